"""The jobs of the chat study, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kv_transition.paths import Paths
from kv_transition.provenance import digest
from kv_transition.studies.chat import specs
from kv_transition.studies.study import Item, Job, Work, rows_in

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    """Return the jobs of conversations; none without the section ``chat``."""
    if not settings.chat:
        return Work()
    notes = []
    files, section = Paths(settings.output.dir, settings.experiment), settings.chat
    n = rows_in(files.conversations(section.set)) or section.n or 0
    turns = section.max_turns or 8
    if section.max_turns is None:
        notes.append(f"the estimate assumes {turns} turns per conversation; chat.max_turns limits them")
    jobs = []
    for policy, budget in specs.cells(settings):
        played = n * turns
        # each answer is read again if its likelihood under the full cache is computed
        read = played * section.max_tokens * (2 if section.answer_nll else 1)
        expected = digest(specs.cell(settings, policy, budget))
        path = files.chat(section.set, policy, budget)
        jobs.append(Job(path, expected, n, read, played * section.max_tokens, played))
    if n == 0:
        notes.append("chat: the number of conversations is known when their file has been read")
    return Work((Item("conversations", "conversations", tuple(jobs), "chat_hash"),), (), tuple(notes))
