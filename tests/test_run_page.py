"""The page of a run: whole at any moment, and in a real browser."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import opened
from helpers import class_batches, make_trainer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import BestCheckpoint, Log, Profile, Report, RunCheckpoint, RunDirectory
from camshaft.callbacks.page_writer import PageWriter
from camshaft.engine import Callback, Engine, EpochEnd, StepEnd, at
from camshaft.viewer import Run, RunNotFoundError, comparison_page, plotly_script, run_page
from camshaft.viewer.curves import panels_of
from camshaft.viewer.thinning import thinned

TRAIN, VAL = class_batches(*[8] * 10), class_batches(16, 16, seed=3)
HOSTILE = [
    "<script>alert(1)</script>", '"quotes"', "it's", "a/../b", "=1+1", "line\nbreak", "</script><b>", "a&amp;b",
    "%{y}", "\x1b[31mred",
]  # fmt: skip


def trained(root: Path, *others: Callback, epochs: int = 6, lr: float = 0.1) -> RunDirectory:
    """A run with curves, steps and a confusion matrix."""
    run = RunDirectory(root, settings={"lr": lr, "model": {"width": 64}}, terminal=False)
    metrics = {"acc": MulticlassAccuracy(3), "confusion": MulticlassConfusionMatrix(3)}
    trainer = make_trainer(
        run, Log(every=2), BestCheckpoint("val_acc"), *others, Report(class_names=["cat", "dog", "ship"]),
        metrics=metrics, lr=lr,
    )  # fmt: skip
    trainer.fit(TRAIN, VAL, epochs=epochs)
    return run


def column(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def page_data(path: Path) -> dict[str, Any]:
    """What a page hands to its script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def curve(data: dict[str, Any], title: str, name: str) -> dict[str, Any]:
    (panel,) = (one for one in data["panels"] if one["title"] == title)
    (found,) = (one for one in panel["curves"] if one["name"] == name)
    assert isinstance(found, dict)
    return found


def test_the_page_has_the_history_on_three_axes_and_marks_the_best_moment(tmp_path: Path) -> None:
    run = trained(tmp_path)
    data, losses = page_data(run.path / "report.html"), column(run.path / "history.csv", "val_loss")
    drawn = curve(data, "loss", "validation")
    assert drawn["value"] == losses
    assert drawn["step"] == [10, 20, 30, 40, 50, 60]
    assert drawn["epoch"] == [1, 2, 3, 4, 5, 6]
    assert drawn["seconds"] == sorted(drawn["seconds"])
    assert drawn["best"]["value"] == min(losses)
    accuracies = column(run.path / "history.csv", "val_acc")
    assert data["best"]["epoch"] == accuracies.index(max(accuracies)) + 1
    fine = curve(data, "loss", "training, by steps")
    assert fine["value"] == column(run.path / "steps.csv", "loss")
    assert fine["epoch"][0] == pytest.approx(0.2)
    assert {panel["title"] for panel in data["panels"]} >= {"loss", "acc", "learning rate", "samples per second"}


def test_without_a_log_the_rates_and_the_speed_are_those_of_epochs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    make_trainer(run, Report(), lr=0.25).fit(TRAIN, VAL, epochs=3)
    data = page_data(run.path / "report.html")
    assert curve(data, "learning rate", "lr")["value"] == [0.25] * 3
    assert all(value > 0 for value in curve(data, "steps per second", "training")["value"])


def test_the_confusion_matrix_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    """Of a value that is best in epoch 2 of 4; the picture is of it, too, and a resumed run keeps it."""
    scores = [0.2, 0.9, 0.5, 0.4]

    def step(engine: Engine, batch: torch.Tensor) -> dict[str, float] | None:
        if engine.training:
            return None
        engine.measure(torch.zeros(1), torch.zeros(1))
        return {"score": scores[engine.epoch - 1]}

    def run_to(epochs: int, resume: str | None = None) -> RunDirectory:
        run = RunDirectory(tmp_path / "runs", terminal=False)
        best = BestCheckpoint("val_score", "max", tmp_path / "best")
        report, checkpoint = Report(class_names=["a", "b"]), RunCheckpoint(tmp_path / "checkpoints", every_epochs=1)
        engine = Engine(step, model=torch.nn.Linear(1, 1), callbacks=[run, best, checkpoint, report])
        engine.stages.add_metrics({"confusion": _EpochMatrix()})
        engine.fit([torch.zeros(1)], [torch.zeros(1)], epochs=epochs, resume=resume)
        return run

    run_to(3)
    run = run_to(4, resume="auto")
    kept = json.loads((run.path / "matrices.json").read_text())
    assert kept["class_names"] == ["a", "b"]
    assert kept["matrices"]["confusion"] == {"title": "confusion, validation, epoch 2", "values": [[2, 0], [0, 2]]}
    page = (run.path / "report.html").read_text()
    assert "confusion, validation, epoch 2" in page
    assert "resumed" in page


