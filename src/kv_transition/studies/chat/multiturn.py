"""Read or generate conversations: the system message and the user's turns.

    python -m kv_transition.studies.chat.multiturn --spec JSON --output CONVERSATIONS.parquet

The model gives its own answers, so the answers of the source are dropped and counted. Formats:

- ``turns``: JSON or JSON lines of ``{"id", "turns": [{"role", "content", "checks"?}], "checks"?, "meta"?}``, with the
  role system, user or assistant; `checks` describes a check.
- ``mt_bench``: ``{"question_id", "category", "turns": [text, ...]}`` (Zheng et al. 2023, arXiv 2306.05685).
- ``mt_eval``: a list of ``{"user", "sys", "id"}`` per line, where ``sys`` is a recorded answer (Kwan et al. 2024,
  arXiv 2401.16745).
- ``generated``: `conversations`, for the embedded follower.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kv_transition.errors import UserError
from kv_transition.parsing import parse_json
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.script import status
from kv_transition.studies.chat import checks as checks_module
from kv_transition.studies.chat.tables import CONVERSATIONS

ROLES = ("system", "user", "assistant")
GENERATED_TURNS = 8
SUFFIXES = (".json", ".jsonl")

Record = tuple[str, Any]
"""Position of a record in its file, and the record."""


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON list or of JSON lines, plain or gzipped; blank lines are skipped.

    Raises UserError if the file cannot be read or does not contain JSON.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix not in SUFFIXES:
        raise UserError(f"chat.path: {path} must end in {' or '.join(SUFFIXES)}, optionally followed by .gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8") from None
    if plain.suffix == ".json":
        records = parse_json(text, str(path))
        if not isinstance(records, list):
            raise UserError(f"{path}: the file must contain a JSON list of conversations, not {type(records).__name__}")
        yield from ((f"{path}, conversation {number}", record) for number, record in enumerate(records, 1))
        return
    # JSON lines end at \n; str.splitlines would also split at characters that may occur inside a text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(line, f"{path}, line {number}")


def _object(record: Any, where: str, *fields: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: the record must be a JSON object, not {type(record).__name__}")
    if missing := [field for field in fields if field not in record]:
        raise UserError(f"{where}: the field {missing[0]!r} is missing; required are {', '.join(fields)}")
    return record


def _list(value: Any, where: str, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} must be a list that is not empty, not {value!r}")
    return value


def _id(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: the id must be a text or a whole number, not {value!r}")
    return value


def from_turns(record: Any, where: str) -> dict[str, Any]:
    """Return a conversation in the project's own format; without an id, its id is a hash of its content."""
    record = _object(record, where, "turns")
    id = _id(record.get("id", digest(record["turns"])), where)
    meta = record.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise UserError(f"{where}: conversation {id}: meta must be an object, not {meta!r}")
    return {"id": id, "turns": record["turns"], "checks": record.get("checks") or [], "meta": dict(meta)}


def from_mt_bench(record: Any, where: str) -> dict[str, Any]:
    """Return a question of MT-bench, whose turns are the user's messages."""
    record = _object(record, where, "question_id", "turns")
    turns = _list(record["turns"], where, "turns")
    return {
        "id": _id(record["question_id"], where),
        "turns": [{"role": "user", "content": content} for content in turns],
        "meta": {"category": record.get("category")},
    }


def from_mt_eval(record: Any, where: str) -> dict[str, Any]:
    """Return a dialogue of MT-Eval's refinement task. Its id is that of its turns without their number."""
    turns, ids = [], []
    for number, turn in enumerate(_list(record, where, "a dialogue"), 1):
        turn = _object(turn, f"{where}, turn {number}", "user", "id")
        ids.append(_id(turn["id"], f"{where}, turn {number}"))
        turns.append({"role": "user", "content": turn["user"]})
        if "sys" in turn:
            turns.append({"role": "assistant", "content": turn["sys"]})
    return {"id": re.sub(r"_\d+$", "", ids[0]), "turns": turns, "meta": {}}


FORMATS = {"turns": from_turns, "mt_bench": from_mt_bench, "mt_eval": from_mt_eval}


