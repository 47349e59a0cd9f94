"""Hashes of content and code, metadata of files, and atomic writes."""

from __future__ import annotations

import ast
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGE = "kv_transition"
SOURCE = Path(__file__).parent

# Modules that cannot change a result, because they only name files, describe them or report errors.
_NEUTRAL = frozenset(f"{PACKAGE}{m}" for m in ("", ".errors", ".paths", ".provenance", ".script", ".policies.catalog"))

_RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "polars", "flash_attn")


def digest(value: Any, length: int = 16) -> str:
    """Return the hex digest of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _module_file(name: str) -> Path | None:
    """Return the source of a module of this package, or None for anything else."""
    return _located(SOURCE, name)


@cache
def _located(source: Path, name: str) -> Path | None:
    head, *rest = name.split(".")
    if head != PACKAGE:
        return None
    base = source.joinpath(*rest)
    if (base / "__init__.py").is_file():
        return base / "__init__.py"
    file = base.with_suffix(".py")
    return file if file.is_file() else None


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            # `from package import module` imports a module as well
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@cache
def _parsed(file: Path) -> tuple[str, tuple[str, ...]]:
    """Return the digest of a module's code and the modules that it imports, remembered by the content of the file.

    Parsing all modules takes half a second at each start of Snakemake, so the result is kept beside the compiled
    module.
    """
    content = file.read_bytes()
    key = hashlib.sha256(_own_code() + content).hexdigest()
    kept = Path(cache_from_source(str(file))).with_suffix(".code.json")
    with suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or it is damaged
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known["code"], tuple(known["imports"])
    tree = ast.parse(content)
    imports = tuple(_imports(tree))
    code = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
    _keep(kept, {"key": key, "code": code, "imports": imports})
    return code, imports


@cache
def _own_code() -> bytes:
    return Path(__file__).read_bytes()


def _keep(path: Path, value: Any) -> None:
    """Write a value that can be computed again; nothing is written where Python writes no compiled modules either."""
    if sys.dont_write_bytecode:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(path)


def is_neutral(module: str) -> bool:
    """Return whether a module of this package cannot change a result, as for paths, errors and columns of tables."""
    return module in _NEUTRAL or module.endswith(".tables")


def imported_modules(*roots: str) -> set[str]:
    """Return the modules of this package that the roots import, directly or indirectly, and the roots themselves.

    The imports are read from the source without importing anything, so that planning stays fast.
    """
    return set().union(*(_reached(SOURCE, root) for root in roots))


@cache
def _reached(source: Path, root: str) -> frozenset[str]:
    """Return the modules that one root imports; cached, because a grid asks for the same few roots a thousand times."""
    seen: set[str] = set()
    todo = [root]
    while todo:
        name = todo.pop()
        if name in seen or (file := _located(source, name)) is None:
            continue
        todo.append(name.rpartition(".")[0])  # importing a module also runs its package's __init__.py
        if is_neutral(name):
            continue
        seen.add(name)
        todo.extend(_parsed(file)[1])
    return frozenset(seen)


def code_hash(*roots: str) -> str:
    """Return a digest of the code of the named modules and of all that they import from this package.

    Comments, docstrings, formatting and time stamps do not count, so that an improved comment reruns no job.
    """
    for root in roots:
        if _module_file(root) is None:
            raise ValueError(f"no module {root} in {SOURCE}")
    parts = sorted((name, _parsed(_module_file(name))[0]) for name in imported_modules(*roots))
    return digest(parts)


def content_digest(path: str | os.PathLike[str], suffixes: tuple[str, ...] | None = None) -> str:
    """Return a digest of a file, or of the names and contents of all files below a folder (those with one of
    ``suffixes``).

    Time stamps do not count. Of a file larger than 64 MiB only the size and the first and last MiB count.
    """
    root = Path(path)
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    chosen = [f for f in files if suffixes is None or f.suffix in suffixes]
    return digest([(str(f.relative_to(root)), f.stat().st_size, _file_digest(f)) for f in chosen])


def _file_digest(file: Path) -> str:
    size, mib = file.stat().st_size, 1 << 20
    with file.open("rb") as handle:
        if size <= 64 * mib:
            return hashlib.sha256(handle.read()).hexdigest()
        head = handle.read(mib)
        handle.seek(-mib, os.SEEK_END)
        return hashlib.sha256(head + handle.read()).hexdigest()


@cache
def git_commit() -> str:
    """Return the commit of the checkout, with ``-dirty`` if files differ from it; ``unknown`` without a checkout."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=SOURCE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


@cache
def package_versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_metadata(**fields: Any) -> dict[str, str]:
    """Return the key-value metadata of a Parquet file as text: the given fields, versions, git commit and time."""
    common = {
        "git_commit": git_commit(),
        "package_versions": json.dumps(package_versions(), sort_keys=True),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    own = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in fields.items()}
    return common | own


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` at the end of the block, or is deleted if the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name is cut, because file systems limit a name to 255 bytes
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=path.suffix)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes the file private; results follow the umask
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path as `replacing` does. Raises UserError if the disk is full or not writable; a file stays
    unchanged.
    """
    written = 0
    try:
        with replacing(path) as temporary:
            try:
                yield temporary
            finally:
                with suppress(OSError):
                    written = temporary.stat().st_size
    except UserError:
        raise
    except Exception as error:
        if sentence := unwritable(Path(path), error, written):
            raise UserError(sentence) from error
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def unwritable(path: Path, error: Exception, needed: int = 0) -> str | None:
    """Return the message about a file that could not be written; None if ``error`` has another cause.

    needed: least number of bytes of the file; 0 if unknown.
    """
    kind = error.errno if isinstance(error, OSError) else None
    said = str(error).lower()
    if kind in _REFUSED:
        return f"{path} cannot be written ({error.strerror}); give another output.dir, or the right to write there"
    if kind not in _FULL and "no space left" not in said and "disk is full" not in said:
        return None
    folder = next(place for place in path.absolute().parents if place.is_dir())
    free = shutil.disk_usage(folder).free
    more = f"{needed:,} bytes or more are needed" if needed else "there is no space for another file"
    return f"{path}: the disk is full, {more} and {folder} has {free:,}; free some space and run again to continue"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text atomically. Raises UserError as `atomic_path` does."""
    _write_bytes(Path(path), text.encode("utf-8"))


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(content)
        except OSError as error:
            if sentence := unwritable(path, error, needed=len(content)):
                raise UserError(sentence) from error
            raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_table(path: str | os.PathLike[str], table: pa.Table, fields: Mapping[str, Any]) -> None:
    """Write a Parquet file atomically with ``fields`` (see `file_metadata`) in its key-value metadata."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()  # in memory first, so that the message about a full disk can state the size
    pq.write_table(table.replace_schema_metadata(file_metadata(**fields)), buffer, compression="zstd")
    _write_bytes(Path(path), buffer.getvalue())


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the key-value metadata of a Parquet file. Raises UserError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw = pq.read_schema(path).metadata or {}
        return {k.decode(): v.decode() for k, v in raw.items() if not k.startswith(b"ARROW")}
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # imported here, because no code hash follows the imports of this module
        from kv_transition.parsing import damaged

        raise UserError(damaged(path, error)) from None


def rows_to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table of exactly this schema; a missing column is null, an unknown one is an error."""
    import pyarrow as pa

    rows = list(rows)
    unknown = {key for row in rows for key in row} - set(schema.names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)} are not in the schema")
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
