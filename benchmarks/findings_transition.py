"""The sections of docs/findings.md on the grid: ten policies by budget and mode, on a needle by length, and by task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import findings_figures as figures
import polars as pl
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, listed, picture, there

from kv_transition import labels

RUNS = ("transition", "transition_long")
"""kept runs of the same grid on the needle, in the order of their lengths"""

TASKS = "transition_tasks"
"""the kept run of the grid on other tasks"""

Key = tuple[str, str, str, str]
"""mode, policy, budget and place (a length or a task)"""


@dataclass(frozen=True)
class Grid:
    """The estimates of a grid by cell."""

    unit: str
    """what a place is: length, task"""
    places: list[str]
    score: dict[Key, Row]
    failures: dict[Key, Row]
    footprint: dict[Key, Row]

    @property
    def cells(self) -> list[Key]:
        """Return the cells in which something was evicted."""
        return [key for key in self.score if key[1] != "full" and self.footprint[key]["estimate"] < 1]

    @property
    def modes(self) -> list[str]:
        return sorted({mode for mode, *_ in self.cells})

    @property
    def n(self) -> int:
        return min(row["n"] for row in self.score.values())

    def at(self, mode: str, place: str) -> list[Key]:
        return [key for key in self.cells if (key[0], key[3]) == (mode, place)]

    def full(self, key: Key) -> Key:
        return (key[0], "full", "r1", key[3])

    def below(self, key: Key) -> bool:
        """Return whether the score's interval lies below the full cache's."""
        return self.score[key]["ci_high"] < self.score[self.full(key)]["ci_low"]

    def broken(self, key: Key) -> bool:
        """Return whether the interval of the failure rate lies above the full cache's."""
        return self.failures[key]["ci_low"] > self.failures[self.full(key)]["ci_high"]


def transition() -> list[str]:
    """Where answers break under eviction, and which policy holds longest."""
    grid = _needle()
    lines = [
        "## Where does the answer break, and which policy holds longest?",
        "",
        *_body(grid, _answers(*RUNS), "real_transition", "niah_single"),
        "",
        "By the definition of docs/statistics.md: "
        + ", ".join(f"{count} {outcome}" for outcome, count in _outcomes().most_common())
        + " (policy, budget and mode over the first two lengths).",
    ]
    return lines + ending(
        "longer answers than 24 tokens; other tasks, models and lengths; with so few lengths a zone is located along "
        "budgets, not along lengths. Policies are compared at equal budgets; the figures' axis is what they really "
        "held.",
        *there(*RUNS),
    )


def transition_tasks() -> list[str]:
    """Whether the same holds on other tasks."""
    stats = kept(TASKS, "bin_stats")
    tasks = {task: task for task in stats["task"].unique().sort().to_list()}
    grid = _grid(stats, "task", tasks, "task")
    longest = max(row["token_max"] for row in grid.score.values())
    lines = [
        "## Is it the same on other tasks?",
        "",
        _other_tasks(_needle(), grid),
        "",
        *_body(grid, _answers(TASKS), "real_tasks", f"up to {longest} tokens"),
    ]
    return lines + ending(
        "other tasks, longer prompts, fixed budgets in tokens, other models. Answers have at most 64 tokens here, on "
        "the needle 24.",
        TASKS,
    )


def _needle() -> Grid:
    stats = pl.concat([kept(name, "bin_stats") for name in there(*RUNS)])
    lengths = {n: f"{n:,} tokens" for n in stats["token_max"].unique().sort()}
    return _grid(stats, "length", lengths, "token_max")


def _grid(stats: pl.DataFrame, unit: str, names: dict[int, str] | dict[str, str], column: str) -> Grid:
    """Return the grid whose places are the values of a column, in the order of ``names``."""
    by_statistic = {
        statistic: {
            (r["mode"], r["policy"], r["budget"], names[r[column]]): r
            for r in stats.filter(statistic=statistic).to_dicts()
        }
        for statistic in ("score_mean", "failure_rate", "footprint")
    }
    return Grid(unit, list(names.values()), *by_statistic.values())


