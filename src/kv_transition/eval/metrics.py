"""Metrics of answers: those of LongBench and RULER, and two of this project.

The metrics in ``METRICS`` give the values of LongBench's scoring code (Bai et al. 2023, arXiv 2308.14508), including
its peculiarities, because they serve comparison; ``string_match_all`` is RULER's (Hsieh et al. 2024, arXiv 2404.06654).
`exact_match` and `contains` belong to this project. All values are in [0, 1]. `docs/scoring.md` defines them in prose.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from statistics import fmean

from kv_transition.errors import UserError
from kv_transition.eval import ifeval
from kv_transition.eval.answers import choice, first_number, listed_word, numeric

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")


@lru_cache(maxsize=1 << 13)
def normalize(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and English articles, with single spaces.

    Punctuation is removed before articles, so that "a-b" becomes the word "ab" and "the." is an article.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def first_line(text: str) -> str:
    """Return the part of an answer that LongBench scores for trec, triviaqa, samsum and lsht."""
    return text.lstrip("\n").split("\n", 1)[0]


def scored_text(text: str, first_line_only: bool) -> str:
    return first_line(text) if first_line_only else text


# ----------------------------------------------------------------------------------------------------
# LongBench's metrics: (answer, gold, all_classes) -> [0, 1]

Metric = Callable[[str, str, Sequence[str]], float]


def qa_f1(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return F1 of the words of the normalised answer and gold, repeated words counted; 0 if either has none."""
    words, gold_words = normalize(text).split(), normalize(gold).split()
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0


def rouge_l(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return summary-level ROUGE-L (Lin 2004, section 3.2) as the package ``rouge`` 1.0.1 computes it.

    Sentences end at every full stop; words are separated by white space, and case and punctuation are kept. U is the
    set of words in the longest common subsequences over all pairs of a gold and an answer sentence. With the *distinct*
    words of each side as denominators, F = 2PR / (P + R + 1e-8). The package ``rouge-score`` differs: it lower-cases,
    drops punctuation and counts repeated words.
    """
    sentences, gold_sentences = _sentences(text), _sentences(gold)
    if not sentences or not gold_sentences:
        return 0.0
    union = set().union(*(_common_subsequence(g, s) for g in gold_sentences for s in sentences))
    precision = len(union) / len(set().union(*sentences))
    recall = len(union) / len(set().union(*gold_sentences))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # A blank piece, such as the space after the last full stop, is a sentence of one empty word in the package.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_subsequence(x: list[str], y: list[str]) -> set[str]:
    """Return the words of a longest common subsequence of ``x`` and ``y``, the same one as the package.

    It is bit-parallel (Hyyrö 2004): bit j of ``rises[i]`` is set if the length for x[:i + 1] and y[:j + 1] exceeds that
    for x[:i + 1] and y[:j]; the way back from the end needs nothing else.
    """
    # Words of y that x does not have cannot be part of the subsequence.
    vocabulary = set(x)
    y = [word for word in y if word in vocabulary]
    if not y:
        return set()
    where: dict[str, int] = {}
    for j, word in enumerate(y):
        where[word] = where.get(word, 0) | 1 << j
    every = (1 << len(y)) - 1
    flat = every
    rises = []
    for word in x:
        matches = flat & where.get(word, 0)
        flat = (flat + matches | flat - matches) & every
        rises.append(~flat)
    words = set()
    i, j = len(x) - 1, len(y) - 1
    while i >= 0 and j >= 0:
        if x[i] == y[j]:
            words.add(x[i])
            i, j = i - 1, j - 1
        elif rises[i] >> j & 1:
            i -= 1
        else:
            j -= 1
    return words


def classification(text: str, gold: str, all_classes: Sequence[str]) -> float:
    """Return 1 / (number of classes that the answer names) if the gold class is one of them, else 0.

    A class is named if it is a substring of the answer. Classes that are only a part of the gold's name do not count.
    """
    named = [name for name in all_classes if name in text]
    # Removing from the list during the loop skips the class after each removed one, as in LongBench's code.
    for name in named:
        if name in gold and name != gold:
            named.remove(name)
    return 1 / len(named) if gold in named else 0.0


def count(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the answer that equal the gold number, digit by digit."""
    numbers = _NUMBER.findall(text)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def retrieval(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return `count` for a gold "Paragraph k"; the answer need not contain "Paragraph".

    Raises:
        UserError: the gold does not have that form.
    """
    match = re.search(r"Paragraph (\d+)", gold)
    if match is None:
        raise UserError(f'answer {gold!r} does not name its paragraph: the retrieval metric needs "Paragraph 7"')
    return count(text, match[1])


def code_sim(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return the similarity of the gold line and the answer's first line without "`", "#" or "//", in whole percents.

    It is 2M / T with M the characters in matching blocks (Ratcliff and Obershelp), which ``fuzzywuzzy`` computes by
    ``difflib``. With python-Levenshtein, which LongBench does not require, its values would differ.
    """
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, gold).ratio()) / 100


def string_match(text: str, gold: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the gold occurs in the answer, ignoring case, else 0."""
    return float(gold.lower() in text.lower())


METRICS: dict[str, Metric] = {
    "choice": choice,
    "first_number": first_number,
    "word": listed_word,
    "numeric": numeric,
    "instruction": ifeval.instruction,
    "string_match_part": string_match,
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_sim,
    "string_match_all": string_match,
}
# Metrics that require all gold answers, so that the mean over them counts instead of the best.
WANTS_ALL = frozenset({"string_match_all", "instruction"})


def score_answer(
    metric: str,
    text: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None = None,
    first_line_only: bool = False,
) -> float:
    """Return the best value of the named metric over the gold answers, or their mean if all are required; 0 without
    any.

    Raises UserError if there is no such metric, or if a gold answer does not have the form that the metric needs.
    """
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is not known; take one of {', '.join(METRICS)}")
    text = scored_text(text, first_line_only)
    values = [METRICS[metric](text, gold, all_classes or ()) for gold in answers]
    if metric in WANTS_ALL and values:
        return fmean(values)
    return max(values, default=0.0)


# ----------------------------------------------------------------------------------------------------
# Metrics of this project. With qa_f1 over the same text: exact_match <= qa_f1 and exact_match <= contains.


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised answer equals a normalised gold answer that has a word, else 0."""
    norm = normalize(text)
    return float(bool(norm) and any(norm == normalize(gold) for gold in answers))


def contains(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the words of a gold answer occur consecutively in the answer, both normalised, else 0."""
    words = f" {normalize(text)} "
    return float(any(f" {gold} " in words for gold in map(normalize, answers) if gold))
