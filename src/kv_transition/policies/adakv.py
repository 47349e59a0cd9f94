"""Ada-KV: the heads of a layer share its budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Uses SnapKV's scores, but makes one choice for all KV heads of a layer: it keeps the K Hkv best entries of all
    heads together, after each head has received its window and at least ``floor`` K entries of its own. Heads then hold
    different numbers of entries, and the memory of evicted entries is freed.

    Equal scores go to the lower position, and at equal positions to the lower head.

    Source: Feng et al., "Ada-KV: optimizing KV cache eviction by adaptive budget allocation for efficient LLM
    inference", arXiv 2407.11550.

    Cost: as snapkv, and a sort of the scores of all heads; decoding computes attention head by head.

    Differences: as snapkv; in addition, kvpress' AdaKVPress masks the entries that it evicts and does not free them.
    """

    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "adaptive"
    """how layers and heads share the budget"""
