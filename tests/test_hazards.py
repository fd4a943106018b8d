"""What is known to go wrong in training engines: the same mistake, the right outcome."""

from __future__ import annotations

import gc
import io
import logging
import math
import os
import re
import resource
import shutil
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    EarlyStopping,
    Metrics,
    Placement,
    ProgressBar,
    Report,
    RunDirectory,
    Schedule,
    TensorBoard,
    WeightAverage,
)
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    HandlerError,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    Trainer,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    at,
    every,
    every_seconds,
)

Batch = tuple[Tensor, Tensor]


def make_trainer(*callbacks: Callback, model: nn.Module | None = None, **arguments: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(2, 1) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, **arguments)


def make_batches(*sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 2, generator=generator), torch.randn(size, 1, generator=generator)) for size in sizes]


def scripted(values: list[float], *callbacks: Callback, model: nn.Module | None = None) -> Engine:
    """Run an epoch for each value, which is that epoch's ``val_score``; the weights hold the epoch's number."""
    model = nn.Linear(2, 1) if model is None else model
    engine = Engine(model=model, callbacks=callbacks)
    play(engine, model, values)
    return engine


def play(engine: Engine, model: nn.Module, values: list[float]) -> None:
    remaining = iter(values)
    for epoch in engine.epochs(len(values)):
        for _ in engine.train([1]):
            for parameter in model.parameters():
                parameter.data.fill_(epoch)
        for _ in engine.validate([1]):
            engine.record(score=next(remaining), weight=1)


def epoch_of(path: Path) -> float:
    """Return the epoch that wrote the weights of `scripted` in this file, by loading it as anyone would."""
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return next(iter(weights.values())).flatten()[0].item()


