"""Long documents at exact token lengths for any tokenizer: needles, variables and word counts.

The tasks follow RULER (Hsieh et al. 2024, arXiv 2404.06654). The wording, the filler and the words are this project's
own, and so are some choices: names and counted words are invented, the filler is random prose, variable_tracking always
has a second chain that must be distinguished, and common_words fits into a thousand tokens (5 words with 12 occurrences
among others with at most 3, instead of 10 with 30). Scores therefore cannot be compared with RULER's.

An example is created in two steps, because its length depends on the model's tokenizer:

- `load` draws question, answers and *plan*: the texts that the document must contain, one per line, as depth, tab,
  text. A depth in [0, 1) is the share of the filler that comes before the text.
- `write` turns the plan into the document, with as much filler as gives the prompt the requested length.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from kv_transition.data import ruler_more
from kv_transition.data.records import Record
from kv_transition.data.ruler_words import cut as _cut
from kv_transition.data.ruler_words import invented as _invented
from kv_transition.data.ruler_words import numbers as _numbers
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError

N_KEYS = 4
N_VALUES = 4
N_HOPS = 4
N_CHAINS = 2
N_COMMON = 5
COMMON_TIMES = 12
RARE_TIMES = 3

_RARE_WORDS_AT_ONCE = 40

_SPARE_UNITS = 64
_ATTEMPTS = 12
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_MAY = "-"
"""instead of a depth: an optional text; optional texts are added in this order while there is space"""

Plan = list[tuple[float, str]]
"""Depth and text of everything that a document must contain, in the order of depth."""


def load(dataset: Mapping[str, Any], task: str) -> Iterator[Record]:
    """Yield the examples of ``task``; their context is a plan, see `write`.

    Example i of a length depends only on task, seed, length and i, so that a larger ``n_per_length`` extends the list.
    The needles that are asked for are at depths that cover the document evenly for any number of examples.

    Raises:
        UserError: there is no such task, lengths or n_per_length are missing, or the split is not test.
    """
    get_task("ruler", task)
    for key in ("lengths", "n_per_length"):
        if not dataset.get(key):
            raise UserError(f"dataset.{key}: the ruler data set needs this key")
    if dataset.get("split", "test") != "test":
        raise UserError(f"dataset.split: ruler only has the split test, not {dataset['split']!r}")
    for length in dataset["lengths"]:
        series = f"{task}-{dataset.get('seed', 0)}-{length}"
        start = random.Random(series).random()
        for i in range(dataset["n_per_length"]):
            name = f"{series}-{i:05d}"
            # every prefix of the multiples of the golden ratio covers [0, 1) nearly evenly
            depth = (start + i * _GOLDEN_RATIO) % 1
            rng = random.Random(name)
            if task in ruler_more.QA:
                question, answers, plan, meta = ruler_more.draw_qa(dataset, task, rng, depth, i, length)
            else:
                question, answers, plan, meta = _DRAW[task](rng, depth)
            must = sorted(((at, text) for at, text in plan if at is not None), key=lambda item: item[0])
            lines = [f"{at:.4f}\t{text}" for at, text in must]
            lines += [f"{_MAY}\t{text}" for at, text in plan if at is None]
            record = {
                "example_id": name,
                "question": question,
                "context": "\n".join(lines),
                "answers": answers,
                "all_classes": None,
                "meta": {"length": length, **meta},
            }
            yield f"{task}, example {name}", record


def write(task: str, example_id: str, plan: str, length: int, measure: Callable[[str], int]) -> str:
    """Return the document of an example: the plan's texts among filler, each at its depth.

    The prompt has exactly ``length`` tokens if a combination of filler units adds up to that; otherwise it is shorter
    by as few tokens as possible. It was exact with every tokenizer that was tried, unless there is space for hardly any
    filler.

    Args:
        task: name of the task.
        example_id: the seed of the filler.
        plan: a ``context`` of `load`.
        length: number of tokens of the prompt.
        measure: returns the tokens of the whole prompt with the given document, special tokens and question included.

    Raises:
        UserError: the prompt is longer than ``length`` without any filler.
    """
    lines = [(depth, text) for depth, _, text in (line.partition("\t") for line in plan.split("\n"))]
    fixed = [(float(depth), text) for depth, text in lines if depth != _MAY]
    least = measure(_lay_out(fixed, []))
    if least > length:
        raise UserError(
            f"dataset.lengths: {length} tokens are too few for {task}, whose prompt takes {least} before any filler "
            "with this tokenizer; give lengths well above that"
        )
    if may := [text for depth, text in lines if depth == _MAY]:
        there = bisect_right(range(len(may) + 1), length, key=lambda n: measure(_lay_out(fixed, may[:n]))) - 1
        if there < len(may):
            return _lay_out(fixed, may[:there])
        # all optional texts fit; plain sentences fill the rest
        fixed = sorted([*fixed, *(((i + 0.5) / there, text) for i, text in enumerate(may))], key=lambda item: item[0])
    rng = random.Random(f"{example_id} filler")
    filler = _filler(task, rng, [text for _, text in fixed])
    spare = list(islice(filler, _SPARE_UNITS))
    cost = _costs(spare, measure)
    mean = fmean(cost)
    units: list[str] = []

    def room(n: int, tail: Sequence[str] = ()) -> int:
        """Return the number of tokens that are missing with the first ``n`` units of filler and ``tail`` after them."""
        units.extend(islice(filler, max(0, n - len(units))))
        return length - measure(_lay_out(fixed, [*units[:n], *tail]))

    # Take slightly too few units; then search the remaining ones for a set that fills the rest exactly.
    n, left = 0, length - least
    while (left < 2 * mean and n > 0) or left > 8 * mean:
        n = max(0, n + round(left / mean) - 4)
        left = room(n)

    best, best_left, wanted = units[:n], left, left
    for _ in range(_ATTEMPTS):
        tail = [spare[i] for i in _subset(cost, wanted)]
        left = room(n, tail)
        if 0 <= left < best_left:
            best, best_left = [*units[:n], *tail], left
        if left == 0:
            break
        # tokens may merge across units, so that the counts of the parts do not add up exactly
        wanted += left
        spare, cost = spare[1:] + spare[:1], cost[1:] + cost[:1]
    return _lay_out(fixed, best)


def _filler(task: str, rng: random.Random, texts: Sequence[str]) -> Iterator[str]:
    if task in ruler_more.FILLER:
        return ruler_more.FILLER[task](rng, texts)
    return words(rng, set(texts)) if task == "common_words" else sentences(rng)


def _lay_out(fixed: Plan, filler: Sequence[str]) -> str:
    """Return the document; a text of depth d follows floor(d (n + 1)) of the n units of filler."""
    places = [math.floor(depth * (len(filler) + 1)) for depth, _ in fixed]
    parts: list[str] = []
    done = 0
    for place, (_, text) in zip(places, fixed, strict=True):
        parts += [*filler[done:place], text]
        done = place
    return " ".join([*parts, *filler[done:]])


def _costs(units: Sequence[str], measure: Callable[[str], int]) -> list[int]:
    """Return the number of tokens that each unit adds after another one."""
    before = measure(units[0])
    return [measure(f"{units[0]} {unit}") - before for unit in units]


def _subset(cost: Sequence[int], wanted: int) -> tuple[int, ...]:
    """Return costs whose sum is ``wanted`` or slightly less (subset sum by dynamic programming)."""
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for i, price in enumerate(cost):
        new = {total + price: (*chosen, i) for total, chosen in reached.items() if total + price <= wanted}
        reached = new | reached
        if wanted in reached:
            break
    return reached[max(reached)]


# ----------------------------------------------------------------------------------------------------
# Filler


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield plain sentences of 4 to 37 words, without names, digits or anything that a task asks about."""
    while True:
        parts = [rng.choice(_PEOPLE), rng.choice(_DEEDS)]
        if rng.random() < 0.5:
            parts.insert(0, f"{rng.choice(_TIMES)},")
        if rng.random() < 0.6:
            parts.append(rng.choice(_PLACES))
        if rng.random() < 0.4:
            parts.append(rng.choice(_CIRCUMSTANCES))
        sentence = " ".join(parts)
        yield f"{sentence[0].upper()}{sentence[1:]}."


