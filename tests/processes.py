"""Running a test's function in several gloo processes."""

from __future__ import annotations

import datetime
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def _run(target, *arguments):
    target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends as usual, with nothing left to do


def spawn(target, world, folder, *arguments):
    """Run target(rank, world, folder, *arguments) in processes of their own; their exit codes."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=_run, args=(target, r, world, str(folder), *arguments)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.is_alive():
            process.kill()
            pytest.fail("a process hangs")
    return [process.exitcode for process in processes]
