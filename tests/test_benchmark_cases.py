"""Compare scores of answers to RULER, LongBench-E, InfiniteBench, GSM8K and MATH-500 with scores assigned by hand.

A case names a task, whose metric and answer form (first line only) score it. Each benchmark has at least thirty cases.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from kv_transition.data.tasks import get_task
from kv_transition.eval.metrics import score_answer

HALF, THIRD, QUARTER, FIFTH = (Fraction(1, n) for n in (2, 3, 4, 5))
U = "1b4e28ba-2fa1-4d5c-a3b1-0242ac130003"
FOUR = ["1000001", "2000002", "3000003", "4000004"]
FIVE = ["kadobe", "mulito", "sapora", "tezuni", "vodila"]
THREE = ["kadobe", "mulito", "sapora"]

# RULER: the share of the gold answers that the text contains, ignoring case
RULER = [
    ("niah_repeat", "5283719", ["5283719"], 1),
    ("niah_repeat", "The locker code is 5283719.", ["5283719"], 1),
    ("niah_repeat", "528371", ["5283719"], 0),
    ("niah_single", "52837190", ["5283719"], 1),  # a part of a number counts
    ("niah_single", "5 283 719", ["5283719"], 0),
    ("niah_single", "5,283,719", ["5283719"], 0),
    ("niah_single", "", ["5283719"], 0),
    ("niah_single", "1111111 or 5283719", ["5283719"], 1),  # other numbers do not lower the score
    ("niah_uuid", U, [U], 1),
    ("niah_uuid", U.upper(), [U], 1),
    ("niah_uuid", U[:-1], [U], 0),
    ("niah_uuid", U.replace("-", ""), [U], 0),
    ("niah_multikey", "It is 5283719, I think", ["5283719"], 1),
    ("niah_multikey", "5283718", ["5283719"], 0),
    ("niah_needles", "(5283719)", ["5283719"], 1),
    ("niah_needles", "I do not know", ["5283719"], 0),
    ("niah_uuid_needles", f"<{U}>", [U], 1),
    ("niah_uuid_needles", U[1:], [U], 0),
    ("niah_multivalue", "1000001, 2000002, 3000003, 4000004", FOUR, 1),
    ("niah_multivalue", "4000004 and 1000001", FOUR, HALF),
    ("niah_multivalue", "1000001 1000001 1000001 1000001", FOUR, QUARTER),
    ("niah_multivalue", "none of them", FOUR, 0),
    ("niah_multiquery", "a: 1000001\nb: 2000002\nc: 3000003", FOUR, 3 * QUARTER),
    ("niah_multiquery", "1000001\n2000002\n3000003\n4000004\n5000005", FOUR, 1),
    ("niah_multiquery", "4000004", FOUR, QUARTER),
    ("variable_tracking", "kadobe, mulito, sapora, tezuni, vodila", FIVE, 1),
    ("variable_tracking", "Kadobe and MULITO", FIVE, 2 * FIFTH),
    ("variable_tracking", "kadobe, mulito, sapora, tezuni", FIVE, 4 * FIFTH),
    ("variable_tracking", "kado be", FIVE, 0),
    ("variable_tracking", "vodilas", FIVE, FIFTH),
    ("common_words", "1. kadobe 2. mulito 3. sapora 4. tezuni 5. bokina", FIVE, 4 * FIFTH),
    ("common_words", "1. vodila 2. tezuni 3. sapora 4. mulito 5. kadobe", FIVE, 1),
    ("common_words", "12345", FIVE, 0),
    ("frequent_words", "sapora, kadobe, mulito", THREE, 1),
    ("frequent_words", "sapora, sapora", THREE, THIRD),
    ("frequent_words", "kadobemulito", THREE, 2 * THIRD),
    ("frequent_words", "...", THREE, 0),
]
# RULER's questions: whether the text contains one of the gold answers, ignoring case
RULER_QA = [
    ("qa_squad", "Paris", ["Paris"], 1),
    ("qa_squad", "in paris, France", ["Paris"], 1),
    ("qa_squad", "PARIS", ["Paris"], 1),
    ("qa_squad", "Rome", ["Paris"], 0),
    ("qa_squad", "", ["Paris"], 0),
    ("qa_squad", "Par", ["Paris"], 0),  # the text must contain the gold answer, not the reverse
    ("qa_squad", "Parisian", ["Paris"], 1),
    ("qa_squad", "the 1990s", ["1990s", "in the 1990s"], 1),
    ("qa_squad", "1990", ["1990s", "in the 1990s"], 0),
    ("qa_squad", "in the 1990s", ["the nineties", "the 1990s"], 1),
    ("qa_squad", "three or four", ["four", "five"], 1),
    ("qa_squad", "fourteen", ["four"], 1),
    ("qa_squad", "12 million", ["12million", "twelve million"], 0),
    ("qa_squad", "12 million.", ["12 million"], 1),
    ("qa_squad", "The answer: 12", ["12 "], 0),  # a space at the end counts
    ("qa_squad", "Denver Broncos\nCarolina Panthers", ["Carolina Panthers"], 1),  # on any line
    ("qa_squad", "Denver\nBroncos", ["Denver Broncos"], 0),
    ("qa_squad", "Santa  Clara", ["Santa Clara"], 0),  # two spaces
    ("qa_squad", "\u00fcber", ["\u00dcber"], 1),
    ("qa_squad", "don't", ["don’t"], 0),  # a different apostrophe
    ("qa_hotpot", "yes", ["yes"], 1),
    ("qa_hotpot", "Yes, they were.", ["yes"], 1),
    ("qa_hotpot", "No, they were not.", ["yes"], 0),
    ("qa_hotpot", "I know not", ["no"], 1),  # a part of another word
    ("qa_hotpot", "Chief of Protocol", ["Chief of Protocol"], 1),
    ("qa_hotpot", "chief protocol", ["Chief of Protocol"], 0),
    ("qa_hotpot", "the Animorphs series", ["Animorphs"], 1),
    ("qa_hotpot", "animorph", ["Animorphs"], 0),
    ("qa_hotpot", "3,677 seated", ["3,677 seated"], 1),
    ("qa_hotpot", "3677 seated", ["3,677 seated"], 0),
    ("qa_hotpot", "from 1986 to 2013", ["from 1986 to 2013"], 1),
    ("qa_hotpot", "1986 to 2013", ["from 1986 to 2013"], 0),
]
# LongBench-E: the metrics of LongBench's tasks; trec, triviaqa and samsum use the first line
LONGBENCH_E = [
    ("qasper_e", "unanswerable", ["Unanswerable"], 1),
    ("qasper_e", "It is unanswerable.", ["Unanswerable"], HALF),  # it is unanswerable: 2 * 1 / (3 + 1)
    ("qasper_e", "BLEU and ROUGE", ["ROUGE, BLEU"], 4 * FIFTH),  # 2 * 2 / (3 + 2)
    ("multifieldqa_en_e", "the red house", ["A red house"], 1),
    ("multifieldqa_en_e", "a red barn", ["the red house"], HALF),  # 2 * 1 / (2 + 2)
    ("multifieldqa_en_e", "", ["the red house"], 0),
    ("hotpotqa_e", "yes", ["no", "yes"], 1),
    ("hotpotqa_e", "Yes, both of them", ["yes"], 2 * FIFTH),  # 2 * 1 / (4 + 1)
    ("hotpotqa_e", "New York City", ["New York"], 4 * FIFTH),  # 2 * 2 / (3 + 2)
    ("2wikimqa_e", "John Ford", ["John Huston"], HALF),
    ("2wikimqa_e", "john ford!", ["John Ford"], 1),
    ("2wikimqa_e", "Ford, John Ford", ["John Ford"], 4 * FIFTH),  # a word counts as often as both texts contain it
    ("gov_report_e", "the report", ["the report"], 1),
    ("gov_report_e", "the report is long", ["the report"], 2 * THIRD),  # P = 2/4, R = 1
    ("gov_report_e", "The report", ["the report"], HALF),  # case counts: P = R = 1/2
    ("multi_news_e", "rain fell. wind rose", ["wind rose. rain fell"], 1),  # sentence by sentence
    ("multi_news_e", "rain fell", ["fell rain"], HALF),  # one word in order: P = R = 1/2
    ("multi_news_e", "", ["rain fell"], 0),
    ("samsum_e", "Ann calls Bob\nand more", ["Ann calls Bob"], 1),  # the first line
    ("samsum_e", "\n\nAnn calls Bob", ["Ann calls Bob"], 1),
    ("samsum_e", "Ann calls", ["Ann calls Bob now"], 2 * THIRD),  # P = 1, R = 2/4
    ("trec_e", "Date", ["Date"], 1),
    ("trec_e", "Date\nFood", ["Date"], 1),
    ("trec_e", "Date or Food", ["Date"], HALF),
    ("trec_e", "\nFood", ["Date"], 0),
    ("triviaqa_e", "Mount Everest\nPassage: another", ["Everest", "Mount Everest"], 1),
    ("triviaqa_e", "Everest", ["Mount Everest"], 2 * THIRD),  # 2 * 1 / (1 + 2)
    ("triviaqa_e", "K2\nEverest", ["Everest"], 0),
    ("passage_count_e", "12", ["12"], 1),
    ("passage_count_e", "12 of 15", ["12"], HALF),
    ("passage_count_e", "There are twelve", ["12"], 0),
    ("passage_retrieval_en_e", "Paragraph 4", ["Paragraph 4"], 1),
    ("passage_retrieval_en_e", "4", ["Paragraph 4"], 1),
    ("passage_retrieval_en_e", "Paragraph 4, not 5 or 6", ["Paragraph 4"], THIRD),
    ("passage_retrieval_en_e", "Paragraph 14", ["Paragraph 4"], 0),
    ("lcc_e", "return x", ["return x"], 1),
    ("lcc_e", "# first\nreturn x\nmore", ["return x"], 1),
    ("lcc_e", "abcd", ["abxx"], HALF),  # 2 * 2 / (4 + 4)
    ("repobench_p_e", "```\nimport os", ["import os"], 1),
    ("repobench_p_e", "zzz", ["import os"], 0),
]
CLASSES = ["Date", "Food", "Group of animals"]

INFINITE = [
    *(("passkey", text, gold, value) for text, gold, value in [
        ("71432", ["71432"], 1), ("The pass key is 71432. Remember 5.", ["71432"], 1), ("5, then 71432", ["71432"], 0),
        ("714 32", ["71432"], 0), ("key71432key", ["71432"], 1), ("071432", ["71432"], 0), ("seven", ["71432"], 0),
        ("-71432", ["71432"], 1), ("71432.0", ["71432"], 1), ("\n\n71432", ["71432"], 1), ("7 1 4 3 2", ["71432"], 0),
        ("It is: 71433", ["71432"], 0), ("(71432)", ["71432"], 1), ("71432 71433", ["71432"], 1)]),
    *(("number_string", text, gold, value) for text, gold, value in [
        ("3371111119", ["3371111119"], 1), ("337111111", ["3371111119"], 0), ("33711111119", ["3371111119"], 0),
        ("The number is 3371111119", ["3371111119"], 1), ("3,371,111,119", ["3371111119"], 0), ("", ["9"], 0),
        ("No. 1 is 3371111119", ["3371111119"], 0), ("**3371111119**", ["3371111119"], 1), ("nine", ["9"], 0)]),
    *(("kv_retrieval", text, gold, value) for text, gold, value in [
        (U, [U], 1), (f'"{U}"', [U], 1), (f'{{"key": "{U}"}}', [U], 1), (U.upper(), [U], 0), (U[:-1], [U], 0),
        (f"{U}x", [U], 0), (f"The value is {U}.", [U], 1), (f"not {U[::-1]}", [U], 0), (f"({U})", [U], 0),
        (f"a, {U}!", [U], 1), (f"{U}\nmore", [U], 1), ("", [U], 0)]),
]  # fmt: skip

GSM8K = [
    ("She has 3 + 4 = 7 apples.\n#### 7", "7", 1), ("#### 7", "7", 1), ("####7", "7", 1), ("#### 7.", "7", 1),
    ("#### 7.00", "7", 1), ("#### $7", "7", 1), ("#### 7 dollars", "7", 1), ("#### 1,007", "1007", 1),
    ("#### 1007", "1,007", 1), ("#### -7", "-7", 1), ("#### -7", "7", 0), ("#### 8", "7", 0), ("#### 70", "7", 0),
    ("#### 7\n#### 8", "8", 1), ("#### 7\n#### 8", "7", 0), ("The answer is 7.", "7", 1), ("The answer is 7!", "7", 1),
    ("The answer is $7 million", "7", 1), ("the answer is: 70%", "70", 1), ("7", "7", 1), ("7 and then 9", "9", 1),
    ("7 and then 9", "7", 0), ("seven", "7", 0), ("", "7", 0), ("It took 2 hours and 30 minutes", "30", 1),
    ("The answer is 5, so 2 of them are left: 2", "5", 1), ("#### 3.5", "3.5", 1), ("#### 3.50", "3.5", 1),
    ("#### 3.51", "3.5", 0), ("#### 1/2", "0.5", 1), ("#### 2,5", "25", 0), ("$18", "18", 1),
]  # fmt: skip
MATH_500 = [
    (r"So $\boxed{42}$.", "42", 1), (r"\boxed{42.0}", "42", 1), (r"\boxed{43}", "42", 0), (r"\fbox{42}", "42", 1),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1), (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1),
    (r"\boxed{\tfrac12}", r"\frac{1}{2}", 1), (r"\boxed{0.5}", r"\frac{1}{2}", 1), (r"\boxed{.5}", r"\frac{1}{2}", 1),
    (r"\boxed{1/2}", r"\frac{1}{2}", 1), (r"\boxed{\frac{1}{3}}", "0.33", 0), (r"\boxed{-\frac{1}{2}}", "-1/2", 1),
    (r"\boxed{x+1}", "x + 1", 1), (r"\boxed{1+x}", "x+1", 0), (r"\boxed{\sqrt{2}}", r"\sqrt{2}", 1),
    (r"\boxed{\sqrt 2}", r"\sqrt{2}", 0), (r"\boxed{(3,4)}", "(3, 4)", 1), (r"\boxed{(4,3)}", "(3,4)", 0),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)", 1),
    (r"\boxed{\left(3,\dfrac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})", 1), (r"\boxed{30^\circ}", "30", 1),
    (r"\boxed{30^{\circ}}", r"30^\circ", 1), (r"\boxed{25\%}", r"25\%", 1), (r"\boxed{\$5}", "5", 1),
    (r"\boxed{5\text{ units}}", "5", 1), (r"\boxed{12,345}", "12345", 1), (r"\boxed{10\,000}", "10000", 1),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 0),  # words are units in this answer
    (r"\boxed{2} or \boxed{3}", "3", 1), (r"\boxed{\{1, 2\}}", r"\{1,2\}", 1), (r"\boxed{}", "0", 0),
    (r"no box, but the answer is $\frac{3}{4}$", r"\frac{3}{4}", 1), ("no answer", "1", 0),
]  # fmt: skip

CASES = [
    *(("ruler", *case) for case in (*RULER, *RULER_QA)),
    *(("longbench", *case) for case in LONGBENCH_E),
    *(("infinitebench", *case) for case in INFINITE),
    *(("math", "gsm8k", text, [gold], value) for text, gold, value in GSM8K),
    *(("math", "math_500", text, [gold], value) for text, gold, value in MATH_500),
]


@pytest.mark.parametrize(("data", "name", "text", "golds", "value"), CASES)
def test_an_answer_is_worth_what_was_worked_out(data, name, text, golds, value):
    task = get_task(data, name)
    found = score_answer(task.metric, text, golds, CLASSES, task.first_line_only)
    assert found == pytest.approx(float(value), abs=1e-7)


def test_each_benchmark_has_its_thirty_cases_and_each_task_some():
    assert min(map(len, (RULER, RULER_QA, LONGBENCH_E, INFINITE, GSM8K, MATH_500))) >= 30
    counts = Counter(name for _, name, *_ in CASES)
    assert min(counts.values()) >= 2
    assert sum(name.endswith("_e") for name in counts) == 13  # the tasks of LongBench-E
    assert sum(data == "ruler" for data, _ in {(data, name) for data, name, *_ in CASES}) == 13
