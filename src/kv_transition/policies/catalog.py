"""The list of policies and their hyper-parameters, read from source without importing torch.

A kind is one of: a module of this package that defines a `Policy`, named after the file; a policy of another installed
package, by its entry point in the group ``kv_transition.policies``; a file, as ``path/to/file.py`` or
``path/to/file.py:ClassName``; a press of kvpress, as ``kvpress.SnapKVPress``. All but presses are read from source, so
that checking a configuration imports neither torch nor foreign code.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError
from kv_transition.provenance import content_digest

if TYPE_CHECKING:
    from kv_transition.policies.base import Policy

GROUP = "kv_transition.policies"
"""group of the entry points that offer policies"""

_FOLDER = Path(__file__).parent
_NOT_KINDS = {"base", "catalog", "describe"}
_PRESS = re.compile(r"kvpress\.[A-Za-z_]\w*")
_FILE = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w+))?")
_SAID = ("statistics", "statistics_where", "acts_each_step", "ignores_budget")
_PLAIN = (bool, int, float, str, type(None))
_TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


@dataclass(frozen=True)
class Field:
    """A hyper-parameter as its class declares it."""

    default: Any
    annotation: ast.expr
    meaning: str
    """the docstring below the field"""

    @property
    def allowed(self) -> tuple[Callable[[Any], bool], str] | None:
        """Return a test of a value and the words for it; None if any value of the type is allowed.

        ``Literal[...]`` lists the values, ``Annotated[type, (low, high)]`` bounds them; None is no bound.
        """
        if not isinstance(self.annotation, ast.Subscript):
            return None
        form = ast.unparse(self.annotation.value)
        if form == "Literal":
            choices = ast.literal_eval(self.annotation.slice)
            choices = choices if isinstance(choices, tuple) else (choices,)
            return (lambda value: value in choices), f"choose one of {', '.join(map(str, choices))}"
        if form == "Annotated":
            low, high = ast.literal_eval(self.annotation.slice.elts[1])
            words = f"give {low} or more" if high is None else f"give {low} to {high}"
            return (lambda value: value is None or (value >= low and (high is None or value <= high))), words
        return None

    @property
    def types(self) -> tuple[tuple[type, ...], str]:
        """Return the types that a value may have, and the words for them."""
        names = {node.id for node in ast.walk(self.annotation) if isinstance(node, ast.Name)}
        found = [name for name in _TYPES if name in names]
        nullable = self.default is None
        if not found:
            return (type(self.default),), f"a value like the default, {self.default!r}"
        words = " or ".join(_WORDS[name] for name in found) + (" or null" if nullable else "")
        like = words if nullable else f"{words} like the default, {self.default!r}"
        return tuple(t for name in found for t in _TYPES[name]) + ((type(None),) if nullable else ()), like


@dataclass(frozen=True)
class Class:
    """A policy as its source defines it."""

    file: Path
    name: str
    doc: str
    fields: Mapping[str, Field]
    variables: Mapping[str, Any]
    """class variables of the policy: statistics, statistics_where, acts_each_step, ignores_budget"""
    parents: tuple[Class, ...]


def kinds() -> list[str]:
    """Return all names of kinds, sorted: those of this package and of installed packages.

    Raises UserError if two of them have the same name.
    """
    return sorted([*_built_in(), *_entry_points()])


def hyper_parameters(kind: str) -> dict[str, Any]:
    """Return names and defaults of a kind's hyper-parameters, inherited ones included; empty for a press."""
    return {} if is_press(kind) else {name: field.default for name, field in describe(kind).fields.items()}


def shared_parts() -> Class:
    """Return the class `_scored.Scored`, which all policies that score entries when compressing are derived from."""
    return _read(_FOLDER / "_scored.py", None)


def own_fields(kind: str) -> dict[str, Field]:
    """Return a kind's hyper-parameters without those that it inherits unchanged from `_scored.Scored`."""
    shared = shared_parts().fields
    return {name: field for name, field in describe(kind).fields.items() if field is not shared.get(name)}


