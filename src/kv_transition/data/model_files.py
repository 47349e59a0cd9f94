"""A model's files, looked at without loading the model: one sentence says what is damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kv_transition import parsing
from kv_transition.data import gguf
from kv_transition.errors import UserError

MAX_HEADER = 100_000_000
"""bytes of a safetensors header at most, as the format has it"""
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """A model's file, from its folder or from the hub's cache; None where it is in neither. Asks nobody."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def read_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return a model's config.json, or what a GGUF file says under the same names; None where neither is here.

    Raises UserError if it is damaged or contradicts itself.
    """
    if gguf.is_gguf(name):
        return gguf.config(name)
    file = cached_file(name, revision, "config.json")
    if file is None:
        return None
    config = parsing.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"model.name: {file} must hold a JSON object")
    _check_config(text_of(config), file)
    return config


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that is about text: models that see as well have one of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"model.name: {file} says {key}: {value!r}, and it must be a whole number of at least 1")
    layers, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    if layers is not None and isinstance(kinds, list) and len(kinds) != layers:
        raise UserError(
            f"model.name: {file} contradicts itself, num_hidden_layers is {layers} and layer_types has {len(kinds)} "
            "entries; get it anew"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"model.name: {file} contradicts itself, {heads} attention heads cannot share {groups} KV heads"
        )


def positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model was made for, its rope scaling included; None where the config does not say."""
    text = text_of(config)
    known = text.get("max_position_embeddings") or text.get("n_positions")
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    own = scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if isinstance(own, int) and isinstance(factor, (int, float)) and isinstance(known, int):
        return max(known, int(own * factor))
    return known if isinstance(known, int) else None


def check(name: str, revision: str | None = None, weights: bool = True) -> None:
    """Open what is here of a model: its config, its tokenizer and, if asked for, the header of its weights.

    Raises UserError for the first file that is damaged or contradicts another one. A model that is on the hub only is
    not looked at.
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
        return  # another form, which transformers reads
    from tokenizers import Tokenizer

    parsing.read_json(file)
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.name: {file} is no tokenizer ({reason}); get it anew") from None


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        said = parsing.read_json(index)
        names = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"model.name: {index} has no weight_map from weights to files; get it anew")
        files = [folder / file for file in sorted(set(names.values()))]
    else:
        files = [file for file in [folder / "model.safetensors"] if file.is_file()]
    for file in files:
        if not file.is_file():
            raise UserError(f"model.name: {file} is missing, and {index.name} names it; get it anew")
        for key, (shape, _) in read_header(file).items():
            if key.endswith("embed_tokens.weight"):
                expected = [config.get("vocab_size"), config.get("hidden_size")]
                if None not in expected and list(shape) != expected:
                    raise UserError(
                        f"model.name: {file} does not fit config.json, {key} is {list(shape)} instead of {expected}; "
                        "get it anew"
                    )


def read_header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of each tensor in a safetensors file. Raises UserError if the file is damaged or cut."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"model.name: {file} is cut short or no safetensors file; get it anew")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        found = {key: (list(value["shape"]), str(value["dtype"])) for key, value in header.items()}
        end = max((value["data_offsets"][1] for value in header.values()), default=0)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise UserError(f"model.name: {file} is damaged ({type(error).__name__}: {error}); get it anew") from None
    if not isinstance(end, int) or 8 + length + end != size:
        raise UserError(f"model.name: {file} is cut short, {size} bytes instead of {8 + length} + {end}; get it anew")
    return found
