from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import loader_of, num_calls, pairs, refused, regression
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from camshaft.engine import ConfigurationError, DataError, Engine, StepEnd, repeat
from camshaft.engine.data import check_data, num_batches
from camshaft.engine.feed import Feed
from camshaft.engine.rng import SEED_VERSION, mix, rng_state, set_rng_state

GOLDEN_MIX = [17650578182555822980, 8764810008325594656, 13683858685767402644]
GOLDEN_ORDER = [2.0, 4.0, 5.0, 0.0, 3.0, 1.0]
LOADER = loader_of(8, batch_size=4)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(6)


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


def test_a_loader_of_unknown_length_runs() -> None:
    data = DataLoader(Stream(), batch_size=2)
    assert num_batches(data) is None
    engine = Engine(idle)
    engine.fit(data, epochs=2)
    assert engine.step == 6


def test_a_function_that_returns_batches_is_called_for_each_epoch() -> None:
    engine = Engine(idle)
    engine.fit(lambda: iter([1, 2]), epochs=3)
    assert engine.step == 6


def test_a_used_up_generator_is_refused_at_its_second_epoch() -> None:
    engine = Engine(idle)
    with pytest.raises(DataError, match=r"used up.*a function that returns it"):
        engine.fit(iter([1, 2]), epochs=2)
    assert engine.step == 2


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(torch.zeros(3)), batch_size=4, drop_last=True)])
def test_empty_data_are_refused_before_the_run(data: Any) -> None:
    with pytest.raises(DataError, match="without a single batch"):
        Engine(idle).fit(data, epochs=1)
    with pytest.raises(DataError, match=r"^val is"):
        Engine(idle).fit([1], data, epochs=1)


@pytest.mark.parametrize("data", [3, "batches", None, b"x"])
def test_what_is_no_data_is_refused(data: Any) -> None:
    with pytest.raises(ConfigurationError, match="not an iterable of batches"):
        check_data("train", data)


def test_data_that_end_early_say_how_far_they_reach() -> None:
    with pytest.raises(
        DataError, match=r"Data ended after 7 steps of epoch 1, but epoch_length=10. Pass epoch_length=7"
    ):
        Engine(idle).fit(lambda: iter(range(7)), epochs=1, epoch_length=10)


def test_repeat_begins_a_fresh_pass_each_time() -> None:
    engine = Engine(idle)
    engine.fit(repeat(lambda: iter([1, 2, 3])), epochs=2, epoch_length=5)
    assert engine.step == 10
    with pytest.raises(DataError, match="without a single batch"):
        repeat([])


def test_the_passes_of_repeat_are_seeded_as_those_of_an_epoch_each() -> None:
    """Whatever the length of the epochs, and whatever else draws random numbers."""

    def read(train: Any, epoch_length: int | None = None, num_draws: int = 0) -> list[list[float]]:
        seen: list[list[float]] = []

        def step(engine: Engine, batch: Tensor) -> None:
            seen.append(batch.tolist())
            torch.rand(num_draws)

        Engine(step, seed=7).fit(train, max_steps=12, epoch_length=epoch_length)
        return seen

    loader = DataLoader(Doubled(11), 3, shuffle=True)
    assert read(repeat(loader), 5, num_draws=1) == read(repeat(repeat(loader)), num_draws=2) == read(loader)


def test_repeat_without_a_seed_resumes_without_reading_again() -> None:
    """In its third pass: only what comes after the cut is read, with the random numbers that it would have had."""
    read: list[int] = []

    class Counted(Doubled):
        def __getitem__(self, index: int) -> Tensor:
            read.append(index)
            return super().__getitem__(index)

    feed, again = Feed(epoch_length=99), Feed(epoch_length=99)
    data = repeat(DataLoader(Counted(6), 2, shuffle=True, generator=torch.Generator().manual_seed(3)))
    reading = feed.begin(data, 1, 0)
    for _ in range(7):
        next(reading)
        torch.rand(())  # a training step draws, too
    state, now = feed.state_dict(7), rng_state()
    through = [next(reading).tolist() for _ in range(4)]
    set_rng_state(now)
    again.load_state_dict(state)
    read.clear()
    assert [batch.tolist() for batch in itertools.islice(again.begin(data, 1, 7), 4)] == through
    assert len(read) == 8


