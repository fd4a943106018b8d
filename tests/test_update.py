"""`engine.update`: the one right order of an optimizer update, its windows, and what it refuses."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Batch,
    CountingModel,
    class_batches,
    linear,
    make_trainer,
    num_calls,
    pairs,
    refused,
    regression,
    total_norm,
)
from torch import Tensor, nn

from camshaft.callbacks import (
    Accumulate,
    ClipGradients,
    FreezeUntil,
    Penalty,
    RunCheckpoint,
    Schedule,
    StopOnNonFinite,
    WeightAverage,
)
from camshaft.engine import (
    Callback,
    CamshaftError,
    ConfigurationError,
    DataError,
    Engine,
    EngineStateError,
    EpochEnd,
    Event,
    FunctionStep,
    GradientsReady,
    LossReady,
    StepEnd,
    UpdateEnd,
)


def train_step(engine: Engine, batch: Batch) -> Tensor:
    inputs, target = batch
    loss = nn.functional.cross_entropy(engine.parts["model"](inputs), target)
    if engine.training:
        engine.update(loss)
    return loss


def make_engine(window: int = 1, step: Any = train_step) -> Engine:
    """An engine in function style, whose window is set on ``engine.update`` itself."""
    model = linear()
    engine = Engine(step, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    engine.update.accumulate(batches=window)
    return engine


def fit_in_own_loop(engine: Engine, data: list[Batch], *, epochs: int, max_steps: int | None = None) -> None:
    """The script style."""
    for _ in engine.epochs(epochs, max_steps=max_steps):
        for batch in engine.train(data):
            engine.record(loss=train_step(engine, batch))


def weights(engine: Engine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.parts["model"].parameters()]


def equal(mine: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def gradients(engine: Engine) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in engine.parts["model"].parameters()]


def names_of(engine: Engine, *events: type[Event]) -> list[str]:
    """A list that will hold the name of each of these events, as they happen."""
    seen: list[str] = []
    for event in events:
        engine.subscribe(event, lambda event: seen.append(type(event).__name__))
    return seen


def steps_of(engine: Engine, event: type[Event]) -> list[int]:
    """A list that will hold the step of each such event."""
    seen: list[int] = []
    engine.subscribe(event, lambda event: seen.append(event.engine.step))
    return seen


def by_hand(groups: list[list[Batch]]) -> list[Tensor]:
    """The loop that everyone writes: one update for the samples of each group together."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for group in groups:
        inputs, target = (torch.cat(parts) for parts in zip(*group, strict=True))
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def overflow_at(step: int, num_steps: int) -> list[Batch]:
    """Batches of which one has finite gradients that `scaler` drives beyond float32."""
    data = class_batches(*[8] * num_steps)
    data[step - 1] = (data[step - 1][0] * 1e12, data[step - 1][1])
    return data


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000)


def test_loss_gradients_update_and_step_end_come_in_this_order() -> None:
    engine = make_engine()
    seen = names_of(engine, EpochEnd, StepEnd, UpdateEnd, GradientsReady, LossReady)
    engine.fit(class_batches(8, 8), epochs=1)
    assert seen == [*["LossReady", "GradientsReady", "UpdateEnd", "StepEnd"] * 2, "EpochEnd"]


def test_a_window_has_a_loss_for_each_batch_and_one_update() -> None:
    """Three batches in windows of two: the short last window is updated before the epoch ends."""
    engine = make_engine(window=2)
    seen = names_of(engine, EpochEnd, StepEnd, UpdateEnd, GradientsReady, LossReady)
    engine.fit(class_batches(8, 8, 8), epochs=1)
    first = ["LossReady", "StepEnd", "LossReady", "GradientsReady", "UpdateEnd", "StepEnd"]
    assert seen[:6] == first
    assert [name for name in seen[6:] if name != "StepEnd"] == ["LossReady", "GradientsReady", "UpdateEnd", "EpochEnd"]


