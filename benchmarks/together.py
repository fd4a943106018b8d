"""(i) Two ranks on this machine, in turn with a loop over DistributedDataParallel that is written by hand.

``two_ranks`` starts this file by torchrun, once for ours and once for each peer; each rank then times every contestant
round after round, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from measure import Row, installed, interleave, micro, ratios, spread
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from camshaft.callbacks import Distributed
from camshaft.engine import Trainer

WORLD = 2
BATCH = 64  # of both ranks
PACKAGES = {"pytorch-ignite": "ignite", "lightning": "lightning", "accelerate": "accelerate"}
Run = Callable[[], object]


def two_ranks() -> list[Row]:
    """(i) A step of an MLP with 83,460 parameters on two ranks, with the average of the loss over both."""
    rows = [_row("", kind) for kind in ("list", "loader")]
    for package, module in PACKAGES.items():
        if find_spec(module) is None:
            rows.append(Row("i", f"two ranks: {package}", "skipped: not installed"))
        else:
            rows.append(_row(module, "loader", f"{package} {installed(package)}"))
    return rows


def _row(peer: str, kind: str, name: str = "") -> Row:
    what = f"two ranks, {'ready batches' if kind == 'list' else 'DataLoader'}" + (f": {name}" if name else "")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, kind, peer], capture_output=True, text=True, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        return Row("i", what, f"skipped: {errors[0].strip()}")
    times = json.loads(done.stdout.splitlines()[-1])
    walls = {name.split()[0]: wall for name, wall in times.items() if name.endswith("wall")}
    cost = ", ".join(f"{one} {micro(sorted(wall)[len(wall) // 2])}" for one, wall in walls.items()) + " a step"
    factors = ratios(walls["ours"], walls["hand"])
    middle = sorted(factors)[len(factors) // 2]
    if not peer:
        said = f"{spread(factors)}; CPU time {spread(ratios(times['ours cpu'], times['hand cpu']))}"
        goal = "at most 1.02" if kind == "list" else ""
        return Row("i", what, cost, said, goal, middle <= 1.02 if goal else None, middle)
    of_hand, of_ours = ratios(walls["peer"], walls["hand"]), ratios(walls["peer"], walls["ours"])
    return Row("i", what, cost, f"{spread(of_hand)} of the hand loop, {spread(of_ours)} of ours")


def main(kind: str, peer: str = "", *, rounds: int = 9, steps: int = 0) -> None:
    """Time the contestants on this rank; rank 0 prints the seconds of a step in each round as JSON.

    Ready batches are so many that the beginning and end of a run do not count in the time of a step.
    """
    steps = steps or (1000 if kind == "list" else 300)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    contestants: dict[str, Callable[[Any], Run]] = {"hand": hand_loop, "ours": ours}
    if peer:
        contestants["peer"] = PEERS[peer]
    data = _data(steps, kind)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        times = interleave({name: partial(_together, make, data) for name, make in contestants.items()}, rounds)
    if dist.get_rank() == 0:
        per_step = {f"{name} {clock}": [one / steps for one in getattr(all_, clock)]
                    for name, all_ in times.items() for clock in ("wall", "cpu")}  # fmt: skip
        print(json.dumps(per_step))
    dist.barrier()
    dist.destroy_process_group()


def _together(make: Callable[[Any], Run], data: Any) -> Run:
    """Begin and end together, so that each rank times the slower of them."""
    run = make(data)
    dist.barrier()

    def both() -> None:
        run()
        dist.barrier()

    return both


def _data(steps: int, kind: str) -> Any:
    """Return whole batches in a "list", or the data set that they come from ("loader")."""
    inputs = torch.randn(steps * BATCH, 64, generator=torch.Generator().manual_seed(0))
    target = inputs[:, :4].argmax(1)
    if kind == "list":
        return list(zip(inputs.split(BATCH), target.split(BATCH), strict=True))
    return TensorDataset(inputs, target)


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def ours(data: Any) -> Run:
    model, optimizer = _model()
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Distributed()], seed=0)
    train = data if isinstance(data, list) else DataLoader(data, BATCH, shuffle=True)
    return lambda: trainer.fit(train, epochs=1)


def _own_part(data: Any) -> Any:
    """Return this rank's batches as one reads them by hand."""
    if not isinstance(data, list):
        return DataLoader(data, BATCH // WORLD, sampler=DistributedSampler(data))
    first = dist.get_rank() * BATCH // WORLD
    own = slice(first, first + BATCH // WORLD)
    return ((inputs[own], target[own]) for inputs, target in data)


def hand_loop(data: Any) -> Run:
    model, optimizer = _model()
    replica, loss_fn = DistributedDataParallel(model), nn.CrossEntropyLoss()

    def run() -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for inputs, target in _own_part(data):
            loss = loss_fn(replica(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums[0].add_(loss.detach(), alpha=len(inputs))
            sums[1] += len(inputs)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    return run


def ignite(data: Any) -> Run:
    import ignite.distributed as idist
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Average

    model, _ = _model()
    model = idist.auto_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    Average().attach(trainer, "loss")
    train = _own_part(data)
    return lambda: trainer.run(train, max_epochs=1)


def accelerate(data: Any) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*_model())
    train = accelerator.prepare(DataLoader(data, BATCH // WORLD, shuffle=True))
    loss_fn = nn.CrossEntropyLoss()

    def run() -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for inputs, target in train:
            loss = loss_fn(model(inputs), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            sums[0].add_(loss.detach(), alpha=len(inputs))
            sums[1] += len(inputs)
        sums = accelerator.reduce(sums)
        return float(sums[0] / sums[1])

    return run


def lightning(data: Any) -> Run:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = _model()
            self.loss_fn = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Tensor:
            inputs, target = batch
            loss: Tensor = self.loss_fn(self.model(inputs), target)
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(inputs))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=WORLD, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    module, train = Module(), DataLoader(data, BATCH // WORLD, shuffle=True)
    return lambda: trainer.fit(module, train)


PEERS: dict[str, Callable[[Any], Run]] = {peer.__name__: peer for peer in (ignite, lightning, accelerate)}

if __name__ == "__main__":
    main(*sys.argv[1:])
