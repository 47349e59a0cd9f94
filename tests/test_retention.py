"""Compare retention, survival, conflicts and agreement with loops, closed forms and a known hazard."""

from __future__ import annotations

import json
from itertools import product
from statistics import fmean

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_conversations import chat_rows, layer_rows, verdict, verdicts_of, with_hazard
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import agreement
from kv_transition.stats.examples import Statistics
from kv_transition.stats.survival import median, survival
from kv_transition.studies.chat import multiturn
from kv_transition.studies.chat.analysis import first_failures, pairs, retention, sizes, write_retention
from kv_transition.studies.chat.memory_table import anatomy, memory_table, write_memory_table
from kv_transition.studies.chat.rules import Check
from kv_transition.studies.chat.tables import CACHE_ANATOMY, CHAT, CHAT_LAYERS, CHAT_VERDICTS, MEMORY_TABLE, RETENTION
from kv_transition.studies.chat.verdicts import verdicts, write_verdicts

QUICK = Statistics(resamples=500)


def only(rows, **key) -> dict:
    """Return the only row that has these values."""
    (found,) = [row for row in rows if all(row.get(k) == v for k, v in key.items())]
    return found


# ----------------------------------------------------------------------------------------------------
# Verdicts


CELLS = {
    ("full", "r1"): lambda k, turn: f"yes {k}" if turn < 3 else "no",
    ("random", "r0.2"): lambda k, turn: None if (k, turn) == (0, 4) else "well" if k % 2 else f"yes {k} no",
}


def test_every_instruction_in_force_gets_a_verdict_also_the_overridden_one():
    found = verdicts(chat_rows(3, 4, CELLS))
    assert len(found) == 2 * 3 * (2 * 1 + 2 * 2)
    for row in found:
        assert row["age"] == row["turn"] - (3 if row["check_id"] == "c2" else 1)
        assert row["overridden_by"] == ("c2" if row["check_id"] == "c1" and row["turn"] >= 3 else None)
        k = int(row["conversation_id"][1:])
        text = CELLS[row["policy"], row["budget"]](k, row["turn"])
        wanted = f"yes {k}" if row["check_id"] == "c1" else "no"
        assert row["rule"] == (None if text is None else wanted in text)


def test_chance_is_what_conversations_without_the_instruction_say():
    """Check that the chance level is the mean verdict on answers of other conversations without the instruction."""
    found = verdicts(chat_rows(12, 3, {("full", "r1"): lambda k, turn: "yes 0" if k < 4 else "no"}))
    for row in found:
        if row["turn"] == 3 and row["check_id"] == "c2":
            assert row["chance"] is None  # every conversation has the instruction
        if row["check_id"] == "c1" and row["turn"] < 3:
            k = int(row["conversation_id"][1:])
            others = [*range(k + 1, 12), *range(k)][:10]
            assert row["chance"] == fmean(float(k == 0 and j < 4) for j in others)


def test_an_override_holds_where_the_new_instruction_has_nothing_to_say():
    """Check that an instruction stays overridden in turns in which the newer one gives no verdict."""
    old = Check(kind="contains", value="a", id="old", since=1)
    new = Check(kind="contains", value="b", id="new", since=2, due=[2], overrides="old")
    rows = chat_rows(1, 4, {("full", "r1"): lambda k, turn: "a"})
    for row in rows:
        row["checks"] = json.dumps([c.model_dump() for c in (old, new) if c.in_force(row["turn"])])
    found = [(r["turn"], r["check_id"], r["overridden_by"]) for r in verdicts(rows)]
    assert found == [(1, "old", None), (2, "old", "new"), (2, "new", None), (3, "old", "new"), (4, "old", "new")]


# ----------------------------------------------------------------------------------------------------
# Survival


def test_without_early_ends_survival_is_a_share_with_wilsons_interval():
    rng = np.random.default_rng(3)
    time = np.minimum(rng.geometric(0.2, size=40), 9)
    failed = time < 9
    found = survival(time, failed, 9, 0.95)
    for turn in range(1, 9):
        there = int((time > turn).sum())
        assert found.estimate[turn - 1] == pytest.approx(there / 40)
        assert (found.low[turn - 1], found.high[turn - 1]) == pytest.approx(
            proportion_confint(there, 40, 0.05, "wilson"), abs=1e-9
        )


