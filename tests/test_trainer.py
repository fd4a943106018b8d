from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from helpers import mean_error, num_calls, pairs, refused, regression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from camshaft.callbacks import Accumulate, ProgressBar
from camshaft.engine import ConfigurationError, DataError, Engine, Trainer


def data(inputs: Tensor, target: Tensor, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(inputs, target), batch_size=batch_size)


def make(model: nn.Module, loss_fn: Any, **settings: Any) -> Engine:
    parameters = [*model.parameters(), *(loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ())]
    return Trainer(model, torch.optim.Adam(parameters, lr=0.02), loss_fn, **settings)


class Twins(nn.Module):
    """Embeds the two halves of its input with shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)

    def forward(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(pair[:, :3]), self.embed(pair[:, 3:])


def inputs() -> Tensor:
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


CLASSES = inputs()[:, :3].argmax(1)
FLAGS = (inputs()[:, :1] > 0).float()

CATALOGUE: list[tuple[nn.Module, nn.Module, Tensor]] = [
    (nn.MSELoss(), nn.Linear(6, 1), FLAGS),
    (nn.L1Loss(), nn.Linear(6, 1), FLAGS),
    (nn.SmoothL1Loss(), nn.Linear(6, 1), FLAGS),
    (nn.BCELoss(), nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), FLAGS),
    (nn.BCEWithLogitsLoss(), nn.Linear(6, 1), FLAGS),
    (nn.CrossEntropyLoss(), nn.Linear(6, 3), CLASSES),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), nn.Linear(6, 3), CLASSES),
    (nn.NLLLoss(), nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), CLASSES),
    (
        nn.KLDivLoss(reduction="batchmean"),
        nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)),
        inputs()[:, :3].softmax(1),
    ),
    (nn.CosineEmbeddingLoss(), Twins(), FLAGS[:, 0] * 2 - 1),
    (nn.AdaptiveLogSoftmaxWithLoss(4, 3, cutoffs=[1]), nn.Linear(6, 4), CLASSES),
]


@pytest.mark.parametrize(("loss_fn", "model", "target"), CATALOGUE, ids=lambda value: type(value).__name__)
def test_every_loss_of_the_catalogue_trains_unchanged(loss_fn: nn.Module, model: nn.Module, target: Tensor) -> None:
    trainer = make(model, loss_fn)
    losses = trainer.fit(data(inputs(), target), data(inputs(), target), epochs=30)["val_loss"]
    assert losses[-1] < losses[0] - 0.02
    assert math.isfinite(losses[-1])


def test_a_similarity_per_sample_is_refused_until_it_is_reduced() -> None:
    target = torch.ones(20, 4)
    with pytest.raises(DataError, match=r"shape \[8\].*Reduce it"):
        make(nn.Linear(6, 4), nn.CosineSimilarity()).fit(data(inputs(), target), epochs=1)
    similarity = nn.CosineSimilarity()
    trainer = make(nn.Linear(6, 4), lambda output, target: 1 - similarity(output, target).mean())
    losses = trainer.fit(data(inputs(), target), epochs=20)["train_loss"]
    assert losses[-1] < losses[0]


def test_a_triplet_loss_takes_the_three_items_of_the_output() -> None:
    class Triplets(Twins):
        def forward(self, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # one more
            anchor, positive = super().forward(pair)
            return anchor, positive, -positive

    losses = make(Triplets(), nn.TripletMarginLoss()).fit([inputs()[:8]] * 30, epochs=2)["train_loss"]
    assert losses[1] < losses[0]


def test_averages_are_those_of_all_samples_also_under_accumulation() -> None:
    """20 samples in batches of 8, 8 and 4, by windows of 2: the same epoch loss, since the weights stand still."""
    expected = None
    for callbacks in ([], [Accumulate(batches=2)]):
        torch.manual_seed(0)
        trainer = make(nn.Linear(6, 3), nn.CrossEntropyLoss(), callbacks=callbacks)
        trainer.parts["optimizer"].param_groups[0]["lr"] = 0.0
        output = trainer.parts["model"](inputs()).detach().double()
        expected = nn.functional.cross_entropy(output, CLASSES).item()
        assert trainer.fit(data(inputs(), CLASSES), epochs=1)["train_loss"] == [pytest.approx(expected, abs=1e-6)]


def test_predict_gives_every_sample_in_order_in_eval_mode() -> None:
    trainer = make(nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 3)), nn.CrossEntropyLoss())
    expected = trainer.parts["model"][1](inputs())
    predicted = trainer.predict(data(inputs(), CLASSES))
    assert torch.allclose(predicted, expected)
    assert not predicted.requires_grad
    assert trainer.parts["model"].training


def test_evaluate_leaves_the_run_alone() -> None:
    trainer = make(
        nn.Linear(6, 3), nn.CrossEntropyLoss(), metrics={"acc": lambda o, t: (o.argmax(1) == t).float().mean()}
    )
    trainer.fit(data(inputs(), CLASSES), epochs=1)
    before = dict(trainer.history), trainer.num_validations, torch.get_rng_state()
    result = trainer.evaluate(data(inputs(), CLASSES))
    assert list(result) == ["loss", "acc"]
    assert (dict(trainer.history), trainer.num_validations) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_parameter_that_the_optimizer_lacks_is_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    with caplog.at_level(logging.WARNING):
        Trainer(model, torch.optim.SGD(model[0].parameters(), 0.1), nn.CrossEntropyLoss())
    assert "2 of 4 trainable parameters are not in the optimizer and will not learn: 1.weight, 1.bias." in caplog.text


def test_lbfgs_is_refused_with_the_way_to_use_it() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(ConfigurationError, match=r"optimizer.step\(closure\)"):
        Trainer(model, torch.optim.LBFGS(model.parameters()), nn.CrossEntropyLoss())


def test_running_out_of_memory_in_the_loss_keeps_its_type() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError):
        make(nn.Linear(6, 3), loss_fn).fit(data(inputs(), CLASSES), epochs=1)


def test_the_script_style_can_use_the_trainers_own_step() -> None:
    trainer = make(nn.Linear(6, 3), nn.CrossEntropyLoss())
    step = trainer.stepper
    assert step is not None
    for _ in trainer.epochs(2):
        for batch in trainer.train(data(inputs(), CLASSES)):
            step.train(trainer, batch)
        for batch in trainer.validate(data(inputs(), CLASSES)):
            step.evaluate(trainer, batch)
    assert len(trainer.history["val_loss"]) == 2


TRAINERS: list[tuple[dict[str, Any], str]] = [
    ({"model": nn.Linear}, "model is the class Linear, not an instance. Did you forget ()?"),
    ({"model": "resnet18"}, "model is 'resnet18', of type str"),
    ({"optimizer": torch.optim.SGD}, "optimizer is the class SGD, not an instance. Did you forget ()?"),
    ({"optimizer": "adam"}, "optimizer is 'adam', of type str"),
    ({"loss_fn": nn.MSELoss}, "loss_fn is the class MSELoss, not an instance. Did you forget ()?"),
    ({"loss_fn": "mse"}, "loss_fn is 'mse', which cannot be called"),
    ({"metrics": [mean_error]}, "each needs a name"),
    ({"metrics": {"acc": BinaryAccuracy}}, "Did you forget ()?"),
    ({"metrics": {"loss": mean_error}}, 'Two metrics are named "loss"'),
    ({"seed": "0"}, "seed is '0'"),
    ({"callbacks": [ProgressBar]}, "the class ProgressBar, not an instance. Did you forget ()?"),
    ({"callbacks": ["early_stopping"]}, "'early_stopping', which is not a Callback"),
    ({"callbacks": [print]}, "which is not a Callback"),
    ({"callbacks": [None]}, "None, which is not a Callback"),
    ({"callbacks": ProgressBar()}, "callbacks is"),
    ({"callbacks": "early_stopping"}, "callbacks is 'early_stopping'"),
]


@pytest.mark.parametrize(("arguments", "phrase"), TRAINERS)
def test_a_trainer_refuses_a_part_of_the_wrong_kind(arguments: dict[str, Any], phrase: str) -> None:
    model = nn.Linear(2, 1)
    fitting: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.MSELoss(),
    }
    with refused(ConfigurationError, phrase):
        Trainer(**(fitting | arguments))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with refused(ConfigurationError, "holds none of the model's parameters"):
        regression(optimizer=torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))


def test_an_optimizer_that_lacks_some_parameters_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 1)
    regression(model, optimizer=torch.optim.SGD([model.weight], lr=0.1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 2 trainable parameters are not in the optimizer and will not learn: bias." in caplog.text


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    model = nn.Linear(2, 1)
    with refused(ConfigurationError, "LBFGS evaluates the loss several times per step"):
        regression(model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_a_learning_rate_that_cannot_work_is_refused_before_the_run(rate: float) -> None:
    trainer = regression()
    trainer.parts["optimizer"].param_groups[0]["lr"] = rate  # as by a schedule or by --lr; torch lets NaN through
    with refused(ConfigurationError, f"learning rate of parameter group 0 is {rate}"):
        trainer.fit(pairs(), epochs=1)
    assert num_calls(trainer) == 0


def test_a_complex_loss_is_refused() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return (output * torch.tensor(1j)).mean()

    with refused(DataError, "The loss is complex", "Return a real one"):
        regression(loss_fn=loss_fn).fit(pairs(), epochs=1)


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_a_seed_too_large_for_torch_is_refused(seed: int) -> None:
    assert regression(seed=2**64 - 1).fit(pairs(1), epochs=1)["step"] == [1]
    with refused(ConfigurationError, f"seed is {seed}", "Pass a whole number below 2**64"):
        regression(seed=seed)


@pytest.mark.parametrize("resume", [5, True, b"auto"])
def test_a_resume_that_is_not_a_path_is_refused(resume: Any) -> None:
    trainer = regression()
    with refused(ConfigurationError, f"resume is {resume!r}", 'Pass "auto" or a path'):
        trainer.fit(pairs(), epochs=1, resume=resume)
    assert num_calls(trainer) == 0


class Unmeasured:
    """Batches whose length cannot be asked for."""

    def __len__(self) -> int:
        raise OSError("no index")

    def __iter__(self) -> Any:
        return iter(pairs())


def test_a_length_that_fails_is_told_before_the_run() -> None:
    trainer = regression()
    with refused(DataError, "The length of a Unmeasured cannot be read (OSError('no index'))", "Pass"):
        trainer.fit(Unmeasured(), epochs=1)
    assert num_calls(trainer) == 0