class _EpochMatrix(Metric):
    """A metric whose value tells how often it was computed."""

    num_computed = 0

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Nothing is kept."""

    def compute(self) -> torch.Tensor:
        self.num_computed += 1
        return torch.eye(2, dtype=torch.long) * self.num_computed


def test_settings_environment_handlers_model_times_and_log_are_there(tmp_path: Path) -> None:
    page = (trained(tmp_path, Profile()).path / "report.html").read_text()
    for text in ("model.width", "torch_threads", "BestCheckpoint", "calls,", "Linear(in_features=4", "15 parameters",
                 "forward", "End of the run: 6 epochs done"):  # fmt: skip
        assert text in page, text


def test_a_run_in_a_repository_has_its_commit_and_whether_files_are_changed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from camshaft.callbacks import RunDirectory\nprint(RunDirectory('runs').path)\n"
                      "from camshaft.callbacks.environment import environment\nimport json\n"
                      "print(json.dumps(environment()['git']))\n")  # fmt: skip

    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, text=True, capture_output=True
        ).stdout

    def seen() -> Any:
        ran = subprocess.run([sys.executable, script], cwd=tmp_path, check=True, text=True, capture_output=True)
        return json.loads(ran.stdout.splitlines()[-1])

    assert seen() is None or tmp_path.is_relative_to(Path.cwd())
    git("init", "-q")
    git("add", "train.py")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert seen() == {"commit": commit, "changed": False}
    script.write_text(script.read_text() + "# changed\n")
    assert seen() == {"commit": commit, "changed": True}


def test_a_failed_run_has_a_page_with_its_error_and_a_traceback(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())

    def break_down(event: StepEnd) -> None:
        raise ValueError("the <b>disk</b> burns")

    trainer.subscribe(StepEnd, break_down, when=at(15))
    with pytest.raises(ValueError, match="burns"):
        trainer.fit(TRAIN, VAL, epochs=3)
    page = (run.path / "report.html").read_text()
    assert "ValueError: the &lt;b&gt;disk&lt;/b&gt; burns" in page
    assert "break_down" in page
    assert Run(run.path).status == "failed"
    assert len(curve(page_data(run.path / "report.html"), "loss", "validation")["value"]) == 1


def test_an_interrupted_run_has_a_page_that_says_by_what(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())
    trainer.subscribe(StepEnd, lambda event: signal.raise_signal(signal.SIGTERM), when=at(15))
    trainer.fit(TRAIN, VAL, epochs=3)
    page = (run.path / "report.html").read_text()
    assert f"The page of the run: {run.path / 'report.html'}" in (run.path / "log.log").read_text()
    assert '<span class="status interrupted">interrupted</span>' in page
    assert "interrupted by SIGTERM" in page


def test_without_plotly_there_is_no_page_and_a_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("camshaft.callbacks.page_writer.plotly_script", lambda directory: None)
    with caplog.at_level(logging.INFO):
        run = RunDirectory(tmp_path, terminal=False)
        make_trainer(run, Report()).fit(TRAIN, VAL, epochs=1)
    assert not (run.path / "report.html").exists()
    assert (run.path / "loss.png").exists()
    assert "Write: pip install camshaft[report]." in caplog.text


def test_the_page_can_be_left_out_and_the_script_is_there_once(tmp_path: Path) -> None:
    without = RunDirectory(tmp_path, terminal=False)
    make_trainer(without, Report(page=False)).fit(TRAIN, VAL, epochs=1)
    assert not (without.path / "report.html").exists()
    runs = [trained(tmp_path, epochs=1) for _ in range(2)]
    (script,) = tmp_path.glob(".plotly-*")
    assert script.stat().st_size > 1e6
    for run in runs:
        assert f'src="../{script.name}"' in (run.path / "report.html").read_text()
        assert (run.path / "report.html").stat().st_size < 1e5


def test_the_page_of_a_run_that_goes_on_is_written_on_another_thread_and_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())
    seen: list[str] = []

    def look(event: EpochEnd) -> None:
        deadline = time.monotonic() + 20
        while not (run.path / "report.html").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((run.path / "report.html").read_text())
        assert threading.current_thread() is threading.main_thread()

    trainer.subscribe(EpochEnd, look, when=at(1))
    trainer.fit(TRAIN, VAL, epochs=3)
    assert '<span class="status running">running</span>' in seen[0]
    assert '<span class="status ended">ended</span>' in (run.path / "report.html").read_text()


def test_a_page_takes_no_more_than_a_fiftieth_of_the_time(tmp_path: Path) -> None:
    """Two hundred epochs of a moment each do not make two hundred pages."""
    written: list[float] = []
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())
    original = PageWriter._write

    def counted(self: PageWriter, matrices: Any) -> None:
        began = time.monotonic()
        original(self, matrices)
        written.append(time.monotonic() - began)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageWriter, "_write", counted)
        began = time.monotonic()
        trainer.fit(TRAIN[:1], VAL[:1], epochs=200)
        took = time.monotonic() - began
    assert len(written) <= 3 + took / (50 * min(written))


def test_a_page_that_cannot_be_written_warns_once_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())
    (run.path / "report.html").mkdir()
    trainer.fit(TRAIN, VAL, epochs=2)
    assert len(trainer.history.rows) == 2
    assert caplog.text.count("Report could not write its page") == 1


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_run_page import TRAIN, VAL, trained
from helpers import make_trainer
from camshaft.callbacks import Report, RunCheckpoint, RunDirectory
from camshaft.engine import EpochEnd
run = RunDirectory({root!r}, terminal=False)
trainer = make_trainer(run, RunCheckpoint({checkpoints!r}, every_steps=3), Report())
trainer.subscribe(EpochEnd, lambda event: print("epoch", flush=True))
trainer.fit(TRAIN, VAL, epochs={epochs}, resume="auto")
"""


