"""What must not be written beside a run: keys, tokens and passwords."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

HIDDEN = "***"
NUMBERED = r"(?i:key|token)s?(?![a-z])"  # not in "tokenizer"; under such a name, a number is a size
OTHERS = r"(?i:passw|passphrase|secret|credential)"
NAME = re.compile(f"{NUMBERED}|{OTHERS}")
ASSIGNMENT = re.compile(f"(.*?(?:{NUMBERED}|{OTHERS})[^=]*=).*", re.DOTALL)


def without_secrets(settings: Any) -> Any:
    """Return the settings with ``***`` in the place of each secret, at any depth.

    >>> without_secrets({"lr": 0.1, "hub": {"token": "abc"}, "max_tokens": 512})
    {'lr': 0.1, 'hub': {'token': '***'}, 'max_tokens': 512}
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if isinstance(settings, argparse.Namespace | SimpleNamespace):
        settings = vars(settings)
    if isinstance(settings, Mapping):
        return {
            name: HIDDEN if _is_secret(name, value) else without_secrets(value) for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [without_secrets(value) for value in settings]
    return settings


def command_without_secrets(command: Sequence[str]) -> list[str]:
    """Return a command line with ``***`` in the place of each secret.

    >>> command_without_secrets(["train.py", "hub.key=abc", "--token", "abc"])
    ['train.py', 'hub.key=***', '--token', '***']
    """
    shown: list[str] = []
    follows_name = False
    for argument in command:
        is_option = argument.startswith("-")
        shown.append(HIDDEN if follows_name and not is_option else ASSIGNMENT.sub(rf"\1{HIDDEN}", argument))
        if is_option:  # it may take several values
            follows_name = "=" not in argument and NAME.search(argument) is not None
    return shown


def _is_secret(name: object, value: object) -> bool:
    if not isinstance(name, str) or NAME.search(name) is None:
        return False
    return not isinstance(value, int | float | None) or re.search(OTHERS, name) is not None
