"""A user's mistake goes in; the right error, or the right outcome, comes out.

Every refusal says in one sentence what is the case, and in a last one what to write instead. What can be known
before training is refused before the model has seen a batch.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import BinaryAccuracy, BinaryConfusionMatrix

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    EarlyStopping,
    FreezeUntil,
    LearningRateFinder,
    Metrics,
    MixedPrecision,
    Penalty,
    Placement,
    ProgressBar,
    Report,
    RunDirectory,
    Schedule,
    StopOnNonFinite,
    TensorBoard,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import (
    Callback,
    CamshaftError,
    CheckpointError,
    ConfigurationError,
    DataError,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    FocalLoss,
    HandlerError,
    StepEnd,
    SymmetricCrossEntropy,
    Trainer,
    after,
    at,
    decay_groups,
    every,
    every_seconds,
    repeat,
    until,
)

# How the last sentence of a refusal begins: with what to do, or with the names to choose from.
ADVICE = (
    "Write|Pass|Give|Build|Set|Record|Return|Reduce|Look|Attach|Say|State|Watch|Subscribe|Lower|Derive|Let|Train|"
    "Did you|Hooks:|Events:|Devices:|Parameters:"
)


@contextmanager
def refused(kind: type[Exception], *phrases: str) -> Iterator[None]:
    """Expect exactly ``kind``, with each phrase, one sentence of fact, and a last one of what to write instead."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    message = str(caught.value)
    for phrase in phrases:
        assert phrase in message
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", message)
    assert len(sentences) >= 2, message
    assert re.match(ADVICE, sentences[-1]), message


class CountingModel(nn.Linear):
    """A linear layer from two numbers to one, that counts the batches it has seen."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.num_calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(input)


def make_trainer(model: nn.Module | None = None, **arguments: Any) -> Engine:
    model = CountingModel() if model is None else model
    if "optimizer" not in arguments:
        arguments["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, **({"loss_fn": nn.MSELoss()} | arguments))


def num_calls(trainer: Engine) -> int:
    model = trainer.parts["model"]
    assert isinstance(model, CountingModel)
    return model.num_calls


def make_batches(num_batches: int = 3, batch_size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(batch_size, 2), torch.ones(batch_size, 1)) for _ in range(num_batches)]


def make_loader(num_samples: int, **arguments: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.ones(num_samples, 2), torch.ones(num_samples, 1)), **arguments)


def mean_error(output: Tensor, target: Tensor) -> Tensor:
    """Return a metric that does not say which direction is better."""
    return (output - target).abs().mean()


@pytest.fixture
def below_a_file(tmp_path: Path) -> Path:
    """A directory that nobody can make, root neither: a regular file stands in its way."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "directory"


# Settings -------------------------------------------------------------------------------------------------

Case = tuple[Callable[..., object], dict[str, Any], str]

