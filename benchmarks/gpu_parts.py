"""The parts of benchmarks/gpu.py, the most important first."""

from __future__ import annotations

import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_serve import serve

from kv_transition.attention.statistics import attention_statistics, choose
from kv_transition.cache.batch import stack
from kv_transition.cache.state import STATISTICS, CacheState
from kv_transition.engines.compiled import CompiledDecoder
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION
from kv_transition.policies.base import Policy
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.policies.knorm import KNorm

ROOT = Path(__file__).resolve().parents[1]
MEASURED: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "column sums": frozenset({"attn_sum"}),
    "entropy": frozenset({"query_entropy"}),
    "last queries": frozenset({"recent_queries"}),
    "query moments": frozenset({"query_mean", "query_cov"}),
    "all": STATISTICS,
}
EACH_STEP = ("streaming_llm", "h2o")
CARD = 40e9
TARGET, TARGET_AT = 1.35, 16384


def tests(bench: Bench) -> None:
    """Run the tests that need a GPU."""
    bench.add({"what": "pytest -m gpu"}, run_tests)


def run_tests(bench: Bench) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider"]
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_*gpu*.py"))
    room = max(10.0, bench.ends - time.monotonic())
    started = time.perf_counter()
    try:
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=room)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done within {room:.0f} s"}
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return {"status": done.returncode, "said": last, "s": time.perf_counter() - started}


def prefill(bench: Bench) -> None:
    engine, sizes = bench.engine, bench.sizes
    # kernels are compiled here, not in the first figure
    for kept in MEASURED.values():
        engine.extend(None, bench.tokens(sizes.lengths[0]), kept)
    for n in sizes.lengths:
        ids = bench.tokens(n)
        repeats = 5 if n <= TARGET_AT else 1
        plain = bench.add({"n": n, "read": "transformers"}, transformers_prefill, ids, repeats)
        for name, kept in MEASURED.items():
            if name != "all" and n > sizes.shares_up_to:
                continue
            measured = bench.add({"n": n, "read": name}, own_prefill, ids, kept, repeats)
            if "s" in measured and "s" in plain:
                measured["times_plain"] = measured["s"] / plain["s"]
    for n in sizes.lengths[-2:]:
        bench.add({"n": n, "read": f"all, in chunks of {sizes.chunk}"}, chunked, n)


def own_prefill(bench: Bench, ids: Sequence[int], kept: frozenset[str], repeats: int) -> dict[str, Any]:
    return bench.seconds(lambda: bench.engine.extend(None, ids, kept), repeats)


