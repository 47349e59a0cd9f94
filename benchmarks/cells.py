"""Costs of a cell beyond the unavoidable ones, growth of the costs, and the size of a stored prefill.

    python benchmarks/cells.py [--quick] [--output FILE.json]

Seconds are CPU time, with one thread. Measurements that are compared alternate; the figures are medians over the
rounds.

- ``statistics``: reading a context with the statistics that policies need, divided by reading it without any.
- ``cell``: a cell in a process that has loaded its model (reading the bin, prefills from the store, compression,
  answers, writing the rows), divided by its floor: reading the same prefill files and a plain greedy loop of
  transformers on the same kept entries. The policy is knorm, because its selection is one line of code; both give the
  same answers.
- ``start``: the process of a cell without examples, divided by a process that imports torch and loads the model.
- ``growth``: reading a prompt and answering a cell's questions by prompt length; planning and running the workflow by
  the number of cells. Exponents are least-squares slopes in logarithms.
- ``store``: bytes of a prefill, and the speed of reading it into tensors, compared with reading the file's bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from kv_transition.studies.grid import specs as grid_specs

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
from workload import (
    QUESTION_TOKENS,
    ROOT,
    SIZES,
    Size,
    run,
    snakemake,
    write_documents,
    write_experiment,
    write_figures,
)

POLICY = "knorm"
BUDGET = "r0.2"
STORE = "always"
MAX_GB = 50.0


@dataclass(frozen=True)
class Plan:
    size: Size = SIZES[1]
    length: int = 4096
    examples: int = 5
    max_new_tokens: int = 32
    repeats: int = 5
    growth_size: Size = SIZES[0]
    growth_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    planned_cells: tuple[int, ...] = (10, 40, 160, 640)
    run_cells: tuple[int, ...] = (2, 4, 8)


QUICK = Plan(
    size=SIZES[0],
    length=512,
    examples=2,
    max_new_tokens=8,
    repeats=2,
    growth_lengths=(256, 512, 1024),
    planned_cells=(5, 20),
    run_cells=(1, 2),
)


def cpu(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def in_turn(repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """Return the seconds of each work; the works alternate."""
    turns = [[work() for work in works] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*turns, strict=True)]


def summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median_s": round(float(np.median(seconds)), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
    }


def over(a: list[float], b: list[float]) -> float:
    """Return the median of the ratios of each round, so that a slow drift of the machine affects both."""
    return round(float(np.median(np.divide(a, b))), 3)


class Bench:
    """Prompts of one length that are prepared and read, and the cell job on them."""

    def __init__(self, folder: Path, size: Size, length: int, plan: Plan):
        from kv_transition import settings
        from kv_transition.paths import Paths

        self.folder = folder
        self.model = size.save(folder / "model")
        data = write_documents(folder / "documents.jsonl", length, plan.examples)
        experiment = write_experiment(
            folder,
            self.model,
            data,
            max_new_tokens=plan.max_new_tokens,
            n=plan.examples,
            policies={"full": {}, POLICY: {}},
            budgets=[0.2],
        )
        snakemake(folder, experiment, "--until", "prepare")
        self.spec = grid_specs.cell(settings.load(experiment), "before_question", POLICY, BUDGET)
        self.bin = Path(Paths(str(folder / "results"), "bench").bin(data.stem, 0))
        self.store = folder / "results" / "prefill"
        self.output = folder / "cell.parquet"

    @property
    def arguments(self) -> list[str]:
        return ["--spec", json.dumps(self.spec), "--bin", str(self.bin), "--output", str(self.output)]

    @property
    def environment(self) -> dict[str, str]:
        from kv_transition.run import job

        return {job.STORE_VARIABLE: f"{self.store}:{STORE}:{MAX_GB}"}

    def prefills(self) -> list[Path]:
        return sorted(self.store.rglob("*.safetensors"))

    def engine(self) -> Any:
        from kv_transition.run import job

        return job.load_engine(self.spec["model"], 1)

    def cell(self, engine: Any) -> float:
        """Return the CPU seconds of the cell job, without loading its model."""
        from kv_transition.run import job
        from kv_transition.studies.grid import run as cell

        with mock.patch.object(job, "load_engine", return_value=engine), mock.patch.dict(os.environ, self.environment):
            return cpu(lambda: cell.main(self.arguments))

    def examples(self) -> list[dict[str, Any]]:
        from kv_transition.run import job

        return job.read_bin(str(self.bin))

    def answers(self) -> list[list[int]]:
        import pyarrow.parquet as pq

        return [json.loads(raw)["token_ids"] for raw in pq.read_table(self.output)["raw"].to_pylist()]


class Floor:
    """The unavoidable work: reading the prefills' bytes and the decode steps, written with transformers alone."""

    def __init__(self, bench: Bench, max_new_tokens: int):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        from kv_transition.budget import Budget

        self.files = bench.prefills()
        self.max_new_tokens = max_new_tokens
        self.model = AutoModelForCausalLM.from_pretrained(bench.model, attn_implementation="sdpa").eval()
        self.prompts = []
        with torch.inference_mode():
            for example in bench.examples():
                cache = DynamicCache(config=self.model.config)
                self.model.model(torch.tensor([example["context_ids"]]), past_key_values=cache)
                n = len(example["context_ids"])
                kept = [self._kept(layer, Budget.parse(BUDGET).kept(n)) for layer in cache.layers]
                self.prompts.append((kept, n, example["question_ids"]))

    @staticmethod
    def _kept(layer: Any, k: int) -> tuple[Any, Any]:
        index = layer.keys.norm(dim=-1).topk(k, largest=False).indices.sort(-1).values
        wide = index.unsqueeze(-1).expand(-1, -1, -1, layer.keys.shape[-1])
        return layer.keys.gather(2, wide), layer.values.gather(2, wide)

    def answers(self) -> list[list[int]]:
        import torch
        from safetensors.torch import load_file
        from transformers import DynamicCache

        for file in self.files:
            for tensor in load_file(file).values():
                tensor.clone()  # a mapped file is read when it is touched
        answers = []
        with torch.inference_mode():
            for kept, n, question in self.prompts:
                cache = DynamicCache(config=self.model.config)
                for number, (keys, values) in enumerate(kept):
                    cache.update(keys, values, number)
                tokens, feed, at = [], question, n
                for _ in range(self.max_new_tokens):
                    positions = torch.arange(at, at + len(feed))[None]
                    output = self.model(
                        torch.tensor([feed]), past_key_values=cache, position_ids=positions, logits_to_keep=1
                    )
                    at += len(feed)
                    feed = [int(output.logits[0, -1].argmax())]
                    tokens += feed
                answers.append(tokens)
        return answers


