"""The chat job: play conversations under one policy and budget, turn by turn, on one growing cache.

    python -m kv_transition.studies.chat.run --spec JSON --conversations X.parquet --output Y.parquet --layers Z.parquet

In each turn the model reads the new messages after the kept entries of earlier turns, answers greedily and reads the
tokens that close the answer; then the cache is compressed to the budget. A relative budget refers to all tokens of the
conversation so far, evicted or not. Nothing is read twice, and positions remain those of the text. For the statistic
``reconstruction`` the model repeats a turn, its own answer included, at the end of the turn.

With ``hold``, a policy that acts at each step also keeps the cache at the budget within a turn, from the second turn
on. The statistics that policies read are maintained over all turns.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from kv_transition.budget import Budget
from kv_transition.cache.quantize import Packed
from kv_transition.cache.state import CacheState
from kv_transition.data.tokens import load_tokenizer, tokenizer_sha256
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create
from kv_transition.provenance import digest, read_metadata, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.run.decode import Answer, Setting
from kv_transition.studies.chat.tables import CHAT, CHAT_LAYERS
from kv_transition.studies.chat.turns import Turn, render

TEXT_DROP = "text_drop"
NGRAM = 4

Row = dict[str, Any]


@dataclass(frozen=True)
class TurnSetting(Setting):
    """How the cache is compressed in one turn. holding: whether a policy that acts at each step also acts within the
    turn.
    """

    holding: bool = False

    @property
    def while_decoding(self) -> frozenset[str]:
        """Return the statistics that are read in this turn or after a later one."""
        return self.policy.statistics if self.evicts else frozenset()

    def hold(self, state: CacheState, k: int = 0, *, given_up: bool = False) -> CacheState:
        """Return the state compressed to the budget of all tokens so far, instead of to a constant ``k``."""
        return super().hold(state, self.entries(state.length), given_up=given_up) if self.holding else state


class Memory(Protocol):
    """The memory of a conversation from one turn to the next."""

    def setting(self, number: int) -> TurnSetting:
        """Return how turn ``number`` (from 1) is read and answered."""

    def opening(self, number: int) -> list[int]:
        """Return the tokens to read in turn ``number`` before the answer."""

    def forget(self, state: CacheState, number: int, answer: Answer, seen: int) -> CacheState | None:
        """Return the compressed state at the end of a turn; None if nothing is kept. seen: tokens of the conversation
        so far.

        Records in the answer the entries that the budget allows, and other facts.
        """


@dataclass
class CacheMemory:
    """One cache, compressed by a policy."""

    turns: Sequence[Turn]
    own: TurnSetting
    hold: bool = True
    """whether a policy that acts at each step also acts within the turns"""

    def setting(self, number: int) -> TurnSetting:
        return replace(self.own, holding=self.hold and number > 1)

    def opening(self, number: int) -> list[int]:
        return self.turns[number - 1].opening

    def forget(self, state: CacheState, number: int, answer: Answer, seen: int) -> CacheState:
        answer.budget_entries = k = self.own.entries(seen)
        if self.own.evicts:
            answer.record |= self.own.policy.record(state, k)
        return self.own.compress(state, k, answer.seed)


@dataclass
class Played:
    """A played turn: its seconds, and the states before and after its compression."""

    turn: Turn
    answer: Answer
    seen: int
    """tokens of the conversation so far"""
    before: CacheState | None
    after: CacheState | None
    read_s: float
    peak_mem_mb: float | None


def play(engine: LocalEngine, turns: Sequence[Turn], memory: Memory, answers: Sequence[Answer]) -> Iterator[Played]:
    """Play a conversation and yield each turn at its end. answers: one for each turn; they are filled in."""
    state, seen = None, 0
    engine.peak_memory_mb()  # resets the peak, so that each turn has its own
    for number, (turn, answer) in enumerate(zip(turns, answers, strict=True), 1):
        setting = memory.setting(number)
        state, closing_s = _turn(engine, state, memory.opening(number), turn.closing, setting, answer)
        seen += len(turn.opening) + len(answer.tokens) + len(turn.closing)
        started = engine.clock()
        left = memory.forget(state, number, answer, seen)
        answer.compress_s = engine.clock() - started
        peak = engine.peak_memory_mb()
        yield Played(turn, answer, seen, state, left, answer.first_token_s + closing_s, peak)
        state = left


def _turn(
    engine: LocalEngine,
    state: CacheState | None,
    opening: Sequence[int],
    closing: Sequence[int],
    setting: TurnSetting,
    answer: Answer,
) -> tuple[CacheState, float]:
    """Read, answer and close a turn; return the state and the seconds of closing."""
    statistics = setting.while_decoding
    held = setting.holding and setting.policy.acts_each_step
    # if a turn is held at its budget, only the tokens that were just read are complete
    at_the_end = "reconstruction" in statistics and not held
    room = 0 if held else answer.max_new_tokens + len(closing)
    started = engine.clock()
    state = setting.hold(engine.extend(state, opening, statistics, room, repeat=not at_the_end))
    answer.first_token_s = engine.clock() - started

    watcher = setting.watch(answer)
    started = engine.clock()
    unread: list[int] = []
    while True:
        answer.kept.append(state.entries)
        (token,) = engine.next_tokens(state.logits[None], 0.0, [None])
        if token in engine.eos:
            answer.finish_reason = "stop"
            break
        answer.tokens.append(token)
        if len(answer.tokens) == answer.max_new_tokens:
            unread = [token]
            break
        before = watcher.before_attention(state.logits[None]) if watcher else None
        state = engine.extend(state, [token], statistics, room, before_attention=before)
        state = setting.hold(state, given_up=True)
    answer.decode_s = engine.clock() - started
    if watcher:
        answer.record |= watcher.record(state)

    started = engine.clock()
    if unread or closing:
        state = setting.hold(engine.extend(state, [*unread, *closing], statistics, repeat=not at_the_end))
    if at_the_end:
        state = engine.repeated(state, [*opening, *answer.tokens, *closing])
    return state.settled(), engine.clock() - started


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float | None:
    """Return the share of the n-grams that occurred earlier in the text; None if there are no n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def answer_nll(engine: LocalEngine, played: Sequence[Played]) -> list[float | None]:
    """Return the mean nats per token of each answer under the full cache; None for an empty answer."""
    ids: list[int] = []
    spans = []
    for one in played:
        ids += one.turn.opening
        spans.append((len(ids), len(ids) + len(one.answer.tokens)))
        ids += [*one.answer.tokens, *one.turn.closing]
    if len(ids) < 2:
        return [None] * len(spans)
    # no logits predict the first token
    _, nats = engine.score(None, ids[:-1], ids[1:], frozenset())
    return [float(nats[start - 1 : end - 1].mean()) if end > start else None for start, end in spans]


