"""The calibration job: token entropies of held-out examples, answered with the full cache.

    python -m kv_transition.studies.grid.calibrate --spec JSON --task NAME --examples EXAMPLES.parquet
        --manifest MANIFEST.json --output CALIBRATION.json

The `tau_quantile` of the policy entropy_recall is a quantile of these entropies. One file per task serves every budget
and mode.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from kv_transition.data.binning import bin_of
from kv_transition.data.prepare import choose_wording
from kv_transition.data.prompts import PromptBuilder
from kv_transition.data.tasks import get_task
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.parsing import read_json
from kv_transition.policies.entropy_recall import token_entropy
from kv_transition.provenance import write_json
from kv_transition.run import job

_DIGITS = 6

Row = dict[str, Any]


def held_out(examples: Sequence[Row], manifest: Row, n: int) -> list[Row]:
    """Return at most ``n`` examples that are in no bin but have the length of a bin, the same number from each length.

    Examples that share a document with an example in a bin are omitted. Raises UserError if no example is left.
    """
    edges = manifest["edges"]
    used = {name for b in manifest["bins"] for name in b["example_ids"]}
    documents = {row["context"] for row in examples if row["example_id"] in used}
    by_bin: dict[int, list[Row]] = {}
    for row in sorted(examples, key=lambda row: sha256(row["example_id"].encode()).hexdigest()):
        b = bin_of(row["token_len"], edges)
        if b is not None and row["example_id"] not in used and row["context"] not in documents:
            by_bin.setdefault(b, []).append(row)
    if not by_bin:
        raise UserError(
            "kv.policies: tau_quantile is calibrated on examples whose documents are in no bin, but the bins use all "
            f"{len(examples)} examples of {manifest['task']}; raise dataset.n_per_length, lower binning.n_per_bin, or "
            "give tau itself"
        )
    ranked = [(place, b, row) for b, rows in by_bin.items() for place, row in enumerate(rows)]
    return [row for _, _, row in sorted(ranked, key=lambda each: each[:2])[:n]]


def step_entropies(
    engine: LocalEngine, context_ids: Sequence[int], question_ids: Sequence[int], max_new_tokens: int
) -> list[float]:
    """Return the entropy in nats of the distribution of each token of a greedy answer with the full cache."""
    state = engine.prefill(context_ids, question_ids, frozenset()).prompt
    entropies = []
    # the last token is generated but not read, so it is not a decode step
    for left in range(max_new_tokens - 1, 0, -1):
        token = int(state.logits.argmax())
        if token in engine.eos:
            break
        entropies.append(token_entropy(state.logits))
        state = engine.extend(state, [token], frozenset(), room=left)
    return entropies


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--task", "--examples", "--manifest", "--output")
    spec, preparing = arguments.spec, arguments.spec["prepare"]
    manifest = read_json(arguments.manifest, "manifest")
    chosen = held_out(job.read_bin(arguments.examples), manifest, spec["examples"])
    engine = job.load_engine(spec["model"], arguments.threads)
    task = get_task(preparing["dataset"]["name"], arguments.task)
    wording = choose_wording(preparing["dataset"], task, preparing["decoding"]["max_tokens"], preparing["modes"])
    build = PromptBuilder(engine.tokenizer, wording.template, manifest["max_length"], manifest["chat_template"])
    entropies = []
    for number, row in enumerate(chosen, 1):
        prompt = build(row["context"], row["question"])
        entropies += step_entropies(engine, prompt.context_ids, prompt.question_ids, wording.max_new_tokens)
        print(f"answered {number} of {len(chosen)} held-out prompts", file=sys.stderr)
    write_json(
        arguments.output,
        {
            "task": arguments.task,
            "example_ids": [row["example_id"] for row in chosen],
            "steps": len(entropies),
            "entropies": sorted(round(entropy, _DIGITS) for entropy in entropies),
        },
    )


if __name__ == "__main__":
    job.run(main)
