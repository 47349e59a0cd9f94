"""The error rate of the report's first screen in simulated experiments whose truth is known.

    python benchmarks/first_screen.py [--experiments 200] [--write docs/statistics.md]

Each experiment has a full cache and seven policies at two budgets in four bins, one for each kind of truth: no loss; a
loss of 1 or 2 %; a loss of 6 %, slightly more than the margin of no loss; a moderate loss from the third bin on;
failures that grow; a collapse; chance level. Scores and failures are drawn, the tables are computed, the page is
rendered, and its verdicts are read from the HTML: the word in each cell with where it begins, and the headline. A
sentence is wrong if the truth contradicts it. Exit status 1 if more than 5 % of the sentences of a kind are wrong by
more than chance (a binomial test at 1 %).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from document import put, table
from scipy.stats import binomtest

from kv_transition import labels
from kv_transition.report import page
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.analysis.aggregate import bin_stats, comparisons
from kv_transition.studies.grid.analysis.noninferiority import KEPT
from kv_transition.studies.grid.analysis.transition import transitions
from kv_transition.studies.grid.report import headline, sections
from kv_transition.studies.grid.results import Results
from kv_transition.studies.grid.tables import SCORES

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "first_screen.json"
SIZES = (20, 50, 150)
BAR, LUCK, RESAMPLES = 0.05, 0.01, 100
LENGTHS = (256, 512, 1024, 2048)
BUDGETS = ("r0.5", "r0.2")
FULL_RIGHT, FULL_FAILED = 0.95, 0.02
# by bin: how often a right answer stays right, and how often an answer fails (which loses it)
Truth = tuple[tuple[float, ...], tuple[float, ...]]
NEVER = (0.0,) * 4
Truths = dict[str, tuple[Truth, Truth]]
TRUTHS: Truths = {
    "nothing": (((1.0,) * 4, NEVER), ((1.0,) * 4, NEVER)),
    "little": (((0.99,) * 4, NEVER), ((0.98,) * 4, NEVER)),
    "margin": (((0.94,) * 4, NEVER), ((0.94,) * 4, NEVER)),
    "late": (((1.0, 1.0, 0.85, 0.8), NEVER), ((1.0, 1.0, 0.7, 0.6), NEVER)),
    "failing": (((1.0,) * 4, (0.0, 0.0, 0.1, 0.2)), ((1.0,) * 4, (0.0, 0.1, 0.2, 0.3))),
    "falling": (((1.0, 1.0, 0.9, 0.3), NEVER), ((1.0, 0.8, 0.2, 0.1), NEVER)),
    "chance": (((0.5, 0.4, 0.3, 0.2), NEVER), ((0.1,) * 4, NEVER)),
}
LOSING: Truths = {
    "first": (((0.8,) * 4, NEVER), ((0.7,) * 4, NEVER)),
    "second": (((0.8, 0.75, 0.7, 0.65), NEVER), ((0.7, 0.65, 0.6, 0.5), NEVER)),
    "falling": (((0.8, 0.7, 0.6, 0.3), NEVER), ((0.7, 0.6, 0.2, 0.1), NEVER)),
    "chance": TRUTHS["chance"],
}
WORLDS = {
    "mixed": TRUTHS,
    "all lose": LOSING,
    "one spared": LOSING | {"first": (TRUTHS["nothing"][0], LOSING["first"][1])},
}


@dataclass(frozen=True)
class Known:
    """The true means and failure rates of a policy at a budget, by bin, and those of the full cache."""

    mean: np.ndarray
    failed: np.ndarray
    full_mean: float
    full_failed: float


def known(truth: Truth) -> Known:
    stays, fails = (np.array(part) for part in truth)
    mean = FULL_RIGHT * (1 - FULL_FAILED) * stays * (1 - fails)
    failed = 1 - (1 - FULL_FAILED) * (1 - fails)
    return Known(mean, failed, FULL_RIGHT * (1 - FULL_FAILED), FULL_FAILED)


def simulated(rng: np.random.Generator, n: int, truths: Truths = TRUTHS) -> pa.Table:
    """Return the scores of one experiment: 0 or 1, with the policies on the full cache's examples."""
    columns: dict[str, list] = {name: [] for name in ("policy", "budget", "bin", "example_id", "score", "failure")}

    def add(policy: str, budget: str, b: int, right: np.ndarray, failed: np.ndarray) -> None:
        columns["policy"] += [policy] * n
        columns["budget"] += [budget] * n
        columns["bin"] += [b] * n
        columns["example_id"] += [f"{b}-{i}" for i in range(n)]
        columns["score"] += right.astype(float).tolist()
        columns["failure"] += ["EMPTY_OUTPUT" if lost else None for lost in failed]

    for b in range(len(LENGTHS)):
        failed = rng.random(n) < FULL_FAILED
        right = (rng.random(n) < FULL_RIGHT) & ~failed
        add("full", "r1", b, right, failed)
        for policy, by_budget in truths.items():
            for budget, (stays, fails) in zip(BUDGETS, by_budget, strict=True):
                lost = failed | (rng.random(n) < fails[b])
                add(policy, budget, b, right & (rng.random(n) < stays[b]) & ~lost, lost)
    size = len(columns["bin"])
    tokens = [LENGTHS[b] for b in columns["bin"]]
    share = [1.0 if b == "r1" else float(b[1:]) for b in columns["budget"]]
    rest = {
        "task": ["t"] * size, "mode": ["after_prompt"] * size, "repeat": [0] * size, "token_len": tokens,
        "full_bytes": [1000 * t for t in tokens], "batch_size": [1] * size, "co_running": [True] * size,
        "cache_bytes": [int(1000 * t * s) for t, s in zip(tokens, share, strict=True)], "alias": [False] * size,
    }  # fmt: skip
    empty = [None] * size
    return pa.table({name: (columns | rest).get(name, empty) for name in SCORES.names}, schema=SCORES)


