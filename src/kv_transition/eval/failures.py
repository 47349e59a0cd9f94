"""Failure labels of answers. A wrong answer is not a failure; its score shows it.

`failure` returns the first label of ``LABELS`` that applies, or None. "The text" is the answer as it was generated.
"The scored text" is its first line for tasks that score only that line, else all of it. Words are separated by white
space, so that the labels depend on the answer alone and not on a tokenizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from kv_transition.eval.metrics import contains, scored_text

LABELS = (
    "ENGINE_ERROR",  # the engine reported an error that is none of the next two
    "OOM",  # it ran out of memory
    "TIMEOUT",  # it ran out of time
    "EMPTY_OUTPUT",  # the text is only white space
    "DEGENERATE",  # one n-gram fills half of the text, see is_degenerate
    "TRUNCATED",  # generation stopped at its length limit and the scored text contains no gold answer
    "REFUSAL",  # the first sentence of the scored text declines the request
    "ABSTAIN",  # the first sentence of the scored text says that there is no answer, and no gold answer does
    "FORMAT_ERROR",  # the scored text breaks the task's answer pattern, see breaks_pattern
)

PATTERNS = ("short_qa", "trec_class", "paragraph", "number", "free")

MAX_NGRAM = 8
MIN_DEGENERATE_WORDS = 24
MAX_LINES = 3
MAX_TIMES_GOLD = 10

# Only the first sentence is searched, because a summary may quote a person who does not know.
_OPENING_CHARACTERS = 200
_CANNOT = r"(cannot|cant|can not|could not|couldnt|will not|wont|(am|im) (unable|not able) to)"
_DOES_NOT = r"(does not|doesnt|do not|dont|did not|didnt)"
_TOLD = r"(known|mentioned|stated|provided|given|specified|answerable)"
_SOURCE = r"(text|context|document|passage|paragraph|article|story|information)s?"

_REFUSAL = re.compile(
    r"\b(as an? (ai|(large )?language model)"
    rf"|i ({_CANNOT}|must decline to|decline to|refuse to) (help|assist|comply|fulfill?|discuss|engage|participate))\b"
)
_ABSTENTION = re.compile(
    rf"^((the )?answer( is)? |it is )?(unknown|unanswerable|undetermined|not {_TOLD}|no answer|not sure|na)$"
    rf"|\b(i {_DOES_NOT} know"
    rf"|i {_CANNOT} (answer|find|determine|tell|say|identify|locate|infer)"
    r"|(cannot|cant|can not|could not) be (answered|determined|found|inferred)"
    rf"|(is|are) (unknown|unanswerable|not {_TOLD})"
    rf"|{_SOURCE} {_DOES_NOT} (mention|state|say|specify|provide|contain|include|give|answer)"
    r"|(no|not enough|insufficient) (relevant |sufficient )?(information|context|evidence))\b"
)


def failure(
    text: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None = None,
    pattern: str = "free",
    first_line_only: bool = False,
    finish_reason: str | None = None,
    error: str | None = None,
) -> str | None:
    """Return the label of one answer, or None if nothing failed.

    Args:
        text: the answer as generated.
        answers: the gold answers, any of which is right.
        all_classes: the classes of a classification task.
        pattern: the required form of an answer, one of ``PATTERNS``.
        first_line_only: score the first line only, as LongBench does for some tasks.
        finish_reason: ``length`` if generation stopped at its limit.
        error: the engine's report: "OOM: ...", "TIMEOUT: ...", any other text, or None.
    """
    if error is not None:
        kind = error.partition(":")[0]
        return kind if kind in ("OOM", "TIMEOUT") else "ENGINE_ERROR"
    if not text.strip():
        return "EMPTY_OUTPUT"
    if is_degenerate(text):
        return "DEGENERATE"
    text = scored_text(text, first_line_only)
    if finish_reason == "length" and not contains(text, answers):
        return "TRUNCATED"
    if is_refusal(text):
        return "REFUSAL"
    if is_abstention(text):
        return None if any(map(is_abstention, answers)) else "ABSTAIN"
    if breaks_pattern(text, answers, all_classes or (), pattern):
        return "FORMAT_ERROR"
    return None


def is_degenerate(text: str) -> bool:
    """Return whether occurrences of one n-gram of at most 8 words cover half of a text of at least 24 words.

    Occurrences may overlap; a word in two of them is counted once.
    """
    words = text.split()
    if len(words) < MIN_DEGENERATE_WORDS:
        return False
    # An n-gram has at most 8 different words, so these must cover half of the text; they rarely do.
    if 2 * sum(n for _, n in Counter(words).most_common(MAX_NGRAM)) < len(words):
        return False
    for n in range(1, MAX_NGRAM + 1):
        covered: Counter[tuple[str, ...]] = Counter()
        end: dict[tuple[str, ...], int] = {}
        for i in range(len(words) - n + 1):
            ngram = tuple(words[i : i + n])
            covered[ngram] += i + n - max(i, end.get(ngram, 0))
            end[ngram] = i + n
        if 2 * max(covered.values()) >= len(words):
            return True
    return False


def is_refusal(text: str) -> bool:
    """Return whether the first sentence declines the request, such as "I can't help with that"."""
    return _REFUSAL.search(_opening(text)) is not None


def is_abstention(text: str) -> bool:
    """Return whether the first sentence says that there is no answer, such as "unknown" or "not mentioned"."""
    return _ABSTENTION.search(_opening(text)) is not None


def _opening(text: str) -> str:
    """Return the first sentence, of at most 200 characters, in lower case and without punctuation."""
    sentence = re.split(r"(?<=\w)[.!?](?=\s)|\n", text.strip()[:_OPENING_CHARACTERS], maxsplit=1)[0]
    return " ".join(re.sub(r"[^\w\s]", "", sentence.lower()).split())


def breaks_pattern(text: str, answers: Sequence[str], all_classes: Sequence[str], pattern: str) -> bool:
    """Return whether the text does not have the form that the task requires.

    - ``trec_class``: it names none of the classes.
    - ``paragraph``: it has no "Paragraph k".
    - ``number``: it has no digit.
    - ``short_qa``: it has more than three non-blank lines, or more than ten times the words of the longest gold answer.
    - ``free``: every form is allowed.

    Raises:
        ValueError: there is no such pattern.
    """
    match pattern:
        case "trec_class":
            return not any(name in text for name in all_classes)
        case "paragraph":
            return re.search(r"paragraph\s*\d", text, re.IGNORECASE) is None
        case "number":
            return re.search(r"\d", text) is None
        case "short_qa":
            longest = max((len(gold.split()) for gold in answers), default=0)
            n_lines = sum(bool(line.strip()) for line in text.splitlines())
            return n_lines > MAX_LINES or len(text.split()) > MAX_TIMES_GOLD * max(longest, 1)
        case "free":
            return False
    raise ValueError(f"an answer pattern is one of {', '.join(PATTERNS)}, not {pattern!r}")
