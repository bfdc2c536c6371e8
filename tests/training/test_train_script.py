"""train.py as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gclkern.training.checkpoint import CheckpointError, load_checkpoint
from gclkern.training.data import CorruptImageError
from gclkern.training.data.files import WorkerError
from gclkern.training.processes import Processes
from tests.support import processes
from tests.support.processes import ROOT, train_here

SHORT = ["--epochs", "2", "--device", "cpu"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What train.py prints, in this process, which has everything imported already, and with one thread as in one of its own."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments: object) -> str:
        train_here(*arguments)
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What train.py says to arguments that it refuses, in this process, which has everything imported already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            train_here(*arguments)
        return f"{stopped.value.code} {capsys.readouterr().err}"

    return run


def table(output: str) -> list[str]:
    """The lines of the table at the end."""
    lines = output.splitlines()
    return [line for line in lines[next(place for place, line in enumerate(lines) if "top-1" in line) :] if not line.startswith(("/", "runs/"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of the default run, shortened."""
    folder = tmp_path_factory.mktemp("default") / "run"
    return folder, processes.train(*SHORT, "--retrain-epochs", "2", "--no-pictures", "--out", folder)


def test_the_table_compares_the_stages_with_the_baseline(run: tuple[Path, str]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in table(run[1])}
    assert rows["top-1"] == ["balanced", "many", "medium", "few", "ECE", "NLL", "ECE/T", "NLL/T"]
    assert all(len(rows[name]) == 9 for name in ("baseline", "stage-1", "stage-2"))


def test_the_run_says_what_it_does(run: tuple[Path, str]) -> None:
    lines = run[1].splitlines()
    assert lines[0] == "digits-lt: 472 training images, 359 test images"
    assert lines[3] == "augmentation of training images: crop"
    assert lines[4:7] == [
        "baseline: ce, 4 epochs of 7 steps (448 images), batch 64, lr 0.1 cosine, weight decay 0.0005, instance sampler, mixup 0.2, scale 30",
        "stage-1: gcl, 2 epochs of 7 steps (448 images), batch 64, lr 0.1 cosine, weight decay 0.0005, instance sampler, mixup 0.2, noise_mul 0.5, scale 30",
        (
            "stage-2: gcl, 2 epochs of 7 steps (448 images), batch 64, lr 0.02 cosine, weight decay 0.0005, cben sampler, mixup 0.2, trains the classifier, "
            "noise_mul 0.5, margin 0.1, scale 20, gamma 1"
        ),
    ]
    assert lines[7].startswith("estimated time: ")
    assert "few: 95% intervals of 107 test images: baseline " in run[1]


def test_the_temperature_is_in_the_checkpoints(run: tuple[Path, str]) -> None:
    reports = json.loads((run[0] / "summary.json").read_text())["reports"]
    for name, report in reports.items():
        assert load_checkpoint(run[0] / f"{name}.pt")["temperature"] == report["calibrated"]["temperature"] > 0


def test_the_baseline_has_the_same_budget(run: tuple[Path, str]) -> None:
    with (run[0] / "metrics.csv").open() as file:
        epochs = [row["phase"] for row in csv.DictReader(file)]
    assert epochs.count("baseline") == epochs.count("stage-1") + epochs.count("stage-2") == 4


