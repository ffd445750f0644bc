"""The photographs: which are trained on, which are held out, and how crops are cut. Nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common.settings import InputError
from PIL import Image
from torch import Tensor

# package -> folder inside it; files are opened by path, so no fetcher of either package ever runs.
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}

TRAIN = (
    ("skimage", "hubble_deep_field.jpg"),
    ("skimage", "ihc.png"),
    ("skimage", "motorcycle_left.png"),  # the stereo pair stays on one side of the split
    ("skimage", "motorcycle_right.png"),
    ("skimage", "retina.jpg"),
    ("sklearn", "china.jpg"),
    ("sklearn", "flower.jpg"),
)
HELD_OUT = (
    ("skimage", "astronaut.png"),
    ("skimage", "chelsea.png"),
    ("skimage", "coffee.png"),
    ("skimage", "rocket.jpg"),
)
MAX_SIDE = 800  # larger photographs (hubble, retina) are halved until they fit, or crops of them show no structure


def photograph_path(package: str, name: str) -> Path:
    """Where a photograph lies inside an installed package, which is not imported.

    Raises:
        InputError: the package, or the file inside it, is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise InputError(f"the photographs come with {distribution}: pip install {distribution}")
    path = Path(spec.submodule_search_locations[0]) / _FOLDERS[package] / name
    if not path.is_file():
        raise InputError(f"{package} is installed, but without {path.name} in {_FOLDERS[package]}/")
    return path


def read_image(path: str | Path, *, max_side: int | None = None) -> Tensor:
    """Image file -> uint8 RGB [3, H, W].

    Raises:
        InputError: there is no such file, or it is not an image that Pillow can read.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image file: {error}") from error
    while max_side is not None and max(image.size) > max_side:
        image = image.reduce(2)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def write_image(path: str | Path, image: Tensor) -> None:
    """uint8 RGB [3, H, W] -> image file; the format follows the file's extension.

    Raises:
        InputError: Pillow writes no files with this extension, or not at this place.
    """
    try:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the image {path}: {error}") from error


def load(split: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Photographs of a split, by name: uint8 [3, H, W] each."""
    return {Path(name).stem: read_image(photograph_path(pkg, name), max_side=MAX_SIDE) for pkg, name in split}


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1/2, 1/2], what the network takes and gives."""
    return images.float() / 255 - 0.5


def to_bytes(images: Tensor) -> Tensor:
    """The network's output -> uint8, clipped and rounded: what a decoded file holds."""
    return ((images + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)


def random_crops(photos: list[Tensor], count: int, size: int, generator: torch.Generator, flip: bool = True) -> Tensor:
    """Square crops from photographs [C, H, W] drawn at random, flipped at random -> uint8 [count, C, size, size].

    Raises:
        InputError: a photograph is smaller than the crop.
    """
    smallest = min(min(photo.shape[1:]) for photo in photos)
    if size > smallest:
        raise InputError(f"crop must be at most {smallest}, the smallest side of the photographs; got {size}")
    crops = []
    for which, y, x, flips in torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist():
        photo = photos[int(which * len(photos))]
        top, left = int(y * (photo.shape[1] - size + 1)), int(x * (photo.shape[2] - size + 1))
        crop = photo[:, top : top + size, left : left + size]
        axes = [axis for bit, axis in enumerate((1, 2)) if flip and int(flips * 4) >> bit & 1]
        crops.append(crop.flip(axes) if axes else crop)
    return torch.stack(crops)
