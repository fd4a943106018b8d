"""The progress bar, on a real pseudo-terminal, on a pipe and in a file."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyte
import pytest
import torch
from helpers import class_batches, make_trainer, refused, run_python

from camshaft.callbacks import ProgressBar, RunCheckpoint
from camshaft.engine import ConfigurationError, Engine, StepEnd, Trainer, ValidationStepEnd, at

BATCH = torch.zeros(1)
SCRIPT = """
import sys, time
import torch
from camshaft.callbacks import ProgressBar
from camshaft.engine import Engine
def step(engine, batch):
    time.sleep(0.0002)
    return {"loss": 1 / engine.epoch}
data = [torch.zeros(1)] * 2000
engine = Engine(step, callbacks=[ProgressBar()])
began = time.monotonic()
engine.fit(data, data[:1000], epochs=2)
print(time.monotonic() - began)
"""


class Terminal:
    """A pseudo-terminal of some size, and all that was written to it."""

    def __init__(self, columns: int = 100, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.file = open(slave, "w", encoding="utf-8")  # noqa: SIM115  # closed by `text`
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how a terminal says that nobody holds it open any more
            while chunk := os.read(self._master, 65536):
                self._written += chunk

    def text(self) -> str:
        """Close the terminal and return what it was sent."""
        self.file.close()
        self._reader.join()
        os.close(self._master)
        return self._written.decode()

    def screens(self) -> list[list[str]]:
        """Close the terminal and return what it showed after each piece that was sent, without empty lines."""
        screen = pyte.Screen(self.columns, self.rows)
        stream = pyte.Stream(screen)
        shown = []
        for piece in re.split(r"(?=\r)", self.text()):
            stream.feed(piece)
            shown.append([line.rstrip() for line in screen.display if line.strip()])
        return shown


Watched = tuple[list[list[str]], float]


@pytest.fixture(scope="module")
def watched() -> Watched:
    """The screens and the seconds of a script that runs two epochs of 2,000 fast steps on a terminal."""
    terminal = Terminal()
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal.file
    )
    seconds = float(script.communicate(timeout=120)[0])
    return terminal.screens(), seconds


def is_bar(line: str) -> bool:
    return "it/s" in line or "s/it" in line or "%|" in line


def slow_engine(terminal: Terminal, seconds: float = 0.01) -> Engine:
    """An engine whose steps take a while, with a bar that repaints at each of them."""

    def step(engine: Engine, batch: torch.Tensor) -> dict[str, float]:
        time.sleep(seconds)
        return {"loss": 1.0}

    return Engine(step, callbacks=[ProgressBar(repaint_seconds=0.001, file=terminal.file)])


def test_at_the_end_each_epoch_has_one_line_and_no_bar_is_left(watched: Watched) -> None:
    """Nothing else stands on the screen but why the run ended."""
    number = r"\d\.\d"
    expected = [
        rf"epoch 1/2  train_loss 1.0000  val_loss 1.0000  {number}s",
        rf"epoch 2/2  train_loss 0.5000  val_loss 0.5000  {number}s",
        r"2 epochs done",
    ]
    last = watched[0][-1]
    assert len(last) == 3
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, last, strict=True)), last


def test_bars_repaint_by_the_clock_and_not_by_the_step(watched: Watched) -> None:
    """6,000 steps in some two seconds make about ten pictures a second."""
    screens, seconds = watched
    pictures = sum(before != after and is_bar(after[-1]) for before, after in pairwise(screens) if after)
    assert 2 * seconds < pictures < 10 * seconds + 10


def test_the_validation_bar_stands_below_the_epochs(watched: Watched) -> None:
    """Always directly below it, with its own values, and never without it."""
    nested = [screen for screen in watched[0] if any("validation" in line for line in screen)]
    assert len(nested) > 5
    for screen in nested:
        assert screen[-2].startswith("epoch")
        assert "2000/2000" in screen[-2]
        assert is_bar(screen[-2])
        assert screen[-1].startswith("  validation:")
    assert all("val_loss" in screen[-1] for screen in nested[1:-1] if "1000]" in screen[-1])


def test_there_is_one_bar_for_each_level_and_it_only_moves_on(watched: Watched) -> None:
    """At most two bars at a time, and the count of an epoch's bar never falls."""
    counts: dict[str, list[int]] = {"epoch 1/2": [], "epoch 2/2": []}
    for screen in watched[0]:
        assert sum(map(is_bar, screen)) <= 2
        for line in screen:
            if match := re.match(r"(epoch ./2): .* (\d+)/2000\b.*train_loss", line):
                counts[match[1]].append(int(match[2]))
    assert all(len(numbers) > 5 and numbers == sorted(numbers) for numbers in counts.values())