@pytest.mark.parametrize("style", ["function", "script"])
def test_an_update_is_backward_step_and_zero_grad_to_the_bit(style: str) -> None:
    """In function style and in script style, the weights are those of the loop by hand."""
    data, engine = class_batches(8, 8, 3), make_engine()
    if style == "function":
        engine.fit(data, epochs=3)
    else:
        fit_in_own_loop(engine, data, epochs=3)
    assert equal(weights(engine), by_hand([[batch] for batch in data] * 3))
    assert engine.num_updates == 9


def test_no_gradient_outlives_its_update() -> None:
    """They are set to None, so that an optimizer skips what the next batch does not touch."""
    engine = make_engine()
    left: list[Tensor | None] = []
    engine.subscribe(StepEnd, lambda event: left.extend(p.grad for _, p in event.engine.parts.named_parameters()))
    engine.fit(class_batches(8, 8), epochs=1)
    assert left == [None] * 4


@pytest.mark.parametrize("window", [1, 2])
def test_gradients_ready_shows_unscaled_gradients_to_the_bit(window: int) -> None:
    """A scale that is a power of two leaves no trace, if it is taken out exactly once per update."""
    seen: list[list[list[Tensor]]] = []
    for scale in (torch.amp.GradScaler("cpu", init_scale=2.0**12), None):
        engine = make_engine(window)
        engine.update.use_scaler(scale)
        seen.append([])
        engine.subscribe(GradientsReady, lambda event: seen[-1].append(gradients(event.engine)))
        engine.fit(class_batches(8, 8, 8, 8), epochs=1)
    assert len(seen[0]) == 4 // window
    assert all(equal(scaled, plain) for scaled, plain in zip(*seen, strict=True))


def test_the_scaler_has_unscaled_already_when_gradients_are_ready() -> None:
    """Torch itself refuses a second time: what a handler sees are the gradients the optimizer will take."""

    def unscale_again(event: GradientsReady) -> None:
        with pytest.raises(RuntimeError, match="already been called"):
            event.engine.update.scaler.unscale_(event.engine.parts["optimizer"])  # type: ignore[union-attr]  # set below

    engine = make_engine()
    engine.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    engine.subscribe(GradientsReady, unscale_again)
    engine.fit(class_batches(8, 8), epochs=1)
    assert equal(weights(engine), by_hand([[batch] for batch in class_batches(8, 8)]))


def test_a_step_that_the_scaler_skips_counts_as_skipped_and_moves_nothing() -> None:
    """Batch 3 of 5 overflows: it has neither an UpdateEnd nor a share in the weights."""
    data, engine = overflow_at(3, 5), make_engine()
    engine.update.use_scaler(scaler())
    updates = steps_of(engine, UpdateEnd)
    engine.fit(data, epochs=1)
    assert updates == [1, 2, 4, 5]
    assert (engine.num_updates, engine.num_skipped_updates) == (4, 1)
    assert engine.update.scaler is not None
    assert engine.update.scaler.get_scale() == 2.0**99
    assert equal(weights(engine), by_hand([[data[0]], [data[1]], [data[3]], [data[4]]]))


def test_a_scale_that_grows_is_no_skipped_step() -> None:
    """Doubled after each update, it says nothing against any of them."""
    engine = make_engine()
    engine.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1))
    engine.fit(class_batches(8, 8, 8), epochs=1)
    assert engine.update.scaler is not None
    assert engine.update.scaler.get_scale() == 16.0
    assert (engine.num_updates, engine.num_skipped_updates) == (3, 0)


def test_what_a_handler_returns_at_loss_ready_is_differentiated_and_not_recorded() -> None:
    """Handlers see each other's loss in order; the history keeps the step's own."""
    data, plain, doubled = class_batches(8), make_engine(), make_engine()
    doubled.subscribe(LossReady, lambda event: event.loss + 1.0)
    doubled.subscribe(LossReady, lambda event: (event.loss - 1.0) * 2)
    seen: list[list[Tensor]] = []
    for engine in (plain, doubled):
        engine.subscribe(GradientsReady, lambda event: seen.append(gradients(event.engine)))
        engine.fit(data, epochs=1)
    assert equal(seen[1], [2 * gradient for gradient in seen[0]])
    assert doubled.history["train_loss"] == plain.history["train_loss"]


