"""Names from earlier versions: each is refused with the new one, and is not in ``dir()``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from camshaft.engine import Engine
from camshaft.engine.renamed import OF_ENGINE, OF_UPDATE

DOCS = Path(__file__).parent.parent / "docs" / "engine.md"


def public_names() -> set[str]:
    return {name for name in dir(Engine()) if not name.startswith("_")}


ENGINE = Engine()
OWNERS: list[tuple[object, str, dict[str, str]]] = [
    (ENGINE, "engine", OF_ENGINE),
    (ENGINE.update, "engine.update", OF_UPDATE),
]
OLD = [(owner, name, *names) for owner, name, renamed in OWNERS for names in renamed.items()]


@pytest.mark.parametrize(("owner", "name", "old", "new"), OLD)
def test_an_old_name_is_refused_with_the_new_one(owner: object, name: str, old: str, new: str) -> None:
    """When it is read, and when it is set, which would otherwise be without effect."""
    message = re.escape(f"{name}.{old} was renamed. Write {new}.")
    with pytest.raises(AttributeError, match=f"^{message}$"):
        getattr(owner, old)
    with pytest.raises(AttributeError, match=f"^{message}$"):
        setattr(owner, old, 2)


@pytest.mark.parametrize(("owner", "name", "old", "new"), OLD)
def test_an_old_name_is_not_one_of_the_names_of_its_owner(owner: object, name: str, old: str, new: str) -> None:
    assert old not in dir(owner)
    assert not hasattr(owner, old)


def test_a_name_that_an_engine_never_had_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'Engine' object has no attribute 'zebra'"):
        Engine().zebra  # type: ignore[attr-defined]  # noqa: B018 - the mistake


def test_what_an_engine_has_is_few_enough_to_be_known() -> None:
    assert len(public_names()) <= 41


def test_the_page_about_the_engine_has_a_row_for_each_of_its_names() -> None:
    rows = re.findall(r"^\| `(\w+)", DOCS.read_text(), flags=re.MULTILINE)
    assert public_names() <= set(rows)