def test_the_folder_is_complete(run: tuple[Path, str]) -> None:
    files = {path.name for path in run[0].iterdir()}
    assert files >= {"config.json", "metrics.csv", "summary.json", "last.pt", "baseline.pt", "stage-1.pt", "stage-2.pt"}
    assert not [name for name in files if name.endswith(".partial")]
    summary = json.loads((run[0] / "summary.json").read_text())
    assert set(summary["reports"]) == {"baseline", "stage-1", "stage-2"}
    assert json.loads((run[0] / "config.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("name", ["stage-2.pt", "."])
def test_evaluate_repeats_the_report(run: tuple[Path, str], name: str, train: Callable[..., str]) -> None:
    expected = next(line.split() for line in table(run[1]) if line.startswith("stage-2"))
    assert table(train("--evaluate", run[0] / name))[1].split() == expected


def test_a_finished_run_resumes_to_the_same_table(run: tuple[Path, str], train: Callable[..., str]) -> None:
    before = json.loads((run[0] / "summary.json").read_text())["seconds"]
    assert table(train("--resume", run[0])) == table(run[1])
    assert json.loads((run[0] / "summary.json").read_text())["seconds"] > before / 2, "the time before counts"


@pytest.mark.slow
def test_pictures(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    processes.train("--resume", folder, "--pictures")
    names = ("class-accuracy", "class-confusion", "curves", "group-confusion", "tsne", "worst-errors")
    assert sorted(folder.glob("*.png")) == [folder / f"{name}.png" for name in names]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--epochs", "0"], "--epochs: 0 is not a whole number of at least 1"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--method", "magic"], "invalid choice: 'magic'"),
    (["--data", "cifar10-lt", "--data-dir", "nowhere"], "--download to fetch it"),
    (["--model", "small-cmm"], "unknown network 'small-cmm'"),
    (["--method", "ce", "--sampler", "cben"], "there is no stage 2"),
    (["--accumulate", "5"], "does not divide"),
    (["--resume", "nowhere"], "there is no checkpoint at nowhere; give the folder of a run or its last.pt"),
    (["--evaluate", "nowhere"], "there is no checkpoint at nowhere; give the folder of a run, or a checkpoint in it such as stage-1.pt"),
    (["--evaluate", "README.md"], "README.md cannot be read as a checkpoint"),
    (["--out", "README.md"], "README.md cannot be written (File exists)"),
    (["--resume", "runs/a", "--evaluate", "runs/a"], "not allowed with argument"),
    (["--augment", "crop,flop"], "unknown augmentation 'flop' in 'crop,flop'"),
    (["--data-dir", "pictures"], "--data-dir does nothing with --data digits-lt; for images of your own add --data folder"),
    (["--image-size", "32"], "--image-size does nothing with --data digits-lt; for images of your own add --data folder"),
    (["--skip-corrupt", "--data", "cifar10-lt"], "--skip-corrupt does nothing with --data cifar10-lt; leave it out"),
    (["--data", "folder", "--imbalance", "10"], "--imbalance does nothing with --data folder"),
    (["--data", "folder", "--train-list", "train.txt"], "--train-list does nothing with --data folder"),
    (["--download"], "--download does nothing with --data digits-lt"),
    (["--tau", "0.5"], "--tau does nothing without --retrain tau-norm or --retrain post-hoc-la"),
    (["--method", "ce", "--retrain-lr", "0.5"], "would do nothing: --retrain-lr"),
    (["--shard-classes", "--method", "la"], "the loss of stage-1 takes the logits of all classes"),
    (["--shard-classes", "--amp", "fp16"], "take --amp bf16"),
    (["--stage1", "nowhere", "--retrain", "none"], "there is no stage 2 to follow nowhere"),
    (["--stage1", "tests"], "--stage1: there is no checkpoint at tests; give stage-1.pt of a finished run with the method gcl"),
])  # fmt: skip
def test_bad_arguments_get_a_clear_error(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*arguments)


