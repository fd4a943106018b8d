"""Choosing parameters by name, pattern or predicate, and weight decay for some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import class_batches, refused
from torch import nn

from camshaft.engine import ConfigurationError, Trainer, decay_groups, layer_groups
from camshaft.engine.parameters import is_weight, select_parameters, weights_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Classifier(nn.Module):
    """An encoder and a head, under names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)


ENCODER = ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"]


@pytest.mark.parametrize(
    ("which", "names"),
    [
        (["head.bias"], ["head.bias"]),
        (["encoder.*"], ENCODER),
        (["encoder.?.bias"], ["encoder.0.bias", "encoder.1.bias"]),
        (["*.bias"], ["encoder.0.bias", "encoder.1.bias", "head.bias"]),
        (["encoder.*", "*.bias"], [*ENCODER, "head.bias"]),
        (("head.weight", "head.weight"), ["head.weight"]),
        (lambda name, parameter: parameter.shape[-1] == 4, ["encoder.0.weight"]),
        (is_weight, ["encoder.0.weight", "encoder.1.weight", "head.weight"]),
    ],
)
def test_parameters_are_chosen_by_name_pattern_or_predicate(which: Any, names: list[str]) -> None:
    """Each of them once, and the parameters themselves."""
    model = Classifier()
    chosen = select_parameters(model, which)
    assert list(chosen) == names
    assert all(chosen[name] is model.get_parameter(name) for name in names)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm([2, 4])],
    ids=repr,
)
def test_scales_of_normalisation_layers_are_no_weights(module: nn.Module) -> None:
    """Of whatever shape: a layer norm over several dimensions has scales of as many."""
    model = nn.Sequential(nn.Linear(4, 4), module)
    assert list(weights_of(model)) == ["0.weight"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.Conv2d(1, 2, 3), ["weight"]),
        (nn.Embedding(5, 2), ["weight"]),
        (nn.LSTM(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
    ],
)
def test_weights_are_all_but_biases(module: nn.Module, names: list[str]) -> None:
    assert list(weights_of(module)) == names


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("head.bias", r"^parameters is the string 'head\.bias'\. Pass a list: \['head\.bias'\]\.$"),
        (["head.bais"], r'^No parameter matches "head\.bais"\. Did you mean "head\.bias"\? Parameters: encoder\.0'),
        (["encoder.*", "haed.*"], r'^No parameter matches "haed\.\*"\. '),
        ([], r"^No parameter was chosen\. Pass names or a predicate"),
        (lambda name, parameter: False, r"^No parameter was chosen\. Pass names or a predicate"),
        ([nn.Parameter(torch.zeros(1))], r"parameters.*\. [A-Z]"),
        (None, r"parameters is None.*\. [A-Z]"),
    ],
)
def test_a_choice_of_nothing_is_refused(which: Any, message: str) -> None:
    """A bare string, a misspelt name, an empty list, a predicate that is never true, a parameter."""
    with pytest.raises(ConfigurationError, match=message):
        select_parameters(Classifier(), which)


def test_a_refusal_names_eight_parameters_at_most() -> None:
    """A message about a large model stays readable."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    with pytest.raises(ConfigurationError, match=r"Parameters: 0\.weight, .*, 3\.bias \.\.\.\.$"):
        select_parameters(model, ["zebra"])


def trained(model: nn.Module, groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The weights after 20 steps of SGD with learning rate 1e-2 and momentum 0.9."""
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    Trainer(model, optimizer, nn.CrossEntropyLoss()).fit(class_batches(*[8] * 20), epochs=1)
    return [parameter.detach() for parameter in model.parameters()]


def is_no_bias(name: str, parameter: nn.Parameter) -> bool:
    return not name.endswith("bias")


