"""pytorch-ignite's handlers and metrics do on this engine what they do on their own: both run side by side."""

from __future__ import annotations

import io
import logging
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite import handlers as ih
from ignite import metrics as im
from ignite.engine import Engine as IgniteEngine
from ignite.engine import Events
from ignite.handlers.tensorboard_logger import GradsScalarHandler, WeightsScalarHandler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import RunCheckpoint
from camshaft.callbacks.ignite import Ignite
from camshaft.engine import Callback, Engine, EngineStateError, EpochEnd, Trainer, repeat

EPOCHS, STEPS, VAL_STEPS, SIZE, CLASSES = 4, 6, 3, 8, 3

Batches = list[tuple[Tensor, Tensor]]


def batches(num: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, SIZE, 4, generator=generator)
    return [(x, (x[:, :CLASSES] + 0.5 * x[:, 1:]).argmax(1)) for x in inputs]


TRAIN, VAL = batches(STEPS, seed=1), batches(VAL_STEPS, seed=2)


@dataclass
class Rig:
    """What a handler attaches to, on either side."""

    trainer: IgniteEngine
    evaluator: IgniteEngine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    directory: Path
    loss: Callable[[Any], Tensor]  # picks the loss out of the trainer's output
    gradients_ready: Any  # the event at which gradients can be read
    lrs: list[Any] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)


Attach = Callable[[Rig], Callable[[], Any]]


@dataclass
class Outcome:
    probe: Any
    weights: dict[str, Tensor]
    lrs: list[Any]
    place: tuple[int, int]


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES))
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": [*model[1].parameters(), *model[4].parameters()]},
    ]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def finish(rig: Rig, attach: Attach, run: Callable[[], object]) -> Outcome:
    rig.directory.mkdir()
    with rig.stack:
        probe = attach(rig)
        rig.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: rig.lrs.append([group["lr"] for group in rig.optimizer.param_groups])
        )
        torch.manual_seed(4)
        run()
        place = (rig.trainer.state.epoch, rig.trainer.state.iteration)
    weights = {name: value.clone() for name, value in rig.model.state_dict().items()}
    return Outcome(probe(), weights, rig.lrs, place)