SETTINGS: list[Case] = [
    (every, {"n": 0}, "got every(0)"),
    (every, {"n": -3}, "got every(-3)"),
    (every, {"n": 1.5}, "got every(1.5)"),
    (every, {"n": "2"}, "got every('2')"),
    (every, {"n": True}, "got every(True)"),
    (at, {"n": 0}, "got at(0)"),
    (after, {"n": -1}, "got after(-1)"),
    (until, {"n": 0}, "got until(0)"),
    (every_seconds, {"seconds": 0}, "got every_seconds(0)"),
    (every_seconds, {"seconds": -1.0}, "got every_seconds(-1.0)"),
    (every_seconds, {"seconds": math.nan}, "got every_seconds(nan)"),
    (every_seconds, {"seconds": "1"}, "got every_seconds('1')"),
    (EarlyStopping, {"monitor": "accuracy"}, "'accuracy', which does not say of which stage"),
    (EarlyStopping, {"monitor": "val_acc", "mode": "minimum"}, "mode='minimum'. Did you mean \"min\"?"),
    (EarlyStopping, {"monitor": "val_acc", "mode": "auto"}, "mode='auto'"),
    (EarlyStopping, {"monitor": "val_acc", "patience": -1}, "patience is -1"),
    (EarlyStopping, {"monitor": "val_acc", "patience": 0}, "patience is 0"),
    (EarlyStopping, {"monitor": "val_acc", "patience": 1.5}, "patience is 1.5"),
    (EarlyStopping, {"monitor": "val_acc", "min_delta": -0.1}, "min_delta=-0.1"),
    (EarlyStopping, {"monitor": "val_acc", "min_delta": math.nan}, "min_delta=nan"),
    (EarlyStopping, {"monitor": "val_acc", "min_delta": "0.1"}, "min_delta='0.1'"),
    (EarlyStopping, {"monitor": "val_acc", "on_nan": "ignore"}, "on_nan='ignore'"),
    (BestCheckpoint, {"monitor": "loss"}, "'loss', which does not say of which stage"),
    (BestCheckpoint, {"monitor": "val_acc", "mode": "maximum"}, 'Did you mean "max"?'),
    (BestCheckpoint, {"monitor": "val_acc", "top_k": 0}, "top_k is 0"),
    (BestCheckpoint, {"monitor": "val_acc", "top_k": 2.0}, "top_k is 2.0"),
    (Accumulate, {}, "batches=None and samples=None"),
    (Accumulate, {"batches": 4, "samples": 32}, "batches=4 and samples=32"),
    (Accumulate, {"batches": 0}, "batches is 0"),
    (Accumulate, {"batches": 2.5}, "batches is 2.5"),
    (Accumulate, {"samples": -8}, "samples is -8"),
    (ClipGradients, {}, "norm=None and value=None"),
    (ClipGradients, {"norm": 1.0, "value": 1.0}, "norm=1.0 and value=1.0"),
    (ClipGradients, {"norm": -1.0}, "limit of -1.0"),
    (ClipGradients, {"norm": 0.0}, "limit of 0.0"),
    (ClipGradients, {"norm": math.nan}, "limit of nan"),
    (ClipGradients, {"norm": math.inf}, "limit of inf"),
    (ClipGradients, {"value": "1"}, "limit of '1'"),
    (Placement, {"device": "cuda:99"}, "Device 'cuda:99' is not here"),
    (Placement, {"device": "gpu"}, "Device 'gpu' is not here"),
    (Placement, {"device": ""}, "Device '' is not here"),
    (Placement, {"device": None}, "Device 'None' is not here"),
    (MixedPrecision, {"precision": "fp8"}, "does not know 'fp8'"),
    (MixedPrecision, {"precision": "float16"}, "does not know 'float16'"),
    (Metrics, {"metrics": [BinaryAccuracy()]}, "each needs a name"),
    (Metrics, {"metrics": {"acc": BinaryAccuracy}}, "the class BinaryAccuracy. Did you forget ()?"),
    (Metrics, {"metrics": {"acc": "accuracy"}}, "'acc' is 'accuracy', which cannot be computed"),
    (Metrics, {"metrics": {"acc": lambda output: output}}, "'acc'"),
    (ProgressBar, {"repaint_seconds": 0}, "every_seconds(0)"),
    (ProgressBar, {"line_seconds": -1}, "every_seconds(-1)"),
    (Schedule, {"scheduler": StepLR}, "StepLR'>, which is no scheduler"),
    (Schedule, {"scheduler": "cosine"}, "'cosine', which is no scheduler"),
    (Schedule, {"scheduler": lambda optimizer: StepLR(optimizer, 1), "per": "batch"}, "per='batch'"),
    (warmup_cosine, {"optimizer": None, "warmup": -1, "total": 10}, "warmup is -1"),
    (warmup_cosine, {"optimizer": None, "warmup": 10, "total": 10}, "leaves nothing of total=10"),
    (WeightAverage, {"kind": "mean"}, "does not know 'mean'"),
    (WeightAverage, {"decay": 1.0}, "decay=1.0"),
    (WeightAverage, {"decay": math.nan}, "decay=nan"),
    (WeightAverage, {"every": 0}, "every is 0"),
    (WeightAverage, {"start": -1}, "start is -1"),
    (Penalty, {}, "l1=0.0 and l2=0.0"),
    (Penalty, {"l1": -1.0}, "l1=-1.0 and l2=0.0"),
    (Penalty, {"l2": math.nan}, "l2=nan"),
    (Penalty, {"l2": math.inf}, "l2=inf"),
    (FreezeUntil, {"epoch": 1, "parameters": ["weight"]}, "epoch is 1"),
    (StopOnNonFinite, {"policy": "warn"}, "does not know 'warn'"),
    (StopOnNonFinite, {"every_steps": 0}, "every_steps is 0"),
    (LearningRateFinder, {"min_lr": 1.0, "max_lr": 0.1}, "The range is 1.0 to 0.1"),
    (LearningRateFinder, {"num_steps": 1}, "num_steps is 1"),
    (LearningRateFinder, {"smoothing": 1.0}, "smoothing is 1.0"),
    (decay_groups, {"model": nn.Linear(2, 1), "weight_decay": -1e-5}, "weight_decay is -1e-05"),
    (decay_groups, {"model": nn.Linear(2, 1), "weight_decay": 0.1, "which": "weight"}, "Pass a list: ['weight']"),
    (FocalLoss, {"alpha": 1.5}, "alpha is 1.5"),
    (FocalLoss, {"gamma": -1.0}, "gamma is -1.0"),
    (SymmetricCrossEntropy, {"beta": -1.0}, "beta is -1.0"),
    (Engine, {"step": "train"}, "step is 'train', not a function"),
    (Engine, {"seed": -1}, "seed is -1"),
    (Engine, {"seed": 1.5}, "seed is 1.5"),
]


@pytest.mark.parametrize(("make", "settings", "phrase"), SETTINGS)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)


def test_a_device_that_is_not_there_is_answered_with_those_that_are() -> None:
    with refused(ConfigurationError, "cpu", '"auto"'):
        Placement("cuda:99")


@pytest.mark.parametrize("settings", ["fast", 3, ["lr", 0.1]])
def test_settings_of_a_run_need_names(settings: object, tmp_path: Path) -> None:
    with refused(ConfigurationError, f"settings is {settings!r}"):
        RunDirectory(tmp_path, settings=settings)


# What a trainer is made of --------------------------------------------------------------------------------

TRAINERS: list[tuple[dict[str, Any], str]] = [
    ({"model": nn.Linear}, "model is the class Linear, not an instance. Did you forget ()?"),
    ({"model": "resnet18"}, "model is 'resnet18', of type str"),
    ({"optimizer": torch.optim.SGD}, "optimizer is the class SGD, not an instance. Did you forget ()?"),
    ({"optimizer": "adam"}, "optimizer is 'adam', of type str"),
    ({"loss_fn": nn.MSELoss}, "loss_fn is the class MSELoss, not an instance. Did you forget ()?"),
    ({"loss_fn": "mse"}, "loss_fn is 'mse', which cannot be called"),
    ({"metrics": [mean_error]}, "each needs a name"),
    ({"metrics": {"acc": BinaryAccuracy}}, "Did you forget ()?"),
    ({"metrics": {"loss": mean_error}}, 'Two metrics are named "loss"'),
    ({"seed": "0"}, "seed is '0'"),
    ({"callbacks": [ProgressBar]}, "the class ProgressBar, not an instance. Did you forget ()?"),
    ({"callbacks": ["early_stopping"]}, "'early_stopping', which is not a Callback"),
    ({"callbacks": [print]}, "which is not a Callback"),
    ({"callbacks": [None]}, "None, which is not a Callback"),
    ({"callbacks": ProgressBar()}, "callbacks is"),
    ({"callbacks": "early_stopping"}, "callbacks is 'early_stopping'"),
]


