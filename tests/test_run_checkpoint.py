"""Killed anywhere, nothing lost: what is resumed ends as what ran through."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import class_batches, make_trainer, refused, struck
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import Accuracy, MulticlassAUROC
from torchmetrics.wrappers import LambdaInputTransformer

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    EarlyStopping,
    FreezeUntil,
    MixedPrecision,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import (
    Callback,
    CheckpointDirectory,
    CheckpointError,
    ConfigurationError,
    Engine,
    EpochStart,
    FitEnd,
    Settled,
    StepEnd,
    Trainer,
    ValidationStepEnd,
)
from camshaft.engine.rng import seed_everything


class Augmented(Dataset[Any]):
    """20 samples; reading one draws from all three global generators."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(20, 4, generator=generator)
        self.target = torch.randint(0, 3, (20,), generator=generator)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return self.inputs[index] + 0.1 * noise, self.target[index]


def build(directory: Path | None, setting: str, seed: int | None, **checkpoint: Any) -> Engine:
    """A model with dropout and momentum; ``full`` adds what else has a state."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    callbacks: list[Callback] = [EarlyStopping("val_loss", patience=50), BestCheckpoint("val_loss", restore=False)]
    if setting == "full":
        callbacks += [
            Accumulate(batches=2),
            ClipGradients(norm=0.5),
            WeightAverage(decay=0.8),
            Schedule(warmup_cosine(optimizer, warmup=2, total=9), per="update"),
            MixedPrecision("bf16"),
            FreezeUntil(2, ["0.*"]),
        ]
    if directory is not None:
        callbacks.append(RunCheckpoint(directory, **checkpoint))
    metrics = {
        "acc": Accuracy(task="multiclass", num_classes=3),
        "both": MetricCollection([MulticlassAUROC(3, thresholds=None), Accuracy(task="multiclass", num_classes=3)]),
        "wrapped": LambdaInputTransformer(MulticlassAUROC(3, thresholds=None), transform_pred=lambda output: output),
        "mean": lambda output, target: output.mean(),
    }
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks, seed=seed)


def run(trainer: Engine, workers: int = 0, **settings: Any) -> Engine:
    seed_everything(3)
    train = DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=workers)
    val = DataLoader(TensorDataset(torch.eye(4).repeat(2, 1)[:6], torch.arange(6) % 3), batch_size=2)
    trainer.fit(train, val, **{"epochs": 2, "validate_every": "2 steps", **settings})
    return trainer


def assert_same(resumed: Engine, through: Engine) -> None:
    """Weights, averages, optimizer, history and counters are equal to the bit."""
    for name, part in through.parts.items():
        if hasattr(part, "state_dict"):
            assert_equal(resumed.parts[name].state_dict(), part.state_dict(), name)
    assert_equal(resumed.history.rows, through.history.rows, "history")
    assert_equal(resumed.history.validations, through.history.validations, "validations")
    assert (resumed.step, resumed.num_updates) == (through.step, through.num_updates)


def assert_equal(ours: Any, theirs: Any, place: str) -> None:
    if isinstance(ours, Tensor) and ours.is_sparse:
        assert ours.is_coalesced() == theirs.is_coalesced(), place
        assert_equal([ours._indices(), ours._values()], [theirs._indices(), theirs._values()], place)
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{place}[{number}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), place


def interrupt_at(trainer: Engine, step: int, moment: type[Any] = StepEnd) -> Engine:
    def act(event: Any) -> None:
        if trainer.step == step:
            trainer.run.interrupt(signal.SIGTERM)

    trainer.subscribe(moment, act)
    return trainer


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def fail_each(name: str, make_error: Callable[[], Exception] = no_space) -> Callable[[str], None]:
    """A disk on which every call of this name fails."""

    def strike(called: str) -> None:
        if called == name:
            raise make_error()

    return strike


SETTINGS = [("plain", None, 0), ("full", None, 0), ("full", 11, 0), ("full", 11, 2)]


@pytest.mark.parametrize(("setting", "seed", "workers"), SETTINGS)
@pytest.mark.parametrize("moment", [StepEnd, ValidationStepEnd], ids=lambda event: event.__name__)
def test_interrupted_after_every_step_and_resumed_a_run_ends_as_if_it_had_not_been(
    tmp_path: Path, setting: str, seed: int | None, workers: int, moment: type[Any]
) -> None:
    through = run(build(None, setting, seed), workers)
    assert through.step == 14
    # Workers take their time: every third step then, each step without them.
    for step in range(1, 14, 3 if workers else 1):
        if moment is ValidationStepEnd and step % 2:
            continue
        directory = tmp_path / str(step)
        first = run(interrupt_at(build(directory, setting, seed), step, moment), workers)
        assert (first.step, first.history.exit_code) == (step, 143)
        resumed = run(build(directory, setting, seed), workers, resume="auto")
        assert_same(resumed, through)


def test_a_run_may_be_cut_twice_in_one_epoch_and_resumed_with_another_number_of_workers(tmp_path: Path) -> None:
    through = run(build(None, "full", 11))
    run(interrupt_at(build(tmp_path, "full", 11), 2), workers=2)
    run(interrupt_at(build(tmp_path, "full", 11), 5), workers=0, resume="auto")
    assert_same(run(build(tmp_path, "full", 11), workers=1, resume="auto"), through)


def test_a_plain_loader_with_workers_resumes_in_the_same_order(tmp_path: Path) -> None:
    """Without random augmentation that is bit-identical."""

    def fit(trainer: Engine, resume: str | None = None) -> Engine:
        torch.manual_seed(3)
        data = TensorDataset(Augmented().inputs, Augmented().target)
        train = DataLoader(data, batch_size=3, shuffle=True, num_workers=2)
        trainer.fit(train, train, epochs=2, resume=resume)
        return trainer

    through = fit(build(None, "plain", None))
    fit(interrupt_at(build(tmp_path, "plain", None), 5))
    assert_same(fit(build(tmp_path, "plain", None), resume="auto"), through)


def test_a_periodic_checkpoint_of_a_run_that_died_resumes_too(tmp_path: Path) -> None:
    """The error comes three steps after the last save, and those steps are made again."""
    through = run(build(None, "full", None))
    dying = build(tmp_path, "full", None, every_steps=4, keep=2)

    def die(event: StepEnd) -> None:
        if event.engine.step == 11:
            raise MemoryError

    dying.subscribe(StepEnd, die)
    with pytest.raises(MemoryError):
        run(dying)
    assert [file.step for file in RunCheckpoint(tmp_path).checkpoints.files()] == [8, 4]
    assert_same(run(build(tmp_path, "full", None), resume="auto"), through)


def test_epochs_count_from_where_the_resumed_run_began_and_more_may_be_asked(tmp_path: Path) -> None:
    through = run(build(None, "plain", None), epochs=4)
    run(build(tmp_path, "plain", None), epochs=2)
    assert_same(run(build(tmp_path, "plain", None), epochs=4, resume="auto"), through)


def test_a_finished_run_says_so_and_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(build(tmp_path, "plain", None))
    with caplog.at_level(logging.INFO):
        again = run(build(tmp_path, "plain", None), resume="auto")
    assert again.step == 14
    assert "The run is finished" in caplog.text
    assert "Pass more epochs or steps to continue" in caplog.text


@pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets")  # epoch 2 is one batch
def test_a_run_that_stopped_early_stays_stopped_unless_more_is_asked(tmp_path: Path) -> None:
    stopping = build(tmp_path, "plain", None)
    stopping.subscribe(EpochStart, lambda event: event.engine.stop("enough") if event.engine.epoch == 2 else None)
    run(stopping, epochs=3)
    again = run(build(tmp_path, "plain", None), epochs=3, resume="auto")
    assert (again.step, again.history.reason) == (stopping.step, "enough")
    assert run(build(tmp_path, "plain", None), epochs=4, resume="auto").epoch == 4


def test_settings_are_those_of_the_new_run_and_state_that_of_the_old(tmp_path: Path) -> None:
    first = build(tmp_path, "plain", None)
    run(first)
    second = build(tmp_path, "plain", None)
    stopping = next(c for c in second.listeners.callbacks if isinstance(c, EarlyStopping))
    stopping.patience = 20
    run(second, resume="auto")
    assert stopping.patience == 20
    assert stopping.best == next(c for c in first.listeners.callbacks if isinstance(c, EarlyStopping)).best
    assert math.isfinite(stopping.best)


def test_handlers_whose_state_is_missing_or_extra_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(build(tmp_path, "plain", None))
    model = build(None, "plain", None).parts["model"]
    other = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.02),
        nn.CrossEntropyLoss(),
        callbacks=[RunCheckpoint(tmp_path), ClipGradients(norm=1.0)],
    )
    with caplog.at_level(logging.WARNING):
        run(other, resume="auto", epochs=3)
    assert "There is no state of: ClipGradients." in caplog.text
    assert "not attached now: BestCheckpoint, EarlyStopping." in caplog.text


def test_another_architecture_is_refused_with_its_differences_and_nothing_is_loaded(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None))
    model = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3))
    before = [parameter.clone() for parameter in model.parameters()]
    other = Trainer(
        model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), callbacks=[RunCheckpoint(tmp_path)]
    )
    with pytest.raises(CheckpointError, match=r"model: 0.weight has shape \[8, 4\], the model's has \[9, 4\]"):
        run(other, resume="auto")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_another_seed_is_refused(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", 11))
    with pytest.raises(CheckpointError, match=r"seed=11.*seed=12.*Pass the same seed"):
        run(build(tmp_path, "plain", 12), resume="auto")


def test_auto_starts_afresh_and_says_so_where_a_path_must_exist(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(build(tmp_path / "new", "plain", None), resume="auto")
    assert "No checkpoint yet: the run starts from the beginning." in caplog.text
    with pytest.raises(ConfigurationError, match="There is no checkpoint at"):
        run(build(tmp_path / "other", "plain", None), resume=str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="nowhere to look"):
        run(build(None, "plain", None), resume="auto")


def test_a_directory_of_an_earlier_run_is_not_written_over(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None))
    fresh = build(tmp_path, "plain", None)
    with pytest.raises(ConfigurationError, match="holds checkpoints of an earlier run"):
        run(fresh)
    assert fresh.step == 0


def test_the_newest_are_kept_and_every_nth_for_ever(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None, every_steps=2, keep=2, keep_every=3))
    assert [file.number for file in RunCheckpoint(tmp_path).checkpoints.files()] == [8, 7, 6, 3]


def test_everything_saved_loads_as_weights_only_and_an_unsafe_value_is_refused_by_its_key(tmp_path: Path) -> None:
    trainer = build(tmp_path, "full", 11)
    run(trainer)
    for file in RunCheckpoint(tmp_path).checkpoints.files():
        torch.load(file.path, weights_only=True)

    class Unsafe(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"score": np.float64(0.5)}

    trainer = build(tmp_path / "unsafe", "plain", None)
    trainer.attach(Unsafe())
    with pytest.raises(CheckpointError, match=r"state\['callbacks'\]\['Unsafe'\]\['score'\] is of type numpy.float64"):
        run(trainer)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_found_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    through = run(build(None, "plain", None))
    run(interrupt_at(build(tmp_path, "plain", None, every_steps=4), 10))
    newest, _ = RunCheckpoint(tmp_path).checkpoints.files()
    content = bytearray(newest.path.read_bytes())
    content[len(content) // 2] ^= 1
    newest.path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:1000]), "empty": b""}[damage])
    resumed = run(build(tmp_path, "plain", None), resume="auto")
    assert f"{newest.path} is damaged: the SHA-256 of its" in caplog.text
    assert_same(resumed, through)


def test_if_every_file_is_damaged_that_is_an_error(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None))
    for file in RunCheckpoint(tmp_path).checkpoints.files():
        file.path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="Every checkpoint in"):
        run(build(tmp_path, "plain", None), resume="auto")


def test_where_only_damaged_files_are_left_auto_refuses_again_and_never_begins_anew(tmp_path: Path) -> None:
    """Also when each was put aside by the resume before."""
    run(build(tmp_path, "plain", None))
    for file in RunCheckpoint(tmp_path).checkpoints.files():
        file.path.write_bytes(b"garbage")
    for resume in ("auto", "auto", str(tmp_path)):
        trainer = build(tmp_path, "plain", None)
        with refused(CheckpointError, f"Every checkpoint in {tmp_path} is damaged", ".damaged"):
            run(trainer, resume=resume)
        assert trainer.step == 0


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


READ_ERRORS = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), OSError("lost")]


@pytest.mark.parametrize("call", ["read", "listdir"])
@pytest.mark.parametrize("error", READ_ERRORS, ids=str)
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_damaged(tmp_path: Path, call: str, error: OSError) -> None:
    """It is named with the cause, nothing is renamed, and the next try resumes from it."""
    through = run(build(None, "plain", None))
    run(interrupt_at(build(tmp_path, "plain", None, every_steps=4), 10))
    before = names(tmp_path)
    newest = RunCheckpoint(tmp_path).checkpoints.files()[0].path
    named = newest if call == "read" else tmp_path
    cut = build(tmp_path, "plain", None)
    with (
        struck(fail_each(call, lambda: error)),
        refused(CheckpointError, f"{named} cannot be read: {error.strerror or error}."),
    ):
        run(cut, resume="auto")
    assert (cut.step, names(tmp_path)) == (0, before)
    assert_same(run(build(tmp_path, "plain", None), resume="auto"), through)


def test_a_lack_of_memory_while_a_checkpoint_is_read_is_raised_as_it_is(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None))
    before = names(tmp_path)
    with struck(fail_each("read", MemoryError)), pytest.raises(MemoryError):
        run(build(tmp_path, "plain", None), resume="auto")
    assert names(tmp_path) == before


def test_a_complete_file_that_torch_cannot_load_is_not_damaged(tmp_path: Path) -> None:
    """Its digest is right: another version may read it."""
    run(build(tmp_path, "plain", None))
    digest = hashlib.sha256(b"of another version").hexdigest()[:32]
    (tmp_path / f"run-000009-step-20-{digest}.pt").write_bytes(b"of another version")
    before = names(tmp_path)
    with refused(CheckpointError, f"run-000009-step-20-{digest}.pt is complete but cannot be loaded"):
        run(build(tmp_path, "plain", None), resume="auto")
    assert names(tmp_path) == before


def test_a_run_resumed_in_mid_epoch_has_not_done_that_epoch_yet(tmp_path: Path) -> None:
    """So a stop in it, the last of ``min_epochs``, does not count, as in the run that was never interrupted."""

    def build_stubborn() -> Engine:
        trainer = build(tmp_path, "plain", None)
        trainer.subscribe(StepEnd, lambda event: trainer.stop("early") if trainer.epoch == 3 else None)
        return trainer

    run(interrupt_at(build_stubborn(), 16), epochs=5, min_epochs=3)
    resumed = run(build_stubborn(), epochs=5, min_epochs=3, resume="auto")
    assert (resumed.epoch, resumed.step) == (5, 35)


def test_a_fit_after_a_resumed_one_reads_its_data_from_the_start(tmp_path: Path) -> None:
    """Also if the resumed run had nothing left to read: it was cut after its last step."""
    run(interrupt_at(build(tmp_path, "plain", None), 5), epochs=None, max_steps=5)
    trainer = build(tmp_path, "plain", None)
    run(trainer, epochs=None, max_steps=5, resume="auto")
    steps = trainer.step
    run(trainer, epochs=1)
    assert (steps, trainer.step) == (5, 12)


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    run(build(tmp_path, "plain", None))
    files = RunCheckpoint(tmp_path).checkpoints
    state = torch.load(files.files()[0].path, weights_only=True) | {"format": 99}
    files.save(state, 14)
    with pytest.raises(CheckpointError, match="format 99, and this camshaft reads formats up to 7"):
        run(build(tmp_path, "plain", None), resume="auto")


def test_stale_temporary_files_are_swept(tmp_path: Path) -> None:
    stale = tmp_path / ".run-000001-step-3.123.tmp"
    stale.write_bytes(b"half")
    run(build(tmp_path, "plain", None))
    assert not stale.exists()


def test_writing_in_the_background_saves_the_same(tmp_path: Path) -> None:
    through = run(build(None, "full", None))
    run(interrupt_at(build(tmp_path, "full", None, every_steps=1, background=True), 9))
    assert_same(run(build(tmp_path, "full", None, background=True), resume="auto"), through)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batches", [2, 3])
def test_a_window_of_sparse_gradients_is_saved_and_resumed_to_the_bit(
    tmp_path: Path, background: bool, batches: int
) -> None:
    """After each step of an epoch that ends in the middle of a window."""
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(0, 50, (4, 6), generator=generator) for _ in range(5)]
    data = [(one, one[:, 0] % 3) for one in words]

    def make(directory: Path | None) -> Engine:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        callbacks: list[Callback] = [Accumulate(batches=batches)]
        if directory is not None:
            callbacks.append(RunCheckpoint(directory, every_steps=1, background=background))
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks)

    through = make(None)
    through.fit(data, epochs=1)
    for step in range(1, 5):
        interrupt_at(cut := make(tmp_path / str(step)), step).fit(data, epochs=1)
        gradient = next(cut.parts["model"].parameters()).grad
        assert (gradient is None) if step % batches == 0 else gradient.layout is torch.sparse_coo
        resumed = make(tmp_path / str(step))
        resumed.fit(data, epochs=1, resume="auto")
        assert_same(resumed, through)


def test_the_script_style_resumes_in_mid_epoch(tmp_path: Path) -> None:
    def script(engine: Engine, resume: str | None = None) -> list[Tensor]:
        seed_everything(3)
        model, optimizer = engine.parts["model"], engine.parts["optimizer"]
        train = DataLoader(Augmented(), batch_size=3, shuffle=True)
        for _ in engine.epochs(2, resume=resume):
            for inputs, target in engine.train(train):
                loss = nn.functional.cross_entropy(model(inputs), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                engine.record(loss=loss)
        return [parameter.detach().clone() for parameter in model.parameters()]

    def make(directory: Path | None) -> Engine:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        callbacks = [] if directory is None else [RunCheckpoint(directory)]
        return Engine(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), callbacks=callbacks)

    through = script(make(None))
    cut = make(tmp_path)
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGINT) if cut.step == 9 else None)
    script(cut)
    assert cut.history.exit_code == 130
    assert all(torch.equal(a, b) for a, b in zip(script(make(tmp_path), "auto"), through, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"every_steps": 0},
        {"every_epochs": -1},
        {"every_seconds": 0},
        {"keep": 0},
        {"keep_every": 0},
        {"on_error": "no"},
    ],
)
def test_a_setting_that_cannot_work_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"\. (Pass|Write) "):
        RunCheckpoint(tmp_path, **settings)


def test_a_step_with_optimizers_of_its_own_resumes_too(tmp_path: Path) -> None:
    """No part is named optimizer: each is saved under its own name."""

    def make(directory: Path | None) -> Engine:
        torch.manual_seed(1)
        body, head = nn.Linear(4, 4), nn.Linear(4, 3)
        slow, fast = (torch.optim.Adam(part.parameters(), lr=0.02) for part in (body, head))

        def step(engine: Engine, batch: Any) -> Tensor:
            loss = nn.functional.cross_entropy(head(body(batch[0])), batch[1])
            loss.backward()
            for optimizer in (slow, fast):
                optimizer.step()
                optimizer.zero_grad()
            return loss

        callbacks = [] if directory is None else [RunCheckpoint(directory)]
        return Engine(step, callbacks=callbacks, body=body, head=head, slow=slow, fast=fast)

    def fit(engine: Engine, **settings: Any) -> Engine:
        seed_everything(3)
        engine.fit(DataLoader(Augmented(), batch_size=3, shuffle=True), epochs=2, **settings)
        return engine

    through = fit(make(None))
    cut = make(tmp_path)
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGTERM) if cut.step == 5 else None)
    fit(cut)
    resumed = fit(make(tmp_path), resume="auto")
    for name in ("body", "head", "slow", "fast"):
        assert_equal(resumed.parts[name].state_dict(), through.parts[name].state_dict(), name)


def small_trainer(directory: Path, **settings: Any) -> Engine:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=[RunCheckpoint(directory, every_steps=1, **settings)])


DATA = [(torch.ones(4, 2), torch.ones(4, 1))] * 6


def test_a_failed_save_warns_and_the_next_due_point_tries_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replaced = 0

    def strike(name: str) -> None:
        nonlocal replaced
        replaced += name == "replace"
        if name == "replace" and replaced in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer = small_trainer(tmp_path, keep=9)
    with struck(strike), caplog.at_level(logging.WARNING):
        trainer.fit(DATA, epochs=1)
    assert [file.step for file in CheckpointDirectory(tmp_path).files()] == [6, 6, 5, 4, 1]
    assert caplog.text.count("No space left on device. Training continues; run-000001-step-1-") == 2


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_checkpoint_is_good_although_older_ones_cannot_be_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool, on_error: str
) -> None:
    """That is warned of, ends no run, and is made up for by the next save."""
    removals = 0

    def strike(name: str) -> None:
        nonlocal removals
        removals += name == "unlink"
        if name == "unlink" and removals in (2, 3):  # the first is of the trial of the directory
            raise OSError(errno.EIO, "Input/output error")

    trainer = small_trainer(tmp_path, keep=1, background=background, on_error=on_error)
    with struck(strike), caplog.at_level(logging.WARNING):
        trainer.fit(DATA, epochs=1)
    assert [file.step for file in CheckpointDirectory(tmp_path).files()] == [6]
    assert caplog.text.count(f"Older checkpoints could not be removed from {tmp_path}: Input/output error.") == 2
    assert "could not be written" not in caplog.text


@pytest.mark.parametrize("background", [False, True])
def test_a_run_of_which_every_save_fails_trains_to_its_last_step_and_then_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    """Everything else at the end is done first: the reason, the best weights, the other handlers of FitEnd."""
    trainer = small_trainer(tmp_path, background=background)
    best = BestCheckpoint("val_loss", "max", restore=True)  # the loss falls: the first epoch is the best
    trainer.attach(best)
    ends: list[str] = []
    trainer.subscribe(FitEnd, lambda event: ends.append(event.reason))
    with struck(fail_each("replace")), pytest.raises(OSError, match="No space left"):
        trainer.fit(DATA, DATA, epochs=2)
    assert (trainer.step, ends, trainer.history.reason) == (12, ["2 epochs done"], "2 epochs done")
    assert torch.equal(trainer.parts["model"].weight, best.weights()["weight"])
    assert best.best is not None
    assert best.best.epoch == 1
    assert caplog.text.count("No space left on device. Training continues; there is none yet") == 12 - background
    assert caplog.text.count("No space left on device. The run is over; there is none yet") == 1 + background


@pytest.mark.parametrize("background", [False, True])
def test_a_run_whose_disk_recovers_saves_again_and_does_not_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    """Also not at the end of a second fit, whose saves are its own."""
    trainer = small_trainer(tmp_path, background=background, keep=99)

    def strike(name: str) -> None:
        if name == "replace" and trainer.step in (1, 2, 3, 4):
            raise no_space()

    trainer.subscribe(Settled, lambda event: wait_for_writer())  # what is written is of the present step
    with struck(strike), caplog.at_level(logging.WARNING):
        trainer.fit(DATA, epochs=1)
        trainer.fit(DATA, epochs=1)
    assert {file.step for file in CheckpointDirectory(tmp_path).files()} == set(range(5, 13))
    assert caplog.text.count("No space left on device. Training continues") == 4


def wait_for_writer() -> None:
    for thread in threading.enumerate():
        if thread.name == "camshaft-checkpoint":
            thread.join()


def test_a_last_save_that_fails_is_raised_though_the_earlier_ones_did_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is on the disk is said to be good, and is resumed."""
    trainer = small_trainer(tmp_path)

    def strike(name: str) -> None:
        if name == "replace" and trainer.step == 6:
            raise no_space()

    with struck(strike), pytest.raises(OSError, match="No space left"):
        trainer.fit(DATA, epochs=1)
    assert "The run is over; run-000005-step-5-" in caplog.text
    resumed = small_trainer(tmp_path)
    resumed.fit(DATA, epochs=1, resume="auto")
    assert_same(resumed, trainer)


