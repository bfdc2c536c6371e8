"""Whichever way the library is installed, a program runs the code, and above all the kernels, that its user means."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = str(sysconfig.get_config_var("CC") or "cc").split()[0]
LOCATE = "import gclkern, gclkern.kernels.terms as t, os; print(os.path.realpath(gclkern.__file__)); print(os.path.realpath(t.__file__))"


def run(python: Path | str, *args: str, cwd: Path, compiler: str = "no-compiler") -> subprocess.CompletedProcess[str]:
    """Runs Python without a C compiler, which each installation would wait for and has to work without."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")} | {"CC": compiler}
    done = subprocess.run([str(python), *args], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def locate(python: Path, cwd: Path, first: Path | None = None) -> tuple[Path, Path]:
    """The folders that `gclkern` and `gclkern.kernels` come from in a program started in `cwd`, with `first` before everything else on its path."""
    code = LOCATE if first is None else f"import sys; sys.path.insert(0, {str(first)!r}); {LOCATE}"
    package, kernels = run(python, "-c", code, cwd=cwd).stdout.split()
    return Path(package).parent, Path(kernels).parent


@pytest.fixture(scope="module")
def shared_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with this one's packages, except this library: torch need not be installed again."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    # --system-site-packages would show the base interpreter's packages, not those of an environment that runs these tests, and this library among them
    for shared in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(shared).iterdir():
            if "gclkern" not in entry.name:
                Path(site, entry.name).symlink_to(entry)
    return python


def clone(folder: Path) -> Path:
    """A second checkout: the files that the first one holds, the link to the kernels kept as a link."""
    everywhere = shutil.ignore_patterns(".git", ".hypothesis", "*.egg-info", "__pycache__", ".*_cache", ".venv")
    top = shutil.ignore_patterns("build", "dist", "runs", "data")  # at the top alone: gclkern/training/data is part of the library

    def ignored(path: str, names: list[str]) -> set[str]:
        return everywhere(path, names) | (top(path, names) if Path(path) == ROOT else set())

    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored))


def install(python: Path, *what: str, cwd: Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *what, cwd=cwd)


@pytest.fixture
def environment(shared_environment: Path, tmp_path: Path) -> Iterator[Path]:
    yield shared_environment
    run(shared_environment, "-m", "pip", "uninstall", "--quiet", "--yes", "gclkern", cwd=tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return clone(tmp_path / "checkout")


@pytest.mark.slow
def test_a_checkout_runs_its_own_kernels_beside_an_installation(environment: Path, checkout: Path, tmp_path: Path) -> None:
    install(environment, ".", cwd=checkout)
    assert locate(environment, checkout) == (checkout / "gclkern", checkout / "kernels")
    package, kernels = locate(environment, tmp_path)
    assert environment.parent.parent in package.parents
    assert kernels == package / "kernels"
    script = checkout / "script.py"
    script.write_text(LOCATE)
    assert run(environment, str(script), cwd=tmp_path).stdout.split()[1] == str(checkout / "kernels" / "terms.py")


@pytest.mark.slow
def test_an_editable_installation_follows_its_checkout_and_no_other(environment: Path, checkout: Path, tmp_path: Path) -> None:
    install(environment, "--editable", ".", cwd=checkout)
    assert locate(environment, tmp_path) == (checkout / "gclkern", checkout / "kernels")
    assert locate(environment, checkout) == (checkout / "gclkern", checkout / "kernels")
    second = clone(tmp_path / "second")
    assert locate(environment, second) == (second / "gclkern", second / "kernels")


@pytest.mark.slow
def test_a_wheel_is_complete(environment: Path, checkout: Path, tmp_path: Path) -> None:
    run(environment, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), ".", cwd=checkout, compiler=COMPILER)
    (wheel,) = tmp_path.glob("gclkern-*.whl")
    target = tmp_path / "target"
    install(environment, "--target", str(target), str(wheel), cwd=tmp_path)

    def modules(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*.py")}

    sources = {path for path in modules(checkout / "gclkern") if path.parts[0] != "kernels"}
    sources |= {Path("kernels") / path for path in modules(checkout / "kernels")}
    assert modules(target / "gclkern") == sources
    assert (target / "gclkern" / "py.typed").is_file()
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"gclkern"}, "the wheel brings other top-level packages"
    assert list(target.glob("gclkern-*.dist-info/licenses/LICENSE"))
    assert bool(list(target.glob("gclkern/cpu_backend/_native.*"))) == (shutil.which(COMPILER) is not None), "the compiled loops of the CPU"
    assert locate(environment, tmp_path, target) == (target / "gclkern", target / "gclkern" / "kernels")


