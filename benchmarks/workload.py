"""Inputs of the benchmarks: random models, documents of an exact number of tokens, and CPU times."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-kvpress" / "bin" / "python"

VOCABULARY = 2048
BOS = 0
QUESTION_TOKENS = 16


@dataclass(frozen=True)
class Size:
    """A model with random weights: Qwen2's class, heads of 64 channels, grouped four to one."""

    name: str
    layers: int
    hidden: int

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model and its tokenizer, one token a word, as a transformers folder."""
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        heads = self.hidden // 64
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=32768,
            bos_token_id=BOS,
            eos_token_id=None,
        )
        model = Qwen2ForCausalLM(config)
        for name, weight in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.data.mul_(8)  # peaked attention, so that it matters what is evicted
        model.generation_config.eos_token_id = None  # every answer has its full length
        model.save_pretrained(folder)
        words = {"<s>": BOS} | {f"w{i}": i for i in range(1, VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "tokenizer")
        return folder


SIZES = (Size("4x256", 4, 256), Size("8x512", 8, 512))


def write_documents(path: Path, length: int, n: int, seed: int = 0) -> Path:
    """A jsonl file of ``n`` contexts of ``length`` tokens each, the first ``<s>`` included, with a question."""
    import random

    draw = random.Random(f"{length}/{seed}")

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(count))

    records = [
        {"id": str(i), "context": words(length - 1), "question": words(QUESTION_TOKENS), "answers": ["w1"]}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_experiment(
    folder: Path, model: Path, data: Path, *, max_new_tokens: int, n: int, batch: int = 1, **kv: Any
) -> Path:
    """An experiment on the documents, one length bin, as kvpress asks: context, compression, question, answer.

    batch: answers of a cell that are decoded together.
    """
    import yaml

    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps({data.stem: "{context}\n{input}\n"}))
    config = {
        "experiment": "bench",
        "dataset": {"name": "jsonl", "tasks": [data.stem], "path": str(data), "prompts": str(prompts)},
        "binning": {"n_bins": 1, "n_per_bin": n},
        "model": {"name": str(model), "device": "cpu", "chat_template": "never", "max_length": 32000},
        "kv": {"modes": ["before_question"]} | kv,
        "decoding": {"max_tokens": max_new_tokens, "batch": batch},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@dataclass(frozen=True)
class Cost:
    """User and system seconds of a process and all its children, and seconds of the wall clock."""

    cpu_s: float
    wall_s: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> Cost:
    """Run a command with one thread, and all that it leaves behind, to the end.

    Raises RuntimeError with what it printed if it fails. The seconds of the wall clock are the command's own: a worker
    that waits for further jobs keeps nobody waiting.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "whole.py"), str(figures), *map(str, command)],
            cwd=cwd,
            env=os.environ | one_thread | {"HF_HUB_OFFLINE": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
        found = json.loads(figures.read_text(encoding="utf-8"))
    return Cost(found["cpu_s"], found["wall_s"])


def snakemake(folder: Path, experiment: Path, *options: str) -> Cost:
    """The whole pipeline of an experiment, one job at a time, with ``folder`` as working directory.

    The user's cache folder is empty at first, so that the cost includes what this project keeps there for later runs.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--configfile", experiment]
    return run([*command, "--cores", "1", "--quiet", "all", *options], folder, XDG_CACHE_HOME=str(folder / "cache"))


def write_figures(doc: str, measure: Callable[[bool], Any]) -> None:
    """The command line of a benchmark: ``measure`` gets whether sizes shall be small, and gives what is written."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    figures = measure(arguments.quick)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
