"""Digests of what a run computes, and where two runs part."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from torch import Tensor, nn

from camshaft.callbacks import Accumulate, Fingerprint, Placement, RunCheckpoint, RunDirectory
from camshaft.callbacks.fingerprint import digest, digests
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    GradientsReady,
    LossReady,
    StepEnd,
    Trainer,
    at,
)
from camshaft.viewer import Run
from camshaft.viewer.difference import first_difference

COMMAND = Path(sys.executable).with_name("camshaft")
STEPS = 300


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 6, generator=generator), torch.zeros(4, dtype=torch.long)) for _ in range(100)]


def fingerprinted(
    root: Path, *others: Callback, disturb: Callable[[Engine], object] | None = None, every: int = 1, epochs: int = 3,
    **options: Any,
) -> Path:  # fmt: skip
    """Train for 300 steps, and return the run directory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    run = RunDirectory(root, terminal=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[run, *others, Fingerprint(every)])
    if disturb is not None:
        disturb(trainer)
    trainer.fit(data(), epochs=epochs, **options)
    return run.path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fingerprinted(tmp_path_factory.mktemp("undisturbed"))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "fingerprints.jsonl").read_text().splitlines()]


def flip(tensor: Tensor, element: int, bit: int) -> None:
    with torch.no_grad():
        tensor.view(torch.int32).view(-1)[element] ^= 1 << bit


def test_two_runs_alike_have_the_same_file(undisturbed: Path, tmp_path: Path) -> None:
    other = fingerprinted(tmp_path)
    assert (undisturbed / "fingerprints.jsonl").read_bytes() == (other / "fingerprints.jsonl").read_bytes()
    found = first_difference(Run(undisturbed), Run(other))
    assert (found.step, found.num_same) == (None, STEPS)
    assert found.in_words() == "The runs are the same in all 300 rows that both have."


def test_a_row_has_the_batch_the_loss_and_each_gradient_and_weight(undisturbed: Path) -> None:
    row = rows(undisturbed)[0]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (row["epoch"], row["step"], list(row["data"]), list(row["loss"])) == (1, 1, ["0", "1"], ["loss"])
    assert list(row["gradients"]) == list(row["weights"]) == names


def flip_a_weight(engine: Engine) -> None:
    weight = engine.parts.module("model", "a test").get_parameter("2.weight")
    engine.subscribe(StepEnd, lambda event: flip(weight, 5, 0), when=at(137))


def flip_a_gradient(engine: Engine) -> None:
    bias = engine.parts.module("model", "a test").get_parameter("0.bias")

    def disturb(event: GradientsReady) -> None:
        assert bias.grad is not None
        flip(bias.grad, 3, 1)

    engine.subscribe(GradientsReady, disturb, when=at(137))


def change_the_loss(engine: Engine) -> None:
    def disturb(event: LossReady) -> Tensor | None:
        return event.loss * (1 + 2**-20) if event.engine.step == 137 else None

    engine.subscribe(LossReady, disturb)


def flip_a_bit_of_the_batch(engine: Engine) -> None:
    def disturb(event: BatchReady) -> Any:
        if event.engine.step == 137:
            flip(event.batch[0], 7, 0)

    engine.subscribe(BatchReady, disturb)


@pytest.mark.parametrize(
    ("disturb", "kind", "name"),
    [
        (flip_a_weight, "weights", "2.weight"),
        (flip_a_gradient, "gradients", "0.bias"),
        (change_the_loss, "loss", "loss"),
        (flip_a_bit_of_the_batch, "data", "0"),
    ],
)
def test_what_differs_first_at_step_137_of_300_is_found(
    disturb: Callable[[Engine], object], kind: str, name: str, undisturbed: Path, tmp_path: Path
) -> None:
    """The handler that disturbs is attached after the others; it changes what they have seen only where it must."""

    class Disturbs(Callback):
        def attach(self, engine: Engine) -> None:
            super().attach(engine)
            disturb(engine)

        def __repr__(self) -> str:
            return "Disturbs()"

    other = fingerprinted(tmp_path, Disturbs())
    found = first_difference(Run(undisturbed), Run(other))
    assert (found.step, found.kind, found.names, found.before) == (137, kind, (name,), 136)
    done = subprocess.run([COMMAND, "diff", undisturbed, other], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith(f"The runs differ first at step 137, in {kind}: {name} (1 of ")


def test_with_rows_in_between_the_last_one_that_is_the_same_is_named(undisturbed: Path, tmp_path: Path) -> None:
    other = fingerprinted(tmp_path, disturb=flip_a_weight, every=50)
    found = first_difference(Run(undisturbed), Run(other))
    assert (found.step, found.before, found.only) == (150, 100, (294, 0))
    assert "They were the same at step 100; write Fingerprint(every=1)" in found.in_words()


def test_a_run_that_is_cut_and_resumed_has_the_rows_of_one_that_was_not(undisturbed: Path, tmp_path: Path) -> None:
    """Each once, also where the process was gone after rows that the resumed run makes again."""
    for steps in (110, 250, None):
        checkpoint = RunCheckpoint(tmp_path / "checkpoints", every_steps=40)

        def cut(engine: Engine, steps: int | None = steps) -> None:
            if steps is not None:
                engine.subscribe(StepEnd, lambda event: 1 / 0, when=at(steps))

        try:
            run = fingerprinted(tmp_path / "runs", checkpoint, disturb=cut, resume="auto")
        except ZeroDivisionError:
            continue
    assert rows(run) == rows(undisturbed)


def test_the_gradients_of_a_window_are_in_the_row_of_its_last_batch(tmp_path: Path) -> None:
    run = fingerprinted(tmp_path, Accumulate(batches=2), epochs=1)
    assert ["gradients" in row for row in rows(run)[:4]] == [False, True, False, True]


@settings(max_examples=80, deadline=None)
@given(
    element=st.integers(0, 999),
    bit=st.integers(0, 63),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]),
)
def test_one_flipped_bit_gives_another_digest(element: int, bit: int, dtype: torch.dtype) -> None:
    one = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    other = one.clone()
    size = one.element_size()
    bits = other.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    bits[element] ^= torch.tensor(1, dtype=bits.dtype) << (bit % (8 * size))
    assert digest(one) == digest(one.clone())
    assert digest(one) != digest(other)


