"""Experiment trackers: their real clients, offline, read back from what they leave."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer
from torch import Tensor, nn

from camshaft.callbacks import (
    ClearML,
    Comet,
    Images,
    JsonLines,
    Log,
    MLflow,
    Neptune,
    RunCheckpoint,
    RunDirectory,
    Service,
    Tracker,
    WandB,
)
from camshaft.engine import Engine, EpochEnd, MissingPackageError, StepEnd, at

TRAIN, VAL = class_batches(*[8] * 6), class_batches(16, seed=3)

# These packages, not ours, use what others have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning",
                                        "ignore::ResourceWarning", "ignore::PendingDeprecationWarning")  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_directory(root: Path) -> RunDirectory:
    return RunDirectory(root, settings={"lr": 0.1, "api_token": "not to be sent"}, terminal=False)


# JSON lines -------------------------------------------------------------------------------------------


def test_json_lines_have_every_value_with_its_step(tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    trainer = make_trainer(run, Log(every=3), Tracker(JsonLines()))
    history = trainer.fit(TRAIN, VAL, epochs=2)
    found = lines(run.path / "values.jsonl")
    assert [one["step"] for one in found if "step/loss" in one] == [3, 6, 9, 12]
    for epoch in (0, 1):
        (validation,) = (one for one in found if "val_loss" in one and one["step"] == 6 * (epoch + 1))
        assert validation["val_loss"] == history["val_loss"][epoch]
        (row,) = (one for one in found if "train_loss" in one and one["step"] == 6 * (epoch + 1))
        assert (row["epoch"], row["train_loss"]) == (epoch + 1, history["train_loss"][epoch])


def test_validations_in_mid_epoch_have_the_training_between_them_once(tmp_path: Path) -> None:
    tracker = Tracker(JsonLines(tmp_path / "values.jsonl"))
    trainer = make_trainer(tracker)
    trainer.fit(TRAIN, VAL, epochs=2, validate_every="2 steps")
    found = lines(tmp_path / "values.jsonl")
    assert [one["step"] for one in found if "val_loss" in one] == [2, 4, 6, 8, 10, 12]
    counts = Counter((one["step"], name) for one in found for name in one if name not in ("of", "step"))
    assert set(counts.values()) == {1}


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: {"x": math.nan}, callbacks=[Tracker(JsonLines(tmp_path / "a" / "b.jsonl"))])
    engine.fit([torch.zeros(1)], epochs=1)
    assert lines(tmp_path / "a" / "b.jsonl") == [{"of": "epoch", "step": 1, "epoch": 1, "train_x": None}]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(Tracker(JsonLines(tmp_path / "values.jsonl"))).fit(TRAIN, epochs=1)
    assert [one["step"] for one in lines(tmp_path / "values.jsonl")] == [6]


# All of them, killed and resumed ----------------------------------------------------------------------


def wandb_values(root: Path) -> Iterator[tuple[int, str, float]]:
    wandb_internal_pb2: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    for path in sorted(root.glob("**/*.wandb")):
        for content in _leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if isinstance(value, float | int) and not name.startswith("_") and name != "global_step":
                    yield int(items["global_step"]), name, value


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """Read the records of a LevelDB log, as its format is documented; wandb puts 7 bytes before it."""
    at, parts, block = 7, b"", 2**15
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def mlflow_values(root: Path) -> Iterator[tuple[int, str, float]]:
    (run,) = (path.parent for path in root.glob("mlruns/*/*/meta.yaml") if path.parent.name != "models")
    for path in (run / "metrics").rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                _, value, step = line.split()[:3]
                yield int(step), path.relative_to(run / "metrics").as_posix(), float(value)


def comet_values(root: Path) -> Iterator[tuple[int, str, float]]:
    for path in root.glob("comet/*.zip"):
        with zipfile.ZipFile(path) as archive:
            for line in archive.read("messages.json").decode().splitlines():
                message = json.loads(line)
                if message["type"] == "metric_msg":
                    metric = message["payload"]["metric"]
                    yield metric["step"], metric["metricName"], metric["metricValue"]


def neptune_values(root: Path) -> Iterator[tuple[int, str, float]]:
    for path in sorted(root.glob(".neptune/**/data-*.log")):
        decoder, text, at = json.JSONDecoder(), path.read_bytes().decode(errors="ignore"), 0
        while (at := text.find("{", at)) >= 0:
            try:
                found, at = decoder.raw_decode(text, at)
            except ValueError:
                break
            operation = found["obj"]
            if operation["type"] == "LogFloats":
                for value in operation["values"]:
                    yield int(value["step"]), "/".join(operation["path"]), value["value"]


SERVICES: dict[str, tuple[str, Callable[[Path], Iterator[tuple[int, str, float]]]]] = {
    "JsonLines": (
        "JsonLines()",
        lambda root: ((one["step"], name, value) for path in root.glob("runs/*/values.jsonl")
                      for one in lines(path) for name, value in one.items() if name not in ("of", "step")),
    ),
    "WandB": ("WandB(project='digits', mode='offline', dir={root!r})", wandb_values),
    "MLflow": ("MLflow('digits', tracking_uri='file://{root}/mlruns')", mlflow_values),
    "Comet": (
        "Comet(project_name='digits', online=False, experiment_config=__import__('comet_ml').ExperimentConfig("
        "offline_directory='{root}/comet', log_code=False, log_env_details=False, auto_output_logging=False))",
        comet_values,
    ),
    "Neptune": ("Neptune(project='a/digits', mode='offline', capture_hardware_metrics=False)", neptune_values),
}  # fmt: skip

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from helpers import class_batches, make_trainer
from camshaft.callbacks import *
from camshaft.engine import StepEnd, every
train, val = class_batches(*[8] * 6), class_batches(16, seed=3)
run = RunDirectory({root!r} + "/runs", settings=dict(lr=0.1), terminal=False)
trainer = make_trainer(run, RunCheckpoint({root!r} + "/checkpoints", every_steps=4), Log(every=3), Tracker({service}))
def say(event):
    print("step", event.engine.step, flush=True)
    time.sleep(0.05 if sys.argv[1:] else 0)
trainer.subscribe(StepEnd, say)
trainer.fit(train, val, epochs=4, resume="auto")
"""


