"""The CUDA library as users build it: for every architecture, without spills, loadable under any torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = re.search(r'DEFAULT_CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text())[1]
LOAD = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.diveq_cuda.architectures())"

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what ptxas said about its kernels."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"DIVEQ_BUILD_CUDA": "1", "DIVEQ_BUILD_NATIVE": "0", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (library,) = folder.glob("diveq_kernels/_cuda*.so")
    return library, done.stdout + done.stderr


@pytest.mark.xdist_group("cuda build")
def test_no_kernel_spills(built: tuple[Path, str]) -> None:
    wanted = {name.removesuffix("+PTX").replace(".", "") for name in ARCHITECTURES.split(";")}
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", built[1])
    assert {architecture for _, architecture in compiled} == wanted
    kernels = {name for name, _ in compiled}
    assert len(compiled) == len(kernels) * len(wanted)
    assert sum("search_" in name for name in kernels) >= 5
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built[1])
    assert len(used) >= len(compiled)
    assert set(used) == {("0", "0", "0")}


@pytest.mark.xdist_group("cuda build")
def test_it_loads_without_a_gpu_and_says_what_it_was_built_for(built: tuple[Path, str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, built[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_100"]
    assert built[0].stat().st_size < 16 << 20


@pytest.mark.xdist_group("cuda build")
def test_what_threads_share_is_changed_by_atomics(tmp_path: Path) -> None:
    """In the emulator, where threads do not run at once, plain additions would do as well."""
    changed: dict[str, set[str]] = {}
    for name in ("search", "steps", "layer"):
        command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", "-ptx", "-arch=compute_90", f"csrc/cuda/{name}.cu"]
        subprocess.run([*command, "-o", tmp_path / "kernels.ptx"], cwd=ROOT, check=True)
        for text in (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]:
            changed[text.partition("(")[0]] = set(re.findall(r"\b(?:atom|red)\.global\.([\w.]+)", text))

    def of(kernel: str) -> list[set[str]]:
        return [changed.pop(name) for name in list(changed) if re.search(rf"[\d_]{kernel}", name)]

    gradients = of("(project_|sqdist_)?gradient_kernel")
    assert len(gradients) >= 9 and all(found == {"add.f32", "add.v4.f32"} for found in gradients)
    assert of("project_step_kernel") == [set()]
    steps = of("step_kernel")
    assert len(steps) >= 7 and all(found == {"add.u32"} for found in steps)
    assert of("replace_kernel") == [{"add.u32"}] and of("pack_segments_kernel") == [{"max.u32"}]
    assert len(changed) >= 15 and not any(changed.values()), changed


def test_the_arrays_of_kernels_leave_room_for_what_launches_add(tmp_path: Path) -> None:
    """48 KiB of both is what a launch has unless it asks for more, as device.cuh does above a size of its own part.

    The emulator gives as much as is asked for, and a launch that has too little fails on a GPU only.
    """
    sources = {path.name: path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*")}
    most = int(re.search(r"kMostShared = (\d+) << 10", sources["device.cuh"])[1]) << 10
    of_arrays = int(re.search(r"kOfArrays = (\d+) << 10", sources["device.cuh"])[1]) << 10
    asks_above = int(re.search(r"if \(shared_bytes > (\d+) << 10\)", sources.pop("device.cuh"))[1]) << 10
    assert [name for name, text in sources.items() if "DIVEQ_SHARED(" in text] == ["search_product.cuh"]
    command = ["nvcc", "-std=c++20", "-O3", "-Icsrc", "-Xptxas=-v", "-cubin", "-arch=sm_90", "csrc/cuda/search.cu"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "search.cubin"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    kernels = [text for text in done.stderr.split("Compiling entry function '")[1:] if "search_product_kernel" in text]
    own = [int(re.search(r"(\d+) bytes smem", text)[1]) for text in kernels]
    assert len(own) == 3 and all(0 < size <= (48 << 10) - asks_above for size in own), own
    assert most + max(own) <= 99 << 10  # of sm_86, sm_89 and sm_120
    assert max(own) <= of_arrays  # by which sm_75, which has less, is asked for less
