"""Batches and models as other libraries make them, in a `Trainer`: transformers' and PyTorch Geometric's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_trainer, refused
from torch import Tensor, nn
from torch.utils.data import DataLoader

from camshaft.callbacks import BestCheckpoint, MicroBatch, Placement, RunCheckpoint
from camshaft.engine import Callback, DataError, Engine, StepEnd, Trainer, at, num_samples, prepare_batch, tree_map

OLD = "not with an older torch"


def bert(*callbacks: Callback) -> Engine:
    """A classifier of random weights, which computes its own loss."""
    transformers = pytest.importorskip("transformers.models.bert.modeling_bert", reason=OLD, exc_type=ImportError)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return Trainer(
        model,
        torch.optim.AdamW(model.parameters(), 1e-2),
        loss_fn=lambda output: output.loss,
        prepare_batch=lambda batch: (batch, batch["labels"]),
        metrics={"acc": lambda output, labels: (output.logits.argmax(-1) == labels).float().mean()},
        callbacks=callbacks,
    )


def texts(num_batches: int = 4) -> list[Any]:
    from transformers import BatchEncoding

    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (num_batches, 8, 6), generator=draw)
    return [
        BatchEncoding({"input_ids": one, "attention_mask": torch.ones_like(one), "labels": (one[:, 0] > 24).long()})
        for one in ids
    ]


def test_a_model_of_transformers_trains_as_its_hand_written_loop_does(tmp_path: Path) -> None:
    trainer = bert(Placement("cpu"), BestCheckpoint("val_acc", mode="max", directory=tmp_path))
    history = trainer.fit(texts(), texts(), epochs=2)
    by_hand = bert()
    model, optimizer = by_hand.parts["model"], by_hand.parts["optimizer"]
    model.train()
    for batch in [*texts(), *texts()]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trainer.parts["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(history["val_acc"]) == 2
    assert (tmp_path / "best.pt").exists()


def test_what_transformers_return_is_predicted_by_its_logits() -> None:
    trainer = bert()
    assert trainer.predict(texts(), output=lambda output: output.logits).shape == (32, 2)
    with refused(DataError, "which cannot be joined over batches", "output=lambda output: output.logits"):
        trainer.predict(texts())


def test_a_batch_encoding_stays_one_when_it_is_moved() -> None:
    bert()
    (batch,) = texts(1)
    moved = tree_map(Tensor.clone, batch)
    assert type(moved) is type(batch)
    assert num_samples(moved) == 8


def graphs() -> list[Any]:
    data = pytest.importorskip("torch_geometric.data", reason=OLD, exc_type=ImportError)
    draw = torch.Generator().manual_seed(0)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return [
        data.Data(x=torch.randn(4 + n % 3, 3, generator=draw), edge_index=edges, y=torch.tensor([n % 2]))
        for n in range(10)
    ]


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv, self.head = GCNConv(3, 8), nn.Linear(8, 2)

    def forward(self, batch: Any) -> Any:
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.conv(batch.x, batch.edge_index).relu(), batch.batch))


def graph_trainer(*callbacks: Callback, seed: int | None = None) -> Engine:
    torch.manual_seed(0)
    model = GraphNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=seed)


def graph_loader(**options: Any) -> DataLoader[Any]:
    from torch_geometric.loader import DataLoader as GraphLoader

    loader: DataLoader[Any] = GraphLoader(graphs(), batch_size=4, **options)
    return loader


def test_graphs_train_as_in_a_hand_written_loop_and_each_counts_once() -> None:
    graphs()
    trainer = graph_trainer(Placement("cpu"))
    history = trainer.fit(graph_loader(), graph_loader(), epochs=2)
    by_hand = graph_trainer()
    model, optimizer = by_hand.parts["model"], by_hand.parts["optimizer"]
    for _ in range(2):
        total = 0.0
        for batch in graph_loader():
            loss = nn.functional.cross_entropy(model(batch), batch.y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach()) * batch.num_graphs
    for ours, theirs in zip(trainer.parts["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert history["train_loss"][-1] == pytest.approx(total / 10, rel=1e-6)
    assert trainer.predict(graph_loader()).shape == (10, 2)


def test_a_run_over_graphs_is_resumed_to_the_bit(tmp_path: Path) -> None:
    graphs()
    whole = graph_trainer(seed=1)
    whole.fit(graph_loader(shuffle=True), epochs=2)
    killed = graph_trainer(RunCheckpoint(tmp_path), seed=1)
    killed.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(4))
    killed.fit(graph_loader(shuffle=True), epochs=2)
    assert killed.step == 4
    resumed = graph_trainer(RunCheckpoint(tmp_path), seed=1)
    resumed.fit(graph_loader(shuffle=True), epochs=2, resume="auto")
    for ours, theirs in zip(resumed.parts["model"].parameters(), whole.parts["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_of_graphs_is_not_taken_apart() -> None:
    graphs()
    with refused(DataError, "A batch of graphs cannot be divided.", "Pass a smaller batch_size"):
        graph_trainer(MicroBatch(2)).fit(graph_loader(), epochs=1)


def test_a_batch_of_graphs_is_the_inputs_and_y_the_target() -> None:
    batch = next(iter(graph_loader()))
    inputs, target = prepare_batch(batch)
    assert inputs is batch
    assert torch.equal(target, batch.y)
    assert num_samples(batch) == 4


class Own(nn.Module):
    """Has an error in a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.ones(4, 9), "The model Linear could not take Tensor [4, 9] (mat1 and mat2 shapes cannot be multiplied"),
        ((torch.ones(4, 4), torch.ones(4, 4)), "The model Linear could not take a tuple of 2"),
        ({"left": torch.ones(4, 4), "right": torch.ones(4, 4)}, "unexpected keyword argument 'left'"),
    ],
)
def test_inputs_that_a_model_cannot_take_are_named_with_what_to_write(inputs: Any, said: str) -> None:
    data = [(inputs, torch.zeros(4, dtype=torch.long))]
    with refused(DataError, said, "Pass a function that returns what it takes: prepare_batch="):
        make_trainer().fit(data, epochs=1)
    with refused(DataError, said):
        make_trainer().predict(data)


def test_an_error_in_a_line_of_the_model_is_raised_as_it_is() -> None:
    model = Own()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss())
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        trainer.fit([(torch.ones(4, 9), torch.ones(4, 1))], epochs=1)
    assert not isinstance(caught.value, DataError)
