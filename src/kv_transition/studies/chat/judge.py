"""A language model as judge of whether an answer follows an instruction, at an OpenAI-compatible endpoint.

    python -m kv_transition.studies.chat.judge --spec JSON --store STORE.sqlite --output JUDGE.parquet CHAT.parquet ...

Each pair of answer and instruction is one question with a fixed rubric, at temperature 0; the reply must be one JSON
object. Any other reply (none in time, an error, an incomplete one, other JSON) is no verdict: its reason is recorded,
and it counts neither for nor against. Verdicts are stored as they arrive, so that a rerun asks only for the missing
ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kv_transition.engines.openai_compat import Client, Reply, Request
from kv_transition.provenance import digest, rows_to_table, text_sha256, write_table
from kv_transition.script import status
from kv_transition.studies.chat.checks import Check, describe
from kv_transition.studies.chat.tables import JUDGE
from kv_transition.studies.chat.verdicts import KEY, Case, cases, read_chat

RUBRIC = Path(__file__).with_name("rubric.txt").read_text(encoding="utf-8")
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL | re.IGNORECASE)
_THOUGHT = "</think>"
_SHOWN = 80


class Verdict(BaseModel):
    """The JSON object that the rubric asks for."""

    model_config = ConfigDict(strict=True)

    follows: bool
    reason: str = ""


@dataclass(frozen=True)
class Judged:
    """A verdict, or the reason why there is none."""

    verdict: Verdict | None = None
    error: str | None = None


def question(check: Check, message: str, answer: str) -> list[dict[str, str]]:
    """Return the messages that ask whether ``answer``, given to the user's ``message``, follows the check."""
    asked = {"instruction": f"The answer {describe(check)}.", "message": message, "answer": answer}
    return [
        {"role": "system", "content": RUBRIC},
        {"role": "user", "content": json.dumps(asked, ensure_ascii=False, indent=1)},
    ]


def judged(reply: Reply) -> Judged:
    """Return the verdict in a reply: one JSON object, alone, in one Markdown fence, or after the model's reasoning."""
    if reply.error is not None or reply.text is None:
        return Judged(error=reply.error or "ENGINE_ERROR: no answer")
    text = reply.text.rpartition(_THOUGHT)[2].strip()
    fenced = _FENCED.fullmatch(text)
    text = fenced[1] if fenced else text
    shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
    if not text:
        return Judged(error="MALFORMED: the reply of the judge is empty")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        cut = " (cut at max_tokens)" if reply.finish_reason == "length" else ""
        return Judged(error=f"MALFORMED: the reply is not a JSON object but {shown}{cut}")
    try:
        return Judged(Verdict.model_validate(found))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the verdict"
        return Judged(error=f"SCHEMA: {where}: {first['msg'][0].lower()}{first['msg'][1:]}; the reply is {shown}")


class Store:
    """Verdicts in an SQLite file, by the digest of the question; a verdict is durable when `put` returns."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (asked TEXT PRIMARY KEY, verdict TEXT NOT NULL)")

    def get(self, asked: str) -> Verdict | None:
        row = self._file.execute("SELECT verdict FROM verdicts WHERE asked = ?", (asked,)).fetchone()
        return Verdict.model_validate_json(row[0]) if row else None

    def put(self, asked: str, verdict: Verdict) -> None:
        self._file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (asked, verdict.model_dump_json()))

    def close(self) -> None:
        self._file.close()


def ask(found: Iterable[Case], judge: Mapping[str, Any], store: Store) -> dict[tuple[Any, ...], Judged]:
    """Return the judge's verdict on each case that has an answer, by `Case.key`. judge: the settings' ``chat.judge``.

    Equal questions are asked once. Only questions that are not in the store are asked, and each verdict is stored at
    once. Raises UserError if no question could be answered: no server, no such model, or the key refused.
    """
    answered = [case for case in found if case.row["text"] is not None]
    asked = {case.key: question(case.check, case.row["user"], case.row["text"]) for case in answered}
    names = {key: digest([judge["base_url"], judge["model"], judge["max_tokens"], q], 64) for key, q in asked.items()}
    known = {name: Judged(verdict) for name in set(names.values()) if (verdict := store.get(name)) is not None}
    todo = {names[key]: messages for key, messages in asked.items() if names[key] not in known}
    new = list(todo)

    def done(number: int, reply: Reply) -> None:
        known[new[number]] = result = judged(reply)
        if result.verdict is not None:
            store.put(new[number], result.verdict)

    patience = {name: judge[name] for name in ("base_url", "api_key_env", "timeout_s", "retries", "stream")}
    requests = [Request(judge["model"], judge["max_tokens"], messages=todo[name]) for name in new]
    if requests:
        Client(**patience).complete_all(requests, judge["concurrency"], done)
    failed = sum(known[name].verdict is None for name in new)
    print(f"{len(known)} questions, {len(new)} of them asked, {failed} without a verdict", file=sys.stderr)
    return {key: known[name] for key, name in names.items()}


def write_judge(chat: Sequence[str], output: str, store: str, judge: Mapping[str, Any]) -> None:
    """Ask the judge about all answers in the files ``chat`` and write its verdicts (``tables.JUDGE``)."""
    found = cases(read_chat(chat))
    with closing(Store(store)) as kept:
        said = ask(found, judge, kept)
    rows = [
        dict(zip((*KEY, "check_id"), key, strict=True))
        | {
            "judge": result.verdict.follows if result.verdict else None,
            "judge_reason": result.verdict.reason if result.verdict else None,
            "judge_error": result.error,
        }
        for key, result in said.items()
    ]
    facts = {"model": judge["model"], "base_url": judge["base_url"], "rubric_sha256": text_sha256(RUBRIC)}
    write_table(output, rows_to_table(rows, JUDGE), facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("chat", nargs="+")
    arguments = parser.parse_args(argv)
    return status(write_judge, arguments.chat, arguments.output, arguments.store, arguments.spec["judge"])


if __name__ == "__main__":
    sys.exit(main())
