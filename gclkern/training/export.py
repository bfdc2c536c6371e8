"""Export a trained network for other runtimes: python -m gclkern.training.export RUN FILE.onnx | FILE.pt2

    python -m gclkern.training.export runs/folder-gcl-ldam-drw model.onnx     # for ONNX Runtime and others
    python -m gclkern.training.export runs/folder-gcl-ldam-drw model.pt2      # for torch.export.load

Input `images` (N, channels, size, size), normalised float32, of any N; output `logits` (N, C), already divided by the temperature: their softmax is the
probability of each class. The file includes class names and image transform: as metadata of an ONNX model, as the extra file `classifier.json` of a .pt2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gclkern.training.checkpoint import CheckpointError
from gclkern.training.classifier import NOT_CALIBRATED, Classifier, load_classifier
from gclkern.training.extras import need

METADATA = "classifier.json"


def description(classifier: Classifier) -> dict[str, str]:
    """What is needed to use the exported network, as JSON values by name."""
    facts = {"class_names": classifier.class_names, "architecture": classifier.architecture, "channels": classifier.in_channels}
    return {name: json.dumps(value) for name, value in (facts | classifier.transform.settings).items()}


def export(classifier: Classifier, path: Path | str) -> None:
    """Write the network to a file of ONNX or of torch.export, by the suffix of `path`.

    Args:
        classifier: what :func:`gclkern.training.load_classifier` returns.
        path: the file to write; it ends in .onnx or .pt2.

    Raises:
        ValueError: another suffix than .onnx and .pt2.
        ImportError: the packages that write ONNX are missing; the message names the command to install them.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"the file to export to must end in .onnx or .pt2, got {path}")
    # two images: torch.export treats a batch size of 1 as a constant
    example = torch.zeros(2, classifier.in_channels, classifier.image_size, classifier.image_size, device=classifier.device)
    batch = {0: torch.export.Dim("batch", min=1)}
    if path.suffix == ".pt2":
        program = torch.export.export(classifier, (example,), dynamic_shapes=(batch,))
        torch.export.save(program, path, extra_files={METADATA: json.dumps(description(classifier))})
        return
    for package in ("onnx", "onnxscript"):
        need(package, "writing ONNX")
    model = torch.onnx.export(
        classifier, (example,), dynamic_shapes=(batch,), dynamo=True, input_names=["images"], output_names=["logits"], external_data=False, verbose=False
    )
    assert model is not None
    model.model.metadata_props.update(description(classifier))
    model.save(path, external_data=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gclkern.training.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="RUN", help="folder of a finished run of train.py, or a checkpoint in it")
    parser.add_argument("file", metavar="FILE", help="file to write, ending in .onnx or .pt2")
    args = parser.parse_args(argv)
    try:
        classifier = load_classifier(args.checkpoint)
        export(classifier, args.file)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        sys.exit(f"export: error: {error}")
    if not classifier.calibrated:
        print(NOT_CALIBRATED, file=sys.stderr)  # noqa: T201
    shape = f"(N, {classifier.in_channels}, {classifier.image_size}, {classifier.image_size})"
    print(f"{args.file}: {Path(args.file).stat().st_size / 1e6:.1f} MB; takes images {shape}, returns logits (N, {len(classifier.class_names)})")  # noqa: T201


if __name__ == "__main__":
    main()