def run_ignite(attach: Attach, directory: Path, train: Any = TRAIN, **arguments: Any) -> Outcome:
    """Run ignite's own engine, with the training step that one writes for it."""
    model, optimizer = parts()
    loss_fn = nn.CrossEntropyLoss()

    def train_step(engine: IgniteEngine, batch: Any) -> Any:
        model.train()
        optimizer.zero_grad()
        x, y = batch
        output = model(x)
        loss = loss_fn(output, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        return output.detach(), y

    def evaluation_step(engine: IgniteEngine, batch: Any) -> Any:
        model.eval()
        with torch.no_grad():
            return model(batch[0]), batch[1]

    losses: list[Tensor] = []
    trainer, evaluator = IgniteEngine(train_step), IgniteEngine(evaluation_step)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(VAL))
    rig = Rig(trainer, evaluator, model, optimizer, directory, lambda _: losses[-1], Events.ITERATION_COMPLETED)
    return finish(rig, attach, lambda: trainer.run(train, **arguments or {"max_epochs": EPOCHS}))


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results are equal to the bit; NaN equals NaN."""
    if isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and torch.equal(ours.nan_to_num(nan=7e7), theirs.nan_to_num(nan=7e7))
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs) or (ours != ours and theirs != theirs)


def run_ours(attach: Attach, directory: Path, train: Any = TRAIN, **arguments: Any) -> Outcome:
    model, optimizer = parts()
    bridge = Ignite()
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[bridge])
    rig = Rig(bridge.train, bridge.val, model, optimizer, directory, lambda output: output.loss, "gradients_ready")
    # A set length is known before the data are read, and some handlers ask for it at STARTED.
    arguments = arguments or {"epochs": EPOCHS}
    return finish(rig, attach, lambda: trainer.fit(repeat(train), VAL, epoch_length=len(train), **arguments))


def small(*callbacks: Callback, **arguments: Any) -> Engine:
    model, optimizer = parts()
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, **arguments)


# Handlers ----------------------------------------------------------------------------------------------

CASES: dict[str, Attach] = {}


def case(attach: Attach) -> Attach:
    CASES[attach.__name__] = attach
    return attach


@case
def early_stopping_on_the_evaluator(rig: Rig) -> Callable[[], Any]:
    im.Accuracy().attach(rig.evaluator, "acc")
    handler = ih.EarlyStopping(2, lambda engine: engine.state.metrics["acc"], rig.trainer, threshold=0.5)
    rig.evaluator.add_event_handler(Events.COMPLETED, handler)
    return lambda: (handler.counter, handler.best_score)


@case
def early_stopping_on_the_trainer(rig: Rig) -> Callable[[], Any]:
    im.Loss(nn.CrossEntropyLoss()).attach(rig.trainer, "loss")
    handler = ih.EarlyStopping(1, lambda engine: engine.state.metrics["loss"], rig.trainer, threshold=0.5, mode="min")
    handler.attach(rig.trainer, Events.EPOCH_COMPLETED)
    return lambda: (handler.counter, handler.best_score)


def files(directory: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(directory.iterdir())}


@case
def model_checkpoint(rig: Rig) -> Callable[[], Any]:
    handler = ih.ModelCheckpoint(rig.directory, "net", n_saved=2)
    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), handler, {"model": rig.model})
    return lambda: files(rig.directory)


@case
def best_checkpoint_by_a_score_of_the_evaluator(rig: Rig) -> Callable[[], Any]:
    im.Accuracy().attach(rig.evaluator, "acc")
    handler = ih.Checkpoint(
        {"model": rig.model, "optimizer": rig.optimizer, "trainer": rig.trainer},
        ih.DiskSaver(rig.directory, require_empty=False),
        n_saved=2,
        score_name="acc",
        score_function=ih.Checkpoint.get_default_score_fn("acc"),
        global_step_transform=ih.global_step_from_engine(rig.trainer),
    )
    rig.evaluator.add_event_handler(Events.COMPLETED, handler)
    return lambda: (Path(str(handler.last_checkpoint)).name, files(rig.directory))


@case
def terminate_on_nan(rig: Rig) -> Callable[[], Any]:
    def spoil() -> None:
        with torch.no_grad():
            next(rig.model.parameters()).fill_(float("nan"))

    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), spoil)
    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED, ih.TerminateOnNan())
    return lambda: ("stopped in step", rig.trainer.state.iteration)


@case
def terminate_on_nan_of_the_loss(rig: Rig) -> Callable[[], Any]:
    seen: list[float] = []

    def loss(output: Any) -> float:
        seen.append(rig.loss(output).item())
        return seen[-1] if len(seen) < 9 else float("inf")

    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED, ih.TerminateOnNan(loss))
    return lambda: seen


@case
def timer(rig: Rig) -> Callable[[], Any]:
    handler = ih.Timer(average=True)
    during = (Events.ITERATION_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
    handler.attach(rig.trainer, Events.EPOCH_STARTED, *during)
    return lambda: (handler.step_count, handler.running, handler.total > 0)


@case
def time_limit(rig: Rig) -> Callable[[], Any]:
    handler = ih.TimeLimit(limit_sec=3600)

    def late() -> None:
        handler.start_time -= 3601

    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), late)
    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    return lambda: ("stopped in step", rig.trainer.state.iteration)


@case
def ema_handler(rig: Rig) -> Callable[[], Any]:
    handler = ih.EMAHandler(rig.model, momentum=0.1, momentum_warmup=0.5, warmup_iters=5)
    handler.attach(rig.trainer, name="ema_momentum", event=Events.ITERATION_COMPLETED(every=2))
    return lambda: (rig.trainer.state.ema_momentum, handler.ema_model.state_dict())  # type: ignore[attr-defined]


def attach_schedule(rig: Rig, schedule: Any, event: Any = Events.ITERATION_STARTED) -> Callable[[], Any]:
    rig.trainer.add_event_handler(event, schedule)
    return lambda: rig.trainer.state.param_history  # type: ignore[attr-defined]


@case
def lr_scheduler(rig: Rig) -> Callable[[], Any]:
    torch_schedule = torch.optim.lr_scheduler.StepLR(rig.optimizer, 5, gamma=0.3)
    return attach_schedule(rig, ih.LRScheduler(torch_schedule, save_history=True))


@case
def linear_cyclical_scheduler(rig: Rig) -> Callable[[], Any]:
    return attach_schedule(rig, ih.LinearCyclicalScheduler(rig.optimizer, "lr", 0.01, 0.2, 10, save_history=True))


@case
def cosine_annealing_scheduler(rig: Rig) -> Callable[[], Any]:
    return attach_schedule(rig, ih.CosineAnnealingScheduler(rig.optimizer, "lr", 0.2, 0.0, 12, save_history=True))


@case
def piecewise_linear_by_epochs(rig: Rig) -> Callable[[], Any]:
    milestones = [(0, 0.1), (2, 0.2), (3, 0.0)]
    schedule = ih.PiecewiseLinear(rig.optimizer, "lr", milestones, save_history=True)
    return attach_schedule(rig, schedule, Events.EPOCH_STARTED)


@case
def concat_scheduler(rig: Rig) -> Callable[[], Any]:
    first = ih.LinearCyclicalScheduler(rig.optimizer, "lr", 0.2, 0.1, 16)
    second = ih.CosineAnnealingScheduler(rig.optimizer, "lr", 0.1, 0.0, 30)
    return attach_schedule(rig, ih.ConcatScheduler([first, second], durations=[8], save_history=True))


@case
def lr_scheduler_with_warmup(rig: Rig) -> Callable[[], Any]:
    torch_schedule = torch.optim.lr_scheduler.ExponentialLR(rig.optimizer, gamma=0.9)
    schedule = ih.create_lr_scheduler_with_warmup(torch_schedule, 0.0, 6, save_history=True)
    return attach_schedule(rig, schedule)


@case
def param_group_scheduler(rig: Rig) -> Callable[[], Any]:
    schedules: list[ih.ParamScheduler] = [
        ih.LinearCyclicalScheduler(rig.optimizer, "lr", 0.1, 0.2, 8, param_group_index=0),
        ih.CosineAnnealingScheduler(rig.optimizer, "momentum", 0.9, 0.5, 20, param_group_index=1),
    ]
    return attach_schedule(rig, ih.ParamGroupScheduler(schedules, save_history=True))


@case
def reduce_lr_on_plateau(rig: Rig) -> Callable[[], Any]:
    im.Loss(nn.CrossEntropyLoss()).attach(rig.evaluator, "loss")
    schedule = ih.ReduceLROnPlateauScheduler(rig.optimizer, "loss", trainer=rig.trainer, patience=0, threshold=0.5)
    rig.evaluator.add_event_handler(Events.COMPLETED, schedule)
    return lambda: rig.optimizer.param_groups[0]["lr"]


@case
def fastai_lr_finder(rig: Rig) -> Callable[[], Any]:
    finder = ih.FastaiLRFinder()
    to_save = {"model": rig.model, "optimizer": rig.optimizer}
    rig.stack.enter_context(
        finder.attach(rig.trainer, to_save, rig.loss, num_iter=20, start_lr=1e-3, end_lr=1e3, diverge_th=2)
    )
    return lambda: (finder.get_results(), finder.lr_suggestion())


@case
def tensorboard_logger(rig: Rig) -> Callable[[], Any]:
    im.Accuracy().attach(rig.evaluator, "acc")
    logger = rig.stack.enter_context(ih.TensorboardLogger(rig.directory))
    logger.attach_output_handler(
        rig.trainer,
        Events.ITERATION_COMPLETED(every=2),
        "training",
        output_transform=lambda out: {"loss": rig.loss(out)},
    )
    logger.attach_output_handler(
        rig.evaluator,
        Events.EPOCH_COMPLETED,
        "val",
        ["acc"],
        global_step_transform=ih.global_step_from_engine(rig.trainer),
    )
    logger.attach_opt_params_handler(rig.trainer, Events.ITERATION_STARTED, optimizer=rig.optimizer)
    logger.attach(rig.trainer, WeightsScalarHandler(rig.model), Events.EPOCH_COMPLETED)
    logger.attach(rig.trainer, GradsScalarHandler(rig.model), rig.gradients_ready)
    return lambda: scalars_written(rig.directory)


def scalars_written(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@case
def basic_time_profiler(rig: Rig) -> Callable[[], Any]:
    handler = ih.BasicTimeProfiler()
    handler.attach(rig.trainer)
    rig.trainer.add_event_handler(Events.ITERATION_STARTED, ih.Timer().reset)

    def measured() -> Any:
        times = {"processing": handler.processing_times, "data": handler.dataflow_times}
        times |= {str(event): values for event, values in handler.event_handlers_times.items()}
        return {name: values > 0 for name, values in times.items()}, handler.event_handlers_names[
            Events.ITERATION_STARTED
        ]

    return measured


@case
def handlers_time_profiler(rig: Rig) -> Callable[[], Any]:
    handler = ih.HandlersTimeProfiler()
    handler.attach(rig.trainer)
    rig.trainer.add_event_handler(Events.ITERATION_STARTED, ih.TimeLimit())

    def measured() -> Any:
        calls = {name: len(times) for name, times in handler.event_handlers_times[Events.ITERATION_STARTED].items()}
        return calls, len(handler.processing_times), len(handler.dataflow_times)

    return measured


@case
def state_schedulers(rig: Rig) -> Callable[[], Any]:
    schedulers = [
        ih.LambdaStateScheduler(lambda step: step**2, "a", save_history=True, create_new=True),
        ih.PiecewiseLinearStateScheduler([(2, 0.0), (8, 1.0)], "b", save_history=True, create_new=True),
        ih.ExpStateScheduler(10.0, 0.9, "c", save_history=True, create_new=True),
        ih.StepStateScheduler(10.0, 0.9, 5, "d", save_history=True, create_new=True),
        ih.MultiStepStateScheduler(10.0, 0.9, [3, 6], "e", save_history=True, create_new=True),
    ]
    for scheduler in schedulers:
        scheduler.attach(rig.trainer, Events.ITERATION_COMPLETED(every=3))
    return lambda: rig.trainer.state.param_history  # type: ignore[attr-defined]


@case
def epoch_output_store(rig: Rig) -> Callable[[], Any]:
    stores = ih.EpochOutputStore(), ih.EpochOutputStore(lambda output: output[0].argmax(1))
    stores[0].attach(rig.trainer, "outputs")
    stores[1].attach(rig.evaluator)
    return lambda: (rig.trainer.state.outputs, stores[1].data)  # type: ignore[attr-defined]


@case
def running_average(rig: Rig) -> Callable[[], Any]:
    seen: list[Any] = []
    im.RunningAverage(im.Accuracy(), alpha=0.9).attach(rig.trainer, "acc")
    im.RunningAverage(output_transform=lambda out: rig.loss(out).item()).attach(rig.trainer, "loss")
    picked = operator.itemgetter("acc", "loss")
    rig.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(picked(e.state.metrics)))
    return lambda: seen


@case
def progress_bar(rig: Rig) -> Callable[[], Any]:
    text = io.StringIO()
    bar = ih.ProgressBar(file=text, bar_format="{desc} {n_fmt}/{total_fmt}{postfix}", mininterval=0)
    bar.attach(rig.trainer, output_transform=lambda out: {"loss": rig.loss(out)})
    # How often the bar is painted again is a matter of time.
    return lambda: sorted({line.strip() for line in re.split(r"[\r\n]+", text.getvalue())})


class Lines(logging.Handler):
    """Keeps each line, without its times."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(re.sub(r"\d+\.\d{4} s|\d+:\d\d:\d\d", "-", record.getMessage()))


