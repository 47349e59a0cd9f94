"""Setup and limits of an experiment, from its configuration, manifests and metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from kv_transition import __version__, labels, sections
from kv_transition.errors import UserError
from kv_transition.report.numbers import listed, tokens_of
from kv_transition.stats.examples import FULL, Statistics
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.report import endpoints, findings
from kv_transition.studies.grid.results import Results
from kv_transition.yaml_text import read_yaml

EMBEDDED = {"tiny-reader": "tiny reader", "tiny-follower": "tiny follower"}
"""the models that the project trained on its own synthetic tasks, by their folder"""
Config = Mapping[str, Any]


def read_config(path: str) -> dict[str, Any]:
    """Return the resolved experiment. Raises UserError if it cannot be read."""
    value = read_yaml(path, "resolved experiment")
    if not isinstance(value, dict):
        raise UserError(f"{path}: the resolved experiment must be a mapping of sections")
    return value


def statistics(config: Config, path: str) -> Statistics:
    """Return the settings of an experiment's intervals. Raises UserError if its file has invalid values for them."""
    try:
        known = sections.Statistics.model_validate(config.get("statistics") or {})
    except ValidationError as error:
        raise UserError(f"{path}: the section statistics is invalid ({error.errors()[0]['msg']})") from None
    return Statistics(**known.model_dump())


def embedded(experiment: Config) -> str | None:
    """Return the name of the model if it is one of `EMBEDDED`."""
    return EMBEDDED.get(Path(str((experiment.get("model") or {}).get("name", ""))).name)


def model_name(experiment: Config) -> str:
    model = experiment.get("model") or {}
    return str(model.get("name", "unknown")) + (f" @ {model['revision']}" if model.get("revision") else "")


def commit(experiment: Config) -> str:
    return (experiment.get("provenance") or {}).get("git_commit", "unknown")


def citation(experiment: Config) -> str:
    """Return a BibTeX entry of the software with the version and commit that computed the results."""
    return (
        "@software{kv_transition,\n"
        "  title   = {kv-transition},\n"
        "  author  = {{The kv-transition developers}},\n"
        f"  version = {{{__version__}}},\n"
        f"  note    = {{commit {commit(experiment)}}},\n"
        "}"
    )


