"""Recorded speech from a folder of wav files: reading, the division in training and held-out files, and clips."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import torch
from common.settings import InputError, is_held_out
from torch import Tensor

FOLDER = Path("/usr/share/asterisk/sounds")
PACKAGE = "asterisk-core-sounds-en-wav"  # Debian and Ubuntu
# In that package, but not speech.
NOT_SPEECH = frozenset({"ascending-2tone", "beep", "beeperr", "descending-2tone", "tt-monkeys"})
SILENT = 0.01  # a file whose peak is below this share of the full scale is left out


@dataclass
class Corpus:
    """Files by name, relative to the folder and without the ending; int16 [T] each."""

    rate: int
    train: dict[str, Tensor]
    held_out: dict[str, Tensor]


def read_wav(path: Path) -> tuple[Tensor, int]:
    """16-bit wav file -> int16 [T] (several channels: their mean), samples per second.

    Raises:
        InputError: there is no such file, or it is not 16-bit PCM.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = bytearray(file.readframes(file.getnframes()))
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} is not a readable wav file: {error}") from error
    if width != 2:
        raise InputError(f"{path} has samples of {8 * width} bits; 16-bit PCM is needed")
    samples = torch.frombuffer(content, dtype=torch.int16) if content else torch.zeros(0, dtype=torch.int16)
    return samples.view(-1, channels).float().mean(dim=1).round().to(torch.int16), rate


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """int16 [T] -> wav file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.cpu().numpy().astype("<i2").tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def load(folder: Path) -> Corpus:
    """Every wav file below a folder; silent files, copies of others and ``NOT_SPEECH`` are left out.

    The division goes by the first two words of a file's name, so that variants of a prompt (`conf-adminmenu` and
    `conf-adminmenu-18`) are on one side.

    Raises:
        InputError: no such folder, files of different rates, or too few of them.
    """
    paths = sorted(Path(folder).rglob("*.wav"))
    if not paths:
        hint = f"; apt install {PACKAGE} brings recorded speech to {FOLDER}" if folder == FOLDER else ""
        raise InputError(f"no wav files in {folder}{hint}")
    corpus, seen, rates = Corpus(0, {}, {}), set(), {}
    for path in paths:
        samples, rate = read_wav(path)
        content = samples.numpy().tobytes()
        if path.stem in NOT_SPEECH or content in seen or not len(samples) or samples.abs().max() < SILENT * 2**15:
            continue
        seen.add(content)
        rates[rate] = path
        name = path.relative_to(folder).with_suffix("").as_posix()
        split = corpus.held_out if is_held_out("-".join(name.split("/")[-1].split("-")[:2])) else corpus.train
        split[name] = samples
    if len(rates) > 1:
        raise InputError("all wav files must have one rate; got " + ", ".join(f"{p} {r}" for r, p in rates.items()))
    if not corpus.train or not corpus.held_out:
        counts = f"{len(corpus.train)} and {len(corpus.held_out)}"
        raise InputError(f"{folder} must have files to train on and to hold out; its names divide into {counts}")
    corpus.rate = next(iter(rates))
    return corpus


def to_float(samples: Tensor) -> Tensor:
    """int16 -> float32 in [-1, 1)."""
    return samples.float() / 2**15


def to_int16(wave: Tensor) -> Tensor:
    """The network's output -> int16, clipped and rounded: what a decoded file holds."""
    return (wave * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


def random_clips(samples: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Clips of [T], all training files one after another, from places drawn at random -> int16 [count, 1, size].

    Raises:
        InputError: there are fewer samples than a clip has.
    """
    if size > len(samples):
        raise InputError(f"clip must be at most {len(samples)}, the samples there are; got {size}")
    starts = torch.randint(len(samples) - size + 1, (count,), generator=generator).tolist()
    return torch.stack([samples[None, start : start + size] for start in starts])
