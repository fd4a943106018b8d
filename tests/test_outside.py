"""Nothing in a checkpoint, a name or a setting makes a run touch a file outside its own directories."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, linear, make_trainer, run_python
from torch import Tensor

from camshaft.callbacks import BestCheckpoint, EarlyStopping, Report, RunCheckpoint, RunDirectory, TensorBoard
from camshaft.engine import CamshaftError, CheckpointDirectory, Engine

# Each runs in a process of its own, because what listens to a process cannot be taken away again.
RUN = "import sys; sys.path.insert(0, sys.argv[1]); import test_outside; test_outside.listen(*sys.argv[2:])"
READS = ("open", "os.listdir", "os.scandir", "os.truncate", "os.chdir")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime")
DATA = class_batches(8, 3)


class Listener:
    """Notes what is opened, listed, renamed, made or removed outside the directory of the present case."""

    def __init__(self) -> None:
        self.case: Path | None = None
        self.touched: list[str] = []

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.case is None or event not in (*READS, *CHANGES):
            return
        for path in (
            one for one in arguments[:2] if isinstance(one, str) and (event in CHANGES or one is arguments[0])
        ):
            folder, name = os.path.split(path)
            place = os.path.realpath(path) if event in READS else os.path.join(os.path.realpath(folder), name)
            is_change = event in CHANGES or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
            inside = place.startswith(f"{self.case}/own")
            if place.startswith(f"{self.case}/outside") or (is_change and not inside and place != os.devnull):
                self.touched.append(f"{event} {place}")


def make_case(case: Path) -> Path:
    """Make the run's own directory beside a directory of somebody else's, to which links lead from each folder."""
    for folder in ("outside/checkpoints", "own/best", "own/runs", "own/resume"):
        (case / folder).mkdir(parents=True)
    for name in ("victim.pt", "best.pt", "log.log", "history.csv", "checkpoints/best.pt"):
        torch.save(linear().state_dict(), case / "outside" / name)
    return case / "own"


def forgeries(case: Path) -> list[str]:
    outside = case / "outside"
    return [
        "../../outside", "../../outside/victim.pt", str(outside), str(outside / "victim.pt"), "link", "link.pt",
        "link/victim.pt", "..", "",
    ]  # fmt: skip


def add_links(own: Path) -> None:
    for folder in ("best", "runs", "resume"):
        (own / folder / "link").symlink_to(own.parent / "outside")
        (own / folder / "link.pt").symlink_to(own.parent / "outside" / "victim.pt")


def run(own: Path, epochs: int) -> None:
    callbacks = [
        RunDirectory(own / "runs", terminal=False),
        BestCheckpoint("val_loss", directory=own / "best", top_k=2, restore=True),
        BestCheckpoint("train_loss", "max"),
        EarlyStopping("val_loss", patience=9),
        TensorBoard(),
        RunCheckpoint(own / "resume"),
    ]
    make_trainer(*callbacks).fit(DATA, DATA, epochs=epochs, resume="auto")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of the strings in a state, and of the keys (whose last part is None)."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                yield (*path, key, None)
            yield from places(item, (*path, key))


def forged(value: Any, path: tuple[Any, ...], name: str) -> Any:
    """Return a state with ``name`` at a place."""
    if not path:
        return name
    key, *rest = path
    if isinstance(value, dict):
        if rest == [None]:
            return {name if one == key else one: item for one, item in value.items()}
        return {one: forged(item, tuple(rest), name) if one == key else item for one, item in value.items()}
    return type(value)(forged(item, tuple(rest), name) if one == key else item for one, item in enumerate(value))


def forged_checkpoints(root: Path, listener: Listener, share: int) -> Iterator[str]:
    """Resume from a checkpoint in which one string is another, for each string and each forgery."""
    first = make_case(root / "first")
    run(first, epochs=2)
    state, _ = CheckpointDirectory(first / "resume").load_newest() or ({}, first)
    for number, (path, index) in enumerate((path, index) for path in places(state) for index in range(9)):
        is_leaf = path[-1] is not None
        if (number % share and not (is_leaf and path[0] == "callbacks")) or path[0] == "rng":
            continue
        case = root / str(number)
        own = make_case(case)
        shutil.copytree(first, own, dirs_exist_ok=True)
        add_links(own)
        name = forgeries(case)[index]
        CheckpointDirectory(own / "resume").save(forged(copy.deepcopy(state), path, name), 99)
        listener.case = case
        try:
            run(own, epochs=3)
            ended = "resumed"
        except Exception as error:  # whichever it is: here only the files count
            ended = type(error).__name__
        listener.case = None
        yield f"{ended}: {path} {name}"
        shutil.rmtree(case)


def forged_names(root: Path, listener: Listener, share: int) -> Iterator[str]:
    """Record, watch and draw values whose names are paths, and give such settings to the run."""
    for index in range(9):
        own = make_case(root / str(index))
        name = forgeries(own.parent)[index]
        add_links(own)
        callbacks = [
            RunDirectory(own / "runs", terminal=False, settings={name: name}),
            BestCheckpoint(f"val_{name}", "max", own / "best", top_k=2, restore=True),
            EarlyStopping(f"train_{name}", "max", patience=9), TensorBoard(), Report(),
            RunCheckpoint(own / "resume"),
        ]  # fmt: skip

        def step(engine: Engine, batch: Tensor, name: str = name) -> dict[str, float]:
            return {name: float(engine.epoch)}

        listener.case = own.parent
        try:
            engine = Engine(step, model=linear(), callbacks=callbacks)
            engine.fit([torch.ones(2)], [torch.ones(2)], epochs=3)
            ended = "ended"
        except CamshaftError as error:
            ended = type(error).__name__
        listener.case = None
        yield f"{ended}: {name}"


def deliberate(root: Path, listener: Listener, share: int) -> Iterator[str]:
    """Touch somebody else's files in each way, so that it is known that the listener hears of it."""
    own = make_case(root)
    add_links(own)
    listener.case = root
    (own / "best" / "link.pt").read_bytes()
    os.listdir(own / "best" / "link")
    os.replace(own / "best" / ".." / ".." / "outside" / "log.log", own / "best" / "taken")
    (own / "best" / "link" / "new").mkdir()
    (own / "best" / "link" / "best.pt").unlink()
    (root / "elsewhere").write_text("")
    (own / "best" / "link.pt").unlink()  # the link is the run's own
    yield "touched"


def listen(root: str, share: str, *works: str) -> None:
    """Do each work and print what was done, and what was touched outside."""
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    list(forged_names(Path(root) / "warm", Listener(), 1))  # what is imported late is imported now
    listener, results = Listener(), {}
    sys.addaudithook(listener.hear)
    for work in works:
        listener.touched.clear()
        results[work] = [list(globals()[work](Path(root) / work, listener, int(share))), list(listener.touched)]
    print(json.dumps(results))


Result = tuple[list[str], list[str]]  # what was done, and what was touched outside


def listened(root: Path, share: int, *works: str) -> dict[str, Result]:
    ended = run_python(RUN, Path(__file__).parent, root.resolve(), share, *works, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results: dict[str, Result] = json.loads(ended.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root").resolve()


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Result]:
    return listened(root, 200, "forged_names", "forged_checkpoints", "deliberate")


def test_whatever_is_touched_outside_is_heard_of(results: dict[str, Result], root: Path) -> None:
    outside = root / "deliberate" / "outside"
    assert results["deliberate"][1] == [
        f"open {outside / 'victim.pt'}", f"os.listdir {outside}", f"os.rename {outside / 'log.log'}",
        f"os.mkdir {outside / 'new'}", f"os.remove {outside / 'best.pt'}", f"open {outside.parent / 'elsewhere'}",
    ]  # fmt: skip


def check_forged_checkpoints(result: Result) -> tuple[int, int]:
    """Return how many were resumed from, and how many refused."""
    done, touched = result
    assert touched == []
    num_resumed = sum(one.startswith("resumed") for one in done)
    print(f"{len(done)} forged checkpoints: {num_resumed} resumed, {len(done) - num_resumed} refused")
    return num_resumed, len(done) - num_resumed


def test_a_path_in_the_state_of_a_handler_leads_to_no_file_outside(results: dict[str, Result]) -> None:
    """Each string in the states of the handlers, and some of the others and of the keys."""
    num_resumed, num_refused = check_forged_checkpoints(results["forged_checkpoints"])
    assert num_resumed > 10
    assert num_refused > 10


@pytest.mark.slow
def test_a_path_anywhere_in_a_checkpoint_leads_to_no_file_outside(tmp_path: Path) -> None:
    """Every fourth string and key, of all that there are."""
    assert sum(check_forged_checkpoints(listened(tmp_path, 4, "forged_checkpoints")["forged_checkpoints"])) > 200


def test_a_path_as_a_name_or_a_setting_leads_to_no_file_outside(results: dict[str, Result]) -> None:
    """The run ends well, unless the path is too long for a name."""
    done, touched = results["forged_names"]
    assert touched == []
    assert [one for one in done if not one.startswith("ended: ") and len(one.partition(": ")[2]) <= 100] == []
    assert len([one for one in done if one.startswith("ended: ")]) >= 7
