"""How exactly a run is resumed, in words and in fact: `Feed.exactness()` never promises more than what happens.

A timeline is a small training with one kind of data, one set of handlers and one style, and the signals that cut it
and its resumed runs. Hypothesis draws timelines; each is run once without the signals and once with them, as the
processes of a script would be, with everything built anew. What the words promise must then be so.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_signals_everywhere import equal
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from camshaft.callbacks import (
    Accumulate,
    ClipGradients,
    EarlyStopping,
    MixedPrecision,
    RunCheckpoint,
    Schedule,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import (
    BatchReady,
    Callback,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    FitStart,
    GradientsReady,
    Settled,
    StepEnd,
    Trainer,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    repeat,
)
from camshaft.engine.feed import Feed
from camshaft.engine.rng import rng_state, seed_everything

RESUME = Path(__file__).parent.parent / "docs" / "resume.md"
NUM = 11  # samples, in 4 batches of at most 3
EVENTS: tuple[type[Event], ...] = (
    FitStart, EpochStart, BatchReady, GradientsReady, UpdateEnd, StepEnd, ValidationStart, ValidationStepEnd,
    ValidationEnd, EpochEnd, Settled,
)  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# Data --------------------------------------------------------------------------------------------------------


class Noisy(Dataset[Tensor]):
    """Reads a sample together with a random number from every global generator."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(torch.rand(())), random.random(), float(np.random.rand())])


class OwnGenerator(Noisy):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, *self.generator.random(3)], dtype=torch.float32)


class ToldItsSeed(OwnGenerator):
    """Draws from a generator of its own, which the engine's seed reaches."""

    def set_sample_seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)


class Stream(IterableDataset[Tensor]):
    """Gives the same samples in the same order."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.full((4,), float(index)) for index in range(NUM))


class AtOnce(Sampler[int]):
    """Draws its order from torch's global generator when a pass begins."""

    def __init__(self) -> None:
        """Take nothing: torch's own constructor wants a data source in some versions."""

    def __len__(self) -> int:
        return NUM

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(NUM).tolist()


class FromAPool(AtOnce):
    """Draws each index when it is asked for it, from those that are left."""

    def __iter__(self) -> Iterator[int]:
        pool = list(range(NUM))
        while pool:
            yield pool.pop(int(torch.randint(len(pool), ())))


class OwnRandom(AtOnce):
    """Draws from a generator of Python's own."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.random.sample(range(NUM), NUM)


class Pairs(Sampler[list[int]]):
    """Draws batches of two from torch's global generator, when a pass begins."""

    def __init__(self) -> None:
        """Take nothing, as `AtOnce`."""

    def __len__(self) -> int:
        return NUM // 2

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(NUM).tolist()
        yield from (order[start : start + 2] for start in range(0, NUM - 1, 2))


