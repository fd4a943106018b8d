"""One step of a run, made again in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .difference import Difference, Rows, difference, rows_of
from .run import Run

VARIABLE = "CAMSHAFT_TRIAL"  # see engine/trial.py, which cannot be imported here


class CannotReplayError(Exception):
    """A step cannot be made again, with what to write instead."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of making a step again.

    Args:
        step: its number.
        told: what the process has told: where it began, whether it has made the step, and what it has seen.
        exit_code: of the process.
        difference: between the digests of the run and those of the steps that were made again; None if the run has
            no digests.
        compared: the steps of which both have digests.
    """

    step: int
    told: dict[str, Any]
    exit_code: int
    difference: Difference | None
    compared: tuple[int, ...]

    @property
    def is_good(self) -> bool:
        """Whether the step was made again, and no digest differs."""
        return self.told.get("made") in ("whole", "in part") and (
            self.difference is None or self.difference.step is None
        )

    def in_words(self) -> str:
        """Return what was seen and compared, as text."""
        reasons = " ".join(self.told.get("reasons", []))
        if "made" not in self.told:
            text = f"The command ended with exit code {self.exit_code} and has not made step {self.step} again."
            return f"{text} {reasons}".rstrip() + " Look at what it printed above."
        if self.told["made"] == "left out":
            return f"Step {self.step} was left out by a handler: nothing was computed in it. Pass another step."
        began_at = self.told["began_at"]
        if began_at is None:
            begin = "from the beginning, which repeats the run exactly only if the script sets a seed"
        else:
            begin = f"from the checkpoint at step {began_at}"
        return "\n\n".join([f"Step {self.step} was made again, {begin}.", *self.told["findings"], self._verdict()])

    def _verdict(self) -> str:
        if self.difference is None:
            return "The run has no digests to compare with. Attach Fingerprint(every=...) to have them."
        if self.difference.step is not None:
            return f"It is not the step of the run. {self.difference.in_words()}"
        why = "" if self.told["made"] == "whole" else ", as it has ended before they were complete"
        if not self.compared:
            return f"None of the steps that were made again has digests to compare{why}."
        text = f"The digests of the {len(self.compared)} steps that both have are the same, bit for bit"
        if self.compared[-1] == self.step:
            return f"{text}: it is the step of the run."
        return f"{text}, up to step {self.compared[-1]}. Step {self.step} itself has none to compare{why}."


def replay(
    run: Run, step: int, command: Sequence[str] = (), *, debug: bool = False, anomaly: bool = True,
    hook: str | None = None,
) -> Replayed:  # fmt: skip
    """Make a step of a run again: run a command with all files of its run led elsewhere, and compare digests.

    Args:
        run: the run; nothing in its directory is changed.
        step: the number of the step.
        command: what started the run; by default what the run has kept.
        debug: whether Python's debugger stops in the step.
        anomaly: whether torch looks for the operation whose gradient is NaN.
        hook: "file.py:function", called just before the step's batch is used.

    Raises:
        CannotReplayError: if the step is after the run's last one, there is no command, or it cannot be started.
    """
    _check_step(run, step)
    directory = None
    if not command:
        command, directory = _kept_command(run)
    with tempfile.TemporaryDirectory(prefix="camshaft-replay-") as scratch:
        trial = {
            "kind": "replay", "directory": scratch, "run": str(run.path.resolve()), "step": step,
            "checkpoints": _checkpoint_directories(run),
            "debug": debug, "anomaly": anomaly, "hook": None if hook is None else _checked_hook(hook),
        }  # fmt: skip
        exit_code = _run(command, directory, {**os.environ, VARIABLE: json.dumps(trial)})
        report = Path(scratch) / "replay.json"
        told = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        theirs: Rows = {}
        for file in sorted(Path(scratch).rglob("fingerprints.jsonl"), key=lambda file: file.stat().st_mtime):
            theirs = rows_of(file.read_text(encoding="utf-8"))
    ours = rows_of(run.text("fingerprints.jsonl"))
    compared = tuple(sorted(number for number in ours.keys() & theirs.keys() if number <= step))
    found = difference(ours, {number: theirs[number] for number in compared}) if ours else None
    return Replayed(step, told, exit_code, found, compared)


def _check_step(run: Run, step: int) -> None:
    last = max((int(moment["step"]) for moment in run.moments), default=0)
    if step > last and run.status in ("ended", "failed", "interrupted"):
        raise CannotReplayError(f"{run.path} ended after step {last}, before step {step}. Pass --step {last} or less.")


def _kept_command(run: Run) -> tuple[list[str], str]:
    """Return the command that started a run, and the directory in which it was started."""
    command, directory = run.environment.get("full_command"), run.environment.get("directory")
    advice = f"Write it after the options: camshaft replay {run.path} --step N -- python train.py ..."
    if not isinstance(command, list) or not isinstance(directory, str):
        raise CannotReplayError(f"{run.path} does not say which command started it. {advice}")
    if run.environment.get("ranks") != 1:
        raise CannotReplayError(f"{run.path} is of several ranks, and does not say what launched them. {advice}")
    if any("***" in argument for argument in command):
        raise CannotReplayError(f"{run.path} does not keep the secret that its command had. {advice}")
    if any("ipykernel" in argument for argument in command):
        raise CannotReplayError(f"{run.path} was started in a notebook. {advice.replace('it', 'a command', 1)}")
    if not Path(directory).is_dir():
        raise CannotReplayError(f"{directory}, in which {run.path} was started, does not exist. {advice}")
    return [str(argument) for argument in command], directory


def _checkpoint_directories(run: Run) -> list[str]:
    """Return where checkpoints of the run may be: those that are kept for a replay, and its own."""
    own = run.path / (run.checkpoints or "checkpoints")  # of an absolute path, that path
    return [str((run.path / "replay").resolve()), str(own.resolve())]


def _checked_hook(hook: str) -> str:
    path, colon, name = hook.rpartition(":")
    if not colon or not Path(path).is_file() or not name.isidentifier():
        raise CannotReplayError(f"--hook is {hook}, which names no function of a file. Write --hook file.py:function.")
    return f"{Path(path).resolve()}:{name}"


def _run(command: Sequence[str], directory: str | None, environment: dict[str, str]) -> int:
    """Run a command in this terminal, and return its exit code."""
    try:
        child = subprocess.Popen(command, cwd=directory, env=environment)
    except OSError as error:
        raise CannotReplayError(
            f"{command[0]} could not be started: {error.strerror}. Write another command."
        ) from error
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the child, which gets it, too
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        if child.poll() is None:
            child.terminate()
            child.wait()
