"""Memory and speed of a long answer under a held budget: 4,096 generated tokens on a small random model, one thread.

    python benchmarks/reasoning.py [--tokens 4096] [--budget 256] [--output FILE.json] [--render docs/benchmarks.md]

For each policy: entries, bytes of the cache's storage (with the room behind it) and the process's resident memory over
the answer, and tokens a CPU second in spans of 256 tokens. Before each fourth step an unchanged cache of ``budget``
entries reads the token, so that a neighbour on the machine slows both alike: ``relative`` is the time of a step over
that of these reference steps, by the medians, and ``relative_total`` by the means, compressions included.
Under a held budget all are to be flat
from the 500th token; the full cache stands beside, whose memory grows and whose speed falls.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
from document import put, table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

CASES = {
    "full": ("full", None),
    "r_kv": ("r_kv", None),
    "h2o": ("h2o", None),
    "streaming_llm": ("streaming_llm", None),
    **{f"{kind}, every 128": (kind, 128) for kind in ("snapkv", "lagkv", "chunkkv", "cake", "criticalkv", "kvzip")},
}
PROMPT, SETTLED, SPAN = 512, 500, 256


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def storage_bytes(state: Any) -> int:
    """Return the allocated bytes of keys and values, including the reserved space."""
    tensors = (t for layer in state.layers for part in layer.parts for t in (part.keys, part.values))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(kind: str, every: int | None, tokens: int, budget: int) -> dict[str, Any]:
    import torch
    from workload import SIZES, VOCABULARY

    from kv_transition.budget import Budget
    from kv_transition.engines.local import LocalEngine
    from kv_transition.policies.catalog import create, hyper_parameters
    from kv_transition.run.decode import Setting, Stacked
    from kv_transition.run.paced import with_pace

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        min(SIZES, key=lambda size: (size.layers, size.hidden)).save(Path(folder))
        engine = LocalEngine.from_pretrained(folder)
    policy = create(kind, hyper_parameters(kind))
    kept = "r1" if kind == "full" else f"t{budget}"
    setting = with_pace(Setting(policy, Budget.parse(kept), "after_prompt"), {"compress_every": every})
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, VOCABULARY, (PROMPT,), generator=generator).tolist()
    state = engine.extend(None, prompt, setting.policy.statistics)
    k = setting.entries(PROMPT)
    batch = Stacked(engine, [setting.compress(state, k)], setting, k, setting.room(tokens))
    reference = engine.extend(None, prompt[:budget], frozenset(), room=1)
    rows, most, own, bare = [], 0.0, [], []
    for step in range(1, tokens + 1):
        # tokens are drawn: a greedy answer of a random model is soon one token again and again
        token = int(torch.randint(1, VOCABULARY, (), generator=generator))
        if step % 4 == 0:
            begun = time.process_time()
            engine.extend(reference, [token], frozenset())
            bare.append(time.process_time() - begun)
        begun = time.process_time()
        batch.read({0: token})
        own.append(time.process_time() - begun)
        most = max(most, batch.entries(0))
        if step % SPAN == 0:
            gc.collect()
            rows.append(
                {
                    "step": step,
                    # samples fall on one phase of the evictions; the most of the span does not
                    "entries": batch.entries(0),
                    "most_entries": most,
                    "storage_mb": round(storage_bytes(batch.state(0)) / 2**20, 3),
                    "resident_mb": round(resident_mb(), 1),
                    "tokens_per_s": round(SPAN / sum(own), 1),
                    "relative": round(float(np.median(own) / np.median(bare)), 4),
                    "relative_total": round(float(np.mean(own) / np.mean(bare)), 4),
                }
            )
            most, own, bare = 0.0, [], []
    settled = [row for row in rows if row["step"] - SPAN >= SETTLED - SPAN // 2]
    ratio = {
        name: round(max(r[name] for r in settled) / min(r[name] for r in settled) - 1, 4)
        for name in ("storage_mb", "resident_mb", "tokens_per_s", "relative", "relative_total")
    }
    half = len(settled) // 2
    late = {
        name: round(
            float(np.median([r[name] for r in settled[-half:]]) / np.median([r[name] for r in settled[:half]])), 3
        )
        for name in ("tokens_per_s", "relative", "relative_total")
    }
    return {"policy": kind, "every": every, "spread": ratio, "late_over_early": late, "rows": rows}


def rendered(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["cases"].items():
        settled = [own for own in row["rows"] if own["step"] - SPAN >= SETTLED - SPAN // 2]
        speed = "relative" if "relative" in settled[0] else "tokens_per_s"
        late = row["late_over_early"]
        rows.append(
            [
                name,
                f"{max(own['most_entries'] for own in settled):.0f}",
                f"{settled[0]['resident_mb']:.0f} to {settled[-1]['resident_mb']:.0f}",
                f"{float(np.median([own['tokens_per_s'] for own in settled])):.0f}",
                f"{late[speed] if isinstance(late, dict) else late:.3f}",
                f"{100 * row['spread'][speed]:.0f} %",
            ]
        )
    head = ["policy", "most entries", "process, MB", "tokens a CPU s", "later half over earlier"]
    head += ["greatest over least span"]
    noise = "" if speed == "relative" else " Without reference steps: spreads include the machine's noise."
    return f"{table(head, rows)}\n\nMeasured on {found['date']}, commit {found['commit']}.{noise}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--render", type=Path)
    parser.add_argument("--figures", type=Path, help="render these, and measure nothing")
    arguments = parser.parse_args()
    from kv_transition.provenance import git_commit

    if arguments.figures:
        found = json.loads(arguments.figures.read_text(encoding="utf-8"))
    else:
        cases = {name: measure(*CASES[name], arguments.tokens, arguments.budget) for name in arguments.cases}
        found = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "cases": cases}
    print(
        f"spread (max / min - 1) from about the {SETTLED}th token, and median speed of the later half over the earlier"
    )
    for name, row in found["cases"].items():
        print(f"{name:20} {row['spread']} late/early {row['late_over_early']}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.render:
        put(arguments.render, "reasoning", rendered(found))


if __name__ == "__main__":
    main()
