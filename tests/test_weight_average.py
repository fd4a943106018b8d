"""Weight averages: their arithmetic, where they are used and where not, and what they leave alone."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, refused
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from camshaft.callbacks import Accumulate, BestCheckpoint, RunCheckpoint, StopOnNonFinite, WeightAverage
from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    GradientsReady,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    at,
)


def double_trainer(*callbacks: Callback) -> Engine:
    """In double precision, so that a formula can be checked to 1e-7 and beyond."""
    return make_trainer(*callbacks, model=linear().double(), lr=0.5)


def double_batches(*sizes: int, seed: int = 0) -> list[Batch]:
    return [(inputs.double(), target) for inputs, target in class_batches(*sizes, seed=seed)]


def deep() -> nn.Sequential:
    """With batch norm and dropout: statistics that training changes, and random numbers that it draws."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def flat(module: nn.Module) -> Tensor:
    """Every weight and statistic as one vector: a copy."""
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


def average_of(engine: Engine) -> Tensor:
    return flat(engine.parts["weight_average"].module)


def weights_at(engine: Engine, *events: type[Any]) -> list[Tensor]:
    """A list that will hold the weights in the model at each of these events."""
    seen: list[Tensor] = []
    for event in events:
        engine.subscribe(event, lambda event: seen.append(flat(event.engine.parts["model"])))
    return seen


def ema_by_hand(weights: list[Tensor], decay: float) -> Tensor:
    average = weights[0]
    for new in weights[1:]:
        average = decay * average + (1 - decay) * new
    return average


def swa_by_hand(weights: list[Tensor], decay: float) -> Tensor:
    return torch.stack(weights).mean(dim=0)


KINDS: list[tuple[Any, Callable[[list[Tensor], float], Tensor]]] = [("ema", ema_by_hand), ("swa", swa_by_hand)]


@pytest.mark.parametrize(("kind", "by_hand"), KINDS)
def test_the_average_is_that_of_the_formula(kind: Any, by_hand: Callable[..., Tensor]) -> None:
    """Over the weights after each of 20 updates, to 1e-7."""
    trainer = double_trainer(WeightAverage(kind, decay=0.9))
    weights = weights_at(trainer, UpdateEnd)
    trainer.fit(double_batches(8, 8, 8, 8), epochs=5)
    assert len(weights) == 20
    torch.testing.assert_close(average_of(trainer), by_hand(weights, 0.9), rtol=0, atol=1e-7)
    assert (average_of(trainer) - weights[-1]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "by_hand"), KINDS)
@pytest.mark.parametrize(("start", "every", "counted"), [(3, 1, [4, 5, 6, 7, 8]), (0, 3, [3, 6]), (2, 3, [5, 8])])
def test_start_and_every_choose_the_updates_that_count(
    start: int, every: int, counted: list[int], kind: Any, by_hand: Callable[..., Tensor]
) -> None:
    """``start`` is the update after which contributions begin; ``every`` counts from there."""
    trainer = double_trainer(WeightAverage(kind, decay=0.9, start=start, every=every))
    weights = weights_at(trainer, UpdateEnd)
    trainer.fit(double_batches(8, 8, 8, 8), epochs=2)
    expected = by_hand([weights[update - 1] for update in counted], 0.9)
    torch.testing.assert_close(average_of(trainer), expected, rtol=0, atol=1e-7)


