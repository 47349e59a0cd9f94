"""H2O with heavy hitters only: the recall study's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kv_transition.policies.h2o import H2O


@dataclass(frozen=True)
class H2OHeavy(H2O):
    """H2O whose whole budget goes to the entries with the highest accumulated attention."""

    recent_share: Annotated[float, (0, 1)] = 0.0
