"""Running a test's function in several gloo processes."""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 240  # seconds: after these a process says where it is

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def start(rank, world, folder, timeout=60):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _run(target, rank, world, folder, *arguments):
    """Call target, which must leave its process group alone.

    gloo's threads take the GIL to let go of the tensors of their last collective. They deadlock with a destructor of
    the group that runs in DistributedDataParallel's, which holds the GIL, and may abort an interpreter that ends.
    """
    with open(_stacks(folder, rank), "w") as stacks:
        faulthandler.dump_traceback_later(PATIENCE, file=stacks)
        target(rank, world, folder, *arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _stacks(folder, rank):
    return f"{folder}/stacks{rank}"


def spawn(target, world, folder, *arguments):
    """Run target(rank, world, folder, *arguments) in processes of their own; their exit codes."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=_run, args=(target, r, world, str(folder), *arguments)) for r in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE + 10
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    if hanging:
        pytest.fail("\n".join(f"rank {rank} hangs\n{Path(_stacks(folder, rank)).read_text()}" for rank in hanging))
    return [process.exitcode for process in processes]
