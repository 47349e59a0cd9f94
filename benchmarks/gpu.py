"""The engine on a GPU, with the geometry of a 7B model: random weights, bf16, 28 layers, 28 query and 4 KV heads.

    python benchmarks/gpu.py [--part prefill decode limit] [--output FILE.json]
    python benchmarks/gpu.py --tiny --device cpu

prefill: a prompt of 4k to 128k tokens read with all statistics, with each of them and with none, and in chunks, beside
transformers' own forward pass on the same weights. decode: tokens a second of 16k-token prompts by batch, budget and
loop. limit: the longest prompt that fits 40 GB beside the weights.

Each part has a share of nine minutes on an H200. What there is no time or memory for is said in its place. Figures go
to ``benchmarks/results/{date}-{gpu}.json``, whose parts are replaced one by one. ``--tiny`` tries everything out with a
small model and writes nothing unless told where to. Needs torch, transformers, triton, safetensors and pyarrow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics as stats
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
# where the package itself is not installed
sys.path.insert(0, str(HERE.parent / "src"))

from document import table  # noqa: E402
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from kv_transition.cache.batch import stack  # noqa: E402
from kv_transition.cache.state import STATISTICS, CacheState  # noqa: E402
from kv_transition.engines.compiled import CompiledDecoder  # noqa: E402
from kv_transition.engines.local import LocalEngine  # noqa: E402
from kv_transition.engines.reading import ATTENTION, attention_function  # noqa: E402
from kv_transition.policies.knorm import KNorm  # noqa: E402
from kv_transition.provenance import git_commit, package_versions, write_json  # noqa: E402

MEASURED: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "column sums": frozenset({"attn_sum"}),
    "entropy": frozenset({"query_entropy"}),
    "last queries": frozenset({"recent_queries"}),
    "query moments": frozenset({"query_mean", "query_cov"}),
    "all": STATISTICS,
}
CARD = 40e9
TARGET, TARGET_AT = 1.35, 16384
SECONDS = {"prefill": 190, "decode": 230, "limit": 100}


@dataclass(frozen=True)
class Sizes:
    model: dict[str, int]
    lengths: tuple[int, ...] = (4096, 16384, 65536, 131072)
    shares_up_to: int = 16384
    """longest prompt on which each statistic is measured by itself"""
    chunk: int = 8192
    prompt: int = 16384
    """tokens of a prompt whose answer is decoded"""
    steps: int = 32
    batches: tuple[int, ...] = (1, 4, 16)
    budgets: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    limits: tuple[int, ...] = (32768, 65536, 131072)
    backend: str = "inductor"
    dtype: torch.dtype = torch.bfloat16


SEVEN_B = Sizes(
    model={
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 524288,
    }
)
TINY = Sizes(
    model={
        "vocab_size": 97,
        "hidden_size": 56,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
    },
    lengths=(128, 256),
    shares_up_to=128,
    chunk=64,
    prompt=200,
    steps=3,
    batches=(1, 2),
    budgets=(1.0, 0.2),
    limits=(128, 256, 512),
    backend="eager",
    dtype=torch.float32,
)


@dataclass
class Bench:
    engine: LocalEngine
    sizes: Sizes
    ends: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.engine.device.type == "cuda"

    def tokens(self, n: int) -> list[int]:
        generator = torch.Generator().manual_seed(n)
        return torch.randint(0, self.sizes.model["vocab_size"], (n,), generator=generator).tolist()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.engine.device)

    def clean(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.engine.device)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.engine.device) / 2**30 if self.cuda else None

    def seconds(self, call: Callable[[], Any], repeats: int) -> dict[str, float | None]:
        """Median seconds of a call, warmed up once, and the peak memory of all."""
        self.clean()
        call()
        taken = []
        for _ in range(repeats):
            self.sync()
            started = time.perf_counter()
            call()
            self.sync()
            taken.append(time.perf_counter() - started)
        return {"s": stats.median(taken), "peak_gib": self.peak_gib()}

    def add(self, what: dict[str, Any], measure: Callable[..., dict[str, Any]], *inputs: Any) -> dict[str, Any]:
        """A figure, or the reason why there is none. measure is called with this and the inputs."""
        if time.monotonic() > self.ends:
            found: dict[str, Any] = {"skipped": "no time left"}
        else:
            try:
                found = measure(self, *inputs)
            except (torch.OutOfMemoryError, MemoryError):
                found = {"skipped": "out of memory"}
            self.clean()
        self.figures.append(what | found)
        print(json.dumps(self.figures[-1]), file=sys.stderr, flush=True)
        return self.figures[-1]


def model_of(sizes: Sizes, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    AttentionInterface.register(ATTENTION, attention_function)
    config = Qwen2Config(**sizes.model, tie_word_embeddings=False, rope_theta=1e6)
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval().set_attn_implementation(ATTENTION)
    model.generation_config.eos_token_id = None
    return model


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
    for batch, budget in corners + others:
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
        bench.figures.append(
            {
                "largest_n": longest,
                "by": "the line through the measured peaks of allocated memory, not tried",
                "bytes_per_token": slope * 2**30,
                "gib_at_0": intercept,
            }
        )


PARTS: dict[str, Callable[[Bench], None]] = {"prefill": prefill, "decode": decode, "limit": limit}


def number(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def tables(parts: dict[str, list[dict[str, Any]]]) -> str:
    """What was measured, for people."""
    pages = []
    for part, figures in parts.items():
        heads = list(dict.fromkeys(key for figure in figures for key in figure))
        rows = [
            [
                f[h] if isinstance(f.get(h), str) else number(f.get(h), "d" if type(f.get(h)) is int else ".4g")
                for h in heads
            ]
            for f in figures
        ]
        pages.append(f"{part}\n\n{table(heads, rows)}")
    for figure in parts.get("prefill", []):
        if figure.get("n") == TARGET_AT and figure["read"] == "all" and "times_plain" in figure:
            met = "met" if figure["times_plain"] <= TARGET else "missed"
            pages.append(
                f"all statistics at 16k: {figure['times_plain']:.2f} x plain; at most {TARGET} is wanted: {met}"
            )
    return "\n\n".join(pages)


def conditions(engine: LocalEngine) -> dict[str, Any]:
    hardware: dict[str, Any] = {"device": engine.device_name, "machine": platform.machine()}
    if engine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(engine.device)
        hardware |= {
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": package_versions() | {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": git_commit(),
        "attention": engine.attention,
        "attention_statistics": engine.statistics_by,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model and short prompts: to try it out")
    parser.add_argument(
        "--output", type=Path, help="file for the figures; default: benchmarks/results/{date}-{gpu}.json"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script out")

    sizes = TINY if arguments.tiny else SEVEN_B
    engine = LocalEngine(model_of(sizes, arguments.device))
    known = conditions(engine)
    path = arguments.output
    if path is None and not arguments.tiny:
        name = "".join(c if c.isalnum() else "-" for c in engine.device_name.lower())
        path = HERE / "results" / f"{known['date']}-{name}.json"
    before = json.loads(path.read_text())["figures"] if path is not None and path.is_file() else {}

    parts: dict[str, list[dict[str, Any]]] = {}
    for part in arguments.part:
        bench = Bench(engine, sizes, ends=time.monotonic() + SECONDS[part])
        try:
            PARTS[part](bench)
        except (torch.OutOfMemoryError, MemoryError) as error:
            bench.figures.append({"skipped": f"out of memory: {str(error).splitlines()[0]}"})
        bench.clean()
        parts[part] = bench.figures
        if path is not None:
            write_json(path, known | {"figures": before | parts})
    print(tables(parts))


if __name__ == "__main__":
    main()
