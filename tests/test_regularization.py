"""Penalties, against the formula in NumPy; and frozen parameters, to the bit."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import Batch, class_batches, make_trainer, refused, regression
from torch import Tensor, nn

from camshaft.callbacks import Accumulate, FreezeUntil, Penalty, RunCheckpoint
from camshaft.engine import Callback, ConfigurationError, Engine, GradientsReady, LossReady, StepEnd, Trainer, at

Array = npt.NDArray[np.float64]


def network() -> nn.Sequential:
    """In double precision, with weights, biases and the scales of a normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def double_batches(*sizes: int) -> list[Batch]:
    return [(inputs.double(), target) for inputs, target in class_batches(*sizes)]


def gradients(*callbacks: Callback, data: list[Batch]) -> dict[str, Array]:
    """The gradients of the first update, by the name of their parameter."""
    trainer = make_trainer(*callbacks, model=network(), lr=0.0)
    seen: list[dict[str, Array]] = []

    def look(event: GradientsReady) -> None:
        seen.append(
            {
                name: p.grad.numpy().copy()
                for name, p in trainer.parts["model"].named_parameters()
                if p.grad is not None
            }
        )

    trainer.subscribe(GradientsReady, look)
    trainer.fit(data, epochs=1)
    return seen[0]


def arrays(model: nn.Module) -> dict[str, Array]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


WEIGHTS = ["0.weight", "3.weight"]
SELECTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, WEIGHTS),
    ({"parameters": ["3.weight"]}, ["3.weight"]),
    ({"parameters": ["*.bias"]}, ["0.bias", "1.bias", "3.bias"]),
    ({"parameters": lambda name, parameter: parameter.shape == (6, 4)}, ["0.weight"]),
]


@pytest.mark.parametrize(("selection", "names"), SELECTIONS)
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.3), (0.2, 0.0), (0.2, 0.3)])
def test_the_gradients_are_those_of_the_formula(
    l1: float, l2: float, selection: dict[str, Any], names: list[str]
) -> None:
    """L2 is ``l2 * 0.5 * sum(w ** 2)`` and L1 ``l1 * sum(abs(w))``: they add ``l2 * w + l1 * sign(w)``."""
    data = double_batches(8)
    plain, weights = gradients(data=data), arrays(network())
    penalised = gradients(Penalty(l1=l1, l2=l2, **selection), data=data)
    for name, gradient in penalised.items():
        chosen = name in names
        expected = plain[name] + chosen * (l2 * weights[name] + l1 * np.sign(weights[name]))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


def test_the_loss_that_is_differentiated_is_that_of_the_formula() -> None:
    """The value itself, too: a handler after the penalty is offered loss + penalty."""
    data, weights = double_batches(8), arrays(network())
    trainer = make_trainer(Penalty(l1=0.2, l2=0.3), model=network(), lr=0.0)
    losses: list[float] = []
    trainer.subscribe(LossReady, lambda event: losses.append(event.loss.item()))
    (loss,) = trainer.fit(data, epochs=1)["train_loss"]
    penalty = sum(0.2 * np.abs(weights[name]).sum() + 0.3 * 0.5 * (weights[name] ** 2).sum() for name in WEIGHTS)
    assert losses == [pytest.approx(loss + penalty, abs=1e-12)]


def test_the_recorded_loss_is_without_the_penalty() -> None:
    """The train_loss of the first epoch compares with the val_loss, which never had one."""
    data = class_batches(8, 8)
    history = make_trainer(Penalty(l2=10.0), lr=0.0).fit(data, data, epochs=1)
    plain = make_trainer(lr=0.0).fit(data, data, epochs=1)
    assert history["train_loss"] == plain["train_loss"]
    assert history["train_loss"] == pytest.approx(history["val_loss"], rel=1e-6)


def test_a_window_of_batches_is_penalised_once() -> None:
    """Accumulating 8, 8 and 3 samples adds as much as one batch of 19 would."""
    data = double_batches(8, 8, 3)
    inputs, target = (torch.cat(part) for part in zip(*data, strict=True))
    accumulated = gradients(Penalty(l1=0.2, l2=0.3), Accumulate(3), data=data)
    joined = gradients(Penalty(l1=0.2, l2=0.3), data=[(inputs, target)])
    for name, gradient in joined.items():
        np.testing.assert_allclose(accumulated[name], gradient, rtol=0, atol=1e-12)


