"""Files of codes: packed symbols, what is needed to decode them, and a digest of the model that must do it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diveq_kernels import pack_codes, unpack_codes

from .settings import InputError
from .training import Run

FORMAT = 2
_FIELDS = {"format", "kind", "fingerprint", "model", "packed"}


def fingerprint(run: Run) -> str:
    """A digest of every weight and codeword: what decoder and encoder must share."""
    digest = hashlib.sha256()
    for module in run.modules().values():
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def write(path: Path, run: Run, model_path: Path, codes: Tensor, num_codes: int, **fields: int) -> int:
    """Writes codes and the fields that decoding them needs -> the number of bits of the codes alone."""
    packed = np.frombuffer(pack_codes(codes, num_codes), np.uint8)
    with open(path, "wb") as file:  # a file object: numpy would change a name that does not end in .npz
        np.savez(
            file,
            format=FORMAT,
            kind=run.kind,
            fingerprint=fingerprint(run),
            model=model_path.as_posix(),
            packed=packed,
            **fields,
        )
    return codes.numel() * (num_codes - 1).bit_length()


def read(path: Path) -> dict[str, Any]:
    """The content of a code file, its codes unpacked.

    Raises:
        InputError: no such file, or not such a file.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not _FIELDS <= set(archive.files):
                raise InputError("it lacks " + ", ".join(sorted(_FIELDS - set(archive.files))))
            content = {name: archive[name].item() for name in archive.files if name != "packed"}
            content["codes"] = unpack_codes(archive["packed"].tobytes())
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path} is not a file that codec.py wrote: {error}") from error
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}; this codec reads {FORMAT}")
    return content


def codes(content: dict[str, Any], run: Run, shape: tuple[int, ...], num_codes: int) -> Tensor:
    """The codes of what ``read`` gave, on the run's device.

    Raises:
        InputError: the file was coded with another model, or is damaged.
    """
    if content["fingerprint"] != fingerprint(run):
        raise InputError("the file was coded with another model: use the checkpoint that encoded it")
    found: Tensor = content["codes"]
    if tuple(found.shape) != shape or int(found.max()) >= num_codes:
        raise InputError(f"the file is damaged: codes must be {shape} and below {num_codes}; got {tuple(found.shape)}")
    return found.to(run.device)
