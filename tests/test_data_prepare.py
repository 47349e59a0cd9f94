"""Test the prepared data: bins, prompts and manifest of small data sets and of real LongBench records."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_helpers import KVT_DATA, example, needs_data, word_tokenizer, write_jsonl

from kv_transition import provenance, tables
from kv_transition.data import prepare as job
from kv_transition.data.download import download
from kv_transition.data.tasks import get_task
from kv_transition.data.tokens import load_tokenizer
from kv_transition.errors import UserError

TEMPLATE = "{context} | {input}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return {
        "name": str(word_tokenizer(tmp_path_factory.mktemp("model"))),
        "revision": None,
        "max_length": 1000,
        "chat_template": "auto",
    }


@pytest.fixture
def spec(tmp_path, model):
    """Return thirty jsonl examples with contexts of 10, 20 and 30 words and kinds a, a, b; the prompt adds 5 tokens."""
    records = [example(i, 10 * (1 + i % 3), meta={"kind": "aab"[i // 3 % 3]}) for i in range(30)]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"mine": TEMPLATE, "other": "x"}))
    return {
        "dataset": {
            "name": "jsonl",
            "revision": None,
            "path": str(write_jsonl(tmp_path / "mine.jsonl", records)),
            "split": "test",
            "prompts": str(prompts),
            "max_lengths": None,
        },
        "model": dict(model),
        "binning": {"n_bins": 3, "edges": None, "n_per_bin": 6, "strict": False, "seed": 0},
        "decoding": {"max_tokens": "task"},
        "modes": ["before_question", "after_prompt"],
        "code": "abc",
    }


def prepared(tmp_path, spec, task="mine", name="out"):
    """Run both jobs; return the manifest, the examples and the rows of the bins."""
    source, folder = tmp_path / name / "source.parquet", tmp_path / name
    download({"dataset": spec["dataset"]}, task, str(source))
    job.prepare(spec, task, str(source), str(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    examples = pq.read_table(folder / "examples.parquet").to_pylist()
    bins = [pq.read_table(folder / f"bin{b}.parquet").to_pylist() for b in range(len(manifest["bins"]))]
    return manifest, examples, bins


class TestFiles:
    def test_bins_and_prompts(self, tmp_path, spec):
        manifest, examples, bins = prepared(tmp_path, spec)
        assert len(examples) == 30
        # <bos>, the context, "|" and a question of three words
        assert all(e["token_len"] == e["prompt_len"] == len(e["context"].split()) + 5 for e in examples)
        assert manifest["edges"] == [15, 25, 35, 35]
        assert [[row["token_len"] for row in rows] for rows in bins] == [[15] * 6, [25] * 6, [35] * 6]
        contexts = {e["example_id"]: e["context"] for e in examples}
        for b, rows in enumerate(bins):
            for row in rows:
                assert row["bin"] == b
                assert row["context_text"] == contexts[row["example_id"]]
                assert row["question_text"] == f" | {row['question']}"
                assert (len(row["context_ids"]), len(row["question_ids"])) == (row["token_len"] - 4, 4)
                assert row["max_new_tokens"] == get_task("jsonl", "mine").max_new_tokens
        assert len({row["prompt_sha256"] for rows in bins for row in rows}) == 18

    def test_kinds_keep_their_shares(self, tmp_path, spec):
        _, _, bins = prepared(tmp_path, spec)
        # seven examples of kind a and three of kind b in each bin
        kinds = [Counter(json.loads(row["meta"])["kind"] for row in rows) for rows in bins]
        assert kinds == [{"a": 4, "b": 2}] * 3

    def test_the_manifest_says_how_it_came_about(self, tmp_path, spec):
        manifest, _, bins = prepared(tmp_path, spec)
        assert manifest["version"] == 1
        assert (manifest["task"], manifest["dataset"], manifest["split"]) == ("mine", "jsonl", "test")
        assert manifest["max_length"] == 1000
        assert manifest["chat_template"] is False
        prompts = spec["dataset"]["prompts"]
        with open(prompts, "rb") as file:
            assert manifest["template"] == {"source": prompts, "sha256": sha256(file.read()).hexdigest()}
        with open(spec["dataset"]["path"], "rb") as file:
            assert manifest["source_sha256"] == sha256(file.read()).hexdigest()
        for b, rows in zip(manifest["bins"], bins, strict=True):
            assert b["example_ids"] == [row["example_id"] for row in rows]
            assert (b["n"], b["available"], b["truncated"]) == (6, 10, 0)
            assert b["token_min"] == b["token_max"] == b["fed_min"] == b["fed_max"] == rows[0]["token_len"]
        assert manifest["warnings"] == []

    def test_schemas_and_metadata(self, tmp_path, spec):
        manifest, _, _ = prepared(tmp_path, spec)
        for name, schema in [("examples", tables.EXAMPLES), ("bin0", tables.BIN)]:
            path = tmp_path / "out" / f"{name}.parquet"
            assert pq.read_schema(path).remove_metadata() == schema
            meta = provenance.read_metadata(path)
            assert meta["model"] == spec["model"]["name"]
            assert meta["max_length"] == "1000"
            assert meta["tokenizer_sha256"] == manifest["tokenizer"]["sha256"]
            assert {"dataset", "revision", "split", "model_revision", "config_hash", "git_commit"} <= set(meta)

    def test_two_runs_are_equal_and_code_is_no_part_of_the_configs_hash(self, tmp_path, spec):
        """Check that two runs give equal data, and that the code hash does not change the configuration hash."""
        one = prepared(tmp_path, spec)
        two = prepared(tmp_path, {**spec, "code": "other"}, name="again")
        assert one == two
        hashes = {provenance.read_metadata(tmp_path / n / "bin0.parquet")["config_hash"] for n in ("out", "again")}
        assert len(hashes) == 1

    def test_more_examples_per_bin_extend_the_choice(self, tmp_path, spec):
        few, _, _ = prepared(tmp_path, spec)
        spec["binning"]["n_per_bin"] = 9
        many, _, _ = prepared(tmp_path, spec, name="more")
        for small, large in zip(few["bins"], many["bins"], strict=True):
            assert large["example_ids"][:6] == small["example_ids"]

    def test_equal_prompts_have_equal_hashes_whatever_the_experiment(self, tmp_path, spec):
        _, _, bins = prepared(tmp_path, spec)
        spec["binning"] |= {"n_bins": 2, "seed": 1, "n_per_bin": 30}
        _, _, other = prepared(tmp_path, spec, name="other")
        hashes = {row["example_id"]: row["prompt_sha256"] for rows in other for row in rows}
        assert all(hashes[row["example_id"]] == row["prompt_sha256"] for rows in bins for row in rows)


class TestWarnings:
    def test_too_few_examples_warn(self, tmp_path, spec):
        spec["binning"]["n_per_bin"] = 11
        manifest, _, bins = prepared(tmp_path, spec)
        assert manifest["warnings"][0] == "Bin 0, [15, 25) tokens, has 10 of 11 wanted examples."
        assert manifest["warnings"][2] == "Bin 2, [35, 35] tokens, has 10 of 11 wanted examples."
        assert [len(rows) for rows in bins] == [10, 10, 10]

    def test_and_stop_under_strict(self, tmp_path, spec):
        spec["binning"] |= {"n_per_bin": 11, "strict": True}
        with pytest.raises(UserError, match=r"binning\.n_per_bin: Bin 0, .* has 10 of 11 wanted"):
            prepared(tmp_path, spec)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["source.parquet"]

    def test_given_edges_leave_examples_out(self, tmp_path, spec):
        spec["binning"] |= {"edges": [20, 30, 32, 35]}
        manifest, examples, bins = prepared(tmp_path, spec)
        assert len(examples) == 30
        assert [len(rows) for rows in bins] == [6, 0, 6]
        assert manifest["bins"][1]["token_min"] is None
        assert "10 of 30 examples are not used" in manifest["warnings"][0]
        assert pq.read_schema(tmp_path / "out" / "bin1.parquet").remove_metadata() == tables.BIN

    def test_truncation_is_told(self, tmp_path, spec):
        spec["model"]["max_length"] = 20
        manifest, examples, bins = prepared(tmp_path, spec)
        assert manifest["warnings"] == ["20 of 30 prompts are longer than 20 tokens, so their middle was removed."]
        assert {(e["token_len"], e["prompt_len"]) for e in examples} == {(15, 15), (25, 20), (35, 20)}
        assert manifest["edges"] == [15, 25, 35, 35]
        assert {len(row["context_ids"]) for rows in bins for row in rows} == {11, 16}

    def test_a_cut_question_is_told(self, tmp_path, spec):
        spec["model"]["max_length"] = 6
        manifest, _, _ = prepared(tmp_path, spec)
        assert "In 30 of 30 prompts truncation to 6 tokens cut into the question segment" in manifest["warnings"][1]

    def test_a_model_that_is_not_pinned(self):
        assert "not pinned" in job._prompt_warnings({"name": "some/model", "revision": "main", "max_length": 1}, [])[0]
        assert not job._prompt_warnings({"name": "some/model", "revision": "0" * 40, "max_length": 1}, [])


class TestWording:
    def longbench(self, tmp_path, spec, with_files=True, task="hotpotqa"):
        record = {"input": "w1 ?", "context": "w2 w3", "answers": ["w1"], "_id": "x", "dataset": task}
        write_jsonl(tmp_path / "lb" / f"{task}.jsonl", [record])
        if with_files:
            (tmp_path / "lb/config").mkdir()
            (tmp_path / "lb/config/dataset2prompt.json").write_text(json.dumps({task: TEMPLATE}))
            (tmp_path / "lb/config/dataset2maxlen.json").write_text(json.dumps({task: 33}))
        spec["dataset"] |= {"name": "longbench", "path": str(tmp_path / "lb"), "prompts": None}
        spec["binning"] |= {"n_bins": 1, "n_per_bin": 1}
        return spec

    def test_the_benchmarks_files_beside_the_data_are_used(self, tmp_path, spec):
        manifest, _, bins = prepared(tmp_path, self.longbench(tmp_path, spec), "hotpotqa")
        assert bins[0][0]["question_text"] == " | w1 ?"
        assert bins[0][0]["max_new_tokens"] == manifest["max_new_tokens"]["value"] == 33
        content = (tmp_path / "lb/config/dataset2maxlen.json").read_bytes()
        assert manifest["max_new_tokens"]["sha256"] == sha256(content).hexdigest()
        assert manifest["template"]["source"].endswith("lb/config/dataset2prompt.json")
        assert manifest["warnings"] == []

    def test_without_them_our_own_wording_is_used_and_said_to_be(self, tmp_path, spec):
        """Check that without LongBench's files the project's own template is used, with a warning."""
        manifest, _, bins = prepared(tmp_path, self.longbench(tmp_path, spec, with_files=False), "hotpotqa")
        assert manifest["template"]["source"] == manifest["max_new_tokens"]["source"] == "own"
        assert [("dataset2prompt" in w, "dataset2maxlen" in w) for w in manifest["warnings"]] == [
            (True, False),
            (False, True),
        ]
        assert bins[0][0]["max_new_tokens"] == get_task("longbench", "hotpotqa").max_new_tokens

    def test_a_number_of_tokens_wins(self, tmp_path, spec):
        spec["decoding"]["max_tokens"] = 7
        manifest, _, bins = prepared(tmp_path, self.longbench(tmp_path, spec), "hotpotqa")
        assert bins[0][0]["max_new_tokens"] == 7
        assert manifest["max_new_tokens"]["source"] == "decoding.max_tokens"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"dataset\.prompts: there is no file"),
            ("{", "malformed JSON at line 1, character 2"),
            ("[]", "JSON object"),
            ('{"a": "{context} {input}", "b": "x"}', "no entry for 'mine'; it has a, b"),
            ('{"mine": 5}', "must be a text"),
            ('{"mine": "{context} only"}', r"must contain \{input\}"),
            ('{"mine": "{input} {context} x"}', "before any"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, spec, content, message):
        path = tmp_path / "given.json"
        if content is not None:
            path.write_text(content)
        spec["dataset"]["prompts"] = str(path)
        with pytest.raises(UserError, match=message) as error:
            prepared(tmp_path, spec)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("value", ["0", "-1", '"32"', "1.5", "true"])
    def test_bad_lengths_are_named(self, tmp_path, spec, value):
        path = tmp_path / "lengths.json"
        path.write_text(f'{{"mine": {value}}}')
        spec["dataset"]["max_lengths"] = str(path)
        with pytest.raises(UserError, match=r"dataset\.max_lengths: .*whole number of at least 1"):
            prepared(tmp_path, spec)

    def test_a_task_without_a_question_has_no_before_question(self, tmp_path, spec):
        with pytest.raises(UserError, match=r"kv\.modes: gov_report has no question"):
            prepared(tmp_path, self.longbench(tmp_path, spec, task="gov_report", with_files=False), "gov_report")

    @pytest.mark.parametrize(
        ("task", "setting", "used"), [("hotpotqa", "auto", True), ("hotpotqa", "never", False), ("trec", "auto", False)]
    )
    def test_chat_template(self, tmp_path, spec, task, setting, used):
        chat = "<bos>[user] {{ messages[0]['content'] }} [bot]"
        spec["model"] |= {"name": str(word_tokenizer(tmp_path / "chat", chat)), "chat_template": setting}
        manifest, _, bins = prepared(tmp_path, self.longbench(tmp_path, spec, task=task), task)
        assert manifest["chat_template"] is used
        assert ("[bot]" in bins[0][0]["question_text"]) is used


def test_as_a_job(tmp_path, spec, capsys):
    download({"dataset": spec["dataset"]}, "mine", str(tmp_path / "source.parquet"))
    args = ["--task", "mine", "--source", str(tmp_path / "source.parquet"), "--outdir", str(tmp_path / "out"), "--spec"]
    assert job.main([*args, json.dumps(spec)]) == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
    spec["model"]["name"] = str(tmp_path / "nowhere")
    assert job.main([*args, json.dumps(spec)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("model.name: no tokenizer of")
    assert err.count("\n") == 1


def test_synthetic_lengths_become_the_bins(tmp_path):
    lengths = [256, 512, 1024]
    spec = {
        "dataset": {"name": "synthetic", "path": None, "lengths": lengths, "n_per_length": 8, "seed": 0},
        "model": {
            "name": str(Path(__file__).parents[1] / "resources" / "tiny-reader"),
            "max_length": 2048,
            "chat_template": "auto",
        },
        "binning": {"n_bins": 3, "edges": None, "n_per_bin": 8, "strict": True, "seed": 0},
        "decoding": {"max_tokens": "task"},
        "modes": ["before_question", "after_prompt"],
    }
    manifest, _, bins = prepared(tmp_path, spec, "reader_qa")
    for length, rows in zip(lengths, bins, strict=True):
        assert [json.loads(row["meta"])["length"] for row in rows] == [length] * 8
        assert all(length - 20 <= row["token_len"] <= length for row in rows)
        kinds = Counter(json.loads(row["meta"])["kind"] for row in rows)
        assert kinds == {"one_hop": 4, "chain": 2, "unanswerable": 2}
        unknown = 3
        assert not any(unknown in row["context_ids"] + row["question_ids"] for row in rows)
    assert manifest["warnings"] == []
    assert manifest["max_new_tokens"]["value"] == 16


# the available records do not contain samsum
REAL = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa", "qmsum"),
    *("gov_report", "multi_news", "trec", "passage_count", "passage_retrieval_en", "lcc", "repobench_p"),
)


@needs_data
@pytest.mark.parametrize("task", [pytest.param(t, marks=[] if t == "hotpotqa" else pytest.mark.slow) for t in REAL])
def test_real_records_with_a_real_tokenizer(tmp_path, task):
    """Compare lengths, bins and manifests of 15 tasks up to 16k tokens with plain calls of the tokenizer."""
    name, limit = str(KVT_DATA / "tokenizers" / "qwen2.5"), 16384
    spec = {
        "dataset": {"name": "longbench", "revision": None, "path": str(KVT_DATA / "longbench"), "split": "test"},
        "model": {"name": name, "revision": None, "max_length": limit, "chat_template": "auto"},
        "binning": {"n_bins": 3, "edges": None, "n_per_bin": 2, "strict": True, "seed": 0},
        "decoding": {"max_tokens": "task"},
        "modes": ["after_prompt"],
    }
    manifest, examples, bins = prepared(tmp_path, spec, task)
    source_name = get_task("longbench", task).source_name
    config = KVT_DATA / "longbench" / "config"
    template = json.loads((config / "dataset2prompt.json").read_text(encoding="utf-8"))[source_name]
    assert manifest["max_new_tokens"]["value"] == json.loads((config / "dataset2maxlen.json").read_text())[source_name]
    assert manifest["chat_template"] == (task not in ("trec", "triviaqa", "lcc", "repobench_p"))
    assert sum(b["available"] for b in manifest["bins"]) == len(examples) == manifest["n_examples"]
    assert all(b["available"] > 0 for b in manifest["bins"])

    tokenizer = load_tokenizer(name)
    empty_chat = [{"role": "user", "content": ""}]
    wrapping = tokenizer.apply_chat_template(empty_chat, add_generation_prompt=True, return_dict=False)
    extra = len(wrapping) if manifest["chat_template"] else 0
    by_id = {row["example_id"]: row for row in examples}
    for row in (rows[0] for rows in bins):
        text = template.format(context=by_id[row["example_id"]]["context"], input=row["question"])
        n = len(tokenizer(text, verbose=False).input_ids)
        # segments are tokenized separately, which may change a few tokens at their boundaries
        assert abs(row["token_len"] - n - extra) <= 3
        assert abs(row["prompt_len"] - min(n, limit) - extra) <= 5
        assert row["prompt_len"] == len(row["context_ids"]) + len(row["question_ids"])
        fed = tokenizer.decode(row["context_ids"] + row["question_ids"])
        assert fed == row["context_text"] + row["question_text"]
        if n <= limit:
            assert text.strip() in fed
