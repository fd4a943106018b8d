"""Files that grow by whole pieces."""

from __future__ import annotations

import errno
import os
from pathlib import Path


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
