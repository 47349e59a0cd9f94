"""The part of a disk that stored prefills leave free; needs no torch."""

from __future__ import annotations


def spare_bytes(total: int) -> float:
    """Return the bytes of a disk of ``total`` that ``prefill.store: auto`` leaves free: a tenth, at most 10 GB."""
    return min(total / 10, 10e9)
