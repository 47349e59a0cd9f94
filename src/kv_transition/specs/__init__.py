"""What each job is told: exactly what its result depends on, and a hash of the code that makes it.

A spec reaches its job as JSON on the command line and its rule as a param, so that a change of anything in it, and of
nothing else, makes the job's files stale. `grid` says which jobs there are, `jobs` what each is told, `checks` what is
refused before any of them runs.
"""

from kv_transition.specs.checks import check
from kv_transition.specs.grid import (
    FULL,
    FULL_BUDGET,
    RECALL,
    aliases,
    calibrated,
    cells,
    chat_cells,
    endpoint,
    perplexity_cells,
    resolve,
    statistics,
    treated,
    why_not_observed,
)
from kv_transition.specs.jobs import (
    calibrate,
    cell,
    chat,
    conversations,
    download,
    judge,
    observe,
    perplexity,
    prefill,
    prepare,
    resolved,
    windows,
)

__all__ = [
    "FULL",
    "FULL_BUDGET",
    "RECALL",
    "aliases",
    "calibrate",
    "calibrated",
    "cell",
    "cells",
    "chat",
    "chat_cells",
    "check",
    "conversations",
    "download",
    "endpoint",
    "judge",
    "observe",
    "perplexity",
    "perplexity_cells",
    "prefill",
    "prepare",
    "resolve",
    "resolved",
    "statistics",
    "treated",
    "why_not_observed",
    "windows",
]
