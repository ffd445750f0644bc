"""Packages and C++ libraries of diveq-kernels; everything that needs no code is in pyproject.toml.

Environment variables (README, "Build variables"): DIVEQ_BUILD_NATIVE and DIVEQ_BUILD_CUDA (0: never, 1: or fail, unset:
where the tools are there), TORCH_CUDA_ARCH_LIST, CXX, CUDA_HOME, MAX_JOBS.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_CUDA_ARCHITECTURE = 75  # the oldest that CUDA 13 compiles for
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
if not re.fullmatch(r"0*[1-9]\d*", JOBS):
    raise SystemExit(f"MAX_JOBS must be a number of processes, at least 1, got {JOBS!r}")
DEFAULT_CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0+PTX"
FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=fast", f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": [*AVX512, "-mfma", "-mf16c"]}
ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mamx-tile", "-mamx-bf16", "-mavx512bf16"]

# Outside of pip's isolated build environment, which has no torch: its PYTHONPATH is ignored by -I.
FIND_TORCH = r"""
import importlib.util, json, re
from pathlib import Path
spec = importlib.util.find_spec("torch")
if spec:
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)", text)[1]
    print(json.dumps([str(folder), version, bool(re.search(r"^cuda\b.*= '", text, re.MULTILINE))]))
"""


class MissingError(Exception):
    """Something that a library is built with is not there."""


class Torch(NamedTuple):
    """A torch to build for."""

    folder: Path
    version: str
    has_cuda: bool


def wanted(variable: str) -> bool | None:
    """What a DIVEQ_BUILD_... variable asks for; None: build if possible."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0, 1 or unset, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def find_torch() -> Torch:
    """The torch that the package will run with: of this environment, or of the one around its build."""
    for isolated in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *isolated, "-c", FIND_TORCH], cwd="/", capture_output=True, text=True, check=False
        ).stdout
        if not found:
            continue
        folder, version, has_cuda = json.loads(found)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
            raise MissingError(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        return Torch(Path(folder), version, has_cuda)
    raise MissingError(
        "torch is not installed for this Python; install torch and then this package again, with "
        "--no-build-isolation if the installer builds in an environment of its own"
    )


def find_compiler() -> list[str]:
    """The C++ compiler's command."""
    command = os.environ.get("CXX", "").split() or ["g++"]
    if not shutil.which(command[0]):
        raise MissingError(f"no C++ compiler: {command[0]!r} is not on PATH")
    return command


def find_nvcc() -> str:
    """Path of nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if not nvcc:
        raise MissingError(f"no CUDA toolkit: nvcc is not {f'in {home}/bin' if home else 'on PATH'}")
    return nvcc


def host_compiler_of_nvcc() -> list[str]:
    """CXX for nvcc, which takes no wrapper and no options; without CXX, nvcc's own choice and NVCC_CCBIN."""
    words = [word for word in os.environ.get("CXX", "").split() if not word.startswith("-")]
    return ["-ccbin", words[-1]] if words else []


def default_cuda_architectures(nvcc: str) -> str:
    """Those of DEFAULT_CUDA_ARCHITECTURES that this toolkit knows, the last one with PTX for what is newer."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    names = DEFAULT_CUDA_ARCHITECTURES.removesuffix("+PTX").split(";")
    known = [name for name in names if f"compute_{name.replace('.', '')}" in listed]
    if not known:
        raise MissingError(f"{nvcc} --list-gpu-arch lists none of {', '.join(names)}")
    return ";".join(known) + "+PTX"


@functools.cache  # asked before a build and in it, and to warn once
def cuda_architectures(nvcc: str) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for in nvcc's names: sm_80, sm_90 and compute_90 (PTX) for "8.0;9.0+PTX"."""
    found, wished = [], os.environ.get("TORCH_CUDA_ARCH_LIST") or default_cuda_architectures(nvcc)
    for name in wished.replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not parts:
            raise MissingError(f"TORCH_CUDA_ARCH_LIST has {name!r}, which is no compute capability like 9.0 or 9.0+PTX")
        if int(parts[1] + parts[2]) < OLDEST_CUDA_ARCHITECTURE:
            print(f"\nwarning: GPUs of compute capability {name} are left out: the kernels need 7.5\n", file=sys.stderr)
            continue
        number = "".join(parts.group(1, 2, 3))
        found += [f"{kind}_{number}" for kind in (["sm", "compute"] if parts[4] else ["sm"])]
    if not found:
        raise MissingError(f"TORCH_CUDA_ARCH_LIST is {wished!r}, and the kernels need compute capability 7.5 or later")
    return found


# Free-threaded Pythons have no limited API that a wheel could be named after.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


class NativeExtension(Extension):
    """A library that registers operations with torch when it is loaded: no Python in it, so one for every Python."""

    def __init__(self, name: str, switches: tuple[str, ...], sources: list[str]) -> None:
        super().__init__(name, sources, py_limited_api=LIMITED_API)
        self.switches = switches


class BuildModules(build_py):
    """Copies the modules that there are, and keeps none that an earlier build has left."""

    def run(self) -> None:
        """Empty the folder, then fill it."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "diveq_kernels"), ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds what can be built, says what could not and why, and fails only where a variable demands a library."""

    def build_extension(self, ext: Extension) -> None:
        """Build one library, or say why not."""
        assert isinstance(ext, NativeExtension)
        demanded = any(wanted(switch) for switch in ext.switches)
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build, and of other sources
        try:
            self.compile_and_link(ext)
        except (MissingError, subprocess.CalledProcessError) as error:
            message = f"{ext.name} was not built: {error}"
            if demanded:
                raise SystemExit(f"{message} ({' or '.join(ext.switches)} is 1)") from error
            print(f"\nwarning: {message}\nThe package works without it, more slowly.\n", file=sys.stderr)
            ext.optional = True  # nothing to copy into a source tree

    def compile_and_link(self, ext: NativeExtension) -> None:
        """Compile the sources side by side, with the flags of their instruction sets, and link them with torch."""
        torch, compiler = find_torch().folder, find_compiler()
        nvcc = find_nvcc() if any(source.endswith(".cu") for source in ext.sources) else None
        include = ["-Icsrc", f"-I{torch}/include"]
        architectures = cuda_architectures(nvcc) if nvcc else []
        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        commands, objects = [], []
        for source in ext.sources:
            made = str(folder / (source.replace("/", "_") + ".o"))
            objects.append(made)
            if source.endswith(".cu"):
                flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
                flags += [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in architectures]
                command = [nvcc, *flags, f"--threads={JOBS}", *include, *host_compiler_of_nvcc()]
            else:
                isa = ISA_FLAGS.get(Path(source).stem.removeprefix("kernels_"), [])
                if platform.machine() not in ("x86_64", "AMD64"):
                    isa = []
                known = [f'-DDIVEQ_CUDA_ARCHITECTURES="{" ".join(architectures)}"'] if nvcc else []
                command = [*compiler, *FLAGS, *isa, *known, *include]
            commands.append([*command, "-c", source, "-o", made])
        self.run_all(commands)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [*objects, "-o", str(target), f"-L{torch}/lib", "-ltorch_cpu"]
        if nvcc:  # it knows where its runtime is
            linker = [nvcc, "-shared", "-cudart=static", *host_compiler_of_nvcc(), "-Xlinker=-s,--no-undefined"]
        else:
            linker = [*compiler, "-shared", "-Wl,-s,--no-undefined"]
        self.run_all([[*linker, *libraries]])

    def run_all(self, commands: list[list[str]]) -> None:
        """Run commands side by side, MAX_JOBS at a time."""
        waiting, running = list(commands), []
        while waiting or running:
            while waiting and len(running) < int(JOBS):
                command = waiting.pop(0)
                print(" ".join(command), flush=True)
                running.append((command, subprocess.Popen(command, cwd=ROOT)))
            command, process = running.pop(0)
            if process.wait():
                for _, other in running:
                    other.wait()
                raise subprocess.CalledProcessError(process.returncode, command)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: only what was built, and nothing of an earlier build."""
        extensions = self.extensions
        for ext in extensions:
            Path(ROOT, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.extensions = [ext for ext in extensions if not ext.optional]
        super().copy_extensions_to_source()
        self.extensions = extensions

    def get_outputs(self) -> list[str]:
        """What was built."""
        return [path for path in super().get_outputs() if Path(path).is_file()]


def extensions() -> list[NativeExtension]:
    """The libraries that this build is to try; none if it could not build any, so that the wheel is a pure one."""

    def sources(folder: str, *patterns: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern))

    native, cuda = wanted("DIVEQ_BUILD_NATIVE"), wanted("DIVEQ_BUILD_CUDA")
    found = []
    if native is not False:
        found.append(NativeExtension("diveq_kernels._cpu", ("DIVEQ_BUILD_NATIVE",), sources("csrc/cpu", "*.cpp")))
    if cuda is not False and (native is not False or cuda):
        cuda_sources = sources("csrc/cuda", "*.cu", "*.cpp")
        found.append(NativeExtension("diveq_kernels._cuda", ("DIVEQ_BUILD_CUDA",), cuda_sources))
    built = []
    for ext in found:
        try:
            torch, _ = find_torch(), find_compiler()
            if ext.name.endswith("_cuda"):
                nvcc = find_nvcc()
                if not torch.has_cuda and not cuda:
                    raise MissingError(f"torch {torch.version} has no CUDA; DIVEQ_BUILD_CUDA=1 builds it all the same")
                cuda_architectures(nvcc)
        except MissingError as error:
            if any(wanted(switch) for switch in ext.switches):
                raise SystemExit(f"{ext.name} cannot be built: {error} ({' or '.join(ext.switches)} is 1)") from error
            print(f"\nwarning: {ext.name} is left out: {error}\n", file=sys.stderr)
        else:
            built.append(ext)
    return built


EXTENSIONS = extensions()
setup(
    packages=[*find_packages(include=["diveq_kernels", "diveq_kernels.*"]), "diveq_kernels.triton_kernels"],
    # The top-level name `triton_kernels` belongs to another package, so the folder is installed inside ours.
    package_dir={"diveq_kernels.triton_kernels": "triton_kernels"},
    package_data={"diveq_kernels.triton_kernels": ["configs/*.json"]},  # py.typed is included without asking
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildNative, "build_py": BuildModules},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS and LIMITED_API else {},
)
