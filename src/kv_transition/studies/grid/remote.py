"""A cell of the grid answered by an OpenAI-compatible endpoint: every example of a bin, sent once.

    python -m kv_transition.studies.grid.remote --spec JSON --bin BIN.parquet --output CELL.parquet

Each row is written to a journal beside the output as soon as it arrives. After an interruption the job reads the
journal, sends only the missing requests and writes the same file; an incomplete last line is dropped. The experiment
declares what the endpoint does with its cache. Columns that only the engine knows are null, unless the server reports
them, as the server of kv_transition does.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from kv_transition.budget import Budget
from kv_transition.engines.device_memory import Watch
from kv_transition.engines.openai_compat import Client, Reply, Request, is_loopback
from kv_transition.errors import UserError
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.run import command
from kv_transition.studies.grid.tables import CELLS

REQUESTS_VARIABLE = "KVT_REQUESTS"
"""environment variable ``retries:concurrency:alone:api_key_env``. It is not part of a spec, because the way of sending
requests changes no answer. alone: 1 if no other job sends requests to the endpoint at the same time"""

_SEED_BITS = 31

_FROM_THE_SERVER = (
    *("budget_entries", "protected", "kept_final", "kept_mean", "cache_bytes", "total_bytes", "full_bytes"),
    *("prefill_s", "compress_s", "ttft_s", "decode_s", "peak_mem_mb"),
)

Row = dict[str, Any]
Key = tuple[str, int]
"""an example and the number of its repeat"""


class Journal:
    """The finished rows of a cell, in a file that survives the job."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.rows: list[Row] = []
        whole = 0
        for line in file.read().splitlines(keepends=True):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                break
            self.rows.append(row)
            whole += len(line)
        file.seek(whole)
        file.truncate()

    def add(self, row: Row) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)


@contextmanager
def journal_of(output: str) -> Iterator[Journal]:
    """Yield the journal of a cell. It is deleted at the end of the block, unless the block raises.

    Raises UserError if another process is writing the journal.
    """
    path = Path(output)
    path = path.with_name(f".{path.name}.journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another job is answering this cell; wait for it or stop it") from None
        except OSError:
            pass  # some network drives have no locks
        file.seek(0)
        journal = Journal(file)
        try:
            yield journal
        except BaseException:
            if not journal.rows:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def request_of(spec: Row, example: Row, repeat: int) -> Request:
    """Return the request for an answer. Raises UserError if the prompt cannot be sent in the required form."""
    endpoint, decoding = spec["endpoint"], spec["decoding"]
    seed = command.answer_seed(decoding["seed"], example["example_id"], repeat)
    given: Row = {}
    if endpoint["api"] == "chat":
        content, boundary = _content(example)
        given["messages"] = [{"role": "user", "content": content}]
        place: Any = {"message": 0, "characters": boundary}
    elif sends_tokens(endpoint):
        given["prompt"] = [*example["context_ids"], *example["question_ids"]]
        place = len(example["context_ids"])
    else:
        given["prompt"] = example["context_text"] + example["question_text"]
        place = len(example["context_text"])
    body = dict(endpoint["extra_body"])
    if endpoint["serves"]:
        body |= _asked_of_kv_transition(spec, place, seed)
    return Request(
        endpoint["model"],
        example["max_new_tokens"],
        temperature=decoding["temperature"],
        seed=seed % 2**_SEED_BITS if decoding["temperature"] else None,
        extra_body=body,
        **given,
    )


def sends_tokens(endpoint: Row) -> bool:
    if endpoint["api"] == "chat":
        return False
    return endpoint["send"] == "tokens" or (endpoint["send"] == "auto" and bool(endpoint["serves"]))


def _content(example: Row) -> tuple[str, int]:
    """Return the user's message and the end of the context in it; the endpoint adds the chat template."""
    start, end = example["content_start"], example["content_end"]
    if start is None or end is None:
        raise UserError(
            f"{example['task']}, {example['example_id']}: the message cannot be separated from the chat template; set "
            "model.chat_template to never, or engine.api to completions"
        )
    context = example["context_text"][start:]
    return context + example["question_text"][:end], len(context)