def needed_package(service: str) -> str:
    return {"WandB": "wandb", "MLflow": "mlflow", "Comet": "comet_ml", "Neptune": "neptune", "ClearML": "clearml"}[
        service
    ]


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_a_run_that_is_killed_and_resumed_is_one_run_there_with_no_step_twice(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if service != "JsonLines":
        pytest.importorskip(needed_package(service))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    written, read = SERVICES[service]
    (tmp_path / "train.py").write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path), service=written.format(root=str(tmp_path)))
    )
    command = [sys.executable, "-W", "ignore", "train.py"]
    process = subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "step 15\n":
            break
    if service == "WandB":
        time.sleep(2)  # its own process has what it was sent, and goes on
    # Comet and Neptune write from within the process: what it has not yet written when it is killed is lost.
    process.send_signal(signal.SIGINT if service in ("Comet", "Neptune") else signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "stops sending" not in done.stderr
    counts = Counter((step, name) for step, name, _ in read(tmp_path))
    wanted = {(step, "step/loss") for step in (3, 6, 9, 12, 15, 18, 21, 24)}
    wanted |= {(step, name) for step in (6, 12, 18, 24) for name in ("val_loss", "train_loss")}
    assert wanted <= counts.keys()
    assert {place: number for place, number in counts.items() if number > 1 and place in wanted} == {}


def test_mlflow_has_the_settings_without_secrets_images_and_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"

    def tracked(*, fails: bool) -> Any:
        def step(event: StepEnd) -> None:
            if fails:
                raise RuntimeError("broken")

        tracker = Tracker(MLflow("digits", tracking_uri=uri))
        images = Images(lambda batch, output: batch[0].reshape(-1, 1, 2, 2))
        trainer = make_trainer(run_directory(tmp_path / "runs"), tracker, images)
        trainer.subscribe(StepEnd, step, when=at(8))
        try:
            trainer.fit(TRAIN, VAL, epochs=2)
        except RuntimeError:
            assert fails
        assert tracker.run_id is not None
        return mlflow.MlflowClient(tracking_uri=uri).get_run(tracker.run_id)

    good, bad = tracked(fails=False), tracked(fails=True)
    assert good.data.params == {"lr": "0.1", "api_token": "***"}
    assert (good.info.status, bad.info.status) == ("FINISHED", "FAILED")
    found = mlflow.MlflowClient(tracking_uri=uri).list_artifacts(good.info.run_id, "images")
    assert any(one.path.endswith(".png") for one in found)


def test_wandb_has_histograms_and_the_settings(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    wandb_internal_pb2: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    service = WandB(project="digits", mode="offline", dir=str(tmp_path))
    tracker = Tracker(service, histograms=["weight"])
    make_trainer(run_directory(tmp_path / "runs"), tracker).fit(TRAIN, VAL, epochs=2)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    texts = []
    for content in _leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        texts.append(str(record))
    assert sum('"histogram"' in text.replace("\\", "") for text in texts) >= 2
    assert "***" in "".join(texts)
    assert "not to be sent" not in "".join(text for text in texts if "api_token" in text)


@pytest.mark.slow  # its client looks for its server when the task is closed
def test_clearml_offline_has_the_values(tmp_path: Path) -> None:
    pytest.importorskip("clearml")
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from clearml import Task; Task.set_offline(True)\n"
        "from helpers import class_batches, make_trainer\n"
        "from camshaft.callbacks import *\n"
        "tracker = Tracker(ClearML('digits'), histograms=['weight'])\n"
        "trainer = make_trainer(RunDirectory('runs', settings=dict(lr=0.1), terminal=False), tracker)\n"
        "trainer.fit(class_batches(8, 8), class_batches(8), epochs=2)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", script], cwd=tmp_path, check=True, timeout=300,
                   env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})  # fmt: skip
    (archive,) = tmp_path.glob(".clearml/cache/offline/*.zip")
    with zipfile.ZipFile(archive) as content:
        text = "".join(content.read(name).decode(errors="ignore") for name in content.namelist() if "metrics" in name)
    for name in ('"loss"', '"train"', '"val"'):
        assert name in text


