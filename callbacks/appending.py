"""Files that grow by whole pieces."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def append(path: Path, content: bytes) -> None:
    """Append all of the content, or nothing.

    Raises:
        OSError: if the disk is full, or the file cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def cut(file: BinaryIO, is_kept: Callable[[bytes], bool]) -> None:
    """Keep a file's lines from its present place up to the first that is not kept, or that was cut off by a kill.

    Args:
        file: open for reading and writing.
        is_kept: whether a whole line is.
    """
    end = file.tell()
    for line in file:
        if not line.endswith(b"\n") or not is_kept(line):
            break
        end += len(line)
    file.truncate(end)
