"""What torchrun does with the ranks of a run: it forwards signals, restarts them, and takes them down at the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from camshaft.callbacks import RunCheckpoint

pytestmark = pytest.mark.slow  # each launch takes some seconds

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from camshaft.callbacks import Distributed, RunCheckpoint
from camshaft.engine import StepEnd, Trainer

torch.set_num_threads(1)
directory, rank = Path(sys.argv[1]), os.environ["RANK"]
(directory / f"pid-{rank}").write_text(str(os.getpid()))
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)).double()
inputs = torch.randn(90, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
engine = Trainer(
    net,
    torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
    nn.CrossEntropyLoss(),
    callbacks=[Distributed(timeout=60), RunCheckpoint(directory / "checkpoints", every_steps=1)],
    seed=5,
)
steps = open(directory / f"steps-{rank}", "a")

@engine.on(StepEnd)
def pause(event):
    print(engine.step, file=steps, flush=True)
    time.sleep(float(sys.argv[2]))

history = engine.fit(DataLoader(data, 8, shuffle=True), DataLoader(data, 8), epochs=3, resume="auto")
result = {"weights": net.state_dict(), "rows": history.rows, "exit_code": history.exit_code, "step": engine.step}
torch.save(result, directory / f"result-{rank}")
raise SystemExit(history.exit_code)
"""


ONE_HOST = ("--standalone", "--nproc-per-node", "2")


class Launch:
    """torchrun, running the script above on two ranks of this host, or on those that ``hosts`` say."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        pause: float = 0.0,
        hosts: Sequence[str] = ONE_HOST,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        (directory / "script.py").write_text(SCRIPT)
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *hosts, *options]
        self.process = subprocess.Popen(
            [*command, str(directory / "script.py"), str(directory), str(pause)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """Wait for its end; return its exit code, and what it and its ranks have printed."""
        try:
            printed, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            printed, _ = self.process.communicate()
            pytest.fail(f"torchrun has not ended after {timeout:g} s: {printed}")
        return self.process.returncode, printed

    def wait_for_step(self, rank: int, number: int) -> None:
        """Wait until a rank has made so many steps, in all attempts together."""
        wait_until(lambda: len(self.lines(f"steps-{rank}")) >= number or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()[1]

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def kill(self, rank: int) -> None:
        """Kill a rank."""
        os.kill(int(self.lines(f"pid-{rank}")[0]), signal.SIGKILL)

    def result(self, rank: int) -> dict[str, Any]:
        result: dict[str, Any] = torch.load(self.directory / f"result-{rank}", weights_only=False)
        return result


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, f"nothing has happened for {seconds:g} s"
        time.sleep(0.01)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights and history are the same to the bit."""
    assert one["rows"] == other["rows"]
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(weights, other["weights"][name]) for name, weights in one["weights"].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run reaches that nothing cuts; it must end well, without a word about its group."""
    launch = Launch(tmp_path_factory.mktemp("whole") / "run")
    code, printed = launch.end()
    assert code == 0, printed
    assert "Warning" not in printed
    assert "destroy_process_group" not in printed
    assert_same(launch.result(0), launch.result(1))
    return launch.result(0)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_leaves_a_checkpoint_of_one_step(
    name: signal.Signals, whole: dict[str, Any], tmp_path: Path
) -> None:
    cut = Launch(tmp_path / "run", pause=0.02)
    cut.wait_for_step(0, 5)
    sent = time.monotonic()
    cut.process.send_signal(name)
    code, printed = cut.end()
    assert time.monotonic() - sent < 20, printed
    assert code == 1, printed  # torchrun's own
    assert [cut.result(rank)["exit_code"] for rank in range(2)] == [128 + name] * 2
    newest = RunCheckpoint(tmp_path / "run" / "checkpoints").checkpoints.load_newest()
    assert newest is not None
    assert [cut.result(rank)["step"] for rank in range(2)] == [newest[0]["counters"]["step"]] * 2
    again = Launch(tmp_path / "run")
    assert again.end()[0] == 0
    assert_same(again.result(1), whole)


def test_torchrun_restarts_ranks_that_were_killed_and_nothing_shows_it(whole: dict[str, Any], tmp_path: Path) -> None:
    """Six kills of random ranks at random moments; each attempt continues from the newest checkpoint."""
    draw, launch = random.Random(0), Launch(tmp_path / "run", "--max-restarts", "6", pause=0.02)
    for _ in range(6):
        rank = draw.randrange(2)
        launch.wait_for_step(rank, len(launch.lines(f"steps-{rank}")) + draw.randint(1, 6))
        time.sleep(draw.random() * 0.05)
        launch.kill(rank)
    code, printed = launch.end()
    assert code == 0, printed
    assert_same(launch.result(0), whole)
    assert_same(launch.result(1), whole)


def test_no_normal_end_is_an_abort(whole: dict[str, Any], tmp_path: Path) -> None:
    for number in range(24):
        launch = Launch(tmp_path / str(number))
        code, printed = launch.end()
        assert code == 0, printed
        assert "Warning" not in printed
        assert_same(launch.result(1), whole)


ADDRESSES = ("10.213.77.1", "10.213.77.2")


def run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, each with a device named ``eth``: their names."""
    names = [f"camshaft-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            run_ip("netns", "add", name)
        run_ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run_ip("-n", name, "address", "add", f"{address}/24", "dev", "eth")
            for device in ("eth", "lo"):
                run_ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def can_make_hosts() -> bool:
    try:
        with two_hosts():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def test_two_hosts_train_together_and_survive_a_kill(whole: dict[str, Any], tmp_path: Path) -> None:
    """Each host starts torchrun with one rank; a rank is killed, and both continue from the newest checkpoint."""
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29477", "--rdzv-id", "two-hosts")
    hosts = ("--nnodes", "2", "--nproc-per-node", "1", *meeting)
    with two_hosts() as names:
        launches = [
            Launch(
                tmp_path / "run",
                "--max-restarts",
                "3",
                pause=0.05,
                hosts=(*hosts, "--local-addr", address, "--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}"),
                prefix=("ip", "netns", "exec", name),
                environment={"GLOO_SOCKET_IFNAME": "eth"},
            )
            for name, address in zip(names, ADDRESSES, strict=True)
        ]
        try:
            launches[0].wait_for_step(1, 6)
            launches[0].kill(1)
            ends = [launch.end() for launch in launches]
        finally:
            for launch in launches:
                launch.process.kill()
        assert [code for code, _ in ends] == [0, 0], ends
    steps = launches[0].lines("steps-1")
    assert len(set(steps)) == 36  # of three epochs, and they were not begun again from the first one
    assert len(steps) < 36 + 6
    for rank in range(2):
        assert_same(launches[0].result(rank), whole)
