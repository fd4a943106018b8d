"""One loss for several optimizers: the hand-written loop to the bit, with one window, one scaler and one clipping."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, refused
from ranks import on_ranks
from test_ranks import assert_alike, outcome
from test_ranks import data as rank_data
from test_ranks import model as rank_model
from torch import Tensor, nn

from camshaft.callbacks import (
    Accumulate,
    ClipGradients,
    Distributed,
    FreezeUntil,
    Log,
    RunCheckpoint,
    Schedule,
    StopOnNonFinite,
    WeightAverage,
)
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EngineStateError,
    EpochEnd,
    GradientsReady,
    Logged,
    LossReady,
    StepEnd,
    Trainer,
    at,
)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


NAMES = ("sgd", "adamw")


def split(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for the matrices, and one for the rest."""
    return {
        "sgd": torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1, momentum=0.9),
        "adamw": torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.02),
    }


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def joint(*callbacks: Callback, model: nn.Module | None = None, seed: int | None = None) -> Engine:
    model = model or two_layers()
    return Trainer(model, split(model), nn.CrossEntropyLoss(), callbacks=callbacks, seed=seed)


def by_hand(data: list[Batch], *, window: int = 1, clip: str | None = None) -> list[Tensor]:
    """Train on the batches of equal size, with both optimizers, and return the weights."""
    model = two_layers()
    optimizers = split(model)
    for number, (inputs, target) in enumerate(data, start=1):
        (nn.functional.cross_entropy(model(inputs), target) / window).backward()
        if number % window:
            continue
        if clip == "all":
            every = [p for optimizer in optimizers.values() for p in optimizer.param_groups[0]["params"]]
            torch.nn.utils.clip_grad_norm_(every, 0.1)
        for optimizer in optimizers.values():
            if clip == "each":
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return list(model.state_dict().values())


@pytest.mark.parametrize("clip", [None, "all", "each"])
def test_one_loss_updates_several_optimizers_as_by_hand_to_the_bit(clip: str | None) -> None:
    data = class_batches(8, 8, 8)
    engine = joint(*([ClipGradients(norm=0.1, each=clip == "each")] if clip else []))
    engine.fit(data, epochs=2)
    assert equal(list(engine.parts["model"].state_dict().values()), by_hand(data * 2, clip=clip))
    assert engine.num_updates == 6


def test_several_optimizers_have_one_window() -> None:
    data = class_batches(8, 8, 8, 8)
    engine = joint(Accumulate(2), ClipGradients(norm=0.1))
    engine.fit(data, epochs=2)
    assert equal(list(engine.parts["model"].state_dict().values()), by_hand(data * 2, window=2, clip="all"))
    assert engine.num_updates == 4


def test_several_optimizers_have_one_loss_scaler() -> None:
    """An overflow is skipped by both; without one, the weights are those without a scaler."""
    data, engine = class_batches(8, 8, 8), joint()
    engine.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**20))
    engine.subscribe(LossReady, lambda event: event.loss * math.inf, when=at(2))
    before: list[list[Tensor]] = []
    engine.subscribe(
        StepEnd, lambda event: before.append([v.clone() for v in engine.parts["model"].state_dict().values()])
    )
    engine.fit(data, epochs=1)
    assert equal(before[0], before[1])
    assert (engine.num_updates, engine.num_skipped_updates) == (2, 1)
    expected = by_hand([data[0], data[2]])
    for mine, other in zip(engine.parts["model"].state_dict().values(), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_skipped_update_is_skipped_by_all() -> None:
    data, engine = class_batches(8, 8, 8), joint()

    def skip(event: GradientsReady) -> None:
        if engine.step == 2 and event.optimizer is event.together[1]:
            engine.run.skip_update()

    engine.subscribe(GradientsReady, skip)
    engine.fit(data, epochs=1)
    assert equal(list(engine.parts["model"].state_dict().values()), by_hand([data[0], data[2]]))


def test_handlers_see_one_update_of_several_optimizers() -> None:
    """A schedule follows its own optimizer, an average takes the weights in once, a NaN leaves the update out."""
    average = WeightAverage(decay=0.5)
    schedules = [
        Schedule(lambda one: torch.optim.lr_scheduler.ExponentialLR(one, 0.5), per="update", optimizer=name)
        for name in NAMES
    ]
    engine = joint(average, *schedules, StopOnNonFinite("skip"))
    data = class_batches(8, 8, 8, 8)
    data[1][0].fill_(math.nan)
    engine.fit(data, epochs=1)
    assert engine.parts["weight_average"].n_averaged == engine.num_updates == 3
    assert [engine.parts[name].param_groups[0]["lr"] for name in NAMES] == [0.1 / 8, 0.02 / 8]
    assert all(value.isfinite().all() for value in engine.parts["model"].state_dict().values())


def test_of_several_optimizers_one_may_hold_nothing_that_learns_yet() -> None:
    data, model = class_batches(8, 8), two_layers()
    engine = joint(FreezeUntil(2, ["*.bias"]), model=model)
    bias = model.get_parameter("0.bias")
    before = bias.detach().clone()
    seen: list[bool] = []
    engine.subscribe(EpochEnd, lambda event: seen.append(torch.equal(bias, before)))
    engine.update.use_scaler(torch.amp.GradScaler("cpu"))
    engine.fit(data, epochs=2)
    assert seen == [True, False]
    assert engine.num_updates == 4


@pytest.mark.parametrize("cut_at", [1, 2, 3, 5])
def test_a_joint_update_is_resumed_within_its_window_to_the_bit(cut_at: int, tmp_path: Path) -> None:
    data = class_batches(8, 8, 8, 8, 8)
    whole = joint(Accumulate(2), seed=0)
    whole.fit(data, epochs=2)
    cut = joint(Accumulate(2), RunCheckpoint(tmp_path), seed=0)
    cut.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut_at))
    cut.fit(data, epochs=2)
    resumed = joint(Accumulate(2), RunCheckpoint(tmp_path), seed=0)
    resumed.fit(data, epochs=2, resume="auto")
    ours, theirs = (list(engine.parts["model"].state_dict().values()) for engine in (resumed, whole))
    assert equal(ours, theirs)