class Doubled(Dataset[Tensor]):
    """Reads a sample with random numbers from every generator."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()), random.random(), float(np.random.rand())], dtype=torch.float64)


def read(loader: Any, epoch: int = 1, skip: int = 0, seed: int = 5) -> list[Tensor]:
    """Read what an epoch has after its first ``skip`` batches, as a run that is resumed there does."""
    feed = Feed(seed)
    if skip:
        first = Feed(seed)
        for _ in itertools.islice(first.begin(loader, epoch, 0), skip):
            pass
        feed.load_state_dict(first.state_dict(skip))
    return list(feed.begin(loader, epoch, skip))


@pytest.mark.parametrize("settings", [{"shuffle": True}, {"shuffle": False}, {"shuffle": True, "drop_last": True}])
def test_a_seeded_pass_is_the_same_with_any_number_of_workers_and_after_any_batch(settings: dict[str, Any]) -> None:
    through = read(DataLoader(Doubled(11), 3, **settings))
    assert len(through) == (3 if settings.get("drop_last") else 4)
    for workers, skip in ((0, 0), (0, 2), (2, 0), (2, 1)):
        again = read(DataLoader(Doubled(11), 3, num_workers=workers, **settings), skip=skip)
        assert [batch.tolist() for batch in again] == [batch.tolist() for batch in through[skip:]]


def test_a_seeded_pass_leaves_the_global_generators_alone_and_visits_every_sample_once() -> None:
    before = torch.get_rng_state(), random.getstate()
    first, second = (torch.cat(read(DataLoader(Doubled(11), 3, shuffle=True), epoch=epoch)) for epoch in (1, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(11))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())


def test_the_mixing_and_the_order_are_frozen() -> None:
    """A change would make old checkpoints resume with other data: then `SEED_VERSION` must change, too."""
    assert SEED_VERSION == 1
    assert [mix(0, 1, 2), mix(7, 1, 2), mix(2**63, 10**6, 10**9)] == GOLDEN_MIX
    order = torch.cat(read(DataLoader(Doubled(6), 2, shuffle=True), seed=0))[:, 0].tolist()
    assert order == GOLDEN_ORDER


def test_a_sampler_of_someone_elses_is_seeded_too() -> None:
    weighted = WeightedRandomSampler([1.0] * 11, num_samples=8)
    through = read(DataLoader(Doubled(11), 3, sampler=weighted))
    again = read(DataLoader(Doubled(11), 3, sampler=weighted), skip=1)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in through[1:]]


def noisy_collate(items: list[Tensor]) -> Tensor:
    """Collate as mixing of samples does: with random numbers, and in another order."""
    return torch.stack(random.sample(items, len(items))) + torch.rand(()) + float(np.random.rand())


def test_a_seeded_collate_function_draws_the_same_with_any_number_of_workers() -> None:
    through = read(DataLoader(Doubled(9), 3, collate_fn=noisy_collate))
    assert len({float(batch[0, 0]) % 1 for batch in through}) == 3
    for workers, skip in ((0, 1), (2, 0), (2, 2)):
        torch.rand(1 + workers)  # what a run draws besides does not matter
        again = read(DataLoader(Doubled(9), 3, collate_fn=noisy_collate, num_workers=workers), skip=skip)
        assert [batch.tolist() for batch in again] == [batch.tolist() for batch in through[skip:]]


def test_a_dataset_with_a_generator_of_its_own_is_told_the_seed() -> None:
    class Own(Doubled):
        def set_sample_seed(self, seed: int) -> None:
            self.generator = random.Random(seed)

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([index, self.generator.random()], dtype=torch.float64)

    through = read(DataLoader(Own(9), 3, shuffle=True))
    assert torch.cat(read(DataLoader(Own(9), 3, shuffle=True), skip=2)).tolist() == through[2].tolist()


def test_a_sample_that_raises_says_where_it_stands() -> None:
    class Broken(Doubled):
        def __getitem__(self, index: int) -> Tensor:
            if index == 2:
                raise OSError("unreadable")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="unreadable") as caught:
        read(DataLoader(Broken(4), 2), epoch=3, skip=1)
    assert caught.value.__notes__ == ["While reading sample 2, at position 2 of pass 3."]


def resumed(data: Any, batches: int = 6, cut: int = 4) -> tuple[list[Any], list[Any]]:
    """Return the batches of a pass after ``cut``, read in one go and resumed."""
    first, again = Feed(), Feed()
    reading = first.begin(data, 1, 0)
    through = [next(reading) for _ in range(cut)]
    state, now = first.state_dict(cut), rng_state()
    through += list(reading)
    set_rng_state(now)
    again.load_state_dict(state)
    assert len(through) == batches
    return through[cut:], list(again.begin(data, 1, cut))


def test_batches_in_a_list_are_skipped_by_slicing() -> None:
    through, again = resumed([1, 2, 3, 4, 5, 6])
    assert again == through == [5, 6]


class Made(Sequence[Any]):
    """Six batches, each with a random number that is drawn when it is read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        if index >= 6:
            raise IndexError(index)
        return index, float(torch.rand(()))


