"""Which policies there are. A module of this package that defines a `Policy` is a kind, named after the file.

Kinds and hyper-parameters are read from the source, so that a configuration is checked without importing torch.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
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


@cache
def hyper_parameters(kind: str) -> dict[str, Any]:
    """Names and defaults of a kind's hyper-parameters, those of its parent included."""
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
    inherited: dict[str, Any] = {}
    for base in policy.bases:
        if isinstance(base, ast.Name) and parents.get(base.id, "base") != "base":
            inherited |= hyper_parameters(parents[base.id])
    own = {
        node.target.id: ast.literal_eval(node.value)
        for node in policy.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    return inherited | own


def resolve(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind and all hyper-parameters of a policy as a configuration names it.

    Raises UserError if there is no such kind or hyper-parameter, or if one has the wrong type.
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
            raise UserError(
                f"kv.policies.{name}.{key}: {value!r} has the wrong type; give a value like the default, {default!r}"
            )
    return kind, defaults | given


def create(kind: str, hyper_parameters: Mapping[str, Any]) -> Policy:
    """The policy object; imports torch."""
    from kv_transition.policies.base import Policy

    module = importlib.import_module(f"kv_transition.policies.{kind}")
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return next(c for c in classes if issubclass(c, Policy))(**hyper_parameters)
