"""The job that runs tasks of lm-evaluation-harness under one policy, budget and mode.

    python -m kv_transition.studies.harness.run --spec JSON --output DOCUMENTS.parquet

Prompts, metrics, scores and standard errors are the harness's own; the model type is `kv_transition.harness.model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from kv_transition.budget import Budget
from kv_transition.data.tokens import load_tokenizer
from kv_transition.engines.loading import load_model
from kv_transition.errors import UserError
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.studies.harness.tables import DOCUMENTS

Row = dict[str, Any]


def evaluated(spec: Row) -> Mapping[str, Any]:
    """Return the harness's results for the tasks of the spec: scores, samples and more.

    Raises UserError if the harness is not installed, has no such task, or if a task cannot be run with the policy.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "harness: lm-evaluation-harness is not installed; use an environment with the extra lm-eval "
            "(`make lm-eval` creates one), or let Snakemake create it with --sdm conda"
        )
    from lm_eval import simple_evaluate

    tasks = _tasks(spec)  # before the model is loaded, because this may raise
    return simple_evaluate(
        _model(spec), tasks=spec["tasks"], task_manager=tasks, num_fewshot=spec["num_fewshot"], limit=spec["limit"],
        batch_size=spec["batch_size"], bootstrap_iters=spec["resamples"], log_samples=True,
    )  # fmt: skip


def _model(spec: Row) -> Any:
    from kv_transition.harness.model import CompressedLM

    own = {key: value for key, value in spec["model"].items() if key not in ("name", "fingerprint")}
    model = load_model(spec["model"]["name"], **own)
    model.set_attn_implementation("sdpa")  # GuestEngine replaces the attention while the cache is compressed
    budget = Budget.parse(spec["budget"])
    return CompressedLM(
        model, spec["kind"], None if budget.is_full else spec["budget"], spec["mode"], spec["separator"], spec["seed"],
        tokenizer=load_tokenizer(spec["model"]["name"], spec["model"]["revision"]), device=str(model.device),
        batch_size=spec["batch_size"], **{f"policy.{key}": value for key, value in spec["hyper_parameters"].items()},
    )  # fmt: skip


def _tasks(spec: Row) -> Any:
    """Return the harness's index of tasks. Raises UserError if it lacks one of the spec's tasks."""
    from lm_eval.tasks import TaskManager

    manager = None
    if spec["include_path"]:  # the harness's own tasks are thousands of files, so they are read only if they are needed
        manager = TaskManager(include_path=spec["include_path"], include_defaults=False)
    if manager is None or not set(spec["tasks"]) <= set(manager.all_tasks):
        manager = TaskManager(include_path=spec["include_path"])
    if unknown := [name for name in spec["tasks"] if name not in manager.all_tasks]:
        raise UserError(
            f"harness.tasks: lm-evaluation-harness {version('lm-eval')} has no task {unknown[0]!r}; `lm_eval ls tasks` "
            "lists its tasks, and harness.include_path names a folder with further tasks"
        )
    return manager


def scores(found: Mapping[str, Any]) -> list[Row]:
    """Return the harness's own score of each task or group, metric and filter, with its standard error."""
    rows = []
    for task, results in found["results"].items():
        counted = (found.get("n-samples") or {}).get(task) or {}
        for key, value in results.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or _number(value) is None:
                continue
            rows.append({
                "task": task, "metric": metric, "filter": name, "score": _number(value),
                "stderr": _number(results.get(f"{metric}_stderr,{name}")), "n": counted.get("effective"),
                "higher_is_better": (found.get("higher_is_better") or {}).get(task, {}).get(metric),
            })  # fmt: skip
    return rows


def documents(found: Mapping[str, Any]) -> list[Row]:
    """Return one row for each document of each task, metric and filter."""
    return [
        {
            "task": task, "metric": metric, "filter": sample["filter"],
            "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"], "value": _number(sample[metric]),
            "target": str(sample["target"]),
            "response": json.dumps(sample["filtered_resps"], ensure_ascii=False, default=str),
        }
        for task, samples in found["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
    ]  # fmt: skip


def _number(value: Any) -> float | None:
    """Return a number of any library as a float; None for other values, such as N/A or a pair of sums."""
    try:
        return float(value) if value is not None and not isinstance(value, str) else None
    except (TypeError, ValueError):
        return None


def main(argv: list[str] | None = None) -> None:
    import torch

    arguments = job.arguments(__doc__, argv, "--output")
    spec = arguments.spec
    torch.set_num_threads(arguments.threads)
    found = evaluated(spec)
    about = {"mode": spec["mode"], "policy": spec["policy"], "budget": spec["budget"], "harness_hash": digest(spec)}
    table = rows_to_table([about | row for row in documents(found)], DOCUMENTS)
    facts = {
        "harness": about | {"scores": scores(found), "version": version("lm-eval")},
        "kind": spec["kind"],
        "hyper_parameters": spec["hyper_parameters"],
        "model": spec["model"]["name"],
        "model_revision": spec["model"]["revision"],
        "model_fingerprint": spec["model"]["fingerprint"],
        "dtype": spec["model"]["dtype"],
    }
    write_table(arguments.output, table, facts)


if __name__ == "__main__":
    job.run(main)