def read(path: str, source: str) -> list[dict[str, Any]]:
    """Return the conversations of a file as rows of `tables.CONVERSATIONS` without ``chat_set``, with JSON as values.

    Raises UserError if the file cannot be read or a conversation is malformed; the message names conversation and turn.
    """
    return normalised(((where, FORMATS[source](record, where)) for where, record in read_records(Path(path))), path)


def normalised(records: Iterator[Record], name: str) -> list[dict[str, Any]]:
    """Return conversations ``{"id", "turns", "checks"?, "meta"?}`` as rows.

    name: name of the source in error messages.
    """
    seen: dict[str, str] = {}
    rows = []
    for place, conversation in records:
        where = f"{place}: conversation {conversation['id']}"
        if conversation["id"] in seen:
            raise UserError(
                f"{where} has the same id as {seen[conversation['id']]}; give each conversation a different id"
            )
        seen[conversation["id"]] = place
        rows.append(_row(conversation, where))
    if not rows:
        raise UserError(f"{name} contains no conversation")
    return rows


def _row(conversation: Mapping[str, Any], where: str) -> dict[str, Any]:
    system, users, dropped = [], [], 0
    for number, message in enumerate(_list(conversation["turns"], where, "turns"), 1):
        at = f"{where}, turn {number}"
        message = _object(message, at, "role", "content")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"{at}: the role is {role!r}; choose one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{at}: content must be a text that is not blank, not {content!r}")
        if role == "system" and users:
            raise UserError(
                f"{at}: a system message follows a user message; put system messages before the user's first turn"
            )
        if role == "assistant":
            dropped += 1
        else:
            (system if role == "system" else users).append(content)
    if not users:
        raise UserError(f"{where}: there is no user message; give at least one turn with the role user")
    checks = checks_module.of_conversation(conversation, where)
    return {
        "conversation_id": conversation["id"],
        "system": "\n\n".join(system) or None,
        "turns": [
            {"content": content, "checks": [c.model_dump() for c in checks if c.in_force(turn)]}
            for turn, content in enumerate(users, 1)
        ],
        "dropped_assistant": dropped,
        "meta": conversation.get("meta") or {},
    }


def generated(n: int, turns: int, seed: int) -> list[dict[str, Any]]:
    """Return conversations for the embedded follower, as rows like those of `read`."""
    # Imported by name, so that the code hash of conversations from files does not include the generator.
    module = importlib.import_module("kv_transition.studies.chat.conversations")
    made = module.generate(n, turns, seed)
    return normalised(((f"generated conversation {i}", c) for i, c in enumerate(made, 1)), "the generator")


def chosen(rows: list[dict[str, Any]], n: int | None, seed: int, max_turns: int | None) -> list[dict[str, Any]]:
    """Return ``n`` conversations, drawn with ``seed``, in their order, each with at most ``max_turns`` turns."""
    if n is not None and n < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n))]
    return [row | {"turns": row["turns"][:max_turns]} for row in rows]


def write(spec: dict[str, Any], output: str) -> None:
    """Write the conversations of a spec in one format. Raises UserError as `read` does."""
    chat = spec["chat"]
    if chat["source"] == "generated":
        rows = generated(chat["n"], chat["max_turns"] or GENERATED_TURNS, chat["seed"])
    else:
        rows = chosen(read(chat["path"], chat["source"]), chat["n"], chat["seed"], chat["max_turns"])
    table = rows_to_table(
        (
            row
            | {"chat_set": chat["name"], "n_turns": len(row["turns"])}
            | {key: json.dumps(row[key], ensure_ascii=False) for key in ("turns", "meta")}
            for row in rows
        ),
        CONVERSATIONS,
    )
    dropped = sum(row["dropped_assistant"] for row in rows)
    facts = {
        "source": chat["source"],
        "path": chat["path"] or "",
        "content": spec["content"] or "",
        "conversations": len(rows),
        "dropped_assistant": dropped,
    }
    write_table(output, table, facts)
    turns = sum(len(row["turns"]) for row in rows)
    print(f"{len(rows)} conversations of {turns} turns; {dropped} of the assistant's turns dropped", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args(argv)
    return status(write, arguments.spec, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