@pytest.mark.parametrize("replacement", [1.0, torch.ones(3, requires_grad=True), torch.tensor(1.0)])
def test_what_takes_the_place_of_the_loss_must_be_a_loss(replacement: Any) -> None:
    """A number, three numbers or a constant cannot be differentiated: refused as the step's own loss would be."""
    engine = make_engine()
    engine.subscribe(LossReady, lambda event: replacement)
    with pytest.raises(DataError, match=r"[Tt]he loss"):
        engine.fit(class_batches(8), epochs=1)


@pytest.mark.parametrize("style", ["function", "script"])
def test_a_window_never_straddles_two_epochs(style: str) -> None:
    """Five batches in windows of two: each epoch ends with a window of one, which counts in full."""
    data, engine = class_batches(8, 8, 8, 8, 8), make_engine(window=2)
    steps = steps_of(engine, UpdateEnd)
    if style == "function":
        engine.fit(data, epochs=2)
    else:
        fit_in_own_loop(engine, data, epochs=2)
    assert steps == [2, 4, 5, 7, 9, 10]
    expected = by_hand([data[:2], data[2:4], data[4:]] * 2)
    torch.testing.assert_close(weights(engine), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", ["function", "script"])
@pytest.mark.parametrize("end", ["max_steps", "stop"])
def test_a_run_that_ends_within_a_window_makes_its_update(style: str, end: str) -> None:
    """Step 6 is the last, in the middle of a window of four: its two batches are not lost."""
    data, engine = class_batches(*[8] * 8), make_engine(window=4)
    if end == "stop":
        engine.subscribe(StepEnd, lambda event: event.engine.stop("enough"), when=lambda step: step == 6)
    max_steps = 6 if end == "max_steps" else None
    if style == "function":
        engine.fit(data, epochs=2, max_steps=max_steps)
    else:
        fit_in_own_loop(engine, data, epochs=2, max_steps=max_steps)
    assert (engine.step, engine.num_updates) == (6, 2)
    torch.testing.assert_close(weights(engine), by_hand([data[:4], data[4:6]]), rtol=1e-6, atol=1e-6)


def test_an_epoch_left_by_a_break_makes_the_update_of_its_window() -> None:
    """The next epoch begins with an empty window."""
    data, engine = class_batches(*[8] * 4), make_engine(window=2)
    for _ in engine.epochs(2):
        for batch in engine.train(data):
            train_step(engine, batch)
            if engine.epoch_step == 3:
                break
    assert engine.num_updates == 4
    torch.testing.assert_close(weights(engine), by_hand([data[:2], data[2:3]] * 2), rtol=1e-6, atol=1e-6)


def test_a_run_that_failed_within_a_window_leaves_nothing_to_the_next() -> None:
    """The batch before the error has no say in the second run, neither in its gradients nor in its scale."""
    data, engine = class_batches(*[8] * 4), make_trainer()
    engine.update.accumulate(batches=2)
    handle = engine.subscribe(StepEnd, lambda event: 1 / 0, when=lambda step: step == 1)
    with pytest.raises(ZeroDivisionError):
        engine.fit(data, epochs=1)
    handle.cancel()
    engine.fit(data, epochs=1)
    torch.testing.assert_close(weights(engine), by_hand([data[:2], data[2:]]), rtol=1e-6, atol=1e-6)


def test_a_handler_can_record_at_each_update_also_at_the_last_short_one() -> None:
    """The gradient norm of each of the two windows of an epoch is averaged into train_grad_norm."""

    def log_norm(event: GradientsReady) -> None:
        norm = total_norm([p.grad for _, p in event.engine.parts.named_parameters() if p.grad is not None])
        norms.append(norm.item())
        event.engine.record(grad_norm=norm, weight=1)

    norms: list[float] = []
    engine = make_engine(window=2)
    engine.subscribe(GradientsReady, log_norm)
    history = engine.fit(class_batches(8, 8, 8), epochs=1)
    assert len(norms) == 2
    assert history["train_grad_norm"] == [pytest.approx(sum(norms) / 2, rel=1e-6)]


def test_a_batch_weighs_in_its_window_by_the_samples_that_the_step_states() -> None:
    """Where a batch does not tell its size, ``engine.update(loss, num_samples)`` does: here 2 and 6."""

    def step(engine: Engine, batch: dict[str, Any]) -> None:
        loss = nn.functional.cross_entropy(engine.parts["model"](batch["x"]), batch["y"])
        engine.update(loss, batch["size"])

    data, engine = class_batches(2, 6), make_engine(window=2, step=step)
    engine.fit([{"x": x, "y": y, "size": len(x), "scale": torch.ones(3)} for x, y in data], epochs=1)
    torch.testing.assert_close(weights(engine), by_hand([data]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_skip_leaves_out_this_one_update(scale: float | None) -> None:
    """Weights, momentum and count are as if batch 2 had not been; batch 3 is learnt from again."""
    data, engine = class_batches(8, 8, 8), make_engine()
    engine.update.use_scaler(None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale))
    updates = steps_of(engine, UpdateEnd)
    engine.subscribe(GradientsReady, lambda event: event.engine.run.skip_update() if event.engine.step == 2 else None)
    engine.fit(data, epochs=1)
    assert updates == [1, 3]
    assert (engine.num_updates, engine.num_skipped_updates) == (2, 1)
    assert equal(weights(engine), by_hand([[data[0]], [data[2]]]))


def test_an_engine_without_an_optimizer_says_which_part_is_missing() -> None:
    with pytest.raises(EngineStateError, match=r"part named optimizer.*are: model\. Write Engine\(.*optimizer="):
        Engine(train_step, model=linear()).fit(class_batches(8), epochs=1)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (None, r'part named optimizer, but the parts are: model, adam\..*optimizer="adam"\)'),
        ("adm", r'part named adm, but .*Did you mean "adam"\?'),
        ("model", r"part named model, but"),
        ("itself", r'of type Adam, but it takes the name of a part.*Write optimizer="adam"'),
    ],
)
def test_an_optimizer_that_is_no_part_is_refused_with_the_names_of_those_that_are(
    named: str | None, message: str
) -> None:
    model = linear()
    adam = torch.optim.Adam(model.parameters())

    def step(engine: Engine, batch: Batch) -> None:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        engine.update(loss, optimizer=adam if named == "itself" else named)  # type: ignore[arg-type]  # the mistake

    with pytest.raises(EngineStateError, match=message):
        Engine(step, model=model, adam=adam).fit(class_batches(8), epochs=1)