def test_under_accumulation_updates_contribute_and_batches_do_not() -> None:
    """Seven batches in windows of three are three contributions."""
    trainer = double_trainer(WeightAverage("swa"), Accumulate(3))
    weights = weights_at(trainer, UpdateEnd)
    trainer.fit(double_batches(*[8] * 7), epochs=1)
    assert len(weights) == 3
    torch.testing.assert_close(average_of(trainer), swa_by_hand(weights, 0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("skipper", ["scaler", "handler"])
def test_a_skipped_update_does_not_advance_the_average(skipper: str) -> None:
    """Update 2 overflows, or is left out for its NaN: the average is that of the other two."""
    trainer = make_trainer(WeightAverage("swa"), StopOnNonFinite("skip"))
    data = class_batches(8, 8, 8)
    if skipper == "scaler":
        trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**100))
    data[1] = (data[1][0] * (1e12 if skipper == "scaler" else float("nan")), data[1][1])
    weights = weights_at(trainer, StepEnd)
    trainer.fit(data, epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (2, 1)
    torch.testing.assert_close(average_of(trainer), (weights[0] + weights[2]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_before_its_first_update_the_raw_weights_are_evaluated(kind: Any) -> None:
    """With a start after update 3, the validation of epoch 1 sees the raw weights, and those after it the average."""
    trainer = double_trainer(WeightAverage(kind, decay=0.9, start=3))
    evaluated, raw, averages = weights_at(trainer, ValidationStart), weights_at(trainer, StepEnd), list[Tensor]()
    trainer.subscribe(StepEnd, lambda event: averages.append(average_of(event.engine)))
    data = double_batches(8, 8)
    trainer.fit(data, data, epochs=3)
    assert torch.equal(evaluated[0], raw[1])
    assert [torch.equal(seen, averages[step]) for seen, step in zip(evaluated[1:], (3, 5), strict=True)] == [True] * 2
    assert not torch.equal(evaluated[2], raw[5])


def test_validation_evaluate_and_predict_use_the_average() -> None:
    """All three give what a model with the hand-computed average gives."""
    trainer, data, val = double_trainer(WeightAverage(decay=0.9)), double_batches(8, 8, 8), double_batches(16, seed=1)
    weights = weights_at(trainer, UpdateEnd)
    history = trainer.fit(data, val, epochs=2)
    model = linear().double()
    nn.utils.vector_to_parameters(ema_by_hand(weights, 0.9), model.parameters())
    output = model(val[0][0]).detach()
    loss = nn.functional.cross_entropy(output, val[0][1]).item()
    assert history["val_loss"][-1] == pytest.approx(loss, abs=1e-7)
    assert trainer.evaluate(val)["loss"] == pytest.approx(loss, abs=1e-7)
    torch.testing.assert_close(trainer.predict(val), output, rtol=0, atol=1e-7)


@pytest.mark.parametrize("buffers", [True, False])
def test_batch_norm_statistics_of_the_average_are_evaluated_with_its_weights(buffers: bool) -> None:
    """They are averaged, too, or with ``buffers=False`` those of the newest weights."""
    trainer = make_trainer(WeightAverage(decay=0.5, buffers=buffers), model=deep())
    evaluated, raw, means = weights_at(trainer, ValidationEnd), weights_at(trainer, UpdateEnd), list[Tensor]()
    trainer.subscribe(
        UpdateEnd, lambda event: means.append(trainer.parts["model"].get_buffer("1.running_mean").double())
    )
    trainer.fit(class_batches(8, 8, 8), class_batches(8), epochs=1)
    assert torch.equal(evaluated[0], average_of(trainer))
    average = trainer.parts["weight_average"].module[1].running_mean.double()
    torch.testing.assert_close(average, ema_by_hand(means, 0.5) if buffers else means[-1], rtol=0, atol=1e-6)
    assert not torch.equal(evaluated[0], raw[-1])


def run_deep(*callbacks: Callback, val: list[Batch] | None, **settings: Any) -> Engine:
    trainer = make_trainer(*callbacks, model=deep())
    torch.manual_seed(1)
    trainer.fit(class_batches(8, 8, 8), val, epochs=4, **settings)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "ema"},
        {"kind": "ema", "buffers": False, "every": 2},
        {"kind": "swa"},
        {"kind": "swa", "buffers": False},
        {"kind": "ema", "batch_norm_data": class_batches(8, 8)},
    ],
)
def test_training_goes_on_as_if_there_were_no_average(settings: dict[str, Any]) -> None:
    """Validated after each step with the average, the raw weights, statistics and momentum are the same to the bit."""
    with_average = run_deep(WeightAverage(**settings), val=class_batches(8), validate_every="1 steps")
    plain = run_deep(val=None)
    assert torch.equal(flat(with_average.parts["model"]), flat(plain.parts["model"]))
    assert with_average.history["train_loss"] == plain.history["train_loss"]
    mine, other = (run.parts["optimizer"].state_dict()["state"] for run in (with_average, plain))
    assert all(torch.equal(mine[key]["momentum_buffer"], other[key]["momentum_buffer"]) for key in other)


