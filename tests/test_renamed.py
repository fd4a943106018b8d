"""Names that an engine had earlier: each is refused with the new one, and is out of sight."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from camshaft.engine import Engine
from camshaft.engine.renamed import MOVED

DOCS = Path(__file__).parent.parent / "docs" / "engine.md"


def public_names() -> set[str]:
    return {name for name in dir(Engine()) if not name.startswith("_")}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    message = f"engine.{old} was renamed. Write {new}."
    with pytest.raises(AttributeError, match=f"^{re.escape(message)}$"):
        getattr(Engine(), old)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_none_of_the_engines(old: str) -> None:
    assert old not in dir(Engine())
    assert not hasattr(Engine(), old)


def test_a_name_that_an_engine_never_had_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'Engine' object has no attribute 'zebra'"):
        Engine().zebra  # type: ignore[attr-defined]  # noqa: B018 - the mistake


def test_what_an_engine_has_is_few_enough_to_be_known() -> None:
    assert len(public_names()) <= 40


def test_the_page_about_the_engine_has_a_row_for_each_of_its_names() -> None:
    rows = re.findall(r"^\| `(\w+)", DOCS.read_text(), flags=re.MULTILINE)
    assert public_names() <= set(rows)
