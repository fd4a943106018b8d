"""Schedules: the learning rates are those of torch's own loop, step by step, and a bad setting is refused."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, num_calls, pairs, refused, regression
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

from camshaft.callbacks import Accumulate, RunCheckpoint, Schedule, StopOnNonFinite, warmup_cosine
from camshaft.engine import Callback, ConfigurationError, Engine, GradientsReady, LossReady, StepEnd, Trainer, repeat

MakeScheduler = Callable[..., LRScheduler]


def learning_rates(trainer: Engine) -> list[float]:
    """A list that will hold the learning rate with which each update is made."""
    rates: list[float] = []
    trainer.subscribe(
        GradientsReady, lambda event: rates.append(event.engine.parts["optimizer"].param_groups[0]["lr"])
    )
    return rates


def schedule_trainer(make: MakeScheduler, *others: Callback, lr: float = 0.1, **settings: Any) -> Engine:
    return make_trainer(*others, Schedule(make, **settings), lr=lr)


class TorchLoop:
    """The loop as torch's pages write it, which notes the learning rate of each update."""

    def __init__(self, make: MakeScheduler, *, lr: float = 0.1) -> None:
        self.model = linear()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.scheduler = make(self.optimizer)
        self.rates: list[float] = []

    def train(self, data: list[Batch], *, per: str = "never") -> None:
        for inputs, target in data:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), target).backward()
            self.optimizer.step()
            if per == "update":
                self.scheduler.step()
        if per == "epoch":
            self.scheduler.step()

    def loss(self, data: list[Batch]) -> Tensor:
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(self.model(inputs), target) for inputs, target in data]
        return torch.stack(losses).double().mean()


def halve(every: int = 1) -> MakeScheduler:
    """What makes a schedule that halves the rate every so many steps."""
    return lambda optimizer: StepLR(optimizer, every, gamma=0.5)


def assert_same_weights(trainer: Engine, loop: TorchLoop) -> None:
    both = zip(trainer.parts["model"].parameters(), loop.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in both)


SCHEDULES: list[tuple[str, MakeScheduler]] = [
    ("epoch", halve(2)),
    ("epoch", lambda optimizer: CosineAnnealingLR(optimizer, T_max=5)),
    ("update", lambda optimizer: OneCycleLR(optimizer, max_lr=0.5, total_steps=15)),
    ("update", lambda optimizer: warmup_cosine(optimizer, warmup=4, total=15)),
    ("epoch", lambda optimizer: warmup_cosine(optimizer, warmup=2, total=5, min_lr=0.01)),
]


@pytest.mark.parametrize(("per", "make"), SCHEDULES)
def test_the_learning_rates_and_weights_are_those_of_torchs_own_loop(per: str, make: MakeScheduler) -> None:
    """To the bit, over five epochs of three updates, and without a warning of torch about the order of steps."""
    data, loop = class_batches(8, 8, 8), TorchLoop(make)
    trainer = schedule_trainer(make, per=per)
    rates = learning_rates(trainer)
    trainer.fit(data, epochs=5)
    for _ in range(5):
        loop.train(data, per=per)
    assert rates == loop.rates
    assert len(set(rates)) > 2
    assert_same_weights(trainer, loop)


def test_a_plateau_lowers_the_rate_as_in_torchs_own_loop() -> None:
    """ReduceLROnPlateau gets each validation's loss; with a rate this high, it soon no longer falls."""

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    data, val, loop = class_batches(8, 8), class_batches(8, 8, seed=1), TorchLoop(make, lr=8.0)
    trainer = schedule_trainer(make, lr=8.0, monitor="val_loss")
    rates = learning_rates(trainer)
    trainer.fit(data, val, epochs=10)
    for _ in range(10):
        loop.train(data)
        loop.scheduler.step(loop.loss(val))  # type: ignore[arg-type]  # a plateau's
    assert rates == loop.rates
    assert len(set(rates)) > 2
    assert_same_weights(trainer, loop)


