"""Presses of kvpress (https://github.com/NVIDIA/kvpress, Apache-2.0) as policies named ``kvpress.<Press>``.

A press reads hidden states. Therefore the prompt is prefilled again, by the model's own attention with the press as
context manager. The entries that the press keeps become a `CacheState` for decoding.

kvpress 0.5.5 requires transformers < 5.3; `_cache_positions` restores what has changed since then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState, Layer, LayerCache, SplitLayer
from kv_transition.engines.reading import ATTENTION
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

    from kv_transition.engines.local import LocalEngine

PREFIX = "kvpress."


def installed_version() -> str:
    """Return the version of kvpress. Raises UserError if it cannot be imported."""
    _kvpress()
    return version("kvpress")


@torch.inference_mode()
def read(
    engine: LocalEngine, tokens: Sequence[int], kind: str, arguments: Mapping[str, Any], k: int, seed: int = 0
) -> CacheState:
    """Prefill ``tokens`` with a press that keeps ``k`` entries per KV head, and return the state.

    kind: ``kvpress.SnapKVPress`` or another press. arguments: those of its constructor, plain values without
    ``compression_ratio``, which follows from k. A press that wraps another press has that press's name as an argument,
    and its arguments with that name and a dot: ``{"press": "SnapKVPress", "press.window_size": 32}``. seed: for presses
    that draw random numbers.

    The state has no statistics and no logits: a press acts before the question, or on all but the last token of a
    prompt (with k - 1), which `extend` then reads. Presses that mask entries instead of removing them (AdaKVPress) give
    a state without those entries, so that their memory is freed.

    Raises UserError if kvpress is missing or has no such press, if the press cannot be constructed from the arguments
    or set to ``k``, or if it keeps keys that the model did not write (merged, re-rotated or thinned), because these
    have no position in the text.
    """
    if k < 1:
        raise UserError(f"{kind}: a press keeps at least one entry; give a larger budget")
    model = engine.model
    kvpress = _kvpress()
    if any(window is not None for window in engine.windows):
        raise UserError(f"{kind}: presses run on full-attention models only, but this model has sliding windows")
    press = _press(kvpress, kind, arguments)
    n = len(tokens)
    attention = [layer.self_attn for layer in model.model.layers]
    with (
        torch.random.fork_rng(),
        _attention(model, "eager" if isinstance(press, kvpress.ObservedAttentionPress) else "sdpa"),
        _cache_positions(attention),
        _full_cache(attention) as full,
    ):
        torch.manual_seed(seed)
        cache = _run(model, press, ratio_for(n, k), torch.tensor([list(tokens)], device=engine.device), kind)
        masks = [getattr(module, "masked_key_indices", None) for module in attention]
    layers = []
    for number, (module, masked) in enumerate(zip(attention, masks, strict=True)):
        keys, values = full[number]
        module.masked_key_indices = None
        kept = cache.layers[number]
        if masked is None:
            layers.append(_found(kept.keys[0], kept.values[0], keys, module.scaling, kind))
        else:
            layers.append(_unmasked(keys, values, masked, module.scaling))
    state = CacheState(layers=tuple(layers), length=n)
    # the layers of a pyramid are rounded one by one, so one entry of difference is allowed
    if state.entries > k + 1:
        raise UserError(
            f"{kind}: keeps {state.entries:g} of {n} entries although the budget is {k}; it cannot be set to that"
        )
    return state


def ratio_for(n: int, k: int) -> float:
    """Return the fraction to remove for which kvpress, which keeps ``int(n * (1 - ratio))``, keeps ``k`` of ``n``."""
    ratio = 1 - k / n
    while int(n * (1 - ratio)) < k:
        ratio = math.nextafter(ratio, 0)
    return max(ratio, 0.0)


def _kvpress() -> ModuleType:
    """Return the module kvpress. Importing it wraps every attention function; this project's own is restored."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = dict(ALL_ATTENTION_FUNCTIONS.items()).get(ATTENTION)
    try:
        import kvpress
    except ImportError as error:
        raise UserError(
            f"kvpress cannot be imported ({error}); install kvpress 0.5.5 with pip's --no-deps, and accelerate, "
            "cachetools, datasets, fire, pandas, peft, requests and termcolor"
        ) from None
    if own is not None:
        ALL_ATTENTION_FUNCTIONS[ATTENTION] = own
    return kvpress


