"""The images: handwritten digits that scikit-learn brings, or a folder of image files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common.settings import InputError, is_held_out
from PIL import Image, ImageOps
from torch import Tensor
from vqvae.data import read_image

DIGITS = "digits"
_ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}


@dataclass
class Images:
    """Pictures uint8 [n, C, size, size] and their classes int64 [n]; ``classes`` is 1 where there are none."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: int
    flip: bool  # whether a mirrored picture is as likely

    @property
    def size(self) -> int:
        return self.train.shape[-1]

    @property
    def channels(self) -> int:
        return self.train.shape[1]


def load(source: str, size: int) -> Images:
    """The digits (8 x 8, whatever ``size``), or the files of a folder, each cut to a square and scaled to ``size``.

    Raises:
        InputError: no such folder, a file that is no image, or too few files.
    """
    if source == DIGITS:
        from sklearn.datasets import load_digits

        bunch = load_digits()  # comes inside the package
        pictures = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
        names = [f"digits-{index}" for index in range(len(pictures))]
        return _divide(pictures, torch.from_numpy(bunch.target).long(), names, 10, flip=False)
    paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in _ENDINGS)
    if len(paths) < 2:
        raise InputError(f"--data must be {DIGITS!r} or a folder of image files; {source} has {len(paths)}")
    pictures = torch.stack([_square(read_image(path), size) for path in paths])
    names = [path.relative_to(source).as_posix() for path in paths]
    return _divide(pictures, torch.zeros(len(paths), dtype=torch.int64), names, 1, flip=True)


def _square(image: Tensor, size: int) -> Tensor:
    fitted = ImageOps.fit(Image.fromarray(image.permute(1, 2, 0).numpy()), (size, size))
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _divide(pictures: Tensor, labels: Tensor, names: list[str], classes: int, *, flip: bool) -> Images:
    out = torch.tensor([is_held_out(name, 5) for name in names])
    if out.all() or not out.any():
        raise InputError(f"there must be images to train on and to hold out; all {len(names)} are on one side")
    return Images(pictures[~out], labels[~out], pictures[out], labels[out], classes, flip)
