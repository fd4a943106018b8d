"""One step of a run made again by ``camshaft replay``: real scripts, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import class_batches, make_trainer

from camshaft.callbacks import RunCheckpoint, RunDirectory, StopOnNonFinite
from camshaft.engine import DataError, Engine, checkpoint_files
from camshaft.engine.trial import VARIABLE as VARIABLE_OF_ENGINE
from camshaft.viewer import Run
from camshaft.viewer.replay import VARIABLE, CannotReplayError, replay

COMMAND = Path(sys.executable).with_name("camshaft")
SCRIPT = """
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from camshaft.callbacks import Accumulate, Fingerprint, RunCheckpoint, RunDirectory, StopOnNonFinite
from camshaft.engine import BatchReady, Engine, Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--style", default="trainer")
parser.add_argument("--seed", type=int)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--window", type=int, default=1)
parser.add_argument("--drop", type=float, default=0.2)
parser.add_argument("--nan-at", type=int)
parser.add_argument("--fail-at", type=int)
parser.add_argument("--break-at", type=int)
parser.add_argument("--skip-at", type=int)
parser.add_argument("--save-every", type=int, default=10)
parser.add_argument("--keep", type=int, default=100)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--policy")
parser.add_argument("--another-fit", action="store_true")
parser.add_argument("--plain", action="store_true")
args = parser.parse_args()


class Samples(Dataset):
    def __len__(self):
        return 80

    def __getitem__(self, index):
        noise = torch.randn(6) * 0.1  # random augmentation
        return torch.full((6,), index / 80) + noise, index % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(args.drop), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.drop(self.first(inputs).relu())
        if self.training and engine.step == args.nan_at:
            hidden = (hidden - 1000).log()
        return self.last(hidden)


torch.manual_seed(3)
if args.another_fit:
    before = nn.Linear(6, 6)
    first = Trainer(before, torch.optim.SGD(before.parameters(), lr=0.1), nn.MSELoss())
    first.fit([(torch.ones(2, 6), torch.ones(2, 6))] * 50, epochs=1)
model = nn.Sequential(nn.Linear(6, 3)) if args.plain else Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()
train = DataLoader(Samples(), 4, shuffle=True, num_workers=args.workers)
val = DataLoader(Samples(), 8)
run = RunDirectory("runs", settings=args, terminal=False)
callbacks = [run, RunCheckpoint(run.path / "checkpoints", every_steps=args.save_every, keep=args.keep), Fingerprint(1)]
callbacks += [Accumulate(args.window)] if args.window > 1 else []
callbacks += [StopOnNonFinite(args.policy, every_steps=1000)] if args.policy else []


def step(engine, batch):
    inputs, target = batch
    loss = loss_fn(model(inputs), target)
    if engine.training:
        engine.update(loss)
    return loss


the_step = {"trainer": None, "function": step, "script": None}[args.style]
parts = {"model": model, "optimizer": optimizer, "callbacks": callbacks, "seed": args.seed}
engine = Trainer(loss_fn=loss_fn, **parts) if args.style == "trainer" else Engine(the_step, **parts)


@engine.on(BatchReady)
def skip(event):
    if engine.training and engine.step == args.skip_at:
        engine.run.skip_batch()


if args.style == "script":
    for _ in engine.epochs(args.epochs):
        for batch in engine.train(train):
            inputs, target = batch
            loss = loss_fn(model(inputs), target)
            if engine.step == args.fail_at:
                raise ValueError("the user's own error")
            if engine.step == args.break_at:
                break
            engine.update(loss)
            engine.record(loss=loss)
        for inputs, target in engine.validate(val):
            engine.record(loss=loss_fn(model(inputs), target))
else:
    engine.fit(train, val, epochs=args.epochs)

with Path("tail.txt").open("a") as file:  # what comes after the training
    file.write("the end")
"""
HOOK = """
from camshaft.engine import LossReady

def look(engine):
    print("in the hook: step", engine.step, "of", tuple(engine.batch[0].shape))
    engine.subscribe(LossReady, lambda event: print("in the hook: loss", float(event.loss) > 0))

