"""The spec of the model, and digests of the files of model and data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.data import gguf
from kv_transition.provenance import code_hash, content_digest, digest

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def prefill(settings: Settings) -> dict[str, Any]:
    return {"model": model(settings), "code": code_hash("kv_transition.run.prefill")}


def model(settings: Settings) -> dict[str, Any]:
    known = settings.model.model_dump(exclude={"max_length", "chat_template"})
    return known | {
        "chunk_tokens": settings.prefill.chunk_tokens,
        "fingerprint": _fingerprint(known["name"], known["revision"]),
    }


@cache
def content(path: str) -> str:
    """Return the digest of a local file or folder."""
    return content_digest(path)


@cache
def tokenizer_content(name: str) -> str | None:
    """Return the digest of a local model's folder without its weights; None for a hub id, which is identified by its
    revision.
    """
    if gguf.is_gguf(name):
        return gguf.content_sha256(name)
    return content_digest(name, (".json", ".model", ".jinja")) if Path(name).is_dir() else None


@cache
def _fingerprint(name: str, revision: str | None) -> str:
    """Return the identity of a model: a digest of a hub id and its revision, or of the content of a folder or GGUF
    file.
    """
    if gguf.is_gguf(name):
        return gguf.content_sha256(name)[:16]
    if not Path(name).is_dir():
        return digest([name, revision])
    return content_digest(name, (".json", ".safetensors", ".bin", ".model"))
