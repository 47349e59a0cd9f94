"""What tells one model from another, without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kv_transition.provenance import digest


def fingerprint(name: str, revision: str | None) -> str:
    """What tells one model from another: a hub id and its revision, or the contents of a folder.

    Of weights larger than 64 MiB only the first and last MiB are read, beside the size.
    """
    folder = Path(name)
    if not folder.is_dir():
        return digest([name, revision])
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".safetensors", ".bin", ".model"))
    return digest([(str(f.relative_to(folder)), f.stat().st_size, _content_digest(f)) for f in files])


def _content_digest(file: Path) -> str:
    size, mib = file.stat().st_size, 1 << 20
    with file.open("rb") as handle:
        if size <= 64 * mib:
            return hashlib.sha256(handle.read()).hexdigest()
        head = handle.read(mib)
        handle.seek(-mib, 2)
        return hashlib.sha256(head + handle.read()).hexdigest()