@contextmanager
def full_disk(max_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``max_bytes``: further writes fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def all_notes(error: BaseException | None) -> str:
    """Return the notes on an error and on those that caused it."""
    return "" if error is None else " ".join(getattr(error, "__notes__", [])) + all_notes(error.__cause__)


# Handlers and dispatch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_watching_a_failure_does_not_swallow_it(error: BaseException) -> None:
    """Handlers of RunFailed hear of the error; fit raises it all the same."""
    heard: list[BaseException] = []

    def step(engine: Engine, batch: int) -> None:
        raise error

    engine = Engine(step)
    engine.subscribe(RunFailed, lambda event: heard.append(event.error))
    with pytest.raises(type(error)) as caught:
        engine.fit([1], epochs=3)
    assert caught.value is error
    assert heard == [error]


def test_an_error_while_the_run_ends_hides_neither_the_first_error_nor_the_other_handlers() -> None:
    """Every handler of RunFailed and FitEnd runs, and the error that ended the run is the one that comes out."""
    heard: list[str] = []

    def explode(event: Event) -> None:
        raise ValueError(type(event).__name__)

    engine = Engine(lambda engine, batch: None)
    for event in (StepEnd, RunFailed, FitEnd):
        engine.subscribe(event, explode)
    engine.subscribe(RunFailed, lambda event: heard.append("failed"))
    engine.subscribe(FitEnd, lambda event: heard.append("end"))
    with pytest.raises(ValueError, match="StepEnd") as caught:
        engine.fit([1], epochs=1)
    assert heard == ["failed", "end"]
    assert "ValueError('RunFailed')" in all_notes(caught.value)


EVENTS: list[type[Event]] = [
    FitStart, EpochStart, BatchReady, LossReady, GradientsReady, UpdateEnd, StepEnd, ValidationStart,
    ValidationStepEnd, ValidationEnd, EpochEnd, Settled, FitEnd,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_a_stop_iteration_in_a_handler_does_not_end_training_quietly(event: type[Event]) -> None:
    """A handler's StopIteration is an error like any other, and is told with the handler's name."""

    def run_dry(event: Event) -> None:
        next(iter(()))

    trainer = make_trainer()
    trainer.subscribe(event, run_dry)
    with pytest.raises((StopIteration, RuntimeError)) as caught:
        trainer.fit(make_batches(2, 2), make_batches(2), epochs=1)
    assert f"run_dry, a handler of {event.__name__}" in all_notes(caught.value)


def test_a_stop_iteration_in_the_step_does_not_end_training_quietly() -> None:
    """Only the data may end an epoch: what the step raises comes out."""

    def step(engine: Engine, batch: int) -> None:
        next(iter(()))

    with pytest.raises((StopIteration, RuntimeError)):
        Engine(step).fit([1, 2], epochs=1)


ONCE_PER_FIT: list[type[Event]] = [FitStart, BatchReady, StepEnd, EpochEnd, FitEnd]


@pytest.mark.parametrize("event", ONCE_PER_FIT)
def test_a_handler_added_during_a_dispatch_waits_for_the_next(event: type[Event]) -> None:
    """The handlers of a moment are those attached before it."""
    heard: list[str] = []
    engine = Engine(lambda engine, batch: None)

    def first(_: Event) -> None:
        heard.append("first")
        if len(heard) == 1:
            engine.subscribe(event, lambda _: heard.append("late"))

    engine.subscribe(event, first)
    engine.fit([1], epochs=1)
    assert heard == ["first"]
    engine.fit([1], epochs=1)
    assert heard == ["first", "first", "late"]


@pytest.mark.parametrize("event", ONCE_PER_FIT)
def test_a_handler_cancelled_during_a_dispatch_does_not_run_in_it(event: type[Event]) -> None:
    """Cancelling counts from that moment on; those after it in the row still run."""
    heard: list[str] = []
    engine = Engine(lambda engine, batch: None)
    engine.subscribe(event, lambda _: second.cancel())
    second = engine.subscribe(event, lambda _: heard.append("second"))
    engine.subscribe(event, lambda _: heard.append("third"))
    engine.fit([1], epochs=1)
    assert heard == ["third"]


def test_cancelling_one_subscription_leaves_its_likes_alone() -> None:
    """Subscriptions are told apart by themselves, not by their handler or their filter."""
    assert every(2) != every(3)
    heard: list[int] = []
    engine = Engine(lambda engine, batch: None)

    def handler(event: StepEnd) -> None:
        heard.append(engine.step)

    cancelled = [engine.subscribe(StepEnd, handler, when=every(n)) for n in (2, 3, 3)][:2]
    for subscription in cancelled:
        subscription.cancel()
    engine.fit(range(6), epochs=1)
    assert heard == [3, 6]


@pytest.mark.parametrize("make", [lambda: every(2), lambda: at(4), lambda: every_seconds(0.0005)])
def test_one_filter_given_to_two_handlers_serves_both_alike(make: Callable[[], object]) -> None:
    """A filter is a value: to use it twice says the same as to write it twice."""
    heard: dict[str, list[int]] = {"one": [], "two": []}
    engine = Engine(lambda engine, batch: time.sleep(0.001))
    when = make()
    engine.subscribe(StepEnd, lambda event: heard["one"].append(engine.step), when=when)
    engine.subscribe(StepEnd, lambda event: heard["two"].append(engine.step), when=when)
    engine.fit(range(4), epochs=1)
    assert heard["one"]
    assert heard["two"] == heard["one"]


@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_ends", "on_train_batch_end", "on_train_epoch_end", "on_validation_epoch_end", "on_batch_begin"],
)
def test_a_hook_of_another_library_is_refused_and_never_silently_unheard(hook: str) -> None:
    """A method that looks like a hook and matches no event is refused when the callback is attached."""
    callback = type("FromElsewhere", (Callback,), {hook: lambda self, event: None})()
    with pytest.raises(HandlerError, match=f"FromElsewhere.{hook} matches no event"):
        Engine(callbacks=[callback])


def test_a_hook_set_on_the_object_is_heard_like_one_of_its_class() -> None:
    """What is named like a hook is one, wherever it was defined."""
    heard: list[int] = []
    callback = Callback()
    callback.on_epoch_end = lambda event: heard.append(event.engine.epoch)  # type: ignore[method-assign]  # on purpose
    Engine(lambda engine, batch: None, callbacks=[callback]).fit([1], epochs=2)
    assert heard == [1, 2]


def test_a_signature_is_checked_at_subscription_and_not_when_the_event_comes() -> None:
    """A handler that could never be called is refused before the run, also for an event that comes late."""

    def handler(event: FitEnd, reason: str) -> None: ...

    with pytest.raises(HandlerError, match=r"handler\(\) takes event, reason"):
        Engine().subscribe(FitEnd, handler)  # type: ignore[arg-type]  # the mistake under test


@dataclass
class CountedEvery:
    """A filter as `every`, that counts how often it was asked."""

    n: int
    num_asked: int = 0

    def __call__(self, count: int) -> bool:
        self.num_asked += 1
        return count % self.n == 0

    def next_due(self, count: int) -> int:
        return (count // self.n + 1) * self.n


def test_a_filter_is_not_asked_on_the_steps_it_has_ruled_out() -> None:
    """A handler on every hundredth step costs nothing on the others, but for the step after it."""
    when = CountedEvery(100)
    heard: list[int] = []
    engine = Engine(lambda engine, batch: None)
    engine.subscribe(StepEnd, lambda event: heard.append(engine.step), when=when)
    engine.fit(range(1000), epochs=1)
    assert heard == list(range(100, 1001, 100))
    assert when.num_asked <= 21


def test_no_log_record_is_made_for_a_step(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """However closely one listens, the number of log records does not grow with the steps."""
    caplog.set_level(logging.DEBUG)
    num_records = []
    for num_steps in (2, 50):
        caplog.clear()
        run = RunDirectory(tmp_path, terminal=False)
        trainer = make_trainer(run, EarlyStopping("val_loss"), BestCheckpoint("val_loss"), TensorBoard())
        trainer.fit(make_batches(*[2] * num_steps), make_batches(*[2] * num_steps), epochs=1)
        num_records.append(len(caplog.records))
    assert num_records[0] == num_records[1] > 0


# Progress -------------------------------------------------------------------------------------------------


def test_a_bar_without_a_terminal_writes_a_line_an_epoch_and_no_more() -> None:
    """A log file holds no control characters, and does not grow with the steps."""
    file = io.StringIO()
    make_trainer(ProgressBar(file=file)).fit(make_batches(*[2] * 200), make_batches(2, 2), epochs=3)
    text = file.getvalue()
    assert len(text.splitlines()) == 4
    assert not set(text) & {"\r", "\x1b"}


def screens(text: str) -> list[list[str]]:
    """Return what a terminal shows after each movement of the cursor: its lines, without the blanks around them."""
    lines, row, shown = [""], 0, []
    for piece in re.split(r"(\r\n|\r|\x1b\[A)", text):
        if piece == "\r\n":
            row += 1
            lines += [""] if row == len(lines) else []
        elif piece == "\x1b[A":
            row -= 1
        elif piece not in ("", "\r"):
            lines[row] = piece
        shown.append([line.strip() for line in lines])
    return shown


def read_all(reader: int) -> str:
    """Return what was written on a terminal whose other side is closed."""
    chunks: list[bytes] = []
    with os.fdopen(reader, "rb", buffering=0) as file, suppress(OSError):  # how Linux tells that it was all
        while chunk := file.read(4096):
            chunks.append(chunk)
    return b"".join(chunks).decode()


def test_the_bars_of_training_and_validation_do_not_fight_for_a_line() -> None:
    """On a terminal the validation's bar stands on the line below the epoch's, and both are gone at the end."""
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as file:
        trainer = make_trainer(ProgressBar(file=file, repaint_seconds=1e-6))
        trainer.fit(make_batches(2, 2), make_batches(2, 2), epochs=1)
    shown = screens(read_all(reader))
    titles = [[line.partition(":")[0] for line in lines] for lines in shown]
    assert ["epoch 1/1", "validation"] in titles
    assert not [lines for lines in titles if lines[0] == "validation" or "epoch 1/1" in lines[1:]]
    assert not [line for line in shown[-1] if "|" in line]
    assert shown[-1][0].startswith("epoch 1/1  train_loss")


# Early stopping -------------------------------------------------------------------------------------------


def test_nan_is_no_improvement_for_early_stopping() -> None:
    """A run whose value is NaN for ``patience`` checks in a row stops."""
    engine = scripted([0.5, math.nan, math.nan, 0.1], EarlyStopping("val_score", mode="min", patience=2))
    assert engine.epoch == 3
    assert "has not improved for 2 checks (best 0.5 at epoch 1)" in engine.history.reason


def test_a_number_improves_on_a_first_value_of_nan() -> None:
    """NaN at the beginning is not a best that nothing could beat."""
    stopping = EarlyStopping("val_score", mode="max", patience=2)
    engine = scripted([math.nan, 0.1, 0.2, 0.3], stopping)
    assert engine.epoch == 4
    assert (stopping.best, stopping.best_epoch) == (0.3, 4)


def test_early_stopping_is_not_reset_by_a_validation_or_an_evaluation() -> None:
    """The count continues from one check to the next, whatever else is evaluated between them."""
    trainer = make_trainer(EarlyStopping("val_loss", patience=3, min_delta=1e6))
    trainer.subscribe(EpochEnd, lambda event: trainer.evaluate(make_batches(2)))
    history = trainer.fit(make_batches(2, 2), make_batches(2), epochs=50)
    assert trainer.epoch == 4
    assert history.reason.startswith("EarlyStopping: val_loss has not improved for 3 checks")


def test_zero_is_a_value_like_any_other() -> None:
    """A value of exactly 0.0 can be the best, and is not taken for a missing one."""
    stopping = EarlyStopping("val_score", mode="min", patience=2)
    best = BestCheckpoint("val_score", mode="min")
    engine = scripted([0.5, 0.0, 0.2, 0.1], stopping, best)
    assert (stopping.best, stopping.best_epoch, engine.epoch) == (0.0, 2, 4)
    assert best.best is not None
    assert (best.best.value, best.best.epoch) == (0.0, 2)


def test_a_second_fit_has_its_whole_patience_and_still_knows_the_best() -> None:
    """A run that follows one which stopped is not stopped at its first check, nor is its first value a new best."""
    stopping = EarlyStopping("val_score", mode="max", patience=2)
    model = nn.Linear(2, 1)
    engine = scripted([0.9, 0.1, 0.1, 0.1], stopping, model=model)
    assert engine.epoch == 3
    play(engine, model, [0.5] * 9)
    assert engine.epoch == 5
    assert (stopping.best, stopping.best_epoch) == (0.9, 1)


def test_a_restored_callback_keeps_its_new_settings() -> None:
    """State comes back, settings do not: the patience written in the new run counts."""
    old = EarlyStopping("val_score", mode="max", patience=3)
    scripted([0.9, 0.1], old)
    new = EarlyStopping("val_score", mode="max", patience=5, min_delta=0.01)
    model = nn.Linear(2, 1)
    engine = Engine(model=model, callbacks=[new])
    engine.subscribe(FitStart, lambda event: new.load_state_dict(old.state_dict()))  # when a resume gives it back
    play(engine, model, [0.1] * 9)
    assert (new.patience, new.min_delta, new.best) == (5, 0.01, 0.9)
    assert engine.epoch == 4  # one check without improvement before, four now


# Best weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_full_disk_costs_no_good_checkpoint(top_k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new file is whole before an old one goes; a failed write is warned about and training continues."""
    model = nn.Linear(100, 100)
    best = BestCheckpoint("val_score", "max", tmp_path, top_k=top_k)
    engine = Engine(model=model, callbacks=[best])
    play(engine, model, [0.1])
    with full_disk(max_bytes=20_000):
        play(engine, model, [0.2])
    assert "BestCheckpoint could not write" in caplog.text
    assert epoch_of(tmp_path / "best.pt") == 1
    assert best.best is not None
    assert best.best.epoch == 1
    play(engine, model, [0.3])
    assert epoch_of(tmp_path / "best.pt") == 3
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"best.pt"} | ({kept.file for kept in best.kept} if top_k > 1 else set())


def test_weights_and_optimizer_on_the_disk_are_of_the_same_moment_after_a_failed_write(tmp_path: Path) -> None:
    """If one of two files that belong together cannot be written, the other stays as well."""
    model = nn.Sequential(nn.Linear(100, 100).requires_grad_(False), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    engine = Engine(model=model, optimizer=optimizer, callbacks=[BestCheckpoint("val_score", "max", tmp_path)])
    for epoch, limit in ((1, nullcontext()), (2, full_disk(max_bytes=20_000))):
        for parameter in model[1].parameters():
            optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, epoch)}
        with limit:
            play(engine, model, [0.1 * epoch])
    assert epoch_of(tmp_path / "best.pt") == 1
    state = torch.load(tmp_path / "best.optimizer.pt", weights_only=True)["state"]
    assert state[0]["momentum_buffer"].unique().tolist() == [1.0]


def test_a_failed_write_leaves_no_file_that_nobody_owns(tmp_path: Path) -> None:
    """With several checkpoints kept, what was half done by a failed write is taken away again."""
    model = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    best = BestCheckpoint("val_score", "max", tmp_path, top_k=2)
    engine = Engine(model=model, optimizer=optimizer, callbacks=[best])
    with full_disk(max_bytes=60_000):  # enough for the weights, not for Adam's moments
        play(engine, model, [0.1])
    play(engine, model, [0.2, 0.3, 0.4])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"best.pt", "best.optimizer.pt", *(kept.file for kept in best.kept)}


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Whoever has opened the old file reads it whole: a new one takes its name, nothing is written into it."""
    model = nn.Linear(2, 1)
    engine = scripted([0.1], BestCheckpoint("val_score", "max", tmp_path), model=model)
    with open(tmp_path / "best.pt", "rb") as file:
        play(engine, model, [0.2])
        old = torch.load(file, weights_only=True)
    assert old["weight"].tolist() == [[1.0, 1.0]]
    assert epoch_of(tmp_path / "best.pt") == 2


def test_two_best_checkpoints_do_not_overwrite_each_others_files(tmp_path: Path) -> None:
    """Two handlers that would write the same ``best.pt`` are refused before the first step."""
    trainer = make_trainer(BestCheckpoint("val_loss", "min", tmp_path), BestCheckpoint("train_loss", "min", tmp_path))
    with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path))):
        trainer.fit(make_batches(2), make_batches(2), epochs=1)
    assert trainer.step == 0


def test_nan_is_never_best(tmp_path: Path) -> None:
    """Neither the first value nor a later one is best if it is NaN."""
    best = BestCheckpoint("val_score", "min", tmp_path, top_k=2)
    scripted([math.nan, 0.5, math.nan, 0.7], best)
    assert [kept.epoch for kept in best.kept] == [2, 4]
    assert epoch_of(tmp_path / "best.pt") == 2


@pytest.mark.parametrize("others", [[], [WeightAverage(decay=0.5)]])
def test_best_weights_are_of_the_moment_their_value_was_measured(others: list[Callback], tmp_path: Path) -> None:
    """A checkpoint is chosen by the validation of its own weights, not by the one before."""
    best = BestCheckpoint("val_loss", directory=tmp_path)
    train, val = make_batches(4, 4, 4, 4), make_batches(8, 3, seed=1)
    trainer = make_trainer(best, *others)
    trainer.fit(train, val, epochs=3, validate_every="3 steps")
    model = nn.Linear(2, 1)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert best.best is not None
    assert make_trainer(model=model).evaluate(val)["loss"] == best.best.value
    assert best.best.value == min(row["val_loss"] for row in trainer.history.validations)


def test_what_is_told_at_an_epochs_end_is_of_its_own_validation() -> None:
    """EpochEnd and Settled come after the epoch's validation, and carry or see its values."""
    values = [0.1, 0.2, 0.3]
    told: list[float] = []
    engine = Engine(lambda engine, batch: None if engine.training else {"score": values[engine.epoch - 1]})
    engine.subscribe(EpochEnd, lambda event: told.append(event.metrics["val_score"]))
    engine.subscribe(Settled, lambda event: told.append(len(engine.history.validations)))
    engine.fit([torch.ones(1)], [torch.ones(1)], epochs=3)
    # A step settles before the epoch's validation, an epoch after it.
    assert told == [0, 0.1, 1, 1, 0.2, 2, 2, 0.3, 3]


