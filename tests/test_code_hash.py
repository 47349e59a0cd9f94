"""The hash of code is remembered beside the compiled modules: by content, never instead of it."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from kv_transition import provenance

NAME = "kv_transition.main"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the folder of a package of two modules that is hashed in place of this one."""
    folder = tmp_path / "kv_transition"
    folder.mkdir()
    (folder / "main.py").write_text("from kv_transition import helper\nX = helper.f(1)\n")
    (folder / "helper.py").write_text("def f(x):\n    return x + 1\n")
    monkeypatch.setattr(provenance, "SOURCE", folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    yield folder
    new_process()


def new_process() -> None:
    provenance._parsed.cache_clear()
    provenance._reached.cache_clear()


def hashed() -> str:
    new_process()
    return provenance.code_hash(NAME)


def kept(package: Path) -> list[Path]:
    return sorted((package / "__pycache__").glob("*.code.json"))


@pytest.fixture
def parsed(monkeypatch):
    """Return the sources that are parsed from now on."""
    sources = []
    parse = ast.parse

    def count(source, *more, **options):
        sources.append(source)
        return parse(source, *more, **options)

    monkeypatch.setattr(provenance.ast, "parse", count)
    return sources


def test_the_second_process_parses_nothing_and_gets_the_same(package, parsed):
    first = hashed()
    assert len(parsed) == len(kept(package)) == 2
    assert hashed() == first
    assert len(parsed) == 2


def test_code_changed_within_size_and_time_stamp_is_noticed(package):
    first, helper = hashed(), package / "helper.py"
    before = helper.stat()
    helper.write_text("def f(x):\n    return x + 2\n")
    os.utime(helper, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert helper.stat().st_size == before.st_size
    assert hashed() != first


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": "another"}', "\0" * 40])
def test_a_damaged_memory_is_not_believed(package, content):
    first = hashed()
    for file in kept(package):
        file.write_text(content)
    assert hashed() == first


def test_it_does_not_depend_on_what_is_remembered(package, monkeypatch):
    first = hashed()
    for file in kept(package):
        file.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert hashed() == first
    assert not kept(package)


def test_another_version_of_the_hash_itself_parses_again(package, parsed, monkeypatch):
    hashed()
    monkeypatch.setattr(provenance, "_own_code", lambda: b"another version")
    hashed()
    assert len(parsed) == 4


def test_a_package_that_cannot_be_written_to_is_hashed_all_the_same(package):
    (package / "__pycache__").write_text("no folder")
    first = hashed()
    assert hashed() == first
