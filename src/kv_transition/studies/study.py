"""The interface of a study for the command line, the checks, the plan and the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition import parsing
from kv_transition.errors import UserError
from kv_transition.provenance import digest

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def _nothing_to_check(settings: Settings) -> None:
    pass


def _no_statistics(settings: Settings) -> frozenset[str]:
    return frozenset()


def _no_work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    return Work()


@dataclass(frozen=True)
class Study:
    """The description of a study. Its rules are in ``workflow/rules/{name}.smk``, its report sections in its module
    ``report``.
    """

    name: str
    there: Callable[[Settings], bool]
    """returns whether an experiment includes the study"""
    lacking: str
    """error message of the command line for an experiment without the study"""
    rules: Mapping[str, tuple[str, ...]]
    """the last rules of each command of the command line (prepare, run, score, ...)"""
    command: str | None = None
    """the study's own command, which is also in ``rules``; None: it has none"""
    help: str = ""
    check: Callable[[Settings], None] = _nothing_to_check
    """raises UserError if keys contradict each other or name something that does not exist"""
    statistics: Callable[[Settings], frozenset[str]] = _no_statistics
    """attention statistics that the study reads in addition to those of the policies"""
    work: Callable[[Settings, Mapping[str, float]], Work] = _no_work
    """returns its jobs that run a model, for `plan`; its argument: the measured mean answer length by task"""


CELL_FILE, CELL_ROW = 12_000, 300
"""estimated bytes of a results file and of each of its rows, used until one exists"""
OBSERVED_ROW = 40


NO_ROWS = "no rows"
"""used instead of a hash: a bin without examples has no answers, so its file cannot be outdated"""


@dataclass(frozen=True)
class Job:
    """One job that runs a model: its output, its hash and its amount of work."""

    path: str
    expected: str | None
    """hash that its rows must have; None: only the existence of the file is checked"""
    sequences: int
    read_tokens: int
    answer_tokens: float
    rows: int
    row_bytes: int = CELL_ROW


@dataclass(frozen=True)
class Item:
    """All jobs of one kind."""

    name: str
    unit: str
    jobs: tuple[Job, ...]
    hash_column: str | None = None

    @cached_property
    def state(self) -> dict[str, list[Job]]:
        """The jobs by the state of their files: done, outdated, missing."""
        found: dict[str, list[Job]] = {"done": [], "outdated": [], "missing": []}
        for job in self.jobs:
            found[self._look(job)].append(job)
        return found

    def _look(self, job: Job) -> str:
        path = Path(job.path)
        if not path.is_file():
            return "missing"
        if job.expected is None or self.hash_column is None:
            return "done"
        return "done" if _hash(path, self.hash_column) in (job.expected, NO_ROWS) else "outdated"

    @property
    def left(self) -> list[Job]:
        return self.state["missing"] + self.state["outdated"]

    def seconds(self, jobs: list[Job], speed: Any, loads: int) -> float:
        """Return the estimated seconds of these jobs, for which the model is loaded ``loads`` times."""
        work = sum(job.read_tokens * speed.read_s + job.answer_tokens * speed.answer_s for job in jobs)
        return loads * speed.start_s + work

    def bytes(self, jobs: list[Job]) -> int:
        """Return the estimated bytes of the files of these jobs; sizes of existing files are used for missing ones."""
        there = [Path(job.path).stat().st_size for job in self.state["done"]]
        each = sum(there) / len(there) if there else None
        return int(sum(CELL_FILE + job.rows * job.row_bytes if each is None else each for job in jobs))


def _hash(path: Path, column: str) -> str | None:
    """Return the hash in the rows of a results file or in a prefill index; None if it cannot be read."""
    try:
        if path.suffix == ".json":
            index = parsing.read_json(path)
            return digest({key: index.get(key) for key in ("code", "model")}) if isinstance(index, dict) else None
        found = parsing.read_parquet(path, partitioning=None)
    except UserError:
        return None  # a damaged file is written again
    if column not in found.column_names:
        return None
    return found[column][0].as_py() if found.num_rows else NO_ROWS


@dataclass(frozen=True)
class Work:
    """The jobs of a study that run a model, the tokens of each stored prefill, and notes."""

    items: tuple[Item, ...] = ()
    documents: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def rows_in(path: str) -> int | None:
    """Return the number of rows of a Parquet file; None if it does not exist."""
    if not Path(path).is_file():
        return None
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows
