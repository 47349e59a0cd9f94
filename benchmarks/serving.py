"""One experiment through cell jobs, through `kv_transition serve`, and through `transformers serve`.

    python benchmarks/serving.py [--quick] [--output FILE.json]

*Grids* are run to their last cell by the workflow, one job at a time: once with cell jobs, which share a warm worker,
and once with cells that ask a server; cost is that of all processes, the start of worker or server included. *The full
cache* is what all three can do: each document is read and answered by the engine's cells, by our server and by
transformers' own. Every process has one thread, float32, greedy decoding.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import ROOT, SIZES, VOCABULARY, Cost, Size, snakemake, write_documents, write_experiment, write_figures

READER = ROOT / "resources" / "tiny-reader"
NAME = "served"

Answers = dict[tuple[str, ...], str]
"""an answer by what was asked"""


@dataclass(frozen=True)
class Plan:
    """The sizes of the benchmark."""

    reader_lengths: tuple[int, ...] = (256, 1024)
    reader_examples: int = 10
    size: Size = SIZES[0]
    length: int = 2048
    examples: int = 5
    budgets: tuple[float, ...] = (0.5, 0.2, 0.1)
    policies: tuple[str, ...] = ("random", "streaming_llm", "h2o", "snapkv", "tova")
    max_new_tokens: int = 32


QUICK = Plan((256,), 2, length=512, examples=2, budgets=(0.5,), policies=("h2o", "snapkv"), max_new_tokens=8)


@contextmanager
def cost_of(found: list[Cost]) -> Iterator[None]:
    """Append the cost of all processes that ended within the block."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    yield
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found.append(Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended - started))


