"""The report's sentences on what the experiment declares about its endpoints, unverified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

Config = Mapping[str, Any]


def is_remote(experiment: Config) -> bool:
    return (experiment.get("engine") or {}).get("kind") == "openai"


def setup(experiment: Config) -> list[tuple[str, str]]:
    """Return the declarations as pairs of name and value."""
    if not is_remote(experiment):
        return []
    engine = experiment["engine"]
    model = engine.get("model") or (experiment.get("model") or {}).get("name")
    default = {"base_url": engine["base_url"], "model": model, "extra_body": engine.get("extra_body")}
    policies = "receives policy and budget with each request" if engine.get("serves") else "the full cache"
    rows = [("Endpoint", f"{_words(default)}, {engine['api']}; declared: {policies}")]
    if declared := engine.get("endpoints"):
        named = "; ".join(f"{key}: {_words(value)}" for key, value in declared.items())
        rows.append(("Declared for policies", named))
    return rows


def _words(endpoint: Config) -> str:
    parts = [endpoint.get("base_url"), endpoint.get("model") and f"model {endpoint['model']}"]
    extra = endpoint.get("extra_body")
    return ", ".join([*filter(None, parts), *([json.dumps(extra)] if extra else [])])


def limits(experiment: Config, scores: pl.DataFrame) -> list[str]:
    """Return sentences on what answers of an endpoint cannot show."""
    urls = scores["base_url"].drop_nulls().unique().sort().to_list()
    if not urls:
        return []
    answers = scores.filter(pl.col("base_url").is_not_null())
    found = [f"Answers came from an endpoint ({', '.join(urls)}). "]
    if (experiment.get("engine") or {}).get("serves"):
        found[0] += "Entries kept, bytes and seconds are values that the endpoint reports; they were not verified."
    else:
        found[0] += (
            "Its treatment of the cache is declared by the experiment and was not verified: entries and bytes kept "
            "could not be measured."
        )
    if answers["kept_mean"].is_null().all() and set(answers["policy"]) != {"full"}:
        found.append(
            "It is not known whether an endpoint compresses at all: equal answers may come from one full cache."
        )
    if "raw" in answers.columns:
        concerns = answers["raw"].str.json_path_match("$.http.concerns").fill_null("")
        other = concerns.str.contains("by the tokenizer of model.name", literal=True).sum()
        missing = concerns.str.contains("no usage|cannot be").sum()
        if other:
            found.append(
                f"For {other} of {answers.height} answers the endpoint counted another number of prompt tokens than "
                "the tokenizer of model.name. Its tokenizer, chat template or token boundaries may differ."
            )
        if missing:
            found.append(
                f"For {missing} of {answers.height} answers the endpoint's token counts were missing or impossible."
            )
    return found