def test_a_bar_shows_the_length_from_its_first_picture_on(watched: Watched) -> None:
    """The length of a list or a loader is known before its first batch: no "0it [00:00, ?it/s]"."""
    assert not [line for screen in watched[0] for line in screen if re.search(r": 0it \[", line)]


@pytest.mark.parametrize("event", [StepEnd, ValidationStepEnd])
def test_a_failure_leaves_no_bar_behind(event: type[StepEnd | ValidationStepEnd]) -> None:
    """In mid-epoch or in mid-validation of epoch 2: the screen has the first epoch and what went wrong."""
    terminal = Terminal()
    engine = slow_engine(terminal)
    engine.subscribe(event, lambda event: 1 / 0, when=lambda count: engine.epoch == 2 and count % 5 == 3)
    with pytest.raises(ZeroDivisionError):
        engine.fit([BATCH] * 5, [BATCH] * 5, epochs=3)
    screens = terminal.screens()
    assert max(sum(map(is_bar, screen)) for screen in screens) == 2
    assert [line[:9] for line in screens[-1]] == ["epoch 1/3", "failed wi"]


def test_a_loop_that_the_user_leaves_leaves_no_bar_behind() -> None:
    """In the script style, by a break."""
    terminal = Terminal()
    engine = Engine(callbacks=[ProgressBar(repaint_seconds=0.001, file=terminal.file)])
    for _ in engine.epochs(5):
        for _ in engine.train([BATCH] * 5):
            time.sleep(0.01)
            engine.record(loss=1.0)
        break
    screens = terminal.screens()
    assert any(is_bar(line) for screen in screens for line in screen)
    assert screens[-1] == ["the loop was left in epoch 1"]


def test_after_a_validation_in_mid_epoch_the_epochs_bar_goes_on() -> None:
    """The validation's bar is gone, the epoch's is where it was."""
    terminal = Terminal()
    slow_engine(terminal).fit([BATCH] * 9, [BATCH] * 3, epochs=1, validate_every="3 steps")
    screens = terminal.screens()
    after = [screen for screen in screens if len(screen) == 1 and re.search(r"\b[78]/9\b", screen[0])]
    assert after
    assert any("validation" in line for screen in screens for line in screen)
    assert [line[:9] for line in screens[-1]] == ["epoch 1/1", "1 epoch d"]


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_in_a_narrow_window_bars_keep_to_their_lines(columns: int) -> None:
    """However narrow: a bar is cut and not wrapped, and none of it is left over at the end."""
    terminal = Terminal(columns)
    slow_engine(terminal).fit([BATCH] * 5, [BATCH] * 5, epochs=2)
    screens = terminal.screens()
    for screen in screens:
        assert sum(map(is_bar, screen)) <= 2
    joined = "".join(line.ljust(columns) for line in screens[-1])
    assert joined.count("epoch ") == 2
    assert not is_bar(joined)