def together_and(alone: str, *, first: bool) -> Callable[[Engine, Batch], None]:
    def step(engine: Engine, batch: Batch) -> None:
        names: list[Any] = [alone, NAMES] if first else [NAMES, alone]
        for name in names:
            engine.update(nn.functional.cross_entropy(engine.parts["model"](batch[0]), batch[1]), optimizer=name)

    return step


@pytest.mark.parametrize("first", [True, False])
def test_an_optimizer_that_steps_alone_and_with_others_is_refused(first: bool) -> None:
    model = two_layers()
    parts: dict[str, Any] = split(model)
    engine = Engine(together_and("sgd", first=first), model=model, **parts)
    with refused(EngineStateError, '"sgd" steps in an update of "sgd"', "Give one of them an optimizer of its own."):
        engine.fit(class_batches(8), epochs=1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "engine.update was given an object of type tuple"),
        (("sgd", "adma"), "engine.update needs an optimizer as the part named adma"),
        (("sgd", None), "engine.update was given an object of type NoneType"),
        (3, "engine.update was given an object of type int"),
    ],
)
def test_names_of_several_optimizers_that_are_none_are_refused(names: Any, said: str) -> None:
    model = two_layers()
    parts: dict[str, Any] = split(model)
    engine = Engine(lambda engine, batch: engine.update(model(batch).mean(), optimizer=names), model=model, **parts)
    with refused(EngineStateError, said, "Write "):
        engine.fit([torch.ones(2, 4)], epochs=1)


def test_a_trainer_of_optimizers_that_are_none_is_refused() -> None:
    model = two_layers()
    with refused(ConfigurationError, "adamw is the class AdamW, not an instance."):
        Trainer(model, {"sgd": split(model)["sgd"], "adamw": torch.optim.AdamW}, nn.CrossEntropyLoss())  # type: ignore[dict-item]  # the mistake
    with refused(ConfigurationError, "optimizer is {}, of type dict."):
        Trainer(model, {}, nn.CrossEntropyLoss())


def test_a_log_has_the_norms_of_each() -> None:
    rows: list[dict[str, float]] = []
    engine = joint(Log(1, gradients=True))
    engine.subscribe(Logged, lambda event: rows.append(dict(event.values)))
    engine.fit(class_batches(8), epochs=1)
    assert {"grad_norm_sgd", "grad_norm_adamw", "update_ratio_sgd", "update_ratio_adamw"} <= rows[0].keys()
    assert rows[0]["lr_sgd"] == 0.1


def on_one_or_two() -> dict[str, Any]:
    net = rank_model()
    callbacks = [Distributed(), Accumulate(3), ClipGradients(norm=0.5)]
    trainer = Trainer(net, split(net), nn.CrossEntropyLoss(), callbacks=callbacks, seed=7)
    trainer.fit(rank_data(), rank_data(37, shuffle=False, seed=1), epochs=3)
    return outcome(trainer, net)


def test_on_two_ranks_it_is_the_run_of_one_process() -> None:
    alone = on_one_or_two()
    first, second = on_ranks(2, on_one_or_two)
    assert torch.equal(first["weights"], second["weights"])
    assert_alike(first, alone)
