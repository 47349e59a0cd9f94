"""Compare scores of answers to the benchmarks with values computed by hand."""

from __future__ import annotations

import json

import pytest

from kv_transition.errors import UserError
from kv_transition.eval.ifeval import CHECKS
from kv_transition.eval.metrics import score_answer

CHOICE = [
    ("The correct answer is (A).", "A", 1),
    ("The correct answer is (A).", "B", 0),
    ("The correct answer is A.", "A", 1),
    ("The correct answer is A", "A", 1),
    ("The correct answer is (D)", "D", 1),
    ("**The correct answer is (C)**", "C", 1),
    ("The correct answer is *(C)*", "C", 1),
    ("The correct answer is **B**.", "B", 1),
    ("I think so. The correct answer is (B). Done.", "B", 1),
    ("The correct answer is (E).", "A", 0),
    ("the correct answer is (A).", "A", 0),  # the sentence that the prompt asks for
    ("The answer is (A).", "A", 0),
    ("(A)", "A", 0),
    ("A", "A", 0),
    ("", "A", 0),
    ("The correct answer is", "A", 0),
    ("The correct answer is (a).", "A", 0),
    ("The correct answer is (A). The correct answer is (B).", "A", 1),
    ("The correct answer is (A). The correct answer is (B).", "B", 0),
    ("The correct answer is B. The correct answer is (A).", "A", 1),  # the form in brackets has priority
    ("The correct answer is B. The correct answer is (A).", "B", 0),
    ("The correct answer is ( A ).", "A", 0),
    ("The correct answer is Apple.", "A", 0),
    ("The correct answer is C, since D is wrong.", "C", 1),
    ("The correct answer is (C)\nbecause of that", "C", 1),
    ("The correct answer is\n(C)", "C", 0),
    ("The correct answer is not (C)", "C", 0),
    ("The correct answer is (D), not (A)", "D", 1),
    ("The correct answer is (D), not (A)", "A", 0),
    ("The correct answer is (C)", " C ", 1),
    ("The correct answer is (CD)", "C", 0),
    ("The correct answer is A or B", "A", 1),
]
FIRST_NUMBER = [
    ("71432", "71432", 1),
    ("The pass key is 71432.", "71432", 1),
    ("71432 or 9", "71432", 1),
    ("9 or 71432", "71432", 0),
    ("7143", "71432", 0),
    ("714321", "71432", 0),
    ("", "71432", 0),
    ("none", "71432", 0),
    ("0071432", "71432", 0),
    ("0071432", "0071432", 1),
    ("71,432", "71432", 0),
    ("71,432", "71", 1),
    ("-5", "5", 1),
    ("5.5", "5", 1),
    ("a1b2", "1", 1),
    ("a1b2", "2", 0),
    ("#12#", "12", 1),
    ("１２", "12", 0),  # full-width digits are not digits
]
WORD = [
    ("cb59052b-9128", "cb59052b-9128", 1),
    ('"cb59052b-9128"', "cb59052b-9128", 1),
    ("The value is: cb59052b-9128.", "cb59052b-9128", 1),
    ("{a: cb59052b-9128}", "cb59052b-9128", 1),
    ("cb59052b 9128", "cb59052b-9128", 0),
    ("xcb59052b-9128", "cb59052b-9128", 0),
    ("cb59052b-91289", "cb59052b-9128", 0),
    ("CB59052B-9128", "cb59052b-9128", 0),
    ("", "cb59052b-9128", 0),
    ("a\nb", "b", 1),
    ("a,b", "a", 1),
    ("a;b", "a", 0),  # a semicolon is no separator
    ("a!b?c", "c", 1),
    ("(a)", "a", 0),
    ("'a'", "a", 1),
    ("a.b", "a", 1),
]
NUMERIC = [
    ("72", "72", 1),
    ("so #### 72", "72", 1),
    ("#### 72 apples", "72", 1),
    ("#### 1,234", "1234", 1),
    ("#### $1,234.50", "1234.5", 1),
    ("#### 72.0", "72", 1),
    ("#### 73", "72", 0),
    ("3 + 4 = 7, so 7 and 2 make 9", "9", 1),
    ("3 + 4 = 7, so 7 and 2 make 9", "7", 0),
    ("The answer is 12. It took 5 minutes.", "12", 1),
    ("The answer is: 12", "12", 1),
    ("The answer is 5. No, the answer is 6.", "6", 1),
    ("The answer is -4", "-4", 1),
    ("The answer is -4", "4", 0),
    (r"\boxed{72}", "72", 1),
    (r"first \boxed{1}, then \boxed{2}", "2", 1),
    (r"first \boxed{1}, then \boxed{2}", "1", 0),
    (r"\boxed{\frac{3}{4}}", "0.75", 1),
    (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}", 1),
    (r"\boxed{\frac34}", r"\frac{3}{4}", 1),
    (r"\boxed{3/4}", r"\frac{6}{8}", 1),
    (r"\boxed{-\frac{1}{2}}", "-0.5", 1),
    (r"\boxed{\frac{1}{0}}", "0", 0),
    (r"\boxed{50\%}", "50", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{12\text{ cm}}", "12", 1),
    (r"\boxed{x^2 + 1}", "x^2+1", 1),
    (r"\boxed{x^2 + 1}", "x^2+2", 0),
    (r"\boxed{\left(1, 2\right)}", "(1,2)", 1),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", 1),
    (r"\boxed{10", "10", 1),  # no closing bracket: the last number counts
    ("", "72", 0),
    ("no number here", "72", 0),
    ("It costs $3.", "3", 1),
    ("1,2", "12", 0),  # no thousands separator
    ("#### .5", "0.5", 1),
    ("#### 1000000", "1,000,000", 1),
    ("#### 0.1", "1/10", 1),
]
PART = [
    ("It was Paris.", ["Paris"], 1),
    ("it was paris.", ["Paris"], 1),
    ("Rome", ["Paris"], 0),
    ("Rome", ["Paris", "Rome"], 1),
    ("", ["Paris"], 0),
    ("Parisian", ["Paris"], 1),
    ("Pa ris", ["Paris"], 0),
    ("yes", ["Yes", "no"], 1),
]

ASKED = [
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "The Sun and the moon.", "The sun alone."),
    ("keywords:existence", {"keywords": ["art"]}, "a start", "a tart? no: music"[:1]),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "at least"}, "ab Ab", "ab"),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}, "ab", "ab, abab"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat!"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 3, "let_relation": "at least"}, "Zzz", "zz"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 1, "let_relation": "less than"}, "abc", "Z"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "Only one."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "A. B.", "A. B? C."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo\n***", "one***\n ***two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "don't", "a b c"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        'One.\n\n"hello, you"',
        "Hello.\n\nOne.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "one"},
        "One.\n\ntwo",
        "one\n\ntwo\n\nthree",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S late", "Bye\nP.S. late"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b **"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, " * a", "* a\n* b"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "**a**", "a * b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nx\nSection 2\ny",
        "Section 1\nx\nsection 2\ny",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:json_format", {}, "[1, 2]", "[1, 2"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<<>>\n<text>"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******one******two******", "one******two******three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, " say it. Fine.", "Fine. Say it."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, '"So. any questions?" ', "Any questions? No."),
    ("startend:quotation", {}, ' "all of it" ', '"half" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and ESA.",
        "NASA and Esa",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "only ONE",
        "A B c",
    ),
    ("change_case:english_capital", {}, "ALL OF IT 1!", "ALL of it"),
    ("change_case:english_lowercase", {}, "all of it 1!", "All of it"),
    ("punctuation:no_comma", {}, "none; here", "one, here"),
    (
        "language:response_language",
        {"language": "de"},
        "Heute regnet es den ganzen Tag, und wir bleiben zu Hause.",
        "It has been raining all day, and we stay at home.",
    ),
    (
        "language:response_language",
        {"language": "hi"},
        "आज पूरे दिन बारिश हो रही है और हम घर पर हैं।",
        "Aujourd'hui il pleut toute la journée et nous restons à la maison.",
    ),
    (
        "language:response_language",
        {"language": "ru"},
        "Сегодня весь день идёт дождь.",
        "Сьогодні весь день іде дощ, і ми вдома.",
    ),
    ("language:response_language", {"language": "kn"}, "1 + 1 = 2", "Oggi piove tutto il giorno."),
]


