"""A whole run is tried in seconds, and everything is put back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import refused
from test_every_handler import MAKE
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    EarlyStopping,
    Export,
    Fingerprint,
    Log,
    MixedPrecision,
    Report,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    StopAfter,
    TensorBoard,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    StepEnd,
    Trainer,
    ValidationEnd,
    ValidationStepEnd,
    after,
    at,
    every,
    every_seconds,
    repeat,
)
from camshaft.testing import toy_data, toy_engine
from camshaft.testing.checks import equal

TRAIN, VAL = toy_data()
EPOCHS = 12
every_handler = pytest.mark.parametrize("name", list(MAKE))


def state_of(engine: Engine) -> dict[str, Any]:
    """All that decides what a run comes to, without asking what a rehearsal asks."""
    handlers = {repr(one): {k: repr(v) for k, v in vars(one).items()} for one in engine.listeners.callbacks}
    counters = ("epoch", "step", "num_fits", "num_validations", "num_updates", "num_skipped_updates")
    return {
        **{name: part.state_dict() for name, part in engine.parts.stateful().items()},
        **{name: getattr(engine, name) for name in counters},
        "modes": [layer.training for module in engine.parts.modules().values() for layer in module.modules()],
        "gradients": [
            parameter.grad for _, parameter in engine.parts.named_parameters() if parameter.grad is not None
        ],
        "parts": list(engine.parts),
        "explained": engine.explain(),
        "rows": engine.history.rows,
        "reason": engine.history.reason,
        "handlers": str(handlers),
        "random numbers": [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state()],
    }


def files(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()
    }


# Each stock handler -----------------------------------------------------------------------------------------


@every_handler
def test_with_each_handler_everything_is_as_before_and_the_run_is_the_same(name: str, tmp_path: Path) -> None:
    left_alone, rehearsed = (toy_engine(MAKE[name](tmp_path / place)) for place in ("alone", "rehearsed"))
    random.seed(0)
    torch.manual_seed(0)
    left_alone.fit(TRAIN, VAL, epochs=EPOCHS)
    random.seed(0)
    torch.manual_seed(0)
    before, written = state_of(rehearsed), files(tmp_path)
    rehearsal = rehearsed.rehearse(TRAIN, VAL, epochs=EPOCHS)
    after_it = state_of(rehearsed)
    assert {key for key in before if not equal(before[key], after_it[key])} == set()
    assert files(tmp_path) == written
    assert rehearsal.tried["epochs"].startswith("1, 2, 3, ")
    assert ", 12 of 12" in rehearsal.tried["epochs"]
    assert "bit for bit the same" in rehearsal.tried["resumed"], rehearsal
    rehearsed.fit(TRAIN, VAL, epochs=EPOCHS)
    for key in ("model", "optimizer"):
        assert equal(left_alone.parts[key].state_dict(), rehearsed.parts[key].state_dict())
    assert left_alone.history.rows == rehearsed.history.rows


class Planted(Exception):  # noqa: N818 - a fault, not an error of ours
    """A fault that somebody has planted."""


@every_handler
@pytest.mark.parametrize("method", ["on_epoch_end", "on_fit_end", "state_dict"])
def test_a_fault_in_each_handler_is_found_and_everything_put_back(name: str, method: str, tmp_path: Path) -> None:
    """At the end of the last epoch, at the end of the run, and when it is saved."""
    handler = MAKE[name](tmp_path)
    own = getattr(handler, method, lambda *arguments: None)

    def fail(*arguments: Any) -> Any:
        if method == "on_epoch_end" and arguments[0].engine.epoch < EPOCHS:
            return own(*arguments)
        raise Planted

    setattr(handler, method, fail)
    engine = toy_engine(handler)
    before = state_of(engine)
    with pytest.raises(Planted) as caught:
        engine.rehearse(TRAIN, VAL, epochs=EPOCHS)
    assert any("Found by a rehearsal" in note for note in caught.value.__notes__)
    if method == "on_epoch_end":
        assert any(f"in epoch {EPOCHS}" in note for note in caught.value.__notes__)
    after_it = state_of(engine)
    assert {key for key in before if not equal(before[key], after_it[key])} == set()


# What handlers hear -----------------------------------------------------------------------------------------


def heard(engine: Engine, event: type[Event], read: Callable[[Any], Any]) -> list[Any]:
    """What a handler reads at each such event; a rehearsal puts this list back, so it is kept behind a file's name."""
    kept: list[Any] = []
    engine.subscribe(event, threading_append(kept, read))
    return kept


