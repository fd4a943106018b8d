"""Plain weights: out of their wrappers, compared, and loaded as a whole or not at all."""

from __future__ import annotations

import pytest
import torch
from helpers import refused
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

from camshaft.engine import CheckpointError, load_weights, unwrap
from camshaft.engine.weights import weight_differences


def test_weights_of_another_architecture_are_refused_with_five_differences() -> None:
    small, large = nn.Sequential(*[nn.Linear(2, 2)] * 3), nn.Sequential(*[nn.Linear(2, 3)] * 4)
    before = [parameter.clone() for parameter in small.parameters()]
    with pytest.raises(CheckpointError, match=r"3.weight is unknown to the model.*and 3 more"):
        load_weights(small, large.state_dict(), "best.pt")
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), before, strict=True))


def test_wrappers_leave_no_trace_in_the_weights() -> None:
    model = nn.Linear(2, 2)
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]  # it wraps a module in a module
    wrapped = nn.DataParallel(compiled)
    assert unwrap(wrapped) is model


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.Identity])
def test_what_is_no_wrapper_is_the_model_itself(wrap: type[nn.Module]) -> None:
    model = wrap()
    assert unwrap(model) is model


def test_weights_reach_the_model_inside_its_wrapper() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    load_weights(nn.DataParallel(model), other.state_dict(), "best.pt")
    assert torch.equal(model.weight, other.weight)


def test_one_shape_that_differs_keeps_the_weights_that_would_fit_out_too() -> None:
    first = nn.Linear(2, 2)
    small, wide = nn.Sequential(first, nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = first.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"1.weight has shape \[3, 2\], the model's has \[1, 2\].*nothing was"):
        load_weights(small, wide.state_dict(), "best.pt")
    assert torch.equal(first.weight, before)


def test_differences_are_missing_and_unknown_names_and_other_shapes() -> None:
    model = nn.Linear(2, 1)
    assert weight_differences(model, model.state_dict()) == []
    assert weight_differences(model, {"weight": torch.zeros(1, 3), "scale": torch.zeros(1)}) == [
        "bias is missing",
        "scale is unknown to the model",
        "weight has shape [1, 3], the model's has [1, 2]",
    ]


@pytest.mark.parametrize("value", [3, "garbage", None, [0.0]])
def test_what_is_not_a_tensor_is_told_by_its_name(value: object) -> None:
    model = nn.Linear(2, 1)
    with refused(CheckpointError, "weight is not a tensor", "nothing was loaded"):
        load_weights(model, model.state_dict() | {"weight": value}, "best.pt")


def in_quantization_aware_training(width: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU()).train()
    model.qconfig = get_default_qat_qconfig("fbgemm")
    prepared: nn.Module = prepare_qat(model)
    return prepared


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao's own
def test_observers_take_the_shapes_that_they_had_when_they_were_saved() -> None:
    """They are empty until they have seen a batch; torch lets them grow when they are loaded."""
    seen, fresh = in_quantization_aware_training(), in_quantization_aware_training()
    seen(torch.ones(3, 2))
    assert {n for n, v in seen.state_dict().items() if v.shape != fresh.state_dict()[n].shape}
    load_weights(fresh, seen.state_dict(), "best.pt")
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in seen.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao's own
def test_observers_of_another_architecture_are_refused_and_nothing_is_loaded() -> None:
    seen, other = in_quantization_aware_training(), in_quantization_aware_training(width=3)
    seen(torch.ones(3, 2))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with refused(CheckpointError, "0.weight has shape [2, 2], the model's has [3, 2]"):
        load_weights(other, seen.state_dict(), "best.pt")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