def test_where_all_have_failed_the_curve_stays_at_zero():
    """Check that the survival curve stays at 0 after all conversations have failed."""
    found = survival(np.array([1, 2, 2]), np.ones(3, bool), 5, 0.95)
    assert found.estimate == pytest.approx([2 / 3, 0, 0, 0, 0])
    assert found.high[-1] == pytest.approx(proportion_confint(0, 3, 0.05, "wilson")[1])


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=25))
def test_survival_is_the_product_of_shares_that_do_not_fail(conversations):
    time, failed = (np.array(column) for column in zip(*conversations, strict=True))
    found = survival(time, failed, 7, 0.95)
    share = 1.0
    for turn in range(1, 8):
        there = sum(t >= turn for t in time)
        if not there and share > 0:
            assert np.isnan(found.estimate[turn - 1])
            continue
        share *= 1 - sum(t == turn and f for t, f in conversations) / max(there, 1)
        assert found.estimate[turn - 1] == pytest.approx(share, abs=1e-12)
        assert 0 <= found.low[turn - 1] <= share + 1e-12
        assert share - 1e-12 <= found.high[turn - 1] <= 1
        assert found.n[turn - 1] == there or share == 0
        assert found.low[turn - 1] < 1
        assert found.high[turn - 1] > 0


def test_the_survival_curve_covers_the_true_one():
    rng = np.random.default_rng(5)
    hazard, turns, trials = 0.12, 8, 300
    truth = (1 - hazard) ** np.arange(1, turns + 1)
    for n in (10, 40):
        covered = np.zeros(turns)
        seen = np.zeros(turns)
        for _ in range(trials):
            fails, ends = rng.geometric(hazard, size=n), rng.integers(3, turns + 1, size=n)
            found = survival(np.minimum(fails, ends), fails <= ends, turns, 0.95)
            reached = ~np.isnan(found.estimate)
            seen += reached
            covered += reached & (found.low <= truth) & (truth <= found.high)
        assert (covered / seen).mean() >= 0.93
        assert (covered / seen).min() >= 0.89


def test_the_median_is_where_the_curve_comes_down_to_a_half():
    assert median(survival(np.array([1, 2, 3, 4]), np.ones(4, bool), 4, 0.95))[0] == 2
    assert median(survival(np.full(30, 8), np.zeros(30, bool), 8, 0.95)) == (np.inf, np.inf, np.inf)
    # one conversation gives almost no information
    assert median(survival(np.array([8]), np.zeros(1, bool), 8, 0.95)) == (np.inf, 1, np.inf)


def test_the_medians_interval_covers_the_true_one():
    rng = np.random.default_rng(9)
    truth = 6  # 0.88^6 is the first power below one half
    found = []
    for _ in range(200):
        time = rng.geometric(0.12, size=25)
        found.append(median(survival(np.minimum(time, 20), time <= 20, 20, 0.95)))
    assert fmean(low <= truth <= high for _, low, high in found) >= 0.93


