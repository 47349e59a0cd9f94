"""Compute only what is read from a model's last layer: the output of the last token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def mlp_of_last_token(model: torch.nn.Module, q: int, last_only: bool) -> Iterator[None]:
    """Let the MLP of a model's last layer read only the last of ``q`` tokens, and return its output ``q`` times.

    What follows the MLP treats tokens one by one, so that the last token's logits are right and those of the others are
    not. Passes of other threads through the model are unchanged, and so is a model without ``layers``, or whose last
    layer has no module ``mlp``. last_only: false changes nothing.
    """
    layers = getattr(model.get_decoder(), "layers", None) if last_only else None
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None:
        yield
        return
    own = threading.get_ident()

    def last(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != own:
            return None
        hidden, *others = inputs
        return (hidden[:, -1:], *others)

    def repeated(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != own:
            return None
        if isinstance(output, tuple):  # with the choice of experts, which nothing reads
            return (output[0].repeat(1, q, 1), *output[1:])
        return output.repeat(1, q, 1)

    hooks = []
    try:
        hooks += [mlp.register_forward_pre_hook(last), mlp.register_forward_hook(repeated)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
