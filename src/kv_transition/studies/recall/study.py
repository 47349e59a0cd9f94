"""The recall study: comparison of the entries that policies would hold with the entries that each step attends to."""

from kv_transition.studies.recall import plan, specs
from kv_transition.studies.study import Study

STUDY = Study(
    name="recall",
    there=lambda settings: settings.observe.enabled,
    lacking="the experiment observes nothing; add observe: {enabled: true}",
    rules={"run": ("observe",), "observe": ("observation_checks", "entropy_recall_plots")},
    command="observe",
    help="Compare the entries that policies would hold with those that each step needs.",
    check=specs.check,
    statistics=specs.statistics,
    work=plan.work,
)
