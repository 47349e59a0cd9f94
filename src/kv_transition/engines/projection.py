"""The output projection of attention layers, and the norms of projected values."""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transition.errors import UserError


def output_projections(model: torch.nn.Module) -> list[Tensor]:
    """Return the output projection of each layer by query head, [H, d, D], for D channels of the hidden state.

    Raises UserError if the model's layers have no ``self_attn.o_proj``.
    """
    heads = model.config.get_text_config().num_attention_heads
    found = []
    for layer in model.get_decoder().layers:
        module = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if module is None:
            raise UserError(
                f"output_norm: the output projection in the layers of {type(model).__name__} is not known; choose a "
                "policy with weighting: none"
            )
        found.append(_matrix(module, model.dtype).unflatten(0, (heads, -1)))
    return found


def _matrix(module: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the matrix [H d, D] of a layer; for quantized weights, its outputs for the unit vectors."""
    weight = getattr(module, "weight", None)
    size = (module.out_features, module.in_features)
    if weight is not None and weight.is_floating_point() and tuple(weight.shape) == size:
        return weight.detach().T
    unit = torch.eye(module.in_features, dtype=dtype, device=next(module.parameters()).device)
    return module(unit) - module(torch.zeros_like(unit[:1]))


def output_norm(values: Tensor, projection: Tensor) -> Tensor:
    """Return the L1 norm of each projected value, mean over the group: values [*B, Hkv, q, d] -> [*B, Hkv, q] fp32.

    projection: [H, d, D]. One query head is computed at a time, so that no more than [*B, q, D] is held. Source:
    CriticalKV, arXiv 2502.03805.
    """
    kv_heads = values.shape[-3]
    group = projection.shape[0] // kv_heads
    rows = []
    for head in range(kv_heads):
        own = values[..., head, :, :]
        norms = [(own @ projection[head * group + g]).float().abs().sum(-1) for g in range(group)]
        rows.append(sum(norms) / group)
    return torch.stack(rows, -2)
