"""An optional package is imported when it is used, and the error for a missing one names the command to install it."""

from __future__ import annotations

from pathlib import Path

import pytest

from camshaft.engine import CamshaftError, import_optional


def test_a_missing_package_is_named_with_its_command_by_an_error_that_is_an_import_error_too() -> None:
    with pytest.raises(
        ImportError, match=r"^Export needs the package no-such, .*Write: pip install no-such\.$"
    ) as caught:
        import_optional("no_such_package_anywhere.part", package="no-such", used_by="Export")
    assert isinstance(caught.value, CamshaftError)


def test_what_an_installed_package_itself_misses_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere") as caught:
        import_optional("needs_another", used_by="Export")
    assert not isinstance(caught.value, CamshaftError)