def worth(metric: str, text: str, *gold: str) -> float:
    return score_answer(metric, text, gold)


@pytest.mark.parametrize(("text", "gold", "value"), CHOICE)
def test_the_letter_of_longbench_v2(text, gold, value):
    assert worth("choice", text, gold) == value


@pytest.mark.parametrize(("text", "gold", "value"), FIRST_NUMBER)
def test_the_first_number_of_infinitebench(text, gold, value):
    assert worth("first_number", text, gold) == value


@pytest.mark.parametrize(("text", "gold", "value"), WORD)
def test_the_value_of_infinitebench(text, gold, value):
    assert worth("word", text, gold) == value


@pytest.mark.parametrize(("text", "gold", "value"), NUMERIC)
def test_the_number_of_gsm8k_and_math_500(text, gold, value):
    assert worth("numeric", text, gold) == value


@pytest.mark.parametrize(("text", "gold", "value"), PART)
def test_a_part_of_the_answer_is_enough_for_rulers_questions(text, gold, value):
    assert worth("string_match_part", text, *gold) == value


@pytest.mark.parametrize(("name", "arguments", "follows", "breaks"), ASKED)
def test_an_instruction_is_followed_or_not(name, arguments, follows, breaks):
    gold = json.dumps({"id": name, "kwargs": arguments})
    assert worth("instruction", follows, gold) == 1
    assert worth("instruction", breaks, gold) == 0
    assert worth("instruction", " \n", gold) == 0


def test_every_instruction_is_among_the_cases_and_there_are_enough_of_each():
    assert {name for name, *_ in ASKED} == set(CHECKS)
    assert min(len(CHOICE), len(FIRST_NUMBER) + len(WORD), len(NUMERIC), 2 * len(ASKED)) >= 30


def test_an_answers_score_is_the_share_of_its_instructions():
    golds = [json.dumps({"id": name, "kwargs": {}}) for name in ("punctuation:no_comma", "startend:quotation")]
    assert worth("instruction", '"none"', *golds) == 1
    assert worth("instruction", "none", *golds) == 0.5
    assert worth("instruction", "a, b", *golds) == 0


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ({"id": "other:thing"}, "not known"),
        ({"id": "length_constraints:number_words", "kwargs": {"relation": "at least"}}, "num_words"),
        ({"id": "length_constraints:number_words", "kwargs": {"relation": "over", "num_words": 3}}, "less than"),
        ({"id": "language:response_language", "kwargs": {"language": "tlh"}}, "language is one of"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_named(gold, words):
    with pytest.raises(UserError, match=words):
        worth("instruction", "text", json.dumps(gold))
