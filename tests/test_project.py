"""Promises about the project itself: its floors, its imports, and what its docs say."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import documented_events

import camshaft.callbacks
import camshaft.engine
import camshaft.testing
import camshaft.viewer
from camshaft.engine import Callback, CamshaftError, Event

ROOT = Path(__file__).parent.parent
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (camshaft.engine, camshaft.callbacks, camshaft.testing, camshaft.viewer)
    for module in pkgutil.iter_modules(package.__path__)
]
SOURCES = sorted(
    path for folder in ("engine", "callbacks", "testing", "viewer") for path in (ROOT / folder).glob("*.py")
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            names.add("." * node.level)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "engine").glob("*.py")), ids=lambda path: path.name)
def test_the_engine_knows_no_handler(path: Path) -> None:
    assert not [name for name in imported(path) if "callbacks" in name or "examples" in name or name.startswith("..")]


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.name)
def test_a_handler_imports_only_the_floor_below(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith(("camshaft.callbacks", "examples", ".."))]


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.name)
def test_no_handler_needs_the_testing_kit(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("camshaft.testing")]


@pytest.mark.parametrize("path", sorted((ROOT / "viewer").glob("*.py")), ids=lambda path: path.name)
def test_what_shows_runs_knows_neither_the_engine_nor_handlers(path: Path) -> None:
    """It reads files, and starts without torch."""
    assert not [name for name in imported(path) if name.startswith(("camshaft", "examples", "..", "torch"))]


def submodules_imported(path: Path) -> set[str]:
    """The modules within camshaft.engine from which a file imports, at its top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "camshaft.engine":
            names |= {alias.name for alias in node.names} - set(camshaft.engine.__all__)
    return names | {name for name in imported(path) if name.startswith("camshaft.engine.")}


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.name)
def test_a_handler_imports_only_what_the_engine_offers(path: Path) -> None:
    assert not submodules_imported(path)


@pytest.mark.parametrize(
    "line",
    [
        "import camshaft.engine.files",
        "from camshaft.engine import files",
        "from camshaft.engine.files import save",
        "def f():\n    from camshaft.engine.run import NO_RUN",
    ],
)
def test_an_import_from_inside_the_engine_would_be_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text(f"from camshaft.engine import Engine\n{line}\n")
    assert submodules_imported(tmp_path / "handler.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_said_to_be_an_engine_that_is_none(path: Path) -> None:
    assert 'cast("Engine"' not in path.read_text()


def bases_of_ours(kind: type) -> list[type]:
    """The classes of ours above a class, other than those from which everybody derives."""
    above = [base for base in kind.__mro__[1:] if base.__module__.startswith("camshaft.")]
    return [base for base in above if base not in (Callback, Event) and not issubclass(base, CamshaftError)]


@pytest.mark.parametrize("name", MODULES)
def test_a_class_is_understood_without_reading_another_above_it(name: str) -> None:
    """Only callbacks, events and errors derive from a class of ours, and callbacks and events from no second one."""
    classes = [value for value in vars(importlib.import_module(name)).values() if inspect.isclass(value)]
    assert {kind: bases_of_ours(kind) for kind in classes if kind.__module__ == name and bases_of_ours(kind)} == {}


def test_importing_loads_no_heavy_package_and_starts_nothing() -> None:
    code = (
        "import sys, threading, signal\n"
        "before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
        "import camshaft.engine, camshaft.callbacks\n"
        "heavy = 'torchvision torchmetrics ignite matplotlib pandas sklearn tensorboardX'.split()\n"
        "assert not [name for name in heavy if name in sys.modules], [n for n in heavy if n in sys.modules]\n"
        "assert threading.active_count() == 1\n"
        "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("package", [camshaft.engine, camshaft.callbacks, camshaft.testing, camshaft.viewer])
def test_every_exported_name_exists_and_says_what_it_is(package: object) -> None:
    names: list[str] = package.__all__  # type: ignore[attr-defined]  # a module
    assert len(names) == len(set(names))
    assert not [name for name in names if not getattr(package, name).__doc__]


def blocks(path: str) -> list[str]:
    text = (ROOT / path).read_text()
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def test_the_code_in_the_readme_runs_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("README.md"):
        exec(block, names)
    out = capsys.readouterr().out
    assert "epoch 1: loss" in out
    assert "step 10" in out
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    left = {path.name for path in run.iterdir()}
    assert {"loss.png", "acc.png", "log.log", "settings.json", "environment.json", "history.csv", "report.html"} < left


PAGES_WITH_CODE = (
    "update", "handlers", "ranks", "data", "testing", "reproducing", "rollback", "steering", "replay", "rehearsal",
)  # fmt: skip


@pytest.mark.parametrize("page", [f"docs/{name}.md" for name in PAGES_WITH_CODE])
def test_the_code_in_the_docs_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/data.md":
        pytest.importorskip("transformers.models.gpt2.modeling_gpt2", exc_type=ImportError)  # not with an older torch
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(block, names)


def test_the_page_about_handlers_names_every_tool() -> None:
    """All that ``camshaft.engine`` exports for authors of handlers: what comes after the errors."""
    told = (ROOT / "docs/handlers.md").read_text()
    exported = camshaft.engine.__all__
    tools = exported[exported.index("CheckpointError") + 1 :]
    assert len(tools) > 30
    assert not [name for name in tools if f"`{name}`" not in told]


def test_your_own_handler_and_event_take_less_than_15_lines_each() -> None:
    (block,) = (block for block in blocks("README.md") if "class LossSpike" in block)
    event, handler = block.split("class SpikeWatch")
    assert len([line for line in event.splitlines() if line]) < 15
    assert len([line for line in handler.split("engine =")[0].splitlines() if line]) < 15


def test_the_readme_lists_the_events_in_firing_order() -> None:
    from camshaft.engine import events

    known = events.known_events().values()
    builtin = [event.__name__ for event in known if getattr(events, event.__name__, None) is event]  # not a doctest's
    assert documented_events() == builtin


def test_the_readme_and_the_page_of_the_handlers_list_every_one() -> None:
    # Without a tool for authors of handlers, in docs/handlers.md, and what a function of the table returns.
    expected = set(camshaft.callbacks.__all__) - {"Monitor", "CrossValidation"}
    page = (ROOT / "docs" / "stock_handlers.md").read_text()
    assert {line.split("`")[1].split("(")[0] for line in page.splitlines() if line.startswith("| `")} == expected
    table = (ROOT / "README.md").read_text().split("## Handlers")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(expected)


def imported_siblings(path: Path) -> set[str]:
    """The files of the same package that a file imports when it runs: not those that only a type checker sees."""
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {f"{node.module}.py" for node in nodes if node not in skipped and node.module}


def test_the_design_page_lists_every_file_of_the_engine_and_imports_point_down_in_it() -> None:
    lines = (ROOT / "docs/design.md").read_text().split("    engine/\n")[1].split("\n\n")[0].splitlines()
    listed = [line.split()[0] for line in lines]
    files = {path.name: path for path in (ROOT / "engine").glob("*.py") if path.name != "__init__.py"}
    assert set(listed) == set(files)
    upward = {
        (name, other)
        for name, path in files.items()
        for other in imported_siblings(path)
        if listed.index(other) < listed.index(name)
    }
    assert not upward