def test_a_plateau_steps_at_each_validation_and_at_no_other_time() -> None:
    """With a validation every second epoch and patience 0, a loss that stands still halves the rate every second."""

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, eps=0.0)

    model = linear().requires_grad_(False)
    model.bias.requires_grad_(True)
    optimizer = torch.optim.SGD([model.bias], lr=1e-30)  # too small to change the loss
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Schedule(make, monitor="val_loss")])
    rates = learning_rates(trainer)
    trainer.fit(class_batches(8), class_batches(8), epochs=7, validate_every=2)
    assert rates == [1e-30, 1e-30, 1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31]


def test_under_accumulation_a_schedule_per_update_counts_updates() -> None:
    """Seven batches in windows of three are three updates an epoch: the rates are those of a loop with three."""
    trainer = schedule_trainer(halve(2), Accumulate(3), per="update")
    rates, by_batch = learning_rates(trainer), []
    trainer.subscribe(StepEnd, lambda event: by_batch.append(trainer.parts["optimizer"].param_groups[0]["lr"]))
    trainer.fit(class_batches(*[8] * 7), epochs=2)
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert by_batch[:6] == [0.1, 0.1, 0.1, 0.1, 0.1, 0.05]


def test_an_update_that_the_scaler_skips_does_not_advance_the_schedule() -> None:
    """The first and the third batch overflow: neither counts, and torch has no reason to warn of the order."""
    data = [(x * 1e12, y) if number in (0, 2) else (x, y) for number, (x, y) in enumerate(class_batches(*[8] * 5))]
    trainer = schedule_trainer(halve(), per="update")
    trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000))
    rates = learning_rates(trainer)
    trainer.fit(data, epochs=1)
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert (trainer.num_updates, trainer.num_skipped_updates) == (3, 2)


def test_an_update_that_a_handler_skips_does_not_advance_the_schedule() -> None:
    data = class_batches(8, 8, 8)
    data[1] = (data[1][0] * math.nan, data[1][1])
    trainer = schedule_trainer(halve(), StopOnNonFinite("skip"), per="update")
    rates = learning_rates(trainer)
    trainer.fit(data, epochs=1)
    assert rates == [0.1, 0.05, 0.05]


def test_an_epoch_of_which_every_update_was_skipped_gives_no_warning() -> None:
    """Torch warns when a schedule moves before the first step of the optimizer; a scaler's first steps often fail."""
    trainer = schedule_trainer(halve(), per="epoch")
    trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**100))
    inputs, target = class_batches(8)[0]
    trainer.fit([(inputs * 1e12, target)], epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (0, 1)


def test_warmup_cosine_rises_in_a_line_and_falls_along_a_cosine() -> None:
    """By the two formulas: ``start_factor`` of the rate at first, all of it at ``warmup``, ``min_lr`` at the end."""
    trainer = schedule_trainer(
        lambda optimizer: warmup_cosine(optimizer, warmup=5, total=20, start_factor=0.1, min_lr=0.02), per="update"
    )
    rates = learning_rates(trainer)
    trainer.fit(class_batches(*[8] * 21), epochs=1)
    rise = [0.1 * (0.1 + 0.9 * update / 5) for update in range(5)]
    fall = [0.02 + 0.08 * (1 + math.cos(math.pi * update / 15)) / 2 for update in range(16)]
    assert rates == pytest.approx(rise + fall, rel=1e-6)


def test_a_warmup_may_be_a_share_of_the_whole_or_nothing() -> None:
    """A fifth of 20 is 4 updates; nothing is a cosine from the first update on."""
    for warmup, count in ((0.2, 4), (0, 0), (0.99, 1)):
        total = 20 if warmup != 0.99 else 2
        optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
        scheduler = warmup_cosine(optimizer, total, warmup=warmup)
        rates = []
        for _ in range(total + 2):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates.index(max(rates)) == count
        assert max(rates) == pytest.approx(0.1)
        assert rates[-2:] == [0.0, 0.0]


def spans(pace: Literal["update", "step", "epoch"], fit: dict[str, Any], *others: Callback, **data: Any) -> list[int]:
    """The totals with which a schedule over the whole run was made, one for each of two fits."""
    totals: list[int] = []

    def make(optimizer: torch.optim.Optimizer, total: int) -> LRScheduler:
        totals.append(total)
        return CosineAnnealingLR(optimizer, T_max=total)

    trainer = schedule_trainer(make, *others, per=pace)
    rates = learning_rates(trainer)
    for _ in range(2):
        trainer.fit(data.get("train") or class_batches(*[8] * 7), **fit)
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]  # the second fit begins where the first began
    if pace == "update":
        assert trainer.num_updates == sum(totals)
    return totals