def test_validating_within_a_window_leaves_its_gradients_alone() -> None:
    """The weights are swapped and swapped back; what a window has gathered so far stays with the raw ones."""
    with_average = run_deep(Accumulate(2), WeightAverage(), val=class_batches(8), validate_every="1 steps")
    plain = run_deep(Accumulate(2), val=None)
    assert torch.equal(flat(with_average.parts["model"]), flat(plain.parts["model"]))


def test_an_evaluation_that_fails_puts_the_raw_weights_back() -> None:
    trainer = make_trainer(WeightAverage(decay=0.9))
    trainer.fit(class_batches(8, 8, 8), epochs=2)
    before = flat(trainer.parts["model"])
    with pytest.raises(DataError):
        trainer.evaluate([(torch.zeros(8, 99), torch.zeros(8, dtype=torch.long))])
    assert torch.equal(flat(trainer.parts["model"]), before)
    assert not torch.equal(before, average_of(trainer))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_batch_norm_data_give_the_statistics_that_update_bn_gives(kind: Any) -> None:
    """To the bit those of torch's function, called by hand on the averaged weights."""
    data = class_batches(16, 16, 4, seed=3)
    trainer = run_deep(WeightAverage(kind, decay=0.5, buffers=False, batch_norm_data=data), val=None)
    by_hand = deep()
    by_hand.load_state_dict(trainer.parts["weight_average"].module.state_dict())
    by_hand[3] = nn.Identity()  # dropout comes after the statistics
    update_bn(data, by_hand)
    assert torch.equal(flat(trainer.parts["weight_average"].module), flat(by_hand))
    assert not torch.allclose(
        by_hand.get_buffer("1.running_mean"), trainer.parts["model"].get_buffer("1.running_mean")
    )


def test_batch_norm_data_draw_no_random_numbers_of_the_run() -> None:
    """Dropout runs in training mode there; the generators are afterwards as they would have been."""
    states = []
    for data in (None, class_batches(8, 8)):
        run_deep(WeightAverage(batch_norm_data=data), val=None)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


