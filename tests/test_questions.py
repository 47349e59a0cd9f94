"""Test several questions about one context: read once, compressed once, with the answers of separate questions."""

from __future__ import annotations

import json
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from data_helpers import example, word_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from models import engine, tokens
from safetensors.torch import load_file
from serving import words

from kv_transition.cache.store import PrefillStore
from kv_transition.data.binning import choose
from kv_transition.data.download import download, normalize
from kv_transition.data.jsonl import load
from kv_transition.data.prepare import prepare
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.policies.catalog import hyper_parameters, kinds
from kv_transition.run import job, prefill
from kv_transition.studies.grid import run as cell
from kv_transition.studies.recall import run as observe
from kv_transition.tables import cluster_of

DECODING = {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0}
KV = ("keys", "values")
MEASURED = {"load_s", "prefill_s", "compress_s", "ttft_s", "decode_s", "latency_s", "peak_mem_mb", "batch_size"}


@pytest.fixture
def model(monkeypatch):
    ready = engine("qwen2")
    monkeypatch.setattr(ready, "tokenizer", words())
    return ready


@pytest.fixture
def fed(model, monkeypatch):
    """Return the list of the number of tokens of each reading."""
    found, extend = [], model.extend

    def counted(state, ids, *more, **named):
        found.append(len(ids))
        return extend(state, ids, *more, **named)

    monkeypatch.setattr(model, "extend", counted)
    return found


def asked(context, number, n=5):
    return {
        "task": "t", "example_id": f"c{context}-{number}", "bin": 0, "prompt_sha256": f"sha{context}-{number}",
        "prompt_len": 50 + n, "context_ids": tokens(50, seed=context),
        "question_ids": tokens(n, seed=100 + 10 * context + number), "max_new_tokens": 4,
    }  # fmt: skip


# two contexts with three questions each of different lengths, in mixed order, and one context with a single question
EXAMPLES = [asked(0, 0), asked(1, 0, 7), asked(0, 1, 3), asked(2, 0), asked(1, 1), asked(0, 2, 6), asked(1, 2)]


def spec(kind, mode, **changes):
    budget = "r1" if kind in ("full", "quantized") else "r0.3"
    return {
        "mode": mode, "policy": kind, "kind": kind, "budget": budget, "first_token": "compressed",
        "hyper_parameters": hyper_parameters(kind) | ({"tau": 1.0} if kind == "entropy_recall" else {}),
        "decoding": DECODING,
    } | changes  # fmt: skip


def told(rows):
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


# -- the same rows


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize("kind", kinds())
def test_rows_are_those_of_questions_that_are_run_alone(model, tmp_path, kind, mode):
    never = PrefillStore(tmp_path, mode="never")
    together = cell.rows(model, EXAMPLES, spec(kind, mode), never)
    alone = [row for one in EXAMPLES for row in cell.rows(model, [one], spec(kind, mode), never)]
    assert told(together) == told(alone)


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_batches_of_questions_about_one_context(model, tmp_path, mode):
    never = PrefillStore(tmp_path, mode="never")
    one_by_one = cell.rows(model, EXAMPLES, spec("h2o", mode), never)
    together = cell.rows(model, EXAMPLES, spec("h2o", mode, decoding=DECODING | {"batch": 3}), never)
    assert [row["text"] for row in together] == [row["text"] for row in one_by_one]


# -- read once, compressed once


def test_a_context_is_read_once_in_a_cell(model, tmp_path, fed):
    cell.rows(model, EXAMPLES, spec("snapkv", "before_question"), PrefillStore(tmp_path, mode="never"))
    assert fed.count(50) == 3


def test_a_context_is_read_once_where_it_is_observed(model, tmp_path, fed):
    about = {
        "policies": {"h2o": {"kind": "h2o", "hyper_parameters": hyper_parameters("h2o")}}, "budgets": ["r0.3"],
        "granularities": ["global"], "memories": ["ideal"], "seed": 0, "max_tokens": "task", "entropy_gap_every": 0,
        "continuations": False, "reasoning": False,
    }  # fmt: skip
    examples = [one | {"meta": None, "context_sha256": f"{one['example_id'][:2]}..."} for one in EXAMPLES]
    found = list(observe.observed(model, examples, about, PrefillStore(tmp_path, mode="never")))
    assert sorted(example["example_id"] for example, _, _ in found) == sorted(one["example_id"] for one in EXAMPLES)
    assert fed.count(50) == 3
    tables = [observe.steps_table(*one) for one in found]
    assert len({name for table in tables for name in table["cluster"].to_pylist()}) == 3


def test_a_context_is_read_once_by_the_prefill_job(model, tmp_path, fed):
    store = PrefillStore(tmp_path / "model", mode="always")
    prefill.read(model, store, list(prefill.missing(store, EXAMPLES, frozenset())))
    assert fed.count(50) == 3
    cell.rows(model, EXAMPLES, spec("knorm", "before_question"), store)
    cell.rows(model, EXAMPLES, spec("knorm", "after_prompt"), store)
    assert fed.count(50) == 3
    assert list(prefill.missing(store, EXAMPLES, frozenset())) == []