class Batches(Sequence[Tensor]):
    """Batches that are made when they are read; with random numbers or without."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        if index >= 4:
            raise IndexError(index)
        return torch.full((3, 4), float(index)) + self.noise * torch.rand(3, 4)


class Stateful:
    """Keeps its own position, draws augmentation from the global generator, and a seed when a pass begins."""

    def __init__(self) -> None:
        self.position = 0
        self.num_passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        torch.empty((), dtype=torch.int64).random_()  # as torch's loaders do
        return self._read()

    def _read(self) -> Iterator[Tensor]:
        while self.position < 4:
            self.position += 1
            yield torch.full((3, 4), float(self.position)) + torch.rand(3, 4)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def generator() -> torch.Generator:
    """A generator as a script makes it when it starts."""
    return torch.Generator().manual_seed(4)


def captured(workers: dict[str, Any]) -> Callable[[], DataLoader[Any]]:
    """A function that returns the same loader at each call, with a generator that it keeps."""
    loader = DataLoader(Noisy(), 3, shuffle=True, generator=generator(), **workers)
    return lambda: loader


def distributed(workers: dict[str, Any]) -> DataLoader[Any]:
    """The part of the second of two ranks."""
    return DataLoader(Noisy(), 2, sampler=DistributedSampler(Noisy(), 2, 1, seed=3), **workers)


def distributed_batches(workers: dict[str, Any]) -> DataLoader[Any]:
    """The same, in a batch sampler."""
    batches = BatchSampler(DistributedSampler(Noisy(), 2, 1, seed=3), 2, drop_last=False)
    return DataLoader(Noisy(), batch_sampler=batches, **workers)


def tensors() -> TensorDataset:
    """Samples without any random numbers."""
    return TensorDataset(torch.arange(NUM).float()[:, None].expand(NUM, 4))


def sampled(sampler: Callable[..., Any], dataset: Callable[[], Any] = Noisy) -> Callable[[dict[str, Any]], Any]:
    """A kind of loader with such a sampler."""
    return lambda workers: DataLoader(dataset(), 3, sampler=sampler(), **workers)


def weighted(**settings: Any) -> WeightedRandomSampler:
    """Later samples more often."""
    return WeightedRandomSampler([1.0 + index for index in range(NUM)], NUM, **settings)


def replaced(**settings: Any) -> RandomSampler:
    """Some samples more than once."""
    return RandomSampler(range(NUM), replacement=True, num_samples=NUM + 2, **settings)


class Kind(NamedTuple):
    """A kind of data.

    ``make`` builds them, with the settings of a loader's workers. ``holds`` is whether what the words ask of the data
    ("if ...", "must ...") is true of them.
    """

    make: Callable[[dict[str, Any]], Any]
    holds: bool = True


KINDS: dict[str, Kind] = {
    "in order": Kind(lambda workers: DataLoader(Noisy(), 3, **workers)),
    "shuffled": Kind(lambda workers: DataLoader(Noisy(), 3, shuffle=True, **workers)),
    "shuffled tensors": Kind(lambda workers: DataLoader(tensors(), 3, shuffle=True, **workers)),
    "shuffled, generator": Kind(
        lambda workers: DataLoader(Noisy(), 3, shuffle=True, generator=generator(), **workers)
    ),
    "single samples": Kind(lambda workers: DataLoader(Noisy(), None, shuffle=True, **workers)),
    "weighted": Kind(sampled(weighted)),
    "weighted tensors": Kind(sampled(weighted, tensors)),
    "weighted, generator": Kind(sampled(lambda: weighted(generator=generator()))),
    "subset": Kind(sampled(lambda: SubsetRandomSampler(range(NUM)))),
    "subset, generator": Kind(sampled(lambda: SubsetRandomSampler(range(NUM), generator=generator()))),
    "replaced": Kind(sampled(replaced)),
    "replaced tensors": Kind(sampled(replaced, tensors)),
    "replaced, generator": Kind(sampled(lambda: replaced(generator=generator()))),
    "sampler of one's own": Kind(sampled(AtOnce)),
    "sampler of one's own over tensors": Kind(sampled(AtOnce, tensors)),
    "sampler that draws from a pool": Kind(sampled(FromAPool), holds=False),
    "sampler with a generator of Python's": Kind(sampled(OwnRandom), holds=False),
    "batch sampler of one's own": Kind(lambda workers: DataLoader(Noisy(), batch_sampler=Pairs(), **workers)),
    "distributed": Kind(distributed),
    "distributed batches": Kind(distributed_batches),
    "dataset with its own generator": Kind(
        lambda workers: DataLoader(OwnGenerator(), 3, shuffle=True, **workers), holds=False
    ),
    "dataset that is told its seed": Kind(
        lambda workers: DataLoader(ToldItsSeed(), 3, shuffle=True, **workers), holds=False
    ),
    "stream": Kind(lambda workers: DataLoader(Stream(), 3, **{**workers, "num_workers": min(1, len(workers))})),
    "list": Kind(lambda workers: list(torch.arange(NUM).float()[:, None].expand(NUM, 4).split(3))),
    "sequence": Kind(lambda workers: Batches(noise=0)),
    "sequence with random numbers": Kind(lambda workers: Batches(noise=1), holds=False),
    "repeated loader": Kind(lambda workers: repeat(DataLoader(Noisy(), 3, shuffle=True, **workers))),
    "repeated loader, generator": Kind(
        lambda workers: repeat(DataLoader(Noisy(), 3, shuffle=True, generator=generator(), **workers))
    ),
    "repeated list": Kind(lambda workers: repeat([torch.zeros(3, 4), torch.ones(2, 4)])),
    "function": Kind(lambda workers: lambda: DataLoader(tensors(), 3, shuffle=True, **workers)),
    "function with a generator": Kind(captured, holds=False),
    "repeated function": Kind(lambda workers: repeat(lambda: DataLoader(tensors(), 3, shuffle=True, **workers))),
    "loader with a state": Kind(lambda workers: Stateful()),
    "repeated loader with a state": Kind(lambda workers: repeat(Stateful())),
}
WORKERS: dict[int, dict[str, Any]] = {0: {}, 2: {"num_workers": 2}, -2: {"num_workers": 2, "persistent_workers": True}}


# Timelines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A signal at the n-th such event of a run."""

    event: type[Event]
    count: int
    number: signal.Signals = signal.SIGTERM

    def __repr__(self) -> str:
        return f"Cut({self.event.__name__}, {self.count}, signal.{self.number.name})"