def _body(grid: Grid, answers: pl.DataFrame, image: str, subtitle: str) -> list[str]:
    """Return the answer, the figures and the tables of a grid. answers: single answers with their kind of failure."""
    cells, below = grid.cells, [key for key in grid.cells if grid.below(key)]
    broken = [key for key in cells if grid.broken(key)]
    early = [key for key in broken if key not in below]
    order = "rise before the mean falls" if early else "do not rise before the mean falls"
    held = [key for key in cells if key not in below]
    pictures, tables = [], []
    for mode in grid.modes:
        pictures += _picture(grid, mode, image, subtitle)
        for place in grid.places:
            tables += _table(grid, mode, place)
    return [
        f"Of {len(cells)} cells (policy, budget, mode, {grid.unit}) {len(below)} are below the full cache's score, "
        f"their intervals apart. {_leaders(grid)}",
        "",
        f"Failures {order}: their rate is above the full cache's, intervals apart, in {len(broken)} cells, in "
        f"{len(early)} of these while the mean is not below. {_failures(answers)}",
        *pictures,
        "",
        f"The {len(held)} cells whose interval is not below the full cache's (a cell in which a budget of tokens "
        "evicts nothing is not counted, and has a dash below):",
        "",
        _held(grid, held),
        *tables,
    ]


def _picture(grid: Grid, mode: str, image: str, subtitle: str) -> list[str]:
    """Draw score over what is kept, a panel for each place, and return the line that shows it."""
    rows = [
        {"kept": 100 * grid.footprint[key]["estimate"], "score": row["estimate"], "low": row["ci_low"],
         "high": row["ci_high"], "policy": key[1], "place": key[3]}
        for key in grid.cells if key[0] == mode for row in [grid.score[key]]
    ]  # fmt: skip
    best = {policy: max(r["score"] for r in rows if r["policy"] == policy) for policy in {r["policy"] for r in rows}}
    rows.sort(key=lambda r: (-best[r["policy"]], r["policy"], grid.places.index(r["place"])))
    figures.lines(
        rows, "kept", "score", "policy", titles=("% of the full cache's bytes, mean over the answer", "mean score"),
        head=(f"Scores, compressed {labels.mode(mode)}",
              f"SmolLM2-135M-Instruct, {subtitle}, n = {grid.n} a point, 95 % intervals"),
        output=IMAGES / f"{image}_{mode}.svg", panel="place", panels=grid.places,
    )  # fmt: skip
    return picture(f"{image}_{mode}", f"score by share kept, {labels.mode(mode)}, by {grid.unit}")[:-1]


def _table(grid: Grid, mode: str, place: str) -> list[str]:
    own = grid.at(mode, place)
    budgets = sorted({key[2] for key in own}, key=labels.budget_order)
    full = grid.score[mode, "full", "r1", place]
    return [
        "",
        f"Mean score, compressed {labels.mode(mode)}, {place}, n = {grid.n}; full cache {_cell(full)}:",
        "",
        table(
            ["policy", *(f"{labels.budget(b)} kept" for b in budgets)],
            [[p, *(_cell(grid.score.get((mode, p, b, place))) for b in budgets)] for p in sorted({k[1] for k in own})],
        ),
    ]


def _cell(row: Row | None) -> str:
    return "–" if row is None else interval(row["estimate"], row["ci_low"], row["ci_high"], 2)


def _first(grid: Grid) -> dict[tuple[str, str, str], str]:
    """Return by mode, budget and place the policy whose interval is above that of every other; none: no entry."""
    found = {}
    # in one order, because policies with as many settings are named in it
    for mode, budget, place in sorted({(mode, budget, place) for mode, _, budget, place in grid.cells}):
        own = {key[1]: grid.score[key] for key in grid.at(mode, place) if key[2] == budget}
        ranked = sorted(own, key=lambda policy, own=own: -own[policy]["estimate"])
        if len(ranked) > 1 and own[ranked[0]]["ci_low"] > max(own[policy]["ci_high"] for policy in ranked[1:]):
            found[mode, budget, place] = ranked[0]
    return found


