"""One forward pass for the next tokens of several sequences, each of which remembers what it likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kv_transition.engines.reading import Reading


class Readings:
    """A token of each of several sequences; transformers takes it for its cache, as it does one `Reading`.

    What a model does to each token by itself (projections, norms, MLP) is done to all rows at once, so that its weights
    are read once. Attention belongs to each sequence: its own `Reading` computes it over its own entries, with its own
    statistics. So nothing is padded, and sequences of any lengths and policies may share a pass, join and leave.
    """

    is_compileable = False

    def __init__(self, readings: Sequence[Reading]):
        self.readings = readings

    @property
    def position_ids(self) -> Tensor:
        """[B, 1]"""
        return torch.cat([reading.position_ids for reading in self.readings])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new tokens' own keys and values: those before are not transformers' business."""
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """queries [B, H, 1, d], keys and values [B, Hkv, 1, d] of the new tokens -> output [B, H, 1, d]."""
        rows = zip(self.readings, queries.split(1), keys.split(1), values.split(1), strict=True)
        return torch.cat([reading.attend(layer, *row, scale) for reading, *row in rows])
