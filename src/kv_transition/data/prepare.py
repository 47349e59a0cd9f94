"""The job ``prepare``: write one task's examples as prompts in length bins, and a manifest of their preparation.

``python -m kv_transition.data.prepare --spec JSON --task NAME --source FILE --outdir FOLDER``
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition import parsing, provenance, tables
from kv_transition.data import ruler
from kv_transition.data.binning import bin_of, choose, quantile_edges
from kv_transition.data.prompts import Prompt, PromptBuilder, Template
from kv_transition.data.tasks import Task, get_task
from kv_transition.data.templates import official
from kv_transition.data.tokens import load_tokenizer, tokenizer_sha256
from kv_transition.errors import UserError
from kv_transition.script import status

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_VERSION = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Wording:
    """The prompt template and the answer length of a task, with their sources and warnings."""

    template: Template
    max_new_tokens: int
    manifest: Row
    warnings: list[str]


def choose_wording(dataset: Mapping[str, Any], task: Task, max_tokens: int | str, modes: Sequence[str]) -> Wording:
    """Return the template and the answer length of a task: the benchmark's own if its files are given, otherwise this
    project's.

    Raises:
        UserError: a file is not in the expected form, or a mode needs a question that the task or the template lacks.
    """
    warnings = []
    found = official(dataset, "prompts", task.source_name)
    if found:
        text, source, file_sha256 = found.value, found.source, found.sha256
    else:
        text, source, file_sha256 = task.template, "own", sha256(task.template.encode()).hexdigest()
        if dataset["name"] == "longbench":
            warnings.append(
                f"{task.name} uses this project's own prompt wording, not LongBench's; "
                "give its dataset2prompt.json as dataset.prompts for the official one."
            )
    template = Template.parse(text, f"the template of {task.name} ({source})")
    if task.has_question and not template.has_question:
        raise UserError(
            f"the template of {task.name} ({source}) must contain {{input}}, because the task has a question"
        )
    if "before_question" in modes and not task.has_question:
        raise UserError(f"kv.modes: {task.name} has no question, so before_question is not possible; use after_prompt")

    length = official(dataset, "max_lengths", task.source_name) if max_tokens == "task" else None
    if length:
        limit, limit_source = length.value, length.source
    elif max_tokens == "task":
        limit, limit_source = task.max_new_tokens, "own"
        if dataset["name"] == "longbench":
            warnings.append(
                f"{task.name} answers may take {limit} tokens, this project's own choice and not LongBench's; "
                "give its dataset2maxlen.json as dataset.max_lengths for the official one."
            )
    else:
        limit, limit_source = int(max_tokens), "decoding.max_tokens"
    manifest = {
        "template": {"source": source, "sha256": file_sha256},
        "max_new_tokens": {"value": limit, "source": limit_source, "sha256": length.sha256 if length else None},
    }
    return Wording(template, limit, manifest, warnings)


def write_to_length(rows: Sequence[Row], build: PromptBuilder) -> list[Row]:
    """Return the examples of a ruler task with their documents instead of plans, see `ruler.write`.

    Raises UserError if a document would be truncated, or is too short for its content.
    """
    lengths = [json.loads(row["meta"])["length"] for row in rows]
    if max(lengths) > build.max_length:
        raise UserError(
            f"model.max_length: {build.max_length} would remove the middle of documents of {max(lengths)} tokens "
            f"(dataset.lengths), which may contain the answers; give at least {max(lengths)}"
        )

    def document(row: Row, length: int) -> str:
        def measure(context: str) -> int:
            return build.plain_len(context, row["question"])

        return ruler.write(row["task"], row["example_id"], row["context"], length, measure)

    return [row | {"context": document(row, length)} for row, length in zip(rows, lengths, strict=True)]


def divide(rows: Sequence[Row], prompts: Sequence[Prompt], binning: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """Return the length bins with the examples that are run in each, and warnings.

    Questions that their source gives for one context (``meta.context_id``) are in the bin of the longest of their
    prompts and are chosen together.

    Args:
        rows: examples with example_id and meta (JSON text).
        prompts: their prompts.
        binning: n_bins, edges (or null), n_per_bin, strict, seed.

    Returns:
        For each bin ``{"bin", "edges", "token_min", "token_max", "fed_min", "fed_max", "available", "truncated",
        "chosen"}``, where the ranges are those of the bin's examples before and after truncation (null if there are
        none) and ``chosen`` contains positions in ``rows``; and warnings.

    Raises:
        UserError: a bin has fewer examples than n_per_bin and ``strict`` is set.
    """
    n_bins, wanted = binning["n_bins"], binning["n_per_bin"]
    together = [str(json.loads(row["meta"]).get("context_id", row["example_id"])) for row in rows]
    longest: dict[str, int] = {}
    for name, prompt in zip(together, prompts, strict=True):
        longest[name] = max(prompt.token_len, longest.get(name, 0))
    lengths = [longest[name] for name in together]
    edges = binning.get("edges") or quantile_edges(lengths, n_bins)
    if len(edges) != n_bins + 1:
        raise UserError(f"binning.edges: {n_bins} bins need {n_bins + 1} edges, not {len(edges)}")
    members: list[list[int]] = [[] for _ in range(n_bins)]
    for i, length in enumerate(lengths):
        if (b := bin_of(length, edges)) is not None:
            members[b].append(i)

    warnings = []
    if outside := len(rows) - sum(map(len, members)):
        warnings.append(
            f"{outside} of {len(rows)} examples are not used: they have fewer than {edges[0]} "
            f"or more than {edges[-1]} tokens, the outer edges of the bins."
        )
    bins = []
    for b, inside in enumerate(members):
        if len(inside) < wanted:
            span = f"[{edges[b]}, {edges[b + 1]}{']' if b == n_bins - 1 else ')'}"
            sentence = f"Bin {b}, {span} tokens, has {len(inside)} of {wanted} wanted examples."
            if binning.get("strict"):
                raise UserError(f"binning.n_per_bin: {sentence} Lower it, or set binning.strict to false.")
            warnings.append(sentence)
        kinds = [str(json.loads(rows[i]["meta"]).get("kind", "")) for i in inside]
        ids = [rows[i]["example_id"] for i in inside]
        chosen = choose(ids, kinds, wanted, binning.get("seed", 0), [together[i] for i in inside])
        bins.append(
            {
                "bin": b,
                "edges": [edges[b], edges[b + 1]],
                "token_min": min((lengths[i] for i in inside), default=None),
                "token_max": max((lengths[i] for i in inside), default=None),
                "fed_min": min((prompts[i].prompt_len for i in inside), default=None),
                "fed_max": max((prompts[i].prompt_len for i in inside), default=None),
                "available": len(inside),
                "truncated": sum(prompts[i].truncated for i in inside),
                "chosen": [inside[i] for i in chosen],
            }
        )
    return bins, warnings


def prepare(spec: Mapping[str, Any], task_name: str, source: str, outdir: str) -> None:
    """Write examples.parquet, bin{b}.parquet for every bin and manifest.json into ``outdir``.

    Every text is tokenized once, here, with the model's own tokenizer: examples.parquet has the counts, and the bin
    files have the token ids of the chosen examples. No later job tokenizes a prompt again.

    Args:
        spec: ``{"dataset", "model": {name, revision, max_length, chat_template}, "binning", "decoding": {max_tokens},
            "modes"}``.
        task_name: name of the task.
        source: the table that the job ``download`` wrote.
        outdir: folder of the results; after an error it is unchanged.

    Raises:
        UserError: the configuration or the data do not allow it.
    """

    dataset, model = spec["dataset"], spec["model"]
    task = get_task(dataset["name"], task_name)
    wording = choose_wording(dataset, task, spec["decoding"]["max_tokens"], spec["modes"])
    tokenizer = load_tokenizer(model["name"], model.get("revision"))
    has_chat_template = bool(tokenizer.chat_template)
    chat = model.get("chat_template", "auto") == "auto" and has_chat_template and task.chat_template
    build = PromptBuilder(tokenizer, wording.template, model["max_length"], chat)

    rows = parsing.read_parquet(source, schema=tables.SOURCE).to_pylist()
    if dataset["name"] == "ruler":
        rows = write_to_length(rows, build)
    prompts = [build(row["context"], row["question"]) for row in rows]
    bins, bin_warnings = divide(rows, prompts, spec["binning"])
    warnings = [*wording.warnings, *_prompt_warnings(model, prompts), *bin_warnings]

    examples = [
        {**row, "token_len": prompt.token_len, "prompt_len": prompt.prompt_len}
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    bin_tables = [_bin_table(b, examples, prompts, wording.max_new_tokens) for b in bins]
    origin = provenance.read_metadata(source)
    fields = {
        "dataset": dataset["name"],
        "revision": dataset.get("revision"),
        "split": dataset.get("split", "test"),
        "source": origin.get("source"),
        "source_sha256": origin.get("source_sha256"),
        "task": task.name,
        "model": model["name"],
        "model_revision": model.get("revision"),
        "max_length": model["max_length"],
    }
    tokenizer_id = {
        "name": model["name"],
        "revision": model.get("revision"),
        "sha256": tokenizer_sha256(tokenizer),
    }
    manifest = {
        "version": MANIFEST_VERSION,
        **{
            key: fields[key]
            for key in ("task", "dataset", "revision", "split", "source", "source_sha256", "max_length")
        },
        "metric": task.metric,
        "tokenizer": tokenizer_id,
        **wording.manifest,
        "chat_template": chat,
        "n_examples": len(rows),
        "n_truncated": sum(prompt.truncated for prompt in prompts),
        "n_per_bin": spec["binning"]["n_per_bin"],
        "edges": [*(b["edges"][0] for b in bins), bins[-1]["edges"][1]],
        "bins": [
            {
                **{key: value for key, value in b.items() if key != "chosen"},
                "n": len(b["chosen"]),
                "example_ids": [rows[i]["example_id"] for i in b["chosen"]],
            }
            for b in bins
        ],
        "warnings": warnings,
    }
    fields |= {
        "tokenizer_sha256": tokenizer_id["sha256"],
        "config_hash": provenance.digest({key: value for key, value in spec.items() if key != "code"}),
    }
    folder = Path(outdir)
    provenance.write_table(folder / "examples.parquet", provenance.rows_to_table(examples, tables.EXAMPLES), fields)
    for b, table in enumerate(bin_tables):
        provenance.write_table(folder / f"bin{b}.parquet", table, fields)
    provenance.write_json(folder / "manifest.json", manifest)


def _prompt_warnings(model: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[str]:
    warnings = []
    limit = model["max_length"]
    if not Path(model["name"]).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", model.get("revision") or ""):
        warnings.append(f"{model['name']} is not pinned to a commit (model.revision), so the hub may change it.")
    if truncated := sum(prompt.truncated for prompt in prompts):
        warnings.append(
            f"{truncated} of {len(prompts)} prompts are longer than {limit} tokens, so their middle was removed."
        )
    if cut := sum(prompt.question_cut for prompt in prompts):
        warnings.append(
            f"In {cut} of {len(prompts)} prompts truncation to {limit} tokens cut into the question segment; "
            "raise model.max_length."
        )
    return warnings


def _bin_table(b: Row, examples: Sequence[Row], prompts: Sequence[Prompt], max_new_tokens: int) -> pa.Table:
    rows = []
    for i in b["chosen"]:
        example, prompt = examples[i], prompts[i]
        rows.append(
            {
                **{key: value for key, value in example.items() if key != "context"},
                "bin": b["bin"],
                "prompt_sha256": prompt.sha256,
                "context_sha256": provenance.text_sha256(example["context"]),
                "context_text": prompt.context_text,
                "question_text": prompt.question_text,
                "content_start": prompt.content and prompt.content[0],
                "content_end": prompt.content and prompt.content[1],
                "context_ids": prompt.context_ids,
                "question_ids": prompt.question_ids,
                "max_new_tokens": max_new_tokens,
            }
        )
    return provenance.rows_to_table(rows, tables.BIN)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--outdir", required=True)
    args = parser.parse_args(argv)
    return status(prepare, args.spec, args.task, args.source, args.outdir)


if __name__ == "__main__":
    sys.exit(main())