# Services of one's own, and their failures ------------------------------------------------------------


class Kept:
    """A service that keeps what it gets, and fails when it is told to."""

    name = "Kept"
    rewinds = False

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[tuple[str, Any]] = []

    def _do(self, what: str, value: Any) -> None:
        if what == self.failing:
            raise ConnectionError("no network")
        self.calls.append((what, value))

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        self._do("open", (run_id, dict(settings), dict(sent)))
        return run_id or "first"

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self._do("log", (step, dict(values)))

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        self._do("image", (name, pixels, step))

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        self._do("histogram", (name, values, step))

    def close(self, outcome: str) -> None:
        self._do("close", outcome)


@pytest.mark.parametrize("failing", ["open", "log", "histogram", "close"])
def test_a_service_that_fails_warns_once_and_training_continues(
    failing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service: Service = Kept(failing)
    trainer = make_trainer(run_directory(tmp_path), Tracker(service, histograms=["weight"]))
    trainer.fit(TRAIN, VAL, epochs=3)
    assert len(trainer.history.rows) == 3
    assert caplog.text.count("Tracker stops sending to Kept: ConnectionError('no network')") == 1


def test_a_resumed_run_is_opened_with_its_id_after_its_step(tmp_path: Path) -> None:
    def run(epochs: int) -> Kept:
        service = Kept()
        checkpoint = RunCheckpoint(tmp_path / "checkpoints", every_epochs=1)
        trainer = make_trainer(run_directory(tmp_path / "runs"), checkpoint, Tracker(service))
        trainer.fit(TRAIN, VAL, epochs=epochs, resume="auto")
        return service

    first, second = run(2), run(4)
    assert first.calls[0] == ("open", (None, {"lr": 0.1, "api_token": "***"}, {}))
    assert second.calls[0] == ("open", ("first", {"lr": 0.1, "api_token": "***"}, {"validation": 12, "epoch": 12}))
    assert [one[0] for what, one in second.calls if what == "log"] == [18, 18, 24, 24]
    assert (first.calls[-1], second.calls[-1]) == (("close", "finished"), ("close", "finished"))


def test_how_a_run_ends_is_told(tmp_path: Path) -> None:
    def outcome(handler: Callable[[StepEnd], object]) -> Any:
        service = Kept()
        trainer = make_trainer(Tracker(service))
        trainer.subscribe(StepEnd, handler, when=at(3))
        with contextlib.suppress(ZeroDivisionError):
            trainer.fit(TRAIN, epochs=1)
        return service.calls[-1]

    assert outcome(lambda event: signal.raise_signal(signal.SIGTERM)) == ("close", "interrupted")
    assert outcome(lambda event: 1 / 0) == ("close", "failed")


def test_images_figures_and_histograms_of_ones_own_handlers() -> None:
    from matplotlib.figure import Figure

    service = Kept()
    tracker = Tracker(service)
    trainer = make_trainer(tracker)

    def draw(event: EpochEnd) -> None:
        tracker.add_image("grey", torch.tensor([[0.0, 1.0], [0.5, 2.0]]), 1)
        tracker.add_figure("figure", Figure(figsize=(1, 1)), 1)
        tracker.add_histogram("values", torch.tensor([1.0, math.nan, 3.0]), 1)

    trainer.subscribe(EpochEnd, draw)
    trainer.fit(TRAIN, epochs=1)
    grey, figure = (value[1] for what, value in service.calls if what == "image")
    assert grey.tolist() == [[[0] * 3, [255] * 3], [[128] * 3, [255] * 3]]
    assert (figure.shape, figure.dtype) == ((100, 100, 3), torch.uint8)
    ((_, values, _),) = (value for what, value in service.calls if what == "histogram")
    assert values.tolist() == [1, 3]


@pytest.mark.parametrize(
    "service", [WandB(), MLflow(), Comet(), ClearML("digits"), Neptune()], ids=lambda one: one.name
)
def test_a_missing_package_is_named_before_the_run(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = needed_package(service.name)
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"Write: pip install {package}\.$"):
        make_trainer(Tracker(service))


def test_tracking_changes_no_weight(tmp_path: Path) -> None:
    def weights(*callbacks: Any) -> nn.Module:
        trainer = make_trainer(*callbacks)
        trainer.fit(TRAIN, VAL, epochs=2)
        return trainer.parts.modules()["model"]

    tracked = weights(Log(every=2), Tracker(Kept(), histograms=["weight"]))
    for one, other in zip(tracked.parameters(), weights().parameters(), strict=True):
        assert torch.equal(one, other)
