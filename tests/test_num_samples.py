"""A batch counts by what ``num_samples`` returns: in updates, averages, metrics and evaluations, in every style."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Accumulate, Distributed, MicroBatch, RunCheckpoint
from camshaft.engine import Callback, ConfigurationError, DataError, Engine, StepEnd, Trainer

PADDING = -100
LENGTHS = [[5, 2, 4], [1, 1, 1], [5, 5, 3], [2, 3, 1], [4, 4, 4]]  # tokens of the sequences of five batches
Data = list[tuple[Tensor, Tensor]]
Count = Callable[[Any], Any]
COUNTS: dict[str, Count] = {
    "tensor": lambda batch: (batch[1] != PADDING).sum(),
    "float": lambda batch: float((batch[1] != PADDING).sum()),
    "int": lambda batch: int((batch[1] != PADDING).sum()),
}


def sequences(lengths: list[list[int]] | None = None) -> Data:
    """Inputs of shape (sequences, 5, 3) and targets (sequences, 5), padded."""
    draw = torch.Generator().manual_seed(0)
    data = []
    for batch in lengths or LENGTHS:
        target = torch.randint(0, 4, (len(batch), 5), generator=draw)
        for row, length in zip(target, batch, strict=True):
            row[length:] = PADDING
        data.append((torch.randn(len(batch), 5, 3, generator=draw, dtype=torch.float64), target))
    return data


def net_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    return net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def hits(output: Tensor, target: Tensor) -> Tensor:
    """The share of the tokens that are predicted."""
    real = target != PADDING
    return ((output.argmax(-1) == target) & real).sum() / real.sum()


def by_hand(data: Data, window: int, epochs: int = 2) -> tuple[Tensor, list[float], list[float]]:
    """Weights, mean losses and hit rates of a loop that adds up losses of tokens and divides by their number."""
    net, optimizer = net_and_optimizer()
    losses, rates = [], []
    for _ in range(epochs):
        total, hit, count = 0.0, 0.0, 0
        for start in range(0, len(data), window):
            group = data[start : start + window]
            tokens = sum(int((target != PADDING).sum()) for _, target in group)
            for inputs, target in group:
                output = net(inputs)
                loss = functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
                (loss / tokens).backward()
                total, count = total + float(loss.detach()), count + int((target != PADDING).sum())
                hit += float(((output.argmax(-1) == target) & (target != PADDING)).sum())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / count)
        rates.append(hit / count)
    return nn.utils.parameters_to_vector(net.parameters()), losses, rates


def by_trainer(data: Any, count: Count, callbacks: list[Callback], **options: Any) -> Engine:
    net, optimizer = net_and_optimizer()
    engine = Trainer(
        net, optimizer, token_loss, metrics={"hits": hits}, callbacks=callbacks, num_samples=count, seed=3
    )
    engine.fit(data, epochs=2, **options)
    return engine


def by_function(data: Any, count: Count, callbacks: list[Callback], **options: Any) -> Engine:
    net, optimizer = net_and_optimizer()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        output = net(batch[0])
        loss = token_loss(output, batch[1])
        if engine.training:
            engine.update(loss)
        return {"loss": loss, "hits": hits(output, batch[1])}

    engine = Engine(step, model=net, optimizer=optimizer, callbacks=callbacks, num_samples=count, seed=3)
    engine.fit(data, epochs=2, **options)
    return engine


def by_script(data: Any, count: Count, callbacks: list[Callback], **options: Any) -> Engine:
    net, optimizer = net_and_optimizer()
    engine = Engine(model=net, optimizer=optimizer, callbacks=callbacks, num_samples=count, seed=3)
    for _ in engine.epochs(2, **options):
        for inputs, target in engine.train(data):
            output = net(inputs)
            loss = token_loss(output, target)
            engine.update(loss)
            engine.record(loss=loss, hits=hits(output, target))
    return engine


STYLES = [by_trainer, by_function, by_script]


def weights_of(engine: Engine) -> Tensor:
    return nn.utils.parameters_to_vector(engine.parts["model"].parameters())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_each_token_counts_once_in_gradients_averages_and_metrics(window: int, count: Count, style: Any) -> None:
    """Also in a window that the end of the epoch cuts short."""
    expected, losses, rates = by_hand(sequences(), window)
    engine = style(sequences(), count, [Accumulate(batches=window)] if window > 1 else [])
    torch.testing.assert_close(weights_of(engine), expected, rtol=1e-12, atol=1e-12)
    assert engine.history["train_loss"] == pytest.approx(losses, rel=1e-12)
    assert engine.history["train_hits"] == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("style", [by_trainer, by_function])
def test_an_evaluation_weighs_its_batches_alike(style: Any) -> None:
    engine = style(sequences(), COUNTS["tensor"], [])
    inputs, target = (torch.cat(parts) for parts in zip(*sequences(), strict=True))
    with torch.no_grad():
        whole = token_loss(engine.parts["model"](inputs), target)
    assert engine.evaluate(sequences())["loss"] == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_batch_that_counts_nothing_does_no_harm(empty: int, style: Any, count: Count) -> None:
    """At the start, in the middle or at the end of a window; its loss is NaN."""
    lengths = [[3, 2], [5, 1], [4, 4]]
    expected, losses, _ = by_hand(sequences(lengths), window=3)
    data = sequences(lengths)
    data.insert(empty, (torch.ones(2, 5, 3, dtype=torch.float64), torch.full((2, 5), PADDING)))
    engine = style(data, count, [Accumulate(batches=4)])
    torch.testing.assert_close(weights_of(engine), expected, rtol=1e-12, atol=1e-12)
    assert engine.history["train_loss"] == pytest.approx(losses, rel=1e-12)


def test_a_window_that_counts_nothing_leaves_the_weights_alone() -> None:
    nothing = [(torch.ones(2, 5, 3, dtype=torch.float64), torch.full((2, 5), PADDING))] * 2
    engine = by_trainer(nothing, COUNTS["tensor"], [Accumulate(batches=2)])
    assert torch.equal(weights_of(engine), nn.utils.parameters_to_vector(net_and_optimizer()[0].parameters()))


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("window", [1, 2])
def test_the_parts_of_a_micro_batch_count_by_their_tokens(window: int, count: Count) -> None:
    callbacks = [Accumulate(batches=window), MicroBatch(num_parts=3)]
    engine = by_trainer(sequences(), count, callbacks)
    expected, losses, rates = by_hand(sequences(), window)
    torch.testing.assert_close(weights_of(engine), expected, rtol=1e-12, atol=1e-12)
    assert engine.history["train_loss"] == pytest.approx(losses, rel=1e-12)
    assert engine.history["train_hits"] == pytest.approx(rates, rel=1e-6)
    assert engine.num_updates == 2 * -(-len(LENGTHS) // window)


def test_a_window_of_tokens_closes_when_it_holds_them() -> None:
    engine = by_trainer(sequences(), COUNTS["tensor"], [Accumulate(samples=20)])
    assert engine.num_updates == 2 * 2  # 11 + 3 + 13 tokens, and 6 + 12 at the end of the epoch


@pytest.mark.parametrize("style", STYLES)
def test_killed_after_any_step_and_resumed_the_weights_are_the_same_to_the_bit(style: Any, tmp_path: Path) -> None:
    """Also with sums of tensors in an open window."""
    whole = style(sequences(), COUNTS["tensor"], [Accumulate(batches=2)])
    for fatal in range(1, 10):
        directory = tmp_path / str(fatal)

        class Kill(Callback):
            def on_step_end(self, event: StepEnd, last: int = fatal) -> None:
                if event.engine.step > last:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            style(
                sequences(), COUNTS["tensor"], [Accumulate(batches=2), RunCheckpoint(directory, every_steps=1), Kill()]
            )
        callbacks = [Accumulate(batches=2), RunCheckpoint(directory, every_steps=1)]
        resumed = style(sequences(), COUNTS["tensor"], callbacks, resume="auto")
        assert torch.equal(weights_of(resumed), weights_of(whole))
        assert resumed.history.rows == whole.history.rows


@pytest.mark.parametrize(
    ("returned", "described"),
    [
        (None, "None"),
        (-1, "-1"),
        (float("nan"), "nan"),
        ("8", "'8'"),
        (torch.ones(2), "a float32 tensor of shape [2]"),
    ],
)
@pytest.mark.parametrize("style", STYLES)
def test_what_is_no_number_of_samples_is_refused_at_the_first_batch(style: Any, returned: Any, described: str) -> None:
    with refused(DataError, f"num_samples returned {described} for a batch that is a tuple of 2", "Return a finite"):
        style(sequences(), lambda batch: returned, [])


@pytest.mark.parametrize("count", [8, lambda: 8])
def test_what_cannot_be_called_with_a_batch_is_refused_at_once(count: Any) -> None:
    with refused(ConfigurationError, "num_samples is", "Write num_samples=lambda batch: ..."):
        Trainer(*net_and_optimizer(), token_loss, num_samples=count)


class Reads(TorchDispatchMode):
    """Counts how often a value is read on the host."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += str(func).startswith("aten._local_scalar_dense")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("style", STYLES)