def test_batches_that_are_made_when_they_are_read_are_replayed() -> None:
    """So that the random numbers of the reading are drawn before the generators are set to where they were."""
    through, again = resumed(Made())
    assert again == through


def test_an_iterable_is_replayed() -> None:
    through, again = resumed(lambda: iter("abcdef"))
    assert again == through == ["e", "f"]
    through, again = resumed(DataLoader(Stream(), batch_size=1))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in through] == [[4], [5]]


def test_a_loader_with_generators_of_its_own_resumes_with_them() -> None:
    loader = DataLoader(Doubled(12), 2, shuffle=True, generator=torch.Generator().manual_seed(3))
    through, again = resumed(loader)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in through]


def test_a_loader_without_batching_resumes_after_its_samples() -> None:
    through, again = resumed(DataLoader(Doubled(6), batch_size=None, shuffle=True))
    assert [sample.tolist() for sample in again] == [sample.tolist() for sample in through]


def test_a_loader_with_a_state_of_its_own_is_asked_for_it() -> None:
    class Stateful:
        """Counts for itself, and would give other batches if it were replayed."""

        def __init__(self) -> None:
            self.position = 0

        def __iter__(self) -> Iterator[int]:
            while self.position < 6:
                self.position += 1
                yield self.position

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    through, again = resumed(Stateful())
    assert again == through == [5, 6]


