"""The testing kit: each check catches the handler that it is there for, and passes a good one."""

from __future__ import annotations

import logging
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    Event,
    FitEnd,
    FitStart,
    LossReady,
    StepEnd,
)
from camshaft.testing import (
    CHECKS,
    CheckFailedError,
    check_callback,
    count_host_reads,
    parametrize_checks,
    record_events,
    toy_data,
    toy_engine,
    toy_run,
)


class Counter(Callback):
    """A good handler: counts steps, and keeps its count."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, event: StepEnd) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def __repr__(self) -> str:
        return "Counter()"


@parametrize_checks(lambda directory: Counter())
def test_a_good_handler_passes_every_check(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


# A zoo of bad handlers, each caught by the check of its name ------------------------------------------


class ChangesWeights(Counter):
    def on_epoch_end(self, event: EpochEnd) -> None:
        with torch.no_grad():
            next(event.engine.parts.module("model", "a test").parameters()).mul_(0.999)


class ChangesDropout(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        event.engine.parts.module("model", "a test").get_submodule("1").p = 0.1  # type: ignore[assignment]


class ChangesTheLoss(Counter):
    def on_loss_ready(self, event: LossReady) -> torch.Tensor:
        return event.loss * 1.001


class DrawsTorchNumbers(Counter):
    def on_fit_end(self, event: FitEnd) -> None:
        torch.rand(1)


class DrawsPythonNumbers(Counter):
    def on_step_end(self, event: StepEnd) -> None:
        random.random()


class PlantsAnAttribute(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        event.engine.parts.module("model", "a test").best = 0.0  # type: ignore[assignment]


class LeavesAHook(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        event.engine.parts.module("model", "a test").register_forward_hook(lambda *args: None)


class ReadsTheLoss(Counter):
    total = 0.0

    def on_loss_ready(self, event: LossReady) -> None:
        self.total += event.loss.item()


class ReadsAList(Counter):
    def on_step_end(self, event: StepEnd) -> None:
        self.values = event.output.tolist() if isinstance(event.output, torch.Tensor) else []
        next(event.engine.parts.module("model", "a test").parameters()).tolist()


class KeepsOutputs(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def on_step_end(self, event: StepEnd) -> None:
        self.kept.append(event.output)


class KeepsALambda(Counter):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "function": lambda: None}


class ForgetsItsState(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RemembersSinceItsStart(Counter):
    """Keeps the number of steps of which it has seen the loss, but not what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def on_step_end(self, event: StepEnd) -> None:
        self.seen.append(event.engine.step)
        self.count = len(self.seen)


class RefusesASecondRun(Counter):
    ran = False

    def on_fit_start(self, event: FitStart) -> None:
        if self.ran:
            event.engine.stop("once is enough")
        self.ran = True


class SharedByEngines(Counter):
    def attach(self, engine: Engine) -> None:
        engine.subscribe(StepEnd, self.on_step_end)


class SwallowsErrors(Counter):
    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.listeners.around("fit", self._scope)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        with suppress(Exception):
            yield