@pytest.mark.parametrize("watcher", [EarlyStopping, BestCheckpoint])
@pytest.mark.parametrize("name", ["accuracy", "error", "loss_of_blood"])
def test_a_direction_is_never_guessed_from_a_name(watcher: Callable[..., Callback], name: str) -> None:
    """A metric that does not say which way is better needs ``mode``, whatever it is called."""

    def mean_difference(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).mean()

    trainer = make_trainer(watcher(f"val_{name}"), metrics={name: mean_difference})
    with pytest.raises(ConfigurationError, match="cannot know whether a higher or a lower"):
        trainer.fit(make_batches(2), make_batches(2), epochs=1)


def test_a_direction_is_what_the_metric_says_of_itself() -> None:
    """An error is minimised even if somebody named it accuracy."""
    best = BestCheckpoint("val_accuracy")
    trainer = make_trainer(best, metrics={"accuracy": MeanSquaredError()})
    history = trainer.fit(make_batches(4, 4), make_batches(4, seed=1), epochs=4)
    assert best.best is not None
    assert best.best.value == min(history["val_accuracy"])


def test_a_worse_second_fit_does_not_overwrite_the_best_weights(tmp_path: Path) -> None:
    """What was best is known to the next run of the engine, and a diverged one does not replace it."""
    model = nn.Linear(2, 1)
    engine = scripted([0.9], BestCheckpoint("val_score", "max", tmp_path), model=model)
    play(engine, model, [0.1, 0.2, math.nan])
    assert epoch_of(tmp_path / "best.pt") == 1