def test_a_loader_with_a_state_of_its_own_may_draw_a_seed_when_it_begins() -> None:
    """As torch's loaders do; the random numbers of the batches after it are those that they would have been."""

    class Stateful:
        position = 0

        def __iter__(self) -> Iterator[tuple[int, float]]:
            torch.rand(())
            return self.read()

        def read(self) -> Iterator[tuple[int, float]]:
            while self.position < 6:
                self.position += 1
                yield self.position, float(torch.rand(()))

        def state_dict(self) -> int:
            return self.position

        def load_state_dict(self, state: int) -> None:
            self.position = state

    through, again = resumed(Stateful())
    assert again == through


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("in_batch_sampler", [False, True])
def test_a_sampler_that_was_told_its_epoch_resumes_in_it(seed: int | None, in_batch_sampler: bool) -> None:
    """In another process, whose sampler was not told; the next pass has the epoch that was told last."""

    def build() -> DataLoader[Any]:
        sampler: DistributedSampler[int] = DistributedSampler(Doubled(12), 2, 1)
        if in_batch_sampler:
            return DataLoader(Doubled(12), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
        return DataLoader(Doubled(12), 2, sampler=sampler)

    def tell(loader: DataLoader[Any], epoch: int) -> None:
        (loader.batch_sampler.sampler if in_batch_sampler else loader.sampler).set_epoch(epoch)  # type: ignore[union-attr]

    loader, feed = build(), Feed(seed, epoch_length=2)
    tell(loader, 7)
    reading = feed.begin(repeat(loader), 1, 0)
    next(reading)
    tell(loader, 8)
    state = feed.state_dict(1)
    through = [next(reading)[:, 0].tolist() for _ in range(8)]

    again = Feed(seed, epoch_length=2)
    again.load_state_dict(state)
    assert [batch[:, 0].tolist() for batch in itertools.islice(again.begin(repeat(build()), 1, 1), 8)] == through


class Backwards(Sampler[int]):
    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[int]:
        yield from reversed(range(self.num))


class Pairs(Sampler[list[int]]):
    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([index, index + 1] for index in range(0, self.num, 2))


class Told(Doubled):
    def set_sample_seed(self, seed: int) -> None:
        """Take the seed for the next sample."""


Plain = TensorDataset
ORDER = "draws its order only from the global generators"
BEGUN = ", and all of it when a pass begins"


@pytest.mark.parametrize(
    ("data", "seeded", "words"),
    [
        (DataLoader(Subset(Plain(torch.ones(4)), [1])), False, "bit-identical"),
        (DataLoader(Plain(torch.ones(4)), num_workers=2), False, "bit-identical"),
        (DataLoader([1.0, 2.0], 2, collate_fn=noisy_collate), False, "bit-identical, if noisy_collate draws random"),  # type: ignore[arg-type]
        (DataLoader(Doubled(4)), False, "bit-identical, if Doubled draws random numbers only from the global"),
        (DataLoader(Doubled(4), num_workers=2), False, "same order (random augmentation in workers differs"),
        (DataLoader(Doubled(4), num_workers=2, persistent_workers=True), False, "not known"),
        (DataLoader(Doubled(4), num_workers=2, generator=torch.Generator()), False, "not known"),
        (DataLoader(Stream(), num_workers=1, persistent_workers=True), False, "not known"),
        (DataLoader(Plain(torch.ones(4)), sampler=Backwards(4)), False, f"bit-identical, if Backwards {ORDER}{BEGUN}"),
        (
            DataLoader(Doubled(4), num_workers=2, sampler=Backwards(4)),
            False,
            f"same order, if Backwards {ORDER}{BEGUN} (",
        ),
        (
            DataLoader(Doubled(4), batch_sampler=Pairs(4)),
            True,
            f"bit-identical, if Pairs {ORDER}, and if Doubled draws",
        ),
        (DataLoader(Doubled(4), num_workers=2), True, "bit-identical, if Doubled draws"),
        (DataLoader(Told(4), num_workers=2), True, "bit-identical"),
        ([1, 2], False, "bit-identical"),
        (repeat([1, 2]), False, "bit-identical"),
        (Made(), False, "replayed"),
        (DataLoader(Stream()), False, "replayed"),
        (lambda: DataLoader(Plain(torch.ones(4))), True, "replayed"),
    ],
)
def test_how_exactly_a_run_can_be_resumed_is_said_in_words(data: Any, seeded: bool, words: str) -> None:
    feed = Feed(0 if seeded else None)
    feed.open(data)
    assert feed.exactness() == words or (words != "bit-identical" and feed.exactness().startswith(words))


def test_a_dataset_that_draws_from_elsewhere_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Elsewhere(Doubled):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([index, random.SystemRandom().random()])

    read(DataLoader(Elsewhere(4), 2))
    assert "differs: the dataset draws from a generator of its own. Give it a method set_sample_seed" in caplog.text
    caplog.clear()
    read(DataLoader(Doubled(4), 2))
    assert not caplog.text


class NoItems(IterableDataset[Tensor]):
    """A stream that has ended before it began, and knows no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


EMPTY: list[tuple[Any, str]] = [
    ([], "is a list without a single batch"),
    ((), "is a tuple without a single batch"),
    (loader_of(3, batch_size=4, drop_last=True), "drop_last=True drops a last batch of fewer than 4"),
    (DataLoader(NoItems(), batch_size=4), "is a DataLoader without a single batch"),
    (lambda: iter(()), "without a single batch"),
]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize(("empty", "phrase"), EMPTY)
def test_empty_data_are_refused_by_name(empty: Any, phrase: str, name: str) -> None:
    data = {"train": pairs(1), "val": pairs(1)} | {name: empty}
    trainer = regression()
    with refused(DataError, f"{name} is", phrase):
        trainer.fit(**data, epochs=1)
    # A length tells beforehand; a stream has to be read.
    known = isinstance(empty, list | tuple) or getattr(empty, "drop_last", False)
    assert num_calls(trainer) == (0 if known or name == "train" else 1)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_empty_data_are_refused_outside_a_run_too(call: str) -> None:
    with refused(DataError, "is a list without a single batch"):
        getattr(regression(), call)([])


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (TensorDataset(torch.ones(4, 2)), "a TensorDataset, which is not an iterable of batches"),
        ("train.csv", "a str, which is not an iterable of batches"),
        (32, "an int, which is not an iterable of batches"),
    ],
)
def test_what_gives_no_batches_is_refused_before_the_run(name: str, data: Any, phrase: str) -> None:
    trainer = regression()
    with refused(ConfigurationError, f"{name} is", phrase.partition(" ")[2]):
        trainer.fit(**({"train": pairs(), "val": pairs()} | {name: data}), epochs=1)
    assert num_calls(trainer) == 0


def test_a_generator_is_refused_when_a_second_epoch_needs_it() -> None:
    trainer = regression()
    with refused(DataError, "train is a generator that is used up", "a function that returns it"):
        trainer.fit((batch for batch in pairs()), epochs=2)
    assert (trainer.epoch, num_calls(trainer)) == (2, 3)


def test_a_generator_is_refused_when_a_second_validation_needs_it() -> None:
    with refused(DataError, "val is a generator that is used up"):
        regression().fit(pairs(), (batch for batch in pairs()), epochs=2)


def test_a_function_that_returns_a_generator_serves_every_epoch() -> None:
    trainer = regression()
    history = trainer.fit(lambda: (batch for batch in pairs()), lambda: iter(pairs()), epochs=2)
    assert history["step"] == [3, 6]
    assert len(history["val_loss"]) == 2


def test_a_generator_serves_one_epoch() -> None:
    assert regression().fit((batch for batch in pairs()), epochs=1)["step"] == [3]


def test_an_epoch_longer_than_known_data_is_refused_before_the_run() -> None:
    trainer = regression()
    with refused(DataError, "7", "epoch_length=10"):
        trainer.fit(pairs(7), epochs=1, epoch_length=10)
    assert num_calls(trainer) == 0


def test_an_epoch_longer_than_a_stream_is_refused_where_the_stream_ends() -> None:
    trainer = regression()
    with refused(DataError, "Data ended after 7 steps of epoch 1, but epoch_length=10. Pass epoch_length=7"):
        trainer.fit(lambda: iter(pairs(7)), epochs=1, epoch_length=10)
    assert num_calls(trainer) == 7


def test_data_are_repeated_on_request() -> None:
    assert regression().fit(repeat(pairs(7)), epochs=2, epoch_length=10)["step"] == [10, 20]


def test_more_steps_than_one_pass_take_further_epochs() -> None:
    history = regression().fit(pairs(3), max_steps=7)
    assert history["step"] == [3, 6, 7]
    assert history.reason == "max_steps=7 reached"


class BrokenSample(Dataset[tuple[Tensor, Tensor]]):
    """Twelve samples, of which the ninth cannot be read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 8:
            raise OSError("image 8 is truncated")
        return torch.ones(2), torch.ones(1)


def test_a_sample_that_raises_is_told_with_its_place() -> None:
    loader = DataLoader(BrokenSample(), batch_size=4)
    trainer = regression()
    with pytest.raises(OSError, match="image 8 is truncated") as caught:
        trainer.fit(pairs(1), loader, epochs=1)
    assert "While reading batch 3 of the val data in epoch 1." in caught.value.__notes__
    with pytest.raises(OSError, match="image 8 is truncated") as caught:
        trainer.fit(loader, epochs=1)
    assert "While reading batch 3 of the train data in epoch 2." in caught.value.__notes__


class DyingWorker(Dataset[tuple[Tensor, Tensor]]):
    """Twelve samples; the process that reads sample ``at_index`` dies, as if it had run out of memory."""

    def __init__(self, at_index: int) -> None:
        self.at_index = at_index

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at_index:
            time.sleep(0.2)  # until the main process waits for the batch, or is at work on another one
            os._exit(1)
        return torch.ones(2), torch.ones(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_worker_that_dies_is_told_with_the_likely_reason(batch: int) -> None:
    loader = DataLoader(DyingWorker(at_index=4 * (batch - 1)), batch_size=4, num_workers=1)
    trainer = regression()
    trainer.subscribe(StepEnd, lambda event: time.sleep(5))  # torch interrupts it when a worker of its has died
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        trainer.fit(loader, epochs=1)
    assert "memory or shared memory; try num_workers=0" in " ".join(caught.value.__notes__)


def test_data_that_end_with_an_epoch_of_set_length_say_so_in_the_next_one() -> None:
    with pytest.raises(DataError, match=r"Data ended before epoch 3, because .*epoch_length=2 share a pass\. Pass"):
        Engine(idle).fit(lambda: iter(range(4)), epochs=3, epoch_length=2)


@pytest.mark.parametrize("several", [[LOADER, LOADER], (LOADER, LOADER)], ids=["list", "tuple"])
def test_several_loaders_are_no_data(several: Any) -> None:
    """Also where they are the validation's, which runs only after an epoch."""
    for data in ((several,), ([1], several)):
        engine = Engine(idle)
        with refused(ConfigurationError, "of 2 loaders, not of batches"):
            engine.fit(*data, epochs=1)
        assert engine.step == 0


@pytest.mark.parametrize("several", [{"a": LOADER, "b": LOADER}, {"inputs": [1], "target": [2]}])
def test_a_dict_is_no_training_data(several: Any) -> None:
    """It would give its keys for batches; as validation data, it is several sets by name."""
    engine = Engine(idle)
    with refused(ConfigurationError, "train is a dict, which would give its keys for batches."):
        engine.fit(several, epochs=1)
    with refused(ConfigurationError, "data is a dict, which would give its keys for batches."):
        list(engine_with_model().predictions(several))
    assert engine.step == 0


def engine_with_model() -> Engine:
    return Engine(idle, model=torch.nn.Linear(1, 1))