@case
def fb_research_logger(rig: Rig) -> Callable[[], Any]:
    lines: list[str] = []
    logger = logging.Logger("fb", logging.INFO)
    logger.addHandler(Lines(lines))
    handler = ih.FBResearchLogger(logger, show_output=True)
    handler.attach(rig.trainer, "Train", 2, lambda out: {"loss": rig.loss(out)}, optimizer=rig.optimizer)
    return lambda: lines


@pytest.mark.parametrize("attach", CASES.values(), ids=CASES)
def test_a_handler_does_what_it_does_on_ignites_engine(attach: Attach, tmp_path: Path) -> None:
    theirs, ours = run_ignite(attach, tmp_path / "theirs"), run_ours(attach, tmp_path / "ours")
    assert theirs.probe, "the case shows nothing"
    assert same(ours.probe, theirs.probe)
    assert same(ours.weights, theirs.weights)
    assert ours.lrs == theirs.lrs
    assert ours.place == theirs.place


def test_a_batch_size_scheduler_changes_the_number_of_steps_of_an_epoch(tmp_path: Path) -> None:
    """Here an epoch stays one pass over the data; ignite keeps its number of steps."""
    data = TensorDataset(torch.cat([x for x, _ in TRAIN]), torch.cat([y for _, y in TRAIN]))

    def sizes(run: Callable[[Any, Any], object], side: IgniteEngine) -> list[int]:
        seen: list[int] = []
        loader = DataLoader(data, batch_size=SIZE)
        ih.BatchSizeScheduler(loader, lambda epoch: SIZE * (1 + epoch)).attach(side)
        side.add_event_handler(Events.ITERATION_STARTED, lambda engine: seen.append(len(engine.state.batch[0])))
        run(loader, 2)
        return seen

    bridge, theirs = Ignite(), IgniteEngine(lambda engine, batch: None)
    trainer = small(bridge)
    assert sizes(lambda loader, epochs: trainer.fit(loader, epochs=epochs), bridge.train) == [8] * 6 + [16] * 3
    assert sizes(theirs.run, theirs) == [8] * 6 + [16] * 6


