"""Quantized storage: 8, 4 or 2 bits a channel, with a scale and a zero point for each group of channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GROUP = 64
"""largest number of channels that share a scale"""

_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Packed:
    """A tensor [..., n, d] with ``bits`` bits a number, quantized between the least and greatest value of each group.

    A group is a run of channels of one vector, so that a new token never changes the stored ones. A stored number c
    represents scale c + zero. Its error is at most scale / 2 plus the rounding of scale and zero, unless one of them
    saturates.
    """

    codes: Tensor
    """[..., n, d bits / 8] uint8, the first channel in the lowest bits"""
    scale: Tensor
    """[..., n, groups], fp16 for the half dtypes (whose values are then limited to +-65504), else fp32"""
    zero: Tensor
    """[..., n, groups], the least value of each group"""
    bits: int
    dtype: torch.dtype
    """dtype of the original tensor and of `dense`"""

    @classmethod
    def pack(cls, x: Tensor, bits: int, group: int = GROUP) -> Packed:
        """Return x [..., n, d] quantized in equal groups of at most ``group`` channels.

        Raises ValueError unless bits is 2, 4 or 8 and d channels fill whole bytes.
        """
        d = x.shape[-1]
        if bits not in (2, 4, 8) or d * bits % 8:
            raise ValueError(f"{d} channels of {bits} bits do not fill whole bytes; bits is 2, 4 or 8")
        groups = next(g for g in range(-(-d // group), d + 1) if d % g == 0)
        stored = torch.float32 if x.dtype == torch.float32 else torch.float16
        wide = x.float().unflatten(-1, (groups, d // groups))
        if stored == torch.float16:
            wide = wide.clamp(-_HALF_MAX, _HALF_MAX)
        low, high = wide.aminmax(dim=-1)
        zero = low.to(stored)
        scale = ((high - zero.float()) / (2**bits - 1)).to(stored)
        # in a group of equal values any scale but 0 is correct
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        levels = (wide - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        codes = levels.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
        return cls(_pressed(codes, bits), scale, zero, bits, x.dtype)

    def dense(self) -> Tensor:
        """Return the numbers [..., n, d] in the original dtype."""
        groups = self.scale.shape[-1]
        levels = _spread(self.codes, self.bits).unflatten(-1, (groups, self.shape[-1] // groups)).float()
        return (
            levels.mul_(self.scale.float().unsqueeze(-1))
            .add_(self.zero.float().unsqueeze(-1))
            .flatten(-2)
            .to(self.dtype)
        )

    def append(self, x: Tensor) -> Packed:
        """Return the tensor with x [..., q, d] appended, quantized in the same way."""
        new = Packed.pack(x, self.bits, self.shape[-1] // self.scale.shape[-1])
        return self._with(new, lambda old, added: torch.cat([old, added], -2))

    def cut(self, start: int, stop: int) -> Packed:
        """Return the vectors from ``start`` to ``stop``, as views."""
        return self.map(lambda tensor: tensor[..., start:stop, :])

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Return the tensor with ``change`` applied to each part; ``change`` must keep the last dimension."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def joined(self, all_of_them: Sequence[Packed]) -> Packed:
        """Return several tensors of one shape as a batch, in a new first dimension."""
        return replace(
            self, **{name: torch.stack([each.tensors()[name] for each in all_of_them]) for name in self.tensors()}
        )

    def _with(self, other: Packed, change: Callable[[Tensor, Tensor], Tensor]) -> Packed:
        others = other.tensors()
        return replace(self, **{name: change(tensor, others[name]) for name, tensor in self.tensors().items()})

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and zero points."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def facts(self) -> dict[str, Any]:
        """Return the JSON values that `from_tensors` needs in addition to the tensors."""
        return {"bits": self.bits, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Packed:
        return cls(**tensors, bits=int(facts["bits"]), dtype=getattr(torch, facts["dtype"]))


def _pressed(codes: Tensor, bits: int) -> Tensor:
    """Return packed codes: [..., d] uint8 below 2^bits -> [..., d bits / 8]."""
    if bits == 8:
        return codes
    several = codes.unflatten(-1, (-1, 8 // bits))
    return sum(several[..., i] << (bits * i) for i in range(8 // bits))


def _spread(codes: Tensor, bits: int) -> Tensor:
    """Return unpacked codes: [..., d bits / 8] -> [..., d]."""
    if bits == 8:
        return codes
    return torch.stack([(codes >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=-1).flatten(-2)
