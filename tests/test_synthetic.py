"""Test the synthetic task: deterministic, of exact length, with answers at the documented positions."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transition.data import synthetic, world
from kv_transition.data.synthetic import (
    DEFAULT_KINDS,
    KINDS,
    MAX_DOCUMENT_TOKENS,
    MIN_DOCUMENT_TOKENS,
    QUESTION_TEMPLATE,
    RELATIONS,
    ask,
    draw_document,
    make_document,
    reader_ambiguous,
    reader_mixed,
    reader_qa,
)
from kv_transition.data.world import VOCABULARY

seeds = st.integers(0, 2**32)
document_sizes = st.integers(MIN_DOCUMENT_TOKENS, 600)


def sentences(context: str) -> set[str]:
    """Split a context into its sentences."""
    return {sentence.strip() for sentence in context.replace("\n", " ").split(" .")}


def test_vocabulary_has_no_duplicates_and_starts_with_the_special_tokens():
    assert VOCABULARY[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    invented = {*world.FIRST_NAMES, *world.SURNAMES, *world.ORGANISATION_NAMES, *world.CITY_NAMES}
    ordinary = set(VOCABULARY) - invented
    assert not {word.lower() for word in invented} & {word.lower() for word in ordinary}


# ------------------------------------------------------------------------------------------ documents


@given(seed=seeds, n_tokens=document_sizes, filler=st.sampled_from([None, 0.0, 0.3, 1.0]))
@settings(max_examples=150, deadline=None)
def test_a_document_has_the_requested_number_of_tokens_or_up_to_three_fewer(seed, n_tokens, filler):
    document = make_document(random.Random(seed), n_tokens, filler)
    with_bos = 1 + len(document.words)
    assert n_tokens - 3 <= with_bos <= n_tokens
    assert document.text.split() == list(document.words)
    assert set(document.words) <= set(VOCABULARY)


@pytest.mark.parametrize("n_tokens", [2048, MAX_DOCUMENT_TOKENS])
@pytest.mark.parametrize("filler", [0.0, 1.0])
def test_long_documents_have_the_requested_length_too(n_tokens, filler):
    document = make_document(random.Random(5), n_tokens, filler)
    assert n_tokens - 3 <= 1 + len(document.words) <= n_tokens


@pytest.mark.parametrize("n_tokens", [0, MIN_DOCUMENT_TOKENS - 1, MAX_DOCUMENT_TOKENS + 1])
def test_lengths_that_cannot_be_made_are_refused(n_tokens):
    with pytest.raises(ValueError, match=str(n_tokens)):
        make_document(random.Random(0), n_tokens)


@given(seed=seeds, n_tokens=document_sizes)
@settings(max_examples=50, deadline=None)
def test_a_document_states_every_fact_once_and_names_are_unambiguous(seed, n_tokens):
    document = make_document(random.Random(seed), n_tokens)
    assert document.persons
    assert document.organisations
    text = " ".join(document.words)
    for entity in document.persons + document.organisations:
        assert {RELATIONS[relation].subject for relation, _ in entity.facts()} == {entity.kind}
        for _, sentence in entity.facts():
            assert text.count(" ".join(sentence)) == 1
    assert len({person.name[1] for person in document.persons}) == len(document.persons)
    for word in (0, 1):
        names = {organisation.name[word] for organisation in document.organisations}
        assert len(names) == len(document.organisations)
    assert {person.values["employer"] for person in document.persons} <= set(document.employers)


def test_passages_are_numbered_in_order_one_a_line():
    lines = make_document(random.Random(1), 512).text.splitlines()
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"Passage {number} : ")
        assert line.endswith(" .")


def test_both_kinds_of_passages_are_shuffled():
    document = make_document(random.Random(2), 1024)
    organisations = {organisation.name for organisation in document.organisations}
    order = [tuple(passage[3:5]) in organisations for passage in document.passages]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


# ---------------------------------------------------------------------------------------------- split


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_drawn_document_belongs_to_its_split(seed):
    train = draw_document(random.Random(seed), 128, "train")
    test = draw_document(random.Random(seed), 128, "test")
    assert (train.split, test.split) == ("train", "test")
    assert train.text != test.text


def test_the_split_is_a_tenth_and_ignores_how_passages_are_laid_out():
    rng = random.Random(3)
    documents = [make_document(rng, 128) for _ in range(2000)]
    share = sum(document.split == "test" for document in documents) / len(documents)
    assert 0.075 < share < 0.125
    merged = [synthetic.Document((d.words,), d.persons, d.organisations) for d in documents[:100]]
    assert [d.split for d in merged] == [d.split for d in documents[:100]]


def test_the_splits_are_disjoint_whatever_the_seeds():
    contexts = {
        split: {e["context"] for seed in range(5) for e in reader_qa([130], 20, seed, split=split)}
        for split in ("train", "test")
    }
    assert not contexts["train"] & contexts["test"]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        draw_document(random.Random(0), 128, "validation")


# ------------------------------------------------------------------------------------------ questions


@given(seed=seeds, kind=st.sampled_from(KINDS), relation=st.sampled_from(list(RELATIONS)))
@settings(max_examples=150, deadline=None)
def test_answers_follow_from_the_document(seed, kind, relation):
    rng = random.Random(seed)
    document = make_document(rng, 300)
    question = ask(rng, document, kind, relation)
    name, stated = " ".join(question.name), sentences(document.text)
    assert name in question.text
    if kind == "one_hop":
        assert f"{name} {' '.join(RELATIONS[relation].statement)} {question.answer}" in stated
    elif kind == "chain":
        employer, city = question.answer.split(" , based in ")
        assert f"{name} works for {employer}" in stated
        assert f"{employer} operates in {city}" in stated
    else:
        assert question.answer == "unknown"
        assert name not in document.text
        assert question.name[1] not in document.words
    segment = QUESTION_TEMPLATE.format(question=question.text).split()
    assert len(segment) <= synthetic.QUESTION_TOKENS
    assert {*segment, *question.answer.split()} <= set(VOCABULARY)


def test_every_kind_and_relation_is_checked():
    document = make_document(random.Random(0), 200)
    with pytest.raises(ValueError, match="two_hop"):
        ask(random.Random(0), document, "two_hop", "job")
    with pytest.raises(ValueError, match="hobby"):
        ask(random.Random(0), document, "one_hop", "hobby")


# ------------------------------------------------------------------------------------------- examples


def test_examples_have_the_documented_form():
    (example,) = reader_qa([256], 1, seed=0)
    assert set(example) == {"example_id", "question", "context", "answers", "meta"}
    assert example["meta"] == {"kind": "one_hop", "length": 256}
    assert [type(answer) for answer in example["answers"]] == [str]
    assert "  " not in example["context"]
    assert "  " not in example["question"]


def test_examples_are_a_function_of_the_arguments():
    arguments = ([150, 300], 12, 7)
    first, again = list(reader_qa(*arguments)), list(reader_qa(*arguments))
    assert first == again
    other_seed = list(reader_qa([150, 300], 12, 8))
    assert not {e["context"] for e in first} & {e["context"] for e in other_seed}
    assert len({e["example_id"] for e in first + other_seed}) == 48


@given(few=st.integers(1, 10), more=st.integers(10, 20), seed=seeds)
@settings(max_examples=10, deadline=None)
def test_more_examples_extend_fewer(few, more, seed):
    extended = list(reader_qa([140, 180], more, seed))
    assert list(reader_qa([140, 180], few, seed)) == extended[:few] + extended[more : more + few]


def test_lengths_do_not_depend_on_each_other():
    both = list(reader_qa([140, 180], 5, 3))
    assert list(reader_qa([180], 5, 3)) == both[5:]


def test_contexts_do_not_depend_on_the_kinds():
    contexts = [[e["context"] for e in reader_qa([200], 8, 1, {kind: 1})] for kind in KINDS]
    assert contexts[0] == contexts[1] == contexts[2]


@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
def test_prompts_fill_the_length_and_never_exceed_it(length):
    for example in reader_qa([length], 8, seed=11):
        question = QUESTION_TEMPLATE.format(question=example["question"])
        n_tokens = 1 + len(example["context"].split()) + len(question.split())
        assert length - 6 <= n_tokens <= length


@pytest.mark.parametrize("n", [4, 20, 100])
def test_kinds_are_in_exact_proportion(n):
    counts = Counter(e["meta"]["kind"] for e in reader_qa([128], n, seed=0))
    assert counts == {kind: share * n for kind, share in DEFAULT_KINDS.items()}


@given(weights=st.dictionaries(st.sampled_from(KINDS), st.floats(0.05, 10), min_size=1), n=st.integers(1, 60))
@settings(deadline=None)
def test_kinds_stay_within_one_of_their_proportion(weights, n):
    counts = Counter(islice(synthetic._balanced(weights), n))
    for kind, weight in weights.items():
        assert abs(counts[kind] - n * weight / sum(weights.values())) <= 1 + 1e-6


def test_relations_are_dealt_out_in_turn():
    questions = [e["question"] for e in reader_qa([128], 10, 0, {"one_hop": 1})]
    assert Counter(question.split()[-1] for question in questions) == {
        "work?": 2,
        "live?": 2,
        "have?": 2,
        "based?": 2,
        "founded?": 2,
    }


@pytest.mark.parametrize("kinds", [{}, {"two_hop": 1}, {"one_hop": -1, "chain": 2}, {"one_hop": 0}])
def test_bad_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match="kinds maps"):
        next(reader_qa([128], 1, 0, kinds))


@given(seed=seeds, n=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_an_ambiguous_document_states_both_answers_of_the_one_it_is_asked_about(seed, n):
    for example in reader_ambiguous([140, 300], n, seed):
        first, second = example["answers"]
        assert first != second
        stated = sentences(example["context"])
        found = [
            (name, relation)
            for relation, told in RELATIONS.items()
            for name in {" ".join(sentence.split()[:2]) for sentence in stated}
            if told.question.format(name=name) == example["question"]
            and all(f"{name} {' '.join(told.statement)} {answer}" in stated for answer in (first, second))
        ]
        assert len(found) == 1
        assert set(example["context"].split()) <= set(VOCABULARY)
        size = len(example["context"].split()) + 1 + synthetic.QUESTION_TOKENS
        assert example["meta"]["length"] - 3 <= size <= example["meta"]["length"]


def test_ambiguous_examples_are_a_function_of_the_arguments():
    assert list(reader_ambiguous([150], 6, 7)) == list(reader_ambiguous([150], 9, 7))[:6]


def test_a_third_of_the_mixed_examples_is_ambiguous():
    plain, ambiguous = list(reader_qa([150, 300], 4, 7)), list(reader_ambiguous([150, 300], 2, 7))
    order = [plain[0], plain[1], ambiguous[0], plain[2], plain[3], ambiguous[1]]
    assert list(reader_mixed([150], 6, 7)) == order
    assert [e["meta"]["length"] for e in reader_mixed([150, 300], 3, 7)] == [150] * 3 + [300] * 3
