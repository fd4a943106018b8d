from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import linear, make_trainer, refused
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from camshaft.callbacks import BestCheckpoint, RunCheckpoint
from camshaft.engine import AverageMeter, ConfigurationError, DataError, Engine
from camshaft.engine.record import Record
from camshaft.engine.values import format_values


def test_an_average_weighs_each_value_by_its_samples() -> None:
    meter = AverageMeter()
    for value, n in ((1.0, 16), (2.0, 16), (10.0, 2)):
        meter.update(torch.tensor(value), n)
    assert (meter.avg, meter.sum, meter.count) == (68 / 34, 68, 34)
    assert float(meter.val) == 10.0


def test_sums_keep_double_precision() -> None:
    """In single precision 1e8 + 1 is 1e8."""
    meter = AverageMeter()
    for value in (1e8, 1.0, 1.0, 1.0, 1.0):
        meter.update(torch.tensor(value))
    assert meter.avg == (1e8 + 4) / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_any_number_type_is_averaged(dtype: torch.dtype) -> None:
    meter = AverageMeter()
    meter.update(torch.tensor(2, dtype=dtype), n=3)
    meter.update(4.0, n=1)
    assert meter.avg == 2.5


def test_an_average_of_nothing_is_nan_and_of_zero_is_zero() -> None:
    meter = AverageMeter()
    assert math.isnan(meter.avg)
    meter.update(0.0)
    assert meter.avg == 0.0


def test_a_recorded_loss_keeps_no_graph() -> None:
    meter = AverageMeter()
    meter.update(torch.ones((), requires_grad=True) * 2)
    assert isinstance(meter.sum, torch.Tensor)
    assert not meter.sum.requires_grad


def test_nan_stays_nan() -> None:
    record = Record()
    record.add({"loss": torch.tensor(math.nan)}, 4)
    record.add({"loss": torch.tensor(1.0)}, 4)
    assert math.isnan(record.compute()["loss"])
    assert "nan" in format_values(record.compute())


@pytest.mark.parametrize("value", [torch.ones(8), "0.5", None])
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(DataError, match=r"^loss (has shape \[8\]|is ).*"):
        Record().add({"loss": value}, 1)  # type: ignore[dict-item]  # the point


