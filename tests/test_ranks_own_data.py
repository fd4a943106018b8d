"""A run over data of each rank's own, resumed from any of its checkpoints, ends as one that was never cut."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import refused
from ranks import on_ranks
from test_signals_everywhere import equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from camshaft.callbacks import Distributed, RunCheckpoint, Schedule, warmup_cosine
from camshaft.engine import Callback, CheckpointDirectory, CheckpointError, Engine, StepEnd, Trainer, at, repeat
from camshaft.engine.rng import rng_state

SAMPLES = [5, 11, 5]  # of the ranks: 2, 4 and 2 batches, of which the last ones are short


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Reads a sample with random numbers from every global generator."""

    def __init__(self, num: int = sum(SAMPLES)) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([index / self.num, *noise]), torch.tensor([index % 2.0])


def numbers() -> range:
    """The numbers of this rank's samples."""
    start = sum(SAMPLES[: dist.get_rank()])
    return range(start, start + SAMPLES[dist.get_rank()])


def read() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches, in an order drawn when the pass begins."""
    order, samples = random.sample(numbers(), len(numbers())), Noisy()
    for start in range(0, len(order), 3):
        inputs, targets = zip(*(samples[index] for index in order[start : start + 3]), strict=True)
        yield torch.stack(inputs), torch.stack(targets)


class Stream(IterableDataset[Any]):
    """This rank's samples, augmented."""

    def __iter__(self) -> Iterator[Any]:
        return (Noisy()[index] for index in numbers())


class Stateful:
    """Keeps its own position, draws a seed when a pass begins, and counts the batches that it reads."""

    def __init__(self) -> None:
        self.position = 0
        self.num_read = 0

    def __iter__(self) -> Iterator[Any]:
        torch.empty((), dtype=torch.int64).random_()  # as torch's loaders do
        return self._read()

    def _read(self) -> Iterator[Any]:
        samples = Noisy()
        while self.position < len(numbers()):
            start, self.position = self.position, self.position + 3
            self.num_read += 1
            inputs, targets = zip(*(samples[index] for index in numbers()[start : self.position]), strict=True)
            yield torch.stack(inputs), torch.stack(targets)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Batches(Dataset[Any]):
    """This rank's batches, augmented, as the samples of a loader that makes no batches."""

    def __len__(self) -> int:
        return SAMPLES[dist.get_rank()] // 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        samples = [Noisy()[number] for number in numbers()[2 * index : 2 * index + 2 + index % 2]]
        return torch.stack([inputs for inputs, _ in samples]), torch.stack([targets for _, targets in samples])


def subset(num_workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Subset(Noisy(), numbers()), 3, shuffle=True, num_workers=num_workers)


def in_a_list() -> list[tuple[Tensor, Tensor]]:
    sizes, generator = (3, 2) if dist.get_rank() == 0 else (3, 3, 3, 2), torch.Generator().manual_seed(dist.get_rank())
    return [(torch.rand(size, 4, generator=generator), torch.ones(size, 1)) for size in sizes]


DATA: dict[str, Callable[[], Any]] = {
    "a loader with a state": Stateful,
    "a function": lambda: read,
    "an iterable dataset": lambda: DataLoader(Stream(), 3),
    "a map-style dataset": subset,
    "a map-style dataset, read by a worker": lambda: subset(num_workers=1),
    "a map-style dataset of batches": lambda: DataLoader(Batches(), None, shuffle=True),
    "an iterator": read,
    "a list": in_a_list,
    "a loader with a state, repeated": lambda: repeat(Stateful()),
    "a map-style dataset, repeated": lambda: repeat(subset()),
}


