"""Score all answers of an experiment: join cells and their examples into one table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kv_transition import parsing, paths, provenance
from kv_transition.data.tasks import Task, get_task
from kv_transition.errors import UserError
from kv_transition.eval import failures, metrics
from kv_transition.studies.grid import tables
from kv_transition.tables import cluster_of

_EXAMPLE_FIELDS = ("token_len", "question", "answers", "meta")
_EXAMPLE_COLUMNS = ["example_id", "prompt_sha256", "context_sha256", "all_classes", *_EXAMPLE_FIELDS]
_BIN_FILE = re.compile(rf"(?:^|/)data/(?P<task>{paths.TASK})/bin(?P<bin>{paths.BIN})\.parquet$")
_NAMED_FILES = 3

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """The answers of one cell, and the key in its path."""

    path: str
    key: Mapping[str, str]  # task, mode, policy, budget, bin
    answers: pa.Table  # of tables.CELLS
    metadata: Mapping[str, str]


def write_scores(
    grid: str,
    cells: Sequence[str],
    bins: Sequence[str],
    manifests: Sequence[str],
    aliases: Sequence[tuple[str, str]],
    output: str,
) -> None:
    """Score the cells of the ``score`` rule; ``grid``: a JSON file with the hash that each cell's rows must have."""
    expected = parsing.read_json(grid)
    score_cells(cells, bins, manifests, expected, output, aliases)


def score_cells(
    cells: Sequence[str],
    bins: Sequence[str],
    manifests: Sequence[str],
    expected: Mapping[str, str],
    output: str,
    aliases: Sequence[tuple[str, str]] = (),
) -> None:
    """Score every answer and write them as one table (``tables.SCORES``), in the order of the cells.

    Args:
        cells: paths of cells (``tables.CELLS``); the cell of an empty bin is empty.
        bins: paths of the bin files (``tables.BIN``) that the cells answer.
        manifests: paths of the tasks' manifests, which name data set and task.
        expected: the ``cell_hash`` that each cell must have, by path.
        output: path of the table. It gets the metadata that all cells have in common.
        aliases: (policy, budget) pairs that are the full cache by definition: the full cache's rows are repeated under
            each of these names, in every mode, with ``alias`` true.

    Raises:
        UserError: a file cannot be read; a cell does not answer exactly the prompts of its bin, each once a repeat, or
            was computed with other settings or code; a bin file or a manifest is missing. Nothing is written then.
    """
    examples = {_bin_key(path): _read_examples(path) for path in bins}
    tasks = dict(_read_task(path) for path in manifests)
    loaded, problems = [], {}
    for path in cells:
        key = paths.cell_key(path)
        if (key["task"], key["bin"]) not in examples or key["task"] not in tasks:
            raise UserError(f"{path}: the bin file or the manifest of this cell is not among the inputs")
        try:
            cell = _read_cell(path, key)
            _check(cell, examples[key["task"], key["bin"]], expected.get(path))
        except _UnfitError as unfit:
            problems[path] = str(unfit)
        else:
            loaded.append(cell)
    if problems:
        raise UserError(_sentence(problems, len(cells)))

    scored = [_score(cell, examples[cell.key["task"], cell.key["bin"]], tasks[cell.key["task"]]) for cell in loaded]
    table = pa.concat_tables([tables.SCORES.empty_table(), *scored])
    if aliases:
        full = [rows for cell, rows in zip(loaded, scored, strict=True) if cell.key["policy"] == "full"]
        if not full:
            raise UserError(
                "a budget of 1.0 repeats the full cache's answers, but the full cache was not run: add the policy full"
            )
        table = pa.concat_tables([table, *(_alias(pa.concat_tables(full), *name) for name in aliases)])
    provenance.write_table(output, table, _common_metadata(loaded))


# ----------------------------------------------------------------------------------------------------
# Reading and checking


class _UnfitError(Exception):
    """The reason why a cell cannot be scored."""


def _bin_key(path: str) -> tuple[str, str]:
    match = _BIN_FILE.search(path)
    if match is None:
        raise ValueError(f"{path} is not the path of a bin file")
    return match["task"], match["bin"]


