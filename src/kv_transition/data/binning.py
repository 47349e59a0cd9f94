"""Length bins, and the choice of the examples of a bin that are run.

Bins are half-open, ``[edge_i, edge_i+1)``; the last one is closed, ``[edge_n-1, edge_n]``. The length is the number of
tokens of the whole prompt before truncation.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate


def quantile_edges(lengths: Sequence[int], n_bins: int) -> list[int]:
    """Return edges that divide the lengths as evenly as possible; equal lengths are always in the same bin.

    The cut between two bins is placed between two different lengths, where the number of examples below it is nearest
    to the quantile (the lower cut in a tie) and every bin still gets at least one length. An edge is the smallest
    length of the bin above it; the first edge is the minimum and the last edge the maximum. If there are fewer
    different lengths than bins, each length has its own bin and the bins before the last one are empty.

    Args:
        lengths: at least one, in any order.
        n_bins: at least 1.

    Returns:
        ``n_bins + 1`` edges in non-decreasing order.
    """
    counts = Counter(lengths)
    values = sorted(counts)
    below = list(
        accumulate((counts[value] for value in values), initial=0)
    )  # below[j]: examples shorter than values[j]
    edges = [values[0]]
    cut = 0
    for b in range(1, n_bins):
        # a cut before values[j]; at least one length must remain for each of the following bins
        last = max(cut + 1, len(values) - (n_bins - b))
        candidates = range(cut + 1, min(last + 1, len(values)))
        cut = min(candidates, key=lambda j: abs(below[j] * n_bins - b * len(lengths)), default=len(values) - 1)
        edges.append(values[cut])
    return [*edges, values[-1]]


def bin_of(length: float, edges: Sequence[float]) -> int | None:
    """Return the bin of a length, counted from 0; None outside the edges."""
    if not edges[0] <= length <= edges[-1]:
        return None
    return bisect_right(edges, length, 1, len(edges) - 1) - 1


def choose(
    ids: Sequence[str], kinds: Sequence[str], n: int, seed: int, together: Sequence[str] | None = None
) -> list[int]:
    """Return the positions of ``n`` randomly chosen examples of a bin, each kind in proportion to its share of the bin.

    The choice is nested: a larger ``n`` extends the list. The order of the input has no effect, and the order of two
    examples of the same kind depends only on their ids and the seed.

    Args:
        ids: unique names of the examples.
        kinds: the stratum of each example; all equal for a simple random choice.
        n: number of examples to choose; all are chosen if there are fewer.
        seed: any integer.
        together: a name for each example; examples with the same name are chosen one after the other. None: the ids.

    Returns:
        Positions in ``ids``, in the order of choice.
    """

    def drawn(name: str) -> str:
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    def lot(i: int) -> tuple[str, str]:
        return drawn((together or ids)[i]), drawn(ids[i])

    strata: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(ids)), key=lot):
        strata[kinds[i]].append(i)
    # The j-th of m examples has the position (j + 1/2) / m, so that each kind is spread evenly over the choice.
    place = {i: (j + 0.5) / len(members) for members in strata.values() for j, i in enumerate(members)}
    return sorted(place, key=lambda i: (place[i], lot(i)))[:n]
