"""Build the report: a Markdown file that refers to the figures, and an HTML page that contains everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from altair.utils import schemapi

from kv_transition import parsing
from kv_transition.labels import percent
from kv_transition.outputs import experiment
from kv_transition.provenance import read_metadata
from kv_transition.report import page
from kv_transition.report.section import Section, Source
from kv_transition.stats.frames import read_table
from kv_transition.studies import registry
from kv_transition.studies.grid.report.answered import answered
from kv_transition.studies.grid.results import read_results

_REPORTS = registry.load("report")
SECTIONS: tuple[Section, ...] = tuple(section for report in _REPORTS for section in report.SECTIONS)
FIGURES: dict[str, tuple[str, str]] = {name: words for report in _REPORTS for name, words in report.FIGURES.items()}
"""title and caption of each figure, in the order in which the page shows them"""


def build_report(
    *,
    scores: str | None = None,
    bin_stats: str | None = None,
    comparisons: str | None = None,
    transition: str | None = None,
    manifests: Sequence[str],
    config: str,
    plots_dir: str,
    output_md: str,
    output_html: str,
    title: str | None = None,
    extra: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> None:
    """Write report.md (which refers to the figures) and report.html (which contains them).

    All arguments but ``title``, ``extra`` and ``missing`` are paths; the first four are None in an experiment without
    tasks. extra: paths of further tables by name; files that do not exist are omitted. missing: for a report on an
    unfinished experiment, the reason why a cell is not in ``scores``, by the path of the cell. Raises UserError if a
    table is empty or a file cannot be read.
    """
    source = Source(
        read_results(scores, bin_stats, comparisons, transition) if scores else None,
        experiment.read_config(config),
        [_read_json(path) for path in manifests],
        read_metadata(scores) if scores else {},
        {name: read_table(path) for name, path in (extra or {}).items() if Path(path).is_file()},
    )
    folder, base = Path(plots_dir), Path(output_md).resolve().parent
    figures = {
        name: {"name": name, "title": heading, "caption": caption, "path": _relative(folder / f"{name}.svg", base),
               "svg": page.read_svg(folder / f"{name}.svg", name, caption)}
        for name, (heading, caption) in FIGURES.items() if (folder / f"{name}.svg").is_file()
    }  # fmt: skip
    interactive = folder / "interactive.html"
    context = report_context(source, title, missing or {})
    context["figures"] = figures
    context["interactive"] = _relative(interactive, base) if interactive.is_file() else None
    page.write_markdown(output_md, "report.md.jinja", context)
    page.write_page(output_html, "report.html.jinja", context)


def _relative(path: Path, base: Path) -> str:
    resolved = path.resolve()
    return resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else resolved.as_posix()


@schemapi.debug_mode(False)  # Altair does not validate the parts of charts; the tests validate whole charts
def report_context(source: Source, title: str | None, missing: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that the templates show, except the figures."""
    results, settings = source.results, source.experiment
    statistics = {"confidence": 0.95, "resamples": 10_000} | (settings.get("statistics") or {})
    if results:
        statistics["confidence"] = results.confidence
    found = [(section, section.build(source)) for section in SECTIONS]
    extra = [{"name": s.name, "title": s.title, "content": content} for s, content in found if content is not None]
    context = {
        "title": title or settings.get("experiment", "kv-transition"),
        "experiment": settings.get("experiment", "experiment"),
        "model": experiment.model_name(settings),
        "embedded": experiment.embedded(settings),
        "answers": results.scores.height if results else 0,
        "confidence": percent(statistics["confidence"]),
        "resamples": statistics["resamples"],
        "missing": missing,
        "setup": experiment.setup(settings, results, source.manifests, source.metadata),
        "sections": extra,
        "warnings": [(m.get("task", "?"), w) for m in source.manifests for w in m.get("warnings", [])],
        "limits": experiment.limits(settings, results),
        "future": experiment.future(settings, results),
        "commit": experiment.commit(settings),
        "citation": experiment.citation(settings),
        "charts": {s["name"]: s["content"]["chart"] for s in extra if "chart" in s["content"]},
    }
    if results:
        shown = answered(source, results)
        context |= shown | {"charts": shown["charts"] | context["charts"]}
    return context


def _read_json(path: str) -> dict[str, Any]:
    return parsing.read_json(path, "manifest")