@pytest.mark.slow
def test_a_killed_run_leaves_a_whole_page_and_the_resumed_one_goes_on_in_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    settings = {"tests": str(Path(__file__).parent), "root": str(tmp_path / "runs"),
                "checkpoints": str(tmp_path / "checkpoints")}  # fmt: skip
    script.write_text(KILLED.format(epochs=100_000, **settings))
    for kill in range(3):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(5 + 3 * kill):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
        page = (run / "report.html").read_text()
        assert page.rstrip().endswith("</html>")
        assert Run(run).status == "killed"
    epochs = len(Run(run).epochs) + 2
    script.write_text(KILLED.format(epochs=epochs, **settings))
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert [row["epoch"] for row in Run(run).epochs] == list(range(1, epochs + 1))
    assert Run(run).status == "ended"
    page = (run / "report.html").read_text()
    assert page.count("<td>resumed</td>") == 3
    assert curve(page_data(run / "report.html"), "loss", "validation")["epoch"] == list(range(1, epochs + 1))
    clock = Run(run).clock
    assert clock == sorted(clock)


def test_hostile_names_are_text_and_write_nothing_elsewhere(tmp_path: Path) -> None:
    """In the page, and in the files that it is made from."""
    root = tmp_path / "runs"
    run = RunDirectory(root, settings=dict.fromkeys(HOSTILE, "<img src=x onerror=alert(1)>"), terminal=False)

    names = [name for name in HOSTILE if name.isprintable()]  # others are refused

    def step(engine: Engine, batch: torch.Tensor) -> dict[str, float]:
        return dict.fromkeys(names, 1.0)

    Engine(step, callbacks=[run, Log(every=1), Report(class_names=HOSTILE)]).fit(
        [torch.zeros(1)], [torch.zeros(1)], epochs=2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert {path.name for path in root.iterdir() if not path.name.startswith(".plotly")} == {run.path.name}
    with opened(run.path / "report.html") as shown:
        for name in names:
            assert shown.panel(name).is_visible(), name
        cells = shown.page.locator("td").all_text_contents()
        assert set(HOSTILE) <= set(cells)
        assert cells.count("<img src=x onerror=alert(1)>") == len(HOSTILE)
        assert shown.page.locator("img").count() == 0
        assert shown.messages == []
    assert {name.removeprefix("val_") for name in Run(run.path).epochs[0] if name.startswith("val_")} == set(names)
    assert {name for row in Run(run.path).steps() for name in row} >= set(names)
    with (run.path / "steps.csv").open(newline="") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "+", "@"))]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_is_quiet_asks_no_host_and_fits(width: int, scheme: str, tmp_path: Path) -> None:
    run = trained(tmp_path)
    with opened(run.path / "report.html", width=width, scheme=scheme) as shown:
        shown.panel("loss")
        assert shown.messages == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in shown.requests)
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        ground = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 30)")


