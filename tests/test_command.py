"""The command camshaft, as a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import BestCheckpoint, RunDirectory
from camshaft.engine import Engine

COMMAND = Path(sys.executable).with_name("camshaft")
TRAIN, VAL = class_batches(8, 8, 8), class_batches(16, seed=3)


def camshaft(*arguments: str, cwd: Path, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
    """Run the command, and return what it printed, and its errors."""
    ran = subprocess.run(
        [COMMAND, *arguments], cwd=cwd, text=True, capture_output=True, timeout=120,
        env={**os.environ, "COLUMNS": "120", **(env or {})},
    )  # fmt: skip
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    assert "Traceback" not in ran.stderr
    return ran.stdout, ran.stderr


def trained(root: Path, *, lr: float = 0.1, epochs: int = 3) -> Path:
    run = RunDirectory(root, settings={"lr": lr, "width": 64}, terminal=False)
    trainer = make_trainer(run, BestCheckpoint("val_acc"), metrics={"acc": MulticlassAccuracy(3)}, lr=lr)
    trainer.fit(TRAIN, VAL, epochs=epochs)
    return run.path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three runs, of which the last is the best by its loss."""
    directory = tmp_path_factory.mktemp("place")
    for lr in (0.1, 0.01, 0.5):
        trained(directory / "runs", lr=lr)
    return directory