def threading_append(kept: list[Any], read: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A handler whose list is not put back, because it is that of a class."""

    class Kept:
        values = kept

    def handler(event: Any) -> None:
        Kept.values.append(read(event))

    return handler


def test_handlers_see_the_numbers_of_the_real_run(tmp_path: Path) -> None:
    """The first life only: the first epochs, the places of handlers, and the last epoch to its last step."""
    engine = toy_engine()
    epochs = heard(engine, EpochEnd, lambda event: (event.engine.epoch, event.engine.step))
    engine.subscribe(StepEnd, lambda event: None, when=every(100))
    engine.subscribe(EpochEnd, lambda event: None, when=at(30))
    reasons = heard(
        engine, FitEnd, lambda event: (event.reason, event.engine.num_updates, event.engine.num_validations)
    )
    rehearsal = engine.rehearse(TRAIN, VAL, epochs=40)
    assert epochs[:6] == [(1, 4), (2, 7), (3, 12), (20, 100), (30, 147), (40, 200)]
    assert reasons[0] == ("40 epochs done", 200, 40)
    assert "at step 100" in rehearsal.tried["handlers"]
    assert "at epoch 30" in rehearsal.tried["handlers"]
    assert rehearsal.warnings == []


def test_the_last_epoch_reads_the_last_batches_without_reading_those_before() -> None:
    class Data(torch.utils.data.Dataset[Tensor]):
        read: ClassVar[list[int]] = []

        def __getitem__(self, index: int) -> Tensor:
            self.read.append(index)
            return torch.ones(2)

        def __len__(self) -> int:
            return 1001

    engine = Engine(lambda engine, batch: {"loss": batch.mean()})
    engine.rehearse(DataLoader(Data(), batch_size=10), epochs=1000)
    assert {*Data.read} == {*range(40), *range(990, 1001)}


def test_a_last_batch_that_is_too_small_for_batch_normalisation_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())
    data = TensorDataset(torch.randn(81, 4), torch.zeros(81, dtype=torch.long))
    with pytest.raises(DataError, match="a batch of one sample at step 110") as caught:
        trainer.rehearse(DataLoader(data, batch_size=8), epochs=10)
    assert "in epoch 10" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("plan", "last"),
    [
        ({"epochs": 1}, (1, 5)),
        ({"epochs": 7, "max_steps": 12}, (3, 12)),
        ({"max_steps": 33}, (7, 33)),
        ({"epochs": 5, "epoch_length": 1}, (5, 5)),
        ({"epochs": 4, "validate_every": "2 steps"}, (4, 20)),
        ({"epochs": 9, "validate_every": 4, "min_epochs": 9}, (9, 45)),
    ],
)
def test_every_kind_of_plan_ends_where_it_does(plan: dict[str, Any], last: tuple[int, int]) -> None:
    engine = toy_engine()
    ends = heard(engine, FitEnd, lambda event: (event.engine.epoch, event.engine.step))
    rehearsal = engine.rehearse(TRAIN, VAL, **plan)
    assert ends[0] == last
    assert rehearsal.warnings == []
    engine.fit(TRAIN, VAL, **plan)
    assert (engine.epoch, engine.step) == last


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(TRAIN)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (Stream(), VAL),
        (lambda: iter(TRAIN), lambda: iter(VAL)),
        (DataLoader(Stream(), batch_size=None), DataLoader(Stream(), batch_size=None)),
        (TRAIN, {"clean": VAL, "noisy": TRAIN}),
        (DataLoader(TensorDataset(torch.randn(9, 4), torch.zeros(9).long()), batch_size=2, shuffle=True), None),
        (TRAIN[:1], VAL[:1]),
    ],
)
@pytest.mark.parametrize("seed", [None, 1])
def test_every_kind_of_data_works(train: Any, val: Any, seed: int | None) -> None:
    model = nn.Linear(4, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), seed=seed)
    rehearsal = trainer.rehearse(train, val, epochs=5)
    assert "5 of 5" in rehearsal.tried["epochs"]
    assert rehearsal.warnings == []


def test_endless_data_are_tried_up_to_the_last_step() -> None:
    engine = toy_engine()
    ends = heard(engine, FitEnd, lambda event: event.engine.step)
    engine.subscribe(StepEnd, lambda event: None, when=every(500))
    rehearsal = engine.rehearse(repeat(TRAIN), VAL, max_steps=10_000, epoch_length=1000)
    assert ends[0] == 10_000
    assert "at step 500" in rehearsal.tried["handlers"]
    ends.clear()
    rehearsal = engine.rehearse(repeat(TRAIN), VAL, max_steps=10_000, validate_every=1000)
    assert ends[0] == 10_000
    assert rehearsal.tried["epochs"].endswith("4 validations")


def test_data_that_do_not_suffice_are_told() -> None:
    rehearsal = toy_engine().rehearse(TRAIN * 30, VAL, epochs=20, epoch_length=10)
    assert rehearsal.warnings == ["The data have 150 batches, and the run needs 200. Pass repeat(train)."]


def test_a_second_fit_is_rehearsed_from_where_the_first_ended() -> None:
    engine = toy_engine()
    engine.fit(TRAIN, VAL, epochs=3)
    ends = heard(engine, FitEnd, lambda event: (event.engine.epoch, event.engine.step, event.engine.num_validations))
    engine.rehearse(TRAIN, VAL, epochs=10)
    assert ends[0] == (13, 65, 13)
    engine.fit(TRAIN, VAL, epochs=10)
    assert ends[-1] == (13, 65, 13)


def test_a_handler_that_is_never_due_is_told() -> None:
    engine = toy_engine()

    def never(event: Event) -> None:
        raise AssertionError

    engine.subscribe(StepEnd, never, when=every(1000))
    engine.subscribe(EpochEnd, never, when=after(40))
    rehearsal = engine.rehearse(TRAIN, VAL, epochs=40, validate_every=50)
    assert [one for one in rehearsal.warnings if "every(n=1000)" in one or "after(n=40)" in one] == rehearsal.warnings[
        1:
    ]
    assert len(rehearsal.warnings) == 3
    assert rehearsal.warnings[0].startswith("No validation is due in this run.")


def test_a_handler_deep_in_a_validation_is_told_not_to_be_tried() -> None:
    engine = toy_engine()
    engine.subscribe(ValidationStepEnd, lambda event: None, when=every(100))
    engine.subscribe(ValidationStepEnd, lambda event: None, when=at(2))
    (warning,) = engine.rehearse(TRAIN, VAL * 100, epochs=3).warnings
    assert "every(n=100)" in warning
    assert warning.endswith("is not tried: only 2 batches of each validation set are read.")


def test_what_waits_for_hours_is_due_at_once(tmp_path: Path) -> None:
    def save(event: StepEnd) -> None:
        raise Planted

    engine = toy_engine()
    engine.subscribe(StepEnd, save, when=every_seconds(3600))
    with pytest.raises(Planted):
        engine.rehearse(TRAIN, VAL, epochs=3)


# Best values, early stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_weights_are_saved_and_not_saved(mode: Any, tmp_path: Path) -> None:
    best = BestCheckpoint("val_loss", mode, directory=tmp_path)
    engine = toy_engine(best)
    saves = heard(engine, ValidationEnd, lambda event: (event.engine.epoch, best.best is not None and best.best.epoch))
    engine.rehearse(TRAIN, VAL, epochs=20)
    was_best = [epoch == kept for epoch, kept in saves[:4]]
    assert {True, False} == {*was_best[1:]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("monitor", ["val_loss", "train_loss"])
@pytest.mark.parametrize("patience", [1, 7])
def test_early_stopping_ends_a_run_without_gain_and_not_the_one_to_the_last_epoch(
    mode: Any, monitor: str, patience: int
) -> None:
    engine = toy_engine(EarlyStopping(monitor, mode, patience=patience))
    ends = heard(engine, FitEnd, lambda event: event.engine.epoch)
    rehearsal = engine.rehearse(TRAIN, VAL, epochs=100)
    assert ends[:2] == [100, patience + 1]
    assert f"has not improved for {patience} checks" in rehearsal.tried["stopped"]


def test_it_is_said_that_nobody_stops() -> None:
    rehearsal = toy_engine(EarlyStopping("val_loss", patience=80)).rehearse(TRAIN, VAL, epochs=100)
    assert rehearsal.tried["stopped"] == "by nobody, though no value got better 50 times in a row"


def test_a_value_that_is_watched_in_mid_epoch_stops_a_run_of_one_epoch() -> None:
    engine = toy_engine(EarlyStopping("val_loss", patience=2))
    rehearsal = engine.rehearse(TRAIN * 20, VAL, epochs=1, validate_every="10 steps")
    assert "has not improved for 2 checks" in rehearsal.tried["stopped"]
    assert rehearsal.tried["epochs"].endswith("4 validations")


# Faults -----------------------------------------------------------------------------------------------------


def test_faults_in_validation_saving_export_and_in_the_data_of_the_last_epoch(tmp_path: Path) -> None:
    class Unsafe(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"when": Path()}

    class Branches(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.sum() > 0 else -super().forward(input)

    def batches() -> Iterator[Any]:
        if engine.epoch == 20:
            raise Planted("the file of epoch 20 is missing")
        return iter(TRAIN)

    def val() -> Iterator[Any]:
        raise Planted

    engine = toy_engine(RunCheckpoint(tmp_path / "run"), Unsafe())
    with pytest.raises(Exception, match="cannot be loaded safely"):
        engine.rehearse(TRAIN, VAL, epochs=20)
    engine = toy_engine(Export(tmp_path / "model.pt2"))
    engine.parts["model"][0] = Branches(4, 8)
    with pytest.raises(ConfigurationError, match=r"model\.pt2 could not be exported"):
        engine.rehearse(TRAIN, VAL, epochs=20)
    engine = toy_engine()
    with pytest.raises(Planted, match="epoch 20"):
        engine.rehearse(batches, VAL, epochs=20)
    with pytest.raises(Planted):
        engine.rehearse(TRAIN, val, epochs=20)
    assert list(tmp_path.rglob("*.pt*")) == []


def test_a_fault_in_what_takes_the_state_back_is_found() -> None:
    class Forgetful(Callback):
        def __init__(self) -> None:
            self.num_steps = 0

        def on_step_end(self, event: StepEnd) -> None:
            self.num_steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"num_steps": self.num_steps}

    rehearsal = toy_engine(Forgetful()).rehearse(TRAIN, VAL, epochs=20)
    assert rehearsal.warnings == ["A run that is resumed differs from one that goes on, in: handler Forgetful."]
    assert "with differences" in rehearsal.tried["resumed"]


def test_a_step_that_is_not_repeatable_is_told_and_not_taken_for_a_fault_of_the_resume() -> None:
    source = random.SystemRandom()
    engine = toy_engine()

    def noise(event: StepEnd) -> None:
        with torch.no_grad():
            engine.parts["model"][0].weight += source.random()

    engine.subscribe(StepEnd, noise)
    rehearsal = engine.rehearse(TRAIN, VAL, epochs=20)
    assert any("Two runs from the same state differ in: " in one and "part model" in one for one in rehearsal.warnings)
    assert "not comparable" in rehearsal.tried["resumed"]


def test_what_handlers_warn_of_is_in_the_report(tmp_path: Path) -> None:
    """A disk that cannot be written does not end a real run, so it does not end a rehearsal either."""
    best = BestCheckpoint("val_loss", "min", directory=tmp_path)
    engine = toy_engine(best)

    def spoil(event: EpochStart) -> None:
        if best.directory is not None and (best.directory / "best.pt").is_file():
            (best.directory / "best.pt").unlink()
            (best.directory / "best.pt").mkdir()

    engine.subscribe(EpochStart, spoil)
    rehearsal = engine.rehearse(TRAIN, VAL, epochs=20)
    assert any("BestCheckpoint could not write in" in one for one in rehearsal.warnings)


# A signal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "raised"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_signal_ends_a_rehearsal_and_everything_is_put_back(
    name: str, raised: type[BaseException], tmp_path: Path
) -> None:
    engine = toy_engine(RunCheckpoint(tmp_path / "run"))
    engine.subscribe(StepEnd, lambda event: signal.raise_signal(signal.Signals[name]), when=at(3))
    before = state_of(engine)
    with pytest.raises(raised) as caught:
        engine.rehearse(TRAIN, VAL, epochs=20)
    assert name == "SIGINT" or caught.value.args == (143,)
    assert list(tmp_path.iterdir()) == []
    after_it = state_of(engine)
    assert {key for key in before if not equal(before[key], after_it[key])} == set()


# A fresh process --------------------------------------------------------------------------------------------

SCRIPT = """
import os
from pathlib import Path
import torch
from camshaft.callbacks import BestCheckpoint, RunCheckpoint, RunDirectory, StopAfter, WeightAverage
from camshaft.engine import Callback
from camshaft.testing import toy_data, toy_engine

Path(f"pid-{os.getpid()}").touch()
is_fresh = "CAMSHAFT_TRIAL" in os.environ

class Own(Callback):
    def state_dict(self):
        return {"state": 1}

    def load_state_dict(self, state):
        __PLANTED__

if __name__ == "__main__":
    for number in range(2):
        seed = os.getpid() + number  # each process begins with weights of its own
        handlers = [Own(), RunDirectory("runs", terminal=False), BestCheckpoint("val_loss"), StopAfter(hours=1)]
        engine = toy_engine(*handlers, *[RunCheckpoint(f"run {number}")] * number, WeightAverage(decay=0.9), seed=seed)
        print(engine.rehearse(*toy_data(), epochs=20).tried["resumed"])
"""


def run_script(directory: Path, planted: str = "pass") -> subprocess.CompletedProcess[str]:
    (directory / "script.py").write_text(SCRIPT.replace("__PLANTED__", planted))
    command = [sys.executable, "script.py", "--any", "option"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_script_is_resumed_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    """Also at its second rehearsal, which has a RunCheckpoint; the first is resumed from a state of its own."""
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    pids = {path.name[4:] for path in tmp_path.glob("pid-*")}
    assert len(pids) == 3
    said = [line for line in done.stdout.splitlines() if line.startswith("in a fresh process (")]
    assert len(said) == 2
    assert all(line.endswith("), bit for bit the same as without") for line in said)
    assert {line.partition("(")[2].partition(")")[0] for line in said} < pids
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("pid-"))
    assert [name for name in left if name not in ("runs", "script.py")] == []
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_script_that_cannot_be_resumed_fails_with_what_it_has_printed(tmp_path: Path) -> None:
    done = run_script(tmp_path, "assert not is_fresh, 'it needs what only the first process has'")
    assert done.returncode == 1
    assert "EngineStateError: The run could not be resumed in a fresh process, which ended with code 1" in done.stderr
    assert "it needs what only the first process has" in done.stderr


@pytest.mark.slow
def test_a_resume_that_is_not_exact_in_a_fresh_process_is_told(tmp_path: Path) -> None:
    done = run_script(tmp_path, "is_fresh and torch.rand(1)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A run that is resumed differs from one that goes on, in:") == 0
    done = run_script(
        tmp_path, "is_fresh and engine.parts['model'][0].register_forward_pre_hook(lambda m, i: i[0] * 2)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A run that is resumed differs from one that goes on, in:") == 2
    assert "part model" in " ".join(done.stdout.split())


DIGITS = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, __EXAMPLES__)
import digits
import torch
from camshaft.callbacks import Export, Report, RunCheckpoint, TensorBoard
from camshaft.engine import BatchReady, Engine, EpochEnd, FitEnd, ValidationEnd

def used():
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))

class Wrong(Exception):
    pass

def last(engine):
    if engine.epoch == 20:
        raise Wrong

def plant(engine):
    what, handlers = sys.argv[1], {type(one).__name__: one for one in engine.listeners.callbacks}
    if what == "validation":
        engine.subscribe(ValidationEnd, lambda event: last(engine))
    elif what == "saving":
        engine.attach(RunCheckpoint("run"))
        handlers["EarlyStopping"].state_dict = lambda: {"a": object()}
    elif what == "export":
        engine.attach(Export("model.pt2"))
        layer = engine.parts["model"][-1]
        forward = layer.forward
        layer.forward = lambda inputs: forward(inputs) if inputs.sum() > 0 else -forward(inputs)
    elif what == "data":
        engine.subscribe(BatchReady, lambda event: last(engine))
    elif what == "FitEnd":
        engine.subscribe(FitEnd, lambda event: 1 / 0)
    elif what != "nothing":
        engine.subscribe(EpochEnd, lambda event: last(engine))

rehearse = Engine.rehearse

def rehearse_alone(engine, *arguments, **settings):
    plant(engine)
    before = used()
    try:
        print(rehearse(engine, *arguments, **settings))
    finally:
        print(f"SECONDS {used() - before}")
    sys.exit()

Engine.rehearse = rehearse_alone
digits.main(digits.get_args_parser().parse_args(["--rehearse", "--no-bar", "--output", "runs"]))
"""


PLANTED = ("nothing", "validation", "saving", "export", "data", "FitEnd")


@pytest.mark.parametrize("planted", ["EpochEnd", *(pytest.param(one, marks=pytest.mark.slow) for one in PLANTED)])
def test_the_digits_recipe_is_rehearsed_and_its_faults_are_found_in_less_than_30_seconds(
    planted: str, tmp_path: Path
) -> None:
    """Seconds of the processor, in both processes: the machine may have other things to do."""
    examples = str(Path(__file__).parent.parent / "examples")
    (tmp_path / "digits_alone.py").write_text(DIGITS.replace("__EXAMPLES__", repr(examples)))
    done = subprocess.run(
        [sys.executable, "digits_alone.py", planted],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = float(done.stdout.partition("SECONDS ")[2].split()[0])
    assert seconds < 30
    if planted == "nothing":
        assert done.returncode == 0, done.stderr
        assert "in a fresh process" in done.stdout
        assert "EarlyStopping: val_acc has not improved for 5 checks" in done.stdout
        assert "bit for bit" in " ".join(done.stdout.split())
    else:
        assert done.returncode == 1
        assert "Found by a rehearsal (from the first epoch to the last), in epoch 20" in done.stderr or (
            planted == "saving" and "Found by a rehearsal" in done.stderr
        )


# The run after it -------------------------------------------------------------------------------------------


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples with random augmentation."""

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), index / 40) + torch.randn(4) * random.random(), index % 3

    def __len__(self) -> int:
        return 42


KINDS = ["seed", "no seed", "workers", "persistent workers", "files", "bf16", "a step of one's own"]


def build(kind: str, directory: Path) -> tuple[Engine, Any]:
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train = DataLoader(
        Noisy(), batch_size=8, shuffle=True, num_workers=2 * (kind == "workers"), drop_last=kind == "workers"
    )
    callbacks: list[Callback] = [Schedule(warmup_cosine), WeightAverage(decay=0.9), Accumulate(batches=2)]
    if kind == "files":
        callbacks += [
            RunDirectory(directory / "runs", terminal=False),
            RunCheckpoint(directory / "run", every_steps=1),
        ]
        callbacks += [BestCheckpoint("val_loss", restore=True), TensorBoard(), Report(), Log(2), Fingerprint(1)]
        callbacks += [Export("model.pt2"), StopAfter(hours=1)]
    if kind == "bf16":
        callbacks.append(MixedPrecision("bf16"))
    seed = None if kind in ("no seed", "persistent workers") else 3
    if kind == "a step of one's own":

        def step(engine: Engine, batch: Any) -> Any:
            inputs, target = batch
            loss = nn.functional.cross_entropy(model(inputs), target)
            if engine.training:
                engine.update(loss)
            return {"loss": loss}

        return Engine(step, callbacks=callbacks, model=model, optimizer=optimizer), train
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=seed), train


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_after_a_rehearsal_is_the_run_without_one(kind: str, tmp_path: Path) -> None:
    val = DataLoader(Noisy(), batch_size=8)
    alone, train = build(kind, tmp_path / "alone")
    alone.fit(train, val, epochs=3)
    rehearsed, train = build(kind, tmp_path / "rehearsed")
    before = files(tmp_path / "rehearsed")
    rehearsal = rehearsed.rehearse(train, val, epochs=3)
    assert rehearsal.warnings == [] or kind == "persistent workers"  # whose random numbers nobody knows
    assert files(tmp_path / "rehearsed") == before
    assert list((tmp_path / "rehearsed").rglob(".rehearsal*")) == []
    rehearsed.fit(train, val, epochs=3)
    assert len(alone.parts) > 3
    for name, part in alone.parts.stateful().items():
        assert equal(part.state_dict(), rehearsed.parts[name].state_dict())
    assert alone.history.rows == rehearsed.history.rows
    assert alone.history.validations == rehearsed.history.validations


# What it says -----------------------------------------------------------------------------------------------


def test_it_says_what_the_whole_run_will_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = toy_engine(RunCheckpoint(tmp_path, keep=2))
    slow = threading.Event()
    engine.subscribe(StepEnd, lambda event: slow.wait(0.05))
    rehearsal = engine.rehearse(TRAIN * 10, VAL, epochs=100)
    assert rehearsal.seconds_per_epoch is not None
    assert rehearsal.seconds is not None
    assert 50 * 0.05 < rehearsal.seconds_per_epoch < 50 * 0.05 * 2
    assert rehearsal.seconds == pytest.approx(100 * rehearsal.seconds_per_epoch)
    engine.fit(TRAIN, VAL, epochs=2)
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    assert rehearsal.bytes_on_disk["RunCheckpoint"] == pytest.approx(kept, rel=0.2)
    assert rehearsal.bytes_per_checkpoint == pytest.approx(kept / 2, rel=0.2)
    assert rehearsal.peak_memory > 1_000_000
    printed = capsys.readouterr().out
    assert str(rehearsal) in printed
    for text in ("from the first epoch to the last", "Tried:", "time per epoch", "kept on disk", "peak memory"):
        assert text in printed
    assert max(map(len, str(rehearsal).splitlines())) <= 100


# What is refused --------------------------------------------------------------------------------------------


def test_data_that_can_be_read_only_once_are_refused() -> None:
    with refused(ConfigurationError, "train is a generator"):
        toy_engine().rehearse((batch for batch in TRAIN), VAL, epochs=2)
    with refused(ConfigurationError, "val noisy is a list_iterator"):
        toy_engine().rehearse(TRAIN, {"noisy": iter(VAL)}, epochs=2)


def test_within_a_run_and_without_a_step_it_is_refused() -> None:
    engine = toy_engine()
    engine.subscribe(EpochStart, lambda event: engine.rehearse(TRAIN, VAL, epochs=2))
    with pytest.raises(EngineStateError, match="already running"):
        engine.fit(TRAIN, VAL, epochs=1)
    with refused(ConfigurationError, "no step"):
        Engine().rehearse(TRAIN, VAL, epochs=2)
