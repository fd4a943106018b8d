"""A model that several ranks hold in parts: the same weights, averages and files as those of one process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import kill_before, refused, struck
from ranks import on_ranks
from test_ranks import accuracy, assert_alike, data, everything_on, model, plain
from test_ranks_cost import operations
from test_ranks_numbers import adversarial, assert_as_alone
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    Compile,
    Distributed,
    FreezeUntil,
    LearningRateFinder,
    MixedPrecision,
    Penalty,
    Placement,
    RunCheckpoint,
    StopOnNonFinite,
    WeightAverage,
)
from camshaft.callbacks.fsdp import matching_modules
from camshaft.engine import (
    PART_DIGESTS,
    Callback,
    CheckpointDirectory,
    CheckpointError,
    ConfigurationError,
    DataError,
    Engine,
    StepEnd,
    Trainer,
    at,
    has_shards,
    is_sharded,
    keep_checkpoint,
    local_part,
    made_whole,
    parameters_of,
    write_part,
)
from camshaft.engine import sharded as sharded_tensors
from camshaft.engine.checkpoint import load_verified
from camshaft.engine.sharded import IN_PARTS, InParts

fsdp = pytest.importorskip("torch.distributed.fsdp")
tensors = pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_reduce_scatter"),
    reason="this torch cannot weigh the gradients of ranks",
)
Kind = Callable[[], Distributed]
Callbacks = Callable[[], list[Callback]]

UNITS = ["0", "2"]


def sharded(**settings: Any) -> Distributed:
    return Distributed("fsdp", **({"units": UNITS} | settings))


def with_penalty() -> list[Callback]:
    return [Placement("cpu"), Penalty(l1=0.001, l2=0.01), ClipGradients(value=0.01), FreezeUntil(2, ["2.*"])]


def make(kind: Kind, callbacks: Callbacks, net: nn.Module | None = None) -> Engine:
    net = model() if net is None else net
    return Trainer(
        net,
        torch.optim.SGD(net.parameters(), 0.3, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"acc": accuracy},
        callbacks=[kind(), *callbacks()],
        seed=7,
    )


def fit(kind: Kind, callbacks: Callbacks, *, epochs: int = 3, **settings: Any) -> dict[str, Any]:
    trainer = make(kind, callbacks)
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=epochs, **settings)
    return outcome(trainer)


def by_hand(kind: Kind, callbacks: Callbacks) -> dict[str, Any]:
    """The script style, with a backward pass and an update of its own."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    engine = Engine(model=net, optimizer=optimizer, callbacks=[kind(), *callbacks()], seed=7)
    for _ in engine.epochs(3):
        for inputs, target in engine.train(data()):
            loss = nn.functional.cross_entropy(net(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.record(loss=loss)
        for inputs, target in engine.validate(data(37, shuffle=False, seed=1)):
            engine.record(loss=nn.functional.cross_entropy(net(inputs), target))
    return outcome(engine)


def outcome(engine: Engine) -> dict[str, Any]:
    return {
        "weights": flat(engine.parts["model"].parameters()),
        "rows": engine.history.rows,
        "reason": engine.history.reason,
        "counters": [engine.epoch, engine.step, engine.num_updates, engine.num_validations],
    }


def flat(parameters: Iterator[Tensor]) -> Tensor:
    return torch.cat([made_whole(parameter).detach().cpu().reshape(-1) for parameter in parameters])


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "style", "callbacks"),
    [
        (2, fit, plain),
        (2, fit, everything_on),
        (2, fit, with_penalty),
        (2, by_hand, plain),
        (4, fit, everything_on),
    ],
)
def test_ranks_that_hold_parts_train_as_one_process_does(
    world: int, style: Callable[..., dict[str, Any]], callbacks: Callbacks
) -> None:
    """Also with a short last batch, of which some ranks have no sample, and with windows that it cuts short."""
    alone = style(sharded, callbacks)
    results = on_ranks(world, style, sharded, callbacks)
    assert all(result["rows"] == results[0]["rows"] for result in results)
    assert_alike(results[0], alone)


def test_parts_may_be_held_by_several_ranks_each() -> None:
    mesh = {"shard": 2, "replicate": 2}
    results = on_ranks(4, fit, partial(sharded, mesh=mesh), everything_on)
    assert_alike(results[0], fit(sharded, everything_on))


