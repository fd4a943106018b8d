"""Metrics of torchmetrics and of ignite on several ranks: the values of one process, with few transfers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ignite.distributed as idist
import ignite.metrics
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from ranks import on_ranks
from test_ranks import accuracy, data, model
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import classification, regression
from torchmetrics.wrappers import LambdaInputTransformer, MinMaxMetric, MultioutputWrapper

from camshaft.callbacks import Distributed, Ignite, Metrics
from camshaft.engine import ConfigurationError, EpochEnd, Event, StepEnd, Trainer, ValidationEnd, ValidationStart, at

Values = dict[str, Any]


def margin(output: Tensor) -> Tensor:
    """Return one number for each sample."""
    return output[:, 1] - output[:, 0]


def a_number(target: Tensor) -> Tensor:
    return target.double()


def collection() -> dict[str, Any]:
    """Five metrics that share states, two of which keep every sample."""
    return {
        "all": torchmetrics.MetricCollection(
            [
                classification.MulticlassAccuracy(2),
                classification.MulticlassF1Score(2),
                classification.MulticlassAUROC(2),
                classification.MulticlassAveragePrecision(2),
                classification.MulticlassConfusionMatrix(2),
            ]
        )
    }


def of_numbers(metric: torchmetrics.Metric) -> torchmetrics.Metric:
    return LambdaInputTransformer(metric, margin, a_number)


def singles() -> dict[str, Any]:
    return {
        "spearman": of_numbers(regression.SpearmanCorrCoef()),
        "pearson": of_numbers(regression.PearsonCorrCoef()),
        "mean": LambdaInputTransformer(torchmetrics.MeanMetric(), margin, lambda target: torch.ones(len(target))),
        "largest": of_numbers(torchmetrics.regression.MeanAbsoluteError()),
        "min_max": MinMaxMetric(classification.MulticlassAccuracy(2)),
        "per_output": LambdaInputTransformer(
            MultioutputWrapper(regression.MeanSquaredError(), 2), transform_target=lambda t: torch.stack([t, 1 - t], 1)
        ),
    }


def of_ignite() -> dict[str, Any]:
    return {
        "acc": ignite.metrics.Accuracy(),
        "ce": ignite.metrics.Loss(nn.functional.cross_entropy),
        "matrix": ignite.metrics.ConfusionMatrix(2),
        "recall": ignite.metrics.Recall(average=True),
    }


def fit(make: Callable[[], dict[str, Any]], train: tuple[int, int], val: int, **settings: Any) -> list[Values]:
    """Return all values of two epochs and of an evaluation."""
    seen: list[Values] = []
    net = model()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(),
                      callbacks=[Distributed(), Metrics(make())], seed=7)  # fmt: skip
    trainer.subscribe(EpochEnd, lambda event: seen.append(dict(event.metrics)))
    trainer.subscribe(ValidationEnd, lambda event: seen.append(dict(event.metrics)))
    trainer.fit(data(train[0], batch_size=train[1]), data(val, shuffle=False, seed=1), epochs=2, **settings)
    seen.append(trainer.evaluate(data(val, shuffle=False, seed=1)))
    if val < 4:  # torchmetrics has no correlation of ranks that begin with a single sample
        seen = [{name: value for name, value in values.items() if "pearson" not in name} for values in seen]
    return seen


def assert_close(ours: list[Values], theirs: list[Values], tolerance: float = 1e-6) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(
                torch.as_tensor(value), torch.as_tensor(other[name]), rtol=0, atol=tolerance, equal_nan=True,
                check_dtype=False,
            )  # fmt: skip


SIZES = {  # samples of training, of a batch and of a validation
    "ragged": ((35, 16), 37),
    "a rank without a batch": ((3, 8), 19),
    "a validation smaller than the world": ((16, 8), 3),
}
METRICS = {make.__name__: make for make in (collection, singles, of_ignite)}


@pytest.mark.filterwarnings("ignore:Metric `.*` will save all targets:UserWarning")
@pytest.mark.filterwarnings("ignore:No (negative|positive) samples :UserWarning")
@pytest.mark.filterwarnings("ignore:The variance of predictions or target:UserWarning")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_the_values_of_one_process(name: str, sizes: str) -> None:
    alone = fit(METRICS[name], *SIZES[sizes])
    for result in on_ranks(4, fit, METRICS[name], *SIZES[sizes]):
        assert_close(result, alone)


def test_metrics_have_the_values_of_one_process_in_validations_in_mid_epoch() -> None:
    alone = fit_with_validations()
    for result in on_ranks(2, fit_with_validations):
        assert_close(result, alone)


def fit_with_validations() -> list[Values]:
    return fit(collection, (35, 8), 9, validate_every=2)


# ignite's, through the bridge -------------------------------------------------------------------------------


def bridged(train: tuple[int, int], val: int) -> list[Values]:
    """Return what ignite's metrics, and its handlers, see on the bridge."""
    seen: list[Values] = []
    bridge = Ignite()
    for side in (bridge.train, bridge.val):
        for name, metric in of_ignite().items():
            if name != "recall" or min(train[0], val) > 4:  # ignite's needs a sample on every rank
                metric.attach(side, name)
        side.add_event_handler(
            ignite.engine.Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics))
        )
    net = model()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(),
                      callbacks=[Distributed(), bridge], seed=7)  # fmt: skip
    trainer.fit(data(train[0], batch_size=train[1]), data(val, shuffle=False, seed=1), epochs=2)
    return seen


