"""What is computed in one step."""

from __future__ import annotations

import logging
import math
import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor, nn

from .batch import outline, tree_map
from .debugging import is_own_code
from .events import LossReady
from .finite import is_finite, non_finite_outputs, num_non_finite
from .sharded import local_part
from .weights import unwrap

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("camshaft")

_MOST_SHOWN = 10


class Observation:
    """What is seen of the step that begins: outputs, losses and gradients, and what of them is NaN or infinite.

    Args:
        engine: the engine, which has read the step's batch.
        anomaly: whether torch looks for the operation whose gradient is NaN. It does so from then on.
    """

    def __init__(self, engine: Engine, *, anomaly: bool) -> None:
        self._engine = engine
        self._anomaly_mode = anomaly
        self._observers = ExitStack()
        self._anomaly = ""  # what torch says of it
        self._losses: list[Tensor] = []
        self._recorded: dict[str, float] = {}
        self._non_finite: list[str] = []  # in the order in which it was computed
        self._outputs: list[str] = []
        self._norms: dict[str, float] = {}  # of gradients

    def begin(self) -> None:
        """Look at what is there, and at everything from now on."""
        self._engine.stages["train"].since_mark()
        tensors: list[Tensor] = []
        tree_map(tensors.append, self._engine.batch)
        for number, tensor in enumerate(tensors):
            if wrong := num_non_finite(tensor):
                self._non_finite.append(f"tensor {number} of the batch ({wrong} of {tensor.numel()} numbers)")
        self._look_at_parameters("before")
        self._observe()

    def _look_at_parameters(self, when: str) -> None:
        for name, parameter in self._engine.parts.named_parameters():
            if f"parameter {name}, before the step" not in self._non_finite and not is_finite(parameter):
                self._non_finite.append(f"parameter {name}, {when} the step")

    def _observe(self) -> None:
        """Hear of outputs and gradients; what is switched on stays so, as the process ends after the step."""
        parts = self._engine.parts
        modules = {name: unwrap(module) for name, module in parts.modules().items()}
        if any(_is_compiled(module) for module in parts.modules().values()):
            logger.info("What modules return is not looked at, because that would compile the model in another way.")
        else:
            bare = {"" if name == "model" else name: module for name, module in modules.items()}
            self._outputs = self._observers.enter_context(non_finite_outputs(bare))
        scaler = self._engine.update.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, parameter in parts.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._look_at_gradient(name, scale))
                self._observers.callback(handle.remove)
        if self._anomaly_mode:
            warnings.filterwarnings("always", message="Error detected in")
            self._show_warning, warnings.showwarning = warnings.showwarning, self._keep_warning
            torch.autograd.set_detect_anomaly(True)

    def _look_at_gradient(self, name: str, scale: float) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            values = local_part(gradient.detach())
            values = values.coalesce().values() if values.layout is torch.sparse_coo else values
            self._norms[name] = float(torch.linalg.vector_norm(values.float())) / scale
            if not is_finite(values) and (text := f"the gradient of {name}") not in self._non_finite:
                self._take_over_outputs()
                self._non_finite.append(text)

        return look

    def _take_over_outputs(self) -> None:
        """Put what modules have returned so far into the order of all that was computed."""
        self._non_finite += [f"the output of {one}" for one in self._outputs]
        self._outputs.clear()

    def keep_loss(self, event: LossReady) -> None:
        """Keep a loss."""
        self._losses.append(event.loss.detach())
        self._take_over_outputs()
        if not is_finite(event.loss):
            self._non_finite.append("the loss")

    def _keep_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if str(message).startswith("Error detected in"):
            self._anomaly = str(message).partition("(Triggered internally")[0].rstrip()
        else:
            self._show_warning(message, category, filename, lineno, file, line)

    def end(self, *, is_whole: bool) -> None:
        """Look at nothing more; ``is_whole`` says whether the step has ended without an error, on each rank."""
        if is_whole:
            self._recorded = self._engine.stages["train"].since_mark()
        self._observers.close()
        self._take_over_outputs()
        self._look_at_parameters("after")

    def findings(self, error: BaseException | None) -> list[str]:
        """Return what was seen, a text for each thing.

        Args:
            error: what the step has raised.
        """
        engine = self._engine
        batch = engine.run.training_stage.batch
        found = [f"It is batch {engine.epoch_step} of epoch {engine.epoch}: {outline(batch)}."]
        if self._losses:
            found.append(f"Loss: {', '.join(f'{float(loss):.6g}' for loss in self._losses)}")
        elif self._recorded:  # a step that does not call engine.update
            found.append(f"Recorded: {', '.join(f'{name} {value:.6g}' for name, value in self._recorded.items())}")
        if self._norms:
            largest = sorted(self._norms.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
            lines = [f"{norm:<12.6g} {name}" for name, norm in reversed(largest)]
            found.append(_listed("Norms of gradients, largest first:", lines))
        if self._non_finite:
            found.append(_listed("NaN or infinite, in the order of the computation:", self._non_finite))
        else:
            found.append("Batch, parameters, outputs of modules, loss and gradients are finite.")
        if error is not None and self._anomaly:
            found.append(
                f"Anomaly mode of torch has ended the step: {error}\n{_without_others(self._anomaly)}\n"
                "With --no-anomaly, the step is made whole."
            )
        elif error is not None:
            found.append("The step raised:\n" + "".join(traceback.format_exception(error)).rstrip())
        return found


def _listed(title: str, lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:_MOST_SHOWN]]
    left = len(lines) - len(shown)
    return "\n".join([title, *shown, *([f"  and {left} more"] if left else [])])


def _without_others(traceback: str) -> str:
    """Return a traceback with the frames of the user's own code and the last one."""
    head, *frames = re.split(r"(?m)^(?=  File )", traceback)
    own = [one for one in frames[:-1] if is_own_code(one.split('"')[1])]
    return "".join([head, *own, *frames[-1:]]).rstrip()


def _is_compiled(module: nn.Module) -> bool:
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in module.modules())
