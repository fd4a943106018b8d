from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from helpers import refused
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from camshaft.callbacks import Accumulate, MicroBatch
from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    EngineStateError,
    Trainer,
    UpdateEnd,
    ValidationStepEnd,
)


class Small(nn.Linear):
    """Runs out of memory beyond ``limit`` samples, after it has computed."""

    limit = 4

    def forward(self, inputs: Tensor) -> Tensor:
        output = super().forward(inputs)
        if len(inputs) > self.limit and self.training:
            raise torch.OutOfMemoryError("no more")
        return output


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in (10, 10, 10, 7, 1)
    ]


def trained(*callbacks: Callback, limit: int = 4) -> Engine:
    torch.manual_seed(1)
    model = Small(3, 2).double()
    model.limit = limit
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, nn.MSELoss(), metrics={"mean": lambda o, t: o.mean()}, callbacks=callbacks)
    trainer.fit([(x.double(), y.double()) for x, y in data()], epochs=2)
    return trainer


@pytest.mark.parametrize("window", [[], [1], [2], [3]])
def test_halved_batches_give_the_weights_and_averages_of_whole_ones(
    window: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Also in a window, whose gradients so far must survive a failed try."""
    windows: list[list[Callback]] = [[Accumulate(batches=n) for n in window] for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        small = trained(MicroBatch(), *windows[0])
    whole = trained(*windows[1], limit=99)
    for ours, theirs in zip(small.parts["model"].parameters(), whole.parts["model"].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    for name in ("train_loss", "train_mean"):
        assert small.history[name] == pytest.approx(whole.history[name], abs=1e-12)
    assert small.num_updates == whole.num_updates
    assert [record.args for record in caplog.records] == [(1, 2), (1, 4)]


def test_an_open_window_survives_two_failed_tries_of_which_one_had_begun_to_learn() -> None:
    """The second batch fails as a whole, and then in the second of its two parts, after the backward of the first."""

    class Late(nn.Linear):
        calls = 0
        fails: tuple[int, ...] = ()

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            if self.calls in self.fails:
                raise torch.OutOfMemoryError("no more")
            return super().forward(inputs)

    weights = []
    for fails in ((2, 4), ()):
        torch.manual_seed(1)
        model = Late(3, 2).double()
        model.fails = fails
        callbacks: list[Callback] = [MicroBatch(), Accumulate(2)]
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=callbacks)
        trainer.fit([(x.double(), y.double()) for x, y in data()[:2]], epochs=1)
        weights.append(model.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-12)


def test_it_goes_on_in_as_many_parts_and_updates_once_a_batch() -> None:
    handler = MicroBatch()
    updates: list[int] = []
    torch.manual_seed(1)
    model = Small(3, 2)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=[handler])
    trainer.subscribe(UpdateEnd, lambda event: updates.append(event.engine.step))
    trainer.fit(data(), epochs=1)
    assert updates == [1, 2, 3, 4, 5]
    assert handler.state_dict() == {"num_parts": 4}
    resumed = MicroBatch()
    resumed.load_state_dict(handler.state_dict())
    assert resumed.num_parts == 4


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        trained(MicroBatch(), limit=0)


def test_batches_of_dicts_and_lists_are_divided_by_their_samples() -> None:
    seen: list[Any] = []

    def prepare(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        seen.append((len(batch["x"]), batch["names"], float(batch["scale"])))
        return batch["x"], batch["y"]

    model = Small(3, 2)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        nn.MSELoss(),
        callbacks=[MicroBatch(2)],
        prepare_batch=prepare,
    )
    batch = {"x": torch.ones(3, 3), "y": torch.ones(3, 2), "names": ["a", "b", "c"], "scale": torch.tensor(2.0)}
    trainer.fit([batch], epochs=1)
    assert seen == [(2, ["a", "b"], 2.0), (1, ["c"], 2.0)]


def gan_step(engine: Engine, batch: Any) -> None:
    for name in ("a", "b"):
        engine.update(engine.parts[name](batch[0]).square().mean(), optimizer=f"{name}_optimizer")


def step_of_its_own(engine: Engine, batch: Any) -> dict[str, Tensor]:
    inputs, target = batch
    output = engine.parts["model"](inputs)
    loss = (output - target).square().mean()
    engine.measure(output, target)
    engine.record(mean=output.mean())  # before what may fail: it must count once
    if engine.training:
        engine.update(loss)
    return {"loss": loss}


def own_engine(*callbacks: Callback, limit: int, step: Any = step_of_its_own) -> Engine:
    torch.manual_seed(1)
    model = Small(3, 2).double()
    model.limit = limit
    engine = Engine(step, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    engine.stages.add_metrics({"mse": MeanSquaredError()})
    for callback in callbacks:
        engine.attach(callback)
    return engine


def doubles() -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double()) for x, y in data()]


@pytest.mark.parametrize("window", [1, 3])
def test_a_step_of_ones_own_is_divided_as_that_of_a_trainer(window: int) -> None:
    engines = [own_engine(MicroBatch(), Accumulate(window), limit=4), own_engine(Accumulate(window), limit=99)]
    for engine in engines:
        engine.fit(doubles(), epochs=2)
    small, whole = engines
    assert torch.allclose(small.parts["model"].weight, whole.parts["model"].weight, atol=1e-12)
    for name in ("train_loss", "train_mean", "train_mse"):
        assert small.history[name] == pytest.approx(whole.history[name], rel=1e-6), name
    assert small.num_updates == whole.num_updates


def test_tokens_are_weights_of_the_parts_too() -> None:
    """The loss is a mean over the samples that the mask leaves, which differ from part to part."""

    def masked(engine: Engine, batch: Any) -> None:
        inputs, target, mask = batch
        errors = (engine.parts["model"](inputs) - target).square().mean(1)
        engine.update((errors * mask).sum() / mask.sum().clamp(min=1))

    weights = []
    for limit in (3, 99):
        torch.manual_seed(1)
        model = Small(3, 2).double()
        model.limit = limit
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine = Engine(masked, model=model, optimizer=optimizer, num_samples=lambda batch: batch[2].sum())
        engine.attach(MicroBatch())
        masks = [torch.arange(len(x)) % 3 != 0 for x, _ in doubles()]
        engine.fit([(x, y, mask) for (x, y), mask in zip(doubles(), masks, strict=True)], epochs=1)
        weights.append(model.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-12)


def twice(engine: Engine, batch: Any) -> None:
    for _ in range(2):
        engine.update(engine.parts["model"](batch[0]).square().mean())


def of_other_numbers(engine: Engine, batch: Any) -> None:
    engine.update(engine.parts["model"](batch[0]).square().mean(), 2 * len(batch[0]))


@pytest.mark.parametrize(
    ("step", "fact", "advice"),
    [
        (twice, "called engine.update a second time", "Let the step call engine.update(loss) once"),
        (of_other_numbers, "samples, where it counts", "State what the loss is a mean of"),
        (lambda engine, batch: None, "did not call engine.update", "Let the step call engine.update(loss) once"),
    ],
)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_step_that_cannot_be_divided_is_refused_in_the_first_step(
    step: Any, fact: str, advice: str, num_parts: int
) -> None:
    """Also where the batch is not divided yet: it would be, in the middle of a night."""
    engine = own_engine(MicroBatch(num_parts), limit=99, step=step)
    with refused(EngineStateError, "Step 1 takes its batch in parts", fact, advice):
        engine.fit(doubles(), epochs=1)


def test_two_optimizers_that_take_turns_cannot_be_divided() -> None:
    parts: dict[str, Any] = {name: nn.Linear(3, 1) for name in ("a", "b")}
    parts |= {f"{name}_optimizer": torch.optim.SGD(model.parameters(), 0.1) for name, model in parts.items()}
    engine = Engine(gan_step, callbacks=[MicroBatch()], **parts)
    with refused(EngineStateError, "called engine.update a second time"):
        engine.fit(data(), epochs=1)


class SmallAlways(nn.Linear):
    """Runs out of memory beyond four samples, in evaluations only, and on the CPU as torch says it there."""

    limit = 4

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.limit and not self.training:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return super().forward(inputs)


def note_output(seen: list[bool], event: ValidationStepEnd) -> None:
    seen.append(event.output is None)


@pytest.mark.parametrize("style", ["trainer", "step"])
def test_an_evaluation_that_runs_out_of_memory_goes_on_in_parts(style: str, caplog: pytest.LogCaptureFixture) -> None:
    values, outputs = [], []
    for limit in (4, 99):
        torch.manual_seed(1)
        model = SmallAlways(3, 2).double()
        model.limit = limit
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if style == "trainer":
            metrics = {"mse": MeanSquaredError(), "mean": lambda o, t: o.mean()}
            engine = Trainer(model, optimizer, nn.MSELoss(), metrics=metrics)
        else:
            engine = Engine(step_of_its_own, model=model, optimizer=optimizer)
            engine.stages.add_metrics({"mse": MeanSquaredError()})
        handler = MicroBatch()
        engine.attach(handler)
        without: list[bool] = []
        engine.subscribe(ValidationStepEnd, partial(note_output, without))
        engine.fit(doubles(), doubles(), epochs=1)
        values.append({**engine.history.rows[-1], **engine.evaluate(doubles())})
        outputs.append(without)
        assert handler.num_parts == 1  # training had memory enough
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert outputs == [[True, True, True, True, False], [False] * 5]
    parts = [record.args for record in caplog.records if "evaluation" in record.getMessage()]
    assert parts == [(2,), (4,)]


def test_a_single_sample_that_does_not_fit_into_an_evaluation_is_an_error() -> None:
    model = SmallAlways(3, 2)
    model.limit = 0
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=[MicroBatch()])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trainer.evaluate(data())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    for stage in ("train", "evaluate"):
        model = nn.Linear(7, 2)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=[MicroBatch()])
        with pytest.raises(DataError):
            trainer.fit(data(), epochs=1) if stage == "train" else trainer.evaluate(data())


def test_numbers_of_parts_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="num_parts is 0"):
        MicroBatch(0)
    with refused(ConfigurationError, "This engine has no step to wrap"):
        Engine(callbacks=[MicroBatch()])
