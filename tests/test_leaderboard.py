"""Test several experiments as one table: values are preserved and escaped; a file of another form is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
import yaml

from kv_transition.errors import UserError
from kv_transition.outputs.leaderboard import Entry, Leaderboard, leaderboard

DOCS = Path(__file__).parents[1] / "docs" / "leaderboard.md"


def experiment(folder: Path, name: str, model: str = "org/model", policy: str = "snapkv") -> Path:
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"experiment": name, "model": {"name": model, "revision": None}, "dataset": {"name": "ruler"}})
    )
    rows = []
    for b in (0, 1):
        for statistic, estimate in (
            ("score_mean", 0.25 + b / 2),
            ("kept_mean", 100.0 * (b + 1)),
            ("failure_rate", 0.1),
        ):
            rows.append(
                {
                    "task": "niah_single",
                    "mode": "after_prompt",
                    "policy": policy,
                    "budget": "r0.2",
                    "bin": b,
                    "token_min": 10,
                    "token_max": 20,
                    "token_mean": 15.0,
                    "statistic": statistic,
                    "estimate": estimate,
                    "ci_low": 0.2,
                    "ci_high": 0.9,
                    "n": 20,
                    "method": "Wilson",
                    "clusters": 20,
                }
            )
    pl.DataFrame(rows).write_parquet(folder / "bin_stats.parquet")
    pl.DataFrame({"task": ["niah_single"], "metric": ["string_match_all"]}).write_parquet(folder / "scores.parquet")
    return folder


class Cells(HTMLParser):
    """Collect the text of the table's cells, and all tags of the page."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.cell: list[str] | None = None
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.cell = []

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag):
        if tag == "td":
            self.rows[-1].append("".join(self.cell))
            self.cell = None


def test_experiments_become_one_table_and_one_file(tmp_path):
    folders = [experiment(tmp_path, name) for name in ("first", "second")]
    leaderboard([str(f) for f in folders], str(tmp_path / "out"))
    entries = json.loads((tmp_path / "out" / "leaderboard.json").read_text())["entries"]
    assert [(e["experiment"], e["bin"], e["score"], e["kept"], e["metric"]) for e in entries] == [
        ("first", 0, 0.25, 100.0, "string_match_all"),
        ("first", 1, 0.75, 200.0, "string_match_all"),
        ("second", 0, 0.25, 100.0, "string_match_all"),
        ("second", 1, 0.75, 200.0, "string_match_all"),
    ]
    page = Cells((tmp_path / "out" / "leaderboard.html").read_text())
    body = [row for row in page.rows if row]
    assert [row[8] for row in body] == ["0.750 [0.20, 0.90]"] * 2 + ["0.250 [0.20, 0.90]"] * 2
    assert body[0][:7] == ["first", "org/model", "ruler", "niah_single", "after_prompt", "snapkv", "r0.2"]
    # a leaderboard of a leaderboard is identical to it
    leaderboard([str(tmp_path / "out" / "leaderboard.json")], str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "leaderboard.json").read_text())["entries"] == entries


def test_the_page_loads_nothing_and_escapes_everything(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    folder = experiment(tmp_path, "x", model=evil, policy=evil)
    leaderboard([str(folder)], str(tmp_path / "out"))
    page = Cells((tmp_path / "out" / "leaderboard.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag in ("img", "link", "iframe", "object") for tag, _ in page.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    body = [row for row in page.rows if row]
    assert body[0][1] == body[0][5] == evil


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version"),
        ({"entries": [{}]}, "entries.0"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_file_of_another_form_is_refused_in_a_sentence(tmp_path, change, words):
    (tmp_path / "leaderboard.json").write_text(json.dumps({"version": 1, "entries": []} | change))
    with pytest.raises(UserError, match=words) as error:
        leaderboard([str(tmp_path / "leaderboard.json")], str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_what_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        leaderboard([str(tmp_path / "none")], str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no bin_stats\.parquet"):
        leaderboard([str(tmp_path / "empty")], str(tmp_path))
    folder = experiment(tmp_path, "twice")
    with pytest.raises(UserError, match="given twice"):
        leaderboard([str(folder), str(folder)], str(tmp_path))


def test_the_documented_keys_are_those_of_the_schema():
    rows = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert documented == set(Entry.model_fields)
    assert set(Leaderboard.model_fields) == {"version", "entries"}