def cell_over_floor(bench: Bench, plan: Plan) -> dict[str, Any]:
    engine = bench.engine()
    bench.cell(engine)  # reads the prompts and stores them
    floor = Floor(bench, plan.max_new_tokens)
    same = [a == b for a, b in zip(bench.answers(), floor.answers(), strict=True)]
    bench.cell(engine)
    cells, floors = in_turn(plan.repeats, lambda: bench.cell(engine), lambda: cpu(floor.answers))
    return {
        "model": plan.size.name,
        "length": plan.length,
        "examples": plan.examples,
        "policy": POLICY,
        "budget": BUDGET,
        "same_answers": f"{sum(same)}/{len(same)}",
        "cell": summary(cells),
        "floor": summary(floors),
        "ratio": over(cells, floors),
    }


def start_over_import(bench: Bench, plan: Plan) -> dict[str, Any]:
    import pyarrow.parquet as pq

    empty = bench.folder / "empty.parquet"
    pq.write_table(pq.read_table(bench.bin).slice(0, 0), empty)
    arguments = [str(empty) if part == str(bench.bin) else part for part in bench.arguments]
    load = (
        "import torch; torch.set_num_threads(1); from transformers import Qwen2ForCausalLM; "
        f"Qwen2ForCausalLM.from_pretrained({str(bench.model)!r})"
    )

    def process(*command: str) -> float:
        environment = bench.environment | {"PYTHONPATH": str(ROOT / "src")}
        return run([sys.executable, *command], bench.folder, **environment).cpu_s

    starts, imports = in_turn(
        plan.repeats,
        lambda: process("-m", "kv_transition.studies.grid.run", *arguments),
        lambda: process("-c", load),
    )
    return {"cell": summary(starts), "import": summary(imports), "ratio": over(starts, imports)}


