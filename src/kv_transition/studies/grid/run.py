"""A cell of the grid: every example of a bin under one policy, budget and mode.

    python -m kv_transition.studies.grid.run --spec JSON --bin BIN.parquet --output CELL.parquet

For each example the job loads or computes its prefill, compresses it to the budget, reads the question and decodes (see
`run.decode`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from kv_transition.budget import Budget
from kv_transition.cache.store import Prefill
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Policy
from kv_transition.policies.catalog import create, is_press
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.run.contexts import Contexts
from kv_transition.run.decode import Answer, Compressed, Setting, begin_all, finish
from kv_transition.run.matched import Course, Match, settled
from kv_transition.run.paced import Paced, over_time, with_pace
from kv_transition.run.prefill import key_of, store_of
from kv_transition.studies.grid.moments import Paces, calibrated, paces
from kv_transition.studies.grid.tables import CELLS

GUESS = 8
"""first guess of the number of decode steps of an answer, if K depends on that number"""
Unit = tuple[dict[str, Any], int]
"""an example and the number of its repeat"""


def setting_of(spec: dict[str, Any]) -> Setting:
    setting = Setting(
        policy=_policy(spec["kind"], spec["hyper_parameters"]),
        budget=Budget.parse(spec["budget"]),
        mode=spec["mode"],
        first_token=spec["first_token"],
        temperature=spec["decoding"]["temperature"],
        compile=spec["decoding"].get("compile", False),
        match=spec.get("match", "none"),
    )
    return with_pace(setting, spec["decoding"])


def _policy(kind: str, hyper_parameters: dict[str, Any]) -> Policy:
    return _presses().Press(kind, hyper_parameters) if is_press(kind) else create(kind, hyper_parameters)


def _presses() -> ModuleType:
    """Return the module of presses, imported by name, so that the code hash of other cells does not include it."""
    return importlib.import_module("kv_transition.run.press")


def batches(units: Sequence[Unit], size: int, setting: Setting, *, ragged: bool) -> Iterator[list[Unit]]:
    """Yield lists of at most ``size`` answers to decode as one batch: answers whose caches will hold the same number of
    entries.

    ragged: also combine other answers, if padding costs less than the batch saves. The caches of a policy that acts at
    each step are never padded, and a policy that acts before a step's attention decodes one answer at a time.
    """
    if setting.policy.one_at_a_time or setting.matches:
        size = 1
    each_step = setting.evicts and setting.policy.acts_each_step
    held = each_step and not setting.policy.ignores_budget

    def entries(unit: Unit) -> int:
        context, question = (len(unit[0][key]) for key in ("context_ids", "question_ids"))
        before_question = setting.mode == "before_question"
        n = context if before_question else context + question
        k = setting.entries(n) if setting.evicts else n
        return k + question if before_question and not held else k

    # The largest answers come first, so that a lack of memory appears at once and the buffers of compiled decoding are
    # large enough for all later answers. Answers about one context follow each other.
    place: dict[tuple[int, ...], tuple[int, int]] = {}
    for number, unit in enumerate(units):
        most, first = place.get(key_of(unit[0]), (0, number))
        place[key_of(unit[0])] = max(most, entries(unit)), first
    ordered = sorted(units, key=lambda unit: (-place[key_of(unit[0])][0], place[key_of(unit[0])][1], -entries(unit)))
    run: list[Unit] = []
    for unit in ordered:
        alike = not run or entries(unit) == entries(run[0]) or (ragged and not each_step)
        if run and (len(run) == size or not alike):
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


def rows(
    engine: LocalEngine,
    examples: list[dict[str, Any]],
    spec: dict[str, Any],
    store: Any,
    calibration: str | None = None,
    treated: str | None = None,
) -> list[dict[str, Any]]:
    """Return the cell's rows, one per answer, in the order of the bin.

    calibration, treated: the files that a cell of entropy_recall reads in addition to its bin (see `moments`).
    """
    setting = setting_of(spec)
    setting = replace(setting, policy=calibrated(setting.policy, calibration))
    paced = paces(treated)
    decoding = spec["decoding"]
    units = [(example, repeat) for example in examples for repeat in range(decoding["repeats"])]
    contexts = Contexts(engine, store, [example for example, _ in units])
    done: dict[tuple[str, int], dict[str, Any]] = {}
    for batch in batches(units, decoding["batch"], setting, ragged=engine.device.type == "cuda"):
        for (example, repeat), row in zip(batch, _answered(engine, batch, setting, spec, contexts, paced), strict=True):
            done[example["example_id"], repeat] = _identity(engine, example, repeat, spec) | row
    return [done[example["example_id"], repeat] for example, repeat in units]


def _answered(
    engine: LocalEngine, units: list[Unit], setting: Setting, spec: dict[str, Any], contexts: Contexts, paced: Paces
) -> list[dict[str, Any]]:
    """Return a row for each answer. If memory runs out, a batch is halved, and a single answer is recorded as a
    failure.
    """
    try:
        return _answer(engine, units, setting, spec, contexts, paced)
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or ["no memory left"])[0]
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(units) == 1:
        return [{"error": f"OOM: {reason}"}]
    middle = len(units) // 2
    halves = (units[:middle], units[middle:])
    return [row for half in halves for row in _answered(engine, half, setting, spec, contexts, paced)]


def _answer(
    engine: LocalEngine, units: list[Unit], setting: Setting, spec: dict[str, Any], contexts: Contexts, paced: Paces
) -> list[dict[str, Any]]:
    if not setting.matches:
        return _answered_at(engine, units, setting, spec, contexts, paced, GUESS)
    [(example, _)] = units
    return settled(
        lambda steps: _answered_at(engine, units, setting, spec, contexts, paced, steps),
        lambda made: made[0]["steps"],
        lambda steps: setting.entries_over(_course(example, setting, steps)),
        min(GUESS, example["max_new_tokens"]),
    )


def _course(example: dict[str, Any], setting: Setting, steps: int) -> Course:
    context, question = (len(example[key]) for key in ("context_ids", "question_ids"))
    before_question = setting.mode == "before_question"
    return Course(context, question, steps) if before_question else Course(context + question, 0, steps)


def _answered_at(
    engine: LocalEngine,
    units: list[Unit],
    setting: Setting,
    spec: dict[str, Any],
    contexts: Contexts,
    paced: Paces,
    steps: int,
) -> list[dict[str, Any]]:
    seeds = [job.answer_seed(spec["decoding"]["seed"], e["example_id"], r) for e, r in units]
    answers = [
        Answer(seed, example["max_new_tokens"], paced.get((example["example_id"], repeat)), steps=steps)
        for seed, (example, repeat) in zip(seeds, units, strict=True)
    ]
    load_s: list[float] = []

    def prefills() -> Iterator[tuple[Prefill, Compressed | None]]:
        for example, _ in units:
            prefill, seconds = contexts.prefill(example, setting.policy.statistics)
            load_s.append(seconds)
            yield prefill, contexts.compressed(example, prefill, setting)

    if is_press(spec["kind"]):
        states = [
            _presses().begin(engine, example["context_ids"], example["question_ids"], setting, answer)
            for (example, _), answer in zip(units, answers, strict=True)
        ]
        load_s = [0.0] * len(units)
    else:
        questions = [example["question_ids"] for example, _ in units]
        states = begin_all(engine, prefills(), questions, setting, answers)
    finish(engine, states, setting, answers)
    peak = engine.peak_memory_mb()
    return [_row(engine, setting, *pair, peak) for pair in zip(answers, load_s, strict=True)]


def _identity(engine: LocalEngine, example: dict[str, Any], repeat: int, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: example[key] for key in ("task", "example_id", "bin", "prompt_sha256")},
        **{key: spec[key] for key in ("mode", "policy", "budget")},
        "cell_hash": digest(spec),
        "repeat": repeat,
        "prompt_tokens": example["prompt_len"],
        "batch_size": 1,
        "co_running": False,
        "engine": engine.name,
    }


def _row(engine: LocalEngine, setting: Setting, got: Answer, load_s: float, peak: float | None) -> dict[str, Any]:
    return {
        "text": engine.tokenizer.decode(got.tokens, skip_special_tokens=True),
        "finish_reason": got.finish_reason,
        "completion_tokens": len(got.tokens),
        "budget_entries": got.budget_entries,
        "protected": setting.policy.protected(got.budget_entries),
        "kept_final": got.kept[-1],
        "kept_mean": sum(got.kept) / len(got.kept),
        "full_mean": _full(got, "mean"),
        "full_final": _full(got, "final"),
        "steps": len(got.kept),
        "cache_bytes": got.cache_bytes,
        "total_bytes": got.total_bytes,
        "full_bytes": got.full_bytes,
        "load_s": load_s,
        "prefill_s": got.prefill_s,
        "compress_s": got.compress_s,
        "ttft_s": got.prefill_s + got.compress_s + got.first_token_s,
        "decode_s": got.decode_s,
        "latency_s": got.prefill_s + got.compress_s + got.decode_s,
        "batch_size": got.batch_size,
        "peak_mem_mb": peak,
        "raw": json.dumps({"token_ids": got.tokens} | got.record | _telemetry(setting, got)),
    }


def _telemetry(setting: Setting, got: Answer) -> dict[str, Any]:
    """Return the entries over time for an answer whose cache was compressed while it was generated."""
    return {"entries": over_time(got.kept)} if isinstance(setting.policy, Paced) else {}


def _full(got: Answer, match: Match) -> float | None:
    """Return the number of entries of a full cache over the same answer."""
    return None if got.course is None else replace(got.course, steps=len(got.kept)).full(match)


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--bin", "--output", optional=("--calibration", "--treated"))
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    engine = job.load_engine(spec["model"], arguments.threads)
    store = store_of(spec["model"], spec["prefill_code"], arguments.bin)
    made = rows(engine, examples, spec, store, arguments.calibration, arguments.treated)
    table = rows_to_table(made, CELLS)
    facts = {
        "config_hash": digest({key: value for key, value in spec.items() if key not in ("code", "prefill_code")}),
        "model_load_s": round(engine.load_s, 3),
        "hyper_parameters": spec["hyper_parameters"],
        "kind": spec["kind"],
        **job.model_facts(spec["model"], engine),
        **job.bin_metadata(arguments.bin),
    }
    write_table(arguments.output, table, facts)


if __name__ == "__main__":
    job.run(main)
