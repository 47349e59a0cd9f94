"""A layer with two tiers: evicted entries (cold) are kept in host memory instead of being lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kv_transition.cache.state import EVERY, PER_ENTRY, LayerCache, Room


@dataclass(frozen=True)
class TieredLayer(LayerCache):
    """A layer of one sequence with two tiers. Its own tensors are the hot entries, which receive attention and count in
    a budget.

    Every entry is either hot or cold. An entry keeps its statistics when it changes tier; they do not change while it
    is cold. Hot tensors may have a batch dimension of 1, cold tensors never have it.
    """

    cold: LayerCache | None = None
    """[Hkv, c, d] on the CPU, unordered; None as long as nothing was evicted"""
    moved: int = 0
    """number of changes of tier so far, in both directions, counted per KV head"""
    recalled: int = 0
    """number of changes from cold to hot"""

    @property
    def entry_nbytes(self) -> int:
        """Return the bytes of one KV head's key and value of one entry."""
        return sum(t.shape[-1] * t.element_size() for t in (self.keys, self.values))

    @property
    def cold_nbytes(self) -> int:
        """Return the bytes of the keys and values in host memory."""
        return 0 if self.cold is None else self.cold.nbytes


def offload(before: LayerCache, kept: LayerCache) -> TieredLayer:
    """Return the layer ``kept``, with the entries of ``before`` that it lacks added to the cold entries.

    kept: a selection of the entries of ``before``, the same number in each head. Raises ValueError for a batch.
    """
    _require_alone(before)
    gone = before.select(_missing(before.positions, kept.positions))
    evicted = LayerCache(
        **{name: _alone(tensor, name).cpu() for name, tensor in _entries(gone).items()}, scale=before.scale
    )
    old = before if isinstance(before, TieredLayer) else TieredLayer(**vars(before))
    cold = evicted if old.cold is None else _joined(old.cold, evicted)
    own = {f: value for f, value in vars(kept).items() if f not in ("cold", "moved", "recalled")}
    return TieredLayer(**own, cold=cold, moved=old.moved + evicted.positions.numel(), recalled=old.recalled)


def attention(layer: TieredLayer, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the current token's attention to each entry if all were visible: [Hkv, n + c] fp32, hot entries first.

    queries [*B, H, 1, d] and keys [*B, Hkv, 1, d], rotated, are those of the token. The softmax is over hot entries,
    cold entries and the token's own entry; mean over the group. Products with cold keys are computed in host memory, so
    that no entry moves.
    """
    heads = layer.positions.shape[-2]
    rows = queries.reshape(heads, -1, queries.shape[-1]).float() * layer.scale

    def logits(rows: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        product = rows @ keys.reshape(heads, -1, keys.shape[-1]).float().mT
        return product if bias is None else product + bias.reshape(heads, 1, -1)

    hot = logits(rows, layer.keys, layer.bias)
    cold = logits(rows.cpu(), layer.cold.keys, layer.cold.bias).to(hot.device)
    weights = torch.cat([hot, cold, logits(rows, keys, None)], -1).softmax(-1)
    return weights[..., :-1].mean(1)


def positions(layer: TieredLayer) -> Tensor:
    """Return the positions of all entries, in the order of `attention`: [Hkv, n + c] int64."""
    hot = _alone(layer.positions, "positions")
    return torch.cat([hot, layer.cold.positions.to(hot.device)], -1)


def exchange(layer: TieredLayer, chosen: Tensor) -> TieredLayer:
    """Return the layer with the entries ``chosen`` [Hkv, n] hot and all others cold; n does not change.

    chosen: indices in the order of `attention`, rising by position in each head. Only entries that change tier are
    moved.
    """
    _require_alone(layer)
    n = layer.n
    comes = chosen >= n
    head, rank = (~comes).nonzero(as_tuple=True)
    stays = torch.zeros_like(comes).index_put((head, chosen[head, rank]), torch.ones_like(head, dtype=torch.bool))
    # In each head the same number of entries leave and enter, and both lists are in the order of the heads.
    slot, leaver = comes.nonzero(as_tuple=True), (~stays).nonzero(as_tuple=True)
    place = tuple(index.cpu() for index in (slot[0], chosen[slot] - n))
    if not len(place[0]):
        return layer
    hot = layer.select(chosen.clamp(max=n - 1).expand(layer.positions.shape))
    cold = _copied(layer.cold)
    for name, tensor in _entries(layer).items():
        own, stored = _alone(getattr(hot, name), name), getattr(cold, name)
        own[slot] = stored[place].to(own.device)
        stored[place] = _alone(tensor, name)[leaver].cpu()
    m = len(place[0])
    # a statistic that is no longer maintained is dropped for all entries
    gone = dict.fromkeys(EVERY & set(_entries(cold)) - set(_entries(layer)))
    return replace(hot, cold=replace(cold, **gone), moved=layer.moved + 2 * m, recalled=layer.recalled + m)


def _entries(layer: LayerCache) -> dict[str, Tensor]:
    """Return all tensors that a layer has for each entry."""
    return {name: tensor for name in PER_ENTRY if (tensor := getattr(layer, name)) is not None}


def _alone(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor without a batch dimension of 1."""
    return tensor.reshape(tensor.shape[-3 if name in ("keys", "values") else -2 :])


def _missing(all_of_them: Tensor, kept: Tensor) -> Tensor:
    """Return the indices [..., n - K] of the positions [..., n] that are not among ``kept`` [..., K]; both rise."""
    nearest = torch.searchsorted(kept.contiguous(), all_of_them.contiguous()).clamp(max=kept.shape[-1] - 1)
    gone = kept.gather(-1, nearest) != all_of_them
    return gone.nonzero()[:, -1].view(*kept.shape[:-1], -1)


def _joined(cold: LayerCache, evicted: LayerCache) -> LayerCache:
    """Return the cold entries with more appended, and free space, because a few are added at every step."""
    grown = cold.append(evicted.keys, evicted.values, evicted.positions, evicted.angles, _spare(cold))
    behind = {}
    for name in (name for name in PER_ENTRY if name in EVERY or name == "bias"):
        new, old = getattr(evicted, name), getattr(cold, name)
        # a statistic that is no longer maintained is dropped for all entries
        behind[name] = None if new is None else torch.cat([old, new], -1)
    return replace(grown, **behind)


# Tensors created in inference mode cannot be written to outside of it.
@torch.inference_mode(False)
def _copied(cold: LayerCache) -> LayerCache:
    """Return the cold entries in separate storage, with free space."""
    shapes = {name: getattr(cold, name).shape for name in ("keys", "values")}
    empty = {name: getattr(cold, name).new_empty(s[0], s[1] + _spare(cold), s[2]) for name, s in shapes.items()}
    room = Room(**empty, used=cold.n)
    copied = {name: getattr(room, name)[:, : cold.n] for name in shapes}
    for name, tensor in copied.items():
        tensor.copy_(getattr(cold, name))
    rest = {name: tensor.clone() for name, tensor in _entries(cold).items() if name not in copied}
    return replace(cold, **copied, **rest, room=room)


def _spare(cold: LayerCache) -> int:
    """Return the number of free entries to allocate, so that cold storage is rarely copied."""
    return max(64, cold.n // 8)


def _require_alone(layer: LayerCache) -> None:
    if layer.positions.dim() == 3 and len(layer.positions) > 1:
        raise ValueError("evicted entries are stored for one sequence only; decode such answers one by one")
