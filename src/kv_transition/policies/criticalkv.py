"""CriticalKV: attention weighted by the norm of the projected value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """SnapKV with the weighting ``projected_values``: half of the budget goes to the entries with the highest scores,
    the other half to those with the largest product of score and norm of the projected value.

    Source: Feng et al., "Identify critical KV cache in LLM inference from an output perturbation perspective", arXiv
    2502.03805.

    Cost: as snapkv, and the projection of each value by each query head of its group during the prefill: O(H N d D)
    time for D channels of the hidden state, and O(N) memory.

    Differences: as snapkv. Every score policy accepts the option ``weighting``; with allocation adaptive the heads'
    budgets follow from the scores alone, as in the authors' CriticalAdaKV.
    """

    weighting: Literal["none", "projected_values"] = "projected_values"
    """the factor that scores are multiplied by"""
