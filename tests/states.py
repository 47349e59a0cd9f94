"""Random cache states of every kind, built from tensors only, and a bit-exact comparison of states."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kv_transition.cache.quantize import Packed
from kv_transition.cache.rotary import Rotary
from kv_transition.cache.state import STATISTICS, CacheState, LayerCache, SplitLayer
from kv_transition.cache.store import Prefill

KINDS = ["plain", "gaps", "room", "window", "split", "packed", "merged"]
ROTARY = Rotary((1.0, 0.1 + 0.2))


def random_layer(
    kind: str,
    *,
    heads: int = 2,
    group: int = 2,
    n: int = 6,
    d: int = 8,
    dtype: torch.dtype = torch.float32,
    statistics: frozenset[str] = STATISTICS,
    batch: tuple[int, ...] = (),
    seed: int = 0,
) -> LayerCache | SplitLayer:
    """Return a layer of one kind. ``room``: views of larger storage; ``gaps``: a layer after an eviction."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator).to(of)

    if kind == "split":
        sizes = torch.randint(0, n + 1, (heads,), generator=generator).tolist()
        common = {"heads": 1, "group": group, "d": d, "dtype": dtype, "statistics": statistics, "batch": batch}
        return SplitLayer(tuple(random_layer("gaps", n=m, seed=seed + i, **common) for i, m in enumerate(sizes)))
    keys, values = random(heads, n, d, of=dtype), random(heads, n, d, of=dtype)
    positions = torch.arange(n).expand(*batch, heads, n)
    made = {
        "attn_sum": lambda: random(heads, n),
        "query_entropy": lambda: random(heads, n),
        "recent_queries": lambda: random(heads * group, min(n, 3), d, of=dtype),
        "query_mean": lambda: random(heads * group, d),
        "query_cov": lambda: random(heads * group, d, d),
    }
    layer = LayerCache(
        keys=keys,
        values=values,
        positions=positions,
        scale=float(random(1).flatten()[0]) if not batch else d**-0.5,
        rotary=ROTARY,
        **{name: make() for name, make in made.items() if name in statistics},
    )
    if kind == "gaps":
        layer = replace(layer, positions=positions * 3 + 1, rotary=None)
    elif kind == "room":
        large = [torch.cat([t, torch.full_like(t, torch.nan)], -2) for t in (keys, values)]
        layer = replace(layer, keys=large[0][..., :n, :], values=large[1][..., :n, :])
    elif kind == "window":
        layer = replace(layer, window=n + 1, positions=positions + 5).without(STATISTICS)
    elif kind == "packed":
        layer = replace(layer, keys=Packed.pack(keys, 4), values=Packed.pack(values, 8))
    elif kind == "merged":
        bias = random(heads, n)
        bias[..., :1] = -torch.inf
        layer = replace(layer, angles=positions + 0.25, bias=bias)
    return layer


def random_state(kinds: list[str], *, length: int = 50, shift: int = 0, seed: int = 0, **shape) -> CacheState:
    layers = tuple(random_layer(kind, seed=seed + 100 * i, **shape) for i, kind in enumerate(kinds))
    return CacheState(layers, length, torch.randn(11, generator=torch.Generator().manual_seed(seed)), shift)


def random_prefill(
    kinds: list[str], context: int = 6, question: int = 3, *, seconds: float = 1.0, seed: int = 0, **shape
) -> Prefill:
    """Return a prefill with layers of the kinds plain, room and window; the context is the beginning of the prompt."""
    prompt = random_state(kinds, length=context + question, n=context + question, seed=seed, **shape)

    def before(layer: LayerCache, number: int) -> LayerCache:
        if layer.window is not None:
            return random_layer("window", n=context, seed=seed + number + 7, **shape)
        other = {
            name: torch.full_like(tensor, 0.5)
            for name in STATISTICS - {"query_entropy"}
            if (tensor := getattr(layer, name)) is not None
        }
        return replace(layer, **other).cut(0, context)

    layers = tuple(before(layer, number) for number, layer in enumerate(prompt.layers))
    return Prefill(CacheState(layers, context, prompt.logits + 1), prompt, seconds, seconds / 4)


def plain(state: CacheState) -> CacheState:
    """Return the state as a file stores it, without the fields of layer classes that a policy defines."""

    def held(layer: LayerCache) -> LayerCache:
        return LayerCache(**{f.name: getattr(layer, f.name) for f in fields(LayerCache)})

    layers = (SplitLayer(tuple(map(held, x.parts))) if isinstance(x, SplitLayer) else held(x) for x in state.layers)
    return replace(state, layers=tuple(layers))


def identical(a, b) -> bool:
    """Return whether two states, layers, tensors or plain values are bit-identical; spare storage is not compared."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (CacheState, LayerCache, SplitLayer, Packed)):
        names = [f.name for f in fields(a) if f.name != "room"]
        return type(a) is type(b) and all(identical(getattr(a, name), getattr(b, name)) for name in names)
    return a == b
