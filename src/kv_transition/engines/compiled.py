"""Decoding as one compiled graph: one token of every sequence at a time, with caches in fixed buffers.

It is like transformers' StaticCache, but for evicted caches: each sequence, layer and head may hold its own number of
entries. All entries end at the same place of the buffers, so that new entries have one place; places before the first
entry of a sequence have bias -inf. Shapes and addresses do not change between tokens and batches, so one graph serves
all lengths up to the capacity of the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kv_transition.cache.quantize import Packed
from kv_transition.cache.state import EVERY, CacheState, Layer, LayerCache, Room
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError

RUN = 256
"""Number of entries that one thread block of a GPU reads. The entries of a head are divided into runs of this length,
because one query per head would leave most of a GPU idle"""

_RUNS_TO_RECORD = 3
"""Number of runs for a CUDA graph: the second run records it, the third replays it"""

_MOST_GRAPHS = 64
"""Number of graphs kept for one function; torch's default is 8"""


class CompiledDecoder:
    """Reads one token at a time on top of a batch of states, without statistics.

    `load` copies the states in, `logits` are those of the next tokens, and `read` takes the chosen tokens. Sequences
    are named by their index in the batch. Buffers are reused; a batch with more or longer sequences than before
    allocates and compiles again, so the largest batch should come first.
    """

    def __init__(self, engine: LocalEngine, *, backend: str = "inductor"):
        """Compile the step of an engine. backend: that of torch.compile; inductor replays CUDA graphs on a GPU."""
        self.engine = engine
        self.live: list[int] = []
        """sequences that are still decoded, in the order of the rows of ``logits``"""
        self.logits = torch.empty(0)
        """[len(live), V] fp32, logits of the next token of each live sequence"""
        self._memory: _Memory | None = None
        self._backend = backend
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        options = {"mode": "reduce-overhead"} if backend == "inductor" and engine.device.type == "cuda" else {}
        self._step = torch.compile(_step, backend=backend, fullgraph=True, dynamic=False, **options)

    def refusal(self, states: Sequence[CacheState]) -> str | None:
        """Return the reason why these sequences cannot or should not be decoded here, or None."""
        if self._backend == "inductor" and self.engine.device.type != "cuda":
            return "the model is not on a GPU"
        if len(set(getattr(self.engine.model, "hf_device_map", {}).values())) > 1:
            return "the model is distributed over several devices"
        if any(isinstance(part.keys, Packed) for layer in states[0].layers for part in layer.parts):
            return "the cache is quantized"
        return None

    @torch.no_grad()
    def load(self, states: Sequence[CacheState], room: int) -> None:
        """Copy in states of single sequences, with space for ``room`` more tokens of each.

        Compiles if the buffers are too small. Raises UserError if that fails.
        """
        remade = self._memory is None or not self._memory.holds(states, room)
        if remade:
            rows = max(len(states), 0 if self._memory is None else self._memory.rows)
            # free the old buffers before allocating the new ones
            self._memory = None
            self._memory = _Memory(states, rows, room, self.engine)
        self._taken = self._memory.fill(states)
        if remade:
            # Compilation, warm-up and recording happen here, so that they are part of no answer's time. The values
            # that these runs write are overwritten by the first token.
            try:
                for _ in range(_RUNS_TO_RECORD):
                    self._run()
            except torch.OutOfMemoryError:
                # otherwise half of the batch would use the same too large buffers
                self._memory = None
                raise
        self._steps, self._room = 0, room
        self.live = list(range(len(states)))
        self.logits = torch.stack([state.logits.to(self.engine.device) for state in states])

    @torch.no_grad()
    def read(self, said: Mapping[int, int]) -> None:
        """Read the next token of each sequence that continues; the others have ended."""
        if self._steps == self._room:
            raise ValueError(f"there was space for {self._room} tokens only")
        memory = self._memory
        ids = torch.zeros(memory.rows, 1, dtype=torch.int64)
        for number, token in said.items():
            ids[number] = token
        memory.ids.copy_(ids)
        logits = self._run()
        memory.advance()
        self._steps += 1
        self.live = list(said)
        # a copy: a replayed graph writes its results to the same place again
        self.logits = logits[torch.tensor(self.live, device=logits.device)]

    def _run(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return self._step(self.engine.model, self._memory)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(
                f"decoding.compile: the model cannot be compiled ({reason}); set decoding.compile to false"
            ) from error

    def entries(self, number: int) -> float:
        """Return the entries per KV head of a sequence, mean over the evictable layers."""
        return self._taken[number].entries + self._steps

    def state(self, number: int) -> CacheState:
        """Return one sequence as views of the buffers, valid until the next `load`, without statistics."""
        taken, t = self._taken[number], self._steps
        steps = torch.arange(taken.length, taken.length + t)
        layers = []
        for layer in taken.layers:
            layers.append(layer.with_parts([_grown(part, steps, taken.shift) for part in layer.parts]))
        logits = self.logits[self.live.index(number)]
        return CacheState(tuple(layers), taken.length + t, logits, taken.shift)


@lru_cache(maxsize=1)
def decoder_of(engine: LocalEngine) -> CompiledDecoder:
    """Return the decoder of an engine, which is cached, so that buffers and graphs serve all batches."""
    return CompiledDecoder(engine)


def _step(model: torch.nn.Module, memory: _Memory) -> Tensor:
    """Read one more token of each sequence; return the logits [B, V] fp32 of the next ones."""
    output = model(
        input_ids=memory.ids,
        position_ids=memory.position_ids,
        past_key_values=memory,
        use_cache=True,
        logits_to_keep=1,
        reading=memory,
    )
    return output.logits[:, -1].float()


class _Memory:
    """The buffers, in the form of a transformers cache, as `Reading` is."""

    is_compileable = True

    def __init__(self, states: Sequence[CacheState], rows: int, room: int, engine: LocalEngine):
        """Allocate space for ``rows`` sequences like these, and ``room`` more tokens of each."""
        first, device = states[0], engine.device
        self.rows = rows
        self.windows = [layer.window for layer in first.layers]
        longest = _longest(states)
        # layers with a sliding window are short and have a capacity of their own
        self.capacity = {windowed: _rounded(n + max(room, 1)) for windowed, n in longest.items()}
        self.keys, self.values, self.biases = [], [], []
        for layer in first.layers:
            part = layer.parts[0]
            at = (rows, sum(p.positions.shape[0] for p in layer.parts), self.capacity[layer.window is not None])
            self.keys.append(part.keys.new_zeros(*at, part.keys.shape[-1]))
            self.values.append(part.values.new_zeros(*at, part.values.shape[-1]))
            self.biases.append(torch.zeros(at, dtype=torch.float32, device=part.keys.device))
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros_like(self.ids)
        self.slots = {windowed: torch.zeros(1, dtype=torch.int64, device=device) for windowed in longest}
        fixed = (*self.keys, *self.values, *self.biases, self.ids, self.position_ids, *self.slots.values())
        for tensor in fixed:
            # otherwise a replayed graph would copy each of them before every token
            torch._dynamo.mark_static_address(tensor)

    def holds(self, states: Sequence[CacheState], room: int) -> bool:
        fits = all(n + room <= self.capacity[windowed] for windowed, n in _longest(states).items())
        return fits and len(states) <= self.rows

    def fill(self, states: Sequence[CacheState]) -> list[CacheState]:
        """Copy the states in; return them with the buffers as their storage."""
        ends = _longest(states)
        for windowed, end in ends.items():
            self.slots[windowed].fill_(end)
        self.position_ids.zero_()
        self.position_ids[: len(states), 0] = torch.tensor([s.length - s.shift for s in states])
        for number, window in enumerate(self.windows):
            # Rows without a sequence see only their own new tokens, so that no row is without an entry.
            self.biases[number][..., : ends[window is not None]] = -torch.inf
            self.biases[number][..., ends[window is not None] :] = 0
        return [
            replace(s, layers=tuple(self._take(row, i, layer, ends) for i, layer in enumerate(s.layers)))
            for row, s in enumerate(states)
        ]

    def _take(self, row: int, number: int, layer: Layer, ends: Mapping[bool, int]) -> Layer:
        end, head, parts = ends[layer.window is not None], 0, []
        for part in layer.parts:
            heads, n = part.positions.shape
            own = slice(head, head + heads)
            room = Room(self.keys[number][row, own, end - n :], self.values[number][row, own, end - n :], n)
            room.keys[:, :n] = part.keys
            room.values[:, :n] = part.values
            self.biases[number][row, own, end - n : end] = 0 if part.bias is None else part.bias
            kept = {"keys": room.keys[:, :n], "values": room.values[:, :n], "room": room}
            parts.append(replace(part.without(EVERY), **kept))
            head += heads
        return layer.with_parts(parts)

    def advance(self) -> None:
        self.position_ids.add_(1)
        for slot in self.slots.values():
            slot.add_(1)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return the output [B, H, 1, d] for queries [B, H, 1, d] and the new tokens' keys, values [B, Hkv, 1, d]."""
        window, bias = self.windows[layer], self.biases[layer]
        slot = self.slots[window is not None]
        self.keys[layer].index_copy_(2, slot, keys)
        self.values[layer].index_copy_(2, slot, values)
        place = torch.arange(bias.shape[-1], device=bias.device)
        hidden = place > slot if window is None else (place > slot) | (place <= slot - window)
        return _attend_one(queries, self.keys[layer], self.values[layer], bias.masked_fill(hidden, -torch.inf), scale)


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return the attention of queries [B, H, 1, d] over keys, values [B, Hkv, C, d] with bias [B, Hkv, C].

    C is a multiple of `RUN`.
    """
    batch, kv_heads, capacity, _ = keys.shape
    group, runs = queries.shape[1] // kv_heads, capacity // RUN
    rows = queries.reshape(batch * kv_heads, 1, group, -1).expand(-1, runs, -1, -1).flatten(0, 1)
    logits = _product(rows, keys.reshape(-1, RUN, keys.shape[-1]).mT) * scale
    logits = logits.view(batch, kv_heads, runs, group, RUN) + bias.view(batch, kv_heads, runs, 1, RUN)
    # over the runs and the entries in them
    every = (2, 4)
    weights = (logits - logits.amax(every, keepdim=True)).exp()
    total = weights.sum(every).unsqueeze(-1)
    sums = _product(weights.to(values.dtype).flatten(0, 2), values.reshape(-1, RUN, values.shape[-1]))
    output = sums.view(batch, kv_heads, runs, group, -1).sum(2) / total
    return output.reshape(batch, kv_heads * group, 1, -1).to(queries.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the batched matrix product, accumulated and returned in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _grown(part: LayerCache, steps: Tensor, shift: int) -> LayerCache:
    """Return a part as it was loaded, with the entries that were written behind it since then."""
    steps = steps.to(part.positions.device).expand(part.positions.shape[0], -1)
    new = slice(part.n, part.n + steps.shape[1])
    angles = (steps - shift).to(torch.float32) if shift else None
    grown = part.append(part.room.keys[:, new], part.room.values[:, new], steps, angles, 0)
    if part.window is None:
        return replace(grown, room=None)
    return replace(grown.cut(max(0, grown.n - part.window), grown.n), room=None)


def _longest(states: Sequence[CacheState]) -> dict[bool, int]:
    """Return the largest number of entries of a head, in layers without and with a sliding window."""
    longest: dict[bool, int] = {}
    for layer in (layer for state in states for layer in state.layers):
        windowed = layer.window is not None
        longest[windowed] = max(longest.get(windowed, 0), *(part.n for part in layer.parts))
    return longest


def _rounded(n: int) -> int:
    """Return a capacity of at least ``n``, less than a quarter (or `RUN`) larger, so that few capacities occur."""
    grain = max(RUN, (1 << n.bit_length()) // 8)
    return -(-n // grain) * grain
