"""Every recipe runs as it is, learns, and leaves a finished run directory behind.

Each test's docstring says what the asserted number would be for a model that has learnt nothing.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
# What a recipe needs besides torch, and what does not work with the oldest torch.
NEEDS = {"graph": "torch_geometric.loader", "language_model": "transformers.models.gpt2.modeling_gpt2"}
RECIPES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep to one thread: models this small are no faster on more, and far slower where other processes want them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(name: str) -> ModuleType:
    """Import a recipe, which no package holds; once, as it may define events."""
    full_name = f"recipe_{name}"
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="not with an older torch", exc_type=ImportError)
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    return sys.modules[full_name]


def run(name: str, output: Path, *arguments: object) -> Any:
    """Run a recipe with these command-line arguments and return its engine."""
    module = recipe(name)
    parser = module.get_args_parser()
    return module.main(parser.parse_args([*map(str, arguments), "--output", str(output)]))


def assert_finished(engine: Any, *pictures: str) -> None:
    """The directory holds the whole log, the settings, a row for each epoch and pictures with something in them."""
    directory = engine.directory
    log = (directory / "log.log").read_text()
    assert f"Run directory: {directory}" in log
    assert "Settings: {" in log
    assert engine.history.reason in log
    assert json.loads((directory / "settings.json").read_text())["output"] == str(directory.parent)
    rows = list(csv.DictReader((directory / "history.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == engine.history["epoch"]
    for picture in pictures:
        assert_real(directory / picture)


def assert_real(picture: Path) -> None:
    """A picture of a fair size that is not of one colour."""
    from matplotlib.image import imread

    pixels = torch.tensor(imread(str(picture)))[..., :3]
    assert min(pixels.shape[:2]) > 150
    assert len(pixels.flatten(0, 1).unique(dim=0)) > 20


def test_every_recipe_has_a_test_and_a_line_in_the_table() -> None:
    tests = {name for name in globals() if name.startswith("test_")}
    table = (ROOT / "examples" / "README.md").read_text()
    for name in RECIPES:
        assert any(test.startswith(f"test_{name}_") for test in tests), name
        assert f"python examples/{name}.py" in table, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_describes_itself_and_every_setting_has_a_default(name: str) -> None:
    module = recipe(name)
    assert f"python examples/{name}.py" in str(module.__doc__)
    module.get_args_parser().parse_args([])


@pytest.mark.slow
def test_digits_learns(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("digits", tmp_path, "--epochs", 4, "--no-bar")
    assert max(trainer.history["val_acc"]) > 0.9
    assert_finished(trainer, "loss.png", "acc.png", "confusion.png", "samples.png")


def test_three_styles_agree(tmp_path: Path) -> None:
    """The largest class has about half of the samples; that the weights agree, the recipe asserts itself."""
    engines = run("three_styles", tmp_path, "--epochs", 4)
    for engine in engines:
        assert max(engine.history["val_acc"]) > 0.85
        assert_finished(engine)


def test_rings_tells_the_rings_apart(tmp_path: Path) -> None:
    """Guessing has an area under the curve of 0.5; the best that is possible is 0.983."""
    trainer = run("rings", tmp_path, "--lr", 0.01, "--epochs", 8)
    assert max(trainer.history["val_auc"]) > 0.95
    assert_finished(trainer, "loss.png", "auc.png", "predictions.png")


@pytest.mark.slow
def test_classification_learns(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("classification", tmp_path, "--epochs", 3, "--ema-decay", 0.9)
    assert max(trainer.history["val_acc"]) > 0.8
    assert_finished(trainer, "loss.png", "acc.png", "samples.png", "least_sure.png")


@pytest.mark.slow
def test_classification_runs_in_bf16(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("classification", tmp_path, "--epochs", 2, "--ema-decay", 0.9, "--precision", "bf16")
    assert max(trainer.history["val_acc"]) > 0.4


@pytest.mark.slow
def test_segmentation_learns(tmp_path: Path) -> None:
    """Background everywhere has a mean intersection over union of about 0.2."""
    engine = run("segmentation", tmp_path, "--images", 480, "--epochs", 4)
    assert max(engine.history["val_miou"]) > 0.3
    assert_finished(engine, "loss.png", "miou.png", "overlays.png")


@pytest.mark.slow
def test_detection_learns(tmp_path: Path) -> None:
    """Boxes at random, or the same box for every image, have a mean average precision below 0.02."""
    engine = run("detection", tmp_path, "--images", 200, "--epochs", 4)
    assert max(engine.history["val_map"]) > 0.2
    assert_finished(engine, "loss.png", "map.png", "boxes.png")


@pytest.mark.slow
def test_gan_finds_the_clusters(tmp_path: Path) -> None:
    """Untrained, all samples lie in the middle, in no cluster; of points spread along the circle, 57 % lie in one."""
    engine = run("gan", tmp_path, "--epochs", 15, "--picture-every", 5)
    assert engine.history["val_clusters"][-1] == 8
    assert engine.history["val_good"][-1] > 0.65
    assert_finished(engine, "generator_loss.png", "discriminator_loss.png", "good.png", "clusters.png", "samples.png")


@pytest.mark.slow
def test_text_learns(tmp_path: Path) -> None:
    """The frequencies of the characters alone give 3.20 nats per character, those of their pairs 2.48."""
    engine = run("text", tmp_path, "--max-steps", 120, "--validate-every", 40, "--width", 128, "--lr", 0.01)
    assert [row["step"] for row in engine.history.validations] == [40, 80, 120]
    assert engine.history.validations[-1]["val_loss"] < 2.3
    assert 60 <= engine.num_updates < 120
    assert len((engine.directory / "sample.txt").read_text()) > 300
    assert_finished(engine, "loss.png")


def test_fsdp_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One letter for every place, or one of 16 at random, is right on 6 to 7 %."""
    trainer = run("fsdp", tmp_path)
    assert max(trainer.history["val_acc"]) > 0.9
    assert_finished(trainer)
    line = capsys.readouterr().out.splitlines()[-2]
    assert line == line[:6] * 3