def test_an_l2_penalty_is_weight_decay_for_plain_sgd() -> None:
    """To rounding, over 20 steps with momentum: the penalty's gradient is the decay's term."""
    penalised, decayed = network(), network()
    for model, decay, callbacks in ((penalised, 0.0, [Penalty(l2=0.01)]), (decayed, 0.01, [])):
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in model.named_parameters() if name in WEIGHTS], "weight_decay": decay},
            {"params": [p for name, p in model.named_parameters() if name not in WEIGHTS]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks).fit(double_batches(*[8] * 20), epochs=1)
    for mine, other in zip(penalised.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_two_penalties_add_up() -> None:
    """One for each of two groups of parameters."""
    data, weights = double_batches(8), arrays(network())
    plain = gradients(data=data)
    both = gradients(Penalty(l2=0.1, parameters=["0.weight"]), Penalty(l2=0.2, parameters=["3.weight"]), data=data)
    np.testing.assert_allclose(both["0.weight"], plain["0.weight"] + 0.1 * weights["0.weight"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(both["3.weight"], plain["3.weight"] + 0.2 * weights["3.weight"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"l1": 0.0, "l2": 0.0}, {"l1": -1e-4}, {"l1": 1.0, "l2": -1.0}, {"l2": float("nan")}, {"l2": float("inf")},
     {"l2": "1e-4"}, {"l1": None}],
)  # fmt: skip
def test_a_penalty_wants_finite_numbers_of_which_one_is_above_zero(arguments: dict[str, Any]) -> None:
    """Also not the string that YAML makes of 1e-4."""
    with pytest.raises(ConfigurationError, match=r"^Penalty got l1=.* and l2=.*\. Pass .*numbers"):
        Penalty(**arguments)


@pytest.mark.parametrize(
    "make", [lambda names: Penalty(l2=0.1, parameters=names), lambda names: FreezeUntil(2, names)]
)
def test_an_unknown_name_is_refused_at_attachment(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'^No parameter matches "3\.wieght"\. Did you mean "3\.weight"\?'):
        make_trainer(make(["3.wieght"]), model=network())


@pytest.mark.parametrize("callback", [Penalty(l2=0.1), FreezeUntil(2, ["*"])])
def test_an_engine_without_a_model_is_refused_at_attachment(callback: Callback) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"^(Penalty|FreezeUntil) needs .* no part is a module\. Write Engine\(step, model=",
    ):
        Engine(lambda engine, batch: None, callbacks=[callback])


@pytest.mark.parametrize(
    "callback", [Penalty(l2=0.1, parameters=["0.weight"]), FreezeUntil(2, ["0.weight"])], ids=repr
)
def test_names_are_those_of_the_bare_model(callback: Callback) -> None:
    """Without the prefix of a data-parallel or compiled wrapper, as in a checkpoint of the weights."""
    make_trainer(callback, model=nn.DataParallel(network()))


@pytest.mark.parametrize("callback", [Penalty, FreezeUntil])
def test_the_class_instead_of_an_instance_is_refused(callback: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the class \w+, not an instance\. Did you forget \(\)\?"):
        make_trainer(callback)


# Freezing ----------------------------------------------------------------------------------------------


def body(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if name.startswith("0.")]


def equal(mine: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def freezing_trainer(callback: Callback, optimizer: type[torch.optim.Optimizer], **settings: Any) -> Engine:
    model = network()
    return Trainer(model, optimizer(model.parameters(), **settings), nn.CrossEntropyLoss(), callbacks=[callback])


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_frozen_parameters_are_bit_identical_until_their_epoch(optimizer: Any, settings: dict[str, Any]) -> None:
    """Neither momentum nor weight decay moves them; from epoch 3 on they learn; the others learn all along."""
    trainer = freezing_trainer(FreezeUntil(3, ["0.*"]), optimizer, **settings)
    bodies, heads = [body(trainer.parts["model"])], [trainer.parts["model"].get_parameter("3.weight").detach().clone()]

    def keep(event: StepEnd) -> None:
        bodies.append(body(trainer.parts["model"]))
        heads.append(trainer.parts["model"].get_parameter("3.weight").detach().clone())

    trainer.subscribe(StepEnd, keep)
    trainer.fit(double_batches(8, 8), epochs=4)
    still = [equal(before, after) for before, after in pairwise(bodies)]
    assert still == [True, True, True, True, False, False, False, False]
    assert not any(torch.equal(before, after) for before, after in pairwise(heads))


def test_the_run_is_that_of_a_loop_that_freezes_by_hand() -> None:
    """Frozen for one epoch, then thawed, with the momentum that begins there: the same weights to the bit."""
    trainer = freezing_trainer(FreezeUntil(2, ["0.*"]), torch.optim.SGD, lr=0.1, momentum=0.9)
    trainer.fit(double_batches(8, 8), epochs=3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in (1, 2, 3):
        model[0].requires_grad_(epoch >= 2)
        for inputs, target in double_batches(8, 8):
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equal(list(trainer.parts["model"].parameters()), list(model.parameters()))


def test_a_gradient_from_before_the_run_does_not_move_what_is_frozen() -> None:
    """Left over from a trial of the model, it would be a step's gradient for ever, as no backward renews it."""

    def step(engine: Engine, batch: Batch) -> None:
        engine.update(nn.functional.cross_entropy(model(batch[0]), batch[1]))

    model, data = network(), double_batches(8)
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), body(model)
    Engine(step, model=model, optimizer=optimizer, callbacks=[FreezeUntil(2, ["0.*"])]).fit(data, epochs=1)
    assert equal(body(model), before)


def test_a_second_fit_goes_on_frozen_or_thawed() -> None:
    """Frozen until epoch 3 over three fits of one epoch each: only the third moves the body."""
    trainer = freezing_trainer(FreezeUntil(3, ["0.*"]), torch.optim.SGD, lr=0.1)
    bodies = [body(trainer.parts["model"])]
    for _ in range(3):
        trainer.fit(double_batches(8), epochs=1)
        bodies.append(body(trainer.parts["model"]))
    assert [equal(before, after) for before, after in pairwise(bodies)] == [True, True, False]


def test_what_is_to_be_thawed_must_be_in_the_optimizer() -> None:
    """Or it would stay frozen for ever: an optimizer over ``requires_grad`` parameters alone is the usual cause."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigurationError, match=r"^FreezeUntil.*optimizer.*\. [A-Z]"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[FreezeUntil(2, ["0.*"])])


@pytest.mark.parametrize("epoch", [0, 1, -3, 2.0, "2", True])
def test_an_epoch_that_cannot_be_is_refused_when_made(epoch: Any) -> None:
    """From epoch 1 on they would never have been frozen."""
    with pytest.raises(ConfigurationError, match=r"^FreezeUntil's epoch is .*\. Pass a whole number of at least 2\.$"):
        FreezeUntil(epoch, ["0.*"])


@pytest.mark.parametrize(
    ("make", "settings", "phrase"),
    [
        (Penalty, {}, "l1=0.0 and l2=0.0"),
        (Penalty, {"l1": -1.0}, "l1=-1.0 and l2=0.0"),
        (Penalty, {"l2": math.nan}, "l2=nan"),
        (Penalty, {"l2": math.inf}, "l2=inf"),
        (FreezeUntil, {"epoch": 1, "parameters": ["weight"]}, "epoch is 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)


@pytest.mark.parametrize("make", [partial(Penalty, l2=0.1), partial(FreezeUntil, 2)])
@pytest.mark.parametrize(
    ("parameters", "phrase"),
    [
        (["wieght"], 'No parameter matches "wieght". Did you mean "weight"? Parameters: weight, bias.'),
        (["encoder.*"], 'No parameter matches "encoder.*". Parameters: weight, bias.'),
        ("weight", "parameters is the string 'weight'. Pass a list: ['weight']."),
        (lambda name, parameter: False, "No parameter was chosen"),
    ],
)
def test_parameters_that_the_model_does_not_have_are_told_at_attachment(
    make: Callable[..., Callback], parameters: object, phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        regression(callbacks=[make(parameters=parameters)])


# Thawed layer by layer, and parts by name ----------------------------------------------------------------


def norm_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    ).double()


STAGES = {2: ["2.*", "3.*"], 3: ["0.*", "1.*"]}


def thawing_trainer(*callbacks: Callback, batch_norm: bool = True) -> Engine:
    model = norm_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freeze = FreezeUntil(STAGES, batch_norm=batch_norm)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[freeze, *callbacks], seed=0)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_layers_thaw_one_after_the_other_as_by_hand(batch_norm: bool) -> None:
    """Also through validations, which put every layer into eval mode for their length; statistics included."""
    trainer = thawing_trainer(batch_norm=batch_norm)
    trainer.fit(double_batches(8, 8), double_batches(8), epochs=4)
    model = norm_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in (1, 2, 3, 4):
        for first, places in ((2, (2, 3)), (3, (0, 1))):
            for place in places:
                model[place].requires_grad_(epoch >= first)
                if batch_norm:
                    model[place].train(epoch >= first)
        for inputs, target in double_batches(8, 8):
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = trainer.parts["model"].state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(layer.training for layer in trainer.parts["model"])  # as it was before the run


@pytest.mark.parametrize("cut_at", [1, 3, 5])
def test_a_run_that_is_cut_while_layers_are_frozen_is_resumed_to_the_bit(cut_at: int, tmp_path: Path) -> None:
    whole = thawing_trainer()
    whole.fit(double_batches(8, 8), epochs=4)
    cut = thawing_trainer(RunCheckpoint(tmp_path))
    cut.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut_at))
    cut.fit(double_batches(8, 8), epochs=4)
    resumed = thawing_trainer(RunCheckpoint(tmp_path))
    resumed.fit(double_batches(8, 8), epochs=4, resume="auto")
    ours, theirs = resumed.parts["model"].state_dict(), whole.parts["model"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3,), "FreezeUntil got epoch=3 and parameters=None."),
        (({3: ["0.*"]}, ["0.*"]), "FreezeUntil got epoch={3: ['0.*']} and parameters=['0.*']."),
        (({},), "FreezeUntil got epoch={} and parameters=None."),
        (({1: ["0.*"]},), "FreezeUntil's epoch is 1"),
        (({2: ["0.*"], 3: ["0.bias"]},), "FreezeUntil has two epochs for 0.bias."),
    ],
)
def test_epochs_that_cannot_be_are_refused(arguments: Any, said: str) -> None:
    with refused(ConfigurationError, said):
        make_trainer(FreezeUntil(*arguments), model=network())


def test_a_part_that_is_not_the_model_is_frozen_or_kept_small() -> None:
    def step(engine: Engine, batch: Tensor) -> None:
        engine.update(engine.parts["critic"](engine.parts["generator"](batch)).mean())

    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1)
    before = generator.weight.detach().clone(), critic.weight.detach().clone()
    callbacks = [FreezeUntil(2, ["*"], part="generator"), Penalty(l2=0.1, part="critic")]
    engine = Engine(step, generator=generator, critic=critic, optimizer=optimizer, callbacks=callbacks)
    engine.fit([torch.zeros(3, 2)], epochs=1)
    assert torch.equal(generator.weight, before[0])
    bias = generator.bias.detach()
    expected = before[1] - 0.1 * (bias + 0.1 * before[1])  # the critic's input is the generator's bias
    torch.testing.assert_close(critic.weight.detach(), expected)


@pytest.mark.parametrize("make", [lambda part: Penalty(l2=0.1, part=part), lambda p: FreezeUntil(2, ["*"], part=p)])
def test_a_part_that_does_not_exist_is_refused_with_a_guess(make: Any) -> None:
    with refused(ConfigurationError, 'Did you mean "model"?'):
        make_trainer(make("modle"))
