"""A reader of YAML that accepts the values of JSON only: no dates, sets or binary values, and each key once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import yaml

from kv_transition.errors import UserError
from kv_transition.parsing import MAX_DEPTH, check_value, read_text

MAX_VALUES = 1_000_000
"""largest number of values in a YAML document, counted after aliases are expanded"""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates; its errors name the line of the value that cannot be read."""

    # "2024-01-01" stays a text
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            node = self.anchors.get(event.anchor)
            if node is not None and node.end_mark is None:
                raise yaml.composer.ComposerError(
                    None, None, f"the alias *{event.anchor} refers to a value that contains it", event.start_mark
                )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested too deeply; {MAX_DEPTH} levels are allowed", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag.rpartition(":")[2] in ("timestamp", "binary", "set", "omap", "pairs"):
            problem = f"values of type {node.tag.rpartition(':')[2]} are not allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        # PyYAML's constructors raise these for a value that does not match its tag, such as !!bool maybe
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, IndexError):
            problem = f"this value cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def read_yaml(path: str | os.PathLike[str], what: str = "file", advice: str = "") -> Any:
    """Return the value of a YAML file. Raises UserError as `read_text` and `parse_yaml` do."""
    return parse_yaml(read_text(path, what), str(path), advice)


def parse_yaml(text: str, where: str, advice: str = "") -> Any:
    """Return the value of a YAML text, made of the types of JSON.

    where: name of the text in error messages. advice: advice in the messages about malformed text. Raises UserError if
    the text is malformed, has a key twice in one mapping, is nested too deeply, refers to itself, grows beyond
    `MAX_VALUES` by its aliases, or contains a value of another type.
    """
    loader = None
    try:
        loader = _Loader(text)  # raises for a character that YAML does not allow
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, where)
        value = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML{_place(error)}{advice and f'; {advice}'}") from None
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply; {MAX_DEPTH} levels are allowed") from None
    finally:
        if loader is not None:
            loader.dispose()
    check_value(value, where, nul=False)
    return value


def _place(error: yaml.YAMLError) -> str:
    """Return the line and the problem of a YAML error."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        reason = getattr(error, "reason", None)
        return f" ({reason} at character {error.position + 1})" if reason else ""
    problem = getattr(error, "problem", None)
    return f" at line {mark.line + 1}" + (f" ({problem})" if problem else "")


def _check_node(root: yaml.Node, where: str) -> None:
    """Raise UserError if a mapping names a key twice, or if aliases make the document too large."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            children = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise UserError(
            f"{where}: its aliases expand to more than {MAX_VALUES:,} values; write the values without aliases"
        )


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # the constructor rejects such a key
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in first:
            lines = f"in lines {first[name]} and {line}" if first[name] != line else f"in line {line}"
            raise UserError(f"{where}: the key {key.value!r} is given twice, {lines}; keep one")
        first[name] = line
