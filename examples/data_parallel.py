"""DIVEQ under DistributedDataParallel: every process trains on rows of its own, and all have one codebook.

    torchrun --nproc-per-node 2 examples/data_parallel.py

Runs on CPUs with gloo, or on one GPU per process with nccl. The data are made: 64-dimensional points of 500 clusters.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diveq_kernels import DIVEQ


class Autoencoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(64, 16), torch.nn.Linear(16, 64)
        self.quantizer = DIVEQ(256, 16, replacement_iters=20, allow_warning=False, verbose=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_q, _, perplexity = self.quantizer(self.encoder(x))
        return self.decoder(z_q), perplexity


def train(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    clusters = torch.randn(500, 64)
    # Nothing else is needed: use, replacements and (for the SF layers) λ and initialisation are those of all ranks.
    model = DistributedDataParallel(Autoencoder().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())  # rows of its own
    for step in range(1, options.steps + 1):
        chosen = torch.randint(500, (options.batch,), generator=generator)
        x = (clusters[chosen] + 0.1 * torch.randn(options.batch, 64, generator=generator)).to(device)
        output, perplexity = model(x)
        loss = torch.nn.functional.mse_loss(output, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and (step == 1 or step % 50 == 0 or step == options.steps):
            print(f"step {step}: loss {loss.item():.4f}, perplexity of this rank's rows {perplexity.item():.1f}")

    codebook = model.module.quantizer.codebook.detach()
    everyones = [torch.empty_like(codebook) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, codebook)
    same = all(torch.equal(codebook, other) for other in everyones)
    if dist.get_rank() == 0:
        print(f"{len(everyones)} processes, codebooks bit-identical: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1024, help="rows of one process")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    train(options, device)
    dist.barrier()
    dist.destroy_process_group()  # when the model is gone: gloo's can deadlock in DistributedDataParallel's destructor


if __name__ == "__main__":
    main()
    # Without the interpreter's tear-down, in which threads of torch.distributed that still run now and then abort.
    sys.stdout.flush()
    os._exit(0)