def test_a_restored_best_checkpoint_does_not_overwrite_better_weights(tmp_path: Path) -> None:
    """A new object with the old one's state knows what is on the disk."""
    old = BestCheckpoint("val_score", "max", tmp_path)
    scripted([0.5, 0.9], old)
    new = BestCheckpoint("val_score", "max", tmp_path)
    new.load_state_dict(old.state_dict())
    scripted([0.1], new)
    assert epoch_of(tmp_path / "best.pt") == 2


@pytest.mark.parametrize("directory", [True, False])
def test_the_state_of_a_callback_holds_only_what_loads_safely(directory: bool, tmp_path: Path) -> None:
    """Tensors, numbers, strings, lists and dicts: what ``weights_only=True`` takes."""
    best = BestCheckpoint("val_score", "max", tmp_path if directory else None)
    stopping = EarlyStopping("val_score", "max")
    engine = scripted([0.1, 0.5, 0.2], best, stopping)
    for part in (best, stopping, engine.history):
        torch.save(part.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded.keys() == part.state_dict().keys()


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_saved_weights_are_those_of_the_bare_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """No name in the file tells of a compiled or a parallel wrapper."""
    bare = nn.Linear(2, 1)
    trainer = make_trainer(Placement(), BestCheckpoint("val_loss", directory=tmp_path), model=wrap(bare))
    trainer.fit(make_batches(2), make_batches(2), epochs=1)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    assert list(weights) == ["weight", "bias"]
    nn.Linear(2, 1).load_state_dict(weights)


# Gradients and updates ------------------------------------------------------------------------------------


def test_accumulation_windows_end_with_the_epoch_and_a_short_one_counts_in_full() -> None:
    """Fifteen batches in windows of four make four updates an epoch, each with the gradient of a mean."""
    weight = nn.Parameter(torch.zeros(1))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients: list[float] = []
    engine = Engine(
        lambda engine, batch: engine.update((weight * batch).mean()),
        model=model, optimizer=optimizer, callbacks=[Accumulate(batches=4)],
    )  # fmt: skip
    engine.subscribe(GradientsReady, lambda event: gradients.append(weight.grad.item() if weight.grad else math.nan))
    engine.fit([torch.ones(2)] * 15, epochs=2)
    assert engine.num_updates == 8
    assert gradients == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("accumulate", [Accumulate(batches=3), Accumulate(samples=9)])
def test_a_window_of_uneven_batches_has_the_gradients_of_one_batch(accumulate: Accumulate) -> None:
    """Each sample counts alike, also in a short last batch."""
    batches = make_batches(4, 4, 1)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    split, together = make_trainer(accumulate), make_trainer()
    split.fit(batches, epochs=2)
    together.fit([whole], epochs=2)
    assert split.num_updates == together.num_updates == 2
    torch.testing.assert_close(split.parts["model"].state_dict(), together.parts["model"].state_dict())


def make_scaled(*callbacks: Callback, scale: float = 2.0**14) -> Engine:
    """A trainer with a loss scaler, as fp16 has it, in float32 on the CPU."""
    trainer = make_trainer(*callbacks)
    trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=scale))
    return trainer


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """The limit is one on the true gradients: below it, a scaled run is as one without a scaler."""
    batches = make_batches(4, 4, 4)
    plain, scaled = make_trainer(ClipGradients(norm=100.0)), make_scaled(ClipGradients(norm=100.0))
    for trainer in (plain, scaled):
        trainer.fit(batches, epochs=2)
    torch.testing.assert_close(scaled.parts["model"].state_dict(), plain.parts["model"].state_dict())