def _asked_of_kv_transition(spec: Row, place: Any, seed: int) -> Row:
    budget = Budget.parse(spec["budget"])
    asked: Row = {
        "kv_policy": {"kind": spec["kind"], **spec["hyper_parameters"]},
        "kv_mode": spec["mode"],
        "kv_context": place,
        "kv_seed": seed,
        "kv_first_token": spec["first_token"],
    }
    if budget.tokens is not None:
        asked["kv_budget"] = {"tokens": budget.tokens}
    elif not budget.is_full:
        asked["kv_budget"] = float(budget.fraction)
    return asked


def _tiny(example: Row) -> Row:
    """Return an example that generates one token and uses every option of the cell."""
    return example | {
        "context_text": "Hello,",
        "question_text": " world",
        "content_start": 0,
        "content_end": 6,
        "context_ids": example["context_ids"][:16],
        "question_ids": example["question_ids"][:1],
        "max_new_tokens": 1,
    }


def rows(
    examples: Sequence[Row], spec: Row, client: Client, journal: Journal, concurrency: int = 1, *, alone: bool = True
) -> list[Row]:
    """Return the cell's rows, one per answer, in the order of the bin; answers in the journal are not requested again.

    alone: whether the endpoint serves no other job at the same time.

    Raises UserError if the endpoint cannot answer at all; the journal then contains the answers so far.
    """
    units = [(example, repeat) for example in examples for repeat in range(spec["decoding"]["repeats"])]
    cell_hash = digest(spec)
    done = {_key(row): row for row in journal.rows if row["cell_hash"] == cell_hash}
    prompts = {example["example_id"]: example["prompt_sha256"] for example in examples}
    done = {key: row for key, row in done.items() if row["prompt_sha256"] == prompts.get(key[0])}
    missing = [(example, repeat) for example, repeat in units if (example["example_id"], repeat) not in done]
    # the longest prompts first, as in the local engine, so that a lack of memory appears at once
    missing.sort(key=lambda unit: -unit[0]["prompt_len"])
    requests = [request_of(spec, *unit) for unit in missing]
    if missing:
        _check_served(client.check(request_of(spec, _tiny(missing[0][0]), 0)), spec)
    with Watch(wanted=bool(missing) and is_loopback(client.base_url)) as memory:

        def keep(number: int, reply: Reply) -> None:
            example, repeat = missing[number]
            if reply.error is None:
                _check_served(reply, spec)
            row = _identity(example, repeat, spec, cell_hash) | _row(reply, example, spec, memory, alone)
            journal.add(row)
            done[_key(row)] = row

        client.complete_all(requests, concurrency, keep)
    return [done[example["example_id"], repeat] for example, repeat in units]


def _key(row: Row) -> Key:
    return row["example_id"], row["repeat"]


def _check_served(reply: Reply, spec: Row) -> None:
    """Check that a kv_transition server did what was requested."""
    if not spec["endpoint"]["serves"]:
        return
    did = {key: (reply.kv or {}).get(key) for key in ("policy", "hyper_parameters", "budget", "mode")}
    asked = {"policy": spec["kind"]} | {key: spec[key] for key in ("hyper_parameters", "budget", "mode")}
    if did != asked:
        raise UserError(
            f"{spec['endpoint']['base_url']} does not confirm that it served {spec['policy']} at {spec['budget']}; it "
            "must be python -m kv_transition serve of this version, otherwise set engine.serves to null"
        )


def _identity(example: Row, repeat: int, spec: Row, cell_hash: str) -> Row:
    return {
        **{key: example[key] for key in ("task", "example_id", "bin", "prompt_sha256")},
        **{key: spec[key] for key in ("mode", "policy", "budget")},
        "cell_hash": cell_hash,
        "repeat": repeat,
        "engine": "openai",
        "base_url": spec["endpoint"]["base_url"],
    }


