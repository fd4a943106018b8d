"""Rules that hold for any input: Hypothesis draws inputs, the same at each run, to find one that breaks a rule."""

from __future__ import annotations

import itertools
import math
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import (
    AverageMeter,
    BatchReady,
    Data,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    StepEnd,
    ValidationStart,
    ValidationStepEnd,
    after,
    at,
    every,
    repeat,
    until,
)
from camshaft.engine.dispatch import Channel, Subscription
from camshaft.engine.feed import Feed
from camshaft.engine.plan import Plan
from camshaft.engine.record import Record
from camshaft.engine.rng import mix, rng_state, set_rng_state
from camshaft.engine.when import NEVER, Always, When

# Without a deadline, because a busy machine breaks no rule; the inputs are drawn again only when a test is changed.
settings.register_profile("camshaft", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("camshaft")


# Filters ---------------------------------------------------------------------------------------------------

Way = Literal["emit", "emit_to_all", "transform"]
WAYS: st.SearchStrategy[Way] = st.sampled_from(["emit", "emit_to_all", "transform"])


def filters(base: int = 0) -> st.SearchStrategy[When]:
    """Filters that change their mind within the first 60 counts after ``base``, where they do at all."""
    number = st.integers(base + 1, base + 60)
    return st.one_of(
        st.builds(every, st.integers(1, 50)), st.builds(at, number), st.builds(after, number), st.builds(until, number)
    )


def dispatch(channel: Channel[StepEnd], way: Way, event: StepEnd, count: int) -> None:
    """Announce an event as the loop does: only if somebody may be due."""
    if count < channel.due:
        return
    if way == "transform":
        channel.transform(lambda value: event, None, count)
    else:
        getattr(channel, way)(event, count)


@given(data=st.data(), base=st.sampled_from([0, NEVER - 30]), way=WAYS)
def test_a_filter_never_jumps_over_a_count_that_it_lets_through(data: st.DataObject, base: int, way: Way) -> None:
    """Wherever the counter starts, and wherever it is set to before a rewind, each handler hears its filter's counts.

    Also beyond `NEVER`, the count that stands for "not in sight".
    """
    whens = data.draw(st.lists(filters(base), min_size=1, max_size=3))
    starts = data.draw(st.lists(st.integers(base, base + 70), min_size=1, max_size=4))
    channel, engine = Channel(StepEnd), Engine()
    heard: list[list[int]] = [[] for _ in whens]
    for counts, when in zip(heard, whens, strict=True):
        channel.add(lambda event, counts=counts: counts.append(event.batch), when)  # type: ignore[misc]
    expected: list[list[int]] = [[] for _ in whens]
    for start in starts:
        channel.rewind()
        for count in range(start + 1, start + 41):
            dispatch(channel, way, StepEnd(engine, count, None), count)
        for counts, when in zip(expected, whens, strict=True):
            counts += [count for count in range(start + 1, start + 41) if when(count)]
    assert heard == expected


@given(when=filters(), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), num_validated=st.integers(1, 70))
def test_an_engines_filters_hear_their_steps_in_every_run(when: When, lengths: list[int], num_validated: int) -> None:
    """Steps are counted on from run to run, and the batches of each validation from 1."""
    engine = Engine(idle)
    steps, validated = [], []
    engine.subscribe(StepEnd, lambda event: steps.append(event.engine.step), when)
    engine.subscribe(ValidationStepEnd, lambda event: validated.append(event.engine.validation_step), when)
    for length in lengths:
        engine.fit(range(length), range(num_validated), epochs=2)
    assert steps == [step for step in range(1, 2 * sum(lengths) + 1) if when(step)]
    assert validated == [step for step in range(1, num_validated + 1) if when(step)] * 2 * len(lengths)


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


# The order of handlers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """What a handler does when it is called, besides saying so."""

    kind: Literal["nothing", "add", "cancel", "raise"]
    number: int = 0  # of the handler to cancel