def test_a_context_is_stored_once(model, tmp_path, monkeypatch, fed):
    """Check that keys and values of each context are stored once; a context with one question is stored with its
    question."""
    monkeypatch.setenv(job.STATISTICS_VARIABLE, "attn_sum")
    store, alone = (PrefillStore(tmp_path / name / "model", mode="always") for name in ("together", "alone"))
    prefill.read(model, store, list(prefill.missing(store, EXAMPLES, frozenset({"attn_sum"}))))
    files = sorted(store.root.glob("*.safetensors"))
    assert len(files) == 3
    entries = 3 * 50 + len(asked(2, 0)["question_ids"])
    config = model.model.config
    size = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    held = [tensor for file in files for name, tensor in load_file(file).items() if name.split(".")[-1] in KV]
    assert sum(tensor.nbytes for tensor in held) == entries * size

    # cells give the same answers from these files as from separately stored prompts
    fed.clear()
    for kind, mode in (("h2o", "before_question"), ("h2o", "after_prompt"), ("full", "after_prompt")):
        shared = cell.rows(model, EXAMPLES, spec(kind, mode), store)
        assert fed.count(50) == 0
        single = [row for one in EXAMPLES for row in cell.rows(model, [one], spec(kind, mode), alone)]
        assert told(shared) == told(single)
        fed.clear()
    assert len(list(alone.root.glob("*.safetensors"))) == len(EXAMPLES)
    assert sorted(store.root.glob("*.safetensors")) == files


@pytest.mark.parametrize(("kind", "times"), [("snapkv", 3), ("h2o", 3), ("random", 7)])
def test_a_context_is_compressed_once_unless_the_policy_draws(model, tmp_path, monkeypatch, kind, times):
    policy = type(cell.setting_of(spec(kind, "before_question")).policy)
    compressed, compress = [], policy.compress

    def counted(self, state, k, **named):
        if state.length == 50:  # number of tokens read: the context, without a question
            compressed.append(k)
        return compress(self, state, k, **named)

    monkeypatch.setattr(policy, "compress", counted)
    cell.rows(model, EXAMPLES, spec(kind, "before_question"), PrefillStore(tmp_path, mode="never"))
    assert compressed == [15] * times


def test_the_questions_of_a_context_are_in_a_row(model):
    setting = cell.setting_of(spec("snapkv", "before_question"))
    units = [(one, repeat) for one in EXAMPLES for repeat in range(2)]
    ordered = [unit for batch in cell.batches(units, 1, setting, ragged=False) for unit in batch]
    contexts = [one["example_id"][:2] for one, _ in ordered]
    assert sum(a != b for a, b in pairwise(contexts)) == 2
    assert sorted(map(str, ordered)) == sorted(map(str, units))


# -- from the file to the bins


def shared(i, questions=3, **fields):
    single = example(i)
    several = [{"question": f"w{q} ?", "answers": [f"w{q}"]} for q in range(questions)]
    return {"context": single["context"], "questions": several, **fields}


def rows_of(tmp_path, records):
    path = write_jsonl(tmp_path / "mine.jsonl", records)
    return normalize(load({"name": "jsonl", "path": str(path)}, "mine"), get_task("jsonl", "mine"))


def test_a_line_with_questions_is_as_many_examples(tmp_path):
    rows = rows_of(tmp_path, [shared(1, 2, id="c", meta={"from": "a"}), example(2)])
    assert [row["example_id"] for row in rows] == ["c-1", "c-2", "e2"]
    assert [row["question"] for row in rows] == ["w0 ?", "w1 ?", example(2)["question"]]
    assert [row["answers"] for row in rows[:2]] == [["w0"], ["w1"]]
    assert rows[0]["context"] == rows[1]["context"] == example(1)["context"]
    assert json.loads(rows[1]["meta"]) == {"from": "a", "context_id": "c", "number": 2}


def test_a_question_is_named_as_if_it_stood_alone(tmp_path):
    """Check the names, because seeds and with them sampled answers depend on them."""
    together = rows_of(tmp_path, [shared(1)])
    single = [{"context": example(1)["context"], **one} for one in shared(1)["questions"]]
    assert [row["example_id"] for row in together] == [row["example_id"] for row in rows_of(tmp_path, single)]
    named = shared(1, 2)
    named["questions"][1]["id"] = "mine"
    assert rows_of(tmp_path, [named])[1]["example_id"] == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "line 1: questions must be a list of objects"),
        ({"questions": ["w1 ?"]}, "line 1: questions must be a list of objects"),
        ({"questions": [{"question": "w1 ?"}]}, "line 1, question 1: the field 'answers' is missing"),
        ({"question": "w1 ?"}, "line 1: the line has 'question' and 'questions'"),
        ({"meta": 3}, "line 1: meta must be a JSON object"),
        ({"questions": [{"question": "w1 ?", "answers": ["a"], "meta": 3}]}, "line 1, question 1: meta must be"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, [shared(1) | changes])


