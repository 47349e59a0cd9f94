"""The state of a cache: keys, values and positions of each layer, and the statistics that policies read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from kv_transition.cache.quantize import Packed
from kv_transition.cache.room import SLACK, Room
from kv_transition.cache.rotary import Rotary

WINDOW = 64
"""Queries kept per layer: any attention window of up to this many last queries can be recomputed."""

STATISTICS = frozenset({"attn_sum", "query_entropy", "recent_queries", "query_mean", "query_cov"})
"""Statistics that are computed during the prefill unless a policy names those that it reads"""

ON_REQUEST = frozenset({"output_norm", "reconstruction"})
"""Statistics that are computed only if a policy names them: they need the model's weights or a second reading"""

EVERY = STATISTICS | ON_REQUEST

MOMENTS = frozenset({"query_mean", "query_cov"})

PER_ENTRY = (
    "keys",
    "values",
    "positions",
    "attn_sum",
    "query_entropy",
    "output_norm",
    "reconstruction",
    "angles",
    "bias",
)
"""fields of a layer that have a value for each entry"""


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer. Entries that remain after a compression keep their statistics.

    The layer has H query heads in Hkv groups, n entries per KV head in rising order of position, and d channels. The
    shapes below are those of one sequence; a batch has one more dimension in front, and the same number of entries in
    each sequence. A statistic that was not maintained is None.
    """

    keys: Tensor | Packed
    """[Hkv, n, d], rotated to the entries' true positions, or to ``angles``"""
    values: Tensor | Packed
    """[Hkv, n, d]"""
    positions: Tensor
    """[Hkv, n] int64, the position of each entry in the text; -1 is padding"""
    scale: float
    """factor of query-key products before the softmax"""
    attn_sum: Tensor | None = None
    """[Hkv, n] fp32, attention received from every query so far, mean over the group's query heads"""
    query_entropy: Tensor | None = None
    """[Hkv, n] fp32, nats: entropy of the attention of the query at the entry's position, mean over all H heads"""
    output_norm: Tensor | None = None
    """[Hkv, n] fp32, L1 norm of the value after the output projection, mean over the group's query heads"""
    reconstruction: Tensor | None = None
    """[Hkv, n] fp32, greatest attention received while the model repeated the text; +inf if not repeated"""
    recent_queries: Tensor | None = None
    """[H, w, d] rotated, the last w <= WINDOW queries"""
    query_mean: Tensor | None = None
    """[H, d] fp32, un-rotated, of all queries after the first 4"""
    query_cov: Tensor | None = None
    """[H, d, d] fp32, of the same queries (divided by their number)"""
    rotary: Rotary | None = None
    """rotation of keys and queries; None if the model's rotation is not known"""
    angles: Tensor | None = None
    """[Hkv, n] fp32, the position that each key is rotated to, if it differs from the position in the text"""
    bias: Tensor | None = None
    """[Hkv, n] fp32, added to the attention logits: log m for an entry merged from m tokens, -inf for padding"""
    anchors: Tensor | None = None
    """[Hkv, s, d], keys of the first entries before any re-rotation; each re-rotation starts from these"""
    window: int | None = None
    """a sliding-window layer sees this many tokens, itself included, and is never evicted"""
    room: Room | None = field(default=None, repr=False, compare=False)

    @property
    def n(self) -> int:
        return self.positions.shape[-1]

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """Return the pieces of the layer with the same number of entries in each head, in the order of the heads."""
        return (self,)

    def with_parts(self, parts: Sequence[LayerCache]) -> LayerCache:
        """Return the same layer made of other pieces, as many as `parts` has."""
        (only,) = parts
        return only

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values, measured from the tensors."""
        return _nbytes(self.keys) + _nbytes(self.values)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, angles: Tensor | None, room: int) -> LayerCache:
        """Return the layer with new entries appended: keys, values [Hkv, q, d], positions and angles [Hkv, q].

        The statistics of new entries begin at 0, ``reconstruction`` at +inf. room: number of entries to leave space for
        if new storage is allocated.
        """
        n, q = self.n, keys.shape[-2]
        grown = {"positions": torch.cat([self.positions, positions], -1)}
        if self.angles is not None or angles is not None:
            old = self.positions.to(torch.float32) if self.angles is None else self.angles
            new = positions.to(torch.float32) if angles is None else angles
            grown["angles"] = torch.cat([old, new], -1)
        for name in ("attn_sum", "query_entropy", "output_norm", "reconstruction", "bias"):
            if (old := getattr(self, name)) is not None:
                first = torch.inf if name == "reconstruction" else 0
                grown[name] = torch.cat([old, old.new_full(positions.shape, first)], -1)
        if isinstance(self.keys, Packed):
            return replace(self, keys=self.keys.append(keys), values=self.values.append(values), **grown)
        own = self.room
        # If another state has appended to the same storage, this one gets storage of its own.
        if own is None or not own.has_room_behind(n, q):
            lent = own is not None and own.lent
            own = Room.of(self.keys, self.values, q + max(room, SLACK if lent else 0), lent=lent)
        return replace(self, **own.append(keys, values), **grown)

    def select(self, index: Tensor) -> LayerCache:
        """Return the layer with the entries ``index`` [Hkv, K] only, rising in each row."""
        vectors = {name: _rows(getattr(self, name), index) for name in ("keys", "values")}
        return replace(self, room=None, **vectors, **self._numbers(index))

    def drop(self, gone: Tensor) -> LayerCache:
        """Return the layer without the entry ``gone`` [Hkv, 1] of each head, in the same order.

        The result equals `select` of all other entries. The storage of this layer may be written to in place: neither
        this layer nor any layer that shares its storage since the last `drop` may be used again. See `Room`.
        """
        n, room = self.n, self.room
        rest = torch.arange(n - 1, device=gone.device)
        numbers = self._numbers(rest + (rest >= gone))
        if room is None or not room.lent or not room.has_room_behind(n, 0):
            room = Room.of(self.keys, self.values, SLACK, lent=True)
        return replace(self, **room.drop(gone), **numbers)

    def _numbers(self, index: Tensor) -> dict[str, Tensor]:
        """Return the fields other than keys and values of the entries ``index``."""
        names = (name for name in PER_ENTRY if name not in ("keys", "values"))
        return {name: tensor.gather(-1, index) for name in names if (tensor := getattr(self, name)) is not None}

    def cut(self, start: int, stop: int) -> LayerCache:
        """Return the layer with the entries ``start`` to ``stop``, as views; statistics of the whole layer stay."""
        chosen = {}
        for name in PER_ENTRY:
            tensor = getattr(self, name)
            if isinstance(tensor, Packed):
                chosen[name] = tensor.cut(start, stop)
            elif tensor is not None:
                chosen[name] = tensor[..., start:stop, :] if name in ("keys", "values") else tensor[..., start:stop]
        return replace(self, room=self.room if start == 0 else None, **chosen)

    def without(self, statistics: frozenset[str]) -> LayerCache:
        """Return the layer without these statistics, because they are not maintained any more."""
        return replace(self, **dict.fromkeys(statistics))


@dataclass(frozen=True)
class SplitLayer:
    """A layer whose KV heads hold different numbers of entries. Each part is a `LayerCache` of one or more heads."""

    parts: tuple[LayerCache, ...]

    @property
    def n(self) -> float:
        """Return the number of entries per KV head, mean over the heads."""
        heads = [part.positions.shape[-2] for part in self.parts]
        return sum(part.n * h for part, h in zip(self.parts, heads, strict=True)) / sum(heads)

    @property
    def window(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def with_parts(self, parts: Sequence[LayerCache]) -> SplitLayer:
        return SplitLayer(tuple(parts))


Layer = LayerCache | SplitLayer


@dataclass(frozen=True)
class CacheState:
    """The cache of a sequence, or of a batch of sequences, over all layers.

    Immutable: `extend` and `compress` return new states, which may share memory with the old one.
    """

    layers: tuple[Layer, ...]
    length: int | Tensor
    """number of tokens read so far; [B, 1, 1] int64 for a batch"""
    logits: Tensor | None = field(default=None, repr=False)
    """[V] fp32, logits of the next token; None before the first token. [B, V] for a batch"""
    shift: int | Tensor = 0
    """position of the next token in the text minus its rotary position; [B, 1, 1] int64 for a batch"""

    @property
    def evictable(self) -> tuple[Layer, ...]:
        """Return the full-attention layers. Layers with a sliding window are never evicted."""
        return tuple(layer for layer in self.layers if layer.window is None)

    @property
    def entries(self) -> float:
        """Return the number of entries per KV head, mean over the evictable layers."""
        layers = self.evictable
        return sum(layer.n for layer in layers) / len(layers)

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values that budgets count: those of the evictable layers."""
        return sum(layer.nbytes for layer in self.evictable)

    @property
    def total_nbytes(self) -> int:
        """Return the bytes of all keys and values, including sliding-window layers."""
        return sum(layer.nbytes for layer in self.layers)

    def select(self, indices: Sequence[Tensor | None]) -> CacheState:
        """Return the state with the entries ``indices[l]`` [Hkv, K_l] of each layer (None: all entries); the logits
        stay.
        """
        pairs = zip(self.layers, indices, strict=True)
        return replace(self, layers=tuple(layer if i is None else layer.select(i) for layer, i in pairs))

    def settled(self) -> CacheState:
        """Return the same state, except that appending to the result allocates new storage."""
        parts = ([replace(part, room=None) for part in layer.parts] for layer in self.layers)
        return replace(self, layers=tuple(map(lambda layer, own: layer.with_parts(own), self.layers, parts)))

    def without_last(self) -> CacheState:
        """Return the state without the last token, so that the token can be read again with the remaining entries.

        Every head must still hold the entry of the last token, as its last entry. The statistics of other entries still
        include the attention of that token.
        """
        last = self.length - 1
        layers = []
        for layer in self.layers:
            if not all(bool((part.positions[..., -1] == last).all()) for part in layer.parts):
                raise ValueError("the last token's entry has been evicted, so the token cannot be removed")
            parts = [
                replace(
                    part.cut(0, part.n - 1),
                    recent_queries=None if part.recent_queries is None else part.recent_queries[..., :-1, :],
                )
                for part in layer.parts
            ]
            layers.append(layer.with_parts(parts))
        return CacheState(layers=tuple(layers), length=last, shift=self.shift)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the vectors ``index`` [*, K] of x [*, n, d]. It moves whole rows, which is faster than gather."""
    d = x.shape[-1]
    if x.dim() == 3 and not x.is_contiguous():  # avoid a copy of the whole view
        return torch.stack([head.index_select(0, chosen) for head, chosen in zip(x, index, strict=True)])
    first = torch.arange(index.shape[:-1].numel(), device=index.device).view(*index.shape[:-1], 1) * x.shape[-2]
    return x.reshape(-1, d).index_select(0, (index + first).flatten()).view(*index.shape, d)


def _nbytes(stored: Tensor | Packed) -> int:
    return stored.nbytes if isinstance(stored, Packed) else stored.numel() * stored.element_size()


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    """Return every tensor of a layer by name; those of a packed or split layer have dotted names."""
    found: dict[str, Tensor] = {}
    if isinstance(layer, SplitLayer):
        for number, part in enumerate(layer.parts):
            found |= {f"{number}.{name}": tensor for name, tensor in tensors_of(part).items()}
        return found
    for f in fields(layer):
        value = getattr(layer, f.name)
        if isinstance(value, Tensor):
            found[f.name] = value
        elif isinstance(value, Packed):
            found |= {f"{f.name}.{name}": tensor for name, tensor in value.tensors().items()}
    return found


def same(a: CacheState, b: CacheState, *, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Return whether two states of single sequences agree in every tensor."""
    if a.length != b.length or a.shift != b.shift or len(a.layers) != len(b.layers):
        return False
    pairs = [(tensors_of(x), tensors_of(y)) for x, y in zip(a.layers, b.layers, strict=True)]
    if any(x.keys() != y.keys() for x, y in pairs):
        return False
    tensors = [(x[k], y[k]) for x, y in pairs for k in x]
    if a.logits is not None and b.logits is not None:
        tensors.append((a.logits, b.logits))
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol) for x, y in tensors)