def test_a_schedule_does_not_move_on_a_step_that_the_scaler_skipped() -> None:
    """UpdateEnd is fired for updates that were made, so that what counts them counts right."""
    trainer = make_scaled(Schedule(lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5), per="update"))
    updated: list[int] = []
    trainer.subscribe(LossReady, lambda event: event.loss * math.inf, when=at(2))
    trainer.subscribe(UpdateEnd, lambda event: updated.append(trainer.step))
    trainer.fit(make_batches(4, 4, 4), epochs=1)
    assert (updated, trainer.num_updates, trainer.num_skipped_updates) == ([1, 3], 2, 1)
    assert trainer.parts["optimizer"].param_groups[0]["lr"] == 0.1 * 0.25
    assert all(parameter.isfinite().all() for parameter in trainer.parts["model"].parameters())


def test_a_weight_average_is_not_used_before_it_holds_anything() -> None:
    """Until its first contribution, evaluations see the weights themselves."""
    train, val = make_batches(4, 4), make_batches(5, seed=1)
    plain = make_trainer().fit(train, val, epochs=3)
    averaged = make_trainer(WeightAverage(decay=0.5, start=4)).fit(train, val, epochs=3)
    assert averaged["val_loss"][:2] == plain["val_loss"][:2]
    assert averaged["val_loss"][2] != plain["val_loss"][2]
    assert averaged["train_loss"] == plain["train_loss"]