@pytest.mark.parametrize(("arguments", "phrase"), TRAINERS)
def test_a_trainer_refuses_a_part_of_the_wrong_kind(arguments: dict[str, Any], phrase: str) -> None:
    model = nn.Linear(2, 1)
    fitting: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.MSELoss(),
    }
    with refused(ConfigurationError, phrase):
        Trainer(**(fitting | arguments))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with refused(ConfigurationError, "holds none of the model's parameters"):
        make_trainer(optimizer=torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))


def test_an_optimizer_that_lacks_some_parameters_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    make_trainer(model, optimizer=torch.optim.SGD([model.weight], lr=0.1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 2 trainable parameters are not in the optimizer and will not learn: bias." in caplog.text


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    model = nn.Linear(2, 1)
    with refused(ConfigurationError, "LBFGS evaluates the loss several times per step"):
        make_trainer(model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_a_learning_rate_that_cannot_work_is_refused_before_the_run(rate: float) -> None:
    trainer = make_trainer()
    trainer.parts["optimizer"].param_groups[0]["lr"] = rate  # as by a schedule or by --lr; torch lets NaN through
    with refused(ConfigurationError, f"learning rate of parameter group 0 is {rate}"):
        trainer.fit(make_batches(), epochs=1)
    assert num_calls(trainer) == 0


def test_one_metric_name_in_two_places_is_refused_at_attachment() -> None:
    trainer = make_trainer(metrics={"acc": mean_error})
    with refused(ConfigurationError, 'Two metrics are named "acc"'):
        trainer.attach(Metrics({"acc": BinaryAccuracy()}))


@pytest.mark.parametrize("metric", [BinaryAccuracy(), mean_error])
def test_a_value_recorded_under_the_name_of_a_metric_is_refused(metric: Any) -> None:
    def step(engine: Engine, batch: Tensor) -> dict[str, Tensor]:
        engine.measure(torch.ones(4), torch.ones(4, dtype=torch.int64), weight=4)
        return {"acc": torch.tensor(0.5)}

    engine = Engine(step, callbacks=[Metrics({"acc": metric})])
    with pytest.raises(CamshaftError, match="acc"):
        engine.fit([torch.ones(4)], epochs=1)


@pytest.mark.parametrize("make", [ProgressBar, partial(EarlyStopping, "val_loss"), partial(ClipGradients, 1.0)])
def test_one_callback_attached_twice_is_refused(make: Callable[[], Callback]) -> None:
    callback = make()
    with refused(ConfigurationError, f"{callback!r} is attached twice"):
        make_trainer(callbacks=[callback, callback])


@pytest.mark.parametrize("make", [partial(Penalty, l2=0.1), partial(FreezeUntil, 2)])
@pytest.mark.parametrize(
    ("parameters", "phrase"),
    [
        (["wieght"], 'No parameter matches "wieght". Did you mean "weight"? Parameters: weight, bias.'),
        (["encoder.*"], 'No parameter matches "encoder.*". Parameters: weight, bias.'),
        ("weight", "parameters is the string 'weight'. Pass a list: ['weight']."),
        (lambda name, parameter: False, "No parameter was chosen"),
    ],
)
def test_parameters_that_the_model_does_not_have_are_told_at_attachment(
    make: Callable[..., Callback], parameters: object, phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make_trainer(callbacks=[make(parameters=parameters)])


OTHER = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("schedule", "phrase"),
    [
        (Schedule(StepLR(OTHER, 1)), "over another optimizer than the run's"),
        (Schedule(partial(StepLR, step_size=1), monitor="val_loss"), "StepLR and monitor='val_loss'"),
        (Schedule(lambda optimizer: ReduceLROnPlateau(optimizer)), "ReduceLROnPlateau and monitor=None"),
        (Schedule(lambda optimizer: None), "None"),  # type: ignore[arg-type, return-value]  # the mistake under test
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_at_attachment(schedule: Schedule, phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        make_trainer(callbacks=[schedule])


def test_two_run_directories_are_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    with refused(ConfigurationError, "has a RunDirectory already"):
        make_trainer(callbacks=[first, RunDirectory(tmp_path)])


def test_a_best_checkpoint_without_a_model_is_refused() -> None:
    with refused(ConfigurationError, "no part named model"):
        Engine(callbacks=[BestCheckpoint("val_loss", "min")])


# Handlers -------------------------------------------------------------------------------------------------


def no_arguments() -> None: ...
def two_arguments(event: StepEnd, step: int) -> None: ...
def only_by_keyword(*, event: StepEnd) -> None: ...
async def asynchronous(event: StepEnd) -> None: ...
async def asynchronous_generator(event: StepEnd) -> Any:
    yield event


def generator(event: StepEnd) -> Iterator[StepEnd]:
    yield event


class AsynchronousObject:
    async def __call__(self, event: StepEnd) -> None: ...


@pytest.mark.parametrize(
    ("handler", "phrase"),
    [
        (no_arguments, "no_arguments() takes no arguments, but a StepEnd handler receives the event"),
        (two_arguments, "two_arguments() takes event, step, but"),
        (only_by_keyword, "only_by_keyword() takes event, but"),
        (asynchronous, "asynchronous() is async or a generator, so a call would not run it"),
        (asynchronous_generator, "asynchronous_generator() is async or a generator"),
        (AsynchronousObject(), "async"),
        (generator, "generator() is async or a generator"),
        (AsynchronousObject, "AsynchronousObject is not a function"),
        ("print", "'print' is not a function"),
        (None, "None is not a function"),
    ],
)
def test_a_handler_that_cannot_take_one_event_is_refused_at_subscription(handler: Any, phrase: str) -> None:
    with refused(HandlerError, phrase, "(event: StepEnd)"):
        Engine().subscribe(StepEnd, handler)


@pytest.mark.parametrize(
    ("event", "phrase"),
    [
        ("step_end", "'step_end' is not an event class"),
        (Event, "is not an event class"),
        (int, "is not an event class"),
        (None, "None is not an event class"),
        (FitStart(Engine()), "is one event, not a class of them. Write FitStart."),
    ],
)
def test_what_is_no_event_class_is_refused_at_subscription(event: Any, phrase: str) -> None:
    with refused(HandlerError, phrase):
        Engine().subscribe(event, print)


def test_on_without_its_event_is_refused() -> None:
    on: Any = Engine().on
    with refused(HandlerError, "is not an event class"):

        @on  # type: ignore[untyped-decorator]  # the mistake under test: @engine.on for @engine.on(StepEnd)
        def handler(event: StepEnd) -> None: ...


@pytest.mark.parametrize(
    ("when", "phrase"),
    [
        (100, "when=100 is not a filter. Write every(100), at(100)"),
        (0.5, "when=0.5 is not a filter"),
        ("every 100", "when='every 100' is not a filter"),
        (every, "when=every is a class, not a filter. Write every(...)"),
        (lambda: True, "when="),
    ],
)
def test_a_when_that_is_no_filter_is_refused_at_subscription(when: Any, phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        Engine().subscribe(StepEnd, print, when=when)


@pytest.mark.parametrize("hook", ["on_step_ended", "on_stepend", "on_steps_end"])
def test_a_misspelt_hook_is_refused_with_the_nearest_name(hook: str) -> None:
    callback = type("Mine", (Callback,), {hook: lambda self, event: None})()
    with refused(HandlerError, f'Mine.{hook} matches no event. Did you mean "on_step_end"? Hooks: on_fit_start'):
        Engine(callbacks=[callback])


@pytest.mark.parametrize(
    ("hook", "phrase"),
    [
        (lambda self: None, "takes no arguments, but a StepEnd handler receives the event"),
        (lambda self, event, step: None, "takes event, step, but a StepEnd handler receives the event"),
    ],
)
def test_a_hook_with_a_wrong_signature_is_refused_at_attachment(hook: Callable[..., Any], phrase: str) -> None:
    callback = type("Mine", (Callback,), {"on_step_end": hook})()
    with refused(HandlerError, phrase):
        Engine(callbacks=[callback])


def test_an_asynchronous_hook_is_refused_at_attachment() -> None:
    class Mine(Callback):
        async def on_step_end(self, event: StepEnd) -> None: ...  # type: ignore[override]  # the mistake

    with refused(HandlerError, "Mine.on_step_end() is async"):
        Engine(callbacks=[Mine()])


@pytest.mark.parametrize(("scope", "hint"), [("foward", 'Did you mean "forward"?'), ("step", "Write")])
def test_a_scope_that_does_not_exist_is_refused(scope: Any, hint: str) -> None:
    with refused(ConfigurationError, f'"{scope}" is not a scope.', hint, "Write one of: fit, forward, evaluation"):
        Engine().listeners.around(scope, lambda: torch.no_grad())


@pytest.mark.parametrize("manager", [nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_a_context_manager_instead_of_a_function_that_makes_one_is_refused(manager: Any) -> None:
    with refused(ConfigurationError, "forward"):
        Engine().listeners.around(
            "forward", manager
        )  # one made beforehand serves once, but a scope is entered on each step


def test_an_error_in_a_handler_comes_out_with_handler_event_and_step() -> None:
    def explode(event: StepEnd) -> None:
        raise KeyError("my own mistake")

    trainer = make_trainer()
    trainer.subscribe(StepEnd, explode, when=at(2))
    with pytest.raises(KeyError, match="my own mistake") as caught:
        trainer.fit(make_batches(), epochs=1)
    notes = " ".join(caught.value.__notes__)
    assert re.search(r"explode, a handler of StepEnd, at step 2\.", notes)
    assert "At step 2, batch 2 of epoch 1." in notes


# How far to go --------------------------------------------------------------------------------------------

PLANS: list[tuple[dict[str, Any], str]] = [
    ({"epochs": None}, "Neither epochs nor max_steps was given"),
    ({"epochs": -5}, "epochs is -5"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epochs": "2"}, "epochs is '2'"),
    ({"epochs": True}, "epochs is True"),
    ({"epochs": math.inf}, "epochs is inf"),
    ({"max_steps": -1}, "max_steps is -1"),
    ({"max_steps": 10.0}, "max_steps is 10.0"),
    ({"min_epochs": -1}, "min_epochs is -1"),
    ({"min_epochs": 3}, "min_epochs=3 is more than epochs=2"),
    ({"min_epochs": None}, "min_epochs is None"),
    ({"epoch_length": 0}, "epoch_length is 0"),
    ({"epoch_length": 2.0}, "epoch_length is 2.0"),
    ({"validate_every": 0}, "validate_every is 0"),
    ({"validate_every": -1}, "validate_every is -1"),
    ({"validate_every": 0.5}, "validate_every is 0.5"),
    ({"validate_every": "0 steps"}, "validate_every is 0"),
    ({"validate_every": "5 minutes"}, "validate_every='5 minutes' is not an interval"),
    ({"validate_every": "often"}, "validate_every='often' is not an interval"),
    ({"validate_every": "1.5 epochs"}, "validate_every='1.5 epochs' is not an interval"),
]


@pytest.mark.parametrize(("plan", "phrase"), PLANS)
def test_a_plan_that_cannot_work_is_refused_before_the_run(plan: dict[str, Any], phrase: str) -> None:
    trainer = make_trainer()
    with refused(ConfigurationError, phrase):
        trainer.fit(make_batches(), make_batches(), **({"epochs": 2} | plan))
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("epochs", [-5, 1.5, "2", None])
def test_the_script_style_refuses_a_plan_before_the_first_epoch(epochs: Any) -> None:
    with refused(ConfigurationError, "epochs"):
        Engine().epochs(epochs)  # refused by the call, not by the first turn of a loop


def test_an_epoch_count_from_numpy_is_a_whole_number() -> None:
    trainer = make_trainer()
    trainer.fit(make_batches(), epochs=np.int64(2))  # type: ignore[arg-type]  # what a sweep over an array passes
    assert trainer.epoch == 2


@pytest.mark.parametrize("plan", [{"epochs": 0}, {"max_steps": 0}])
def test_no_epochs_fire_start_and_end_and_nothing_else(plan: dict[str, Any]) -> None:
    trainer = make_trainer()
    fired: list[type[Event]] = []
    for event in (FitStart, EpochStart, StepEnd, EpochEnd, FitEnd):
        trainer.subscribe(event, lambda event: fired.append(type(event)))
    trainer.fit(make_batches(), **plan)
    assert (fired, num_calls(trainer)) == ([FitStart, FitEnd], 0)


def test_a_second_fit_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "camshaft")
    trainer = make_trainer()
    trainer.fit(make_batches(), epochs=2)
    assert "Going on" not in caplog.text
    trainer.fit(make_batches(), epochs=2)
    assert "Going on from epoch 2, step 6." in caplog.text
    assert trainer.history["epoch"] == [1, 2, 3, 4]
    assert trainer.history["step"] == [3, 6, 9, 12]


def test_a_run_within_a_run_is_refused_and_leaves_the_engine_usable() -> None:
    trainer = make_trainer()
    nested = trainer.subscribe(EpochEnd, lambda event: trainer.fit(make_batches(), epochs=1))
    with refused(EngineStateError, "already running"):
        trainer.fit(make_batches(), epochs=2)
    nested.cancel()
    trainer.fit(make_batches(), epochs=2)
    assert trainer.history.reason == "2 epochs done"


def test_a_loop_within_a_loop_is_refused() -> None:
    engine = Engine()
    for _ in engine.epochs(1):
        with refused(EngineStateError, "already running"):
            next(iter(engine.epochs(1)))
        assert len(list(engine.train([1, 2]))) == 2


OUTSIDE: list[tuple[Callable[[Engine], object], str]] = [
    (lambda engine: engine.stop("enough"), "engine.stop was called outside a run"),
    (lambda engine: next(iter(engine.train([1]))), "engine.train was called outside a run"),
    (lambda engine: next(iter(engine.validate([1]))), "engine.validate was called outside a run"),
    (lambda engine: engine.record(loss=0.5, weight=1), "recorded outside a stage"),
    (lambda engine: engine.measure(torch.ones(1), torch.ones(1), weight=1), "recorded outside a stage"),
]


@pytest.mark.parametrize(("call", "phrase"), OUTSIDE)
def test_a_call_that_needs_a_run_says_so_outside_of_one(call: Callable[[Engine], object], phrase: str) -> None:
    with refused(EngineStateError, phrase):
        call(Engine())


def test_a_fit_without_a_step_is_refused() -> None:
    with refused(ConfigurationError, "This engine has no step"):
        Engine().fit([torch.ones(2)], epochs=1)


def test_an_update_without_an_optimizer_names_the_parts_there_are() -> None:
    model = nn.Linear(2, 1)
    engine = Engine(lambda engine, batch: engine.update(model(batch).sum()), model=model)
    with refused(EngineStateError, "part named optimizer, but the parts are: model"):
        engine.fit([torch.ones(4, 2)], epochs=1)


# Data -----------------------------------------------------------------------------------------------------


class NoItems(IterableDataset[Tensor]):
    """A stream that has ended before it began, and knows no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


EMPTY: list[tuple[Any, str]] = [
    ([], "is a list without a single batch"),
    ((), "is a tuple without a single batch"),
    (make_loader(3, batch_size=4, drop_last=True), "drop_last=True drops a last batch of fewer than 4"),
    (DataLoader(NoItems(), batch_size=4), "is a DataLoader without a single batch"),
    (lambda: iter(()), "without a single batch"),
]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize(("empty", "phrase"), EMPTY)
def test_empty_data_are_refused_by_name(empty: Any, phrase: str, name: str) -> None:
    data = {"train": make_batches(1), "val": make_batches(1)} | {name: empty}
    trainer = make_trainer()
    with refused(DataError, f"{name} is", phrase):
        trainer.fit(**data, epochs=1)
    # A length tells beforehand; a stream has to be read.
    known = isinstance(empty, list | tuple) or getattr(empty, "drop_last", False)
    assert num_calls(trainer) == (0 if known or name == "train" else 1)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_empty_data_are_refused_outside_a_run_too(call: str) -> None:
    with refused(DataError, "is a list without a single batch"):
        getattr(make_trainer(), call)([])


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (TensorDataset(torch.ones(4, 2)), "a TensorDataset, which is not an iterable of batches"),
        ("train.csv", "a str, which is not an iterable of batches"),
        (32, "an int, which is not an iterable of batches"),
    ],
)
def test_what_gives_no_batches_is_refused_before_the_run(name: str, data: Any, phrase: str) -> None:
    trainer = make_trainer()
    with refused(ConfigurationError, f"{name} is", phrase.partition(" ")[2]):
        trainer.fit(**({"train": make_batches(), "val": make_batches()} | {name: data}), epochs=1)
    assert num_calls(trainer) == 0


def test_a_generator_is_refused_when_a_second_epoch_needs_it() -> None:
    trainer = make_trainer()
    with refused(DataError, "train is a generator that is used up", "a function that returns it"):
        trainer.fit((batch for batch in make_batches()), epochs=2)
    assert (trainer.epoch, num_calls(trainer)) == (2, 3)


def test_a_generator_is_refused_when_a_second_validation_needs_it() -> None:
    with refused(DataError, "val is a generator that is used up"):
        make_trainer().fit(make_batches(), (batch for batch in make_batches()), epochs=2)


def test_a_function_that_returns_a_generator_serves_every_epoch() -> None:
    trainer = make_trainer()
    history = trainer.fit(lambda: (batch for batch in make_batches()), lambda: iter(make_batches()), epochs=2)
    assert history["step"] == [3, 6]
    assert len(history["val_loss"]) == 2


def test_a_generator_serves_one_epoch() -> None:
    assert make_trainer().fit((batch for batch in make_batches()), epochs=1)["step"] == [3]


def test_an_epoch_longer_than_known_data_is_refused_before_the_run() -> None:
    trainer = make_trainer()
    with refused(DataError, "7", "epoch_length=10"):
        trainer.fit(make_batches(7), epochs=1, epoch_length=10)
    assert num_calls(trainer) == 0


def test_an_epoch_longer_than_a_stream_is_refused_where_the_stream_ends() -> None:
    trainer = make_trainer()
    with refused(DataError, "Data ended after 7 steps of epoch 1, but epoch_length=10. Pass epoch_length=7"):
        trainer.fit(lambda: iter(make_batches(7)), epochs=1, epoch_length=10)
    assert num_calls(trainer) == 7


def test_data_are_repeated_on_request() -> None:
    assert make_trainer().fit(repeat(make_batches(7)), epochs=2, epoch_length=10)["step"] == [10, 20]


def test_more_steps_than_one_pass_take_further_epochs() -> None:
    history = make_trainer().fit(make_batches(3), max_steps=7)
    assert history["step"] == [3, 6, 7]
    assert history.reason == "max_steps=7 reached"


# Batches --------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    image: Tensor
    label: Tensor


X, Y = torch.ones(4, 2), torch.ones(4, 1)


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], {"image": X, "label": Y}, {"x": X, "y": Y}, {"input": X, "targets": Y}, Sample(X, Y)],
)
def test_a_list_of_batches_is_a_loader_whatever_the_batches_are(batch: Any) -> None:
    trainer = make_trainer()
    history = trainer.fit([batch, batch], [batch], epochs=3)
    assert num_calls(trainer) == 9
    assert history["train_loss"][2] < history["train_loss"][0]


@pytest.mark.parametrize(
    ("batch", "phrase"),
    [
        ((X, Y, Y), "A batch is a tuple of 3 (Tensor [4, 2], Tensor [4, 1], Tensor [4, 1])"),
        ([], "A batch is a list of 0"),
        ({"label": Y}, "A batch is dict with keys label"),
        ({"x": X, "label": Y, "target": Y}, "A batch is dict with keys x, label, target"),
        ("image.png", "A batch is of type str"),
        (None, "A batch is None"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_before_the_model_sees_it(batch: Any, phrase: str) -> None:
    trainer = make_trainer()
    with refused(DataError, phrase, "prepare_batch"):
        trainer.fit([batch], epochs=1)
    assert num_calls(trainer) == 0


def test_a_batch_of_three_works_with_a_function_that_splits_it() -> None:
    trainer = make_trainer(prepare_batch=lambda batch: (batch[0], batch[2]))
    assert trainer.fit([(X, "names", Y)], epochs=2)["step"] == [1, 2]


def test_a_bare_tensor_is_a_batch_without_a_target() -> None:
    trainer = make_trainer(loss_fn=lambda output: output.pow(2).mean())
    assert trainer.fit([X], epochs=2)["step"] == [1, 2]


def test_a_loss_that_needs_a_target_says_that_there_is_none() -> None:
    with refused(DataError, "the output, Tensor [4, 1], and the target, None"):
        make_trainer().fit([X], epochs=1)


def test_a_number_of_samples_that_cannot_be_known_must_be_stated() -> None:
    def step(engine: Engine, batch: Mapping[str, Any]) -> dict[str, float]:
        return {"score": 0.5}

    with refused(DataError, "A batch is dict with keys text, so its number of samples cannot be known", "weight="):
        Engine(step).fit([{"text": "a b c"}], epochs=1)


def test_tensors_that_disagree_tell_no_number_of_samples() -> None:
    with refused(DataError, "(Tensor [4, 2], Tensor [3, 1]), so its number of samples cannot be known"):
        Engine(lambda engine, batch: {"score": 0.5}).fit([(X, Y[:3])], epochs=1)


def test_a_last_batch_of_one_with_batch_normalisation_is_answered_with_drop_last() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    trainer = make_trainer(model)
    with refused(DataError, "a batch of one sample at step 3", "drop_last=True"):
        trainer.fit(make_loader(9, batch_size=4), epochs=1)
    trainer.fit(make_loader(9, batch_size=4, drop_last=True), epochs=1)


class BrokenSample(Dataset[tuple[Tensor, Tensor]]):
    """Twelve samples, of which the ninth cannot be read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 8:
            raise OSError("image 8 is truncated")
        return torch.ones(2), torch.ones(1)


def test_a_sample_that_raises_is_told_with_its_place() -> None:
    loader = DataLoader(BrokenSample(), batch_size=4)
    trainer = make_trainer()
    with pytest.raises(OSError, match="image 8 is truncated") as caught:
        trainer.fit(make_batches(1), loader, epochs=1)
    assert "While reading batch 3 of the val data in epoch 1." in caught.value.__notes__
    with pytest.raises(OSError, match="image 8 is truncated") as caught:
        trainer.fit(loader, epochs=1)
    assert "While reading batch 3 of the train data in epoch 2." in caught.value.__notes__


class DyingWorker(Dataset[tuple[Tensor, Tensor]]):
    """Twelve samples; the process that reads sample ``at_index`` dies, as if it had run out of memory."""

    def __init__(self, at_index: int) -> None:
        self.at_index = at_index

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at_index:
            time.sleep(0.2)  # until the main process waits for the batch, or is at work on another one
            os._exit(1)
        return torch.ones(2), torch.ones(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_worker_that_dies_is_told_with_the_likely_reason(batch: int) -> None:
    loader = DataLoader(DyingWorker(at_index=4 * (batch - 1)), batch_size=4, num_workers=1)
    trainer = make_trainer()
    trainer.subscribe(StepEnd, lambda event: time.sleep(5))  # torch interrupts it when a worker of its has died
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        trainer.fit(loader, epochs=1)
    assert "memory or shared memory; try num_workers=0" in " ".join(caught.value.__notes__)


# Model, loss and step -------------------------------------------------------------------------------------


class DictOutput(CountingModel):
    def forward(self, input: Tensor) -> Any:
        return {"logits": super().forward(input), "hidden": input}


def test_an_output_that_the_loss_cannot_take_is_described() -> None:
    with refused(DataError, "The loss MSELoss could not take the output, dict with keys logits, hidden", "loss_fn="):
        make_trainer(DictOutput()).fit(make_batches(), epochs=1)


def test_shapes_that_the_loss_cannot_take_are_described() -> None:
    with refused(DataError, "NLLLoss could not take the output, Tensor [4, 1], and the target, Tensor [3]"):
        make_trainer(loss_fn=nn.NLLLoss()).fit([(X, torch.zeros(3, dtype=torch.int64))], epochs=1)


def test_a_metric_cannot_read_an_output_of_several_parts() -> None:
    trainer = make_trainer(
        DictOutput(),
        loss_fn=lambda output, target: nn.functional.mse_loss(output["logits"], target),
        metrics={"acc": BinaryAccuracy()},
    )
    with refused(DataError, "The metric 'acc' was given the model's output, a dict with keys logits, hidden"):
        trainer.fit(make_batches(), epochs=1)


def detached(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.detach(), target)


LOSSES: list[tuple[Callable[..., Any], str]] = [
    (nn.MSELoss(reduction="none"), "The loss has shape [4, 1], but it must be one number. Reduce it: loss.mean()."),
    (lambda output, target: nn.functional.mse_loss(output, target).item(), "of type float, which has no gradient"),
    (lambda output, target: None, "The loss is None, of type NoneType"),
    (lambda output, target: {"loss": output.mean()}, "of type dict"),
    (detached, "The loss does not depend on any trainable parameter (weight, bias ...)"),
    (lambda output: output.detach().mean(), "Look for .detach(), .item(), argmax or torch.no_grad()"),
]


@pytest.mark.parametrize(("loss_fn", "phrase"), LOSSES)
def test_a_loss_that_cannot_be_trained_on_is_refused_before_an_update(
    loss_fn: Callable[..., Any], phrase: str
) -> None:
    trainer = make_trainer(loss_fn=loss_fn)
    with refused(DataError, phrase):
        trainer.fit(make_batches(), epochs=1)
    assert (num_calls(trainer), trainer.num_updates) == (1, 0)


def test_a_model_frozen_throughout_is_told_by_its_parameters() -> None:
    trainer = make_trainer(CountingModel().requires_grad_(False))
    with refused(DataError, "No parameter of the model is trainable (frozen: weight, bias ...)", "requires_grad"):
        trainer.fit(make_batches(), epochs=1)
    assert trainer.num_updates == 0


def test_an_update_in_a_step_of_ones_own_checks_the_loss_as_well() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(lambda engine, batch: engine.update(model(batch)), model=model, optimizer=optimizer)
    with refused(DataError, "The loss has shape [4, 1]"):
        engine.fit([X], epochs=1)


def test_a_step_that_returns_nothing_records_nothing() -> None:
    seen: list[int] = []

    def step(engine: Engine, batch: int) -> None:
        seen.append(batch)

    history = Engine(step).fit([1, 2, 3], epochs=1)
    assert (seen, list(history)) == ([1, 2, 3], ["epoch", "step"])


@pytest.mark.parametrize(
    ("output", "phrase"),
    [
        (0.5, "The step returned 0.5, of type float. Return None, a tensor, or a dict"),
        ((X, Y), "of type tuple"),
        (torch.ones(8), "loss has shape [8], but a recorded value is one number"),
        ({"acc": torch.ones(8)}, "acc has shape [8], but a recorded value is one number. Reduce it: acc.mean()."),
        ({"acc": "good"}, "acc is 'good', which is not a number"),
        ({"acc": None}, "acc is None, which is not a number"),
    ],
)
def test_a_step_that_returns_what_cannot_be_recorded_is_refused(output: Any, phrase: str) -> None:
    with refused(DataError, phrase):
        Engine(lambda engine, batch: output).fit([X], epochs=1)


def test_a_model_left_in_eval_mode_trains_and_is_given_back_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "camshaft")
    trainer = make_trainer(CountingModel().eval())
    modes: list[bool] = []
    trainer.subscribe(StepEnd, lambda event: modes.append(trainer.parts["model"].training))
    trainer.fit(make_batches(2), make_batches(), epochs=2)
    assert (modes, trainer.parts["model"].training) == ([True] * 4, False)
    assert "The model was in eval mode" in caplog.text


def test_a_model_in_eval_mode_is_given_back_as_it_was_also_after_an_error() -> None:
    def explode(event: StepEnd) -> None:
        raise ZeroDivisionError

    trainer = make_trainer(CountingModel().eval())
    trainer.subscribe(StepEnd, explode)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(make_batches(), epochs=1)
    assert not trainer.parts["model"].training


# Watched values -------------------------------------------------------------------------------------------

Watcher = Callable[..., Callback]
WATCHERS = [EarlyStopping, BestCheckpoint]


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize(
    ("monitor", "nearest"), [("val_accuracy", "val_acc"), ("val_los", "val_loss"), ("train_ac", "train_acc")]
)
def test_a_watched_value_that_will_not_exist_is_told_before_the_run(
    watcher: Watcher, monitor: str, nearest: str
) -> None:
    trainer = make_trainer(metrics={"acc": mean_error}, callbacks=[watcher(monitor, mode="max")])
    with refused(ConfigurationError, f'watches "{monitor}", but', f'Did you mean "{nearest}"?'):
        trainer.fit(make_batches(), make_batches(), epochs=1)
    assert num_calls(trainer) == 0


def test_a_value_that_a_schedule_waits_for_and_will_not_exist_is_told_before_the_run() -> None:
    trainer = make_trainer(callbacks=[Schedule(lambda o: ReduceLROnPlateau(o), monitor="val_los")])
    with refused(ConfigurationError, 'Schedule watches "val_los", but', 'Did you mean "val_loss"?'):
        trainer.fit(make_batches(), make_batches(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watched_value_unlike_any_other_is_answered_with_those_there_are(watcher: Watcher) -> None:
    trainer = make_trainer(callbacks=[watcher("val_f1", mode="max")])
    with refused(ConfigurationError, 'watches "val_f1", but the values are: val_loss.'):
        trainer.fit(make_batches(), make_batches(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_validation_value_without_validation_data_is_told_before_the_run(watcher: Watcher) -> None:
    trainer = make_trainer(callbacks=[watcher("val_loss")])
    with refused(ConfigurationError, 'watches "val_loss", but fit was given no validation data', '"train_loss"'):
        trainer.fit(make_batches(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_direction_that_nobody_stated_is_asked_for_before_the_run(watcher: Watcher) -> None:
    trainer = make_trainer(metrics={"error": mean_error}, callbacks=[watcher("val_error")])
    with refused(ConfigurationError, 'cannot know whether more or less of "val_error" is better', 'mode="max"'):
        trainer.fit(make_batches(), make_batches(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_value_that_a_step_of_ones_own_does_not_record_is_told_at_the_first_validation(watcher: Watcher) -> None:
    engine = Engine(
        lambda engine, batch: {"loss": 0.5, "acc": 0.5},
        callbacks=[watcher("val_accuracy", mode="max")],
        model=nn.Linear(2, 1),
    )
    with refused(ConfigurationError, "the values are: val_loss, val_acc.", 'Did you mean "val_acc"?'):
        engine.fit([X], [X], epochs=5)
    assert (engine.epoch, engine.num_validations) == (1, 1)


def test_a_value_that_a_loop_of_ones_own_does_not_record_is_told_at_the_first_epochs_end() -> None:
    engine = Engine(callbacks=[EarlyStopping("train_acc", mode="max")])
    with refused(ConfigurationError, 'EarlyStopping watches "train_acc", but the values are: train_loss'):
        for _ in engine.epochs(5):
            for _ in engine.train([X]):
                engine.record(loss=0.5)
    assert engine.epoch == 1


def test_a_watched_value_must_be_a_single_number() -> None:
    trainer = make_trainer(
        loss_fn=nn.BCEWithLogitsLoss(),
        metrics={"confusion": BinaryConfusionMatrix()},
        callbacks=[EarlyStopping("val_confusion", mode="max")],
    )
    with refused(ConfigurationError, 'watches "val_confusion", which has shape [2, 2]'):
        trainer.fit(make_batches(), make_batches(), epochs=1)


# Files ----------------------------------------------------------------------------------------------------


def test_a_run_directory_that_cannot_be_made_is_refused_where_it_is_written(below_a_file: Path) -> None:
    with refused(ConfigurationError, f"RunDirectory cannot write in {below_a_file}: Not a directory."):
        RunDirectory(below_a_file)


@pytest.mark.parametrize("make", [partial(BestCheckpoint, "val_loss", "min"), Report, TensorBoard])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(
    make: Callable[..., Callback], below_a_file: Path
) -> None:
    trainer = make_trainer(callbacks=[make(directory=below_a_file)])
    with refused(ConfigurationError, f"cannot write in {below_a_file}: Not a directory.", "that can be written"):
        trainer.fit(make_batches(), make_batches(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("make", [Report, TensorBoard])
def test_a_handler_with_nowhere_to_write_says_so_before_the_first_step(make: Callable[[], Callback]) -> None:
    trainer = make_trainer(callbacks=[make()])
    with refused(ConfigurationError, f"{make.__name__} has nowhere to write", "RunDirectory()"):
        trainer.fit(make_batches(), epochs=1)
    assert num_calls(trainer) == 0


def test_fp16_on_the_cpu_is_refused_before_the_first_step() -> None:
    trainer = make_trainer(callbacks=[MixedPrecision("fp16")])
    with refused(ConfigurationError, "on the CPU, which has no fp16 training", 'MixedPrecision("bf16")'):
        trainer.fit(make_batches(), epochs=1)
    assert num_calls(trainer) == 0


def test_best_weights_of_another_architecture_are_told_by_their_first_differences(tmp_path: Path) -> None:
    best = BestCheckpoint("val_loss", directory=tmp_path, restore=True)
    trainer = make_trainer(callbacks=[best])
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    trainer.subscribe(EpochEnd, lambda event: torch.save(other.state_dict(), tmp_path / "best.pt"))
    with refused(CheckpointError, "weight is missing", "0.weight is unknown to the model", "and 3 more", "best.pt"):
        trainer.fit(make_batches(), make_batches(), epochs=1)


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
    make_trainer(callbacks=[best]).fit(make_batches(), make_batches(), epochs=1)
    damage(tmp_path / "best.pt")
    with refused(CheckpointError, str(tmp_path / "best.pt")):
        best.weights()


def test_best_weights_are_not_there_before_a_value_was_best() -> None:
    with refused(ConfigurationError, "No best weights exist: val_loss has had no value"):
        BestCheckpoint("val_loss", "min").weights()
