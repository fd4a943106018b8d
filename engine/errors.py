"""Every error a user can cause, and the one way their messages are worded.

    CamshaftError
    ├── ConfigurationError (ValueError)   a setting, a name or an argument that cannot work
    │   └── HandlerError                  a handler or hook that could never be called
    ├── DataError (ValueError)            data or a model's output that does not fit
    ├── CheckpointError (RuntimeError)    a file that cannot be loaded into this run
    ├── EngineStateError (RuntimeError)   a call that is not possible at this moment
    └── MissingPackageError (ImportError) a package that is needed for this and not installed

Each message is one sentence of fact, with names and values, and one of what to write instead.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import SupportsIndex, TypeGuard

LONGEST_NAME = 100
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "ALLOC_FAILED",
)


class CamshaftError(Exception):
    """The root of every error that camshaft raises itself."""


class ConfigurationError(CamshaftError, ValueError):
    """A setting, a name or an argument that cannot work."""


class HandlerError(ConfigurationError):
    """A handler or hook that cannot be called the way it is written."""


class DataError(CamshaftError, ValueError):
    """Data, or a model's output, that does not fit what is done with it."""


class CheckpointError(CamshaftError, RuntimeError):
    """A checkpoint file that cannot be loaded into this run."""


class EngineStateError(CamshaftError, RuntimeError):
    """A call that is not possible at this moment of the run."""


class MissingPackageError(CamshaftError, ImportError):
    """A package that is needed for what was asked, and is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'Did you mean "x"? '`` for the nearest known name, or nothing.

    >>> did_you_mean("val_accuracy", ["val_loss", "val_acc"])
    'Did you mean "val_acc"? '
    >>> did_you_mean("zebra", ["val_loss"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'Did you mean "{close[0]}"? ' if close else ""


def can_take(function: Callable[..., object], num_arguments: int) -> bool:
    """Return whether a function can be called with so many positional arguments, as far as can be known.

    >>> can_take(lambda output, target: 0, 2), can_take(lambda: 0, 1)
    (True, False)
    """
    try:
        inspect.signature(function).bind(*range(num_arguments))
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device, or of the host, did not suffice.

    torch has a class for it on accelerators alone.

    >>> ran_out_of_memory(MemoryError()), ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    (True, False)
    """
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return type(error).__name__ == "OutOfMemoryError" or any(said in str(error) for said in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number: not a string, a boolean or NaN.

    >>> is_number(0.1), is_number("0.1"), is_number(float("nan"))
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole_number(name: str, value: object, *, least: int) -> int:
    """Return ``value`` if it is a whole number of at least ``least``, or refuse it by name.

    Raises:
        ConfigurationError: for floats, strings, booleans and numbers below ``least``.

    >>> whole_number("patience", 3, least=1)
    3
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) < least:
        raise ConfigurationError(
            f"{name} is {value!r}, which is not a count. Pass a whole number of at least {least}."
        )
    return operator.index(value)


def check_name(name: str, error: type[CamshaftError]) -> None:
    """Refuse a name that would break a line of a log or be too long for the name of a file.

    Raises:
        CamshaftError: of the kind ``error``.
    """
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise error(
            f"A value is named {name!r:.60}, which is not a name for a table and a file. "
            f"Give it a name of at most {LONGEST_NAME} printable characters."
        )
