"""How much of its KV cache can a long-context language model lose before its answers become unreliable?

This module offers the names for programs and notebooks. Each is imported at its first use, so that importing the
package does not import torch; docs/python.md shows examples.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kv_transition.api.context import Compressed, Context
    from kv_transition.api.evicting_cache import EvictingCache
    from kv_transition.api.grid import grid
    from kv_transition.api.model import Model, load
    from kv_transition.api.plots import heat_map, plot
    from kv_transition.api.reply import Reply, Scored
    from kv_transition.budget import Budget
    from kv_transition.errors import UserError
    from kv_transition.policies.base import Policy

__version__ = "0.1.0"

_AT = {
    "Budget": "kv_transition.budget",
    "Compressed": "kv_transition.api.context",
    "Context": "kv_transition.api.context",
    "EvictingCache": "kv_transition.api.evicting_cache",
    "Model": "kv_transition.api.model",
    "Policy": "kv_transition.policies.base",
    "Reply": "kv_transition.api.reply",
    "Scored": "kv_transition.api.reply",
    "UserError": "kv_transition.errors",
    "grid": "kv_transition.api.grid",
    "heat_map": "kv_transition.api.plots",
    "load": "kv_transition.api.model",
    "plot": "kv_transition.api.plots",
}
"""the module of each public name"""

__all__ = [
    "Budget",
    "Compressed",
    "Context",
    "EvictingCache",
    "Model",
    "Policy",
    "Reply",
    "Scored",
    "UserError",
    "grid",
    "heat_map",
    "load",
    "plot",
]


def __getattr__(name: str) -> Any:
    if name not in _AT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_AT[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