@pytest.mark.parametrize(("error", "message"), [
    (ValueError("`lr` is odd"), "train.py: error: --lr is odd"),
    (OSError("no disk"), "train.py: error: no disk"),
    (ImportError("no torchvision"), "train.py: error: no torchvision"),
    (CheckpointError("damaged"), "train.py: error: damaged"),
    (CorruptImageError("a.png"), "train.py: error: a.png"),
    (WorkerError("take `workers=0`"), "train.py: error: take --workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "Bus error.); take --workers 0"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "take a smaller --batch-size"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"), "take a smaller --image-size or --batch-size"),
    (KeyboardInterrupt(), "train.py: interrupted"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero; this is a fault of the program, please report it with "),
])  # fmt: skip
def test_no_error_is_a_traceback(error: BaseException, message: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("gclkern.training.data.load_data", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown = refused()
    assert message in shown
    assert "Traceback" not in shown
    reports = list(tmp_path.iterdir())
    assert [("Traceback" in file.read_text(), str(file) in shown) for file in reports] == [(True, True)] * isinstance(error, ZeroDivisionError)


def test_a_reader_that_has_seen_enough() -> None:
    """As in `python train.py --help | head -1`: neither an error nor the interpreter's complaint at its end."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--help"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """To leave NCCL's process group in order all must: the others, which wait for this one, would keep its error from being seen."""
    left: list[Processes] = []
    monkeypatch.setattr(Processes, "close", left.append)
    options = ["--no-baseline", "--no-pictures", "--device", "cpu", "--out", tmp_path / "run"]
    assert "the loss of epoch 1 is nan; train with a lower --lr" in refused("--epochs", "1", "--lr", "1e30", "--method", "ce", *options)
    assert not left


def test_a_run_keeps_its_arguments(run: tuple[Path, str], refused: Callable[..., str]) -> None:
    assert "--lr: the run was started with None, now it is 0.3" in refused("--resume", run[0], "--lr", "0.3")
    assert "already holds a run" in refused("--out", run[0])
    assert "holds a finished network" in refused("--resume", run[0] / "stage-1.pt")


def test_stages_2_share_a_stage_1(run: tuple[Path, str], tmp_path: Path, train: Callable[..., str], refused: Callable[..., str]) -> None:
    """A run on a finished stage 1 ends as one that trained it, bit by bit, however often it is evaluated; a stage 1 of other settings is refused."""
    options = [*SHORT, "--retrain-epochs", "2", "--no-pictures", "--eval-every", "2", "--stage1", run[0] / "stage-1.pt"]
    train(*options, "--out", tmp_path / "run")
    expected, found = (json.loads((folder / "summary.json").read_text()) for folder in (run[0], tmp_path / "run"))
    assert found["reports"] == {"stage-2": expected["reports"]["stage-2"] | {"calibrated": None}}  # it has not trained stage 1 to calibrate with
    assert [phase["name"] for phase in found["phases"]] == ["baseline", "stage-1", "stage-2"]
    message = refused(*options, "--seed", "1", "--out", tmp_path / "other")
    assert "stage-1.pt was trained with --seed 0, this run has 1" in message
    options[-1] = run[0] / "last.pt"
    assert "give stage-1.pt of a finished run" in refused(*options, "--out", tmp_path / "other")
    options[-1] = run[0] / "stage-1.pt"  # of DRO-LT that is cross entropy, before its robust phase
    message = refused(*options, "--method", "dro-lt", "--retrain", "crt", "--out", tmp_path / "other")
    assert "holds stage-1 of kind network; give stage-1-classifier.pt of a finished run with the method dro-lt" in message


@pytest.mark.slow
def test_a_checkpoint_of_other_classes_is_refused(run: tuple[Path, str], tmp_path: Path, train: Callable[..., str], refused: Callable[..., str]) -> None:
    from PIL import Image

    for part, images in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(images):
                Image.fromarray(np.full((12, 12, 3), 40 * index + 60 * (name == "b"), np.uint8)).save(tmp_path / part / name / f"{index}.png")
    folder = ["--data", "folder", "--data-dir", tmp_path, "--workers", "1", "--image-size", "16"]
    assert "the checkpoint has 10 classes, folder has 2" in refused("--evaluate", run[0], *folder)
    short = [*SHORT, *folder, "--model", "small-cnn", "--batch-size", "4", "--retrain", "crt", "--retrain-epochs", "1"]
    assert "stage-2" in train(*short, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["class_names"] == ["a", "b"]
    assert (tmp_path / "run" / "curves.png").exists()
    assert not (tmp_path / "run" / "tsne.png").exists(), "four test images are too few"
    for part in ("train", "test"):
        (tmp_path / part / "b").rename(tmp_path / part / "c")
    assert "class 1 is 'b' in the checkpoint and 'c' in folder; evaluate" in refused("--evaluate", tmp_path / "run")
    assert "class 1 is 'b' in the checkpoint and 'c' in folder; continue with the data" in refused("--resume", tmp_path / "run")
    broken = tmp_path / "train" / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert str(broken) in refused(*short, "--out", tmp_path / "broken")
    assert "1 training image left out: " in train(*short, "--out", tmp_path / "skipped", "--skip-corrupt")


@pytest.mark.parametrize("options", [
    ["--amp", "bf16", "--channels-last", "--ema", "0.9", "--accumulate", "2", "--retrain", "lws", "--retrain-epochs", "1"],
    ["--amp", "fp16", "--deterministic", "--retrain", "ncm", "--holdout", "0.2", "--method", "ldam-drw"],
])  # fmt: skip
@pytest.mark.slow
def test_options_of_speed(tmp_path: Path, options: list[str]) -> None:
    assert "stage-2" in processes.train(*SHORT, *options, "--no-baseline", "--no-pictures", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "best.pt").exists() is ("--holdout" in options)


@pytest.mark.gpu
def test_a_captured_step_trains_as_a_plain_one(tmp_path: Path, train: Callable[..., str]) -> None:
    found = []
    for option in ("--capture", "--no-capture"):
        train("--epochs", "3", "--retrain-epochs", "2", "--no-baseline", "--no-pictures", "--deterministic", option, "--out", tmp_path / option)
        with (tmp_path / option / "metrics.csv").open() as file:
            found.append(torch.tensor([float(row["loss"]) for row in csv.DictReader(file)]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
