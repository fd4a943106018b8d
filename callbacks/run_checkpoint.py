"""Checkpoints of the complete run, which can then be killed at any step and resumed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from camshaft.engine import (
    PART_DIGESTS,
    BatchReady,
    Callback,
    CheckpointDirectory,
    ConfigurationError,
    Engine,
    FitEnd,
    FitStart,
    Phase,
    Ranks,
    Settled,
    StepEnd,
    ensure_writable,
    every_seconds,
    has_shards,
    run_state,
    take_apart,
    tree_map,
    whole_number,
    write_part,
)

from .mirror import Mirror

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger("camshaft")

T = TypeVar("T")
_FAILED = "failed: "  # begins what a rank says in the place of a digest


def _count(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(f"RunCheckpoint's {name}", value, least=1)


class RunCheckpoint(Callback):
    """Saves everything that decides the rest of the run, for ``fit(..., resume="auto")``.

    It saves when a step or an epoch has settled, at the end of the run, and when a signal interrupts it. A file is
    complete and on the disk before it gets its name and before an older one is removed; its name holds its digest.

    A failed save never ends training: it warns, and the next save that is due tries again. If the last save of the
    run failed, its error is raised when everything else at the end of the run is done.

    Args:
        directory: where to write; it belongs to one run.
        every_steps, every_epochs, every_seconds: when to save; every epoch by default. Several may be given.
        keep: how many of the newest to keep; at least 1.
        keep_every: keep every n-th for ever, too.
        mirror: where to copy each checkpoint when it is on the disk: a directory in a storage that fsspec knows, such
            as ``"s3://bucket/run"``. With an empty ``directory``, as on another machine, ``resume="auto"`` fetches the
            newest from there. Best weights and logs are not copied.
        sharded: what ranks hold in parts (``Distributed("fsdp")``) is not gathered: each rank writes its own, into a
            directory beside the checkpoint. All ranks must see the directory. It is resumed by any number of ranks.
            It is refused with tensor parallelism.
        background: copy the state on the training thread and write it on another; one write at a time. Its errors
            are seen at the next save, or at the end of the run.
        on_error: "warn" as described above, or "raise" at the first failure.

    Raises:
        ConfigurationError: for settings that cannot work; before the first step if the directory cannot be written,
            is in use by another run, or holds an earlier one and ``resume`` was not asked for.
        CheckpointError: at the first save, naming the key, if a part or handler keeps what cannot be loaded safely.
        MissingPackageError: naming the package that fsspec needs for the mirror.
        OSError: at the end of the run, if its last save, or the copy of it, failed; or at the first failed save if
            ``on_error="raise"``. A failed copy before the last one is a warning.
    """

    unique = True
    steerable: ClassVar = {
        "every_steps": partial(_count, "every_steps"),
        "every_epochs": partial(_count, "every_epochs"),
    }

    def __init__(
        self,
        directory: str | Path,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_seconds: float | None = None,
        keep: int = 2,
        keep_every: int | None = None,
        mirror: str | Path | None = None,
        sharded: bool = False,
        background: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if every_steps is None and every_epochs is None and every_seconds is None:
            every_epochs = 1
        if every_seconds is not None and not every_seconds > 0:
            raise ConfigurationError(f"RunCheckpoint has every_seconds={every_seconds}. Pass a number above 0.")
        if on_error not in ("warn", "raise"):
            raise ConfigurationError(f'RunCheckpoint has on_error={on_error!r}. Write "warn" or "raise".')
        if mirror is not None and sharded:
            raise ConfigurationError(
                "RunCheckpoint has sharded=True and a mirror, which would lack the parts of the ranks. "
                "Pass one of them; without sharded=True, what ranks hold in parts is gathered."
            )
        self.sharded = sharded
        self.checkpoints: CheckpointDirectory = CheckpointDirectory(Path(directory))
        self.every_steps = _count("every_steps", every_steps)
        self.every_epochs = _count("every_epochs", every_epochs)
        self.every_seconds = every_seconds
        self.keep = whole_number("RunCheckpoint's keep", keep, least=1)
        self.keep_every = _count("keep_every", keep_every)
        self._mirror = None if mirror is None else Mirror(str(mirror), self.keep, keep_every)
        self.on_error = on_error
        self._writer = _Writer() if background else None
        self._told: Store | None = None  # where the ranks' threads tell that of rank 0 what they have written
        self._num_told = 0
        self._error: OSError | None = None  # of the newest save
        self._saved_at: tuple[int, int, Phase, int] | None = None
        self._owns = False  # whether this object has written in the directory

    def attach(self, engine: Engine) -> None:
        """Look at the data and at the clock, too; let no other run write in the directory at the same time."""
        if self.sharded and engine.ranks.tensor_size > 1:
            raise ConfigurationError(
                "RunCheckpoint has sharded=True, which knows parts that are cut along one dimension of a mesh, and "
                "tensor parallelism cuts along a second one. Write sharded=False: then rank 0 gathers the whole."
            )
        super().attach(engine)
        engine.listeners.around("lock", lambda: self._locked(engine))
        self._first_batch = engine.subscribe(BatchReady, self._say_exactness)
        if self.every_seconds is not None and engine.ranks.is_main:
            engine.subscribe(StepEnd, lambda event: event.engine.run.save(), when=every_seconds(self.every_seconds))

    def write_into(self, directory: Path) -> None:
        """Save there, and copy nothing."""
        self.checkpoints, self._mirror, self._owns = CheckpointDirectory(directory), None, False

    def on_fit_start(self, event: FitStart) -> None:
        """Look whether the directory is this run's."""
        if self._writer is not None:
            self._writer.wait()  # an earlier run may have been stopped while it waited
        if event.engine.ranks.on_main(self._has_files) and not self._owns and not event.engine.run.is_resuming:
            raise ConfigurationError(
                f"{self.checkpoints.path} holds checkpoints of an earlier run. "
                'Continue it with fit(..., resume="auto"), or pass another directory.'
            )
        self._saved_at = self._error = None

    def on_settled(self, event: Settled) -> None:
        """Save if it is due."""
        engine = event.engine
        here = (engine.epoch, engine.step, engine.run.phase, engine.num_validations)
        if here != self._saved_at and engine.run.goes_back_to is None and self._is_due(engine):
            self._error = self._save_in_parts(engine) if self._is_in_parts(engine) else self._save_whole(engine)
            self._owns = self._owns or self._error is None
            self._saved_at = here if self._error is None else None

    def on_fit_end(self, event: FitEnd) -> None:
        """Wait for a write in the background; raise the error of the last save.

        Raises:
            OSError: if it failed.
        """
        self._wait_for_own_part(event.engine.ranks)
        error, self._error = event.engine.ranks.on_main(self._wait_for_all), None
        if error is not None:
            raise error

    def _wait_for_all(self) -> OSError | None:
        """Wait for what threads are writing, and return the error of the last save, or of its copy."""
        error = self._wait("The run is over") or self._error
        copy_error = None if self._mirror is None else self._mirror.wait()
        return error or copy_error

    def _has_files(self) -> bool:
        """Remove what killed runs have left, and return whether there are checkpoints."""
        try:
            self.checkpoints.sweep()
            return bool(self.checkpoints.files())
        except OSError as error:
            raise ConfigurationError(
                f"RunCheckpoint cannot look into {self.checkpoints.path}: {error.strerror or error}. "
                "Look for the cause, and start again."
            ) from error

    @contextmanager
    def _locked(self, engine: Engine) -> Iterator[None]:
        with ExitStack() as stack:

            def lock() -> None:
                ensure_writable(self.checkpoints.path, "RunCheckpoint")
                stack.enter_context(self.checkpoints.locked())
                if self._mirror is not None:
                    self._mirror.check()
                    self._mirror.fetch_newer(self.checkpoints)

            engine.ranks.on_main(lock)
            yield

    def _say_exactness(self, event: BatchReady) -> None:
        """Log, once, how exactly the run could be resumed: its data are known now."""
        if event.engine.training:
            self._first_batch.cancel()
            exactness = event.engine.run.feed.exactness()
            logger.info("Resumed, this run would be: %s.", exactness)

    def _is_due(self, engine: Engine) -> bool:
        if engine.run.is_over or engine.run.save_is_due:
            return True
        if engine.run.phase is not Phase.BETWEEN:
            return self.every_steps is not None and engine.step % self.every_steps == 0
        return self.every_epochs is not None and engine.epoch % self.every_epochs == 0

    def _is_in_parts(self, engine: Engine) -> bool:
        return self.sharded and has_shards(parameter for _, parameter in engine.parts.named_parameters())

    def _save_whole(self, engine: Engine) -> OSError | None:
        state = run_state(engine)
        if engine.run.goes_back_to is not None:  # asked for by a handler whose state this is: it is not to be kept
            return None
        return engine.ranks.on_main(lambda: self._save(state, engine))

    def _save_in_parts(self, engine: Engine) -> OSError | None:
        """Let every rank write its part; when all of them are on the disk, rank 0 writes the checkpoint itself."""
        ranks, then = engine.ranks, _next(engine)
        state, parts = take_apart(run_state(engine, gathers=False))
        self._wait_for_own_part(ranks)
        ranks.on_main(lambda: self._wait(then))
        directory = ranks.on_main(lambda: _or_error(self.checkpoints.begin_parts))
        if not isinstance(directory, OSError) and self._writer is not None:
            self._start_part(self._writer, engine, directory, (state if ranks.is_main else None, parts))
            return None
        written: list[str | OSError] = [directory] if isinstance(directory, OSError) else []
        if not isinstance(directory, OSError):
            written = ranks.gather_all(_or_error(lambda: write_part(directory, ranks.rank, parts)))
        errors = [one for one in written if isinstance(one, OSError)]
        state[PART_DIGESTS] = written
        return ranks.on_main(lambda: self._failed(errors[0], then) if errors else self._save(state, engine))

    def _start_part(self, writer: _Writer, engine: Engine, directory: Path, state_and_parts: Any) -> None:
        """Let a thread of each rank write its part; that of rank 0 waits for the others, and writes the checkpoint."""
        ranks, step = engine.ranks, engine.step
        told = self._told = self._told or ranks.store()
        self._num_told += 1
        keys = [f"{self._num_told}/{rank}" for rank in range(ranks.world)]

        def write(state_and_parts: Any) -> None:
            state, parts = state_and_parts
            with _telling(told, keys[ranks.rank]) as digest:
                digest.append(write_part(directory, ranks.rank, parts))
            if state is not None:
                self._write(state | {PART_DIGESTS: _digests(told, keys, ranks)}, step)

        writer.start(state_and_parts, write)

    def _wait_for_own_part(self, ranks: Ranks) -> None:
        """Wait for the thread of a rank that is not rank 0, which has been told if the disk failed."""
        error = None if self._writer is None or ranks.is_main else self._writer.wait()
        if error is not None and not isinstance(error, OSError):
            raise error

    def _save(self, state: dict[str, Any], engine: Engine) -> OSError | None:
        """Write the state, or begin to; return the error if that fails."""
        then = _next(engine)
        self._wait(then)
        if self._writer is not None:
            step = engine.step
            self._writer.start(state, lambda state: self._write(state, step))
            return None
        try:
            self._write(state, engine.step)
        except OSError as error:
            return self._failed(error, then)
        return None

    def _wait(self, then: str) -> OSError | None:
        """Wait for a write in the background, and return its error if it was one of the disk."""
        error = None if self._writer is None else self._writer.wait()
        if isinstance(error, OSError):
            return self._failed(error, then)
        if error is not None:
            raise error
        return None

    def _write(self, state: dict[str, Any], step: int) -> None:
        file = self.checkpoints.save(state, step)
        if self._mirror is not None:
            self._mirror.send(file.path)
        try:
            self.checkpoints.prune(self.keep, self.keep_every)
        except OSError as error:  # the new one is good all the same
            logger.warning("Older checkpoints could not be removed from %s: %s. The next save tries again.",
                           self.checkpoints.path, error.strerror or error)  # fmt: skip

    def _failed(self, error: OSError, then: str) -> OSError:
        if self.on_error == "raise":
            raise error
        logger.warning(
            "A checkpoint could not be written in %s: %s. %s; %s.",
            self.checkpoints.path,
            error.strerror or error,
            then,
            self._what_is_good(),
        )
        return error

    def _what_is_good(self) -> str:
        try:
            newest = next(iter(self.checkpoints.files()), None)
        except OSError:
            return "which are still good cannot be seen"
        return f"{newest.path.name} is still good" if newest else "there is none yet"

    def __repr__(self) -> str:
        return f"RunCheckpoint({str(self.checkpoints.path)!r}, keep={self.keep})"


