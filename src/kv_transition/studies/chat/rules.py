"""Rules that decide whether an answer follows an instruction.

`kv_transition.studies.chat.checks` describes checks and when they are in force. An answer of only white space follows
no instruction, not even a maximum length.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from kv_transition.errors import shown
from kv_transition.eval.language import most_likely
from kv_transition.eval.metrics import exact_match
from kv_transition.studies.chat.checks import KINDS, LANGUAGES, Check, at_turn, describe, of_conversation, validate

__all__ = ["KINDS", "LANGUAGES", "Check", "at_turn", "describe", "detect_language", "of_conversation", "passes",
           "validate"]  # fmt: skip

# The end of a sentence: a mark, closing quotes or brackets, then white space or the end of the text; a Chinese or
# Japanese mark needs no space after it.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s|$)|[。！？]+[」』”’）]*""")
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)
CONFIDENCE = 0.5
"""minimum probability of a language; below it the language is undetermined"""
MATCH_S = 2.0
"""time limit of a regular expression for an answer, in seconds"""


def passes(check: Check, text: str) -> bool | None:
    """Return whether the answer follows the check; None if its regular expression takes too long.

    - ``max_words``, ``min_words``: words are separated by white space.
    - ``max_sentences``: pieces that contain a letter or digit and end at ``. ! ? …`` before white space, or at the end.
    - ``lines``: exactly this number of lines that are not blank.
    - ``contains``, ``excludes``: all (none) of the phrases occur in it as whole words.
    - ``starts_with``, ``ends_with``: it starts (ends) with one of the phrases, as whole words.
    - ``case``: ``upper`` without a lower-case letter, ``lower`` without a capital letter, ``title`` with a capital as
      every word's first letter.
    - ``json``: only an object or a list, alone or in one Markdown fence; with the keys given, an object that has them.
    - ``language``: the most likely one of ``LANGUAGES`` (py3langid), with a probability of at least one half.
    - ``matches``: the regular expression is found in it; ``^`` and ``$`` are the ends of the text.
    - ``answer``: one of the texts, both normalised as for exact match.

    Phrases and expressions ignore case unless ``case_sensitive`` is set; a blank in a phrase matches any white space.
    """
    text = text.strip()
    if not text:
        return False
    match check.kind:
        case "max_words":
            return len(text.split()) <= check.value
        case "min_words":
            return len(text.split()) >= check.value
        case "max_sentences":
            return sum(any(map(str.isalnum, piece)) for piece in _SENTENCE_END.split(text)) <= check.value
        case "lines":
            return sum(bool(line.strip()) for line in text.splitlines()) == check.value
        case "contains":
            return all(_phrase(phrase, check).search(text) for phrase in check.values)
        case "excludes":
            return not any(_phrase(phrase, check).search(text) for phrase in check.values)
        case "starts_with":
            return any(_phrase(phrase, check).match(text) for phrase in check.values)
        case "ends_with":
            return any(_phrase(phrase, check, r"\Z").search(text) for phrase in check.values)
        case "case":
            return _is_case(text, check.value)
        case "json":
            return _is_json(text, check.values)
        case "language":
            return detect_language(text) == check.value
        case "matches":
            return _matches(check.value, text, check.case_sensitive)
        case "answer":
            return exact_match(text, check.values) == 1
    raise ValueError(f"a check's kind is one of {', '.join(KINDS)}, not {check.kind!r}")


_TOO_SLOW: set[str] = set()
"""expressions that exceeded the time limit once; they are not tried on later answers"""


def _matches(expression: str, text: str, case_sensitive: bool) -> bool | None:
    """Return whether an expression is found in a text; None where that takes longer than `MATCH_S`."""
    import regex

    if expression in _TOO_SLOW:
        return None
    flags = 0 if case_sensitive else regex.IGNORECASE
    try:
        return regex.search(expression, text, flags, timeout=MATCH_S) is not None
    except (TimeoutError, MemoryError, regex.error):
        _TOO_SLOW.add(expression)
        print(
            f"the regular expression {shown(expression)} takes too long, so its check has no verdict", file=sys.stderr
        )
        return None


def _phrase(phrase: str, check: Check, behind: str = "") -> re.Pattern[str]:
    """Return a pattern that finds the phrase as whole words."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    start = r"(?<!\w)" if re.match(r"\s*\w", phrase) else ""
    end = r"(?!\w)" if re.search(r"\w\s*$", phrase) else ""
    return re.compile(f"{start}{words}{end}{behind}", 0 if check.case_sensitive else re.IGNORECASE)


def _is_case(text: str, case: str) -> bool:
    if case == "upper":
        return not any(map(str.islower, text))
    if case == "lower":
        return not any(map(str.isupper, text))
    firsts = (next(filter(str.isalpha, word), "") for word in text.split())
    return not any(map(str.islower, firsts))


def _is_json(text: str, keys: list[str]) -> bool:
    fenced = _FENCED.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    if keys:
        return isinstance(found, dict) and all(key in found for key in keys)
    return isinstance(found, (dict, list))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def detect_language(text: str) -> str:
    """Return the ISO 639-1 code of the most likely language of ``LANGUAGES``, or ``und`` if none is likely enough."""
    return most_likely(text, LANGUAGES, CONFIDENCE)
