"""Perplexity of text that is scored from a compressed cache."""

from kv_transition.studies.perplexity import plan, specs
from kv_transition.studies.study import Study

STUDY = Study(
    name="perplexity",
    there=lambda settings: settings.perplexity is not None,
    lacking="the experiment scores no text; add the section perplexity, such as "
    "perplexity: {corpus: text, path: books/}",
    rules={
        "prepare": ("perplexity_windows",),
        "run": ("perplexity",),
        "perplexity": ("perplexity_stats", "perplexity_plots"),
    },
    command="perplexity",
    help="Measure the perplexity of text that is scored from compressed caches.",
    check=specs.check,
    work=plan.work,
)
