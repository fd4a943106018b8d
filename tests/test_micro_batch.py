from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camshaft.callbacks import Accumulate, MicroBatch
from camshaft.engine import Callback, ConfigurationError, Engine, Trainer, UpdateEnd


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


def test_an_engine_with_a_step_of_its_own_is_told_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size=num_samples_of_the_batch"):
        Engine(lambda engine, batch: None, callbacks=[MicroBatch()])
    with pytest.raises(ConfigurationError, match="num_parts is 0"):
        MicroBatch(0)
