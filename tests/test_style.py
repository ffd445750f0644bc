"""Rules about the project's own files that ruff and mypy do not know."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ".ci benchmarks csrc diveq_kernels docs examples requirements tests triton_kernels".split()
BINARY = {".gif", ".jpg", ".npz", ".png", ".pt", ".pyc", ".so"}

# Written so that no pattern matches itself.
FORBIDDEN = {
    "a package index (each machine's pip knows its own)": r"--(extra-)?index[-_]url|--find[-]links"
    r"|https?://\S+/(simp[l]e|wh[l])\b",
    "a path of one developer's machine": r"(?<![\w.~-])/(r[o]ot|w[o]rk|h[o]me|U[s]ers)/\w|[A-Z]:\\U[s]ers\\",
}


def project_files() -> list[Path]:
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a worktree
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in files if path.suffix not in BINARY)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_mentions(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_the_patterns_match() -> None:
    lines = ["pip install --" + "index-url x", "see /" + "home/me/code"]
    assert all(re.search(pattern, line) for pattern, line in zip(FORBIDDEN.values(), lines, strict=True))


def test_versions_agree() -> None:
    stated = {
        "diveq_kernels/_version.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(\d.+)\]",  # the newest release comes first
    }
    versions = [re.search(pattern, (ROOT / name).read_text(), re.M)[1] for name, pattern in stated.items()]
    assert len(set(versions)) == 1, versions


def test_ci_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_torch_is_pinned_only_for_development() -> None:
    pin = re.compile(r"^\W*torch==", re.MULTILINE)
    pinned = [path for path in project_files() if pin.search(path.read_text(encoding="utf-8"))]
    assert pinned == [ROOT / "requirements" / "dev.txt"]