@pytest.mark.parametrize("sizes", SIZES)
def test_metrics_on_the_bridge_have_the_values_of_one_process(sizes: str) -> None:
    alone = bridged(*SIZES[sizes])
    for result in on_ranks(4, bridged, *SIZES[sizes]):
        assert_close(result, alone)


@pytest.mark.parametrize("on_the_bridge", [False, True])
def test_ignite_metrics_that_keep_every_sample_are_refused(on_the_bridge: bool) -> None:
    def refused() -> str:
        net, metric, bridge = model(), ignite.metrics.EpochMetric(lambda outputs, targets: 0.0), Ignite()
        metric.attach(bridge.val, "all")
        trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(), seed=7,
                          metrics={} if on_the_bridge else {"all": metric},
                          callbacks=[Distributed(), *([bridge] if on_the_bridge else [])])  # fmt: skip
        with pytest.raises(ConfigurationError) as info:
            trainer.fit(data(), data(), epochs=1)
        return str(info.value) if trainer.step == 0 else f"after step {trainer.step}"

    name = "ignite's EpochMetric" if on_the_bridge else "The ignite metric 'all'"
    assert on_ranks(2, refused) == [
        f"{name} keeps every sample, and ignite can join those of several ranks only if all have as many. "
        "Take a metric of torchmetrics, or compute it from what predict returns."
    ] * 2  # fmt: skip


def test_ignite_sees_the_group_that_was_made_after_its_metrics() -> None:
    def seen() -> list[Any]:
        store = dist.distributed_c10d._get_default_store()
        rank, world = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        metrics, before = of_ignite(), idist.get_world_size()
        dist.init_process_group("gloo", store=PrefixStore("again", store), rank=rank, world_size=world)
        net = model()
        trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(), metrics=metrics,
                          callbacks=[Distributed()], seed=7)  # fmt: skip
        values = trainer.evaluate(data(37, shuffle=False))
        return [before, idist.get_rank(), idist.get_world_size(), values["acc"]]

    def alone() -> float:
        net = model()
        trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(), metrics=of_ignite())
        acc: float = trainer.evaluate(data(37, shuffle=False))["acc"]
        return acc

    expected = alone()
    assert on_ranks(2, seen) == [[1, 0, 2, pytest.approx(expected)], [1, 1, 2, pytest.approx(expected)]]


# Transfers --------------------------------------------------------------------------------------------------

COLLECTIVES = ("all_reduce", "all_gather_object", "all_gather", "broadcast", "broadcast_object_list", "barrier",
               "all_gather_into_tensor", "reduce", "gather", "gather_object")  # fmt: skip


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of torch.distributed's functions, less those that they make of each other."""
    counts: Counter[str] = Counter()
    depth = [0]
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += not depth[0]
            depth[0] += 1
            try:
                return originals[name](*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def transfers(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the transfers of a validation, of the end of an epoch, and of eight steps."""
    net = model()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(),
                      metrics={"own": accuracy} | make(), callbacks=[Distributed()], seed=7)  # fmt: skip
    marks: dict[str, Counter[str]] = {}

    def mark(name: str, event: Event) -> None:
        marks[name] = counts.copy()

    with counted() as counts:
        for name, event, when in [("step 2", StepEnd, at(2)), ("step 10", StepEnd, at(10)),
                                  ("validation", ValidationStart, None), ("validated", ValidationEnd, None),
                                  ("epoch", EpochEnd, None)]:  # fmt: skip
            trainer.subscribe(event, partial(mark, name), when)
        trainer.fit(data(80, batch_size=8), data(20, shuffle=False), epochs=1)
    return {
        "steps": marks["step 10"] - marks["step 2"],
        "validation": marks["validated"] - marks["validation"],
        "epoch": marks["epoch"] - marks["validated"],
    }


def nothing() -> dict[str, Any]:
    return {}


def test_a_stage_takes_one_transfer_for_its_averages_and_one_for_all_its_metrics() -> None:
    for result in on_ranks(2, transfers, nothing):
        assert result == {"steps": {}, "validation": {"all_reduce": 1}, "epoch": {"all_reduce": 1}}
    both = {"all_reduce": 1, "all_gather_object": 1}
    for result in on_ranks(2, transfers, collection):
        assert result == {"steps": {}, "validation": both, "epoch": both}


def of_a_profile(run: Callable[[], object]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return Counter({e.key: e.count for e in profile.key_averages() if e.key.startswith("gloo:")})


def by_hand(num: int) -> None:
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for inputs, target in data(num, batch_size=8):
        nn.functional.cross_entropy(net(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(num: int) -> None:
    net = model()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.3), nn.CrossEntropyLoss(),
                      callbacks=[Distributed()], seed=7)  # fmt: skip
    trainer.fit(data(num, batch_size=8), epochs=1)


def test_a_step_communicates_as_often_as_in_a_loop_of_ones_own() -> None:
    """Eight steps against four: what a run sends once, at its beginning and end, does not count."""

    def both() -> list[int]:
        counts = [[of_a_profile(partial(run, n))["gloo:all_reduce"] for n in (32, 64)] for run in RUNS]
        return [longer - shorter for shorter, longer in counts]

    assert on_ranks(2, both) == [[4, 4], [4, 4]]


RUNS = (by_hand, by_trainer)
