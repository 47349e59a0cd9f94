"""Stored prefills: one safetensors file per prompt, which may be deleted at any time."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from kv_transition.cache import disk, file
from kv_transition.cache.state import EVERY, CacheState
from kv_transition.errors import UserError
from kv_transition.provenance import write_json

PREFILL = "kv_transition prefill 1"
"""kind of a file that contains a prefill; the number is the version of the format"""

_ADVICE = "delete it, so that it is computed again"
_SHARED = {"keys": -2, "values": -2, "positions": -1, "query_entropy": -1, "output_norm": -1, "reconstruction": -1}
"""fields that the context's entries share with the same entries of the prompt: the dimension of the entries"""


@dataclass(frozen=True)
class Prefill:
    """The states of a prompt that was read once with the full cache: after the context, and at the end of the prompt.

    Both states share keys and values: one prefill serves both modes.
    """

    context: CacheState
    prompt: CacheState
    context_s: float
    """seconds of reading the context"""
    question_s: float
    """seconds of reading the rest of the prompt"""

    @property
    def prompt_s(self) -> float:
        return self.context_s + self.question_s


@dataclass(frozen=True)
class PrefillStore:
    """The stored prefills of one model and one version of the engine; the name of ``root`` is a hash of both.

    ``max_gb`` limits the stores of all models together. When it is reached, the least recently used prefills are
    deleted. On a local disk, a job that is reading a deleted prefill can finish reading it.

    mode: ``always`` stores; ``never`` neither stores nor reads; ``auto`` stores while loading a prefill takes less time
    than reading the prompt again and a tenth of the disk, at most 10 GB, stays free. facts: facts that a stored prefill
    must have, such as model, tokenizer and dtype.
    """

    root: Path
    mode: str = "auto"
    max_gb: float = 50.0
    facts: Mapping[str, str] = field(default_factory=dict)

    def path(self, prompt_sha256: str) -> Path:
        return self.root / f"{prompt_sha256}.safetensors"

    def __contains__(self, prompt_sha256: str) -> bool:
        return self.path(prompt_sha256).is_file()

    def statistics(self, prompt_sha256: str) -> frozenset[str] | None:
        """Return the statistics that a stored prefill has; None if there is none. Raises UserError as `load` does."""
        try:
            with file.opened(self.path(prompt_sha256), PREFILL, self.facts, _ADVICE) as stored:
                return frozenset(stored.description["statistics"])
        except FileNotFoundError:
            return None

    def load(
        self, prompt_sha256: str, device: file.Devices = "cpu", statistics: frozenset[str] | None = None
    ) -> Prefill | None:
        """Return the stored prefill with these statistics and no others (None: all that it has).

        Returns None if there is no prefill or if it lacks one of the statistics. On a CPU its tensors are read when
        they are first used. Raises UserError if the file is damaged or was computed with another model.
        """
        if self.mode == "never":
            return None
        path = self.path(prompt_sha256)
        try:
            with file.opened(path, PREFILL, self.facts, _ADVICE) as stored:
                about = stored.description
                wanted = EVERY if statistics is None else statistics
                if statistics is not None and not statistics <= set(about["statistics"]):
                    return None
                prefill = Prefill(
                    context=stored.state(about["context"], device, EVERY - wanted),
                    prompt=stored.state(about["prompt"], device, EVERY - wanted),
                    context_s=about["context_s"],
                    question_s=about["question_s"],
                )
        except FileNotFoundError:
            return None
        with suppress(OSError):  # deleted meanwhile, or owned by another user
            os.utime(path)
        return prefill

    def save(self, prompt_sha256: str, prefill: Prefill) -> bool:
        """Store a prefill unless mode, size or disk space forbid it; return whether it was stored.

        The file is written atomically and replaces one with other statistics. Raises UserError if it cannot be written;
        for a full disk only in mode ``always``.
        """
        if self.mode == "never":
            return False
        path = self.path(prompt_sha256)
        beginning, tensors = file.lay_out(PREFILL, *_flatten(prefill), self.facts)
        size = len(beginning) + sum(tensor.nbytes for tensor in tensors)
        if self.mode == "auto" and not self._worth_it(size, prefill.prompt_s):
            return False
        if not self._make_room(size, path):
            _say_once(f"prefill.max_gb: {self.max_gb} GB are too few for a prefill; not every prompt is stored")
            return False
        try:
            file.write(path, beginning, tensors)
        except OSError as error:
            if self.mode == "auto" and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _say_once(f"{self.root}: {error.strerror}; not every prompt is stored")
                return False
            reason = error.strerror or error
            raise UserError(
                f"{self.root}: writing a prefill failed ({reason}); free some disk space or set prefill.store to never"
            ) from error
        # Another job may have stored a prefill at the same time; the later of the two jobs sees both files.
        self._make_room(size, path)
        if self.mode == "auto":
            self._measure(path, size)
        return True

    def _worth_it(self, size: int, seconds: float) -> bool:
        """Return whether loading ``size`` bytes takes less than the ``seconds`` it saves, and the disk has space."""
        on = disk.usage(self.root)
        spare = disk.spare_bytes(on.total)
        if on.free - size < spare:
            _say_once(
                f"prefill.store: less than {spare / 1e6:,.0f} MB of the disk would stay free; not every prompt is "
                "stored, and each cell prefills the others again; free some disk space or set prefill.store to always"
            )
            return False
        speed = self._measured().get("bytes_per_second")
        return speed is None or size / speed < seconds

    def _make_room(self, size: int, path: Path) -> bool:
        """Delete the least recently used prefills until ``size`` more bytes fit; return whether they fit.

        ``path`` is the file being written: it is neither counted nor deleted. Files that other jobs are writing are
        counted and not deleted.
        """
        limit = self.max_gb * 1e9 - size
        if limit < 0:
            return False
        others = sorted(self._files(path))
        used = sum(bytes_ for _, bytes_, _ in others)
        for _, bytes_, other in others:
            if used <= limit:
                break
            if not other.name.startswith("."):
                with suppress(OSError):  # owned by another user
                    other.unlink(missing_ok=True)
                    used -= bytes_
        return used <= limit

    def _files(self, but: Path) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of last use, the bytes and the path of each prefill in all stores."""
        for path in self.root.parent.glob("*/*.safetensors"):
            if path != but:
                with suppress(FileNotFoundError):  # deleted by another job
                    found = path.stat()
                    yield found.st_mtime, found.st_size, path

    @property
    def _speed_file(self) -> Path:
        return self.root.parent / f"read-speed-{platform.node()}.json"

    def _measured(self) -> dict[str, float]:
        try:
            return json.loads(self._speed_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _measure(self, path: Path, size: int) -> None:
        """Measure the speed of reading a prefill from disk, once for each host, and again for a much larger file.

        The time of a small file is mainly the latency of the disk.
        """
        if size <= 4 * self._measured().get("bytes", 0):
            return
        with suppress(OSError):  # deleted by another job, or the store is read-only
            write_json(self._speed_file, {"bytes": size, "bytes_per_second": size / _read_s(path)})


def _read_s(path: Path) -> float:
    """Return the seconds of reading a file, without the page cache if the system supports that."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as stored:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stored.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while stored.readinto(buffer):
            pass
        return time.perf_counter() - started


def _flatten(prefill: Prefill) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of both states, each once, and the JSON description of the rest of the prefill."""
    tensors, prompt = file.flatten(prefill.prompt, "prompt.")
    if prefill.prompt is prefill.context:  # without a question there is one moment
        return tensors, _described(prefill, prompt, prompt)
    context_tensors, context = file.flatten(prefill.context, "context.")
    for number, layer in enumerate(prefill.context.layers):
        if layer.window is not None:
            continue  # such a layer has different entries in the two states
        own, longer = context["layers"][number]["layer"], prompt["layers"][number]["layer"]
        for name, dim in _SHARED.items():
            if "tensor" in own.get(name, {}) and "tensor" in longer.get(name, {}):
                del context_tensors[own[name]["tensor"]]
                own[name] = longer[name] | {"first": layer.n, "dim": dim}
    return tensors | context_tensors, _described(prefill, context, prompt)


def _described(prefill: Prefill, context: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    return {
        "context": context,
        "prompt": prompt,
        "context_s": prefill.context_s,
        "question_s": prefill.question_s,
        "statistics": sorted(file.statistics_of(prefill.context) & file.statistics_of(prefill.prompt)),
    }


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)
