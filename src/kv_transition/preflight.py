"""What is looked at before Snakemake starts, so that a run which cannot go well changes nothing."""

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
"""what Snakemake itself writes, at the least: its locks, its log and a record of each job"""
DAMAGED = ".damaged"


def check(settings: Settings) -> None:
    """Raise UserError for a folder of results that cannot be written to or is full, and for a damaged model."""
    check_folder(settings)
    model_files.check(settings.model.name, settings.model.revision, weights=settings.engine.kind == "local")


def check_folder(settings: Settings) -> None:
    """Raise UserError where results cannot be written, or where there is no room for those that are missing."""
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
                "make room, or give another output.dir"
            )


def nearest(path: Path) -> Path:
    """Return the path itself if it is there, else the first of its parents that is."""
    return next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())


def check_cores(cores: str | None) -> None:
    """Raise UserError unless ``cores`` is a number of at least 1, ``all`` or None."""
    if cores is not None and cores != "all" and not (cores.isdecimal() and int(cores) >= 1):
        raise UserError(f"--cores: {cores!r} is not allowed; give a whole number of at least 1, or all")


def check_manifests(settings: Settings) -> None:
    """Raise UserError for a manifest that cannot be read: a job that finds it would lose what it was to renew."""
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
            raise UserError(f"{path} holds no manifest; {_advice(path)}")


def _advice(path: Path) -> str:
    return f"put a copy of it back, or delete it and run again: {path.parent.name} is then prepared and answered anew"


def unlock(settings: Settings, config: Path) -> str | None:
    """Remove the lock of a Snakemake that was killed; return a sentence about it, None where there was none.

    Raises UserError where another run works on the same results, or where it cannot be told whether one does.
    """
    by_hand = f"snakemake --configfile {config} --unlock"
    found = locks.clear(Paths(settings.output.dir, settings.experiment).root, by_hand)
    return "the run before this one was killed; its lock is removed" if found else None


def mend_times(settings: Settings) -> str | None:
    """Move the times of results that lie in the future back to now, in their order; return a sentence about it.

    They are there after a clock was put back. Snakemake refuses what is made from such a file, so nothing that exists
    is older than it should be. None where there are no such files.
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
    return f"{len(ahead)} files in {root} were up to {shift:.0f} s in the future; their times are mended"


def outdated(settings: Settings, rename: bool = True) -> list[str]:
    """Return the files that no longer fit the configuration, or are damaged: what Snakemake is to make again.

    The hashes in the files say so: Snakemake's own memory may be lost. Damaged files without a hash are renamed, so
    that they are made again where they are needed; not so without ``rename``.
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
    """Yield the Parquet files below a folder that end too early or hold something else."""
    for path in sorted(root.rglob("*.parquet")):
        if path.is_file() and not path.name.startswith(".") and not _whole(path):
            yield path


def _whole(path: Path) -> bool:
    """Return whether a Parquet file begins and ends as one does, with a footer as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        if size < 12 or handle.read(4) != b"PAR1":
            return False
        handle.seek(-8, 2)
        tail = handle.read(8)
    return tail[4:] == b"PAR1" and int.from_bytes(tail[:4], "little") <= size - 12


def too_long(settings: Settings) -> str | None:
    """Return a warning where prompts may be longer than what the model was made for, None where they cannot be."""
    config = model_files.read_config(settings.model.name, settings.model.revision)
    known = model_files.positions(config) if config else None
    if known is None or settings.model.max_length <= known:
        return None
    return (
        f"model.max_length: {settings.model.max_length:,} tokens are more than the {known:,} positions that "
        f"{settings.model.name} was made for; answers to longer prompts may be noise"
    )