ACTIONS = st.one_of(
    st.just(Action("nothing")),
    st.just(Action("add")),
    st.just(Action("raise")),
    st.builds(Action, st.just("cancel"), st.integers(0, 30)),
)


class Handlers(Protocol):
    """Numbered handlers of one event, which say when they are called."""

    heard: list[int]

    def add(self, when: When, action: Action) -> None:
        """Attach one more handler, after the others."""

    def cancel(self, number: int) -> None:
        """Cancel a handler, which may have been cancelled before; numbers go round."""


def call(handlers: Handlers, number: int, action: Action) -> None:
    """Do what is done by every handler."""
    handlers.heard.append(number)
    if action.kind == "add":
        handlers.add(Always(), Action("nothing"))
    elif action.kind == "cancel":
        handlers.cancel(action.number)
    elif action.kind == "raise":
        raise ArithmeticError(number)


class RealHandlers:
    """Those of a channel."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.heard: list[int] = []
        self.channel = Channel(StepEnd)
        self.subscriptions: list[Subscription[StepEnd]] = []

    def add(self, when: When, action: Action) -> None:
        number = len(self.subscriptions)
        self.subscriptions.append(self.channel.add(lambda event: call(self, number, action), when))

    def cancel(self, number: int) -> None:
        self.subscriptions[number % len(self.subscriptions)].cancel()

    def emit(self, count: int) -> bool:
        """Return whether a handler raised."""
        try:
            dispatch(self.channel, self.way, StepEnd(Engine(), None, None), count)
        except ArithmeticError:
            return True
        return False


class ListedHandlers:
    """What a channel should do, written down as plainly as can be."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.heard: list[int] = []
        self.all: list[tuple[int, When, Action]] = []
        self.cancelled: set[int] = set()

    def add(self, when: When, action: Action) -> None:
        self.all.append((len(self.all), when, action))

    def cancel(self, number: int) -> None:
        self.cancelled.add(number % len(self.all))

    def emit(self, count: int) -> bool:
        raised = False
        for number, when, action in list(self.all):
            if number in self.cancelled or not when(count):
                continue
            try:
                call(self, number, action)
            except ArithmeticError:
                raised = True
                if self.way != "emit_to_all":
                    break
        return raised


class Dispatches(RuleBasedStateMachine):
    """Handlers run in the order in which they were attached.

    A cancelled one is never called again, and one that is added during a dispatch is not called in that dispatch.
    """

    @initialize(way=WAYS)
    def begin(self, way: Way) -> None:
        self.real, self.listed = RealHandlers(way), ListedHandlers(way)
        self.count = 0
        self.add(Always(), Action("nothing"))

    @rule(when=st.one_of(st.just(Always()), filters()), action=ACTIONS)
    def add(self, when: When, action: Action) -> None:
        self.real.add(when, action)
        self.listed.add(when, action)

    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        self.real.cancel(number)
        self.listed.cancel(number)

    @rule(count=st.integers(0, 70))
    def set_the_counter(self, count: int) -> None:
        self.count = count
        self.real.channel.rewind()

    @rule(times=st.integers(1, 12))
    def emit(self, times: int) -> None:
        for _ in range(times):
            self.count += 1
            assert self.real.emit(self.count) == self.listed.emit(self.count)
            assert self.real.heard == self.listed.heard
            assert len(self.real.subscriptions) == len(self.listed.all)


TestDispatches = Dispatches.TestCase
TestDispatches.settings = settings(max_examples=60, stateful_step_count=25)


# Averages --------------------------------------------------------------------------------------------------

Value = float | Tensor