@pytest.mark.parametrize(
    ("pace", "fit", "others", "total"),
    [
        ("update", {"epochs": 3}, [], 21),
        ("update", {"max_steps": 10}, [], 10),
        ("update", {"epochs": 3, "max_steps": 10}, [], 10),
        ("update", {"epochs": 3}, [Accumulate(3)], 9),
        ("update", {"max_steps": 9}, [Accumulate(3)], 4),
        ("update", {"epochs": 2, "epoch_length": 5}, [], 10),
        ("epoch", {"epochs": 3}, [], 3),
        ("epoch", {"max_steps": 10}, [], 2),
        ("step", {"epochs": 3}, [Accumulate(3)], 21),
        ("step", {"max_steps": 10}, [], 10),
    ],
)
def test_a_function_of_the_total_is_told_how_far_the_run_goes(
    pace: Literal["update", "step", "epoch"], fit: dict[str, Any], others: list[Accumulate], total: int
) -> None:
    """The data have seven batches; each fit is told again, and the run makes as many updates as was said."""
    copies = [Accumulate(other.batches) for other in others]
    train = repeat(class_batches(*[8] * 7)) if "epoch_length" in fit else None
    assert spans(pace, fit, *copies, train=train) == [total, total]


def test_a_schedule_over_the_run_ends_where_the_run_ends_and_begins_anew_with_the_next() -> None:
    trainer = schedule_trainer(warmup_cosine, per="update")
    rates = learning_rates(trainer)
    for _ in range(2):
        trainer.fit(class_batches(*[8] * 5), epochs=4)
    assert rates[:20] == rates[20:]
    assert rates[0] == pytest.approx(0.001)
    assert rates.index(max(rates)) == 2
    assert 0 < rates[19] < 0.001
    assert trainer.parts["optimizer"].param_groups[0]["lr"] == 0


def test_a_rate_that_was_set_by_hand_between_two_fits_is_the_one_to_reach() -> None:
    trainer = schedule_trainer(warmup_cosine, per="update")
    rates = learning_rates(trainer)
    trainer.fit(class_batches(*[8] * 10), epochs=1)
    trainer.parts["optimizer"].param_groups[0]["lr"] = 0.001
    trainer.fit(class_batches(*[8] * 10), epochs=1)
    assert (max(rates[:10]), max(rates[10:])) == (0.1, 0.001)


def test_a_total_that_cannot_be_known_is_asked_for_before_the_first_step() -> None:
    """A generator has no length; windows by samples end where they may."""
    for train, others in ((lambda: iter(class_batches(8)), []), (class_batches(8), [Accumulate(samples=20)])):
        trainer = schedule_trainer(warmup_cosine, *others, per="update")
        with pytest.raises(ConfigurationError, match=r"cannot know how many updates.*State it: lambda optimizer"):
            trainer.fit(train, epochs=2)
        assert trainer.step == 0


