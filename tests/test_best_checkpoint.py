"""The best weights: which they are, what the file holds, and that no failed write costs a good one."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, linear, make_trainer, pairs, refused, regression, run_python, run_script, struck
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import BestCheckpoint, Placement, RunCheckpoint, RunDirectory
from camshaft.engine import (
    Callback,
    CheckpointDirectory,
    CheckpointError,
    ConfigurationError,
    Engine,
    EpochEnd,
    EpochStart,
    StepEnd,
)
from camshaft.engine.checkpoint import load_verified

NAN = math.nan


def epoch_of(file: Path) -> float:
    """Return the epoch whose weights a file of a `run_script` run holds; each weight of them is its number."""
    weights = torch.load(file, weights_only=True)
    (epoch,) = {value for tensor in weights.values() for value in tensor.flatten().tolist()}
    return float(epoch)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("values", "best_epoch"),
    [
        ([1, 3, 2], 2),
        ([1, 2, 3], 3),
        ([3, 2, 1], 1),
        ([2, 2, 2], 1),  # of equal values the earlier is better
        ([NAN, 1, NAN], 2),  # NaN is never best, also not as the first
        ([1, NAN, 2, NAN], 3),
        ([-1, 0.0, -0.0], 2),  # zero is a value
        ([-math.inf, -5, -6], 2),
    ],
)
def test_best_pt_holds_the_weights_of_the_best_epoch(values: list[float], best_epoch: int, tmp_path: Path) -> None:
    """For more-is-better, and for the negated values with less-is-better."""
    best = BestCheckpoint("val_score", "max", tmp_path / "max")
    run_script(values, best)
    run_script([-value for value in values], BestCheckpoint("val_score", "min", tmp_path / "min"))
    assert epoch_of(tmp_path / "max" / "best.pt") == epoch_of(tmp_path / "min" / "best.pt") == best_epoch
    assert best.best is not None
    assert (best.best.epoch, best.best.value, best.path) == (best_epoch, max_of(values), tmp_path / "max" / "best.pt")


def max_of(values: list[float]) -> float:
    return max(value for value in values if not math.isnan(value))


def test_a_run_of_nan_alone_keeps_nothing(tmp_path: Path) -> None:
    """There is no best, no file, and restore=True leaves the last weights in the model."""
    best = BestCheckpoint("val_score", "max", tmp_path, restore=True)
    engine = run_script([NAN, NAN], best)
    assert (best.best, best.path, names(tmp_path)) == (None, None, set())
    assert engine.parts["model"].weight.unique().tolist() == [2.0]
    with pytest.raises(ConfigurationError, match="No best weights exist"):
        best.weights()


def test_top_k_keeps_the_k_best_under_names_that_tell_value_epoch_and_step(tmp_path: Path) -> None:
    """Of ties the earlier stay; what falls out of the k best is removed."""
    best = BestCheckpoint("val_score", "max", tmp_path, top_k=3)
    run_script([0.5, 0.25, 0.5, NAN, 0.25, 0.75, 0.25, 0.5], best)
    assert [(kept.value, kept.epoch) for kept in best.kept] == [(0.75, 6), (0.5, 1), (0.5, 3)]
    files = {6: "val_score=0.75-epoch=6-step=6.pt", 1: "val_score=0.5-epoch=1-step=1.pt"}
    files[3] = "val_score=0.5-epoch=3-step=3.pt"
    assert names(tmp_path) == {"best.pt", *files.values()}
    assert {epoch: epoch_of(tmp_path / file) for epoch, file in files.items()} == {6: 6, 1: 1, 3: 3}
    assert epoch_of(tmp_path / "best.pt") == 6


class AtEachEpoch(Callback):
    """Calls a function with the number of the epoch when it starts, and another when it ends."""

    def __init__(self, start: Callable[[int], object] = int, end: Callable[[int], object] = int) -> None:
        self.start = start
        self.end = end

    def on_epoch_start(self, event: EpochStart) -> None:
        self.start(event.engine.epoch)

    def on_epoch_end(self, event: EpochEnd) -> None:
        self.end(event.engine.epoch)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_after_every_epoch_the_files_are_those_of_the_k_best_so_far(top_k: int, tmp_path: Path) -> None:
    """Over thirty random values with many ties, nothing more and nothing less lies in the directory."""
    dice = random.Random(0)
    values = [dice.choice([1.0, 2.0, 3.0, 4.0, NAN]) for _ in range(30)]
    best = BestCheckpoint("val_score", "min", tmp_path, top_k=top_k)
    num_checked = 0

    def look(epoch: int) -> None:
        nonlocal num_checked
        ranked = sorted((value, number) for number, value in enumerate(values[:epoch], 1) if value == value)[:top_k]
        assert [(kept.value, kept.epoch) for kept in best.kept] == ranked
        files = {kept.file for kept in best.kept} if top_k > 1 else set()
        assert names(tmp_path) == ({"best.pt", *files} if ranked else set())
        num_checked += 1

    run_script(values, best, AtEachEpoch(end=look))
    assert num_checked == 30


def test_the_file_loads_without_this_package(tmp_path: Path) -> None:
    """torch.load(weights_only=True) into a bare model, in an interpreter that never imports camshaft."""
    data = class_batches(16, 5)
    trainer = make_trainer(BestCheckpoint("val_loss", directory=tmp_path))
    trainer.fit(data, data, epochs=3)
    script = (
        "import sys, torch\n"
        "model = torch.nn.Linear(4, 3)\n"
        "model.load_state_dict(torch.load(sys.argv[1], weights_only=True))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)\n"
        "optimizer.load_state_dict(torch.load(sys.argv[2], weights_only=True))\n"
        "assert not [name for name in sys.modules if name.startswith('camshaft')]\n"
        "print(model.weight.flatten().tolist(), optimizer.param_groups[0]['momentum'])"
    )
    run = run_python(script, tmp_path / "best.pt", tmp_path / "best.optimizer.pt")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{trainer.parts['model'].weight.flatten().tolist()} 0.9"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
def test_no_wrapper_leaves_its_prefix_in_the_weights(wrap: Any, tmp_path: Path) -> None:
    """The file is of the bare model, whatever stood around it, and restore=True gets it back in."""
    bare = nn.Linear(2, 1)
    wrapped = wrap(bare)
    assert list(wrapped.state_dict()) != list(bare.state_dict())
    run_script([1.0, 3.0, 2.0], BestCheckpoint("val_score", "max", tmp_path, restore=True), model=wrapped)
    assert list(torch.load(tmp_path / "best.pt", weights_only=True)) == ["weight", "bias"]
    assert epoch_of(tmp_path / "best.pt") == 2
    assert bare.weight.unique().tolist() == [2.0]


def test_data_parallel_trains_and_is_kept(tmp_path: Path) -> None:
    """A model in DataParallel (on the CPU: as it is) goes through a whole fit, and its file fits a bare one."""
    best = BestCheckpoint("val_loss", directory=tmp_path)
    trainer = make_trainer(best, model=nn.DataParallel(linear()))
    trainer.fit(class_batches(16, 5), class_batches(8), epochs=2)
    nn.Linear(4, 3).load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))


def test_the_optimizer_beside_it_is_of_the_same_moment(tmp_path: Path) -> None:
    """best.optimizer.pt continues with exactly the updates that followed the best epoch."""
    data = class_batches(8, 8, 3)
    trainer = make_trainer(BestCheckpoint("train_loss", "max", tmp_path))  # the loss falls: the first stays the best
    moments: list[Tensor] = []
    trainer.subscribe(EpochEnd, lambda event: moments.append(momentum(trainer)))
    trainer.fit(data, data, epochs=3)
    state = torch.load(tmp_path / "best.optimizer.pt", weights_only=True)
    assert torch.equal(state["state"][0]["momentum_buffer"], moments[0])
    assert not torch.equal(moments[0], moments[2])


def momentum(trainer: Engine) -> Tensor:
    buffer: Tensor = trainer.parts["optimizer"].state_dict()["state"][0]["momentum_buffer"]
    return buffer.clone()


def test_without_a_directory_the_best_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written anywhere; weights() has the best, and later training does not reach into it."""
    monkeypatch.chdir(tmp_path)
    best = BestCheckpoint("val_score", "max")
    engine = run_script([1.0, 3.0, 2.0], best)
    assert best.weights()["weight"].unique().tolist() == [2.0]
    assert engine.parts["model"].weight.unique().tolist() == [3.0]
    assert (best.path, list(tmp_path.iterdir())) == (None, [])


