"""What pyproject.toml cannot say: the folder kernels/ as a part of the package, the compiled loops of the CPU, and README's links for a package index."""

import hashlib
import re
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


class SourceDistribution(sdist):
    """An sdist with the link gclkern/kernels of a checkout. Setuptools leaves it out, and without it the tests of an unpacked sdist find no kernels."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "gclkern", "kernels").symlink_to("../kernels")


def description() -> str:
    """README with absolute addresses: a package index shows it without the files that its relative links and pictures lead to."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    readme = (ROOT / "README.md").read_text()
    return re.sub(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)", lambda found: f"{found[0]}{source}/{'raw' if found[1] else 'blob'}/main/", readme)


# One compiled library serves every Python from 3.11 on, because it uses Python's limited API alone; a free-threaded Python has none.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")


def cpu_loops() -> Extension:
    """gclkern.cpu_backend's library. It is optional: without a C compiler the torch backend serves the CPU."""
    folder = Path("gclkern", "cpu_backend", "native")  # of setuptools, relative to this file
    sources = sorted((ROOT / folder).glob("*.[ch]"))
    # as gclkern.cpu_backend.library.source_hash, which refuses a library of other sources
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return Extension(
        "gclkern.cpu_backend._native",
        [str(folder / source.name) for source in sources if source.suffix == ".c"],
        depends=[str(folder / source.name) for source in sources if source.suffix == ".h"],
        define_macros=[("GCLKERN_SOURCES", f'"{digest}"')],
        # without error numbers and traps a compiler may vectorise roots and comparisons; NaN and infinity keep their meaning
        extra_compile_args=["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"],
        libraries=["m"],
        py_limited_api=STABLE,
        optional=True,
    )


# An installed top-level package `kernels` would clash with the one of that name on PyPI. A checkout finds the same folder through the link gclkern/kernels.
setup(
    packages=[*find_packages(include=["gclkern", "gclkern.*"], exclude=["gclkern.kernels", "gclkern.kernels.*"]), "gclkern.kernels"],
    package_dir={"gclkern.kernels": "kernels"},
    package_data={"gclkern": ["py.typed"]},
    ext_modules=[cpu_loops()],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
    cmdclass={"sdist": SourceDistribution},
    long_description=description(),
    long_description_content_type="text/markdown",
)