def test_a_resumed_run_that_goes_further_has_the_schedule_of_its_new_length(tmp_path: Path) -> None:
    """The count is where it was, and the rates are those of a run that was so long from the start."""

    def run(epochs: int, resume: str | None) -> list[float]:
        callbacks = [RunCheckpoint(tmp_path, every_epochs=1)] if resume else []
        trainer = schedule_trainer(warmup_cosine, *callbacks, per="update")
        rates = learning_rates(trainer)
        trainer.fit(class_batches(8, 8, 8), epochs=epochs, resume=resume)
        return rates

    run(2, "auto")
    assert run(5, "auto") == run(5, None)[6:]


def test_each_optimizer_may_have_a_schedule_of_its_own() -> None:
    """Each is stepped by the updates of its own optimizer alone, however the schedule was given."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    slow, fast = (torch.optim.SGD(module.parameters(), lr=1.0) for module in (body, head))

    def step(engine: Engine, batch: Batch) -> None:
        loss = nn.functional.cross_entropy(head(body(batch[0])), batch[1])
        engine.update(loss, optimizer="fast")
        if engine.step % 2 == 0:
            loss = nn.functional.cross_entropy(head(body(batch[0])), batch[1])
            engine.update(loss, optimizer="slow")

    schedules = [
        Schedule(halve(), per="update", optimizer="fast"),
        Schedule(StepLR(slow, 1, gamma=0.1), per="update"),
    ]
    engine = Engine(step, body=body, head=head, slow=slow, fast=fast, callbacks=schedules)
    engine.fit(class_batches(*[8] * 4), epochs=1)
    assert fast.param_groups[0]["lr"] == 0.5**4
    assert slow.param_groups[0]["lr"] == pytest.approx(0.1**2)
    assert {"fast_scheduler", "slow_scheduler"} < engine.parts.keys()


def alternating(*callbacks: Callback, every: int = 3) -> Engine:
    """Two optimizers, of which the slow one is due in every third step only."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    slow, fast = (torch.optim.SGD(module.parameters(), lr=1.0) for module in (body, head))

    def step(engine: Engine, batch: Batch) -> None:
        loss = nn.functional.cross_entropy(head(body(batch[0])), batch[1])
        engine.update(loss, optimizer="slow" if engine.step % every == 0 else "fast")

    return Engine(step, body=body, head=head, slow=slow, fast=fast, callbacks=callbacks)


def test_a_schedule_per_step_ends_with_the_run_however_often_its_optimizer_is_due() -> None:
    """And torch, which expects the optimizer to be first, has nothing to warn of."""
    engine = alternating(Schedule(warmup_cosine, per="step", optimizer="slow"))
    rates: list[float] = []
    engine.subscribe(StepEnd, lambda event: rates.append(engine.parts["slow"].param_groups[0]["lr"]))
    engine.fit(class_batches(*[8] * 10), epochs=2)
    assert max(rates) == 1.0
    assert rates[-1] < 0.01 < rates[-4]
    assert engine.parts["slow"].param_groups[0]["lr"] == 0


def test_a_total_of_updates_that_the_optimizer_does_not_make_is_told_after_the_first_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alternating(Schedule(warmup_cosine, per="update", optimizer="slow")).fit(class_batches(*[8] * 10), epochs=2)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert 'counts on 10 updates of "slow" in an epoch of 10 steps, and there were 3' in told[0]


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_schedule_whose_optimizer_is_never_due_is_refused_after_the_first_epoch(
    resume: str | None, tmp_path: Path
) -> None:
    """Also where a run was asked to resume, and there was nothing yet."""
    callbacks = [Schedule(halve(), per="update", optimizer="slow"), RunCheckpoint(tmp_path)]
    engine = alternating(*callbacks, every=100)
    with pytest.raises(ConfigurationError, match=r'no update was for "slow"\. Write engine\.update\(loss, optimizer='):
        engine.fit(class_batches(8, 8), epochs=2, resume=resume)


