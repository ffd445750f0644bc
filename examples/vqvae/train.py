"""One training run: the loop, its progress bar, and checkpoints that continue it exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from . import quantizers
from .config import Config, InputError
from .data import random_crops, to_float
from .evaluate import mean_psnr
from .model import Autoencoder

FORMAT = 1  # of checkpoints


class Run:
    """Model, quantizer, optimizer, random state and history of one run at one step."""

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self.config, self.device, self.step = config, torch.device(device), 0
        torch.manual_seed(config.seed)
        # The network is made first: with one seed it starts from the same weights whatever the quantizer.
        self.model = Autoencoder(config.width, config.dim).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.quantizer = quantizers.build(config).to(device)
        parameters = [*self.model.parameters(), *self.quantizer.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=config.lr)
        self.crops = torch.Generator().manual_seed(config.seed)  # its own, so that every method sees the same crops
        self.history: dict[str, list[float]] = {
            name: [] for name in ("step", "loss", "psnr", "used", "ms", "quantizing", "eval_step", "eval_psnr")
        }

    # ---- training ----------------------------------------------------------------------------------------------------

    def advance(self, photos: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step -> total loss, reconstruction MSE (0-dim, not synchronised), symbols."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * _cosine(self.step / self.config.steps)
        batch = random_crops(photos, self.config.batch, self.config.crop, self.crops)
        images = to_float(batch.to(self.device)).contiguous(memory_format=torch.channels_last)
        z_q, symbols, own_loss = self.quantizer(self.model.encoder(images))
        mse = nnf.mse_loss(self.model.decoder(z_q), images)
        loss = mse if own_loss is None else mse + own_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach(), mse.detach(), symbols

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "format": FORMAT,
            "config": self.config.as_dict(),
            "step": self.step,
            "model": self.model.state_dict(),
            "quantizer": self.quantizer.state_dict(),
            "quantizer_buffers": dict(self.quantizer.named_buffers()),  # those too that no state_dict holds
            "optimizer": self.optimizer.state_dict(),
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
                "crops": self.crops.get_state(),
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
    def load(cls, path: Path, device: str = "cpu", *, config: Config | None = None) -> Run:
        """The run that ``save`` wrote.

        Raises:
            InputError: no such file, not such a checkpoint, or one of a run with other settings than ``config``.
        """
        state = read_checkpoint(path, device)
        saved = Config.from_dict(state["config"])
        if config is not None and config != saved:
            a, b = config.as_dict(), saved.as_dict()
            differing = ", ".join(f"{key}={b[key]} (asked for: {a[key]})" for key in a if a[key] != b[key])
            raise InputError(f"{path} cannot be resumed, its settings differ: {differing}")
        run = cls(saved, device)
        run.model.load_state_dict(state["model"])
        run.quantizer.load_state_dict(state["quantizer"])
        buffers = dict(run.quantizer.named_buffers())
        for name, value in state["quantizer_buffers"].items():
            buffers[name].copy_(value)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.history = state["step"], state["history"]
        torch.set_rng_state(state["rng"]["torch"].cpu())
        if run.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), run.device)
        run.crops.set_state(state["rng"]["crops"].cpu())
        return run


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint's content, with the errors that ``Run.load`` describes."""
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; train one with train_vqvae.py")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for what is not a checkpoint
        raise InputError(f"{path} is not a checkpoint of train_vqvae.py") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of train_vqvae.py, or one of another version")
    return state


def train(
    run: Run,
    photos: list[Tensor],
    held_out: list[Tensor],
    path: Path,
    after_log: Callable[[Run], None] | None = None,
) -> None:
    """Trains to ``config.steps``, logging, evaluating and checkpointing at the intervals of the configuration."""
    config, history = run.config, run.history
    run.model.train()
    run.quantizer.train()
    bar = tqdm(total=config.steps, initial=run.step, desc=f"{config.method} seed {config.seed}", mininterval=0.5)
    losses, mses, seen, began = [], [], [], time.perf_counter()
    while run.step < config.steps:
        loss, mse, symbols = run.advance(photos)
        losses.append(loss)
        mses.append(mse)
        seen.append(symbols)
        bar.update()
        last = run.step == config.steps
        if run.step % config.log_every and not last:
            continue
        mean_loss, mean_mse = float(torch.stack(losses).mean()), float(torch.stack(mses).mean())
        elapsed = time.perf_counter() - began  # after the two floats, so a GPU has finished
        history["step"].append(run.step)
        history["loss"].append(mean_loss)
        history["psnr"].append(-10 * math.log10(mean_mse))
        history["quantizing"].append(float(run.quantizer.quantizing))
        history["used"].append(
            torch.cat([s.flatten() for s in seen]).bincount().count_nonzero().item() / run.quantizer.num_symbols()
            if run.quantizer.quantizing
            else 0.0
        )
        history["ms"].append(1e3 * elapsed / len(losses))
        bar.set_postfix_str(f"loss {mean_loss:.5f}, PSNR {history['psnr'][-1]:.2f} dB, used {history['used'][-1]:.0%}")
        if run.step % config.eval_every == 0 or last:
            if run.quantizer.quantizing:
                history["eval_step"].append(run.step)
                history["eval_psnr"].append(mean_psnr(run.model, run.quantizer, held_out))
            run.save(path)
        if after_log is not None:
            after_log(run)
        losses, mses, seen, began = [], [], [], time.perf_counter()
    bar.close()


def _cosine(progress: float) -> float:
    """From 1 down to 1 % of the learning rate."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
