"""One model, trained in three styles, with bit-identical weights at the end.

    python examples/three_styles.py

* script: your own two loops over ``engine.epochs``, ``engine.train`` and ``engine.validate``;
* function: a step function, and one call of ``fit``;
* class: model, optimizer, loss and metrics go into a `Trainer`.

The same handlers serve all three.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import BestCheckpoint, EarlyStopping, Metrics, ProgressBar, RunDirectory
from camshaft.engine import Callback, Engine, Trainer

Loader = DataLoader[tuple[Tensor, ...]]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train one model in three styles.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--output", default="runs", help="where run directories are made")
    return parser


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of right answers; logits [N, C], target [N]."""
    return (output.argmax(dim=1) == target).float().mean()


loss_fn = nn.CrossEntropyLoss()


def ingredients(args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Loader, Loader, list[Callback]]:
    """Return the same model, optimizer, data and handlers, made for each style."""
    torch.manual_seed(0)
    inputs = torch.randn(1000, 2)
    target = (inputs.norm(dim=1) > 1.2).long() + (inputs[:, 0] > 0).long()  # 3 classes
    train = DataLoader(TensorDataset(inputs[:810], target[:810]), args.batch_size, shuffle=True)
    val = DataLoader(TensorDataset(inputs[810:], target[810:]), args.batch_size)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    handlers = [
        RunDirectory(args.output, settings=args),
        EarlyStopping("val_acc", mode="max", patience=5),
        BestCheckpoint("val_acc", mode="max", restore=True),
        ProgressBar(),
    ]
    return model, optimizer, train, val, handlers


def script_style(args: argparse.Namespace) -> Engine:
    """Keep both loops."""
    model, optimizer, train, val, handlers = ingredients(args)
    engine = Engine(model=model, optimizer=optimizer, callbacks=handlers)
    for _ in engine.epochs(args.epochs):
        for inputs, target in engine.train(train):
            output = model(inputs)
            loss = loss_fn(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.record(loss=loss, acc=accuracy(output, target), weight=len(inputs))
        for inputs, target in engine.validate(val):
            output = model(inputs)
            engine.record(loss=loss_fn(output, target), acc=accuracy(output, target), weight=len(inputs))
    return engine


def function_style(args: argparse.Namespace) -> Engine:
    """Write the step and leave the loops to ``fit``."""
    model, optimizer, train, val, handlers = ingredients(args)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        output = model(inputs)
        loss: Tensor = loss_fn(output, target)
        engine.measure(output, target)
        if engine.training:
            engine.update(loss)
        return loss

    handlers.append(Metrics({"acc": accuracy}))
    engine = Engine(step, model=model, optimizer=optimizer, callbacks=handlers)
    engine.fit(train, val, epochs=args.epochs)
    return engine


def class_style(args: argparse.Namespace) -> Engine:
    """Hand over the parts."""
    model, optimizer, train, val, handlers = ingredients(args)
    trainer = Trainer(model, optimizer, loss_fn, metrics={"acc": accuracy}, callbacks=handlers)
    trainer.fit(train, val, epochs=args.epochs)
    return trainer


def main(args: argparse.Namespace) -> list[Engine]:
    """Train in each style, and assert that all give the same weights and history."""
    engines = [style(args) for style in (script_style, function_style, class_style)]
    first, *others = engines
    for other in others:
        weights = zip(first.parts["model"].parameters(), other.parts["model"].parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in weights)
        assert {name: first.history[name] for name in other.history} == dict(other.history)
    print(f"three styles, one result: best val_acc {max(first.history['val_acc']):.4f}, weights bit-identical")
    print(f"run directories: {', '.join(str(engine.directory) for engine in engines)}")
    return engines


if __name__ == "__main__":
    main(get_args_parser().parse_args())
