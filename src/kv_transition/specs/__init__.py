"""What each job is told: exactly what its result depends on, and a hash of the code that makes it.

A spec reaches its job as JSON on the command line and its rule as a param, so that a change of anything in it, and of
nothing else, makes the job's files stale. This package holds what all studies share: `policies`,
`model` and the checks of the whole `experiment`. Which jobs a study has, and what
they are told, is in ``studies/{study}/specs.py``.
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
