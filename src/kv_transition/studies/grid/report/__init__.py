"""The grid's part of the report: its figures and sections."""

from __future__ import annotations

from kv_transition.report.section import Section
from kv_transition.studies.grid.report import allocation, depth

FIGURES = {
    "acc_vs_len": ("Score", "Mean score against document length, one panel per mode and budget."),
    "failrate_vs_len": ("Failures", "Share of answers that failed: answers “unknown” and broken answers."),
    "unknown_vs_len": ("“Unknown”", "Share of answers “unknown” although the document contains the answer."),
    "broken_vs_len": ("Broken answers", "Share of answers that are empty, degenerate, truncated or malformed."),
    "failures": ("Kinds of failure", "Failed answers by kind of failure, over all lengths."),
    "differences": ("Differences", "Score minus the full cache's score on the same examples, over all lengths."),
    "front": ("Score against bytes", "Score kept against bytes kept, relative to the full cache, over all lengths."),
    "latency_vs_len": ("Time", "Median time of a whole answer: prefill, compression and decoding, at batch size 1."),
    "entries_over_steps": ("Entries held over the answer", "Entries per KV head over the prompt's budget, before each "
                           "token of the answer, with decoding.compress_every: mean and range over the answers."),
    "std_vs_len": ("Spread", "Standard deviation of the score between examples. For scores of 0 and 1 it is a function "
                   "of the mean and adds no information."),
}  # fmt: skip
SECTIONS = (
    Section("allocation", "Adaptive allocation", allocation.build),
    Section("depth", "Depth of the needle", depth.build),
)
