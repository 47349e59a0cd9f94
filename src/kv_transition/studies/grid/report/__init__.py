"""The grid's part of the report."""

from __future__ import annotations

from kv_transition.report.section import Section
from kv_transition.studies.grid.report import allocation, depth

FIGURES = {
    "acc_vs_len": ("Score", "Mean score against document length, one panel per mode and budget."),
    "failrate_vs_len": ("Failures", "Share of answers that failed: said to be unknown, or broken."),
    "unknown_vs_len": ("“Unknown”", "Share of answers that say that the answer is not known, where it is there."),
    "broken_vs_len": ("Broken answers", "Share of answers that are empty, degenerate, truncated and so on."),
    "failures": ("Kinds of failure", "What the failed answers look like, over all lengths."),
    "differences": ("Differences", "Score minus the full cache's on the same examples, over all lengths."),
    "front": ("Score against bytes", "Score kept against bytes kept, both of the full cache's, over all lengths."),
    "latency_vs_len": ("Time", "Median time to the whole answer: reading, compressing, decoding; at batch size 1."),
    "std_vs_len": ("Spread", "Standard deviation of the score between examples. For scores of 0 and 1 it is a function "
                   "of the mean and shows nothing of its own."),
}  # fmt: skip
SECTIONS = (
    Section("allocation", "Adaptive allocation", allocation.build),
    Section("depth", "Depth of the needle", depth.build),
)
