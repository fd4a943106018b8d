"""What every test shares."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

# Models this small are no faster on more threads, and far slower where other processes want the cores.
torch.set_num_threads(1)

# A shell lets what it starts in the background ignore Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def below_a_file(tmp_path: Path) -> Path:
    """A directory that nobody can make, root neither: a regular file stands in its way."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "directory"
