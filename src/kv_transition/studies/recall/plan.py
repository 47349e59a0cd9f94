"""The observation jobs, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kv_transition.paths import Paths
from kv_transition.provenance import digest
from kv_transition.studies.bins import longest_answer, prompt_lengths
from kv_transition.studies.recall import specs
from kv_transition.studies.study import Item, Job, Work

if TYPE_CHECKING:
    from kv_transition.settings import Settings

ROW_BYTES = 40


def work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    """Return the observation jobs of an experiment; none if ``observe`` is not enabled."""
    section = settings.observe
    if not (settings.tasks and section.enabled):
        return Work()
    files = Paths(settings.output.dir, settings.experiment)
    spec = specs.observe(settings)
    expected = digest(spec)
    sets = len(spec["policies"]) * len(section.budgets) * len(section.granularities) * len(section.memories)
    jobs = []
    for task in settings.tasks:
        tokens = longest_answer(settings, task) if section.max_tokens == "task" else section.max_tokens
        for bin in range(settings.binning.n_bins):
            n = len(prompt_lengths(settings, files, task, bin)[0])
            sequences = n * (2 if section.continuations else 1)
            steps = sequences * tokens
            path = files.observations(task, bin)
            jobs.append(Job(path, expected, sequences, 0, steps, steps * sets, ROW_BYTES))
    note = "the time of observations includes only the decoding, not the comparison of each step"
    return Work((Item("observations", "sequences", tuple(jobs), "observe_hash"),), (), (note,))