def test_first_failures_end_at_a_turn_without_a_verdict():
    rows = [
        *(verdict("fails", t, t != 3) for t in range(1, 6)),
        *(verdict("lasts", t, True) for t in range(1, 6)),
        *(verdict("error", t, None if t == 4 else True) for t in range(1, 5)),
        verdict("at once", 1, None),
        *(verdict("late", t, t < 2, since=1) for t in (1, 2)),
        *(verdict("late", t, True, check_id="v", standing=False) for t in range(1, 6)),
        verdict("none", 1, False, standing=False),
        *(verdict("overridden", t, False, overridden_by="c2") for t in range(1, 4)),
        *(verdict("overridden", t, True, check_id="c2", overrides="c1") for t in range(1, 4)),
        *(verdict("idle", t, True) for t in (1, 2)),
        *(verdict("idle", t, False, check_id="v", standing=False) for t in range(1, 6)),
    ]
    found = first_failures(verdicts_of(rows), "rule").select("conversation_id", "time", "failed").rows()
    assert found == [
        ("error", 3, False), ("fails", 3, True), ("idle", 5, False), ("lasts", 5, False), ("late", 2, True),
        ("overridden", 3, False),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Retention per turn


def test_retention_covers_the_truth_of_conversations_that_differ():
    """Check coverage if each conversation has its own rate, so that intervals must treat conversations as clusters."""
    rng = np.random.default_rng(11)
    truth, trials = 0.75, 80
    for n in (10, 30):
        covered = 0
        for _ in range(trials):
            rates = rng.beta(1.5, 0.5, size=n)
            rows = [
                verdict(f"k{i}", t, bool(rng.random() < p), check_id=f"c{c}")
                for i, p in enumerate(rates)
                for t, c in product(range(1, 5), range(2))
            ]
            found = only(retention(verdicts_of(rows), QUICK), statistic="retention", turn=None)
            covered += found["ci_low"] <= truth <= found["ci_high"]
            assert (found["n"], found["clusters"]) == (8 * n, n)
        assert covered / trials >= 0.9


def test_retention_and_survival_follow_the_hazard():
    rng = np.random.default_rng(2)
    rows = with_hazard(rng, 400, 8, 0.1)
    found = retention(verdicts_of(rows), QUICK)
    for turn in range(1, 9):
        truth = 0.9**turn
        kept = only(found, statistic="retention", turn=turn)
        alive = only(found, statistic="survival", turn=turn)
        assert kept["estimate"] == pytest.approx(alive["estimate"])  # a conversation that fails once fails for good
        assert kept["ci_low"] < truth < kept["ci_high"]
        assert alive["ci_low"] < truth < alive["ci_high"]
    half = only(found, statistic="survival_median")
    assert half["ci_low"] <= 7 <= half["ci_high"]  # 0.9^7 is the first below one half


def test_only_standing_instructions_that_are_not_overridden_count():
    rows = [
        verdict("a", 1, True), verdict("a", 1, False, check_id="v", standing=False),
        verdict("a", 1, False, check_id="x", overridden_by="c1"), verdict("a", 1, None, check_id="y"),
    ]  # fmt: skip
    found = retention(verdicts_of(rows), QUICK)
    assert only(found, statistic="retention", turn=1)["estimate"] == 1
    assert only(found, statistic="retention", turn=1)["n"] == 1
    assert only(found, statistic="own_turn")["estimate"] == 0


def test_no_verdict_at_all_gives_no_row():
    assert retention(verdicts_of([]), QUICK) == []


def test_differences_at_the_last_turn_are_paired_and_held_to_holm():
    rng = np.random.default_rng(8)
    rows = []
    for policy, rate in {"full": 1.0, "random": 0.2, "snapkv": 0.9, "text_drop": 0.4}.items():
        for i in range(30):
            length = 3 + i % 3  # conversations have different last turns
            rows += [
                verdict(
                    f"k{i}", t, bool(rng.random() < rate), policy=policy, budget="r1" if policy == "full" else "r0.2"
                )
                for t in range(1, length + 1)
            ]
    rows = [r for r in rows if not (r["policy"] == "random" and r["conversation_id"] == "k0" and r["turn"] == 3)]
    found = [
        r for r in retention(verdicts_of(rows), Statistics(resamples=4000)) if r["statistic"] == "last_turn_difference"
    ]
    last = {
        (r["policy"], r["conversation_id"]): float(r["rule"])
        for r in rows
        if r["turn"] == 3 + int(r["conversation_id"][1:]) % 3
    }
    for row in found:
        ids = [f"k{i}" for i in range(30) if (row["policy"], f"k{i}") in last]
        assert row["n"] == len(ids) == (29 if row["policy"] == "random" else 30)
        assert row["estimate"] == pytest.approx(fmean(last[row["policy"], i] - last["full", i] for i in ids))
        assert (row["reference_policy"], row["reference_budget"]) == ("full", "r1")
        apart = row["ci_low"] > 0 or row["ci_high"] < 0
        assert apart == (row["p_value"] < 0.05)
    p = [row["p_value"] for row in found]
    assert min(p) < 0.05 < max(p)
    assert [row["p_holm"] for row in found] == pytest.approx(multipletests(p, method="holm")[1])
    assert only(found, policy="random")["p_holm"] < 0.01
    assert only(found, policy="snapkv")["p_holm"] > 0.05


# ----------------------------------------------------------------------------------------------------
# Conflicts


def conflict(conversation: str, outcomes: list[str]) -> list[dict]:
    """Return the verdicts of a conversation whose answers from turn 3 on follow ``outcomes``."""
    rows = [verdict(conversation, t, True) for t in (1, 2)]
    for t, outcome in enumerate(outcomes, 3):
        rows.append(verdict(conversation, t, outcome in ("old", "both"), overridden_by="c2"))
        rows.append(verdict(conversation, t, outcome in ("new", "both"), check_id="c2", since=3, overrides="c1"))
    return rows


def test_who_wins_is_counted_at_every_age():
    outcomes = [["old", "new", "new"], ["new", "new", "new"], ["both", "old", "neither"], ["old", "both", "old"]]
    rows = [row for i, own in enumerate(outcomes) for row in conflict(f"k{i}", own)]
    assert pairs(verdicts_of(rows), "rule").height == 12
    found = retention(verdicts_of(rows), QUICK)
    for age in range(3):
        for name in ("new", "old", "both", "neither"):
            row = only(found, statistic=f"conflict_{name}", age=age)
            assert row["estimate"] == pytest.approx(fmean(own[age] == name for own in outcomes))
            assert row["n"] == 4
    # the first instruction is forgotten from age 1, from age 0, from age 2, never
    remembered = [only(found, statistic="remembered", age=age)["estimate"] for age in range(3)]
    assert remembered == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    half = only(found, statistic="remembered_median")
    assert half["estimate"] == 1


def test_generated_conversations_answered_rightly_keep_everything():
    """Check the generator's own answers through the loader's rows: all rules are followed, and the newer one always
    wins."""
    rows = []
    for talk in multiturn.generated(40, 8, 3):
        for turn, (said, answer) in enumerate(zip(talk["turns"], talk["meta"]["answers"], strict=True), 1):
            rows.append(dict.fromkeys(CHAT.names) | {
                "chat_set": "generated", "conversation_id": talk["conversation_id"], "turn": turn, "policy": "full",
                "budget": "r1", "user": said["content"], "text": answer, "checks": json.dumps(said["checks"]),
            })  # fmt: skip
    found = retention(verdicts_of([dict.fromkeys(CHAT_VERDICTS.names) | row for row in verdicts(rows)]), QUICK)
    assert {row["estimate"] for row in found if row["statistic"] in ("retention", "own_turn", "survival")} == {1}
    assert only(found, statistic="conflict_new", age=None)["estimate"] == 1
    assert only(found, statistic="remembered_median")["estimate"] == 0
    assert max(row["estimate"] for row in found if row["statistic"] == "chance") < 0.1


# ----------------------------------------------------------------------------------------------------
# Agreement


def test_kappa_is_the_textbooks():
    # Cohen's kappa of 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (0.70 - 0.50) / (1 - 0.50)
    first = np.repeat([1.0, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1.0, 0, 1, 0], [20, 5, 10, 15])
    row = agreement.kappa(first, second, np.arange(50), 0.95)
    assert row["estimate"] == pytest.approx(0.4)
    assert row["ci_low"] < 0.4 < row["ci_high"]


@given(st.lists(st.integers(1, 60), min_size=4, max_size=4))
def test_the_linearised_error_is_that_of_the_library_where_clusters_are_single(table):
    """Compare the linearized error of kappa with statsmodels for clusters of one answer."""
    each = np.vstack([np.tile(kind, (times, 1)) for kind, times in zip(np.eye(4), table, strict=True)])
    kappa, error = agreement.linearised(each)
    theirs = cohens_kappa(np.array(table).reshape(2, 2))
    n = len(each)
    assert kappa == pytest.approx(theirs.kappa, abs=1e-12)
    assert error**2 * (n - 1) / n == pytest.approx(theirs.var_kappa, rel=1e-6, abs=1e-12)


@given(st.data())
def test_kappa_counts_as_a_loop_does(data):
    n = data.draw(st.integers(2, 30))
    bits = st.lists(st.booleans(), min_size=n, max_size=n)
    first, second = data.draw(bits), data.draw(bits)
    held = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    row = agreement.kappa(np.array(first, float), np.array(second, float), np.array(held), 0.95)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert row["estimate"] is None
        assert "never changes" in row["method"]
        return
    same = fmean(a == b for a, b in zip(first, second, strict=True))
    chance = fmean(first) * fmean(second) + (1 - fmean(first)) * (1 - fmean(second))
    assert row["estimate"] == pytest.approx((same - chance) / (1 - chance))
    assert row["clusters"] == len(set(held))
    assert -1 <= row["ci_low"] <= row["estimate"] <= row["ci_high"] <= 1


def test_kappa_covers_the_truth_where_conversations_differ():
    rng = np.random.default_rng(4)

    def draw(conversations):
        rate = np.repeat(rng.beta(1.2, 1.2, size=conversations), 8)
        rule = rng.random(len(rate)) < rate
        judge = np.where(rng.random(len(rate)) < 0.88, rule, ~rule)
        return rule.astype(float), judge.astype(float), np.repeat(np.arange(conversations), 8)

    truth = agreement.kappa(*draw(100_000), 0.95)["estimate"]
    for conversations in (10, 30):
        rows = [agreement.kappa(*draw(conversations), 0.95) for _ in range(300)]
        assert fmean(row["ci_low"] <= truth <= row["ci_high"] for row in rows) >= 0.92


def test_perfect_agreement_is_not_certain():
    bits = np.array([0.0, 1, 1, 0, 1])
    row = agreement.kappa(bits, bits, np.arange(5), 0.95)
    assert row["estimate"] == 1
    assert row["ci_low"] < 0.9


def test_a_judge_that_fails_is_neither_for_nor_against():
    rows = [
        verdict("a", 1, True, judge=True), verdict("a", 2, True, judge=None, judge_error="TIMEOUT: late"),
        verdict("b", 1, False, judge=False), verdict("b", 2, False, judge=True),
    ]  # fmt: skip
    found = retention(verdicts_of(rows), QUICK)
    assert only(found, statistic="retention", by="judge", turn=None)["n"] == 3
    assert only(found, statistic="retention", by="judge", turn=None)["estimate"] == pytest.approx(2 / 3)
    failed = only(found, statistic="judge_failed", policy="full")
    assert (failed["estimate"], failed["n"]) == (0.25, 4)
    assert only(found, statistic="agreement", policy="full")["n"] == 3
    assert only(found, statistic="kappa", policy="full")["n"] == 3
    assert len([r for r in found if r["statistic"] == "kappa"]) == 2  # one for the cell, and one for all cells together


# ----------------------------------------------------------------------------------------------------
# Table 1 and sizes


@pytest.fixture
def written(tmp_path):
    """Write all files: answers, verdicts, retention, table 1, cache sizes. Return the answers and the paths."""
    chat = chat_rows(5, 4, CELLS)
    files = {
        name: str(tmp_path / f"{name}.parquet")
        for name in ("chat", "layers", "verdicts", "retention", "table", "cache")
    }
    write_table(files["chat"], rows_to_table(chat, CHAT), {})
    write_table(files["layers"], rows_to_table(layer_rows(chat), CHAT_LAYERS), {})
    write_verdicts([files["chat"]], files["verdicts"])
    statistics = {"confidence": 0.95, "resamples": 500, "seed": 0}
    write_retention(files["verdicts"], [files["chat"]], files["retention"], statistics)
    write_memory_table(
        files["verdicts"], [files["chat"]], [files["layers"]], files["table"], files["cache"], statistics
    )
    return chat, files


def test_table_1_is_what_a_loop_counts(written):
    chat, files = written
    table = pq.read_table(files["table"]).cast(MEMORY_TABLE).to_pylist()
    for (policy, budget), says in CELLS.items():
        own = [row for row in chat if row["policy"] == policy]
        kept = []
        for row in own:
            text, k = says(int(row["conversation_id"][1:]), row["turn"]), int(row["conversation_id"][1:])
            if text is not None:
                kept.append(float((f"yes {k}" if row["turn"] < 3 else "no") in text))
        expected = {
            "retention_rule": fmean(kept),
            "repetition": fmean(row["repetition"] for row in own),
            "answer_perplexity": np.exp(fmean(r["answer_nll"] for r in own if r["answer_nll"] is not None)),
            "entries": fmean(row["entries_after"] for row in own),
            "cache_bytes": fmean(row["bytes_after"] for row in own),
            "total_bytes": fmean(row["total_bytes_after"] for row in own),
            "failed": fmean(row["text"] is None for row in own),
        }
        for statistic, value in expected.items():
            row = only(table, policy=policy, budget=budget, statistic=statistic)
            assert row["estimate"] == pytest.approx(value), statistic
            assert row["ci_low"] <= value <= row["ci_high"], statistic
            assert row["clusters"] == 5
        assert only(table, policy=policy, statistic="entries")["n"] == 20
        assert not [row for row in table if row["statistic"] == "retention_judge"]


def test_sizes_and_anatomy_are_means_over_conversations(written):
    chat, files = written
    found = pq.read_table(files["retention"]).cast(RETENTION).to_pylist()
    for turn in range(1, 5):
        own = [r for r in chat if r["turn"] == turn and r["policy"] == "random"]
        row = only(found, policy="random", statistic="entries_after", turn=turn)
        assert row["estimate"] == pytest.approx(fmean(r["entries_after"] for r in own))
        assert row["n"] == 5
    cache = pq.read_table(files["cache"]).cast(CACHE_ANATOMY).to_pylist()
    for turn, when in product(range(1, 5), ("before", "after")):
        own = [r for r in chat if r["turn"] == turn and r["policy"] == "random"]
        shape = {"policy": "random", "turn": turn, "when": when, "statistic": "entries"}
        assert only(cache, **shape, kind="full")["estimate"] == pytest.approx(fmean(r[f"entries_{when}"] for r in own))
        assert only(cache, **shape, kind="full")["layers"] == 2
        assert only(cache, **shape, kind="sliding")["estimate"] == 8
        assert only(cache, **shape, kind="sliding")["layers"] == 1
    assert {row["bytes_per_token"] for row in cache} == {128.0}


def test_files_without_instructions_or_answers_still_become_tables(tmp_path):
    chat = [row | {"checks": "[]"} for row in chat_rows(2, 2, CELLS)]
    for name, rows, schema in (("chat", chat, CHAT), ("layers", [], CHAT_LAYERS)):
        write_table(tmp_path / f"{name}.parquet", rows_to_table(rows, schema), {})
    write_verdicts([str(tmp_path / "chat.parquet")], str(tmp_path / "v.parquet"))
    assert pq.read_table(tmp_path / "v.parquet").schema.equals(CHAT_VERDICTS)
    own, statistics = [str(tmp_path / "chat.parquet")], {"confidence": 0.95, "resamples": 500, "seed": 0}
    write_retention(str(tmp_path / "v.parquet"), own, str(tmp_path / "r.parquet"), statistics)
    found = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert {row["statistic"] for row in found} == {
        "entries_before",
        "entries_after",
        "bytes_after",
        "total_bytes_after",
    }
    layers = [str(tmp_path / "layers.parquet")]
    outputs = str(tmp_path / "t.parquet"), str(tmp_path / "a.parquet")
    write_memory_table(str(tmp_path / "v.parquet"), own, layers, *outputs, statistics)
    assert pq.read_table(outputs[1]).num_rows == 0
    assert "repetition" in {row["statistic"] for row in pq.read_table(outputs[0]).to_pylist()}
    assert memory_table(verdicts_of([]), pl.DataFrame(chat, schema_overrides={"error": pl.String}), QUICK)
    assert anatomy(pl.DataFrame(), QUICK) == []
    assert sizes(pl.DataFrame(chat), QUICK)
