"""The benchmark's own prompt templates and answer lengths, read from its files.

They are LongBench's text (``dataset2prompt.json``, ``dataset2maxlen.json``), so this project does not contain them.
They are searched at the path in the configuration, then in ``config/`` next to local data, then in ``config/`` of the
hub repository at the commit of the data. Your own tasks may have such files too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kv_transition.data.hub import fetch, hub_source, list_files
from kv_transition.errors import UserError
from kv_transition.parsing import decode, parse_json

FILES = {"prompts": "dataset2prompt.json", "max_lengths": "dataset2maxlen.json"}


@dataclass(frozen=True)
class Entry:
    """The entry of one task in one of the files, and the source of that file."""

    value: Any
    source: str
    sha256: str


def official(dataset: Mapping[str, Any], key: str, name: str) -> Entry | None:
    """Return the entry of task ``name`` in the file ``key`` ("prompts" or "max_lengths"); None if there is no such
    file.

    Raises:
        UserError: a file that the configuration names is missing or lacks the task, or an entry has the wrong type.
    """
    given = dataset.get(key)
    found = _given(given, key) if given is not None else _beside_the_data(dataset, key)
    if found is None:
        return None
    path, source = found
    content = path.read_bytes()
    where = f"dataset.{key}: {source}"
    entries = parse_json(decode(content, where), where)
    if not isinstance(entries, dict):
        raise UserError(f"dataset.{key}: {source} must contain a JSON object from task to value")
    name = name if name in entries else name.removesuffix("_e")  # LongBench-E has the prompts of LongBench
    if name not in entries:
        if given is None:
            return None
        raise UserError(f"dataset.{key}: {source} has no entry for {name!r}; it has {', '.join(entries)}")
    value = entries[name]
    expected = str if key == "prompts" else int
    if type(value) is not expected or not value or (expected is int and value < 1):
        what = "a text" if expected is str else "a whole number of at least 1"
        raise UserError(f"dataset.{key}: in {source} the entry of {name!r} must be {what}, not {value!r}")
    return Entry(value, source, sha256(content).hexdigest())


def _given(path: str, key: str) -> tuple[Path, str]:
    if not Path(path).is_file():
        raise UserError(f"dataset.{key}: there is no file {path}; give a {FILES[key]}")
    return Path(path), path


def _beside_the_data(dataset: Mapping[str, Any], key: str) -> tuple[Path, str] | None:
    if dataset["name"] != "longbench":
        return None
    name = f"config/{FILES[key]}"
    source = hub_source(dataset)
    if source is not None:
        if name not in list_files(*source):
            return None
        return fetch(*source, name), f"{source[0]}@{source[1]}/{name}"
    root = Path(dataset["path"])
    path = (root if root.is_dir() else root.parent) / name
    return (path, str(path)) if path.is_file() else None
