"""One forward pass for the next tokens of several sequences, each with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_transition.engines.reading import Reading

_ROWS = 8
"""Maximum number of rows of one product; more rows use several products"""

_BLOCK = 2**19
"""Bytes of a block of weights, small enough to stay in a core's cache for the tokens of all sequences"""

_SMALL = 2**16
"""Weights with fewer numbers are multiplied row by row, because preparing a product of several rows costs more"""


def treat_tokens_alone(model: nn.Module) -> None:
    """Change the linear layers of a model so that each of several single tokens gets the same result as alone.

    A matrix product of eight rows may add up in another order than eight products of one row. An answer would then
    depend on the answers decoded beside it, whenever two logits, or two scores of a policy, are nearly equal. On a CPU
    in fp32, single tokens use products that give each row the same bits whatever the other rows are. If a trial shows
    that oneDNN's products over weights packed for eight rows do so, these are used; they need the memory of the weights
    a second time. Otherwise each row is multiplied separately, one block of weights at a time, which all rows read from
    the core's cache. On other devices nothing changes, and for several tokens of one sequence only the last layer's
    MLP does, which computes the last of them.
    """
    tried: dict[torch.Size, int | None] = {}
    for module in model.modules():
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            packed = _packed(module, tried)
            module.forward = partial(_linear, module) if packed is None else partial(_linear_packed, module, *packed)


def _in_cpu_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


@torch.inference_mode()
def _packed(module: nn.Linear, tried: dict[torch.Size, int | None]) -> tuple[Tensor, int] | None:
    """Return the weight packed for `_ROWS` rows, and the minimum number of rows of a product; None if not possible.

    tried: this minimum by the shape of the weight, for which oneDNN chooses its order of summation.
    """
    weight, kernels = module.weight, torch.ops.mkldnn
    if not _in_cpu_fp32(weight) or weight.numel() < _SMALL or not hasattr(kernels, "_reorder_linear_weight"):
        return None
    if weight.shape in tried and tried[weight.shape] is None:
        return None
    packed = kernels._reorder_linear_weight(weight, _ROWS)
    if weight.shape not in tried:
        tried[weight.shape] = _fewest_rows(packed, weight.shape[1])
    fewest = tried[weight.shape]
    return None if fewest is None else (packed, fewest)


def _fewest_rows(packed: Tensor, width: int) -> int | None:
    """Return the minimum number of rows at which each row of a product has the same bits at any index; None: none."""
    x = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0))
    expected = _product(x, packed, None)
    same = torch.equal(_product(x.flip(0), packed, None).flip(0), expected)
    if not same:
        return None
    fewest = _ROWS
    while fewest > 1 and all(
        torch.equal(_product(x[i : i + fewest - 1], packed, None), expected[i : i + fewest - 1])
        for i in range(_ROWS - fewest + 2)
    ):
        fewest -= 1
    return fewest


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _linear_packed(module: nn.Linear, packed: Tensor, fewest: int, x: Tensor) -> Tensor:
    """Return the output [B, q, out] of a linear layer with packed weights for x [B, q, in]."""
    if x.dim() != 3 or x.shape[1] != 1:
        return functional.linear(x, module.weight, module.bias)
    products = []
    for rows in x[:, 0].split(_ROWS):
        n = len(rows)
        if n < fewest:
            rows = torch.cat([rows, rows.new_zeros(fewest - n, rows.shape[1])])
        products.append(_product(rows, packed, module.bias)[:n])
    return (products[0] if len(products) == 1 else torch.cat(products)).unsqueeze(1)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Return the output [B, q, out] of a linear layer for x [B, q, in]."""
    weight, bias = module.weight, module.bias
    tokens = x.dim() == 3 and x.shape[0] > 1 and x.shape[1] == 1
    if not tokens or not _in_cpu_fp32(x):
        return functional.linear(x, weight, bias)
    if weight.numel() < _SMALL:
        return torch.cat([functional.linear(row, weight, bias) for row in x.split(1)])
    outputs = max(1, _BLOCK // (x.shape[-1] * x.element_size()))
    products = [torch.bmm(x, block.T.expand(len(x), -1, -1)) for block in weight.split(outputs)]
    product = products[0] if len(products) == 1 else torch.cat(products, -1)
    return product if bias is None else product + bias


class Readings:
    """One token of each of several sequences, in the form of a transformers cache, as `Reading` is.

    The operations on single tokens (projections, norms, MLP) process all rows in one pass, so that the weights are read
    from memory once (see `treat_tokens_alone`). Attention is computed for each sequence by its own `Reading`, over its
    own entries and with its own statistics. Therefore nothing is padded; sequences of any lengths and policies can
    share a pass, and they can join and leave at each step.
    """

    is_compileable = False

    def __init__(self, readings: Sequence[Reading]):
        self.readings = readings

    @property
    def position_ids(self) -> Tensor:
        """Return the positions [B, 1]."""
        return torch.cat([reading.position_ids for reading in self.readings])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new tokens' own keys and values, because transformers does not need those before them."""
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return the output [B, H, 1, d] for queries [B, H, 1, d] and the new tokens' keys, values [B, Hkv, 1, d]."""
        rows = zip(self.readings, queries.split(1), keys.split(1), values.split(1), strict=True)
        return torch.cat([reading.attend(layer, *row, scale) for reading, *row in rows])
