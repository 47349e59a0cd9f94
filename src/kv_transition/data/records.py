"""Read JSON lines, plain or gzipped, with the position of each record for error messages."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_transition.data.tasks import FILES, OF_FILES, get_task
from kv_transition.errors import UserError
from kv_transition.parsing import parse_json

SUFFIXES = (".jsonl", ".jsonl.gz")

Record = tuple[str, dict[str, Any]]
"""Position of a record ("file, line 3") and its fields."""


def find_file(path: Path, name: str) -> Path:
    """Return the file of task ``name``: ``path`` if it is a file, otherwise ``{name}.jsonl[.gz]`` in that folder.

    Raises:
        UserError: there is no such file, or there are two.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"dataset.path: {path} must end in {' or '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise UserError(f"dataset.path: there is no file or folder {path}")
    found = [path / (name + suffix) for suffix in SUFFIXES if (path / (name + suffix)).is_file()]
    if len(found) > 1:
        raise UserError(f"dataset.path: {path} contains both {found[0].name} and {found[1].name}; keep one of them")
    if not found:
        there = sorted(file.name for file in path.iterdir() if file.name.endswith(SUFFIXES))
        listing = ", ".join(there) or f"no file that ends in {' or '.join(SUFFIXES)}"
        raise UserError(f"dataset.path: {path} contains no {name}.jsonl or {name}.jsonl.gz; it contains {listing}")
    return found[0]


def find_any(path: Path, names: Sequence[str]) -> Path:
    """Return the file of the first of ``names`` that exists, as `find_file`; ``.json`` is also accepted."""
    if path.is_file() and path.suffix == ".json":
        return path
    there = (path / f"{name}{suffix}" for name in names for suffix in (*SUFFIXES, ".json"))
    return next((file for file in there if path.is_dir() and file.is_file()), None) or find_file(path, names[0])


def local_source(dataset: Mapping[str, Any], task: str) -> Path | None:
    """Return the local file with a task's examples; None if they are generated or downloaded.

    Args:
        dataset: the ``dataset`` section of a configuration (name, path).
        task: name of the task in the configuration.
    """
    path = dataset.get("path")
    if path is None or dataset["name"] in ("synthetic", "ruler"):
        return None
    if dataset["name"] == "longbench" and not Path(path).exists():
        return None  # a hub repository
    if dataset["name"] in OF_FILES:
        return find_any(Path(path), FILES[task]) if Path(path).exists() else None
    return find_file(Path(path), get_task(dataset["name"], task).source_name)


def read_file(path: Path) -> Iterator[Record]:
    """Yield the records of a ``.jsonl`` or ``.jsonl.gz`` file; blank lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from parse_lines(lines, str(path))
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_lines(lines: Iterable[bytes], name: str) -> Iterator[Record]:
    """Yield the JSON object of each line. name: the name of the file in error messages."""
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} is not UTF-8") from None
        if not text.strip():
            continue
        record = parse_json(text, where)
        if not isinstance(record, dict):
            raise UserError(f"{where}: the line must contain a JSON object, not {type(record).__name__}")
        yield where, record


def require(record: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    """Raise UserError if one of ``fields`` is missing."""
    missing = [field for field in fields if field not in record]
    if missing:
        raise UserError(f"{where}: the field {missing[0]!r} is missing; required are {', '.join(fields)}")