@pytest.mark.parametrize("on_disk", [True, False])
def test_restore_ends_the_run_with_the_best_weights(on_disk: bool, tmp_path: Path) -> None:
    """To the bit, from the file or from memory."""
    best = BestCheckpoint("val_score", "max", tmp_path if on_disk else None, restore=True)
    engine = run_script([1.0, 3.0, 2.0], best)
    assert engine.parts["model"].weight.unique().tolist() == [2.0]


def test_restored_weights_reach_the_value_that_was_best(tmp_path: Path) -> None:
    """After a fit, evaluate gives the best validation's values, not the last one's."""
    best = BestCheckpoint("val_acc", directory=tmp_path, restore=True)
    trainer = make_trainer(best, metrics={"acc": MulticlassAccuracy(3, average="micro")}, lr=3.0)
    history = trainer.fit(class_batches(8, 8, 8), class_batches(64, seed=3), epochs=6)
    top = max(history["val_acc"])
    assert top > history["val_acc"][-1]
    assert trainer.evaluate(class_batches(64, seed=3))["acc"] == top


def test_restore_happens_also_when_the_run_failed(tmp_path: Path) -> None:
    """An error in epoch 3 leaves the best of the first two in the model."""
    best = BestCheckpoint("val_loss", directory=tmp_path, restore=True)
    trainer = make_trainer(best)
    trainer.subscribe(StepEnd, lambda event: 1 / 0, when=lambda step: step == 5)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(class_batches(8, 8), class_batches(8), epochs=3)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.parts["model"].state_dict().items())


