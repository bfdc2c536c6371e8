"""What pyproject.toml cannot say: the folder kernels/ as a part of the package, and README's links for a package index."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup
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


# An installed top-level package `kernels` would clash with the one of that name on PyPI. A checkout finds the same folder through the link gclkern/kernels.
setup(
    packages=[*find_packages(include=["gclkern", "gclkern.*"], exclude=["gclkern.kernels", "gclkern.kernels.*"]), "gclkern.kernels"],
    package_dir={"gclkern.kernels": "kernels"},
    package_data={"gclkern": ["py.typed"]},
    cmdclass={"sdist": SourceDistribution},
    long_description=description(),
    long_description_content_type="text/markdown",
)