def test_a_number_that_is_a_tensor_is_not_read_in_a_step(style: Any) -> None:
    """A longer epoch reads no more than a shorter one."""
    num = []
    for repeats in (1, 3):
        with Reads() as reads:  # type: ignore[no-untyped-call]  # torch has not typed it
            style(sequences() * repeats, COUNTS["tensor"], [Accumulate(batches=2)])
        num.append(reads.num)
    assert num[0] == num[1]


def train_on_ranks(style: Any, window: int) -> list[Any]:
    callbacks: list[Callback] = [Distributed(), *([Accumulate(batches=window)] if window > 1 else [])]
    engine = style(data_of_lengths(), COUNTS["tensor"], callbacks)
    evaluated = engine.evaluate(data_of_lengths()) if engine.stepper is not None else {}
    return [weights_of(engine).tolist(), engine.history["train_loss"], evaluated]


def data_of_lengths() -> DataLoader[Any]:
    """One sequence in three holds nothing, so that a rank may have samples, but no token."""
    data = sequences([[5, 2, 0, 4, 1, 0, 3, 3, 0, 2, 5, 0, 1]])[0]
    return DataLoader(TensorDataset(*data), 3)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_on_several_ranks_each_token_counts_once_too(style: Any, window: int) -> None:
    callbacks: list[Callback] = [Accumulate(batches=window)] if window > 1 else []
    alone = style(data_of_lengths(), COUNTS["tensor"], callbacks)
    for weights, losses, evaluated in on_ranks(2, train_on_ranks, style, window):
        assert weights == pytest.approx(weights_of(alone).tolist(), rel=1e-12)
        assert losses == pytest.approx(alone.history["train_loss"], rel=1e-12)
        if evaluated:
            assert evaluated == pytest.approx(alone.evaluate(data_of_lengths()), rel=1e-6)
