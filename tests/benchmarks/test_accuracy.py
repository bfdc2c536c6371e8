"""The tables of accuracies: which runs they are, how they are run, stopped and continued, and what is made of their results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import train
from benchmarks import accuracy, render_results
from benchmarks.accuracy import METHODS, TABLES, Bench, Run, Table, comparison, run_all, runs_of, tables
from benchmarks.common import RESULTS
from benchmarks.published import MARKS, PUBLISHED, published_top1
from gclkern.training.recipes import plan, plan_run

# Stands for train.py: writes down how it was started and leaves what a run leaves. Seed 7 works until it is told to stop, seed 8 does not even stop then.
TRAIN = """
import json, signal, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = Path(given.get("--resume") or given["--out"])
begin = time.monotonic()
if given.get("--method") == "la":
    sys.exit("made to fail")
folder.mkdir(exist_ok=True)
if given.get("--seed") in ("7", "8"):
    def stop(*_):
        if given["--seed"] == "7":
            (folder / "last.pt").write_text("a checkpoint")
            sys.exit()
    signal.signal(signal.SIGTERM, stop)
    time.sleep(60)
time.sleep(0.2)
(folder / "stage-1.pt").write_text("a checkpoint")
if "tau-norm" not in sys.argv:
    (folder / "metrics.csv").write_text("phase,epoch,loss,top1\\nstage-1,1,0.5,\\nstage-1,2,0.25,0.75\\n")
report = {"top1": 0.75, "groups": {"many": 0.75}, "ece": 0.1}
summary = {"reports": {"stage-1": report}, "phases": [{"name": "stage-1", "epochs": 2}], "config": {"amp": "off", "out": str(folder)},
           "class_counts": [2, 1], "groups": {"many": [0, 1]}, "argv": sys.argv[1:], "times": [begin, time.monotonic()]}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    script = tmp_path / "fake_train.py"
    script.write_text(TRAIN)
    return Bench(tmp_path / "runs", tmp_path / "results", "nowhere", threads=1, train=script)


def made(method: str, seed: int = 0, scale: float = 1.0) -> Run:
    return Run("cifar10-lt", 100.0, method, seed, scale, ())


def summary(bench: Bench, run: Run) -> Any:
    return json.loads((bench.folder(run) / "summary.json").read_text())


def test_train_understands_every_run() -> None:
    """No two runs of all tables share a file, unless they are the same run."""
    found: dict[str, list[str]] = {}
    for table in TABLES.values():
        for run in runs_of(table):
            phases = plan_run(train.parse_arguments(run.arguments).config, [500, 50, 5], 1)
            assert (phases[-1].name == "stage-2") >= (run.base is not None)
            assert found.setdefault(run.name, run.arguments) == run.arguments
    assert len(found) > 200


@pytest.mark.parametrize(("method", "scale", "epochs"), [
    ("gcl", 1.0, [200, 30]),
    ("dro-lt", 1.0, [200, 80, 20]),
    ("gcl", 0.1, [20, 3]),
    ("dro-lt", 0.1, [20, 2, 1]),
])  # fmt: skip
def test_schedules(method: str, scale: float, epochs: list[int]) -> None:
    config = train.parse_arguments(made(method, scale=scale).arguments).config
    assert [phase.epochs for phase in plan_run(config, [500, 5], 1)] == epochs


def test_published_numbers_belong_to_methods() -> None:
    assert {method for _, _, method in PUBLISHED} <= set(METHODS)
    assert PUBLISHED["cifar100-lt", 100.0, "gcl"] == 48.71
    assert PUBLISHED["cifar10-lt", 200.0, "ce"] == 65.68


def test_a_stage_2_waits_for_its_stage_1(bench: Bench) -> None:
    stage1, stage2 = made("gcl-stage1"), made("gcl")
    assert run_all(bench, [stage2, stage1], jobs=2, seconds=60) == []
    arguments = summary(bench, stage2)["argv"]
    assert arguments[arguments.index("--stage1") + 1] == str(bench.folder(stage1) / "stage-1.pt")
    assert summary(bench, stage2)["times"][0] > summary(bench, stage1)["times"][1]