def test_all_scalars_come_in_one_transfer() -> None:
    """Counted below Python: one tolist of a stacked tensor, however many values there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's hook
            self.reads += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    record = Record()
    for step in range(3):
        record.add({f"value{i}": torch.tensor(float(i + step)) for i in range(5)}, 2)
    with CountReads() as counted:  # type: ignore[no-untyped-call]  # torch's base has no types
        values = record.compute()
    assert values == {f"value{i}": i + 1.0 for i in range(5)}
    assert counted.reads == 0


def test_peek_shows_the_present_averages_on_the_cpu() -> None:
    seen: list[dict[str, float]] = []

    def step(engine: Engine, batch: float) -> None:
        engine.record(loss=batch, weight=1)
        seen.append(engine.current.peek())

    engine = Engine(step)
    engine.fit([1.0, 3.0], epochs=1)
    assert seen == [{"train_loss": 1.0}, {"train_loss": 2.0}]
    assert engine.current.peek() == {}


def test_numbers_are_shown_with_digits_that_say_something() -> None:
    shown = format_values({"a": 0.0, "b": 0.5, "c": 1e-6, "d": 123456.0, "m": torch.ones(2)})
    assert shown == "a 0.0000  b 0.5000  c 1e-06  d 1.235e+05"


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.array(0.5), np.array([0.5])])
def test_numbers_of_numpy_become_plain_floats(value: Any) -> None:
    """What a checkpoint holds must be plain."""
    record = Record()
    record.add({"loss": value}, 2)
    assert record.compute() == {"loss": 0.5}
    assert [type(one) for one in record.state_dict()["meters"]["loss"]] == [float, float, int]


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, 1 + 2j, np.complex64(1), torch.tensor(1 + 2j), np.ones(2)],
    ids=["huge", "too huge to print", "complex", "NumPy's complex", "complex tensor", "array"],
)
def test_a_number_that_is_not_a_float_is_refused_by_name(value: Any) -> None:
    with refused(DataError, "acc is ", "Record "):
        Record().add({"acc": value}, 1)


def weighted(values: list[tuple[Any, Any]]) -> Record:
    record = Record()
    for value, weight in values:
        record.add({"loss": value}, weight)
    return record


LOSSES = [torch.tensor(1.0), torch.tensor(4.0)]


@pytest.mark.parametrize(
    "values",
    [
        [(LOSSES[0], torch.tensor(3)), (LOSSES[1], torch.tensor([1.0]))],
        [(LOSSES[0], 3), (LOSSES[1], torch.tensor(1))],
        [(LOSSES[0], torch.tensor(3, dtype=torch.uint8)), (LOSSES[1], 1)],
        [(1.0, torch.tensor(3.0)), (4.0, torch.tensor(True))],
        [(1.0, 3.0), (4.0, torch.tensor(1.0))],
        [(LOSSES[0], torch.tensor(3)), (torch.tensor(math.nan), torch.tensor(0)), (LOSSES[1], torch.tensor(1))],
    ],
)
def test_a_weight_may_be_a_tensor(values: list[tuple[Any, Any]]) -> None:
    """Before or after weights that are numbers; where it is 0, there is nothing to add."""
    record = weighted(values)
    assert record.compute() == record.peek() == {"loss": 7 / 4}
    assert record.meters["loss"].avg == 7 / 4
    assert record.since_mark() == {"loss": 7 / 4}
    record.add({"loss": 5.0}, torch.tensor(4.0))
    assert record.since_mark() == {"loss": 5.0}
    assert record.since_mark() == {}
    assert record.compute() == {"loss": 27 / 8}


def test_a_value_to_which_nothing_was_added_has_no_average() -> None:
    record = weighted([(torch.tensor(math.nan), torch.tensor(0.0))])
    assert record.compute() == record.peek() == record.since_mark() == {}


def test_averages_with_weights_on_the_device_survive_a_checkpoint() -> None:
    record, other = weighted([(1.0, torch.tensor(3))]), Record()
    record.since_mark()
    record.add({"loss": torch.tensor(4.0)}, torch.tensor(1))
    other.load_state_dict(record.state_dict(), torch.device("cpu"))
    assert other.compute() == {"loss": 7 / 4}
    assert other.since_mark() == {"loss": 4.0}


@pytest.mark.parametrize("weigh", [Tensor.sum, lambda mask: float(mask.sum())], ids=["tensor", "number"])
def test_a_run_weighs_by_the_tensor_that_its_step_gives(weigh: Any, tmp_path: Path) -> None:
    masks = [torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 0, 0]), torch.tensor([1, 0, 0, 0])]

    def step(engine: Engine, batch: Tensor) -> None:
        engine.record(loss=batch.square().sum() / batch.sum(), size=3.0, weight=weigh(batch))
        engine.measure(batch.float().mean(), None, weight=weigh(batch))

    engine = Engine(step, callbacks=[RunCheckpoint(tmp_path, every_steps=1)])
    engine.stages.add_metrics({"share": lambda output, target: output})
    history = engine.fit(masks, masks, epochs=2)
    assert history["train_loss"] == history["val_loss"] == [1.0, 1.0]
    assert history["train_size"] == [3.0, 3.0]
    assert history["train_share"] == history["val_share"] == [(3 * 0.75 + 0.25) / 4] * 2


@pytest.mark.parametrize(
    ("weight", "phrase"),
    [
        (-1, "weight is -1"),
        (-0.5, "weight is -0.5"),
        (math.nan, "weight is nan"),
        (math.inf, "weight is inf"),
        pytest.param(10**400, "weight is an integer too large", id="huge"),
        ("16", "weight is '16'"),
        (torch.ones(4), "weight is a float32 tensor of shape [4]"),
        (torch.tensor(1j), "weight is a complex64 tensor"),
    ],
)
@pytest.mark.parametrize("call", ["record", "measure"])
def test_a_weight_that_is_not_a_number_of_samples_is_refused(call: str, weight: Any, phrase: str) -> None:
    def step(engine: Engine, batch: float) -> None:
        if call == "record":
            engine.record(loss=batch, weight=weight)
        else:
            engine.measure(batch, batch, weight=weight)

    with refused(DataError, phrase):
        Engine(step).fit([1.0], epochs=1)


BAD_NAMES = ["two\nlines", "nul\0", "\x1b[31mred", "tab\t", "\ud800", "a" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_break_a_line_or_a_file_is_refused(name: str) -> None:
    """Before the first step where it is known, and otherwise when its first value is recorded."""
    with refused(ConfigurationError, "A value is named", "at most 100 printable characters"):
        make_trainer(metrics={name: lambda output, target: 0.0})
    with refused(ConfigurationError, "A value is named", "at most 100 printable characters"):
        Engine().stages.declare(name)
    engine = Engine(lambda engine, batch: {name: 1.0})
    with refused(DataError, "A value is named", "at most 100 printable characters"):
        engine.fit([torch.ones(2)], epochs=1)
    assert engine.step == 1


def test_a_name_that_a_metric_gives_to_one_of_its_values_is_looked_at_too() -> None:
    collection = MetricCollection({"two\nlines": MeanMetric()})
    engine = Engine(lambda engine, batch: engine.measure(batch, 1.0))
    engine.stages.add_metrics({"mean": collection})
    with refused(DataError, "A value is named 'mean_two\\nlines'", "printable"):
        engine.fit([torch.ones(2)], epochs=1)


@pytest.mark.parametrize(
    "name", ["a/b", "語" * 100, "../../x", "a b*[c]?", "\\", "%s{}"], ids=lambda name: ascii(name[:3])
)
def test_any_other_name_has_files_of_its_best_weights(name: str, tmp_path: Path) -> None:
    """Whatever is in it, each file lies in the directory, and loads."""
    best = BestCheckpoint(f"val_{name}", "max", tmp_path / "best", top_k=2)
    engine = Engine(lambda engine, batch: {name: float(engine.epoch)}, model=linear(), callbacks=[best])
    engine.fit([torch.ones(2)], [torch.ones(2)], epochs=3)
    assert [kept.epoch for kept in best.kept] == [3, 2]
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"best.pt", *(kept.file for kept in best.kept)}
    assert list(tmp_path.iterdir()) == [tmp_path / "best"]
