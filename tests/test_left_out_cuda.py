"""Blocks of the CUDA kernels' searches, on a GPU or emulated, whose rows a mask or ``num_active`` leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TARGETS, Target, generator
from torch import Tensor

import diveq_kernels.functional as F

CUDA = [target for target in TARGETS if target.backend == "cuda"]
if not CUDA:
    pytest.skip("the cuda backend runs on no device here", allow_module_level=True)

# The rows that are searched, of their numbers and the rows of a block.
LIVE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda row, block: row >= 0,
    "none": lambda row, block: row < 0,
    "the first of each": lambda row, block: row % block == 0,
    "the last of each": lambda row, block: row % block == block - 1,
    "both ends of one": lambda row, block: (row == block) | (row == 2 * block - 1),
    "second half of one": lambda row, block: (row >= 3 * block // 2) & (row < 2 * block),
    "up to an edge": lambda row, block: row < 2 * block,
    "one further": lambda row, block: row <= 2 * block,
    "from an edge": lambda row, block: row >= 2 * block,
    "one before": lambda row, block: row >= 2 * block - 1,
    "what is no whole block": lambda row, block: row >= 3 * block,
}


@pytest.mark.parametrize("target", CUDA, ids=str)
@pytest.mark.parametrize("function", ["nearest", "fast", "project", "sf_diveq", "residual_diveq", "product_diveq"])
@pytest.mark.parametrize(("dim", "block", "codewords"), [(4, 256, 600), (20, 64, 200)])
def test_blocks_without_a_row_to_search_for(
    target: Target, function: str, dim: int, block: int, codewords: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass over no codewords: where searches are emulated, the barriers that they come to show it."""
    gen, launches = generator(), tmp_path / "launches"
    monkeypatch.setenv("DIVEQ_EMULATED_LAUNCHES", str(launches))
    residual, product = function == "residual_diveq", function == "product_diveq"
    stages = 2 if residual or product else 1
    z = torch.randn(3 * block + 5, 2 * dim if product else dim, generator=gen).to(target.device)
    shape = (stages, codewords, dim) if residual or product else (codewords, dim)
    books = torch.randn(shape, generator=gen).to(target.device)
    keywords = {"precision": "fast"} if function == "fast" else {"seed": 1} if "diveq" in function else {}
    if function == "sf_diveq":
        keywords["dither"] = torch.rand(codewords - 1, generator=gen).to(target.device)

    def search(**rows: Tensor) -> tuple[Any, int]:
        launches.write_text("")
        found = getattr(F, "nearest" if function == "fast" else function)(z, books, backend="cuda", **keywords, **rows)
        searches = re.findall(r"search_\w+_kernel\b.* (\d+)", launches.read_text())
        return found, sum(map(int, searches))

    def check(found: Any, live: Tensor) -> None:
        """By row, or by stage and row."""
        assert torch.equal(found.indices, torch.where(live, everything.indices, -1))
        for value, of_all in zip(found, everything, strict=True):
            if value is not found.indices and live.dim() == 1:
                left_out = z if value.shape == z.shape else torch.zeros_like(value)
                assert torch.equal(value[live], of_all[live]) and torch.equal(value[~live], left_out[~live])

    everything, _ = search()
    row = torch.arange(len(z), device=target.device)
    (_, most), (_, least) = (search(mask=LIVE[name](row, block)) for name in ("all", "none"))
    emulated = target.device == "cpu"
    assert least == (4 * stages if emulated else 0) and most >= 3 * least  # one barrier for each block, to find out

    for name, live_in in LIVE.items():
        live = live_in(row, block)
        blocks = len(set((row[live] // block).tolist()))
        found, barriers = search(mask=live)
        print(name)
        check(found, live)
        assert 4 * barriers == blocks * most + (4 - blocks) * least
        if residual:
            found, barriers = search(num_active=1 + live.long())
            check(found, torch.stack([live | True, live]))
            assert 8 * barriers == (4 + blocks) * most + (4 - blocks) * least
