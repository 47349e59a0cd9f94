"""Batches of caches, so that the model's weights are read once for several sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.cache.quantize import Packed
from kv_transition.cache.room import Room
from kv_transition.cache.state import CacheState, Layer, LayerCache


def stack(states: Sequence[CacheState], statistics: frozenset[str]) -> CacheState:
    """Return one batched state of single sequences with the same kinds of layers; other statistics are dropped.

    Sequences with fewer entries than the longest are padded in front. Padding has position -1 and bias -inf, so that it
    receives no attention. Policies that act at each step get no padded batch.
    """
    return gather(list(states), statistics, 0)


def gather(states: list[CacheState], statistics: frozenset[str], room: int) -> CacheState:
    """Return the batch of `stack`, and empty the list ``states``.

    Each layer of the single sequences is given up when the batch has it, so that the memory of both is that of one, and
    one more layer. room: number of entries for which the batch has free space.
    """
    device = states[0].logits.device
    length = torch.tensor([s.length for s in states], device=device).view(-1, 1, 1)
    logits = torch.stack([s.logits.to(device) for s in states])
    shifts = [s.shift for s in states]
    waiting = [list(reversed(s.layers)) for s in states]
    states.clear()
    layers = []
    while waiting[0]:
        layers.append(_with_room(_stack_layers([own.pop() for own in waiting], statistics), room))
    return CacheState(
        layers=tuple(layers),
        length=length,
        logits=logits,
        shift=torch.tensor(shifts, device=device).view(-1, 1, 1) if any(shifts) else 0,
    )


def take(state: CacheState, rows: Sequence[int], room: int = 0) -> CacheState:
    """Return the sequences ``rows`` of a batch, with free space for ``room`` more entries."""
    index = torch.tensor(rows)

    def chosen(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, index.to(tensor.device))

    return CacheState(
        layers=tuple(_with_room(_map(layer, chosen), room) for layer in state.layers),
        length=chosen(state.length),
        logits=chosen(state.logits),
        shift=chosen(state.shift) if isinstance(state.shift, Tensor) else state.shift,
    )


def row(state: CacheState, number: int) -> CacheState:
    """Return one sequence of a batch without its padding, as views."""

    def alone(layer: Layer) -> Layer:
        return layer.with_parts([_unpadded(_map_part(part, lambda tensor: tensor[number])) for part in layer.parts])

    return CacheState(
        layers=tuple(alone(layer) for layer in state.layers),
        length=int(state.length[number]),
        logits=state.logits[number],
        shift=int(state.shift[number]) if isinstance(state.shift, Tensor) else state.shift,
    )


def _unpadded(layer: LayerCache) -> LayerCache:
    padding = int((layer.positions[0] < 0).sum())
    return layer.cut(padding, layer.n) if padding else layer


def _stack_layers(layers: Sequence[Layer], statistics: frozenset[str]) -> Layer:
    stacked = [_stack(parts, statistics) for parts in zip(*(layer.parts for layer in layers), strict=True)]
    return layers[0].with_parts(stacked)


def _stack(layers: Sequence[LayerCache], statistics: frozenset[str]) -> LayerCache:
    n = max(layer.n for layer in layers)
    padding = [n - layer.n for layer in layers]
    first = layers[0]

    def joined(tensors: Sequence[Tensor], dim: int, fill: float = 0) -> Tensor:
        if any(padding):
            # functional.pad counts dimensions from the last
            behind = [0, 0] * (-dim - 1)
            tensors = [functional.pad(t, [*behind, p, 0], value=fill) for t, p in zip(tensors, padding, strict=True)]
        return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)

    def stored(name: str) -> Tensor | Packed:
        values = [getattr(layer, name) for layer in layers]
        if isinstance(values[0], Packed):
            if any(padding):
                raise ValueError("quantized sequences of different lengths cannot be padded into one batch")
            return values[0].joined(values)
        return joined(values, -2)

    changed: dict[str, Tensor | None] = {"query_mean": None, "query_cov": None}
    for name in ("attn_sum", "query_entropy", "output_norm", "reconstruction"):
        kept = name in statistics and getattr(first, name) is not None
        changed[name] = joined([getattr(layer, name) for layer in layers], -1) if kept else None
    if "recent_queries" in statistics and first.recent_queries is not None:
        shortest = min(layer.recent_queries.shape[-2] for layer in layers)
        recent = [layer.recent_queries[..., layer.recent_queries.shape[-2] - shortest :, :] for layer in layers]
        changed["recent_queries"] = torch.stack(recent)
    else:
        changed["recent_queries"] = None
    if any(padding) or any(layer.bias is not None for layer in layers):
        zeros = torch.zeros_like(first.positions, dtype=torch.float32)
        biases = [zeros.new_zeros(layer.positions.shape) if layer.bias is None else layer.bias for layer in layers]
        changed["bias"] = joined(biases, -1, -torch.inf)
    anchors = [layer.anchors for layer in layers]
    alike = all(a is not None and a.shape == anchors[0].shape for a in anchors)
    changed["anchors"] = torch.stack(anchors) if alike else None
    if any(layer.angles is not None for layer in layers):
        angles = [layer.positions.float() if layer.angles is None else layer.angles for layer in layers]
        changed["angles"] = joined(angles, -1)
    return replace(
        first,
        keys=stored("keys"),
        values=stored("values"),
        positions=joined([layer.positions for layer in layers], -1, -1),
        room=None,
        **changed,
    )


def _with_room(layer: Layer, room: int) -> Layer:
    """Return the layer in storage with free space for ``room`` entries; quantized entries have no such storage."""

    def roomy(part: LayerCache) -> LayerCache:
        if not room or isinstance(part.keys, Packed):
            return part
        return replace(part, **Room.of(part.keys, part.values, room).placed())

    return layer.with_parts([roomy(part) for part in layer.parts])


def _map(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """Return the layer with ``change`` applied to each of its tensors."""
    return layer.with_parts([_map_part(part, change) for part in layer.parts])


def _map_part(layer: LayerCache, change: Callable[[Tensor], Tensor]) -> LayerCache:
    changed = {}
    for name, value in vars(layer).items():
        if isinstance(value, Packed):
            changed[name] = value.map(change)
        elif isinstance(value, Tensor):
            changed[name] = change(value)
    return replace(layer, room=None, **changed)
