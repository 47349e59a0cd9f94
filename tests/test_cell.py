"""Test the rows of a cell: one for each answer, and a failure for each answer that fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import engine, tokens

from kv_transition.budget import Budget
from kv_transition.cache.store import PrefillStore
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.provenance import digest, rows_to_table
from kv_transition.run.decode import Setting
from kv_transition.studies.grid import run as cell
from kv_transition.studies.grid.tables import CELLS

SPEC = {
    "mode": "before_question",
    "policy": "mine",
    "kind": "random",
    "hyper_parameters": {"per_head": True},
    "budget": "r0.3",
    "first_token": "compressed",
    "decoding": {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0},
}


class Words:
    """A tokenizer whose words are the token ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture
def model(monkeypatch):
    ready = engine("qwen2")
    monkeypatch.setattr(ready, "tokenizer", Words())
    return ready


@pytest.fixture
def examples():
    return [
        {
            "task": "t", "example_id": f"e{i}", "bin": 0, "prompt_sha256": f"sha{i}", "prompt_len": 55,
            "context_ids": tokens(50, seed=i), "question_ids": tokens(5, seed=9), "max_new_tokens": 6,
        }
        for i in range(3)
    ]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return PrefillStore(tmp_path / "model")


def run(model, examples, store, **changes):
    return cell.rows(model, examples, SPEC | changes, store)


def test_every_example_is_a_row_of_the_table(model, examples, store):
    rows = run(model, examples, store)
    table = rows_to_table(rows, CELLS)
    assert table["example_id"].to_pylist() == ["e0", "e1", "e2"]
    row = rows[0]
    assert row["cell_hash"] == digest(SPEC)
    assert row["budget_entries"] == 15  # ceil(0.3 * 50)
    assert row["kept_final"] == 15 + 5 + 5  # plus the question and all generated tokens except the last
    assert row["completion_tokens"] == len(row["text"].split()) == 6
    assert row["finish_reason"] == "length"
    assert row["latency_s"] == pytest.approx(row["prefill_s"] + row["compress_s"] + row["decode_s"])
    assert row["prefill_s"] + row["compress_s"] <= row["ttft_s"] <= row["latency_s"]


def test_the_model_stops_at_its_end_token(model, examples, store, monkeypatch):
    free = run(model, examples, store)[0]["text"].split()
    monkeypatch.setattr(model, "eos", frozenset([int(free[2])]))
    stopped = run(model, examples, store)[0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"].split() == free[: free.index(free[2])]


def test_repeats_of_a_random_policy_differ_and_come_again(model, examples, store):
    decoding = SPEC["decoding"] | {"repeats": 4}
    rows = run(model, examples, store, decoding=decoding)
    assert [(r["example_id"], r["repeat"]) for r in rows[:5]] == [("e0", 0), ("e0", 1), ("e0", 2), ("e0", 3), ("e1", 0)]
    texts = [r["text"] for r in rows]
    assert len(set(texts[:4])) > 1
    assert texts == [r["text"] for r in run(model, examples, store, decoding=decoding)]
    other = run(model, examples, store, decoding=decoding | {"seed": 1})
    assert texts != [r["text"] for r in other]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory\ndetails"), MemoryError()])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_out_of_memory_is_the_failure_of_that_example_alone(model, examples, store, monkeypatch, error, batch):
    """Check that a batch with such an example is halved until the example is alone."""
    whole = cell.finish
    too_large = examples[1]["context_ids"]

    def finish(engine, states, setting, answers):
        if any(state.length == len(too_large) + 5 for state in states):
            raise error
        return whole(engine, states, setting, answers)

    too_large.append(5)
    expected = [row["text"] for row in run(model, examples, store, budget="t15")]
    monkeypatch.setattr(cell, "finish", finish)
    rows = run(model, examples, store, budget="t15", decoding=SPEC["decoding"] | {"batch": batch})
    assert [bool(r.get("error")) for r in rows] == [False, True, False]
    assert rows[1]["error"].startswith("OOM: ")
    assert "\n" not in rows[1]["error"]
    assert [rows[0]["text"], rows[2]["text"]] == [expected[0], expected[2]]
    assert rows_to_table(rows, CELLS)["text"].to_pylist()[1] is None


def test_a_bug_is_not_a_failure(model, examples, store, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(cell, "finish", broken)
    with pytest.raises(KeyError):
        run(model, examples, store)


def test_a_batch_gives_the_rows_of_one_by_one(model, examples, store):
    decoding = SPEC["decoding"] | {"repeats": 2}
    alone = run(model, examples, store, decoding=decoding)
    together = run(model, examples, store, decoding=decoding | {"batch": 4})
    assert [r["batch_size"] for r in together] == [4, 4, 4, 4, 2, 2]
    for name in ("example_id", "repeat", "text", "kept_final", "kept_mean", "cache_bytes", "full_bytes"):
        assert [r[name] for r in together] == [r[name] for r in alone], name


@given(
    sizes=st.lists(st.tuples(st.integers(20, 60), st.integers(1, 9)), min_size=1, max_size=12),
    size=st.integers(1, 5),
    kind=st.sampled_from(["h2o", "knorm", "full", "quantized"]),
    mode=st.sampled_from(["before_question", "after_prompt"]),
    budget=st.sampled_from(["r0.3", "t16"]),
    ragged=st.booleans(),
)
def test_what_is_decoded_together_fits_together(sizes, size, kind, mode, budget, ragged):
    """Check that each answer is in one batch, and that padding is used only if policy and device permit it."""
    units = [({"context_ids": [0] * c, "question_ids": [0] * q}, i) for i, (c, q) in enumerate(sizes)]
    policy = create(kind, hyper_parameters(kind))
    setting = Setting(policy, Budget.parse("r1" if kind in ("full", "quantized") else budget), mode)
    made = list(cell.batches(units, size, setting, ragged=ragged))
    assert sorted(number for batch in made for _, number in batch) == list(range(len(sizes)))
    assert all(1 <= len(batch) <= size for batch in made)
    for batch in made:
        held = set()
        for example, _ in batch:
            c, q = len(example["context_ids"]), len(example["question_ids"])
            n = c if mode == "before_question" else c + q
            k = n if kind in ("full", "quantized") else setting.budget.kept(n)
            held.add(k + (q if mode == "before_question" and kind != "h2o" else 0))
        assert len(held) == 1 or (ragged and kind not in ("h2o", "quantized"))