def test_an_update_in_a_validation_says_that_a_step_asks_for_training() -> None:
    """A step that forgets ``if engine.training`` is told so, and not that a tensor lacks a grad_fn."""

    def step(engine: Engine, batch: Batch) -> None:
        engine.update(nn.functional.cross_entropy(engine.parts["model"](batch[0]), batch[1]))

    with pytest.raises(CamshaftError, match=r"engine\.training"):
        make_engine(step=step).fit(class_batches(8), class_batches(8), epochs=1)


@pytest.mark.parametrize(
    "callback",
    [
        Penalty(l2=1.0),
        WeightAverage(),
        StopOnNonFinite("skip"),
        Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), per="update"),
    ],
    ids=repr,
)
def test_a_step_that_updates_by_itself_is_told_which_handler_never_hears_of_it(callback: Callback) -> None:
    """A handler of losses or updates would do nothing at all, in silence, next to a plain ``optimizer.step()``."""
    engine = make_engine(step=step_by_hand)
    engine.attach(callback)
    with pytest.raises(CamshaftError, match=r"engine\.update"):
        engine.fit(class_batches(8, 8), epochs=2)


def step_by_hand(engine: Engine, batch: Batch) -> None:
    nn.functional.cross_entropy(engine.parts["model"](batch[0]), batch[1]).backward()
    engine.parts["optimizer"].step()
    engine.parts["optimizer"].zero_grad()