def test_what_was_made_for_a_total_and_cannot_be_stretched_is_refused_on_resume(tmp_path: Path) -> None:
    def trainer() -> Engine:
        def one_cycle(optimizer: torch.optim.Optimizer, total: int) -> LRScheduler:
            return OneCycleLR(optimizer, 0.1, total)

        return schedule_trainer(one_cycle, RunCheckpoint(tmp_path), per="update")

    trainer().fit(class_batches(8, 8), epochs=2, resume="auto")
    with pytest.raises(
        ConfigurationError, match=r"OneCycleLR was made for a total of 4 updates, .* will make 6\. Ask"
    ):
        trainer().fit(class_batches(8, 8), epochs=3, resume="auto")


def test_a_plateau_has_no_use_for_a_total() -> None:
    trainer = schedule_trainer(lambda optimizer, total: ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau does not need a total"):
        trainer.fit(class_batches(8), epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize("make", [lambda: None, lambda a, b, c: None])
def test_a_function_of_no_or_three_arguments_is_refused_when_made(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"takes neither \(optimizer\) nor \(optimizer, total\)"):
        Schedule(make)


def test_a_part_named_scheduler_may_be_the_one_that_is_scheduled() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1)
    Engine(model=model, optimizer=optimizer, scheduler=scheduler, callbacks=[Schedule(scheduler)])


def test_a_loop_of_ones_own_cannot_tell_its_length_not_even_the_second_time() -> None:
    """Its data are seen in the loop's body, and may be others in a second run."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model=model, optimizer=optimizer)
    for _ in engine.epochs(1):
        for _ in engine.train(class_batches(8, 8)):
            pass
    engine.attach(Schedule(warmup_cosine, per="step"))
    with pytest.raises(ConfigurationError, match="cannot know how many steps"):
        next(iter(engine.epochs(1)))


def test_an_epoch_of_skipped_updates_counts_the_same_after_a_resume(tmp_path: Path) -> None:
    """Epoch 2 overflows throughout, so the schedule stands still in it, also if the run was cut there."""

    def run(stop: int | None, resume: str | None, *callbacks: Callback) -> float:
        trainer = schedule_trainer(halve(), *callbacks)
        trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000))
        trainer.subscribe(LossReady, lambda event: event.loss * (1e38 if trainer.epoch == 2 else 1.0))
        trainer.subscribe(
            StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM) if trainer.step == stop else None
        )
        trainer.fit(class_batches(8, 8, 8), epochs=3, resume=resume)
        return float(trainer.parts["optimizer"].param_groups[0]["lr"])

    run(5, None, RunCheckpoint(tmp_path))
    assert run(None, "auto", RunCheckpoint(tmp_path)) == run(None, None) == 0.025


def test_a_schedule_for_an_optimizer_that_is_not_there_names_those_that_are() -> None:
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r'is for "optimizer", but the optimizers are: d_optimizer\.'):
        Engine(d_optimizer=optimizer, callbacks=[Schedule(halve())])


def test_a_second_fit_goes_on_along_the_schedule() -> None:
    """Two fits of two epochs have the learning rates of one fit of four."""
    trainer = schedule_trainer(halve())
    rates = learning_rates(trainer)
    for _ in range(2):
        trainer.fit(class_batches(8), epochs=2)
    assert rates == [0.1, 0.05, 0.025, 0.0125]


def test_the_scheduler_becomes_a_part_of_the_run() -> None:
    """Whether it was given as it is, or as a function of the optimizer."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1)
    for given in (scheduler, lambda optimizer: scheduler):
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Schedule(given)])
        assert trainer.parts["scheduler"] is scheduler