def words(rng: random.Random, others: set[str]) -> Iterator[str]:
    """Yield invented words that are not in ``others``, each at most RARE_TIMES times."""
    fresh = _invented(rng, others)
    while True:
        block = list(islice(fresh, _RARE_WORDS_AT_ONCE)) * RARE_TIMES
        rng.shuffle(block)
        yield from block


_TIMES = (
    "at dawn",
    "after the rain",
    "before supper",
    "late in autumn",
    "on market days",
    "towards evening",
    "when the bells had stopped",
    "in the first warm week of spring",
    "on the way home",
    "during the long frost",
    "every other week",
    "once the guests were gone",
    "as soon as the ice had melted",
    "around noon",
    "in those years",
    "while the fog still lay on the fields",
)
_PEOPLE = (
    "the miller",
    "a tired ferryman",
    "the schoolteacher",
    "two carpenters",
    "the baker and his sister",
    "an old shepherd",
    "the children",
    "a travelling clockmaker",
    "the night watch",
    "some of the neighbours",
    "the gardener",
    "her uncle",
    "the youngest apprentice",
    "a group of students",
    "the innkeeper",
    "the man with the grey hat",
    "three fishermen",
    "the organist",
    "a stranger",
    "the women from the laundry",
)
_DEEDS = (
    "mended the fence",
    "carried water",
    "sang an old song",
    "counted the sheep twice",
    "waited for the coach",
    "painted the shutters green",
    "told a story that nobody believed",
    "sharpened the scythes",
    "baked bread with caraway",
    "sat down and said nothing",
    "looked for the lost umbrella",
    "swept the yard",
    "hung the nets up to dry",
    "argued about the weather",
    "played cards",
    "gathered plums and a few late pears",
    "wrote a letter and then burned it",
    "watched the clouds",
    "lit a small fire",
    "repaired the roof of the barn",
    "learned to walk on stilts",
    "brewed strong coffee for everybody",
    "fed the geese",
    "moved the heavy oak table",
)
_PLACES = (
    "behind the chapel",
    "along the harbour wall",
    "in the kitchen",
    "near the bridge",
    "at the edge of the forest",
    "under the chestnut trees",
    "by the well",
    "between the two orchards",
    "on the north side of the hill",
    "in front of the post office",
    "upstairs",
    "across the river",
    "in the shade of the tower",
    "outside the gate",
    "at the far end of the village",
    "next to the stables",
)
_CIRCUMSTANCES = (
    "because the wind had turned",
    "while the kettle boiled",
    "although it was getting cold",
    "without a word of thanks",
    "as their parents had done",
    "and nobody asked why",
    "until the lamps were lit",
    "for the sake of peace",
    "in spite of the noise from the street",
    "so that there would be enough for the winter",
    "with great patience",
    "as if there were no hurry at all",
)