class Duel:
    """A generator and a discriminator with an optimizer each, which are stepped in turn, by hand or by the engine."""

    def __init__(self, *callbacks: Callback, clip: float | None = None) -> None:
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)
        self.slow = torch.optim.Adam(self.generator.parameters(), lr=0.01)
        self.fast = torch.optim.Adam(self.discriminator.parameters(), lr=0.02)
        self.clip = clip
        self.callbacks = callbacks

    def engine(self) -> Engine:
        return Engine(
            self.step,
            generator=self.generator,
            discriminator=self.discriminator,
            slow=self.slow,
            fast=self.fast,
            callbacks=self.callbacks,
        )

    def step(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        return self.losses(batch, lambda name, loss: engine.update(loss, optimizer=name))

    def losses(self, batch: Batch, update: Callable[[str, Tensor], None]) -> dict[str, Tensor]:
        real, fake = batch[0], self.generator(batch[0][:, :2])
        softplus = nn.functional.softplus
        loss_d = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        update("fast", loss_d)
        loss_g = softplus(-self.discriminator(fake)).mean()
        update("slow", loss_g)
        return {"loss_d": loss_d, "loss_g": loss_g}

    def update_by_hand(self, name: str, loss: Tensor) -> None:
        optimizer = getattr(self, name)
        optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)
        optimizer.step()

    def state(self) -> list[Tensor]:
        return [*self.generator.state_dict().values(), *self.discriminator.state_dict().values()]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_optimizers_are_updated_as_by_hand_to_the_bit(clip: float | None) -> None:
    """Also with clipping, which sees the gradients of the optimizer that is about to step, and no others."""
    data, plain = class_batches(8, 8, 8), Duel(clip=clip)
    mine = Duel(*([] if clip is None else [ClipGradients(norm=clip)]))
    engine = mine.engine()
    history = engine.fit(data, epochs=2)
    losses = [plain.losses(batch, plain.update_by_hand)["loss_g"].item() for _ in range(2) for batch in data]
    assert equal(mine.state(), plain.state())
    assert history["train_loss_g"][0] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)
    assert engine.num_updates == 12


def test_a_step_with_two_optimizers_of_its_own_is_left_alone() -> None:
    data, mine, plain = class_batches(8, 8, 8), Duel(), Duel()
    engine = Engine(lambda engine, batch: mine.losses(batch, mine.update_by_hand), slow=mine.slow, fast=mine.fast)
    engine.fit(data, epochs=2)
    for batch in data * 2:
        plain.losses(batch, plain.update_by_hand)
    assert equal(mine.state(), plain.state())
    assert engine.num_updates == 0


def test_a_loss_leaves_gradients_only_in_what_its_optimizer_holds() -> None:
    """The generator's loss runs through the discriminator, whose next gradients it must not touch."""
    duel, seen = Duel(), []
    engine = duel.engine()

    def look(event: GradientsReady) -> None:
        with_gradient = [name for name, p in engine.parts["generator"].named_parameters() if p.grad is not None]
        others = [name for name, p in engine.parts["discriminator"].named_parameters() if p.grad is not None]
        seen.append((event.optimizer is duel.slow, len(with_gradient), len(others)))

    engine.subscribe(GradientsReady, look)
    engine.fit(class_batches(8), epochs=1)
    assert seen == [(False, 0, 2), (True, 2, 0)]


def test_an_update_without_a_name_leaves_nothing_in_another_optimizers_parameters() -> None:
    """As with the name of the part that is meant."""
    states = []
    for name in (None, "optimizer"):
        torch.manual_seed(0)
        body, critic = nn.Linear(4, 4), nn.Linear(4, 3)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (body, critic)]

        def step(engine: Engine, batch: Batch, name: str | None = name) -> None:
            for chosen in (name, "critic_optimizer"):
                loss = nn.functional.cross_entropy(engine.parts["critic"](engine.parts["body"](batch[0])), batch[1])
                engine.update(loss, optimizer=chosen)

        parts: dict[str, Any] = {"optimizer": optimizers[0], "critic_optimizer": optimizers[1]}
        Engine(step, body=body, critic=critic, **parts).fit(class_batches(8, 8), epochs=1)
        states.append([*body.state_dict().values(), *critic.state_dict().values()])
    assert equal(*states)


