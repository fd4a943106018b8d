"""Ranks that compute each layer together: the numbers of one process, and no sample counts twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from ignite.metrics import Accuracy
from ranks import on_ranks
from test_fsdp import (
    BOTH,
    KINDS,
    cut,
    divided,
    fill,
    first_and_last_layer,
    flat,
    in_parts,
    outcome,
    resume,
    trained_after_steps_by_hand,
    windows,
    with_penalty,
)
from test_fsdp import make as make_trainer
from test_ranks import accuracy, assert_alike, data, everything_on, model, plain
from test_ranks_numbers import assert_as_alone
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import scaled_dot_product_attention
from torchmetrics.classification import MulticlassConfusionMatrix

from camshaft.callbacks import BestCheckpoint, Distributed, Ignite, RunCheckpoint, WeightAverage
from camshaft.engine import Callback, ConfigurationError, EpochEnd, StepEnd, Trainer, at, is_sharded, local_part

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.skipif(
        not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_reduce_scatter"),
        reason="this torch cannot weigh the gradients of ranks",
    ),
    # torch's, of a unit that ends with a layer that is cut: nothing here changes its output in place
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
]
Callbacks = Callable[[], list[Callback]]
MESH = {"shard": 2, "tensor": 2}


def cut_both_layers(net: nn.Module, mesh: Any) -> None:
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel(**settings: Any) -> Distributed:
    given: dict[str, Any] = {"mesh": MESH, "parallelize": cut_both_layers, "units": ["0", "2"]} | settings
    return Distributed("fsdp", **given)


class Block(nn.Module):
    """Attention and a feed-forward network over the numbers of a sample, with layers that no plan cuts."""

    def __init__(self, width: int = 8, size_of_head: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.size_of_head = size_of_head
        self.embed = nn.Linear(1, width)
        self.norm = nn.LayerNorm(width)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.joined = nn.Linear(width, width)
        self.wider, self.back = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.embed(inputs.unsqueeze(2))
        normed = self.norm(states)
        queries, keys, values = (
            layer(normed).unflatten(2, (-1, self.size_of_head)).transpose(1, 2)  # as many heads as there are here
            for layer in (self.queries, self.keys, self.values)
        )
        states = states + self.joined(scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))
        states = states + self.back(nn.functional.gelu(self.wider(states)))
        output: Tensor = self.head(states.mean(1))
        return output


def cut_block(net: nn.Module, mesh: Any) -> None:
    columns = dict.fromkeys(["queries", "keys", "values", "wider"], ColwiseParallel())
    parallelize_module(net, mesh, columns | dict.fromkeys(["joined", "back"], RowwiseParallel()))


BLOCK = {"parallelize": cut_block, "units": ["queries", "back"]}


def block() -> nn.Module:
    return Block().double()


def trained(kind: Callable[[], Distributed], net: nn.Module, callbacks: Callbacks, *, epochs: int = 2) -> Any:
    """Train, evaluate and predict; also return the confusion matrices of the training epochs."""
    trainer = Trainer(
        net,
        torch.optim.SGD(net.parameters(), 0.3, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"acc": accuracy, "confusion": MulticlassConfusionMatrix(2)},
        callbacks=[kind(), *callbacks()],
        seed=7,
    )
    confusions: list[Tensor] = []
    trainer.subscribe(EpochEnd, lambda event: confusions.append(event.metrics["train_confusion"]))
    val = data(37, shuffle=False, seed=1)
    trainer.fit(data(), val, epochs=epochs)
    return outcome(trainer), torch.stack(confusions), trainer.evaluate(val)["confusion"], trainer.predict(val)


@pytest.mark.parametrize(
    ("make", "settings", "callbacks"),
    [
        pytest.param(model, {}, everything_on, id="perceptron"),
        pytest.param(model, {}, with_penalty, id="penalty", marks=pytest.mark.slow),
        pytest.param(block, BLOCK, everything_on, id="block", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_compute_layers_together_train_as_one_process_does(
    make: Callable[[], nn.Module], settings: dict[str, Any], callbacks: Callbacks
) -> None:
    """Also with a short last batch, which does not divide evenly."""
    kind = partial(tensor_parallel, **settings)
    alone, *measured = trained(kind, make(), callbacks)
    for found, confusions, confusion, predicted in on_ranks(4, lambda: trained(kind, make(), callbacks)):
        assert_alike(found, alone)
        assert torch.equal(confusions, measured[0])
        assert confusions.sum(dim=(1, 2)).tolist() == [103] * len(confusions)
        assert torch.equal(confusion, measured[1])
        assert confusion.sum() == 37
        torch.testing.assert_close(predicted, measured[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("updates", [[BOTH], [*BOTH]], ids=["joint", "apart"])
def test_a_model_may_have_two_optimizers(updates: list[Any]) -> None:
    assert_as_alone(4, divided, first_and_last_layer, updates, windows, torch.optim.SGD, tensor_parallel)


@pytest.mark.slow
def test_parts_may_be_held_by_several_groups_each() -> None:
    kind = partial(tensor_parallel, mesh={"tensor": 2, "shard": 2, "replicate": 2})
    alone, *_ = trained(kind, model(), everything_on, epochs=2)
    for found, confusions, *_ in on_ranks(8, lambda: trained(kind, model(), everything_on, epochs=2)):
        assert_alike(found, alone)
        assert confusions.sum(dim=(1, 2)).tolist() == [103, 103]


def test_ranks_of_one_group_read_the_same_samples_and_draw_the_same_numbers() -> None:
    def seen() -> tuple[Tensor, Tensor, float]:
        inputs: list[Tensor] = []
        drawn: list[Tensor] = []
        trainer = make_trainer(tensor_parallel, plain)

        def look(event: StepEnd) -> None:
            inputs.append(event.batch[0])
            drawn.append(torch.rand(1))

        trainer.subscribe(StepEnd, look)
        trainer.fit(data(), epochs=1)
        return torch.cat(inputs), torch.cat(drawn), trainer.ranks.total(len(torch.cat(inputs)))

    ranks = on_ranks(4, seen)
    for pair in (ranks[:2], ranks[2:]):
        assert torch.equal(pair[0][0], pair[1][0])
        assert torch.equal(pair[0][1], pair[1][1])
    assert not torch.equal(ranks[0][1], ranks[2][1])
    assert len(ranks[0][0]) + len(ranks[2][0]) == 103
    assert {total for *_, total in ranks} == {103}


def test_a_signal_to_any_rank_stops_all_of_them() -> None:
    def run() -> tuple[int, str]:
        trainer = make_trainer(tensor_parallel, plain)

        def strike(event: StepEnd) -> None:
            if torch.distributed.get_rank() == 3:  # which counts for nothing in a sum
                event.engine.run.interrupt(signal.SIGTERM)

        trainer.subscribe(StepEnd, strike, when=at(2))
        trainer.fit(data(), epochs=1)
        return trainer.step, trainer.history.reason

    (step, reason), *others = on_ranks(4, run)
    assert 2 <= step < 7
    assert "SIGTERM" in reason
    assert others == [(step, reason)] * 3


# The first weights ------------------------------------------------------------------------------------------


def test_every_rank_begins_with_the_weights_of_rank_0_also_of_layers_that_are_not_cut() -> None:
    def weights() -> tuple[Tensor, list[list[int]]]:
        torch.manual_seed(torch.distributed.get_rank())
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
        trainer = make_trainer(tensor_parallel, plain, net)
        return flat(net.parameters()), [list(local_part(one).shape) for one in trainer.parts["model"].parameters()]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
    for of_rank, shapes in on_ranks(4, weights):
        assert torch.equal(of_rank, flat(net.parameters()))
        assert shapes == [[2, 5], [2], [2, 4], [2], [2], [2]]


@pytest.mark.parametrize(
    ("init", "is_real_on_main"),
    [
        (None, False),
        pytest.param(fill, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_a_model_may_be_on_the_meta_device(init: Any, is_real_on_main: bool) -> None:
    def begun() -> Tensor:
        is_real = is_real_on_main and torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
        with torch.device("cpu" if is_real else "meta"):
            net = model()
        torch.manual_seed(3)
        trainer = make_trainer(partial(tensor_parallel, init=init), plain, net)
        trainer.fit(data(), epochs=1)
        return flat(net.parameters())

    alone = begun() if not is_real_on_main else flat(make_fitted().parameters())
    for of_rank in on_ranks(4, begun):
        torch.testing.assert_close(of_rank, alone, rtol=0, atol=1e-12)


def make_fitted() -> nn.Module:
    net = model()
    make_trainer(tensor_parallel, plain, net).fit(data(), epochs=1)
    return net


@pytest.mark.slow
def test_the_state_of_an_optimizer_that_has_stepped_is_kept() -> None:
    alone = trained_after_steps_by_hand(tensor_parallel)
    results = on_ranks(4, trained_after_steps_by_hand, tensor_parallel)
    torch.testing.assert_close(results[0], alone, rtol=0, atol=1e-12)


def test_with_one_process_a_model_is_as_it_was_given() -> None:
    net = model()
    make_trainer(tensor_parallel, plain, net)
    assert not any(map(is_sharded, net.parameters()))


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "world_before", "after", "world_after"),
    [
        ("tensor", 4, "replicated", 1),
        ("replicated", 1, "tensor", 4),
        ("sharded", 2, "tensor", 4),
        ("tensor", 4, "both", 4),
    ],
)
def test_a_checkpoint_continues_on_ranks_of_every_kind(
    before: str, world_before: int, after: str, world_after: int, tmp_path: Path
) -> None:
    kinds = KINDS | {"tensor": tensor_parallel}
    on_ranks(world_before, cut, kinds[before], tmp_path / "run", 11)
    results = on_ranks(world_after, resume, kinds[after], tmp_path / "run")
    assert_alike(results[0], resume(Distributed, tmp_path / "alone"))


def continued(kind: Callable[[], Distributed], directory: Path) -> Any:
    trainer = make_trainer(kind, lambda: [WeightAverage(decay=0.9), RunCheckpoint(directory)])
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=3, resume="auto")
    return outcome(trainer)


def test_a_checkpoint_in_parts_continues_on_ranks_that_cut_layers_in_another_way(tmp_path: Path) -> None:
    on_ranks(2, in_parts, tmp_path / "run")
    results = on_ranks(4, continued, tensor_parallel, tmp_path / "run")
    assert_alike(results[0], continued(Distributed, tmp_path / "alone"))


def test_the_best_weights_are_one_plain_file_and_are_restored_on_every_rank(tmp_path: Path) -> None:
    def run(directory: Path) -> Tensor:
        trainer = make_trainer(
            tensor_parallel, lambda: [BestCheckpoint("val_loss", directory=directory, restore=True)]
        )
        trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=2)
        return flat(trainer.parts["model"].parameters())

    alone = run(tmp_path / "alone")
    for restored in on_ranks(4, run, tmp_path / "ranks"):
        torch.testing.assert_close(restored, alone, rtol=0, atol=1e-12)
    ours, theirs = (torch.load(tmp_path / one / "best.pt", weights_only=True) for one in ("alone", "ranks"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)


# What cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"parallelize": None}, ["nothing says which layers"]),
        ({"mesh": {"shard": 2}}, ['which has no dimension "tensor"']),
        ({"mesh": None}, ['mesh=None, which has no dimension "tensor"']),
        ({"mesh": {"shard": 2, "tensor": 1}}, ["a size that cuts nothing"]),
        ({"parallelize": {"0": ColwiseParallel()}}, ["cannot be called with a model and a mesh"]),
        ({"kind": "replicate"}, ['mesh and parallelize, which only "fsdp" takes']),
        ({"data": "sharded"}, ["must read the same samples"]),
    ],
)
def test_settings_that_cannot_work_are_refused_when_made(settings: dict[str, Any], phrases: list[str]) -> None:
    given: dict[str, Any] = {"kind": "fsdp", "mesh": MESH, "parallelize": cut_both_layers} | settings
    with refused(ConfigurationError, *phrases):
        Distributed(**given)


class Tied(nn.Module):
    """Two layers with one weight, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight
        self.third.weight.requires_grad_(False)


