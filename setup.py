"""Maps the folder kernels/ into the package; everything else about the distribution stands in pyproject.toml."""

from setuptools import find_packages, setup

# An installed top-level package `kernels` would clash with the one of that name on PyPI. A checkout finds the same folder through the link gclkern/kernels.
setup(
    packages=[*find_packages(include=["gclkern", "gclkern.*"], exclude=["gclkern.kernels", "gclkern.kernels.*"]), "gclkern.kernels"],
    package_dir={"gclkern.kernels": "kernels"},
    package_data={"gclkern": ["py.typed"]},
)
