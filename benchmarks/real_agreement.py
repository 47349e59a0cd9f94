"""Agreement with kvpress on a real language model: the same prompts, the same K, both in float32.

    python benchmarks/real_agreement.py RESULTS/EXPERIMENT/data/TASK/bin0.parquet [--n 5] [--budget 0.5]

kvpress and this project read each context, keep K of its entries, read the question and answer greedily. Counted are
answers that are equal to the last token. Where one differs, the first step at which it does is kept with what each side
chose, how many of the kept entries are the same on both sides, and how far apart the two tokens' logits were here.
Needs `make real` and `make bench-peers`. Writes benchmarks/results/real/agreement/agreement.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from kv_transition.budget import Budget
from kv_transition.cache.state import STATISTICS, CacheState
from kv_transition.data import gguf
from kv_transition.engines import dequantize
from kv_transition.engines.local import LocalEngine
from kv_transition.policies import catalog
from kv_transition.provenance import git_commit, package_versions

ROOT = Path(__file__).parents[1]
WINDOW_64 = {"window": 64, "kernel": 5, "pooling": "mean"}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("SnapKVPress", WINDOW_64),
    "knorm": ("KnormPress", {}),
    "streaming_llm": ("StreamingLLMPress", {}),
    "expected_attention": ("ExpectedAttentionPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "adakv": ("AdaKVPress(SnapKVPress)", WINDOW_64),
}
"""our policy, the press that means the same, and our hyper-parameters that make it so"""


def theirs(python: Path, folder: str, row: dict[str, Any], k: int, steps: int) -> dict[str, Tensor]:
    """Return the entries that kvpress keeps of a context and its answers, by policy."""
    n = len(row["context_ids"])
    cases = {
        name: {"model": folder, "press": press, "arguments": {}, "ratio": 1 - k / n, "max_pooling": False,
               "question": row["question_ids"], "steps": steps}
        for name, (press, _) in PAIRS.items()
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        cases_file, output = Path(place, "cases.json"), Path(place, "out.safetensors")
        cases_file.write_text(json.dumps({"tokens": row["context_ids"], "cases": cases}))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [str(python), str(ROOT / "benchmarks" / "peers" / "compress.py"), str(cases_file), str(output)]
        subprocess.run(command, env=environment, check=True)
        return load_file(output)


def held(state: CacheState, n: int) -> Tensor:
    """Return [L, Hkv, n] bool: the positions in the text that each head still holds."""
    layers = []
    for layer in state.layers:
        rows = [row for part in getattr(layer, "parts", (layer,)) for row in part.positions]
        mask = torch.zeros(len(rows), n, dtype=torch.bool)
        for head, row in enumerate(rows):
            mask[head, row] = True
        layers.append(mask)
    return torch.stack(layers)


def compared(
    engine: LocalEngine, full: CacheState, name: str, row: dict[str, Any], k: int, peer: dict[str, Tensor]
) -> dict:
    """Return the comparison of one policy's answer with that of its press."""
    policy = catalog.create(name, PAIRS[name][1])
    state = policy.compress(full, k)
    kept, other = held(state, full.length), peer[f"{name}.kept"]
    expected = peer[f"{name}.tokens"].tolist()
    found: dict[str, Any] = {"example": row["example_id"], "k": k, "entries": int(other.sum()),
                             "kept_by_both": int((kept & other).sum()), "equal": True}  # fmt: skip
    feed = row["question_ids"]
    for step, token in enumerate(expected):
        state = engine.extend(state, feed, frozenset())
        own = int(state.logits.argmax())
        if own != token:
            logits = state.logits.flatten()
            gap = float(logits[own] - logits[token])
            return found | {"equal": False, "step": step, "logits_apart": round(gap, 5)}
        feed = [own]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--budget", default="0.5")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-kvpress" / "bin" / "python")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = str(dequantize.model_folder(gguf.SMOLLM2, "float32"))
    engine = LocalEngine.from_pretrained(gguf.SMOLLM2, device="cpu")
    results: dict[str, list[dict]] = {name: [] for name in PAIRS}
    for row in pl.read_parquet(given.prompts).head(given.n).to_dicts():
        n = len(row["context_ids"])
        # kvpress keeps int(n (1 - ratio)): no ratio may round K away
        k = Budget.of_fraction(given.budget, "--budget").kept(n)
        k = int(n * (1 - (1 - k / n)))
        peer = theirs(given.python, folder, row, k, given.steps)
        full = engine.extend(None, row["context_ids"], STATISTICS)
        for name in PAIRS:
            results[name].append(compared(engine, full, name, row, k, peer))
            print(name, results[name][-1], flush=True)
    output = ROOT / "benchmarks" / "results" / "real" / "agreement" / "agreement.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"git_commit": git_commit(), "package_versions": package_versions(), "kvpress": "0.5.5",
             "budget": given.budget, "steps": given.steps, "prompts": given.prompts.parent.name}  # fmt: skip
    output.write_text(json.dumps(about | {"policies": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
