"""The entries of a cache as a table."""

from __future__ import annotations

import polars as pl

from kv_transition.cache.state import CacheState


def kept_frame(state: CacheState) -> pl.DataFrame:
    """Return ``layer``, ``head`` (KV head) and ``position`` of every entry, sorted by these.

    Layers with a sliding window, which are never evicted, are omitted. A merged entry has its mean position.
    """
    rows: dict[str, list[int]] = {"layer": [], "head": [], "position": []}
    for number, layer in enumerate(state.layers):
        if layer.window is not None:
            continue
        heads = (head for part in layer.parts for head in part.positions.tolist())
        for head, positions in enumerate(heads):
            rows["layer"] += [number] * len(positions)
            rows["head"] += [head] * len(positions)
            rows["position"] += positions
    return pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.Int64))
