"""The studies of this project, in the order of the report. A new study is added to the list in this module."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kv_transition.studies.study import Study

STUDIES = (
    "grid",
    "recall",
    "perplexity",
    "chat",
    "harness",
)


def modules(name: str) -> list[str]:
    """Return the dotted name of the module ``name`` of each study; every study has one."""
    return [f"kv_transition.studies.{study}.{name}" for study in STUDIES]


def load(name: str) -> list[ModuleType]:
    """Import the module ``name`` of each study and return the modules. Imports stay lazy, so this is called only on
    use.
    """
    return [import_module(module) for module in modules(name)]


def studies() -> list[Study]:
    """Return the description of each study: its ``study.STUDY``."""
    return [module.STUDY for module in load("study")]
