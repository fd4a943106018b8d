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
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

TIMEOUT = 60.0  # seconds


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what ``function(*args)`` returns on each rank of a group of ``world`` processes.

    Raises:
        AssertionError: with the tracebacks, if any of them raised or did not end.
    """
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_one_rank, args=(Path(directory), rank, world, function, args))
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
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(world)]


def _one_rank(directory: Path, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        store = FileStore(str(directory / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
        torch.save(function(*args), directory / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (directory / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not the exit handlers of the process that was forked
