"""Mixed precision: what runs in 16 bits, what stays in 32, and which updates the loss scaler lets pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, num_calls, pairs, refused, regression
from torch import Tensor, nn

from camshaft.callbacks import Accumulate, ClipGradients, MixedPrecision, Placement
from camshaft.engine import (
    ConfigurationError,
    Engine,
    GradientsReady,
    StepEnd,
    UpdateEnd,
    ValidationStepEnd,
    every,
)


class Spiking(nn.Linear):
    """A model whose output is scaled by infinity whenever its first input is above 100."""

    def forward(self, inputs: Tensor) -> Tensor:
        output = super().forward(inputs)
        return output * (math.inf if bool(inputs[0, 0] > 100) else 1.0)


def scaled_trainer(*callbacks: Any, **scaler: Any) -> Engine:
    """A trainer on the CPU with a real gradient scaler, as MixedPrecision("fp16") sets it on CUDA."""
    torch.manual_seed(0)
    trainer = make_trainer(*callbacks, model=Spiking(4, 3))
    trainer.update.use_scaler(torch.amp.GradScaler("cpu", **scaler))
    return trainer


def with_spike(*sizes: int, at: int) -> list[Batch]:
    """Batches of which the one at this position overflows."""
    data = class_batches(*sizes)
    data[at][0][0, 0] = 1000.0
    return data


def weights(trainer: Engine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parts["model"].parameters()]


def equal(mine: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_bf16_on_the_cpu_learns_and_keeps_weights_and_moments_in_float32() -> None:
    """The loss falls, the forward pass is in bfloat16, and nothing that is kept is."""
    trainer = make_trainer(MixedPrecision("bf16"), lr=0.5)
    dtypes: set[torch.dtype] = set()
    trainer.subscribe(StepEnd, lambda event: dtypes.add(event.output.dtype))
    history = trainer.fit(class_batches(32, 32, 9), epochs=8)
    assert history["train_loss"][-1] < history["train_loss"][0] / 2
    assert dtypes == {torch.bfloat16}
    moments = [state["momentum_buffer"] for state in trainer.parts["optimizer"].state.values()]
    assert {tensor.dtype for tensor in [*trainer.parts["model"].parameters(), *moments]} == {torch.float32}


def test_validation_evaluation_and_prediction_run_in_the_same_precision() -> None:
    """What is measured is the model as it is trained."""
    trainer = make_trainer(MixedPrecision("bf16"))
    dtypes: set[torch.dtype] = set()
    trainer.subscribe(ValidationStepEnd, lambda event: dtypes.add(event.output.dtype))
    data = class_batches(8)
    history = trainer.fit(data, data, epochs=1)
    assert dtypes == {torch.bfloat16}
    assert trainer.predict(data).dtype == torch.bfloat16
    assert trainer.evaluate(data)["loss"] == pytest.approx(history["val_loss"][0], abs=0.0)


def test_autocast_ends_with_the_forward_pass() -> None:
    """Backward, the optimizer and the other handlers run outside it, also in the middle of a run."""
    inside: list[bool] = []
    trainer = make_trainer(MixedPrecision("bf16"))
    trainer.subscribe(GradientsReady, lambda event: inside.append(torch.is_autocast_enabled("cpu")))
    trainer.subscribe(StepEnd, lambda event: inside.append(torch.is_autocast_enabled("cpu")))
    trainer.fit(class_batches(8, 8), epochs=1)
    assert inside == [False] * 4


def test_a_step_that_never_enters_the_scope_is_told_so() -> None:
    """Mixed precision would do nothing at all, in silence."""
    engine = Engine(lambda engine, batch: None, model=torch.nn.Linear(1, 1), callbacks=[MixedPrecision("bf16")])
    with pytest.raises(ConfigurationError, match=r'with engine.scope\("forward"\)'):
        engine.fit([1], epochs=1)


def test_bf16_needs_no_loss_scaler() -> None:
    """Its range is that of float32."""
    trainer = make_trainer(MixedPrecision("bf16"))
    trainer.fit(class_batches(8), epochs=1)
    assert trainer.update.scaler is None


def test_a_step_of_ones_own_enters_autocast_by_its_scope() -> None:
    """engine.scope("forward") in a step function is where MixedPrecision applies."""

    def step(engine: Engine, batch: Batch) -> None:
        with engine.scope("forward"):
            inner.append(model(batch[0]).dtype)
        outer.append(model(batch[0]).dtype)

    inner, outer, model = list[torch.dtype](), list[torch.dtype](), linear()
    Engine(step, model=model, callbacks=[MixedPrecision("bf16")]).fit(class_batches(8), epochs=1)
    assert (inner, outer) == ([torch.bfloat16], [torch.float32])


def test_fp16_on_the_cpu_is_refused_before_the_first_step() -> None:
    """The message offers bf16; numerics are never changed quietly."""
    trainer = make_trainer(MixedPrecision("fp16"))
    with pytest.raises(ConfigurationError, match=r'no fp16 training. Write MixedPrecision\("bf16"\)'):
        trainer.fit(class_batches(8), epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize("precision", ["float16", "16", "", None, torch.float16])
def test_an_unknown_precision_is_refused_at_construction(precision: Any) -> None:
    """There are fp16 and bf16."""
    with pytest.raises(ConfigurationError, match='Write "fp16" or "bf16"'):
        MixedPrecision(precision)


def test_a_scaler_changes_no_weight_while_nothing_overflows() -> None:
    """A scale that is a power of two goes through exactly: with and without it the weights are the same."""
    scaled, plain = scaled_trainer(init_scale=2.0**10), scaled_trainer()
    plain.update.use_scaler(None)
    for trainer in (scaled, plain):
        trainer.fit(class_batches(8, 8, 3), epochs=2)
    assert equal(weights(scaled), weights(plain))
    assert (scaled.num_updates, scaled.num_skipped_updates) == (6, 0)


def test_an_overflow_skips_the_step_counts_no_update_and_fires_no_update_end() -> None:
    """Of five steps the third overflows: four updates, and the weights of a run without that batch."""
    trainer, without = scaled_trainer(init_scale=2.0**10), scaled_trainer(init_scale=2.0**10)
    updated: list[tuple[int, int]] = []
    trainer.subscribe(UpdateEnd, lambda event: updated.append((event.engine.step, event.engine.num_updates)))
    data = with_spike(8, 8, 8, 8, 8, at=2)
    trainer.fit(data, epochs=1)
    without.fit(data[:2] + data[3:], epochs=1)
    assert updated == [(1, 1), (2, 2), (4, 3), (5, 4)]
    assert (trainer.num_updates, trainer.num_skipped_updates) == (4, 1)
    assert equal(weights(trainer), weights(without))


def test_every_n_updates_counts_those_that_were_made() -> None:
    """every(2) on UpdateEnd fires at the second and fourth update, whatever was skipped in between."""
    trainer = scaled_trainer(init_scale=2.0**10)
    steps: list[int] = []
    trainer.subscribe(UpdateEnd, lambda event: steps.append(event.engine.step), when=every(2))
    trainer.fit(with_spike(8, 8, 8, 8, 8, 8, at=1), epochs=1)
    assert steps == [3, 5]


def test_after_an_overflow_the_scale_is_halved_and_its_gradients_are_gone() -> None:
    """The scaler backs off once, and the next update is of finite gradients alone."""
    trainer = scaled_trainer(init_scale=2.0**10)
    trainer.fit(with_spike(8, 8, at=0), epochs=1)
    assert trainer.update.scaler is not None
    assert trainer.update.scaler.get_scale() == 2.0**9
    assert all(parameter.isfinite().all() for parameter in trainer.parts["model"].parameters())


def test_one_overflowing_batch_skips_its_whole_window() -> None:
    """With accumulation and clipping on, the window of the spike makes no update and the next one is clean."""
    data = with_spike(8, 8, 8, 8, 8, 3, at=1)
    trainer = scaled_trainer(Accumulate(2), ClipGradients(norm=0.05), init_scale=2.0**10)
    without = scaled_trainer(Accumulate(2), ClipGradients(norm=0.05), init_scale=2.0**9)
    trainer.fit(data, epochs=1)
    without.fit(data[2:], epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (2, 1)
    assert equal(weights(trainer), weights(without))


@pytest.mark.parametrize("scale", [math.inf, 2.0**127])
def test_a_scale_that_overflows_every_loss_skips_every_update(scale: float) -> None:
    """Also an infinite scale, which cannot shrink: nothing is updated, counted or announced."""
    trainer = scaled_trainer(init_scale=scale)
    updated: list[int] = []
    trainer.subscribe(UpdateEnd, lambda event: updated.append(event.engine.step))
    before = weights(trainer)
    trainer.fit([(inputs * 99, target) for inputs, target in class_batches(8, 8, 8)], epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates, updated) == (0, 3, [])
    assert equal(weights(trainer), before)


def test_a_growing_scale_is_no_skip() -> None:
    """growth_interval=1 doubles the scale after each update, and each one counts."""
    trainer = scaled_trainer(init_scale=1.0, growth_interval=1)
    trainer.fit(class_batches(8, 8, 8), epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (3, 0)
    assert trainer.update.scaler is not None
    assert trainer.update.scaler.get_scale() == 8.0


def test_the_recorded_loss_is_without_the_scale() -> None:
    """The history shows the loss, not what was differentiated."""
    scaled, plain = scaled_trainer(init_scale=2.0**10), make_trainer(model=Spiking(4, 3))
    plain.parts["model"].load_state_dict(scaled.parts["model"].state_dict())
    histories = [trainer.fit(class_batches(8, 3), epochs=1) for trainer in (scaled, plain)]
    assert histories[0]["train_loss"] == histories[1]["train_loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_cuda_learns_what_float32_does(precision: Any) -> None:
    """To the accuracy of 16 bits, with float32 weights; Placement may stand before or after it."""
    data = class_batches(*[64] * 20)
    mixed = make_trainer(MixedPrecision(precision), Placement("cuda"), lr=0.5)
    plain = make_trainer(Placement("cuda"), lr=0.5)
    losses = [trainer.fit(data, data, epochs=4)["val_loss"][-1] for trainer in (mixed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert {parameter.dtype for parameter in mixed.parts["model"].parameters()} == {torch.float32}
    assert (mixed.update.scaler is not None) == (precision == "fp16")


@pytest.mark.gpu
def test_fp16_on_cuda_survives_overflows_of_its_first_scales() -> None:
    """A scale that is too high is halved until it fits; the skipped steps are no updates."""
    trainer = make_trainer(Placement("cuda"), MixedPrecision("fp16"))
    trainer.update.use_scaler(torch.amp.GradScaler("cuda", init_scale=2.0**30))
    updated: list[int] = []
    trainer.subscribe(UpdateEnd, lambda event: updated.append(event.engine.step))
    trainer.fit(class_batches(*[64] * 40), epochs=1)
    assert trainer.num_skipped_updates > 0
    assert len(updated) == trainer.num_updates == 40 - trainer.num_skipped_updates
    assert all(parameter.isfinite().all() for parameter in trainer.parts["model"].parameters())


@pytest.mark.gpu
def test_resumed_runs_keep_the_scaler_of_the_first_fit() -> None:
    """A second fit continues with the scale that the first has found."""
    trainer = make_trainer(Placement("cuda"), MixedPrecision("fp16"))
    trainer.fit(class_batches(64), epochs=1)
    scaler = trainer.update.scaler
    trainer.fit(class_batches(64), epochs=1)
    assert scaler is not None
    assert trainer.update.scaler is scaler


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"precision": "fp8"}, "does not know 'fp8'"),
        ({"precision": "float16"}, "does not know 'float16'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        MixedPrecision(**settings)


def test_fp16_on_the_cpu_is_refused_before_the_model_sees_a_batch() -> None:
    trainer = regression(callbacks=[MixedPrecision("fp16")])
    with refused(ConfigurationError, "on the CPU, which has no fp16 training", 'MixedPrecision("bf16")'):
        trainer.fit(pairs(), epochs=1)
    assert num_calls(trainer) == 0