def test_weights_that_are_one_stay_one_and_those_that_are_frozen_stay_so() -> None:
    def look() -> tuple[bool, list[str]]:
        def cut_third(net: nn.Module, mesh: Any) -> None:
            parallelize_module(net, mesh, {"third": ColwiseParallel()})

        net = Tied()
        make_trainer(partial(tensor_parallel, parallelize=cut_third, units=[]), plain, net)
        frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
        return net.second.weight is net.first.weight, frozen

    assert on_ranks(4, look) == [(True, ["third.weight"])] * 4


def cut_first(net: nn.Module, mesh: Any) -> None:
    parallelize_module(net, mesh, {"first": ColwiseParallel()})


def test_what_cannot_be_cut_is_refused_when_attached() -> None:
    def attach() -> None:
        with refused(ConfigurationError, "which is for 6 ranks, and there are 4"):
            make_trainer(partial(tensor_parallel, mesh={"shard": 3, "tensor": 2}), plain)
        with refused(ConfigurationError, "parallelize has cut no parameter of the part model", "0.weight, 0.bias"):
            make_trainer(partial(tensor_parallel, parallelize=lambda net, mesh: None), plain)
        with refused(ConfigurationError, "The parameter 0.weight has shape [6, 5]", "multiple of 4"):
            make_trainer(tensor_parallel, plain, nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)))
        with refused(ConfigurationError, "The parameters first.weight and second.weight", "has made two"):
            make_trainer(partial(tensor_parallel, parallelize=cut_first, units=[]), plain, Tied())

    on_ranks(4, attach)


def test_handlers_that_cannot_work_say_so_before_the_first_step(tmp_path: Path) -> None:
    def attach() -> None:
        with refused(ConfigurationError, "RunCheckpoint has sharded=True", "tensor parallelism"):
            make_trainer(tensor_parallel, lambda: [RunCheckpoint(tmp_path, sharded=True)])
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), 0.3)
        with refused(ConfigurationError, "The ignite metric 'acc' adds up what all ranks have seen"):
            Trainer(
                net,
                optimizer,
                nn.CrossEntropyLoss(),
                metrics={"acc": Accuracy()},
                callbacks=[tensor_parallel()],
                seed=7,
            ).fit(data(), epochs=1)

    on_ranks(4, attach)


def test_metrics_of_ignites_own_engine_would_count_samples_twice() -> None:
    def run() -> None:
        ignite = Ignite()
        Accuracy().attach(ignite.train, "acc")
        trainer = make_trainer(tensor_parallel, lambda: [ignite])
        with refused(ConfigurationError, "ignite's Accuracy adds up what all ranks have seen"):
            trainer.fit(data(), epochs=1)

    on_ranks(4, run)
