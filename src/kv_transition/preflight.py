"""Checks before Snakemake starts, so that a run that cannot succeed changes nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kv_transition import locks, parsing
from kv_transition.data import model_files
from kv_transition.errors import UserError
from kv_transition.paths import Paths
from kv_transition.plan import table, work
from kv_transition.settings import Settings

OWN_BYTES = 1_000_000
"""least number of bytes that Snakemake itself writes: its locks, its log and a record of each job"""
DAMAGED = ".damaged"
CHECKED = "KVT_CHECKED"
"""environment variable that tells the workflow that this check was done"""


def check(settings: Settings) -> None:
    """Check the folder of results, the model and the manifests. Raises UserError if the folder is full or not writable,
    or a file is damaged.
    """
    check_folder(settings)
    model_files.check(settings.model.name, settings.model.revision, weights=settings.engine.kind == "local")
    check_manifests(settings)


def check_folder(settings: Settings) -> None:
    """Check the folder of results. Raises UserError if it is not writable, or has no space for the results to be
    computed.
    """
    folder = nearest(Path(settings.output.dir))
    for place, key in ((nearest(folder / settings.experiment), "output.dir"), (Path(), "the folder of the workflow")):
        try:
            with tempfile.TemporaryFile(dir=place) as trial:
                trial.write(b"\0")
                trial.flush()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{key}: {place.absolute()} cannot be written to ({reason}); give another output.dir"
            ) from None
    needed = sum(item.bytes(item.left) for item in work.work(settings).items)
    for place, key, wanted in ((folder, "output.dir", needed), (Path(), "the folder of the workflow", OWN_BYTES)):
        free = shutil.disk_usage(place).free
        if free < wanted:
            raise UserError(
                f"{key}: {place.absolute()} has {table.size(free)} free, and about {table.size(wanted)} are needed; "
                "free some space, or give another output.dir"
            )


def nearest(path: Path) -> Path:
    """Return the path itself if it exists, else the first of its parents that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())


def check_cores(cores: str | None) -> None:
    """Raise UserError unless ``cores`` is a number of at least 1, ``all`` or None."""
    if cores is not None and cores != "all" and not (cores.isdecimal() and int(cores) >= 1):
        raise UserError(f"--cores: {cores!r} is not allowed; give a whole number of at least 1, or all")


def check_manifests(settings: Settings) -> None:
    """Raise UserError for a manifest that cannot be read, because a job that updates it would lose its content."""
    files = Paths(settings.output.dir, settings.experiment)
    for task in settings.tasks:
        path = Path(files.manifest(task))
        if not path.is_file():
            continue
        try:
            whole = isinstance(parsing.read_json(path, "manifest"), dict)
        except UserError as error:
            raise UserError(f"{error}; {_advice(path)}") from None
        if not whole:
            raise UserError(f"{path} is not a manifest; {_advice(path)}")


def _advice(path: Path) -> str:
    return f"restore a copy of it, or delete it and run again: {path.parent.name} is then prepared and answered again"


def unlock(settings: Settings, config: Path) -> str | None:
    """Remove the lock of a Snakemake process that was killed; return a sentence about it, or None if there was no lock.

    Raises UserError if another run works on the same results, or if that cannot be determined.
    """
    by_hand = f"snakemake --configfile {config} --unlock"
    found = locks.clear(Paths(settings.output.dir, settings.experiment).root, by_hand)
    return "the previous run was killed; its lock is removed" if found else None


def mend_times(settings: Settings) -> str | None:
    """Move the times of results that lie in the future back to now, in the same order; return a sentence about it, or
    None.

    Such times result from a clock that was set back. Snakemake refuses outputs that are older than such a file.
    """
    now = time.time()
    root = Path(settings.output.dir, settings.experiment)
    found = [(path.stat().st_mtime, path) for path in root.rglob("*") if path.exists()]
    ahead = [(then, path) for then, path in found if then > now + 1]
    if not ahead:
        return None
    shift = max(then for then, _ in ahead) - now
    for then, path in ahead:
        os.utime(path, (then - shift, then - shift))
    return f"{len(ahead)} files in {root} were up to {shift:.0f} s in the future; their times are corrected"


def outdated(settings: Settings, rename: bool = True) -> list[str]:
    """Return the files that Snakemake has to compute again: damaged ones and those that do not match the configuration.

    The hashes in the files decide, because Snakemake's own records may be lost. Damaged files without a hash are
    renamed, so that they are computed again when they are needed.

    rename: False leaves the damaged files unchanged.
    """
    root = Path(settings.output.dir, settings.experiment)
    if not root.is_dir():
        return []
    known = work.work(settings)
    mine = {job.path for item in known.items for job in item.jobs if item.hash_column is not None}
    for path in damaged_tables(root) if rename else ():
        if str(path) not in mine:
            path.rename(path.with_name(path.name + DAMAGED))
    return [job.path for item in known.items for job in item.state["outdated"]]


def damaged_tables(root: Path) -> Iterator[Path]:
    """Yield the Parquet files below a folder that are truncated or are not Parquet."""
    for path in sorted(root.rglob("*.parquet")):
        if path.is_file() and not path.name.startswith(".") and not _whole(path):
            yield path


def _whole(path: Path) -> bool:
    """Return whether a file has the first and last bytes of a Parquet file and a footer of the stated length."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        if size < 12 or handle.read(4) != b"PAR1":
            return False
        handle.seek(-8, 2)
        tail = handle.read(8)
    return tail[4:] == b"PAR1" and int.from_bytes(tail[:4], "little") <= size - 12


def too_long(settings: Settings) -> str | None:
    """Return a warning if prompts may be longer than the model supports, else None."""
    config = model_files.read_config(settings.model.name, settings.model.revision)
    known = model_files.positions(config) if config else None
    if known is None or settings.model.max_length <= known:
        return None
    return (
        f"model.max_length: {settings.model.max_length:,} tokens are more than the {known:,} positions that "
        f"{settings.model.name} was made for; answers to longer prompts may be noise"
    )
