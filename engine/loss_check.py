"""What a loss must be, so that it can be differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from .errors import DataError
from .parts import Parts


def check_loss(loss: object, parts: Parts) -> None:
    """Refuse a loss that is not one number, or cannot be differentiated, with the reason."""
    if not isinstance(loss, Tensor):
        raise DataError(_not_a_tensor(loss))
    if loss.numel() != 1:
        raise DataError(f"The loss has shape {list(loss.shape)}, but it must be one number. Reduce it: loss.mean().")
    if loss.is_complex():
        raise DataError("The loss is complex, which cannot be minimised. Return a real one, such as loss.abs().")
    if not loss.requires_grad and torch.is_grad_enabled():
        _refuse_without_grad(parts)


def _not_a_tensor(loss: object) -> str:
    advice = "Return the tensor itself, without .item() or float()."
    if loss is None:
        advice = "Return a tensor; where the model computes its own loss, the target must be among its inputs."
    elif hasattr(loss, "loss"):
        advice = "Return its part that is the loss: output.loss."
    elif isinstance(loss, Mapping) and "loss" in loss:
        advice = 'Return its part that is the loss: output["loss"].'
    return f"The loss is {loss!r:.80}, of type {type(loss).__name__}, which has no gradient. {advice}"


def _refuse_without_grad(parts: Parts) -> NoReturn:
    trainable = [name for name, p in parts.named_parameters() if p.requires_grad]
    if not trainable:
        frozen = ", ".join(name for name, _ in list(parts.named_parameters())[:5])
        raise DataError(
            f"No parameter of the model is trainable (frozen: {frozen} ...). "
            "Set requires_grad = True on those that should learn."
        )
    raise DataError(
        f"The loss does not depend on any trainable parameter ({', '.join(trainable[:5])} ...). "
        "Look for .detach(), .item(), argmax or torch.no_grad() between the model and the loss."
    )
