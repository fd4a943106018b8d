"""Similarity learning: an embedding in which images of one class lie together, by triplet loss.

    python examples/similarity.py    # scikit-learn's bundled digits, no download
    python examples/similarity.py --data fashionmnist --steps 600

Each batch holds several images of each of several classes; the loss takes, for each of them, the farthest of its own
class and the nearest of another. Recall@1 is how often an image's nearest neighbour is of its class. Leaves a picture
of the embedding, the curves, the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Sampler, TensorDataset

from camshaft.callbacks import BestCheckpoint, EarlyStopping, Placement, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine, Trainer

Sets = tuple[TensorDataset, TensorDataset]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Learn an embedding by triplet loss.")
    parser.add_argument("--data", choices=["digits", "fashionmnist"], default="digits")
    parser.add_argument("--data-dir", default="data", help="where FashionMNIST lies or is downloaded to")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="batches in an epoch")
    parser.add_argument("--classes", type=int, default=8, help="classes in a batch")
    parser.add_argument("--samples", type=int, default=8, help="images of each of them")
    parser.add_argument("--dimensions", type=int, default=32, help="of the embedding")
    parser.add_argument("--margin", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_digits() -> Sets:
    """Return 1,797 real digits [N, 1, 8, 8] with labels [N], half for training and half for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, val = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(900)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def load_fashion_mnist(directory: str) -> Sets:
    """Return FashionMNIST [N, 1, 28, 28], downloaded if it is not there; 2,000 images for validation."""
    from torchvision.datasets import FashionMNIST

    train, val = (FashionMNIST(directory, train=train, download=True) for train in (True, False))
    train_set = TensorDataset(train.data[:, None] / 255, train.targets)
    return train_set, TensorDataset(val.data[:2000, None] / 255, val.targets[:2000])


class ClassBatches(Sampler[list[int]]):
    """Batches of P classes with K samples of each, drawn again for each batch."""

    def __init__(self, labels: Tensor, num_classes: int, num_samples: int, num_batches: int) -> None:
        self.members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        self.num_classes, self.num_samples, self.num_batches = num_classes, num_samples, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            chosen = [self.members[place] for place in torch.randperm(len(self.members))[: self.num_classes]]
            yield torch.cat([own[torch.randperm(len(own))[: self.num_samples]] for own in chosen]).tolist()


class Embedding(nn.Module):
    """Images [N, 1, H, W] to unit vectors [N, D]."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU())
        self.layers = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, dimensions))

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding."""
        return normalize(self.layers(images), dim=1)


def hard_triplet_loss(embedding: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the mean of ``max(0, margin + farthest of the own class - nearest of another)``; [N, D], labels [N]."""
    distance = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    farthest = distance.masked_fill(~same, 0).amax(dim=1)
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    return (margin + farthest - nearest).relu().mean()


def recall_at_one(embedding: Tensor, labels: Tensor) -> Tensor:
    """Return the share of a batch [N, D] whose nearest neighbour in it is of the same class [N]."""
    similarity = (embedding @ embedding.T).fill_diagonal_(-1)
    return (labels[similarity.argmax(dim=1)] == labels).float().mean()


def draw_embedding(embedding: Tensor, labels: Tensor, path: Path) -> None:
    """Draw an embedding [N, D], flattened to two dimensions by t-SNE, a colour for each class."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    places = TSNE(init="pca", random_state=0).fit_transform(embedding.numpy())
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for label in labels.unique().tolist():
        x, y = places[labels == label].T
        axes.scatter(x, y, s=8, color=f"C{label}", label=label)
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    axes.set(title="validation images by embedding", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    train_set, val_set = load_digits() if args.data == "digits" else load_fashion_mnist(args.data_dir)
    batches = ClassBatches(train_set.tensors[1], args.classes, args.samples, args.steps)
    train = DataLoader(train_set, batch_sampler=batches)
    val = DataLoader(val_set, batch_size=len(val_set))  # one batch, so that neighbours are looked for among all

    model = Embedding(args.dimensions)
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        partial(hard_triplet_loss, margin=args.margin),
        metrics={"recall": recall_at_one},
        callbacks=[
            run,
            Placement(args.device),
            EarlyStopping("val_recall", mode="max", patience=args.patience),
            BestCheckpoint("val_recall", mode="max", restore=True),
            Report(),
            ProgressBar(),
        ],
    )
    untrained = trainer.evaluate(val)["recall"]
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs)

    draw_embedding(trainer.predict(val), val_set.tensors[1], run.path / "embedding.png")
    print(f"recall@1 on validation: {trainer.evaluate(val)['recall']:.4f}, before training {untrained:.4f}")
    print(f"run directory: {run.path}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
