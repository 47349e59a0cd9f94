"""Numbers as a report shows them: with interval, n, and the row that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kv_transition import labels

DASH = "–"


@dataclass(frozen=True)
class Number:
    """An estimate with its interval as ``text``; ``source``: its table and row; ``method``: that of the interval."""

    text: str
    n: int = 0
    source: str = ""
    method: str = ""

    def __str__(self) -> str:
        return self.text


MISSING = Number(DASH)


def source_of(table: str, row: Mapping[str, Any]) -> str:
    """Return the table and the key of its row: ``comparisons/reader_qa/after_prompt/snapkv/r0.5/all/score_ratio``."""
    bin = row.get("bin")
    key = [row["task"], row["mode"], row["policy"], row["budget"], "all" if bin is None else f"bin{bin}"]
    return "/".join((table, *key, row["statistic"]))


def number(
    row: Mapping[str, Any] | None,
    table: str,
    digits: int = 2,
    scale: float = 1.0,
    unit: str = "",
    signed: bool = False,
    source: str = "",
) -> Number:
    """Return ``0.97 [0.91, 0.99]``, scaled; a dash if nothing was measured."""
    if row is None or row["estimate"] is None:
        return MISSING
    if signed:
        text = labels.signed(row, digits)
    else:
        text = labels.interval(*(None if row[k] is None else row[k] * scale for k in _BOUNDS), digits)
    point, _, bounds = text.partition(" ")
    text = f"{point}{unit} {bounds}".strip()
    return Number(text, row["n"], source or source_of(table, row), row["method"] or "")


_BOUNDS = ("estimate", "ci_low", "ci_high")


def tokens_of(bin: Mapping[str, Any]) -> str:
    return labels.token_range(bin["token_min"], bin["token_max"])


def kept_of(budget: str) -> str:
    """Return the budget in words: ``20 % of the cache``, ``128 tokens``, ``its own share of the cache``."""
    if budget == labels.OWN:
        return "its own share of the cache"
    return labels.budget(budget) + ("" if budget.startswith("t") else " of the cache")


def listed(parts: Iterable[str]) -> str:
    """Return the parts joined in words: ``a``, ``a and b``, ``a, b and c``."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
