"""Conversations on one growing cache that is compressed between turns."""

from kv_transition.studies.chat import plan, specs
from kv_transition.studies.study import Study

STUDY = Study(
    name="chat",
    there=lambda settings: settings.chat is not None,
    lacking="the experiment has no conversations; add the section chat, such as chat: {source: generated, n: 20}",
    rules={
        "prepare": ("conversations",),
        "run": ("chat",),
        "score": ("chat_verdicts",),
        "chat": ("memory_table", "retention_plots"),
    },
    command="chat",
    help="Play conversations on a cache that is compressed turn by turn.",
    check=specs.check,
    work=plan.work,
)
