"""Graphs: PyTorch Geometric's batches in a trainer, each graph counted once.

    python examples/graph.py

Which of four kinds is a random graph: a ring, a star, a tree or a clique, with some edges at random? A node knows only
the number of its neighbours. Leaves the curves, the confusion matrix, the best weights, the log, the settings and the
history.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINConv, global_add_pool
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import BestCheckpoint, Log, Placement, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, Trainer

KINDS = ("ring", "star", "tree", "clique")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Classify random graphs.")
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def make_graph(kind: int) -> Data:
    """Return a graph of 6 to 12 nodes, of which a fifth of the nodes have one more edge, at random."""
    size = random.randint(6, 12)
    edges = {
        "ring": [(node, (node + 1) % size) for node in range(size)],
        "star": [(0, node) for node in range(1, size)],
        "tree": [(node, (node - 1) // 2) for node in range(1, size)],
        "clique": [(one, other) for one in range(size) for other in range(one)],
    }[KINDS[kind]]
    edges += [(random.randrange(size), random.randrange(size)) for _ in range(size // 5)]
    both_ways = torch.tensor([*edges, *((b, a) for a, b in edges)]).T
    degree = torch.bincount(both_ways[0], minlength=size)
    return Data(x=degree[:, None].float() / 10, edge_index=both_ways, y=torch.tensor([kind]))


class GraphNet(nn.Module):
    """Three rounds of messages between neighbours, and the sum over each graph's nodes: logits [graphs, kinds]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [1, width, width]
        self.rounds = nn.ModuleList(
            GINConv(nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width))) for size in sizes
        )
        self.head = nn.Linear(width, len(KINDS))

    def forward(self, batch: Any) -> Tensor:
        """Return the logits of a batch of graphs."""
        x = batch.x
        for messages in self.rounds:
            x = messages(x, batch.edge_index).relu()
        logits: Tensor = self.head(global_add_pool(x, batch.batch))
        return logits


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    graphs = [make_graph(number % len(KINDS)) for number in range(args.graphs)]
    cut = args.graphs // 5
    train = DataLoader(graphs[cut:], args.batch_size, shuffle=True)
    val = DataLoader(graphs[:cut], args.batch_size)

    model = GraphNet(args.width)
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        nn.CrossEntropyLoss(),
        metrics={
            "acc": MulticlassAccuracy(len(KINDS), average="micro"),
            "confusion": MulticlassConfusionMatrix(len(KINDS)),
        },
        callbacks=[
            run,
            Placement(args.device),
            Log(every=10, gradients=True),
            BestCheckpoint("val_acc", mode="max", restore=True),
            Report(class_names=KINDS),
            ProgressBar(),
        ],
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)
    print(f"validation accuracy: {trainer.evaluate(val)['acc']:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