def _press(kvpress: ModuleType, kind: str, arguments: Mapping[str, Any]) -> Any:
    """Return the press with its arguments; compression_ratio is set later."""
    name = kind.removeprefix(PREFIX)
    if name not in kvpress.__all__ or not name.endswith("Press"):
        there = ", ".join(sorted(press for press in kvpress.__all__ if press.endswith("Press")))
        raise UserError(f"{kind}: kvpress {version('kvpress')} has no {name}; it has {there}")
    if "compression_ratio" in arguments:
        raise UserError(f"{kind}.compression_ratio: remove this key; the budget determines how much is kept")
    own = {key: value for key, value in arguments.items() if "." not in key}
    for key, value in own.items():
        if isinstance(value, str) and value.endswith("Press"):
            inner = {k.removeprefix(f"{key}."): v for k, v in arguments.items() if k.startswith(f"{key}.")}
            own[key] = _press(kvpress, f"{PREFIX}{value}", inner)
    with _its_own_errors(kind, f"cannot be constructed from {dict(arguments)}"):
        return getattr(kvpress, name)(**own)


def _run(model: torch.nn.Module, press: Any, ratio: float, ids: Tensor, kind: str) -> Any:
    from transformers import DynamicCache

    with _its_own_errors(kind, "cannot be given a budget"):
        if not hasattr(press, "compression_ratio"):
            raise AttributeError("it has no compression_ratio")
        press.compression_ratio = ratio
    cache = DynamicCache(config=model.config)
    with _its_own_errors(kind, f"fails on a prompt of {ids.shape[1]} tokens"), press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


@contextlib.contextmanager
def _its_own_errors(kind: str, what: str) -> Iterator[None]:
    """Turn any exception of a press into UserError, except lack of memory, which is a failure of the example."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{kind}: {what} ({reason})") from error


@contextlib.contextmanager
def _attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _cache_positions(attention: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Pass ``cache_position`` to the layers, which presses read and transformers does not pass since 5.4.

    At the end, remove the rotary embedding that kvpress leaves in each layer.
    """

    def restore(_: Any, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {"cache_position": keywords["position_ids"][0]} | keywords

    bare = [module for module in attention if not hasattr(module, "rotary_emb")]
    hooks = [module.register_forward_pre_hook(restore, with_kwargs=True) for module in attention]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in bare:
            if hasattr(module, "rotary_emb"):
                del module.rotary_emb


@contextlib.contextmanager
def _full_cache(attention: Sequence[torch.nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Yield keys and values [Hkv, n, d] of each layer before the press acts, because its hooks run after these."""
    full: dict[int, tuple[Tensor, Tensor]] = {}

    def see(module: torch.nn.Module, args: tuple, keywords: dict[str, Any], output: Any) -> None:
        layer = keywords["past_key_values"].layers[module.layer_idx]
        # a press may read the prompt more than once
        full.setdefault(module.layer_idx, (layer.keys[0], layer.values[0]))

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in attention]
    try:
        yield full
    finally:
        for hook in hooks:
            hook.remove()


def _found(keys: Tensor, values: Tensor, full: Tensor, scale: float, kind: str) -> LayerCache:
    """Return the layer of the entries that a press kept: keys, values [Hkv, K, d] in any order, full [Hkv, n, d]."""
    places = torch.stack([_places(*pair) for pair in zip(keys, full, strict=True)])
    positions, order = places.sort(dim=-1)
    index = places.clamp(min=0).unsqueeze(-1).expand_as(keys)
    if not torch.equal(full.gather(1, index), keys) or bool((positions.diff(dim=-1) <= 0).any()):
        raise UserError(f"{kind}: keeps keys that the model did not write, so they have no position in the text")
    order = order.unsqueeze(-1).expand_as(keys)
    return LayerCache(keys=keys.gather(1, order), values=values.gather(1, order), positions=positions, scale=scale)


def _places(keys: Tensor, full: Tensor) -> Tensor:
    """Return for each row of keys [K, d] the row of full [n, d] with the same content: [K].

    Rows are found by a hash of their bits. Rotated keys of two positions differ in some bits.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[full.element_size()]
    factors = torch.randint(1, 2**62, (full.shape[1],), generator=torch.Generator().manual_seed(0)).to(full.device)
    wanted, there = ((rows.contiguous().view(bits).long() * factors).sum(-1) for rows in (keys, full))
    there, order = there.sort()
    return order[torch.searchsorted(there, wanted).clamp(max=len(order) - 1)]


def _unmasked(keys: Tensor, values: Tensor, masked: tuple[Tensor, Tensor, Tensor], scale: float) -> Layer:
    """Return the layer without the entries (batch, head, place) that a press has masked; keys, values [Hkv, n, d]."""
    keep = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    keep[masked[1], masked[2]] = False
    heads = [row.nonzero()[:, 0] for row in keep]
    parts = tuple(
        LayerCache(keys=keys[h, at][None], values=values[h, at][None], positions=at[None], scale=scale)
        for h, at in enumerate(heads)
    )
    return SplitLayer(parts)
