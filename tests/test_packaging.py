"""What an installation contains and where Python finds it: wheel, sdist, editable install, checkout."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"diveq_kernels": "diveq_kernels", "triton_kernels": "diveq_kernels/triton_kernels"}

# One worker builds and shares the wheel.
pytestmark = pytest.mark.xdist_group("packaging")

REPORT_IMPORTS = """
import importlib, importlib.util, json, site, sys
site.addsitedir({site!r})  # with its .pth files, as Python's own start does
sys.path.append({torch!r})
modules = ["diveq_kernels", "diveq_kernels.triton_kernels"]
files = {{name: importlib.import_module(name).__file__ for name in modules}}
stranger = importlib.util.find_spec("triton_kernels")
print(json.dumps({{**files, "triton_kernels": stranger and stranger.origin}}))
"""


def run(*arguments: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(to: Path) -> Path:
    """A copy without builds and environments, so that building leaves no trace and takes nothing stale."""

    def unwanted(folder: str, names: list[str]) -> list[str]:
        generated = {"__pycache__", "build", "dist", "runs"}
        return [
            name
            for name in names
            if name in generated
            or name.endswith(".egg-info")
            or (name.startswith(".") and name != ".ci")
            or (Path(folder) / name / "pyvenv.cfg").exists()
        ]

    return Path(shutil.copytree(ROOT, to, ignore=unwanted))


def pip(command: str, *arguments: str | Path, cwd: Path) -> None:
    run("-m", "pip", command, "--no-index", "--no-deps", "--no-build-isolation", *arguments, cwd=cwd)


def build_wheel(source: Path, to: Path) -> Path:
    pip("wheel", source, cwd=to)
    (wheel,) = to.glob("*.whl")
    return wheel


def imported_files(site: Path, cwd: Path) -> dict[str, str | None]:
    """Where a Python started in ``cwd`` finds our modules, with nothing installed but ``site`` and torch."""
    script = REPORT_IMPORTS.format(site=str(site), torch=str(Path(torch.__file__).parents[1]))
    return json.loads(run("-S", "-c", script, cwd=cwd))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def without_names_of_nvcc(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a wheel; nvcc gives what it compiles names that hold the folder it was in."""
    for name in files:
        if name.startswith("diveq_kernels/_cuda."):
            files[name] = b""
        elif name.endswith("/RECORD"):
            files[name] = re.sub(rb"(diveq_kernels/_cuda\.[^,]*),.*", rb"\1", files[name])
    return files


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "diveq-kernels")


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (name,) = (name for name in contents(wheel) if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(contents(wheel)[name])


def test_wheel_installs_one_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diveq_kernels"}


def test_wheel_holds_every_module_and_the_type_marker(wheel: Path) -> None:
    expected = {"diveq_kernels/py.typed", "diveq_kernels/triton_kernels/__init__.py"}
    for folder, package in PACKAGES.items():
        for pattern in ("*.py", "*.json"):
            files = (ROOT / folder).rglob(pattern)
            expected |= {f"{package}/{path.relative_to(ROOT / folder)}" for path in files}
    assert expected <= set(contents(wheel))


def test_metadata(wheel: Path, metadata: Message) -> None:
    assert metadata["Name"] == "diveq-kernels"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    licences = [text for name, text in contents(wheel).items() if name.endswith("licenses/LICENSE")]
    assert licences == [(ROOT / "LICENSE").read_bytes()]


def test_torch_is_the_only_hard_requirement(metadata: Message) -> None:
    hard = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert hard == ["torch>=2.10"]


def test_building_does_not_ask_for_torch() -> None:
    build_system = re.search(r"\[build-system\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert re.findall(r'"([\w-]+)', re.search(r"requires = \[(.*?)\]", build_system[1])[1]) == ["setuptools"]


def test_development_requirements_pin_the_extras(metadata: Message) -> None:
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if re.match(r"[\w-]+==", line)}
    required = metadata.get_all("Requires-Dist")
    extras = {re.match(r"[\w-]+", line)[0] for line in required if re.search(r"extra == .(demo|test)", line)}
    assert len(extras) > 8
    assert extras <= pinned


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    archive = tmp_path / run("-c", build, cwd=checkout).splitlines()[-1]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    documents = ("README.md", "CITATION.cff")
    for needed in ("Makefile", *documents, "requirements/dev.txt", "tests/test_packaging.py", "benchmarks/run.py"):
        assert (unpacked / needed).is_file(), needed
    (tmp_path / "wheel").mkdir()
    again = build_wheel(unpacked, tmp_path / "wheel")
    assert without_names_of_nvcc(contents(again)) == without_names_of_nvcc(contents(wheel))


def test_installed_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--target", site, wheel, cwd=tmp_path)
    stranger = site / "triton_kernels" / "__init__.py"  # the other package of that name
    stranger.parent.mkdir()
    stranger.touch()

    found = imported_files(site, cwd=tmp_path)
    installed = site / "diveq_kernels"
    assert found["diveq_kernels"] == str(installed / "__init__.py")
    assert found["diveq_kernels.triton_kernels"] == str(installed / "triton_kernels" / "__init__.py")
    assert found["triton_kernels"] == str(stranger)

    # Started in a checkout, Python imports that instead: all of it, and none of the installed copy.
    assert_all_from(checkout, imported_files(site, cwd=checkout))


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--target", site, "--editable", checkout, cwd=tmp_path)

    found = imported_files(site, cwd=tmp_path)
    assert_all_from(checkout, found)
    assert found["triton_kernels"] is None or not Path(found["triton_kernels"]).is_relative_to(checkout)

    other = copy_checkout(tmp_path / "other")
    assert_all_from(other, imported_files(site, cwd=other))


def assert_all_from(checkout: Path, found: dict[str, str | None]) -> None:
    assert found["diveq_kernels"] == str(checkout / "diveq_kernels" / "__init__.py")
    assert found["diveq_kernels.triton_kernels"] == str(checkout / "triton_kernels" / "__init__.py")
