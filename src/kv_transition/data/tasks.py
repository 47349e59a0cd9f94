"""The tasks and their properties.

Metrics, answer patterns and the use of chat templates follow LongBench (Bai et al. 2024, arXiv 2308.14508) and, for the
ruler tasks, RULER (Hsieh et al. 2024, arXiv 2404.06654). The prompt wordings and answer lengths in this module are this
project's own; LongBench's are read from its own files if those are given (see `kv_transition.data.templates`). This
module imports only the standard library, so that checking a configuration is fast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kv_transition import paths
from kv_transition.errors import UserError

METRICS = (
    "qa_f1",
    "rouge_l",
    "classification",
    "retrieval",
    "count",
    "code_sim",
    "string_match_all",
    "string_match_part",
)
METRICS += ("choice", "first_number", "word", "numeric", "instruction")
PATTERNS = ("short_qa", "trec_class", "paragraph", "number", "free")


@dataclass(frozen=True)
class Task:
    """The properties of one task.

    Attributes:
        name: as in the configuration and in paths.
        metric: one of ``METRICS``; the meaning of ``score`` for this task.
        pattern: one of ``PATTERNS``; an answer of another form is a FORMAT_ERROR.
        template: this project's wording of the prompt, with ``{context}`` and, if there is a question, ``{input}``.
        max_new_tokens: this project's maximum length of an answer in tokens.
        has_question: False for summaries, counts and code, which have no before_question mode.
        chat_template: False if the prompt is fed without a chat template even to a chat model.
        first_line_only: only the first line of an answer counts.
    """

    name: str
    metric: str
    pattern: str
    template: str
    max_new_tokens: int
    has_question: bool = True
    chat_template: bool = True
    first_line_only: bool = False

    @property
    def source_name(self) -> str:
        """Return the task's name in LongBench's own files."""
        return self.name.replace("repobench_p", "repobench-p")


_READ = "Read the text below. A question about it follows.\n\n{context}\n\n"
_SHORT = "Give only the answer, in as few words as possible.\n\nQuestion: {input}\nAnswer:"
_FEW_SHOT = "{context}\n\n{input}"

_SHORT_QA = Task("", "qa_f1", "short_qa", _READ + _SHORT, max_new_tokens=48)
_SUMMARY = Task(
    "",
    "rouge_l",
    "free",
    "Read the text below and summarize it.\n\n{context}\n\nWrite a summary of about one page.\n\nSummary:",
    max_new_tokens=400,
    has_question=False,
)
_CODE = Task(
    "",
    "code_sim",
    "free",
    "Below is source code. Write the line that comes next.\n\n{context}{input}\nThe next line is:\n",
    max_new_tokens=48,
    has_question=False,
    chat_template=False,
)

_LONGBENCH = {
    **dict.fromkeys(("narrativeqa", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), _SHORT_QA),
    "qasper": replace(
        _SHORT_QA,
        template=_READ + 'Where the text does not hold the answer, answer "unanswerable". ' + _SHORT,
    ),
    "gov_report": _SUMMARY,
    "multi_news": _SUMMARY,
    "qmsum": replace(
        _SUMMARY,
        template="Read the meeting's transcript below. A request follows.\n\n{context}\n\n"
        "Reply in a few sentences.\n\nRequest: {input}\nReply:",
        has_question=True,
    ),
    "trec": Task(
        "",
        "classification",
        "trec_class",
        "Every question below is followed by its type. Name the type of the last one.\n\n" + _FEW_SHOT,
        max_new_tokens=24,
        chat_template=False,
        first_line_only=True,
    ),
    "triviaqa": replace(
        _SHORT_QA,
        template="Answer the last question from its passage, as the examples before it do.\n\n" + _FEW_SHOT,
        chat_template=False,
        first_line_only=True,
    ),
    "samsum": replace(
        _SUMMARY,
        template="Summarize the last dialogue, as the examples before it do.\n\n" + _FEW_SHOT,
        max_new_tokens=100,
        has_question=True,
        chat_template=False,
        first_line_only=True,
    ),
    "passage_count": Task(
        "",
        "count",
        "number",
        "Some of the numbered paragraphs below are repeated.\n\n{context}\n\n"
        "How many different paragraphs are there? Reply with a number only.\n\nAnswer: ",
        max_new_tokens=16,
        has_question=False,
    ),
    "passage_retrieval_en": Task(
        "",
        "retrieval",
        "paragraph",
        "Read the numbered paragraphs below. A summary of one of them follows.\n\n{context}\n\n"
        'Summary: {input}\n\nWhich paragraph is it? Reply with "Paragraph" and its number only.\n\nAnswer: ',
        max_new_tokens=16,
    ),
    "lcc": replace(_CODE, template=_CODE.template.replace("{input}", "")),
    "repobench_p": _CODE,
}

# LongBench-E: the same tasks with examples that are spread evenly over three ranges of length
_LONGBENCH_E = {f"{name}_e": _LONGBENCH[name] for name in _LONGBENCH if name not in ("narrativeqa", "musique", "qmsum")}

# The prompt of `kv_transition.data.synthetic.QUESTION_TEMPLATE`, which the embedded reader is trained on.
_READER_QA = Task(
    "",
    "qa_f1",
    "short_qa",
    "{context}\nQuestion : {input} Answer :",
    max_new_tokens=16,
    chat_template=False,
)

# These tasks require every answer, not the best of several. `kv_transition.data.ruler` makes the documents.
_NEEDLE = Task(
    "",
    "string_match_all",
    "number",
    "Locker codes are mentioned in the text below. Remember them: a question about them follows.\n\n{context}\n\n"
    "Question: {input}\nReply with the code only.\nAnswer:",
    max_new_tokens=48,
)
_RULER = {
    "niah_single": _NEEDLE,
    "niah_multikey": _NEEDLE,
    "niah_multivalue": replace(
        _NEEDLE, template=_NEEDLE.template.replace("the code only", "all of them"), max_new_tokens=128
    ),
    "variable_tracking": Task(
        "",
        "string_match_all",
        "free",
        "Variables are set in the text below, to a value or to what another variable has. Keep track of them: a "
        "question about them follows.\n\n{context}\n\nQuestion: {input}\nReply with the names of all of them.\nAnswer:",
        max_new_tokens=48,
    ),
    "common_words": Task(
        "",
        "string_match_all",
        "free",
        "Below is a list of invented words, some of which stand in it many times.\n\n{context}\n\n"
        "Question: {input}\nReply with these words only.\nAnswer:",
        max_new_tokens=48,
    ),
    **dict.fromkeys(("niah_repeat", "niah_needles"), _NEEDLE),
    **dict.fromkeys(("niah_uuid", "niah_uuid_needles"), replace(_NEEDLE, max_new_tokens=64)),
    "niah_multiquery": replace(
        _NEEDLE, template=_NEEDLE.template.replace("the code only", "all of them"), max_new_tokens=128
    ),
    "frequent_words": Task(
        "",
        "string_match_all",
        "free",
        "Below is a coded text. Count how often each coded word stands in it.\n\n{context}\n\n"
        "Question: {input}\nReply with these words only.\nAnswer:",
        max_new_tokens=48,
    ),
    **dict.fromkeys(("qa_squad", "qa_hotpot"), replace(_SHORT_QA, metric="string_match_part", max_new_tokens=32)),
}

_REASON = Task(
    "",
    "numeric",
    "free",
    "{context}\n\nReason step by step. End with a line that holds #### and the final answer alone.\n",
    max_new_tokens=2048,
    has_question=False,
)
_BENCHMARKS = {
    "longbench_v2": {
        "longbench_v2": Task(
            "",
            "choice",
            "free",
            _READ + "Question: {input}\n\nReply with one letter, in this form: The correct answer is (A).\n",
            max_new_tokens=128,
        )
    },
    "infinitebench": {
        "passkey": Task(
            "",
            "first_number",
            "number",
            "A number is hidden in the long text below. Find it and remember it.\n\n{context}\n\n{input}\nAnswer:",
            max_new_tokens=6,
        ),
        "number_string": Task(
            "",
            "first_number",
            "number",
            "A sequence of digits is hidden in the long text below. Find it and remember it.\n\n{context}\n\n{input}\n"
            "Answer:",
            max_new_tokens=12,
        ),
        "kv_retrieval": Task(
            "", "word", "free", "Take the value of a key from the JSON object below.\n\n{context}\n\n{input}\n", 50
        ),
    },
    "math": {"gsm8k": replace(_REASON, max_new_tokens=1024), "math_500": _REASON},
    "ifeval": {"ifeval": Task("", "instruction", "free", "{context}", max_new_tokens=1024, has_question=False)},
}

_TASKS = {
    "synthetic": {name: replace(_READER_QA, name=name) for name in ("reader_qa", "reader_ambiguous", "reader_mixed")},
    "ruler": {name: replace(task, name=name) for name, task in _RULER.items()},
    "longbench": {name: replace(task, name=name) for name, task in (_LONGBENCH | _LONGBENCH_E).items()},
    **{data: {name: replace(task, name=name) for name, task in own.items()} for data, own in _BENCHMARKS.items()},
}
OF_FILES = frozenset(_BENCHMARKS)
"""data sets that are read from the benchmark's own files, see `data.benchmarks`"""
FILES = {
    "longbench_v2": ("longbench_v2", "data"),
    "passkey": ("passkey",),
    "number_string": ("number_string",),
    "kv_retrieval": ("kv_retrieval",),
    "gsm8k": ("gsm8k", "test"),
    "math_500": ("math_500", "test"),
    "ifeval": ("ifeval", "input_data", "ifeval_input_data"),
}
"""allowed file names of each task, in the order in which they are searched"""
DATASETS = (*_TASKS, "jsonl")


def get_task(dataset: str, task: str) -> Task:
    """Return the task ``task`` of the data set ``dataset``; a ``jsonl`` data set accepts any task name.

    Raises:
        UserError: there is no such data set, or no such task in it.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset.name: {dataset!r} is not allowed; choose one of {', '.join(DATASETS)}")
    if dataset == "jsonl":
        if not re.fullmatch(paths.TASK, task):
            raise UserError(f"dataset.tasks: {task!r} must consist of lower-case letters, digits and '_'")
        return replace(_SHORT_QA, name=task, max_new_tokens=64)
    if task not in _TASKS[dataset]:
        allowed = ", ".join(_TASKS[dataset])
        raise UserError(f"dataset.tasks: {dataset} has no task {task!r}; choose from {allowed}")
    return _TASKS[dataset][task]