def test_a_loop_of_ones_own_has_its_schedule_per_epoch() -> None:
    """In script style, next to a plain ``optimizer.step()``."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(model=model, optimizer=optimizer, callbacks=[Schedule(halve())])
    rates = []
    for _ in engine.epochs(3):
        for inputs, target in engine.train(class_batches(8)):
            rates.append(optimizer.param_groups[0]["lr"])
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert rates == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("make", [halve(), warmup_cosine])
def test_two_schedules_are_refused(make: MakeScheduler) -> None:
    """The second would take the place of the first, and be stepped by both."""
    first, second = (Schedule(make) for _ in range(2))
    with pytest.raises(ConfigurationError, match=r"Schedule.*\. [A-Z]"):
        make_trainer(first, second)


@pytest.mark.parametrize("scheduler", [StepLR, "StepLR", None, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_what_is_no_scheduler_is_refused_when_made(scheduler: Any) -> None:
    """A class instead of an instance is the usual one."""
    with pytest.raises(ConfigurationError, match=r"(?s)^Schedule got .*, which is not a scheduler\. Pass StepLR\("):
        Schedule(scheduler)


def test_an_unknown_pace_is_refused_when_made() -> None:
    with pytest.raises(
        ConfigurationError, match=r'^Schedule has per=\'batch\'\. Write "update", "step" or "epoch"\.$'
    ):
        Schedule(halve(), per="batch")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("returned", [None, StepLR, 0.1])
def test_a_function_that_returns_no_scheduler_is_refused_at_attachment(returned: Any) -> None:
    """A forgotten ``return``, or the class itself."""
    with pytest.raises(ConfigurationError, match=r"Schedule.*\. [A-Z]"):
        schedule_trainer(lambda optimizer: returned)


def test_a_scheduler_of_another_optimizer_is_refused_at_attachment() -> None:
    """It would turn a learning rate that nobody uses."""
    stranger = torch.optim.SGD(linear().parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"an optimizer that is not the run's\. Build it over the run"):
        make_trainer(Schedule(StepLR(stranger, 1)))


def test_an_engine_without_an_optimizer_is_refused_at_attachment() -> None:
    with pytest.raises(ConfigurationError, match=r"^Schedule needs the optimizer\. Write Engine\(step, optimizer="):
        Engine(model=linear(), callbacks=[Schedule(halve())])


@pytest.mark.parametrize(
    ("make", "monitor", "message"),
    [
        (ReduceLROnPlateau, None, r"ReduceLROnPlateau and monitor=None\. ReduceLROnPlateau needs one"),
        (halve(), "val_loss", r"StepLR and monitor='val_loss'\. ReduceLROnPlateau needs one"),
        (ReduceLROnPlateau, "loss", r"watches 'loss', which does not name a stage\. Write \"val_loss\""),
    ],
)
def test_a_plateau_and_a_monitor_belong_together(make: MakeScheduler, monitor: str | None, message: str) -> None:
    """Refused at attachment, in both directions; so is a monitor that names no stage."""
    with pytest.raises(ConfigurationError, match=message):
        schedule_trainer(lambda optimizer: make(optimizer), monitor=monitor)


@pytest.mark.parametrize(
    ("monitor", "val", "message"),
    [
        ("val_lss", True, r'watches "val_lss", but the values are: val_loss\. Did you mean "val_loss"\?'),
        ("val_loss", False, r"fit was given no validation data\. Pass fit\(train, val"),
    ],
)
def test_a_monitor_that_will_have_no_value_is_refused_before_the_first_step(
    monitor: str, val: bool, message: str
) -> None:
    trainer = schedule_trainer(lambda optimizer: ReduceLROnPlateau(optimizer), monitor=monitor)
    with pytest.raises(ConfigurationError, match=f"^Schedule.*{message}"):
        trainer.fit(class_batches(8), class_batches(8) if val else None, epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup": -1, "total": 10},
        {"warmup": "all", "total": 10},
        {"warmup": 0.1, "total": 0},
        {"warmup": 2.5, "total": 10},
        {"warmup": 10, "total": 10},
        {"warmup": 2, "total": 10, "start_factor": 0.0},
        {"warmup": 2, "total": 10, "start_factor": 1.5},
        {"warmup": 2, "total": 10, "min_lr": -0.1},
    ],
)
def test_warmup_cosine_refuses_what_cannot_work(arguments: dict[str, Any]) -> None:
    """A warm-up of nothing, one as long as the whole, a rate that would be zero or below."""
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"(warmup|total|start_factor|min_lr).*\. Pass "):
        warmup_cosine(optimizer, **arguments)


@pytest.mark.parametrize(
    ("make", "settings", "phrase"),
    [
        (Schedule, {"scheduler": StepLR}, "StepLR'>, which is not a scheduler"),
        (Schedule, {"scheduler": "cosine"}, "'cosine', which is not a scheduler"),
        (Schedule, {"scheduler": lambda optimizer: StepLR(optimizer, 1), "per": "batch"}, "per='batch'"),
        (warmup_cosine, {"optimizer": None, "warmup": -1, "total": 10}, "warmup is -1"),
        (warmup_cosine, {"optimizer": None, "warmup": 10, "total": 10}, "leaves nothing of total=10"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)


OTHER = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("schedule", "phrase"),
    [
        (Schedule(StepLR(OTHER, 1)), "an optimizer that is not the run's"),
        (Schedule(partial(StepLR, step_size=1), monitor="val_loss"), "StepLR and monitor='val_loss'"),
        (Schedule(lambda optimizer: ReduceLROnPlateau(optimizer)), "ReduceLROnPlateau and monitor=None"),
        (Schedule(lambda optimizer: None), "None"),  # type: ignore[arg-type, return-value]  # the mistake under test
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_at_attachment(schedule: Schedule, phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        regression(callbacks=[schedule])


def test_a_value_that_a_schedule_waits_for_and_will_not_exist_is_told_before_the_run() -> None:
    trainer = regression(callbacks=[Schedule(lambda o: ReduceLROnPlateau(o), monitor="val_los")])
    with refused(ConfigurationError, 'Schedule watches "val_los", but', 'Did you mean "val_loss"?'):
        trainer.fit(pairs(), pairs(), epochs=1)
    assert num_calls(trainer) == 0


class Changing:
    """Data of which each pass has another number of batches."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)

    def __len__(self) -> int:
        return self.lengths[0]

    def __iter__(self) -> Iterator[Any]:
        length = self.lengths.pop(0) if len(self.lengths) > 1 else self.lengths[0]
        return iter(pairs(length))


