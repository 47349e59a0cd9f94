"""Which policies there are. A module of this package that defines a `Policy` is a kind, named after the file.

Kinds and hyper-parameters are read from the source, so that a configuration is checked without importing torch.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError

if TYPE_CHECKING:
    from kv_transition.policies.base import Policy

_FOLDER = Path(__file__).parent
_NOT_KINDS = {"__init__", "base", "catalog"}


def kinds() -> list[str]:
    """Every kind of policy, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem not in _NOT_KINDS)


def hyper_parameters(kind: str) -> dict[str, Any]:
    """Names and defaults of a kind's hyper-parameters, those of its parent included."""
    return {name: default for name, (default, _) in _fields(kind).items()}


@cache
def _fields(kind: str) -> dict[str, tuple[Any, ast.expr]]:
    """Name: (default, annotation) of the fields of a kind's class, those of its parent included."""
    tree = ast.parse((_FOLDER / f"{kind}.py").read_text(encoding="utf-8"))
    parents = {
        alias.name: node.module.rpartition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kv_transition.policies.")
        for alias in node.names
    }
    policy = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in parents for b in node.bases)
    )
    inherited: dict[str, tuple[Any, ast.expr]] = {}
    for base in policy.bases:
        if isinstance(base, ast.Name) and parents.get(base.id, "base") != "base":
            inherited |= _fields(parents[base.id])
    own = {
        node.target.id: (ast.literal_eval(node.value), node.annotation)
        for node in policy.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        if not ast.unparse(node.annotation).startswith("ClassVar")
    }
    return inherited | own


def _allowed(annotation: ast.expr) -> tuple[Callable[[Any], bool], str] | None:
    """What an annotation says of the values: ``Literal[...]`` lists them, ``Annotated[type, (low, high)]`` bounds them.

    A test of a value and the words for it; None if any value of the type will do. No bound is None.
    """
    if not isinstance(annotation, ast.Subscript):
        return None
    form = ast.unparse(annotation.value)
    if form == "Literal":
        choices = ast.literal_eval(annotation.slice)
        choices = choices if isinstance(choices, tuple) else (choices,)
        return (lambda value: value in choices), f"choose one of {', '.join(map(str, choices))}"
    if form == "Annotated":
        low, high = ast.literal_eval(annotation.slice.elts[1])
        words = f"give {low} or more" if high is None else f"give {low} to {high}"
        return (lambda value: value is None or (value >= low and (high is None or value <= high))), words
    return None


def resolve(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind and all hyper-parameters of a policy as a configuration names it.

    Raises UserError if there is no such kind or hyper-parameter, or if one has a wrong type or value.
    """
    kind = options.get("kind", name)
    if kind not in kinds():
        raise UserError(f"kv.policies.{name}: there is no policy {kind!r}; choose one of {', '.join(kinds())}")
    defaults = hyper_parameters(kind)
    given = {key: value for key, value in options.items() if key != "kind"}
    for key, value in given.items():
        if key not in defaults:
            allowed = ", ".join(defaults) or "none"
            raise UserError(f"kv.policies.{name}.{key}: {kind} has no such hyper-parameter; it has: {allowed}")
        default = defaults[key]
        accepted = (int, float) if isinstance(default, float) else (int,) if default is None else (type(default),)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, accepted):
            if value is None and default is None:
                continue
            like = "a whole number or null" if default is None else f"a value like the default, {default!r}"
            raise UserError(f"kv.policies.{name}.{key}: {value!r} has the wrong type; give {like}")
        allowed = _allowed(_fields(kind)[key][1])
        if allowed and not allowed[0](value):
            raise UserError(f"kv.policies.{name}.{key}: {value!r} is not allowed; {allowed[1]}")
    return kind, defaults | given


def create(kind: str, hyper_parameters: Mapping[str, Any]) -> Policy:
    """The policy object; imports torch."""
    from kv_transition.policies.base import Policy

    module = importlib.import_module(f"kv_transition.policies.{kind}")
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return next(c for c in classes if issubclass(c, Policy))(**hyper_parameters)
