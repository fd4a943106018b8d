"""Exported models, loaded back by their own libraries, on batches of other lengths."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import Tensor, nn

from camshaft.callbacks import BestCheckpoint, Export, RunDirectory, WeightAverage
from camshaft.engine import ConfigurationError, Engine, StepEnd, Trainer, at

TRAIN, VAL = class_batches(8, 8, 8), class_batches(8, seed=1)
OLD = "not with an older torch"
FILES = ["model.safetensors", "model.pt2", "model.onnx"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def run_file(path: Path, inputs: dict[str, Tensor] | Tensor) -> Tensor:
    """Let the file's own library compute the output."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        model = net()
        model.load_state_dict(load_file(path))
        out: Tensor = model.eval()(inputs)
        return out
    if path.suffix == ".pt2":
        loaded = torch.export.load(path).module()
        predicted: Tensor = loaded(**inputs) if isinstance(inputs, dict) else loaded(inputs)
        return predicted
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    names = [one.name for one in session.get_inputs()]
    outputs = session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})
    return torch.from_numpy(outputs[0])


@pytest.mark.parametrize("name", FILES)
def test_the_file_computes_what_the_model_does_also_for_other_lengths(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(Export(tmp_path / name), model=net())
    trainer.fit(TRAIN, VAL, epochs=1)
    assert trainer.parts["model"].training
    for length in (8, 3):
        inputs = torch.randn(length, 4, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = trainer.parts["model"].eval()(inputs)
        torch.testing.assert_close(run_file(tmp_path / name, inputs), expected, rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bare_names_are_in_the_run_directory_and_hold_the_best_weights(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    best = BestCheckpoint("val_loss", "max", restore=True)  # the first is best
    make_trainer(run, best, Export("model.safetensors"), model=net()).fit(TRAIN, VAL, epochs=3)
    from safetensors.torch import load_file

    exported, kept = load_file(run.path / "model.safetensors"), best.weights()
    assert all(torch.equal(exported[name], value) for name, value in kept.items())


def test_the_average_is_exported_where_evaluations_use_it(tmp_path: Path) -> None:
    trainer = make_trainer(WeightAverage(decay=0.5), Export(tmp_path / "model.safetensors"), model=net())
    trainer.fit(TRAIN, VAL, epochs=1)
    from safetensors.torch import load_file

    average = trainer.parts["weight_average"].module.state_dict()
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in average.items())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.layer(left - right)
        return out


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_several_inputs_by_name_are_exported(name: str, tmp_path: Path) -> None:
    model = Two()
    batch = ({"left": torch.randn(5, 4), "right": torch.randn(5, 4)}, torch.zeros(5, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Export(tmp_path / name)]).fit([batch], epochs=1)
    with torch.no_grad():
        torch.testing.assert_close(run_file(tmp_path / name, batch[0]), model(**batch[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["signal", "error"])
def test_a_run_that_was_cut_exports_nothing(how: str, tmp_path: Path) -> None:
    trainer = make_trainer(Export(tmp_path / "model.pt2"))

    def cut(event: StepEnd) -> None:
        if how == "error":
            raise ArithmeticError
        event.engine.run.interrupt(signal.SIGTERM)

    trainer.subscribe(StepEnd, cut, when=at(2))
    if how == "error":
        with pytest.raises(ArithmeticError):
            trainer.fit(TRAIN, epochs=1)
    else:
        trainer.fit(TRAIN, epochs=1)
    assert list(tmp_path.iterdir()) == []


class Unexportable(nn.Module):
    """Decides by its data, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if float(x.sum()) > 0 else -out


def test_what_cannot_be_exported_is_told_after_all_else_is_done(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("an earlier file")
    later: list[str] = []
    trainer = make_trainer(Export(tmp_path / "model.pt2"), model=Unexportable())
    trainer.subscribe(StepEnd, lambda event: None)
    from camshaft.engine import FitEnd

    trainer.subscribe(FitEnd, lambda event: later.append(event.reason))
    with refused(ConfigurationError, "model.pt2 could not be exported", "Look at the error above this one"):
        trainer.fit(TRAIN, epochs=1)
    assert later == ["1 epoch done"]
    assert (tmp_path / "model.pt2").read_text() == "an earlier file"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "Export was given no file."),
        (("model.onx",), "Export does not know the format of 'model.onx'"),
        (("model",), "it knows .safetensors, .pt2, .onnx."),
    ],
)
def test_formats_that_are_none_are_refused(files: Any, said: str) -> None:
    with refused(ConfigurationError, said, "Write "):
        Export(*files)


def test_a_directory_that_cannot_be_written_is_refused_before_step_1(below_a_file: Path) -> None:
    trainer: Engine = make_trainer(Export(below_a_file / "model.pt2"))
    with pytest.raises(ConfigurationError, match="Export cannot write"):
        trainer.fit(TRAIN, epochs=1)
    assert trainer.step == 0