def _next(engine: Engine) -> str:
    return "The run is over" if engine.run.is_over else "Training continues"


def _or_error(write: Callable[[], T]) -> T | OSError:
    """Return what a function returns, or the error of the disk that it raises: other ranks must hear of it."""
    try:
        return write()
    except OSError as error:
        return error


@contextmanager
def _telling(told: Store, key: str) -> Iterator[list[str]]:
    """Tell the thread of rank 0 the digest that the body appends to a list, or that it failed."""
    digests: list[str] = []
    try:
        yield digests
    except BaseException as error:
        told.set(key, f"{_FAILED}{getattr(error, 'strerror', None) or error}")
        raise
    told.set(key, digests[0])


def _digests(told: Store, keys: list[str], ranks: Ranks) -> list[str]:
    """Return the digests of all ranks' parts when they are written.

    Raises:
        OSError: if one of them failed.
    """
    while not told.check(keys):  # not wait(), which would keep the store from the training thread
        if ranks.is_broken:
            raise OSError("a rank has failed")
        time.sleep(0.02)
    said = [told.get(key).decode() for key in keys]
    for key in keys:
        told.delete_key(key)
    for rank, one in enumerate(said):
        if one.startswith(_FAILED):
            raise OSError(f"rank {rank}: {one.removeprefix(_FAILED)}")
    return said


class _Writer:
    """Writes one state at a time on a thread; the state is copied first, into memory that is used again."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: list[Tensor] = []

    def start(self, state: T, write: Callable[[T], None]) -> None:
        thread = threading.Thread(target=self._run, args=(self._copy(state), write), name="camshaft-checkpoint")
        thread.start()
        self._thread = thread

    def wait(self) -> BaseException | None:
        """Wait for the present write, and return the error that it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _run(self, state: T, write: Callable[[T], None]) -> None:
        try:
            write(state)
        except BaseException as error:  # whatever it is, the training thread must see it
            self._error = error

    def _copy(self, state: T) -> T:
        places, self._buffers = iter(self._buffers), []

        def into_buffer(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided:  # as sparse gradients are: of another size each time
                return tensor.detach().cpu().clone()
            place = next(places, None)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                place = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers.append(place)
            return place.copy_(tensor.detach())

        copied: T = tree_map(into_buffer, state)
        return copied
