"""ShardedNearest: a codebook too large for one device, split over the processes of a group.

    torchrun --nproc-per-node 2 examples/sharded_codebook.py
    torchrun --nproc-per-node 2 examples/sharded_codebook.py --rows own

With ``--rows same`` every process has the same rows, as in tensor parallelism; with ``own`` rows of its own, and
the rest of the model is under DistributedDataParallel. Runs on CPUs with gloo, or on one GPU per process with nccl. The
data are made: 64-dimensional points of 5000 clusters.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import diveq_kernels.functional as F
from diveq_kernels import ShardedNearest
from diveq_kernels.distributed import keep_shards


class Autoencoder(torch.nn.Module):
    def __init__(self, codewords: int, rows: str) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(64, 16), torch.nn.Linear(16, 64)
        self.quantizer = ShardedNearest(codewords, 16, rows=rows)
        # Not init.normal_ of the part: with one seed everywhere all parts would be the same.
        self.quantizer.load_codebook(torch.randn(codewords, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z_q, _ = self.quantizer.quantize(self.encoder(x))
        return self.decoder(z_q)


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, own = dist.get_rank(), options.rows == "own"

    torch.manual_seed(0)
    clusters = torch.randn(5000, 64)
    autoencoder = Autoencoder(options.codewords, options.rows).to(device)
    model: torch.nn.Module = autoencoder
    if own:
        keep_shards(autoencoder)  # DistributedDataParallel would give every process the first one's part
        model = DistributedDataParallel(autoencoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(rank if own else 0)
    for step in range(1, options.steps + 1):
        chosen = torch.randint(5000, (options.batch,), generator=generator)
        x = (clusters[chosen] + 0.1 * torch.randn(options.batch, 64, generator=generator)).to(device)
        loss = torch.nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step == 1 or step % 25 == 0 or step == options.steps):
            print(f"step {step}: loss {loss.item():.4f}")

    quantizer = autoencoder.quantizer
    z = autoencoder.encoder(x).detach()
    indices = quantizer(z).indices
    whole = quantizer.gather_codebook()  # for a checkpoint that any number of processes can load with load_codebook
    same = torch.equal(indices, F.nearest(z, whole).indices)
    print(f"rank {rank} has {len(quantizer.codebook)} of {len(whole)} codewords; codes of the whole codebook: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1024, help="rows of one process")
    parser.add_argument("--codewords", type=int, default=4096, help="on all processes together")
    parser.add_argument("--rows", choices=("same", "own"), default="same")
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
