"""Settings that are a function of how far a run is: entries of optimizers, and attributes of parts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, refused
from ranks import on_ranks
from torch import nn

from camshaft.callbacks import Distributed, Ramp, RunCheckpoint
from camshaft.engine import Callback, ConfigurationError, Engine, StepEnd, Trainer, at

DATA = class_batches(4, 4, 4)


class Weighted(nn.Module):
    """A loss with a weight that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.0

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target) + self.weight * output.square().mean()


def trainer(*callbacks: Callback, seed: int | None = None) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 3))
    groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return Trainer(model, optimizer, Weighted(), callbacks=callbacks, seed=seed)


def seen(engine: Engine, read: Callable[[Engine], Any], **options: Any) -> list[Any]:
    """Return what is set in each step of a fit."""
    values: list[Any] = []
    engine.subscribe(StepEnd, lambda event: values.append(read(event.engine)))
    engine.fit(DATA, DATA, **options)
    return values


def share(done: int, total: int) -> float:
    return done / total


def test_an_entry_of_every_parameter_group_is_set_before_each_step() -> None:
    values = seen(
        trainer(Ramp("optimizer.weight_decay", share)),
        lambda engine: [group["weight_decay"] for group in engine.parts["optimizer"].param_groups],
        epochs=2,
    )
    assert values == [[done / 6] * 2 for done in range(6)]


def test_an_attribute_within_a_part_is_set() -> None:
    assert seen(trainer(Ramp("model.1.p", share)), lambda engine: engine.parts["model"][1].p, epochs=2) == [
        done / 6 for done in range(6)
    ]
    by_steps = seen(trainer(Ramp("loss_fn.weight", share)), lambda one: one.parts["loss_fn"].weight, max_steps=4)
    assert by_steps == [0.0, 0.25, 0.5, 0.75]


def test_per_epoch_and_without_a_total() -> None:
    per_epoch = Ramp("loss_fn.weight", lambda done: float(done), per="epoch")
    assert seen(trainer(per_epoch), lambda engine: engine.parts["loss_fn"].weight, epochs=3) == [
        0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0,
    ]  # fmt: skip


def test_a_second_fit_begins_the_ramp_again() -> None:
    engine = trainer(Ramp("loss_fn.weight", share))
    engine.fit(DATA, epochs=1)
    assert seen(engine, lambda engine: engine.parts["loss_fn"].weight, epochs=1) == [0.0, 1 / 3, 2 / 3]


def test_the_weights_are_those_of_a_hand_written_loop() -> None:
    engine = trainer(Ramp("loss_fn.weight", share), Ramp("optimizer.weight_decay", lambda done, total: 0.1 * done))
    engine.fit(DATA, epochs=2)
    by_hand = trainer()
    model, optimizer, loss_fn = (by_hand.parts[name] for name in ("model", "optimizer", "loss_fn"))
    for done, (inputs, target) in enumerate([*DATA, *DATA]):
        loss_fn.weight = done / 6
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 * done
        loss_fn(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(engine.parts["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("last", range(1, 6))
def test_a_resumed_run_has_the_values_of_the_run_left_alone(last: int, tmp_path: Path) -> None:
    def run(resume: str | None, cut: int | None) -> Engine:
        engine = trainer(Ramp("loss_fn.weight", share), RunCheckpoint(tmp_path / str(cut or last)))
        if cut is not None:
            engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut))
        engine.fit(DATA, epochs=2, resume=resume)
        return engine

    alone = trainer(Ramp("loss_fn.weight", share))
    alone.fit(DATA, epochs=2)
    run(None, last)
    resumed = run("auto", None)
    for ours, theirs in zip(resumed.parts["model"].parameters(), alone.parts["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("optimiser.lr", 'Did you mean "optimizer"?'),
        ("optimizer.weight_dekay", 'Did you mean "weight_decay"?'),
        ("loss_fn.wieght", 'Did you mean "weight"?'),
        ("model.7.p", "which has no such attribute"),
    ],
)
def test_what_is_not_there_is_refused_before_the_first_step(target: str, said: str) -> None:
    engine = trainer(Ramp(target, share))
    with refused(ConfigurationError, "Ramp sets", said):
        engine.fit(DATA, epochs=1)
    assert engine.step == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("weight_decay", share), "Ramp has the target 'weight_decay'."),
        (("optimizer.lr", 0.5), "Ramp has the value 0.5."),
        (("optimizer.lr", lambda: 0.5), "Ramp has the value"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(arguments: Any, said: str) -> None:
    with refused(ConfigurationError, said):
        Ramp(*arguments)
    with refused(ConfigurationError, "Ramp has per='batch'."):
        Ramp("optimizer.lr", share, per="batch")  # type: ignore[arg-type]  # the point


def falling(seconds: float) -> float:
    return 0.1 * max(0.0, 1 - seconds / 3600)


def test_per_second_the_value_follows_the_time_that_the_run_has_taken(tmp_path: Path) -> None:
    """Also that of the run which is resumed; what lies between does not count."""
    begun = time.monotonic()
    first = trainer(Ramp("optimizer.lr", falling, per="second"), RunCheckpoint(tmp_path, every_steps=1))
    first.subscribe(StepEnd, lambda event: time.sleep(0.03))
    rates = seen(first, lambda engine: engine.parts["optimizer"].param_groups[0]["lr"], epochs=2)
    took = time.monotonic() - begun
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 0.1
    assert falling(5 * 0.03) >= rates[-1] >= falling(took)
    time.sleep(0.5)
    begun = time.monotonic()
    second = trainer(Ramp("optimizer.lr", falling, per="second"), RunCheckpoint(tmp_path, every_steps=1))
    later = seen(second, lambda engine: engine.parts["optimizer"].param_groups[0]["lr"], epochs=3, resume="auto")
    assert len(later) == 3
    assert rates[-1] > later[0] > later[-1] >= falling(took + time.monotonic() - begun)


def ramp_on_ranks() -> str:
    engine = trainer(Distributed(), Ramp("optimizer.lr", falling, per="second"), seed=0)
    try:
        engine.fit(DATA, epochs=1)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_per_second_on_several_ranks_is_refused() -> None:
    for said in on_ranks(2, ramp_on_ranks):
        assert said.startswith('Ramp has per="second" on 2 ranks')


def test_per_second_there_is_no_total() -> None:
    with refused(ConfigurationError, "nobody knows how long the run takes", "Write lambda seconds"):
        Ramp("optimizer.lr", share, per="second")


def test_a_run_of_unknown_length_needs_a_function_of_what_is_done_alone() -> None:
    def stream() -> Any:
        yield from DATA

    engine = trainer(Ramp("loss_fn.weight", share))
    with refused(ConfigurationError, "Ramp does not know how many steps the run makes.", "lambda done: ..."):
        engine.fit(stream, epochs=1)
    assert engine.num_updates == 0