def values(least: float = -1e6) -> st.SearchStrategy[Value]:
    """Numbers, and tensors of one element in the precisions that losses have."""
    doubles = st.floats(least, 1e6)
    singles = st.floats(least, 1e6, width=32)
    return st.one_of(
        doubles,
        st.builds(torch.tensor, doubles, dtype=st.just(torch.float64)),
        st.builds(torch.tensor, singles, dtype=st.just(torch.float32)),
        st.builds(torch.tensor, st.lists(singles, min_size=1, max_size=1), dtype=st.just(torch.float32)),
    )


WEIGHTS = st.one_of(st.integers(1, 1000), st.floats(1e-3, 1e3))
PAIRS = st.lists(st.tuples(values(), WEIGHTS), min_size=1, max_size=20)


def mean(pairs: list[tuple[Value, float]]) -> float:
    """The weighted mean, in exact sums."""
    return math.fsum(float(value) * weight for value, weight in pairs) / math.fsum(weight for _, weight in pairs)


def nearly(pairs: list[tuple[Value, float]]) -> Any:
    """The weighted mean to 1e-12 of the size of what was averaged."""
    return pytest.approx(
        mean(pairs), rel=0, abs=1e-12 * mean([(abs(float(value)), weight) for value, weight in pairs])
    )


@given(pairs=PAIRS, cuts=st.sets(st.integers(1, 19)))
def test_the_pieces_that_a_meter_gives_away_add_up_to_the_whole(
    pairs: list[tuple[Value, float]], cuts: set[int]
) -> None:
    """One meter fed with everything equals the sum over the pieces that were taken out of another."""
    whole, meter = AverageMeter(), AverageMeter()
    taken: list[tuple[Value, Value]] = []
    for number, (value, weight) in enumerate(pairs):
        if number in cuts:
            taken.append(meter.take())
        whole.update(value, weight)
        meter.update(value, weight)
    taken.append(meter.take())
    merged = math.fsum(float(total) for total, _ in taken) / math.fsum(float(count) for _, count in taken)
    assert whole.avg == nearly(pairs)
    assert merged == nearly(pairs)
    assert (meter.count, float(meter.sum), float(meter.val)) == (0, 0.0, float(pairs[-1][0]))


ROWS = st.lists(
    st.tuples(st.dictionaries(st.sampled_from(["loss", "acc"]), values(), min_size=1), st.one_of(st.just(0), WEIGHTS)),
    max_size=20,
)


def by_name(rows: list[tuple[dict[str, Value], float]]) -> dict[str, list[tuple[Value, float]]]:
    """The (value, weight) pairs of each name; a value of no sample is left out."""
    names = [name for row, weight in rows if weight for name in row]
    return {name: [(row[name], weight) for row, weight in rows if weight and name in row] for name in names}


@given(rows=ROWS, marks=st.sets(st.integers(1, 19)), save=st.integers(1, 19))
def test_the_stretches_of_a_record_add_up_to_the_whole(
    rows: list[tuple[dict[str, Value], float]], marks: set[int], save: int
) -> None:
    """Each `since_mark` gives the means of its stretch, and `compute` those of all; also after a save in between."""
    record = Record()
    start = 0
    for number, (row, weight) in enumerate(rows):
        if number in marks:
            assert record.since_mark() == {n: nearly(pairs) for n, pairs in by_name(rows[start:number]).items()}
            start = number
        if number == save:
            state = record.state_dict()
            record = Record()
            record.load_state_dict(state, torch.device("cpu"))
        record.add(row, weight)
    whole = {name: nearly(pairs) for name, pairs in by_name(rows).items()}
    assert record.compute() == record.peek() == whole
    assert record.since_mark() == {name: nearly(pairs) for name, pairs in by_name(rows[start:]).items()}
    assert record.compute() == whole
    assert record.since_mark() == {}


# Resuming --------------------------------------------------------------------------------------------------


class Noisy(Dataset[Tensor]):
    """Reads a sample together with a random number from every global generator."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, *noise()], dtype=torch.float64)


def noise() -> list[float]:
    """Draw from every global generator, as augmentation and dropout do."""
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


class LazySampler(Sampler[int]):
    """Draws each index from the global generator only when it is asked for it."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.num):
            yield int(torch.randint(self.num, ()))