def run_build(python: Path, step: str, folder: Path, cwd: Path) -> None:
    """A step of the build backend, into `folder`, without the current folder on the path.

    The package `kernels` of PyPI has a hook for setuptools, which would find the folder kernels/ in its place.
    """
    code = f"import setuptools.build_meta, sys; setuptools.build_meta.{step}(sys.argv[1])"
    run(python, "-P", "-c", code, str(folder), cwd=cwd)


@pytest.mark.slow
def test_the_tests_run_from_an_sdist(environment: Path, checkout: Path, tmp_path: Path) -> None:
    run_build(environment, "build_sdist", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("gclkern-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    sdist = tmp_path / archive.name.removesuffix(".tar.gz")

    def files(folder: Path) -> set[Path]:
        """Whatever the tests may read: the sources, and what belongs to them."""
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so") and "egg-info" not in str(path)}

    unneeded = {Path(".gitignore"), Path(".github/workflows/ci.yml"), Path(".git")}
    assert files(checkout) - files(sdist) - unneeded == set()
    assert (sdist / "gclkern" / "kernels").is_symlink()
    assert locate(environment, sdist) == (sdist / "gclkern", sdist / "kernels")

    run(environment, "-m", "pytest", "--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", cwd=sdist)  # fails where a module cannot be imported
    few = ["tests/test_clouds.py", "tests/benchmarks/test_render_results.py", "tests/training/test_schedules.py"]
    run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", *few, cwd=sdist)
    if shutil.which(COMPILER) is not None:
        run(environment, "setup.py", "build_ext", "--inplace", cwd=sdist, compiler=COMPILER)
        run(environment, "-c", "from gclkern import cpu_backend; assert cpu_backend.is_available, cpu_backend.missing", cwd=sdist)


def test_a_package_index_gets_absolute_links(environment: Path, checkout: Path, tmp_path: Path) -> None:
    """It shows README without the files beside it."""
    run_build(environment, "prepare_metadata_for_build_wheel", tmp_path, cwd=checkout)
    (file,) = tmp_path.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(file.read_text())
    readme, description = (ROOT / "README.md").read_text(), metadata.get_payload()
    assert isinstance(description, str) and metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", readme))
    source = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))["Source"]
    paths = [re.sub(r"^(blob|raw)/main/|#.*", "", link.removeprefix(f"{source}/")) for link in links if link.startswith(f"{source}/")]
    assert paths and all((ROOT / path).exists() for path in paths)
    assert all(link.startswith(f"{source}/raw/") for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", description))


LOAD_FROM_HUB = """
import importlib.util, json, pathlib, sys
import torch

folder, loader = pathlib.Path(sys.argv[1]), sys.argv[2]

def load():
    if loader == "kernels":
        import kernels
        return kernels.get_local_kernel(folder)
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

hub = load()
assert "gclkern" not in sys.modules and "numpy.typing" not in sys.modules
sys.path.insert(0, sys.argv[3])
import gclkern

features, weight, target, cloud = torch.randn(8, 16), torch.randn(3, 16), torch.randint(3, (8,)), torch.tensor([0.0, 0.2, 0.5])
results = []
for package in (hub, gclkern):  # beside each other: the operators of each have a namespace of their own
    leaf = weight.clone().requires_grad_()
    loss = package.functional.linear_gcl_cross_entropy(features, leaf, target, cloud, seed=3, backend="torch")
    loss.backward()
    results.append((loss.detach(), leaf.grad))
assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
assert type(hub.CosineLinear(4, 3)) is not gclkern.CosineLinear
assert hub.distributed.ShardedCosineLinear.__module__.startswith(hub.__name__ + ".")
"""


@pytest.mark.parametrize("loader", ["import", "kernels"])
def test_the_hubs_layout_loads_beside_the_package(tmp_path: Path, loader: str) -> None:
    """`kernels` is the loader that users have; what it does without checking the machine is an import by path."""
    # looked up by its distribution: in a checkout an import finds the folder kernels/
    if loader == "kernels" and "kernels" not in {distribution.name for distribution in importlib.metadata.distributions()}:
        pytest.skip("needs the package kernels of PyPI")
    run(sys.executable, str(ROOT / ".ci" / "hub_kernel.py"), str(tmp_path), cwd=tmp_path)
    for variant in (tmp_path / "build").iterdir():
        assert (variant / "kernels" / "head.py").is_file() and not (variant / "training").exists()
    run(sys.executable, "-c", LOAD_FROM_HUB, str(tmp_path), loader, str(ROOT), cwd=tmp_path)


def test_without_triton_everything_runs() -> None:
    code = """
        import sys

        class WithoutTriton:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

        sys.meta_path[:] = map(WithoutTriton, sys.meta_path)
        import torch, gclkern
        from gclkern.functional import gcl_cross_entropy

        cosine = torch.rand(4, 10, requires_grad=True)
        gcl_cross_entropy(cosine, torch.tensor([0, 3, 9, 3]), torch.linspace(0, 1, 10), seed=1).backward()
        assert cosine.grad is not None and cosine.grad.isfinite().all()
        try:
            gcl_cross_entropy(cosine, torch.tensor([0, 3, 9, 3]), backend="triton")
        except ValueError as error:
            print(error)
        assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
    """
    assert "Triton" in run(sys.executable, "-c", textwrap.dedent(code), cwd=ROOT).stdout


def test_importing_the_library_imports_no_triton() -> None:
    run(sys.executable, "-c", "import sys, gclkern, gclkern.functional; assert 'triton' not in sys.modules", cwd=ROOT)


def test_distributed_and_training_load_when_they_are_asked_for() -> None:
    code = """
        import sys, gclkern

        assert not {"gclkern.distributed", "gclkern.training"} & set(sys.modules)
        assert gclkern.distributed.ShardedCosineLinear(4, 3).weight.shape == (3, 4)
        assert gclkern.training.__name__ == "gclkern.training"
        try:
            gclkern.trainning
        except AttributeError as error:
            print(error)
    """
    assert run(sys.executable, "-c", textwrap.dedent(code), cwd=ROOT).stdout == "module 'gclkern' has no attribute 'trainning'\n"


def test_the_first_step_of_every_loss_imports_no_compiler() -> None:
    """torch._dynamo and what it imports, about 900 modules, cost every process seconds and 160 MB."""
    code = """
        import sys, torch, gclkern
        from gclkern import functional

        features, target, counts = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 0]), [50, 20, 5]
        cosine, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
        losses = [
            gclkern.GCLLoss(counts, noise_mul=0.5)(cosine, target),
            gclkern.LDAMLoss(counts)(cosine, target),
            gclkern.LogitAdjustedLoss(counts)(cosine, target),
            gclkern.CosFaceLoss()(cosine, target),
            gclkern.FocalLoss()(cosine, target),
            *(gclkern.LinearGCLLoss(counts, plan=plan)(features, weight, target) for plan in ("materialised", "chunked", "recompute")),
            gclkern.DROLTLoss(counts)(features, target, *functional.class_centroids(features.detach(), target, 3)),
            gclkern.distributed.ShardedLinearGCLLoss(counts)(features, weight, target),
        ]
        torch.stack(losses).sum().backward()
        gclkern.cloud_noise(1, 2, 3)
        assert not {"torch._dynamo", "sympy", "triton"} & set(sys.modules)
    """
    run(sys.executable, "-c", textwrap.dedent(code), cwd=ROOT)
