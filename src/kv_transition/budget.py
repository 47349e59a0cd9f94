"""Budgets: the share of a cache that is kept, as a fraction of its entries or a number of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Self

from kv_transition.errors import UserError

_DECIMALS = 10
"""largest number of decimals of a fraction, so that its name states it exactly"""


@dataclass(frozen=True)
class Budget:
    """The number of kept entries per KV head: exactly one of ``fraction`` in (0, 1] and ``tokens`` >= 1 is set.

    In names it is written as ``r0.2`` (a canonical decimal) or ``t128``.
    """

    fraction: Fraction | None = None
    tokens: int | None = None

    @classmethod
    def of_fraction(cls, value: float | str, key: str = "budget") -> Self:
        """Return a budget that keeps a fraction of the cache; ``value`` is read as a decimal."""
        if isinstance(value, bool) or not isinstance(value, (Real, str)):
            raise UserError(f"{key}: {value!r} is not a number; give a fraction in (0, 1]")
        try:
            fraction = Fraction(str(value))
        except ValueError:
            raise UserError(f"{key}: {value!r} is not a number; give a fraction in (0, 1]") from None
        if not 0 < fraction <= 1:
            raise UserError(f"{key}: {value} lies outside (0, 1]; give the fraction of the cache to keep, such as 0.2")
        if 10**_DECIMALS % fraction.denominator:
            raise UserError(f"{key}: {value} has more than {_DECIMALS} decimals; give a fraction in (0, 1] such as 0.2")
        return cls(fraction=fraction)

    @classmethod
    def of_tokens(cls, value: int, key: str = "budget") -> Self:
        """Return a budget that keeps a number of entries per KV head."""
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise UserError(f"{key}: tokens must be a whole number of at least 1, not {value!r}")
        return cls(tokens=int(value))

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the budget written as ``r0.2`` or ``t128``."""
        kind, value = name[:1], name[1:]
        if kind == "r" and value:
            return cls.of_fraction(value)
        if kind == "t" and value.isdigit():
            return cls.of_tokens(int(value))
        raise UserError(f"budget {name!r} is neither a fraction such as r0.2 nor a number of tokens such as t128")

    @property
    def is_full(self) -> bool:
        return self.fraction == 1

    def kept(self, n: int) -> int:
        """Return K = ceil(r * N) with r exact, or min(t, N); ``n`` is N, the number of entries at compression."""
        if self.tokens is not None:
            return min(self.tokens, n)
        return math.ceil(self.fraction * n)

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"t{self.tokens}"
        return "r" + (f"{float(self.fraction):.{_DECIMALS}f}".rstrip("0").rstrip("."))
