"""A training that another process steers while it goes on, and its repetition, which is bit-identical.

    python examples/steering.py

A small network learns scikit-learn's bundled digits. Meanwhile the command ``camshaft steer`` halves its learning rate
twice, clips its gradients more, asks for a validation, and ends it. Each order is recorded with the step at which it
was taken; a second training reads the record and repeats it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import ClipGradients, RunCheckpoint, RunDirectory, Steering
from camshaft.engine import Engine, EpochEnd, Trainer, at

ORDERS = ("lr x0.5", "set ClipGradients.norm=0.5", "validate", "lr x0.5", "stop --after epoch")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Steer a training from another process, and repeat it.")
    parser.add_argument("--epochs", type=int, default=1000, help="at most; it is ordered to stop before")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    return parser


def load_digits() -> TensorDataset:
    """Return 1,797 real digits [N, 64] with labels [N]."""
    from sklearn.datasets import load_digits as load

    digits = load()
    return TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))


def send_orders(run: Path) -> None:
    """Send orders to a run, as somebody at another terminal does."""
    command = Path(sys.executable).with_name("camshaft")
    for order in ORDERS:
        print(f"$ camshaft steer {run} {order}", flush=True)
        subprocess.run([command, "steer", run, *order.split()], check=False)


def train(args: argparse.Namespace, repeat: Path | None = None) -> Engine:
    """Train while orders come; or repeat those of an earlier run."""
    torch.manual_seed(0)
    train, val = random_split(load_digits(), [0.8, 0.2], torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    run = RunDirectory(args.output, settings=args, terminal=False)
    callbacks = [
        run,
        Steering(every_seconds=0.1, repeat=repeat),
        ClipGradients(norm=5.0),
        RunCheckpoint(run.path / "checkpoints", every_epochs=10),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    metrics = {"acc": MulticlassAccuracy(10, average="micro")}
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks, seed=0)
    sender = threading.Thread(target=send_orders, args=(run.path,))  # which waits for the other process
    if repeat is None:
        trainer.subscribe(EpochEnd, lambda event: sender.start(), when=at(2))
    trainer.fit(DataLoader(train, args.batch_size, shuffle=True), DataLoader(val, args.batch_size), epochs=args.epochs)
    if repeat is None:
        sender.join()
    return trainer


def main(args: argparse.Namespace) -> list[Engine]:
    """Train, repeat the training, and assert that both came to the same weights."""
    steered = train(args)
    assert steered.directory is not None
    repeated = train(args, repeat=steered.directory)
    for engine in (steered, repeated):
        print(f"{engine.directory}: {engine.history.reason}")
        for remark in engine.history.remarks:
            print(f"    step {remark['step']:5}  {remark['text']}")
    both = zip(steered.parts["model"].parameters(), repeated.parts["model"].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)
    assert steered.history.rows == repeated.history.rows
    print(f"bit-identical after {steered.step} steps, validation accuracy {steered.history['val_acc'][-1]:.3f}")
    return [steered, repeated]


if __name__ == "__main__":
    main(get_args_parser().parse_args())
