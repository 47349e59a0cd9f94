"""Common parts of benchmarks/gpu.py: sizes, a model with random weights, figures written as they are measured."""

from __future__ import annotations

import json
import statistics as stats
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# where the package itself is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError

NO_TIME = "no time left"


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
    kernels: tuple[int, ...] = (4096, 16384)
    """tokens of a layer whose statistics are computed by themselves"""
    served: int = 4096
    """tokens of a prompt that is served"""
    answer: int = 64
    """tokens of its answer"""
    alone: int = 2
    """answers that are measured one at a time"""
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
    kernels=(128,),
    served=64,
    answer=4,
    backend="eager",
    dtype=torch.float32,
)


@dataclass
class Bench:
    engine: LocalEngine
    sizes: Sizes
    ends: float = 0.0
    done: list[dict[str, Any]] = field(default_factory=list)
    """figures of an earlier run, which are taken over and not measured again"""
    kept: Callable[[list[dict[str, Any]]], None] = lambda figures: None
    """told all figures of the part after each of them"""
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
        """Return the median seconds of a call after one warm-up, and the peak memory of all calls."""
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
        """Return a figure, or the reason why there is none. measure is called with this and the inputs."""
        known = next((figure for figure in self.done if what.items() <= figure.items()), None)
        if known is not None:
            found = known
        elif time.monotonic() > self.ends:
            found = {"skipped": NO_TIME}
        else:
            try:
                found = measure(self, *inputs)
            except (torch.OutOfMemoryError, MemoryError):
                found = {"skipped": "out of memory"}
            except (ImportError, NotImplementedError, UserError) as error:
                found = {"skipped": str(error).splitlines()[0]}
            self.clean()
        self.figures.append(what | found)
        print(json.dumps(self.figures[-1]), file=sys.stderr, flush=True)
        self.kept(self.figures)
        return self.figures[-1]

    def note(self, figure: dict[str, Any]) -> None:
        """Add a figure that follows from measured ones."""
        self.figures.append(figure)
        self.kept(self.figures)


def measured_before(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that need not be measured again: all but those that there was no time for."""
    return [figure for figure in figures if figure.get("skipped") != NO_TIME]


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
