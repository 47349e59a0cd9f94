"""The other tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): repeated and needle haystacks, identifiers, several
questions at once, coded words, and questions on documents from local files.

`DRAW` returns question, answers, plan and ``meta`` of an example; `FILLER` the text between the plan's texts.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from kv_transition.data.ruler_words import cut, identifier, invented, numbers
from kv_transition.errors import UserError
from kv_transition.parsing import decode, parse_json

Plan = list[tuple[float | None, str]]
"""Depth and text of everything that a document must contain; depth None: optional, added in this order"""
Drawn = tuple[str, list[str], Plan, dict[str, Any]]

N_QUERIES = 4
FREQUENT = (12, 8, 5)
"""minimum number of occurrences of each of the most frequent words"""
_BLOCK = (60, 15, 6, 3, 2, *(1,) * 12)
"""occurrences of the word of each rank in a block of the coded text: 60 / rank^2, at least 1"""
_CHARACTERS = 8
"""characters of filler per token of the document: more than any tokenizer has"""
_NOISE = "The field is wide. The road is long. The stone is grey. We come and we go. And on it runs."
_SENTENCE = "The locker code of {} is {}."


def _one(rng: random.Random, depth: float, key: str, code: str) -> Drawn:
    at = cut(depth)
    return f"What is the locker code of {key}?", [code], [(at, _SENTENCE.format(key, code))], {"depths": [at]}


def _repeat(rng: random.Random, depth: float) -> Drawn:
    return _one(rng, depth, next(invented(rng)), numbers(rng, 1, 7)[0])


def _uuid(rng: random.Random, depth: float) -> Drawn:
    return _one(rng, depth, next(invented(rng)), identifier(rng))


def _uuid_needles(rng: random.Random, depth: float) -> Drawn:
    return _one(rng, depth, identifier(rng), identifier(rng))


def _multiquery(rng: random.Random, depth: float) -> Drawn:
    """Return codes of several names, a quarter of the document apart; all of them are asked for."""
    names, codes = list(islice(invented(rng), N_QUERIES)), numbers(rng, N_QUERIES, 7)
    depths = [cut((depth + j / N_QUERIES) % 1) for j in range(N_QUERIES)]
    plan = [(at, _SENTENCE.format(name, code)) for at, name, code in zip(depths, names, codes, strict=True)]
    asked = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"What are the locker codes of {asked}?", codes, plan, {"depths": sorted(depths)}


def _frequent(rng: random.Random, depth: float) -> Drawn:
    """Return three coded words that occur in the text more often than all others."""
    words = list(islice(invented(rng), len(FREQUENT)))
    plan = [(cut(rng.random()), word) for word, times in zip(words, FREQUENT, strict=True) for _ in range(times)]
    return "Which three coded words stand in the text most often?", words, plan, {}


DRAW: dict[str, Callable[[random.Random, float], Drawn]] = {
    "niah_repeat": _repeat,
    "niah_uuid": _uuid,
    "niah_needles": _repeat,
    "niah_uuid_needles": _uuid_needles,
    "niah_multiquery": _multiquery,
    "frequent_words": _frequent,
}


def _noise(rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    return cycle(re.findall(r"[^.]+\.", _NOISE.replace(". ", ".")))


def _needles(rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    """Yield codes of other names as filler, which are similar to the code that is asked for."""
    names = invented(rng, {word.strip(".") for text in texts for word in text.split()})
    taken = " ".join(texts)
    while True:
        code = numbers(rng, 1, 7)[0]
        if code not in taken:
            yield _SENTENCE.format(next(names), code)


def _uuids(rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    while True:
        yield _SENTENCE.format(identifier(rng), identifier(rng))


def _coded(rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    """Yield blocks of words whose frequency falls with the square of their rank; the plan's words have the first ranks.

    The plan's words are the most frequent ones even if the last block is incomplete: the rarest of them occurs 5 times
    in the plan and 6 times in each complete block, any other word at most 3 times per block.
    """
    top = [word for word, _ in Counter(texts).most_common(len(FREQUENT))]
    vocabulary = [*top, *islice(invented(rng, set(top)), len(_BLOCK) - len(top))]
    block = [word for word, times in zip(vocabulary, _BLOCK, strict=True) for _ in range(times)]
    while True:
        rng.shuffle(block)
        yield from block


FILLER: dict[str, Callable[[random.Random, Sequence[str]], Iterator[str]]] = {
    "niah_repeat": _noise,
    "niah_needles": _needles,
    "niah_uuid_needles": _uuids,
    "frequent_words": _coded,
}


# ----------------------------------------------------------------------------------------------------
# Questions on documents from local files

QA = {"qa_squad": "squad.json", "qa_hotpot": "hotpotqa.json"}
"""file of each task"""


def draw_qa(dataset: Mapping[str, Any], task: str, rng: random.Random, depth: float, number: int, length: int) -> Drawn:
    """Return question ``number`` of the file; the document must contain its passages and may contain others.

    Raises:
        UserError: the file does not exist, has another form, or has fewer questions.
    """
    path = dataset.get("path")
    if path is None:
        raise UserError(f"dataset.path: {task} needs the file {QA[task]} or its folder")
    file = Path(path) / QA[task] if Path(path).is_dir() else Path(path)
    questions, documents = _read(str(file), task)
    if number >= len(questions):
        raise UserError(f"dataset.n_per_length: {file} has {len(questions)} questions; give at most that")
    question, answers, needed = questions[number]
    plan: Plan = [(cut(depth if i == 0 else rng.random()), documents[own]) for i, own in enumerate(needed)]
    rest = [i for i in range(len(documents)) if i not in set(needed)]
    rng.shuffle(rest)
    wanted = _CHARACTERS * length
    for other in rest:
        if wanted <= 0:
            break
        plan.append((None, documents[other]))
        wanted -= len(documents[other])
    return question, answers, plan, {"depths": [cut(depth)]}


@cache
def _read(path: str, task: str) -> tuple[list[tuple[str, list[str], list[int]]], list[str]]:
    """Return the questions with their answers and document indices, and the documents as single lines."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"dataset.path: there is no file {file}; {task} reads {QA[task]}")
    value = parse_json(decode(file.read_bytes(), path), path)
    try:
        found = list(_squad(value) if task == "qa_squad" else _hotpot(value))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not of the form of {QA[task]} ({type(error).__name__}: {error})") from None
    if not found:
        raise UserError(f"{file} has no question that can be answered")
    texts = sorted({text for _, _, own in found for text in own})
    places = {text: number for number, text in enumerate(texts)}
    questions = [(q, answers, list(dict.fromkeys(places[text] for text in own))) for q, answers, own in found]
    order = random.Random(0).sample(range(len(questions)), len(questions))
    return [questions[i] for i in order], [f"Document: {text}" for text in texts]


def _squad(value: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    for article in value["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if not asked.get("is_impossible") and answers:
                    yield _line(asked["question"]), answers, [_line(paragraph["context"])]


def _hotpot(value: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    for asked in value:
        yield _line(asked["question"]), [asked["answer"]], [_line(f"{t} {''.join(p)}") for t, p in asked["context"]]


def _line(text: str) -> str:
    return " ".join(text.split())
