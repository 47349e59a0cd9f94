"""PyramidKV: large budgets for the lower layers, small ones for the upper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice with a budget for each layer that falls linearly from the lowest to the highest: the window w and
    from 2 (K - w) - min at the bottom to min = (K - w) / beta at the top, K on average. Where the bottom would get more
    entries than there are, it keeps all and the line is turned about its middle, so that the rest goes to the layers
    above.

    Fractions are rounded by largest remainder, so that the layers' budgets add up to K times their number exactly. A
    layer that holds fewer entries than its budget keeps them all, and what it leaves is not handed on. Each layer's
    window is at most half of its own budget.

    Source: Cai et al., "PyramidKV: dynamic KV cache compression based on pyramidal information funneling",
    arXiv 2406.02069.

    Cost: as snapkv.

    Differences: as snapkv; and kvpress gives layer l round(max - l step) entries, the window included, and falls back
    to plain SnapKV where the top layer would get fewer entries than the window.
    """

    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "pyramid"
    """how layers and heads share the budget"""
