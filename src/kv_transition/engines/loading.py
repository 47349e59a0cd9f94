"""Load a transformers model so that its cache can be read and evicted."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kv_transition.cache.rotary import Rotary
from kv_transition.data import gguf, gguf_tokenizer
from kv_transition.engines import dequantize
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    device_map: str | None = None,
) -> torch.nn.Module:
    """Return the model on its device, from a folder, the hub or a GGUF file.

    quantization: {"kind": "nf4", "double_quantization": bool, "compute_dtype": str} of bitsandbytes. device_map:
    accelerate's placement of a model over several GPUs, such as ``auto``. Raises UserError if loading fails or no layer
    of the model can be evicted.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    place = str(dequantize.model_folder(name, dtype)) if gguf.is_gguf(name) else name
    # Only the attention function is registered, so that transformers creates no mask (see `Reading`).
    AttentionInterface.register(ATTENTION, attention_function)
    device = usable_device(device)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": ATTENTION}
    # never run code of a model, even if a user at a terminal would allow it, and never load pickled weights
    options |= {"trust_remote_code": False, "use_safetensors": True}
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization)
    if device_map is not None or quantization is not None:
        _require("accelerate", "model.device_map" if device_map is not None else "model.quantization")
        options["device_map"] = device_map or {"": device}
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        refuse_unsupported(config, name)
        with gguf_tokenizer.without_progress_bars(), _without_reports():
            model, found = AutoModelForCausalLM.from_pretrained(
                # a mismatch is reported below in one sentence
                place, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )  # fmt: skip
        _refuse_unfit(found, name)
        model = model if "device_map" in options else model.to(device)
        refuse_damaged(model, name)
        return model
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model.name: {name!r} does not fit into the memory of {device}; set model.quantization, a half "
            "model.dtype, or model.device_map if there are several GPUs"
        ) from error
    # for a folder with contradictory files, transformers may raise any exception
    except Exception as error:
        if error.args == (ATTENTION,):  # a table of the model's own attention classes
            raise UserError(
                f"model.name: {name!r} is a model whose attention cannot be replaced; choose another model"
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model.name: {name!r} cannot be loaded ({reason}); give a model folder or a hub id") from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from printing a table of the weights that do not match, within the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_unfit(found: Mapping[str, Any], name: str) -> None:
    """Raise UserError if weights are missing or have other shapes, because transformers would use random numbers for
    them.
    """
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"model.name: {name!r} lacks {len(missing)} weights, such as {missing[0]}; download it again")
    if unfit := sorted(found["mismatched_keys"]):
        key, there, expected = unfit[0]
        raise UserError(
            f"model.name: {name!r} has {len(unfit)} weights that do not match its config.json, such as {key}, "
            f"{list(there)} instead of {list(expected)}; download it again"
        )


def refuse_damaged(model: torch.nn.Module, name: str) -> None:
    """Raise UserError for a model with weights that are not finite, because every answer would be noise."""
    for key, weight in model.named_parameters():
        # the sum is cheap to compute, and it is not finite if an entry is not
        if not weight.is_floating_point() or weight.is_meta or torch.isfinite(weight.sum(dtype=torch.float32)):
            continue
        if bad := int((~torch.isfinite(weight)).sum()):
            raise UserError(
                f"model.name: {name!r} is damaged, {bad} entries of {key} are NaN or infinite; download it again, or "
                "set model.dtype to float32 if a half dtype is too narrow"
            )


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device that token ids must be on."""
    return _device(model.get_input_embeddings())


def layer_devices(model: torch.nn.Module) -> list[torch.device]:
    """Return the device of each layer, which is also that of its cache."""
    return [_device(layer) for layer in model.get_decoder().layers]


def _device(module: torch.nn.Module) -> torch.device:
    # weights that accelerate has offloaded are not on a device until they are used
    used_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if used_on is None else torch.device(used_on)


def usable_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: this machine has no cuda device; set model.device to cpu or auto")
    return device


def _bitsandbytes(quantization: Mapping[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    _require("bitsandbytes", "model.quantization")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization["kind"],
        bnb_4bit_use_double_quant=quantization["double_quantization"],
        bnb_4bit_compute_dtype=getattr(torch, quantization["compute_dtype"]),
    )


def _require(package: str, key: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{key}: the package {package} is not installed; install it (envs/inference.yaml has the version)"
        )


def refuse_unsupported(config: Any, name: str) -> None:
    """Raise UserError for a model with unknown kinds of layers, or without a layer that can be evicted."""
    kinds = layer_kinds(config)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"model.name: {name!r} has layers of the kind {', '.join(sorted(unknown))}; "
            "only models with full and sliding-window attention can be evicted"
        )
    if "full_attention" not in kinds:
        raise UserError(
            f"model.name: every layer of {name!r} has a sliding window, so there is nothing to evict; choose a model "
            "with full-attention layers"
        )


def layer_kinds(config: Any) -> list[str]:
    """Return the kind of each layer: ``full_attention``, ``sliding_attention`` or another one."""
    text = config.get_text_config()
    if kinds := getattr(text, "layer_types", None):
        return list(kinds)
    sliding = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * text.num_hidden_layers


def layer_windows(config: Any) -> list[int | None]:
    """Return the number of tokens that each layer sees, None for all."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in layer_kinds(config)]


def length_dependent_rope(config: Any) -> str | None:
    """Return the kind of rope scaling if its frequencies depend on the length read so far; None if they are fixed."""
    said = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [part for part in said.values() if isinstance(part, Mapping)] or [said]
    kinds = {part.get("rope_type") for part in each} & {"dynamic", "longrope"}
    return next(iter(sorted(kinds)), None)


def layer_rotaries(model: torch.nn.Module) -> list[Rotary | None]:
    """Return the rotation of keys and queries of each layer; None if it is not certain."""
    kinds = layer_kinds(model.config)
    # the decoder's embedding, not that of a vision tower
    decoder = model.get_decoder()
    embedding = next((m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    by_kind = {kind: _rotary(embedding, kind) for kind in set(kinds)}
    return [by_kind[kind] for kind in kinds]


def _rotary(embedding: torch.nn.Module | None, kind: str) -> Rotary | None:
    inv_freq = getattr(embedding, f"{kind}_inv_freq", getattr(embedding, "inv_freq", None))
    if inv_freq is None:
        return None
    rotary = Rotary(tuple(inv_freq.float().tolist()))
    return rotary if _as_the_model(rotary, embedding, kind) else None


def _as_the_model(rotary: Rotary, embedding: torch.nn.Module, kind: str) -> bool:
    """Return whether `Rotary` reproduces the difference between the model's own rotations by one and by seven
    positions.
    """
    apply = getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    device = next(embedding.buffers()).device
    d = 2 * len(rotary.inv_freq)
    x = torch.linspace(-1, 1, d, device=device).expand(1, 1, 2, d)
    at = torch.tensor([[1, 7]], device=device)
    takes_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    cos, sin = embedding(x, at, layer_type=kind) if takes_kind else embedding(x, at)
    if cos.shape[-1] != d:
        return False
    turned, _ = apply(x, x, cos, sin)
    by = torch.tensor([6.0], device=device)
    return torch.allclose(rotary.turn(turned[0, 0, :1], by), turned[0, 0, 1:], atol=1e-4)