def test_the_lr_finder_does_not_lengthen_the_run() -> None:
    bridge, finder = Ignite(), ih.FastaiLRFinder()
    trainer = small(bridge)
    with (
        finder.attach(bridge.train, dict(trainer.parts), lambda output: output.loss, num_iter=50, end_lr=0.2),
        pytest.warns(UserWarning, match="without loss diverging"),
    ):
        trainer.fit(repeat(TRAIN), epochs=2, epoch_length=STEPS)
    assert len(finder.get_results()["lr"]) == 2 * STEPS


def test_a_checkpoint_can_be_written_when_the_run_fails(tmp_path: Path) -> None:
    bridge = Ignite()
    trainer = small(bridge)
    handler = ih.Checkpoint({"model": trainer.parts["model"]}, ih.DiskSaver(tmp_path))
    bridge.train.add_event_handler(Events.EXCEPTION_RAISED, handler)
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: [][0])
    with pytest.raises(IndexError):
        trainer.fit(TRAIN, epochs=1)
    assert list(files(tmp_path)) == ["model_3.pt"]


def test_a_scheduler_that_is_a_part_of_the_run_is_resumed_with_it(tmp_path: Path) -> None:
    def run(directory: Path, fail_at: int | None = None, resume: str | None = None) -> tuple[list[Any], Any]:
        model, optimizer = parts()
        bridge, seen = Ignite(), list[Any]()
        schedule = ih.CosineAnnealingScheduler(optimizer, "lr", 0.2, 0.0, 30)
        bridge.train.add_event_handler(Events.ITERATION_STARTED, schedule)
        bridge.train.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: seen.append((*place(engine), optimizer.param_groups[0]["lr"]))
        )
        bridge.train.add_event_handler(Events.EPOCH_COMPLETED, took_less_than_an_hour)
        if fail_at is not None:
            bridge.train.add_event_handler(Events.ITERATION_COMPLETED(once=fail_at), lambda: [][0])
        callbacks = [bridge, RunCheckpoint(directory, every_steps=1)]
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=1, schedule=schedule)
        try:
            trainer.fit(TRAIN, VAL, epochs=3, resume=resume)
        except IndexError:
            return seen, None
        return seen, model.state_dict()

    whole, weights = run(tmp_path / "whole")
    first, _ = run(tmp_path / "cut", fail_at=9)
    second, resumed_weights = run(tmp_path / "cut", resume="auto")
    assert first[:8] + second == whole
    assert same(resumed_weights, weights)


def took_less_than_an_hour(engine: IgniteEngine) -> None:
    assert 0 < engine.state.times["EPOCH_COMPLETED"] < 3600  # type: ignore[operator]  # ignite says None, too


# Events ------------------------------------------------------------------------------------------------

# ignite lets a pass over the data end when the next one begins; ours has ended before. The others need a failure.
UNHEARD = {"DATALOADER_STOP_ITERATION", "EXCEPTION_RAISED", "TERMINATE_SINGLE_EPOCH", "INTERRUPT"}


def record_events(rig: Rig) -> Callable[[], Any]:
    heard: list[tuple[Any, ...]] = []

    def record(engine: IgniteEngine, side: str, name: str) -> None:
        state = engine.state
        length = state.epoch_length if name.startswith("ITERATION") else None  # known with the first batch
        heard.append((side, name, state.epoch, state.iteration, state.max_epochs, length, state.output is None))

    for event in set(Events.__members__) - UNHEARD:
        rig.trainer.add_event_handler(Events[event], record, "train", event)
        rig.evaluator.add_event_handler(Events[event], record, "val", event)
    return lambda: heard


