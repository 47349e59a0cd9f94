"""Test RULER's other tasks: documents contain their answers, at the requested length, for all haystacks."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import pytest

from kv_transition.data import ruler, ruler_more
from kv_transition.data.download import normalize
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.eval.metrics import score_answer

TASKS = tuple(ruler_more.DRAW)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def measure(text: str) -> int:
    """Count the tokens of a tokenizer with one token per word or mark, plus 20 for the rest of the prompt."""
    return 20 + len(re.findall(r"\w+|[^\w\s]", text))


def records(task: str, lengths=(400, 1500), n: int = 12, **dataset) -> list[dict]:
    found = ruler.load({"lengths": list(lengths), "n_per_length": n, "seed": 3, **dataset}, task)
    return [record for _, record in found]


def document(task: str, record: dict) -> str:
    return ruler.write(task, record["example_id"], record["context"], record["meta"]["length"], measure)


@pytest.mark.parametrize("task", TASKS)
def test_documents_have_the_length_asked_and_hold_the_answers(task):
    for record in records(task):
        text = document(task, record)
        # needles have equal lengths, and a document contains whole needles only
        missing = {"niah_needles": 9, "niah_uuid_needles": 30}.get(task, 1)
        assert 0 <= record["meta"]["length"] - measure(text) < missing
        assert all(answer in text for answer in record["answers"])
        assert score_answer(get_task("ruler", task).metric, text, record["answers"]) == 1
        assert text == document(task, record)


@pytest.mark.parametrize("task", ["niah_repeat", "niah_uuid", "niah_needles", "niah_uuid_needles", "niah_multiquery"])
def test_each_asked_key_has_one_code(task):
    for record in records(task):
        text = document(task, record)
        stated = re.findall(r"The locker code of ([\w-]+) is ([\w-]+)\.", text)
        codes = dict(stated)
        assert len(codes) == len(stated)
        asked = re.findall(rf"{UUID}|[bdklmnprstvz][aeiou](?:[bdklmnprstvz][aeiou]){{2}}", record["question"])
        assert [codes[key] for key in asked] == record["answers"]
        assert len(asked) == (4 if task == "niah_multiquery" else 1)
        assert all(re.fullmatch(UUID if "uuid" in task else r"\d{7}", code) for code in record["answers"])
        assert all(re.fullmatch(UUID, key) for key in asked) == (task == "niah_uuid_needles")


def test_the_haystacks_are_what_they_are_called():
    for record in records("niah_repeat"):
        sentences = Counter(re.findall(r"[^. ][^.]*\.", document("niah_repeat", record)))
        assert len(sentences) <= 6  # five noise sentences, and the needle
    for task in ("niah_needles", "niah_uuid_needles"):
        for record in records(task):
            rest = re.sub(r"The locker code of [\w-]+ is [\w-]+\. ?", "", document(task, record))
            assert rest == ""


def test_needles_lie_evenly_over_the_document():
    depths = sorted(d for r in records("niah_needles", (400,), 40) for d in r["meta"]["depths"])
    assert depths[0] < 0.08
    assert depths[-1] > 0.92
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.08


@pytest.mark.parametrize("length", [120, 130, 150, 200, 333, 700, 3000])
def test_the_frequent_words_are_the_three_most_frequent_at_any_length(length):
    for record in records("frequent_words", (length,), 15):
        counts = Counter(document("frequent_words", record).split())
        least = min(counts[word] for word in record["answers"])
        assert len(record["answers"]) == 3
        assert all(n < least for word, n in counts.items() if word not in record["answers"])


NAMES = ["ox", "cow", "hen", "pig", "cat"]


def paragraph(i: int, name: str) -> dict:
    answers = [{"text": str(i)}, {"text": str(i)}, {"text": f"no {i}"}]
    asked = {"question": f"What is the {name}?", "answers": answers}
    impossible = {"question": "What is not there?", "is_impossible": True, "answers": []}
    return {"context": f"Passage {i} says that\n the {name} is\t{i}.", "qas": [asked, impossible]}


SQUAD = {"data": [{"paragraphs": [paragraph(i, name) for i, name in enumerate(NAMES)]}]}
HOTPOT = [
    {"question": f"Which {i}?", "answer": f"a{i}",
     "context": [[f"Title {i}", [f"First of {i}. ", "Second."]], [f"Other {i}", ["Else."]]]}
    for i in range(4)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    return tmp_path


def test_questions_of_squad_stand_with_their_passage_among_others(folder):
    found = records("qa_squad", (80, 300), 5, path=str(folder))
    assert len({record["question"] for record in found}) == 5
    for record in found:
        number = record["answers"][0]
        assert record["answers"] == [number, f"no {number}"]
        text = document("qa_squad", record)
        assert f"Document: Passage {number} says that the" in text
        assert record["meta"]["length"] - 15 <= measure(text) <= record["meta"]["length"]
        if record["meta"]["length"] == 300:  # all documents fit, and noise sentences fill the rest
            assert text.count("Document: ") == 5
    assert len(normalize(((r["example_id"], r) for r in found), get_task("ruler", "qa_squad"))) == 10


def test_questions_of_hotpotqa_stand_with_all_their_paragraphs(folder):
    for record in records("qa_hotpot", (200,), 4, path=str(folder)):
        text, number = document("qa_hotpot", record), record["answers"][0][1]
        assert f"Document: Title {number} First of {number}. Second." in text
        assert f"Document: Other {number} Else." in text
        assert score_answer("string_match_part", f"It is A{number}", record["answers"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": None}, r"qa_squad needs the file squad\.json"),
        ({"path": "none"}, "no file none"),
        ({"n_per_length": 9}, "has 5 questions"),
    ],
)
def test_questions_that_are_not_there_are_refused(folder, change, words):
    dataset = {"lengths": [200], "n_per_length": 2, "path": str(folder)} | change
    with pytest.raises(UserError, match=words):
        list(ruler.load(dataset, "qa_squad"))


def test_a_file_of_another_form_is_refused(folder):
    (folder / "squad.json").write_text("[1]")
    ruler_more._read.cache_clear()
    with pytest.raises(UserError, match=r"not of the form of squad\.json"):
        records("qa_squad", path=str(folder))


def test_all_thirteen_tasks_of_ruler_are_here():
    """Check niah_single_1 to 3, niah_multikey_1 to 3, multivalue, multiquery, vt, cwe, fwe, qa_1, qa_2."""
    ours = ["niah_repeat", "niah_single", "niah_uuid", "niah_multikey", "niah_needles", "niah_uuid_needles"]
    ours += ["niah_multivalue", "niah_multiquery", "variable_tracking", "common_words", "frequent_words"]
    ours += ["qa_squad", "qa_hotpot"]
    metrics = {task: get_task("ruler", task).metric for task in ours}
    assert len(metrics) == 13
    assert {task for task, metric in metrics.items() if metric == "string_match_part"} == {"qa_squad", "qa_hotpot"}
    assert set(metrics.values()) == {"string_match_all", "string_match_part"}