not_a_function = 3
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs the script with options, in a directory of its own, and returns that; each run once."""
    known: dict[str, Path] = {}

    def make(options: str = "", *, code: int = 0) -> Path:
        if options not in known:
            place = known[options] = tmp_path_factory.mktemp("place")
            (place / "train.py").write_text(SCRIPT)
            (place / "hook.py").write_text(HOOK)
            ran = subprocess.run(
                [sys.executable, "train.py", *options.split()], cwd=place, env=environment(), capture_output=True,
                text=True, timeout=120, check=False,
            )  # fmt: skip
            assert ran.returncode == code, ran.stderr
        return known[options]

    return make


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def replayed(place: Path, *arguments: str, code: int = 0, typed: str = "") -> str:
    """Run the command and return what it printed; nothing in the place may have changed."""
    before = everything(place)
    ran = subprocess.run(
        [COMMAND, "replay", *arguments], cwd=place, env=environment(), input=typed, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    assert everything(place) == before
    return ran.stdout + ran.stderr


def everything(place: Path) -> dict[str, tuple[int, str]]:
    """Each file of the place, with its time and the digest of what it holds; but not what Python compiles."""
    files = [path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def the_run(place: Path) -> Path:
    (path,) = (path for path in (place / "runs").iterdir() if path.is_dir())
    return path


@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("script", "--seed 1 --workers 2"),
        *(pytest.param(style, "--seed 1 --workers 2", marks=pytest.mark.slow) for style in ("trainer", "function")),
        *(pytest.param(style, "", marks=pytest.mark.slow) for style in ("trainer", "function", "script")),
        pytest.param("script", "--window 3", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_one_that_the_run_has_made(style: str, options: str, made: Callable[..., Path]) -> None:
    """With random augmentation and dropout; and what comes after the training in the script is not done again."""
    place = made(f"--style {style} {options}".rstrip())
    said = replayed(place, "last", "--step", "37")
    assert "Step 37 was made again, from the checkpoint at step 30." in said
    assert "It is batch 17 of epoch 2: a list of 2 (Tensor [4, 6], Tensor [4])." in said
    assert "Batch, parameters, outputs of modules, loss and gradients are finite." in said
    assert said.rstrip().endswith(
        "The digests of the 7 steps that both have are the same, bit for bit: it is the step of the run."
    )
    assert (place / "tail.txt").read_text() == "the end"


@pytest.mark.slow
def test_a_step_that_is_another_is_told(made: Callable[..., Path]) -> None:
    """Here the command is not that of the run."""
    command = ("--", sys.executable, "train.py", "--drop", "0.5")
    said = replayed(made("--style trainer"), "last", "--step", "37", *command, code=1)
    assert "It is not the step of the run. The runs differ first at step 31, in loss: loss (1 of 1 tensors)." in said


def test_without_a_checkpoint_before_it_the_run_is_made_again_from_its_beginning(made: Callable[..., Path]) -> None:
    said = replayed(made("--style trainer"), "last", "--step", "7")
    assert "from the beginning, which repeats the run exactly only if the script sets a seed." in said
    assert "The digests of the 7 steps that both have are the same" in said


def test_the_gradients_are_listed_with_the_largest_first(made: Callable[..., Path]) -> None:
    said = replayed(made("--style trainer"), "last", "--step", "37")
    lines = said.split("Norms of gradients, largest first:\n")[1].splitlines()[:4]
    norms, names = zip(*(line.split() for line in lines), strict=True)
    assert sorted(names) == ["first.bias", "first.weight", "last.bias", "last.weight"]
    assert [float(norm) for norm in norms] == sorted(map(float, norms), reverse=True)


@pytest.mark.parametrize(
    ("style", "policy"), [("trainer", "stop"), pytest.param("script", "raise", marks=pytest.mark.slow)]
)
def test_the_command_that_is_logged_finds_where_a_loss_becomes_nan(
    style: str, policy: str, made: Callable[..., Path]
) -> None:
    """Found at the end of the epoch, when every checkpoint that RunCheckpoint has kept holds weights of NaN."""
    options = f"--style {style} --policy {policy} --nan-at 33 --save-every 1 --keep 1"
    place = made(options, code=int(policy == "raise"))
    (line,) = (line for line in (the_run(place) / "log.log").read_text().splitlines() if "camshaft replay" in line)
    assert "To make step 33 again, from the checkpoint at step 32, and see where it begins: " in line
    command = shlex.split(line.partition("camshaft replay ")[2])
    said = replayed(place, *command)
    assert "It is batch 13 of epoch 2" in said
    assert "Loss: nan" in said
    assert 'the output of "last" (Linear), whose inputs are not finite either' in said
    assert "Anomaly mode of torch has ended the step: Function '" in said
    assert "returned nan values in its 0th output." in said
    assert 'train.py", line' in said.split("Traceback of forward call that caused the error:")[1]
    assert "None of the steps that were made again has digests to compare, as it has ended before" in said
    whole = replayed(place, *command, "--no-anomaly")
    assert "the gradient of first.weight" in whole
    assert "it is the step of the run." in whole


def spoilt(step: int, num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = class_batches(*[8] * num_steps)
    data[step - 1] = (torch.full((8, 4), torch.nan), data[step - 1][1])
    return data


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("save_every", [1, 3, 5])
@pytest.mark.parametrize(("look_every", "policy"), [(1, "raise"), (4, "stop"), (100, "raise"), (100, "stop")])
def test_the_last_checkpoint_before_the_first_bad_step_is_kept(
    policy: str, look_every: int, save_every: int, background: bool, tmp_path: Path
) -> None:
    """The last one that is on the disk: a thread may still be writing the newest."""
    run = RunDirectory(tmp_path / "runs", terminal=False)
    checkpoint = RunCheckpoint(run.path / "checkpoints", every_steps=save_every, keep=1, background=background)
    stop = StopOnNonFinite("stop" if policy == "stop" else "raise", every_steps=look_every)
    trainer = make_trainer(run, checkpoint, stop)
    try:
        trainer.fit(spoilt(11, 20), epochs=2)
    except DataError:
        assert policy == "raise"
    kept = checkpoint_files((run.path / "replay").glob("*.pt"))[0]
    last = 10 // save_every * save_every
    assert kept.step == last or (background and kept.step == last - save_every)
    model = torch.load(kept.path, weights_only=True)["parts"]["model"]
    assert all(torch.isfinite(value).all() for value in model.values())


def test_a_run_without_trouble_keeps_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs", terminal=False)
    make_trainer(run, RunCheckpoint(run.path / "checkpoints", every_steps=1), StopOnNonFinite("stop")).fit(
        class_batches(*[8] * 20), epochs=1
    )
    assert not (run.path / "replay").exists()


@pytest.mark.parametrize(
    ("style", "typed", "shown"),
    [
        pytest.param("trainer", "p inputs.shape", "torch.Size([4, 6])", marks=pytest.mark.slow),
        pytest.param("function", "p batch[0].shape", "torch.Size([4, 6])", marks=pytest.mark.slow),
        ("script", "p batch[0].shape", "torch.Size([4, 6])"),
    ],
)
def test_the_debugger_stops_in_the_users_code(style: str, typed: str, shown: str, made: Callable[..., Path]) -> None:
    """At its first line in the step: of the model, of the step function, or of the loop's body."""
    first = "hidden = self.drop(" if style == "trainer" else "inputs, target = batch"
    said = replayed(made(f"--style {style}"), "last", "--step", "37", "--debug", typed=f"{typed}\nc\n")
    assert "train.py(" in said.split("(Pdb)")[0]
    assert f"-> {first}" in said.split("(Pdb)")[0]
    assert f"(Pdb) {shown}" in said
    assert said.count("(Pdb)") == 2
    assert "it is the step of the run." in said


