"""The looks at a growing experiment: the decision of each, and the published tables after the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from kv_transition import parsing
from kv_transition.errors import UserError
from kv_transition.provenance import write_table
from kv_transition.stats.examples import Statistics, inherited
from kv_transition.studies.grid.analysis.adaptive import Adaptive, allocate, confidence
from kv_transition.studies.grid.analysis.transition import transitions
from kv_transition.studies.grid.tables import ALLOCATION, SCORES


def write_look(
    scores_paths: Sequence[str],
    manifests_paths: Sequence[str],
    output: str,
    plan: Mapping[str, Any],
    statistics: Mapping[str, Any],
    look: int,
) -> None:
    """Write how many examples each bin gets after this look (tables.ALLOCATION); the `allocate` checkpoint.

    Args:
        scores_paths: tables.SCORES of every shard that was run so far.
        manifests_paths: manifests of the tasks; they name the available examples of each bin.
        output: path of the table.
        plan: the ``adaptive`` section.
        statistics: the ``statistics`` section; its confidence holds over all looks together.
        look: number of the look, from 0.

    Raises UserError if a manifest cannot be read, or if the scores contain no row.
    """
    scores, fields = joined(scores_paths, SCORES)
    adaptive, base = Adaptive(**plan), statistics["confidence"]
    available = {key: n for path in manifests_paths for key, n in _chosen(path).items()}
    have = dict.fromkeys(available, 0)
    examples = scores.select(["task", "bin", "example_id"]).group_by(["task", "bin"]).aggregate(
        [("example_id", "count_distinct")]
    )  # fmt: skip
    for row in examples.to_pylist():
        have[row["task"], row["bin"]] = row["example_id_count_distinct"]
    levels = (confidence(adaptive, look, base), base)
    found = [transitions(scores, Statistics(**{**statistics, "confidence": level})) for level in levels]
    table = allocate(found, have, available, adaptive, look, base)
    write_table(output, table, fields | {"adaptive": dict(plan), "statistics": dict(statistics)})


def write_published(
    shards_paths: Sequence[str], looks_paths: Sequence[str], scores_path: str, allocation_path: str
) -> None:
    """Write the scores of all shards as one table, and all looks as another.

    The metadata of the scores contain ``confidence``: that of the last look, which all later statistics must use.
    """
    allocation, looked = joined(looks_paths, ALLOCATION)
    scores, fields = joined(shards_paths, SCORES)
    last = max(allocation.to_pylist(), key=lambda row: row["look"])
    write_table(scores_path, scores, fields | {"confidence": last["confidence"], "looks": last["look"] + 1})
    write_table(allocation_path, allocation, looked)


def joined(paths: Sequence[str], schema: pa.Schema) -> tuple[pa.Table, dict[str, str]]:
    """Return the rows of all files, and the metadata that they have in common."""
    tables = [parsing.read_parquet(path, partitioning=None).cast(schema) for path in paths]
    return pa.concat_tables(tables), dict(set.intersection(*(set(inherited(path).items()) for path in paths)))


def _chosen(path: str) -> dict[tuple[str, int], int]:
    """Return the number of examples of each (task, bin) in a manifest."""
    try:
        manifest = parsing.read_json(path)
        return {(manifest["task"], b["bin"]): b["n"] for b in manifest["bins"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable manifest ({error!r}): delete it and run again") from None