@pytest.mark.parametrize("scaler", [None, "fp16"])
@pytest.mark.parametrize("window", [1, 2])
def test_a_loss_for_the_wrong_optimizer_is_refused(window: int, scaler: str | None) -> None:
    """It reaches nothing that the optimizer holds: nothing would be learnt, in silence."""
    duel = Duel(*([Accumulate(window)] if window > 1 else []))

    def step(engine: Engine, batch: Batch) -> None:
        engine.update(duel.discriminator(batch[0]).mean(), optimizer="slow")

    engine = Engine(step, slow=duel.slow, fast=duel.fast, discriminator=duel.discriminator, callbacks=duel.callbacks)
    engine.update.use_scaler(None if scaler is None else torch.amp.GradScaler("cpu"))
    with pytest.raises(DataError, match=r'gave no gradient to anything that "slow" holds\. Pass the name'):
        engine.fit(class_batches(8), epochs=1)


def test_an_optimizer_of_which_nothing_learns_yet_is_left_out() -> None:
    """FreezeUntil keeps the body still for an epoch; the head learns meanwhile, and then both do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    body, head = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)

    def step(engine: Engine, batch: Batch) -> None:
        for name in ("body", "head"):
            engine.update(nn.functional.cross_entropy(model(batch[0]), batch[1]), optimizer=name)

    seen: list[list[bool]] = []
    before = [value.clone() for value in model.state_dict().values()]

    def look(event: EpochEnd) -> None:
        now = list(model.state_dict().values())
        seen.append([not torch.equal(now[place], before[place]) for place in (0, 2)])  # the two weights

    engine = Engine(step, model=model, body=body, head=head, callbacks=[FreezeUntil(2, ["0.*"])])
    engine.subscribe(EpochEnd, look)
    engine.fit(class_batches(8, 8), epochs=2)
    assert seen == [[False, True], [True, True]]
    assert (engine.num_updates, engine.num_skipped_updates) == (6, 2)


def test_one_loss_for_two_optimizers_is_refused_with_what_to_write() -> None:
    duel = Duel()

    def step(engine: Engine, batch: Batch) -> None:
        loss = duel.discriminator(duel.generator(batch[0][:, :2])).mean()
        for name in ("fast", "slow"):
            engine.update(loss, optimizer=name)

    with pytest.raises(DataError, match=r'for "slow", was differentiated before\. Compute it again'):
        Engine(step, slow=duel.slow, fast=duel.fast).fit(class_batches(8), epochs=1)


def test_an_optimizer_that_is_stepped_by_hand_may_be_a_part() -> None:
    """Its gradients are not cut off by the update of the other."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    by_hand = torch.optim.SGD(body.parameters(), lr=0.1)

    def step(engine: Engine, batch: Batch) -> None:
        engine.update(nn.functional.cross_entropy(head(body(batch[0])), batch[1]))
        by_hand.step()
        by_hand.zero_grad()

    before = body.weight.detach().clone()
    Engine(step, optimizer=torch.optim.SGD(head.parameters(), lr=0.1), by_hand=by_hand).fit(class_batches(8), epochs=1)
    assert not torch.equal(body.weight, before)


