"""A whole run, tried in seconds: its first epoch and its last, and what happens only now and then.

A rehearsal makes the real run several times, a few batches of each epoch, with jumps in between; each time, everything
is put back. So every handler hears what it will hear in ten hours, with the numbers that it will see there.
"""

from __future__ import annotations

import itertools
import logging
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .continued import ENOUGH, KIND, cut_and_resumed, resume_here
from .data import Data, DataSets, as_sets
from .errors import ConfigurationError
from .events import FitStart
from .plan import Plan
from .put_back import put_back
from .rehearsed import WHAT, Rehearsal, listing
from .route import NUM_STEPS
from .tour import from_first_to_last, without_gain
from .trial import asked_trial, lead_files

if TYPE_CHECKING:
    from .engine import Engine

_calls = itertools.count(1)  # of `rehearse` in this process: a fresh process has to find the same one

logger = logging.getLogger("camshaft")


def rehearse(engine: Engine, train: Data, val: DataSets | None, plan: Plan) -> Rehearsal:
    """Try a whole run, put everything back, and say what was found; see `Engine.rehearse`."""
    number, trial = next(_calls), asked_trial()
    if trial is not None and (trial.kind != KIND or trial.settings["number"] != number):
        return Rehearsal(tried=dict.fromkeys(WHAT, "nothing, because this run is only tried itself"))
    _refuse_what_cannot_be_put_back(engine, train, val)
    settings = {name: value for name, value in asdict(plan).items() if name != "limit"}
    fit = partial(engine.fit, train, val, **settings)
    if trial is not None:
        resume_here(engine, fit, trial)
    if torch.cuda.is_available():
        torch.cuda.init()  # or its random numbers could not be put back
    directories = _directories(engine)
    before, rehearsal = listing(directories), Rehearsal()
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=_disk_of(directories)) as directory:
        scratch = Path(directory).resolve()
        life = partial(_life, engine, (train, val), scratch)
        with _warnings_into(rehearsal.warnings, scratch):
            from_first_to_last(engine, fit, life, val, rehearsal)
            without_gain(engine, fit, life, rehearsal)
            cut_and_resumed(engine, fit, life, rehearsal, number)
    if changed := sorted({str(path) for path, _ in before.items() ^ listing(directories).items()}):
        rehearsal.warnings.append(f"The rehearsal has changed files of the run: {', '.join(changed[:5])}.")
    print(rehearsal, flush=True)
    return rehearsal


def _refuse_what_cannot_be_put_back(engine: Engine, train: Data, val: DataSets | None) -> None:
    if engine.ranks.several:
        raise ConfigurationError(
            "engine.rehearse was called on several ranks, which it does not work for yet. "
            "Use one process; the handlers are the same there."
        )
    sets = {} if val is None else {f"val {name}".strip(): data for name, data in as_sets("val", val).items()}
    for name, data in {"train": train, **sets}.items():
        if isinstance(data, Iterator):
            raise ConfigurationError(
                f"{name} is a {type(data).__name__}, which can be read only once, and a rehearsal reads some of it. "
                "Pass a function that returns it."
            )


def _directories(engine: Engine) -> list[Path]:
    """Return where the run itself will write, as far as handlers say so."""
    own = [one.checkpoints.path for one in engine.listeners.callbacks if one.checkpoints is not None]
    return own if engine.directory is None else [engine.directory, *own]


def _disk_of(directories: list[Path]) -> Path | None:
    """Return a directory on the disk that the run will write to; None for the usual one of the system."""
    return next((one.parent for one in directories if one.parent.is_dir()), None)


@contextmanager
def _life(engine: Engine, data: tuple[Any, ...], scratch: Path, name: str, *, within: str = "") -> Iterator[Path]:
    """Put everything back after the block, which makes one run. Yields the directory that its files are led into.

    Args:
        engine: whose run.
        data: what is put back beside the engine.
        scratch: where files go.
        name: what is tried, for messages.
        within: the name of an earlier one, whose files are to be used.
    """
    print(f"Rehearsal: {name} ...", flush=True)
    files = scratch / (within or name)
    files.mkdir(exist_ok=True)
    with put_back(engine, *data):
        lead_files(engine.listeners.callbacks, files)
        engine.subscribe(FitStart, lambda event: event.engine.run.limit_validation(NUM_STEPS))
        try:
            yield files
        except Exception as error:
            error.add_note(f"Found by a rehearsal ({name}), in epoch {engine.epoch}. Everything was put back.")
            raise
        interrupted = engine.history.interrupted
    if interrupted is not None and interrupted != ENOUGH:  # a signal that was sent to the rehearsal
        raise KeyboardInterrupt if interrupted == signal.SIGINT else SystemExit(128 + interrupted)


@contextmanager
def _warnings_into(found: list[str], scratch: Path) -> Iterator[None]:
    """Collect what is warned of, each once, without the names of the files that are removed."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (text := record.getMessage().replace(f"{scratch}/", "")) not in found:
                found.append(text)

    handler = Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
