from __future__ import annotations

import math

import pytest
import torch

from camshaft.engine import AverageMeter, DataError, Engine
from camshaft.engine.record import Record, format_values


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
