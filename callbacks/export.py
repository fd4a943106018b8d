"""A trained model in a file for others: safetensors, torch.export, ONNX."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    FitEnd,
    FitStart,
    RunFailed,
    StepEnd,
    did_you_mean,
    ensure_writable,
    has_shards,
    import_optional,
    is_plain_name,
    prepare_batch,
    tree_map,
    unwrap,
)

logger = logging.getLogger("camshaft")


class Export(Callback):
    """Writes the model when a run ends, loads it back, and compares it on a batch before the file gets its name.

    Attach it after a `BestCheckpoint` with ``restore=True`` to export the best weights. What is exported is what an
    evaluation uses: eval mode, and the average of a `WeightAverage`. A run that failed or was interrupted exports
    nothing.

    Args:
        files: names or paths, of which the end says the format: ``model.safetensors`` (weights), ``model.pt2``
            (``torch.export``) and ``model.onnx``. A bare name is in the run directory, if there is one.
        part: the part that is exported. In the last two formats it is called as the part ``model`` is; the first
            dimension of its inputs may then have another length.

    Raises:
        ConfigurationError: for another format; before the first step, if a directory cannot be written; and at the
            end, after all other handlers, if an export cannot be made, or gives other results.
        MissingPackageError: at attachment, if a format's package is not installed.
    """

    def __init__(self, *files: str | Path, part: str = "model") -> None:
        self.files = [Path(file) for file in files]
        if not files:
            raise ConfigurationError('Export was given no file. Write Export("model.onnx").')
        for file in self.files:
            if file.suffix not in _WRITERS:
                known = ", ".join(_WRITERS)
                raise ConfigurationError(
                    f"Export does not know the format of {str(file)!r}; it knows {known}. "
                    f"{did_you_mean(file.suffix, _WRITERS)}Write a name with one of those ends."
                )
        self.part = part
        self._example: Any = None
        self._failed = False

    def attach(self, engine: Engine) -> None:
        """Look whether there is what it needs."""
        super().attach(engine)
        module = engine.parts.module(self.part, "Export")
        if has_shards(module.parameters()):
            raise ConfigurationError(
                f"Export cannot export {self.part}, which ranks hold in parts. "
                "Load the best weights into a model in one process, and export that."
            )
        for file in self.files:
            for package in _PACKAGES[file.suffix]:
                import_optional(package, package=package.partition(".")[0], used_by="Export")

    def write_into(self, directory: Path) -> None:
        """Write what would not be in the run directory there."""
        self.files = [one if is_plain_name(str(one)) else directory / one.name for one in self.files]

    def on_fit_start(self, event: FitStart) -> None:
        """Find out where to write; keep the inputs of the first step as an example."""
        self._failed, self._example = False, None
        for path in self._paths(event.engine):
            event.engine.ranks.on_main(partial(ensure_writable, path.parent, "Export"))
        self._subscription = event.engine.subscribe(StepEnd, self._keep)

    def on_run_failed(self, event: RunFailed) -> None:
        """Remember that there is nothing to export."""
        self._failed = True

    def on_fit_end(self, event: FitEnd) -> None:
        """Write every file.

        Raises:
            ConfigurationError: if one of them cannot be made, or gives other results.
        """
        engine = event.engine
        self._subscription.cancel()
        if self._failed or engine.run.breaks_off or self._example is None:
            return
        with engine.evaluating():  # on every rank; the first one writes
            for path in self._paths(engine):
                engine.ranks.on_main(partial(self._write, path, unwrap(engine.parts[self.part])))

    def _write(self, path: Path, module: nn.Module) -> None:
        args, kwargs = self._example
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            _WRITERS[path.suffix](module, args, kwargs, temporary)
            os.replace(temporary, path)
            logger.info("Exported the part %s: %s", self.part, path)
        except Exception as error:  # the exporters have kinds of their own
            raise ConfigurationError(
                f"{path} could not be exported ({str(error).strip().partition(chr(10))[0]}). "
                "Look at the error above this one; the model is as it was, and its weights can be saved by torch.save."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _paths(self, engine: Engine) -> list[Path]:
        directory = engine.directory
        return [directory / one if directory and is_plain_name(str(one)) else one for one in self.files]

    def _keep(self, event: StepEnd) -> None:
        self._subscription.cancel()
        engine = event.engine
        inputs = prepare_batch(engine.batch)[0] if engine.stepper is None else engine.stepper.inputs(engine.batch)
        inputs = tree_map(lambda tensor: tensor.detach().clone(), inputs)
        if isinstance(inputs, Mapping):
            self._example = (), dict(inputs)
        else:
            self._example = (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    def __repr__(self) -> str:
        return f"Export({', '.join(repr(str(file)) for file in self.files)})"


def _write_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    safetensors = import_optional("safetensors.torch", used_by="Export")
    safetensors.save_model(module, str(path))
    loaded, own = safetensors.load_file(str(path)), module.state_dict()
    for name, value in loaded.items():  # of tied weights, one is written
        torch.testing.assert_close(value, own[name].cpu(), rtol=0, atol=0, equal_nan=True)


def _write_program(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    program = torch.export.export(module, args, kwargs, dynamic_shapes=_shapes(args, kwargs))
    torch.export.save(program, path)
    _compare(torch.export.load(path).module()(*args, **kwargs), module(*args, **kwargs))


def _write_onnx(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    onnxruntime = import_optional("onnxruntime", used_by="Export")
    program = torch.onnx.export(
        module, args, kwargs=kwargs, dynamo=True, dynamic_shapes=_shapes(args, kwargs), verbose=False
    )
    assert program is not None  # it is what the exporter over torch.export returns
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [one.cpu().numpy() for one in _leaves((args, kwargs))]
    names = [one.name for one in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, given, strict=True)))
    _compare([torch.from_numpy(one) for one in outputs], _leaves(module(*args, **kwargs)))


def _compare(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(_leaves(actual), _leaves(expected), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4, equal_nan=True)


def _leaves(values: Any) -> list[Tensor]:
    """Return the tensors of nested values, in their order."""
    leaves: list[Tensor] = []
    tree_map(leaves.append, values)
    return leaves


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return that the first dimension of each input may be longer or shorter."""
    dim: Any = getattr(torch.export.Dim, "AUTO", None) or torch.export.Dim("batch")  # AUTO: since torch 2.6
    arguments = tree_map(lambda tensor: {0: dim} if tensor.ndim else None, (args, kwargs))
    return arguments[0] if not kwargs else arguments[1]


_Writer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Path], None]
_WRITERS: dict[str, _Writer] = {".safetensors": _write_weights, ".pt2": _write_program, ".onnx": _write_onnx}
_PACKAGES = {".safetensors": ["safetensors.torch"], ".pt2": [], ".onnx": ["onnx", "onnxscript", "onnxruntime"]}
