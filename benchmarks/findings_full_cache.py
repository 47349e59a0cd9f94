"""The section of docs/findings.md on what the model can do with its full cache, by task and length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import findings_figures as figures
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, picture, there

LENGTHS = (512, 1024, 2048, 4096, 7800)
"""lengths of the prompts in tokens; a prompt is a little longer, or shorter"""

OWN = ("lengths", "lengths_later", "one_hop", "transition", "transition_long", "transition_tasks")
"""kept runs on this project's tasks; lengths_later has cells of the experiment of lengths that ran at a later commit"""

ENOUGH = 0.5
"""mean score of a task that can show what eviction costs"""


def full_cache() -> list[str]:
    """What the model can do before anything is evicted."""
    own = _scores(_nearest, *there(*OWN))
    given = _scores(_span, *there("longbench"))
    tables = _matrix("real_full_cache", "this project's tasks", own)
    if given:
        tables += _matrix("real_longbench", "records of LongBench", given)
    both = own | given
    tasks = list(dict.fromkeys(task for task, _ in both))
    shown = _where(both, lambda row: row["ci_low"] >= ENOUGH)
    maybe = _where(both, lambda row: row["ci_low"] < ENOUGH <= row["ci_high"])
    never = [task for task in tasks if task not in shown and task not in maybe]
    lines = [
        "## What can the model do at all?",
        "",
        f"It does {_listed(shown)}: there the interval of the mean score lies at {ENOUGH} or above. Only a task that "
        "the model can do shows what eviction costs.",
        "",
        f"- Undecided (the interval includes {ENOUGH}): {_listed(maybe)}.",
        f"- Below {ENOUGH} at every length that was run, with the whole interval: {_names(never)}.",
        *tables,
        "",
        "`one_hop`: questions of HotpotQA with the one paragraph that holds the answer among distractors (F1); "
        "`key_value`: copying a number from a list (F1). `niah_*` and the others of the first table are this project's "
        "ruler tasks; lengths are those of the text, to which the question and the chat template add about 30 tokens. "
        "Scores with n = 60 are of the grids below, whose tasks were chosen by their scores at n = 10."
        + (" The second table has a part of LongBench's records, hence not LongBench's score; prompts beyond 8,000 "
           "tokens lose their middle, as in LongBench." if given else ""),
    ]  # fmt: skip
    return lines + ending(
        "with so few examples, any difference that the intervals do not show; cells without a number, which were not "
        "run; lengths beyond those of the tables (the model has 8,192 positions).",
        *there(*OWN, "longbench"),
    )


Scores = dict[tuple[str, str], Row]


def _scores(place: Callable[[Row], str], *names: str) -> Scores:
    """Return the full cache's mean score by task and length; of several runs that with the most examples."""
    found: Scores = {}
    for name in names:
        rows = kept(name, "bin_stats").filter(policy="full", statistic="score_mean", mode="after_prompt")
        for row in rows.sort("task", "bin").to_dicts():
            key = (row["task"], place(row))
            found[key] = max(row, found.get(key, row), key=lambda r: r["n"])
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[1]["token_min"])))


def _nearest(row: Row) -> str:
    return f"{min(LENGTHS, key=lambda length: abs(length - row['token_max'])):,} tokens"


def _span(row: Row) -> str:
    bounds = [bound for bound in (4200, 8000) if row["token_max"] <= bound]
    return f"to {bounds[0]:,} tokens" if bounds else "longer, cut"


def _matrix(image: str, what: str, scores: Scores) -> list[str]:
    """Return a picture and a table of the scores, a row a task and a column a length."""
    places = list(dict.fromkeys(where for _, where in sorted(scores, key=lambda key: scores[key]["token_min"])))
    tasks = list(dict.fromkeys(task for task, _ in scores))
    figures.dots(
        [row | {"place": where, "low": row["ci_low"], "high": row["ci_high"]} for (_, where), row in scores.items()],
        "task", "estimate", group="place", groups=places, title="mean score, 95 % interval", reference=ENOUGH,
        head=("What the model can do with its full cache", f"SmolLM2-135M-Instruct, nothing evicted; {what}"),
        output=IMAGES / f"{image}.svg",
    )  # fmt: skip
    return [
        *picture(image, f"mean score of the full cache by task and length: {what}"),
        table(
            ["task", *places],
            [[task, *(_counted(scores.get((task, where))) for where in places)] for task in tasks],
        ),
    ]  # fmt: skip


def _counted(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{interval(row['estimate'], row['ci_low'], row['ci_high'], 2)}, n = {row['n']}"


def _where(scores: Scores, holds: Callable[[Row], bool]) -> dict[str, str]:
    """Return the tasks of which it holds at some length, and at which."""
    found: dict[str, list[str]] = {}
    for (task, where), row in scores.items():
        if holds(row):
            found.setdefault(task, []).append(where)
    run = Counter(task for task, _ in scores)
    return {task: "every length" if len(at) == run[task] else "; ".join(at) for task, at in found.items()}


def _listed(found: dict[str, str]) -> str:
    return _names([f"{task} ({at})" for task, at in found.items()])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no task"
