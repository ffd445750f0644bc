"""Packages of diveq-kernels; everything that needs no code is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["diveq_kernels", "diveq_kernels.*"]), "diveq_kernels.triton_kernels"],
    # The top-level name `triton_kernels` belongs to another package, so the folder is installed inside ours.
    package_dir={"diveq_kernels.triton_kernels": "triton_kernels"},
    package_data={"diveq_kernels.triton_kernels": ["*.json"]},  # py.typed is included without asking
)