def test_log_lines_stand_above_the_bars_and_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a run directory, what is logged in mid-epoch and in mid-validation is on the terminal, each on its line."""
    from camshaft.callbacks import RunDirectory

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.file)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    engine = slow_engine(terminal)
    engine.attach(RunDirectory(tmp_path))
    mine = logging.getLogger("mine")
    engine.subscribe(StepEnd, lambda event: mine.info("in step %d", engine.step), when=at(3))
    engine.subscribe(ValidationStepEnd, lambda event: mine.info("in validation"), when=at(3))
    engine.fit([BATCH] * 5, [BATCH] * 5, epochs=1)
    lines = terminal.screens()[-1]
    assert not any(map(is_bar, lines))
    assert [line for line in lines if line.startswith(("in", "epoch", "1 ep"))] == [
        "in step 3", "in validation", *[line for line in lines if line.startswith("epoch")], "1 epoch done",
    ]  # fmt: skip
    assert sum(line.startswith("epoch") for line in lines) == 1


def test_on_a_pipe_there_is_one_plain_line_per_epoch() -> None:
    """No carriage return and no escape code: what a cluster's log file wants to hold."""
    run = run_python(SCRIPT.replace("0.0002", "0.00001"))
    assert run.returncode == 0, run.stderr
    assert "\r" not in run.stderr
    assert "\x1b" not in run.stderr
    first, second, reason = run.stderr.splitlines()
    assert first.startswith("epoch 1/2  train_loss 1.0000  val_loss 1.0000  ")
    assert second.startswith("epoch 2/2  train_loss 0.5000  val_loss 0.5000  ")
    assert reason == "2 epochs done"


def lines_of(trainer: Engine, file: io.StringIO, *data: object, **settings: int) -> list[str]:
    """Return what a fit writes to a file that is no terminal."""
    trainer.attach(ProgressBar(file=file, line_seconds=0.1))
    trainer.fit(*data, **settings)  # type: ignore[arg-type]  # the tests' own data
    return file.getvalue().splitlines()


def test_a_long_epoch_writes_a_line_now_and_then() -> None:
    """Every line_seconds, here a tenth: some five in half a second, with the step and the averages so far."""

    def step(engine: Engine, batch: torch.Tensor) -> dict[str, float]:
        time.sleep(0.01)
        return {"loss": float(engine.step)}

    engine = Engine(step)
    began = time.monotonic()
    lines = lines_of(engine, io.StringIO(), [BATCH] * 50, epochs=1)
    seconds = time.monotonic() - began
    within = [re.fullmatch(r"epoch 1/1  step (\d+)/50  train_loss ([\d.]+)", line) for line in lines[:-2]]
    assert 2 <= len(within) <= 10 * seconds
    for match in within:
        assert match is not None
        assert float(match[2]) == (int(match[1]) + 1) / 2  # the mean of 1 ... step


def test_where_the_length_is_unknown_no_length_is_made_up() -> None:
    """A generator, and a run by steps: neither a last epoch nor a last step is shown."""

    def slowly() -> Iterator[torch.Tensor]:
        for _ in range(10):
            time.sleep(0.02)
            yield BATCH

    lines = lines_of(Engine(lambda engine, batch: {"loss": 1.0}), io.StringIO(), slowly, max_steps=20)
    assert re.fullmatch(r"epoch 1  step \d+  train_loss 1\.0000", lines[0])
    assert lines[-2].startswith("epoch 2  train_loss")
    assert lines[-1] == "max_steps=20 reached"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.nan, "nan"), (math.inf, "inf"), (0.0, "0.0000"), (1.23456e-7, "1.235e-07"), (123456.0, "1.235e+05"),
     (-0.5, "-0.5000"), (99.99999, "100.0000")],
)  # fmt: skip
def test_a_value_is_shown_as_what_it_is(value: float, shown: str) -> None:
    """NaN as NaN; four decimals, or four digits where those would say nothing."""
    engine = Engine(lambda engine, batch: {"loss": value})
    assert lines_of(engine, io.StringIO(), [BATCH], epochs=1)[0].startswith(f"epoch 1/1  train_loss {shown}  ")


def test_the_lines_show_the_values_of_the_history() -> None:
    """Those of the whole epoch, and in the history's order."""
    file = io.StringIO()
    trainer = make_trainer(ProgressBar(file=file))
    history = trainer.fit(class_batches(8, 8, 3), class_batches(16), epochs=3)
    *lines, _ = file.getvalue().splitlines()
    for line, train, val in zip(lines, history["train_loss"], history["val_loss"], strict=True):
        assert re.search(rf"  train_loss {train:.4f}  val_loss {val:.4f}[* ] ", line)