def resolve(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the kind and all hyper-parameters of a policy as a configuration names it.

    Raises UserError if there is no such kind or hyper-parameter, or if one has a wrong type or value.
    """
    kind = options.get("kind", name)
    given = {key: value for key, value in options.items() if key != "kind"}
    where = f"kv.policies.{name}"
    if not isinstance(kind, str):
        raise UserError(f"{where}.kind: {kind!r} is not a text; choose one of {', '.join(kinds())}")
    if is_press(kind):
        for key, value in given.items():
            if not isinstance(value, _PLAIN):
                raise UserError(f"{where}.{key}: {value!r} is not a plain value; give a number, a text, true or false")
        return kind, given
    try:
        fields = describe(kind).fields
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"{where}.{key}: {kind} has no such hyper-parameter; it has: {', '.join(fields) or 'none'}")
        field = fields[key]
        types, words = field.types
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{where}.{key}: {value!r} has the wrong type; give {words}")
        allowed = field.allowed
        if allowed and not allowed[0](value):
            raise UserError(f"{where}.{key}: {value!r} is not allowed; {allowed[1]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{key}: {value!r} is not allowed; give a finite number")
    return kind, {key: field.default for key, field in fields.items()} | given


def ignores_budget(kind: str, hyper_parameters: Mapping[str, Any]) -> bool:
    """Return whether the hyper-parameters alone determine the footprint; such a policy runs once, at budget r1."""
    declared = False if is_press(kind) else describe(kind).variables.get("ignores_budget", False)
    if isinstance(declared, bool):
        return declared
    name, value = declared
    return hyper_parameters.get(name) == value


def statistics(kind: str, hyper_parameters: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the statistics of the cache that a kind reads; a press reads none."""
    if is_press(kind):
        return frozenset()
    found = describe(kind)
    given = {name: field.default for name, field in found.fields.items()} | dict(hyper_parameters or {})
    where = found.variables.get("statistics_where", {})
    more = (names for (name, value), names in where.items() if given.get(name) == value)
    return found.variables.get("statistics", frozenset()).union(*more)


def acts_each_step(kind: str) -> bool:
    """Return whether a kind holds the cache at its budget while decoding."""
    return not is_press(kind) and bool(describe(kind).variables.get("acts_each_step", False))


def is_press(kind: str) -> bool:
    return _PRESS.fullmatch(kind) is not None


def source(kind: str) -> Path:
    """Return the file that defines a kind. Raises UserError if there is no such kind; a press has no file."""
    return describe(kind).file


def modules(kind: str) -> list[str]:
    """Return the modules of this package whose code determines a kind, for `provenance.code_hash`.

    Their own imports are not listed.
    """
    if is_press(kind):
        return ["kv_transition.run.press"]
    if kind in _built_in():
        return [f"{GROUP}.{kind}"]
    tree = _parsed(describe(kind).file)
    named = (node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return sorted({"kv_transition.policies.base", *(m for m in named if m.startswith("kv_transition."))})


def content(kind: str) -> str | None:
    """Return a digest of the code outside this package that determines a kind: its file, or the version of kvpress.

    None for this package's own kinds, and if kvpress is not installed.
    """
    if is_press(kind):
        try:
            return f"kvpress {metadata.version('kvpress')}"
        except metadata.PackageNotFoundError:
            return None
    return None if kind in _built_in() else content_digest(source(kind))


def create(kind: str, hyper_parameters: Mapping[str, Any]) -> Policy:
    """Return the policy object; imports torch and, for a policy from outside, its code.

    Raises UserError if its module cannot be imported, or for a press.
    """
    if is_press(kind):
        raise ValueError(f"{kind} is a press, which reads the prompt itself; it has no policy object")
    found = describe(kind)
    if kind in _built_in():
        module = importlib.import_module(f"{GROUP}.{kind}")
    else:
        try:
            module = _load(kind, found.file)
        except Exception as error:  # code from outside may raise anything
            raise UserError(f"{found.file} cannot be imported: {type(error).__name__}: {error}") from error
    return getattr(module, found.name)(**hyper_parameters)


def _load(kind: str, file: Path) -> Any:
    if kind in _entry_points():
        return importlib.import_module(_entry_points()[kind].module)
    # Dataclasses look their module up by its name.
    name = f"kv_transition_external.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def _built_in() -> frozenset[str]:
    stems = (file.stem for file in _FOLDER.glob("*.py"))
    return frozenset(stem for stem in stems if not stem.startswith("_") and stem not in _NOT_KINDS)


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=GROUP):
        taken = found.get(point.name)
        if point.name in _built_in() or (taken and taken.value != point.value):
            other = f"that of {taken.value}" if taken else "a kind of this project"
            raise UserError(
                f"the policy {point.name!r} of {point.value} has the name of {other}; uninstall one of them"
            )
        found[point.name] = point
    return found


@cache
def describe(kind: str) -> Class:
    """Return the definition of a kind as its source states it. Raises UserError if there is no such kind or policy."""
    if kind in _built_in():
        return _read(_FOLDER / f"{kind}.py", None)
    if match := _FILE.fullmatch(kind):
        file = Path(match["path"]).expanduser()
        if not file.is_file():
            raise UserError(f"there is no file {file}; give one that defines a policy, or one of {', '.join(kinds())}")
        return _read(file.resolve(), match["name"])
    if point := _entry_points().get(kind):
        return _read(_module_file(point), point.attr or None)
    raise UserError(
        f"there is no policy {kind!r}; choose one of {', '.join(kinds())}, or give a file path/to/policy.py"
    )


def _module_file(point: metadata.EntryPoint) -> Path:
    """Return the source of an entry point's module, without importing the packages that contain it."""
    head, *rest = point.module.split(".")
    spec = importlib.util.find_spec(head)
    if spec is not None and not rest and spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        base = Path(folder).joinpath(*rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    raise UserError(f"the policy {point.name!r} names the module {point.module}, which has no source; reinstall it")


@cache
def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a file that exists and can be read") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} is not valid Python ({error})") from None


@cache
def _read(file: Path, name: str | None) -> Class:
    """Return the policy that a file defines; ``name`` is its class, required if the file defines several."""
    tree = _parsed(file)
    imported = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{GROUP}.")
        for alias in node.names
    }
    policies: dict[str, ast.ClassDef] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(base in imported or base in policies for base in _bases(node)):
            policies[node.name] = node
    if name is not None and name not in policies:
        held = ", ".join(policies) or "none"
        raise UserError(f"{file} defines no policy {name}; the classes derived from Policy in it are: {held}")
    if not policies:
        raise UserError(f"{file} defines no policy; derive a class from kv_transition.policies.base.Policy")
    if name is None and len(policies) > 1:
        raise UserError(
            f"{file} defines {len(policies)} policies; say which: {file}:{next(iter(policies))}, for example"
        )
    policy = policies[name or next(iter(policies))]

    fields: dict[str, Field] = {}
    variables: dict[str, Any] = {}
    parents: list[Class] = []
    for base in _bases(policy):
        if base in policies:
            parent = _read(file, base)
        elif base in imported and imported[base] != f"{GROUP}.base":
            parent = _read(_FOLDER / f"{imported[base].rpartition('.')[2]}.py", None)
        else:
            continue
        parents.append(parent)
        fields |= parent.fields
        variables |= parent.variables
    own = _own_fields(policy, file)
    if own and not any("dataclass" in ast.unparse(decorator) for decorator in policy.decorator_list):
        raise UserError(
            f"{file}: {policy.name} has hyper-parameters but is no dataclass; put @dataclass(frozen=True) on it"
        )
    doc = ast.get_docstring(policy) or ""
    variables |= _own_variables(policy, file)
    return Class(file, policy.name, doc, fields | own, variables, tuple(parents))


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def _own_fields(policy: ast.ClassDef, file: Path) -> dict[str, Field]:
    fields = {}
    for node, after in zip(policy.body, [*policy.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith(("ClassVar", "typing.ClassVar")):
            continue
        name = node.target.id
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            raise UserError(
                f"{file}: {policy.name}.{name} has no default that is a plain value; write one, as in {name}: int = 4"
            ) from None
        meaning = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        fields[name] = Field(default, node.annotation, " ".join(str(meaning).split()))
    return fields


def _own_variables(policy: ast.ClassDef, file: Path) -> dict[str, Any]:
    found = {}
    for node in policy.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or target.id not in _SAID:
            continue
        try:
            found[target.id] = _plain(node.value)
        except (ValueError, TypeError):
            raise UserError(f"{file}: {policy.name}.{target.id} is not written out as a plain value") from None
        if target.id == "statistics":
            found[target.id] = frozenset(found[target.id])
    return found


def _plain(value: ast.expr) -> Any:
    """Return the value of a literal, which may contain frozensets. Raises ValueError or TypeError for anything else."""
    if isinstance(value, ast.Dict):
        return {_plain(key): _plain(of) for key, of in zip(value.keys, value.values, strict=True)}
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "frozenset":
        return frozenset(ast.literal_eval(value.args[0]) if value.args else ())
    return ast.literal_eval(value)
