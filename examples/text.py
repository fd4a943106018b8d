"""A character language model: batches as dicts, updates by the token, and a run that counts steps, not epochs.

    python examples/text.py    # learns from the Python language reference, which comes with Python
    python examples/text.py --text my_book.txt --max-steps 5000

Paragraphs differ in length, so a batch is padded, and its loss counts by its number of tokens: in the averages, and in
the gradients of an update that spans several batches. Leaves text that the model wrote, the curve of the loss over
steps, the best weights, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from camshaft.callbacks import Accumulate, BestCheckpoint, ClipGradients, Placement, ProgressBar, Report, RunDirectory
from camshaft.engine import Engine

END, PAD = "\0", -1  # the character that begins and ends a text, and what fills up a batch


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a character language model.")
    parser.add_argument("--text", help="a text file to learn from, instead of the Python language reference")
    parser.add_argument("--max-steps", type=int, default=800, help="batches to train on")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between two validations")
    parser.add_argument("--batch-size", type=int, default=16, help="paragraphs in a batch")
    parser.add_argument("--tokens-per-update", type=int, default=4000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


class Batch(TypedDict):
    """Paragraphs as numbers [N, L], padded with PAD, and how many tokens there are to predict."""

    tokens: Tensor
    num_tokens: int


def load_paragraphs(path: str | None) -> list[str]:
    """Return the paragraphs of a text in a random order, at most 400 characters of each."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    else:
        text = Path(path).read_text(encoding="utf-8")
    paragraphs = [" ".join(part.split())[:400] for part in text.split("\n\n")]
    paragraphs = [part for part in paragraphs if sum(map(str.isalpha, part)) > max(20, 0.6 * len(part))]  # no tables
    random.shuffle(paragraphs)
    return paragraphs


def collate(paragraphs: Sequence[str], vocabulary: str) -> Batch:
    """Return a batch of padded paragraphs."""
    rows = [torch.tensor([vocabulary.index(c) for c in END + part + END]) for part in paragraphs]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"tokens": tokens, "num_tokens": sum(len(row) - 1 for row in rows)}


class CharacterModel(nn.Module):
    """Predicts the next character: tokens [N, L] give logits [N, L, V] and the state to go on from."""

    def __init__(self, num_characters: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, num_characters)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits and the last state."""
        hidden, state = self.recurrent(self.embed(tokens.clamp(min=0)), state)
        return self.head(hidden), state


@torch.no_grad()
def write_text(model: CharacterModel, vocabulary: str, length: int, temperature: float = 0.7) -> str:
    """Return text of the model's own, character by character."""
    device = next(model.parameters()).device
    token, state, text = torch.full((1, 1), vocabulary.index(END), device=device), None, ""
    for _ in range(length):
        logits, state = model(token, state)
        token = torch.multinomial((logits[:, -1] / temperature).softmax(dim=1), 1)
        text += vocabulary[int(token)]
    return text.replace(END, "\n\n").strip()


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished engine."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    paragraphs = load_paragraphs(args.text)
    vocabulary = "".join(sorted({END, *"".join(paragraphs)}))
    to_batch = partial(collate, vocabulary=vocabulary)
    cut = len(paragraphs) // 20
    train: DataLoader[str] = DataLoader(paragraphs[cut:], args.batch_size, shuffle=True, collate_fn=to_batch)  # type: ignore[arg-type]  # a list serves as a dataset
    val: DataLoader[str] = DataLoader(paragraphs[:cut], args.batch_size, collate_fn=to_batch)  # type: ignore[arg-type]

    model = CharacterModel(len(vocabulary), args.width)

    def step(engine: Engine, batch: Batch) -> None:
        logits, _ = model(batch["tokens"][:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), ignore_index=PAD)
        if engine.training:
            engine.update(loss, num_samples=batch["num_tokens"])
        engine.record(loss=loss, weight=batch["num_tokens"])

    run = RunDirectory(args.output, settings=args)
    engine = Engine(
        step,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr),
        callbacks=[
            run,
            Placement(args.device),
            Accumulate(samples=args.tokens_per_update),
            ClipGradients(norm=1.0),
            BestCheckpoint("val_loss", mode="min", restore=True),
            Report(),
            ProgressBar(),
        ],
    )
    if args.rehearse:
        engine.rehearse(train, val, max_steps=args.max_steps, validate_every=args.validate_every)
    history = engine.fit(train, val, max_steps=args.max_steps, validate_every=args.validate_every)

    sample = write_text(model, vocabulary, length=600)
    (run.path / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample}\n")
    best = history.best("val_loss", mode="min")
    print(f"best validation loss: {best['val_loss']:.3f} nats per character, after {best['step']} batches")
    print(f"run directory: {run.path}")
    return engine


if __name__ == "__main__":
    main(get_args_parser().parse_args())