def test_the_debugger_may_be_left(made: Callable[..., Path]) -> None:
    said = replayed(made("--style script"), "last", "--step", "37", "--debug", typed="q\n")
    assert "The debugger was left within the step." in said


@pytest.mark.slow
def test_a_step_without_code_of_the_users_has_nothing_for_a_debugger(made: Callable[..., Path]) -> None:
    said = replayed(made("--plain"), "last", "--step", "37", "--debug", typed="c\n")
    assert "(Pdb)" not in said
    assert "Write a function with breakpoint() in it, and --hook file.py:function." in said


def test_a_function_of_the_users_is_called_just_before_the_batch_is_used(made: Callable[..., Path]) -> None:
    said = replayed(made("--style trainer"), "last", "--step", "37", "--hook", "hook.py:look")
    assert said.startswith("in the hook: step 37 of (4, 6)\nin the hook: loss True\n")
    assert "it is the step of the run." in said


@pytest.mark.parametrize("name", ["missing", pytest.param("not_a_function", marks=pytest.mark.slow)])
def test_a_function_that_is_not_there_is_told(name: str, made: Callable[..., Path]) -> None:
    said = replayed(made("--style trainer"), "last", "--step", "37", "--hook", f"hook.py:{name}", code=1)
    assert f"has no function {name} that can be called with the engine. Write def {name}(engine): ..." in said
    assert "The command ended with exit code 1 and has not made step 37 again." in said


