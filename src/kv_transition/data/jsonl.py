"""Your own examples: one JSON object per line with ``question``, ``context``, ``answers``, optional ``id``,
``meta``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kv_transition.data.records import Record, local_source, read_file, require
from kv_transition.errors import UserError, shown
from kv_transition.provenance import digest

FIELDS = ("question", "context", "answers")


def load(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of ``task`` under their normalized names.

    An example without an ``id`` is named after its content, so that reordering a file changes nothing.

    Raises:
        UserError: the file cannot be read, or a line is malformed or lacks a field.
    """
    path = local_source(dataset, task)
    if path is None:
        raise UserError("dataset.path: a jsonl data set needs the file, or the folder that holds {task}.jsonl")
    for where, record in read_file(path):
        require(record, FIELDS, where)
        example_id = record.get("id")
        if isinstance(example_id, int) and not isinstance(example_id, bool):
            example_id = str(example_id)
        if example_id is not None and not isinstance(example_id, str):
            raise UserError(f"{where}: the field 'id' must be a text or a whole number, not {shown(example_id)}")
        if example_id is None:
            example_id = digest([record["question"], record["context"]])
        meta = record.get("meta")
        yield (
            where,
            {
                "example_id": example_id,
                **{field: record[field] for field in FIELDS},
                "all_classes": None,
                "meta": {} if meta is None else meta,
            },
        )