def test_a_weight_is_cut_into_as_many_parts_as_the_mesh_says() -> None:
    def sizes(mesh: dict[str, int] | None) -> tuple[int, int]:
        parameters = parameters_of(make(partial(sharded, mesh=mesh), plain).parts["optimizer"])
        return sum(local_part(p).numel() for p in parameters), sum(p.numel() for p in parameters)

    whole_size = sum(parameter.numel() for parameter in model().parameters())
    parts = on_ranks(4, sizes, None)
    assert sum(part for part, _ in parts) == whole_size
    assert {full for _, full in parts} == {whole_size}
    parts = on_ranks(4, sizes, {"replicate": 2, "shard": 2})
    assert sum(part for part, _ in parts) == 2 * whole_size


def test_float32_and_a_fused_adamw_agree_to_six_digits() -> None:
    def weights() -> Tensor:
        net = model().float()
        optimizer = torch.optim.AdamW(net.parameters(), 0.01, fused=True)
        trainer = Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=[sharded(), ClipGradients(0.5)], seed=7)
        trainer.fit([(inputs.float(), target) for inputs, target in data(shuffle=False)], epochs=3)
        return flat(net.parameters())

    torch.testing.assert_close(on_ranks(2, weights)[0], weights(), rtol=0, atol=1e-6)


def test_a_policy_computes_in_its_precision_and_keeps_the_weights_in_theirs() -> None:
    def types() -> tuple[torch.dtype, torch.dtype, float]:
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        net = model().float()
        trainer = make(partial(sharded, policy=policy), plain, net)
        trainer.fit([(inputs.float(), target) for inputs, target in data(shuffle=False)], epochs=3)
        output = trainer.predict([torch.zeros(4, 5)])
        return output.dtype, next(net.parameters()).dtype, trainer.history["train_loss"][-1]

    output, weight, loss = on_ranks(2, types)[0]
    assert (output, weight) == (torch.bfloat16, torch.float32)
    assert loss == pytest.approx(fit(sharded, plain)["rows"][-1]["train_loss"], abs=0.1)


def test_a_second_fit_continues_with_the_parts() -> None:
    def fit_twice() -> dict[str, Any]:
        trainer = make(sharded, lambda: [WeightAverage(decay=0.9, load_at_end=True)])
        for _ in range(2):
            trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=1)
        return outcome(trainer)

    assert_alike(on_ranks(2, fit_twice)[0], fit_twice())


def test_a_compiled_model_is_sharded_too() -> None:
    alone = fit(sharded, plain)
    assert_alike(on_ranks(2, fit, sharded, lambda: [Compile(backend="eager")])[0], alone)


def test_evaluations_and_predictions_are_those_of_one_process() -> None:
    def results() -> tuple[dict[str, Any], Tensor, bool]:
        trainer = make(sharded, lambda: [WeightAverage(decay=0.5)])
        trainer.fit(data(), epochs=1)
        val = data(37, shuffle=False, seed=1)
        measured, predicted = trainer.evaluate(val), trainer.predict(val)
        return measured, predicted, has_shards(trainer.parts["model"].parameters())

    (measured, predicted, _), ranks = results(), on_ranks(2, results)
    for of_rank, predicted_by_rank, is_in_parts in ranks:
        assert of_rank == pytest.approx(measured, abs=1e-12)
        torch.testing.assert_close(predicted_by_rank, predicted, rtol=0, atol=1e-12)
        assert is_in_parts


class _Experts(nn.Module):
    """Only one of two layers is used, by the number of the sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.experts[int(inputs[0, 0] > 0)](inputs)
        return output


def test_ranks_may_leave_out_different_parameters_if_that_is_said() -> None:
    def weights() -> Tensor:
        trainer = make(lambda: Distributed("fsdp", find_unused_parameters=True), plain, _Experts())
        inputs = torch.tensor([[1.0] * 5, [-1.0] * 5])
        trainer.fit([(inputs, torch.tensor([0, 1]))], epochs=2)
        return flat(trainer.parts["model"].parameters())

    ranks = on_ranks(2, weights)
    assert torch.equal(*ranks)
    assert not torch.equal(ranks[0], flat(_Experts().parameters()))


# Several optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "is_detached", "settings"),
    [(1, True, {}), (2, True, {}), (2, False, {}), (2, True, {"find_unused_parameters": True})],
)
def test_networks_with_an_optimizer_each_train_as_in_one_process(
    every: int, is_detached: bool, settings: dict[str, Any]
) -> None:
    """Each loss runs through both networks, while the other one's window is open."""
    assert_as_alone(2, partial(adversarial, every, partial(sharded, **settings), is_detached=is_detached))


