"""One training run: the loop, its progress bar, and checkpoints that continue it exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .settings import InputError, Settings

FORMAT = 3  # of checkpoints
Self = TypeVar("Self", bound="Run")


class Run:
    """Modules, optimizer, random state and history of one run at one step.

    A subclass makes its modules (``build``), takes a step (``advance``), and says what to log of some steps
    (``summarise``) and to measure on held-out data (``measure``). What it is trained on and measured with is passed
    to ``train``, so that a run can be loaded and used without any.
    """

    kind: ClassVar[str]  # what the checkpoint holds; `codec.py` finds the code that reads it by this
    settings: ClassVar[type[Settings]]
    parts: ClassVar[tuple[str, ...]]  # attributes that hold modules, in the order of the optimizer's groups
    history: dict[str, list[float]]

    def __init__(self, config: Any, device: str = "cpu") -> None:
        self.config, self.device, self.step, self.history = config, torch.device(device), 0, {}
        torch.manual_seed(config.seed)
        self.build()
        self.rates = [config.quantizer_lr if part == "quantizer" else config.lr for part in self.parts]
        self.optimizer = torch.optim.Adam({"params": list(part.parameters())} for part in self.modules().values())
        self.draws = torch.Generator().manual_seed(config.seed)  # its own, so that every method sees the same data

    def modules(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in self.parts}

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Sets the attributes ``parts``. Torch's generator has been seeded."""
        raise NotImplementedError

    def advance(self, data: Any) -> dict[str, Tensor]:
        """One optimizer step -> what ``summarise`` needs, not synchronised with the host."""
        raise NotImplementedError

    def summarise(self, steps: list[dict[str, Tensor]]) -> dict[str, float]:
        """What the history keeps of the steps since the last log."""
        raise NotImplementedError

    def measure(self, held_out: Any) -> dict[str, float]:
        """Held-out measures for the learning curve."""
        raise NotImplementedError

    @property
    def quantizing(self) -> bool:
        """False while latents are not quantized yet: nothing is measured on held-out data then."""
        return True

    # ---- steps -------------------------------------------------------------------------------------------------------

    def update(self, loss: Tensor) -> None:
        """The optimizer's step down ``loss``, at this step's learning rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _cosine(self.step / self.config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def train_mode(self, training: bool = True) -> None:
        for part in self.modules().values():
            part.train(training)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        parts = self.modules()
        return {
            "format": FORMAT,
            "kind": self.kind,
            "config": self.config.as_dict(),
            "step": self.step,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            # those too that no state_dict holds
            "buffers": {name: dict(part.named_buffers()) for name, part in parts.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
                "draws": self.draws.get_state(),
            },
            "history": self.history,
        }

    def save(self, path: Path) -> None:
        """Written beside ``path`` and moved there whole: an interruption leaves the old file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(self.state(), partial)
        os.replace(partial, path)

    @classmethod
    def load(cls: type[Self], path: Path, device: str = "cpu", *, config: Settings | None = None) -> Self:
        """The run that ``save`` wrote.

        Raises:
            InputError: no such file, not such a checkpoint, or one of a run with other settings than ``config``.
        """
        state = read_checkpoint(path, device)
        if state["kind"] != cls.kind:
            raise InputError(f"{path} is a checkpoint of kind {state['kind']!r}; {cls.kind!r} is needed here")
        saved = cls.settings.from_dict(state["config"])
        if config is not None and config != saved:
            a, b = config.as_dict(), saved.as_dict()
            differing = ", ".join(f"{key}={b[key]} (asked for: {a[key]})" for key in a if a[key] != b[key])
            raise InputError(f"{path} cannot be resumed, its settings differ: {differing}")
        run = cls(saved, device)
        for name, part in run.modules().items():
            part.load_state_dict(state["parts"][name])
            buffers = dict(part.named_buffers())
            for key, value in state["buffers"][name].items():
                buffers[key].copy_(value)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.history = state["step"], state["history"]
        torch.set_rng_state(state["rng"]["torch"].cpu())
        if run.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), run.device)
        run.draws.set_state(state["rng"]["draws"].cpu())
        return run

    @property
    def ms_per_step(self) -> float:
        """Of the fastest interval between two logs: other programs' load makes intervals slower, never faster."""
        return min(ms for ms, on in zip(self.history["ms"], self.history["quantizing"], strict=True) if on)


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint's content, with the errors that ``Run.load`` describes."""
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; train one first")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for what is not a checkpoint
        raise InputError(f"{path} is not a checkpoint of the examples") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of the examples, or one of another version")
    return state


def train(run: Run, data: Any, held_out: Any, path: Path, after_log: Callable[[Any], None] | None = None) -> None:
    """Trains to ``config.steps``, logging, measuring and checkpointing at the intervals of the configuration."""
    config = run.config
    run.train_mode()
    bar = tqdm(total=config.steps, initial=run.step, desc=f"{config.method} seed {config.seed}", mininterval=0.5)
    steps: list[dict[str, Tensor]] = []
    began = time.perf_counter()
    while run.step < config.steps:
        steps.append(run.advance(data))
        bar.update()
        last = run.step == config.steps
        if run.step % config.log_every and not last:
            continue
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        elapsed = time.perf_counter() - began
        entry = run.summarise(steps)
        bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        _append(run.history, {"step": run.step, "ms": 1e3 * elapsed / len(steps), "quantizing": float(run.quantizing)})
        _append(run.history, entry)
        if run.step % config.eval_every == 0 or last:
            if run.quantizing:
                run.train_mode(False)
                _append(run.history, {"eval_step": run.step})
                _append(run.history, {f"eval_{name}": value for name, value in run.measure(held_out).items()})
                run.train_mode()
            run.save(path)
        if after_log is not None:
            after_log(run)
        steps, began = [], time.perf_counter()
    bar.close()


def share_used(symbols: list[Tensor], count: int) -> float:
    """The share of ``count`` symbols that occur in any of the tensors; -1 is no symbol."""
    flat = torch.cat([s.flatten() for s in symbols])
    return flat[flat >= 0].bincount().count_nonzero().item() / count


def _append(history: dict[str, list[float]], entry: dict[str, float]) -> None:
    for name, value in entry.items():
        history.setdefault(name, []).append(value)


def _cosine(progress: float) -> float:
    """From 1 down to 1 % of the learning rate."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
