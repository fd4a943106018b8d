"""A generative adversarial network: two models, two optimizers, and a step that trains both.

    python examples/gan.py

The generator learns to turn noise into points of eight clusters on a circle. Each loss is for one optimizer, named as
the part it is; the clipping and a schedule follow each. A validation counts how many samples lie in a cluster, and how
many clusters were found. Leaves pictures of the samples as they were along the run and of both losses, the log, the
settings and the history.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from camshaft.callbacks import ClipGradients, Placement, ProgressBar, Report, RunDirectory, Schedule, warmup_cosine
from camshaft.engine import Engine, EpochEnd, every

CLUSTERS, RADIUS, SPREAD = 8, 2.0, 0.15


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a GAN on eight clusters of points.")
    parser.add_argument("--points", type=int, default=25_600)
    parser.add_argument("--noise", type=int, default=8, help="dimensions of the generator's noise")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--gradient-penalty", type=float, default=0.1, help="on the discriminator at real points")
    parser.add_argument("--picture-every", type=int, default=6, help="epochs between two pictures of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def centres() -> Tensor:
    """Return the middle of each cluster [8, 2]."""
    angles = 2 * math.pi * torch.arange(CLUSTERS) / CLUSTERS
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def make_points(num_points: int) -> Tensor:
    """Return points [N, 2] of the eight clusters."""
    return centres()[torch.randint(CLUSTERS, (num_points,))] + SPREAD * torch.randn(num_points, 2)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Return a network with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, outputs)
    )


def coverage(samples: Tensor) -> dict[str, Tensor]:
    """Return the share of samples within three spreads of a centre, and the number of clusters with a fair share."""
    distance, nearest = torch.cdist(samples, centres().to(samples)).min(dim=1)
    good = distance < 3 * SPREAD
    counts = nearest[good].bincount(minlength=CLUSTERS)
    return {"good": good.float().mean(), "clusters": (counts > len(samples) / CLUSTERS / 4).sum()}


def draw_samples(real: Tensor, pictures: dict[str, Tensor], path: Path) -> None:
    """Draw the real points and, beside them, each set of samples [N, 2] under its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * (len(pictures) + 1), 3.4), layout="constrained")
    panels = figure.subplots(1, len(pictures) + 1, sharex=True, sharey=True)
    for axes, (title, points) in zip(panels, [("real", real), *pictures.items()], strict=True):
        axes.scatter(*points.T.numpy(), s=3, alpha=0.5, c="tab:blue" if title == "real" else "tab:orange")
        axes.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished engine."""
    torch.manual_seed(args.seed)
    real_points = make_points(args.points)
    train: DataLoader[Tensor] = DataLoader(real_points, args.batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type]  # a tensor serves as a dataset
    val = [torch.randn(2000, args.noise)]  # the same noise in each validation

    generator, discriminator = mlp(args.noise, 2), mlp(2, 1)

    def step(engine: Engine, batch: Tensor) -> dict[str, Tensor]:
        if not engine.training:
            return coverage(generator(batch))
        real = batch.requires_grad_()
        fake = generator(torch.randn(len(real), args.noise, device=real.device))

        score = discriminator(real)
        (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        penalty = args.gradient_penalty / 2 * gradient.square().sum(dim=1).mean()
        d_loss = softplus(-score).mean() + softplus(discriminator(fake.detach())).mean()
        engine.update(d_loss + penalty, optimizer="d_optimizer")

        g_loss = softplus(-discriminator(fake)).mean()
        engine.update(g_loss, optimizer="g_optimizer")
        return {"generator_loss": g_loss, "discriminator_loss": d_loss}

    run = RunDirectory(args.output, settings=args)
    engine = Engine(
        step,
        generator=generator,
        discriminator=discriminator,
        g_optimizer=torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.99)),
        d_optimizer=torch.optim.Adam(discriminator.parameters(), lr=args.lr, betas=(0.5, 0.99)),
        callbacks=[
            run,
            Placement(args.device),
            ClipGradients(norm=10.0),
            Schedule(warmup_cosine, per="update", optimizer="g_optimizer"),
            Schedule(warmup_cosine, per="update", optimizer="d_optimizer"),
            Report(),
            ProgressBar(),
        ],
    )
    pictures = {}

    @engine.on(EpochEnd, when=every(args.picture_every))
    def keep_samples(event: EpochEnd) -> None:
        with torch.no_grad():
            pictures[f"epoch {engine.epoch}"] = generator(val[0].to(engine.parts.device)).cpu()

    if args.rehearse:
        engine.rehearse(train, val, epochs=args.epochs)
    history = engine.fit(train, val, epochs=args.epochs)

    draw_samples(real_points[:2000], pictures, run.path / "samples.png")
    print(
        f"samples in a cluster: {history['val_good'][-1]:.1%}, clusters found: {history['val_clusters'][-1]:.0f} of 8"
    )
    print(f"run directory: {run.path}")
    return engine


if __name__ == "__main__":
    main(get_args_parser().parse_args())
