"""Specs: the values that a job's result depends on, with a hash of the code that computes it.

A job receives its spec as JSON on the command line, and its rule has it as a param, so that exactly a change of the
spec makes the job's files stale. This package contains what all studies share: `policies`, `model` and the checks of
the whole `experiment`. The specs of a study are in ``studies/{study}/specs.py``.
"""

from kv_transition.specs.experiment import check, resolved, statistics
from kv_transition.specs.model import prefill
from kv_transition.specs.policies import FULL, FULL_BUDGET, RECALL, endpoint, resolve

__all__ = [
    "FULL",
    "FULL_BUDGET",
    "RECALL",
    "check",
    "endpoint",
    "prefill",
    "resolve",
    "resolved",
    "statistics",
]
