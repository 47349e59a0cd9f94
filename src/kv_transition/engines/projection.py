"""What the output projection makes of values: how much an entry can add to what its layer says."""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transition.errors import UserError


def output_projections(model: torch.nn.Module) -> list[Tensor]:
    """The output projection of each layer by query head, [H, d, D], D channels of the hidden state.

    Raises UserError where the model's layers have no ``self_attn.o_proj``.
    """
    heads = model.config.get_text_config().num_attention_heads
    found = []
    for layer in model.get_decoder().layers:
        module = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if module is None:
            raise UserError(
                f"output_norm: the layers of {type(model).__name__} have no output projection that is known here; "
                "choose a policy with weighting: none"
            )
        found.append(_matrix(module, model.dtype).unflatten(0, (heads, -1)))
    return found


def _matrix(module: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    """[H d, D]; of a layer with quantized weights by what it makes of the unit vectors."""
    weight = getattr(module, "weight", None)
    size = (module.out_features, module.in_features)
    if weight is not None and weight.is_floating_point() and tuple(weight.shape) == size:
        return weight.detach().T
    unit = torch.eye(module.in_features, dtype=dtype, device=next(module.parameters()).device)
    return module(unit) - module(torch.zeros_like(unit[:1]))


def output_norm(values: Tensor, projection: Tensor) -> Tensor:
    """L1 norm of each projected value, mean over the group: values [*B, Hkv, q, d] -> [*B, Hkv, q] fp32.

    projection: [H, d, D]. One query head at a time, so that no more than [*B, q, D] is held.
    Source: CriticalKV, arXiv 2502.03805.
    """
    kv_heads = values.shape[-3]
    group = projection.shape[0] // kv_heads
    rows = []
    for head in range(kv_heads):
        own = values[..., head, :, :]
        norms = [(own @ projection[head * group + g]).float().abs().sum(-1) for g in range(group)]
        rows.append(sum(norms) / group)
    return torch.stack(rows, -2)
