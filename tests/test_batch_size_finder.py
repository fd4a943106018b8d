"""The batch-size finder: what it finds, and what it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import refused
from test_learning_rate_finder import everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from camshaft.callbacks import BatchSizeFinder, MicroBatch, Schedule, WeightAverage
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, EpochEnd, Trainer


class Small(nn.Sequential):
    """Runs out of memory beyond ``limit`` samples, after it has computed, and counted into a buffer of its own."""

    def __init__(self, limit: int, error: str = "no more") -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
        self.limit, self.error = limit, error

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]  # in torch's stubs
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError(self.error) if self.error == "no more" else RuntimeError(self.error)
        return output


def dataset(num: int = 100) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num, 3, generator=generator), torch.randn(num, 2, generator=generator))


def loader(batch_size: int) -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size, shuffle=True, drop_last=batch_size > 1)


def small_trainer(limit: int, *callbacks: Callback, **settings: Any) -> Engine:
    torch.manual_seed(1)
    model = Small(limit, **settings)
    model[1].eval().requires_grad_(False)  # a batch of one sample has no statistics
    model[1].train = lambda mode=True: model[1]  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, optimizer, nn.MSELoss(), metrics={"mse": MeanSquaredError()}, callbacks=callbacks)


@pytest.mark.parametrize(
    "error",
    ["no more", pytest.param("DefaultCPUAllocator: can't allocate memory: you tried to", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("limit", "halve", "found"), [(1, False, 1), (20, False, 16), (20, True, 20), (27, True, 26), (31, True, 30)]
)
def test_it_finds_the_largest_size_that_fits(limit: int, halve: bool, found: int, error: str) -> None:
    finder = BatchSizeFinder(halve=halve)
    assert finder.run(small_trainer(limit, error=error), loader) == finder.suggestion == found
    assert all(fits == (size <= limit) for size, fits in finder.tried.items())


@pytest.mark.slow
def test_it_ends_where_the_data_or_the_range_end() -> None:
    assert BatchSizeFinder().run(small_trainer(10**6), loader) == 64  # of 100 samples
    assert BatchSizeFinder(48).run(small_trainer(10**6), loader) == 32
    assert BatchSizeFinder(48, halve=True).run(small_trainer(10**6), loader) == 32


def test_everything_is_left_as_it_was_to_the_bit() -> None:
    """Model, buffers, modes, optimizer, gradients, counters, history, random numbers; also when memory was short."""
    average = WeightAverage("ema")
    schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    trainer = small_trainer(20, average, schedule)
    heard: list[int] = []
    trainer.subscribe(EpochEnd, lambda event: heard.append(event.engine.epoch))
    trainer.fit(loader(10), epochs=2)
    before = everything(trainer), [value.tolist() for value in trainer.parts["weight_average"].state_dict().values()]
    BatchSizeFinder(num_steps=5, halve=True).run(trainer, loader)
    assert (everything(trainer), [v.tolist() for v in trainer.parts["weight_average"].state_dict().values()]) == before
    assert heard == [1, 2]


def test_a_fit_after_it_is_the_fit_without_it() -> None:
    weights = []
    for finds in (False, True):
        trainer = small_trainer(20, MicroBatch())
        if finds:
            assert BatchSizeFinder().run(trainer, loader) == 16
        trainer.fit(loader(16), epochs=2)
        weights.append([p.detach().clone() for p in trainer.parts["model"].parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_step_of_ones_own_is_tried_with_its_parts() -> None:
    def step(engine: Engine, batch: Any) -> Tensor:
        loss = (engine.parts["model"](batch[0]) - batch[1]).square().mean()
        engine.update(loss)
        return loss  # type: ignore[no-any-return]

    trainer = small_trainer(7)
    engine = Engine(step, model=trainer.parts["model"], optimizer=trainer.parts["optimizer"])
    assert BatchSizeFinder().run(engine, loader) == 4


def test_a_real_lack_of_memory_on_the_cpu_is_found() -> None:
    """In a process with an address space of 1 GiB more than it has; a sample takes 4 MiB in each of a few places."""
    code = """
import resource, sys, torch
from torch import nn
from camshaft.engine import Trainer
from camshaft.callbacks import BatchSizeFinder
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(1, 2**20), nn.ReLU(), nn.Linear(2**20, 1))
trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss())
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))
finder = BatchSizeFinder(4096, num_steps=1)
print(finder.run(trainer, lambda size: [(torch.ones(size, 1), torch.ones(size, 1))]), finder.tried)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, tried = done.stdout.split(" ", 1)
    assert 8 <= int(found) <= 256
    assert f"{int(found) * 2}: False" in tried


def test_ctrl_c_ends_the_search_and_leaves_the_weights() -> None:
    trainer = small_trainer(10**6)
    before = everything(trainer)

    def data_of(batch_size: int) -> Any:
        if batch_size == 4:
            return interrupting
        return loader(batch_size)

    def interrupting() -> Any:
        for batch in loader(4):
            yield batch
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        BatchSizeFinder().run(trainer, data_of)
    assert everything(trainer)[:5] == before[:5]


def test_what_it_cannot_do_is_refused() -> None:
    finder = BatchSizeFinder()
    with refused(ConfigurationError, "BatchSizeFinder makes the steps of an engine"):
        finder.run(Engine(), loader)
    with refused(ConfigurationError, "not a function of a batch size", "Write lambda batch_size:"):
        finder.run(small_trainer(4), loader(4))  # type: ignore[arg-type]
    with refused(DataError, "Not a single sample fits"):
        finder.run(small_trainer(0), loader)
    with refused(DataError):
        finder.run(small_trainer(4), lambda size: [])
    with refused(ConfigurationError, "max_batch_size is 0, which is not a count"):
        BatchSizeFinder(0)
    with refused(ConfigurationError, "num_steps is 0, which is not a count"):
        BatchSizeFinder(num_steps=0)
    with pytest.raises(DataError, match="could not take"):  # not a lack of memory
        finder.run(small_trainer(4), lambda size: [(torch.ones(size, 3), [])])