@pytest.mark.parametrize("per", ["update", "step"])
@pytest.mark.parametrize(("lengths", "told"), [((6, 4, 2), "epoch 2 had 4"), ((6, 6, 6), None), ((4, 5, 4), "had 5")])
def test_a_schedule_of_which_the_data_change_their_length_warns_once(
    per: Literal["update", "step"], lengths: tuple[int, ...], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as an epoch was shorter or longer than what the total was computed from."""
    schedule = Schedule(lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 / (1 + step)), per=per)
    regression(callbacks=[schedule]).fit(Changing(*lengths), epochs=3)
    lines = [record.getMessage() for record in caplog.records if "steps in an epoch" in record.getMessage()]
    assert len(lines) == (told is not None)
    assert all(told is not None and told in line and "Schedule counts on" in line for line in lines)


@pytest.mark.parametrize("plan", [{"epochs": 3, "max_steps": 8}, {"epochs": 2, "epoch_length": 4}])
def test_an_epoch_that_the_plan_cuts_short_is_no_change_of_length(
    plan: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(lambda optimizer, total: OneCycleLR(optimizer, 0.1, total), per="step")
    regression(callbacks=[schedule]).fit(repeat(pairs(6)) if "epoch_length" in plan else pairs(6), **plan)  # type: ignore[arg-type]  # whole numbers
    assert "steps in an epoch" not in caplog.text