def anatomy(state: CacheState | None) -> list[Row]:
    """Return for each layer: kv_heads, entries per head (mean), head_dim, dtype, bytes, bytes_per_token."""
    rows = []
    for number, layer in enumerate(state.layers if state else ()):
        keys = layer.parts[0].keys
        rows.append(
            {
                "layer": number,
                "kind": "full" if layer.window is None else "sliding",
                "kv_heads": sum(part.positions.shape[-2] for part in layer.parts),
                "entries": float(layer.n),
                "head_dim": keys.shape[-1],
                "dtype": f"int{keys.bits}" if isinstance(keys, Packed) else str(keys.dtype).removeprefix("torch."),
                "bytes": layer.nbytes,
                "bytes_per_token": layer.nbytes / layer.n if layer.n else None,
            }
        )
    return rows


def memory_of(spec: Row, tokenizer: Any, conversation: Row, turns: Sequence[Turn], chat: bool, engine: Any) -> Memory:
    """Return the memory for the policy or control of the spec."""
    budget = Budget.parse(spec["budget"])
    if spec["kind"] == TEXT_DROP:
        # imported by name, so that the code hash of policies does not include the control
        module = importlib.import_module("kv_transition.studies.chat.text_drop")
        setting = TurnSetting(create("full", {}), Budget.parse("r1"), mode="chat")
        users = [turn.user for turn in turns]
        return module.TextMemory(engine, tokenizer, conversation["system"], users, turns, budget, chat, setting)
    policy = create(spec["kind"], spec["hyper_parameters"])
    return CacheMemory(turns, TurnSetting(policy, budget, mode="chat"), spec["hold"])


def turns_of(tokenizer: Any, conversation: Row, chat: bool) -> list[Turn]:
    """Return the turns of a row of `tables.CONVERSATIONS`. Raises UserError with the name of the conversation."""
    users = [turn["content"] for turn in json.loads(conversation["turns"])]
    try:
        return render(tokenizer, conversation["system"], users, chat=chat)
    except UserError as error:
        raise UserError(f"conversation {conversation['conversation_id']}: {error}") from None


@dataclass
class Conversation:
    """The rows of a conversation for `tables.CHAT` and `tables.CHAT_LAYERS`."""

    rows: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)


