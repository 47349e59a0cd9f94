"""Benchmarks that are read from their own files: LongBench v2, InfiniteBench's retrieval, GSM8K, MATH-500, IFEval.

The files are local, or from a hub repository at a pinned commit: ``{task}.jsonl[.gz]``, or one JSON array
``{task}.json``, with the fields of the benchmark. The prompt wordings are this project's own; scoring is the
benchmark's, see `eval.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kv_transition.data.hub import fetch, hub_source, list_files
from kv_transition.data.records import Record, find_any, read_file, require
from kv_transition.data.tasks import FILES
from kv_transition.errors import UserError
from kv_transition.parsing import decode, parse_json
from kv_transition.provenance import digest


def load(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of ``task`` with normalized field names.

    Raises:
        UserError: the file cannot be read or downloaded, or a record is malformed or lacks a field.
    """
    normalized = _NORMALIZED[task]
    for where, record in _records(_file(dataset, task)):
        yield where, normalized(record, where)


def _file(dataset: Mapping[str, Any], task: str) -> Path:
    if dataset.get("path") is None:
        raise UserError(f"dataset.path: {dataset['name']} needs its file or folder, or a hub repository")
    source = hub_source(dataset)
    if source is None:
        return find_any(Path(dataset["path"]), FILES[task])
    files = list_files(*source)
    for name in FILES[task]:
        for file in files:
            if Path(file).name in (f"{name}.jsonl", f"{name}.json", f"{name}.jsonl.gz"):
                return fetch(*source, file)
    raise UserError(f"dataset.path: {source[0]} at {source[1]} has no {' or '.join(FILES[task])} as .jsonl or .json")


def _records(path: Path) -> Iterator[Record]:
    if path.suffix != ".json":
        yield from read_file(path)
        return
    value = parse_json(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{path}: the file must contain a JSON array of objects")
    yield from ((f"{path}, record {number}", item) for number, item in enumerate(value, start=1))


def _example(record: Mapping[str, Any], context: str, question: str, answers: list[str], **meta: Any) -> dict[str, Any]:
    given = next((record[key] for key in ("_id", "id", "key", "unique_id") if key in record), None)
    return {
        "example_id": digest([question, context]) if given is None else str(given),
        "question": question,
        "context": context,
        "answers": answers,
        "all_classes": None,
        "meta": meta,
    }


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text, not {type(value).__name__}")
    return value


def _choices(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    letters = "ABCD"
    require(record, ("question", "context", "answer", *(f"choice_{x}" for x in letters)), where)
    answer = _text(record["answer"], "answer", where).strip()
    if answer not in tuple(letters):
        raise UserError(f"{where}: answer must be one of {', '.join(letters)}, not {answer!r}")
    listed = "\n".join(f"({x}) {_text(record[f'choice_{x}'], f'choice_{x}', where).strip()}" for x in letters)
    question = f"{_text(record['question'], 'question', where).strip()}\n{listed}"
    meta = {key: record[key] for key in ("domain", "sub_domain", "difficulty", "length") if key in record}
    return _example(record, _text(record["context"], "context", where), question, [answer], **meta)


def _infinite(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    require(record, ("context", "input", "answer"), where)
    answer = record["answer"]
    answer = answer[0] if isinstance(answer, list) and answer else answer
    context, question = (_text(record[key], key, where) for key in ("context", "input"))
    return _example(record, context, question, [_text(answer, "answer", where)])


def _gsm8k(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    require(record, ("question", "answer"), where)
    worked, mark, final = _text(record["answer"], "answer", where).rpartition("####")
    if not mark or not final.strip():
        raise UserError(f"{where}: answer must end with '#### ' and the number")
    return _example(record, _text(record["question"], "question", where), "", [final.strip()], steps=worked.count("\n"))


def _math(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    require(record, ("problem", "answer"), where)
    meta = {key: record[key] for key in ("subject", "level") if key in record}
    return _example(
        record, _text(record["problem"], "problem", where), "", [_text(record["answer"], "answer", where)], **meta
    )


def _ifeval(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an IFEval example; its answers are the instructions to check, see `eval.ifeval`."""
    require(record, ("prompt", "instruction_id_list", "kwargs"), where)
    names, kwargs = record["instruction_id_list"], record["kwargs"]
    if not isinstance(names, list) or not isinstance(kwargs, list) or len(names) != len(kwargs):
        raise UserError(f"{where}: instruction_id_list and kwargs must be lists of the same length")
    asked = [
        json.dumps({"id": name, "kwargs": {k: v for k, v in (own or {}).items() if v is not None}}, sort_keys=True)
        for name, own in zip(names, kwargs, strict=True)
    ]
    if not asked:
        raise UserError(f"{where}: instruction_id_list is empty; at least one instruction was expected")
    return _example(record, _text(record["prompt"], "prompt", where), "", asked)


_NORMALIZED = {
    "longbench_v2": _choices,
    "passkey": _infinite,
    "number_string": _infinite,
    "kv_retrieval": _infinite,
    "gsm8k": _gsm8k,
    "math_500": _math,
    "ifeval": _ifeval,
}
