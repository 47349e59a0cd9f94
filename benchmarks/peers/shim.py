"""kvpress 0.5.5 on transformers from 5.4 on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def cache_positions(model: torch.nn.Module) -> Iterator[None]:
    """Hands attention layers ``cache_position`` again, which presses read and transformers no longer passes."""

    def restore(_, arguments, keywords):
        return arguments, {"cache_position": keywords["position_ids"][0]} | keywords

    hooks = [layer.self_attn.register_forward_pre_hook(restore, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