# Numbers --------------------------------------------------------------------------------------------------


def test_an_epochs_value_is_the_mean_over_its_samples() -> None:
    """Neither the last batch's value nor a mean of the batches' means."""
    batches = make_batches(8, 8, 1)

    def mean_target(output: Tensor, target: Tensor) -> Tensor:
        return target.mean()

    trainer = make_trainer(metrics={"target": mean_target})
    history = trainer.fit(batches, batches, epochs=1)
    expected = torch.cat([target for _, target in batches]).double().mean().item()
    assert history["train_target"] == pytest.approx([expected])
    assert history["val_target"] == pytest.approx([expected])
    assert trainer.evaluate(batches)["target"] == pytest.approx(expected)


def test_the_size_of_a_dict_batch_is_its_samples_and_not_its_keys() -> None:
    """A dict of two tensors of eight samples weighs eight."""

    def step(engine: Engine, batch: dict[str, Any]) -> Tensor:
        mean: Tensor = batch["x"].mean()
        return mean

    batches = [{"x": torch.ones(8), "names": ["a"] * 8}, {"x": torch.zeros(2), "names": ["b"] * 2}]
    assert Engine(step).fit(batches, epochs=1)["train_loss"] == [0.8]


def test_nothing_of_an_earlier_evaluation_is_left_in_a_metric() -> None:
    """Every stage starts again, with metrics of its own: a look beforehand does not lift the best."""

    def step(engine: Engine, batch: Batch) -> None:
        engine.measure(*batch)

    right = (torch.ones(4), torch.ones(4, dtype=torch.int64))
    wrong = (torch.ones(4), torch.zeros(4, dtype=torch.int64))
    engine = Engine(step, callbacks=[Metrics({"acc": BinaryAccuracy()})])
    engine.fit([right], [right], epochs=1)
    history = engine.fit([wrong], [wrong, right], epochs=2)
    assert history["train_acc"] == [1.0, 0.0, 0.0]
    assert history["val_acc"] == [1.0, 0.5, 0.5]


