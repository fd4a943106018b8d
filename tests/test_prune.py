"""A real Optuna study, with a pruner of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import nn

from camshaft.callbacks import Prune, Report, RunDirectory
from camshaft.engine import ConfigurationError, Engine, Trainer

TRAIN, VAL = class_batches(*[16] * 6), class_batches(16, 16, seed=1)
optuna.logging.set_verbosity(optuna.logging.ERROR)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def study_of(objective: Any, num_trials: int, **settings: Any) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **settings)
    study.optimize(objective, n_trials=num_trials)
    return study


def test_a_study_prunes_what_does_not_learn_and_finds_what_does(tmp_path: Path) -> None:
    """The pruner is told each validation's value; a trial that it ends leaves its files, and has the state PRUNED."""
    engines: list[Engine] = []

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        rate = [1e-6, 0.5][trial.number % 2] if trial.number else 0.5
        run = RunDirectory(tmp_path, terminal=False)
        callbacks = [run, Report(), Prune(trial, "val_acc")]
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), rate), nn.CrossEntropyLoss(),
                          metrics={"acc": accuracy}, callbacks=callbacks)  # fmt: skip
        engines.append(trainer)
        trainer.fit(TRAIN, VAL, epochs=6)
        return trainer.history["val_acc"][-1]

    study = study_of(
        objective, 4, direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1)
    )
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert study.trials[1].intermediate_values == dict(enumerate(engines[1].history["val_acc"], start=1))
    pruned = engines[2]
    assert pruned.epoch < 6
    assert pruned.history.reason.startswith("Prune: val_acc is ")
    assert pruned.directory is not None
    assert (pruned.directory / "acc.png").exists()
    assert study.best_value == max(engine.history["val_acc"][-1] for engine in (engines[0], engines[1], engines[3]))


def test_a_value_that_will_not_exist_is_refused_before_step_1() -> None:
    trial = optuna.create_study().ask()
    trainer = make_trainer(Prune(trial, "val_zebra"))
    with pytest.raises(ConfigurationError, match="val_zebra"):
        trainer.fit(TRAIN, VAL, epochs=1)
    assert trainer.step == 0


def test_what_is_no_trial_is_refused() -> None:
    with refused(ConfigurationError, "Prune got 3, which is not a trial.", "Pass that of the objective."):
        Prune(3, "val_loss")
    with refused(ConfigurationError, "The study has 2 directions", "Make a study of one direction"):
        Prune(optuna.create_study(directions=["minimize", "maximize"]).ask(), "val_loss")


def test_a_watched_run_that_is_not_pruned_has_the_weights_of_one_without() -> None:
    watched, plain = make_trainer(Prune(optuna.create_study().ask(), "val_loss")), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(TRAIN, VAL, epochs=2)
    for ours, theirs in zip(watched.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_rehearsal_tells_a_study_in_a_database_nothing(tmp_path: Path) -> None:
    class Always(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return True

    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", pruner=Always())
    trainer = make_trainer(Prune(study.ask(), "val_loss"))
    trainer.rehearse(TRAIN, VAL, epochs=6)
    assert study.trials[0].intermediate_values == {}
    with pytest.raises(optuna.TrialPruned):
        trainer.fit(TRAIN, VAL, epochs=6)
    assert list(study.trials[0].intermediate_values) == [1]
