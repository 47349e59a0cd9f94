"""Test that the table of tasks is complete and consistent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transition.data import synthetic, tasks
from kv_transition.data.prompts import Template
from kv_transition.data.tasks import DATASETS, METRICS, PATTERNS, get_task
from kv_transition.errors import UserError

QA = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa")
SUMMARIES = ("gov_report", "qmsum", "multi_news", "samsum")
SOURCE = str(Path(tasks.__file__).parents[2])
ENGLISH = (*QA, *SUMMARIES, "trec", "passage_count", "passage_retrieval_en", "lcc", "repobench_p")
EVERY = [("longbench", name) for name in ENGLISH] + [("synthetic", "reader_qa"), ("jsonl", "my_task")]


@pytest.mark.parametrize(("dataset", "name"), EVERY)
def test_every_task_is_complete(dataset, name):
    task = get_task(dataset, name)
    assert task.name == name
    assert task.metric in METRICS
    assert task.pattern in PATTERNS
    assert task.max_new_tokens >= 1
    template = Template.parse(task.template, name)
    assert template.has_question or not task.has_question


def test_the_metrics_are_longbenchs():
    groups = {
        "qa_f1": QA,
        "rouge_l": SUMMARIES,
        "classification": ("trec",),
        "retrieval": ("passage_retrieval_en",),
        "count": ("passage_count",),
        "code_sim": ("lcc", "repobench_p"),
    }
    expected = {name: metric for metric, names in groups.items() for name in names}
    assert {name: get_task("longbench", name).metric for name in ENGLISH} == expected


def test_the_exceptions():
    table = {name: get_task("longbench", name) for name in ENGLISH}
    assert {n for n, t in table.items() if not t.chat_template} == {"trec", "triviaqa", "samsum", "lcc", "repobench_p"}
    assert {n for n, t in table.items() if t.first_line_only} == {"trec", "triviaqa", "samsum"}
    without = {"gov_report", "multi_news", "passage_count", "lcc", "repobench_p"}
    assert {n for n, t in table.items() if not t.has_question} == without
    assert {n: t.source_name for n, t in table.items() if t.source_name != n} == {"repobench_p": "repobench-p"}
    assert not get_task("synthetic", "reader_qa").chat_template


def test_the_embedded_readers_prompt_is_the_one_it_is_trained_on():
    template = Template.parse(get_task("synthetic", "reader_qa").template, "t")
    context, question = template.fill("CCC", "QQQ")
    assert context + question == "CCC" + synthetic.QUESTION_TEMPLATE.format(question="QQQ")
    assert context == "CCC"


@pytest.mark.parametrize(
    ("dataset", "name", "named"),
    [
        ("longbnch", "hotpotqa", ["dataset.name", *DATASETS]),
        ("longbench", "hotpot", ["dataset.tasks", *ENGLISH]),
        ("longbench", "repobench-p", ["repobench_p"]),
        ("synthetic", "hotpotqa", ["dataset.tasks", "reader_qa"]),
        ("jsonl", "My Task", ["dataset.tasks", "lower-case"]),
    ],
)
def test_unknown_names_are_answered_with_the_allowed_ones(dataset, name, named):
    with pytest.raises(UserError) as error:
        get_task(dataset, name)
    assert all(text in str(error.value) for text in named)


def test_the_table_is_light():
    heavy = "any(name in sys.modules for name in ('pyarrow', 'numpy', 'torch', 'pydantic'))"
    code = f"import sys, kv_transition.data.tasks; sys.exit({heavy})"
    env = {**os.environ, "PYTHONPATH": SOURCE}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
