"""The public names and their signatures are those of tests/data/names.txt, so that none changes unnoticed.

``python tests/test_names.py`` updates the file.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, TypeGuard

import pytest
from helpers import check_golden, make_trainer, write_golden

import camshaft.callbacks
import camshaft.engine
from camshaft.engine import Engine

FILE = "names.txt"
UPDATE = "python tests/test_names.py"
EXPORTED = {*camshaft.engine.__all__, *camshaft.callbacks.__all__}
# Methods that users call without naming them: ``history["val_acc"]``, ``every(3)(count)``.
SPECIAL = {"__call__", "__getitem__", "__iter__", "__len__"}


def test_the_public_names_and_their_signatures_are_those_of_the_file() -> None:
    check_golden(FILE, snapshot(), update=UPDATE)


def test_a_changed_name_is_shown_as_a_diff_with_the_way_to_update() -> None:
    changed = snapshot().replace("History.rows:", "History.lines:")
    with pytest.raises(pytest.fail.Exception, match=rf"(?s)-History\.rows.*\+History\.lines.*run `{UPDATE}`"):
        check_golden(FILE, changed, update=UPDATE)


def test_no_line_has_an_address_which_would_change_from_run_to_run() -> None:
    assert " at 0x" not in snapshot()


def snapshot() -> str:
    """A line for each name, which says whose it is, so that a diff can be read without what surrounds it."""
    trainer: Engine = make_trainer()
    paragraphs = [
        *exported(camshaft.engine),
        *exported(camshaft.callbacks),
        ["# dir(Engine())", *(f"Engine().{name}" for name in dir(Engine()) if is_public(name))],
        ["# dir(Trainer(...))", *(f"Trainer(...).{name}" for name in dir(trainer) if is_public(name))],
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"


def exported(package: ModuleType) -> Iterator[list[str]]:
    """A paragraph for each name in ``__all__``, in that order."""
    yield [f"# {package.__name__}"]
    for name in package.__all__:
        value = getattr(package, name)
        if isinstance(value, type):
            yield list(class_lines(name, value))
        else:
            yield [f"def {name}{signature(value)}" if inspect.isroutine(value) else f"{name} = {value!r}"]


def class_lines(name: str, cls: type) -> Iterator[str]:
    """The class with its bases, its constructor, and the members that it adds to those of its public bases."""
    bases = ", ".join(public_bases(cls))
    yield f"class {name}({bases})" if bases else f"class {name}"
    if has_constructor(cls):
        yield name + signature(cls, returns=False)
    members = {member for owner in with_private_bases(cls) for member in (*defined(owner), *fields(owner))}
    for member in sorted(filter(is_public, members)):
        yield f"{name}.{member}{description(cls, member)}"


def defined(cls: type) -> list[str]:
    """What a class defines, without the old names that only raise an error."""
    return [name for name in vars(cls) if hasattr(cls, name)]


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in SPECIAL


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("camshaft.")


def with_private_bases(cls: type) -> list[type]:
    """The class and those bases of camshaft's that are not exported: their members count as its own."""
    private = [base for base in cls.__bases__ if is_ours(base) and base.__name__ not in EXPORTED]
    return [cls, *(other for base in private for other in with_private_bases(base))]


def public_bases(cls: type) -> list[str]:
    """The nearest bases that a user can name: exported ones, and those of torch and the standard library."""
    own = with_private_bases(cls)
    return [base.__name__ for owner in own for base in owner.__bases__ if base not in (*own, object)]


def has_constructor(cls: type) -> bool:
    """Whether the constructor is ours; that of the built-in exceptions has another text in each version of Python."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return owner is object or is_ours(owner)


def description(cls: type, name: str) -> str:
    """What follows a member's name: a method's signature, or else the type and the value as far as they are known."""
    value = inspect.getattr_static(cls, name, None)
    if isinstance(value, FunctionType | classmethod | staticmethod):
        return signature(getattr(cls, name))
    if isinstance(value, property):
        return f": {inspect.signature(value.fget).return_annotation}" if value.fget else ""
    declared = next((text for base in cls.__mro__ if is_ours(base) and (text := fields(base).get(name))), "")
    text = f": {declared}" if declared else ""
    return f"{text} = {value!r}" if isinstance(value, bool | int | str) else text


@cache
def fields(cls: type) -> dict[str, str]:
    """The attributes that the class declares or its methods set, with their types where the source has them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    found = {node.attr: "" for node in ast.walk(tree) if is_set_on_self(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and is_set_on_self(node.target):
            found[node.target.attr] = ast.unparse(node.annotation)
    return found | inspect.get_annotations(cls)


def is_set_on_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether this is the left side of ``self.name = ...``."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


class Text(str):
    """Stands without quotes in a signature."""

    def __repr__(self) -> str:
        return str(self)


def signature(function: Callable[..., Any], *, returns: bool = True) -> str:
    """The signature as it stands in the source: annotations without quotes, functions by their names."""
    found = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=as_written(parameter.annotation), default=by_name(parameter.default))
        for parameter in found.parameters.values()
    ]
    result = as_written(found.return_annotation) if returns else inspect.Signature.empty
    return str(found.replace(parameters=parameters, return_annotation=result))


def as_written(annotation: Any) -> Any:
    return Text(annotation) if isinstance(annotation, str) else annotation


def by_name(default: Any) -> Any:
    return Text(default.__name__) if isinstance(default, FunctionType) else default


if __name__ == "__main__":
    write_golden(FILE, snapshot())
