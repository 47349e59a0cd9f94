"""The disk of a folder, and the part of it that stored prefills leave free; needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def usage(folder: str | Path) -> Any:
    """Return `shutil.disk_usage` (total, used and free bytes) of the disk of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists()))


def spare_bytes(total: int) -> float:
    """Return the bytes of a disk of ``total`` that ``prefill.store: auto`` leaves free: a tenth, at most 10 GB."""
    return min(total / 10, 10e9)
