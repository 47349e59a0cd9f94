"""One forward pass for the next tokens of several sequences, each of which remembers what it likes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_transition.engines.reading import Reading

_BLOCK = 2**19
"""Bytes of weights that stay in a core's cache while the tokens of all sequences pass them"""

_SMALL = 2**16
"""Weights of fewer numbers are multiplied row by row: torch has other kernels for small batched products"""


def treat_tokens_alone(model: nn.Module) -> None:
    """Let the linear layers of a model treat each of several single tokens as if it had come alone.

    A matrix product of eight rows adds up in another order than eight products of one row, and an answer would depend
    on what is decoded beside it wherever two logits, or two scores of a policy, nearly tie. On a CPU in fp32 the
    products are of one row each, a block of weights at a time, which all rows read from the core's cache. Elsewhere,
    and for tokens of one sequence, nothing changes.
    """
    for module in model.modules():
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            module.forward = partial(_linear, module)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """x [B, q, in] -> [B, q, out]"""
    weight, bias = module.weight, module.bias
    tokens = x.dim() == 3 and x.shape[0] > 1 and x.shape[1] == 1
    if not tokens or x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.linear(x, weight, bias)
    if weight.numel() < _SMALL:
        return torch.cat([functional.linear(row, weight, bias) for row in x.split(1)])
    outputs = max(1, _BLOCK // (x.shape[-1] * x.element_size()))
    products = [torch.bmm(x, block.T.expand(len(x), -1, -1)) for block in weight.split(outputs)]
    product = products[0] if len(products) == 1 else torch.cat(products, -1)
    return product if bias is None else product + bias


class Readings:
    """A token of each of several sequences; transformers takes it for its cache, as it does one `Reading`.

    What a model does to each token by itself (projections, norms, MLP) is done to all rows in one pass, so that its
    weights are read from memory once (see `treat_tokens_alone`). Attention belongs to each sequence: its own `Reading`
    computes it over its own entries, with its own statistics. So nothing is padded, and sequences of any lengths and
    policies may share a pass, join and leave.
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