def transformers_prefill(bench: Bench, ids: Sequence[int], repeats: int) -> dict[str, Any]:
    """The same model with PyTorch's attention and transformers' own cache."""
    from transformers import DynamicCache

    model = bench.engine.model
    tensor = torch.tensor([list(ids)], device=bench.engine.device)

    @torch.inference_mode()
    def read() -> None:
        model(input_ids=tensor, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    model.set_attn_implementation("sdpa")
    try:
        return bench.seconds(read, repeats)
    finally:
        model.set_attn_implementation(ATTENTION)


def chunked(bench: Bench, n: int) -> dict[str, Any]:
    """All statistics of one reading in chunks; not warmed up, since every chunk is a call of its own."""
    engine = bench.engine
    engine.chunk_tokens = bench.sizes.chunk
    bench.clean()
    try:
        bench.sync()
        started = time.perf_counter()
        engine.extend(None, bench.tokens(n))
        bench.sync()
        return {"s": time.perf_counter() - started, "peak_gib": bench.peak_gib()}
    finally:
        engine.chunk_tokens = None


def decode(bench: Bench) -> None:
    """Measure tokens per second: the plain loop by budget, the compiled one by budget, and policies that act at each
    step.
    """
    sizes = bench.sizes
    full = bench.engine.extend(None, bench.tokens(sizes.prompt), frozenset())
    kept = {r: KNorm().compress(full, int(r * sizes.prompt)) if r < 1 else full for r in sizes.budgets}
    for batch in sizes.batches:
        for budget, state in kept.items():
            bench.add({"batch": batch, "budget": budget, "loop": "plain"}, plain_loop, [state] * batch)
    # Each compiles for a minute: those that bound the others first.
    ends = (sizes.batches[0], sizes.batches[-1])
    corners = [(b, r) for b in ends for r in (sizes.budgets[0], sizes.budgets[-1])]
    others = [(b, r) for b in sizes.batches for r in sizes.budgets if (b, r) not in corners]
    for batch, budget in corners:
        bench.add({"batch": batch, "budget": budget, "loop": "compiled"}, compiled_loop, [kept[budget]] * batch)
    for kind in EACH_STEP:
        policy = create(kind, hyper_parameters(kind))
        state = bench.engine.extend(None, bench.tokens(sizes.prompt), policy.statistics)
        k = int(sizes.budgets[-1] * sizes.prompt)
        for batch in sizes.batches:
            what = {"batch": batch, "budget": sizes.budgets[-1], "loop": f"{kind}, acts each step"}
            bench.add(what, stepping_loop, policy, policy.compress(state, k), k, batch)
    for batch, budget in others:
        bench.add({"batch": batch, "budget": budget, "loop": "compiled"}, compiled_loop, [kept[budget]] * batch)


def plain_loop(bench: Bench, states: Sequence[CacheState]) -> dict[str, Any]:
    engine, steps = bench.engine, bench.sizes.steps
    bench.clean()
    batch = stack(states, frozenset())
    tokens = [[1]] * len(states)
    warm = 3
    for _ in range(warm):
        batch = engine.extend(batch, tokens, frozenset(), warm + steps)
    bench.sync()
    started = time.perf_counter()
    for _ in range(steps):
        tokens = batch.logits.argmax(-1, keepdim=True).tolist()
        batch = engine.extend(batch, tokens, frozenset(), steps)
    bench.sync()
    return rate(bench, len(states), time.perf_counter() - started)


def stepping_loop(bench: Bench, policy: Policy, state: CacheState, k: int, batch: int) -> dict[str, Any]:
    engine, steps, warm = bench.engine, bench.sizes.steps, 3
    bench.clean()
    held = stack([state] * batch, policy.statistics)
    started = 0.0
    for step in range(warm + steps):
        if step == warm:
            bench.sync()
            started = time.perf_counter()
        tokens = held.logits.argmax(-1, keepdim=True).tolist()
        held = policy.hold(engine.extend(held, tokens, policy.statistics), k)
    bench.sync()
    return rate(bench, batch, time.perf_counter() - started)


def compiled_loop(bench: Bench, states: Sequence[CacheState]) -> dict[str, Any]:
    steps, warm = bench.sizes.steps, 3
    torch._dynamo.reset()
    bench.clean()
    decoder = CompiledDecoder(bench.engine, backend=bench.sizes.backend)
    started = time.perf_counter()
    # compiles
    decoder.load(states, warm + steps)
    for _ in range(warm):
        decoder.read(dict.fromkeys(range(len(states)), 1))
    bench.sync()
    compiled = time.perf_counter()
    for _ in range(steps):
        decoder.read(dict(enumerate(decoder.logits.argmax(-1).tolist())))
    bench.sync()
    return rate(bench, len(states), time.perf_counter() - compiled) | {"compile_s": compiled - started}


def rate(bench: Bench, batch: int, seconds: float) -> dict[str, Any]:
    steps = bench.sizes.steps
    return {
        "tokens_per_s": batch * steps / seconds,
        "ms_per_step": 1000 * seconds / steps,
        "peak_gib": bench.peak_gib(),
    }


def limit(bench: Bench) -> None:
    """Read in chunks with all statistics on a card of 40 GB: measured peaks, and the line through them."""
    if bench.cuda:
        total = torch.cuda.get_device_properties(bench.engine.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    try:
        measured = [bench.add({"n": n, "card_gb": CARD / 1e9}, chunked, n) for n in bench.sizes.limits]
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    points = [(f["n"], f["peak_gib"]) for f in measured if f.get("peak_gib") is not None]
    if len(points) >= 2:
        slope, intercept = stats.linear_regression(*zip(*points, strict=True))
        longest = int((CARD / 2**30 - intercept) / slope)
        bench.note(
            {
                "largest_n": longest,
                "by": "the line through the measured peaks of allocated memory, not tried",
                "bytes_per_token": slope * 2**30,
                "gib_at_0": intercept,
            }
        )


def kernels(bench: Bench) -> None:
    """One layer's column sums and entropies beside its attention, and beside what the card can do at most."""
    peak = bench.add({"what": "matrix product", "n": 4096 if bench.cuda else 256}, product)
    heads, kv_heads = bench.sizes.model["num_attention_heads"], bench.sizes.model["num_key_value_heads"]
    d = bench.sizes.model["hidden_size"] // heads
    for n in bench.sizes.kernels:
        shape = (heads, kv_heads, d)
        plain = bench.add({"what": "attention", "n": n}, attention_alone, n, shape)
        for name, wanted in (("column sums", (True, False)), ("entropy", (False, True)), ("both", (True, True))):
            found = bench.add({"what": name, "n": n}, statistics_alone, n, shape, wanted)
            if "s" not in found:
                continue
            if "s" in plain:
                found["over_attention"] = found["s"] / plain["s"]
            if "flops_per_s" in peak:
                # Q K^T of a causal triangle is all that needs a matrix unit
                found["of_roofline"] = n * n * heads * d / found["s"] / peak["flops_per_s"]
            bench.kept(bench.figures)


def product(bench: Bench) -> dict[str, Any]:
    n = 4096 if bench.cuda else 256
    a = torch.ones(n, n, device=bench.engine.device, dtype=bench.sizes.dtype)
    found = bench.seconds(lambda: a @ a, 10)
    return found | {"flops_per_s": 2 * n**3 / found["s"]}


def heads_of(bench: Bench, n: int, heads: int, d: int) -> torch.Tensor:
    generator = torch.Generator(bench.engine.device).manual_seed(heads)
    made = torch.randn(heads, n, d, generator=generator, device=bench.engine.device)
    return made.to(bench.sizes.dtype)


def attention_alone(bench: Bench, n: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    heads, kv_heads, d = shape
    queries, keys = heads_of(bench, n, heads, d)[None], heads_of(bench, n, kv_heads, d)[None]

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)

    return bench.seconds(attend, 5)


def statistics_alone(bench: Bench, n: int, shape: tuple[int, int, int], wanted: tuple[bool, bool]) -> dict[str, Any]:
    heads, kv_heads, d = shape
    queries, keys = heads_of(bench, n, heads, d), heads_of(bench, n, kv_heads, d)
    sums, entropy = wanted
    return bench.seconds(lambda: attention_statistics(queries, keys, d**-0.5, column_sums=sums, entropy=entropy), 5) | {
        "by": choose(bench.engine.device.type, queries.dtype, head_dim=d)
    }


def studies(bench: Bench) -> None:
    """A step that is observed, a scored token, and what only some machines have installed."""
    bench.add({"what": "observed step, 2 policies, 2 budgets, per head"}, observed)
    for kind in ("full", *EACH_STEP):
        bench.add({"what": f"scored tokens, {kind}"}, scored, kind)
    bench.add({"what": "attention by flash-attn"}, flash_attn)
    bench.add({"what": "load in nf4"}, nf4)


def observed(bench: Bench) -> dict[str, Any]:
    from kv_transition.studies.recall.run import follow, shadows_of

    engine, steps = bench.engine, bench.sizes.steps
    state = engine.extend(None, bench.tokens(bench.sizes.prompt))
    spec = {
        "policies": {kind: {"kind": kind, "hyper_parameters": hyper_parameters(kind)} for kind in ("snapkv", "h2o")},
        "budgets": ["r0.5", "r0.2"],
        "granularities": ["per_head"],
        "memories": ["ideal"],
    }
    follow(engine, state, shadows_of(spec, 0), 2)
    bench.sync()
    started = time.perf_counter()
    follow(engine, state, shadows_of(spec, 0), steps)
    bench.sync()
    return {"ms_per_step": 1000 * (time.perf_counter() - started) / steps}


def scored(bench: Bench, kind: str) -> dict[str, Any]:
    from kv_transition.budget import Budget
    from kv_transition.run.decode import Setting
    from kv_transition.studies.perplexity.run import score

    policy, n = create(kind, hyper_parameters(kind)), bench.sizes.prompt
    setting = Setting(policy, Budget.parse("r1" if kind == "full" else "r0.5"), "before_question")
    k = setting.entries(n)
    state = setting.compress(bench.engine.extend(None, bench.tokens(n), policy.statistics), k)
    tokens = bench.tokens(bench.sizes.steps + 1)
    found = bench.seconds(lambda: score(bench.engine, state, tokens, setting, k), 1)
    return found | {"tokens_per_s": bench.sizes.steps / found["s"]}


def flash_attn(bench: Bench) -> dict[str, Any]:
    import flash_attn

    model = bench.engine.model
    tensor = torch.tensor([bench.tokens(bench.sizes.prompt)], device=bench.engine.device)

    @torch.inference_mode()
    def read() -> None:
        model(input_ids=tensor, use_cache=False, logits_to_keep=1)

    model.set_attn_implementation("flash_attention_2")
    try:
        return bench.seconds(read, 3) | {"version": flash_attn.__version__}
    finally:
        model.set_attn_implementation(ATTENTION)


def nf4(bench: Bench) -> dict[str, Any]:
    """Seconds of loading the same weights in 4 bit, and the memory that they take; on a GPU only."""
    if not bench.cuda:
        raise NotImplementedError("bitsandbytes is used on a GPU")
    quantization = {"kind": "nf4", "double_quantization": True, "compute_dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        bench.engine.model.save_pretrained(folder)
        started = time.perf_counter()
        engine = LocalEngine.from_pretrained(folder, device="cuda", dtype="bfloat16", quantization=quantization)
        took = time.perf_counter() - started
        gib = engine.model.get_memory_footprint() / 2**30
        rate_of = plain_loop(replace(bench, engine=engine, figures=[]), [engine.extend(None, bench.tokens(4096))])
    return {"s": took, "weights_gib": gib} | rate_of


PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "tests": (tests, 60),
    "prefill": (prefill, 130),
    "decode": (decode, 120),
    "limit": (limit, 45),
    "kernels": (kernels, 25),
    "studies": (studies, 60),
    "serve": (serve, 40),
}
"""each part with its seconds: eight minutes in all; what one leaves is the next one's"""
