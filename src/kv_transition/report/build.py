"""The report: one Markdown file beside its figures, one HTML page that holds everything."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from kv_transition.analysis.aggregate import FULL
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata, write_text
from kv_transition.report import findings as f

FIGURES = {
    "acc_vs_len": ("Score", "Mean score against document length, one panel per mode and budget."),
    "failrate_vs_len": ("Failures", "Share of answers that failed: empty, degenerate, truncated and so on."),
    "failures": ("Kinds of failure", "What the failed answers look like, over all lengths."),
    "std_vs_len": ("Spread", "Standard deviation of the score between examples. For scores of 0 and 1 it is a function "
                   "of the mean and shows nothing of its own."),
    "latency_vs_len": ("Time", "Median time to the whole answer: reading, compressing, decoding; at batch size 1."),
}  # fmt: skip
CLOCKS = {
    "process": "Times are CPU seconds of the one thread that a job runs on, whatever the other cores do meanwhile.",
    "wall": "Times are the wall clock's, from answers with nothing else running on the device.",
}
TINY_READER = "tiny-reader"


def build_report(
    *,
    scores: str,
    bin_stats: str,
    comparisons: str,
    transition: str,
    manifests: Sequence[str],
    config: str,
    plots_dir: str,
    output_md: str,
    output_html: str,
    title: str | None = None,
) -> None:
    """Write report.md (which refers to the figures beside it) and report.html (which holds them).

    All arguments are paths but ``title``. Raises UserError if a table is empty or a file cannot be read.
    """
    context = report_context(scores, bin_stats, comparisons, transition, manifests, config, title)
    folder = Path(plots_dir)
    drawn = [
        {"name": name, "title": heading, "caption": caption, "svg": folder / f"{name}.svg"}
        for name, (heading, caption) in FIGURES.items()
        if (folder / f"{name}.svg").is_file()
    ]
    base = Path(output_md).resolve().parent
    figures = [
        {**d, "svg": inline_svg(d["svg"].read_text(encoding="utf-8"), d["name"], d["caption"]),
         "path": _relative(d["svg"], base)}
        for d in drawn
    ]  # fmt: skip
    interactive = folder / "interactive.html"
    context |= {
        "figures": figures,
        "interactive": _relative(interactive, base) if interactive.is_file() else None,
    }
    write_text(output_md, _environment(html=False).get_template("report.md.jinja").render(context))
    page = _environment(html=True).get_template("report.html.jinja").render(context)
    write_text(output_html, page.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0"))


def _relative(path: Path, base: Path) -> str:
    resolved = path.resolve()
    return resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else resolved.as_posix()


def _environment(html: bool) -> Environment:
    return Environment(
        loader=PackageLoader("kv_transition.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def inline_svg(svg: str, name: str, alt: str) -> str:
    """The drawing as it can stand inside a page beside others: ids of its own, a name for screen readers."""
    from markupsafe import Markup, escape

    start = svg.find("<svg")
    if start < 0:
        raise UserError(f"plots: {name}.svg is no SVG drawing; draw the plots again")
    svg = svg[start:]
    for pattern, replacement in (
        (r'\bid="', rf'id="{name}-'),
        (r"url\(#", rf"url(#{name}-"),
        (r'href="#', rf'href="#{name}-'),
    ):
        svg = re.sub(pattern, replacement, svg)
    # The style sheet lets it be as wide as the page, but not much wider than it was drawn.
    svg = re.sub(r"^<svg([^>]*?) width=\"([\d.]+)\" height=\"[\d.]+\"", r'<svg\1 style="--drawn:\2px"', svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def report_context(
    scores: str,
    bin_stats: str,
    comparisons: str,
    transition: str,
    manifests: Sequence[str],
    config: str,
    title: str | None = None,
) -> dict[str, Any]:
    """Everything that the templates show but the figures."""
    experiment = _read_yaml(config)
    statistics = {"confidence": 0.95, "resamples": 10_000} | (experiment.get("statistics") or {})
    alias = (pl.col("policy") != FULL["policy"]) & (pl.col("budget") == FULL["budget"])
    columns = ["task", "mode", "policy", "budget", "bin", "example_id", "failure", "engine", "base_url", "metric"]
    tables = f.Tables(
        pl.read_parquet(scores, columns=columns).filter(~alias),
        *(pl.read_parquet(path).filter(~alias) for path in (bin_stats, comparisons, transition)),
        statistics["confidence"],
    )
    if not tables.stats.height:
        raise UserError(f"{bin_stats}: the table is empty; run the aggregate step on at least one scored cell")
    data = [_read_json(path) for path in manifests]
    return {
        "title": title or experiment.get("experiment", "kv-transition"),
        "experiment": experiment.get("experiment", "experiment"),
        "model": _model(experiment),
        "tiny": is_tiny_reader(experiment),
        "answers": tables.scores.height,
        "confidence": f"{100 * statistics['confidence']:g} %",
        "resamples": statistics["resamples"],
        "kept": f"{100 * f.KEPT:g} %",
        "verdicts": f.verdicts(tables),
        "findings": f.findings(tables),
        "setup": setup(experiment, tables, data, read_metadata(scores)),
        "costs": f.costs(tables),
        "transitions": f.transitions(tables),
        "states": f.STATES,
        "bin_tables": f.bin_tables(tables),
        "warnings": [(m.get("task", "?"), w) for m in data for w in m.get("warnings", [])],
        "limits": limits(experiment, tables),
        "future": future(experiment, tables),
        "clock": CLOCKS.get(read_metadata(scores).get("clock", ""), CLOCKS["wall"]),
        "commit": _commit(experiment),
    }


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: the resolved experiment cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: the resolved experiment must be a mapping of sections")
    return value


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the manifest cannot be read ({error}); run the prepare step again") from None


def is_tiny_reader(experiment: dict[str, Any]) -> bool:
    """Whether the model is the one that the project trained on its own synthetic task."""
    return Path(str((experiment.get("model") or {}).get("name", ""))).name == TINY_READER


def _model(experiment: dict[str, Any]) -> str:
    model = experiment.get("model") or {}
    return str(model.get("name", "unknown")) + (f" @ {model['revision']}" if model.get("revision") else "")


def _commit(experiment: dict[str, Any]) -> str:
    return (experiment.get("provenance") or {}).get("git_commit", "unknown")


def setup(
    experiment: dict[str, Any], tables: f.Tables, manifests: list[dict], metadata: dict[str, str]
) -> list[tuple[str, str]]:
    """What was run, as pairs of name and value."""
    section = {
        name: experiment.get(name) or {} for name in ("model", "dataset", "kv", "decoding", "hardware", "engine")
    }
    model, dataset, kv = section["model"], section["dataset"], section["kv"]
    provenance = experiment.get("provenance") or {}
    device = model.get("device", "auto")
    card = section["hardware"].get("gpu_model")
    counts = tables.stats.filter(statistic="score_mean")["n"]
    low, high = counts.min(), counts.max()
    rows = [
        ("Model", _model(experiment) + (f", {model['dtype']}" if model.get("dtype") else "")),
        ("Data set", ", ".join(f"{dataset.get('name', '?')}/{t}" for t in dict.fromkeys(t for t, _ in tables.groups))
         + (f" @ {dataset['revision']}" if dataset.get("revision") else "")),
        ("Metric", ", ".join(sorted(set(tables.scores["metric"].drop_nulls()))) or "unknown"),
        ("Policies", ", ".join([FULL["policy"], *tables.policies])),
        ("Cache kept", ", ".join(f.labels.budget(b) for b in tables.budgets) or "all"),
        ("Compressed", ", ".join(f.labels.mode(m) for m in dict.fromkeys(m for _, m in tables.groups))),
        ("Length bins", "; ".join(
            f"{t}: " + ", ".join(f.tokens_of(b) for b in tables.bins(t)) + " tokens"
            for t in dict.fromkeys(t for t, _ in tables.groups))),
        ("Examples in a bin", str(low) if low == high else f"{low} to {high}"),
        ("Answers", f"{tables.scores.height}"),
        ("Decoding", _decoding(section["decoding"])),
        ("Device", device if device == "cpu" or not card else f"{device} ({card} asked for)"),
    ]  # fmt: skip
    hyper = {name: options for name, options in (kv.get("policies") or {}).items() if options}
    if hyper:
        rows.append(("Hyper-parameters", "; ".join(f"{n}: {json.dumps(o)}" for n, o in hyper.items())))
    for manifest in manifests:
        if template := (manifest.get("template") or {}):
            task = manifest.get("task", "?")
            rows.append((f"Prompt of {task}", f"{template.get('source')}, sha256 {str(template.get('sha256'))[:12]}"))
    versions = provenance.get("package_versions") or {}
    rows += [
        ("Code", f"commit {_commit(experiment)}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"),
    ]
    rows += [
        (label, metadata[key])
        for key, label in (
            ("attention", "Attention"),
            ("attention_statistics", "Attention statistics"),
            ("device", "Hardware"),
        )
        if metadata.get(key)
    ]
    return rows


def _decoding(decoding: dict[str, Any]) -> str:
    temperature = decoding.get("temperature", 0)
    how = "greedy" if not temperature else f"temperature {temperature}"
    repeats = decoding.get("repeats", 1)
    return how + (f", {repeats} repeats of each example" if repeats > 1 else "")


def limits(experiment: dict[str, Any], tables: f.Tables) -> list[str]:
    """What this experiment cannot say."""
    found = []
    if is_tiny_reader(experiment):
        found.append(
            "The model is the project's own tiny reader, trained on a synthetic task. Rankings of policies from it are "
            "not findings about language models; it shows that the measurement works."
        )
    found += f.exploratory(tables)
    if len({mode for _, mode in tables.groups}) > 1:
        found.append(
            "The two modes answer different questions and are never mixed: after the prompt, the policy has seen the "
            "question, and late tokens may already carry the answer; before the question, it has not."
        )
    found.append(
        "“No loss seen” is no proof that there is none: each interval says how large a loss may be hidden. Bins are "
        "ranges of length, so a transition is located to a bin, not to a token."
    )
    if (
        not (experiment.get("decoding") or {}).get("temperature")
        and (experiment.get("decoding") or {}).get("repeats", 1) == 1
    ):
        found.append(
            "Each example was answered once, greedily: instability within an example (other seeds, other wordings) "
            "was not measured."
        )
    timed = tables.stats.filter(statistic="latency_p50").drop_nulls("estimate").height
    if not timed:
        found.append("No answer was timed alone on the machine, so nothing is said about speed.")
    found.append("Reading the prompt is always done with full attention; only what is kept afterwards is compressed.")
    endpoints = tables.scores["base_url"].drop_nulls().unique().sort().to_list()
    if endpoints:
        found.append(
            f"Answers came from an endpoint ({', '.join(endpoints)}). What it does with its cache was not verified: "
            "entries and bytes kept could not be measured there."
        )
    return found


def future(experiment: dict[str, Any], tables: f.Tables) -> list[str]:
    """What would tell most next, from what was left open."""
    found = []
    open_cases = tables.transition.filter(detector="definition", outcome="undecided")
    if open_cases.height:
        found.append(
            f"More examples in the bins of the {open_cases.height} undecided policy and budget pairs: their intervals "
            "reach both sides of the criterion."
        )
    cliffs = tables.transition.filter(detector="definition", outcome="cliff")

    shortest = tables.stats["bin"].min()
    collapsed_first = cliffs.filter(pl.col("collapse_bin") == shortest).height
    if collapsed_first:
        found.append(
            f"Larger budgets or shorter documents for the {collapsed_first} pairs that collapsed in the shortest bin."
        )
    if (experiment.get("decoding") or {}).get("repeats", 1) == 1:
        found.append("Repeats of each example, to see instability within an example.")
    if is_tiny_reader(experiment):
        found.append("The same experiment with a pretrained language model and a real data set (LongBench).")
    return found
