"""A classifier from its checkpoint alone: its predictions are those of the evaluation, on the command line and in exported form, too."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gclkern.training import export, predict
from gclkern.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from gclkern.training.classifier import Classifier, load_classifier
from gclkern.training.config import RunConfig
from gclkern.training.data import CorruptImageError, DataSplits, load_data
from gclkern.training.evaluation import predict as predict_logits
from gclkern.training.network import build_network, network_checkpoint
from gclkern.training.processes import Processes
from gclkern.training.recipes import plan
from tests.support.processes import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits-lt")


@pytest.fixture(scope="module")
def checkpoint(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained cosine classifier whose batch statistics are not the initial ones, so that eval mode matters."""
    torch.manual_seed(0)
    phase = plan("gcl", None, "digits-lt", digits.class_counts)[0]
    network = build_network("small-cnn", phase.head, 10, in_channels=1, image_size=8)
    network.scale.fill_(30.0)
    network.train()(torch.randn(64, 1, 8, 8))
    state = network_checkpoint(network, phase, digits, RunConfig())
    state["temperature"] = 2.5
    path = tmp_path_factory.mktemp("run") / "stage-1.pt"
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Classifier:
    return load_classifier(checkpoint)


@pytest.fixture(scope="module")
def photos(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images as files, three folders deep and of names that need care, with one file that is damaged."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index, name in enumerate(("0.png", "a, b.png", "more/two\nlines.png")):
        Image.fromarray(digits.test.images[index, 0].numpy()).save(folder / name)  # type: ignore[attr-defined]
    (folder / "damaged.png").write_bytes(b"not a picture")
    return folder


def test_predictions_are_those_of_the_evaluation(classifier: Classifier, digits: DataSplits) -> None:
    evaluated = predict_logits(classifier.network, digits.test, Processes.single(CPU))[0][:20]
    images = [Image.fromarray(np.asarray(image[0])) for image in digits.test.images[:20]]  # type: ignore[attr-defined]
    logits = classifier(torch.stack([classifier.transform(image) for image in images]))
    torch.testing.assert_close(logits, evaluated / 2.5, rtol=1e-5, atol=1e-5)
    found = classifier.predict(images, top=3, batch_size=7)
    share, label = (evaluated / 2.5).softmax(1).topk(3, dim=1)
    assert [[one.label for one in row] for row in found] == label.tolist()
    torch.testing.assert_close(torch.tensor([[one.probability for one in row] for row in found]), share, rtol=1e-5, atol=1e-6)
    assert found[0][0].name == digits.class_names[found[0][0].label]  # type: ignore[index]


def test_a_classifier_stays_in_eval_mode(classifier: Classifier) -> None:
    images = torch.randn(4, 1, 8, 8)
    assert not classifier.train().training
    torch.testing.assert_close(classifier(images)[:1], classifier(images[:1]))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_files_as_the_command_line_has_them(checkpoint: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table, lines = tmp_path / "found.csv", tmp_path / "found.jsonl"
    assert predict.main([str(checkpoint), str(photos), "--top", "2", "--csv", str(table)]) == 1
    errors = capfd.readouterr().err
    assert "damaged.png cannot be read as an image" in errors and "1 of 4 files could not be read" in errors
    assert predict.main([str(checkpoint), str(photos), "--top", "2", "--json-lines", str(lines)]) == 1
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "class 1", "probability 1", "class 2", "probability 2"]
    objects = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row[0] for row in rows] == [item["path"] for item in objects] == sorted(str(path) for path in photos.rglob("*.png") if path.name != "damaged.png")
    assert [row[1] for row in rows] == [item["predictions"][0]["name"] for item in objects]
    assert predict.main([str(checkpoint), str(photos / "more")]) == 0
    assert "two\\nlines.png  " in capfd.readouterr().out
    assert predict.main([str(checkpoint), str(photos), "--top", "2", "--json-lines", "-"]) == 1
    assert capfd.readouterr().out == lines.read_text()


