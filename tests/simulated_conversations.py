"""Conversations with a known hazard, as tables that the analysis reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl

from kv_transition.studies.chat.checks import Check
from kv_transition.studies.chat.tables import CHAT, CHAT_LAYERS, CHAT_VERDICTS

Row = dict[str, Any]


def verdict(conversation: str, turn: int, rule: bool | None, **more: Any) -> Row:
    row: Row = dict.fromkeys(CHAT_VERDICTS.names) | {
        "chat_set": "talks", "conversation_id": conversation, "turn": turn, "policy": "full", "budget": "r1",
        "check_id": "c1", "kind": "max_words", "asks": "is short", "standing": True, "since": 1, "rule": rule,
    }  # fmt: skip
    row |= more
    return row | {"age": turn - row["since"]}


def verdicts_of(rows: list[Row]) -> pl.DataFrame:
    """Return the verdicts in the form of `analysis.retention.read_verdicts`."""
    schema = pl.from_arrow(CHAT_VERDICTS.empty_table()).schema
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    keys = ["chat_set", "policy", "budget", "conversation_id", "turn", "since", "check_id"]
    return frame.sort(keys).with_columns(cluster="conversation_id")


def with_hazard(rng: np.random.Generator, n: int, turns: int, hazard: float, **more: Any) -> list[Row]:
    """Return ``n`` conversations that follow their instruction until they fail for good; each turn has the given
    hazard."""
    rows = []
    for i in range(n):
        failing = rng.geometric(hazard)
        rows += [verdict(f"k{i:03d}", turn, bool(turn < failing), **more) for turn in range(1, turns + 1)]
    return rows


def chat_rows(
    n: int, turns: int, cells: Mapping[tuple[str, str], Callable[[int, int], str | None]], entries: float = 10.0
) -> list[Row]:
    """Return answers (tables.CHAT): conversation k must say "yes k" in every turn, and from turn 3 on "no" instead."""
    rows = []
    for (policy, budget), says in cells.items():
        for k in range(n):
            first = Check(kind="contains", value=f"yes {k}", id="c1", since=1)
            second = Check(kind="contains", value="no", id="c2", since=3, overrides="c1")
            for turn in range(1, turns + 1):
                text = says(k, turn)
                seen = entries * turn + k
                held = seen if policy == "full" else seen / 5
                rows.append(dict.fromkeys(CHAT.names) | {
                    "chat_set": "talks", "conversation_id": f"k{k:02d}", "turn": turn, "policy": policy,
                    "budget": budget, "user": f"{turn}?", "text": text,
                    "checks": json.dumps([c.model_dump() for c in (first, second) if c.in_force(turn)]),
                    "entries_before": seen, "entries_after": held, "bytes_before": int(64 * seen),
                    "bytes_after": int(64 * held), "total_bytes_after": int(64 * held) + 128,
                    "full_bytes": int(64 * seen), "repetition": (turn % 3) / 4,
                    "answer_nll": None if text is None else 0.1 * turn + 0.01 * k,
                    "error": "OOM: none left" if text is None else None,
                })  # fmt: skip
    return rows


def layer_rows(chat: list[Row]) -> list[Row]:
    """Return two full layers and one sliding-window layer (tables.CHAT_LAYERS) for each answer."""
    rows = []
    for row in chat:
        own = {name: row[name] for name in ("chat_set", "conversation_id", "turn", "policy", "budget")}
        for when in ("before", "after"):
            for layer, kind in enumerate(("full", "full", "sliding")):
                entries = row[f"entries_{when}"] if kind == "full" else 8.0
                rows.append(dict.fromkeys(CHAT_LAYERS.names) | own | {
                    "layer": layer, "kind": kind, "when": when, "kv_heads": 2, "entries": entries, "head_dim": 8,
                    "dtype": "float32", "bytes": int(entries * 2 * 8 * 2 * 4), "bytes_per_token": 128.0,
                })  # fmt: skip
    return rows
