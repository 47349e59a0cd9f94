"""The jobs of the grid, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kv_transition.paths import Paths
from kv_transition.provenance import digest
from kv_transition.specs.model import prefill
from kv_transition.studies.bins import longest_answer, prompt_lengths
from kv_transition.studies.grid import specs
from kv_transition.studies.study import Item, Job, Work

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    """Return the prefills and cells of an experiment; none without tasks."""
    if not settings.tasks:
        return Work()
    files = Paths(settings.output.dir, settings.experiment)
    remote = settings.engine.kind == "openai"
    adaptive = settings.adaptive.enabled
    pieces = list(enumerate(settings.adaptive.shards)) if adaptive else [(None, (0, settings.binning.n_per_bin))]
    hashes = {key: digest(specs.cell(settings, *key)) for key in specs.cells(settings)}
    read = digest(prefill(settings))
    reading, cells, documents = [], [], []
    unknown, unprepared = set(), {}
    for task in settings.tasks:
        longest = longest_answer(settings, task)
        answer = min(longest, answer_tokens.get(task, longest))
        if task not in answer_tokens:
            unknown.add(task)
        for bin in range(settings.binning.n_bins):
            lengths, known = prompt_lengths(settings, files, task, bin)
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
    items = [] if remote else [Item("prefills", "prompts", tuple(reading), "prompts")]
    items.append(Item("cells", "answers", tuple(cells), "cell_hash"))
    notes = []
    if adaptive:
        notes.append("adaptive allocation is on: this is the maximum; bins that are decided early need less")
    if unprepared:
        notes.append(f"not prepared yet: {', '.join(unprepared)}; prompt lengths are taken from {_known_as(settings)}")
    if unknown and not remote:
        notes.append("answers are counted at their largest length, because these tasks have no answers yet")
    return Work(tuple(items), tuple(documents), tuple(notes))


def _known_as(settings: Settings) -> str:
    if settings.dataset.lengths:
        return "dataset.lengths"
    return f"model.max_length, {settings.model.max_length:,} tokens, the largest possible length"