def matrices_and_rest(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in net.parameters() if p.ndim == 2], [p for p in net.parameters() if p.ndim != 2]


def first_and_last_layer(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return list(net.get_submodule("0").parameters()), list(net.get_submodule("2").parameters())


Split = Callable[[nn.Module], tuple[list[nn.Parameter], list[nn.Parameter]]]
BOTH = ("first", "second")


def divided(
    split: Split,
    updates: list[Any],
    callbacks: Callbacks,
    first: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    kind: Kind = sharded,
) -> dict[str, Any]:
    """Train one model with two optimizers; each update has a forward pass of its own."""
    net = model()
    ours, others = split(net)

    def step(engine: Engine, batch: Any) -> None:
        for names in updates:
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            if engine.training:
                engine.update(loss, optimizer=names)
        engine.record(loss=loss)

    parts: dict[str, Any] = {"first": first(ours, lr=0.1, momentum=0.9), "second": torch.optim.AdamW(others, 0.01)}
    engine = Engine(step, model=net, **parts, callbacks=[kind(), *callbacks()], seed=7)
    engine.fit(data(35, batch_size=8), data(5, shuffle=False), epochs=2)
    return outcome(engine)


def windows() -> list[Callback]:
    return [Accumulate(2), ClipGradients(0.5), WeightAverage(decay=0.9)]


@pytest.mark.parametrize("callbacks", [pytest.param(plain, marks=pytest.mark.slow), windows, with_penalty])
@pytest.mark.parametrize("split", [pytest.param(matrices_and_rest, marks=pytest.mark.slow), first_and_last_layer])
@pytest.mark.parametrize("updates", [[BOTH], [*BOTH]], ids=["joint", "apart"])
def test_a_model_with_two_optimizers_trains_as_in_one_process(
    updates: list[Any], split: Split, callbacks: Callbacks
) -> None:
    assert_as_alone(2, divided, split, updates, callbacks)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_agrees_to_the_precision_in_which_it_computes() -> None:
    run = partial(divided, matrices_and_rest, [BOTH], plain, torch.optim.Muon)
    torch.testing.assert_close(on_ranks(2, run)[0]["weights"], run()["weights"], rtol=0, atol=0.03)


@pytest.mark.parametrize("updates", [[BOTH], [*BOTH]], ids=["joint", "apart"])
def test_an_update_adds_up_the_gradients_of_its_own_optimizers_alone(updates: list[Any]) -> None:
    """Each of the two units once in each of the 10 steps, in one update or in two."""
    run = partial(divided, first_and_last_layer, updates, plain)
    first, second = on_ranks(2, operations, run)
    assert first == second
    assert sum(count for name, count in first.items() if "reduce_scatter" in name) == 20


@pytest.mark.parametrize("in_parts", [False, True])
def test_open_windows_of_several_optimizers_go_on_in_one_process_and_back(in_parts: bool, tmp_path: Path) -> None:
    def saved() -> list[Callback]:
        return [RunCheckpoint(tmp_path, sharded=in_parts)]

    on_ranks(2, partial(adversarial, 4, sharded, callbacks=saved, stop_at=2))
    adversarial(4, sharded, callbacks=saved, stop_at=7)
    results = on_ranks(2, partial(adversarial, 4, sharded, callbacks=saved))
    assert_alike(results[0], adversarial(4))


def train_two(updates: Callable[[Engine, Any], None]) -> None:
    """Train in the script style, with two networks that have an optimizer each."""
    parts: dict[str, Any] = {"own": model(), "other": model()}
    parts |= {f"{name}_optimizer": torch.optim.SGD(net.parameters(), 0.1) for name, net in parts.items()}
    engine = Engine(**parts, callbacks=[sharded()], seed=0)
    for _ in engine.epochs(1):
        for batch in engine.train(data()):
            updates(engine, batch)


def update_the_other(engine: Engine, batch: Any) -> None:
    engine.update(nn.functional.cross_entropy(engine.parts["own"](batch[0]), batch[1]), optimizer="other_optimizer")


def update_after_a_step(engine: Engine, batch: Any) -> None:
    losses = [nn.functional.cross_entropy(engine.parts["own"](batch[0]), batch[1]) for _ in range(2)]
    for loss in losses:
        engine.update(loss, optimizer="own_optimizer")


@pytest.mark.parametrize(
    ("updates", "error", "said"),
    [
        (update_the_other, DataError, 'gave no gradient to anything that "other_optimizer" holds'),
        (update_after_a_step, RuntimeError, "modified by an inplace operation"),
    ],
)
def test_updates_that_one_process_refuses_are_refused_on_every_rank(
    updates: Callable[[Engine, Any], None], error: type[Exception], said: str
) -> None:
    """Such as a loss of weights that are gone: a backward pass would gather those that came after them."""

    def attempt() -> None:
        with pytest.raises(error, match=said):
            train_two(updates)

    attempt()
    on_ranks(2, attempt)


# The first weights ------------------------------------------------------------------------------------------


def test_every_rank_begins_with_the_weights_of_rank_0() -> None:
    def weights() -> Tensor:
        torch.manual_seed(torch.distributed.get_rank())
        net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
        dict(net.named_buffers())["1.running_mean"].fill_(torch.distributed.get_rank())
        make(lambda: Distributed("fsdp", batch_norm="local"), plain, net)
        return flat(iter([*net.parameters(), *net.buffers()]))

    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    for of_rank in on_ranks(2, weights):
        assert torch.equal(of_rank, flat(iter([*expected.parameters(), *expected.buffers()])))


def made_on(device: str, init: Any = None) -> Tensor:
    """Make a model on a device, train it, and return its weights."""
    torch.manual_seed(3)
    with torch.device(device):
        net = nn.Sequential(nn.Linear(5, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 2, dtype=torch.float64))
    torch.manual_seed(3)
    trainer = make(partial(sharded, init=init), plain, net)
    trainer.fit(data(), epochs=1)
    return flat(net.parameters())


def fill(net: nn.Module) -> None:
    for number, parameter in enumerate(net.parameters()):
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / (10.0 + number))