def _read_examples(path: str) -> dict[str, Example]:
    """Return the examples of a bin by their id."""
    try:
        rows = pq.read_table(path, columns=_EXAMPLE_COLUMNS, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable bin file ({_first_line(error)}): delete it and run again") from None
    return {row["example_id"]: row for row in rows}


def _read_task(path: str) -> tuple[str, Task]:
    """Return the task's name and definition, from its manifest."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        dataset, task = manifest["dataset"], manifest["task"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable manifest with a dataset and a task ({_first_line(error)}): "
            "delete it and run again"
        ) from None
    return task, get_task(dataset, task)


def _read_cell(path: str, key: Mapping[str, str]) -> Cell:
    try:
        table = pq.read_table(path, partitioning=None)
        answers = table.select(tables.CELLS.names).cast(tables.CELLS)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise _UnfitError(f"not a readable cell: {_first_line(error)}") from None
    raw = table.schema.metadata or {}
    metadata = {k.decode(): v.decode() for k, v in raw.items() if not k.startswith(b"ARROW")}
    return Cell(path, key, answers, metadata)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check(cell: Cell, examples: Mapping[str, Example], expected_hash: str | None) -> None:
    """Raise _UnfitError unless the cell matches its path and expected hash and answers its bin exactly."""
    if expected_hash is None:
        raise _UnfitError("not a cell of this experiment")
    columns = cell.answers.select([*cell.key, "example_id", "repeat", "prompt_sha256", "cell_hash"]).to_pydict()
    for name, value in cell.key.items():
        if other := {str(v) for v in columns[name]} - {value}:
            raise _UnfitError(f"contains answers of {name} {min(other)}")
    if other := {str(h) for h in columns["cell_hash"]} - {expected_hash}:
        raise _UnfitError(f"computed with other settings or code, cell_hash {min(other)} instead of {expected_hash}")

    ids = columns["example_id"]
    if surplus := set(ids) - set(examples):
        raise _UnfitError(f"answers {min(surplus)}, which is not in its bin")
    for example_id, prompt_hash in zip(ids, columns["prompt_sha256"], strict=True):
        if prompt_hash != examples[example_id]["prompt_sha256"]:
            raise _UnfitError(f"answers another prompt of {example_id}")
    repeats = set(columns["repeat"]) or {0}
    times = Counter(zip(ids, columns["repeat"], strict=True))
    for example_id in examples:
        for repeat in repeats:
            if times[example_id, repeat] == 0:
                raise _UnfitError(f"has no answer to {example_id}")
            if times[example_id, repeat] > 1:
                raise _UnfitError(f"answers {example_id} more than once")


def _sentence(problems: Mapping[str, str], n_cells: int) -> str:
    named = "; ".join(f"{path}: {why}" for path, why in list(problems.items())[:_NAMED_FILES])
    more = f"; and {len(problems) - _NAMED_FILES} more" if len(problems) > _NAMED_FILES else ""
    return (
        f"{len(problems)} of {n_cells} cells do not match this experiment ({named}{more}): "
        "delete these files and run again, or rerun all cells with snakemake --forcerun cell"
    )


# ----------------------------------------------------------------------------------------------------
# Scoring


def grade(
    text: str | None, finish_reason: str | None, error: str | None, example: Example, task: Task
) -> dict[str, Any]:
    """Return the scores of one answer: the columns of ``tables.SCORES`` from ``metric`` to ``failure``.

    If the engine reported an error, there is no answer to score: the scores are null and the failure states the reason.
    ``gold_norm`` is the gold answer with the highest F1, the first of several.
    """
    answers, classes = example["answers"] or [], example["all_classes"]
    label = failures.failure(text or "", answers, classes, task.pattern, task.first_line_only, finish_reason, error)
    if error is not None:
        return {"metric": task.metric, "failure": label}
    scored = metrics.scored_text(text or "", task.first_line_only)
    f1 = [metrics.qa_f1(scored, gold) for gold in answers]
    best = max(f1, default=0.0)
    return {
        "metric": task.metric,
        "score": best if task.metric == "qa_f1" else metrics.score_answer(task.metric, scored, answers, classes),
        "em": metrics.exact_match(scored, answers),
        "f1": best,
        "contains": metrics.contains(scored, answers),
        "pred_norm": metrics.normalize(scored),
        "gold_norm": metrics.normalize(answers[f1.index(best)]) if answers else "",
        "failure": label,
    }


def _score(cell: Cell, examples: Mapping[str, Example], task: Task) -> pa.Table:
    """Return the cell's rows of ``tables.SCORES``."""
    columns = cell.answers.select(["example_id", "text", "finish_reason", "error"]).to_pydict()
    rows = []
    for example_id, *answer in zip(*columns.values(), strict=True):
        example = examples[example_id]
        try:
            grades = grade(*answer, example, task)
        except UserError as error:
            raise UserError(f"task {cell.key['task']}, example {example_id}: {error}") from None
        described = {field: example[field] for field in _EXAMPLE_FIELDS} | {"cluster": cluster_of(example)}
        rows.append(described | grades | {"alias": False})
    added = provenance.rows_to_table(rows, pa.schema(list(tables.SCORES)[len(tables.CELLS) :]))
    return pa.table([*cell.answers.columns, *added.columns], schema=tables.SCORES)


def _alias(full: pa.Table, policy: str, budget: str) -> pa.Table:
    """Return the full cache's rows under another policy's name."""
    columns = {"policy": policy, "budget": budget, "alias": True}
    for name, value in columns.items():
        field = full.schema.field(name)
        full = full.set_column(
            full.schema.get_field_index(name), field, pa.repeat(pa.scalar(value, field.type), full.num_rows)
        )
    return full


def _common_metadata(cells: Sequence[Cell]) -> dict[str, str]:
    """Return the metadata that all cells share; commit and versions of the cells get names of their own."""
    if not cells:
        return {}
    common = dict(set.intersection(*(set(cell.metadata.items()) for cell in cells)))
    own = {"timestamp": None, "git_commit": "cells_git_commit", "package_versions": "cells_package_versions"}
    return {own.get(name, name): value for name, value in sorted(common.items()) if own.get(name, name)}