TERMINATIONS: dict[str, tuple[str, Any, str]] = {
    "in a step": ("trainer", Events.ITERATION_COMPLETED(once=8), "trainer"),
    "in the last step of an epoch": ("trainer", Events.ITERATION_COMPLETED(once=12), "trainer"),
    "at the end of an epoch": ("trainer", Events.EPOCH_COMPLETED(once=2), "trainer"),
    "at the end of the run": ("trainer", Events.COMPLETED, "trainer"),
    "before a batch is read": ("trainer", Events.GET_BATCH_STARTED(once=8), "trainer"),
    "during a validation": ("evaluator", Events.ITERATION_COMPLETED(once=2), "trainer"),
    "after a validation": ("evaluator", Events.COMPLETED, "trainer"),
    "only a validation": ("evaluator", Events.ITERATION_COMPLETED(once=2), "evaluator"),
    "only a validation, at its start": ("evaluator", Events.STARTED, "evaluator"),
}


@pytest.mark.parametrize("skip_completed", [False, True])
@pytest.mark.parametrize("where", TERMINATIONS)
def test_the_events_of_a_terminated_run_are_ignites(where: str, skip_completed: bool, tmp_path: Path) -> None:
    def attach(rig: Rig) -> Callable[[], Any]:
        heard = record_events(rig)
        side, event, terminated = TERMINATIONS[where]
        getattr(rig, side).add_event_handler(event, getattr(rig, terminated).terminate, skip_completed)
        return heard

    theirs, ours = run_ignite(attach, tmp_path / "theirs"), run_ours(attach, tmp_path / "ours")
    assert ours.probe == theirs.probe
    assert same(ours.weights, theirs.weights)


def test_the_events_of_a_whole_run_are_ignites(tmp_path: Path) -> None:
    theirs, ours = run_ignite(record_events, tmp_path / "theirs"), run_ours(record_events, tmp_path / "ours")
    assert len(theirs.probe) > EPOCHS * (STEPS + VAL_STEPS) * 4
    assert ours.probe == theirs.probe


@pytest.mark.parametrize(
    ("event", "once", "step"), [("EPOCH_STARTED", 2, 7), ("GET_BATCH_COMPLETED", 7, 8), ("ITERATION_STARTED", 8, 8)]
)
def test_terminated_before_a_step_the_run_still_makes_that_step(
    event: str, once: int, step: int, tmp_path: Path
) -> None:
    def attach(rig: Rig) -> Callable[[], Any]:
        heard = record_events(rig)
        rig.trainer.add_event_handler(Events[event](once=once), lambda: rig.trainer.terminate())
        return heard

    def attach_after(rig: Rig) -> Callable[[], Any]:
        rig.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), lambda: rig.trainer.terminate())
        return lambda: None

    theirs, ours = run_ignite(attach, tmp_path / "theirs"), run_ours(attach, tmp_path / "ours")
    assert ours.probe == theirs.probe
    assert same(ours.weights, run_ignite(attach_after, tmp_path / "after").weights)


def test_terminate_gives_the_run_its_reason() -> None:
    bridge = Ignite()
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED(once=8), lambda: bridge.train.terminate())
    trainer = small(bridge)
    assert trainer.fit(TRAIN, epochs=9).reason == "a handler of pytorch-ignite called terminate()"
    assert trainer.step == 8


def test_terminate_waits_for_min_epochs() -> None:
    bridge, terminated = Ignite(), list[Any]()
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED, lambda: bridge.train.terminate())
    bridge.train.add_event_handler(Events.TERMINATE, lambda: terminated.append(trainer.step))
    trainer = small(bridge)
    trainer.fit(TRAIN, epochs=9, min_epochs=2)
    assert terminated == [trainer.step] == [2 * STEPS + 1]


def test_a_terminated_run_can_be_followed_by_another() -> None:
    bridge, places = Ignite(), list[Any]()
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: bridge.train.terminate())
    bridge.train.add_event_handler(Events.STARTED | Events.COMPLETED, lambda e: places.append(place(e)))
    trainer = small(bridge)
    trainer.fit(TRAIN, epochs=3)
    trainer.fit(TRAIN, epochs=2)
    assert places == [(0, 0, 3), (1, 2, 3), (1, 2, 3), (3, 2 + 2 * STEPS, 3)]


def place(engine: IgniteEngine) -> tuple[int, int, int | None]:
    return engine.state.epoch, engine.state.iteration, engine.state.max_epochs


def test_a_run_by_steps_has_max_iters_and_reads_no_further() -> None:
    bridge, read = Ignite(), list[Any]()
    bridge.train.add_event_handler(Events.GET_BATCH_STARTED, lambda: read.append("batch"))
    small(bridge).fit(TRAIN, max_steps=8)
    assert len(read) == 8
    assert (bridge.train.state.max_iters, bridge.train.state.max_epochs) == (8, None)
    assert (bridge.train.state.iteration, bridge.train.state.epoch_length) == (8, STEPS)


def test_a_validation_in_mid_epoch_can_terminate_the_run() -> None:
    bridge, heard = Ignite(), list[Any]()
    bridge.val.add_event_handler(Events.COMPLETED, lambda: bridge.train.terminate())
    for event in (Events.GET_BATCH_STARTED, Events.TERMINATE, Events.EPOCH_COMPLETED, Events.COMPLETED):
        bridge.train.add_event_handler(event, lambda engine, name: heard.append((name, place(engine)[1])), event.name)
    trainer = small(bridge)
    trainer.fit(TRAIN, VAL, epochs=3, validate_every="4 steps")
    assert heard == [*(("GET_BATCH_STARTED", step) for step in range(4)), ("TERMINATE", 4), ("COMPLETED", 4)]
    assert trainer.step == 4


