"""Rows sorted by index and cut into pieces (``_runs.py``)."""

from __future__ import annotations

import pytest
import torch
from cases import generator

from diveq_kernels import _runs
from diveq_kernels._runs import sorted_runs


@pytest.mark.parametrize("piece", [1, 3, 512])
@pytest.mark.parametrize(("rows", "count"), [(0, 4), (1, 1), (7, 30), (200, 5), (200, 1)])
def test_every_row_is_in_one_piece_of_its_index(
    rows: int, count: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pieces follow one another in the order of indices, and rows in a piece in their own."""
    monkeypatch.setattr(_runs, "PIECE", piece)
    indices = torch.randint(-1, count, (3, rows), generator=generator(), dtype=torch.int32)
    runs = sorted_runs(indices, count)
    assert runs.length == piece and runs.owners.shape == (3, min(count, rows) + rows // piece)
    assert runs.owners.dtype == torch.int32 and {x.dtype for x in runs[:3]} == {torch.int64}
    for stage, chosen in enumerate(indices.tolist()):
        order, bounds, firsts, owners = (x[stage].tolist() for x in runs[:-1])
        pieces = []
        for number, owner in enumerate(owners):
            if owner < count:
                start = bounds[owner] + (number - firsts[owner]) * piece
                pieces.append((owner, order[start : min(start + piece, bounds[owner + 1])]))
        assert len(pieces) == firsts[count] and all(rows_of for _, rows_of in pieces)
        found = [(owner, n) for owner, rows_of in pieces for n in rows_of]
        assert found == sorted((j, n) for n, j in enumerate(chosen) if j >= 0)
        assert all(len(rows_of) <= piece for _, rows_of in pieces)
