"""The report: one Markdown file beside its figures, one HTML page that holds everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from kv_transition.analysis import plots, tradeoff
from kv_transition.analysis.results import Results, read_results, read_table
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.report import (
    allocation,
    card,
    entropy_recall,
    experiment,
    findings,
    memory,
    page,
    perplexity,
    sections,
    verdict,
)
from kv_transition.report.examples import examples

FIGURES = {
    "acc_vs_len": ("Score", "Mean score against document length, one panel per mode and budget."),
    "failrate_vs_len": ("Failures", "Share of answers that failed: empty, degenerate, truncated and so on."),
    "failures": ("Kinds of failure", "What the failed answers look like, over all lengths."),
    "differences": ("Differences", "Score minus the full cache's on the same examples, over all lengths."),
    "front": ("Score against bytes", "Score kept against bytes kept, both of the full cache's, over all lengths."),
    "latency_vs_len": ("Time", "Median time to the whole answer: reading, compressing, decoding; at batch size 1."),
    "std_vs_len": ("Spread", "Standard deviation of the score between examples. For scores of 0 and 1 it is a function "
                   "of the mean and shows nothing of its own."),
} | perplexity.FIGURES | memory.FIGURES | entropy_recall.FIGURES  # fmt: skip
CLOCKS = {
    "process": "Times are CPU seconds of the one thread that a job runs on, whatever the other cores do meanwhile.",
    "wall": "Times are the wall clock's, from answers with nothing else running on the device.",
}


@dataclass(frozen=True)
class Source:
    """What a report is made from; ``extra`` holds further tables by name, where they were made.

    ``results`` is None in an experiment that answers no task.
    """

    results: Results | None
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


# In the order in which they stand, between the costs and the single answers.
SECTIONS: tuple[Section, ...] = (
    Section(perplexity.NAME, perplexity.TITLE, perplexity.build),
    Section(memory.NAME, memory.TITLE, memory.build),
    Section(entropy_recall.NAME, entropy_recall.TITLE, entropy_recall.build),
    Section(allocation.NAME, allocation.TITLE, allocation.build),
)


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
    """Write report.md (which refers to the figures beside it) and report.html (which holds them).

    Paths, but for ``title``; the first four are None where no task is answered; ``extra``: paths of further tables by
    name, left out where there is no such file;
    ``missing``: why each cell that is not in ``scores`` is not, by its path, for a report of an unfinished experiment.
    Raises UserError if a table is empty or a file cannot be read.
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


def report_context(source: Source, title: str | None, missing: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the templates show but the figures."""
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
        "confidence": allocation.percent(statistics["confidence"]),
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
        answered = _answered(source, results)
        context |= answered | {"charts": answered["charts"] | context["charts"]}
    return context


def _answered(source: Source, results: Results) -> dict[str, Any]:
    """What is shown of the answers to the tasks."""
    return {
        "kept": f"{100 * verdict.KEPT:g} %",
        "verdicts": verdict.verdicts(results, source.extra.get("noninferiority")),
        "findings": findings.findings(results),
        "oddities": findings.oddities(results),
        "costs": sections.costs(results),
        "front": sections.front(results),
        "differences": sections.differences(results),
        "between": sections.between(results, source.extra.get("pairs")),
        "smallest": sections.smallest(results, source.extra.get("smallest_budgets")),
        "along_budgets": sections.along_budgets(results, source.extra.get("budget_transition")),
        "failures": sections.failures(results),
        "transitions": sections.transitions(results),
        "states": sections.STATES,
        "bin_tables": sections.bin_tables(results),
        "card": card.table(card.matched_budget(results, source.experiment, source.metadata)),
        "examples": examples(results),
        "clock": CLOCKS.get(source.metadata.get("clock", ""), CLOCKS["wall"]),
        "charts": {
            "explorer": plots.interactive(results),
            "differences": tradeoff.difference_explorer(results),
            "front": tradeoff.front_explorer(results),
        },
    }


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the manifest cannot be read ({error}); run the prepare step again") from None
