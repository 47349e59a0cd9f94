"""What an experiment consists of, and how much of it is there: counted from the configuration and from the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kv_transition import specs
from kv_transition.data.tasks import get_task
from kv_transition.paths import Paths
from kv_transition.plan.model_size import ModelSize
from kv_transition.plan.speed import Speed, on_gpu
from kv_transition.provenance import digest
from kv_transition.settings import Settings
from kv_transition.worker.client import workers_wanted

CELL_FILE, CELL_ROW = 12_000, 300
"""bytes of a results file and of each row in it, where there is none to be measured yet"""
OBSERVED_ROW = 40


@dataclass(frozen=True)
class Job:
    """One job that runs a model: what it makes, what makes that, and how much is in it."""

    path: str
    expected: str | None
    """hash that its rows carry; None: the file's being there is all that can be asked"""
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
        """Jobs by what is there: done, outdated, missing."""
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
        return "done" if _hash(path, self.hash_column) == job.expected else "outdated"

    @property
    def left(self) -> list[Job]:
        return self.state["missing"] + self.state["outdated"]

    def seconds(self, jobs: list[Job], speed: Speed, loads: int) -> float:
        """Of these jobs, for which the model is loaded ``loads`` times."""
        work = sum(job.read_tokens * speed.read_s + job.answer_tokens * speed.answer_s for job in jobs)
        return loads * speed.start_s + work

    def bytes(self, jobs: list[Job]) -> int:
        """Of their files: those that are there stand for those that are not."""
        there = [Path(job.path).stat().st_size for job in self.state["done"]]
        each = sum(there) / len(there) if there else None
        return int(sum(CELL_FILE + job.rows * job.row_bytes if each is None else each for job in jobs))


def _hash(path: Path, column: str) -> str | None:
    """What made a results file, as its rows say; of a prefill index, what it says of itself."""
    if path.suffix == ".json":
        index = json.loads(path.read_text(encoding="utf-8"))
        return digest({key: index.get(key) for key in ("code", "model")})
    import pyarrow
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path, columns=[column])[column]
    except (pyarrow.ArrowInvalid, KeyError, OSError):
        return None
    return found[0].as_py() if len(found) else None


@dataclass(frozen=True)
class Work:
    settings: Settings
    items: tuple[Item, ...]
    documents: tuple[int, ...]
    """tokens of each prompt that is read once and stored"""
    notes: tuple[str, ...]

    def store_bytes(self, size: ModelSize) -> int:
        """Of all prefills, were there room; `prefill.max_gb` bounds it."""
        settings = self.settings
        statistics = specs.statistics(settings)
        return sum(size.stored_bytes(tokens, settings.model.dtype, statistics) for tokens in self.documents)


def work(settings: Settings, answer_tokens: dict[str, float] | None = None) -> Work:
    """Count everything; ``answer_tokens``: mean length of answers by task, where it is known."""
    notes: list[str] = []
    items: list[Item] = []
    documents: list[int] = []
    if settings.tasks:
        items += _grid(settings, answer_tokens or {}, documents, notes)
    if settings.perplexity:
        items.append(_perplexity(settings, notes))
    if settings.chat:
        items.append(_chat(settings, notes))
    return Work(settings, tuple(items), tuple(documents), tuple(notes))


def _grid(settings: Settings, measured: dict[str, float], documents: list[int], notes: list[str]) -> list[Item]:
    files = Paths(settings.output.dir, settings.experiment)
    remote = settings.engine.kind == "openai"
    adaptive = settings.adaptive.enabled
    pieces = list(enumerate(settings.adaptive.shards)) if adaptive else [(None, (0, settings.binning.n_per_bin))]
    if adaptive:
        notes.append("adaptive allocation is on: at most this much, and less where a bin is decided early")
    reading, cells, observations = [], [], []
    hashes = {key: digest(specs.cell(settings, *key)) for key in specs.cells(settings)}
    read = digest(specs.prefill(settings))
    observed = digest(specs.observe(settings)) if settings.observe.enabled else None
    unknown, unprepared = set(), {}
    for task in settings.tasks:
        longest = _answer(settings, task)
        answer = min(longest, measured.get(task, longest))
        if task not in measured:
            unknown.add(task)
        for bin in range(settings.binning.n_bins):
            lengths, known = _lengths(settings, files, task, bin)
            if not known:
                unprepared[task] = None
            for number, (begin, end) in pieces:
                folder = files if number is None else files.shard(number)
                chosen = lengths[begin:end]
                documents += [] if remote else chosen
                if not remote:
                    reading.append(Job(folder.prefill_index(task, bin), read, len(chosen), sum(chosen), 0, 0))
                answers = len(chosen) * settings.decoding.repeats
                for key, expected in hashes.items():
                    path = folder.cell(task, *key, bin)
                    cells.append(Job(path, expected, answers, 0, answers * answer, answers))
            if settings.observe.enabled:
                observations.append(_observation(settings, files, task, bin, len(lengths), observed))
    if unprepared:
        notes.append(f"not prepared yet: {', '.join(unprepared)}; prompts counted as {known_as(settings)}")
    if unknown and not remote:
        notes.append("answers counted at their longest: none of these tasks has been answered yet")
    items = [] if remote else [Item("prefills", "prompts", tuple(reading), "prompts")]
    items.append(Item("cells", "answers", tuple(cells), "cell_hash"))
    if observations:
        items.append(Item("observations", "sequences", tuple(observations), "observe_hash"))
        notes.append("observations counted as the decoding alone, without what comparing each step costs")
    return items


