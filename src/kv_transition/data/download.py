"""The job ``download``: write one task's examples, from any source, as one table (`tables.SOURCE`).

``python -m kv_transition.data.download --spec JSON --task NAME --output FILE``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

from kv_transition import provenance, tables
from kv_transition.data import benchmarks, jsonl, longbench, ruler
from kv_transition.data.hub import hub_source
from kv_transition.data.records import Record, local_source
from kv_transition.data.tasks import OF_FILES, Task, get_task
from kv_transition.errors import UserError
from kv_transition.script import status


def load_synthetic(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of a synthetic task.

    Raises:
        UserError: lengths, n_per_length or split are missing or not allowed.
    """
    from kv_transition.data import synthetic

    for key in ("lengths", "n_per_length"):
        if not dataset.get(key):
            raise UserError(f"dataset.{key}: the synthetic data set needs this key")
    generate = getattr(synthetic, task)
    try:
        examples = generate(
            dataset["lengths"], dataset["n_per_length"], dataset.get("seed", 0), split=dataset.get("split", "test")
        )
        for number, example in enumerate(examples, start=1):
            yield f"{task}, example {number}", {**example, "all_classes": None}
    except ValueError as error:
        raise UserError(f"dataset: {error}") from None


LOADERS = {"synthetic": load_synthetic, "ruler": ruler.load, "longbench": longbench.load, "jsonl": jsonl.load}
LOADERS |= dict.fromkeys(OF_FILES, benchmarks.load)


def normalize(records: Iterable[Record], task: Task) -> list[dict[str, Any]]:
    """Check every record and return the rows with the columns of `tables.SOURCE`.

    Raises:
        UserError: a field has the wrong type, a context (or the question of a task that has one) is empty, there is
            no answer, two examples share an id or both question and context, or there is no example.
    """
    rows: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    texts: dict[str, str] = {}
    for where, record in records:
        _check(record, task, where)
        example_id = record["example_id"]
        content = sha256(json.dumps([record["question"], record["context"]]).encode()).hexdigest()
        if example_id in ids:
            raise UserError(f"{where}: the id {example_id!r} is already used at {ids[example_id]}")
        if content in texts:
            raise UserError(f"{where}: the same question and context already occur at {texts[content]}")
        ids[example_id] = texts[content] = where
        meta = json.dumps(record["meta"], sort_keys=True, ensure_ascii=False)
        rows.append({**record, "task": task.name, "meta": meta})
    if not rows:
        raise UserError(f"dataset: the source of {task.name} contains no examples")
    return rows


def _check(record: Mapping[str, Any], task: Task, where: str) -> None:
    for field in ("example_id", "question", "context"):
        if not isinstance(record[field], str):
            raise UserError(f"{where}: {field} must be a text, not {type(record[field]).__name__}")
    for field in ("example_id", "context", *(["question"] if task.has_question else [])):
        if not record[field].strip():
            raise UserError(f"{where}: {field} is empty")
    answers = record["answers"]
    if not _is_texts(answers) or not any(answer.strip() for answer in answers):
        raise UserError(f"{where}: answers must be a list of texts, at least one of them not empty")
    if record["all_classes"] is not None and not _is_texts(record["all_classes"]):
        raise UserError(f"{where}: all_classes must be a list of texts or null")
    if not isinstance(record["meta"], dict):
        raise UserError(f"{where}: meta must be a JSON object")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def describe_source(dataset: Mapping[str, Any], task: str) -> dict[str, str | None]:
    """Return the source of the examples for the metadata: a name and, for a local file, the hash of its content."""
    path = local_source(dataset, task)
    if path is not None:
        return {"source": path.name, "source_sha256": sha256(path.read_bytes()).hexdigest()}
    if dataset["name"] == "longbench" or dataset["name"] in OF_FILES:
        return {"source": "{}@{}".format(*hub_source(dataset)), "source_sha256": None}
    return {"source": "generated", "source_sha256": None}


def download(spec: Mapping[str, Any], task: str, output: str) -> None:
    """Write the source table of one task.

    Args:
        spec: ``{"dataset": {name, revision, path, split, lengths, n_per_length, seed}}``.
        task: name of the task.
        output: the Parquet file to write; it is written atomically.

    Raises:
        UserError: the data cannot be read or downloaded, or are not in the expected form.
    """
    dataset = spec["dataset"]
    described = get_task(dataset["name"], task)
    rows = normalize(LOADERS[dataset["name"]](dataset, task), described)
    fields = {
        "dataset": dataset["name"],
        "revision": dataset.get("revision"),
        "split": dataset.get("split", "test"),
        "task": task,
        "config_hash": provenance.digest({key: value for key, value in spec.items() if key != "code"}),
        **describe_source(dataset, task),
    }
    provenance.write_table(output, provenance.rows_to_table(rows, tables.SOURCE), fields)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    return status(download, args.spec, args.task, args.output)


if __name__ == "__main__":
    sys.exit(main())
