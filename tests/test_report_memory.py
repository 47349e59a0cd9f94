"""Test the report section on conversations, with answers that have known true values."""

from __future__ import annotations

import re

import polars as pl
import pytest
import yaml
from simulated_conversations import chat_rows, layer_rows

from kv_transition.errors import UserError
from kv_transition.outputs.build import Source, build_report
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.studies.chat import report as memory
from kv_transition.studies.chat.analysis import write_retention
from kv_transition.studies.chat.memory_table import write_memory_table
from kv_transition.studies.chat.plots import FIGURES, write_retention_plots
from kv_transition.studies.chat.tables import CHAT, CHAT_LAYERS, JUDGE
from kv_transition.studies.chat.verdicts import write_verdicts

STATISTICS = {"confidence": 0.95, "resamples": 500, "seed": 0}
POLICIES = {"full": {}, "dice": {"kind": "random"}, "sinks": {"kind": "streaming_llm"}, "snapkv": {}}


def keeps(k, turn):
    return f"yes {k}" if turn < 3 else "no"


def forgets(k, turn):
    return keeps(k, turn) if turn < 2 or k % 3 == 0 else "hm"


CELLS = {
    ("full", "r1"): keeps, ("snapkv", "r0.2"): keeps, ("dice", "r0.2"): forgets, ("sinks", "r0.2"): forgets,
    ("text_drop", "r0.2"): forgets,
}  # fmt: skip


def judge_rows(chat):
    """Return rows of a judge that agrees with the rule on c1, gives no verdict at turn 4, and accepts all other
    answers."""
    rows = []
    for row in chat:
        for check in ("c1", "c2") if row["turn"] >= 3 else ("c1",):
            key = {name: row[name] for name in ("chat_set", "conversation_id", "turn", "policy", "budget")}
            kept = f"yes {int(row['conversation_id'][1:])}" in row["text"] if check == "c1" else True
            late = {"judge": None, "judge_error": "TIMEOUT: no complete answer within 60 s"}
            rows.append(key | {"check_id": check} | (late if row["turn"] == 4 else {"judge": kept}))
    return rows


def make(folder, n=12, judged=True):
    chat = chat_rows(n, 4, CELLS)
    names = ("chat", "layers", "judge", "chat_verdicts", "retention", "memory_table", "cache_anatomy")
    files = {name: str(folder / f"{name}.parquet") for name in names}
    write_table(files["chat"], rows_to_table(chat, CHAT), {})
    write_table(files["layers"], rows_to_table(layer_rows(chat), CHAT_LAYERS), {})
    write_table(files["judge"], rows_to_table(judge_rows(chat), JUDGE), {})
    write_verdicts([files["chat"]], files["chat_verdicts"], files["judge"] if judged else None)
    write_retention(files["chat_verdicts"], [files["chat"]], files["retention"], STATISTICS)
    tables = files["memory_table"], files["cache_anatomy"]
    write_memory_table(files["chat_verdicts"], [files["chat"]], [files["layers"]], *tables, STATISTICS)
    (folder / "plots").mkdir()
    drawings = {f"{name}_svg": str(folder / f"plots/{name}.svg") for name in FIGURES}
    write_retention_plots(files["retention"], 0.95, drawings)
    settings = {"experiment": "talks", "model": {"name": "resources/tiny-follower", "dtype": "float32"},
                "kv": {"policies": POLICIES}, "chat": {"source": "turns"}, "statistics": STATISTICS}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    build_report(
        manifests=[], config=str(folder / "config.yaml"), plots_dir=str(folder / "plots"), extra=files,
        output_md=str(folder / "report.md"), output_html=str(folder / "report.html"),
    )  # fmt: skip
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    return folder, *make(folder)


def test_an_experiment_of_conversations_has_the_section_and_its_figures(made):
    _, text, page = made
    assert "## Conversations on a compressed cache" in text
    assert 'data-chart="memory"' in page
    for name in FIGURES:
        assert f"plots/{name}.svg" in text
        assert f'id="figure-{name}"' in page
    assert "None" not in text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())


def test_rows_stand_in_the_order_of_table_1(made):
    _, text, _ = made
    table = text.split("### Table 1")[1].split("\n\n")[1]
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert names[:4] == ["full", "sinks", "dice", "snapkv"]
    assert names[4] == "text_drop (control: deletes text, no KV compression)"
    assert "It is not KV compression" in text


def test_numbers_are_those_of_their_tables(made):
    folder, _, page = made
    found = re.findall(
        r'data-from="((?:retention|memory_table|cache_anatomy)/[^"]+)" data-n="(\d+)"[^>]*>([^<]+)<', page
    )
    assert len(found) > 60
    tables = {name: pl.read_parquet(folder / f"{name}.parquet") for name in ("retention", "memory_table")}
    checked = 0
    for place, n, shown in found:
        table, *key = place.split("/")
        if table not in tables or "bytes" in place or "median" in place:
            continue
        own = tables[table].filter(chat_set=key[0], policy=key[1], budget=key[2], statistic=key[3])
        if table == "retention" and len(key) > 4:
            own = own.filter(by=key[4])
        if table == "retention":
            own = own.filter(pl.col("turn").is_null() & pl.col("age").is_null())
        if key[1] == "all":
            continue
        (row,) = own.to_dicts()
        assert int(n) == row["n"]
        assert float(shown.split()[0].replace("−", "-")) == pytest.approx(row["estimate"], abs=0.051)
        checked += 1
    assert checked > 40


def test_the_judges_silence_is_shown_and_counts_for_nobody(made):
    """Check that missing verdicts of the judge are shown and not counted."""
    folder, text, _ = made
    block = text.split("### Rule and judge")[1]
    assert "Without a verdict" in block
    failed = pl.read_parquet(folder / "retention.parquet").filter(statistic="judge_failed", policy="full")
    assert failed["estimate"].item() == pytest.approx(2 / 6)  # two of the six questions of each conversation
    kept = pl.read_parquet(folder / "memory_table.parquet").filter(policy="dice", statistic="retention_judge")
    # turns 1 to 3; the last one has check c2, which the judge always accepts
    assert kept["estimate"].item() == pytest.approx((1 + 4 / 12 + 1) / 3)


def test_few_conversations_are_exploratory_and_no_judge_leaves_no_trace(tmp_path):
    text, _ = make(tmp_path, n=5, judged=False)
    assert "**Exploratory:** 5 conversations are fewer than the required 20" in text
    assert "judge" not in text.split("## Conversations")[1].split("\n## ")[0].lower().replace(
        "by rule and by judge", ""
    )


def test_without_conversations_there_is_no_section():
    assert memory.build(Source(None, {})) is None


def test_an_unknown_figure_is_refused(made, tmp_path):
    folder, *_ = made
    with pytest.raises(UserError, match="no figure is called 'retension_svg'"):
        write_retention_plots(str(folder / "retention.parquet"), 0.95, {"retension_svg": str(tmp_path / "x.svg")})
