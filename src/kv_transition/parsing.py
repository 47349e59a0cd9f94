"""Readers of text, JSON and Parquet from outside: they return a value, or raise UserError with one sentence."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError

if TYPE_CHECKING:
    import os

    import pyarrow as pa

MAX_DEPTH = 100
"""levels of nesting; no file of this project has more than ten"""

_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_MARKS[codecs.BOM_UTF16_BE] = "UTF-16"


def read_text(path: str | os.PathLike[str], what: str = "file") -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    what: the word for the file in error messages. Raises UserError if the file does not exist, is a folder or a pipe,
    cannot be read, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{str(path)!r} is a folder; give the {what} itself")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; give the {what} itself")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decode(content, str(path))


def decode(content: bytes, where: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark. Raises UserError for another encoding."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise UserError(f"{where} is in {encoding}; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: byte {error.start + 1}, in line {line}, is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{where} contains binary data, not text")
    return text


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Return the value of a JSON file. Raises UserError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, what), str(path))


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text; ``where`` is its name in error messages.

    Raises UserError if the text is malformed, nested too deeply, has a key twice in one object, or contains a number or
    character that cannot be represented.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except _TwiceError as error:
        raise UserError(f"{where}: the key {error} is given twice; keep one") from None
    except json.JSONDecodeError as error:
        line = "" if ", line " in where else f"line {error.lineno}, "
        place = f"{line}character {error.colno}"
        raise UserError(f"{where}: malformed JSON at {place} ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{where}: malformed JSON: it is nested too deeply; {MAX_DEPTH} levels are allowed") from None
    except ValueError:
        raise UserError(f"{where}: malformed JSON: a whole number has too many digits") from None
    check_value(value, where)
    return value


class _TwiceError(Exception):
    """A key occurs twice in one JSON object."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for key in keys if keys.count(key) > 1)))
    return found


def check_value(value: Any, where: str, nul: bool = True) -> None:
    """Check that a parsed value can be stored. Raises UserError for characters that cannot, or nesting beyond
    `MAX_DEPTH`.

    nul: whether texts may contain the character NUL; names of files may not.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise UserError(f"{where}: it is nested too deeply; {MAX_DEPTH} levels are allowed")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, where, nul)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key, where, nul)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner


def _check_text(text: Any, where: str, nul: bool) -> None:
    if not isinstance(text, str):
        return  # keys of YAML may be numbers; the reader of the value checks their type
    if "\0" in text and not nul:
        raise UserError(f"{where} contains the character NUL, which is not allowed in a name; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair is not a character; write the text as UTF-8") from None


def read_parquet(path: str | os.PathLike[str], **options: Any) -> pa.Table:
    """Return a Parquet file as a table; options: those of ``pyarrow.parquet.read_table``.

    Raises UserError if the file does not exist, is damaged or lacks a requested column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the step that writes it") from None
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(damaged(path, error)) from None


def damaged(path: str | os.PathLike[str], error: Exception) -> str:
    """Return the error message about a results file that cannot be read."""
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return f"{path} is damaged ({reason}); delete it and run again, so that it is computed again"
