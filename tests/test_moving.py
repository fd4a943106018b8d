"""The pages on moving here: both programs of each page run, and come to the same numbers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs" / "moving").glob("*.md"))
NEEDS = {"loop": "torch", "ignite": "ignite"}  # the others are named as their package

COMPARE = """
import torch

def ran(*blocks):
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "page", "exec"), names)
    return names

before, after = ran(blocks[0], blocks[1]), ran(blocks[0], blocks[2])
losses, others = torch.tensor(before["val_losses"]), torch.tensor(after["val_losses"])
assert losses.shape == (5,)
assert losses[-1] < 0.8 * losses[0]
torch.testing.assert_close(losses, others, rtol=1e-5, atol=1e-6)
if "network" not in before:  # a model of Keras has layers of its own
    for one, other in zip(before["model"].parameters(), after["model"].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.stem, marks=() if page.stem in ("loop", "ignite", "lightning") else pytest.mark.slow
        )
        for page in PAGES
    ],
)
def test_both_programs_of_the_page_end_with_the_same_numbers(page: Path, tmp_path: Path) -> None:
    package = NEEDS.get(page.stem, page.stem)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    blocks = [block.split("```")[0] for block in page.read_text().split("```python\n")[1:]]
    assert len(blocks) == 3
    script = tmp_path / "both.py"
    script.write_text(f"blocks = {blocks!r}\n{COMPARE}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("equal")


def test_there_is_a_page_for_each_of_those_that_people_come_from() -> None:
    assert [page.stem for page in PAGES] == [
        "fastai",
        "ignite",
        "keras",
        "lightning",
        "loop",
        "torchkeras",
        "transformers",
    ]
