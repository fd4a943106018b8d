"""Every handler on two ranks: it works there, with equal weights, or it is refused before the first step."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_every_handler import MAKE
from test_ranks import assert_alike, data, model, outcome
from torch import nn

from camshaft.callbacks import Distributed, LearningRateFinder, RunCheckpoint, StopOnNonFinite, WeightAverage
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, StepEnd, Trainer, at


def trainer(*callbacks: Callback, net: nn.Module | None = None, batch_norm: Any = "sync") -> Engine:
    net = model() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    callbacks = (Distributed(batch_norm=batch_norm), *callbacks)
    return Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=7)


REFUSED = {
    "Distributed": "The engine has a Distributed already. Attach only one.",
    "Steering": "Steering does not work on several ranks yet",
    "MicroBatch": "MicroBatch divides a batch when a rank lacks memory",
    "Rollback": "Rollback works in one process only.",
}
TOLERANCE = {"MixedPrecision": 0.05, "Metrics": 1e-12}  # of the weights alone: their values are not in fp64


def with_handler(name: str, directory: Path) -> dict[str, Any]:
    net = model()
    engine = trainer(MAKE[name](directory), net=net)
    engine.fit(data(35, batch_size=8), data(9, shuffle=False, seed=1), epochs=3)
    return outcome(engine, net)


@pytest.mark.parametrize("name", [name for name in MAKE if name not in REFUSED])
def test_every_handler_trains_on_two_ranks_as_in_one_process(name: str, tmp_path: Path) -> None:
    alone = with_handler(name, tmp_path / "one")
    first, second = on_ranks(2, with_handler, name, tmp_path / "two")
    assert torch.equal(first["weights"], second["weights"])
    assert first["rows"] == second["rows"]
    if name in TOLERANCE:
        torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=TOLERANCE[name])
    else:
        assert_alike(first, alone)


@pytest.mark.parametrize("name", REFUSED)
def test_a_handler_that_cannot_work_on_several_ranks_is_refused(name: str, tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(ConfigurationError) as info:
            trainer(MAKE[name](tmp_path))
        return str(info.value)

    for message in on_ranks(2, refused):
        assert message.startswith(REFUSED[name])


class Remembers(Callback):
    """Keeps something that it gets when it is attached."""

    main_only = True

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        self.seen = [engine.ranks.rank]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [*self.seen, *state["seen"]]


def test_the_state_of_a_handler_of_rank_0_is_asked_for_only_there(tmp_path: Path) -> None:
    def run(directory: Path) -> list[int]:
        trainer(Remembers(), RunCheckpoint(directory)).fit(data(16), epochs=1)
        handler = Remembers()
        trainer(handler, RunCheckpoint(directory)).fit(data(16), epochs=2, resume="auto")
        return getattr(handler, "seen", [])

    assert on_ranks(2, run, tmp_path) == [[0, 0], []]


def with_a_nan(policy: Any) -> dict[str, Any]:
    """Train on data of which one sample, which the last rank reads in step 2, is not a number."""
    train = data(32, batch_size=8, shuffle=False)
    train.dataset.tensors[0][15] = math.nan  # type: ignore[attr-defined]
    engine, error = trainer(StopOnNonFinite(policy, every_steps=1)), ""
    try:
        engine.fit([tuple(batch) for batch in train], epochs=1)
    except DataError as raised:
        error = str(raised).partition(";")[0]  # what is found in its own batch differs from rank to rank
    return {"step": engine.step, "error": error, "skipped": engine.num_skipped_updates}


@pytest.mark.parametrize("policy", ["raise", "stop", "skip"])
def test_a_nan_on_one_rank_has_the_effect_of_one_in_one_process(policy: str) -> None:
    alone = with_a_nan(policy)
    assert alone["step"] == (4 if policy == "skip" else 2)
    assert on_ranks(2, with_a_nan, policy) == [alone, alone]


def with_a_nan_that_is_read_after_a_resume(directory: Path) -> list[str]:
    """As above, but the run is saved and cut before the losses are looked at."""
    train = data(32, batch_size=8, shuffle=False)
    train.dataset.tensors[0][15] = math.nan  # type: ignore[attr-defined]
    batches, reasons = [tuple(batch) for batch in train], []
    for cuts in (True, False):
        engine = trainer(StopOnNonFinite("stop"), RunCheckpoint(directory))
        if cuts:
            engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(3))
        engine.fit(batches, epochs=1, resume="auto")
        reasons.append(engine.history.reason.partition(";")[0])
    return reasons


def test_a_nan_on_one_rank_is_known_to_a_resumed_run(tmp_path: Path) -> None:
    for reasons in on_ranks(2, with_a_nan_that_is_read_after_a_resume, tmp_path):
        assert "first at step 2" in reasons[1], reasons


def suggestion(batch_norm: str) -> list[float]:
    net = model() if batch_norm == "sync" else nn.Sequential(model(), nn.BatchNorm1d(2).double())
    finder = LearningRateFinder(1e-3, 10.0, num_steps=30)
    return [finder.run(trainer(net=net, batch_norm=batch_norm), data(64, shuffle=False)), *finder.losses]


def test_the_finder_suggests_the_same_on_all_ranks_and_in_one_process() -> None:
    first, second = on_ranks(2, suggestion, "sync")
    assert first == second
    assert first == pytest.approx(suggestion("sync"), rel=1e-9)


def test_the_finder_keeps_the_settings_of_distributed() -> None:
    first, second = on_ranks(2, suggestion, "local")
    assert first == second


def averaged() -> dict[str, Any]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    engine = trainer(WeightAverage(decay=0.5, batch_norm_data=data(40, batch_size=8)), net=net, batch_norm="local")
    engine.fit(data(32, batch_size=8), epochs=2)
    state: dict[str, Any] = engine.parts["weight_average"].state_dict()
    return state


def test_statistics_that_are_computed_again_are_equal_on_all_ranks() -> None:
    first, second = on_ranks(2, averaged)
    for name in first:
        assert torch.equal(first[name], second[name]), name
