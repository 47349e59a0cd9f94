"""Test conversations: all formats are read in one form, errors name the position, and tokens of turns add up."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from dialogues import FOLDING, LEAVES_THOUGHTS_OUT, MARKS_THE_LAST, REFUSES_THE_SYSTEM, SEPARATE, text, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from kv_transition.errors import UserError
from kv_transition.studies.chat import multiturn
from kv_transition.studies.chat.tables import CONVERSATIONS
from kv_transition.studies.chat.turns import render

DATA = os.environ.get("KVT_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="KVT_DATA names no folder with real files: real chats are skipped")


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content} | more


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# formats


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_the_own_form_in_every_kind_of_file(tmp_path, suffix):
    conversations = [
        {"id": "a", "turns": [user("one"), assistant("dropped"), user("two\u2028three"), assistant("dropped")]},
        {"id": 7, "turns": [{"role": "system", "content": "be brief"}, user("hello")], "meta": {"kind": "x"}},
    ]
    content = (
        "\n\n".join(json.dumps(c, ensure_ascii=False) for c in conversations)
        if "jsonl" in suffix
        else json.dumps(conversations, ensure_ascii=False, indent=1)
    ).encode()
    path = tmp_path / f"test{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    first, second = multiturn.read(str(path), "turns")
    assert (first["conversation_id"], first["system"], first["dropped_assistant"]) == ("a", None, 2)
    assert [turn["content"] for turn in first["turns"]] == ["one", "two\u2028three"]
    assert (second["conversation_id"], second["system"], second["meta"]) == ("7", "be brief", {"kind": "x"})


def test_checks_stand_at_the_turns_where_they_are_in_force(tmp_path):
    conversation = {
        "id": "a",
        "checks": [{"kind": "max_words", "value": 20, "id": "all"}],
        "turns": [
            user("one", checks=[{"kind": "contains", "value": "x", "id": "once", "until": 1}]),
            user("two", checks=[{"kind": "max_words", "value": 5, "id": "new", "overrides": "all"}]),
            user("three"),
        ],
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps([conversation]))
    (row,) = multiturn.read(str(path), "turns")
    assert [[check["id"] for check in turn["checks"]] for turn in row["turns"]] == [
        ["all", "once"],
        ["all", "new"],
        ["all", "new"],
    ]
    assert row["turns"][1]["checks"][1]["overrides"] == "all"
    assert row["turns"][1]["checks"][1]["since"] == 2


def test_what_is_the_same_conversation_has_the_same_name(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"turns": [user("one")]}, {"turns": [user("two")]}]))
    names = [row["conversation_id"] for row in multiturn.read(str(path), "turns")]
    path.write_text(json.dumps([{"turns": [user("two")]}, {"turns": [user("one")]}]))
    assert [row["conversation_id"] for row in multiturn.read(str(path), "turns")] == names[::-1]


GOOD = {"id": "a", "turns": [user("one"), assistant("x"), user("two")]}


@pytest.mark.parametrize(
    ("source", "records", "said"),
    [
        ("turns", {"id": "a"}, ["list of conversations"]),
        ("turns", [], ["contains no conversation"]),
        ("turns", ["a"], ["conversation 1", "JSON object"]),
        ("turns", [GOOD, {"id": "b"}], ["conversation 2", "'turns' is missing"]),
        ("turns", [GOOD, GOOD], ["conversation 2", "conversation a", "a different id"]),
        ("turns", [{"id": "a", "turns": []}], ["conversation a", "turns must be a list"]),
        ("turns", [{"id": True, "turns": [user("x")]}], ["conversation 1", "id must be a text"]),
        ("turns", [{"id": "a", "turns": [user("x"), {"role": "user"}]}], ["conversation a, turn 2", "'content'"]),
        ("turns", [{"id": "a", "turns": [{"role": "bot", "content": "x"}]}], ["conversation a, turn 1", "'bot'"]),
        ("turns", [{"id": "a", "turns": [user("x"), user(" \n")]}], ["conversation a, turn 2", "not blank"]),
        ("turns", [{"id": "a", "turns": [user(3)]}], ["conversation a, turn 1", "not blank"]),
        ("turns", [{"id": "a", "turns": [assistant("x")]}], ["conversation a", "there is no user message"]),
        (
            "turns",
            [{"id": "a", "turns": [user("x"), {"role": "system", "content": "y"}]}],
            ["conversation a, turn 2", "before the user's first turn"],
        ),
        (
            "turns",
            [{"id": "a", "turns": [user("x"), user("y", checks=[{"kind": "shape", "value": 1}])]}],
            ["conversation a, turn 2", "shape"],
        ),
        (
            "turns",
            [{"id": "a", "turns": [user("x")], "meta": []}, {"id": "b", "turns": 3}],
            ["conversation b", "turns"],
        ),
        ("mt_bench", [{"question_id": 1, "turns": "x"}], ["conversation 1", "turns must be a list"]),
        ("mt_bench", [{"question_id": 1, "turns": ["x", ""]}], ["conversation 1, turn 2", "not blank"]),
        ("mt_bench", [{"turns": ["x"]}], ["conversation 1", "'question_id' is missing"]),
        ("mt_eval", [[]], ["conversation 1", "not empty"]),
        ("mt_eval", [{"user": "x"}], ["conversation 1", "must be a list"]),
        ("mt_eval", [[{"user": "x", "id": "1_a_1"}, {"id": "1_a_2"}]], ["conversation 1, turn 2", "'user' is missing"]),
    ],
)
def test_a_malformed_conversation_is_named_with_its_turn(tmp_path, source, records, said):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError) as error:
        multiturn.read(str(path), source)
    message = str(error.value)
    assert "bad.json" in message
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", b"[{]", "malformed JSON at line 1"),
        ("c.jsonl", b'{"id": "a", "turns": [{"role": "user", "content": "x"}]}\n{', "line 2"),
        ("c.jsonl", b"\xff", "byte 1 is not UTF-8"),
        ("c.jsonl.gz", b"no gzip", "cannot be read"),
        ("c.json", b'[{"id": "a", "turns": [{"role": "user", "content": "\\ud800"}]}]', "surrogate"),
        ("c.txt", b"", "must end in"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        multiturn.read(str(path), "turns")
    assert name in str(error.value)


def test_the_example_of_the_docs_is_read(tmp_path):
    docs = (Path(__file__).parents[1] / "docs/conversations.md").read_text(encoding="utf-8")
    path = tmp_path / "c.json"
    path.write_text(docs.partition("```json\n")[2].partition("```")[0], encoding="utf-8")
    (row,) = multiturn.read(str(path), "turns")
    assert row["system"] == "Answer in at most 20 words."
    assert [[check["kind"] for check in turn["checks"]] for turn in row["turns"]] == [
        ["max_words"],
        ["max_words", "case"],
    ]


def run(tmp_path, **chat) -> Path:
    chat = {"source": "turns", "path": None, "name": "set", "n": None, "seed": 0, "max_turns": None} | chat
    output = tmp_path / "conversations.parquet"
    assert multiturn.main(["--spec", json.dumps({"chat": chat, "content": None}), "--output", str(output)]) == 0
    return output


def test_the_job_draws_conversations_and_cuts_their_turns(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"id": str(i), "turns": [user(f"{i} {t}") for t in range(4)]} for i in range(30)]))
    table = pq.read_table(run(tmp_path, path=str(path), n=7, seed=3, max_turns=2))
    assert table.schema.equals(CONVERSATIONS)
    rows = table.to_pylist()
    ids = [int(row["conversation_id"]) for row in rows]
    assert len(set(ids)) == 7
    assert ids == sorted(ids)
    assert all(row["n_turns"] == 2 and len(json.loads(row["turns"])) == 2 for row in rows)
    again = pq.read_table(run(tmp_path, path=str(path), n=7, seed=3, max_turns=2)).to_pylist()
    assert again == rows
    other = pq.read_table(run(tmp_path, path=str(path), n=7, seed=4, max_turns=2)).to_pylist()
    assert other != rows


def test_the_job_says_what_is_wrong_in_one_line(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text("[]")
    spec = {"chat": {"source": "turns", "path": str(path), "name": "x", "n": None, "seed": 0, "max_turns": None}}
    output = tmp_path / "out.parquet"
    assert multiturn.main(["--spec", json.dumps(spec | {"content": None}), "--output", str(output)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not output.exists()


def test_generated_conversations_have_the_turns_asked_for(tmp_path):
    rows = pq.read_table(run(tmp_path, source="generated", n=3, max_turns=5)).to_pylist()
    assert [row["n_turns"] for row in rows] == [5] * 3
    assert len({row["turns"] for row in rows}) == 3
    assert any(turn["checks"] for row in rows for turn in json.loads(row["turns"]))


@needs_data
def test_the_real_files_are_read():
    questions = multiturn.read(f"{DATA}/chat/mt_bench_question.jsonl", "mt_bench")
    assert [len(row["turns"]) for row in questions] == [2] * 80
    assert questions[0]["turns"][1]["content"].endswith("Start every sentence with the letter A.")
    assert questions[0]["meta"]["category"] == "writing"
    dialogues = multiturn.read(f"{DATA}/chat/mteval_refinement_multi_inst.jsonl.gz", "mt_eval")
    with gzip.open(f"{DATA}/chat/mteval_refinement_multi_inst.jsonl.gz") as lines:
        raw = [json.loads(line) for line in lines]
    assert [len(row["turns"]) for row in dialogues] == [len(turns) for turns in raw]
    assert sum(row["dropped_assistant"] for row in dialogues) == sum(map(len, raw))
    assert dialogues[1]["conversation_id"] == "1_qa"


# turns


def whole(tokenizer, system, users, answers) -> list[int]:
    """Return the token ids of the whole conversation, rendered at once."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answer in zip(users, answers, strict=True):
        messages += [user(asked), assistant(answer)]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def fed(tokenizer, turns, answers) -> list[int]:
    ids = []
    for turn, answer in zip(turns, answers, strict=True):
        ids += [*turn.opening, *tokenizer(answer, add_special_tokens=False).input_ids, *turn.closing]
    return ids


