"""Test how much memory a batch of answers takes while it is decoded."""

from __future__ import annotations

import torch
from models import engine as tiny
from models import tokens
from torch.profiler import ProfilerActivity, profile

from kv_transition.budget import Budget
from kv_transition.policies import catalog
from kv_transition.run.decode import Answer, Setting, answer_all

CONTEXT, SEQUENCES = 1500, 8


def peak(work) -> int:
    """Return the largest number of bytes that are allocated during ``work`` beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_a_batch_takes_less_than_three_times_its_caches():
    """Compare with the caches of all answers: each answer has one, and the batch replaces them layer by layer.

    Answers end at different steps. The batch of those that remain is a copy, and nothing keeps the batches before it.
    """
    engine = tiny("qwen2")
    setting = Setting(catalog.create("full", {}), Budget.of_fraction(1), "before_question")
    question = tokens(3, seed=9)
    prefills = [engine.prefill(tokens(CONTEXT, seed=i), question, frozenset()) for i in range(SEQUENCES)]
    answers = [Answer(i, 2 + i) for i in range(SEQUENCES)]
    caches = sum(prefill.context.nbytes for prefill in prefills)
    with torch.inference_mode():
        used = peak(lambda: answer_all(engine, prefills, [question] * SEQUENCES, setting, answers))
    assert sorted(len(answer.tokens) for answer in answers) == [2 + i for i in range(SEQUENCES)]
    assert caches < used < 3 * caches
