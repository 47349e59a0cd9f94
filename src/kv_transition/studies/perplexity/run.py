"""The perplexity job: score every window of a length bin under one policy and budget.

    python -m kv_transition.studies.perplexity.run --spec JSON --windows WINDOWS.parquet --output SCORES.parquet

For each window the model reads the context, the cache is compressed to the budget, and the following tokens are fed
(teacher forcing); the negative log-likelihood of each next token is recorded. The first of these tokens is fed but not
scored, because the full cache predicted it: every score comes from the compressed cache. A policy that acts at each
step acts after each token.

Under a policy that acts at each step, windows of equal length are scored together, so that the weights are read once
per step for all of them. Batched products are rounded in another order, so the nats differ by rounding errors from
those of a single window. The kept entries are the same, unless two scores differ by less than such an error.

With ``streaming`` the policy also acts while the context is read, as in the evaluation of StreamingLLM (Xiao et al.,
arXiv 2309.17453); otherwise the context is read with the full cache.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kv_transition.budget import Budget
from kv_transition.cache.batch import row, stack
from kv_transition.cache.state import CacheState
from kv_transition.cache.store import PrefillStore
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.catalog import create
from kv_transition.provenance import digest, read_metadata, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.run.decode import Setting
from kv_transition.run.matched import Course
from kv_transition.run.prefill import read_once, store_of
from kv_transition.studies.perplexity.tables import PERPLEXITY, WINDOW_KEY

Row = dict[str, Any]

TOGETHER = 8
"""maximum number of windows that are scored together"""


@dataclass(frozen=True)
class Read:
    """A context that was read, with the compressed cache."""

    state: CacheState
    token_bytes: float
    """bytes per token of a full cache"""
    prefill_s: float
    """seconds of reading; with streaming, the time of the policy is included"""
    compress_s: float = 0.0
    record: Row = field(default_factory=dict)
    """facts that the policy records about its compression"""


@dataclass(frozen=True)
class Scored:
    """The scores of the tokens after a context."""

    state: CacheState
    """the cache after the last fed token"""
    nats: Tensor
    """[n] fp32, -log p of each scored token"""
    kept: Sequence[float]
    """entries per KV head after each fed token"""
    record: Row = field(default_factory=dict)
    """facts that the policy records about its steps"""


def setting_of(spec: Row) -> Setting:
    policy = create(spec["kind"], spec["hyper_parameters"])
    return Setting(policy, Budget.parse(spec["budget"]), mode="before_question", match=spec.get("match", "none"))


def read(engine: LocalEngine, window: Row, setting: Setting, k: int, seed: int, store: PrefillStore) -> Read:
    """Return the context of a window, read with the full cache (or loaded from the store) and compressed to ``k``."""
    prefill, _ = read_once(engine, store, window | {"question_ids": []}, setting.policy.statistics)
    full = prefill.context
    started = engine.clock()
    state = setting.compress(full, k, seed)
    compress_s = engine.clock() - started
    record = setting.policy.record(full, k) if setting.evicts else {}
    return Read(state, full.nbytes / full.length, prefill.context_s, compress_s, record)


def stream(engine: LocalEngine, tokens: Sequence[int], setting: Setting, k: int, chunk: int) -> Read:
    """Return the cache after reading ``tokens`` in pieces of ``chunk``, with at most ``k`` entries in between."""
    started = engine.clock()
    state, token_bytes = None, 0.0
    for start in range(0, len(tokens), chunk):
        grown = engine.extend(state, tokens[start : start + chunk], setting.while_decoding)
        token_bytes = token_bytes or grown.nbytes / grown.length
        state = setting.hold(grown, k, given_up=True)
    return Read(state.settled(), token_bytes, engine.clock() - started)


def score(
    engine: LocalEngine, state: CacheState, tokens: Sequence[int], setting: Setting, k: int, seed: int = 0
) -> Scored:
    """Feed all ``tokens`` [n + 1] except the last after ``state``, and return the scores of all except the first.

    A policy that acts at each step acts after each token, and also before it if it observes the steps. For other
    policies the tokens are read as one block, with the same result.
    """
    fed, targets = tokens[:-1], tokens[1:]
    if not (setting.evicts and setting.policy.acts_each_step):
        after, nats = engine.score(state, fed, targets, frozenset())
        held = state.entries
        return Scored(after, nats, [held + 1 + i for i in range(len(fed))])
    watcher = setting.policy.watch(seed)
    nats, kept = [], []
    for token, target in zip(fed, targets, strict=True):
        look = watcher.before_attention(state.logits[None]) if watcher else None
        grown, own = engine.score(state, [token], [target], setting.while_decoding, before_attention=look)
        state = setting.hold(grown, k, given_up=True)
        nats.append(own)
        kept.append(state.entries)
    return Scored(state.settled(), torch.cat(nats), kept, watcher.record(state) if watcher else {})


def score_together(
    engine: LocalEngine, states: Sequence[CacheState], tokens: Sequence[Sequence[int]], setting: Setting, k: int
) -> list[Scored]:
    """Return the scores of several windows, as `score`, under a policy that acts at each step.

    The states must have the same number of entries, and the ``tokens`` [B, n + 1] the same length.
    """
    state = stack(states, setting.while_decoding)
    nats, kept = [], []
    for step in range(len(tokens[0]) - 1):
        fed, targets = ([[own[at]] for own in tokens] for at in (step, step + 1))
        grown, own = engine.score(state, fed, targets, setting.while_decoding)
        state = setting.hold(grown, k, given_up=True)
        nats.append(own)
        kept.append(state.entries)
    after, nats = state.settled(), torch.cat(nats, -1)
    return [Scored(row(after, number), nats[number], kept) for number in range(len(tokens))]


def course_of(window: Row) -> Course:
    """Return how the cache grows; entries are counted after each fed token, so the first count includes one."""
    return Course(len(window["context_ids"]), 1, len(window["target_ids"]) - 1)


def together(
    engine: LocalEngine, windows: Sequence[Row], setting: Setting, spec: Row, store: PrefillStore
) -> list[Row]:
    """Return the measurements, as `measured`, of windows of equal length; the scoring time is divided equally."""
    k = setting.entries_over(course_of(windows[0]))
    read = [_read(engine, window, setting, k, spec, store) for window in windows]
    bytes_after = [own.state.nbytes for own in read]
    started = engine.clock()
    got = score_together(engine, [own.state for own in read], [w["target_ids"] for w in windows], setting, k)
    score_s = (engine.clock() - started) / len(windows)
    return [_row(engine, *each, k, score_s) for each in zip(windows, read, bytes_after, got, strict=True)]


def measured(engine: LocalEngine, window: Row, setting: Setting, spec: Row, store: PrefillStore) -> Row:
    """Return the measurements of a window, as columns of PERPLEXITY."""
    k = setting.entries_over(course_of(window))
    own = _read(engine, window, setting, k, spec, store)
    bytes_after = own.state.nbytes
    started = engine.clock()
    got = score(engine, own.state, window["target_ids"], setting, k, _seed(window, spec))
    return _row(engine, window, own, bytes_after, got, k, engine.clock() - started)


def _seed(window: Row, spec: Row) -> int:
    return job.answer_seed(spec["seed"], f"{window['book_id']}/{window['window']}/{len(window['context_ids'])}", 0)


def _read(engine: LocalEngine, window: Row, setting: Setting, k: int, spec: Row, store: PrefillStore) -> Read:
    if spec["streaming"] and setting.evicts:
        return stream(engine, window["context_ids"], setting, k, spec["streaming_chunk"])
    return read(engine, window, setting, k, _seed(window, spec), store)


def _row(engine: LocalEngine, window: Row, own: Read, bytes_after: int, got: Scored, k: int, score_s: float) -> Row:
    context = window["context_ids"]
    nll = float(got.nats.double().sum())
    finite = math.isfinite(nll)
    return {
        "nll_sum": nll if finite else None,
        "n_tokens": len(got.nats),
        "budget_entries": k,
        "kept_final": got.kept[-1],
        "kept_mean": sum(got.kept) / len(got.kept),
        "full_mean": course_of(window).full("mean"),
        "bytes_before": round(own.token_bytes * len(context)),
        "bytes_after": bytes_after,
        "cache_bytes": got.state.nbytes,
        "total_bytes": got.state.total_nbytes,
        "full_bytes": round(own.token_bytes * got.state.length),
        "prefill_s": own.prefill_s,
        "compress_s": own.compress_s,
        "score_s": score_s,
        "peak_mem_mb": engine.peak_memory_mb(),
        "raw": json.dumps(own.record | got.record),
        "error": None if finite else "NOT_FINITE: a token has no finite probability; try another model.dtype",
    }


def rows(engine: LocalEngine, windows: Sequence[Row], spec: Row, store: PrefillStore) -> list[Row]:
    """Return a row of PERPLEXITY for each window; a window that runs out of memory is a row with its error."""
    setting = setting_of(spec)
    made: list[Row] = []
    for group in _groups(windows, setting):
        for window, found in zip(group, _measured_all(engine, group, setting, spec, store), strict=True):
            identity = {name: window[name] for name in WINDOW_KEY}
            about = {"policy": spec["policy"], "budget": spec["budget"], "perplexity_hash": digest(spec)}
            made.append(identity | about | found)
            told = f"scored {len(made)} of {len(windows)} windows, perplexity {so_far(made)}"
            print(told, file=sys.stderr, flush=True)
    return made


def _groups(windows: Sequence[Row], setting: Setting) -> Iterator[Sequence[Row]]:
    """Yield the windows in their order, in groups that are scored together: neighbours of equal length, if this saves
    time.
    """
    policy = setting.policy
    most = TOGETHER if setting.evicts and policy.acts_each_step and not policy.one_at_a_time else 1
    for _, alike in groupby(windows, key=lambda window: (len(window["context_ids"]), len(window["target_ids"]))):
        group = list(alike)
        yield from (group[start : start + most] for start in range(0, len(group), most))


def _measured_all(
    engine: LocalEngine, windows: Sequence[Row], setting: Setting, spec: Row, store: PrefillStore
) -> list[Row]:
    """Return the measurements of a group of windows, scored together if the memory is sufficient."""
    if len(windows) > 1:
        try:
            return together(engine, windows, setting, spec, store)
        except (torch.OutOfMemoryError, MemoryError):
            _free(engine)
    found = []
    for window in windows:
        try:
            found.append(measured(engine, window, setting, spec, store))
        except (torch.OutOfMemoryError, MemoryError) as error:
            found.append({"error": f"OOM: {(str(error).strip().splitlines() or ['no memory left'])[0]}"})
        if "nll_sum" not in found[-1]:
            _free(engine)
    return found


def _free(engine: LocalEngine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def so_far(made: Sequence[Row]) -> str:
    scored = [row for row in made if row.get("nll_sum") is not None]
    tokens = sum(row["n_tokens"] for row in scored)
    return f"{math.exp(min(sum(row['nll_sum'] for row in scored) / tokens, 700)):.4g}" if tokens else "unknown"


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--windows", "--output")
    spec = arguments.spec
    windows = job.read_bin(arguments.windows)
    engine = job.load_engine(spec["model"], arguments.threads)
    store = store_of(spec["model"], spec["prefill_code"], arguments.windows)
    table = rows_to_table(rows(engine, windows, spec, store), PERPLEXITY)
    about = read_metadata(arguments.windows)
    facts = {
        "model_load_s": round(engine.load_s, 3),
        "kind": spec["kind"],
        "hyper_parameters": spec["hyper_parameters"],
        "streaming": spec["streaming"],
        **job.model_facts(spec["model"], engine),
        **{key: about[key] for key in ("corpus", "revision", "split", "source", "stride") if key in about},
    }
    write_table(arguments.output, table, facts)


if __name__ == "__main__":
    job.run(main)
