"""Compare metrics with values computed by hand, and with the packages that LongBench calls."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.eval.failures import failure
from kv_transition.eval.metrics import (
    METRICS,
    contains,
    exact_match,
    first_line,
    normalize,
    qa_f1,
    rouge_l,
    score_answer,
)

# F1 = 2c / (p + g): c common words, p words of the answer, g words of the gold answer, after normalization.
# Each line: answer, gold answers, F1. The comment gives the remaining words of the answer | of the gold answer.
QA_F1 = [
    # equal, different, partly equal
    ("Paris", ["Paris"], Fraction(1)),
    ("Paris", ["London"], Fraction(0)),
    ("PARIS", ["paris"], Fraction(1)),
    ("The answer is Scott Derrickson.", ["Scott Derrickson"], Fraction(2 * 2, 4 + 2)),  # answer is scott derrickson
    ("Derrickson, Scott", ["Scott Derrickson"], Fraction(1)),  # order does not count
    # articles
    ("The cat sat", ["a cat sat"], Fraction(1)),  # cat sat | cat sat
    ("the cat sat on the mat", ["the cat lay on a mat"], Fraction(2 * 3, 4 + 4)),  # cat sat on mat | cat lay on mat
    ("Alexander the Great", ["Alexander Great"], Fraction(1)),
    ("AN APPLE A DAY", ["apple day"], Fraction(1)),
    ("the", ["the"], Fraction(0)),  # neither has any words left
    ("a", ["an"], Fraction(0)),
    ("vitamin A", ["vitamin C"], Fraction(2 * 1, 1 + 2)),  # vitamin | vitamin c
    ("another theatre Anna", ["theatre"], Fraction(2 * 1, 3 + 1)),  # articles inside words are not removed
    # articles and punctuation: punctuation is removed first
    ("The, Beatles", ["Beatles"], Fraction(1)),
    ("an. apple", ["apple"], Fraction(1)),
    ("(the)Beatles", ["Beatles"], Fraction(0)),  # thebeatles
    ("the_end", ["end"], Fraction(0)),  # theend
    ("the1", ["1"], Fraction(0)),  # the1 is one word
    ("U. S. A.", ["U.S.A."], Fraction(0)),  # u s (its "a" is an article) | usa
    ("“The” end", ["end"], Fraction(2 * 1, 3 + 1)),  # “ ” end: these quotes are not ASCII punctuation
    # punctuation
    ("Hello, world!", ["hello world"], Fraction(1)),
    ("U.S.A.", ["USA"], Fraction(1)),
    ("12 B.C.", ["12 BC"], Fraction(1)),
    ("C++", ["C"], Fraction(1)),
    ("snake_case", ["snakecase"], Fraction(1)),
    ("?!", ["Paris"], Fraction(0)),
    # hyphens, dashes, possessives
    ("well-known author", ["well known author"], Fraction(2 * 1, 2 + 3)),  # wellknown author
    ("yes—no", ["yes no"], Fraction(0)),  # an em dash stays: yes—no
    ("yes — no", ["yes no"], Fraction(2 * 2, 3 + 2)),  # yes — no
    ("Jane's house", ["Jane house"], Fraction(2 * 1, 2 + 2)),  # janes house
    ("Jane’s house", ["Jane's house"], Fraction(2 * 1, 2 + 2)),  # jane’s house | janes house
    ("O'Neill", ["O Neill"], Fraction(0)),  # oneill
    # a repeated word counts as often as both sides have it
    ("yes yes yes", ["yes"], Fraction(2 * 1, 3 + 1)),
    ("yes", ["yes yes yes"], Fraction(2 * 1, 1 + 3)),
    ("yes yes", ["yes yes yes"], Fraction(2 * 2, 2 + 3)),
    ("to be or not to be", ["to be"], Fraction(2 * 2, 6 + 2)),
    ("new new york", ["york new york"], Fraction(2 * 2, 3 + 3)),  # min(2, 1) new + min(1, 2) york
    # several gold answers: the best one counts
    ("New York City", ["NYC", "New York", "New York City"], Fraction(1)),
    ("New York", ["York", "New York City, USA"], Fraction(2, 3)),  # max(2*1/3, 2*2/6)
    ("red green", ["red", "green blue", "red green blue yellow"], Fraction(2, 3)),  # max(2/3, 2/4, 4/6)
    ("red", ["", "blue"], Fraction(0)),
    ("red", [], Fraction(0)),
    # empty answers
    ("", ["Paris"], Fraction(0)),
    ("Paris", [""], Fraction(0)),
    ("", [""], Fraction(0)),
    (" \n\t", ["Paris"], Fraction(0)),
    # numbers and signs
    ("1,000", ["1000"], Fraction(1)),
    ("3.14", ["314"], Fraction(1)),  # the decimal point is punctuation
    ("1,000.50 dollars", ["1000 dollars"], Fraction(2 * 1, 2 + 2)),  # 100050 dollars
    ("-5", ["5"], Fraction(1)),
    ("$5", ["5"], Fraction(1)),
    ("€5", ["5"], Fraction(0)),  # not ASCII
    # white space
    ("New\n\tYork  City", ["new york city"], Fraction(1)),
    ("New\u00a0York", ["New York"], Fraction(1)),  # a non-breaking space is white space
    ("New\u200bYork", ["New York"], Fraction(0)),  # a zero-width space is not
    # other scripts and letters
    ("ÉCOLE", ["école"], Fraction(1)),
    ("e\u0301cole", ["\u00e9cole"], Fraction(0)),  # decomposed and composed are different words
    ("STRASSE", ["straße"], Fraction(0)),  # lower case, not case folding
    ("İstanbul", ["istanbul"], Fraction(0)),  # lower-case İ is i and a combining dot
    ("à la carte", ["la carte"], Fraction(2 * 2, 3 + 2)),  # à is not the article a
    ("東京 タワー", ["東京"], Fraction(2 * 1, 2 + 1)),
    ("東京タワー", ["東京"], Fraction(0)),  # no spaces, one word
    ("Tokyo！", ["Tokyo"], Fraction(0)),  # full-width punctuation stays
    ("yes 👍", ["yes"], Fraction(2 * 1, 2 + 1)),
]


@pytest.mark.parametrize(("text", "answers", "expected"), QA_F1)
def test_qa_f1_is_the_hand_worked_fraction(text, answers, expected):
    assert Fraction(score_answer("qa_f1", text, answers)).limit_denominator(1000) == expected


def test_normalize_keeps_the_order_lower_punctuation_articles_spaces():
    assert normalize("  The A-Team's  AN. x ") == "ateams x"
    assert normalize("an…d") == "…d"  # an ellipsis ends a word


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo", "one"),
        ("\n\none\ntwo", "one"),
        (" \none", " "),  # only line feeds are stripped
        ("", ""),
        ("\n", ""),
        ("one\r\ntwo", "one\r"),
    ],
)
def test_first_line(text, line):
    assert first_line(text) == line


def test_first_line_only_where_asked():
    assert score_answer("qa_f1", "\nred\nblue", ["blue"], first_line_only=True) == 0
    assert score_answer("qa_f1", "\nred\nblue", ["blue"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "gold", "classes", "expected"),
    [
        ("Food", "Food", ["Food", "Date"], Fraction(1)),
        ("It is Food or Date", "Food", ["Food", "Date", "Event"], Fraction(1, 2)),
        ("food", "Food", ["Food"], Fraction(0)),  # case counts
        ("Date", "Food", ["Food", "Date"], Fraction(0)),
        ("", "Food", ["Food"], Fraction(0)),
        ("Seafood and Foods", "Food", ["Food"], Fraction(1)),  # a substring is enough
        (
            "Invention, book",
            "Invention, book",
            ["book", "Invention, book"],
            Fraction(1),
        ),  # a class that is part of the gold class is not counted
        (
            "Invention, book",
            "book",
            ["book", "Invention, book"],
            Fraction(1, 2),
        ),  # a class that contains the gold class is counted
        # "a" is removed during the loop, which then skips "ab": two classes are left, ab and abc
        ("abc", "abc", ["a", "ab", "abc"], Fraction(1, 2)),
    ],
)
def test_classification(text, gold, classes, expected):
    assert Fraction(score_answer("classification", text, [gold], classes)).limit_denominator(1000) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("Paragraph 3", "Paragraph 3", Fraction(1)),
        ("3", "Paragraph 3", Fraction(1)),
        ("Paragraph 13", "Paragraph 3", Fraction(0)),
        ("Paragraphs 3, 4 and 3", "Paragraph 3", Fraction(2, 3)),
        ("Paragraph 03", "Paragraph 3", Fraction(0)),
        ("none", "Paragraph 3", Fraction(0)),
    ],
)
def test_retrieval(text, gold, expected):
    assert Fraction(score_answer("retrieval", text, [gold])).limit_denominator(1000) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", Fraction(1)),
        ("7 of 12", Fraction(1, 2)),
        ("seven", Fraction(0)),
        ("17", Fraction(0)),
        ("7.7", Fraction(1)),
        ("", Fraction(0)),
    ],
)
def test_count(text, expected):
    assert Fraction(score_answer("count", text, ["7"])).limit_denominator(1000) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("x = 1", "x = 1", Fraction(1)),
        ("x = 1", "x = 2", Fraction(2 * 4, 5 + 5)),
        ("\nx = 1\ny = 2", "x = 1", Fraction(1)),  # the first line
        ("# set x\nx = 1", "x = 1", Fraction(1)),  # comments and fences are skipped
        ("```python\n// no\nx = 1", "x = 1", Fraction(1)),
        ("x = 1  # one", "x = 1", Fraction(0)),  # every line has a mark: the empty string counts
        ("tide", "diet", Fraction(1, 4)),  # Ratcliff-Obershelp; edit distance and the reverse order give 1/2
        ("diet", "tide", Fraction(1, 2)),
        ("ab", "abc", Fraction(80, 100)),  # 2*2/5
        ("abc", "abcdef", Fraction(67, 100)),  # 2*3/9 in whole percents
        ("", "", Fraction(1)),
        ("", "x", Fraction(0)),
    ],
)
def test_code_sim(text, gold, expected):
    assert Fraction(score_answer("code_sim", text, [gold])).limit_denominator(1000) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        # Lin 2004, section 3.1: S1 police killed the gunman; S2 police kill the gunman; S3 the gunman kill police
        ("police kill the gunman", "police killed the gunman", Fraction(3, 4)),
        ("the gunman kill police", "police killed the gunman", Fraction(1, 2)),
        # Lin 2004, section 3.2: the union is w1 w2 w3 w5; P = 4/8 distinct words, R = 4/5
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", Fraction(8, 13)),
        ("the cat sat. it purred", "the cat lay. it purred", Fraction(4, 5)),
        ("b a a a", "b a", Fraction(1)),  # distinct words
        ("The cat", "the cat", Fraction(1, 2)),  # case counts
        ("cat, dog", "cat dog", Fraction(1, 2)),  # and so does punctuation
        ("one. two. ", "one", Fraction(1, 2)),  # the blank after the last stop is a word: P = 1/3, R = 1
        ("red", "blue", Fraction(0)),
        ("", "red", Fraction(0)),
        ("...", "red", Fraction(0)),
        ("red", "", Fraction(0)),
    ],
)
def test_rouge_l(text, gold, expected):
    assert score_answer("rouge_l", text, [gold]) == pytest.approx(float(expected), abs=1e-7)


@given(*2 * [st.lists(st.sampled_from(["a ", "b ", "c ", "d", "A ", ". ", ".", "\n", "  "]), max_size=25).map("".join)])
def test_rouge_l_is_what_the_package_of_longbench_gives(text, gold):
    package = pytest.importorskip("rouge", reason="the package rouge is not installed")
    try:
        theirs = package.Rouge(metrics=["rouge-l"]).get_scores([text], [gold], avg=True)["rouge-l"]["f"]
    except ValueError:  # LongBench scores any error as zero
        theirs = 0.0
    assert rouge_l(text, gold) == pytest.approx(theirs, abs=1e-12)


def test_the_best_gold_answer_counts_and_none_is_zero():
    for metric in METRICS:
        assert score_answer(metric, "Paragraph 7", [], []) == 0
    assert score_answer("count", "7", ["8", "7"]) == 1


def test_unknown_metric_and_unfit_gold_are_named():
    with pytest.raises(UserError, match=r"metric 'bleu' is not known; take one of .*, qa_f1, rouge_l"):
        score_answer("bleu", "x", ["x"])
    with pytest.raises(UserError, match=r'answer \'third\' .* needs "Paragraph 7"'):
        score_answer("retrieval", "3", ["third"])


@pytest.mark.parametrize(
    ("text", "answers", "em", "contained"),
    [
        ("The Paris.", ["Paris"], 1, 1),
        ("In Paris, France", ["Paris"], 0, 1),
        ("Parisian", ["Paris"], 0, 0),  # whole words
        ("New big York", ["New York"], 0, 0),  # words must be adjacent
        ("London", ["Paris", "london"], 1, 1),
        ("", [""], 0, 0),  # an empty answer is not a match
        ("the", ["a"], 0, 0),
        ("x", [], 0, 0),
    ],
)
def test_exact_match_and_contains(text, answers, em, contained):
    assert exact_match(text, answers) == em
    assert contains(text, answers) == contained


texts = st.text(st.sampled_from("abtheTHE .,'-\n17é ") | st.characters(exclude_categories=["Cs"]), max_size=30)


@given(texts, st.lists(texts, max_size=3), texts)
def test_invariants(text, answers, another):
    f1 = score_answer("qa_f1", text, answers)
    assert 0 <= f1 <= 1
    assert exact_match(text, answers) <= min(f1, contains(text, answers))
    assert f1 <= score_answer("qa_f1", text, [*answers, another])
    assert qa_f1(text, another) == qa_f1(another, text)
    assert (f1 == 1) >= bool(exact_match(text, answers))
    for metric in ("rouge_l", "count", "code_sim"):
        assert 0 <= score_answer(metric, text, answers) <= 1
    assert 0 <= score_answer("classification", text, answers, [*answers, another]) <= 1


def test_every_gold_answer_of_longbench_is_right_and_no_failure(kvt_data):
    files = sorted((kvt_data / "longbench").glob("*.jsonl.gz"))
    assert files
    for file in files:
        task = get_task("longbench", file.name.removesuffix(".jsonl.gz").replace("-", "_"))
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        for record in records:
            answers, classes = record["answers"], record["all_classes"]
            for gold in answers:
                # LongBench also treats a gold line of code with such a mark as a comment.
                marked = task.metric == "code_sim" and any(mark in gold for mark in ("`", "#", "//"))
                score = score_answer(task.metric, gold, [gold], classes, task.first_line_only)
                assert score == pytest.approx(0 if marked else 1), (file.name, gold)
                label = failure(gold, answers, classes, task.pattern, task.first_line_only, finish_reason="length")
                assert label is None, (file.name, gold)
