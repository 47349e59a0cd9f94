"""What exact attention statistics cost beside attention itself: seconds and peak memory of one layer.

    python benchmarks/attention_statistics.py [--lengths 512 1024 ...] [--output FILE.json]

Each figure comes from a process of its own. Memory is what a call needs at its peak beyond its inputs; since an
engine computes the statistics after the attention's output, this is the most that they can add to a prefill's peak.
On a CPU it is the resident set's high-water mark, which Linux can reset, so that neither imports nor inputs count; time
is the process's CPU time on one thread, which neighbours on other cores do not lengthen. On a GPU it is the allocator's
peak, and time is between two events.

Eager attention takes the whole matrix of probabilities. Where that would not fit, its memory is four times that of
half the length, and marked ~.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (4096, 8192, 16384)
# query heads, KV heads, head dimension, dtype: a layer of Qwen2-7B, and a small one
SHAPES = ((28, 4, 128, "bfloat16"), (8, 2, 64, "float32"))
STATISTICS = {"sums": (True, False), "entropy": (False, True), "both": (True, True)}
EAGER_BYTES = 3 << 30
GROWTH, SHARE = 2.2, 0.1


def measure(kind: str, what: str, q: int, n: int, shape: tuple[int, int, int, str], device: str) -> dict[str, float]:
    """Return seconds and MiB of one call; kind is sdpa, eager or an implementation."""
    import torch
    from torch.nn import functional

    from kv_transition.attention.statistics import attention_statistics

    torch.set_num_threads(1)
    heads, kv_heads, d, dtype = shape
    scale = d**-0.5
    column_sums, entropy = STATISTICS[what]

    @torch.inference_mode()
    def call(queries: torch.Tensor, keys: torch.Tensor) -> object:
        if kind == "sdpa":
            causal = queries.shape[2] > 1
            return functional.scaled_dot_product_attention(
                queries, keys, keys, is_causal=causal, scale=scale, enable_gqa=True
            )
        if kind != "eager":
            return attention_statistics(
                queries, keys, scale, column_sums=column_sums, entropy=entropy, implementation=kind
            )
        logits = queries @ keys.repeat_interleave(heads // kv_heads, 1).mT * scale
        logits += torch.full(logits.shape[-2:], -torch.inf, dtype=logits.dtype, device=device).triu_(1)
        p = logits.softmax(-1, dtype=torch.float32)
        return p.sum(2).unflatten(1, (kv_heads, -1)).mean(2), torch.special.entr(p).sum(-1).mean(1)

    def tensors(q: int, n: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        sizes = (1, heads, q, d), (1, kv_heads, n, d)
        return [torch.randn(size, device=device, dtype=getattr(torch, dtype)) for size in sizes]

    # what a first call loads and keeps is no part of it
    call(*tensors(min(q, 128), 128))
    inputs = tensors(q, n)
    with Peak(device) as peak:
        seconds = [clocked(lambda: call(*inputs), device)]
    while sum(seconds) < 2 and len(seconds) < 20:
        seconds.append(clocked(lambda: call(*inputs), device))
    return {"seconds": min(seconds), "mib": peak.mib}


class Peak:
    """The maximum of the MiB in use within the block, minus those in use at its start."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        else:
            self.mib = (self.resident("VmHWM") - self.before) / 2**20

    @staticmethod
    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def clocked(call: object, device: str) -> float:
    if device != "cuda":
        started = time.process_time()
        call()
        return time.process_time() - started
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def apart(*task: object) -> dict[str, float]:
    """Return the result of `measure` in a new process."""
    done = subprocess.run([sys.executable, __file__, "--task", json.dumps(task)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def kinds(shape: tuple[int, int, int, str], device: str) -> list[tuple[str, str]]:
    import torch

    from kv_transition.attention.statistics import IMPLEMENTATIONS, choose
    from kv_transition.errors import UserError

    found = [("sdpa", "both"), ("eager", "both")]
    for implementation in IMPLEMENTATIONS:
        try:
            choose(device, getattr(torch, shape[3]), head_dim=shape[2], implementation=implementation)
        except UserError:
            continue
        found += [(implementation, what) for what in STATISTICS]
    return found


def judge(mib: dict[int, float], eager: dict[int, float]) -> str:
    """Return whether memory grows with the length, and not with its square."""
    growth = [mib[b] / mib[a] for a, b in ((4096, 8192), (8192, 16384)) if a in mib and b in mib]
    words = [f"x {g:.2f}" for g in growth]
    good = all(g <= GROWTH for g in growth)
    if 8192 in mib and 8192 in eager:
        share = mib[8192] / eager[8192]
        words.append(f"{share:.1%} of eager at 8192")
        good = good and share < SHARE
    return f"{', '.join(words)}: {'holds' if good else 'FAILS'}" if words else "not measured"


def bench(shape: tuple[int, int, int, str], device: str, lengths: list[int]) -> list[dict[str, object]]:
    heads, kv_heads, d, dtype = shape
    print(f"\n{heads}/{kv_heads} heads, d = {d}, {dtype}, {device}: seconds / MiB")
    print(f"{'':17}" + "".join(f"{n:>16}" for n in lengths))
    rows, eager = [], {}
    for kind, what in kinds(shape, device):
        mib: dict[int, float] = {}
        cells = []
        for n in lengths:
            if kind == "eager" and heads * n * n * 4 > EAGER_BYTES:
                if n // 2 in mib:
                    mib[n] = 4 * mib[n // 2]
                cells.append(f"- / ~{mib[n]:.0f}" if n in mib else "-")
                continue
            figures = apart(kind, what, n, n, shape, device)
            mib[n] = figures["mib"]
            cells.append(f"{figures['seconds']:.4g} / {figures['mib']:.0f}")
            rows.append({"shape": shape, "device": device, "kind": kind, "what": what, "q": n, "n": n, **figures})
        name = kind if kind in ("sdpa", "eager") else f"{kind}, {what}"
        print(f"{name:17}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
        if kind == "eager":
            eager = mib
        elif kind != "sdpa":
            print(f"{'':17}memory {judge(mib, eager)}")
    for name, kind, what in (
        ("sdpa", "sdpa", "both"),
        ("one row, sums", "blocks", "sums"),
        ("one row, both", "blocks", "both"),
    ):
        cells = []
        for n in lengths:
            figures = apart(kind, what, 1, n, shape, device)
            cells.append(f"{figures['seconds'] * 1e6:.0f} us")
            rows.append({"shape": shape, "device": device, "kind": kind, "what": what, "q": 1, "n": n, **figures})
        print(f"{'q = 1: ' + name:21}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(measure(*json.loads(arguments.task))))
        return
    import torch

    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for shape in SHAPES:
            rows += bench(shape, device, sorted(arguments.lengths))
    if arguments.output:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        facts = {"torch": torch.__version__, "python": platform.python_version(), "machine": machine}
        arguments.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
