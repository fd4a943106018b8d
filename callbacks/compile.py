"""Compiled modules."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any

import torch
from torch import nn

from camshaft.engine import Callback, ConfigurationError, Engine, FitStart, did_you_mean


class Compile(Callback):
    """Compiles parts of the run in place, by ``torch.compile``.

    The modules stay the objects they are and their weights keep their names, so that checkpoints load with and without
    this handler. The first batch of each shape and mode waits for the compiler, and results differ from uncompiled
    ones in their last bits. Measure whether it pays: a step of a three-layer network on a CPU became 1.5 times slower.

    Args:
        parts: names of the parts to compile; each must be a module.
        options: what ``torch.compile`` takes: ``mode``, ``dynamic``, ``fullgraph``, ``backend`` or ``options``.

    Raises:
        ConfigurationError: at attachment, for a part that is not a module or is wrapped by ``torch.compile``;
            before the first step, where the device has no compiler.
    """

    def __init__(self, *parts: str, **options: Any) -> None:
        for part in parts:
            if not isinstance(part, str):
                raise ConfigurationError(
                    f"Compile takes names of parts, and got an object of type {type(part).__name__}. "
                    'Write Compile("model").'
                )
        self.parts = parts or ("model",)
        self.options = options

    def attach(self, engine: Engine) -> None:
        """Compile the parts; torch does the work when they are first called."""
        modules = engine.parts.modules()
        for name in self.parts:
            if name not in modules:
                raise ConfigurationError(
                    f'Compile should compile "{name}", but the modules are: {", ".join(modules) or "none"}. '
                    f"{did_you_mean(name, modules)}Name parts of the engine that are modules."
                )
            if isinstance(getattr(modules[name], "_orig_mod", None), nn.Module):
                raise ConfigurationError(f'"{name}" was compiled by torch.compile(model). Leave one of the two out.')
            if any(isinstance(other, Compile) and name in other.parts for other in engine.listeners.callbacks):
                raise ConfigurationError(f'The engine has a Compile of "{name}" already. Attach one.')
        super().attach(engine)
        for name in self.parts:
            try:
                _compile_in_place(modules[name], self.options)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f'"{name}" cannot be compiled: {str(error).rstrip(".")}. '
                    "Pass what torch.compile takes, or leave Compile out."
                ) from error

    def on_fit_start(self, event: FitStart) -> None:
        """Refuse a device without a compiler, which torch would notice in the middle of the first step."""
        if self.options.get("backend", "inductor") == "inductor" and (
            reason := _reason_against(event.engine.parts.device)
        ):
            raise ConfigurationError(f"Compile cannot work here: {reason}")

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Compile({', '.join(map(repr, self.parts))}{options})"


def _compile_in_place(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile a module with ``module.compile()``, and one of torch's own in a way that holds for every torch.

    Torch before 2.14 compiles torch's own code only where other code calls it: it left an ``nn.Sequential`` as it was,
    silently (https://github.com/pytorch/pytorch/issues/150915). Here a function of ours calls it.
    """
    module.compile(**options)
    forward = module.forward
    if not forward.__module__.startswith("torch.nn.modules."):
        return

    def whole(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        module.forward = compiled  # for this call: a copy of the module must not hold it
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            module.__dict__.pop("forward", None)

    whole.__code__ = whole.__code__.replace()  # its own: torch compiles one code at most 8 times
    compiled = torch.compile(whole, **options)
    module._compiled_call_impl = call


def _reason_against(device: torch.device) -> str:
    """Return why torch's own compiler cannot work for a device, and what to do; nothing where it can."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return f"{torch.cuda.get_device_name(device)} is older than it supports. Leave Compile out."
        if importlib.util.find_spec("triton") is None:
            return "triton is missing, which writes code for CUDA. Write: pip install triton."
        return ""
    # Where torch looks, too; on other systems than Linux it looks further.
    compiler = os.environ.get("CXX", "g++")
    if sys.platform == "linux" and shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}. Install g++, or set CXX to the path of another."
    return ""
