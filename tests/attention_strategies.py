"""Hypothesis strategies that generate random attention cases for property tests of all implementations."""

from __future__ import annotations

from attention_cases import Case
from hypothesis import strategies as st


@st.composite
def cases(draw: st.DrawFn, longest: int = 700, plain: bool = False, group: int = 8) -> Case:
    n = draw(st.integers(1, longest))
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, group)),
        q=draw(st.one_of(st.just(n), st.integers(1, n))),
        n=n,
        d=draw(st.sampled_from([32, 64, 80, 128])),
        window=None if plain else draw(st.one_of(st.none(), st.integers(1, n + 5))),
        bias="none" if plain else draw(st.sampled_from(["none", "counts", "padded"])),
        peak=draw(st.sampled_from([0.01, 0.3, 1.0, 8.0])),
        seed=draw(st.integers(0, 2**16)),
    )