@dataclass(frozen=True)
class Timeline:
    """A training, and the signals that cut it; after the last of them it goes on to its end.

    ``every_steps`` and ``background`` are those of its checkpoints. ``workers`` is a number of workers; a
    negative one means that they are persistent. ``val`` says how the validation reads.
    """

    kind: str
    seed: int | None = None
    workers: int = 0
    script: bool = False
    handlers: frozenset[str] = frozenset()
    val: str = "list"
    epochs: int = 2
    epoch_length: int | None = None
    max_steps: int | None = None
    validate_every: int | str | None = None
    every_steps: int | None = None
    background: bool = False
    cuts: tuple[Cut, ...] = ()


HANDLERS: dict[str, Callable[[Any], Callback]] = {
    "accumulate": lambda optimizer: Accumulate(batches=3),
    "average": lambda optimizer: WeightAverage(decay=0.9),
    "schedule": lambda optimizer: Schedule(warmup_cosine(optimizer, warmup=2, total=30), per="step"),
    "clip": lambda optimizer: ClipGradients(norm=0.5),
    "bf16": lambda optimizer: MixedPrecision("bf16"),
    "stop": lambda optimizer: EarlyStopping("train_loss", patience=1),
}
VALS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "list": lambda: [torch.ones(2, 4), torch.zeros(3, 4)],
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "shuffled, generator": lambda: DataLoader(Noisy(), 3, shuffle=True, generator=generator()),
}


