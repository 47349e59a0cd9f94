"""PyramidKV: large budgets for the lower layers, small ones for the upper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Makes SnapKV's choice with a budget for each layer that falls linearly from the lowest layer to the highest: the
    window w, and in addition min = (K - w) / beta at the top and 2 (K - w) - min at the bottom, so that the mean is K.
    If the bottom layer would get more entries than there are, it keeps all, and the line is rotated about its middle,
    so that the layers above get the rest.

    Fractions are rounded by the method of the largest remainder, so that the budgets of the layers add up to K times
    their number. A layer that holds fewer entries than its budget keeps them all, and the rest of its budget is not
    used. The window of a layer takes at most half of the layer's budget.

    Source: Cai et al., "PyramidKV: dynamic KV cache compression based on pyramidal information funneling", arXiv
    2406.02069.

    Cost: as snapkv.

    Differences: as snapkv; in addition, kvpress gives layer l round(max - l step) entries, the window included, and
    uses plain SnapKV if the top layer would get fewer entries than the window.
    """

    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "pyramid"
    """how layers and heads share the budget"""