def prepared_lines(tmp_path, records, n_per_bin, max_length=200):
    data = {"name": "jsonl", "path": str(write_jsonl(tmp_path / "mine.jsonl", records))}
    return prepared(tmp_path, data, "mine", n_per_bin, max_length)


def prepared(tmp_path, data, task, n_per_bin, max_length=200, n_bins=2):
    download({"dataset": data}, task, str(tmp_path / "source.parquet"))
    about = {
        "dataset": data, "modes": ["before_question"], "decoding": {"max_tokens": 8},
        "model": {"name": str(word_tokenizer(tmp_path / "model")), "revision": None, "max_length": max_length},
        "binning": {"n_bins": n_bins, "edges": None, "n_per_bin": n_per_bin, "strict": False, "seed": 0},
    }  # fmt: skip
    prepare(about, task, str(tmp_path / "source.parquet"), str(tmp_path / "out"))
    return [pq.read_table(tmp_path / f"out/bin{b}.parquet").to_pylist() for b in range(n_bins)]


def test_the_questions_of_a_line_stay_together(tmp_path):
    records = [shared(i, 3, context=" ".join(f"w{(i + j) % 50}" for j in range(20 + i)), id=f"c{i}") for i in range(12)]
    for one in records:  # one of the questions is longer than the largest difference of context lengths
        one["questions"][1]["question"] = " ".join(f"w{j}" for j in range(30)) + " ?"
    for rows in prepared_lines(tmp_path, records, n_per_bin=9):
        names = [row["example_id"].rpartition("-")[0] for row in rows]
        assert len(rows) == 9
        assert {names.count(name) for name in names} == {3}
        assert all(len({tuple(r["context_ids"]) for r in rows if r["example_id"].startswith(n)}) == 1 for n in names)


def test_a_truncated_context_is_still_one_document(tmp_path):
    """Check that a longer question shortens the context more, as in a run alone, and that the cluster is the same."""
    records = [shared(i, 2, context=" ".join(f"w{(i + j) % 50}" for j in range(100))) for i in range(4)]
    for one in records:
        one["questions"][0]["question"] = " ".join(f"w{j}" for j in range(9)) + " ?"
    rows = [row for rows in prepared_lines(tmp_path, records, n_per_bin=9, max_length=80) for row in rows]
    assert len({tuple(row["context_ids"]) for row in rows}) == 8
    assert len({row["context_sha256"] for row in rows}) == 4


@pytest.mark.parametrize("task", ["hotpotqa", "musique"])
def test_records_that_share_a_context_are_found_by_themselves(model, tmp_path, fed, task):
    """Check LongBench's own format, without declared groups: three contexts with two questions each, two with one."""
    contexts = [" ".join(f"w{(7 * c + j) % 50}" for j in range(40)) for c in range(5)]
    places = [0, 1, 2, 0, 3, 2, 1, 4]
    records = [
        {"_id": f"r{i}", "input": f"w{i} w{i + 1} ?", "context": contexts[c], "answers": ["w1"], "dataset": task}
        for i, c in enumerate(places)
    ]
    write_jsonl(tmp_path / f"data/{task}.jsonl", records)
    (rows,) = prepared(tmp_path, {"name": "longbench", "path": str(tmp_path / "data")}, task, 8, n_bins=1)
    clusters = {row["example_id"]: cluster_of(row) for row in rows}
    assert len(set(clusters.values())) == 5
    assert all((clusters[f"r{i}"] == clusters[f"r{j}"]) == (places[i] == places[j]) for i in range(8) for j in range(8))
    read = len(rows[0]["context_ids"])
    assert {len(row["context_ids"]) for row in rows} == {read}
    cell.rows(model, rows, spec("snapkv", "before_question"), PrefillStore(tmp_path, mode="never"))
    assert fed.count(read) == 5


@given(
    groups=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    n=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_at_most_one_context_is_cut_by_the_choice(groups, n, seed):
    names = [f"c{g}" for g, size in enumerate(groups) for _ in range(size)]
    ids = [f"e{i}" for i in range(len(names))]
    kinds_ = [""] * len(ids)
    chosen = choose(ids, kinds_, n, seed, names)
    assert choose(ids, kinds_, n + 1, seed, names)[:n] == chosen  # the choices are nested
    partly = [name for name in set(names) if 0 < sum(names[i] == name for i in chosen) < names.count(name)]
    assert len(partly) <= 1
    assert choose(ids, kinds_, n, seed, ids) == choose(ids, kinds_, n, seed)
