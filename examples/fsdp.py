"""A transformer whose weights are divided among processes: each holds a part, and gathers a layer when it is due.

    python examples/fsdp.py
    torchrun --nproc-per-node 2 examples/fsdp.py
    torchrun --nproc-per-node 4 examples/fsdp.py --replicate 2    # weights in 2 parts, each on 2 ranks

The text is made up: each line repeats a word of random letters, so that all but the first word can be known. The model
is made on the meta device, without memory for its weights; they come when it is sharded. The files are those of one
process: a run that 4 ranks began can be continued by 2, or by one.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import (
    BestCheckpoint,
    ClipGradients,
    Distributed,
    Placement,
    ProgressBar,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    warmup_cosine,
)
from camshaft.engine import Engine, Trainer, launched_world

LETTERS = "abcdefghijklmnop"
WORD, NUM_WORDS = 6, 4


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a transformer that is sharded over processes.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lines", type=int, default=2000, help="lines of text to train on")
    parser.add_argument("--batch-size", type=int, default=50, help="lines in a batch, of all processes together")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--replicate", type=int, default=1, help="ranks that hold the same part of the weights")
    parser.add_argument("--checkpoints", help="where to save the run, and to continue it from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def make_lines(number: int, seed: int) -> TensorDataset:
    """Return lines of a repeated word: all letters but the last, and for each the letter that follows it."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(LETTERS), (number, WORD), generator=generator)
    lines = words.repeat(1, NUM_WORDS)
    return TensorDataset(lines[:, :-1], lines[:, 1:])


class Layer(nn.Module):
    """Causal attention and a feed-forward network; states [N, L, D]."""

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """Return the next states."""
        heads = self.queries_keys_values(self.norms[0](states)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.joined(found.transpose(1, 2).flatten(2))
        output: Tensor = states + self.feed_forward(self.norms[1](states))
        return output


class Transformer(nn.Module):
    """Predicts the next letter: letters [N, L] give logits [N, L, V]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), width)
        self.places = nn.Embedding(WORD * NUM_WORDS, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits."""
        states = self.embed(letters) + self.places(torch.arange(letters.shape[1], device=letters.device))
        for layer in self.layers:
            states = layer(states)
        logits: Tensor = self.head(states)
        return logits


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over all letters."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the share of right letters among those that can be known."""
    return (logits.argmax(dim=2) == target)[:, WORD - 1 :].float().mean()


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished engine."""
    torch.manual_seed(args.seed)
    train = DataLoader(make_lines(args.lines, seed=1), args.batch_size, shuffle=True)
    val = DataLoader(make_lines(400, seed=2), args.batch_size)
    with torch.device("meta"):
        model = Transformer(args.width, args.depth)
    mesh = None if args.replicate == 1 else {"replicate": args.replicate, "shard": launched_world() // args.replicate}
    saved = [RunCheckpoint(args.checkpoints)] if args.checkpoints else []
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        loss_fn,
        metrics={"acc": accuracy},
        callbacks=[
            Distributed("fsdp", mesh=mesh, units=["layers.*"]),
            RunDirectory(args.output, settings=args),
            Placement(args.device),
            Schedule(warmup_cosine, per="update"),
            ClipGradients(norm=1.0),
            BestCheckpoint("val_acc", mode="max", restore=True),
            ProgressBar(),
            *saved,
        ],
        seed=args.seed,
    )
    if args.rehearse:
        trainer.rehearse(train, val, epochs=args.epochs)
    trainer.fit(train, val, epochs=args.epochs, resume="auto" if args.checkpoints else None)

    output = trainer.predict([next(iter(val))[0][:3]])  # on every rank: each has a part of the weights
    if trainer.ranks.is_main:
        for line in output.argmax(dim=2):
            print("".join(LETTERS[letter] for letter in line[WORD - 1 :]))
        print(f"best val_acc {max(trainer.history['val_acc']):.4f}; run directory: {trainer.directory}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