@pytest.mark.parametrize("options", ["", pytest.param("--debug", marks=pytest.mark.slow)])
def test_an_error_in_a_loop_of_the_users_is_shown(options: str, made: Callable[..., Path]) -> None:
    place = made("--style script --fail-at 33", code=1)
    said = replayed(place, "last", "--step", "33", *options.split(), typed="c\n")
    assert "The step raised:" in said
    assert "ValueError: the user's own error" in said
    assert not (place / "tail.txt").exists()


@pytest.mark.slow
def test_a_loop_that_is_left_in_the_step_ends_the_script(made: Callable[..., Path]) -> None:
    place = made("--style script --break-at 33 --epochs 3")
    said = replayed(place, "last", "--step", "33")
    assert "Step 33 was made again, from the checkpoint at step 30." in said
    assert (place / "tail.txt").read_text() == "the end"


@pytest.mark.slow
def test_a_step_that_was_left_out_is_told(made: Callable[..., Path]) -> None:
    said = replayed(made("--skip-at 33"), "last", "--step", "33", code=1)
    assert "Step 33 was left out by a handler: nothing was computed in it. Pass another step." in said


@pytest.mark.slow
def test_a_fit_that_the_checkpoint_does_not_fit_is_made_as_always(made: Callable[..., Path]) -> None:
    """And it has enough steps to be taken for the one that is meant."""
    said = replayed(made("--another-fit"), "last", "--step", "37")
    assert "Step 37 was made again, from the checkpoint at step 30." in said
    assert "it is the step of the run." in said


