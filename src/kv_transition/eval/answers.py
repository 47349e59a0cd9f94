"""Metrics for answers with one right form: a letter, a number, a value of a dictionary.

Each metric returns a value in [0, 1] from (answer, gold, classes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_LETTER = re.compile(r"The correct answer is (?:\(([A-D])\)|([A-D])(?![A-Za-z]))")
_NUMBER = re.compile(r"-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}|(-?)\\[dt]?frac(\d)(\d)")
_BETWEEN = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
"""characters that separate the words of an answer, as in InfiniteBench"""


def choice(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the letter after "The correct answer is" is the gold letter, in brackets or not; asterisks are
    ignored.

    Source: LongBench v2 (arXiv 2412.15204), whose prompt asks for that sentence; a bracketed letter has priority.
    """
    plain = text.replace("*", "")
    found = list(_LETTER.finditer(plain))
    first = next((m[1] for m in found if m[1]), next((m[2] for m in found), None))
    return float(first == gold.strip())


def first_number(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the first run of digits equals the gold one. Source: InfiniteBench, passkey and number_string."""
    found = re.search(r"[0-9]+", text)
    return float(found is not None and found[0] == gold)


def listed_word(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the gold is a word of the answer, separated by punctuation. Source: InfiniteBench, kv_retrieval."""
    return float(gold in text.translate(_BETWEEN).split())


def numeric(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    r"""Return 1 if the answer's final number equals the gold one, or if both are the same formula.

    The final answer is the content of the last ``\boxed{}``, else the text after the last "####", else the text after
    the last "answer is", else the last number. Thousands may be separated by commas, and fractions written as 3/4 or
    \frac{3}{4}; currency, percent and degree signs, units in \text{} and spaces are ignored. Numbers are compared
    exactly.
    """
    given = _final(text)
    if given is None:
        return 0.0
    own, wanted = _value(given), _value(gold)
    if own is not None and wanted is not None:
        return float(own == wanted)
    return float(_plain(given) == _plain(gold) and bool(_plain(gold)))


def _final(text: str) -> str | None:
    if boxed := _boxed(text):
        return boxed
    for mark in (r"####", r"answer is:?"):
        parts = re.split(mark, text, flags=re.IGNORECASE)
        if len(parts) > 1 and parts[-1].strip():
            line = parts[-1].strip().splitlines()[0]
            numbers = _NUMBER.findall(line)
            return numbers[0] if numbers and not _FRACTION.search(line) else line.strip().rstrip(".")
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, which may contain braces; None if there is no closed one."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _plain(text: str) -> str:
    """Return a formula without the parts that do not change its value."""
    text = re.sub(r"\\text\{[^}]*\}|\\mbox\{[^}]*\}|\\left|\\right|\\!|\\,|\\ |\^\\circ|\^\{\\circ\}", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"[\s$%]|\\[$%]", "", text).rstrip(".")


def _value(text: str) -> Fraction | None:
    """Return the number that a text consists of; None if it is not a single number."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", _plain(text)).removeprefix("+")
    if match := _FRACTION.fullmatch(plain):
        sign, top, bottom = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], match[6])
        return None if int(bottom) == 0 else Fraction(int(top), int(bottom)) * (-1 if sign else 1)
    if re.fullmatch(r"-?\d+/\d+", plain):
        top, bottom = plain.split("/")
        return None if int(bottom) == 0 else Fraction(int(top), int(bottom))
    return Fraction(plain) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", plain) else None