def test_state_batch_can_be_replaced_before_the_step() -> None:
    replaced, plain = Ignite(), Ignite()
    replaced.train.add_event_handler(Events.ITERATION_STARTED, double)
    trainers = small(replaced), small(plain)
    doubled = [(2 * x, y) for x, y in TRAIN]
    for trainer, data in zip(trainers, (TRAIN, doubled), strict=True):
        torch.manual_seed(0)
        trainer.fit(data, epochs=1)
    assert same(trainers[0].parts["model"].state_dict(), trainers[1].parts["model"].state_dict())


def double(engine: IgniteEngine) -> None:
    state: Any = engine.state
    state.batch = (2 * state.batch[0], state.batch[1])


def test_state_metrics_holds_the_engines_own_values() -> None:
    bridge, scores = Ignite(), list[Any]()
    bridge.val.add_event_handler(Events.COMPLETED, lambda engine: scores.append(engine.state.metrics["val_loss"]))
    history = small(bridge).fit(TRAIN, VAL, epochs=2)
    assert scores == history["val_loss"]
    assert bridge.train.state.metrics["train_loss"] == history["train_loss"][-1]


def test_data_of_unknown_length_are_read_until_they_end() -> None:
    bridge, heard = Ignite(), list[Any]()
    for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED):
        bridge.train.add_event_handler(event, heard.append, event.name)
    small(bridge).fit(lambda: iter(TRAIN), epochs=2)
    epoch = ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED"] * STEPS + ["GET_BATCH_STARTED"]
    assert heard == 2 * epoch


def test_output_holds_no_gradients_and_has_the_loss() -> None:
    bridge, losses = Ignite(), list[Any]()

    def look(engine: IgniteEngine) -> None:
        output: Any = engine.state.output
        assert not output[0].requires_grad
        assert not output.loss.requires_grad
        assert output[1] is TRAIN[engine.state.iteration - 1][1]
        losses.append(output.loss.item())

    bridge.train.add_event_handler(Events.ITERATION_COMPLETED, look)
    history = small(bridge).fit(TRAIN, epochs=1)
    assert sum(losses) / STEPS == pytest.approx(history["train_loss"][0])


def test_output_is_what_the_step_of_a_plain_engine_returned() -> None:
    bridge, seen = Ignite(), list[Any]()
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    engine = Engine(lambda engine, batch: {"mean": batch.mean()}, callbacks=[bridge])
    engine.fit([torch.ones(2), torch.zeros(2)], epochs=1)
    assert seen == [{"mean": 1.0}, {"mean": 0.0}]


def test_the_script_style_is_followed_too() -> None:
    bridge, heard = Ignite(), list[Any]()
    names = ("STARTED", "EPOCH_STARTED", "ITERATION_STARTED", "ITERATION_COMPLETED", "EPOCH_COMPLETED", "COMPLETED")
    for name in names:
        bridge.train.add_event_handler(Events[name], heard.append, name)
    engine = Engine(callbacks=[bridge])
    for _ in engine.epochs(1):
        for batch in engine.train(["first", "second"]):
            heard.append(batch)
    first, second = (["ITERATION_STARTED", batch, "ITERATION_COMPLETED"] for batch in ("first", "second"))
    assert heard == ["STARTED", "EPOCH_STARTED", *first, *second, "EPOCH_COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("reraise", [False, True])
def test_an_error_of_a_handler_ends_the_run_whoever_watches(reraise: bool) -> None:
    bridge, heard = Ignite(), list[Any]()

    def fail() -> None:
        raise ArithmeticError("boom")

    def watch(engine: IgniteEngine, error: BaseException) -> None:
        heard.append((engine is bridge.train, str(error)))
        if reraise:
            raise error

    bridge.val.add_event_handler(Events.ITERATION_COMPLETED(once=2), fail)
    for side in (bridge.val, bridge.train):
        side.add_event_handler(Events.EXCEPTION_RAISED, watch)
        side.add_event_handler(Events.COMPLETED, lambda: heard.append("never"))
    with pytest.raises(ArithmeticError, match="boom") as caught:
        small(bridge).fit(TRAIN, VAL, epochs=1)
    assert heard == [(False, "boom"), (True, "boom")]
    assert "Raised by Ignite.on_validation_step_end, a handler of ValidationStepEnd" in caught.value.__notes__[0]
    assert not [note for note in caught.value.__notes__ if "too" in note]


def test_an_error_of_the_watcher_is_noted() -> None:
    bridge = Ignite()
    bridge.train.add_event_handler(Events.EXCEPTION_RAISED, lambda error: 1 / 0)
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED, lambda: [][0])
    with pytest.raises(IndexError) as caught:
        small(bridge).fit(TRAIN, epochs=1)
    assert any("ZeroDivisionError" in note for note in caught.value.__notes__)


def test_what_cannot_be_followed_is_refused() -> None:
    bridge = Ignite()
    with pytest.raises(EngineStateError, match="has no loop of its own"):
        bridge.train.run(TRAIN)
    bridge.train.add_event_handler(Events.ITERATION_COMPLETED(once=2), bridge.train.terminate_epoch)
    with pytest.raises(EngineStateError, match="terminate_epoch"):
        small(bridge).fit(TRAIN, epochs=1)


