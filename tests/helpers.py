"""Small real parts that the handlers' tests are made of."""

from __future__ import annotations

import builtins
import difflib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.engine import Callback, Engine, Trainer, checkpoint, files

Batch = tuple[Tensor, Tensor]
GOLDEN = Path(__file__).with_name("data")
README = Path(__file__).parent.parent / "README.md"


def class_batches(*sizes: int, seed: int = 0) -> list[Batch]:
    """Batches of these sizes: inputs [B, 4], and the class 0, 1 or 2 that a fixed linear rule gives each of them."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    inputs = [torch.randn(size, 4, generator=generator) for size in sizes]
    return [(batch, (batch @ rule).argmax(dim=1)) for batch in inputs]


def linear() -> nn.Linear:
    """A model from 4 inputs to 3 classes, the same at each call."""
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def make_trainer(
    *callbacks: Callback, model: nn.Module | None = None, lr: float = 0.1, metrics: Mapping[Any, Any] | None = None
) -> Engine:
    """A trainer for `class_batches`, with momentum so that the order of updates shows in the weights."""
    model = linear() if model is None else model  # a compiled model has no truth value
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks)


def run_script(values: Sequence[float], *callbacks: Callback, model: nn.Module | None = None) -> Engine:
    """Run an epoch for each value: its ``val_score`` is that value, and its number is what fills the weights."""
    model = nn.Linear(2, 1) if model is None else model
    parameters = list(model.parameters())

    def step(engine: Engine, batch: Tensor) -> dict[str, float] | None:
        if not engine.training:
            return {"score": values[engine.epoch - 1]}
        for parameter in parameters:
            parameter.data.fill_(engine.epoch)
        return None

    engine = Engine(step, model=model, callbacks=callbacks)
    engine.fit([torch.zeros(1)], [torch.zeros(1)], epochs=len(values))
    return engine


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all of them as one vector. The oldest torch has no function for it."""
    norm: Tensor = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return norm


# How the last sentence of a refusal begins: with what to do, or with the names to choose from.
ADVICE = (
    "Write|Pass|Give|Build|Set|Record|Return|Reduce|Look|Attach|Say|State|Watch|Subscribe|Lower|Derive|Let|Train|"
    "Make|Ask|Use|Select|Did you|Hooks:|Events:|Devices:|Parameters:"
)


@contextmanager
def refused(kind: type[Exception], *phrases: str) -> Iterator[None]:
    """Expect exactly ``kind``, with each phrase, one sentence of fact, and a last one of what to write instead."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    message = str(caught.value)
    for phrase in phrases:
        assert phrase in message
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", message)
    assert len(sentences) >= 2, message
    assert re.match(ADVICE, sentences[-1]), message


class Failing:
    """A file of which every call first asks ``strike``."""

    def __init__(self, file: Any, strike: Callable[[str], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> int:
        self._strike("write")
        return int(self._file.write(data))

    def flush(self) -> None:
        self._strike("flush")
        self._file.flush()

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def struck(strike: Callable[[str], None]) -> Iterator[None]:
    """Call ``strike(name)`` before each call that touches the disk while a checkpoint is written, listed or read."""
    patch = pytest.MonkeyPatch()

    def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike(name)
            result = function(*args, **kwargs)
            return Failing(result, strike) if name == "open" else result

        return call

    patch.setattr(files, "open", before("open", builtins.open), raising=False)
    patch.setattr(checkpoint, "open", before("read", builtins.open), raising=False)
    patch.setattr(os, "listdir", before("listdir", os.listdir))
    patch.setattr(os, "fsync", before("fsync", os.fsync))
    patch.setattr(os, "replace", before("replace", os.replace))
    patch.setattr(Path, "unlink", before("unlink", Path.unlink))
    try:
        yield
    finally:
        patch.undo()


def kill_before(fatal: int, work: Callable[[], object]) -> None:
    """Do the work in a child that is killed before its ``fatal``-th call that touches the disk."""
    child = os.fork()
    if child == 0:
        calls = 0

        def strike(name: str) -> None:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        with struck(strike):
            work()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def run_python(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, with one thread."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def documented_events() -> list[str]:
    """The names in README's table of events, which are in firing order."""
    table = README.read_text().split("## Events, in")[1].split("##")[0]
    return [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]


def check_golden(name: str, text: str, *, update: str) -> None:
    """Fail with a diff unless the file of this name in tests/data holds ``text``; ``update`` is what rewrites it."""
    kept = read_golden(name)
    if text == kept:
        return
    diff = difflib.unified_diff(
        kept.splitlines(), text.splitlines(), f"tests/data/{name}", "what the code has now", lineterm=""
    )
    shown = "\n".join(diff)
    pytest.fail(f"{shown}\n\nIf this change is meant, run `{update}` and commit what it writes.", pytrace=False)


def write_golden(name: str, text: str) -> None:
    """Let the file of this name in tests/data hold ``text``, and say so."""
    done = "as it was" if text == read_golden(name) else "changed"
    (GOLDEN / name).write_text(text)
    print(f"Wrote tests/data/{name}: {len(text.splitlines())} lines, {done}.")


def read_golden(name: str) -> str:
    """What the file of this name in tests/data holds; nothing if there is none yet."""
    file = GOLDEN / name
    return file.read_text() if file.exists() else ""


class CountingModel(nn.Linear):
    """A linear layer from two numbers to one, that counts the batches it has seen."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.num_calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(input)


class DictOutput(CountingModel):
    """Returns a dict of several parts, which no loss takes."""

    def forward(self, input: Tensor) -> Any:
        return {"logits": super().forward(input), "hidden": input}


def regression(model: nn.Module | None = None, **arguments: Any) -> Engine:
    """A trainer for `pairs`; any argument of `Trainer` may be another."""
    model = CountingModel() if model is None else model
    if "optimizer" not in arguments:
        arguments["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, **({"loss_fn": nn.MSELoss()} | arguments))


def num_calls(trainer: Engine) -> int:
    """How many batches the model of a `regression` has seen."""
    model = trainer.parts["model"]
    assert isinstance(model, CountingModel)
    return model.num_calls


def pairs(num_batches: int = 3, batch_size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches for `regression`: two ones as inputs, and a one as target."""
    return [(torch.ones(batch_size, 2), torch.ones(batch_size, 1)) for _ in range(num_batches)]


def loader_of(num_samples: int, **arguments: Any) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of so many samples of `pairs`."""
    return DataLoader(TensorDataset(torch.ones(num_samples, 2), torch.ones(num_samples, 1)), **arguments)


def mean_error(output: Tensor, target: Tensor) -> Tensor:
    """A metric that does not say which direction is better."""
    return (output - target).abs().mean()
