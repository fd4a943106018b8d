"""Keep the best weights."""

from __future__ import annotations

import copy
import hashlib
import logging
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from camshaft.engine import (
    Callback,
    CheckpointError,
    ConfigurationError,
    Engine,
    FitEnd,
    FitStart,
    Ranks,
    average_name,
    ensure_writable,
    has_shards,
    is_plain_name,
    load_weights,
    made_whole,
    remove_temporaries,
    save_together,
    unwrap,
    whole_number,
)

from .monitor import Mode, Monitor

logger = logging.getLogger("camshaft")


@dataclass(frozen=True, slots=True)
class Kept:
    """One of the best: its value, when it was reached, the file that holds it, and that file's SHA-256."""

    value: float
    epoch: int
    step: int
    file: str
    digest: str = ""  # in memory there is no file


class BestCheckpoint(Callback):
    """Writes the model's weights whenever a value is the best so far, and keeps the ``top_k`` best.

    ``best.pt`` always holds the best: a plain ``state_dict`` of the bare model, for
    ``model.load_state_dict(torch.load("best.pt", weights_only=True))``. Beside it, ``best.optimizer.pt`` holds the
    state of that moment of the part ``optimizer``, if there is one. With ``top_k > 1`` the runners-up are kept under
    names that tell value, epoch and step.

    A new file is whole and on the disk before an old one goes; a failed write warns, and training continues with
    the old file. After a power cut ``best.optimizer.pt`` is of the moment of ``best.pt``, or missing. Of two equal
    values the earlier is better. NaN is never best. A resumed run continues with what its state says was kept, told
    by digests; it warns and begins again if the best weights are not in its directory, as when a later best has taken
    their place and there is no runner-up.

    Args:
        monitor: the value to watch, such as ``"val_acc"``.
        mode: "max" or "min"; may be left out where the metric says itself which is better.
        directory: where to write; by default ``checkpoints`` in the run directory. With neither, the best
            weights are kept in memory only.
        top_k: how many to keep; at least 1.
        restore: load the best weights into the model when the run ends.
        parts: the parts whose weights are kept, such as ``["generator"]``. The weights of several are one dict of
            their state dicts, by part.

    Raises:
        ConfigurationError: for settings that cannot work; before the first step if the value will not exist or
            the directory cannot be written.
    """

    def __init__(
        self,
        monitor: str,
        mode: Mode | None = None,
        directory: str | Path | None = None,
        *,
        top_k: int = 1,
        restore: bool = False,
        parts: Sequence[str] = ("model",),
    ) -> None:
        if isinstance(parts, str) or not parts:
            raise ConfigurationError(f'BestCheckpoint has parts={parts!r}. Write a list of names: parts=["model"].')
        self.parts = tuple(parts)
        self.monitor = Monitor("BestCheckpoint", monitor, mode)
        self.top_k = whole_number("BestCheckpoint's top_k", top_k, least=1)
        self.restore = restore
        self._wanted_directory = None if directory is None else Path(directory)
        self.directory: Path | None = self._wanted_directory
        self.kept: list[Kept] = []  # best first
        self._in_memory: dict[str, Any] | None = None
        self._ranks = Ranks()  # until it is attached

    @property
    def best(self) -> Kept | None:
        """The best so far."""
        return self.kept[0] if self.kept else None

    @property
    def path(self) -> Path | None:
        """The file of the best weights, or None where there is none."""
        return self.directory / "best.pt" if self.directory and self.kept and self._in_memory is None else None

    def attach(self, engine: Engine) -> None:
        """Watch the value."""
        for name in self.parts:
            engine.parts.module(name, "BestCheckpoint")
        super().attach(engine)
        self._ranks = engine.ranks
        self.monitor.attach(engine, self._check)

    def write_into(self, directory: Path) -> None:
        """Write there, if this would not be the run directory, and forget what was best before."""
        self._wanted_directory = self._wanted_directory and directory
        self.kept, self._in_memory = [], None

    def on_fit_start(self, event: FitStart) -> None:
        """Find out where to write, and whether that works."""
        run_directory = event.engine.directory
        self.directory = self._wanted_directory or (run_directory and run_directory / "checkpoints")
        self.directory = self._ranks.shared(self.directory)
        self._ranks.on_main(lambda: self._prepare(event))

    def _prepare(self, event: FitStart) -> None:
        if self.directory is not None:
            others = [c for c in event.engine.listeners.callbacks if isinstance(c, BestCheckpoint) and c is not self]
            if any(other.directory == self.directory for other in others):
                raise ConfigurationError(
                    f"Two BestCheckpoints write {self.directory / 'best.pt'}. Pass each a directory of its own."
                )
            ensure_writable(self.directory, "BestCheckpoint")
            remove_temporaries(self.directory, "best*.pt", "*-epoch=*-step=*.pt")
            if (self.directory / "best.pt").exists() and not self.kept and not event.engine.run.is_resuming:
                logger.warning(
                    "%s is of an earlier run, and this run's best will replace it.", self.directory / "best.pt"
                )

    def on_fit_end(self, event: FitEnd) -> None:
        """Load the best weights, if asked to."""
        if self.kept:
            best = self.kept[0]
            logger.info("Best %s %.6g at epoch %d, step %d%s", self.monitor.name, best.value, best.epoch, best.step,
                        f"  {self.path}" if self.path else "")  # fmt: skip
            if self.restore and not has_shards(
                p for name in self.parts for p in event.engine.parts[name].parameters()
            ):
                self._ranks.on_main(lambda: self._load_into(event.engine, self.weights()))
                self._send(event.engine)
            elif self.restore and not self._ranks.is_broken:
                self._load_into(event.engine, self._ranks.on_main(self.weights))  # each rank loads its part

    def _load_into(self, engine: Engine, weights: dict[str, Any]) -> None:
        source = str(self.path or "The best checkpoint")
        by_part = weights if len(self.parts) > 1 else {self.parts[0]: weights}
        for name in self.parts:
            load_weights(engine.parts[name], by_part[name], source)
            if (average := engine.parts.get(average_name(name))) is not None:
                load_weights(average.module, by_part[name], source)  # or evaluations would use a later average

    def _send(self, engine: Engine) -> None:
        """Let the other ranks have what rank 0 has loaded, unless one of them has failed."""
        names = [one for name in self.parts for one in (name, average_name(name))]
        modules = [module for name, module in engine.parts.modules().items() if name in names]
        if not self._ranks.is_broken:
            self._ranks.copy_from_main([t for module in modules for t in (*module.parameters(), *module.buffers())])

    def weights(self) -> dict[str, Any]:
        """Return the best weights.

        Raises:
            ConfigurationError: if no value has been best yet.
            CheckpointError: if the file is damaged or gone.
        """
        if self._in_memory is not None:
            return self._in_memory
        if self.path is None:
            raise ConfigurationError(
                f"No best weights exist: {self.monitor.name} has had no value that is a number. Train first."
            )
        try:
            weights: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path} cannot be loaded: {error!r}. Train again, or load another file yourself."
            ) from error
        return weights

    def _check(self, engine: Engine, value: float) -> None:
        worse = [place for place, kept in enumerate(self.kept) if self.monitor.better(value, than=kept.value)]
        place = worse[0] if worse else len(self.kept)
        if value != value or place >= self.top_k:
            return
        metric = re.sub(r"[^\w.-]", "_", self.monitor.name, flags=re.ASCII)  # "val_loss/box" is not a file's name
        name = f"{metric}={value:.6g}-epoch={engine.epoch}-step={engine.step}.pt"
        digest = ""
        directory = self.directory
        if directory is None:
            if place == 0:
                self._in_memory = made_whole(copy.deepcopy(self._weights_of(engine)))
        else:
            files = self._files(engine, directory, name, is_best=place == 0)
            digest = self._ranks.on_main(lambda: self._save(directory, files))
            if not digest:
                return
            if place == 0:
                self._in_memory = None
        self.kept.insert(place, Kept(value, engine.epoch, engine.step, name, digest))
        self._prune()

    def _files(self, engine: Engine, directory: Path, name: str, *, is_best: bool) -> dict[Path, Any]:
        """Return what to write; what several ranks hold in parts comes together on rank 0."""
        weights = self._weights_of(engine)
        files: dict[Path, Any] = {directory / "best.pt": weights} if is_best else {}
        if self.top_k > 1:
            files[directory / name] = weights
        if is_best:
            optimizer = engine.parts.get("optimizer")
            state = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else None
            files[directory / "best.optimizer.pt"] = state
        return {path: made_whole(value, is_kept=self._ranks.is_main) for path, value in files.items()}

    def _weights_of(self, engine: Engine) -> dict[str, Any]:
        """Return the state dict of the one part, or those of several by part."""
        weights = {name: unwrap(engine.parts[name]).state_dict() for name in self.parts}
        return weights if len(self.parts) > 1 else weights[self.parts[0]]

    def _save(self, directory: Path, files: dict[Path, Any]) -> str:
        """Write the files and return the first one's digest; "" if that failed."""
        try:
            return save_together(files)[0]
        except OSError as error:
            logger.warning("BestCheckpoint could not write in %s: %s. The earlier files stay, and training continues.",
                           directory, error.strerror or error)  # fmt: skip
            return ""

    def _prune(self) -> None:
        for kept in self.kept[self.top_k :]:
            if self.directory is not None and self._ranks.is_main:
                (self.directory / kept.file).unlink(missing_ok=True)
        del self.kept[self.top_k :]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, best first."""
        return {"kept": [asdict(kept) for kept in self.kept], "in_memory": self._in_memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; begin again if the best weights do not exist any more.

        Raises:
            CheckpointError: if a name in it is not one of a file in the directory; nothing was taken over.
        """
        kept = [Kept(**one) for one in state["kept"]]
        for one in kept:
            _check(one)
        self.kept, self._in_memory = kept, state["in_memory"]
        self._ranks.on_main(self._look_for_what_is_kept)
        self.kept, self._in_memory = self._ranks.shared((self.kept, self._in_memory))

    def _look_for_what_is_kept(self) -> None:
        if self._in_memory is not None:
            self._write_from_memory(self._in_memory)
        elif self.kept:
            self._keep_what_is_there()

    def _write_from_memory(self, weights: dict[str, Any]) -> None:
        """Write the best weights of a run that had no directory where this one has."""
        if self.directory is not None and (digest := self._write_best(self.directory, weights)):
            self.kept[0] = replace(self.kept[0], digest=digest)
            self._in_memory = None

    def _write_best(self, directory: Path, weights: dict[str, Any]) -> str:
        return self._save(directory, {directory / "best.pt": weights, directory / "best.optimizer.pt": None})

    def _keep_what_is_there(self) -> None:
        """Forget what is not in the directory: others may have taken its place after the state was saved."""
        best, *others = self.kept
        if self.directory is not None and self._has_best(self.directory, best):
            self.kept[1:] = [one for one in others if _holds(self.directory / one.file, one.digest)]
            return
        logger.warning("The best weights of the resumed run are not in %s%s. BestCheckpoint starts again.",
                       self.directory or "its checkpoint",
                       ": best.pt is of another moment" if self.path and self.path.is_file() else "")  # fmt: skip
        self.kept = []

    def _has_best(self, directory: Path, best: Kept) -> bool:
        """Return whether best.pt is the state's best; if it is another, but the best has its own file, it is again."""
        if _holds(directory / "best.pt", best.digest):
            return True
        own = directory / best.file
        return _holds(own, best.digest) and bool(self._write_best(directory, torch.load(own, weights_only=True)))

    def __repr__(self) -> str:
        parts = "" if self.parts == ("model",) else f", parts={list(self.parts)}"
        return f"BestCheckpoint({self.monitor.name!r}, mode={self.monitor.mode!r}, top_k={self.top_k}{parts})"


def _check(kept: Kept) -> None:
    """Refuse what is not one of the best; a name must not lead out of the directory: the file of it may be removed."""
    if not is_plain_name(kept.file):
        raise CheckpointError(
            f"A best checkpoint is kept as {kept.file!r}, which is not the name of a file in a directory. "
            "Resume from another checkpoint."
        )
    if not isinstance(kept.value, int | float) or not all(type(one) is int for one in (kept.epoch, kept.step)):
        raise CheckpointError(f"A best checkpoint is kept as {kept!r:.80}. Resume from another checkpoint.")


def _holds(path: Path, digest: str) -> bool:
    """Return whether there is a file, and not a link to one, with this content."""
    if path.is_symlink():
        return False
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def watched_value(callbacks: Iterable[Callback]) -> Monitor | None:
    """Return the value that says which moment of a run was best.

    It is the one of the first `BestCheckpoint`; without any, the one of the first handler that watches a value.
    """
    watching = [one for one in callbacks if isinstance(getattr(one, "monitor", None), Monitor)]
    watching.sort(key=lambda one: not isinstance(one, BestCheckpoint))
    monitor: Monitor | None = getattr(watching[0], "monitor", None) if watching else None
    return monitor