@contextmanager
def server(command: Sequence[str | Path], port: int, folder: Path) -> Iterator[str]:
    """Run a server within the block. Raises RuntimeError with its output if it does not start."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / f"server-{port}.log"
    with log.open("w") as file:
        environment = os.environ | one_thread | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=file, stderr=file)
    try:
        _wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    import httpx

    for _ in range(1200):
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-4000:])
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server at port {port} does not answer\n{log.read_text()[-4000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ours(model: Path, port: int, *more: str) -> list[str | Path]:
    options = ["--name", NAME, "--device", "cpu", "--threads", "1", "--max-length", "40000", "--port", str(port)]
    return [sys.executable, "-m", "kv_transition", "serve", "--model", model, *options, *more]


def ours_without_statistics(model: Path, port: int) -> list[str | Path]:
    """The full cache is asked for alone, so that nothing need be kept up for policies."""
    return ours(model, port, "--statistics", "none")


def transformers(model: Path, port: int) -> list[str | Path]:
    program = Path(sys.executable).parent / "transformers"
    return [program, "serve", model, "--device", "cpu", "--dtype", "float32", "--port", str(port)]


def reader_experiment(folder: Path, plan: Plan) -> Path:
    """Return the demo's grid on the embedded reader, with fewer documents."""
    import yaml

    config = {
        "experiment": "bench",
        "dataset": {
            "name": "synthetic",
            "tasks": ["reader_qa"],
            "lengths": list(plan.reader_lengths),
            "n_per_length": plan.reader_examples,
        },
        "binning": {"n_bins": len(plan.reader_lengths), "n_per_bin": plan.reader_examples},
        "model": {"name": str(READER), "device": "cpu", "max_length": 4352},
        "kv": {"policies": {name: {} for name in ("full", *plan.policies)}, "budgets": [0.5, 0.2]},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def through_server(experiment: Path, folder: Path, url: str) -> Path:
    """Return the same experiment with cells that use a server."""
    import yaml

    engine = {"kind": "openai", "base_url": url, "serves": "kv_transition", "model": NAME, "api_key_env": None}
    config = yaml.safe_load(experiment.read_text()) | {"engine": engine}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def answers_of(folder: Path) -> Answers:
    """Return token ids by task, mode, policy, budget and example."""
    import pyarrow.parquet as pq

    found = {}
    for file in sorted(folder.glob("results/bench/cells/**/bin*.parquet")):
        for row in pq.read_table(file).to_pylist():
            key = tuple(row[name] for name in ("task", "mode", "policy", "budget", "example_id"))
            found[key] = row["error"] or json.dumps(json.loads(row["raw"])["token_ids"])
    return found


def grid(name: str, folder: Path, write: Callable[[Path], tuple[Path, Path]]) -> dict[str, Any]:
    """One experiment both ways. write: makes it in a folder, gives its file and its model."""
    alone, served = folder / "cells", folder / "served"
    alone.mkdir(parents=True)
    served.mkdir()
    experiment, model = write(alone)
    snakemake(alone, experiment, "--dry-run")  # neither pays for files that were never read
    costs: list[Cost] = []
    with cost_of(costs):
        snakemake(alone, experiment, "--until", "cell")
    port = free_port()
    with cost_of(costs), server(ours(model, port), port, folder) as url:
        snakemake(served, through_server(experiment, served, url), "--until", "cell")
    mine, theirs = answers_of(alone), answers_of(served)
    cells, asked = costs
    return {
        "grid": name,
        "cells": len(list(alone.glob("results/bench/cells/**/bin*.parquet"))),
        "answers": len(mine),
        "same_answers": sum(mine[key] == theirs.get(key) for key in mine),
        "cells_cpu_s": round(cells.cpu_s, 2),
        "serve_cpu_s": round(asked.cpu_s, 2),
        "cpu_ratio": round(cells.cpu_s / asked.cpu_s, 2),
        "cells_wall_s": round(cells.wall_s, 2),
        "serve_wall_s": round(asked.wall_s, 2),
        "wall_ratio": round(cells.wall_s / asked.wall_s, 2),
    }


def write_model(folder: Path, size: Size) -> tuple[Path, list[str]]:
    """A model whose tokenizer transformers' own loading leaves as it is, and the words that are one token each."""
    from transformers import Qwen2Tokenizer

    model = size.save(folder)
    shutil.rmtree(model / "tokenizer")
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    triples = [pair + c for pair in pairs for c in "aeo"][: VOCABULARY - len(string.printable) - len(pairs)]
    merges = [*((pair[0], pair[1]) for pair in pairs), *((word[:2], word[2]) for word in triples)]
    alphabet = [chr(i) for i in range(ord("!"), ord("~") + 1)] + ["\u0120", "\u010a"]  # blank and line feed, as bytes
    vocabulary = {token: i for i, token in enumerate([*alphabet, *pairs, *triples][: VOCABULARY - 1])}
    known = [merge for merge in merges if "".join(merge) in vocabulary]
    Qwen2Tokenizer(vocab=vocabulary, merges=known, unk_token=None).save_pretrained(model)
    return model, [word for word in triples if word in vocabulary]


def write_texts(path: Path, words: Sequence[str], length: int, n: int) -> Path:
    """As `write_documents`, of words that are two tokens with the blank before them."""
    draw = random.Random(f"texts/{length}")
    records = [
        {
            "id": str(i),
            "context": " ".join(draw.choices(words, k=length // 2)),
            "question": " ".join(draw.choices(words, k=8)),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(record | {"answers": ["a"]}) + "\n" for record in records))
    return path


def full_cache(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Each document with its question and the full cache, by all three; the first of them is the measure."""
    model, words = write_model(folder / "model", plan.size)
    data = write_texts(folder / "texts.jsonl", words, plan.length, plan.examples)
    experiment = write_experiment(
        folder, model, data, max_new_tokens=plan.max_new_tokens, n=plan.examples, policies={"full": {}}, budgets=[1.0]
    )
    costs: list[Cost] = []
    with cost_of(costs):
        snakemake(folder, experiment, "--until", "cell")
    prompts, texts = _prompts_and_texts(folder)
    found = [("cells", texts, [])]
    for name, command in (
        ("kv_transition serve", ours_without_statistics),
        ("transformers serve", transformers),
    ):
        port = free_port()
        with cost_of(costs), server(command(model, port), port, folder) as url:
            served = str(model) if command is transformers else NAME
            ask(url, served, [" ".join(words[:64])], 2)  # what is done once, at the first request
            said, seconds = ask(url, served, prompts, plan.max_new_tokens)
        found.append((name, said, seconds))
    return [
        {
            "engine": name,
            "answers": len(texts),
            "same_answers": sum(a == b for a, b in zip(said, texts, strict=True)),
            "cpu_s": round(cost.cpu_s, 2),
            "wall_s": round(cost.wall_s, 2),
            "s_per_request": round(sum(seconds) / len(seconds), 3) if seconds else None,
        }
        for (name, said, seconds), cost in zip(found, costs, strict=True)
    ]


def _prompts_and_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Return the prompts and the answers of the cells of the full cache."""
    import pyarrow.parquet as pq

    (bin_file,) = folder.glob("results/bench/data/*/bin0.parquet")
    (cell_file,) = folder.glob("results/bench/cells/*/*/full/*/bin0.parquet")
    said = {row["example_id"]: row["text"] for row in pq.read_table(cell_file).to_pylist()}
    examples = pq.read_table(bin_file).to_pylist()
    prompts = [example["context_text"] + example["question_text"] for example in examples]
    return prompts, [said[example["example_id"]] for example in examples]


def ask(url: str, model: str, prompts: Sequence[str], max_tokens: int) -> tuple[list[str], list[float]]:
    """Return the answers, one after the other, and their seconds; the official client is used."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    said, seconds = [], []
    for prompt in prompts:
        started = time.perf_counter()
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        seconds.append(time.perf_counter() - started)
        said.append(answer.choices[0].text)
    return said, seconds


def measure(quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = plan.size.save(folder / "model")
        data = write_documents(folder / "documents.jsonl", plan.length, plan.examples)

        def on_reader(where: Path) -> tuple[Path, Path]:
            return reader_experiment(where, plan), READER

        def on_random(where: Path) -> tuple[Path, Path]:
            policies = {name: {} for name in ("full", *plan.policies)}
            own = {"policies": policies, "budgets": list(plan.budgets)}
            return (
                write_experiment(where, model, data, max_new_tokens=plan.max_new_tokens, n=plan.examples, **own),
                model,
            )

        (folder / "full").mkdir()
        full = full_cache(folder / "full", plan)
        print(json.dumps(full), flush=True)
        grids = []
        for title, write in (("tiny reader", on_reader), (f"{plan.size.name}, {plan.length} tokens", on_random)):
            grids.append(grid(title, folder / title.split(",")[0].replace(" ", "-"), write))
            print(json.dumps(grids[-1]), flush=True)
    return {
        "grids": grids,
        "full": full,
        "full_is": {"model": plan.size.name, "length": plan.length, "max_new_tokens": plan.max_new_tokens},
    }


if __name__ == "__main__":
    write_figures(__doc__, measure)