def test_in_a_run_directory_it_writes_under_checkpoints(tmp_path: Path) -> None:
    """BestCheckpoint without a directory goes where the run is."""
    run, best = RunDirectory(tmp_path), BestCheckpoint("val_score", "max")
    run_script([1.0, 2.0], best, run)
    assert best.path == run.path / "checkpoints" / "best.pt"
    assert epoch_of(best.path) == 2


def test_a_training_value_is_kept_at_the_end_of_its_epoch(tmp_path: Path) -> None:
    """train_* values work without validation data."""
    trainer = make_trainer(BestCheckpoint("train_loss", directory=tmp_path))
    trainer.fit(class_batches(16, 16), epochs=3)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.parts["model"].state_dict().items())


def test_a_validation_in_mid_epoch_keeps_the_weights_of_its_step(tmp_path: Path) -> None:
    """The file's name has the step of the validation, and its weights are those after that step."""
    best = BestCheckpoint("val_loss", "max", tmp_path, top_k=2)  # the loss falls: the first are kept
    trainer = make_trainer(best)
    after: dict[int, Tensor] = {}
    trainer.subscribe(StepEnd, lambda event: after.update({event.engine.step: linear_weight(trainer)}))
    trainer.fit(class_batches(*[16] * 6), class_batches(16), epochs=1, validate_every="2 steps")
    assert [kept.step for kept in best.kept] == [2, 4]
    for kept in best.kept:
        assert torch.equal(torch.load(tmp_path / kept.file, weights_only=True)["weight"], after[kept.step])


def linear_weight(trainer: Engine) -> Tensor:
    weight: Tensor = trainer.parts["model"].state_dict()["weight"]
    return weight.clone()


def test_watching_for_the_best_does_not_change_the_weights(tmp_path: Path) -> None:
    """A run with BestCheckpoint is the run without it, to the bit."""
    watched, plain = make_trainer(BestCheckpoint("val_loss", directory=tmp_path, top_k=2)), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(class_batches(8, 8, 3), class_batches(8), epochs=3)
    assert torch.equal(linear_weight(watched), linear_weight(plain))