def _leaders(grid: Grid) -> str:
    """Return which policies are best, where their interval is above that of every other."""
    settings = {(mode, budget, place) for mode, _, budget, place in grid.cells}
    found = Counter((policy, mode) for (mode, *_), policy in _first(grid).items())
    what = f"(mode, budget, {grid.unit})"
    if not found:
        return f"In none of {len(settings)} settings {what} is one policy's interval above all others'."
    each = ", ".join(f"{policy} {labels.mode(mode)} in {n}" for (policy, mode), n in found.most_common())
    return f"One policy's interval is above all others' in {found.total()} of {len(settings)} settings {what}: {each}."


def _other_tasks(needle: Grid, tasks: Grid) -> str:
    """Return on which tasks some policy holds, and on which tasks the needle's leaders are behind another policy."""
    held = {key[3] for key in tasks.cells if not tasks.below(key)}
    holding = [task for task in tasks.places if task in held]
    never = [task for task in tasks.places if task not in held]
    parts = [f"on {listed(never)} no policy holds at any budget"] if never else []
    parts += [f"on {listed(holding)} some do"] if holding else []
    answer = "No" if never else "Yes"
    behind = []
    for mode in tasks.modes:
        leaders = Counter(policy for (own, *_), policy in _first(needle).items() if own == mode).most_common(1)
        for leader, _ in leaders:
            places = [place for place in tasks.places if _is_behind(tasks, (mode, leader, "r0.5", place))]
            behind.append(f"{leader} ({labels.mode(mode)}) on {listed(places) or 'none'}")
    return (
        f"{answer}: {'; '.join(parts)}. The policies that lead on the needle, over all its lengths and budgets, are "
        f"below another one at 50 %, their intervals apart: {'; '.join(behind)}."
    )


def _is_behind(grid: Grid, cell: Key) -> bool:
    """Return whether another policy's interval lies above that of a cell, at the same budget."""
    mode, _, budget, place = cell
    others = [key for key in grid.at(mode, place) if key[2] == budget]
    return max(grid.score[key]["ci_low"] for key in others) > grid.score[cell]["ci_high"]


def _answers(*names: str) -> pl.DataFrame:
    return pl.concat([kept(name, "answers") for name in there(*names)])


def _failures(answers: pl.DataFrame) -> str:
    """Return the kinds of failure by their number, and how many failed answers are not wrong."""
    failed = answers.filter(~pl.col("alias"), pl.col("failure").is_not_null())
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in Counter(failed["failure"]).most_common())
    right = failed.filter(pl.col("score") > 0).height
    return (
        f"A failure is an answer of a certain kind (docs/scoring.md), here {kinds}. Of these {failed.height:,} answers "
        f"{right:,} score above 0: nearly every failure is also a wrong answer, so failures can hardly rise first here."
    )


def _held(grid: Grid, cells: list[Key]) -> str:
    """Return a table of the policies of the cells by mode, place and budget."""
    policies: dict[tuple[str, str, str], list[str]] = {}
    order = {place: i for i, place in enumerate(grid.places)}
    for mode, policy, budget, place in sorted(
        cells, key=lambda k: (k[0], order[k[3]], labels.budget_order(k[2]), k[1])
    ):
        policies.setdefault((mode, place, budget), []).append(policy)
    rows = [
        [labels.mode(mode), place, labels.budget(budget), ", ".join(names)]
        for (mode, place, budget), names in policies.items()
    ]
    return table(["compressed", grid.unit, "kept", "policies"], rows)


def _outcomes() -> Counter[str]:
    found = kept("transition", "transition").filter(detector="definition")
    return Counter(found["outcome"].to_list())
