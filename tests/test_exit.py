"""A script's process ends when the script is through, however that comes about, and no loader's worker outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

# All of it is global, as in many a script, so the interpreter still holds the loaders when it exits.
SCRIPT = """
import ctypes, multiprocessing, os, shutil, signal, sys, threading, time
from torch.utils.data import DataLoader, Dataset
from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Engine

class Samples(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 10:  # in the third step a worker reads it already, and the run will soon wait for it
            {sample}
        return index

def step(engine, batch):
    if engine.step == 3 and engine.training:
        print("workers:", len(multiprocessing.active_children()), file=sys.stderr, flush=True)
        {step}

def run():
    sys.exit(engine.fit(train, val, epochs=2).exit_code)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    train = DataLoader(Samples(), batch_size=2, num_workers={workers}{options})
    val = DataLoader(Samples(), batch_size=2, num_workers=min(1, {workers}){options})
    engine = Engine(step, callbacks=[{callback}])
    {main}
"""
PERSISTENT = ", persistent_workers=True"
RAISES = "raise OSError('mine')"
SLEEPS = "time.sleep(60)"
# In native code, where no signal handler of Python's runs; as with a lock that was taken when its process was forked.
STUCK = "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
ENDED_BY = {signal.SIGTERM: [-signal.SIGTERM], signal.SIGINT: [-signal.SIGINT, 130]}  # 130: Python's other way
READY = "workers: {}\n"
Send = Callable[[int, int], None]


def end_of(
    directory: Path,
    *,
    step: str = "pass",
    sample: str = "pass",
    workers: int = 2,
    options: str = "",
    callback: str = "",
    main: Sequence[str] = ("run()",),
    signals: Sequence[signal.Signals] = (),
    send: Send = os.killpg,
    after: float = 0,
) -> tuple[int, str]:
    """Run the script with these parts, and return its exit code and stderr.

    The signals are sent ``after`` that many seconds in the third step. The script's stdout ends only when no process
    holds it open any longer, so a worker that stays fails this too.
    """
    script, err = directory / "script.py", directory / "stderr"
    parts = {"step": step, "sample": sample, "workers": workers, "options": options, "callback": callback}
    script.write_text(SCRIPT.format(**parts, main="\n    ".join(main)))
    with err.open("w") as stderr:
        process = start(script, stderr.fileno())
    ready = READY.format(workers)
    try:
        wait_for(ready, process, err)
        time.sleep(after)
        for number in signals:
            send(process.pid, number)
            wait_for("send it again to stop now", process, err)
        process.communicate(timeout=10)
    finally:
        leave_nothing_of(process)
    return process.returncode, err.read_text().replace(ready, "")


def start(script: Path, stderr: int) -> subprocess.Popen[bytes]:
    """Start the script in a process group of its own, and with one thread."""
    return subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )


def wait_for(text: str, process: subprocess.Popen[bytes], err: Path) -> None:
    """Wait until the process has written this."""
    deadline = time.monotonic() + 60
    while text not in err.read_text():
        assert process.poll() is None, err.read_text()
        assert time.monotonic() < deadline, err.read_text()
        time.sleep(0.02)


def leave_nothing_of(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and its workers, so that a test that fails leaves none."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("options", [PERSISTENT, pytest.param("", marks=pytest.mark.slow)])
def test_a_script_that_returns_ends(tmp_path: Path, options: str) -> None:
    assert end_of(tmp_path, options=options) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize(("step", "code"), [("pass", 0), (RAISES, 1)])
def test_a_script_ends_whatever_way_its_workers_were_started(
    tmp_path: Path, method: str, step: str, code: int
) -> None:
    options = f"{PERSISTENT}, multiprocessing_context='{method}'"
    assert end_of(tmp_path, step=step, options=options)[0] == code


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", PERSISTENT])
def test_an_error_in_the_step_ends_the_script(tmp_path: Path, options: str) -> None:
    code, err = end_of(tmp_path, step=RAISES, options=options)
    assert code == 1
    assert "OSError: mine" in err


def test_an_error_in_a_sample_ends_the_script(tmp_path: Path) -> None:
    """The traceback holds the iterator, and so its workers, to the end."""
    code, err = end_of(tmp_path, sample=RAISES)
    assert code == 1
    assert "OSError: mine" in err


def test_a_loop_left_by_break_ends_the_script(tmp_path: Path) -> None:
    loop = [
        "for epoch in engine.epochs(2):",
        "    batches = engine.train(train)",
        "    for batch in batches:",
        "        step(engine, batch)",
        "        if engine.step == 5: break",
        "    break",
    ]
    assert end_of(tmp_path, main=loop) == (0, "")


def test_a_worker_that_is_killed_ends_the_script(tmp_path: Path) -> None:
    """As the kernel does it when memory runs out, while the run waits for a batch of another worker."""
    kill = "threading.Timer(0.5, min(multiprocessing.active_children(), key=lambda worker: worker.pid).kill).start()"
    code, err = end_of(tmp_path, step=kill, sample=SLEEPS)
    assert code == 1
    assert "killed by signal: Killed" in err


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, os.killpg),
        pytest.param(signal.SIGINT, os.killpg, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, os.kill, marks=pytest.mark.slow),
    ],
)
def test_one_signal_ends_the_script_with_its_code(tmp_path: Path, number: signal.Signals, send: Send) -> None:
    """To the process group, and so to the workers, or to the process alone."""
    code, err = end_of(tmp_path, step="time.sleep(1)", options=PERSISTENT, signals=[number], send=send)
    assert code == 128 + number
    assert err == f"\n{number.name}: finishing the step; send it again to stop now.\n"


@pytest.mark.parametrize("sample", [STUCK, pytest.param(SLEEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("send", [os.killpg, pytest.param(os.kill, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_script_that_waits_for_a_worker(
    tmp_path: Path, number: signal.Signals, send: Send, sample: str
) -> None:
    """A second after the third step, the run stands in the loader, whose traceback then holds the workers."""
    code, err = end_of(tmp_path, sample=sample, signals=[number, number], send=send, after=1)
    assert code in ENDED_BY[number]
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [STUCK, SLEEPS])
def test_a_script_may_go_on_after_the_second_ctrl_c(tmp_path: Path, sample: str) -> None:
    """No error about its workers gets in its way, and torch can end them with the pass."""
    main = [
        "try: run()",
        "except KeyboardInterrupt: pass",
        "time.sleep(0.5)",
        "sys.exit(len(multiprocessing.active_children()))",
    ]
    code, err = end_of(tmp_path, main=main, sample=sample, signals=[signal.SIGINT] * 2, after=1)
    assert (code, "Error" in err) == (0, False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_script_in_a_step_that_hangs(tmp_path: Path, number: signal.Signals) -> None:
    code, err = end_of(tmp_path, step=SLEEPS, signals=[number, number])
    assert code in ENDED_BY[number]
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


@pytest.mark.slow
def test_a_run_in_a_process_of_multiprocessing_ends(tmp_path: Path) -> None:
    """Also if it was forked from one that has had a run of its own."""
    main = [
        "engine.fit(DataLoader(Samples(), num_workers=1), max_steps=1)",
        "child = multiprocessing.get_context('fork').Process(target=run)",
        "child.start()",
        "child.join()",
        "sys.exit(child.exitcode)",
    ]
    assert end_of(tmp_path, main=main, options=PERSISTENT) == (0, "")


class Way(NamedTuple):
    """A way to end: the script's parts, its exit code, and what it says on stderr."""

    code: int
    says: str = ""
    step: str = "pass"
    main: Sequence[str] = ("run()",)
    signals: Sequence[signal.Signals] = ()


SPOIL = "time.sleep(0.2); shutil.rmtree('{directory}'); open('{directory}', 'w').close()"
WAYS = {
    "return": Way(0),
    "exception": Way(1, "OSError: mine", step=RAISES),
    "sys.exit": Way(7, step="sys.exit(7)"),
    "signal": Way(143, "SIGTERM: finishing the step", step="time.sleep(1)", signals=[signal.SIGTERM]),
    "second signal": Way(-signal.SIGTERM, "SIGTERM", step=SLEEPS, signals=[signal.SIGTERM] * 2),
    "failed save": Way(1, "NotADirectoryError", step=SPOIL),
    "refused resume": Way(  # when the workers of an earlier run are there
        1,
        "There is no checkpoint at missing",
        main=["engine.fit(train, val, epochs=1)", "engine.fit(train, val, epochs=1, resume='missing')"],
    ),
}
IN_THE_FAST_SUITE = [("failed save", -2, True), ("refused resume", -2, True)]
EVERY_WAY = [(way, workers, background) for way in WAYS for workers in (0, 2, -2) for background in (True, False)]


@pytest.mark.parametrize(
    ("way", "workers", "background"),
    [pytest.param(*case, marks=[] if case in IN_THE_FAST_SUITE else pytest.mark.slow) for case in EVERY_WAY],
)
def test_every_way_to_end_ends_the_script(tmp_path: Path, way: str, workers: int, background: bool) -> None:
    """With checkpoints after each step, and with no workers, with some, or with persistent ones (-2)."""
    directory = tmp_path / "checkpoints"
    code, says, step, main, signals = WAYS[way]
    ended, err = end_of(
        tmp_path,
        step=step.format(directory=directory),
        workers=abs(workers),
        options=PERSISTENT if workers < 0 else "",
        callback=f"RunCheckpoint({str(directory)!r}, every_steps=1, background={background})",
        main=main,
        signals=signals,
    )
    assert (ended, says in err) == (code, True), err