def _answer(settings: Settings, task: str) -> int:
    longest = settings.decoding.max_tokens
    return get_task(settings.dataset.name, task).max_new_tokens if longest == "task" else longest


def known_as(settings: Settings) -> str:
    if settings.dataset.lengths:
        return "dataset.lengths says"
    return f"model.max_length, {settings.model.max_length:,} tokens, the longest that they can be"


def _lengths(settings: Settings, files: Paths, task: str, bin: int) -> tuple[list[int], bool]:
    """Prompt tokens of a bin's examples, and whether they have been counted."""
    path = Path(files.bin(task, bin))
    if path.is_file():
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=["prompt_len"])["prompt_len"].to_pylist(), True
    n, bins = settings.binning.n_per_bin, settings.binning.n_bins
    lengths = settings.dataset.lengths
    if not lengths:
        return [settings.model.max_length] * n, False
    return [sorted(lengths)[bin * len(lengths) // bins]] * min(n, len(lengths) * settings.dataset.n_per_length), False


def _observation(settings: Settings, files: Paths, task: str, bin: int, n: int, expected: str | None) -> Job:
    section = settings.observe
    sequences = n * (2 if section.continuations else 1)
    tokens = _answer(settings, task) if section.max_tokens == "task" else section.max_tokens
    sets = len(specs.observe(settings)["policies"]) * len(section.budgets)
    rows = sequences * tokens * sets * len(section.granularities) * len(section.memories)
    return Job(files.observations(task, bin), expected, sequences, 0, sequences * tokens, rows, OBSERVED_ROW)


def _perplexity(settings: Settings, notes: list[str]) -> Item:
    files, section = Paths(settings.output.dir, settings.experiment), settings.perplexity
    jobs = []
    for policy, budget in specs.perplexity_cells(settings):
        expected = digest(specs.perplexity(settings, policy, budget))
        for bin, context in enumerate(section.context_tokens):
            n = _rows(files.windows(section.corpus, bin))
            if n is None:
                n = (section.books or 0) * (section.windows_per_book or 0)
            steps = context + section.stride if section.streaming and section.streaming_chunk == 1 else 0
            read = 0 if steps else n * (context + section.stride)
            jobs.append(Job(files.perplexity(section.corpus, policy, budget, bin), expected, n, read, n * steps, n))
    if any(job.sequences == 0 for job in jobs):
        notes.append("perplexity: how many windows there are is known once the books have been cut")
    return Item("perplexity", "windows", tuple(jobs), "perplexity_hash")


def _chat(settings: Settings, notes: list[str]) -> Item:
    files, section = Paths(settings.output.dir, settings.experiment), settings.chat
    n = _rows(files.conversations(section.set)) or section.n or 0
    turns = section.max_turns or 8
    if section.max_turns is None:
        notes.append(f"conversations counted at {turns} turns each; chat.max_turns bounds them")
    jobs = []
    for policy, budget in specs.chat_cells(settings):
        played = n * turns
        # each answer is read again where its likelihood under the full cache is asked for
        read = played * section.max_tokens * (2 if section.answer_nll else 1)
        expected = digest(specs.chat(settings, policy, budget))
        path = files.chat(section.set, policy, budget)
        jobs.append(Job(path, expected, n, read, played * section.max_tokens, played))
    if n == 0:
        notes.append("chat: how many conversations there are is known once their file has been read")
    return Item("conversations", "conversations", tuple(jobs), "chat_hash")


def _rows(path: str) -> int | None:
    if not Path(path).is_file():
        return None
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def outdated(settings: Settings) -> list[str]:
    """Files whose hash is not that of the configuration: what has to be run again, whoever else remembers it."""
    return [job.path for item in work(settings).items for job in item.state["outdated"]]


def summary(made: Work, speed: Speed | None, size: ModelSize | None) -> dict[str, Any]:
    """The plan as plain values, in seconds and bytes; None where nothing is known."""
    remote = made.settings.engine.kind == "openai"
    speed = None if remote else speed  # the endpoint's time is not ours
    items = {}
    warm = workers_wanted()
    loads = {"every": 0, "left": 0}  # so far: one worker holds the model for jobs of all kinds
    for item in made.items:
        every, left = list(item.jobs), item.left
        own = {}
        for name, jobs in (("every", every), ("left", left)):
            own[name] = min(len(jobs), 1 - loads[name]) if warm else len(jobs)
            loads[name] += own[name]
        items[item.name] = {
            "unit": item.unit,
            "jobs": len(every),
            "done": len(item.state["done"]),
            "outdated": len(item.state["outdated"]),
            "units": sum(job.sequences for job in every),
            "seconds": None if speed is None else item.seconds(every, speed, own["every"]),
            "seconds_left": None if speed is None else item.seconds(left, speed, own["left"]),
            "bytes": item.bytes(every),
            "bytes_left": item.bytes(left),
        }
    left = None if speed is None else sum(item["seconds_left"] for item in items.values())
    return {
        "items": items,
        "device": "endpoint" if remote else "gpu" if on_gpu(made.settings) else "cpu",
        "hours_left": None if left is None else left / 3600,
        "speed": None if speed is None else speed.source,
        "store_bytes": None if size is None else made.store_bytes(size),
        "bytes_left": sum(item["bytes_left"] for item in items.values()),
        "notes": list(dict.fromkeys(made.notes)),
    }
