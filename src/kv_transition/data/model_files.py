"""Checks of a model's files without loading the model; each error is one sentence that names the damaged file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_transition import parsing
from kv_transition.data import gguf
from kv_transition.errors import UserError

MAX_HEADER = 100_000_000
"""maximum bytes of a safetensors header, as the format defines it"""
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
_COMMON = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite")
)
"""model types whose layers have the shapes of `_layer_shapes`; those of others are checked when the model is loaded"""
_LAYER = re.compile(r"(?:(?:model|language_model)\.)*layers\.([0-9]{1,9})\.(.+)")


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """Return a model's file from its folder or the hub's cache; None if neither has it. Makes no request."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # neither a folder nor the name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def read_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return a model's config.json, or the same values of a GGUF file; None if neither is local.

    Raises UserError if the file is damaged or contradicts itself.
    """
    if gguf.is_gguf(name):
        return gguf.config(name)
    file = cached_file(name, revision, "config.json")
    if file is None:
        return None
    config = parsing.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"model.name: {file} must contain a JSON object")
    _check_config(text_of(config), file)
    return config


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the text model; multimodal models have a separate one."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"model.name: {file} has {key}: {value!r}, which must be a whole number of at least 1")
    layers, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    if layers is not None and isinstance(kinds, list) and len(kinds) != layers:
        raise UserError(
            f"model.name: {file} contradicts itself, num_hidden_layers is {layers} and layer_types has {len(kinds)} "
            "entries; download it again"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"model.name: {file} contradicts itself, {heads} attention heads cannot share {groups} KV heads"
        )


def positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a model supports, rope scaling included; None if unknown."""
    text = text_of(config)
    known = text.get("max_position_embeddings") or text.get("n_positions")
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    own = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if isinstance(own, int) and isinstance(factor, (int, float)) and isinstance(known, int):
        return max(known, int(own * factor))
    return known if isinstance(known, int) else None


def check(name: str, revision: str | None = None, weights: bool = True) -> None:
    """Open the local files of a model: its config, its tokenizer and, if asked for, the header of its weights.

    Raises UserError for the first file that is damaged or contradicts another one. A model that is only on the hub is
    not checked.
    """
    config = read_config(name, revision)
    if gguf.is_gguf(name) or not Path(name).expanduser().is_dir():
        return
    folder = Path(name).expanduser()
    _check_tokenizer(folder)
    if weights and config is not None:
        _check_weights(folder, text_of(config))


def _check_tokenizer(folder: Path) -> None:
    place = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (place / file).is_file():
            parsing.read_json(place / file)
    file = place / "tokenizer.json"
    if not file.is_file():
        return  # another file format, which transformers reads
    from tokenizers import Tokenizer

    parsing.read_json(file)
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.name: {file} is not a tokenizer ({reason}); download it again") from None


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        said = parsing.read_json(index)
        names = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"model.name: {index} has no weight_map from weights to files; download it again")
        files = [folder / file for file in sorted(set(names.values()))]
    else:
        files = [file for file in [folder / "model.safetensors"] if file.is_file()]
    shapes: dict[str, list[int]] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"model.name: {file} is missing, although {index.name} names it; download it again")
        for key, (shape, _) in read_header(file).items():
            _check_shape(file, key, shape, _expected(config, key))
            shapes[key] = shape
    layers = config.get("num_hidden_layers")
    stored = {int(found[1]) for key in shapes if (found := _LAYER.fullmatch(key))}
    if _common(config) and layers is not None and stored and (len(stored), max(stored) + 1) != (layers, layers):
        raise UserError(
            f"model.name: {folder} contradicts itself, config.json has num_hidden_layers: {layers} and the weights "
            f"have {len(stored)} layers, {min(stored)} to {max(stored)}; download it again"
        )


def _check_shape(file: Path, key: str, shape: list[int], expected: list[int | None] | None) -> None:
    if expected is not None and None not in expected and list(shape) != expected:
        raise UserError(
            f"model.name: {file} does not match config.json: {key} is {list(shape)} instead of {expected}; "
            "download it again"
        )


def _common(config: Mapping[str, Any]) -> bool:
    # Quantized weights are packed into other shapes.
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in _COMMON and not config.get("quantization_config")


def _expected(config: Mapping[str, Any], key: str) -> list[int | None] | None:
    """Return the shape of a weight by the config, None for a size that the config leaves out; None if unknown."""
    if key.endswith("embed_tokens.weight"):
        return [config.get("vocab_size"), config.get("hidden_size")]
    found = _LAYER.fullmatch(key)
    return _layer_shapes(config).get(found[2]) if found and _common(config) else None


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, list[int | None]]:
    """Return the shapes of a layer's projections, for the model types in `_COMMON`."""
    hidden, inner, head = (config.get(key) for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads")
    queries = heads * head if heads and head else None
    keys = groups * head if groups and head else None
    return {
        "self_attn.q_proj.weight": [queries, hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, queries],
        "mlp.gate_proj.weight": [inner, hidden],
        "mlp.up_proj.weight": [inner, hidden],
        "mlp.down_proj.weight": [hidden, inner],
    }


def read_header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of each tensor in a safetensors file. Raises UserError if it is damaged or truncated."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"model.name: {file} is truncated or not a safetensors file; download it again")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        found = {key: (list(value["shape"]), str(value["dtype"])) for key, value in header.items()}
        end = max((value["data_offsets"][1] for value in header.values()), default=0)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise UserError(f"model.name: {file} is damaged ({type(error).__name__}: {error}); download it again") from None
    if not isinstance(end, int) or 8 + length + end != size:
        raise UserError(
            f"model.name: {file} is truncated: {size} bytes instead of {8 + length} + {end}; download it again"
        )
    return found