@pytest.mark.slow
def test_fsdp_gives_on_two_processes_what_it_gives_on_one(tmp_path: Path) -> None:
    """Weights are compared, after training on each."""
    arguments = ("--lines", 400, "--epochs", 2)
    alone = run("fsdp", tmp_path / "one", *arguments).directory
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "examples" / "fsdp.py"]
    subprocess.run(
        [*map(str, [*command, *arguments, "--output", tmp_path / "two"])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240,
    )  # fmt: skip
    (together,) = (tmp_path / "two").iterdir()
    ours, theirs = (torch.load(one / "checkpoints" / "best.pt", weights_only=True) for one in (alone, together))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_noisy_labels_shows_the_difference(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %; equal losses would differ by nothing."""
    trainers = run("noisy_labels", tmp_path)
    plain, symmetric = (trainer.history["val_acc"][-1] for trainer in trainers.values())
    assert symmetric > 0.93
    assert symmetric > plain + 0.05
    for trainer in trainers.values():
        assert_finished(trainer, "loss.png", "acc.png")
    assert_real(trainers["SymmetricCrossEntropy"].directory / "comparison.png")


def test_rollback_ends_as_if_the_batches_had_never_been_there(tmp_path: Path) -> None:
    trainers = run("rollback", tmp_path)
    spoiled, back, without = trainers.values()
    assert spoiled.history["val_acc"][-1] < 0.2
    assert back.history["val_acc"][-1] > 0.9
    weights = zip(back.parts["model"].parameters(), without.parts["model"].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert len(back.history.remarks) == 6
    assert_real(back.directory / "losses.png")


def test_parameter_groups_learns_and_decays_weights_only(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("parameter_groups", tmp_path, "--epochs", 6)
    assert max(trainer.history["val_acc"]) > 0.95
    decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.parts["optimizer"].param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.parts["model"].named_parameters():
        assert decay[id(parameter)] == (1e-5 if parameter.ndim > 1 else 0), name
    assert_finished(trainer, "loss.png", "acc.png", "weights.png")


def test_graph_learns_and_logs_by_steps(tmp_path: Path) -> None:
    """One kind for every graph is right on 25 %."""
    trainer = run("graph", tmp_path, "--epochs", 6)
    assert max(trainer.history["val_acc"]) > 0.9
    assert_finished(trainer, "loss.png", "acc.png", "confusion.png")
    rows = list(csv.DictReader((trainer.directory / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(10, 151, 10))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_search_finds_settings_and_prunes_trials(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    best = run("search", tmp_path, "--trials", 8, "--epochs", 6, "--folds", 2)
    assert best.history["val_acc"][-1] > 0.93
    assert_real(best.directory / "search.png")
    logs = [path.read_text() for path in tmp_path.glob("*/log.log")]
    assert len(logs) == 8
    assert any("Prune: val_acc is" in log for log in logs)


def test_steering_is_repeated_to_the_bit(tmp_path: Path) -> None:
    """That the weights agree, the recipe asserts itself; one class for every image is right on 10 to 12 %."""
    engines = run("steering", tmp_path)
    for engine in engines:
        assert engine.history.reason == "Steering: it was ordered to stop"
        assert len(engine.history.remarks) == 5
        assert engine.history["val_acc"][-1] > 0.9
        assert_finished(engine)


@pytest.mark.slow
def test_language_model_learns_and_is_resumed(tmp_path: Path) -> None:
    """A uniform guess has 5.5 nats per byte, and the frequencies of bytes alone have 3.1."""
    small = ("--width", 64, "--layers", 1, "--validate-every", 40)
    trainer = run("language_model", tmp_path, *small, "--max-steps", 200)
    assert trainer.history.best("val_loss", "min")["val_loss"] < 3.0
    assert len((trainer.directory / "sample.txt").read_text()) > 100
    resumed = run(
        "language_model", tmp_path, *small, "--max-steps", 240, "--resume", trainer.directory / "checkpoints"
    )
    assert resumed.step == 240
    assert resumed.directory == trainer.directory
    rows = list(csv.DictReader((resumed.directory / "steps.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(20, 241, 20))
    assert_real(resumed.directory / "loss.png")


def test_similarity_learns(tmp_path: Path) -> None:
    """Untrained, recall@1 is 0.957, as the pixels tell much; of the 50 nearest, 63 % are of the class."""
    trainer = run("similarity", tmp_path, "--epochs", 4)
    assert max(trainer.history["val_recall"]) > 0.975
    _, val_set = recipe("similarity").load_digits()
    images, labels = val_set.tensors
    embedding: Tensor = trainer.predict([images])
    nearest = (embedding @ embedding.T).topk(51).indices[:, 1:]
    assert (labels[nearest] == labels[:, None]).float().mean() > 0.93
    assert_finished(trainer, "loss.png", "recall.png", "embedding.png")


@pytest.mark.slow
def test_video_learns(tmp_path: Path) -> None:
    """One direction for every clip, or a look at single frames, is right on 25 to 31 %."""
    trainer = run("video", tmp_path, "--clips", 320, "--size", 16, "--epochs", 3, "--batch-size", 8)
    assert max(trainer.history["val_acc"]) > 0.7
    assert_finished(trainer, "loss.png", "acc.png", "confusion.png", "clips.png")


def test_custom_handler_draws_the_hardest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("custom_handler", tmp_path, "--epochs", 3)
    assert max(trainer.history["val_acc"]) > 0.85
    assert capsys.readouterr().out.count("hardest in the first validation") == 1
    assert_finished(trainer, "loss.png", "acc.png", "hardest-01.png", "hardest-02.png", "hardest-03.png")


def test_replay_names_the_module_that_returns_nan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of 100 steps, the one with the empty sequence; its checkpoint is that of step 80."""
    trainer = run("replay", tmp_path)
    assert "first at step 85;" in trainer.history.reason
    said = capfd.readouterr().out
    assert "Step 85 was made again, from the checkpoint at step 80." in said
    assert 'of the computation:\n  the output of "pool" (MeanOfSequence)\n' in said
    assert "The digests of the 4 steps that both have are the same, bit for bit, up to step 84." in said
    assert_finished(trainer)


def test_distributed_runs_on_one_process(tmp_path: Path) -> None:
    """One class for every image is right on 10 to 12 %."""
    trainer = run("distributed", tmp_path)
    assert max(trainer.history["val_acc"]) > 0.9
    assert_finished(trainer, "loss.png", "acc.png")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "text"])
