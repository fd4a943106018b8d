"""A search over settings with Optuna, that ends trials early which do not learn; then a cross-validation of the best.

    python examples/search.py
    python examples/search.py --trials 30

A small network learns scikit-learn's bundled digits. Each trial has a run directory of its own; the study is drawn as
a picture beside them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import Prune, RunDirectory, cross_validate
from camshaft.engine import Callback, Engine, Trainer


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Search for a learning rate, a width and a dropout probability.")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12, help="of each trial")
    parser.add_argument("--folds", type=int, default=3, help="of the cross-validation of the best settings")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    return parser


def load_digits() -> TensorDataset:
    """Return 1,797 real digits [N, 64] with labels [N]."""
    from sklearn.datasets import load_digits as load

    digits = load()
    return TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))


def make_trainer(settings: dict[str, Any], callbacks: tuple[Callback, ...] = ()) -> Engine:
    """Return a new trainer with these settings."""
    torch.manual_seed(0)
    width = settings["width"]
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(settings["dropout"]), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    metrics = {"acc": MulticlassAccuracy(10, average="micro")}
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks, seed=0)


def draw_study(study: optuna.Study, path: Path) -> None:
    """Draw each trial's validation accuracy over the epochs; those that were pruned are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    for trial in study.trials:
        is_best = trial.number == study.best_trial.number
        style = "--" if trial.state is optuna.trial.TrialState.PRUNED else "-"
        label = f"trial {trial.number}: lr {trial.params['lr']:.2g}" + (", the best" if is_best else "")
        axes.plot(*zip(*trial.intermediate_values.items(), strict=True), style, lw=3 if is_best else 1, label=label)
    axes.set(title="search", xlabel="validation", ylabel="val_acc")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Search, draw the study, cross-validate the best settings, and return the engine of the best trial."""
    digits = load_digits()
    parts = random_split(digits, [0.8, 0.2], torch.Generator().manual_seed(0))
    engines: dict[int, Engine] = {}

    def objective(trial: optuna.Trial) -> float:
        settings = {
            "lr": trial.suggest_float("lr", 1e-5, 0.3, log=True),
            "width": trial.suggest_categorical("width", [16, 64, 128]),
            "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        }
        run = RunDirectory(args.output, settings=vars(args) | settings, terminal=False)
        engine = engines[trial.number] = make_trainer(settings, (run, Prune(trial, "val_acc")))
        train, val = DataLoader(parts[0], args.batch_size, shuffle=True), DataLoader(parts[1], args.batch_size)
        return engine.fit(train, val, epochs=args.epochs)["val_acc"][-1]

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2),
    )
    study.optimize(objective, n_trials=args.trials)

    best = engines[study.best_trial.number]
    assert best.directory is not None
    draw_study(study, best.directory / "search.png")
    settings = study.best_params
    folds = cross_validate(partial(make_trainer, settings), digits, args.folds, epochs=args.epochs)
    states = [trial.state.name for trial in study.trials]
    print(f"{len(states)} trials, {states.count('PRUNED')} of them pruned; the best: {settings}")
    print(f"validation accuracy of the best trial: {study.best_value:.4f}")
    print(f"over {args.folds} folds: {folds.mean('val_acc'):.4f} +- {folds.std('val_acc'):.4f}")
    print(f"run directory of the best trial: {best.directory}")
    return best


if __name__ == "__main__":
    main(get_args_parser().parse_args())
