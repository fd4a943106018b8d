"""The script that draws curves."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
from pathlib import Path


def seen_from(directory: Path, script: Path | None) -> str:
    """Return the address of the script in a page of this directory; "" without one."""
    return "" if script is None else Path(os.path.relpath(script, directory)).as_posix()


def plotly_script(directory: Path) -> Path | None:
    """Put plotly's script into a directory, once, and return its path; None where plotly is not installed.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        version = importlib.metadata.version("plotly")
        source = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
        return None
    path = directory / f".plotly-{version}.min.js"  # hidden: a directory of runs is to show runs
    content = source.read_bytes()
    if not path.exists() or path.stat().st_size != len(content):
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
    return path
