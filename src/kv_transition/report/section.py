"""The source data of a report, and its sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.provenance import SOURCE

if TYPE_CHECKING:
    import polars as pl


def template_folders() -> list[Path]:
    """Return the folders with templates: the report's own, then those of the studies."""
    return [SOURCE / "report" / "templates", *sorted((SOURCE / "studies").glob("*/templates"))]


@dataclass(frozen=True)
class Source:
    """The data that a report is built from.

    ``results`` is None in an experiment without tasks. ``extra`` holds the tables of the studies by name.
    """

    results: Any
    experiment: Mapping[str, Any]
    manifests: Sequence[Mapping[str, Any]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the report that only some experiments have.

    ``build`` returns the values that the templates use as ``section``, or None if there is nothing to show. The
    templates are ``{name}.md.jinja`` and ``{name}.html.jinja`` of the study. Without them the section is shown by
    ``section.{md,html}.jinja`` and has the keys ``sentences``, ``figures`` (names of FIGURES) and ``tables`` (each with
    ``heading``, ``columns`` and ``rows`` of text and `Number`). A Vega-Lite specification under ``chart`` is drawn at
    the template's ``data-chart="{name}"``.
    """

    name: str
    title: str
    build: Callable[[Source], dict[str, Any] | None]