def test_the_folder_of_a_run_stands_for_its_last_stage(checkpoint: Path, tmp_path: Path, classifier: Classifier) -> None:
    for name in ("stage-1.pt", "stage-2.pt"):
        (tmp_path / name).write_bytes(checkpoint.read_bytes() if name == "stage-2.pt" else b"another network")
    (tmp_path / "summary.json").write_text(json.dumps({"phases": [{"name": "stage-1"}, {"name": "stage-2"}]}))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_classifier(tmp_path)(images), classifier(images))


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_without_a_temperature_a_note_says_so(
    temperature: float | None, checkpoint: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stage-1.pt"
    save_checkpoint(path, {**load_checkpoint(checkpoint), "temperature": temperature})
    note = "note: no temperature was fitted, so probabilities may be too large or too small; train with --holdout 0.1\n"
    predict.main([str(path), str(photos / "0.png"), "--csv", "-"])
    output, errors = capfd.readouterr()
    assert (errors, output[:13]) == (note if temperature is None else "", "path,class 1,")
    export.main([str(path), str(tmp_path / "model.pt2")])
    assert (note in capfd.readouterr().err) is (temperature is None)


def test_what_cannot_be_used_is_refused(checkpoint: Path, photos: Path, tmp_path: Path, classifier: Classifier) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a folder without a finished run; give a checkpoint in it .here: stage-1.pt."):
        load_classifier(checkpoint.parent)
    with pytest.raises(FileNotFoundError, match="is a folder without a finished run; it holds no checkpoint either; give the folder of another run"):
        load_classifier(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        load_classifier(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "other.pt", {"epoch": 1})
    with pytest.raises(CheckpointError, match="holds no network"):
        load_classifier(tmp_path / "other.pt")
    with pytest.raises(CorruptImageError, match=r"damaged\.png"):
        classifier.predict([photos / "damaged.png"])
    with pytest.raises(TypeError, match="put it into a list"):
        classifier.predict("0.png")
    with pytest.raises(ValueError, match="top and batch_size must be at least 1"):
        classifier.predict([], top=0)
    with pytest.raises(SystemExit, match=r"predict: error: .*nowhere does not exist"):
        predict.main([str(checkpoint), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"export: error: .*must end in .onnx or .pt2"):
        export.main([str(checkpoint), str(tmp_path / "model.txt")])


def code_of_the_page(word: str) -> str:
    """The block of docs/training.md that has this word."""
    blocks = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if word in block)
    return str(block)


def test_export_to_torch(checkpoint: Path, classifier: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    export.main([str(checkpoint), str(tmp_path / "model.pt2")])
    assert capsys.readouterr().out.endswith(f"MB; takes images (N, 1, 8, 8), returns logits (N, {len(classifier.class_names)})\n")
    extra = {export.METADATA: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    for count in (1, 5):
        images = torch.randn(count, 1, 8, 8)
        torch.testing.assert_close(program.module()(images), classifier(images))
    assert json.loads(json.loads(extra[export.METADATA])["class_names"]) == classifier.class_names
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "images": images}
    exec(code_of_the_page("torch.export.load"), names)
    torch.testing.assert_close(names["logits"], classifier(images))


@pytest.mark.slow  # the exporter and the runtime take ten seconds to import
def test_export_to_onnx(checkpoint: Path, classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    export.main([str(checkpoint), str(tmp_path / "model.onnx")])
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 5):
        images = torch.randn(count, 1, 8, 8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), classifier(images), rtol=1e-4, atol=1e-4)  # other convolutions, logits up to 12
    monkeypatch.chdir(tmp_path)
    names = {"onnxruntime": runtime, "json": json, "images": images.numpy()}
    exec(code_of_the_page("InferenceSession"), names)
    torch.testing.assert_close(torch.from_numpy(names["logits"]), classifier(images), rtol=1e-4, atol=1e-4)
    assert names["names"] == classifier.class_names
    assert session.get_modelmeta().custom_metadata_map.keys() >= {"resize", "crop", "mean", "std"}, "which the page names"


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "phase"), [("tde", 0), ("bbn", 0), ("oltr", 1)])
def test_methods_with_networks_of_their_own(method: str, phase: int, *, onnx: bool, digits: DataSplits, tmp_path: Path) -> None:
    """A checkpoint is enough for their kind of network, too; what predicts, here and exported, is the form of inference: TDE's has its correction."""
    torch.manual_seed(0)
    planned = plan(method, None, "digits-lt", digits.class_counts)[phase]
    network = build_network(f"{planned.backbone}:small-cnn", planned.head, 10, in_channels=1, image_size=8)
    network.train()(torch.randn(64, 1, 8, 8))  # moves the mean feature and the statistics
    if method == "oltr":
        network.head.memory.data.normal_()
    checkpoint = network_checkpoint(network, planned, digits, RunConfig(method=method))
    checkpoint["temperature"] = 2.5
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    classifier = load_classifier(tmp_path / "model.pt")
    evaluated = predict_logits(network, digits.test, Processes.single(CPU))[0][:20]
    images = torch.stack([classifier.transform(Image.fromarray(np.asarray(image[0]))) for image in digits.test.images[:20]])  # type: ignore[attr-defined]
    torch.testing.assert_close(classifier(images), evaluated / 2.5, rtol=1e-5, atol=1e-5)
    if method == "tde":
        network.head.alpha.zero_()
        assert float((network(images) - evaluated).detach().abs().max()) > 0.1, "predictions have the correction"
    if onnx:
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        export.main([str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")])
        (exported,) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images[:3].numpy()})
        found = torch.from_numpy(exported)
    else:
        export.main([str(tmp_path / "model.pt"), str(tmp_path / "model.pt2")])
        found = torch.export.load(tmp_path / "model.pt2").module()(images[:3])
    torch.testing.assert_close(found, classifier(images[:3]), rtol=1e-4, atol=1e-4)


def test_images_in_memory_may_have_any_mode(classifier: Classifier) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    plain = classifier.transform(Image.fromarray(values))
    for image in (Image.fromarray(values.astype(np.uint16) * 257), Image.fromarray(values.astype(np.float32) / 255), Image.fromarray(values).convert("RGBA")):
        assert torch.equal(classifier.transform(image), plain), image.mode
