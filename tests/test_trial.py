"""A run that is only tried: what handlers were told to write elsewhere goes into another directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import class_batches, make_trainer

from camshaft.callbacks import (
    BestCheckpoint,
    Export,
    Fingerprint,
    JsonLines,
    Log,
    Profile,
    Report,
    RunCheckpoint,
    RunDirectory,
    TensorBoard,
    Tracker,
)
from camshaft.engine import Callback, asked_trial, lead_files
from camshaft.engine.trial import VARIABLE

TRAIN, VAL = class_batches(4, 4, 4), class_batches(4, seed=1)


def files(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()
    }


def writers(place: Path) -> list[Callback]:
    """Handlers that write, each told where."""
    return [
        RunDirectory(place / "runs", terminal=False),
        RunCheckpoint(place / "run", every_steps=1, mirror=place / "mirror"),
        BestCheckpoint("val_loss", directory=place / "best"),
        Export(place / "model.pt2", "plain.pt2"),
        Fingerprint(1, directory=place / "fingerprints"),
        Log(1),
        Profile(place / "profile"),
        Report(place / "report"),
        TensorBoard(place / "board"),
        Tracker(JsonLines(place / "values.jsonl")),
    ]


def test_nothing_is_written_where_handlers_were_told_to_write(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    callbacks = writers(place)
    before = files(place)
    lead_files(callbacks, elsewhere)
    make_trainer(*callbacks).fit(TRAIN, VAL, epochs=2)
    assert files(place) == before
    written = {Path(name).parts[0] for name in files(elsewhere) if not name.startswith(".plotly")}  # beside the run
    assert written == {type(one).__name__ for one in callbacks} - {"Log"}


def test_without_that_all_of_them_write_there(tmp_path: Path) -> None:
    """Or the test above would see nothing."""
    make_trainer(*writers(tmp_path)).fit(TRAIN, VAL, epochs=2)
    written = {Path(name).parts[0] for name in files(tmp_path)}
    assert written == {
        "runs", "run", "mirror", "best", "model.pt2", "fingerprints", "profile", "report", "board", "values.jsonl"
    }  # fmt: skip


def test_the_run_directory_of_a_script_that_is_tried_is_there_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_trial() is None
    trial = {"kind": "replay", "directory": str(tmp_path / "trial"), "step": 3}
    monkeypatch.setenv(VARIABLE, json.dumps(trial))
    run = RunDirectory(tmp_path / "runs", terminal=False)
    assert run.path.parent == tmp_path / "trial"
    assert not (tmp_path / "runs").exists()
    found = asked_trial()
    assert found is not None
    assert (found.kind, found.directory, found.settings) == ("replay", tmp_path / "trial", {"step": 3})
    assert json.loads(found.as_variable()) == trial
