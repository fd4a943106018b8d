"""A transformer of the library transformers, trained from scratch: tokens as weights, logs by steps, and resume.

    python examples/language_model.py
    python examples/language_model.py --resume runs/<a run>/checkpoints    # goes on where that run was cut

A small GPT-2 learns the Python language reference, which comes with Python, byte by byte. Pieces of text differ in
length, so the loss, a mean over tokens, counts by its number of tokens: in the averages and in the gradients. Leaves
text that the model wrote, curves over steps, the loss every few steps in ``steps.csv``, the best weights, a checkpoint
of the run, the log, the settings and the history.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

from camshaft.callbacks import (
    BestCheckpoint,
    ClipGradients,
    Log,
    Placement,
    ProgressBar,
    Report,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import Engine, Trainer, decay_groups

END, PAD, IGNORED = 0, 0, -100  # bytes of text are never 0; transformers ignore labels of -100


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on text.")
    parser.add_argument("--text", help="a text file to learn from, instead of the Python language reference")
    parser.add_argument("--max-steps", type=int, default=600, help="batches to train on")
    parser.add_argument("--validate-every", type=int, default=100, help="steps between two validations")
    parser.add_argument("--batch-size", type=int, default=16, help="pieces of text in a batch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", help="the checkpoints of a run that was cut")
    parser.add_argument("--output", default="runs", help="where run directories are made")
    parser.add_argument("--rehearse", action="store_true", help="try the whole run first, in seconds")
    return parser


def load_pieces(path: str | None) -> list[bytes]:
    """Return the paragraphs of a text in a random order, at most 200 bytes of each."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    else:
        text = Path(path).read_text(encoding="utf-8")
    pieces = [" ".join(part.split()).encode()[:200] for part in text.split("\n\n")]
    pieces = [piece for piece in pieces if len(piece) > 40]
    random.Random(0).shuffle(pieces)
    return pieces


def collate(pieces: Sequence[bytes]) -> BatchEncoding:
    """Return a batch as transformers' tokenizers make it; padding is not to be predicted."""
    rows = [torch.tensor([END, *piece, END]) for piece in pieces]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return BatchEncoding(
        {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, IGNORED)}
    )


def num_tokens(batch: BatchEncoding) -> Tensor:
    """Return how many tokens a batch's loss is the mean of; the first of a piece is not predicted."""
    labels: Tensor = batch["labels"]
    return (labels[:, 1:] != IGNORED).sum()


@torch.no_grad()
def write_text(model: GPT2LMHeadModel, length: int, temperature: float = 0.7) -> str:
    """Return text of the model's own, byte by byte."""
    device, tokens = next(model.parameters()).device, [END]
    for _ in range(length):
        logits = model(input_ids=torch.tensor([tokens[-200:]], device=device)).logits[0, -1]
        tokens.append(int(torch.multinomial((logits / temperature).softmax(dim=0), 1)))
    return bytes(token or 10 for token in tokens[1:]).decode(errors="replace")


def main(args: argparse.Namespace) -> Engine:
    """Train as the settings say and return the finished trainer."""
    torch.manual_seed(args.seed)
    pieces = load_pieces(args.text)
    cut = len(pieces) // 20
    train: DataLoader[bytes] = DataLoader(pieces[cut:], args.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]  # a list serves as a dataset
    val: DataLoader[bytes] = DataLoader(pieces[:cut], args.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    settings: dict[str, Any] = {
        "vocab_size": 256, "n_positions": 256, "n_embd": args.width, "n_layer": args.layers, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": END, "eos_token_id": END,
        "loss_type": "ForCausalLMLoss",
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**settings))
    run = RunDirectory(args.output, settings=args)
    trainer = Trainer(
        model,
        torch.optim.AdamW(decay_groups(model, 0.1), lr=args.lr),
        loss_fn=lambda output: output.loss,  # the model has computed it
        prepare_batch=lambda batch: (batch, batch["labels"]),  # the labels stay among the inputs
        num_samples=num_tokens,
        callbacks=[
            run,
            Placement(args.device),
            ClipGradients(norm=1.0),
            Schedule(warmup_cosine, per="update"),
            WeightAverage("ema", decay=0.98),
            Log(every=20, gradients=True),
            BestCheckpoint("val_loss", restore=True),
            RunCheckpoint(args.resume or run.path / "checkpoints", every_steps=100),
            Report(),
            ProgressBar(),
        ],
        seed=args.seed,
    )
    resume = "auto" if args.resume else None
    if args.rehearse:
        trainer.rehearse(train, val, max_steps=args.max_steps, validate_every=args.validate_every)
    history = trainer.fit(train, val, max_steps=args.max_steps, validate_every=args.validate_every, resume=resume)

    with trainer.evaluating():
        sample = write_text(model, length=400)
    directory = trainer.directory or run.path
    (directory / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample}\n")
    best = history.best("val_loss", mode="min")
    print(f"best validation loss: {best['val_loss']:.3f} nats per byte, after {best['step']} batches")
    print(f"run directory: {directory}")
    return trainer


if __name__ == "__main__":
    main(get_args_parser().parse_args())