def test_evaluating_in_the_middle_of_an_epoch_leaves_its_averages_alone() -> None:
    """Training, validation and evaluation do not share a record."""
    collection = MetricCollection({"mse": MeanSquaredError()})
    plain, watched = (make_trainer(metrics={"all": collection}) for _ in range(2))
    watched.subscribe(StepEnd, lambda event: watched.evaluate(make_batches(3, seed=5)))
    histories = [trainer.fit(make_batches(4, 4, 2), make_batches(2), epochs=2) for trainer in (plain, watched)]
    assert histories[0].rows == histories[1].rows


def test_nan_is_told_as_nan() -> None:
    """An epoch with a NaN loss says so; no earlier average stands in its place."""
    values = iter([0.5, 0.5, math.nan, 0.5])
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(next(values))})
    losses = engine.fit([torch.ones(2)] * 2, epochs=2)["train_loss"]
    assert losses[0] == 0.5
    assert math.isnan(losses[1])


@pytest.mark.parametrize("validate_every", ["1 epoch", "1 step"])
def test_watching_a_run_does_not_change_it(validate_every: str) -> None:
    """Validation, with its own shuffling, and what is drawn when an epoch ends leave the weights bit for bit."""

    def train(val: DataLoader[tuple[Tensor, ...]] | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer = make_trainer(Accumulate(batches=2), model=model)
        if val is not None:
            trainer.subscribe(EpochEnd, lambda event: (torch.rand(3), np.random.rand()))
        data = TensorDataset(torch.randn(20, 2), torch.randn(20, 1))
        loader = DataLoader(data, batch_size=4, shuffle=True)
        trainer.fit(loader, val, epochs=3, validate_every=None if val is None else validate_every)
        return model.state_dict()

    noisy = DataLoader(TensorDataset(torch.randn(9, 2), torch.randn(9, 1)), batch_size=2, shuffle=True)
    torch.testing.assert_close(train(noisy), train(None), rtol=0, atol=0)


# Loggers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [None, BestCheckpoint, TensorBoard, Report])
def test_a_run_directory_that_vanishes_does_not_end_the_training(
    writer: Callable[..., Callback] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What only watches may fail; it warns, and the epochs are finished."""

    def remove(event: ValidationStart) -> None:
        for thread in threading.enumerate():
            if thread.name == "camshaft-page":  # which would put a file into what is being removed
                thread.join()
        shutil.rmtree(run.path)

    run = RunDirectory(tmp_path, terminal=False)
    extra = [] if writer is None else [writer("val_loss") if writer is BestCheckpoint else writer()]
    trainer = make_trainer(run, *extra)
    trainer.subscribe(ValidationStart, remove, when=at(2))
    history = trainer.fit(make_batches(4, 4), make_batches(4), epochs=4)
    assert history["epoch"] == [1, 2, 3, 4]
    assert "history.csv could not be written" in caplog.text


def test_a_logger_on_a_full_disk_warns_once_and_leaves_neither_thread_nor_open_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure of an external logger costs its logs, and nothing else."""
    gc.collect()
    threads, num_open_files = set(threading.enumerate()), len(os.listdir("/dev/fd"))
    trainer = make_trainer(TensorBoard(tmp_path))
    with full_disk(max_bytes=200):
        history = trainer.fit(make_batches(4), make_batches(4), epochs=20)
    assert len(history["epoch"]) == 20
    assert caplog.text.count("TensorBoard stops writing") == 1
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/dev/fd")) <= num_open_files