class Attempt:
    """One process of a timeline: an engine that runs to the end, or to its signal."""

    def __init__(self, timeline: Timeline, number: int, directory: Path) -> None:
        seed_everything(1)
        self.timeline = timeline
        self.seen: list[Any] = []
        self.words = ""
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        callbacks = [HANDLERS[name](optimizer) for name in sorted(timeline.handlers)]
        self.engine = Trainer(
            self.model,
            optimizer,
            lambda output, target: (output.float() - target).square().mean(),
            callbacks=[*callbacks, self._checkpoint(directory)],
            seed=timeline.seed,
        )
        self.data = KINDS[timeline.kind].make(WORKERS[timeline.workers])
        self.engine.subscribe(EpochStart, self._tell_the_epoch)
        self.engine.subscribe(BatchReady, self._see)
        if number < len(timeline.cuts):
            self._send(timeline.cuts[number])

    def _checkpoint(self, directory: Path) -> RunCheckpoint:
        timeline = self.timeline
        every_epochs = None if timeline.every_steps else 1
        return RunCheckpoint(
            directory, every_steps=timeline.every_steps, every_epochs=every_epochs, background=timeline.background
        )

    def run(self, *, resumes: bool) -> None:
        """Run, or resume."""
        timeline, resume = self.timeline, "auto" if resumes else None
        if timeline.script:
            self._run_script(resume)
            return
        self.engine.fit(
            self.data,
            VALS[timeline.val](),
            epochs=timeline.epochs,
            max_steps=timeline.max_steps,
            epoch_length=timeline.epoch_length,
            validate_every=None if timeline.val == "none" else timeline.validate_every,
            resume=resume,
        )

    def _run_script(self, resume: str | None) -> None:
        engine, val = self.engine, VALS[self.timeline.val]()
        max_steps = self.timeline.max_steps or (9 if isinstance(self.data, repeat) else None)
        for _ in engine.epochs(self.timeline.epochs, max_steps=max_steps, resume=resume):
            for batch in engine.train(self.data):
                loss = self._loss(batch)
                engine.update(loss)
                engine.record(loss=loss)
            for batch in engine.validate(val) if val is not None else ():
                engine.record(loss=self._loss(batch))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with self.engine.scope("forward"):
            output = self.model(batch[0])
        loss: Tensor = (output.float() - batch[1]).square().mean()
        return loss

    def _tell_the_epoch(self, event: Event) -> None:
        """As a script does for a DistributedSampler; it counts from 0."""
        batch_sampler = getattr(self.data, "batch_sampler", None)
        for sampler in (getattr(self.data, "sampler", None), getattr(batch_sampler, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(event.engine.epoch - 1)

    def _see(self, event: BatchReady) -> tuple[Tensor, Tensor]:
        batch = event.batch[0] if isinstance(event.batch, list | tuple) else event.batch
        batch = batch.reshape(-1, 4)
        if event.engine.training:
            self.words = self.words or event.engine.run.feed.exactness()
            self.seen.append((event.engine.epoch, event.engine.step, batch.tolist()))
        return batch, batch.sum(1, keepdim=True)

    def _send(self, cut: Cut) -> None:
        heard = Counter[str]()

        def count(event: Event) -> None:
            heard["all"] += 1
            if heard["all"] == cut.count:
                signal.raise_signal(cut.number)

        self.engine.subscribe(cut.event, count)


class Outcome(NamedTuple):
    """What a timeline ended with: what must be equal to the bit, the indices that were read, and the words."""

    everything: dict[str, Any]
    order: list[Any]
    words: set[str]


def outcome(timeline: Timeline, directory: Path) -> Outcome:
    """Run a timeline to its end."""
    seen: list[Any] = []
    words: set[str] = set()
    for number in range(len(timeline.cuts) + 1):
        attempt = Attempt(timeline, number, directory)
        attempt.run(resumes=number > 0)
        del (
            attempt.data
        )  # while no cycle holds it: torch waits 10 s for persistent workers that are collected with one
        seen += attempt.seen
        words |= {attempt.words} - {""}
        if attempt.engine.history.exit_code == 0:
            break
    order = [(epoch, step, [row[0] for row in batch]) for epoch, step, batch in seen]
    return Outcome({"seen": seen, **result(attempt.engine)}, order, words)


def result(engine: Engine) -> dict[str, Any]:
    """Return all that a run ends with."""
    names = ("epoch", "step", "num_updates", "num_validations", "num_skipped_updates")
    return {
        "parts": {name: part.state_dict() for name, part in engine.parts.items() if hasattr(part, "state_dict")},
        "counters": {name: getattr(engine, name) for name in names},
        "rows": engine.history.rows,
        "validations": engine.history.validations,
        "reason": engine.history.reason,
        "handlers": [callback.state_dict() for callback in engine.listeners.callbacks],
        "random numbers": rng_state(),
    }


def promise(words: str, holds: bool) -> str:
    """Return what the words promise for data of which their condition holds, or does not: all, order or nothing."""
    is_conditional = re.search(r"\bif\b|\bmust\b|the loader's own", words) is not None
    if words.startswith("not known") or (is_conditional and not holds):
        return "nothing"
    return "order" if words.startswith("same order") else "all"


def check(timeline: Timeline, directory: Path) -> None:
    """Fail if the words for this timeline promise more than what happens."""
    through = outcome(replace(timeline, cuts=()), directory / "through")
    resumed = outcome(timeline, directory / "resumed")
    (words,) = through.words | resumed.words
    promised = promise(words, KINDS[timeline.kind].holds)
    if promised == "all":
        ours, theirs = resumed.everything, through.everything
        assert [name for name in theirs if not equal(ours[name], theirs[name])] == [], words
    elif promised == "order":
        assert resumed.order == through.order, words


@st.composite
def timelines(draw: st.DrawFn, workers: Sequence[int] = (0,)) -> Timeline:
    """Any kind of data, with any handlers and signals."""
    kind, script = draw(st.sampled_from(sorted(KINDS))), draw(st.booleans())
    epochs = draw(st.integers(1, 3))
    cuts = st.builds(Cut, st.sampled_from(EVENTS), st.integers(1, 9), st.sampled_from(SIGNALS))
    lengths = st.integers(1, 3 // epochs)  # a DistributedSampler gives three batches
    return Timeline(
        kind,
        seed=draw(st.sampled_from([None, 0, 5])),
        workers=draw(st.sampled_from(workers)),
        script=script,
        handlers=draw(st.frozensets(st.sampled_from(sorted(HANDLERS)), max_size=3)),
        val=draw(st.sampled_from(sorted(VALS))),
        epochs=epochs,
        epoch_length=draw(st.integers(1, 7) if kind.startswith("repeated") else st.one_of(st.none(), lengths)),
        max_steps=draw(st.sampled_from([None, None, 5])),
        validate_every=draw(st.sampled_from([None, "2 steps", "3 steps", 2])),
        every_steps=draw(st.sampled_from([None, 1, 2])),
        background=draw(st.booleans()),
        cuts=tuple(draw(st.lists(cuts, min_size=1, max_size=3))),
    )


def check_drawn(max_examples: int, workers: Sequence[int], directory: Path) -> None:
    """Check so many timelines, the same ones at each run."""

    @given(timeline=timelines(workers))
    @settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)
    def check_one(timeline: Timeline) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            check(timeline, Path(scratch))

    check_one()


# The tests ---------------------------------------------------------------------------------------------------


def test_the_words_promise_no_more_than_what_happens(tmp_path: Path) -> None:
    """However often the run is cut, at whatever events, and whatever handlers it has."""
    check_drawn(70, [0], tmp_path)


@pytest.mark.slow
def test_the_words_promise_no_more_than_what_happens_in_thousands_of_runs(tmp_path: Path) -> None:
    check_drawn(2000, [0], tmp_path)


@pytest.mark.slow
def test_the_words_promise_no_more_than_what_happens_with_workers(tmp_path: Path) -> None:
    check_drawn(200, [2, -2], tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 5])
def test_the_words_are_true_of_each_kind_of_data(tmp_path: Path, kind: str, seed: int | None) -> None:
    """Cut in its second pass, and once more, with all that draws random numbers."""
    repeated = kind.startswith("repeated")
    cuts = (Cut(StepEnd, 5), Cut(ValidationStepEnd, 1))
    handlers = frozenset({"accumulate", "average"})
    epoch_length = 5 if repeated else None
    check(
        Timeline(kind, seed, handlers=handlers, val="shuffled, generator", epoch_length=epoch_length, cuts=cuts),
        tmp_path,
    )


FOUND = [
    Timeline("batch sampler of one's own", script=True, epochs=1, max_steps=5, cuts=(Cut(ValidationStart, 1),)),
    Timeline("batch sampler of one's own", script=True, epochs=1, max_steps=5, cuts=(Cut(StepEnd, 5),)),
    Timeline("batch sampler of one's own", script=True, epochs=1, max_steps=5, cuts=(Cut(Settled, 6),)),
]


@pytest.mark.parametrize("timeline", FOUND, ids=lambda timeline: f"{timeline.kind}-{timeline.cuts[0]}")
def test_the_words_are_true_where_they_were_not_once(tmp_path: Path, timeline: Timeline) -> None:
    check(timeline, tmp_path)


WEAK = [
    Timeline("sampler that draws from a pool"),
    Timeline("sampler with a generator of Python's"),
    Timeline("sampler with a generator of Python's", seed=5),
    Timeline("dataset with its own generator"),
    Timeline("dataset with its own generator", seed=5),
    Timeline("dataset that is told its seed"),
    Timeline("function with a generator"),
    Timeline("in order", workers=2),
    Timeline("shuffled", workers=-2),
    Timeline("shuffled, generator", workers=2),
    Timeline("stream", workers=-2),
]


@pytest.mark.parametrize("timeline", WEAK, ids=lambda timeline: f"{timeline.kind}-{timeline.seed}-{timeline.workers}")
def test_where_the_words_promise_less_a_resumed_run_differs(tmp_path: Path, timeline: Timeline) -> None:
    """So that they ask for no more than they must."""
    through = outcome(timeline, tmp_path / "through")
    cut = Cut(EpochEnd, 1) if timeline.kind == "stream" else Cut(StepEnd, 6)
    resumed = outcome(replace(timeline, cuts=(cut,)), tmp_path / "resumed")
    (words,) = through.words
    assert promise(words, KINDS[timeline.kind].holds) != "all"
    assert not equal(resumed.everything, through.everything)


def test_same_order_is_bit_identical_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    timeline = Timeline("weighted", workers=2, epochs=3)
    through = outcome(timeline, tmp_path / "through")
    resumed = outcome(replace(timeline, cuts=(Cut(EpochEnd, 1), Cut(EpochEnd, 1))), tmp_path / "resumed")
    assert through.words == resumed.words
    assert through.words.pop().startswith("same order (")
    assert equal(resumed.everything, through.everything)


def test_a_run_logs_the_words_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "camshaft")
    words = outcome(Timeline("weighted", seed=5), tmp_path).words
    said = [message for message in caplog.messages if message.startswith("Resumed, this run would be: ")]
    assert said == [f"Resumed, this run would be: {words.pop()}."]