Order = Literal["in order", "lazy", "shuffled", "weighted", "replaced", "own batches"]
ORDERS: tuple[Order, ...] = get_args(Order)
Kind = Literal["loader", "list", "function", "repeat"]


@dataclass(frozen=True)
class Reading:
    """What a run reads, and how far."""

    num: int
    batch_size: int | None
    drop_last: bool
    order: Order
    num_generators: int  # of its own: one for the loader and its sampler, or one for each of them
    kind: Kind
    seed: int | None
    epochs: int
    epoch_length: int | None

    def data(self) -> Data:
        """Return the data, built as a script builds them when it starts."""
        if self.kind == "list":
            return list(torch.arange(self.num).split(self.batch_size or 1))
        loader = self._loader(*self._generators())
        if self.kind == "function":
            return lambda: loader
        return repeat(loader) if self.kind == "repeat" else loader

    def _generators(self) -> tuple[torch.Generator | None, torch.Generator | None]:
        first, second = (torch.Generator().manual_seed(seed) for seed in (3, 4))
        return [(None, None), (first, first), (first, second)][self.num_generators]

    def _loader(self, for_loader: torch.Generator | None, for_sampler: torch.Generator | None) -> DataLoader[Any]:
        dataset, sampler = Noisy(self.num), self._sampler(for_sampler)
        if self.order == "own batches":
            batches = BatchSampler(sampler or (), self.batch_size or 1, self.drop_last)
            return DataLoader(dataset, batch_sampler=batches, generator=for_loader)
        drop_last = self.drop_last and self.batch_size is not None
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=self.order == "shuffled",
            sampler=sampler,
            drop_last=drop_last,
            generator=for_loader,
        )

    def _sampler(self, generator: torch.Generator | None) -> Sampler[int] | None:
        indices = range(self.num)
        if self.order == "weighted":
            return WeightedRandomSampler([1.0 + index for index in indices], self.num, generator=generator)
        if self.order == "replaced":
            return RandomSampler(indices, replacement=True, num_samples=self.num + 2, generator=generator)
        if self.order == "own batches":
            return SubsetRandomSampler(indices, generator=generator)
        return LazySampler(self.num) if self.order == "lazy" else None


def kinds(order: Order, num_generators: int) -> list[Kind]:
    """What can be resumed exactly; a function's loader is not seen, so its generators cannot be saved."""
    if order == "in order":
        return ["loader", "list", "function", "repeat"]
    return ["loader", "repeat"] if num_generators else ["loader", "function", "repeat"]