def listed(*arguments: str, cwd: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(camshaft("list", "--json", *arguments, cwd=cwd)[0])
    return found


def test_list_shows_the_runs_and_marks_the_best(place: Path) -> None:
    names = sorted(path.name for path in (place / "runs").iterdir() if path.is_dir())
    assert [run["run"] for run in listed(cwd=place)] == names
    by_loss = listed("--by", "val_loss", cwd=place)
    values = [run["best"]["value"] for run in by_loss]
    assert values == sorted(values)
    assert by_loss[0]["run"] == names[2]
    by_accuracy = [run["best"]["value"] for run in listed("--by", "val_acc", cwd=place)]
    assert by_accuracy == sorted(by_accuracy, reverse=True)
    text, _ = camshaft("list", "--by", "val_loss", cwd=place)
    (marked,) = (line for line in text.splitlines() if "★" in line)
    assert marked.startswith(names[2])
    assert f"{values[0]:.6g}" in marked


def test_show_has_settings_history_and_the_page(place: Path) -> None:
    text, _ = camshaft("show", "last", cwd=place)
    (line,) = (line for line in text.splitlines() if line.startswith("lr "))
    assert line.split() == ["lr", "0.5"]
    assert "ended: 3 epochs done" in text
    assert "none yet; write: camshaft show" in text
    run = json.loads(camshaft("show", "last", "--json", "--page", cwd=place)[0])
    assert len(run["history"]) == run["epochs"] == 3
    assert run["settings"] == {"lr": 0.5, "width": 64}
    assert (Path(place) / run["path"] / "report.html").exists()
    by_path, by_name = camshaft("show", run["path"], cwd=place), camshaft("show", run["run"], cwd=place)
    assert by_path == by_name


def test_compare_prints_what_differs_and_writes_the_page(place: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (place / "runs").iterdir() if path.is_dir())
    page = tmp_path / "page.html"
    text, _ = camshaft("compare", *names, "--output", str(page), cwd=place)
    assert [line.split() for line in text.splitlines() if line.startswith("lr")] == [["lr", "0.1", "0.01", "0.5"]]
    assert "width" not in text
    assert page.read_text().rstrip().endswith("</html>")
    found = json.loads(camshaft("compare", *names, "--json", cwd=place)[0])
    assert found["differing_settings"] == {"lr": dict(zip(names, ["0.1", "0.01", "0.5"], strict=True))}


def test_doctor_tells_the_truth(tmp_path: Path) -> None:
    found = {one["name"]: one for one in json.loads(camshaft("doctor", "--json", cwd=tmp_path)[0])}
    assert found["python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    for package in ("torch", "torchvision", "tqdm", "plotly", "fsspec"):
        assert importlib.metadata.version(package) in found.get(package, found["torch"])["found"] or package == "torch"
    assert ("cuda:0" in found) == torch.cuda.is_available()
    assert (found.get("cuda", {}).get("state") == "missing") == (
        not torch.cuda.is_available() and shutil.which("nvidia-smi") is None
    )
    compilers = [name for name in ("g++", "clang++", "c++", "cl") if shutil.which(name)]
    assert found["C++ compiler"]["state"] == ("ok" if compilers else "missing")
    assert f"in {tmp_path}" in found["disk"]["found"]
    assert found["several ranks"]["found"].split(", ")[0] == "gloo"


def test_doctor_finds_a_missing_extra_and_a_broken_package(tmp_path: Path) -> None:
    """Real packages whose files are not found; a problem is exit code 1."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (hide / "sitecustomize.py").write_text(
        "import importlib.metadata as m\noriginal = m.version\n"
        "def version(name):\n"
        "    if name == 'plotly':\n        raise m.PackageNotFoundError(name)\n"
        "    return original(name)\n"
        "m.version = version\n"
    )
    text, _ = camshaft("doctor", cwd=tmp_path, code=1, env={"PYTHONPATH": str(hide)})
    assert 'pip install "camshaft[report]"' in text
    assert "torchvision::nms does not exist" in text
    assert "1 problems: import torchvision." in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "none"], 1, "none does not exist. Pass the directory that a RunDirectory has made."),
        (["show", "."], 1, ". is not a run directory: it has no settings.json. Pass the directory that a "
         "RunDirectory has made."),
        (["list", "none"], 1, "none does not exist. Pass the directory in which the run directories are."),
        (["list", "--by", "val_los"], 1, 'No run has a value "val_los". Did you mean "val_loss"? Values: train_loss, '
         "train_acc, val_loss, val_acc."),
        (["list", "--mode", "most"], 2, "Invalid value for '--mode': 'most' is not one of 'min', 'max'. "
         "Write: camshaft list --help."),
        (["shw"], 2, "No such command 'shw'. Did you mean 'show'? Write: camshaft --help."),
        (["compare"], 2, "Missing argument 'RUNS...'. Write: camshaft compare --help."),
        (["compare", "last", "--output", "no/such/page.html"], 1, "no/such/page.html could not be written: "
         "No such file or directory. Choose another place."),
    ],
)  # fmt: skip
def test_an_error_is_two_sentences_and_a_code(arguments: list[str], code: int, message: str, place: Path) -> None:
    out, error = camshaft(*arguments, cwd=place, code=code)
    assert (out, error.strip()) == ("", message)


def test_help_and_completion_are_there(place: Path) -> None:
    text, _ = camshaft("--help", cwd=place)
    assert all(name in text for name in ("list", "show", "compare", "doctor", "_CAMSHAFT_COMPLETE"))
    script, _ = camshaft(cwd=place, env={"_CAMSHAFT_COMPLETE": "bash_source"})
    assert "complete" in script
    names, _ = camshaft(cwd=place, env={"_CAMSHAFT_COMPLETE": "bash_complete", "COMP_WORDS": "camshaft show 2",
                                        "COMP_CWORD": "2"})  # fmt: skip
    assert {line.split(",")[1] for line in names.splitlines()} == {path.name for path in (place / "runs").iterdir()
                                                                   if path.is_dir()}  # fmt: skip


def test_forty_columns_and_no_colour(place: Path) -> None:
    """What is too wide is left out, not broken; the run and its value stay."""
    text, _ = camshaft("list", "--by", "val_loss", cwd=place, env={"COLUMNS": "40"})
    assert max(map(len, text.splitlines())) <= 40
    assert text.splitlines()[0].split() == ["run", "best", "val_loss"]
    assert len(text.splitlines()) == 4
    text, _ = camshaft("show", "last", cwd=place, env={"COLUMNS": "40"})
    assert max(map(len, text.splitlines())) <= 40
    assert text.splitlines()[-4].split() == ["epoch", "train_acc", "val_loss", "val_acc"]
    text, _ = camshaft("doctor", cwd=place, env={"FORCE_COLOR": "1"})
    assert "\x1b[32m" in text
    text, _ = camshaft("doctor", cwd=place, env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b[32m" not in text


def test_hostile_names_steer_no_terminal(tmp_path: Path) -> None:
    hostile = ["[red]markup[/red]", "\x1b[2J\x1b]0;title\x07", "new\nline", "=1+1", ":smile:"]
    run = RunDirectory(tmp_path / "runs", settings=dict.fromkeys(hostile, "\x1b[31m"), terminal=False)
    engine = Engine(lambda engine, batch: {"[red]x[/red]": 1.0}, callbacks=[run])
    engine.fit([torch.zeros(1)], [torch.zeros(1)], epochs=1)
    text, _ = camshaft("show", "last", cwd=tmp_path)
    assert "\x1b" not in text
    for shown in ("[red]markup[/red]", "\\x1b[2J\\x1b]0;title\\x07", "new\\nline", "=1+1", ":smile:", "[red]x[/red]"):
        assert shown in text, shown


def test_five_hundred_runs_are_listed_in_two_seconds(place: Path, tmp_path: Path) -> None:
    """Beyond the start of Python; copies of a real run."""
    source = next(path for path in (place / "runs").iterdir() if path.is_dir())
    for number in range(500):
        copy = tmp_path / "runs" / f"2026-01-01_00-00-00-{number:03}"
        copy.mkdir(parents=True)
        for name in ("settings.json", "environment.json", "history.csv", "timeline.jsonl", "log.log"):
            shutil.copy(source / name, copy / name)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    start = time.monotonic() - began
    began = time.monotonic()
    runs = listed("--by", "val_loss", cwd=tmp_path)
    assert len(runs) == 500
    assert time.monotonic() - began - start < 2


def test_it_starts_without_torch() -> None:
    code = "import sys, camshaft.viewer.command; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