class TwoInputs(nn.Module):
    """Batch norm over the sum of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.norm(left + right))  # type: ignore[no-any-return]  # a module's call


@pytest.mark.parametrize("shape", [tuple, dict])
def test_batch_norm_data_reach_a_model_of_several_inputs(shape: type) -> None:
    """The model is called with them as in training: ``*inputs`` for a tuple, ``**inputs`` for a dict."""

    def inputs(batch: Tensor) -> Any:
        return (
            shape(zip(("left", "right"), batch.split(2, dim=1), strict=True)) if shape is dict else batch.split(2, 1)
        )

    data = [(inputs(batch), target) for batch, target in class_batches(8, 8)]
    trainer = make_trainer(WeightAverage(batch_norm_data=data), model=TwoInputs())
    trainer.fit(data, epochs=1)
    sums = [batch[:, :2] + batch[:, 2:] for batch, _ in class_batches(8, 8)]
    expected = torch.stack([part.mean(dim=0) for part in sums]).mean(dim=0)
    torch.testing.assert_close(trainer.parts["weight_average"].module.norm.running_mean, expected)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_load_at_end_puts_the_average_into_the_model(kind: Any) -> None:
    """Weights and batch-norm statistics; without it the model keeps the raw ones."""
    data = class_batches(16, 16)
    for load_at_end in (True, False):
        average = WeightAverage(kind, batch_norm_data=data, buffers=False, load_at_end=load_at_end)
        trainer = run_deep(average, val=None)
        assert torch.equal(flat(trainer.parts["model"]), average_of(trainer)) == load_at_end


def test_an_average_of_nothing_is_not_loaded() -> None:
    """If the run ends before ``start``, the model keeps its weights."""
    trainer, plain = make_trainer(WeightAverage(start=100, load_at_end=True)), make_trainer()
    for run in (trainer, plain):
        run.fit(class_batches(8, 8), epochs=1)
    assert torch.equal(flat(trainer.parts["model"]), flat(plain.parts["model"]))


def test_a_best_checkpoint_holds_the_averaged_weights_that_were_measured(tmp_path: Path) -> None:
    """A fresh model with the weights of the file has the loss that was the best."""
    val = class_batches(32, seed=1)
    best = BestCheckpoint("val_loss", directory=tmp_path)
    trainer = make_trainer(WeightAverage(decay=0.8), best, lr=3.0)
    evaluated = weights_at(trainer, ValidationEnd)
    history = trainer.fit(class_batches(8, 8), val, epochs=6)
    model = linear()
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert best.best is not None
    assert torch.equal(flat(model), evaluated[best.best.epoch - 1])
    loss = nn.functional.cross_entropy(model(val[0][0]), val[0][1]).item()
    assert best.best.value == min(history["val_loss"]) == pytest.approx(loss, abs=1e-7)


def test_after_restore_an_evaluation_gives_the_value_that_was_the_best() -> None:
    """The best averaged weights are in the model then; the last average does not take their place."""
    val = class_batches(32, seed=1)
    trainer = make_trainer(WeightAverage(decay=0.5), BestCheckpoint("val_loss", restore=True), lr=10.0)
    history = trainer.fit(class_batches(8, 8), val, epochs=6)
    assert min(history["val_loss"]) < history["val_loss"][-1]
    assert trainer.evaluate(val)["loss"] == pytest.approx(min(history["val_loss"]), abs=1e-7)


def test_a_second_fit_goes_on_with_the_same_average() -> None:
    """Two fits of two epochs have the average of one fit of four."""
    twice, once = double_trainer(WeightAverage(decay=0.9)), double_trainer(WeightAverage(decay=0.9))
    data = double_batches(8, 8)
    for _ in range(2):
        twice.fit(data, epochs=2)
    once.fit(data, epochs=4)
    torch.testing.assert_close(average_of(twice), average_of(once), rtol=0, atol=1e-12)


def test_a_loop_of_ones_own_has_its_average() -> None:
    """In script style, through ``engine.update``."""
    model = linear().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = Engine(model=model, optimizer=optimizer, callbacks=[WeightAverage(decay=0.9)])
    weights = weights_at(engine, GradientsReady)
    for _ in engine.epochs(3):
        for inputs, target in engine.train(double_batches(8, 8)):
            engine.update(nn.functional.cross_entropy(model(inputs), target))
    expected = ema_by_hand([*weights[1:], flat(model)], 0.9)
    torch.testing.assert_close(average_of(engine), expected, rtol=0, atol=1e-7)


def test_two_averages_are_refused() -> None:
    """They would share the part ``weight_average``, and both feed the first."""
    with pytest.raises(ConfigurationError, match=r"WeightAverage.*\. [A-Z]"):
        make_trainer(WeightAverage("ema"), WeightAverage("swa"))


def test_an_engine_without_a_model_is_refused_at_attachment() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"^WeightAverage needs .* no part is a module\. Write Engine\(step, model=model",
    ):
        Engine(lambda engine, batch: None, callbacks=[WeightAverage()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "emma"}, r"^WeightAverage does not know 'emma'\. Write \"ema\" or \"swa\"\.$"),
        ({"decay": 0.0}, r"^WeightAverage has decay=0\.0\. Pass a number between 0 and 1"),
        ({"decay": 1.0}, r"decay=1\.0\. Pass a number"),
        ({"decay": float("nan")}, r"decay=nan\. Pass a number"),
        ({"decay": "0.9"}, r"decay='0\.9'\. Pass a number"),
        ({"every": 0}, r"^WeightAverage's every is 0, which is not a count\. Pass a whole number of at least 1"),
        ({"every": 2.0}, r"every is 2\.0.*\. Pass a whole number"),
        ({"start": -1}, r"start is -1.*\. Pass a whole number of at least 0"),
        ({"batch_norm_data": 32}, r"batch_norm_data is .*\. Pass a DataLoader"),
        ({"batch_norm_data": []}, r"batch_norm_data is .*\. [A-Z]"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    """Batch-norm data, too: they would be missed only when the run is over."""
    with pytest.raises(ValueError, match=message) as caught:
        WeightAverage(**arguments)
    assert type(caught.value).__module__ == "camshaft.engine.errors"


def test_the_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the class WeightAverage, not an instance\. Did you forget \(\)\?"):
        make_trainer(WeightAverage)  # type: ignore[arg-type]  # the mistake


def test_updates_of_another_module_are_no_updates_of_the_model() -> None:
    """A critic that is updated in each step, too: the average takes in every second update of the model."""
    model, critic = linear(), linear()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, critic)]

    def step(engine: Engine, batch: Batch) -> None:
        for name in ("critic", "model"):
            loss = nn.functional.cross_entropy(engine.parts[name](batch[0]), batch[1])
            engine.update(loss, optimizer=f"{name}_optimizer")

    parts: dict[str, Any] = {"model_optimizer": optimizers[0], "critic_optimizer": optimizers[1]}
    engine = Engine(step, model=model, critic=critic, callbacks=[WeightAverage("swa", every=2)], **parts)
    engine.fit(class_batches(*[8] * 6), epochs=1)
    assert int(engine.parts["weight_average"].n_averaged) == 3


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"kind": "mean"}, "does not know 'mean'"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": math.nan}, "decay=nan"),
        ({"every": 0}, "every is 0"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        WeightAverage(**settings)


def test_an_interrupted_run_does_not_compute_batch_norm_statistics() -> None:
    """A scheduler that sent SIGTERM does not wait for it."""
    read: list[int] = []

    def batches() -> Any:
        read.append(1)
        return iter(class_batches(8))

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    trainer = make_trainer(WeightAverage(batch_norm_data=batches), model=model)
    trainer.subscribe(StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM))
    trainer.fit(class_batches(8, 8), epochs=1)
    assert not read


# Parts by name ------------------------------------------------------------------------------------------


def gan(*callbacks: Callback) -> Engine:
    """Two networks, of which each step updates both; a validation measures the generator."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()

    def step(engine: Engine, batch: Tensor) -> dict[str, Tensor]:
        made = engine.parts["generator"](batch)
        if engine.training:
            engine.update(engine.parts["critic"](made.detach()).mean(), optimizer="of_critic")
            engine.update(-engine.parts["critic"](made).mean(), optimizer="of_generator")
        return {"size": made.square().mean()}

    return Engine(
        step,
        generator=generator,
        critic=critic,
        of_generator=torch.optim.SGD(generator.parameters(), 0.1),
        of_critic=torch.optim.SGD(critic.parameters(), 0.1),
        callbacks=callbacks,
        seed=0,
    )


