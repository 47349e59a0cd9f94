"""The grid study: every task, mode, policy, budget and length bin."""

from kv_transition.studies.grid import plan, specs
from kv_transition.studies.study import Study

STUDY = Study(
    name="grid",
    there=lambda settings: settings.dataset is not None,
    lacking="the experiment has no dataset, so there are no tasks to answer; add one, such as "
    "dataset: {name: synthetic, lengths: [256, 512], n_per_length: 20}",
    rules={"prepare": ("prepare",), "run": ("cell",), "score": ("score",)},
    check=specs.check,
    work=plan.work,
)
