"""What is measured, in parts that can be run one by one; shapes are (N, K, D).

The working sizes are those that the package is made for: the paper's VQ-VAE, VQGAN, image tokenizers for language
models, speech codecs. A CPU gets what one core does in minutes.
"""

from __future__ import annotations

from typing import NamedTuple

from diveq_kernels.benchmark.cases import CODEBOOKS, OPERATIONS, Case

STAGES = 8


class Part(NamedTuple):
    """Cases that belong together.

    Attributes:
        about: One line.
        cases: For a kind of device.
        references: Whether the slow reference takes part.
        compiled: Whether diveq under torch.compile does.
    """

    about: str
    cases: dict[str, list[Case]]
    reference: bool = False
    compiled: bool = False


Shape = tuple[int, int, int]
_VQVAE, _VQGAN, _LLM, _SPEECH = (8192, 1024, 512), (2048, 16384, 256), (2048, 65536, 8), (16384, 1024, 64)
_WORKING = {
    "cpu": [_VQVAE, _VQGAN, (8192, 1024, 256), (8192, 8192, 32), _LLM, _SPEECH],
    "cuda": [
        _VQVAE,
        _VQGAN,
        (131072, 16384, 256),
        (131072, 16384, 32),
        (131072, 65536, 16),
        (1048576, 262144, 8),
        (262144, 1024, 64),
    ],
}
_SWEEPS: dict[str, dict[str, list[Shape]]] = {
    "rows": {
        "cpu": [(n, 1024, 64) for n in (1, 16, 256, 1024, 4096, 16384, 65536)],
        "cuda": [(n, 4096, 128) for n in (1024, 4096, 16384, 65536, 262144, 1048576)],
    },
    "codewords": {
        "cpu": [(512, k, 64) for k in (256, 1024, 4096, 16384, 65536, 262144)],
        "cuda": [(65536, k, 128) for k in (256, 1024, 4096, 16384, 65536, 262144)],
    },
    "dims": {
        "cpu": [(8192, 1024, d) for d in (4, 16, 64, 256, 1024)],
        "cuda": [(65536, 4096, d) for d in (4, 8, 16, 32, 64, 128, 256, 512, 1024)],
    },
}
_ONE = {"cpu": _SPEECH, "cuda": (131072, 4096, 128)}
_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}


def _each(operations: tuple[str, ...], shapes: dict[str, list[Shape]]) -> dict[str, list[Case]]:
    return {
        device: [
            Case(operation, *shape, dtype)
            for operation in operations
            for dtype in _DTYPES[device]
            for shape in shapes[device]
        ]
        for device in shapes
    }


def _every_operation(shape: Shape, dtypes: tuple[str, ...]) -> list[Case]:
    stacked = ("residual", "product")
    return [
        Case(operation, *shape, dtype, STAGES if operation in stacked else 1)
        for operation in OPERATIONS
        for dtype in dtypes
    ]


PARTS = {
    "shapes": Part("search and training step at the working sizes", _each(("search", "train"), _WORKING)),
    "operations": Part(
        "every operation at one shape", {device: _every_operation(_ONE[device], _DTYPES[device]) for device in _ONE}
    ),
    "codewords": Part("against K", _each(("search", "train"), _SWEEPS["codewords"])),
    "rows": Part("against N", _each(("search", "train"), _SWEEPS["rows"])),
    "dims": Part("against D", _each(("search", "train"), _SWEEPS["dims"])),
    "dtypes": Part(
        "search and training step in each dtype",
        {
            device: [
                Case(operation, *shape, dtype)
                for operation in ("search", "train")
                for dtype in ("float32", "bfloat16", "float16")
            ]
            for device, shape in _ONE.items()
        },
    ),
    "codebooks": Part(
        "search of codebooks as they are drawn, and with dead codewords",
        {
            device: [
                Case("search", *shape, dtype, codebook=codebook) for dtype in _DTYPES[device] for codebook in CODEBOOKS
            ]
            for device, shape in {"cpu": (4096, 8192, 128), "cuda": (131072, 8192, 128)}.items()
        },
    ),
    "backends": Part(
        "every backend, the reference too", _each(("search", "train"), {"cpu": [_SPEECH], "cuda": [_ONE["cuda"]]}), True
    ),
    "compiled": Part(
        "training step beside diveq under torch.compile",
        _each(("train",), {"cpu": [_SPEECH], "cuda": [(131072, 4096, 128), (131072, 16384, 32)]}),
        compiled=True,
    ),
}