@pytest.mark.parametrize("init", [None, fill])
def test_a_model_on_the_meta_device_gets_the_weights_that_it_has_in_one_process(init: Any) -> None:
    alone = made_on("meta", init)
    assert torch.equal(alone, made_on("cpu")) == (init is None)
    for of_rank in on_ranks(2, made_on, "meta", init):
        torch.testing.assert_close(of_rank, alone, rtol=0, atol=1e-12)


def test_a_model_that_is_whole_on_rank_0_alone_is_sent_to_the_others() -> None:
    def weights() -> Tensor:
        return made_on("cpu" if torch.distributed.get_rank() == 0 else "meta")

    for of_rank in on_ranks(2, weights):
        torch.testing.assert_close(of_rank, made_on("cpu"), rtol=0, atol=1e-12)


class Scale(nn.Module):
    """A layer that cannot be reset."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def test_a_layer_that_says_nothing_of_its_first_weights_needs_a_function() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 2), Scale())
    with refused(ConfigurationError, "The part model has no weights yet", "Scale has no reset_parameters"):
        make(sharded, plain, net)


def trained_after_steps_by_hand(kind: Kind) -> Tensor:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    for _ in range(3):
        net(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=[kind()], seed=7).fit(data(), epochs=1)
    return flat(net.parameters())


def test_the_state_of_an_optimizer_that_has_stepped_is_kept() -> None:
    alone = trained_after_steps_by_hand(sharded)
    torch.testing.assert_close(on_ranks(2, trained_after_steps_by_hand, sharded)[0], alone, rtol=0, atol=1e-12)


# Files ------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_one_plain_file_and_are_restored_on_every_rank(tmp_path: Path) -> None:
    def run(directory: Path | None) -> tuple[Tensor, Any]:
        best = BestCheckpoint("val_loss", directory=directory, top_k=2, restore=True)
        trainer = make(sharded, lambda: [WeightAverage(decay=0.5), best])
        trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=4)
        return flat(trainer.parts["model"].parameters()), best.weights()

    alone, _ = run(tmp_path / "alone")
    for directory in (tmp_path / "ranks", None):
        for restored, weights in on_ranks(2, run, directory):
            torch.testing.assert_close(restored, alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(flat(weights.values()), alone, rtol=0, atol=1e-12)
    assert len(list((tmp_path / "ranks").glob("val_loss=*"))) == 2
    ours = torch.load(tmp_path / "alone" / "best.optimizer.pt", weights_only=True)
    theirs = torch.load(tmp_path / "ranks" / "best.optimizer.pt", weights_only=True)
    torch.testing.assert_close(theirs["state"], ours["state"], rtol=0, atol=1e-12)


def cut(kind: Kind, directory: Path, step: int) -> int:
    """Begin a run that is interrupted after a step, within a window."""
    return resume(kind, directory, step)["counters"][1]  # type: ignore[no-any-return]


def resume(kind: Kind, directory: Path, step: int | None = None) -> dict[str, Any]:
    def callbacks() -> list[Callback]:
        return [Accumulate(3), WeightAverage(decay=0.9), RunCheckpoint(directory)]

    trainer = make(kind, callbacks)
    if step is not None:
        trainer.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(step))
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=3, resume="auto")
    return outcome(trainer)


KINDS: dict[str, Kind] = {
    "replicated": Distributed,
    "sharded": sharded,
    "both": partial(sharded, mesh={"replicate": 2, "shard": 2}),
}


@pytest.mark.parametrize(
    ("before", "world_before", "after", "world_after"),
    [
        ("sharded", 4, "sharded", 2),
        ("sharded", 2, "replicated", 1),
        ("replicated", 2, "both", 4),
        ("both", 4, "replicated", 2),
    ],
)
def test_a_checkpoint_continues_on_any_number_of_ranks_of_either_kind(
    before: str, world_before: int, after: str, world_after: int, tmp_path: Path
) -> None:
    steps = on_ranks(world_before, cut, KINDS[before], tmp_path / "run", 11)
    assert {11} <= set(steps) <= set(range(11, 13))
    results = on_ranks(world_after, resume, KINDS[after], tmp_path / "run")
    assert_alike(results[0], resume(Distributed, tmp_path / "alone"))


def in_parts(
    directory: Path, *, epochs: int = 2, resume: str | None = None, keep: int = 2, background: bool = False
) -> None:
    """Train with checkpoints in parts."""
    checkpoint = RunCheckpoint(directory, sharded=True, keep=keep, background=background)
    trainer = make(sharded, lambda: [WeightAverage(decay=0.9), checkpoint])
    trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=epochs, resume=resume)


def listing(directory: Path) -> list[str]:
    """The names of all checkpoints without their digests, and of all parts."""
    names = [path.name for path in directory.iterdir() if not path.name.endswith(".lock")]
    return sorted(name[: name.rfind("-")] if name.startswith("run") else name for name in names)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("after", "world_after"), [("sharded", 2), ("replicated", 1), ("both", 4)])
def test_a_checkpoint_in_parts_continues_on_any_number_of_ranks_of_either_kind(
    after: str, world_after: int, background: bool, tmp_path: Path
) -> None:
    def cut_in_parts() -> None:
        def stop(event: StepEnd) -> None:
            event.engine.run.interrupt(signal.SIGTERM)

        checkpoint = RunCheckpoint(tmp_path / "run", sharded=True, background=background)
        trainer = make(sharded, lambda: [Accumulate(3), WeightAverage(decay=0.9), checkpoint])
        trainer.subscribe(StepEnd, stop, when=at(11))
        trainer.fit(data(), data(37, shuffle=False, seed=1), epochs=3)

    on_ranks(4, cut_in_parts)
    files = [path.name for path in (tmp_path / "run" / ".run-000002.parts").iterdir()]
    assert sorted(files) == [f"part-{rank}.pt" for rank in range(4)]
    results = on_ranks(world_after, resume, KINDS[after], tmp_path / "run")
    assert_alike(results[0], resume(Distributed, tmp_path / "alone"))


def resumed_without_the_whole(directory: Path) -> tuple[int, int]:
    """Return how many numbers are in the files of parts, and how many of them were read for this rank."""
    sizes: list[tuple[int, int]] = []

    def like(saved: InParts, own: Tensor) -> Tensor:
        spans.clear()
        part = original(saved, own)
        sizes.append((saved.numel(), sum(spans[1::2])))  # of each part in the files, what is written and what is read
        return part

    def span(*args: Any) -> Tensor:
        found = original_span(*args)
        spans.append(found.numel())
        return found

    spans: list[int] = []
    original, original_span = InParts.like, sharded_tensors._span
    not_whole = patch.object(InParts, "whole", side_effect=AssertionError("read whole"))
    with patch.object(InParts, "like", like), not_whole, patch.object(sharded_tensors, "_span", span):
        in_parts(directory, epochs=3, resume="auto")
    return sum(whole for whole, _ in sizes), sum(own for _, own in sizes)


def test_a_rank_reads_only_its_own_part_of_what_was_saved_in_parts(tmp_path: Path) -> None:
    """Weights, the optimizer's state and the average would not fit in its memory."""
    on_ranks(2, in_parts, tmp_path / "run")
    results = on_ranks(4, resumed_without_the_whole, tmp_path / "run")
    saved = {whole for whole, _ in results}
    assert len(saved) == 1
    assert sum(own for _, own in results) == saved.pop() > 0


