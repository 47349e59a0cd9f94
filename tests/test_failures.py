"""Test the label of an answer, by rule and by order of the rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.eval.failures import (
    LABELS,
    MAX_NGRAM,
    breaks_pattern,
    failure,
    is_abstention,
    is_degenerate,
    is_refusal,
)

LOOP = "round and round " * 10


def test_a_right_and_a_wrong_answer_are_no_failures():
    assert failure("Paris", ["Paris"], pattern="short_qa", finish_reason="stop") is None
    assert failure("London", ["Paris"], pattern="short_qa", finish_reason="stop") is None


@pytest.mark.parametrize(
    ("error", "label"),
    [
        ("OOM: 12 GiB asked for", "OOM"),
        ("OOM", "OOM"),
        ("TIMEOUT: 60 s", "TIMEOUT"),
        ("connection refused", "ENGINE_ERROR"),
        ("ROOM: none", "ENGINE_ERROR"),
        ("RuntimeError: OOM", "ENGINE_ERROR"),
        ("", "ENGINE_ERROR"),
    ],
)
def test_errors(error, label):
    assert failure("", ["Paris"], error=error) == label


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u00a0\t"])
def test_empty_output(text):
    assert failure(text, ["Paris"], finish_reason="length") == "EMPTY_OUTPUT"


def test_the_first_label_that_fits_is_given():
    # Every text also matches all labels after its own.
    fits = {
        "OOM": ("", "OOM: all", "length"),
        "EMPTY_OUTPUT": (" ", None, "length"),
        "DEGENERATE": ("I cannot help, I do not know. " * 10, None, "length"),
        "TRUNCATED": ("I cannot help because I do not know " + "and so on " * 3, None, "length"),
        "REFUSAL": ("I cannot help because I do not know how it goes or what else", None, "stop"),
        "ABSTAIN": ("I do not know how it goes or what else, sorry for that", None, "stop"),
        "FORMAT_ERROR": ("it goes on and there is more than what ten words hold", None, "stop"),
    }
    assert list(fits) == [label for label in LABELS if label in fits]
    for label, (text, error, reason) in fits.items():
        assert failure(text, ["Paris"], pattern="short_qa", finish_reason=reason, error=error) == label


def words(n, start=0):
    return [f"w{i}" for i in range(start, start + n)]


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        (["no"] * 24, True),
        (["no"] * 23, False),  # too short to decide
        (["no"] * 12 + words(12), True),  # exactly half
        (["no"] * 11 + words(13), False),
        (words(8) * 3, True),  # an 8-gram
        (words(9) * 3, True),  # the first eight words of each repetition cover 24 of 27 words
        (words(16) * 3, True),  # eight of every sixteen words: exactly half
        (words(17) * 3, False),
        (words(24), False),
        (["so", "it", "goes"] * 4 + words(12), True),
        # frequent words that form no n-gram: "so", "it" and "goes" cover half, each alone one sixth
        ([w for pair in zip(["so", "it", "goes"] * 4, words(12), strict=True) for w in pair], False),
        # "a b a" five times, overlapping: eleven words, each counted once
        (["a", "b"] * 5 + ["a"] + words(13), False),
        (["a", "b"] * 5 + ["a"] + words(11), False),  # 22 words are too few
        (["a", "b"] * 6 + words(12), True),
    ],
)
def test_degenerate(text, degenerate):
    assert is_degenerate(" ".join(text)) is degenerate


@given(st.lists(st.sampled_from("abc"), max_size=40) | st.lists(st.sampled_from("abcdefghijkl"), max_size=40))
def test_degenerate_agrees_with_its_definition(tokens):
    def covered(ngram):
        at = [i for i in range(len(tokens)) if tokens[i : i + len(ngram)] == ngram]
        return len({i + k for i in at for k in range(len(ngram))})

    ngrams = [tokens[i : i + n] for n in range(1, MAX_NGRAM + 1) for i in range(len(tokens) - n + 1)]
    expected = len(tokens) >= 24 and any(covered(ngram) >= len(tokens) / 2 for ngram in ngrams)
    assert is_degenerate(" ".join(tokens)) is expected


def test_truncated_only_at_the_limit_and_without_a_gold_answer():
    assert failure("the capital is", ["Paris"], finish_reason="length") == "TRUNCATED"
    assert failure("the capital is", ["Paris"], finish_reason="stop") is None
    assert failure("It is Paris, the", ["Rome", "paris"], finish_reason="length") is None
    assert failure("Paris is", [], finish_reason="length") == "TRUNCATED"
    # If a task scores only the first line, the text after it is not part of the answer.
    assert failure("Rome\nParis", ["Paris"], first_line_only=True, finish_reason="length") == "TRUNCATED"
    assert failure("\nParis\nRome and", ["Paris"], first_line_only=True, finish_reason="length") is None


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that request.",
        "I'm sorry, but I can’t assist with this",
        "As an AI language model, I have no opinions.",
        "Unfortunately I am unable to comply",
    ],
)
def test_refusals(text):
    assert is_refusal(text)
    assert failure(text, ["Paris"]) == "REFUSAL"


@pytest.mark.parametrize(
    "text",
    [
        "unknown",
        "Unknown.",
        "unknown .",
        "Answer: unanswerable",
        "The answer is not known",
        "N/A",
        "I don't know.",
        "I don’t know who he is",
        "I cannot answer this question.",
        "The question cannot be answered from the text.",
        "The text does not mention his wife. It is about bees.",
        "There is no information on that",
        "It is not mentioned",
        "The passages do not provide his name",
    ],
)
def test_abstentions(text):
    assert is_abstention(text)
    assert failure(text, ["Paris"], pattern="short_qa") == "ABSTAIN"
    assert failure(text, ["Unanswerable", "Paris"], pattern="short_qa") is None  # the gold answer abstains too


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "unknown soldier",
        "The Unknown",
        "no",
        "none",
        "Natalia",
        "He does not know it",
        "It does not provide parking",
        "He was unknown to them",
        "Dr. No",
        "The team met on Friday. I don't know, said the designer.",
    ],
)
def test_answers_that_are_neither_refusal_nor_abstention(text):
    assert not is_refusal(text)
    assert not is_abstention(text)


@pytest.mark.parametrize(
    ("pattern", "text", "broken"),
    [
        ("short_qa", "one\n\ntwo\nthree", False),
        ("short_qa", "one\ntwo\nthree\nfour", True),
        ("short_qa", " ".join(words(20)), False),  # the longest gold has two words
        ("short_qa", " ".join(words(21)), True),
        ("trec_class", "Type: Food", False),
        ("trec_class", "food", True),
        ("paragraph", "Paragraph 12", False),
        ("paragraph", "**paragraph 12**", False),
        ("paragraph", "12", True),
        ("paragraph", "Paragraph twelve", True),
        ("number", "There are 7.", False),
        ("number", "seven", True),
        ("free", "\n".join(words(99)), False),
    ],
)
def test_patterns(pattern, text, broken):
    assert breaks_pattern(text, ["one", "New York"], ["Food", "Date"], pattern) is broken
    expected = "FORMAT_ERROR" if broken else None
    assert failure(text, ["one", "New York"], ["Food", "Date"], pattern, finish_reason="stop") == expected


def test_only_the_scored_line_has_to_keep_the_pattern():
    text = "Paris\n" + "Question: where?\n" * 5
    assert failure(text, ["Paris"], pattern="short_qa", first_line_only=True) is None
    assert failure(text, ["Paris"], pattern="short_qa") == "FORMAT_ERROR"


def test_an_unknown_pattern_is_a_bug():
    with pytest.raises(ValueError, match="short_qa"):
        failure("x", ["x"], pattern="haiku")


@given(
    st.text(max_size=60) | st.just(LOOP),
    st.lists(st.text(max_size=10), max_size=2),
    st.sampled_from(["short_qa", "trec_class", "paragraph", "number", "free"]),
    st.booleans(),
    st.sampled_from(["stop", "length", None]),
)
def test_every_text_gets_a_label_or_none(text, answers, pattern, first_line_only, finish_reason):
    assert failure(text, answers, ["a"], pattern, first_line_only, finish_reason) in (None, *LABELS)
