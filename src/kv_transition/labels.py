"""Bins, budgets and modes as text for readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODES = {"before_question": "before the question", "after_prompt": "after the prompt"}


def tokens(count: float) -> str:
    """Return a number of tokens as ``256``, ``1.0k`` or ``16k``."""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k"


def token_range(low: float, high: float) -> str:
    """Return a range of tokens as ``241–268`` or ``0.9–1.1k``."""
    first, last = tokens(low), tokens(high)
    if first == last:
        return first
    if first.endswith("k") and last.endswith("k"):
        first = first[:-1]
    return f"{first}–{last}"


def parameters(count: int) -> str:
    """Return the number of a model's parameters in thousands, millions or billions, such as ``135M`` or ``7.2B``."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= 0.9995 * size:
            return f"{count / size:.2g}{unit}" if count < 9.95 * size else f"{count / size:.0f}{unit}"
    return f"{count / 1e3:.0f}K"


OWN = "r1"
"""budget of the full cache, and of policies whose hyper-parameters determine the footprint"""


def kept(policy: str, name: str) -> str:
    """Return the share that a policy keeps at a budget: `budget`, or ``100 %`` for the full cache."""
    return "100 %" if policy == "full" else budget(name)


def budget(name: str) -> str:
    """Return ``20 %`` for ``r0.2``, ``128 tokens`` for ``t128``, and ``its own`` for ``r1``."""
    if name == OWN:
        return "its own"
    if name.startswith("r"):
        return f"{100 * float(name[1:]):g} %"
    return f"{name[1:]} tokens"


def budget_order(name: str) -> tuple[int, float]:
    """Return a sort key that puts fractions before tokens and large budgets before small ones."""
    return (name[0] != "r", -float(name[1:]))


def mode(name: str) -> str:
    return MODES.get(name, name.replace("_", " "))


HONEST = ("ABSTAIN",)
"""failures in which the model says that it does not know; all other failures are unusable answers"""


def failure(name: str) -> str:
    """Return a failure label as words, ``empty output`` for ``EMPTY_OUTPUT``; acronyms are unchanged."""
    return name if name == "OOM" else name.replace("_", " ").lower()


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(estimate: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """Return ``0.97 [0.91, 0.99]``; an open bound is an ellipsis."""
    if estimate is None:
        return "–"
    if low is None and high is None:
        return number(estimate, digits)
    ends = ("…" if end is None else number(end, digits) for end in (low, high))
    return f"{number(estimate, digits)} [{', '.join(ends)}]"


def count(n: int, clusters: int | None = None) -> str:
    """Return ``n = 20``, with the number of documents if several examples belong to one document."""
    return f"n = {n}" if clusters is None or clusters == n else f"n = {n} from {clusters} documents"


def signed(row: Mapping[str, Any], digits: int = 2) -> str:
    """Return ``−0.31 [−0.41, −0.21]`` with a typographic minus, and a plus before positive numbers."""
    if row["estimate"] is None:
        return "–"
    point, low, high = (_with_sign(row[k], digits) for k in ("estimate", "ci_low", "ci_high"))
    return f"{point} [{low}, {high}]"


def _with_sign(value: float | None, digits: int) -> str:
    if value is None:
        return "…"
    value = round(value, digits) or 0.0  # a rounded zero gets no sign
    return f"{value:+.{digits}f}".replace("-", "−") if value else f"{value:.{digits}f}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def tested(row: Mapping[str, Any]) -> str:
    """Return ``0.008 (0.040 after Holm)``: the p-value that belongs to the row's own interval, and the adjusted one."""
    return p_value(row["p_value"]) + ("" if row["p_holm"] is None else f" ({p_value(row['p_holm'])} after Holm)")


def percent(share: float) -> str:
    """Return a confidence level in percent, with enough digits to distinguish it from 100 %."""
    away = 100 * (1 - share)
    digits = next((d for d in range(2, 11) if away >= 10.0 ** (1 - d)), 10)
    return f"{100 * share:.{digits}f}".rstrip("0").rstrip(".") + " %"
