"""Lengths of prompts and answers in each bin, which the grid and recall studies read."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kv_transition import parsing
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError

if TYPE_CHECKING:
    from kv_transition.paths import Paths
    from kv_transition.settings import Settings


def longest_answer(settings: Settings, task: str) -> int:
    """Return the maximum number of tokens of an answer to a task."""
    longest = settings.decoding.max_tokens
    return get_task(settings.dataset.name, task).max_new_tokens if longest == "task" else longest


def prompt_lengths(settings: Settings, files: Paths, task: str, bin: int) -> tuple[list[int], bool]:
    """Return the prompt tokens of a bin's examples, and whether they were counted rather than estimated."""
    path = files.bin(task, bin)
    with suppress(UserError):  # the file is missing, or damaged and will be written again
        return parsing.read_parquet(path, columns=["prompt_len"])["prompt_len"].to_pylist(), True
    n, bins = settings.binning.n_per_bin, settings.binning.n_bins
    lengths = settings.dataset.lengths
    if not lengths:
        return [settings.model.max_length] * n, False
    return [sorted(lengths)[bin * len(lengths) // bins]] * min(n, len(lengths) * settings.dataset.n_per_length), False
