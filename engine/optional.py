"""Packages that only some users need: imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingPackageError


def import_optional(module: str, *, package: str | None = None, used_by: str) -> ModuleType:
    """Import a module of a package that camshaft does not require.

    Args:
        module: what to import, such as ``"torch_geometric.data"``.
        package: what ``pip install`` calls it, where that is not the module's first name.
        used_by: who needs it, for the message.

    Raises:
        MissingPackageError: if it is not installed. An error within the package is raised as it is.

    >>> import_optional("json", used_by="an example").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.partition(".")[0] != error.name.partition(".")[0]:
            raise
        package = package or module.partition(".")[0]
        raise MissingPackageError(
            f"{used_by} needs the package {package}, which is not installed. Write: pip install {package}."
        ) from error