def test_a_stage_2_trains_its_stage_1_where_that_is_not_there(bench: Bench) -> None:
    assert run_all(bench, [made("gcl")], jobs=1, seconds=60) == []
    assert "--stage1" not in summary(bench, made("gcl"))["argv"]


def test_a_stage_2_without_epochs_has_no_curves(bench: Bench) -> None:
    assert run_all(bench, [made("gcl-tau-norm")], jobs=1, seconds=60) == []
    assert json.loads(bench.result(made("gcl-tau-norm")).read_text())["curves"] == {}


@pytest.mark.slow
def test_runs_side_by_side(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    alive: list[int] = []
    start = Bench.start

    def counted(self: Bench, run: Run) -> subprocess.Popen[bytes]:
        processes.append(start(self, run))
        alive.append(sum(process.poll() is None for process in processes))
        return processes[-1]

    monkeypatch.setattr(Bench, "start", counted)
    run_all(bench, [made("ce", seed) for seed in range(4)], jobs=2, seconds=60)
    assert len(alive) == 4 and max(alive) == 2


def test_what_is_finished_is_not_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(bench, [made("ce")], jobs=1, seconds=60)
    monkeypatch.setattr(Bench, "start", lambda *_: pytest.fail("started"))
    assert run_all(bench, [made("ce")], jobs=1, seconds=60) == []


def test_a_failure_takes_its_stage_2_along(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(METHODS, "gcl-stage1", METHODS["la"])
    assert run_all(bench, [made("gcl-stage1"), made("gcl"), made("ce")], jobs=1, seconds=60) == [made("gcl-stage1"), made("gcl")]
    assert f"failed, see {bench.runs / made('gcl-stage1').name}.log" in capsys.readouterr().out
    assert "made to fail" in (bench.runs / f"{made('gcl-stage1').name}.log").read_text()
    assert bench.result(made("ce")).exists()


def test_time_over_and_continued(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made("ce", 7), made("ldam-drw", 7)]
    while not (bench.folder(runs[0]) / "last.pt").exists():  # a slow machine may need more than a second to start a process
        assert run_all(bench, runs, jobs=1, seconds=1.0) == []
    assert "0 of 2 runs are finished; the same command continues" in capsys.readouterr().out
    assert not bench.folder(runs[1]).exists()
    assert run_all(bench, runs[:1], jobs=1, seconds=60) == []
    assert summary(bench, runs[0])["argv"] == ["--resume", str(bench.folder(runs[0])), "--data-dir", "nowhere"]


def test_a_run_that_does_not_stop_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "GRACE", 0.5)
    assert run_all(bench, [made("ce", 8)], jobs=1, seconds=2.0) == []
    assert not bench.result(made("ce", 8)).exists()


def result(method: str, seed: int, top1: float, *, scale: float = 1.0, few: float | None = None, device: str = "A made-up GPU") -> dict[str, Any]:
    report = {"top1": top1, "groups": {"many": 0.5} | ({} if few is None else {"few": few}), "ece": 0.125}
    return {
        "data": "cifar10-lt", "imbalance": 100.0, "method": method, "seed": seed, "epochs_scale": scale,
        "phases": [{"name": "stage-1", "epochs": 200, "mixup": 1.0}, {"name": "stage-2", "epochs": 0, "head": "cosine"}],
        "settings": {"amp": "off", "augment": None, "model": None}, "class_counts": [50] * 10,
        "machine": {"device": device, "cores": 2, "cpu": "x86_64"}, "code": "0123456789ab",
        "reports": {"stage-1": {}, "stage-2": report, "best on held-out": {**report, "top1": 0.99}},
        "curves": {"phase": ["stage-1", "stage-2", "stage-2", "stage-2"], "top1": [0.9, None, top1 + 0.01, top1]} if method != "ce" else {},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "accuracy"
    folder.mkdir()
    for index, found in enumerate(
        [result("gcl", 0, 0.82), result("gcl", 1, 0.84), result("ce", 0, 0.7, few=0.25), result("ce", 0, 0.4, scale=0.05, device="CPU")]
    ):
        (folder / f"{index}.json").write_text(json.dumps(found))
    return folder


def test_tables_of_results(results: Path) -> None:
    full, short = tables(results).split("\n\n**")
    assert "| GCL | 200 | 2 | 83.00 ± 1.41 | 84.00 ± 1.41 | 82.68 | 50.00 ± 0.00 |  |  | 12.50 ± 0.00 |" in full.splitlines()
    assert "| cross entropy | 200 | 1 | 70.00 |  | 70.70 | 50.00 |  | 25.00 | 12.50 |" in full.splitlines()
    assert full.startswith("**CIFAR-10-LT, imbalance 100**: the full published schedules. A made-up GPU, float32; code `0123456789ab`.")
    assert "SHORT schedules, 0.05 of the published epochs" in short
    assert "2 CPU cores (x86_64), float32" in short
    assert "40.00" in short and "40.00" not in full


def test_comparison_with_published_numbers(results: Path) -> None:
    """Full schedules alone, in the order of their accuracy."""
    _, _, *lines = comparison(results).splitlines()
    assert lines == [
        "| CIFAR-10-LT, 100 | cross entropy | 1 | 70.00 |  | 70.70 | -0.70 | 464,144 | crop, flip, mixup |",
        "| CIFAR-10-LT, 100 | GCL | 2 | 83.00 ± 1.41 | 84.00 ± 1.41 | 82.68 | +0.32 | 464,144 | crop, flip, mixup |",
    ]


def test_marks_of_published_numbers(results: Path) -> None:
    """Strong augmentation and long training, by a mark in every table, which the text beside it explains."""
    found = {key: published_top1(*key) for key in PUBLISHED}
    of_logit_adjustment = {(data, method): top1 for (data, _, method), top1 in found.items() if method in ("la", "post-hoc-la")}
    assert of_logit_adjustment == {  # of its authors' README
        ("cifar10-lt", "la"): "77.89‡", ("cifar100-lt", "la"): "44.06‡",
        ("cifar10-lt", "post-hoc-la"): "77.32‡", ("cifar100-lt", "post-hoc-la"): "44.07‡",
    }  # fmt: skip
    assert (found["cifar100-lt", 100.0, "dro-lt"], found["cifar100-lt", 10.0, "dro-lt"], found["cifar100-lt", 100.0, "gcl"]) == ("47.33†", "63.41†", "48.71")
    assert {key[2] for key, top1 in found.items() if top1.endswith("‡")} == {"la", "post-hoc-la"}
    strong = {name for name, method in METHODS.items() if _augment(method.options[1]) == "crop,flip,autoaugment,cutout"}
    assert {key[2] for key, top1 in found.items() if "†" in top1} == strong & {key[2] for key in PUBLISHED}
    (results / "la.json").write_text(json.dumps(result("la", 0, 0.75)))
    assert "| logit adjustment | 200 | 1 | 75.00 | 76.00 | 77.89‡ |" in tables(results)
    assert "| CIFAR-10-LT, 100 | logit adjustment | 1 | 75.00 | 76.00 | 77.89‡ | -2.89 |" in comparison(results)
    for section in ("comparison", "accuracy", "methods"):
        text = render_results.render(section, results.parent if section != "methods" else RESULTS)
        assert all(f"{sign} {meaning}." in text for sign, meaning, _ in MARKS)


def _augment(method: str) -> str | None:
    return plan(method, None, "cifar10-lt", [50, 5])[0].augment


def test_precisions_share_a_row_of_the_comparison_alone(results: Path) -> None:
    in_bfloat16 = result("gcl", 2, 0.86)
    in_bfloat16["settings"]["amp"] = "bf16"
    (results / "bf16.json").write_text(json.dumps(in_bfloat16))
    assert "| CIFAR-10-LT, 100 | GCL | 3 | 84.00 ± 2.00 |" in comparison(results)
    assert [part.count("| GCL |") for part in tables(results).split("\n\n**")] == [1, 1, 0]
    text = {section: render_results.render(section, results.parent) for section in ("comparison", "accuracy")}
    assert "A row may have runs in float32 and in bfloat16 autocast" in text["comparison"]
    assert all("the best of the evaluated epochs" in found for found in text.values())


def test_a_page_shows_these_tables(results: Path) -> None:
    page = results.parent / "accuracy.md"

    def disagreements() -> list[str]:
        return render_results.disagreements([page], results.parent, results.parent)

    page.write_text("no tables\n")
    assert disagreements() == ["no section comparison", "no section accuracy"]
    page.write_text("".join(f"<!-- results:begin {name} -->\n<!-- results:end -->\n" for name in ("comparison", "accuracy")))
    page.write_text(render_results.wanted(page.read_text(), results.parent))
    assert disagreements() == [] and "83.00 ± 1.41" in page.read_text()
    (results / "0.json").write_text(json.dumps(result("gcl", 0, 0.83)))
    assert disagreements() == ["section comparison", "section accuracy"]


@pytest.mark.slow
def test_one_command_trains_and_makes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a user runs it, on digits."""
    table = ["cpu", "--data", "digits-lt", "--imbalance", "20", "--methods", "gcl-stage1", "gcl", "--seeds", "0", "--epochs-scale", "0.025"]
    accuracy.main([*table, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    output = capsys.readouterr().out
    first, second = (json.loads((tmp_path / "results" / f"digits-lt-20-{name}-x0.025-seed0.json").read_text()) for name in ("gcl-stage1", "gcl"))
    assert f"| GCL | 2 + 1 | 1 | {100 * second['reports']['stage-2']['top1']:.2f} |" in output
    assert "DIGITS-LT, imbalance 20" in output and "bfloat16 autocast" in output
    assert first["curves"]["phase"] == ["stage-1", "stage-1"] and first["curves"]["epoch"] == [1, 2] and first["curves"]["loss"][0] > 0
    assert list(second["reports"]) == ["stage-2"] and second["curves"]["phase"] == ["stage-2"]
    assert len(first["code"]) == 12 and first["machine"]["versions"]["torch"] and first["settings"]["amp"] == "bf16"
    assert {path.name for path in (tmp_path / "runs").glob("*stage1*/*.pt")} == {"stage-1.pt"}
    assert not [path for path in (tmp_path / "results").iterdir() if str(tmp_path) in path.read_text()], "a result speaks of a folder of this machine"


def test_options_replace_the_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Run] = []

    def run_all(bench: Bench, runs: list[Run], **_: Any) -> list[Run]:
        asked.extend(runs)
        return []

    monkeypatch.setattr(accuracy, "run_all", run_all)
    accuracy.main(["papers", "--methods", "gcl", "--seeds", "3", "4", "--imbalance", "50", "--results", str(tmp_path)])
    assert asked == runs_of(Table(("cifar100-lt", "cifar10-lt"), (50.0,), ("gcl",), (3, 4)))


def test_runs_side_by_side_stop_when_their_seconds_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the module's docstring: CIFAR-100-LT in full schedules, first seeds first, and no more than the given seconds."""
    asked: dict[str, Any] = {}

    def run(bench: Bench, runs: list[Run], *, jobs: int, seconds: float) -> list[Run]:
        asked.update(runs=runs, jobs=jobs, seconds=seconds)
        return []

    monkeypatch.setattr(accuracy, "run_all", run)
    places = ["--runs", str(tmp_path), "--results", str(tmp_path)]
    accuracy.main(["papers", "--data", "cifar100-lt", "--jobs", "8", "--seconds", "200", *places])
    assert (asked["jobs"], asked["seconds"]) == (8, 200)
    assert {(run.data, run.epochs_scale) for run in asked["runs"]} == {("cifar100-lt", 1.0)}
    assert [run.seed for run in asked["runs"]] == sorted(run.seed for run in asked["runs"])
    assert train.parse_arguments(asked["runs"][0].arguments).config.capture is None, "a step is captured where that is possible"
