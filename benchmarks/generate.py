"""The cost of generate() with an EvictingCache, compared with LocalEngine and a plain cache, in CPU time on one thread.

    python benchmarks/generate.py [--model FOLDER] [--context N] [--tokens N] [--rounds N]

Prints, for each policy, the median over rounds of the seconds of one answer in each way, and the ratio of generate() to
LocalEngine, with its range over rounds. The ways alternate within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

import kv_transition as kvt
from kv_transition.api.chosen import setting_of
from kv_transition.run.decode import answer

POLICIES = {"full": None, "snapkv": 0.2, "h2o": 0.2, "tova": 0.2}


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resources/tiny-reader")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = kvt.load(options.model, device="cpu").engine
    model = engine.model
    # both ways draw as many tokens
    model.generation_config.eos_token_id, engine.eos = None, frozenset()
    ids = torch.randint(5, model.config.vocab_size, (1, options.context), generator=torch.Generator().manual_seed(0))
    prompt, drawn = ids[0].tolist(), {"max_new_tokens": options.tokens}

    def plain(cache: object = None) -> list[int]:
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, pad_token_id=0, **drawn)
        return out[0, options.context :].tolist()

    for policy, budget in POLICIES.items():
        setting = setting_of(policy, budget, "after_prompt")

        def ours(setting=setting) -> list[int]:
            prefill = engine.prefill(prompt[:-1], prompt[-1:], setting.policy.statistics)
            return answer(engine, prefill, prompt[-1:], setting, options.tokens, 0).tokens

        def generated(policy=policy, budget=budget) -> list[int]:
            return plain(kvt.EvictingCache(model, policy, budget))

        assert ours() == generated()
        rounds = [[seconds(way) for way in (ours, generated, plain)] for _ in range(options.rounds)]
        own, held, bare = (median(column) for column in zip(*rounds, strict=True))
        ratios = [r[1] / r[0] for r in rounds]
        print(
            f"{policy:8} LocalEngine {own:.3f} s, generate() {held:.3f} s, plain cache {bare:.3f} s; "
            f"generate()/LocalEngine {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), n = {len(ratios)}"
        )


if __name__ == "__main__":
    main()
