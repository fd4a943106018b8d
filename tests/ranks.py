"""Several real processes as ranks, for tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

TIMEOUT = 60.0  # seconds


def on_ranks(
    world: int, function: Callable[..., Any], *args: Any, backend: Literal["gloo", "nccl"] = "gloo"
) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank of a group of ``world`` processes.

    Args:
        world: how many; with "nccl" at most as many as there are GPUs.
        function: what to call; with "nccl" it and its arguments are pickled, because a fork cannot use CUDA.
        args: its arguments.
        backend: "gloo" on the CPU, where no GPU is seen, or "nccl" with a GPU for each rank.

    Raises:
        AssertionError: with the tracebacks, if any of them raised or did not end.
    """
    on_gpus = backend == "nccl"
    world = min(world, torch.cuda.device_count()) if on_gpus else world
    with tempfile.TemporaryDirectory() as directory:
        context: Any = multiprocessing.get_context("spawn" if on_gpus else "fork")
        processes = [
            context.Process(target=_one_rank, args=(Path(directory), rank, world, on_gpus, function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(directory).glob("error-*"))]
        assert not errors, "\n".join(errors)
        assert not hung, f"ranks {hung} have not ended after {TIMEOUT:g} s"
        results = [Path(directory) / f"result-{rank}" for rank in range(world)]
        return [torch.load(result, map_location="cpu", weights_only=False) for result in results]


def _one_rank(
    directory: Path, rank: int, world: int, on_gpus: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        if on_gpus:
            torch.cuda.set_device(rank)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=FileStore(str(directory / "store"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        torch.save(function(*args), directory / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (directory / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not the exit handlers of the process that was forked
