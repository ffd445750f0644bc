"""Bad input: an error that names the argument, what was expected and what came, from every function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import QUANTIZERS, Quantizer, for_every_quantizer, functions
from torch import Tensor

import diveq_kernels.functional as F

for_every_function = pytest.mark.parametrize(("function", "shape"), functions())
space_filling = pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q.space_filling], ids=str)
residual = pytest.mark.parametrize("function", [F.residual_diveq, F.residual_sf_diveq])
single = pytest.mark.parametrize("function", [F.nearest, F.project, F.diveq, F.sf_diveq])

Z = torch.zeros(3, 2, 4)


def refused(kind: type[Exception], words: list[str], function: Callable, *args: Any, **keywords: Any) -> None:
    """The call raises exactly this kind of error and the message has all the words, each as a whole one."""
    with pytest.raises(kind) as error:
        function(*args, **keywords)
    message = str(error.value)
    assert error.type is kind
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), (word, message)
    assert re.search("(?i)must|expected", message) and "got" in message, message


def books_name(shape: tuple[int, ...]) -> str:
    return "codebook" if len(shape) == 2 else "codebooks"


# ---- z and the codebooks -----------------------------------------------------------------------------------------


@for_every_function
def test_not_a_tensor(function: Callable, shape: tuple[int, ...]) -> None:
    books = torch.zeros(shape)
    refused(TypeError, ["z", "Tensor", "list"], function, [[0.0] * 4], books)
    refused(TypeError, ["z", "Tensor", "NoneType"], function, None, books)
    refused(TypeError, [books_name(shape), "Tensor", "list"], function, Z, books.tolist())
    refused(TypeError, ["z", "dense", "sparse_coo"], function, Z.to_sparse(), books)
    refused(TypeError, ["z", "dense", "nested"], function, torch.nested.nested_tensor([Z, Z[:2]]), books)
    refused(TypeError, [books_name(shape), "dense", "sparse_coo"], function, Z, books.to_sparse())


@for_every_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtype(function: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    books = torch.zeros(shape)
    refused(TypeError, ["z", "float32", str(dtype)], function, Z.to(dtype), books)
    refused(TypeError, [books_name(shape), "float32", str(dtype)], function, Z, books.to(dtype))


@for_every_function
def test_rank(function: Callable, shape: tuple[int, ...]) -> None:
    refused(ValueError, ["z", "D", "0"], function, torch.tensor(1.0), torch.zeros(shape))
    for wrong in (shape[1:], (1, *shape)):
        refused(ValueError, [books_name(shape), "K", str(wrong)], function, Z, torch.zeros(wrong))


@for_every_function
def test_dim(function: Callable, shape: tuple[int, ...]) -> None:
    for wrong in ((*shape[:-1], shape[-1] + 1), (*shape[:-1], 1)):
        refused(ValueError, [books_name(shape), "D", "4", str(wrong)], function, Z, torch.zeros(wrong))
    refused(ValueError, ["z", "D", "(3, 0)"], function, torch.zeros(3, 0), torch.zeros(*shape[:-1], 0))
    big = torch.zeros(1).expand(2, 4098)
    books = torch.zeros(1).expand(*shape[:-1], 4098 // (2 if "product" in function.__name__ else 1))
    refused(ValueError, ["z", "4096", str(tuple(big.shape))], function, big, books)


@for_every_function
def test_number_of_codewords(function: Callable, shape: tuple[int, ...]) -> None:
    curve = "sf" in function.__name__ or function is F.project
    for codewords in (0, 1) if curve else (0,):
        wrong = (*shape[:-2], codewords, shape[-1])
        words = [books_name(shape), "K", str(codewords + 1 if not curve else 2), str(wrong)]
        refused(ValueError, words, function, Z, torch.zeros(wrong))
    wrong = (*shape[:-2], 2**22 + 1, shape[-1])
    refused(ValueError, [books_name(shape), "K", str(wrong)], function, Z, torch.zeros(1).expand(wrong))


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q.kind != "single"], ids=str)
def test_number_of_codebooks(quantizer: Quantizer) -> None:
    for wrong in (0, 65536):
        shape = (wrong, 5, 4)
        refused(ValueError, ["codebooks", "from 1 to 65535", str(shape)], quantizer, Z, torch.zeros(1).expand(shape))
    if quantizer.kind == "product":
        three = torch.zeros(3, 5, 1)  # 3 groups do not divide 4
        refused(ValueError, ["codebooks", "4", str(tuple(three.shape))], quantizer, Z, three)


@for_every_function
def test_device(function: Callable, shape: tuple[int, ...]) -> None:
    books = torch.zeros(shape)
    elsewhere = {"device": "meta"}
    refused(ValueError, [books_name(shape), "device", "cpu", "meta"], function, Z, books.to(**elsewhere))
    mask = torch.ones(3, 2, dtype=torch.bool, **elsewhere)
    refused(ValueError, ["mask", "device", "cpu", "meta"], function, Z, books, mask=mask)


# ---- keywords --------------------------------------------------------------------------------------------------------


@for_every_function
def test_mask(function: Callable, shape: tuple[int, ...]) -> None:
    books = torch.zeros(shape)
    for wrong in ((3, 1), (2, 3), (6,), (3, 2, 4), ()):
        mask = torch.ones(wrong, dtype=torch.bool)
        refused(ValueError, ["mask", "(3, 2)", str(wrong)], function, Z, books, mask=mask)
    for dtype in (torch.uint8, torch.float32):
        mask = torch.ones(3, 2, dtype=dtype)
        refused(TypeError, ["mask", "bool", str(dtype)], function, Z, books, mask=mask)
    refused(TypeError, ["mask", "bool", "list"], function, Z, books, mask=[[True, True]] * 3)
    mask = torch.ones(3, 2, dtype=torch.bool)
    refused(TypeError, ["mask", "dense", "sparse_coo"], function, Z, books, mask=mask.to_sparse())
    refused(TypeError, ["mask", "dense", "nested"], function, Z, books, mask=torch.nested.nested_tensor([mask, mask]))


@for_every_function
@pytest.mark.parametrize("precision", ["exactly", "", None, 16])
def test_precision(function: Callable, shape: tuple[int, ...], precision: Any) -> None:
    kind = ValueError if isinstance(precision, str) else (TypeError, ValueError)
    with pytest.raises(kind, match=rf"precision.*exact.*fast.*got {re.escape(repr(precision))}"):
        function(Z, torch.zeros(shape), precision=precision)


@for_every_function
def test_backend(function: Callable, shape: tuple[int, ...]) -> None:
    words = ["backend", "reference", "triton", "cuda", "cpu", "'nope'"]
    with pytest.raises(ValueError) as error:
        function(Z, torch.zeros(shape), backend="nope")
    assert all(word in str(error.value) for word in words)
    refused(TypeError, ["backend", "string", "int"], function, Z, torch.zeros(shape), backend=3)


@for_every_quantizer
def test_noise_std(quantizer: Quantizer) -> None:
    books = torch.zeros(quantizer.books_shape(5, 4))
    for wrong in (-1e-3, -1, float("nan"), float("inf"), -float("inf"), 1e16):
        refused(ValueError, ["noise_std", "0", str(wrong).lstrip("-")], quantizer, Z, books, noise_std=wrong)
    for wrong in ("1e-3", None, [0.1], 1j, True):
        name = type(wrong).__name__
        refused(TypeError, ["noise_std", "number", name], quantizer, Z, books, noise_std=wrong)
    assert quantizer(Z, books, noise_std=1e15).z_q.isfinite().all()  # the most that there may be


@for_every_quantizer
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_seed(quantizer: Quantizer, noise_std: float) -> None:
    """Checked whether or not there is noise."""
    books = torch.zeros(quantizer.books_shape(5, 4))
    keywords = {"noise_std": noise_std}
    for wrong in (1.5, "7", [1], True):
        refused(TypeError, ["seed", "int", type(wrong).__name__], quantizer, Z, books, seed=wrong, **keywords)
    for dtype in (torch.float32, torch.int32):
        wrong = torch.zeros((), dtype=dtype)
        refused(TypeError, ["seed", "int64", str(dtype)], quantizer, Z, books, seed=wrong, **keywords)
    wrong = torch.tensor(3).to_sparse()
    refused(TypeError, ["seed", "dense", "sparse_coo"], quantizer, Z, books, seed=wrong, **keywords)
    wrong = torch.zeros(1, dtype=torch.int64)
    refused(ValueError, ["seed", "(1,)"], quantizer, Z, books, seed=wrong, **keywords)
    wrong = torch.zeros((), dtype=torch.int64, device="meta")
    refused(ValueError, ["seed", "device", "cpu", "meta"], quantizer, Z, books, seed=wrong, **keywords)
    for wrong in (2**63, -(2**63) - 1):
        refused(ValueError, ["seed", str(wrong).lstrip("-")], quantizer, Z, books, seed=wrong, **keywords)


@space_filling
def test_dither(quantizer: Quantizer) -> None:
    books = torch.zeros(quantizer.books_shape(5, 4))
    right = (*books.shape[:-2], 4)
    for wrong in ((*right[:-1], 5), (*right, 1), (1, *right), ()):
        dither = torch.zeros(wrong)
        refused(ValueError, ["dither", str(right), str(wrong)], quantizer, Z, books, dither=dither)
    dither = torch.zeros(right, dtype=torch.int64)
    refused(TypeError, ["dither", "float32", "torch.int64"], quantizer, Z, books, dither=dither)
    refused(TypeError, ["dither", "Tensor", "float"], quantizer, Z, books, dither=0.5)
    dither = torch.zeros(right, device="meta")
    refused(ValueError, ["dither", "device", "cpu", "meta"], quantizer, Z, books, dither=dither)


@residual
def test_num_active(function: Callable) -> None:
    books = torch.zeros(3, 5, 4)
    for wrong in (-1, 0, 4):
        refused(ValueError, ["num_active", "3", str(wrong).lstrip("-")], function, Z, books, num_active=wrong)
    for wrong in (1.0, "2", [1], True):
        refused(TypeError, ["num_active", "int", type(wrong).__name__], function, Z, books, num_active=wrong)
    for dtype in (torch.float32, torch.bool):
        wrong = torch.ones(3, 2, dtype=dtype)
        refused(TypeError, ["num_active", "int64", str(dtype)], function, Z, books, num_active=wrong)
    for shape in ((2, 3), (3,), (3, 2, 1)):
        wrong = torch.ones(shape, dtype=torch.int64)
        refused(ValueError, ["num_active", "(3, 2)", str(shape)], function, Z, books, num_active=wrong)
    wrong = torch.ones(3, 2, dtype=torch.int32).to_sparse()
    refused(TypeError, ["num_active", "dense", "sparse_coo"], function, Z, books, num_active=wrong)
    wrong = torch.ones(3, 2, dtype=torch.int64, device="meta")
    refused(ValueError, ["num_active", "device", "cpu", "meta"], function, Z, books, num_active=wrong)


@residual
@pytest.mark.parametrize("values", [(-5, 99), (2 - 2**32, 2**32), (-(2**63), 2**63 - 1)])
def test_num_active_out_of_range_in_a_tensor(function: Callable, values: tuple[int, int]) -> None:
    """Values in a tensor are not looked at on the host: below 0 is like 0, above Q like Q."""
    gen = torch.Generator().manual_seed(0)
    z, books = torch.randn(2, 4, generator=gen), torch.randn(3, 5, 4, generator=gen)
    dither = {"dither": torch.rand(3, 4)} if function is F.residual_sf_diveq else {}
    found = function(z, books, num_active=torch.tensor(values), noise_std=0, **dither)
    expected = function(z, books, num_active=torch.tensor([0, 3]), noise_std=0, **dither)
    assert torch.equal(found.z_q, expected.z_q) and torch.equal(found.indices, expected.indices)


@for_every_function
def test_the_smallest_valid_input(function: Callable, shape: tuple[int, ...]) -> None:
    """The tests above would also pass if everything were refused."""
    books = torch.zeros(*shape[:-2], 2, shape[-1])
    for tensor in function(Z, books, mask=torch.ones(3, 2, dtype=torch.bool), precision="fast"):
        assert isinstance(tensor, Tensor)
    function(torch.zeros(4), books.double(), precision="exact", backend="reference")