GAN_DATA = [torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def test_the_average_of_a_part_is_that_of_its_updates_by_the_formula() -> None:
    engine = gan(WeightAverage(decay=0.5, part="generator"), WeightAverage(decay=0.9, part="critic"))
    weights: dict[str, list[Tensor]] = {"generator": [], "critic": []}

    def keep(event: UpdateEnd) -> None:
        for name in weights:
            if event.optimizer is engine.parts[f"of_{name}"]:
                weights[name].append(engine.parts[name].weight.detach().clone())

    engine.subscribe(UpdateEnd, keep)
    engine.fit(GAN_DATA, epochs=2)
    for name, decay in (("generator", 0.5), ("critic", 0.9)):
        average = weights[name][0]
        for newest in weights[name][1:]:
            average = decay * average + (1 - decay) * newest
        kept = engine.parts[f"weight_average_{name}"].module.weight
        torch.testing.assert_close(kept, average, rtol=1e-12, atol=1e-12)


def test_validations_measure_the_average_of_the_part_and_its_best_weights_are_kept(tmp_path: Path) -> None:
    best = BestCheckpoint("val_size", "min", tmp_path, parts=["generator"], restore=True)
    engine = gan(WeightAverage(decay=0.5, part="generator"), best)
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(event: ValidationEnd) -> None:
        average = engine.parts["generator"]  # within a validation, they have changed places
        with torch.no_grad():
            by_hand = sum(average(batch).square().mean() for batch in GAN_DATA) / len(GAN_DATA)
        assert event.metrics["val_size"] == pytest.approx(float(by_hand), rel=1e-12)
        seen[engine.epoch] = {name: value.clone() for name, value in average.state_dict().items()}

    engine.subscribe(ValidationEnd, keep)
    engine.fit(GAN_DATA, GAN_DATA, epochs=3)
    assert best.best is not None
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    for holder in (kept, engine.parts["generator"].state_dict(),
                   engine.parts["weight_average_generator"].module.state_dict()):  # fmt: skip
        assert all(torch.equal(holder[name], value) for name, value in seen[best.best.epoch].items())


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_best_weights_of_several_parts_are_of_one_moment(in_memory: bool, tmp_path: Path) -> None:
    parts = ["generator", "critic"]
    best = BestCheckpoint("val_size", "max", None if in_memory else tmp_path, parts=parts, restore=True)
    engine = gan(best)
    seen: dict[int, dict[str, Any]] = {}
    engine.subscribe(
        ValidationEnd,
        lambda event: seen.update({engine.epoch: copy.deepcopy({n: engine.parts[n].state_dict() for n in parts})}),
    )
    engine.fit(GAN_DATA, GAN_DATA, epochs=3)
    assert best.best is not None
    restored = {name: engine.parts[name].state_dict() for name in parts}
    for holder in (best.weights(), restored):
        for name, expected in seen[best.best.epoch].items():
            assert all(torch.equal(holder[name][key], value) for key, value in expected.items())


def test_two_averages_of_one_part_or_of_none_are_refused() -> None:
    with refused(ConfigurationError, "The part critic has a WeightAverage already.", "Attach one for each part."):
        gan(WeightAverage(part="critic"), WeightAverage("swa", part="critic"))
    with refused(ConfigurationError, "WeightAverage needs the part named critc", 'Did you mean "critic"?'):
        gan(WeightAverage(part="critc"))
    with refused(ConfigurationError, "BestCheckpoint has parts='critic'.", 'Write a list of names: parts=["model"].'):
        gan(BestCheckpoint("val_size", "max", parts="critic"))


def test_an_average_of_a_part_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = gan(WeightAverage(decay=0.5, part="generator"))
    whole.fit(GAN_DATA, epochs=2)
    cut = gan(WeightAverage(decay=0.5, part="generator"), RunCheckpoint(tmp_path))
    cut.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(3))
    cut.fit(GAN_DATA, epochs=2)
    resumed = gan(WeightAverage(decay=0.5, part="generator"), RunCheckpoint(tmp_path))
    resumed.fit(GAN_DATA, epochs=2, resume="auto")
    for name in ("generator", "critic", "weight_average_generator"):
        ours, theirs = resumed.parts[name].state_dict(), whole.parts[name].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