def _row(reply: Reply, example: Row, spec: Row, memory: Watch, alone: bool) -> Row:
    shared = True if reply.co_running else (False if alone else None)
    http: Row = {"attempts": reply.attempts}
    if reply.error is not None:
        return {"error": reply.error, "co_running": shared, "raw": json.dumps({"http": http})}
    usage, concerns = usage_of(reply, example, spec)
    http |= {"model": reply.model, "usage": reply.usage, "pieces": reply.pieces, "concerns": concerns}
    kv = dict(reply.kv or {})
    seconds = {"ttft_s": reply.ttft_s, "decode_s": reply.decode_s, "latency_s": reply.latency_s}
    if kv:
        # the server reports times like those of the local engine: without network, queue and cache hits
        http |= seconds
        seconds["latency_s"] = kv["prefill_s"] + kv["compress_s"] + kv["decode_s"]
    begin, end = reply.window or (0.0, 0.0)
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        **usage,
        "load_s": 0.0,
        **seconds,
        # the server may decode overlapping requests as one batch
        "batch_size": 1 if shared is False else None,
        "co_running": shared,
        "peak_mem_mb": memory.peak_mb(begin, end),
        **{key: kv[key] for key in _FROM_THE_SERVER if key in kv},
        "raw": json.dumps({"token_ids": kv.get("token_ids")} | kv.get("record", {}) | {"http": http}),
    }


def usage_of(reply: Reply, example: Row, spec: Row) -> tuple[Row, list[str]]:
    """Return ``prompt_tokens`` and ``completion_tokens`` as the endpoint counted them, and concerns about them.

    A count that is impossible becomes null. The endpoint may tokenize or wrap the prompt in another way, so any count
    of the prompt is accepted; a count that differs from this project's is a concern.
    """
    told = reply.usage or {}
    concerns = [] if reply.usage else ["no usage"]
    counts: Row = {}
    for name, low, high in (
        ("prompt_tokens", 1, None),
        ("completion_tokens", 1 if reply.text else 0, example["max_new_tokens"]),
    ):
        value = told.get(name)
        right = isinstance(value, int) and not isinstance(value, bool) and value >= low
        counts[name] = value if right and (high is None or value <= high) else None
        if reply.usage and counts[name] is None:
            concerns.append(f"{name} {value!r} cannot be right")
    given, ours = counts["prompt_tokens"], example["prompt_len"]
    if given is not None and given != ours:
        concerns.append(f"prompt_tokens {given}, and {ours} by the tokenizer of model.name")
    return counts, concerns


def main(argv: list[str] | None = None) -> None:
    arguments = command.arguments(__doc__, argv, "--bin", "--output", optional=("--calibration", "--treated"))
    spec = arguments.spec
    endpoint = spec["endpoint"]
    retries, concurrency, alone, api_key_env = os.environ.get(REQUESTS_VARIABLE, "5:1:0:OPENAI_API_KEY").split(":")
    client = Client(
        endpoint["base_url"],
        api_key_env=api_key_env or None,
        timeout_s=endpoint["timeout_s"],
        retries=int(retries),
        stream=endpoint["stream"],
    )
    examples = command.read_bin(arguments.bin)
    with journal_of(arguments.output) as journal:
        made = rows(examples, spec, client, journal, int(concurrency), alone=alone == "1")
        facts = {
            "config_hash": digest({key: value for key, value in spec.items() if key != "code"}),
            "model": endpoint["model"],
            "endpoint_declared": endpoint,
            "hyper_parameters": spec["hyper_parameters"],
            "kind": spec["kind"],
            "clock": "wall",
            "device": "endpoint",
            **command.bin_metadata(arguments.bin),
        }
        write_table(arguments.output, rows_to_table(made, CELLS), facts)


if __name__ == "__main__":
    command.run(main)
