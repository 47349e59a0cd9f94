"""What `kv_transition serve` does with a model, without HTTP: its queue, its scheduler and its shared steps."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gpu_bench import Bench

from kv_transition.budget import Budget
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.run.decode import Setting
from kv_transition.serve.model import Reply, Served
from kv_transition.serve.prefills import Prefills
from kv_transition.serve.work import Asked, Prompt
from kv_transition.serve.worker import Job, Worker

AT_ONCE = 8
SHORT = 2
"""tokens of the answer that is not measured"""
WISHES = {"full": "r1", "snapkv": "r0.2", "h2o": "r0.2"}
"""policies and their budgets; h2o acts at each step"""


def serve(bench: Bench) -> None:
    """Measure answers per second of requests one at a time and of 8 at once; each prompt is read for each answer."""
    for kind, budget in WISHES.items():
        for at_once in (1, AT_ONCE):
            what = {"what": f"answers, {kind} {budget}", "n": bench.sizes.served, "at_once": at_once}
            bench.add(what, answers, kind, budget, at_once)


def answers(bench: Bench, kind: str, budget: str, at_once: int) -> dict[str, Any]:
    # a server has an engine of its own, which shares passes
    engine = LocalEngine(bench.engine.model)
    engine.share_passes()
    served = Served("bench", engine, Prefills(engine, max_bytes=0), max_length=bench.sizes.served + bench.sizes.answer)
    worker = Worker(served.step, limit=AT_ONCE, batch=AT_ONCE)
    hyper = hyper_parameters(kind)
    setting = Setting(create(kind, hyper), Budget.parse(budget), "after_prompt")
    number = AT_ONCE if at_once > 1 else bench.sizes.alone
    try:
        return asyncio.run(
            _measured(bench, served, worker, Asked(kind, hyper, setting, 0, None, (), None), number, at_once)
        )
    finally:
        worker.stop()


async def _measured(
    bench: Bench, served: Served, worker: Worker[Reply], asked: Asked, number: int, at_once: int
) -> dict[str, Any]:
    async def answer(prompt: Prompt, tokens: int) -> Reply:
        job: Job[Reply] = Job(
            lambda job: served.begin(asked, prompt, tokens, lambda tokens: False), lambda job, reply: reply
        )
        worker.submit(job)
        told = await job.next()
        if isinstance(told, Exception):
            raise told
        return told

    prompts = [_prompt(bench, i) for i in range(number)]
    await answer(prompts[0], SHORT)
    bench.clean()
    bench.sync()
    started = time.perf_counter()
    if at_once > 1:
        replies = await asyncio.gather(*(answer(prompt, bench.sizes.answer) for prompt in prompts))
    else:
        replies = [await answer(prompt, bench.sizes.answer) for prompt in prompts]
    bench.sync()
    seconds = time.perf_counter() - started
    got = [reply.going.answer for reply in replies]
    return {
        "answers": number,
        "answers_per_s": number / seconds,
        "tokens_per_s": sum(len(each.tokens) for each in got) / seconds,
        "most_at_once": max(each.batch_size for each in got),
        "prefill_s": sum(each.prefill_s for each in got) / number,
        "peak_gib": bench.peak_gib(),
    }


def _prompt(bench: Bench, number: int) -> Prompt:
    ids = bench.tokens(bench.sizes.served + number)[number:]
    return Prompt(ids[:-1], ids[-1:])