@pytest.mark.parametrize(
    ("which", "decayed"),
    [((), ["0.weight", "3.weight"]), ((is_no_bias,), ["0.weight", "1.weight", "3.weight"]), ((["0.*"],), ["0.*"])],
)
def test_decay_groups_train_like_groups_made_by_hand(which: tuple[Any, ...], decayed: list[str]) -> None:
    """Weights 1e-5 and biases 0, with SGD at 1e-2 and momentum 0.9: the same weights after 20 steps, to the bit."""
    mine, hand, plain = network(), network(), network()
    chosen = ["0.weight", "0.bias"] if decayed == ["0.*"] else decayed
    groups = [
        {"params": [p for name, p in hand.named_parameters() if name in chosen], "weight_decay": 1e-5},
        {"params": [p for name, p in hand.named_parameters() if name not in chosen], "weight_decay": 0.0},
    ]
    by_hand = trained(hand, groups)
    by_groups = trained(mine, decay_groups(mine, 1e-5, *which))
    without = trained(plain, [{"params": list(plain.parameters())}])
    assert all(torch.equal(a, b) for a, b in zip(by_groups, by_hand, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(by_groups, without, strict=True))


def test_decay_groups_hold_every_parameter_once() -> None:
    """Also those of a model that is all weights, where the second group is empty."""
    models: list[Callable[[], nn.Module]] = [network, lambda: nn.Linear(2, 2, bias=False)]
    for make in models:
        model = make()
        held = [id(parameter) for group in decay_groups(model, 1e-5) for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
        torch.optim.AdamW(decay_groups(model, 1e-5))


@pytest.mark.parametrize("weight_decay", [-1e-5, float("nan"), float("inf"), "1e-5", None])
def test_a_decay_that_is_no_number_of_at_least_zero_is_refused(weight_decay: Any) -> None:
    """Also the string that YAML makes of 1e-5."""
    with pytest.raises(ConfigurationError, match=r"^weight_decay is .*\. Pass a .*number"):
        decay_groups(network(), weight_decay)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"model": nn.Linear(2, 1), "weight_decay": -1e-5}, "weight_decay is -1e-05"),
        ({"model": nn.Linear(2, 1), "weight_decay": 0.1, "which": "weight"}, "Pass a list: ['weight']"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        decay_groups(**settings)


def test_layer_groups_train_like_groups_made_by_hand() -> None:
    mine, hand = network(), network()
    rates = {"0": 0.01 / 4, "1": 0.01 / 2, "3": 0.01}
    groups = [{"params": list(hand.get_submodule(name).parameters()), "lr": rate} for name, rate in rates.items()]
    by_groups = trained(mine, layer_groups(mine, lr=0.01, factor=0.5))
    assert all(torch.equal(a, b) for a, b in zip(by_groups, trained(hand, groups), strict=True))


def test_layers_may_be_named() -> None:
    model = network()
    groups = layer_groups(model, 0.1, 0.1, layers=[["0.*", "1.*"], ["3.*"]])
    assert [len(group["params"]) for group in groups] == [4, 2]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.1])


def test_a_parameter_of_the_model_itself_is_the_last_layers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(1))

    groups = layer_groups(Scaled(), 0.1, 0.5)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(2, 2), (2,)], [(1,)]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.0, "factor": 0.5}, "layer_groups got lr=0.0 and factor=0.5."),
        ({"lr": 0.1, "factor": 1.5}, "layer_groups got lr=0.1 and factor=1.5."),
        ({"lr": 0.1, "factor": "0.5"}, "layer_groups got lr=0.1 and factor='0.5'."),
        ({"lr": 0.1, "factor": 0.5, "layers": [["0.*"], ["*"]]}, "layer_groups has 0.bias, 0.weight in two layers."),
        ({"lr": 0.1, "factor": 0.5, "layers": [["0.*"], ["1.*"]]}, "layer_groups has 3.weight, 3.bias in no layer."),
        ({"lr": 0.1, "factor": 0.5, "layers": [["9.*"]]}, 'No parameter matches "9.*".'),
    ],
)
def test_layers_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with refused(ConfigurationError, said):
        layer_groups(network(), **settings)
