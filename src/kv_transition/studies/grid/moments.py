"""Inputs of an entropy_recall cell from other files: its calibrated tau, and the recalls of its reference cell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from kv_transition import parsing
from kv_transition.errors import UserError
from kv_transition.policies.base import Policy

Paces = Mapping[tuple[str, int], tuple[int, int]]
"""(number of recalls, number of steps) of each answer, by example and repeat"""


def calibrated(policy: Policy, calibration: str | None) -> Policy:
    """Return the policy with tau set to its ``tau_quantile`` of the held-out entropies in a calibration file."""
    wanted = getattr(policy, "tau_quantile", None)
    if wanted is None or calibration is None:
        return policy
    entropies = parsing.read_json(calibration)["entropies"]
    return replace(policy, tau=quantile(entropies, wanted, calibration))


def quantile(values: list[float], share: float, where: str = "the calibration") -> float:
    """Return the quantile of sorted ``values``, linearly interpolated. Raises UserError if there are none."""
    if not values:
        raise UserError(
            f"{where} contains no decode step; give tau itself, or examples whose answers have several tokens"
        )
    place = share * (len(values) - 1)
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def paces(treated: str | None) -> Paces:
    """Return the recalls and steps of the answers in a cell's file; empty without a file. A failed answer has 0."""
    if treated is None:
        return {}

    found = {}
    for row in parsing.read_parquet(treated, columns=["example_id", "repeat", "raw"]).to_pylist():
        facts = json.loads(row["raw"] or "{}")
        found[row["example_id"], row["repeat"]] = (facts.get("triggers", 0), facts.get("steps", 0))
    return found
