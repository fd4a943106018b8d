"""Notebooks: a real kernel runs them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import class_batches, make_trainer
from PIL import Image

from camshaft.callbacks import LiveCurves
from camshaft.engine import ConfigurationError

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"

# The clients of kernels, not ours, leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def executed(notebook: Any, directory: Path) -> Any:
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(directory)}})
    return client.execute()


def notebook_of(*cells: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def printed(cell: Any) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def pictures(cell: Any) -> list[bytes]:
    found = [
        output["data"] for output in cell["outputs"] if output["output_type"] in ("display_data", "execute_result")
    ]
    return [base64.b64decode(data["image/png"]) for data in found if "image/png" in data]


def test_the_quick_start_runs_and_shows_one_picture_with_both_curves(tmp_path: Path) -> None:
    notebook = executed(nbformat.read(QUICKSTART, as_version=4), tmp_path)
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    (picture,) = pictures(code[1])  # one that was drawn again and again
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width > 2 * image.height  # loss and accuracy side by side
    accuracy = re.search(r"'val_acc': ([\d.]+)", printed(code[2]))
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9
    assert "LiveCurves.on_epoch_end" in printed(code[3])
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]


def test_the_picture_is_drawn_again_and_takes_a_tenth_of_the_time(tmp_path: Path) -> None:
    """Two hundred epochs of a moment each do not make two hundred pictures; the last one has all of them."""
    cell = (
        "import sys, time, torch, IPython.display\n"
        "from camshaft.callbacks import LiveCurves\nfrom camshaft.engine import Engine\n"
        "drawn = []\noriginal = IPython.display.Image\n"
        "def counted(data):\n    drawn.append(len(engine.history.rows))\n    return original(data)\n"
        "IPython.display.Image = counted\n"
        "engine = Engine(lambda engine, batch: {'x': float(engine.epoch)}, callbacks=[LiveCurves('x', 'none')])\n"
        "began = time.monotonic()\nengine.fit([torch.zeros(1)], epochs=200)\n"
        "print(len(drawn), drawn[-1], time.monotonic() - began)"
    )
    done = executed(notebook_of(cell), tmp_path).cells[0]
    number, last, seconds = printed(done).split()
    assert int(last) == 200
    assert 2 <= int(number) <= 3 + float(seconds) / 0.1
    assert len(pictures(done)) == 1


def test_outside_a_notebook_it_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(LiveCurves())
    trainer.fit(class_batches(8), class_batches(8), epochs=2)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Write LiveCurves\(\"loss\"\)\.$"):
        LiveCurves(["loss"])  # type: ignore[arg-type]
