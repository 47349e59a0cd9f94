"""Test that files of benchmarks are read as examples, and that an error names the position of a damaged record."""

from __future__ import annotations

import gzip
import json

import pytest

from kv_transition.data.benchmarks import load
from kv_transition.data.download import normalize
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.eval.metrics import score_answer

V2 = {"_id": "v", "question": "Who?", "context": "A long text.", "answer": "C", "domain": "x",
      "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d"}  # fmt: skip
IFEVAL = {"key": 7, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma", "language:response_language"],
          "kwargs": [{"num_words": None}, {"language": "de"}]}  # fmt: skip
CASES = {
    ("longbench_v2", "longbench_v2"): (V2, "The correct answer is (C)", "The correct answer is (A)"),
    ("infinitebench", "passkey"): (
        {"id": 1, "context": "x 71432 y", "input": "Key?", "answer": ["71432"]}, "71432", "714"),
    ("infinitebench", "number_string"): ({"id": 1, "context": "x", "input": "Key?", "answer": "999"}, "999", "99"),
    ("infinitebench", "kv_retrieval"): ({"id": 1, "context": "{}", "input": "k?", "answer": "v-1"}, '"v-1"', "v"),
    ("math", "gsm8k"): ({"question": "1 + 1?", "answer": "1 and 1\n#### 1,002"}, "so\n#### 1002", "#### 3"),
    ("math", "math_500"): (
        {"unique_id": "m", "problem": "p", "answer": "\\frac{1}{2}", "level": 3}, "\\boxed{0.5}", "2"),
    ("ifeval", "ifeval"): (IFEVAL, "Das ist ein kurzer Satz auf Deutsch.", "This, too, is a short sentence."),
}  # fmt: skip


def examples(tmp_path, data: str, task: str, *records, name: str | None = None) -> list[dict]:
    path = tmp_path / (name or f"{task}.jsonl")
    lines = "\n".join(json.dumps(record) for record in records)
    if path.suffix == ".json":
        path.write_text(json.dumps(list(records)))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return normalize(load({"name": data, "path": str(tmp_path)}, task), get_task(data, task))


@pytest.mark.parametrize(("data", "task"), CASES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_a_record_becomes_an_example_whose_answers_are_scored(tmp_path, data, task, suffix):
    record, right, wrong = CASES[data, task]
    (example,) = examples(tmp_path, data, task, record, name=f"{task}{suffix}")
    own = get_task(data, task)
    assert score_answer(own.metric, right, example["answers"]) == 1
    assert score_answer(own.metric, wrong, example["answers"]) == 0
    assert bool(example["question"]) == own.has_question


def test_the_choices_stand_in_the_question(tmp_path):
    (example,) = examples(tmp_path, "longbench_v2", "longbench_v2", V2, name="data.json")
    assert example["question"] == "Who?\n(A) a\n(B) b\n(C) c\n(D) d"
    assert example["example_id"] == "v"


def test_the_instructions_are_the_answers(tmp_path):
    (example,) = examples(tmp_path, "ifeval", "ifeval", IFEVAL)
    assert [json.loads(answer) for answer in example["answers"]] == [
        {"id": "punctuation:no_comma", "kwargs": {}},
        {"id": "language:response_language", "kwargs": {"language": "de"}},
    ]


@pytest.mark.parametrize(
    ("data", "task", "record", "words"),
    [
        ("longbench_v2", "longbench_v2", V2 | {"answer": "E"}, "answer must be one of A, B, C, D"),
        ("longbench_v2", "longbench_v2", {"question": "x"}, "'context' is missing"),
        ("math", "gsm8k", {"question": "x", "answer": "3"}, "must end with '#### '"),
        ("math", "math_500", {"problem": ["x"], "answer": "3"}, "problem must be a text"),
        ("ifeval", "ifeval", IFEVAL | {"kwargs": []}, "lists of the same length"),
        ("ifeval", "ifeval", IFEVAL | {"instruction_id_list": [], "kwargs": []}, "at least one instruction"),
    ],
)
def test_a_damaged_record_is_named_with_its_place(tmp_path, data, task, record, words):
    with pytest.raises(UserError, match=words) as error:
        examples(tmp_path, data, task, record)
    assert f"{task}.jsonl, line 1" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"passkey\.jsonl"):
        list(load({"name": "infinitebench", "path": str(tmp_path)}, "passkey"))
    (tmp_path / "passkey.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="a JSON array of objects"):
        list(load({"name": "infinitebench", "path": str(tmp_path)}, "passkey"))
