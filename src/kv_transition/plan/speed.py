"""The speed of this machine with a model: measured in earlier results or a short trial, else estimated."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from kv_transition import parsing, specs
from kv_transition.plan.model_size import ModelSize
from kv_transition.settings import Settings

SAMPLE = 200
"""largest number of results files that are read"""
# Operations per second in 16 bit, and memory bandwidth in bytes per second, as the makers of the GPUs state them.
_GPUS = {"h200": (989e12, 4.8e12), "h100": (989e12, 3.35e12), "a100": (312e12, 1.55e12), "l40s": (362e12, 0.86e12)}
_CPU = (2e10, 1e10)
_SHARE = 0.4
"""assumed share of these that is reached"""
TRIAL_TOKENS, TRIAL_STEPS = 1024, 16


@dataclass(frozen=True)
class Speed:
    """Seconds of one process: to load the model, to read a token, and per generated token."""

    start_s: float
    read_s: float
    answer_s: float
    source: str
    """the origin of the figures, as a sentence"""
    measured: bool
    answer_tokens: dict[str, float] = field(default_factory=dict)
    """mean length of the measured answers, by task"""


def on_gpu(settings: Settings) -> bool:
    return settings.model.device != "cpu"


def of_results(settings: Settings) -> Speed | None:
    """Return the speed from cells of the same model, dtype and kind of device; None if there are none.

    The clock is that of the job: on a CPU the CPU time of the process.
    """

    from kv_transition.provenance import read_metadata

    model = specs.prefill(settings)["model"]
    starts: list[float] = []
    read = answered = 0.0
    read_tokens = answer_tokens = answers = 0
    lengths: dict[str, list[int]] = defaultdict(list)
    columns = ["task", "prompt_tokens", "completion_tokens", "load_s", "prefill_s", "latency_s", "error", "batch_size"]
    for path in islice(_cells(settings), SAMPLE):
        facts = read_metadata(path)
        same = facts.get("model_fingerprint") == model["fingerprint"] and facts.get("dtype") == model["dtype"]
        if not same or (facts.get("device", "cpu") != "cpu") != on_gpu(settings):
            continue
        rows = [row for row in parsing.read_parquet(path, columns=columns).to_pylist() if not row["error"]]
        alone = [row for row in rows if row["batch_size"] == 1 and row["prefill_s"] and row["latency_s"]]
        if not alone:
            continue
        starts.append(float(json.loads(facts.get("model_load_s", "0")) or 0))
        for row in alone:
            read += row["prefill_s"]
            read_tokens += row["prompt_tokens"]
            answered += max(0.0, row["latency_s"] - row["prefill_s"]) + (row["load_s"] or 0)
            answer_tokens += max(1, row["completion_tokens"])
            lengths[row["task"]].append(row["completion_tokens"])
        answers += len(alone)
    if not answers:
        return None
    return Speed(
        start_s=sum(starts) / len(starts),
        read_s=read / read_tokens,
        answer_s=answered / answer_tokens,
        source=f"measured: {answers:,} answers of this model under {settings.output.dir}, "
        f"{read_tokens / answers:,.0f} tokens a prompt",
        measured=True,
        answer_tokens={task: max(1.0, sum(found) / len(found)) for task, found in lengths.items()},
    )


def _cells(settings: Settings) -> Iterable[Path]:
    """Yield cells of this experiment, then of others."""
    root = Path(settings.output.dir)
    own = root / settings.experiment
    yield from sorted(own.glob("**/cells/**/bin*.parquet"))
    yield from (path for path in sorted(root.glob("*/cells/**/bin*.parquet")) if own not in path.parents)


def of_trial(settings: Settings) -> Speed:
    """Return the speed from a trial: load the model, read a random text and continue it."""
    import torch

    from kv_transition.run.job import load_engine

    started = time.perf_counter()
    engine = load_engine(specs.prefill(settings)["model"], torch.get_num_threads() if on_gpu(settings) else 1)
    start = time.perf_counter() - started
    tokens = min(TRIAL_TOKENS, settings.model.max_length - TRIAL_STEPS)
    ids = torch.randint(10, 1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = frozenset(specs.statistics(settings))
    engine.extend(None, ids[:16], wanted)  # kernels are chosen at the first call
    begun = engine.clock()
    state = engine.extend(None, ids, wanted)
    read = engine.clock() - begun
    begun = engine.clock()
    for token in ids[:TRIAL_STEPS]:
        state = engine.extend(state, [token], wanted)
    answer = engine.clock() - begun
    return Speed(
        start_s=start,
        read_s=read / tokens,
        answer_s=answer / TRIAL_STEPS,
        source=f"measured just now: a text of {tokens:,} tokens, and {TRIAL_STEPS} tokens after it",
        measured=True,
    )


def assumed(settings: Settings, size: ModelSize | None) -> Speed | None:
    """Return an estimate: reading is limited by operations, generating by reading the weights from memory."""
    if size is None:
        return None
    name = settings.hardware.gpu_model.lower()
    known = next((gpu for gpu in _GPUS if gpu in name), "a100")
    operations, bandwidth = _GPUS[known] if on_gpu(settings) else _CPU
    weights = size.weight_bytes(settings.model)
    if on_gpu(settings):
        machine = f"{_SHARE:.0%} of an {known}'s stated {operations / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.1f} TB/s"
    else:
        machine = f"{_SHARE * operations / 1e9:.0f} GFLOP/s a core"
    return Speed(
        start_s=10 + weights / 1e9,
        read_s=2 * size.parameters / (_SHARE * operations),
        answer_s=weights / (_SHARE * bandwidth),
        source=f"assumed, not measured: {machine}; --calibrate measures",
        measured=False,
    )


def speed(settings: Settings, size: ModelSize | None, calibrate: bool = False) -> Speed | None:
    """Return the best known speed; None if not even the size of the model is known."""
    if calibrate:
        return of_trial(settings)
    return of_results(settings) or assumed(settings, size)