def test_importing_the_module_does_not_import_ignite() -> None:
    code = "import sys, camshaft.callbacks.ignite; sys.exit('ignite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Metrics -----------------------------------------------------------------------------------------------


@dataclass
class Task:
    model: Callable[[], nn.Module]
    loss: nn.Module
    shape: tuple[int, ...]
    target: Callable[[torch.Generator], Tensor]

    def data(self) -> Batches:
        draw = torch.Generator().manual_seed(5)
        return [(torch.randn(SIZE, *self.shape, generator=draw), self.target(draw)) for _ in range(4)]


def classes(num: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda draw: torch.randint(0, num, (SIZE, *shape), generator=draw)


def flags(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda draw: torch.randint(0, 2, (SIZE, *shape), generator=draw).float()


def values(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda draw: 0.5 + torch.rand(SIZE, *shape, generator=draw)


MULTICLASS = Task(lambda: nn.Linear(4, 3), nn.CrossEntropyLoss(), (4,), classes(3))
COLUMN = Task(lambda: nn.Linear(4, 1), nn.MSELoss(), (4,), values(1))
VECTOR = Task(lambda: nn.Linear(4, 3), nn.MSELoss(), (4,), values(3))
NUMBER = Task(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), nn.MSELoss(), (4,), values())
BINARY = Task(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.Sigmoid()), nn.BCELoss(), (4,), flags())
MULTILABEL = Task(lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), nn.BCELoss(), (4,), flags(3))
IMAGES = Task(lambda: nn.Conv2d(1, 1, 3, padding=1), nn.MSELoss(), (1, 12, 12), values(1, 12, 12))
TOKENS = Task(lambda: nn.Conv1d(4, 5, 1), nn.CrossEntropyLoss(), (4, 6), classes(5, 6))

Make = Callable[[], im.Metric]

CLUSTERING = ["SilhouetteScore", "DaviesBouldinScore", "CalinskiHarabaszScore"]
REGRESSION = [
    "CanberraMetric", "FractionalAbsoluteError", "FractionalBias", "GeometricMeanAbsoluteError",
    "GeometricMeanRelativeAbsoluteError", "KendallRankCorrelation", "ManhattanDistance", "MaximumAbsoluteError",
    "MeanAbsoluteRelativeError", "MeanError", "MeanNormalizedBias", "MedianAbsoluteError",
    "MedianAbsolutePercentageError", "MedianRelativeAbsoluteError", "PearsonCorrelation", "R2Score",
    "SpearmanRankCorrelation", "WaveHedgesDistance",
]  # fmt: skip


def harmonic_mean() -> im.Metric:
    precision, recall = im.Precision(average=False), im.Recall(average=False)
    return precision * recall * 2 / (precision + recall)


def rounded(output: Any) -> Any:
    return output[0].round().long(), output[1].long()


METRICS: dict[str, tuple[Task, Make]] = {
    "Accuracy": (MULTICLASS, im.Accuracy),
    "Loss": (MULTICLASS, lambda: im.Loss(nn.CrossEntropyLoss())),
    "Precision": (MULTICLASS, im.Precision),
    "Recall": (MULTICLASS, lambda: im.Recall(average="macro")),
    "Fbeta": (MULTICLASS, lambda: im.Fbeta(1.0)),
    "MetricsLambda": (MULTICLASS, harmonic_mean),
    "MetricGroup": (MULTICLASS, lambda: im.MetricGroup({"acc": im.Accuracy(), "top2": im.TopKCategoricalAccuracy(2)})),
    "ConfusionMatrix": (MULTICLASS, lambda: im.ConfusionMatrix(3)),
    "IoU": (MULTICLASS, lambda: im.IoU(im.ConfusionMatrix(3))),
    "mIoU": (MULTICLASS, lambda: im.mIoU(im.ConfusionMatrix(3))),
    "JaccardIndex": (MULTICLASS, lambda: im.JaccardIndex(im.ConfusionMatrix(3))),
    "DiceCoefficient": (MULTICLASS, lambda: im.DiceCoefficient(im.ConfusionMatrix(3))),
    "TopKCategoricalAccuracy": (MULTICLASS, lambda: im.TopKCategoricalAccuracy(2)),
    "MatthewsCorrCoef": (MULTICLASS, im.MatthewsCorrCoef),
    "Entropy": (MULTICLASS, im.Entropy),
    "MutualInformation": (MULTICLASS, im.MutualInformation),
    "EpochMetric": (MULTICLASS, lambda: im.EpochMetric(lambda out, y: (out.argmax(1) == y).double().mean().item())),
    "MeanSquaredError": (COLUMN, im.MeanSquaredError),
    "RootMeanSquaredError": (COLUMN, im.RootMeanSquaredError),
    "MeanAbsoluteError": (COLUMN, im.MeanAbsoluteError),
    "CosineSimilarity": (VECTOR, im.CosineSimilarity),
    "MeanPairwiseDistance": (VECTOR, im.MeanPairwiseDistance),
    "KLDivergence": (VECTOR, im.KLDivergence),
    "JSDivergence": (VECTOR, im.JSDivergence),
    "MaximumMeanDiscrepancy": (VECTOR, im.MaximumMeanDiscrepancy),
    "HSIC": (VECTOR, im.HSIC),
    "ROC_AUC": (BINARY, im.ROC_AUC),
    "AveragePrecision": (BINARY, im.AveragePrecision),
    "HitRate": (MULTILABEL, lambda: im.HitRate([1, 2])),
    "NDCG": (MULTILABEL, lambda: im.NDCG([1, 2])),
    "PSNR": (IMAGES, lambda: im.PSNR(1.0)),
    "SSIM": (IMAGES, lambda: im.SSIM(1.0)),
    "Perplexity": (TOKENS, im.Perplexity),
    "CohenKappa": (MULTICLASS, lambda: im.CohenKappa(lambda output: (output[0].argmax(1), output[1]))),
    "Accuracy with an output_transform": (BINARY, lambda: im.Accuracy(rounded)),
    "MultiLabelConfusionMatrix": (MULTILABEL, lambda: im.MultiLabelConfusionMatrix(3, rounded)),
    "Average": (NUMBER, lambda: im.Average(lambda output: output[0].mean())),
    "GeometricAverage": (NUMBER, lambda: im.GeometricAverage(lambda output: output[1].mean())),
}
METRICS |= {name: (MULTICLASS, getattr(im.clustering, name)) for name in CLUSTERING}
METRICS |= {name: (NUMBER, getattr(im.regression, name)) for name in REGRESSION}