def test_distributed_gives_the_same_numbers_on_two_processes(task: str, tmp_path: Path) -> None:
    """Another order of the data moves a loss by 0.008 or more, and rounding by less than 0.001.

    Two processes leave one run directory, as one does.
    """
    alone = run("distributed", tmp_path / "alone", "--task", task, "--epochs", 2)
    script = [str(ROOT / "examples" / "distributed.py"), "--task", task, "--epochs", "2", "--output", "together"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, *script], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert not done.returncode, done.stderr
    (directory,) = (tmp_path / "together").iterdir()
    rows = list(csv.DictReader((directory / "history.csv").read_text().splitlines()))
    for row, expected in zip(rows, alone.history.rows, strict=True):
        for name in ("train_loss", "val_loss", "val_acc"):
            assert float(row[name]) == pytest.approx(expected[name], abs=0.003), name
    assert done.stdout.count("run directory:") == 1
    logs = {path.name for path in directory.glob("*.log")}
    assert logs == {"log.log", "log.rank1.log"}


@pytest.fixture
def voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Pascal VOC 2012 of eight noise images, in the layout of the real one, which is not downloaded."""
    from PIL import Image

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", lambda *args, **kwargs: None)
    base = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    names = [f"2012_{number:06}" for number in range(8)]
    random = np.random.default_rng(0)
    mask = np.zeros((90, 120), dtype=np.uint8)
    mask[20:60, 30:80] = 12
    mask[20:22, 30:80] = 255
    corners = "<xmin>30</xmin><ymin>20</ymin><xmax>80</xmax><ymax>60</ymax>"
    box = f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"
    for name in names:
        Image.fromarray(random.integers(255, size=(90, 120, 3), dtype=np.uint8)).save(base / f"JPEGImages/{name}.jpg")
        Image.fromarray(mask).save(base / f"SegmentationClass/{name}.png")
        size = "<size><width>120</width><height>90</height><depth>3</depth></size>"
        (base / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{size}{box}</annotation>"
        )
    for part in ("Segmentation/train", "Segmentation/val", "Main/train", "Main/val"):
        (base / f"ImageSets/{part}.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize(("name", "picture"), [("segmentation", "overlays.png"), ("detection", "boxes.png")])
def test_voc_is_read_in_its_real_layout(name: str, picture: str, voc: Path, tmp_path: Path) -> None:
    engine = run(name, tmp_path / "runs", "--data", "voc", "--data-dir", voc, "--batch-size", 4, "--epochs", 1)
    assert engine.step == 2
    assert_finished(engine, picture)


def test_cifar10_is_read_in_its_real_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = random.integers(255, size=(24, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": images, "labels": random.integers(10, size=24).tolist()}))
    trainer = run(
        "classification", tmp_path / "runs", "--data", "cifar10", "--data-dir", tmp_path / "data", "--epochs", 1
    )
    assert trainer.step == 5 * 24 // 32
    assert_finished(trainer, "samples.png", "least_sure.png")


def write_mnist(root: Path) -> None:
    """Write 500 noise images and their labels in MNIST's four files."""
    random = np.random.default_rng(0)
    root.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = random.integers(255, size=(500, 28, 28), dtype=np.uint8)
        labels = np.arange(500, dtype=np.uint8) % 10
        head = struct.pack(">iiii", 0x803, 500, 28, 28)
        (root / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 500) + labels.tobytes())


def test_mnist_is_read_in_its_real_layout(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    trainers = run("noisy_labels", tmp_path / "runs", "--data", "mnist", "--data-dir", tmp_path, "--epochs", 1)
    assert all(trainer.step == 16 for trainer in trainers.values())


def test_fashion_mnist_is_read_in_its_real_layout(tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    arguments = ("--data", "fashionmnist", "--data-dir", tmp_path, "--epochs", 1, "--steps", 3)
    trainer = run("similarity", tmp_path / "runs", *arguments)
    assert trainer.step == 3
    assert_finished(trainer, "embedding.png")