def engine_of(*callbacks: Callback, data: Any = "sharded") -> Engine:
    """An engine in which the order, the random numbers and the content of stand-ins show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    distributed = Distributed(data=data, batch_norm="local")
    return Trainer(net, optimizer, nn.MSELoss(), callbacks=[distributed, *callbacks], seed=7)


def train(name: str, directory: Path, resume: Path | None = None) -> dict[str, Any]:
    """Return what a run ends with on this rank; without ``resume``, it leaves a checkpoint of each step and epoch."""
    data = DATA[name]()
    engine = engine_of(*([] if resume else [RunCheckpoint(directory, every_steps=1, every_epochs=1, keep=99)]))
    epochs = 1 if name == "an iterator" else 2
    engine.fit(data, epochs=epochs, epoch_length=6 if "repeated" in name else None, resume=resume)
    return {
        "model": engine.parts["model"].state_dict(),
        "optimizer": engine.parts["optimizer"].state_dict(),
        "rows": engine.history.rows,
        "counters": [engine.epoch, engine.step, engine.num_updates],
        "random numbers": rng_state(),
    }


def resumed(name: str, directory: Path) -> dict[str, Any]:
    """Return what each resumed run ends with on this rank, by the name of its checkpoint."""
    return {file.path.name: train(name, directory, file.path) for file in CheckpointDirectory(directory).files()}


SLOW = ("a map-style dataset, read by a worker", "an iterator", "a list", "a loader with a state, repeated")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in DATA])
def test_from_any_checkpoint_a_run_goes_on_as_if_it_had_not_been_cut(name: str, tmp_path: Path) -> None:
    """Within an epoch, at its end, before and after the data of rank 0 have ended; in fresh processes."""
    through = on_ranks(2, train, name, tmp_path)
    epochs, steps, _ = through[0]["counters"]
    for rank, ends in enumerate(on_ranks(2, resumed, name, tmp_path)):
        assert len(ends) == epochs + steps
        for cut, end in ends.items():
            assert [key for key, value in through[rank].items() if not equal(value, end[key])] == [], (rank, cut)


def read_after(directory: Path) -> list[int]:
    """Return how many batches of the loader each resumed run reads, in the order of the cuts."""
    num_read = []
    for file in sorted(CheckpointDirectory(directory).files(), key=lambda file: file.number)[:5]:
        data = Stateful()
        engine_of().fit(data, epochs=1, resume=file.path)
        num_read.append(data.num_read)
    return num_read


def test_a_loader_with_a_state_is_not_read_again_but_for_the_first_batch_of_a_pass(tmp_path: Path) -> None:
    """That is what stand-ins are computed with."""
    on_ranks(2, train, "a loader with a state", tmp_path)
    assert on_ranks(2, read_after, tmp_path) == [[2, 1, 1, 1, 0], [4, 3, 2, 1, 0]]


def resume_elsewhere(directory: Path, data: str) -> list[Any]:
    """Resume a run of two ranks at the end of its first epoch; within it, that is refused."""
    end, *within = [file.path for file in sorted(CheckpointDirectory(directory).files(), key=lambda f: -f.number)][-5:]
    ours = {"divided": "1 rank.", "sharded": "3 ranks, each with its own."}[data]
    for path in within:
        with refused(
            CheckpointError,
            f"{path} lies within a pass over the data of 2 ranks, each with its own",
            f"this run has {ours}",
        ):
            engine_of(data=data).fit(subset(), epochs=2, resume=path)
    engine = engine_of(data=data)
    engine.fit(subset(), epochs=2, resume=end)
    return [engine.epoch, engine.step, engine.history.rows]


@pytest.mark.parametrize(("world", "data", "num_steps"), [(3, "sharded", 8), (1, "divided", 6)])
def test_another_number_of_ranks_goes_on_only_between_two_passes(
    world: int, data: str, num_steps: int, tmp_path: Path
) -> None:
    on_ranks(2, train, "a map-style dataset", tmp_path)
    results = on_ranks(world, resume_elsewhere, tmp_path, data)
    assert [(epoch, step) for epoch, step, _ in results] == [(2, num_steps)] * world
    assert all(rows == results[0][2] for _, _, rows in results)


def resume_other_data(directory: Path) -> None:
    """Resume runs within a pass over data that are the ranks' own, or are not, by one of the other kind."""
    (path,) = [file.path for file in CheckpointDirectory(directory).files() if file.number == 2]
    with refused(CheckpointError, f"{path} lies within a pass", "each with its own, and this run has 2 ranks."):
        engine_of(data="divided").fit(subset(), epochs=2, resume=path)
    engine = engine_of(RunCheckpoint(directory / "divided"), data="divided")
    engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(1))
    divided = [(torch.ones(4, 4), torch.ones(4, 1))] * 3
    engine.fit(divided, epochs=2)
    with refused(CheckpointError, "the data of 2 ranks, and this run has 2 ranks, each with its own. Use as many"):
        engine_of().fit(divided, epochs=2, resume=directory / "divided")


def test_a_pass_does_not_go_on_over_data_of_the_other_kind(tmp_path: Path) -> None:
    on_ranks(2, train, "a map-style dataset", tmp_path)
    on_ranks(2, resume_other_data, tmp_path)


def as_format_6(directory: Path) -> None:
    """Write the third checkpoint of a run anew, as it was when there was the position of rank 0 alone."""
    (path,) = [file.path for file in CheckpointDirectory(directory).files() if file.number == 3]
    state = torch.load(path, weights_only=True)
    positions = [rank.pop("data") for rank in state["ranks"]]
    del positions[0]["pass"]["has_ended"]
    (directory / "6").mkdir()
    CheckpointDirectory(directory / "6").save(
        state | {"format": 6, "run": state["run"] | {"data": positions[0]}}, state["counters"]["step"]
    )


def resume_format_6(directory: Path) -> None:
    with refused(CheckpointError, "lies within a pass over the data of 2 ranks, and this run has 2 ranks, each"):
        engine_of().fit(subset(), epochs=2, resume=directory / "6")


def test_a_checkpoint_of_format_6_within_a_pass_is_refused(tmp_path: Path) -> None:
    """It has the position of the first rank alone."""
    on_ranks(2, train, "a map-style dataset", tmp_path)
    as_format_6(tmp_path)
    on_ranks(2, resume_format_6, tmp_path)


LENGTHS = (4, 2)


def planned(directory: Path) -> list[Any]:
    """Train on data of differing lengths with what plans by them: a schedule, and a validation that is asked for."""
    rank = dist.get_rank()
    own = [(torch.full((2, 4), float(rank + number)), torch.ones(2, 1)) for number in range(LENGTHS[rank])]
    engine = engine_of(Schedule(warmup_cosine, per="step"))
    rates: list[float] = []
    engine.subscribe(StepEnd, lambda event: event.engine.run.validate(), when=at(2))
    engine.subscribe(StepEnd, lambda event: rates.append(event.engine.parts["optimizer"].param_groups[0]["lr"]))
    engine.fit(own, own[:1], epochs=2)
    return [rates, [row["step"] for row in engine.history.validations]]


def test_what_is_planned_by_the_length_of_an_epoch_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, planned, tmp_path)
    assert first == second
    assert len(first[0]) == 8
    assert len(set(first[0])) > 4
