"""The user's own examples: one JSON object per line with ``question``, ``context``, ``answers``, optional ``id`` and
``meta``.

A line may have several ``questions`` about its ``context`` instead, each with ``question`` and ``answers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kv_transition.data.records import Record, local_source, read_file, require
from kv_transition.errors import UserError, shown
from kv_transition.provenance import digest

FIELDS = ("question", "context", "answers")
SHARED = ("context", "questions")


def load(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of ``task`` with normalized field names.

    The id of an example without an ``id`` is a hash of its content, so that the order of the lines has no effect.
    Questions about one context have its name as ``meta.context_id``; they are kept together.

    Raises:
        UserError: the file cannot be read, or a line is malformed or lacks a field.
    """
    path = local_source(dataset, task)
    if path is None:
        raise UserError("dataset.path: a jsonl data set needs a file, or a folder with {task}.jsonl")
    for where, record in (single for line in read_file(path) for single in _questions(*line)):
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


def _questions(where: str, record: dict[str, Any]) -> Iterator[Record]:
    """Yield a record for each question of a line, or the line itself if it has one ``question``."""
    if "questions" not in record:
        yield where, record
        return
    require(record, SHARED, where)
    if both := {"question", "answers"} & record.keys():
        raise UserError(
            f"{where}: the line has {min(both)!r} and 'questions'; put each question and its answers in 'questions'"
        )
    questions, meta = record["questions"], record.get("meta") or {}
    if not isinstance(questions, list) or not questions or not all(isinstance(own, dict) for own in questions):
        raise UserError(f"{where}: questions must be a list of objects with 'question' and 'answers', one or more")
    if not isinstance(meta, dict):
        raise UserError(f"{where}: meta must be a JSON object")
    name = str(record.get("id", digest([record["context"]])))
    for number, own in enumerate(questions, start=1):
        about = {**meta, **_meta(own, f"{where}, question {number}"), "context_id": name, "number": number}
        one = {**own, "context": record["context"], "meta": about}
        if "id" in record:
            one.setdefault("id", f"{name}-{number}")
        yield f"{where}, question {number}", one


def _meta(question: Mapping[str, Any], where: str) -> dict[str, Any]:
    meta = question.get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"{where}: meta must be a JSON object")
    return meta