def rendered(scores: pa.Table) -> str:
    """Return the first screen as the report shows it."""
    how = Statistics(resamples=RESAMPLES)
    found = Results(*(pl.from_arrow(t) for t in (scores, *(of(scores, how) for of in (bin_stats, comparisons)))),
                    pl.from_arrow(transitions(scores, how)))  # fmt: skip
    template = page.environment(html=True).get_template("verdict.html.jinja")
    return template.render(verdicts=headline.verdicts(found), states=sections.states())


def read(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the statements of the screen: (policy, budget, words of a cell), and ("", "", headline)."""
    yield "", "", plain(re.search(r'class="answer"><strong>(.*?)</strong>', text, re.DOTALL)[1])
    for line in re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", text, re.DOTALL):
        policy, *cells = re.split(r"<td[^>]*>", line)
        for budget, part in zip(BUDGETS, cells, strict=True):
            words = re.search(r'<span class="holds"><span[^>]*>.</span>(.*?)</span>', part, re.DOTALL)[1]
            yield plain(policy), budget, plain(words)


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\u00a0", " ").split())


def judged(policy: str, budget: str, words: str, truths: Truths = TRUTHS) -> Iterator[tuple[str, bool]]:
    """Yield the kinds of sentence and whether they are right: the word of a cell, and where it begins."""
    word = next(word for word in scale.SCALE if words.startswith(word))
    truth = known(truths[policy][BUDGETS.index(budget)])
    loses = (truth.mean < truth.full_mean - 1e-9) | (truth.failed > truth.full_failed + 1e-9)
    unstable = truth.failed > truth.full_failed + 1e-9
    collapsed = truth.mean < 0.5 * truth.full_mean
    state = {scale.LOSS: loses, scale.UNSTABLE: unstable, scale.COLLAPSED: collapsed}
    if word == scale.NO_LOSS:
        yield word, bool(truth.mean.mean() >= KEPT * truth.full_mean)
    elif word in state:
        yield word, bool(state[word].any())
        if start := re.search(r"from (\S+) tokens", words):
            at = [labels.tokens(length) for length in LENGTHS].index(start[1])
            yield f"{word} from", bool(state[word][at])


def headline_right(text: str, shown: list[tuple[str, str, str]], truths: Truths = TRUTHS) -> tuple[str, bool]:
    """Return the kind of headline and whether it is right."""
    if " enough, with " in text:
        budget, names = re.match(r"(\d+) % of the cache is enough, with (.*)\.", text).groups()
        key = f"r{int(budget) / 100:g}"
        right = all(
            known(truths[name][BUDGETS.index(key)]).mean.mean() >= KEPT * FULL_RIGHT * (1 - FULL_FAILED)
            for name in re.split(r", | and ", names)
        )
        return "headline: enough", right
    if "too few examples" in text:
        return "headline: too few examples", any(words.startswith(scale.UNDECIDED) for *_, words in shown)
    return "headline: a loss for everything", all(
        (known(truths[p][BUDGETS.index(b)]).mean < FULL_RIGHT * (1 - FULL_FAILED)).any() for p, b, _ in shown
    )


def screens(experiments: Iterable[int], n: int) -> tuple[Counter, Counter, Counter]:
    """Sentences said, wrong ones, and words of cells, over experiments (by their number) with n examples a bin."""
    said, wrong, words = Counter(), Counter(), Counter()
    for number, (world, truths) in product(experiments, enumerate(WORLDS.values())):
        seed = [7, n, number, world] if world else [7, n, number]
        (_, _, lead), *cells = read(rendered(simulated(np.random.default_rng(seed), n, truths)))
        found = [pair for cell in cells for pair in judged(*cell, truths)]
        for policy, budget, text in cells if world == 0 else ():
            words[policy, budget, next(word for word in scale.SCALE if text.startswith(word))] += 1
        for kind, right in [*found, headline_right(lead, cells, truths)]:
            said[kind] += 1
            wrong[kind] += not right
    return said, wrong, words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=200, help="of each kind")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="examples a bin; none: what was kept")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    # sizes may be run one after another
    kept, ok = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.is_file() else {}, True
    for n in map(str, arguments.sizes):
        said, wrong, words = screens(range(arguments.experiments), int(n))
        sentences = {kind: {"said": said[kind], "wrong": wrong[kind]} for kind in sorted(said)}
        shown = {"/".join(key): count for key, count in sorted(words.items())}
        kept[n] = {"experiments": arguments.experiments, "sentences": sentences, "mixed": shown}
        for kind, count in said.items():
            ok &= binomtest(wrong[kind], count, BAR, alternative="greater").pvalue >= LUCK
        print(n, kept[n], flush=True)
    kept = dict(sorted(kept.items(), key=lambda item: int(item[0])))
    OUTPUT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    kinds = sorted({kind for of in kept.values() for kind in of["sentences"]})
    lines = [[kind, *(_cell(of["sentences"].get(kind)) for of in kept.values())] for kind in kinds]
    text = table(["sentence", *(f"n = {n} a bin" for n in kept)], lines)
    counts = ", ".join(str(of["experiments"]) for of in kept.values())
    text += f"\n\n{counts} experiments of each kind ({', '.join(WORLDS)})."
    print(text)
    if arguments.write:
        put(arguments.write, "first screen", text)
    return int(not ok)


def _cell(of: dict | None) -> str:
    return "–" if of is None else f"{of['wrong']} of {of['said']} ({100 * of['wrong'] / of['said']:.1f} %)"


if __name__ == "__main__":
    sys.exit(main())