def test_the_numbers_of_many_epochs_stand_in_one_column() -> None:
    """Epoch 9 of 10 is padded, so that the values of all lines are one below the other."""
    lines = lines_of(Engine(lambda engine, batch: {"loss": 1.0}), io.StringIO(), [BATCH], epochs=10)
    assert {line.index("train_loss") for line in lines[:-1]} == {len("epoch 10/10  ")}
    assert lines[8].startswith("epoch  9/10")


def test_a_second_fit_counts_on() -> None:
    """Its epochs are numbered from where the first ended."""
    file = io.StringIO()
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[ProgressBar(file=file)])
    engine.fit([BATCH], epochs=1)
    engine.fit([BATCH], epochs=2)
    assert [line[:9] for line in file.getvalue().splitlines()] == [
        "epoch 1/1", "1 epoch d", "epoch 2/3", "epoch 3/3", "2 epochs ",
    ]  # fmt: skip


def test_evaluate_and_predict_write_nothing() -> None:
    """A bar is for a run."""
    file = io.StringIO()
    trainer = make_trainer(ProgressBar(file=file))
    trainer.evaluate(class_batches(8))
    trainer.predict(class_batches(8))
    assert file.getvalue() == ""


def test_a_bar_changes_no_weight() -> None:
    """A run on a terminal with a repaint at each step is the run without a bar, to the bit."""
    terminal = Terminal()
    watched, plain = make_trainer(ProgressBar(repaint_seconds=1e-6, file=terminal.file)), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(class_batches(8, 8, 3), class_batches(8), epochs=2)
    assert len(terminal.screens()[-1]) == 3
    for mine, other in zip(watched.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


CLOSED = """
import os, sys
import torch
from camshaft.callbacks import ProgressBar
from camshaft.engine import Engine, EpochEnd, at
engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[ProgressBar()])
read, write = os.pipe()
os.dup2(write, 2)
os.close(write)
engine.subscribe(EpochEnd, lambda event: os.close(read), when=at(2))
engine.fit([torch.zeros(1)], epochs=5)
print(engine.epoch)
"""


def test_a_reader_that_went_away_does_not_end_the_training() -> None:
    """train.py 2>&1 | head, or a closed terminal: showing progress is not worth a run."""
    run = run_python(CLOSED)
    assert run.stdout == "5\n"


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"repaint_seconds": 0}, "every_seconds(0)"),
        ({"line_seconds": -1}, "every_seconds(-1)"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        ProgressBar(**settings)


def test_an_epoch_that_is_resumed_shows_the_time_since_the_run_was_resumed(tmp_path: Path) -> None:
    cut = make_trainer(RunCheckpoint(tmp_path))
    cut.subscribe(StepEnd, lambda event: os.kill(os.getpid(), signal.SIGTERM), when=at(2))
    cut.fit(class_batches(4, 4, 4), epochs=1)
    file = io.StringIO()
    make_trainer(RunCheckpoint(tmp_path), ProgressBar(file=file)).fit(class_batches(4, 4, 4), epochs=1, resume="auto")
    seconds = re.search(r"^epoch 1/1 .* ([\d.]+)s$", file.getvalue(), re.MULTILINE)
    assert seconds is not None
    assert float(seconds[1]) < 60


def validated(values: list[float], **settings: Any) -> str:
    """Return what a run writes whose validations give these values, once as a loss and once as an accuracy."""
    file = io.StringIO()
    engine = Engine(
        lambda engine, batch: (
            {"loss": 1.0, "score": 1.0}
            if engine.training
            else {"loss": values[engine.num_validations - 1], "score": values[engine.num_validations - 1]}
        ),
        callbacks=[ProgressBar(file=file)],
    )
    engine.stages.declare("loss", higher_is_better=False)
    engine.stages.declare("score", higher_is_better=True)
    engine.fit([BATCH] * 4, [BATCH], **{"epochs": len(values), **settings})
    return file.getvalue()


def stars(text: str, name: str) -> list[bool]:
    return [bool(star) for star in re.findall(rf"{name} \S+?(\*?) ", text)]


def test_a_star_marks_a_value_that_is_better_than_all_before_it() -> None:
    """Not the first one, of which that says nothing; not an equal one; never NaN."""
    text = validated([5.0, 4.0, 4.0, 6.0, math.nan, 3.0])
    assert stars(text, "val_loss") == [False, True, False, False, False, True]
    assert stars(text, "val_score") == [False, False, False, True, False, False]
    assert stars(text, "train_loss") == [False] * 6
    lines = text.splitlines()[:4]
    assert len({line.index("val_score") for line in lines}) == 1, "the columns stay columns"


def test_of_several_validations_in_an_epoch_the_line_shows_the_last_and_marks_that_one_alone() -> None:
    text = validated([5.0, 1.0, 2.0, 0.5], epochs=2, validate_every="2 steps")
    assert stars(text, "val_loss") == [True, True]
    assert stars(validated([5.0, 1.0, 2.0, 3.0], epochs=2, validate_every="2 steps"), "val_loss") == [True, False]


def test_a_resumed_run_knows_the_best_of_the_run_before(tmp_path: Path) -> None:
    losses = iter([5.0, 2.0, 3.0, 1.0])
    written = []
    for epochs in (2, 4):
        file = io.StringIO()
        engine = Engine(lambda engine, batch: None if engine.training else {"loss": next(losses)})
        engine.stages.declare("loss", higher_is_better=False)
        for callback in (ProgressBar(file=file), RunCheckpoint(tmp_path)):
            engine.attach(callback)
        engine.fit([BATCH], [BATCH], epochs=epochs, resume="auto")
        written.append(stars(file.getvalue(), "val_loss"))
    assert written == [[False, True], [False, True]]


@pytest.mark.parametrize("no_color", [None, "", "1"])
def test_a_best_value_is_green_on_a_terminal_and_never_with_no_color(
    no_color: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal = Terminal()
    losses = iter([2.0, 1.0])
    engine = Engine(lambda engine, batch: None if engine.training else {"loss": next(losses)})
    engine.stages.declare("loss", higher_is_better=False)
    engine.attach(ProgressBar(file=terminal.file))
    engine.fit([BATCH], [BATCH], epochs=2)
    text = terminal.text()
    assert ("\033[32mval_loss 1.0000*\033[0m" in text) == (not no_color)
    assert "val_loss 1.0000*" in text
    assert "\033[32m" not in validated([2.0, 1.0]), "a file has no colours"


def test_a_bar_shows_the_learning_rate_and_the_samples_in_a_second() -> None:
    """As many as were trained, within what a repaint can know; a validation does not slow them down."""
    terminal = Terminal(columns=140)

    def slow(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return torch.nn.functional.cross_entropy(output, target)

    model = torch.nn.Linear(4, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.0125), slow)
    trainer.attach(ProgressBar(repaint_seconds=0.05, file=terminal.file))
    trainer.fit(class_batches(*[8] * 40), class_batches(*[8] * 20), epochs=2)
    lines = [line for screen in terminal.screens() for line in screen if "lr 0.0125" in line]
    assert len(lines) > 4
    speeds = [float(found[1].replace(",", "")) for line in lines if (found := re.search(r"([\d,]+) samples/s", line))]
    assert len(speeds) > 4
    assert all(100 <= speed <= 400 for speed in speeds), speeds


def test_a_batch_without_samples_is_counted_in_steps() -> None:
    terminal = Terminal(columns=140)
    engine = Engine(
        lambda engine, batch: time.sleep(0.02), callbacks=[ProgressBar(repaint_seconds=0.01, file=terminal.file)]
    )
    engine.fit(["text"] * 20, epochs=1)
    assert re.search(r"\d+\.\d steps/s", terminal.text())