def setup(
    experiment: Config, results: Results | None, manifests: Sequence[Config], metadata: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return pairs of name and value that describe the run; ``results``: None without tasks."""
    section = {name: experiment.get(name) or {} for name in ("model", "kv", "hardware")}
    model, kv = section["model"], section["kv"]
    provenance = experiment.get("provenance") or {}
    device = model.get("device", "auto")
    card = section["hardware"].get("gpu_model")
    rows = [
        ("Model", model_name(experiment) + (f", {model['dtype']}" if model.get("dtype") else "")),
        *_weights(provenance.get("weights_from")),
        *(_answered(experiment, results) if results else []),
        ("Device", device if device == "cpu" or not card else f"{device} ({card} requested)"),
    ]
    if endpoints.is_remote(experiment):
        rows[0] = ("Model", f"{model_name(experiment)} (tokenizer only; the endpoint has the weights)")
        rows[-1:] = endpoints.setup(experiment)
    hyper = {name: options for name, options in (kv.get("policies") or {}).items() if options}
    if hyper:
        rows.append(("Hyper-parameters", "; ".join(f"{n}: {json.dumps(o)}" for n, o in hyper.items())))
    for manifest in manifests:
        if template := (manifest.get("template") or {}):
            task = manifest.get("task", "?")
            rows.append((f"Prompt of {task}", f"{template.get('source')}, sha256 {str(template.get('sha256'))[:12]}"))
    versions = provenance.get("package_versions") or {}
    rows += [
        ("Code", f"commit {commit(experiment)}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"),
    ]
    rows += [
        (label, metadata[key])
        for key, label in (
            ("cells_git_commit", "Commit of the answers"),
            ("attention", "Attention"),
            ("attention_statistics", "Attention statistics"),
            ("device", "Hardware"),
            ("model_fingerprint", "Fingerprint of the model"),
            ("timestamp", "Scored at"),
        )
        if metadata.get(key)
    ]
    return rows


def _weights(origin: Mapping[str, str] | None) -> list[tuple[str, str]]:
    if not origin:
        return []
    return [("Weights from", f"{origin['file']}, {origin['quantization']}, sha256 {origin['sha256'][:12]}")]


def _answered(experiment: Config, results: Results) -> list[tuple[str, str]]:
    dataset = experiment.get("dataset") or {}
    counts = results.stats.filter(statistic="score_mean")["n"]
    low, high = counts.min(), counts.max()
    tasks = list(dict.fromkeys(t for t, _ in results.groups))
    return [
        ("Data set", ", ".join(f"{dataset.get('name', '?')}/{t}" for t in tasks)
         + (f" @ {dataset['revision']}" if dataset.get("revision") else "")),
        ("Metric", ", ".join(sorted(set(results.scores["metric"].drop_nulls()))) or "unknown"),
        ("Policies", ", ".join([FULL["policy"], *results.policies])),
        ("Cache kept", ", ".join(labels.budget(b) for b in results.budgets) or "all"),
        ("Compressed", ", ".join(labels.mode(m) for m in dict.fromkeys(m for _, m in results.groups))),
        ("Length bins", "; ".join(
            f"{t}: " + ", ".join(tokens_of(b) for b in results.bins(t)) + " tokens" for t in tasks)),
        ("Examples in a bin", str(low) if low == high else f"{low} to {high}"),
        ("Answers", f"{results.scores.height}"),
        ("Decoding", _decoding(experiment.get("decoding") or {})),
    ]  # fmt: skip


def _decoding(decoding: Config) -> str:
    temperature = decoding.get("temperature", 0)
    how = "greedy" if not temperature else f"temperature {temperature}"
    repeats = decoding.get("repeats", 1)
    return how + (f", {repeats} repeats of each example" if repeats > 1 else "")


def limits(experiment: Config, results: Results | None) -> list[str]:
    """Return sentences on what this experiment cannot show; ``results``: None without tasks."""
    decoding, found = experiment.get("decoding") or {}, []
    if name := embedded(experiment):
        found.append(
            f"The model is the project's own {name}, trained on a synthetic task. Its rankings of policies are not "
            "findings about language models; they only show that the measurement works."
        )
    else:
        found.append(_one_model(experiment))
    if results is None:
        return found
    found += findings.exploratory(results)
    if results.keeping_all:
        verb = "evict" if len(results.keeping_all) > 1 else "evicts"
        found.append(
            f"The entries that {listed(results.keeping_all)} {verb} stay in host memory. “Kept” counts the entries "
            "that a decode step attends to; bytes include both memories, so no memory is saved."
        )
    if len({mode for _, mode in results.groups}) > 1:
        found.append(
            "The two modes answer different questions and are never mixed. In mode after the prompt, the policy has "
            "read the question, and late tokens may already contain the answer; in mode before the question, it has "
            "not."
        )
    found.append(
        "“No loss shown” means that at most 5 % of the score is lost; “undecided” means that a loss can be neither "
        "shown nor excluded. Bins are ranges of length, so a transition is located to a bin, not to a token."
    )
    if not decoding.get("temperature") and decoding.get("repeats", 1) == 1:
        found.append(
            "Each example was answered once, with greedy decoding, so instability within an example (other seeds, "
            "other wordings) was not measured."
        )
    if not results.stats.filter(statistic="latency_p50").drop_nulls("estimate").height:
        found.append("No answer was timed alone on the machine, so the report makes no statement about speed.")
    if remote := endpoints.limits(experiment, results.scores):
        return found + remote
    found.append("The prefill always uses full attention; the cache is compressed afterwards.")
    return found


def _one_model(experiment: Config) -> str:
    """Return the sentences on what results from a single pretrained model can and cannot show."""
    count = (experiment.get("provenance") or {}).get("parameters")
    size = f" of {labels.parameters(count)} parameters" if count else ""
    return (
        f"These are results of one model{size}. They show the effect of these policies on it for these texts and "
        "lengths. The intervals cover other examples, not other models. Whether the same ranking holds for larger "
        "models, other families or other tasks has to be measured there."
    )


def future(experiment: Config, results: Results | None) -> list[str]:
    """Return sentences on the further runs that would be most informative."""
    if results is None:
        return []
    found = []
    verdicts = results.transition.filter(detector="definition")
    undecided = verdicts.filter(outcome=scale.UNDECIDED)
    if undecided.height:
        most = undecided["n_decides"].max()
        enough = (
            "" if most is None else f"; about {most} in total decide the most demanding of those that can be decided"
        )
        found.append(f"More examples for the {undecided.height} undecided pairs of policy and budget{enough}.")
    shortest = results.stats["bin"].min()
    collapsed_first = verdicts.filter(pl.col("since_bin") == shortest, outcome=scale.COLLAPSED).height
    if collapsed_first:
        found.append(
            f"Larger budgets or shorter documents for the {collapsed_first} pairs that collapsed in the shortest bin."
        )
    if (experiment.get("decoding") or {}).get("repeats", 1) == 1:
        found.append("Repeats of each example, to measure instability within an example.")
    if embedded(experiment):
        found.append("The same experiment with a pretrained language model and a real data set (LongBench).")
    return found