def test_a_save_that_failed_is_tried_again_at_the_same_step_if_a_signal_comes(tmp_path: Path) -> None:
    """The run announces once more that it has settled, and that save is due."""
    trainer = small_trainer(tmp_path)
    tries = 0

    def strike(name: str) -> None:
        nonlocal tries
        tries += name == "replace" and trainer.step == 3
        if name == "replace" and tries == 1:
            raise no_space()

    interrupt_at(trainer, 3)
    with struck(strike):
        trainer.fit(DATA, epochs=1)
    assert [file.step for file in CheckpointDirectory(tmp_path).files()] == [3, 2]


def test_an_error_that_ends_the_run_is_not_hidden_by_a_save_that_failed(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.subscribe(StepEnd, lambda event: 1 / 0, when=lambda step: step == 5)
    with struck(fail_each("replace")), pytest.raises(ZeroDivisionError) as caught:
        trainer.fit(DATA, epochs=1)
    assert any("While the run was ending, too: OSError" in note for note in caught.value.__notes__)


def test_a_directory_that_cannot_even_be_listed_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning would name the newest checkpoint, which cannot be known then."""
    trainer = small_trainer(tmp_path)

    def strike(name: str) -> None:
        if name == "listdir" and trainer.step in (2, 3, 4):
            raise OSError(errno.EIO, "Input/output error")

    with struck(strike):
        trainer.fit(DATA, epochs=1)
    assert trainer.step == 6
    assert caplog.text.count("Input/output error. Training continues; which are still good cannot be seen") == 3


@pytest.mark.parametrize("background", [False, True])
def test_by_wish_the_first_failure_ends_the_run(tmp_path: Path, background: bool) -> None:
    """In the background it is seen at the next save."""
    trainer = small_trainer(tmp_path, on_error="raise", background=background)
    with struck(fail_each("replace")), pytest.raises(OSError, match="No space left"):
        trainer.fit(DATA, epochs=1)
    assert trainer.step == 1 + background


@pytest.mark.parametrize("kind", [MemoryError, ZeroDivisionError])
def test_an_error_of_the_writing_thread_that_is_not_one_of_the_disk_is_raised_at_the_next_save(
    tmp_path: Path, kind: type[Exception]
) -> None:
    trainer = small_trainer(tmp_path, background=True)
    with struck(fail_each("write", kind)), pytest.raises(kind):
        trainer.fit(DATA, epochs=1)
    assert trainer.step == 2


def test_an_error_of_the_last_write_in_the_background_is_raised_at_the_end_of_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(RunCheckpoint(tmp_path, background=True))  # it saves once, when the epoch has ended
    with struck(fail_each("write", MemoryError)), pytest.raises(MemoryError):
        trainer.fit(class_batches(4, 4), epochs=1)
    assert trainer.history.reason == "1 epoch done"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = small_trainer(tmp_path / "file" / "below")
    with pytest.raises(ConfigurationError, match="RunCheckpoint cannot write in"):
        trainer.fit(DATA, epochs=1)
    assert trainer.step == 0


def test_after_a_refused_resume_a_fit_leaves_the_files_of_the_other_run_alone(tmp_path: Path) -> None:
    """Neither its checkpoints nor its run directory are touched by a run that did not fit them."""

    def make(width: int) -> Engine:
        model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
        callbacks = [RunDirectory(tmp_path / "runs", terminal=False), RunCheckpoint(tmp_path / "checkpoints")]
        return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), callbacks=callbacks)

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in old_files}

    make(5).fit(class_batches(4, 4), epochs=3)
    old_files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = content()
    other = make(6)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        other.fit(class_batches(4, 4), epochs=3, resume="auto")
    with pytest.raises(ConfigurationError, match="holds checkpoints of an earlier run"):
        other.fit(class_batches(4, 4), epochs=3)
    assert content() == before
