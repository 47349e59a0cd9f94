"""A `CacheState` in one safetensors file: written without a second copy in memory, read lazily.

The header contains the names of the tensors, the kind of the file, facts about the model that computed it, and a JSON
description from which the state is rebuilt. On a CPU the tensors are memory-mapped: they take memory and time only when
they are first read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open
from torch import Tensor

from kv_transition.cache.quantize import Packed
from kv_transition.cache.rotary import Rotary
from kv_transition.cache.state import EVERY, CacheState, LayerCache, SplitLayer
from kv_transition.errors import UserError
from kv_transition.provenance import replacing

STATE = "kv_transition cache 1"
"""kind of a file that contains one state; the number is the version of the format"""

Device = str | torch.device
Devices = Device | Sequence[Device]
"""one device for all layers, or one for each layer"""

_ALIGNMENT = 64
"""bytes; that of torch's own memory"""
_ADVICE = "create the cache again with the model that continues from it"


def save(state: CacheState, path: str | Path, facts: Mapping[str, str]) -> None:
    """Write a state atomically.

    facts: what another process must have in common to continue from the state, such as model, tokenizer and dtype, and
    any further facts. Raises UserError if the file cannot be written.
    """
    try:
        write(path, *lay_out(STATE, *flatten(state), facts))
    except OSError as error:
        raise UserError(
            f"{path}: writing the cache failed ({error.strerror or error}); free some disk space or give another path"
        ) from error


def load(path: str | Path, device: Devices = "cpu", expect: Mapping[str, str] | None = None) -> CacheState:
    """Return the state that `save` wrote, bit for bit.

    Raises UserError if there is no such file, if it is damaged or of another kind, or if one of its facts is not the
    expected one.
    """
    try:
        with opened(path, STATE, expect or {}, _ADVICE) as file:
            return file.state(file.description, device)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give a cache that was saved before") from None


def read_facts(path: str | Path) -> dict[str, str]:
    """Return the facts that a state was saved with. Raises UserError as `load` does."""
    try:
        with opened(path, STATE, {}, _ADVICE) as file:
            return file.facts
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give a cache that was saved before") from None


def lay_out(
    kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any], facts: Mapping[str, str]
) -> tuple[bytes, list[Tensor]]:
    """Return a safetensors file in two pieces: its header, and the tensors in the order in which they follow."""
    # The order keeps every tensor as aligned as in memory and as its elements need.
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % _ALIGNMENT != 0, -item[1].element_size()))
    plain = json.dumps({"facts": dict(facts), "description": description})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "kind": kind, "state": plain}}
    end = 0
    for name, tensor in ordered:
        spec = TensorSpec(dtype=str(tensor.dtype).partition(".")[2], shape=tensor.shape, data_ptr=0, data_len=0)
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


