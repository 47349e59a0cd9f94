"""The books that perplexity is measured on: local files, a hub repository, or synthetic documents.

A book is a cluster: measurements on several windows of one book are not independent.
"""

from __future__ import annotations

import gzip
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from kv_transition.data.records import SUFFIXES, read_file
from kv_transition.errors import UserError
from kv_transition.studies.perplexity import pg19

TEXTS = (".txt", ".txt.gz")
TABLES = (".parquet", *SUFFIXES)

_MISSING = 4
"""maximum number of tokens by which a synthetic document is shorter than requested, its <bos> included"""

Books = dict[str, Callable[[], str]]
"""The function that reads a book's text, by the name of the book."""


def books(section: Mapping[str, Any], tokens: int) -> Books:
    """Return every book of the corpus of the ``perplexity`` section, in the order of their names.

    Args:
        section: corpus, path, revision, split, text_field, book_field, books, seed.
        tokens: length of a synthetic document; other books have their own length.

    Raises:
        UserError: there is no such file or repository, a record lacks a field, or two books have the same name. Reading
            the text of a book raises it if the file is damaged or not UTF-8.
    """
    if section["corpus"] == "synthetic":
        return dict(_synthetic(section, tokens))
    repository = hub_repository(section)
    found = _local(section) if repository is None else _from_hub(*repository, section)
    named: Books = {}
    for name, read in found:
        if name in named:
            raise UserError(f"perplexity.path: two books are named {name!r}; give each book a different name")
        named[name] = _cleaned(read) if section["corpus"] == "pg19" else _plain(read)
    if not named:
        raise UserError(f"perplexity.path: {section['path']} contains no book: no file ends in {_listing()}")
    return dict(sorted(named.items()))


def hub_repository(section: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the repository and commit of the books; None if they are local or synthetic.

    Raises UserError if the path is neither local nor the name of a repository, or the revision is not a commit.
    """
    path, revision = section["path"], section["revision"]
    if section["corpus"] == "synthetic" or Path(path).exists():
        return None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"perplexity.path: there is no file or folder {path}")
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"perplexity.revision: there is no file or folder {path}, and a download from the hub ({path}) needs the "
            f"commit (40 hexadecimal digits), not {revision!r}"
        )
    return path, revision


def _listing() -> str:
    return ", ".join(TEXTS + TABLES[:-1]) + f" or {TABLES[-1]}"


def _plain(read: Callable[[], str]) -> Callable[[], str]:
    return lambda: read().replace("\r\n", "\n").replace("\r", "\n")


def _cleaned(read: Callable[[], str]) -> Callable[[], str]:
    return lambda: pg19.clean(read())


def _local(section: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    root = Path(section["path"])
    if root.is_file():
        yield from _file(root, root.name, section)
        return
    files = sorted(file for file in root.rglob("*") if file.name.endswith(TEXTS + TABLES))
    # a table in a folder with texts is not a book
    chosen = [file for file in files if file.name.endswith(TEXTS)] or files
    for file in chosen:
        yield from _file(file, file.relative_to(root).as_posix(), section)


def _from_hub(repository: str, revision: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    from kv_transition.data.hub import fetch, list_files

    try:
        there = [file for file in list_files(repository, revision) if file.endswith(TEXTS + TABLES)]
        chosen = [file for file in there if _of_split(PurePosixPath(file), section["split"])]
        if not chosen:
            raise UserError(
                f"{repository} at {revision} has no file of the split {section['split']!r} that ends in {_listing()}; "
                f"it has {', '.join(there[:5]) or 'none of any split'}"
            )
        for file in sorted(chosen):
            yield from _file(fetch(repository, revision, file), file, section)
    except UserError as error:
        raise UserError(f"perplexity.path: {str(error).removeprefix('dataset: ')}") from None


def _of_split(file: PurePosixPath, split: str) -> bool:
    """Return whether a file belongs to the split: ``test/0000.parquet``, ``data/test-00000-of-00001.parquet``."""
    return split in file.parent.parts or re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.name) is not None


def _file(path: Path, name: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the book of a text file, or the books of a table. name: name of the file."""
    if name.endswith(TEXTS):
        yield name.removesuffix(".gz").removesuffix(".txt"), lambda: _text(path, name)
    elif name.endswith(TABLES):
        for where, record in _records(path, name):
            yield _record(record, where, section)
    else:
        raise UserError(f"perplexity.path: {name} must end in {_listing()}")


def _text(path: Path, name: str) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start + 1} is not UTF-8") from None
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def _records(path: Path, name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if not name.endswith(".parquet"):
        return read_file(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [(f"{name}, row {i}", row) for i, row in enumerate(pq.read_table(path).to_pylist(), start=1)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def _record(record: Mapping[str, Any], where: str, section: Mapping[str, Any]) -> tuple[str, Callable[[], str]]:
    fields = {key: section[key] for key in ("text_field", "book_field") if section[key] is not None}
    for key, field in fields.items():
        if field not in record:
            there = ", ".join(record) or "none"
            raise UserError(f"perplexity.{key}: {where} has no {field!r}; its fields are {there}")
    text = record[section["text_field"]]
    if not isinstance(text, str):
        raise UserError(f"{where}: {section['text_field']!r} must be a text, not {type(text).__name__}")
    name = record[section["book_field"]] if "book_field" in fields else sha256(text.encode()).hexdigest()[:16]
    return str(name), lambda: text


def _synthetic(section: Mapping[str, Any], tokens: int) -> Iterator[tuple[str, Callable[[], str]]]:
    from kv_transition.data import synthetic

    low, high = synthetic.MIN_DOCUMENT_TOKENS, synthetic.MAX_DOCUMENT_TOKENS
    tokens += _MISSING
    if tokens > high:
        raise UserError(
            f"perplexity.context_tokens: a synthetic document has at most {high} tokens, but the longest context with "
            f"perplexity.windows_per_book * perplexity.stride tokens after it needs {tokens}; lower one of them"
        )
    if section["split"] not in ("test", "train"):
        raise UserError(f"perplexity.split: synthetic has the splits test and train, not {section['split']!r}")
    for number in range(section["books"]):
        name = f"synthetic-{section['split']}-{section['seed']}-{number:05d}"
        yield name, _document(name, max(tokens, low), section["split"])


def _document(name: str, tokens: int, split: str) -> Callable[[], str]:
    from kv_transition.data.synthetic import draw_document

    return lambda: draw_document(random.Random(f"{name}-{tokens}"), tokens, split).text