def test_state_survives_a_checkpoint_and_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    """A restored one does not take a worse value for the best, and still removes what falls out."""
    first = BestCheckpoint("val_score", "max", tmp_path, top_k=2)
    run_script([5.0, 4.0], first)
    second = BestCheckpoint("val_score", "max", tmp_path, top_k=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run_script([1.0, 4.5], second)
    assert [kept.value for kept in second.kept] == [5.0, 4.5]
    assert names(tmp_path) == {"best.pt", *(kept.file for kept in second.kept)}
    assert epoch_of(tmp_path / "best.pt") == 1


def test_in_memory_state_loads_with_weights_only(tmp_path: Path) -> None:
    """What a run checkpoint would hold of it is tensors and plain values."""
    first, second = BestCheckpoint("val_score", "max"), BestCheckpoint("val_score", "max")
    run_script([1.0, 3.0, 2.0], first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(second.weights()["weight"], first.weights()["weight"])


def test_a_directory_that_cannot_be_written_is_refused_before_step_1(tmp_path: Path) -> None:
    """A file stands where the directory should be; the message names both sides."""
    (tmp_path / "file").write_text("")
    trainer = make_trainer(BestCheckpoint("val_loss", directory=tmp_path / "file" / "best"))
    with pytest.raises(ConfigurationError, match=r"BestCheckpoint cannot write in .*/file/best: Not a directory"):
        trainer.fit(class_batches(8), class_batches(8), epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "2"])
def test_top_k_is_a_whole_number_of_at_least_1(top_k: Any) -> None:
    """Anything else is refused at construction."""
    with pytest.raises(ConfigurationError, match="top_k"):
        BestCheckpoint("val_loss", "min", top_k=top_k)


def test_an_engine_without_a_model_is_refused_when_attached() -> None:
    """There would be nothing to keep."""
    with pytest.raises(ConfigurationError, match="no part is a module"):
        Engine(lambda engine, batch: None, callbacks=[BestCheckpoint("val_loss", "min")])


# What a resumed run finds -----------------------------------------------------------------------------------


def run_and_resume(checkpoints: Path, values: list[float], first: list[Callback], second: list[Callback]) -> Engine:
    """Run all epochs but the last with ``first``, and the last, resumed, with ``second``."""
    run_up_to(len(values) - 1, checkpoints, values, first)
    return run_up_to(len(values), checkpoints, values, second)


def run_up_to(epochs: int, checkpoints: Path, values: list[float], callbacks: list[Callback]) -> Engine:
    """Resume from the newest checkpoint, if there is one; values and weights are those of `run_script`."""
    model = nn.Linear(2, 1)

    def step(engine: Engine, batch: Tensor) -> dict[str, float] | None:
        if not engine.training:
            return {"score": values[engine.epoch - 1]}
        for parameter in model.parameters():
            parameter.data.fill_(engine.epoch)
        return None

    engine = Engine(step, model=model, callbacks=[*callbacks, RunCheckpoint(checkpoints)])
    engine.fit([torch.zeros(1)], [torch.zeros(1)], epochs=epochs, resume="auto")
    return engine


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What BestCheckpoint has warned of."""
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING and "best" in one.msg]


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_run_resumed_in_the_same_directory_ends_with_the_best_weights_of_both(
    top_k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best are of epoch 2, before the interruption; nothing is warned of."""
    first, second = (BestCheckpoint("val_score", "max", tmp_path / "best", top_k=top_k, restore=True) for _ in "12")
    engine = run_and_resume(tmp_path / "run", [1.0, 3.0, 2.0, 2.5], [first], [second])
    assert engine.parts["model"].weight.unique().tolist() == [2.0]
    assert [kept.epoch for kept in second.kept] == [2, 4][:top_k]
    files = {kept.file for kept in second.kept} if top_k > 1 else set()
    assert names(tmp_path / "best") == {"best.pt", *files}
    assert warned(caplog) == []


@pytest.mark.parametrize("values", [[1.0, 3.0, 2.0], [1.0, 3.0, NAN]], ids=["a worse value", "no value"])
@pytest.mark.parametrize("before", ["another directory", "another root"])
def test_a_run_resumed_without_the_best_file_says_so_and_begins_anew(
    before: str, values: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best value after the resumption counts, though the earlier one was better, and the end does not raise."""
    first = [BestCheckpoint("val_score", "max", tmp_path / "1" if before == "another directory" else None)]
    directories = [RunDirectory(tmp_path / name, terminal=False) for name in ("old", "new")]
    second = BestCheckpoint("val_score", "max", restore=True)
    earlier = [directories[0]] if before == "another root" else []
    engine = run_and_resume(tmp_path / "run", values, [*earlier, *first], [directories[1], second])
    checkpoints = directories[1].path / "checkpoints"
    assert warned(caplog) == [
        f"The best weights of the resumed run are not in {checkpoints}. BestCheckpoint starts again."
    ]
    assert engine.parts["model"].weight.unique().tolist() == [3.0]
    assert [kept.epoch for kept in second.kept] == ([] if math.isnan(values[-1]) else [3])
    assert names(checkpoints) == (set() if math.isnan(values[-1]) else {"best.pt"})


def test_a_run_resumed_without_any_directory_cannot_restore_what_is_in_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint holds the best weights only of a run that kept them in memory."""
    second = BestCheckpoint("val_score", "max", restore=True)
    first = BestCheckpoint("val_score", "max", tmp_path / "best")
    engine = run_and_resume(tmp_path / "run", [1.0, 3.0, 2.0], [first], [second])
    assert warned(caplog) == [
        "The best weights of the resumed run are not in its checkpoint. BestCheckpoint starts again."
    ]
    assert engine.parts["model"].weight.unique().tolist() == [3.0]
    assert [kept.epoch for kept in second.kept] == [3]


@pytest.mark.parametrize(("last", "best_epoch"), [(2.0, 2), (4.0, 3)])
def test_best_weights_that_were_kept_in_memory_are_written_where_the_resumed_run_has_a_directory(
    last: float, best_epoch: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are in the checkpoint, so nothing is lost; a better value later takes their place."""
    first, second = BestCheckpoint("val_score", "max"), BestCheckpoint("val_score", "max", tmp_path, restore=True)
    engine = run_and_resume(tmp_path / "run", [1.0, 3.0, last], [first], [second])
    assert epoch_of(tmp_path / "best.pt") == best_epoch
    assert engine.parts["model"].weight.unique().tolist() == [best_epoch]
    assert (second.path, warned(caplog)) == (tmp_path / "best.pt", [])


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_best_that_came_after_the_resumed_state_is_never_taken_for_the_states_best(
    top_k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Epoch 3 was the best and was not in a checkpoint when the run was cut; made again, it is a worse one."""
    first, second, third = (
        BestCheckpoint("val_score", "max", tmp_path / "best", top_k=top_k, restore=True) for _ in range(3)
    )
    run_up_to(2, tmp_path / "run", [1.0, 3.0], [first])
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    run_up_to(3, tmp_path / "run", [1.0, 3.0, 5.0], [second])
    assert epoch_of(tmp_path / "best" / "best.pt") == 3
    engine = run_up_to(4, tmp_path / "cut", [1.0, 3.0, NAN, 2.0], [third])
    found = [3.0, 2.0] if top_k == 2 else [2.0]  # of the k best, those that the lost epoch 3 did not push out
    assert [kept.value for kept in third.kept] == found
    assert epoch_of(tmp_path / "best" / "best.pt") == third.kept[0].epoch
    assert engine.parts["model"].weight.unique().tolist() == [third.kept[0].epoch]
    lost = f"The best weights of the resumed run are not in {tmp_path / 'best'}: best.pt is of another moment."
    assert warned(caplog) == ([] if top_k == 2 else [f"{lost} BestCheckpoint starts again."])


def test_the_optimizers_state_of_another_run_does_not_stay_beside_the_best_weights(tmp_path: Path) -> None:
    (tmp_path / "best.optimizer.pt").touch()
    run_script([1.0], BestCheckpoint("val_score", "max", tmp_path))
    assert names(tmp_path) == {"best.pt"}


@pytest.mark.parametrize("name", ["../x.pt", "/absolute", "", ".", "..", "a/b.pt", "a\\b.pt", "a\0b.pt", 3])
def test_a_file_name_in_a_checkpoint_that_leads_elsewhere_is_refused(name: Any, tmp_path: Path) -> None:
    """A forged checkpoint can neither read, rename nor remove a file outside: nothing of it is taken over."""
    outside = tmp_path / "x.pt"
    outside.write_text("somebody else's")
    best = BestCheckpoint("val_score", "max", tmp_path / "best", top_k=1)
    name = str(outside) if name == "/absolute" else name
    kept = [{"value": value, "epoch": 1, "step": 1, "file": file} for value, file in ((2.0, "a.pt"), (1.0, name))]
    with pytest.raises(CheckpointError, match=r"is not the name of a file in a directory\. Resume from another"):
        best.load_state_dict({"kept": kept, "in_memory": None})
    assert best.kept == []
    run_script([3.0], best)
    assert outside.read_text() == "somebody else's"


def test_a_run_that_resumes_from_a_forged_checkpoint_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    """The files here and elsewhere are as they were."""
    values, checkpoints = [1.0, 2.0, 3.0], CheckpointDirectory(tmp_path / "run")
    first, second = (BestCheckpoint("val_score", "max", tmp_path / "best", restore=True) for _ in "12")
    run_up_to(2, checkpoints.path, values, [first])
    (tmp_path / "x.pt").write_text("somebody else's")
    state = load_verified(checkpoints.files()[0].path)
    state["callbacks"]["BestCheckpoint"]["kept"][0]["file"] = "../x.pt"
    checkpoints.save(state, step=2)
    with pytest.raises(CheckpointError, match=r"kept as '\.\./x\.pt', which is not the name of a file"):
        run_up_to(3, checkpoints.path, values, [second])
    assert (tmp_path / "x.pt").read_text() == "somebody else's"
    assert epoch_of(tmp_path / "best" / "best.pt") == 2


def test_a_metric_with_a_slash_in_its_name_has_files_too_and_is_resumed(tmp_path: Path) -> None:
    """The slash would lead into another directory, so the name of the file has none."""

    def step(engine: Engine, batch: Tensor) -> dict[str, float]:
        return {"score/a": float(engine.epoch)}

    for epochs in (2, 3):
        best = BestCheckpoint("val_score/a", "max", tmp_path / "best", top_k=2)
        engine = Engine(step, model=linear(), callbacks=[best, RunCheckpoint(tmp_path / "run")])
        engine.fit([torch.zeros(1)], [torch.zeros(1)], epochs=epochs, resume="auto")
        first, second = f"val_score_a={epochs}-epoch={epochs}", f"val_score_a={epochs - 1}-epoch={epochs - 1}"
        assert [kept.file.split("-step")[0] for kept in best.kept] == [first, second]
        assert names(tmp_path / "best") == {"best.pt", *(kept.file for kept in best.kept)}


# What the disk may do ---------------------------------------------------------------------------------------

TRACED = """
import json, sys
from pathlib import Path
names = []
def note(event, arguments):
    if event in ("os.rename", "os.remove") and str(arguments[0]).startswith(sys.argv[1]):
        names.append([event, Path(arguments[1] if event == "os.rename" else arguments[0]).name.split("-")[0]])
sys.path.insert(0, sys.argv[2])
from helpers import run_script
from camshaft.callbacks import BestCheckpoint
sys.addaudithook(note)
run_script([1.0, 2.0, 3.0], BestCheckpoint("val_score", "max", sys.argv[1], top_k=2))
print(json.dumps(names))
"""

LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from helpers import run_script
from camshaft.callbacks import BestCheckpoint
from camshaft.engine import Callback
from torch import nn
class Limit(Callback):
    def on_epoch_start(self, event):
        if event.engine.epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
best = BestCheckpoint("val_score", "max", sys.argv[1])
print(run_script([1.0, 2.0, 3.0, 4.0], Limit(), best, model=nn.Linear(5000, 10)).epoch, best.best.epoch)
"""


def test_a_new_file_has_its_name_before_an_old_one_is_removed(tmp_path: Path) -> None:
    """As the operating system was asked for it: the new files take their names, and only then the old one goes."""
    run = run_python(TRACED, tmp_path, Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)[-3:] == [
        ["os.rename", "best.pt"], ["os.rename", "val_score=3"], ["os.remove", "val_score=1"],
    ]  # fmt: skip


def test_a_write_that_fails_halfway_warns_and_the_old_file_still_loads(tmp_path: Path) -> None:
    """From epoch 3 on no file may pass 50 kB, and the weights have 200: the run ends well, best.pt is of epoch 2."""
    run = run_python(LIMITED, tmp_path, Path(__file__).parent)
    assert (run.returncode, run.stdout) == (0, "4 2\n"), run.stderr
    assert run.stderr.count("BestCheckpoint could not write in") == 2
    assert names(tmp_path) == {"best.pt"}
    assert epoch_of(tmp_path / "best.pt") == 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_what_a_killed_run_left_half_written_is_removed_when_the_next_begins(top_k: int, tmp_path: Path) -> None:
    """Killed before each third call: the next run ends with its own files, and no other."""
    left = 0
    for fatal in range(2, 80, 3):
        directory = tmp_path / str(fatal)
        child = os.fork()
        if child == 0:
            with struck(kill_before(fatal)):
                run_script([1.0], BestCheckpoint("val_score", "max", directory, top_k=top_k))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        left += len(list(directory.glob(".best*"))) + len(list(directory.glob(".val_score*")))
        (directory / ".notes.tmp").touch()  # somebody else's
        best = BestCheckpoint("val_score", "max", directory, top_k=top_k)
        run_script([1.0], best)
        files = {kept.file for kept in best.kept} if top_k > 1 else set()
        assert names(directory) == {"best.pt", ".notes.tmp", *files}
    assert left > 5


def kill_before(fatal: int) -> Callable[[str], None]:
    """Kill this process before its n-th call that touches the disk."""
    calls = itertools.count(1)

    def strike(name: str) -> None:
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


class SmallDisk:
    """A real file system of 1 MB, which can be filled up to a rest and emptied again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"

    def fill(self, leave: int = 0) -> None:
        free = shutil.disk_usage(self.path).free - leave
        (self.path / "filler").write_bytes(bytes(free))

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here; the test with a limit on files stands in")
    yield SmallDisk(path)
    subprocess.run(["umount", path], check=True)


def wide() -> nn.Linear:
    """A model whose file has 200 kB."""
    return nn.Linear(5000, 10)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_full_disk_warns_and_training_goes_on_with_the_old_files(
    top_k: int, disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Full from epoch 3 on: all five epochs run, each failed write warns, and what was kept before still loads."""
    best = BestCheckpoint("val_score", "max", disk.best, top_k=top_k)
    full = AtEachEpoch(start=lambda epoch: disk.fill() if epoch == 3 else None)
    engine = run_script([1.0, 2.0, 3.0, 0.0, 4.0], full, best, model=wide())
    assert engine.epoch == 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    expected = f"BestCheckpoint could not write in {disk.best}: No space left on device. "
    assert warnings == [f"{expected}The earlier files stay, and training continues."] * 2
    assert {name.split("-")[0]: epoch_of(disk.best / name) for name in names(disk.best)} == (
        {"best.pt": 2} if top_k == 1 else {"best.pt": 2, "val_score=2": 2, "val_score=1": 1}
    )


def test_when_there_is_room_again_the_next_best_is_written(disk: SmallDisk) -> None:
    """Full in epoch 2 alone: the third is written, restored at the end, and nothing half-written is left."""
    best = BestCheckpoint("val_score", "max", disk.best, restore=True)
    turns: dict[int, Callable[[], None]] = {2: disk.fill, 3: disk.free}
    turning = AtEachEpoch(start=lambda epoch: turns.get(epoch, int)())
    engine = run_script([1.0, 2.0, 3.0, 0.0], turning, best, model=wide())
    assert engine.parts["model"].weight.unique().tolist() == [3.0]
    assert names(disk.best) == {"best.pt"}


def test_best_weights_from_memory_that_find_no_room_stay_in_memory_until_a_better_value(disk: SmallDisk) -> None:
    """A resumed run now has a directory, on a full disk; the next best is written, and takes their place."""
    first, second = BestCheckpoint("val_score", "max"), BestCheckpoint("val_score", "max", disk.best)
    run_script([1.0, 3.0], first)
    disk.best.mkdir()
    disk.fill()
    second.load_state_dict(first.state_dict())
    assert (second.path, second.weights()["weight"].unique().tolist()) == (None, [2.0])
    disk.free()
    run_script([4.0], second)
    assert second.path == disk.best / "best.pt"
    assert second.weights()["weight"].unique().tolist() == [1.0]


def test_a_failed_write_leaves_no_file_that_nobody_keeps(disk: SmallDisk) -> None:
    """Room for one of the two files that a new best needs: neither stays, and the k best are as they were."""
    best = BestCheckpoint("val_score", "max", disk.best, top_k=2)
    room = AtEachEpoch(start=lambda epoch: disk.fill(leave=300_000) if epoch == 2 else None)
    run_script([1.0, 2.0], room, best, model=wide())
    assert epoch_of(disk.best / "best.pt") == 1
    assert names(disk.best) == {"best.pt", *(kept.file for kept in best.kept)}


def test_after_a_failed_write_weights_and_optimizer_are_still_of_one_moment(disk: SmallDisk) -> None:
    """Room for the optimizer's small file but not for the weights: both stay those of epoch 1."""
    big = nn.Sequential(linear())
    big.register_buffer("ballast", torch.zeros(50_000))
    trainer = make_trainer(BestCheckpoint("val_loss", directory=disk.best), model=big)
    (group,) = trainer.parts["optimizer"].param_groups
    trainer.subscribe(EpochStart, lambda event: group.update(lr=0.1 / trainer.epoch))
    trainer.subscribe(EpochStart, lambda event: disk.fill(leave=50_000), when=lambda epoch: epoch == 2)
    history = trainer.fit(class_batches(16, 16), class_batches(16), epochs=2)
    assert history["val_loss"][1] < history["val_loss"][0]
    state = torch.load(disk.best / "best.optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["lr"] == 0.1


@pytest.mark.gpu
def test_weights_from_a_gpu_load_where_there_is_none(tmp_path: Path) -> None:
    """The file's tensors are on the CPU: torch.load without map_location works on any machine."""
    trainer = make_trainer(Placement("cuda"), BestCheckpoint("val_loss", directory=tmp_path))
    trainer.fit(class_batches(16), class_batches(16), epochs=1)
    script = "import sys, torch\nfor path in sys.argv[1:]: torch.load(path, weights_only=True)"
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "best.pt", tmp_path / "best.optimizer.pt"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"monitor": "loss"}, "'loss', which does not name a stage"),
        ({"monitor": "val_acc", "mode": "maximum"}, 'Did you mean "max"?'),
        ({"monitor": "val_acc", "top_k": 0}, "top_k is 0"),
        ({"monitor": "val_acc", "top_k": 2.0}, "top_k is 2.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        BestCheckpoint(**settings)


def test_a_best_checkpoint_without_a_model_is_refused() -> None:
    with refused(ConfigurationError, "no part is a module"):
        Engine(callbacks=[BestCheckpoint("val_loss", "min")])


def test_best_weights_of_another_architecture_are_told_by_their_first_differences(tmp_path: Path) -> None:
    best = BestCheckpoint("val_loss", directory=tmp_path, restore=True)
    trainer = regression(callbacks=[best])
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    trainer.subscribe(EpochEnd, lambda event: torch.save(other.state_dict(), tmp_path / "best.pt"))
    with refused(CheckpointError, "weight is missing", "0.weight is unknown to the model", "and 3 more", "best.pt"):
        trainer.fit(pairs(), pairs(), epochs=1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"garbage" * 99), Path.unlink],
    ids=["truncated", "empty", "garbage", "gone"],
)
def test_best_weights_that_cannot_be_read_are_told_by_their_file(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    best = BestCheckpoint("val_loss", directory=tmp_path)
    regression(callbacks=[best]).fit(pairs(), pairs(), epochs=1)
    damage(tmp_path / "best.pt")
    with refused(CheckpointError, str(tmp_path / "best.pt")):
        best.weights()


def test_best_weights_are_not_there_before_a_value_was_best() -> None:
    with refused(ConfigurationError, "No best weights exist: val_loss has had no value"):
        BestCheckpoint("val_loss", "min").weights()


def test_an_engine_that_has_kept_some_goes_on_from_a_checkpoint_with_fewer(tmp_path: Path) -> None:
    """As when a cell of a notebook is run again: the lists in its handlers' states are those of another moment."""
    best = BestCheckpoint("val_loss", mode="min", directory=tmp_path / "best", top_k=5)
    checkpoint = RunCheckpoint(tmp_path / "run", keep=9)
    trainer = make_trainer(best, checkpoint)
    trainer.fit(class_batches(8, 8), class_batches(8), epochs=3)
    assert len(best.kept) == 3
    trainer.fit(class_batches(8, 8), class_batches(8), epochs=3, resume=checkpoint.checkpoints.files()[-1].path)
    assert trainer.epoch == 3