# What docs/resume.md says of these data.
SPECIMENS: dict[str, list[Timeline]] = {
    "a `DataLoader` over tensors, torch's samplers": [
        Timeline("shuffled tensors"), Timeline("weighted tensors", workers=2), Timeline("replaced tensors", seed=5),
    ],
    "a `DataLoader` over a dataset of your own, `Images`": [
        Timeline("shuffled"), Timeline("distributed"), Timeline("subset, generator"), Timeline("single samples"),
    ],
    "the same with `seed=`, with workers or without": [
        Timeline("shuffled", 5), Timeline("shuffled", 5, workers=2), Timeline("weighted", 5, workers=-2),
    ],
    "the same with `seed=`, and `Images` has `set_sample_seed`": [
        Timeline("dataset that is told its seed", seed=5), Timeline("dataset that is told its seed", 5, workers=2),
    ],
    "workers, no `seed=`": [Timeline("shuffled", workers=2), Timeline("distributed", workers=2)],
    "persistent workers or workers and a `generator=`, no `seed=`": [
        Timeline("in order", workers=-2), Timeline("shuffled, generator", workers=2), Timeline("stream", workers=-2),
    ],
    "a sampler of your own, `Mine`, over tensors": [
        Timeline("sampler of one's own over tensors"), Timeline("sampler of one's own over tensors", workers=2),
    ],
    "the same with `seed=`": [Timeline("sampler of one's own over tensors", seed=5)],
    "a loader with `state_dict` and `load_state_dict`": [
        Timeline("loader with a state"), Timeline("repeated loader with a state", 5),
    ],
    "a list or tuple of batches": [Timeline("list"), Timeline("repeated list")],
    "other iterables, iterable datasets, functions": [
        Timeline("stream"), Timeline("stream", workers=2), Timeline("sequence"), Timeline("function", seed=5),
    ],
}  # fmt: skip


def documented() -> dict[str, str]:
    """The words for each kind of data in the first table of docs/resume.md."""
    lines = RESUME.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| data |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return {data.strip(): words.strip() for _, data, words, _ in (row.split("|") for row in rows)}


def test_the_page_has_a_row_for_each_specimen() -> None:
    assert list(documented()) == list(SPECIMENS)


@pytest.mark.parametrize("row", SPECIMENS)
def test_the_page_has_the_words_of_the_log(row: str) -> None:
    for timeline in SPECIMENS[row]:
        feed = Feed(timeline.seed)
        feed.open(KINDS[timeline.kind].make(WORKERS[timeline.workers]))
        words = re.sub("Noisy|ToldItsSeed", "`Images`", feed.exactness()).replace("AtOnce", "`Mine`")
        assert words.replace("seed=", "`seed=`") == documented()[row], timeline
