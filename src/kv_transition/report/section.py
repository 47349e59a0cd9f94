"""What a report is made from, and a part of it that only some experiments have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.provenance import SOURCE

if TYPE_CHECKING:
    import polars as pl


def template_folders() -> list[Path]:
    """Return the folders in which templates lie: that of the whole page, and one of each study that has its own."""
    return [SOURCE / "report" / "templates", *sorted((SOURCE / "studies").glob("*/templates"))]


@dataclass(frozen=True)
class Source:
    """What a report is made from; ``extra`` holds further tables by name, where they were made.

    ``results`` is None in an experiment that answers no task.
    """

    results: Any
    experiment: Mapping[str, Any]
    manifests: Sequence[Mapping[str, Any]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the report that only some experiments have.

    ``build`` gives what the templates ``{name}.md.jinja`` and ``{name}.html.jinja`` show as ``section``, or None where
    there is nothing to show; a Vega-Lite specification in it under ``chart`` is drawn where the template says
    ``data-chart="{name}"``.
    """

    name: str
    title: str
    build: Callable[[Source], dict[str, Any] | None]