@settings(max_examples=30, deadline=None)
@given(
    template=st.sampled_from([FOLDING, SEPARATE]),
    system=st.sampled_from([None, text(3)]),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
)
def test_turn_by_turn_the_tokens_are_those_of_the_whole(template, system, lengths):
    tokenizer = word_tokenizer(template)
    users, answers = [text(a) for a, _ in lengths], [text(b, 40) for _, b in lengths]
    turns = render(tokenizer, system, users, chat=True)
    assert fed(tokenizer, turns, answers) == whole(tokenizer, system, users, answers)
    assert [turn.user for turn in turns] == users


def test_a_system_message_that_is_folded_belongs_to_the_first_turn():
    tokenizer = word_tokenizer(FOLDING)
    with_system = render(tokenizer, "w70 w71", ["w1", "w2"], chat=True)
    without = render(tokenizer, None, ["w1", "w2"], chat=True)
    assert tokenizer.decode(with_system[0].opening) == "<bos> <start> user w70 w71 w1 <end> <start> model"
    assert with_system[1:] == without[1:]
    assert tokenizer.decode(without[1].opening) == "<start> user w2 <end> <start> model"
    assert tokenizer.decode(without[1].closing) == "<end>"


@needs_data
@pytest.mark.parametrize(("name", "system"), [("qwen2.5", None), ("qwen2.5", "Be brief."), ("mistral", None)])
def test_real_templates_and_tokenizers(name, system):
    """Check that turn-by-turn rendering gives the same ids before, between and after the answers as the whole
    conversation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{DATA}/tokenizers/{name}")
    users = ["What is a café?\n\nTell me.", "  And now, in 3 words?", "Ok <b>thanks</b>"]
    answers = ["A place.", "Coffee, cake, talk", "You are welcome!"]
    rest = whole(tokenizer, system, users, answers)
    for turn in render(tokenizer, system, users, chat=True):
        assert rest[: len(turn.opening)] == turn.opening
        rest = rest[len(turn.opening) :]
        rest = rest[rest.index(turn.closing[0]) :]  # skip the answer, which contains no special token
        assert rest[: len(turn.closing)] == turn.closing
        rest = rest[len(turn.closing) :]
    assert not rest


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        (MARKS_THE_LAST, None, "the turns before turn 2 differently"),
        (LEAVES_THOUGHTS_OUT, None, "the answer of turn 1"),
        (REFUSES_THE_SYSTEM, "w1", "there is no system here"),
    ],
)
def test_a_template_that_cannot_be_fed_turn_by_turn_is_refused(template, system, said):
    with pytest.raises(UserError, match=said) as error:
        render(word_tokenizer(template), system, ["w2", "w3"], chat=True)
    assert str(error.value).startswith("model.chat_template: ")
    assert "\n" not in str(error.value)


def test_without_a_template_there_is_a_plain_one():
    tokenizer = word_tokenizer()
    first, second = render(tokenizer, "w70", ["w1 w2", "w3"], chat=False)
    assert tokenizer.decode(first.opening) == "w70 User: w1 w2 Assistant:"
    assert tokenizer.decode(second.opening) == "User: w3 Assistant:"
    assert first.closing == second.closing
    # a prefix that the tokenizer adds to a text is added once, before the conversation
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    first, second = render(tokenizer, None, ["w1 w2", "w3"], chat=False)
    assert tokenizer.decode(first.opening) == "<bos> User: w1 w2 Assistant:"
    assert tokenizer.decode(second.opening) == "User: w3 Assistant:"
