"""Each peer, set up to do the same work as `workloads.everything_on`: loss, accuracy, bar, history, stop, best, log.

A peer is a function that builds everything and returns what is timed. It runs in a process of its own, for some
change torch when they are imported; what it prints is caught by the caller.
"""

from __future__ import annotations

import csv
import logging
import os
import warnings
from collections import UserList
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workloads import LR, NUM_CLASSES, accuracy, build_model, build_optimizer, new_folder

Run = Callable[[], object]
PATIENCE = 3


class Ready(UserList[Any]):  # ready batches, for those that take a list for something else
    pass


def ignite(train: Any, val: Any) -> Run:
    from ignite.contrib.handlers import ProgressBar
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import EarlyStopping, ModelCheckpoint
    from ignite.metrics import Accuracy, Loss

    model, loss_fn, history, folder = build_model(), nn.CrossEntropyLoss(), [], new_folder()
    trainer = create_supervised_trainer(
        model, build_optimizer(model), loss_fn, output_transform=lambda x, y, y_pred, loss: (y_pred, y)
    )
    evaluator = create_supervised_evaluator(model, {"loss": Loss(loss_fn), "acc": Accuracy()})
    Loss(loss_fn).attach(trainer, "loss")
    Accuracy().attach(trainer, "acc")
    ProgressBar().attach(trainer)

    def score(engine: Any) -> float:
        return float(engine.state.metrics["acc"])

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Any) -> None:
        evaluator.run(val)
        history.append({**engine.state.metrics, **{f"val_{k}": v for k, v in evaluator.state.metrics.items()}})
        _write_csv(folder / "history.csv", history)

    evaluator.add_event_handler(Events.COMPLETED, EarlyStopping(PATIENCE, score, trainer))
    best = ModelCheckpoint(str(folder), "best", score_function=score, score_name="acc", n_saved=1)
    evaluator.add_event_handler(Events.COMPLETED, best, {"model": model})
    return lambda: trainer.run(train, max_epochs=1)


def lightning(train: Any, val: Any) -> Run:
    import lightning as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger
    from torchmetrics.classification import MulticlassAccuracy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = build_model(), nn.CrossEntropyLoss()
            self.acc = nn.ModuleDict({k: MulticlassAccuracy(NUM_CLASSES, average="micro") for k in ("trained", "val")})

        def share(self, batch: Any, stage: str) -> Tensor:
            inputs, target = batch
            output = self.model(inputs)
            loss: Tensor = self.loss_fn(output, target)
            metric = self.acc["val" if stage == "val" else "trained"]
            metric.update(output, target)
            self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
            self.log(f"{stage}_acc", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
            return loss

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.share(batch, "train")

        def validation_step(self, batch: Any, index: int) -> None:
            self.share(batch, "val")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(self.model)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = new_folder()
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu", max_epochs=1, num_sanity_val_steps=0,
        enable_model_summary=False, logger=CSVLogger(folder), default_root_dir=folder,
        callbacks=[EarlyStopping("val_acc", mode="max", patience=PATIENCE), TQDMProgressBar(),
                   ModelCheckpoint(folder, monitor="val_acc", mode="max")],
    )  # fmt: skip
    module = Module()
    if isinstance(train, list):
        train, val = Ready(train), Ready(val)
    return lambda: trainer.fit(module, train, val)


def accelerate(train: Any, val: Any) -> Run:
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, folder, loss_fn = build_model(), new_folder(), nn.CrossEntropyLoss()
    model, optimizer = accelerator.prepare(model, build_optimizer(model))
    if isinstance(train, DataLoader):
        train, val = accelerator.prepare(train, val)

    def one_pass(data: Any, *, learns: bool) -> tuple[float, float]:
        model.train(learns)
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        acc_sum, count = torch.zeros_like(loss_sum), 0
        with torch.set_grad_enabled(learns):
            for inputs, target in tqdm(data):
                output = model(inputs)
                loss = loss_fn(output, target)
                if learns:
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    loss_sum.add_(loss.detach(), alpha=len(inputs))
                    acc_sum.add_(accuracy(output, target), alpha=len(inputs))
                count += len(inputs)
        return float(loss_sum) / count, float(acc_sum) / count

    def run() -> None:
        row = dict(zip(("loss", "acc"), one_pass(train, learns=True), strict=True))
        row |= dict(zip(("val_loss", "val_acc"), one_pass(val, learns=False), strict=True))
        torch.save(accelerator.unwrap_model(model).state_dict(), folder / "best.pt")
        _write_csv(folder / "history.csv", [row])

    return run


def torchkeras(train: Any, val: Any) -> Run:
    from torchkeras import KerasModel
    from torchmetrics.classification import MulticlassAccuracy

    model = build_model()
    keras_model = KerasModel(
        model, loss_fn=nn.CrossEntropyLoss(), optimizer=build_optimizer(model),
        metrics_dict={"acc": MulticlassAccuracy(NUM_CLASSES, average="micro")},
    )  # fmt: skip
    options = {"epochs": 1, "patience": PATIENCE, "monitor": "val_acc", "mode": "max", "plot": False, "cpu": True}
    train, val = (Ready(data) if isinstance(data, list) else data for data in (train, val))
    return lambda: keras_model.fit(train, val, ckpt_path=str(new_folder() / "best.pt"), **options)


