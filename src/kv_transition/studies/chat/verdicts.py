"""Verdicts on whether answers follow the instructions in force, by rule and by judge.

An instruction that a later one overrides is also checked, to see which of the two wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa

from kv_transition import parsing
from kv_transition.errors import UserError
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.studies.chat.rules import Check, at_turn, describe, passes
from kv_transition.studies.chat.tables import CHAT, CHAT_VERDICTS, JUDGE

KEY = ("chat_set", "conversation_id", "turn", "policy", "budget")
FULL = "full"
OTHERS = 10
"""maximum number of answers of other conversations from which chance is estimated"""

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """An answer (a row of ``tables.CHAT``) and an instruction in force at its turn."""

    row: Row
    check: Check
    overridden_by: str | None

    @property
    def key(self) -> Key:
        return (*(self.row[name] for name in KEY), self.check.id)


def read_chat(paths: Iterable[str]) -> list[Row]:
    """Return the answers of all files (``tables.CHAT``), in order. Raises UserError if a file cannot be read."""
    rows: list[Row] = []
    for path in paths:
        try:
            table = parsing.read_parquet(path, columns=CHAT.names, partitioning=None).cast(CHAT)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} contains no conversations ({reason}): delete it and run again") from None
        rows += table.to_pylist()
    return rows


def cases(rows: Sequence[Row]) -> list[Case]:
    """Return every instruction in force at every answer, in the order of the rows."""
    own = [[Check.model_validate(check) for check in json.loads(row["checks"] or "[]")] for row in rows]
    # A row has the checks in force at its turn. A check that is replaced by one that is not due at this turn is taken
    # from the conversation's other turns.
    known: dict[Key, dict[str, Check]] = {}
    for row, checks in zip(rows, own, strict=True):
        known.setdefault((row["chat_set"], row["conversation_id"]), {}).update({c.id: c for c in checks})
    return [
        Case(row, check, overridden_by)
        for row in rows
        for check, overridden_by in at_turn(list(known[row["chat_set"], row["conversation_id"]].values()), row["turn"])
    ]


def verdicts(rows: Sequence[Row], judged: Iterable[Row] = ()) -> list[Row]:
    """Return a row of ``tables.CHAT_VERDICTS`` for each of the `cases`; ``judged``: rows of ``tables.JUDGE``."""
    said = {tuple(row[name] for name in (*KEY, "check_id")): row for row in judged}
    found = cases(rows)
    chance = _chance([case for case in found if case.row["policy"] == FULL], rows)
    return [
        {
            **{name: case.row[name] for name in KEY},
            "check_id": case.check.id,
            "kind": case.check.kind,
            "asks": describe(case.check),
            "standing": case.check.standing,
            "since": case.check.since,
            "age": case.row["turn"] - case.check.since,
            "overrides": case.check.overrides,
            "overridden_by": case.overridden_by,
            "rule": passes(case.check, case.row["text"]) if case.row["text"] is not None else None,
            "chance": chance.get(case.key),
        }
        | {name: said.get(case.key, {}).get(name) for name in ("judge", "judge_reason", "judge_error")}
        for case in found
    ]


def _chance(found: Sequence[Case], rows: Sequence[Row]) -> dict[Key, float]:
    """Return how often answers of the full cache pass a check of another conversation at the same turn."""
    answers: dict[Key, list[tuple[str, str]]] = {}
    for row in rows:
        if row["policy"] == FULL and row["text"] is not None:
            answers.setdefault((row["chat_set"], row["turn"]), []).append((row["conversation_id"], row["text"]))
    asked: dict[Key, set[str]] = {}
    for case in found:
        wanted = (case.row["chat_set"], case.row["conversation_id"], case.row["turn"])
        asked.setdefault(wanted, set()).add(describe(case.check))
    chance = {}
    for case in found:
        if not case.check.standing:
            continue
        name, turn, own = case.row["chat_set"], case.row["turn"], case.row["conversation_id"]
        there = answers.get((name, turn), [])
        # the conversations that follow it in the order of the file, cyclically
        begin = next((i for i, (id, _) in enumerate(there) if id == own), 0)
        others = [
            text
            for id, text in (*there[begin + 1 :], *there[:begin])
            if id != own and describe(case.check) not in asked.get((name, id, turn), ())
        ]
        if others:
            decided = [found for text in others[:OTHERS] if (found := passes(case.check, text)) is not None]
            if decided:
                chance[case.key] = fmean(decided)
    return chance


def write_verdicts(chat: Sequence[str], output: str, judge: str | None = None) -> None:
    """Write ``tables.CHAT_VERDICTS`` to ``output``.

    chat: files of ``tables.CHAT``; judge: a file of ``tables.JUDGE``.
    """
    judged = parsing.read_parquet(judge, columns=JUDGE.names).to_pylist() if judge else []
    rows = read_chat(chat)
    write_table(output, rows_to_table(verdicts(rows, judged), CHAT_VERDICTS), {"judged": bool(judge)})
