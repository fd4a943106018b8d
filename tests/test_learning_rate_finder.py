"""The learning-rate finder: what it leaves alone, what it suggests, and what it refuses."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import LearningRateFinder, MicroBatch, Schedule
from camshaft.engine import ConfigurationError, DataError, Engine, StepEnd, Trainer, num_samples


def deep_trainer(*callbacks: Any) -> Engine:
    """Batch norm has statistics, dropout draws random numbers, and Adam has state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks)


def shuffled(**settings: Any) -> DataLoader[tuple[Tensor, ...]]:
    inputs, target = class_batches(64)[0]
    return DataLoader(TensorDataset(inputs, target), batch_size=16, shuffle=True, **settings)


def everything(trainer: Engine) -> list[Any]:
    """What a run is made of, as bytes and plain values that compare."""
    optimizer = trainer.parts["optimizer"].state_dict()
    counters = ("epoch", "step", "num_fits", "num_updates", "num_skipped_updates", "num_validations")
    return [
        [value.numpy().tobytes() for value in trainer.parts["model"].state_dict().values()],
        [module.training for module in trainer.parts["model"].modules()],
        [parameter.grad is None for parameter in trainer.parts["model"].parameters()],
        [value.numpy().tobytes() for state in optimizer["state"].values() for value in state.values()],
        optimizer["param_groups"],
        [trainer.current.name, *(getattr(trainer, name) for name in counters)],
        [list(trainer.history.rows), list(trainer.history.validations), trainer.history.reason],
        [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
        ],
    ]


def test_the_trainer_is_left_as_it_was_to_the_bit() -> None:
    """Model, modes, optimizer, counters, history and random numbers, between two fits that have made them all."""
    trainer = deep_trainer(Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)))
    trainer.fit(shuffled(), shuffled(), epochs=2)
    before = everything(trainer)
    LearningRateFinder(num_steps=20).run(trainer, shuffled())
    assert everything(trainer) == before


def test_the_run_afterwards_is_that_without_a_finder() -> None:
    """The same weights to the bit, with dropout and a shuffling loader."""
    results = []
    for finds in (True, False):
        trainer, data = deep_trainer(), shuffled()
        torch.manual_seed(1)
        if finds:
            LearningRateFinder(num_steps=20).run(trainer, data)
        history = trainer.fit(data, epochs=2)
        results.append((everything(trainer)[0], history["train_loss"]))
    assert results[0] == results[1]


def test_a_loader_with_a_generator_of_its_own_gives_the_same_order_afterwards() -> None:
    """The numbers that the finder draws from it are put back, too."""
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    LearningRateFinder(num_steps=20).run(deep_trainer(), shuffled(generator=generator))
    assert torch.equal(generator.get_state(), before)


def test_no_handler_of_the_trainer_hears_of_the_walk() -> None:
    steps: list[int] = []
    trainer = make_trainer()
    trainer.subscribe(StepEnd, lambda event: steps.append(event.engine.step))
    LearningRateFinder(num_steps=20).run(trainer, class_batches(16))
    assert steps == []


def test_the_range_is_walked_in_equal_factors() -> None:
    """From the first to the last; a loss that does not grow out of hand is seen at each of them."""
    finder = LearningRateFinder(1e-5, 1e-1, num_steps=21)
    finder.run(make_trainer(), class_batches(64))
    assert finder.learning_rates == pytest.approx(np.geomspace(1e-5, 1e-1, 21), rel=1e-9)
    assert len(finder.losses) == 21


