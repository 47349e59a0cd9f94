"""Test the ruler tasks: prompts of exactly the requested length that have a unique answer."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kv_transition import settings, specs
from kv_transition.data import prepare as job
from kv_transition.data import ruler
from kv_transition.data.download import download
from kv_transition.data.prompts import PromptBuilder, Template
from kv_transition.data.tasks import get_task
from kv_transition.data.tokens import load_tokenizer as load_anew
from kv_transition.errors import UserError
from kv_transition.eval.metrics import score_answer
from kv_transition.studies.grid import specs as grid_specs

ROOT = Path(__file__).parents[1]
TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "common_words")
MORE = ("niah_repeat", "niah_needles", "niah_uuid", "niah_uuid_needles", "niah_multiquery", "frequent_words")
MORE += ("qa_squad", "qa_hotpot")  # see test_ruler_more.py
TOKENIZERS = {"qwen2.5": "tokenizers/qwen2.5", "mistral": "tokenizers/mistral", "stories260K": "stories260K-hf"}
LENGTHS = [600, 1024, 2500]
load_tokenizer = cache(load_anew)
SEGMENTS = re.compile(r"(?s).*?\n\n(?P<document>.*?)\n\nQuestion: (?P<question>.*?)\n")


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_tokenizer", load_tokenizer)
        yield


@pytest.fixture(scope="module", params=["tiny-reader", *TOKENIZERS])
def model(request):
    """Return the folder of a model or of its tokenizer."""
    if request.param == "tiny-reader":
        return str(ROOT / "resources/tiny-reader")
    return str(request.getfixturevalue("kvt_data") / TOKENIZERS[request.param])


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def examples(model, task, tmp_path_factory):
    """Return four examples of each length, prepared for one model: the rows of the bins, and the documents."""
    return prepared(tmp_path_factory.mktemp(task), model, task)


def prepared(folder: Path, model: str, task: str, lengths=LENGTHS, n=4, chat="never", max_length=100_000):
    """Run both jobs; return the rows of the bins, and the documents by example."""
    dataset = {"name": "ruler", "lengths": lengths, "n_per_length": n, "seed": 5}
    spec = {
        "dataset": dataset,
        "model": {"name": model, "revision": None, "max_length": max_length, "chat_template": chat},
        "binning": {"n_bins": len(lengths), "edges": None, "n_per_bin": n, "strict": True, "seed": 0},
        "decoding": {"max_tokens": "task"},
        "modes": ["before_question", "after_prompt"],
    }
    download({"dataset": dataset}, task, str(folder / "source.parquet"))
    job.prepare(spec, task, str(folder / "source.parquet"), str(folder))
    rows = [row for b in range(len(lengths)) for row in pq.read_table(folder / f"bin{b}.parquet").to_pylist()]
    documents = {e["example_id"]: e["context"] for e in pq.read_table(folder / "examples.parquet").to_pylist()}
    return [row | {"meta": json.loads(row["meta"])} for row in rows], documents


def records(task: str, lengths=(600,), n=20, seed=5) -> list[dict]:
    dataset = {"lengths": list(lengths), "n_per_length": n, "seed": seed}
    return [record for _, record in ruler.load(dataset, task)]


def solve(task: str, prompt: str) -> set[str]:
    """Return the answers found in the text of a prompt alone."""
    document, question = SEGMENTS.match(prompt).groups()
    if task == "common_words":
        (number,) = re.findall(r"Which (\w+) words", question)
        return {word for word, _ in Counter(document.split()).most_common({"five": 5}[number])}
    if task == "variable_tracking":
        (wanted,) = re.findall(r"the value (\d+)\?", question)
        value: dict[str, str] = {}
        for name, source in re.findall(r"Variable (\w+) is set to (?:variable )?(\w+)\.", document):
            value[name] = value.get(source, source)
        return {name for name in value if value[name] == wanted}
    (name,) = re.findall(r"locker codes? of (\w+)\?", question)
    return set(re.findall(rf"locker code of {name} is (\d+)\.", document))


def is_needle(sentence: str) -> bool:
    return re.search(r"locker code|Variable", sentence) is not None


# ------------------------------------------------------------------------------------------ documents


def test_prompts_have_exactly_the_length_and_can_be_solved_by_reading(model, task, examples):
    rows, documents = examples
    tokenizer = load_tokenizer(model)
    assert Counter(row["meta"]["length"] for row in rows) == dict.fromkeys(LENGTHS, 4)
    for row in rows:
        length, document = row["meta"]["length"], documents[row["example_id"]]
        assert row["token_len"] == row["prompt_len"] == length
        assert len(row["context_ids"]) + len(row["question_ids"]) == length
        # counted again from the texts; a token such as <bos> is added once at the start
        n_context = len(tokenizer(row["context_text"]).input_ids)
        assert n_context + len(tokenizer(row["question_text"], add_special_tokens=False).input_ids) == length
        # the boundary is directly after the document
        assert row["context_text"].endswith("\n\n" + document)
        assert row["question_text"].startswith("\n\nQuestion: " + row["question"])
        assert solve(task, row["context_text"] + row["question_text"]) == set(row["answers"])
        # only the document contains the answer
        for answer in row["answers"]:
            assert answer not in row["question_text"]
            assert answer not in row["context_text"].removesuffix(document)


@pytest.mark.parametrize("task", TASKS[:4], indirect=True, scope="module")
def test_needles_stand_once_at_their_depths(task, examples):
    rows, documents = examples
    for row in rows:
        sentences = re.findall(r"\S[^.]*\.", documents[row["example_id"]])
        needles = [i for i, sentence in enumerate(sentences) if is_needle(sentence)]
        n_filler = len(sentences) - len(needles)
        if task == "variable_tracking":
            asked = [i for i in needles if re.findall(r"Variable (\w+) is", sentences[i])[0] in row["answers"]]
            solved = [name for i in asked for name in re.findall(r"Variable (\w+) is", sentences[i])]
        else:
            (name,) = re.findall(r"of (\w+)\?", row["question"])
            asked = [i for i in needles if f"of {name} is" in sentences[i]]
            solved = [code for i in asked for code in re.findall(r"\d+", sentences[i])]
        assert sorted(solved) == sorted(row["answers"])
        for needle, depth in zip(asked, row["meta"]["depths"], strict=True):
            before = sum(not is_needle(sentence) for sentence in sentences[:needle])
            assert before == math.floor(depth * (n_filler + 1))
        if task.startswith("niah"):
            assert all(documents[row["example_id"]].count(answer) == 1 for answer in row["answers"])
            n = {"niah_single": 1, "niah_multikey": ruler.N_KEYS, "niah_multivalue": ruler.N_VALUES}[task]
            assert len(needles) == n


@pytest.mark.parametrize("length", [800, 3000])
def test_common_words_are_far_more_frequent_than_all_others(length):
    for record in records("common_words"):
        words = ruler.write("common_words", "e", record["context"], length, lambda text: len(text.split())).split()
        counts = Counter(words)
        assert {counts.pop(answer) for answer in record["answers"]} == {ruler.COMMON_TIMES}
        assert max(counts.values()) <= ruler.RARE_TIMES
        # each third of the list has its share of the 60 words, within 4.5 standard deviations
        thirds = [sum(word in record["answers"] for word in words[i * length // 3 :][: length // 3]) for i in range(3)]
        assert all(abs(n - 20) < 4.5 * math.sqrt(60 * 1 / 3 * 2 / 3) for n in thirds)


def test_a_chain_cannot_be_told_by_listing_all_variables():
    """Check that the document has as many variables outside the chain as in it."""
    for record in records("variable_tracking"):
        names = re.findall(r"Variable (\w+) is", record["context"])
        assert len(names) == 2 * len(record["answers"]) == 10
        assert set(record["answers"]) < set(names)
        # a variable is set before another variable copies it
        for i, (name, source) in enumerate(re.findall(r"Variable (\w+) is set to variable (\w+)", record["context"])):
            assert name != source, i
            assert record["context"].index(f"Variable {source} is") < record["context"].index(f"Variable {name} is")


def test_a_chat_template_comes_on_top(tmp_path, kvt_data):
    folder = kvt_data / TOKENIZERS["qwen2.5"]
    tokenizer = load_tokenizer(str(folder))
    rows, documents = prepared(tmp_path, str(folder), "niah_multikey", chat="auto")
    template = Template.parse(get_task("ruler", "niah_multikey").template, "t")
    for row in rows:
        assert row["context_text"].startswith("<|im_start|>")
        plain = template.fill(documents[row["example_id"]], row["question"])
        for segment, text in zip(("context_text", "question_text"), plain, strict=True):
            assert text in row[segment]
        n = sum(len(tokenizer(text).input_ids) for text in plain)  # without special tokens
        assert n == row["meta"]["length"] < row["token_len"]


def test_a_prompt_of_max_length_is_not_cut(tmp_path, model):
    rows, _ = prepared(tmp_path, model, "niah_single", lengths=[700, 1000], max_length=1000)
    assert {row["prompt_len"] for row in rows} == {700, 1000}
    with pytest.raises(UserError, match=r"model.max_length: 999 .* at least 1000"):
        prepared(tmp_path, model, "niah_single", lengths=[700, 1000], max_length=999)


@given(length=st.integers(0, 4000), seed=st.integers(0, 10**6), price=st.sampled_from([1, 2, 7]))
@hypothesis_settings(max_examples=30, deadline=None)
def test_whatever_a_token_is_prompts_come_as_near_as_filler_can(task, length, seed, price):
    """Check that the remaining length is less than the smallest unit of filler, for tokens that are words or
    characters.

    A word counts ``price`` tokens.
    """
    (record,) = records(task, n=1, seed=seed)
    plan = record["context"]

    def write(wanted, measure):
        return ruler.write(task, "e", plan, wanted, measure)

    def words(text):
        return price * len(text.split())

    if length < words(" ".join(line.split("\t")[1] for line in plan.splitlines())):
        with pytest.raises(UserError, match=rf"dataset.lengths: {length} .*{task}"):
            write(length, words)
        return
    left = length - words(write(length, words))
    assert left >= 0
    shortest = 1 if task == "common_words" else 4
    assert left < price * shortest
    # after some sentences only a remainder is left that no number of words can fill
    if length > words(plan) + 200 * price:
        assert left == length % price
    n_characters = 10 * length + len(plan) + 1000
    left = n_characters - len(write(n_characters, len))
    # generated words have six letters, so a list of them grows by seven characters
    assert 0 <= left < 7 if task == "common_words" else left == 0


def test_tokens_that_merge_across_sentences_are_made_up_for():
    """Check a token count that is not the sum of its parts: every second sentence end merges with the next text."""

    def measure(text):
        return len(text) - 3 * (text.count(". ") // 2)

    for record in records("niah_multikey", n=10):
        document = ruler.write("niah_multikey", record["example_id"], record["context"], 3001, measure)
        assert measure(document) == 3001


# ------------------------------------------------------------------------------------------- examples


def test_examples_are_a_function_of_seed_length_and_number(task):
    both = records(task, (600, 800), 6)
    assert both == records(task, (600, 800), 6)
    assert records(task, (800,), 4) == both[6:10]
    others = records(task, (600, 800), 6, seed=6)
    for field in ("example_id", "context"):
        assert len({record[field] for record in both + others}) == 24
    assert not {a for r in both for a in r["answers"]} & {a for r in others for a in r["answers"]}


def test_documents_are_a_function_of_the_example():
    record, other = records("niah_single", n=2)

    def write(record, length=2000):
        return ruler.write("niah_single", record["example_id"], record["context"], length, len)

    assert write(record) == write(record)
    assert not set(write(record).split(". ")[:-8]) <= set(write(other).split(". "))


@given(seed=st.integers(0, 2**31 - 1), n=st.integers(5, 60))
@hypothesis_settings(max_examples=30, deadline=None)
def test_needles_cover_the_document_evenly_however_many_there_are(seed, n):
    depths = sorted(record["meta"]["depths"][0] for record in records("niah_single", n=n, seed=seed))
    assert all(0 <= depth < 1 for depth in depths)
    gaps = [b - a for a, b in zip(depths, [*depths[1:], depths[0] + 1], strict=True)]
    # in most cases a random draw of 20 leaves a gap of three times the mean
    assert max(gaps) < 2.7 / n


def test_questions_do_not_give_the_answer_away(task):
    wording = get_task("ruler", task).template
    for record in records(task):
        assert record["question"].strip()
        for answer in record["answers"]:
            assert answer not in record["question"]
            assert answer not in wording


def test_filler_and_sentences_hold_no_invented_words():
    phrases = [*ruler._TIMES, *ruler._PEOPLE, *ruler._DEEDS, *ruler._PLACES, *ruler._CIRCUMSTANCES]
    filler = " ".join(phrases)
    assert not re.search(r"(?i)locker|code|variable|[\d.]", filler)
    invented = re.compile(r"\b(?:[bdklmnprstvz][aeiou]){3}\b")
    assert not invented.findall(filler)
    for record in records("niah_multikey"):
        names = re.findall(r"code of (\w+) is", record["context"])
        assert invented.findall(record["context"]) == names
        assert len(set(names)) == ruler.N_KEYS


# ------------------------------------------------------------------------------- configuration, scores


def config(**dataset):
    return {
        "dataset": {"name": "ruler", "tasks": list(TASKS), "lengths": [600], "n_per_length": 3, **dataset},
        "kv": {"budgets": [0.5]},
    }


def test_a_complete_configuration_passes():
    specs.check(settings.parse(config()))


@pytest.mark.parametrize("key", ["lengths", "n_per_length"])
def test_lengths_and_numbers_are_required(key):
    with pytest.raises(UserError, match=r"dataset.lengths: ruler needs"):
        settings.parse(config(**{key: None}))
    with pytest.raises(UserError, match=rf"dataset.{key}: the ruler data set needs this key"):
        list(ruler.load({"lengths": [600], "n_per_length": 3, key: None}, "niah_single"))


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(UserError, match="niah_single, niah_multikey"):
        specs.check(settings.parse(config(tasks=["reader_qa"])))
    with pytest.raises(UserError, match=r"dataset.split: .*'train'"):
        list(ruler.load({"lengths": [600], "n_per_length": 3, "split": "train"}, "niah_single"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"lengths": [601]}, {"n_per_length": 4}])
def test_both_jobs_are_told_what_their_examples_depend_on(change):
    before, after = settings.parse(config()), settings.parse(config(**change))
    assert grid_specs.download(before) != grid_specs.download(after)
    assert grid_specs.prepare(before) != grid_specs.prepare(after)


@pytest.mark.parametrize("name", ["snapkv_longbench", "ruler_smoke"])
def test_the_experiment_files_pass_the_check(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    specs.check(settings.load(f"config/experiments/{name}.yaml"))


def test_every_task_is_named_in_the_documentation():
    line = re.search(r"Tasks of ruler: (.*?)\.", (ROOT / "config/README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", line[1].split(". The")[0])) == (*TASKS, *MORE)


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("The code is 1234567.", ["1234567"], 1.0),
        ("1234568", ["1234567"], 0.0),
        ("1, 2 and 3", ["1", "2", "3", "4"], 0.75),
        ("TOBARI, nodiku", ["tobari", "nodiku", "kelamu"], 2 / 3),
        ("", ["tobari"], 0.0),
        ("tobari", [], 0.0),
    ],
)
def test_the_score_is_the_share_of_the_answers_that_are_named(text, answers, score):
    assert {get_task("ruler", task).metric for task in TASKS} == {"string_match_all"}
    assert score_answer("string_match_all", text, answers) == pytest.approx(score)


def test_the_prompt_is_measured_as_it_is_fed(tmp_path):
    build = PromptBuilder(
        load_tokenizer(str(ROOT / "resources/tiny-reader")), Template.parse("a {context} b {input}", "t"), 10_000, False
    )
    assert build.plain_len("Passage 1 : x", "who ?") == build("Passage 1 : x", "who ?").token_len
