"""The jobs of the perplexity study, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kv_transition.paths import Paths
from kv_transition.provenance import digest
from kv_transition.studies.perplexity import specs
from kv_transition.studies.study import Item, Job, Work, rows_in

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    """Return the perplexity jobs; none without the section ``perplexity``."""
    if not settings.perplexity:
        return Work()
    files, section = Paths(settings.output.dir, settings.experiment), settings.perplexity
    jobs = []
    for policy, budget in specs.cells(settings):
        expected = digest(specs.cell(settings, policy, budget))
        for bin, context in enumerate(section.context_tokens):
            n = rows_in(files.windows(section.corpus, bin))
            if n is None:
                n = (section.books or 0) * (section.windows_per_book or 0)
            steps = context + section.stride if section.streaming and section.streaming_chunk == 1 else 0
            read = 0 if steps else n * (context + section.stride)
            jobs.append(Job(files.perplexity(section.corpus, policy, budget, bin), expected, n, read, n * steps, n))
    uncut = any(job.sequences == 0 for job in jobs)
    notes = ("perplexity: the number of windows is known when the books have been cut into windows",) if uncut else ()
    return Work((Item("perplexity", "windows", tuple(jobs), "perplexity_hash"),), (), notes)