@pytest.mark.parametrize("moment", [GradientsReady, UpdateEnd])
def test_gradients_of_a_failed_fit_are_not_in_the_next(moment: type[Event]) -> None:
    data, engine = class_batches(8), make_engine()
    seen: list[list[Tensor]] = []
    engine.subscribe(GradientsReady, lambda event: seen.append(gradients(event.engine)))
    failing = engine.subscribe(moment, lambda event: 1 / 0)
    start = {name: value.clone() for name, value in engine.parts["model"].state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        engine.fit(data, epochs=1)
    failing.cancel()
    engine.parts["model"].load_state_dict(start)
    engine.fit(data, epochs=1)
    assert equal(seen[0], seen[1])


def test_what_a_failed_fit_had_differentiated_is_forgotten_with_its_gradients() -> None:
    """The generator is frozen before the next fit: its updates are left out, as if it had never learnt."""
    duel = Duel()
    engine = duel.engine()
    failing = engine.subscribe(GradientsReady, lambda event: 1 / 0 if event.optimizer is duel.slow else None)
    with pytest.raises(ZeroDivisionError):
        engine.fit(class_batches(8), epochs=1)
    failing.cancel()
    duel.generator.requires_grad_(False)
    made = engine.num_updates
    engine.fit(class_batches(8, 8), epochs=1)
    assert (engine.num_updates - made, engine.num_skipped_updates) == (2, 2)


def test_a_batch_of_no_samples_counts_for_nothing() -> None:
    """No token to predict: its loss is NaN, and neither the update nor the averages know of it."""
    data = class_batches(8, 8, 8)

    def step(engine: Engine, batch: Batch) -> None:
        none = engine.step == 2
        loss = nn.functional.cross_entropy(engine.parts["model"](batch[0]), batch[1]) * (math.nan if none else 1.0)
        engine.update(loss, num_samples=0 if none else 8)
        engine.record(loss=loss, weight=0 if none else 8)
        engine.current.peek()

    engine = make_engine(3, step)
    history = engine.fit(data, epochs=1)
    assert math.isfinite(history["train_loss"][0])
    other = make_engine(2)
    other.fit([data[0], data[2]], epochs=1)
    assert all(torch.allclose(a, b) for a, b in zip(weights(engine), weights(other), strict=True))


def test_windows_are_counted_for_each_optimizer() -> None:
    """Five batches in windows of two are three updates of each, with the optimizer told by the event."""
    duel = Duel(Accumulate(2))
    engine, updates = duel.engine(), []
    engine.subscribe(UpdateEnd, lambda event: updates.append((event.engine.step, event.optimizer is duel.slow)))
    engine.fit(class_batches(8, 8, 8, 8, 8), epochs=1)
    assert updates == [(2, False), (2, True), (4, False), (4, True), (5, False), (5, True)]


def test_an_overflow_of_one_optimizer_skips_no_other() -> None:
    """Each has a loss scaler of its own: the one whose scale is too high lowers it, alone."""
    duel = Duel()
    engine = duel.engine()
    engine.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    engine.subscribe(LossReady, lambda event: event.loss * 1e38 if event.optimizer is duel.slow else None)
    fast = steps_of(engine, UpdateEnd)
    engine.fit(class_batches(8, 8), epochs=1)
    assert fast == [1, 2]
    assert (engine.num_updates, engine.num_skipped_updates) == (2, 2)
    scales = [state["scaler"]["scale"] for state in engine.update.state_dict().values()]
    assert scales == [2.0**10, 2.0**10, 2.0**8]  # that of no name, fast, slow


def test_a_bad_loss_skips_the_update_of_its_own_optimizer() -> None:
    duel = Duel()
    engine = duel.engine()
    engine.subscribe(LossReady, lambda event: event.loss * math.nan if event.optimizer is duel.fast else None)
    engine.attach(StopOnNonFinite("skip"))  # looks at what the handler above has made of the loss
    before = [value.clone() for value in duel.discriminator.state_dict().values()]
    engine.fit(class_batches(8), epochs=1)
    assert equal(list(duel.discriminator.state_dict().values()), before)
    assert (engine.num_updates, engine.num_skipped_updates) == (1, 1)


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_run_with_two_open_windows_resumes_to_the_bit(cut: int, tmp_path: Path) -> None:
    """Cut after each of ten steps, in windows of three with a scaler for each optimizer."""

    def run(checkpoint: list[Callback], stop: int | None, resume: str | None) -> Duel:
        duel = Duel(Accumulate(3), *checkpoint)
        engine = duel.engine()
        engine.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))
        engine.subscribe(StepEnd, lambda event: engine.run.interrupt(signal.SIGTERM) if engine.step == stop else None)
        engine.fit(class_batches(*[8] * 5), epochs=2, resume=resume)
        return duel

    run([RunCheckpoint(tmp_path)], cut, None)
    assert equal(run([RunCheckpoint(tmp_path)], None, "auto").state(), run([], None, None).state())