def conversation_rows(
    engine: LocalEngine, conversation: Row, turns: Sequence[Turn], spec: Row, chat: bool
) -> Conversation:
    """Play a conversation and return its rows. A turn that runs out of memory is a row with an error, as are later
    turns.
    """
    memory = memory_of(spec, engine.tokenizer, conversation, turns, chat, engine)
    key = {name: spec[name] for name in ("chat_set", "policy", "budget")}
    key["conversation_id"] = conversation["conversation_id"]
    answers = [
        Answer(job.answer_seed(spec["seed"], key["conversation_id"], number), spec["max_tokens"])
        for number in range(1, len(turns) + 1)
    ]
    made, played, error = Conversation(), [], None
    game = play(engine, turns, memory, answers)
    token_bytes, seen = 0.0, 0
    for number, turn in enumerate(turns, 1):
        if error is None and seen + len(turn.opening) > spec["max_length"]:
            error = (
                f"TOO_LONG: turn {number} begins after {seen} tokens and has {len(turn.opening)}, which is more than "
                f"model.max_length, {spec['max_length']}"
            )
        row = key | {"turn": number, "user": turn.user, "chat_hash": digest(spec)}
        row["checks"] = json.dumps(json.loads(conversation["turns"])[number - 1]["checks"], ensure_ascii=False)
        made.rows.append(row)
        if error is None:
            try:
                one = next(game)
            except (torch.OutOfMemoryError, MemoryError) as failure:
                error = f"OOM: {(str(failure).strip().splitlines() or ['no memory left'])[0]}"
                if engine.device.type == "cuda":
                    torch.cuda.empty_cache()
        if error is not None:
            row["error"] = error
            continue
        played.append(one)
        seen = one.seen
        token_bytes = token_bytes or one.before.nbytes / one.before.length
        row |= _measured(engine, one, token_bytes)
        for when, state in (("before", one.before), ("after", one.after)):
            made.layers += [key | {"turn": number, "when": when} | layer for layer in anatomy(state)]
        # free their tensors, because the next turn may need the memory
        one.before = one.after = None
    if spec["answer_nll"]:
        for row, nll in zip(made.rows, _nll_if_it_fits(engine, played), strict=False):
            row["answer_nll"] = nll
    return made


def _nll_if_it_fits(engine: LocalEngine, played: Sequence[Played]) -> list[float | None]:
    try:
        return answer_nll(engine, played)
    except (torch.OutOfMemoryError, MemoryError):
        print(
            "the full cache of this conversation does not fit into the memory, so answer_nll is not computed",
            file=sys.stderr,
        )
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(played)


def _measured(engine: LocalEngine, one: Played, token_bytes: float) -> Row:
    answer, after = one.answer, one.after
    return {
        "text": engine.tokenizer.decode(answer.tokens, skip_special_tokens=True),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(one.turn.opening) + len(one.turn.closing),
        "completion_tokens": len(answer.tokens),
        "tokens_seen": one.seen,
        "budget_entries": answer.budget_entries,
        "entries_before": one.before.entries,
        "entries_after": after.entries if after else 0.0,
        "bytes_before": one.before.nbytes,
        "bytes_after": after.nbytes if after else 0,
        "total_bytes_after": after.total_nbytes if after else 0,
        "full_bytes": round(one.seen * token_bytes),
        "read_s": one.read_s,
        "decode_s": answer.decode_s,
        "compress_s": answer.compress_s,
        "ttft_s": answer.first_token_s,
        "peak_mem_mb": one.peak_mem_mb,
        "repetition": repetition(answer.tokens),
        "raw": json.dumps({"token_ids": answer.tokens, "seed": answer.seed} | answer.record),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--conversations", "--output", "--layers")
    spec = arguments.spec
    conversations = job.read_bin(arguments.conversations)
    tokenizer = load_tokenizer(spec["model"]["name"], spec["model"]["revision"])
    chat = spec["chat_template"] == "auto" and tokenizer.chat_template is not None
    # rendered before the model is loaded, so that an invalid template costs no GPU time
    turns = [turns_of(tokenizer, conversation, chat) for conversation in conversations]
    engine = job.load_engine(spec["model"], arguments.threads)
    rows: list[Row] = []
    layers: list[Row] = []
    for number, (conversation, own) in enumerate(zip(conversations, turns, strict=True), 1):
        made = conversation_rows(engine, conversation, own, spec, chat)
        rows += made.rows
        layers += made.layers
        failed = sum("error" in row for row in made.rows)
        note = f", {failed} of them failed" if failed else ""
        print(f"played {number} of {len(turns)} conversations ({len(own)} turns{note})", file=sys.stderr, flush=True)
    facts = {
        "config_hash": digest({key: value for key, value in spec.items() if key != "code"}),
        "model_load_s": round(engine.load_s, 3),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template": "the tokenizer's" if chat else "plain",
        "kind": spec["kind"],
        "hyper_parameters": spec["hyper_parameters"],
        "source": read_metadata(arguments.conversations).get("source", ""),
        **job.model_facts(spec["model"], engine),
    }
    write_table(arguments.layers, rows_to_table(layers, CHAT_LAYERS), facts)
    write_table(arguments.output, rows_to_table(rows, CHAT), facts)


if __name__ == "__main__":
    job.run(main)
