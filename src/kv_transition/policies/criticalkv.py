"""CriticalKV: attention weighted by what a value becomes when it is projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """SnapKV with the weighting of projected values: half of the budget goes to the best scores, the other half to the
    best products of score and norm.

    Source: Feng et al., "Identify critical KV cache in LLM inference from an output perturbation perspective",
    arXiv 2502.03805.

    Cost: as snapkv, and the projection of each value by each head of its group while reading, O(H N d D) time for D
    channels of the hidden state, and O(N) memory.

    Differences: as snapkv. Any score policy takes the option ``weighting``; with allocation adaptive the heads' budgets
    follow from the scores alone, as in the authors' CriticalAdaKV.
    """

    weighting: Literal["none", "projected_values"] = "projected_values"
    """what scores are multiplied by"""
