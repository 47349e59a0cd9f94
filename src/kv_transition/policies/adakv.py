"""Ada-KV: the heads of a layer share its budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, but one choice for all KV heads of a layer: its K Hkv entries are the best of all heads
    together, once each head has its window and at least ``floor`` K entries of its own. Heads then hold different
    numbers of entries, and what a head does not hold is really freed.

    Equal scores go to the lower position, and among equal positions to the lower head.

    Source: Feng et al., "Ada-KV: optimizing KV cache eviction by adaptive budget allocation for efficient LLM
    inference", arXiv 2407.11550.

    Cost: as snapkv, and a sort of all heads' scores; decoding attends head by head.

    Differences: as snapkv; and kvpress' AdaKVPress masks what it evicts rather than freeing it.
    """

    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "adaptive"
    """how layers and heads share the budget"""
