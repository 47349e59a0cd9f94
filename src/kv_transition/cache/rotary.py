"""Rotary position embedding: rotate keys and queries from one position to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotation of a layer's keys and queries by their position (Su et al., RoFormer, arXiv 2104.09864).

    inv_freq: angle in radians by which each pair of channels is rotated from one position to the next. Channel i is
    paired with channel i + len(inv_freq); channels beyond 2 len(inv_freq) are not rotated.
    """

    inv_freq: tuple[float, ...]

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Return x [..., n, d] with each vector rotated by ``by`` [..., n] positions (also fractions or negative
        numbers).

        Angles and products are computed in fp32; the result has the dtype of x.
        """
        angle = self._angles(by)
        return self._turned(x, angle.cos(), angle.sin())

    def mean_turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Return the mean over ``by`` [m] of x [..., d] rotated by that many positions."""
        angle = self._angles(by)
        return self._turned(x, angle.cos().mean(0), angle.sin().mean(0))

    def _angles(self, by: Tensor) -> Tensor:
        """Return the angles [..., pairs] in radians of positions [...]."""
        return by.to(torch.float32).unsqueeze(-1) * torch.tensor(self.inv_freq, device=by.device)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = len(self.inv_freq)
        first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
