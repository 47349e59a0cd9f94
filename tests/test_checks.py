"""Compare checks of instructions with independent definitions: character by character, or by another library."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.errors import UserError
from kv_transition.studies.chat import rules as checks
from kv_transition.studies.chat.conversations import generate
from kv_transition.studies.chat.rules import Check, at_turn, of_conversation, passes, validate

WORDS = st.lists(st.sampled_from(["red", "Blue", "GREEN", "a", "don't", "7", "so-so", "end.", "why?", "...", "é"]))
SPACES = st.sampled_from([" ", "\n", "\t", "  ", "\n\n"])
TEXTS = st.builds(lambda words, gap: gap.join(words), WORDS, SPACES)


def check(kind: str, value=None, **more) -> Check:
    return validate({"kind": kind, "value": value, **more}, "here")


def words_of(text: str) -> int:
    """Return the number of words: positions where white space is followed by another character."""
    return sum(not c.isspace() and (i == 0 or text[i - 1].isspace()) for i, c in enumerate(text))


@given(TEXTS, st.integers(1, 9))
def test_counts_of_words_and_lines(text, n):
    counted = words_of(text)
    assert passes(check("max_words", n), text) == (0 < counted <= n)
    assert passes(check("min_words", n), text) == (counted >= n)
    lines = len([line for line in text.split("\n") if any(not c.isspace() for c in line)])
    assert passes(check("lines", n), text) == (lines == n)


@given(st.lists(st.sampled_from(["It rains", "He has 3.5 of it", "Go", "Why not"]), min_size=1, max_size=6), st.data())
def test_sentences_are_counted_as_they_were_put_together(sentences, data):
    ends = [data.draw(st.sampled_from([".", "!", "?", "...", '."'])) for _ in sentences]
    text = " ".join(s + e for s, e in zip(sentences, ends, strict=True))
    if data.draw(st.booleans()):
        text = text.rstrip('.!?"')  # the last sentence may lack its mark
    for n in range(1, 8):
        assert passes(check("max_sentences", n), text) == (len(sentences) <= n)


def test_chinese_sentences_need_no_space():
    assert passes(check("max_sentences", 2), "你好。再见！")
    assert not passes(check("max_sentences", 1), "你好。再见！")


def stands_in(phrase: str, text: str) -> list[int]:
    """Return where a phrase begins in a text if no word continues at either end, by comparing characters."""
    found = []
    wordy = lambda c: c.isalnum() or c == "_"  # noqa: E731
    for i in range(len(text) - len(phrase) + 1):
        before = i > 0 and wordy(text[i - 1]) and wordy(phrase[0])
        after = text[i + len(phrase) : i + len(phrase) + 1]
        if text[i : i + len(phrase)] == phrase and not before and not (wordy(after or " ") and wordy(phrase[-1])):
            found.append(i)
    return found


ALPHABET = st.text("ab_ .-!", max_size=14)
PHRASES = st.text("ab.-!", min_size=1, max_size=3)


@given(PHRASES, PHRASES, ALPHABET)
def test_phrases_are_whole_words(first, second, text):
    both = {"value": [first, second], "case_sensitive": True}
    there = [stands_in(p, text.strip()) for p in (first, second)]
    answered = bool(text.strip())
    assert passes(check("contains", **both), text) == (answered and all(there))
    assert passes(check("excludes", **both), text) == (answered and not any(there))
    assert passes(check("starts_with", **both), text) == (answered and any(0 in places for places in there))
    ends = [len(text.strip()) - len(p) in places for p, places in zip((first, second), there, strict=True)]
    assert passes(check("ends_with", **both), text) == (answered and any(ends))


def test_phrases_ignore_case_and_the_kind_of_blank_unless_told():
    assert passes(check("contains", "Red  box"), "the red\nbox")
    assert not passes(check("contains", "Red box", case_sensitive=True), "the red box")
    assert passes(check("matches", "^THE"), "the red box")
    assert not passes(check("matches", "^THE", case_sensitive=True), "the red box")
    assert passes(check("matches", r"\d{2}$"), "in 42")


@given(st.text("aBß 7é.", max_size=10))
def test_case_is_what_changing_it_would_change(text):
    """Compare the check of lower and upper case with changing the case of each character."""
    kept = bool(text.strip())
    assert passes(check("case", "lower"), text) == (kept and text == "".join(c.lower() for c in text))
    no_small = all(c == c.upper() or not c.islower() for c in text)
    assert passes(check("case", "upper"), text) == (kept and no_small)


def test_title_case():
    assert passes(check("case", "title"), 'The "Red" Box, 3 O\'clock (And More)')
    assert not passes(check("case", "title"), "The red Box")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sets(st.sampled_from("abc"), min_size=1), st.booleans())
def test_json_is_an_object_or_a_list(value, keys, fenced):
    text = json.dumps(value)
    text = f"```json\n{text}\n```" if fenced else text
    assert passes(check("json"), text) == isinstance(value, (dict, list))
    wanted = jsonschema.Draft202012Validator({"type": "object", "required": sorted(keys)})
    assert passes(check("json", sorted(keys)), text) == wanted.is_valid(value)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1', 'Sure: {"a": 1}', "{'a': 1}", '{"a": 1} {"b": 2}', "[" * 9999]
)
def test_what_is_nearly_json_is_not(text):
    """Check that text that is almost JSON fails the check json."""
    assert not passes(check("json"), text)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The garden behind the house is full of old apple trees."),
        ("de", "Der Garten hinter dem Haus ist voller alter Apfelbäume."),
        ("fr", "Le jardin derrière la maison est plein de vieux pommiers."),
        ("es", "El jardín detrás de la casa está lleno de viejos manzanos."),
        ("it", "Il giardino dietro la casa è pieno di vecchi meli."),
        ("ja", "家の裏の庭には古いりんごの木がたくさんあります。"),
        ("zh", "房子后面的花园里满是老苹果树。"),
        ("ru", "В саду за домом растёт много старых яблонь."),
    ],
)
def test_languages(language, text):
    assert [code for code in checks.LANGUAGES if passes(check("language", code), text)] == [language]


@pytest.mark.parametrize("text", ["42", "x", '{"a": 1}'])
def test_a_text_that_tells_no_language_is_of_none(text):
    assert checks.detect_language(text) == "und"


def test_an_answer_is_compared_as_for_exact_match():
    assert passes(check("answer", ["Paris", "Lyon"]), "The Lyon.")
    assert not passes(check("answer", "Paris"), "Paris is it")


@given(st.sampled_from(checks.KINDS), st.sampled_from(["", " ", "\n\t"]))
def test_an_empty_answer_follows_nothing(kind, text):
    """Check that an empty answer fails every check."""
    value = {"case": "lower", "language": "en", "json": None}.get(kind, 3 if "_words" in kind else "x")
    value = 1 if kind in ("max_sentences", "lines") else value
    assert not passes(check(kind, value), text)


# ----------------------------------------------------------------------------------------------------
# Refused checks, and when a check is in force


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "kind is missing, one of max_words"),
        ({"kind": "rhyme"}, "kind is 'rhyme'; choose one of max_words"),
        ({"kind": "max_words", "value": 0}, "max_words needs a whole number of at least 1"),
        ({"kind": "max_words", "value": True}, "max_words needs a whole number"),
        ({"kind": "max_words"}, "max_words needs value"),
        ({"kind": "contains", "value": []}, "contains needs a text"),
        ({"kind": "contains", "value": " "}, "contains needs a text"),
        ({"kind": "case", "value": "camel"}, "one of upper, lower, title"),
        ({"kind": "language", "value": "xx"}, "ISO 639-1"),
        ({"kind": "matches", "value": "("}, "regular expression"),
        ({"kind": "json", "value": "a"}, "list of the keys"),
        ({"kind": "lines", "value": 2, "since": 3, "until": 2}, "begins at turn 3"),
        ({"kind": "lines", "value": 2, "size": 3}, "there is no key 'size'; allowed are kind, value"),
        ({"kind": "lines", "value": 2, "case_sensitive": True}, "has no case_sensitive"),
        ({"kind": "lines", "value": 2, "id": "a", "overrides": "a"}, "cannot override itself"),
        ("be brief", "a check is an object"),
    ],
)
def test_what_is_no_check_is_refused_by_one_sentence_that_says_where(given, said):
    with pytest.raises(UserError) as refused:
        validate(given, "talks.json: conversation 7, turn 2", 2)
    text = str(refused.value)
    assert text.startswith("talks.json: conversation 7, turn 2")
    assert said in text
    assert "\n" not in text


def user(content="?", *own):
    return {"role": "user", "content": content, "checks": list(own)}


def test_defaults_follow_from_where_a_check_stands():
    """Check the default ids and turns of checks in system messages, in user turns and for the whole conversation."""
    talk = {
        "turns": [
            {"role": "system", "content": "s", "checks": [{"kind": "lines", "value": 1}]},
            user(),
            {"role": "assistant", "content": "dropped"},
            user("?", {"kind": "answer", "value": "x"}, {"kind": "max_words", "value": 9, "until": 3}),
            user("?", {"kind": "max_words", "value": 2, "id": "short", "overrides": "c4"}),
        ],
        "checks": [{"kind": "language", "value": "en"}],
    }
    found = of_conversation(talk, "f")
    assert [(c.id, c.since, c.until, c.standing) for c in found] == [
        ("c1", 1, None, True),
        ("c2", 1, None, True),
        ("c3", 2, 2, False),
        ("c4", 2, 3, True),
        ("short", 3, None, True),
    ]
    assert [(c.id, by) for c, by in at_turn(found, 3)] == [("c1", None), ("c2", None), ("c4", "short"), ("short", None)]
    assert [c.id for c, _ in at_turn(found, 1)] == ["c1", "c2"]
    again = [Check.model_validate(json.loads(json.dumps(c.model_dump()))) for c in found]
    assert again == found


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([user("?", {"kind": "lines", "value": 1, "overrides": "c9"})], "overrides 'c9', which is not a check"),
        (
            [user("?", {"kind": "lines", "value": 1, "id": "a"}, {"kind": "lines", "value": 2, "id": "a"})],
            "have the id a",
        ),
        ([user("?", {"kind": "lines", "value": 1, "since": 4})], "begins at turn 4, but the user has 1 turns"),
        ([user(), {"role": "assistant", "checks": [{"kind": "lines", "value": 1}]}], "belong to a message of the user"),
        ([user() | {"checks": "short"}], "checks must be a list"),
    ],
)
def test_checks_of_a_conversation_must_agree(turns, said):
    with pytest.raises(UserError, match=said):
        of_conversation({"turns": turns}, "f")


@given(st.integers(1, 6), st.integers(1, 6), st.none() | st.sets(st.integers(1, 8)), st.integers(1, 8))
def test_a_check_is_in_force_from_since_to_until_where_it_is_due(since, more, due, turn):
    until = since + more
    c = check("lines", 1, since=since, until=until, due=None if due is None else sorted(due))
    assert c.in_force(turn) == (turn in set(range(since, until + 1)) & (set(range(1, 9)) if due is None else due))


def test_the_right_answers_of_generated_conversations_pass():
    for talk in generate(60, 8, 5):
        found = of_conversation(talk, "generated")
        for turn, answer in enumerate(talk["meta"]["answers"], 1):
            assert all(passes(c, answer) for c, overridden in at_turn(found, turn) if overridden is None)