def write(path: str | Path, beginning: bytes, tensors: Sequence[Tensor]) -> None:
    """Write the result of `lay_out` atomically. Raises OSError, for example if the disk is full.

    safetensors' own writer needs contiguous CPU tensors, all at once. The keys and values of a state are views of
    larger storage, or are on a GPU, so that they would all have to be copied first. This function writes one tensor
    after the other, and a view row by row.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(beginning)
        for tensor in tensors:
            for piece in (tensor,) if tensor.is_contiguous() else tensor:
                file.write(piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class File:
    """A file that is open for reading."""

    facts: dict[str, str]
    description: dict[str, Any]
    tensor: Callable[[str, Device], Tensor]
    """function that returns a tensor by name, on a device; on the CPU it is read when it is first used"""

    def state(
        self, description: Mapping[str, Any], device: Devices = "cpu", without: frozenset[str] = frozenset()
    ) -> CacheState:
        """Return the state that a description of `flatten` describes, on a device, without some of its statistics."""
        layers = description["layers"]
        one = isinstance(device, (str, torch.device))
        devices = [device] * len(layers) if one else list(device)
        if len(devices) != len(layers):
            raise UserError(
                f"the cache has {len(layers)} layers, not {len(devices)}; use it with the model that computed it"
            )
        rotaries = [_rotary(plain) for plain in description["rotaries"]]
        make = [_Maker(self.tensor, on, rotaries, without) for on in devices]
        return CacheState(
            layers=tuple(maker(layer) for maker, layer in zip(make, layers, strict=True)),
            **{name: make[-1](description[name]) for name in ("length", "logits", "shift")},
        )


@dataclass(frozen=True)
class _Maker:
    """Rebuilds values on a device from the descriptions of `_plain`."""

    tensor: Callable[[str, Device], Tensor]
    device: Device
    rotaries: Sequence[Rotary]
    without: frozenset[str]

    def __call__(self, plain: Any) -> Any:
        match plain:
            case {"tensor": name, "first": n, "dim": dim}:
                return self.tensor(name, self.device).narrow(dim, 0, n)
            case {"tensor": name}:
                return self.tensor(name, self.device)
            case {"range": [start, *shape]}:
                return _range(start, shape[-1], self.device).expand(shape)
            case {"packed": facts, "tensors": tensors}:
                return Packed.from_tensors({name: self(each) for name, each in tensors.items()}, facts)
            case {"rotary": number}:
                return self.rotaries[number]
            case {"parts": parts}:
                return SplitLayer(tuple(self(part) for part in parts))
            case {"layer": values}:
                return LayerCache(**{name: self(each) for name, each in values.items() if name not in self.without})
            case _:
                return plain


@contextmanager
def opened(path: str | Path, kind: str, expect: Mapping[str, str], advice: str) -> Iterator[File]:
    """Yield an open file of this kind whose facts equal the expected ones.

    Raises FileNotFoundError, and UserError with ``advice`` if the file is damaged or not as expected.
    """
    try:
        with _handle(path) as handle:
            header = handle.metadata() or {}
            if header.get("kind") != kind:
                found = header.get("kind", "something else")
                raise UserError(f"{path} is not a complete file of the kind {kind!r} but {found!r}; {advice}")
            plain = json.loads(header["state"])
            for name, value in expect.items():
                if (other := plain["facts"].get(name)) != value:
                    raise UserError(f"{path} was computed with another {name} ({other}, not {value}); {advice}")
            # cached, so that two states of one file share their tensors
            tensor = cache(lambda name, device: handle.get_tensor(name).to(device))
            yield File(plain["facts"], plain["description"], tensor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is incomplete or damaged; {advice}") from error


@contextmanager
def _handle(path: str | Path) -> Iterator[Any]:
    """Yield safetensors' handle of a file, which opens the file twice: for the header, and through torch for the
    tensors.

    Raises FileNotFoundError if the file is deleted or replaced in between.
    """
    with open(path, "rb") as held:
        handle, failure = None, None
        try:
            handle = safe_open(path, framework="pt")
        except RuntimeError as error:
            failure = error
        # checked also if opening failed, because a deleted file may exist again
        if not os.path.samestat(os.fstat(held.fileno()), os.stat(path)):
            raise FileNotFoundError(path) from failure
        if handle is None:
            raise OSError(str(failure)) from failure
        with handle:
            yield handle


def flatten(state: CacheState, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state as named tensors and a JSON description from which `File.state` rebuilds it.

    The tensors are the state's own, not copies. Consecutive positions are part of the description.
    """
    tensors: dict[str, Tensor] = {}
    rotaries: dict[Rotary, int] = {}
    layers = [_plain(layer, f"{prefix}layers.{i}", tensors, rotaries) for i, layer in enumerate(state.layers)]
    rest = ("length", "logits", "shift")
    return tensors, {
        "layers": layers,
        **{name: _plain(getattr(state, name), f"{prefix}{name}", tensors, rotaries) for name in rest},
        "rotaries": [asdict(rotary) for rotary in rotaries],
    }


def _plain(value: Any, name: str, tensors: dict[str, Tensor], rotaries: dict[Rotary, int]) -> Any:
    """Return the description of a value and add its tensors and rotations to the given ones."""
    match value:
        case LayerCache():
            # saved as a LayerCache, because a file does not name classes; a policy rebuilds its own subclass
            kept = {f.name: getattr(value, f.name) for f in fields(LayerCache) if f.name != "room"}
            own = {k: _plain(v, f"{name}.{k}", tensors, rotaries) for k, v in kept.items() if v is not None}
            if start_and_shape := _as_range(value.positions):
                del tensors[own["positions"]["tensor"]]
                own["positions"] = {"range": start_and_shape}
            return {"layer": own}
        case SplitLayer(parts=parts):
            return {"parts": [_plain(part, f"{name}.{i}", tensors, rotaries) for i, part in enumerate(parts)]}
        case Packed():
            named = {k: _plain(v, f"{name}.{k}", tensors, rotaries) for k, v in value.tensors().items()}
            return {"packed": value.facts(), "tensors": named}
        case Rotary():
            return {"rotary": rotaries.setdefault(value, len(rotaries))}
        case Tensor():
            tensors[name] = value
            return {"tensor": name}
        case _:
            return value


def statistics_of(state: CacheState) -> frozenset[str]:
    """Return the statistics that every evictable layer of a state has."""
    parts = [part for layer in state.evictable for part in layer.parts]
    return frozenset(name for name in EVERY if all(getattr(part, name) is not None for part in parts))


def _as_range(positions: Tensor) -> list[int] | None:
    """Return [start, *shape] for positions that are start, start + 1, ... in each head, and None for any others."""
    if positions.numel() == 0:
        return [0, *positions.shape]
    start = int(positions.flatten()[0])
    if torch.equal(positions, _range(start, positions.shape[-1], positions.device).expand_as(positions)):
        return [start, *positions.shape]
    return None


def _range(start: int, n: int, device: Device) -> Tensor:
    return torch.arange(start, start + n, device=device)


def _rotary(plain: Mapping[str, Any]) -> Rotary:
    return Rotary(**{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})