def test_in_a_browser_the_value_under_the_cursor_is_that_of_the_history(tmp_path: Path) -> None:
    run = trained(tmp_path)
    losses = column(run.path / "history.csv", "val_loss")
    with opened(run.path / "report.html") as shown:
        for number in (1, 4):
            assert f"validation : {losses[number]:.6g}" in shown.value_under_cursor("loss", "validation", number)
        panel = shown.panel("loss")
        shown.page.select_option("#axis", "epoch")
        assert panel.evaluate("element => element.data.find((one) => one.name === 'validation').x") == [
            1, 2, 3, 4, 5, 6,
        ]  # fmt: skip
        shown.page.check("#logarithmic")
        assert panel.evaluate("element => element._fullLayout.yaxis.type") == "log"
        shown.page.select_option("#axis", "seconds")
        assert panel.evaluate("element => element._fullLayout.xaxis.title.text") == "time"
        shown.page.fill("#smoothing", "0.9")
        assert panel.evaluate("element => element.data.length") > 4  # each curve once as it is, and once smoothed
        panel.locator(".legendtoggle").first.click()
        shown.page.wait_for_timeout(600)  # plotly waits for a second click
        hidden = panel.evaluate("element => element.data.filter((one) => one.visible === 'legendonly').length")
        assert hidden >= 1
        assert shown.messages == []


@pytest.mark.parametrize(("num_validations", "num_logged"), [(10_000, 0), (0, 1_000_000)])
def test_in_a_browser_a_very_long_run_opens_in_three_seconds_with_its_extremes(
    num_validations: int, num_logged: int, tmp_path: Path
) -> None:
    run = trained(tmp_path, epochs=2)
    if num_validations:
        lines = ["epoch,step,train_loss,val_loss,val_acc"]
        lines += [f"{at // 100 + 1},{at + 1},{1 / (at + 1)},{math.sin(at)},0.5" for at in range(num_validations)]
        lines[5001] = "50,5001,0.1,-123.5,0.5"
        (run.path / "validations.csv").write_text("\n".join(lines) + "\n")
    else:
        with (run.path / "steps.csv").open("w") as file:
            file.write("epoch,step,loss,lr\n")
            for number in range(1, num_logged + 1):
                file.write(f"1,{number},{-123.5 if number == 777_777 else math.sin(number)},0.1\n")
    page = run.path / "report.html"
    page.write_text(run_page(Run(run.path), plotly_script(tmp_path)))
    assert page.stat().st_size < 2e6
    seconds = []
    for _ in range(3):  # the best of three: other processes may have the cores
        with opened(page) as shown:
            started = time.monotonic()
            panel = shown.panel("loss")
            shown.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            drawn = time.monotonic() - started
            timing = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
            seconds.append(drawn + shown.page.evaluate(timing) / 1000)
            lowest = panel.evaluate("element => Math.min(...element.data.flatMap((one) => one.y))")
        assert lowest == -123.5
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3, seconds


def test_thinning_keeps_what_is_little_and_the_extremes_of_what_is_much() -> None:
    few = [(float(x), float(x % 7)) for x in range(1500)]
    assert thinned(few) == few
    many = [(float(x), math.sin(x)) for x in range(100_000)]
    many[31_415] = (31_415.0, 9.0)
    many[50_000] = (50_000.0, math.nan)
    kept = thinned(many)
    assert len(kept) <= 2100
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert (31_415.0, 9.0) in kept
    assert kept[0] == many[0]
    assert kept[-1] == many[-1]
    assert sum(math.isnan(y) for _, y in kept) == 1