def test_the_losses_are_those_of_a_loop_by_hand() -> None:
    """Each at the weights that the learning rates before it have made, smoothed by an exponential mean."""
    finder, ((inputs, target),) = LearningRateFinder(1e-3, 1.0, num_steps=10, smoothing=0.5), class_batches(16)
    finder.run(make_trainer(), [(inputs, target)])
    model, smoothed = linear(), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rate in np.geomspace(1e-3, 1.0, 10):
        optimizer.param_groups[0]["lr"] = float(rate)
        loss = nn.functional.cross_entropy(model(inputs), target)
        smoothed.append(0.5 * smoothed[-1] + 0.5 * loss.item() if smoothed else loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert finder.losses == pytest.approx(smoothed, rel=1e-6)


def quadratic_trainer(lr: float, *, floor: float = 0.0) -> Engine:
    """The loss ``0.5 * (20 * x ** 2 + y ** 2) + floor`` from (1, 1): gradient descent diverges above lr = 0.1."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean() / 2 + floor

    return Trainer(model, torch.optim.SGD(model.parameters(), lr=lr), loss)


# Two samples whose mean squared output is 20 * x ** 2 + y ** 2.
BOWL: list[Any] = [torch.tensor([[40.0**0.5, 0.0], [0.0, 2.0**0.5]])]


def test_the_suggestion_lies_where_a_quadratic_bowl_trains() -> None:
    """Below the rate at which it diverges, and far above one at which nothing happens."""
    suggestion = LearningRateFinder(1e-5, 10.0).run(quadratic_trainer(0.1), BOWL)
    assert 1e-3 < suggestion < 0.1
    good, slow = (quadratic_trainer(lr).fit(BOWL * 50, epochs=2)["train_loss"][1] for lr in (suggestion, 1e-5))
    assert good < slow / 10


def test_the_suggestion_does_not_hang_on_where_the_loss_is_zero() -> None:
    """A loss below zero, as a log-likelihood's can be, walks the same way down."""
    expected = LearningRateFinder(1e-5, 0.09).run(quadratic_trainer(0.1), BOWL)
    assert LearningRateFinder(1e-5, 0.09).run(quadratic_trainer(0.1, floor=-50.0), BOWL) == pytest.approx(expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_with_the_suggestion_beats_the_lowest_rate_by_far(momentum: float) -> None:
    """Logistic regression on separable classes, in batches."""

    def trainer(lr: float) -> Engine:
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        return Trainer(model, optimizer, nn.CrossEntropyLoss())

    data, finder = class_batches(*[32] * 8), LearningRateFinder(1e-6, 10.0)
    rates = (finder.run(trainer(0.1), data), finder.min_lr)
    good, slow = (trainer(rate).fit(data, epochs=5)["train_loss"][-1] for rate in rates)
    assert good < 0.5 * slow


def test_the_walk_ends_when_the_loss_grows_out_of_hand() -> None:
    """At four times its best, or at the first that is no number: the rest of the range is not walked."""
    finder = LearningRateFinder(1e-5, 1e10, num_steps=50)
    finder.run(quadratic_trainer(0.1), BOWL)
    assert len(finder.losses) < 50
    assert finder.losses[-1] > 4 * min(finder.losses)
    assert all(loss <= 4 * min(finder.losses) for loss in finder.losses[:-1])


def test_every_parameter_group_walks_along() -> None:
    model = linear()
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "lr": 1.0}]
    trainer = Trainer(model, torch.optim.SGD(groups, lr=1e-3), nn.CrossEntropyLoss())
    finder = LearningRateFinder(1e-3, 1.0, num_steps=20)
    finder.run(trainer, class_batches(64))
    plain = LearningRateFinder(1e-3, 1.0, num_steps=20)
    model = linear()
    plain.run(Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()), class_batches(64))
    assert finder.losses == plain.losses
    assert [group["lr"] for group in trainer.parts["optimizer"].param_groups] == [0.0, 1.0]


def test_batches_are_split_as_the_trainer_splits_them() -> None:
    """A trainer with a ``prepare_batch`` of its own is walked with it."""

    def target_first(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch[1], batch[0]

    model, ((inputs, target),) = linear(), class_batches(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), prepare_batch=target_first)
    expected = LearningRateFinder().run(make_trainer(), [(inputs, target)])
    assert LearningRateFinder().run(trainer, [(target, inputs)]) == expected