def test_a_tensor_in_parts_says_that_it_has_no_content() -> None:
    content = torch.arange(6.0).reshape(2, 3)
    saved = InParts.of([2, 3], torch.float32, [{"dim": 1, "begin": 0, "content": content[:, :2]},
                                               {"dim": 1, "begin": 2, "content": content[:, 2:]}])  # fmt: skip
    assert saved.shape == (2, 3)
    assert torch.equal(saved.whole(), content)
    with pytest.raises(NotImplementedError, match="meta"):
        torch.empty(2, 3).copy_(saved)


def cut_along(dim: int, world: int) -> list[dict[str, Any]]:
    """A tensor of 5 x 7, cut as torch cuts it: rounded up, so that the last parts may be empty."""
    whole, size = torch.arange(35.0).reshape(5, 7), -(-(5, 7)[dim] // world)
    begins = [min(size * rank, (5, 7)[dim]) for rank in range(world)]
    return [{"dim": dim, "begin": begin, "content": whole.narrow(dim, begin, min(size, (5, 7)[dim] - begin))}
            for begin in begins]  # fmt: skip


def read_along(dim: int) -> list[tuple[int, int]]:
    """Return from what parts, by number and dimension, something else was read than what torch cuts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = tensors.distribute_tensor(torch.arange(35.0).reshape(5, 7), mesh, [tensors.Shard(dim)])
    cuts = [(world, along) for world in (1, 3, 6) for along in (0, 1)]
    read = {cut: InParts.of([5, 7], torch.float32, cut_along(*reversed(cut))).like(expected) for cut in cuts}
    return [cut for cut, own in read.items() if not torch.equal(local_part(own), local_part(expected))]


def test_a_part_is_read_from_parts_of_any_number_and_direction() -> None:
    for wrong in on_ranks(4, lambda: read_along(0) + read_along(1)):
        assert wrong == []


def test_parts_go_with_their_checkpoint_and_what_a_killed_run_left_goes_first(tmp_path: Path) -> None:
    on_ranks(2, partial(in_parts, tmp_path, epochs=3))
    kept = [".run-000002.parts", ".run-000003.parts", "run-000002-step-14", "run-000003-step-21"]
    assert listing(tmp_path) == kept
    (tmp_path / ".run-000009.parts").mkdir()
    (tmp_path / ".run-000009.parts" / "part-0.pt").write_text("half of it")
    on_ranks(2, partial(in_parts, tmp_path, epochs=4, keep=1, resume="auto"))
    assert listing(tmp_path) == [".run-000004.parts", "run-000004-step-28"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_flipped_byte_in_any_part_is_found_and_the_checkpoint_before_is_used(
    rank: int, place: float, tmp_path: Path, checkpoints_in_parts: Path
) -> None:
    shutil.copytree(checkpoints_in_parts, tmp_path / "run")
    part = tmp_path / "run" / ".run-000002.parts" / f"part-{rank}.pt"
    content = bytearray(part.read_bytes())
    content[int(place * len(content))] ^= 1
    part.write_bytes(content)
    state, source = CheckpointDirectory(tmp_path / "run").load_newest() or ({}, Path())
    assert source.name.startswith("run-000001-step-7")
    assert state["counters"]["step"] == 7
    assert [path.name[:17] for path in (tmp_path / "run").glob("*.damaged")] == ["run-000002-step-1"]


def test_a_checkpoint_of_which_a_part_is_missing_is_damaged(tmp_path: Path, checkpoints_in_parts: Path) -> None:
    shutil.copytree(checkpoints_in_parts, tmp_path / "run")
    for number in (1, 2):
        (tmp_path / "run" / f".run-00000{number}.parts" / "part-1.pt").unlink()
    with refused(CheckpointError, "is damaged: its part-1.pt is missing"):
        load_verified(next((tmp_path / "run").glob("run-*.pt")))
    with refused(CheckpointError, "Every checkpoint in"):
        CheckpointDirectory(tmp_path / "run").load_newest()


@pytest.fixture(scope="module")
def checkpoints_in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two checkpoints that two ranks have written."""
    directory = tmp_path_factory.mktemp("checkpoints") / "run"
    on_ranks(2, in_parts, directory)
    return directory


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_part_that_one_rank_cannot_write_warns_and_the_next_save_tries_again(
    failing: int, background: bool, tmp_path: Path
) -> None:
    def run() -> list[str]:
        """Fail once where a part is synced."""
        is_failing = torch.distributed.get_rank() == failing
        failures = iter([OSError(errno.ENOSPC, "No space left on device")] if is_failing else [])

        def strike(name: str) -> None:
            if name == "replace" and (error := next(failures, None)):
                raise error

        with struck(strike):
            in_parts(tmp_path, background=background)
        return listing(tmp_path)

    assert on_ranks(2, run)[0] == [".run-000001.parts", "run-000001-step-14"]


def write_in_parts(path: Path, number: int) -> None:
    """What a save in parts does: begin, write the part of each of two ranks, write the checkpoint, and prune."""
    directory = CheckpointDirectory(path)
    parts = directory.begin_parts()
    digests = [
        write_part(parts, rank, {0: {"dim": 0, "begin": 2 * rank, "content": torch.full((2,), float(number))}})
        for rank in range(2)
    ]
    weights = {IN_PARTS: 0, "shape": [4], "dtype": torch.float32}
    directory.save({"number": number, "weights": weights, PART_DIGESTS: digests}, step=number)
    directory.prune(keep=1, keep_every=None)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_checkpoint_in_parts_is_kept_elsewhere_with_its_parts(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is removed from its directory, and where the file system has no links."""
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *paths, **options: os.open(tmp_path, os.O_WRONLY))  # an OSError
    directory, kept = CheckpointDirectory(tmp_path / "own"), tmp_path / "kept"
    directory.path.mkdir()
    write_in_parts(directory.path, 1)
    for _ in range(2):  # a second time changes nothing
        keep_checkpoint(directory.files()[0], kept)
    write_in_parts(directory.path, 2)
    assert len(directory.files()) == 1
    (file,) = CheckpointDirectory(kept).files()
    assert torch.equal(load_verified(file.path)["weights"], torch.full((4,), 1.0))


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_save_in_parts_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    calls: list[str] = []
    seen = set()
    write_in_parts(tmp_path, 1)
    with struck(calls.append):
        write_in_parts(tmp_path, 2)
    for fatal in range(1, len(calls) + 1):
        path = tmp_path / str(fatal)
        path.mkdir()
        write_in_parts(path, 1)
        kill_before(fatal, partial(write_in_parts, path, 2))
        state, _ = CheckpointDirectory(path).load_newest() or ({}, None)
        assert torch.equal(state["weights"], torch.full((4,), float(state["number"])))
        seen.add(state["number"])
        CheckpointDirectory(path).sweep()
        write_in_parts(path, 3)
        (parts,) = path.glob(".*")
        (file,) = path.glob("run-*")
        assert parts.name == f".{file.name[:10]}.parts"
    assert seen == {1, 2}


def test_parts_that_do_not_make_up_a_tensor_are_refused(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    digest = write_part(directory.begin_parts(), 0, {0: {"dim": 0, "begin": 0, "content": torch.zeros(2)}})
    weights = {IN_PARTS: 0, "shape": [4], "dtype": torch.float32}
    directory.save({"weights": weights, PART_DIGESTS: [digest]}, step=1)
    with refused(CheckpointError, "the parts of a tensor of shape [4] are not all there"):
        directory.load_newest()


def test_one_process_has_no_parts_to_write(tmp_path: Path) -> None:
    in_parts(tmp_path)
    assert listing(tmp_path) == ["run-000001-step-7", "run-000002-step-14"]


# What cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"kind": "fsdb"}, ["does not know 'fsdb'"]),
        ({"units": ["0"]}, ['units, which only "fsdp" takes']),
        ({"mesh": {"shard": 2}, "init": fill}, ['mesh and init, which only "fsdp" takes']),
        ({"kind": "fsdp", "units": "layers.*"}, ["units='layers.*'", "is not a list"]),
        ({"kind": "fsdp", "units": [nn.Linear]}, ["among its units"]),
        ({"kind": "fsdp", "mesh": {"shards": 2}}, ["does not say how weights are cut"]),
        ({"kind": "fsdp", "mesh": {"replicate": 2}}, ["does not say how weights are cut"]),
        ({"kind": "fsdp", "mesh": {"replicate": 2, "shard": 1}}, ["cuts nothing"]),
        ({"kind": "fsdp", "mesh": {"shard": 2.0}}, ["cuts nothing"]),
    ],
)
def test_settings_that_cannot_work_are_refused_when_made(settings: dict[str, Any], phrases: list[str]) -> None:
    with refused(ConfigurationError, *phrases):
        Distributed(**settings)


def test_what_cannot_be_sharded_is_refused_when_attached() -> None:
    def attach() -> None:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with refused(ConfigurationError, 'No module matches "layers.*"', "Give one of these: 0, 1, 2."):
            make(lambda: Distributed("fsdp", units=["0", "layers.*"]), plain)
        with refused(ConfigurationError, 'No module matches "encoder"', 'Did you mean "encode"?'):
            make(lambda: Distributed("fsdp", units=["encoder"]), plain, nn.ModuleDict({"encode": nn.Linear(5, 2)}))
        with refused(ConfigurationError, "which is for 6 ranks, and there are 2"):
            make(partial(sharded, mesh={"replicate": 2, "shard": 3}), plain)
        with refused(ConfigurationError, "A ModuleList cannot be sharded"):
            make(lambda: Distributed("fsdp", units=["experts"]), plain, _Experts())
        with refused(ConfigurationError, "The parts model and head share parameters"):
            Engine(model=net, head=net.get_submodule("2"), callbacks=[sharded()], seed=0)
        with refused(ConfigurationError, "The optimizer holds parameters of no part"):
            Engine(optimizer=optimizer, callbacks=[sharded()], seed=0)
        make(sharded, plain, net)
        with refused(ConfigurationError, "The part model is sharded already"):
            make(sharded, plain, net)

    on_ranks(2, attach)


def test_handlers_that_cannot_work_with_parts_say_so_before_the_first_step() -> None:
    def attach() -> None:
        with refused(ConfigurationError, "would move it", 'Write Placement("cpu")'):
            make(sharded, lambda: [Placement("cpu", channels_last=True)])
        with refused(ConfigurationError, "would move it"):
            make(sharded, lambda: [Placement("meta")])
        with refused(ConfigurationError, "LearningRateFinder copies the model"):
            LearningRateFinder().run(make(sharded, plain), data())

    on_ranks(2, attach)


def test_of_nested_modules_a_pattern_means_the_outer_ones() -> None:
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2)])})
    assert list(matching_modules(net, "layers.*")) == ["layers.0", "layers.1"]
    assert list(matching_modules(net, "layers.*.0")) == ["layers.0.0", "layers.1.0"]
    assert list(matching_modules(net, "*")) == ["layers"]
    assert list(matching_modules(net, "head")) == []


def test_with_one_process_a_model_is_as_it_was_given() -> None:
    net = model()
    parameters = list(net.parameters())
    trainer = make(sharded, plain, net)
    assert all(a is b for a, b in zip(parameters_of(trainer.parts["optimizer"]), parameters, strict=True))
    assert not any(map(is_sharded, net.parameters()))
    assert type(net) is nn.Sequential


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all() -> None:
    def weights() -> Tensor:
        net = model()
        trainer = make(sharded, lambda: [StopOnNonFinite("skip")], net)
        inputs = torch.ones(4, 5, dtype=torch.float64)
        inputs[3] = torch.nan
        trainer.fit([(inputs, torch.tensor([0, 1, 0, 1]))], epochs=1)
        assert trainer.num_skipped_updates == 1
        return flat(net.parameters())

    for of_rank in on_ranks(2, weights):
        assert torch.equal(of_rank, flat(model().parameters()))


def test_bfloat16_autocast_trains_parts() -> None:
    def losses() -> list[float]:
        trainer = make(sharded, lambda: [MixedPrecision("bf16")], model().float())
        trainer.fit([(inputs.float(), target) for inputs, target in data(shuffle=False)], epochs=3)
        return trainer.history["train_loss"]

    ours = losses()
    assert on_ranks(2, losses)[0] == pytest.approx(ours, abs=0.05)
