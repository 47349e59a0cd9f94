"""Checks of a model's files without loading the model; each error is one sentence that names the damaged file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_transition import parsing
from kv_transition.data import gguf
from kv_transition.errors import UserError

MAX_HEADER = 100_000_000
"""maximum bytes of a safetensors header, as the format defines it"""
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """Return a model's file from its folder or the hub's cache; None if neither has it. Makes no request."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
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
    for file in files:
        if not file.is_file():
            raise UserError(f"model.name: {file} is missing, although {index.name} names it; download it again")
        for key, (shape, _) in read_header(file).items():
            if key.endswith("embed_tokens.weight"):
                expected = [config.get("vocab_size"), config.get("hidden_size")]
                if None not in expected and list(shape) != expected:
                    raise UserError(
                        f"model.name: {file} does not match config.json: {key} is {list(shape)} instead of {expected}; "
                        "download it again"
                    )


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