@st.composite
def readings(draw: st.DrawFn, orders: Sequence[Order] = ORDERS, generators: Sequence[int] = (0, 1, 2)) -> Reading:
    """Data with at least one batch, an epoch length that they can give, and nothing that is known to differ."""
    order, num_generators = draw(st.sampled_from(orders)), draw(st.sampled_from(generators))
    size = draw(st.sampled_from([None, None, 1, 2, 3, 4, 5]))
    reading = Reading(
        num=draw(st.integers(size or 1, 12)),
        batch_size=size,
        drop_last=draw(st.booleans()),
        order=order,
        num_generators=num_generators,
        kind=draw(st.sampled_from(kinds(order, num_generators))),
        seed=draw(st.sampled_from([None, 0, 5, 2**40])),
        epochs=draw(st.integers(1, 3)),
        epoch_length=None,
    )
    if reading.kind == "repeat":
        return replace(reading, epoch_length=draw(st.integers(1, 6)))
    data = reading.data()
    length = len(data() if callable(data) else data)  # type: ignore[arg-type]  # a list or a loader
    if length >= reading.epochs and draw(st.booleans()):
        return replace(reading, epoch_length=draw(st.integers(1, length // reading.epochs)))
    return reading


@dataclass(frozen=True)
class Place:
    """Where a run is, after a batch or an epoch."""

    epoch: int = 1
    step: int = 0
    epoch_step: int = 0


def read(reading: Reading, data: Data, feed: Feed, place: Place) -> Iterator[tuple[Place, Any]]:
    """Yield what comes after ``place``, as the loop reads it: batches, and "end" after each epoch."""
    step, epoch_step, length = place.step, place.epoch_step, reading.epoch_length
    for epoch in range(place.epoch, reading.epochs + 1):
        if length is None or epoch_step < length:
            batches = feed.begin(data, epoch, step)
            for batch in itertools.islice(batches, length and length - epoch_step):
                step, epoch_step = step + 1, epoch_step + 1
                noise()  # a training step draws, too
                yield Place(epoch, step, epoch_step), batch.tolist()
        feed.end(epoch, epoch_step, is_complete=True)
        epoch_step = 0
        yield Place(epoch + 1, step), "end"


def seed_all() -> None:
    """Seed the global generators, as a script does at its start."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


CUTS = st.sets(st.integers(1, 30), max_size=3)


@pytest.mark.parametrize("num_generators", [0, 1, 2])
@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data(), cuts=CUTS, cut_after_epochs=st.booleans(), in_one_process=st.booleans())
@settings(max_examples=50)
def test_data_that_are_cut_anywhere_go_on_as_if_they_had_not_been(
    data: st.DataObject,
    order: Order,
    num_generators: int,
    cuts: set[int],
    cut_after_epochs: bool,
    in_one_process: bool,
) -> None:
    """However often a run is cut, after a batch or after an epoch: it reads what it would have read."""
    reading = data.draw(readings([order], [num_generators]))
    seed_all()
    through = [seen for _, seen in read(reading, reading.data(), Feed(reading.seed, reading.epoch_length), Place())]
    if cut_after_epochs:
        cuts |= {number for number, seen in enumerate(through, start=1) if seen == "end"}
    seed_all()
    batches, feed, place = reading.data(), Feed(reading.seed, reading.epoch_length), Place()
    pieces: list[Any] = []
    for cut in [*sorted(cuts), math.inf]:
        for reached, seen in read(reading, batches, feed, place):
            place = reached
            pieces.append(seen)
            if len(pieces) == cut:
                break
        state, now = feed.state_dict(place.step), rng_state()
        noise()
        batches = batches if in_one_process else reading.data()
        feed = Feed(reading.seed, reading.epoch_length)
        feed.load_state_dict(state)
        set_rng_state(now)
    assert pieces == through


def fit(
    reading: Reading, directory: Path, cut: float = math.inf, moment: type[Event] = StepEnd, resume: str | None = None
) -> tuple[list[Any], Engine]:
    """Run an engine in a process of its own, so to say; return what it reads until a signal at ``moment``."""
    seen: list[Any] = []

    def step(engine: Engine, batch: Tensor) -> Tensor:
        seen.append((engine.epoch, batch.tolist()))
        return batch.double().mean() + noise()[0]

    def interrupt(event: Event) -> None:
        if event.engine.step >= cut:
            event.engine.run.interrupt(signal.SIGTERM)

    seed_all()
    engine = Engine(step, callbacks=[RunCheckpoint(directory)], seed=reading.seed)
    engine.subscribe(moment, interrupt)
    engine.fit(reading.data(), epochs=reading.epochs, epoch_length=reading.epoch_length, resume=resume)
    return seen, engine


@given(reading=readings(), cut=st.integers(0, 30), moment=st.sampled_from([BatchReady, StepEnd, EpochStart, EpochEnd]))
@settings(max_examples=60)
def test_a_run_that_is_cut_anywhere_goes_on_as_if_it_had_not_been(
    tmp_path_factory: pytest.TempPathFactory, reading: Reading, cut: int, moment: type[Event]
) -> None:
    """With a checkpoint on the disk, a signal at any step's or epoch's event, and ``resume="auto"``."""
    through, whole = fit(reading, tmp_path_factory.mktemp("through"))
    directory = tmp_path_factory.mktemp("cut")
    first, _ = fit(reading, directory, cut % len(through), moment)
    rest, resumed = fit(reading, directory, resume="auto")
    assert first + rest == through
    assert resumed.history.rows == whole.history.rows
    assert (resumed.epoch, resumed.step) == (whole.epoch, whole.step)


# Plans -----------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that is not refused."""
    epochs = draw(st.one_of(st.none(), st.integers(0, 4)))
    max_steps = draw(st.integers(0, 15) if epochs is None else st.one_of(st.none(), st.integers(0, 15)))
    interval = st.builds("{} {}".format, st.integers(1, 8), st.sampled_from(["steps", "epochs"]))
    return Plan(
        epochs,
        max_steps,
        min_epochs=draw(st.integers(0, 4 if epochs is None else epochs)),
        epoch_length=draw(st.one_of(st.none(), st.integers(1, 6))),
        validate_every=draw(st.one_of(st.none(), st.integers(1, 8), interval)),
    )


def planned_validations(plan: Plan, length: int, epoch: int, step: int) -> list[tuple[int, int]]:
    """The (epoch, step) of each validation that the plan announces for a run from ``epoch`` and ``step`` on."""
    found = []
    interval, unit = plan.validation_interval()
    left = plan.num_steps(length) or 0
    while left:
        epoch += 1
        for _ in range(min(length, left)):
            step, left = step + 1, left - 1
            if unit == "steps" and step % interval == 0:
                found.append((epoch, step))
        if unit == "epochs" and epoch % interval == 0:
            found.append((epoch, step))
    return found


@given(runs=st.lists(plans(), min_size=1, max_size=3), num_batches=st.integers(1, 6))
def test_a_run_goes_as_far_as_its_plan_says_and_validates_where_it_says(runs: list[Plan], num_batches: int) -> None:
    """Steps, epochs and validations are the planned ones; a further run counts on from the one before."""
    engine = Engine(idle)
    validations: list[tuple[int, int]] = []
    engine.subscribe(ValidationStart, lambda event: validations.append((event.engine.epoch, event.engine.step)))
    for plan in runs:
        epoch, step, length = engine.epoch, engine.step, plan.epoch_length or num_batches
        validations.clear()
        batches = list(range(num_batches))
        engine.fit(
            repeat(batches) if plan.epoch_length else batches,
            [0],
            epochs=plan.epochs,
            max_steps=plan.max_steps,
            min_epochs=plan.min_epochs,
            epoch_length=plan.epoch_length,
            validate_every=plan.validate_every,
        )
        assert engine.step - step == plan.num_steps(length)
        assert engine.epoch - epoch == plan.num_epochs(length)
        assert validations == planned_validations(plan, length, epoch, step)


@given(plan=plans(), step=st.integers(0, 10**6))
def test_the_next_validation_is_the_first_step_with_one(plan: Plan, step: int) -> None:
    """What the loop waits for is what `validates_after_step` says."""
    later = (late for late in range(step + 1, step + 9) if plan.validates_after_step(late))
    assert plan.next_validation(step) == next(later, NEVER)


# Random numbers --------------------------------------------------------------------------------------------

SMALL = st.integers(0, 1000)


@given(places=st.sets(st.tuples(SMALL, SMALL, SMALL), min_size=2, max_size=60))
def test_no_two_places_of_small_numbers_mix_to_the_same(places: set[tuple[int, int, int]]) -> None:
    """Other seeds, epochs and positions give other bits, in any order of the same three numbers, too."""
    places |= {(c, b, a) for a, b, c in places} | {(b, c, a) for a, b, c in places}
    assert len({mix(*place) for place in places}) == len(places)