def test_a_damaged_checkpoint_is_left_where_it_is(made: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(the_run(made("--style trainer")), run)
    newest = next(file for file in checkpoint_files((run / "checkpoints").glob("*.pt")) if file.step < 37)
    newest.path.write_bytes(newest.path.read_bytes()[:-7])
    (tmp_path / "train.py").write_text(SCRIPT)
    said = replayed(tmp_path, "copy", "--step", "37", "--", sys.executable, "train.py")
    assert "Step 37 was made again, from the checkpoint at step 20." in said
    assert "The digests of the 17 steps that both have are the same" in said


def test_a_command_that_trains_nothing_is_told(made: Callable[..., Path]) -> None:
    command = (sys.executable, "-c", "raise SystemExit(7)")
    said = replayed(made("--style trainer"), "last", "--step", "37", "--", *command, code=1)
    assert "The command ended with exit code 7 and has not made step 37 again. Look at what it printed above." in said


def test_what_cannot_be_made_again_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    """Before anything is started."""
    run = tmp_path / "copy"
    shutil.copytree(the_run(made("--style trainer")), run)
    kept = json.loads((run / "environment.json").read_text())

    def refusal(step: int = 37, hook: str | None = None, command: tuple[str, ...] = (), **changes: object) -> str:
        known = {name: value for name, value in {**kept, **changes}.items() if value is not None}
        (run / "environment.json").write_text(json.dumps(known))
        with pytest.raises(CannotReplayError) as caught:
            replay(Run(run), step, command, hook=hook)
        return str(caught.value)

    assert refusal(41).endswith("copy ended after step 40, before step 41. Pass --step 40 or less.")
    advice = f"Write it after the options: camshaft replay {run} --step N -- python train.py ..."
    assert refusal(full_command=None) == f"{run} does not say which command started it. {advice}"
    assert refusal(ranks=2) == f"{run} is of several ranks, and does not say what launched them. {advice}"
    secret = [*kept["full_command"], "--token", "***"]
    assert refusal(full_command=secret) == f"{run} does not keep the secret that its command had. {advice}"
    assert refusal(full_command=["python", "-m", "ipykernel_launcher"]).startswith(f"{run} was started in a notebook.")
    gone = str(tmp_path / "gone")
    assert refusal(directory=gone) == f"{gone}, in which {run} was started, does not exist. {advice}"
    assert "could not be started: No such file or directory. Write" in refusal(command=(gone,))
    for hook in ("hook.py", "missing.py:look", f"{tmp_path}:look"):
        said = f"--hook is {hook}, which names no function of a file. Write --hook file.py:function."
        assert refusal(hook=hook) == said


def test_a_timeline_says_where_the_checkpoints_are(tmp_path: Path) -> None:
    """Within the run directory, so that the whole can be moved; elsewhere, exactly where."""

    def said(*callbacks: RunCheckpoint) -> str | None:
        run = RunDirectory(tmp_path / "runs", terminal=False)
        inner = callbacks or (RunCheckpoint(run.path / "own"),)
        Engine(lambda engine, batch: None, callbacks=[run, *inner]).fit([torch.zeros(1)], epochs=1)
        return Run(run.path).checkpoints

    assert said() == "own"
    assert said(RunCheckpoint(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")


def test_both_sides_name_the_same_variable() -> None:
    """The command cannot import the engine, which needs torch."""
    assert VARIABLE == VARIABLE_OF_ENGINE


STEERED = """
import time

import torch
from torch import nn

from camshaft.callbacks import Fingerprint, RunCheckpoint, RunDirectory, Steering
from camshaft.engine import StepEnd, Trainer

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
run = RunDirectory("runs", terminal=False)
callbacks = [run, Steering(1e-9), RunCheckpoint(run.path / "checkpoints", every_steps=500, keep=100), Fingerprint(1)]
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=0)
data = [(torch.randn(4, 6), torch.arange(4) % 3) for _ in range(100)]
trainer.subscribe(StepEnd, lambda event: time.sleep(0.002))
trainer.fit(data, epochs=1000)
"""


@pytest.mark.slow
def test_a_step_after_an_order_of_a_second_process_is_the_step_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(STEERED)
    process = subprocess.Popen([sys.executable, "train.py"], cwd=tmp_path)
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/timeline.jsonl")) and time.monotonic() < until:
            time.sleep(0.05)
        (path,) = tmp_path.glob("runs/*")
        for order in (["lr", "x0.5"], ["stop"]):
            subprocess.run([COMMAND, "steer", path, *order], check=True, timeout=60)
        assert process.wait(60) == 0
    finally:
        process.kill()
    taken = json.loads((path / "steering.jsonl").read_text().splitlines()[0])["step"]
    run, last = Run(path), json.loads((path / "steering.jsonl").read_text().splitlines()[1])["step"]
    found = replay(run, min(taken + 2, last))
    assert found.is_good, found.in_words()
    assert "it is the step of the run" in found.in_words()
    (path / "steering.jsonl").unlink()
    assert not replay(run, min(taken + 2, last)).is_good  # it is the order that makes it so


RANKS = """
import torch
from torch import nn

from camshaft.callbacks import Distributed, Fingerprint, RunCheckpoint, RunDirectory
from camshaft.engine import Trainer

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
checkpoint = RunCheckpoint("checkpoints", every_steps=10, keep=100)
callbacks = [Distributed(), RunDirectory("runs", terminal=False), checkpoint, Fingerprint(1)]
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), seed=0, callbacks=callbacks)
trainer.fit([(torch.randn(4, 6), torch.arange(4) % 3) for _ in range(25)], epochs=2)
"""


@pytest.mark.slow
def test_a_step_of_two_ranks_is_made_again_by_the_command_that_launches_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    again = [str(COMMAND), "replay", "last", "--step", "37", "--", *command]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Step 37 was made again, from the checkpoint at step 30." in done.stdout
    assert (
        "The digests of the 7 steps that both have are the same, bit for bit: it is the step of the run."
        in done.stdout
    )
