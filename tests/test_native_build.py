"""Building without what the C++ library needs: a message, and a failure only where the library was demanded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def set_up(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as far as deciding what to build."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DIVEQ_", "CXX"))}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False
    )


def test_everything_there() -> None:
    done = set_up(DIVEQ_BUILD_CUDA="0")
    assert done.returncode == 0 and "left out" not in done.stderr


def test_no_compiler_is_a_warning() -> None:
    done = set_up(CXX="no-such-compiler", DIVEQ_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "diveq_kernels._cpu is left out: no C++ compiler: 'no-such-compiler' is not on PATH" in done.stderr


def test_no_compiler_is_an_error_if_demanded() -> None:
    done = set_up(CXX="no-such-compiler", DIVEQ_BUILD_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr and "DIVEQ_BUILD_NATIVE is 1" in done.stderr


def test_nothing_is_looked_for_if_not_wanted() -> None:
    done = set_up(CXX="no-such-compiler", DIVEQ_BUILD_NATIVE="0")
    assert done.returncode == 0 and "left out" not in done.stderr


@pytest.mark.parametrize("variable", ["DIVEQ_BUILD_NATIVE", "DIVEQ_BUILD_CUDA"])
def test_other_values_are_refused(variable: str) -> None:
    done = set_up(**{variable: "yes"})
    assert done.returncode != 0 and f"{variable} must be 0, 1 or unset, got 'yes'" in done.stderr


def test_no_toolkit_is_an_error_if_demanded(tmp_path: Path) -> None:
    done = set_up(DIVEQ_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"no CUDA toolkit: nvcc is not in {tmp_path}/bin (DIVEQ_BUILD_CUDA is 1)" in done.stderr


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@needs_nvcc
def test_gpus_that_the_kernels_cannot_run_on_are_left_out() -> None:
    done = set_up(DIVEQ_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="5.2 7.0;7.5 9.0a+PTX")
    assert done.returncode == 0, done.stderr
    for name in ("5.2", "7.0"):
        assert f"GPUs of compute capability {name} are left out: the kernels need 7.5" in done.stderr
    assert "7.5 are left out" not in done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("names", "told"), [("6.1 7.0", "'6.1 7.0', and the kernels need compute"), ("Ampere", "'Ampere', which is no")]
)
def test_lists_without_a_gpu_that_will_do(names: str, told: str) -> None:
    done = set_up(DIVEQ_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST=names)
    assert done.returncode != 0 and told in done.stderr and "DIVEQ_BUILD_CUDA is 1" in done.stderr


def test_an_older_toolkit_builds_what_it_knows(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "compute_%s\\n" 50 80 86 90\n')
    nvcc.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    chosen = {"DIVEQ_BUILD_CUDA": "1", "DIVEQ_BUILD_NATIVE": "0", "CUDA_HOME": str(tmp_path), "CXX": "env g++"}
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(command, cwd=ROOT, env=environment | chosen, capture_output=True, text=True, check=False)
    line = next(line for line in done.stdout.splitlines() if ".cu " in line)  # of the first; it does not compile
    assert re.findall(r",code=(\w+)", line) == ["sm_80", "sm_86", "sm_90", "compute_90"] and "-ccbin g++ " in line


def test_no_toolkit_leaves_the_cuda_library_out(tmp_path: Path) -> None:
    done = set_up(CUDA_HOME=str(tmp_path))
    assert done.returncode == 0 and "diveq_kernels._cuda is left out" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None or not shutil.which("nvcc"), reason="needs nvcc and a CPU torch")
def test_a_torch_without_cuda_gets_the_library_only_if_demanded() -> None:
    done = set_up()
    assert done.returncode == 0 and "has no CUDA; DIVEQ_BUILD_CUDA=1 builds it all the same" in done.stderr
    done = set_up(DIVEQ_BUILD_CUDA="1")
    assert done.returncode == 0 and "left out" not in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("cuda", ["cuda: Optional[str] = '13.0'", "cuda = '12.6'", "cuda: Optional[str] = None"])
def test_a_torch_with_cuda_gets_the_library(cuda: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.11.0+cu130'\n{cuda}\nhip: Optional[str] = 'x'\n")
    done = set_up(PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and ("_cuda is left out: torch 2.11.0" in done.stderr) == cuda.endswith("None")


def test_nothing_of_an_earlier_build_is_left(tmp_path: Path) -> None:
    """No module that has gone, and no library where there is none of these sources, though the build goes on."""
    for folder in ("diveq_kernels", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    folder, inplace = tmp_path / "build" / "lib" / "diveq_kernels", tmp_path / "diveq_kernels"
    folder.mkdir(parents=True)
    library = f"_cpu{'.abi3' if LIMITED_API else ''}.so"
    for stale in (folder / "gone.py", folder / library, inplace / library):
        stale.touch()
    source = tmp_path / "csrc" / "cpu" / "isa.cpp"
    source.write_text("#error broken\n", encoding="utf-8")
    environment = {**os.environ, "DIVEQ_BUILD_CUDA": "0", "MAX_JOBS": "2"}
    for command in (["build", "--build-lib=build/lib"], ["build_ext", "--inplace"]):
        done = subprocess.run(
            [sys.executable, "setup.py", *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "diveq_kernels._cpu was not built" in done.stderr, done.stderr
    assert (folder / "__init__.py").is_file()
    assert not [path for path in (folder / "gone.py", folder / library, inplace / library) if path.exists()]


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_a_number_of_jobs_that_is_none(jobs: str) -> None:
    done = set_up(MAX_JOBS=jobs)
    assert done.returncode != 0 and f"MAX_JOBS must be a number of processes, at least 1, got {jobs!r}" in done.stderr


def test_a_blank_compiler_is_none_named() -> None:
    assert set_up(CXX="  ", DIVEQ_BUILD_CUDA="0").returncode == 0