def test_an_optimizer_that_clears_gradients_in_its_own_way_is_asked_to() -> None:
    class Keeping(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=False)

    model = linear()
    engine = Engine(train_step, model=model, optimizer=Keeping(model.parameters(), lr=0.1))
    engine.fit(class_batches(4), epochs=1)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_an_update_without_an_optimizer_names_the_parts_there_are() -> None:
    model = nn.Linear(2, 1)
    engine = Engine(lambda engine, batch: engine.update(model(batch).sum()), model=model)
    with refused(EngineStateError, "part named optimizer, but the parts are: model"):
        engine.fit([torch.ones(4, 2)], epochs=1)


def detached(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.detach(), target)


LOSSES: list[tuple[Callable[..., Any], str]] = [
    (nn.MSELoss(reduction="none"), "The loss has shape [4, 1], but it must be one number. Reduce it: loss.mean()."),
    (lambda output, target: nn.functional.mse_loss(output, target).item(), "of type float, which has no gradient"),
    (lambda output, target: None, "The loss is None, of type NoneType"),
    (lambda output, target: {"mse": output.mean()}, "none is named loss"),
    (lambda output, target: [output.mean()], "of type list"),
    (detached, "The loss does not depend on any trainable parameter (weight, bias ...)"),
    (lambda output: output.detach().mean(), "Look for .detach(), .item(), argmax or torch.no_grad()"),
]


@pytest.mark.parametrize(("loss_fn", "phrase"), LOSSES)
def test_a_loss_that_cannot_be_trained_on_is_refused_before_an_update(
    loss_fn: Callable[..., Any], phrase: str
) -> None:
    trainer = regression(loss_fn=loss_fn)
    with refused(DataError, phrase):
        trainer.fit(pairs(), epochs=1)
    assert (num_calls(trainer), trainer.num_updates) == (1, 0)


def test_a_model_frozen_throughout_is_told_by_its_parameters() -> None:
    trainer = regression(CountingModel().requires_grad_(False))
    with refused(DataError, "No parameter of the model is trainable (frozen: weight, bias ...)", "requires_grad"):
        trainer.fit(pairs(), epochs=1)
    assert trainer.num_updates == 0


def test_an_update_in_a_step_of_ones_own_checks_the_loss_as_well() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(lambda engine, batch: engine.update(model(batch)), model=model, optimizer=optimizer)
    with refused(DataError, "The loss has shape [4, 1]"):
        engine.fit([torch.ones(4, 2)], epochs=1)


def test_a_step_that_never_updates_is_refused_in_a_second_fit_too() -> None:
    engine = make_engine()
    engine.attach(ClipGradients(norm=1.0))
    engine.fit(class_batches(8), epochs=1)
    engine.wrap_step(lambda step: FunctionStep(lambda engine, batch: None))
    with pytest.raises(ConfigurationError, match=r"ClipGradients.* had no effect in this epoch because"):
        engine.fit(class_batches(8), epochs=1)


def test_an_optimizer_named_in_an_earlier_fit_changes_nothing_in_a_later_one() -> None:
    """Without a name a loss is differentiated as by ``backward()``: for everything that it depends on."""
    model, other = linear(), nn.Linear(3, 3)
    named = True

    def step(engine: Engine, batch: Batch) -> None:
        loss = nn.functional.cross_entropy(other(model(batch[0])), batch[1])
        engine.update(loss, optimizer="named" if named else None)

    optimizers = {"optimizer": model, "named": other}
    parts: dict[str, Any] = {name: torch.optim.SGD(part.parameters(), 0.1) for name, part in optimizers.items()}
    engine = Engine(step, model=model, other=other, **parts)
    engine.fit(class_batches(8), epochs=1)
    named = False
    engine.fit(class_batches(8), epochs=1)
    assert other.weight.grad is not None