def keras(train: Any, val: Any) -> Run:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    class Listed(k.utils.PyDataset):  # type: ignore[misc]  # keras has no types
        def __init__(self, data: Any) -> None:
            super().__init__()
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            return self.data[index]

    model = k.Sequential([k.Input((16,)), k.layers.Dense(32, activation="relu"), k.layers.Dense(NUM_CLASSES)])
    loss = k.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(k.optimizers.SGD(LR), loss, metrics=["accuracy"])
    folder = new_folder()
    callbacks = [
        k.callbacks.EarlyStopping("val_accuracy", mode="max", patience=PATIENCE),
        k.callbacks.ModelCheckpoint(str(folder / "best.keras"), "val_accuracy", mode="max", save_best_only=True),
        k.callbacks.CSVLogger(str(folder / "history.csv")),
    ]
    if isinstance(train, list):
        train, val = Listed(train), Listed(val)
    return lambda: model.fit(train, validation_data=val, epochs=1, callbacks=callbacks, shuffle=False)


def fastai(train: Any, val: Any) -> Run:
    from fastai.callback.progress import CSVLogger
    from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy as fast_accuracy
    from fastai.optimizer import SGD

    folder = new_folder()
    learner = Learner(
        DataLoaders(train, val, device="cuda" if torch.cuda.is_available() else "cpu"), build_model(),
        loss_func=nn.CrossEntropyLoss(), opt_func=SGD, metrics=fast_accuracy, path=folder, model_dir=folder, wd=0,
        cbs=[EarlyStoppingCallback("accuracy", patience=PATIENCE), SaveModelCallback("accuracy"), CSVLogger()],
    )  # fmt: skip
    return lambda: learner.fit(1, lr=LR)


def poutyne(train: Any, val: Any) -> Run:
    from poutyne import CSVLogger, EarlyStopping, Model, ModelCheckpoint

    net, folder = build_model(), new_folder()
    model = Model(net, build_optimizer(net), nn.CrossEntropyLoss(), batch_metrics=["accuracy"])
    callbacks = [
        EarlyStopping(monitor="val_acc", mode="max", patience=PATIENCE),
        ModelCheckpoint(str(folder / "best.pt"), monitor="val_acc", mode="max", save_best_only=True),
        CSVLogger(str(folder / "history.csv")),
    ]
    return lambda: model.fit_generator(train, val, epochs=1, callbacks=callbacks)


def torchtnt(train: Any, val: Any) -> Run:
    from torchtnt.framework.callbacks import TQDMProgressBar
    from torchtnt.framework.fit import fit
    from torchtnt.framework.state import State
    from torchtnt.framework.unit import EvalUnit, TrainUnit
    from torchtnt.utils.early_stop_checker import EarlyStopChecker

    folder, history = new_folder(), []

    class Unit(TrainUnit[Any], EvalUnit[Any]):  # its AutoUnit costs more: this is its leanest form
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = build_model(), nn.CrossEntropyLoss()
            self.optimizer = build_optimizer(self.model)
            self.stopper = EarlyStopChecker("max", PATIENCE)
            self.sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
            self.count = 0

        def share(self, batch: Any) -> Tensor:
            inputs, target = batch
            output = self.model(inputs)
            loss: Tensor = self.loss_fn(output, target)
            with torch.no_grad():
                self.sums[0].add_(loss.detach(), alpha=len(inputs))
                self.sums[1].add_(accuracy(output, target), alpha=len(inputs))
            self.count += len(inputs)
            return loss

        def train_step(self, state: State, data: Any) -> None:
            self.share(data).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        def eval_step(self, state: State, data: Any) -> None:
            self.share(data)

        def finish(self, state: State) -> None:
            history.append({name: float(one) / self.count for name, one in zip("la", self.sums, strict=True)})
            self.sums, self.count = [torch.zeros_like(one) for one in self.sums], 0

        on_train_epoch_end = finish

        def on_eval_epoch_end(self, state: State) -> None:
            self.finish(state)
            torch.save(self.model.state_dict(), folder / "best.pt")
            _write_csv(folder / "history.csv", history)
            if self.stopper.check(torch.tensor(history[-1]["a"])):
                state.stop()

    return partial(fit, Unit(), train, val, max_epochs=1, callbacks=[TQDMProgressBar()])


def skorch(train: Any, val: Any) -> Run:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Checkpoint, EarlyStopping, EpochScoring, ProgressBar
    from skorch.helper import predefined_split
    from workloads import dataset

    train_data, val_data = dataset(len(train)), dataset(len(val))
    net = NeuralNetClassifier(
        build_model(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=LR, max_epochs=1, batch_size=32,
        iterator_train=lambda data, **kwargs: train, iterator_valid=lambda data, **kwargs: val,
        classes=list(range(NUM_CLASSES)), train_split=predefined_split(val_data),
        callbacks=[("train_acc", EpochScoring("accuracy", name="train_acc", lower_is_better=False, on_train=True)),
                   EarlyStopping("valid_acc", patience=PATIENCE, lower_is_better=False),
                   Checkpoint("valid_acc_best", dirname=str(new_folder())), ProgressBar()],
    )  # fmt: skip
    net.initialize()
    target = train_data.tensors[1]
    return lambda: net.partial_fit(train_data, target)


def _write_csv(path: Any, rows: list[dict[str, Any]]) -> None:
    with open(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


PEERS: dict[str, Callable[[Any, Any], Run]] = {
    peer.__name__: peer
    for peer in (ignite, lightning, accelerate, torchkeras, keras, fastai, poutyne, torchtnt, skorch)
}
warnings.filterwarnings("ignore")
