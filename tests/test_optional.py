"""An optional package is imported when it is used, and the error for a missing one names the command to install it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import make_trainer

from camshaft.callbacks import Export, Prune, RunCheckpoint, Summary
from camshaft.engine import CamshaftError, MissingPackageError, import_optional


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


USERS: dict[str, tuple[str, Callable[[], object]]] = {
    "Summary": ("torchinfo", lambda: make_trainer(Summary())),
    "Prune": ("optuna", lambda: Prune(object(), "val_loss")),
    "Export, weights": ("safetensors", lambda: make_trainer(Export("model.safetensors"))),
    "Export, ONNX": ("onnxruntime", lambda: make_trainer(Export("model.onnx"))),
    "RunCheckpoint's mirror": ("fsspec", lambda: RunCheckpoint("run", mirror="memory://run")),
}


@pytest.mark.parametrize("user", USERS)
def test_who_needs_a_package_that_is_missing_says_so_before_the_run(
    user: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, use = USERS[user]
    monkeypatch.chdir(tmp_path)
    if user != "Prune":  # of which this is no trial
        use()  # with the package, there is nothing to complain about
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    owner = user.partition(",")[0]
    with pytest.raises(
        MissingPackageError, match=rf"^{owner} needs the package {package}, .*Write: pip install {package}\.$"
    ):
        use()