def statistics_share(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Return the time of reading a context with statistics, divided by the time without."""
    from kv_transition.cache.state import STATISTICS

    engine = bench.engine()
    context = bench.examples()[0]["context_ids"]
    wanted = {
        "none": frozenset(),
        "recent_queries": frozenset({"recent_queries"}),
        "attn_sum": frozenset({"attn_sum"}),
        "attn_sum and query_entropy": frozenset({"attn_sum", "query_entropy"}),
        "query_mean and query_cov": frozenset({"query_mean", "query_cov"}),
        "all": STATISTICS,
    }

    def reading(statistics: frozenset[str]) -> Callable[[], float]:
        return lambda: cpu(lambda: engine.extend(None, context, statistics))

    seconds = dict(zip(wanted, in_turn(plan.repeats, *map(reading, wanted.values())), strict=True))
    return {
        "model": plan.size.name,
        "length": plan.length,
        "computed_by": engine.description["attention_statistics"],
        "plain": summary(seconds["none"]),
        "ratio": {name: over(seconds[name], seconds["none"]) for name in wanted if name != "none"},
    }


def slope(x: Sequence[int], y: Sequence[float]) -> float:
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 2)


def prefill_and_cell(folder: Path, length: int, plan: Plan) -> dict[str, float]:
    """Return the seconds of reading one prompt with all statistics, and of a cell per example."""
    bench = Bench(folder, plan.growth_size, length, plan)
    engine = bench.engine()
    bench.cell(engine)
    prompt = bench.examples()[0]

    def prefill() -> float:
        return cpu(lambda: engine.prefill(prompt["context_ids"], prompt["question_ids"]))

    reads, cells = in_turn(plan.repeats, prefill, lambda: bench.cell(engine) / plan.examples)
    return {"length": length, "prefill_s": float(np.median(reads)), "cell_s": float(np.median(cells))}


def growth_with_length(plan: Plan) -> dict[str, Any]:
    rows = []
    for length in plan.growth_lengths:
        with tempfile.TemporaryDirectory() as name:
            rows.append(prefill_and_cell(Path(name), length, plan))
    return {
        "model": plan.growth_size.name,
        "rows": [{key: round(value, 4) for key, value in row.items()} for row in rows],
        "prefill_exponent": slope(plan.growth_lengths, [row["prefill_s"] for row in rows]),
        "cell_exponent": slope(plan.growth_lengths, [row["cell_s"] for row in rows]),
    }


def growth_with_cells(plan: Plan) -> dict[str, Any]:
    """Return the seconds of planning many cells and of running few; the full cache's cell is added."""

    def cost(cells: int, *options: str) -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = plan.growth_size.save(folder / "model")
            data = write_documents(folder / "documents.jsonl", min(plan.growth_lengths), 2)
            experiment = write_experiment(
                folder,
                model,
                data,
                max_new_tokens=4,
                n=2,
                policies={"full": {}, POLICY: {}},
                budgets=[{"tokens": i + 1} for i in range(cells)],
            )
            return round(snakemake(folder, experiment, *options).cpu_s, 2)

    planning = [cost(cells, "--dry-run") for cells in plan.planned_cells]
    running = [cost(cells) for cells in plan.run_cells]
    return {
        "planned_cells": plan.planned_cells,
        "planning_s": planning,
        "planning_exponent": slope(plan.planned_cells, planning),
        "run_cells": plan.run_cells,
        "running_s": running,
        "running_exponent": slope(plan.run_cells, running),
        "s_per_cell": round(float(np.polyfit(plan.run_cells, running, 1)[0]), 2),
    }


def store(bench: Bench, plan: Plan) -> dict[str, Any]:
    import torch

    from kv_transition.cache.state import tensors_of
    from kv_transition.cache.store import PrefillStore

    files = bench.prefills()
    config = json.loads((bench.model / "config.json").read_text())
    heads = config["num_key_value_heads"]
    entries = plan.length + QUESTION_TOKENS
    kv_bytes = 2 * config["num_hidden_layers"] * heads * entries * 64 * torch.float32.itemsize
    size = float(np.mean([file.stat().st_size for file in files]))
    here = PrefillStore(files[0].parent, STORE, MAX_GB)

    def load() -> None:
        for file in files:
            for layer in here.load(file.stem).prompt.layers:
                for tensor in tensors_of(layer).values():
                    tensor.clone()  # a mapped file is read when it is touched

    def raw() -> None:
        for file in files:
            file.read_bytes()

    loads, raws = in_turn(plan.repeats, lambda: cpu(load), lambda: cpu(raw))
    total = size * len(files) / 1e6
    return {
        "bytes_per_example": round(size),
        "kv_bytes": kv_bytes,
        "over_kv_bytes": round(size / kv_bytes, 3),
        "load_mb_per_cpu_s": round(total / float(np.median(loads))),
        "file_mb_per_cpu_s": round(total / float(np.median(raws))),
    }


def measure(quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else Plan()
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), plan.size, plan.length, plan)
        parts = (
            ("statistics", statistics_share),
            ("cell", cell_over_floor),
            ("start", start_over_import),
            ("store", store),
        )
        for part, work in parts:
            figures[part] = work(bench, plan)
            print(part, json.dumps(figures[part]), flush=True)
    for part, work in (("growth_with_length", growth_with_length), ("growth_with_cells", growth_with_cells)):
        figures[part] = work(plan)
        print(part, json.dumps(figures[part]), flush=True)
    return figures


if __name__ == "__main__":
    write_figures(__doc__, measure)
