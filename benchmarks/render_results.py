"""The tables and charts of README and docs/, made from the committed results: python -m benchmarks.render_results

Between `<!-- results:begin NAME -->` and `<!-- results:end -->` stands what this file makes of benchmarks/results/, and nothing else:

    status     which devices have run the code
    summary    the few figures that README shows
    cpu_head   of cpu_head.json, by `python -m benchmarks.cpu_head --json`
    cpu_busy   of cpu_busy.json, by `python -m benchmarks.cpu_busy --json`
    cpu_loops  the part of cpu.json that compares the compiled loops with their peers
    cpu        of cpu.json, by `python -m benchmarks.gpu_report` on a machine without a GPU
    gpu        of the other files, by the same command on machines with one
    accuracy   of the files in accuracy/, by `python -m benchmarks.accuracy`
    own_images of the files in own_images/, by `python -m benchmarks.own_images`
    errors     of numerics/errors.json, by `python -m benchmarks.errors`
    methods    of methods/steps.json, by `python -m benchmarks.methods`, of the recipes, the published numbers and accuracy/

Every section names the code that was measured, and calls its figures stale if the code has changed since. Charts are SVG files in docs/images/. A test fails
where a page or a chart is not what the results say.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import methods
from benchmarks.accuracy import results_of, tables
from benchmarks.common import BOTH, INATURALIST, RESULTS, TORCH_BACKEND
from benchmarks.own_images import table as own_images_table
from benchmarks.provenance import ROOT, kernels_hash, torch_hash, training_hash
from benchmarks.published import PUBLISHED
from gclkern.training.atomic_files import replace_text

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "cpu", "accuracy", "numerics", "methods")))
IMAGES = ROOT / "docs" / "images"
SECTIONS = ("status", "summary", "cpu_head", "cpu_busy", "cpu_loops", "cpu", "gpu", "accuracy", "own_images", "errors", "methods")
CPU_TABLES = ("cpu_head", "cpu_busy")  # files of their own beside the reports
_SECTION = re.compile(r"(<!-- results:begin (\S+) -->\n)(.*?)(<!-- results:end -->)", re.DOTALL)
WHOLE = (BOTH, "pass", "draw", "step", "epoch")  # the phases that are all of an operation
SIZES = {"N": ("rows", "samples"), "C": ("classes", "classes"), "D": ("dim", "dimensions")}
COLORS = ("#0b6e4f", "#d1495b", "#00798c", "#edae49", "#5c4d7d", "#8d6b94", "#30638e", "#7a7a7a", "#444444")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown, in which columns of figures stand to the right."""
    rows = [list(row) for row in rows]
    sides = ["---:" if all(cell[:1].isdigit() for cell in column if cell) else "---" for column in zip(*rows, strict=True)]
    lines = [list(header), ["---", *sides[1:]], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def measured_at(what: str, measured: Iterable[str], now: str) -> str:
    """Which code figures belong to. They are stale if that is not the code of `now`."""
    hashes = sorted(set(measured))
    names = ", ".join(f"`{value}`" for value in hashes)
    if hashes == [now]:
        return f"Measured at {what} {names}."
    return f"**Stale**: measured at {what} {names}, which has changed since."


def status(results: Path) -> str:
    gpus = dict.fromkeys(json.loads(path.read_text())["machine"]["device"] for path in _reports(results, gpu=True))
    simulated = (
        "The kernels are verified without one: in Triton's interpreter, and compiled for sm_80 and sm_90 in a simulator of their PTX that checks every address"
    )
    if gpus:
        return f"**Status:** measured on CPUs and on {' and '.join(gpus)}. {simulated}."
    return f"**Status:** measured on CPUs; **the kernels have not run on a GPU yet**. {simulated}."


def summary(results: Path) -> str:
    """What the library buys, in a few figures."""
    rows, notes = [], []
    if (results / "cpu_head.json").exists():
        data = json.loads((results / "cpu_head.json").read_text())
        ours, plain = (data["results"][name] for name in ("gclkern materialised", "plain torch"))
        shape = data["shape"]
        what = f"head and loss on a CPU: {shape['rows']} samples, {shape['classes']} classes, {shape['dim']} dimensions, {shape['threads']} threads"
        rows.append([f"time of the {what}", f"{ours['milliseconds']:.0f} ms", f"plain PyTorch {plain['milliseconds']:.0f} ms"])
        memory = [f"{row['peak_bytes_beyond_gradients'] / 1e6:.0f} MB" for row in (ours, plain)]
        rows.append(["memory of the same, beyond the gradients", memory[0], f"plain PyTorch {memory[1]}"])
        notes.append(measured_at("CPU code", [data["torch_hash"]], torch_hash()))
    for path in _reports(results, gpu=False):
        data = json.loads(path.read_text())
        cells = {result["contestant"]: result for result in _whole(data) if (result["operation"], result["shape"]) == ("logit loss", INATURALIST.name)}
        if "torch cross entropy" in cells:
            ours, plain, other = (_milliseconds(cells[name]["seconds"]) for name in ("gclkern", "plain torch", "torch cross entropy"))
            what = f"time of the loss alone, from cosines: {INATURALIST.rows} samples, {INATURALIST.classes} classes"
            rows.append([what, f"{ours} ms", f"plain PyTorch {plain} ms; cross entropy without noise {other} ms"])
            notes.append(measured_at("CPU code", [data["torch_hash"]], torch_hash()))
    trained = [result for result in results_of(results / "accuracy") if result["epochs_scale"] == 1 and result["method"] in ("ce", "gcl")]
    for data_set, imbalance in dict.fromkeys((result["data"], result["imbalance"]) for result in trained):
        found = [result for result in trained if (result["data"], result["imbalance"]) == (data_set, imbalance)]
        ours, baseline = (_top1([result for result in found if result["method"] == method]) for method in ("gcl", "ce"))
        published = PUBLISHED.get((data_set, imbalance, "gcl"))
        compared = [f"cross entropy {baseline}"] * bool(baseline) + [f"published for GCL {published:.2f}%"] * (published is not None)
        if ours:
            name = data_set.upper().replace("CIFAR", "CIFAR-")
            rows.append([f"test accuracy of GCL on {name}, imbalance {imbalance:g}", ours, "; ".join(compared)])
    if trained:
        notes.append(measured_at("training code", [result["code"] for result in trained], training_hash()))
    if not rows:
        return "Not measured yet."
    return "\n".join([_table(["what", "gclkern", "for comparison"], rows), "", *dict.fromkeys(notes)])


def _top1(found: Iterable[dict[str, Any]]) -> str:
    """Mean over seeds, with their number."""
    shares = [100 * list(result["reports"].values())[-1]["top1"] for result in found]
    return f"{statistics.mean(shares):.1f}% ({len(shares)} seed{'s' if len(shares) > 1 else ''})" if shares else ""


def cpu_head(results: Path) -> str:
    data = json.loads((results / "cpu_head.json").read_text())
    shape, software = data["shape"], data["software"]
    rows = (
        [
            name,
            f"{row['milliseconds']:.0f}",
            f"{row['times_bare_products']:.2f}" + (" ({:.2f} to {:.2f})".format(*row["interval"]) if "interval" in row else ""),
            *(f"{row[key] / 1e6:.0f}" if key in row else "" for key in ("peak_bytes", "peak_bytes_beyond_gradients")),
            row["includes"],
        ]
        for name, row in data["results"].items()
    )
    return "\n".join(
        [
            f"The head's loss with all gradients on a CPU: {shape['rows']} samples, {shape['classes']} classes, {shape['dim']} dimensions, float32,",
            f"{shape['threads']} threads of {software['machine']}, torch {software['torch']}, gclkern by {software.get('cpu_code', 'torch operators')}.",
            f"Medians of {shape['rounds']} rounds in which the contestants take turns, on idle cores; the ratio is the median of the rounds' ratios.",
            "",
            _table(["", "ms", "x bare products", "peak MB", "beyond the gradients", "includes"], rows),
            "",
            measured_at("CPU code", [data["torch_hash"]], torch_hash()),
            "By `python -m benchmarks.cpu_head --json benchmarks/results/cpu_head.json`.",
        ]
    )


def cpu_busy(results: Path) -> str:
    data = json.loads((results / "cpu_busy.json").read_text())
    software = data["software"]
    rows = (
        [
            f"{row['operation']}: {row['rows']} x {row['classes']}" + (f" x {row['dim']}" if row["operation"] == "head" else ""),
            row["contestant"],
            *(_milliseconds(row[key]) for key in ("alone_seconds", "busy_seconds")),
            f"{row['slowdown']:.2f}",
        ]
        for row in data["results"]
    )
    return "\n".join(
        [
            f"{software['machine']}, torch {software['torch']}, gclkern by {software['cpu_code']}; forward + backward, float32, noise on.",
            f"Medians of {data['rounds']} rounds, alone and beside {software['cores']} processes that compute without end, one for each core.",
            "",
            _table(["", "", "ms alone", "ms beside others", "slowdown"], rows),
            "",
            measured_at("CPU code", [data["torch_hash"]], torch_hash()),
            "By `python -m benchmarks.cpu_busy --json benchmarks/results/cpu_busy.json`.",
        ]
    )


SIZES_OF = {"logit loss": ("rows", "classes"), "DRO-LT bound": ("rows", "classes", "dim"), "centroids": ("classes", "dim"), "noise": ("rows", "classes")}


def cpu_loops(path: Path) -> str:
    """The compiled loops beside the torch backend, plain torch and a cross entropy without noise."""
    data = json.loads(path.read_text())
    machine = data["machine"]
    if not machine.get("cpu_code", "").startswith("compiled loops"):
        return f"Not measured yet: {path.name} is of a machine without the loops."
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in _whole(data):
        if result["dtype"] == "fp32" and result["operation"] in SIZES_OF:
            groups.setdefault((result["operation"], result["shape"]), {})[result["contestant"]] = result
    rows = []
    for (operation, _), found in groups.items():
        ours, plain = found["gclkern"], found["plain torch"]
        size = " x ".join(str(ours[key]) for key in SIZES_OF[operation])
        others = (found.get(name) for name in (TORCH_BACKEND, "plain torch", "torch cross entropy"))
        rows.append(
            [
                f"{operation}, {size}", _milliseconds(ours["seconds"]), *("" if other is None else _milliseconds(other["seconds"]) for other in others),
                f"{plain['seconds'] / ours['seconds']:.1f}", *(f"{result['peak_bytes'] / 1e6:.2g}" for result in (ours, plain)),
            ]
        )  # fmt: skip
    header = ["", "loops, ms", "torch backend, ms", "plain torch, ms", "cross entropy without noise, ms", "plain torch / loops", "loops, MB", "plain torch, MB"]
    return "\n".join(
        [
            f"{machine['cpu_code']}, {machine['cpu']}, torch {machine['versions']['torch']}, float32; medians. Losses: forward + backward. Memory: at the peak",
            "beyond the inputs, with what is returned. Sizes: samples x classes x dimensions; centroids, classes x dimensions, are those of a training set.",
            "",
            _table(header, rows),
            "",
            f"{measured_at('CPU code', [data['torch_hash']], torch_hash())} By `python -m benchmarks.gpu_report` on a machine without a GPU.",
        ]
    )


def _reports(results: Path, *, gpu: bool) -> list[Path]:
    """Reports that are complete: one that still runs is no result."""
    files = (path for path in sorted(results.glob("*.json")) if path.stem not in CPU_TABLES and (path.name != "cpu.json") == gpu)
    return [path for path in files if json.loads(path.read_text())["complete"]]


def _whole(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in data["benchmarks"] if "error" not in result and result["phase"] in WHOLE]


def _operation_table(name: str, found: list[dict[str, Any]]) -> str:
    """Milliseconds and peak megabytes of each contestant, one shape and dtype a row."""
    contestants = list(dict.fromkeys(result["contestant"] for result in found))
    cells = {(result["shape"], result["dtype"], result["contestant"]): result for result in found}
    rows = []
    for shape, dtype in dict.fromkeys((result["shape"], result["dtype"]) for result in found):
        row = [f"{shape}, {dtype}"]
        for contestant in contestants:
            cell = cells.get((shape, dtype, contestant))
            row.append("" if cell is None else f"{_milliseconds(cell['seconds'])} ms, {cell['peak_bytes'] / 1e6:.3g} MB")
        rows.append(row)
    includes = "\n".join(f"- {contestant}: {next(r['includes'] for r in found if r['contestant'] == contestant)}" for contestant in contestants)
    return f"**{name}**, {found[0]['phase']}\n\n{_table(['', *contestants], rows)}\n\n{includes}"


def charts(path: Path) -> dict[str, str]:
    """The SVG files that belong to a report, by name: time and memory of the head against each of its sizes."""
    data = json.loads(path.read_text())
    found = {}
    for size, swept in _sweeps(data).items():
        others = ", ".join(f"{swept[0][key]:,} {name}" for other, (key, name) in SIZES.items() if other != size)
        title = f"Head, forward + backward: {others}, {swept[0]['dtype']}, {data['machine']['device']}"
        for kind, unit in (("time", "ms"), ("memory", "peak MB")):
            found[f"{path.stem}-{kind}-{size}.svg"] = line_chart(title, SIZES[size][1], unit, _series(swept, size, kind))
    return found


def _sweeps(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results in which one size alone changes, by that size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in _whole(data):
        if result["shape"].startswith("sweep "):
            found.setdefault(result["shape"].split()[1], []).append(result)
    return found


def _series(swept: list[dict[str, Any]], size: str, kind: str) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds or megabytes against the size, by contestant. The fastest round is what a machine with other work distorts least."""
    key, factor = ("fastest_seconds", 1e3) if kind == "time" else ("peak_bytes", 1e-6)
    series: dict[str, list[tuple[float, float]]] = {}
    for result in swept:
        series.setdefault(result["contestant"], []).append((result[SIZES[size][0]], factor * result[key]))
    return {name: sorted(line) for name, line in series.items()}


def exponent(line: list[tuple[float, float]]) -> float:
    """The power of the size with which the cost grows at the largest sizes: the slope of the last step, both axes logarithmic. 1 is linear."""
    (x0, y0), (x1, y1) = line[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def _growth(data: dict[str, Any]) -> str:
    sweeps = _sweeps(data)
    columns = [(size, kind) for size in sweeps for kind in ("time", "memory")]
    exponents = {column: {name: exponent(line) for name, line in _series(sweeps[column[0]], *column).items()} for column in columns}
    names = dict.fromkeys(name for column in columns for name in exponents[column])
    rows = ([name, *(f"{exponents[column][name]:.2f}" if name in exponents[column] else "" for column in columns)] for name in names)
    header = ["", *(f"{kind} against {size}" for size, kind in columns)]
    return f"Growth of the head's cost: the exponent between the two largest values of each size, of the fastest rounds; 1 is linear.\n\n{_table(header, rows)}"


def report(path: Path) -> str:
    data = json.loads(path.read_text())
    fixed = [result for result in _whole(data) if not result["shape"].startswith("sweep")]
    machine = data["machine"]
    by = f"; gclkern by {machine.get('cpu_code', 'torch operators')}" if path.name == "cpu.json" else ""
    parts = [f"{machine['device']}, torch {machine['versions']['torch']}{by}. Medians; peak memory beyond the inputs, with what is returned."]
    operations = dict.fromkeys(result["operation"] for result in fixed)
    parts += [_operation_table(name, [result for result in fixed if result["operation"] == name]) for name in operations]
    if _sweeps(data):
        parts.append(_growth(data))
    for chart in charts(path):
        kind, size = chart.removesuffix(".svg").split("-")[-2:]
        parts.append(f"![{kind} against {SIZES[size][1]}](images/{chart})")
    measured = ("CPU code", data["torch_hash"], torch_hash()) if path.name == "cpu.json" else ("kernels", data["kernels_hash"], kernels_hash())
    parts.append(f"{measured_at(measured[0], [measured[1]], measured[2])} By `python -m benchmarks.gpu_report`.")
    return "\n\n".join(parts)


def accuracy(results: Path) -> str:
    found = tables(results / "accuracy")
    if not found:
        return "Not measured yet: `python -m benchmarks.accuracy`."
    explained = [
        "In percent, of the last epoch on the balanced test set: top-1, mean accuracy of the classes with many (> 100), medium and few (< 20) training images,",
        "expected calibration error (15 bins); mean and standard deviation over seeds. Published numbers are of full schedules, and the",
        "releases choose their epoch on the test set: the best of the evaluated epochs, so chosen, is for comparison with them alone.",
    ]
    code = measured_at("training code", [result["code"] for result in results_of(results / "accuracy")], training_hash())
    source = "By `python -m benchmarks.accuracy`; settings and curves of each run are in `benchmarks/results/accuracy/`."
    return "\n".join([*explained, "", found, "", code, source])


def own_images(results: Path) -> str:
    found = results_of(results / "own_images")
    if not found:
        return "Not measured yet: `python -m benchmarks.own_images`."
    counts = found[0]["class_counts"]
    explained = [
        f"{len(counts)} classes of CIFAR-100 with {max(counts)} to {min(counts)} training images, {sum(counts):,} in all, and 100 test images each.",
        "In percent, of the last epoch: top-1, mean accuracy of the classes with many (> 100), medium and few (< 20) training images; mean and standard",
        "deviation over seeds. The temperature is fitted on half of the test images and judged on the other half; a user's run fits it on training images,",
        "by `--holdout`.",
    ]
    code = measured_at("training code", [result["code"] for result in found], training_hash())
    return "\n".join([*explained, "", own_images_table(results / "own_images"), "", code, "By `python -m benchmarks.own_images`, which says how."])


def _setting(name: str, value: Any) -> str:
    """One number of a case in words."""
    return str(value) if name == "dtype" else f"{name} {value:,.0f}" if value >= 10 else f"{name} {value:g}"


def errors(path: Path) -> str:
    """One table an operation: a case a row, an implementation a column."""
    data = json.loads(path.read_text())
    names = {"torch": "torch backend", "triton": "kernels, interpreted"}
    head = [
        f"The largest error of 8 rows against float64 on the same inputs, torch {data['torch']} on a CPU: of the loss in units in the last place of float32",
        "(ULP), and of the gradient of the target's logit (of the features, where there are no logits), relative. Each case changes one number of the first.",
    ]
    parts = ["\n".join(head)]
    for operation in dict.fromkeys(row["case"]["operation"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["case"]["operation"] == operation]
        base = {name: value for name, value in rows[0]["case"].items() if name not in ("operation", "implementation")}
        if operation == "DRO-LT bound":
            base = {name: base[name] for name in ("dtype", "offset")}
        cells: dict[str, dict[str, str]] = {}
        for row in rows:
            changed = {name: value for name, value in base.items() if row["case"][name] != value} or base
            case = ", ".join(_setting(name, row["case"][name]) for name in changed)
            found = row["errors"]
            cells.setdefault(case, {})[row["case"]["implementation"]] = f"{found['loss_ulp']:.2g} ULP, {found['target_relative']:.1e}"
        columns = list(dict.fromkeys(row["case"]["implementation"] for row in rows))
        lines = ([case, *(row.get(name, "") for name in columns)] for case, row in cells.items())
        table = _table(["", *(names.get(name, f"`{name}`") for name in columns)], lines)
        parts.append(f"**{operation}**\n\n{table}")
    code = measured_at("CPU code", [data["torch_hash"]], torch_hash())
    parts.append(f"{code} By `python -m benchmarks.errors`; a test measures the cases of up to 1000 classes again.")
    return "\n\n".join(parts)


def methods_table(results: Path) -> str:
    """All methods and re-trainings of train.py."""
    data = json.loads((results / "methods" / "steps.json").read_text())
    header, rows = methods.table(results)
    notes = [
        "Accuracies are top-1 in percent at imbalance 100. † with AutoAugment and Cutout, which the other published numbers are without.",
        "Parameters: of the network on CIFAR-100-LT and, in brackets, of layers that only training has. Both columns on the right are of ResNet-32. Cost: the",
        f"processor's time of a step of {data['batch']} images on one thread, over that of cross entropy on the plain network.",
        "The row of cross entropy, which is measured against itself, shows how far such a ratio can be off.",
    ]
    code = measured_at("training code", data["code"], training_hash())
    return "\n".join([_table(header, rows), "", *notes, "", code, "By `python -m benchmarks.methods`; accuracies by `python -m benchmarks.accuracy`."])


def render(name: str, results: Path = RESULTS) -> str:
    """What belongs between the markers of section `name`."""
    if name not in SECTIONS:
        raise ValueError(f"a page has the section {name!r}, but the results make {', '.join(SECTIONS)}")
    if name in ("status", "summary"):
        text = {"status": status, "summary": summary}[name](results)
    elif name in CPU_TABLES:
        table = {"cpu_head": cpu_head, "cpu_busy": cpu_busy}[name]
        text = table(results) if (results / f"{name}.json").exists() else f"Not measured yet: `python -m benchmarks.{name}`."
    elif name == "cpu_loops":
        text = "\n\n".join(map(cpu_loops, _reports(results, gpu=False))) or "Not measured yet: `python -m benchmarks.gpu_report` on a machine without a GPU."
    elif name == "accuracy":
        text = accuracy(results)
    elif name == "own_images":
        text = own_images(results)
    elif name == "methods":
        text = methods_table(results) if (results / "methods" / "steps.json").exists() else "Not measured yet: `python -m benchmarks.methods`."
    elif name == "errors":
        path = results / "numerics" / "errors.json"
        text = errors(path) if path.exists() else "Not measured yet: `python -m benchmarks.errors`."
    else:
        text = "\n\n".join(map(report, _reports(results, gpu=name == "gpu")))
        text = text or f"Not measured yet: `python -m benchmarks.gpu_report` on a machine {'with' if name == 'gpu' else 'without'} a GPU."
    return text + "\n"


def wanted(page: str, results: Path = RESULTS) -> str:
    """The page as it should be."""
    return _SECTION.sub(lambda found: found[1] + render(found[2], results) + found[4], page)


def _charts(results: Path) -> dict[str, str]:
    return {name: svg for file in (*_reports(results, gpu=False), *_reports(results, gpu=True)) for name, svg in charts(file).items()}


def disagreements(pages: Iterable[Path] = PAGES, results: Path = RESULTS, images: Path = IMAGES) -> list[str]:
    """Sections and charts that are not what the results say, and results that no section shows."""
    sections = [(found[2], found[3]) for page in pages for found in _SECTION.finditer(page.read_text())]
    wrong = [f"section {name}" for name, body in sections if body != render(name, results)]
    for name, files in (
        *((name, [*results.glob(f"{name}.json")]) for name in CPU_TABLES),
        ("cpu", _reports(results, gpu=False)),
        ("gpu", _reports(results, gpu=True)),
        ("accuracy", [*results.glob("accuracy/*.json")]),
        ("own_images", [*results.glob("own_images/*.json")]),
        ("errors", [*results.glob("numerics/errors.json")]),
        ("methods", [*results.glob("methods/steps.json")]),
    ):
        if files and name not in dict(sections):
            wrong.append(f"no section {name}")
    expected = _charts(results)
    there = {path.name: path.read_text() for path in images.glob("*.svg")}
    return wrong + [name for name in {*expected, *there} if there.get(name) != expected.get(name)]


def line_chart(title: str, x_name: str, y_name: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of lines over logarithmic axes, with a legend."""
    left, right, top, bottom, width, height = 70, 250, 40, 50, 860, 420
    points = [point for line in series.values() for point in line if min(point) > 0]
    low_x, high_x = (limit(math.log10(x) for x, _ in points) for limit in (min, max))
    low_y, high_y = math.floor(min(math.log10(y) for _, y in points)), math.ceil(max(math.log10(y) for _, y in points))
    high_x, high_y = max(high_x, low_x + 0.1), max(high_y, low_y + 1)

    def x_at(value: float) -> float:
        return left + (math.log10(value) - low_x) / (high_x - low_x) * (width - left - right)

    def y_at(value: float) -> float:
        return height - bottom - (math.log10(value) - low_y) / (high_y - low_y) * (height - top - bottom)

    def text(x: float, y: float, words: str, anchor: str = "start", rest: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rest}>{words}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(left, 22, title, rest=' font-size="14"'),
        text((left + width - right) / 2, height - 10, x_name, "middle"),
        text(18, (top + height - bottom) / 2, y_name, "middle", f' transform="rotate(-90 18 {(top + height - bottom) / 2:.1f})"'),
    ]
    for power in range(low_y, high_y + 1):
        y = y_at(10.0**power)
        lines.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#dddddd"/>')
        lines.append(text(left - 8, y + 4, f"{10.0**power:g}", "end"))
    for value in sorted({x for x, _ in points}):
        lines.append(f'<path d="M{x_at(value):.1f} {height - bottom}v5" stroke="#222222"/>')
        lines.append(text(x_at(value), height - bottom + 20, f"{value:,.0f}", "middle"))
    for number, (name, line) in enumerate(series.items()):
        color, drawn = COLORS[number % len(COLORS)], [(x_at(x), y_at(y)) for x, y in sorted(line) if min(x, y) > 0]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        lines.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in drawn]
        legend = top + 20 * number
        lines.append(f'<path d="M{width - right + 15} {legend}h22" stroke="{color}" stroke-width="3"/>')
        lines.append(text(width - right + 44, legend + 4, name))
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    for name, svg in _charts(RESULTS).items():
        replace_text(IMAGES / name, svg)
    for page in PAGES:
        replace_text(page, wanted(page.read_text()))
    wrong = disagreements()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
