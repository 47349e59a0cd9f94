"""Prefills on disk: one safetensors file per prompt, a cache that may be deleted at any time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.errors import UserError
from kv_transition.provenance import atomic_path


@dataclass(frozen=True)
class Prefill:
    """A prompt read once with the full cache, as it stood after the context and at the prompt's end.

    Both states share keys and values: one reading serves both modes.
    """

    context: CacheState
    prompt: CacheState
    context_s: float
    """seconds that reading the context took"""
    question_s: float
    """seconds that reading the rest of the prompt took"""

    @property
    def prompt_s(self) -> float:
        return self.context_s + self.question_s


@dataclass(frozen=True)
class PrefillStore:
    """The prefills of one model under one version of the engine; ``root`` names both by a hash.

    ``mode`` is ``always``, ``never``, or ``auto``: while the store is below ``max_gb`` and a tenth of the disk is free.
    """

    root: Path
    mode: str = "auto"
    max_gb: float = 50.0

    def path(self, prompt_sha256: str) -> Path:
        return self.root / f"{prompt_sha256}.safetensors"

    def __contains__(self, prompt_sha256: str) -> bool:
        return self.path(prompt_sha256).is_file()

    def load(self, prompt_sha256: str, device: str = "cpu") -> Prefill | None:
        """The stored prefill, or None if there is none. Raises UserError if the file is damaged."""
        path = self.path(prompt_sha256)
        try:
            with safe_open(path, framework="pt", device=device) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
                return _unpack(tensors, facts)
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, ValueError, OSError):
            raise UserError(f"{path} is not a whole prefill; delete it and it will be computed again") from None

    def save(self, prompt_sha256: str, prefill: Prefill) -> bool:
        """Store unless the mode forbids it; says whether it was stored. The file appears whole or not at all."""
        if self.mode == "never":
            return False
        tensors, facts = _pack(prefill)
        if self.mode == "auto" and not self._has_room(sum(t.numel() * t.element_size() for t in tensors.values())):
            return False
        try:
            with atomic_path(self.path(prompt_sha256)) as temporary:
                save_file(tensors, temporary, metadata=facts)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.root}: writing a prefill failed ({error}); free disk or set prefill.store: never"
            ) from error
        return True

    def _has_room(self, size: int) -> bool:
        existing = self.root if self.root.exists() else next(p for p in self.root.absolute().parents if p.exists())
        disk = shutil.disk_usage(existing)
        used = sum(f.stat().st_size for f in self.root.parent.rglob("*.safetensors")) if self.root.exists() else 0
        return used + size <= self.max_gb * 1e9 and disk.free - size > disk.total / 10


def _pack(prefill: Prefill) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    for name in ("keys", "values"):
        tensors[name] = torch.stack([getattr(layer, name) for layer in prefill.prompt.layers])
    for moment, state in (("context", prefill.context), ("prompt", prefill.prompt)):
        for name in ("attn_sum", "recent_queries"):
            tensors[f"{moment}.{name}"] = torch.stack([getattr(layer, name) for layer in state.layers])
        if state.logits is not None:
            tensors[f"{moment}.logits"] = state.logits
    facts = {
        "context_length": str(prefill.context.length),
        "prompt_length": str(prefill.prompt.length),
        "scales": ",".join(repr(layer.scale) for layer in prefill.prompt.layers),
        "context_s": repr(prefill.context_s),
        "question_s": repr(prefill.question_s),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, facts


def _unpack(tensors: dict[str, Tensor], facts: dict[str, str]) -> Prefill:
    scales = [float(scale) for scale in facts["scales"].split(",")]
    kv_heads = tensors["keys"].shape[1]

    def state(moment: str) -> CacheState:
        n = int(facts[f"{moment}_length"])
        positions = torch.arange(n, device=tensors["keys"].device).expand(kv_heads, n)
        layers = tuple(
            LayerCache(
                keys=tensors["keys"][i, :, :n],
                values=tensors["values"][i, :, :n],
                positions=positions,
                attn_sum=tensors[f"{moment}.attn_sum"][i],
                recent_queries=tensors[f"{moment}.recent_queries"][i],
                scale=scale,
            )
            for i, scale in enumerate(scales)
        )
        return CacheState(layers=layers, length=n, logits=tensors.get(f"{moment}.logits"))

    return Prefill(
        context=state("context"),
        prompt=state("prompt"),
        context_s=float(facts["context_s"]),
        question_s=float(facts["question_s"]),
    )