def test_a_second_run_forgets_the_first() -> None:
    finder, trainer = LearningRateFinder(num_steps=20), make_trainer()
    first = finder.run(trainer, class_batches(64))
    losses = list(finder.losses)
    assert finder.run(trainer, class_batches(64)) == first == finder.suggestion
    assert finder.losses == losses


def test_the_plot_marks_the_suggestion_on_the_curve() -> None:
    """Loss over learning rate on a logarithmic axis, and an upright line at the suggestion, named in the legend."""
    finder = LearningRateFinder(num_steps=20)
    suggestion = finder.run(make_trainer(), class_batches(64))
    (axes,) = finder.plot().axes
    curve, mark = axes.get_lines()
    np.testing.assert_array_equal(
        np.asarray(curve.get_xydata()), list(zip(finder.learning_rates, finder.losses, strict=True))
    )
    assert np.asarray(mark.get_xdata()).tolist() == [suggestion, suggestion]
    assert axes.get_xscale() == "log"
    legend = axes.get_legend()
    assert legend is not None
    assert f"{suggestion:.2g}" in legend.get_texts()[0].get_text()


def test_a_plot_before_the_run_says_to_run_first() -> None:
    """And not an empty picture with a suggestion of nan."""
    with pytest.raises((ConfigurationError, RuntimeError), match=r"\. [A-Z].*run\("):
        LearningRateFinder().plot()


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e6), (1e-30, 1e-25)])
def test_a_range_in_which_the_loss_never_falls_is_refused(low: float, high: float) -> None:
    """Where each step makes it worse, and where no step makes a difference."""
    finder = LearningRateFinder(low, high, num_steps=20)
    with pytest.raises(DataError, match=rf"^The loss never fell between learning rates {low:g} and .*\. Pass another"):
        finder.run(quadratic_trainer(0.1), BOWL)
    assert math.isnan(finder.suggestion)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_lr": 0.0}, r"^The range is 0\.0 to 10\.0\. Pass 0 < min_lr < max_lr\.$"),
        ({"min_lr": -1.0}, r"^The range is -1\.0 to"),
        ({"min_lr": 1.0, "max_lr": 1.0}, r"^The range is 1\.0 to 1\.0\. Pass"),
        ({"min_lr": 1.0, "max_lr": 0.1}, r"^The range is 1\.0 to 0\.1\. Pass"),
        ({"max_lr": math.inf}, r"to inf\. Pass"),
        ({"min_lr": math.nan}, r"^The range is nan to"),
        ({"min_lr": "1e-6"}, r"^The range is .*1e-6.* to .*\. Pass"),
        ({"num_steps": 9}, r"^num_steps is 9, which is not a count\. Pass a whole number of at least 10\.$"),
        ({"num_steps": 50.0}, r"^num_steps is 50\.0, which is not a count\. Pass"),
        ({"smoothing": 1.0}, r"^smoothing is 1\.0\. Pass a number from 0 to below 1\.$"),
        ({"smoothing": -0.1}, r"^smoothing is -0\.1\. Pass"),
        ({"smoothing": None}, r"^smoothing is None\. Pass"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LearningRateFinder(**arguments)


def test_a_finder_is_run_and_not_attached() -> None:
    """It is no callback; the message says so in its own words for an engine that is no trainer, too."""
    with pytest.raises(ConfigurationError, match=r"LearningRateFinder.*is not a Callback\. [A-Z]"):
        make_trainer(LearningRateFinder())  # type: ignore[arg-type]  # the mistake
    engine = Engine(lambda engine, batch: {"samples": num_samples(batch)}, model=linear())
    with pytest.raises(ConfigurationError, match=r"LearningRateFinder.*Trainer.*\. [A-Z]"):
        LearningRateFinder().run(engine, class_batches(8))


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, "The range is 1.0 to 0.1"),
        ({"num_steps": 1}, "num_steps is 1"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        LearningRateFinder(**settings)


def test_a_trainer_whose_batches_come_in_parts_has_a_learning_rate_too() -> None:
    assert LearningRateFinder(num_steps=20).run(make_trainer(MicroBatch(2)), class_batches(*[8] * 20)) > 0