# ----------------------------------------------------------------------------------------------------
# The tasks: question, answers, plan and ``meta``

Drawn = tuple[str, list[str], Plan, dict[str, Any]]


def _niah_single(rng: random.Random, depth: float) -> Drawn:
    return _needles(rng, depth, 1)


def _niah_multikey(rng: random.Random, depth: float) -> Drawn:
    return _needles(rng, depth, N_KEYS)


def _needles(rng: random.Random, depth: float, n_keys: int) -> Drawn:
    """Return codes of several names at random depths; the first name is asked for, and its code is at ``depth``."""
    names = list(islice(_invented(rng), n_keys))
    codes = _numbers(rng, n_keys, 7)
    depths = [_cut(depth), *(_cut(rng.random()) for _ in names[1:])]
    plan = [(at, f"The locker code of {name} is {code}.") for at, name, code in zip(depths, names, codes, strict=True)]
    return f"What is the locker code of {names[0]}?", codes[:1], plan, {"depths": depths[:1]}


def _niah_multivalue(rng: random.Random, depth: float) -> Drawn:
    """Return several codes of one name, a quarter of the document apart."""
    name = next(_invented(rng))
    codes = _numbers(rng, N_VALUES, 7)
    depths = sorted(_cut((depth + j / N_VALUES) % 1) for j in range(N_VALUES))
    plan = [(at, f"One locker code of {name} is {code}.") for at, code in zip(depths, codes, strict=True)]
    return f"What are all the locker codes of {name}?", codes, plan, {"depths": depths}


def _variable_tracking(rng: random.Random, depth: float) -> Drawn:
    """Return chains of variables, each with the value of the previous one; the first chain is asked for."""
    names = list(islice(_invented(rng), N_CHAINS * (N_HOPS + 1)))
    values = _numbers(rng, N_CHAINS, 5)
    plan: Plan = []
    chains = [names[i::N_CHAINS] for i in range(N_CHAINS)]
    for i, (chain, value) in enumerate(zip(chains, values, strict=True)):
        # the first statement may be at any depth; the others come after it
        first = depth / 2 if i == 0 else rng.random() / 2
        depths = [_cut(first), *sorted(_cut(rng.uniform(first, 1)) for _ in chain[1:])]
        sources = [value, *(f"variable {name}" for name in chain)]
        plan += [
            (at, f"Variable {name} is set to {source}.")
            for at, name, source in zip(depths, chain, sources[:-1], strict=True)
        ]
        if i == 0:
            meta = {"depths": depths}
    return f"Which variables have the value {values[0]}?", chains[0], plan, meta


def _common_words(rng: random.Random, depth: float) -> Drawn:
    """Return a list of words in which a few occur far more often than all others."""
    common = list(islice(_invented(rng), N_COMMON))
    plan = [(_cut(rng.random()), word) for word in common for _ in range(COMMON_TIMES)]
    return "Which five words stand in the list most often?", common, plan, {}


_DRAW: dict[str, Callable[[random.Random, float], Drawn]] = {
    "niah_single": _niah_single,
    "niah_multikey": _niah_multikey,
    "niah_multivalue": _niah_multivalue,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
} | ruler_more.DRAW
