"""Test the quickstart: its four checks, their failures, and its error sentences."""

from __future__ import annotations

import polars as pl
import pytest

from kv_transition import quickstart

SMALL = quickstart.EXPERIMENT | {
    "perplexity": {"corpus": "synthetic", "context_tokens": [128], "stride": 16, "books": 2, "windows_per_book": 1},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(quickstart, "EXPERIMENT", SMALL)


def spoiled(monkeypatch, policy: str, **changes):
    """Change the result of the run of one policy: ``changes`` maps columns to functions of their values."""
    rows = quickstart.run.rows

    def spoil(engine, windows, spec, store):
        made = rows(engine, windows, spec, store)
        if spec["policy"] == policy:
            made = [row | {name: change(row[name]) for name, change in changes.items()} for row in made]
        return made

    monkeypatch.setattr(quickstart.run, "rows", spoil)


def test_four_checks_hold_and_say_what_was_found(tmp_path, capsys):
    assert quickstart.main(["--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("✓")] == [f"✓ {name}" for name in quickstart.CHECKS]
    # 2 tensors x 4 layers x 2 KV heads x 128 tokens x 32 channels x 4 bytes
    assert "[2, 128, 32] in each of 4 layers, 262,144 bytes" in said
    assert "26 of 128 entries,    53,248 bytes" in said
    table = pl.read_parquet(tmp_path / "quickstart" / "perplexity.parquet")
    assert set(table["policy"]) == set(SMALL["kv"]["policies"])
    assert str(tmp_path / "quickstart" / "perplexity.parquet") in said


@pytest.mark.parametrize(
    ("policy", "changes", "said"),
    [
        ("full", {"nll_sum": lambda nats: nats + 0.01}, "from a forward pass without a cache"),
        ("h2o", {"bytes_after": lambda size: size + 256}, "h2o keeps"),
        ("full", {"bytes_after": lambda size: size - 256}, "full keeps"),
        ("entropy_merge", {"nll_sum": lambda _: None, "error": lambda _: "OOM: no memory left"}, "no memory left"),
    ],
)
def test_a_check_that_fails_ends_it_with_1(tmp_path, capsys, monkeypatch, policy, changes, said):
    spoiled(monkeypatch, policy, **changes)
    assert quickstart.main(["--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "✗ Strategies applied" in out
    assert said in out
    assert "All four checks passed" not in out


def test_results_that_are_not_what_was_written_are_noticed(tmp_path, capsys, monkeypatch):
    write = quickstart.write_table

    def short(path, table, fields):
        write(path, table.slice(0, table.num_rows - ("ratio" in table.column_names)), fields)

    monkeypatch.setattr(quickstart, "write_table", short)
    assert quickstart.main(["--output", str(tmp_path)]) == 1
    assert "differs from the table that was written" in capsys.readouterr().out


def test_a_model_that_is_not_there_fails_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "EXPERIMENT", SMALL | {"model": {"name": str(tmp_path), "device": "cpu"}})
    assert quickstart.main(["--output", str(tmp_path / "out")]) == 1
    assert "✗ Model loaded" in capsys.readouterr().out