# Their values are neither numbers nor one tensor, or they keep something from batch to batch that only an engine of
# ignite's can tell them.
ATTACHED: dict[str, tuple[Task, Make]] = {
    "ClassificationReport": (MULTICLASS, lambda: im.ClassificationReport(output_dict=True)),
    "RunningAverage": (MULTICLASS, lambda: im.RunningAverage(im.Accuracy())),
    "RocCurve": (BINARY, im.RocCurve),
    "PrecisionRecallCurve": (BINARY, im.PrecisionRecallCurve),
    "VariableAccumulation": (NUMBER, lambda: im.VariableAccumulation(lambda a, x: a + x.sum(), lambda out: out[0])),
}


def ignite_values(task: Task, make: Make) -> list[tuple[Any, Any]]:
    """Return the training and the validation value of each epoch, by ignite's own engine."""
    torch.manual_seed(0)
    model, data = task.model(), task.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: IgniteEngine, batch: Any) -> Any:
        model.train()
        optimizer.zero_grad()
        output = model(batch[0])
        task.loss(output, batch[1]).backward()
        optimizer.step()
        return output.detach(), batch[1]

    def evaluation_step(engine: IgniteEngine, batch: Any) -> Any:
        model.eval()
        with torch.no_grad():
            return model(batch[0]), batch[1]

    trainer, evaluator = IgniteEngine(train_step), IgniteEngine(evaluation_step)
    seen: list[tuple[Any, Any]] = []
    for engine in (trainer, evaluator):
        make().attach(engine, "m")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(data[:2]))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seen.append((trainer.state.metrics["m"], evaluator.state.metrics["m"]))
    )
    trainer.run(data, max_epochs=2)
    return seen


def our_values(task: Task, metrics: dict[str, Any], bridge: Ignite, read: Callable[[EpochEnd], Any]) -> list[Any]:
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, task.loss, metrics=metrics, callbacks=[bridge])
    seen: list[Any] = []
    trainer.subscribe(EpochEnd, lambda event: seen.append(read(event)))
    trainer.fit(task.data(), task.data()[:2], epochs=2)
    return seen


@pytest.mark.parametrize("name", METRICS | ATTACHED)
def test_a_metric_attached_to_the_bridge_has_ignites_values(name: str) -> None:
    task, make = (METRICS | ATTACHED)[name]
    bridge = Ignite()
    sides = (bridge.train, bridge.val)
    for side in sides:
        make().attach(side, "m")
    ours = our_values(task, {}, bridge, lambda event: tuple(side.state.metrics["m"] for side in sides))
    theirs = ignite_values(task, make)
    assert len(theirs) == 2
    assert same(ours, theirs)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_the_trainer_has_ignites_values(name: str) -> None:
    task, make = METRICS[name]

    def read(event: EpochEnd) -> Any:
        return tuple(gather(event.metrics, f"{stage}_m") for stage in ("train", "val"))

    def gather(values: Any, prefix: str) -> Any:
        parts = {key.removeprefix(f"{prefix}_"): value for key, value in values.items() if key.startswith(prefix)}
        return parts.get(prefix, parts)

    ours = our_values(task, {"m": make()}, Ignite(), read)
    torch.testing.assert_close(as_tensors(ours), as_tensors(ignite_values(task, make)), rtol=1e-6, atol=0)


def as_tensors(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: as_tensors(value) for name, value in values.items()}
    if isinstance(values, tuple) or (isinstance(values, list) and isinstance(values[0], tuple)):
        return [as_tensors(value) for value in values]
    return torch.as_tensor(values, dtype=torch.float64)


# The documentation -------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "ignite.md").read_text()


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    names: dict[str, Any] = {"model": parts()[0], "train_loader": TRAIN, "val_loader": VAL}
    exec(compile(example, "docs/ignite.md", "exec"), names)
    assert names["history"].reason == "a handler of pytorch-ignite called terminate()"
    assert [path.suffix for path in tmp_path.glob("best/*")] == [".pt"]


def test_the_page_names_everything_that_was_tried() -> None:
    assert [name for name in METRICS | ATTACHED if f"`{name.split()[0]}`" not in PAGE] == []
    source = Path(__file__).read_text()
    tried = set(re.findall(r"\bih\.(\w+)", source))
    assert {name for name in tried if f"`{name}`" not in PAGE} == set()