class WrapsErrors(Counter):
    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.listeners.around("fit", self._scope)

    @contextmanager
    def _scope(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RuntimeError("something went wrong") from error


class IgnoresSignals(Counter):
    def on_step_end(self, event: StepEnd) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class LeavesAThread(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        threading.Thread(target=threading.Event().wait, args=(20,), daemon=True).start()


class LeavesAFileOpen(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        self.file = open(__file__)  # noqa: SIM115


class ChangesTheLog(Counter):
    def on_fit_start(self, event: FitStart) -> None:
        logging.getLogger().addHandler(logging.NullHandler())


class ChangesTheDefaultDtype(Counter):
    def on_fit_end(self, event: FitEnd) -> None:
        torch.set_default_dtype(torch.float64)


class WritesWhereItIs(Counter):
    def on_fit_end(self, event: FitEnd) -> None:
        Path("log.txt").write_text("done")


class PrintsItsAddress(Counter):
    __repr__ = object.__repr__


class PrintsTwoLines(Counter):
    def __repr__(self) -> str:
        return "PrintsTwoLines(\n)"


class PrintsANumberOfItsOwn(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.number = random.SystemRandom().random()

    def __repr__(self) -> str:
        return f"PrintsANumberOfItsOwn({self.number})"


ZOO: dict[type[Counter], str] = {
    ChangesWeights: "leaves_weights_alone",
    ChangesDropout: "leaves_weights_alone",
    ChangesTheLoss: "leaves_weights_alone",
    DrawsTorchNumbers: "draws_no_random_numbers",
    DrawsPythonNumbers: "draws_no_random_numbers",
    PlantsAnAttribute: "plants_nothing",
    LeavesAHook: "plants_nothing",
    ReadsTheLoss: "reads_nothing_on_the_host",
    ReadsAList: "reads_nothing_on_the_host",
    KeepsOutputs: "keeps_no_outputs",
    KeepsALambda: "keeps_safely_loadable_state",
    ForgetsItsState: "takes_its_state_back",
    RemembersSinceItsStart: "resumes_after_every_step",
    RefusesASecondRun: "fits_twice",
    SharedByEngines: "belongs_to_one_engine",
    SwallowsErrors: "lets_errors_through",
    WrapsErrors: "lets_errors_through",
    IgnoresSignals: "lets_signals_through",
    LeavesAThread: "leaves_nothing_behind",
    LeavesAFileOpen: "leaves_nothing_behind",
    ChangesTheLog: "leaves_nothing_behind",
    ChangesTheDefaultDtype: "leaves_nothing_behind",
    WritesWhereItIs: "writes_only_where_told",
    PrintsItsAddress: "prints_well",
    PrintsTwoLines: "prints_well",
    PrintsANumberOfItsOwn: "is_made_alike",
}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Put back what the bad ones change."""
    handlers, dtype, term = (
        list(logging.getLogger().handlers),
        torch.get_default_dtype(),
        signal.getsignal(signal.SIGTERM),
    )
    yield
    logging.getLogger().handlers = handlers
    torch.set_default_dtype(dtype)
    signal.signal(signal.SIGTERM, term)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_a_bad_handler_is_caught_by_the_check_of_that_name(kind: type[Counter]) -> None:
    with pytest.raises(CheckFailedError) as caught:
        check_callback(lambda directory: kind(), only=[ZOO[kind]])
    message = str(caught.value)
    assert message.startswith(f"{ZOO[kind]}: {kind.__name__}: ")
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", message)
    assert len(sentences) == 2, message


def test_every_check_but_one_has_its_bad_handler() -> None:
    assert CHECKS.keys() - set(ZOO.values()) == {"ignores_evaluation"}


class StepsWhenEvaluated(Counter):
    """Hears the batches of every stage, and takes each for one of the training."""

    def on_batch_ready(self, event: Any) -> None:
        self.count += 1
        if self.count % 2:
            with torch.no_grad():
                next(event.engine.parts.module("model", "a test").parameters()).mul_(0.99)


def test_a_handler_that_takes_evaluations_for_training_is_caught() -> None:
    with pytest.raises(CheckFailedError, match=r"^ignores_evaluation: .*Look at engine\.training"):
        check_callback(lambda directory: StepsWhenEvaluated(), changes_training=True, only=["ignores_evaluation"])


# The rest of the kit ----------------------------------------------------------------------------------


def test_a_handler_that_changes_training_says_so_and_the_others_are_left_in_peace() -> None:
    check_callback(lambda directory: ChangesTheLoss(), changes_training=True, only=["leaves_weights_alone"])


def test_a_handler_comes_with_those_that_it_needs(tmp_path: Path) -> None:
    class Needs(Counter):
        def on_fit_start(self, event: FitStart) -> None:
            if not any(type(one) is Counter for one in event.engine.listeners.callbacks):
                raise ConfigurationError("Needs needs a Counter. Attach Counter().")

    check_callback(lambda directory: [Needs(), Counter()], only=["fits_twice", "resumes_after_every_step"])


def test_what_is_no_check_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^There is no check \"prints\"\. Write one of: leaves_"):
        check_callback(lambda directory: Counter(), only=["prints"])


def test_random_numbers_are_where_they_were_afterwards() -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    check_callback(lambda directory: Counter(), only=["draws_no_random_numbers"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_toy_run_is_the_same_each_time() -> None:
    one, other = toy_run(seed=1), toy_run(seed=1)
    assert one.history["train_loss"] == other.history["train_loss"]
    assert one.history["train_loss"] != toy_run(seed=2).history["train_loss"]


def test_events_are_recorded_with_their_place_also_ones_own_and_no_longer_than_the_body() -> None:
    class Own(Event):
        pass

    engine = toy_engine()
    engine.subscribe(EpochEnd, lambda event: engine.emit(Own(engine)))
    with record_events(engine) as events:
        engine.fit(*toy_data(), epochs=2)
    names = [one.name for one in events]
    assert names.count("StepEnd") == 10
    assert [(one.epoch, one.step) for one in events if one.name == "Own"] == [(1, 5), (2, 10)]
    number = len(events)
    engine.fit(*toy_data(), epochs=1)
    assert len(events) == number


def test_host_reads_are_counted() -> None:
    value = torch.tensor([1.0, 2.0])
    with count_host_reads() as reads:
        total = value.sum()
        _ = float(total), total.item(), bool(total > 0), value.tolist(), value.numpy(), torch.equal(value, value)
    assert reads.count == 6
    value.tolist()
    assert reads.count == 6


def test_the_kit_does_without_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import camshaft.testing as t; t.toy_run()"
    subprocess.run([sys.executable, "-c", code], check=True)