def test_a_nan_is_a_gap(tmp_path: Path) -> None:
    values = [1.0, math.nan, 3.0]
    run = RunDirectory(tmp_path, terminal=False)
    engine = Engine(lambda engine, batch: {"score": values[engine.epoch - 1]}, callbacks=[run, Report()])
    engine.fit([torch.zeros(1)], epochs=3)
    assert curve(page_data(run.path / "report.html"), "score", "training")["value"] == [1.0, None, 3.0]


def test_validations_in_mid_epoch_are_all_drawn_with_the_training_between_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run, Report())
    trainer.fit(TRAIN, VAL, epochs=2, validate_every="4 steps")
    data = page_data(run.path / "report.html")
    steps = [row["step"] for row in trainer.history.validations]
    assert curve(data, "loss", "validation")["step"] == steps
    assert curve(data, "loss", "training")["step"] == [
        row["step"] for row in trainer.history.validations if "train_loss" in row
    ]


def test_several_validation_sets_have_a_curve_each(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    make_trainer(run, Report()).fit(TRAIN, {"clean": VAL, "noisy": VAL}, epochs=2)
    (panel,) = (one for one in panels_of(Run(run.path)) if one.title == "loss")
    assert [one.name for one in panel.curves] == ["training", "validation, clean", "validation, noisy"]


def test_comparison_in_a_browser(tmp_path: Path) -> None:
    runs = [Run(trained(tmp_path / "runs", lr=lr).path) for lr in (0.1, 0.5)]
    page = tmp_path / "comparison.html"
    page.write_text(comparison_page(runs, tmp_path, plotly_script(tmp_path / "runs")))
    text = page.read_text()
    assert text.index("Settings that differ") < text.index("What they reached")
    losses = column(runs[1].path / "history.csv", "val_loss")
    with opened(page) as shown:
        value = shown.value_under_cursor("loss, validation", runs[1].name, 3)
        assert f"{runs[1].name} : {losses[3]:.6g}" in value
        rows = shown.page.locator("details", has_text="Settings that differ").locator("tbody tr").all_text_contents()
        assert rows == ["lr0.10.5"]
        panel = shown.panel("loss, validation")
        panel.locator(".legendtoggle").first.click()
        shown.page.wait_for_timeout(600)  # plotly waits for a second click
        assert panel.evaluate("element => element.data.filter((one) => one.visible === 'legendonly').length") >= 1
        shown.page.set_viewport_size({"width": 390, "height": 900})
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert shown.messages == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in shown.requests)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("timeline.jsonl", b'{"what": "started"\nnot json\n[1]\n{"what": 3, "time": "x"}\n'),
        ("history.csv", b"epoch,step,val_loss\n1,10,abc\n1,10\n2,20,0.5\n"),
        ("steps.csv", b"\xff\xfe\x00"),
        ("settings.json", b"[1, 2"),
        ("matrices.json", b"{}"),
        ("profile.csv", b""),
    ],
)
def test_a_damaged_file_leaves_out_what_it_had(file: str, content: bytes, tmp_path: Path) -> None:
    run = trained(tmp_path, epochs=2)
    (run.path / file).write_bytes(content)
    page = run_page(Run(run.path), None)
    assert page.endswith("</html>\n")
    if file == "history.csv":
        assert Run(run.path).epochs == [{"epoch": 2, "step": 20, "val_loss": 0.5}]


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"does not exist. Pass the directory that a RunDirectory has made\.$"):
        Run(tmp_path / "none")
    with pytest.raises(RunNotFoundError, match=r"is not a run directory: it has no settings\.json\. Pass "):
        Run(tmp_path)


def test_watching_a_page_changes_no_weight(tmp_path: Path) -> None:
    with_page, without = make_trainer(RunDirectory(tmp_path, terminal=False), Report()), make_trainer()
    for trainer in (with_page, without):
        trainer.fit(TRAIN, VAL, epochs=3)
    for one, other in zip(with_page.parts.named_parameters(), without.parts.named_parameters(), strict=True):
        assert torch.equal(one[1], other[1])
    assert os.listdir(tmp_path)
