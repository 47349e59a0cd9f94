"""LongBench's English tasks (Bai et al. 2024, arXiv 2308.14508), from local files or from the hub.

The data set's own repository is a loading script for ``data.zip``, which current versions of ``datasets`` refuse to
run, so the archive is read directly. Mirrors with Parquet files, one folder or file per task, are also read.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kv_transition.data.hub import fetch, hub_source, list_files
from kv_transition.data.records import Record, local_source, parse_lines, read_file, require
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError

ARCHIVE = "data.zip"
FIELDS = ("input", "context", "answers", "_id")
META = ("length", "language", "dataset")


def load(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of ``task`` with normalized field names.

    Raises:
        UserError: the files cannot be read or downloaded, or a record is malformed, lacks a field or belongs to another
            task.
    """
    name = get_task("longbench", task).source_name
    if dataset.get("split", "test") != "test":
        raise UserError(f"dataset.split: LongBench only has the split test, not {dataset['split']!r}")
    source = hub_source(dataset)
    records = read_file(local_source(dataset, task)) if source is None else _from_hub(*source, name)
    for where, record in records:
        require(record, FIELDS, where)
        if record.get("dataset", name) not in (name, f"{name}_e", name.removesuffix("_e")):
            raise UserError(f"{where}: the record belongs to {record['dataset']!r}, not to {name}")
        yield (
            where,
            {
                "example_id": record["_id"],
                "question": record["input"],
                "context": record["context"],
                "answers": record["answers"],
                "all_classes": record.get("all_classes"),
                "meta": {key: record[key] for key in META if key in record},
            },
        )


def _from_hub(repository: str, revision: str, name: str) -> Iterator[Record]:
    files = list_files(repository, revision)
    if ARCHIVE in files:
        yield from _from_archive(fetch(repository, revision, ARCHIVE), name)
        return
    parts = sorted(file for file in files if _is_part(PurePosixPath(file), name))
    if not parts:
        raise UserError(f"dataset.path: {repository} at {revision} has neither {ARCHIVE} nor Parquet files of {name}")
    for part in parts:
        yield from _from_parquet(fetch(repository, revision, part), part)


def _is_part(file: PurePosixPath, name: str) -> bool:
    """Return whether a mirror's Parquet file belongs to the task: ``{name}/test-*.parquet``, ``{name}.parquet``."""
    if file.suffix != ".parquet":
        return False
    return name in file.parent.parts or re.fullmatch(rf"{re.escape(name)}(-\d.*)?", file.stem) is not None


def _from_archive(path: Path, name: str) -> Iterator[Record]:
    member = f"data/{name}.jsonl"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as lines:
            yield from parse_lines(lines, f"{ARCHIVE}/{member}")
    except KeyError:
        raise UserError(f"dataset.tasks: {ARCHIVE} has no {member}") from None
    # the kind of exception that the library raises depends on the damage of the archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise UserError(f"{ARCHIVE} cannot be read: {error}") from None


def _from_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))