def test_the_parts_of_a_large_tensor_count_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the digest that they would have together."""
    one = torch.arange(1000, dtype=torch.float32)
    whole, swapped = digest(one), torch.cat([one[64:128], one[:64], one[128:]])
    monkeypatch.setattr("camshaft.callbacks.fingerprint._CHUNK", 64)
    assert digest(one) == whole
    assert digest(swapped) != whole


def test_many_tensors_together_have_the_digests_that_each_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds, small and large, and none of them changed."""
    monkeypatch.setattr("camshaft.callbacks.fingerprint._SMALL", 64)
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator) for shape in ((), (3,), (0, 4), (5, 6), (8, 8))]
    large = [torch.randn(65, generator=generator), torch.randn(30, 10, generator=generator).T]
    nan = torch.tensor([0x7FC00001, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # three kinds of NaN
    others = [torch.tensor([True, False]), torch.tensor([1 + 2j]), torch.arange(5), torch.eye(3).to_sparse(),
              torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.float64).T]  # fmt: skip
    for tensors in (floats, [*floats, nan], large, [*floats, *large], [*others, *floats, *large, nan], others):
        assert digests(tensors).tolist() == [int(digest(one)) for one in tensors]


@pytest.mark.gpu
def test_digests_on_two_devices_are_those_of_one() -> None:
    tensors = [torch.randn(5), torch.randn(5000), torch.arange(3)]
    alone = [int(digest(one)) for one in tensors]
    assert digests([one.cuda() for one in tensors]).tolist() == alone
    assert digests([tensors[0].cuda(), *tensors[1:]]).tolist() == alone


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.5), torch.zeros(0), torch.zeros(3, 0), torch.tensor([True, False]), torch.ones(2, 3).T,
     torch.tensor([1 + 2j]), torch.eye(3).to_sparse()],
    ids=["scalar", "empty", "no columns", "bool", "transposed", "complex", "sparse"],
)  # fmt: skip
def test_every_kind_of_tensor_has_a_digest(tensor: Tensor) -> None:
    assert digest(tensor).shape == ()
    assert digest(tensor) == digest(tensor.clone())


def test_the_order_of_elements_matters_and_that_of_memory_does_not() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    assert digest(one) != digest(one.flip(0))
    matrix = torch.randn(4, 5)
    assert digest(matrix) == digest(matrix.T.contiguous().T)


def test_a_second_fit_goes_on_in_the_file_and_a_new_engine_begins_it_anew(tmp_path: Path) -> None:
    def trainer() -> Engine:
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Fingerprint(40, tmp_path)])

    for _ in range(2):
        engine = trainer()
        engine.fit(data(), epochs=1)
        engine.fit(data(), epochs=1)
        assert [row["step"] for row in rows(tmp_path)] == [40, 80, 120, 160, 200]


@pytest.mark.gpu
def test_a_batch_that_is_not_placed_yet_is_compared_all_the_same(tmp_path: Path) -> None:
    def run(root: Path, *callbacks: Callback) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks).fit(data(), epochs=1)
        return rows(root)

    before = run(tmp_path / "a", Fingerprint(10, tmp_path / "a"), Placement("cuda"))
    after = run(tmp_path / "b", Placement("cuda"), Fingerprint(10, tmp_path / "b"))
    assert before == after


def test_a_file_that_cannot_be_written_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "fingerprints.jsonl").mkdir()
    model = nn.Linear(6, 3)
    callbacks = [Fingerprint(every=10, directory=tmp_path)]
    Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), callbacks=callbacks).fit(
        data(), epochs=1
    )
    assert caplog.text.count("Fingerprint stops writing") == 1


def test_what_is_no_count_and_no_directory_is_refused() -> None:
    with refused(ConfigurationError, "Fingerprint's every"):
        Fingerprint(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused(ConfigurationError, "Fingerprint"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Fingerprint()]).fit(data(), epochs=1)


def test_runs_without_fingerprints_are_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    Engine(lambda engine, batch: None, callbacks=[run]).fit(data(), epochs=1)
    done = subprocess.run([COMMAND, "diff", run.path, run.path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("has no fingerprints.jsonl. Attach Fingerprint(every=...) to a run.")


def test_a_row_every_hundred_steps_costs_little() -> None:
    """The process time of 2000 steps with it and without, in turn; the bound is far above what was measured."""

    def seconds(*callbacks: Callback) -> float:
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), callbacks=callbacks
        )
        began = time.process_time()
        trainer.fit(data() * 20, epochs=1)
        return time.process_time() - began

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        ratios = [seconds(Fingerprint(100, directory)) / seconds() for _ in range(5)]
    print("RATIOS", sorted(ratios))
    assert sorted(ratios)[2] < 1.2
