"""The cost of a job in addition to its own work with a warm worker, and the number of loads of a large model.

    python benchmarks/warm.py [--jobs 10] [--output FILE.json]
    python benchmarks/warm.py --large [--gigabytes 4] [--output FILE.json]

Without ``--large``: a cell job of the 4x256 model is repeatedly given to a worker that has loaded the model. Its CPU
time is that of the client and of the forked process. Its own work is that of the same cell in a process that has loaded
everything; medians, alternating.

With ``--large``: a model with random bf16 weights, and a grid of 20 cells by the whole workflow with one job at a time.
Its loads are the workers in the logs. Memory is the sum over all processes of the run (shared pages counted once,
/proc/*/smaps_rollup), measured twice per second. It needs that many gigabytes of disk space and twice as much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from cells import QUICK, Bench
from run import conditions
from workload import BOS, ROOT, VOCABULARY, snakemake, write_documents, write_experiment

MODULE = "kv_transition.studies.grid.run"
POLICIES = ("random", "knorm", "snapkv", "streaming_llm", "tova")


def warm_jobs(jobs: int) -> dict[str, Any]:
    """Return medians over the jobs: wall-clock and CPU seconds of a warm job, and of the same work alone."""
    with tempfile.TemporaryDirectory(prefix="kvt", dir="/tmp") as meeting, tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), QUICK.size, 2048, QUICK)
        engine = bench.engine()
        bench.cell(engine)  # reads the prompts and stores them
        environment = os.environ | bench.environment | {
            "PYTHONPATH": str(ROOT / "src"), "XDG_RUNTIME_DIR": meeting, "KVT_WORKER": "auto",
        }  # fmt: skip
        command = [sys.executable, "-m", "kv_transition.worker", MODULE, *bench.arguments]

        def job() -> dict[str, float]:
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            said = re.search(r"^worker \d+: ([\d.]+) s", done.stderr, flags=re.MULTILINE)
            if said is None:
                raise RuntimeError(f"no worker carried the job out:\n{done.stderr[-2000:]}")
            client_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return {"wall_s": wall_s, "client_cpu_s": client_s, "forked_cpu_s": float(said[1])}

        job()  # starts the worker
        turns = [job() | {"own_cpu_s": bench.cell(engine)} for _ in range(jobs)]
    found = {name: round(median(turn[name] for turn in turns), 3) for name in turns[0]}
    more = [turn["client_cpu_s"] + turn["forked_cpu_s"] - turn["own_cpu_s"] for turn in turns]
    return {"jobs": jobs, **found, "cpu_beyond_own_s": round(median(more), 3)}


def large_model(folder: Path, gigabytes: float) -> Path:
    """Write a model with random bf16 weights of that size, layer by layer, with the tokenizer of the other models."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from workload import SIZES

    hidden, inner = 2048, 8192
    of_a_layer = hidden * (hidden * 2 + 2 * hidden // 4) + 3 * hidden * inner
    layers = max(1, round(gigabytes * 1e9 / 2 / of_a_layer))
    SIZES[0].save(folder)  # its tokenizer is kept
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512, max_position_embeddings=32768,
        bos_token_id=BOS, eos_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


class Memory:
    """The most memory that the processes of a session held at once, bytes."""

    def __init__(self) -> None:
        self.peak, self._over = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._known = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            new = [path for path in Path("/proc").glob("[0-9]*") if int(path.name) not in self._known]
            self.peak = max(self.peak, sum(map(_proportional, new)))


def _proportional(process: Path) -> int:
    """Bytes that a process of this package holds, its share of what it shares; 0 of any other."""
    try:
        if b"kv_transition" not in (process / "cmdline").read_bytes():
            return 0
        found = re.search(r"^Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text(), flags=re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def large(gigabytes: float) -> dict[str, Any]:
    """A grid of 20 cells on a model of so many gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = large_model(folder / "model", gigabytes)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        data = write_documents(folder / "documents.jsonl", 128, 2)
        kv = {"policies": {"full": {}} | {kind: {} for kind in POLICIES}, "budgets": [0.75, 0.5, 0.25, 0.1]}
        experiment = write_experiment(folder, model, data, max_new_tokens=2, n=2, **kv)
        text = experiment.read_text().replace("device: cpu", "device: cpu\n  dtype: bfloat16")
        experiment.write_text(text)
        with Memory() as memory:
            cost = snakemake(folder, experiment, "--until", "cell")
        logs = [log.read_text(encoding="utf-8") for log in (folder / "results").rglob("*.log")]
        workers = {pid for log in logs for pid in re.findall(r"^worker (\d+):", log, flags=re.MULTILINE)}
        jobs = sum(bool(re.search(r"^worker \d+:", log, flags=re.MULTILINE)) for log in logs)
    return {
        "weights_gb": round(weights / 1e9, 2),
        "cells": len(POLICIES) * len(kv["budgets"]),
        "jobs_in_workers": jobs,
        "loads": len(workers),
        "peak_gb": round(memory.peak / 1e9, 2),
        "cpu_s": round(cost.cpu_s, 1),
        "wall_s": round(cost.wall_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = large(arguments.gigabytes) if arguments.large else warm_jobs(arguments.jobs)
    text = json.dumps({"conditions": conditions(), "figures": found}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
