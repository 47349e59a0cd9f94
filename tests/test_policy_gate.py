"""Test common requirements of all registered policies.

A policy may be observed beside the full cache only if its shadow holds the entries that it keeps in a cell, if it
uses nothing of the step that it predicts or of a later one, and if its cost is at most linear in the cache length.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models import engine, tokens
from policy_states import random_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kv_transition.budget import Budget
from kv_transition.cache.state import STATISTICS
from kv_transition.policies import catalog
from kv_transition.policies.base import Policy
from kv_transition.studies.recall import run as observe
from kv_transition.studies.recall import specs as recall_specs
from kv_transition.studies.recall.ranking import Scores
from kv_transition.studies.recall.shadow import GRANULARITIES, MEMORIES, Oracle, held_by, shadow

KINDS = [k for k in catalog.kinds() if not recall_specs.why_not_observed(k, catalog.hyper_parameters(k))]
BUDGET = Budget.parse("r0.2")


def policy_of(kind: str) -> Policy:
    return catalog.create(kind, catalog.hyper_parameters(kind))


def shadow_of(kind: str, policy: Policy | None = None, budget: Budget = BUDGET):
    return shadow(kind, kind, policy or policy_of(kind), budget, GRANULARITIES, MEMORIES, seed=5)


def test_every_registered_policy_is_here_or_says_why_not():
    """Check that this file tests every registered policy except full, quantized, entropy_merge and entropy_recall."""
    left_out = set(catalog.kinds()) - set(KINDS)
    assert left_out <= {"full", "quantized", "entropy_merge", "entropy_recall"}
    assert {"h2o", "snapkv", "tova", "adakv", "entropy_drop"} <= set(KINDS)


@pytest.mark.parametrize("budget", ["r0.1", "r0.2", "r0.5"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_prompts_end_the_shadow_holds_what_the_policy_keeps(kind, budget):
    """Check that at the end of the prompt the shadow holds the entries that the policy keeps in a cell."""
    state, _ = random_state(90, seed=3)
    policy, budget = policy_of(kind), Budget.parse(budget)
    each = shadow_of(kind, policy, budget)
    each.begin(Scores(state))
    kept = held_by(policy.compress(state, budget.kept(90), seed=5), 90)
    for memory in MEMORIES:
        assert torch.equal(each.predict(Scores(state))["per_head", memory], kept)


@pytest.mark.parametrize("kind", [k for k in KINDS if policy_of(k).by_score])
def test_scores_differ_only_if_what_they_depend_on_differs(kind):
    """Check that budgets of which a policy says that they have the same scores have the same scores."""
    state, _ = random_state(90, seed=3)
    policy, (layer, *_) = policy_of(kind), state.layers
    first: dict = {}
    for k in range(1, 90):
        score = policy.score(layer, 0, k, state.length, 5)
        assert torch.equal(score, first.setdefault(policy.score_basis(k), score)), k


def test_a_policy_that_names_too_little_of_the_budget_would_be_found():
    """Check that the test above would detect a policy like this one."""

    @dataclass(frozen=True)
    class Careless(type(policy_of("h2o"))):
        def score_basis(self, k):
            return None

    state, _ = random_state(90, seed=3)
    scores = [Careless().score(state.layers[0], 0, k, state.length, 5) for k in (10, 40)]
    assert not torch.equal(*scores)


# no use of the predicted step or of a later one


class Liar:
    """An engine that from one step on reads another token and returns other attention rows."""

    def __init__(self, step: int):
        self.engine, self.lies_from, self.steps = engine("qwen2"), step, 0
        self.eos, self.device = frozenset(), torch.device("cpu")

    def extend(self, state, ids, statistics, room=0, seen=None):
        lie = self.steps >= self.lies_from
        self.steps += 1
        after = self.engine.extend(state, [(ids[0] + 17) % 97] if lie else ids, statistics, room, seen)
        if lie and seen:
            seen[:] = [row.flip(-1) for row in seen]
        return after


def predictions(model, each, steps: int) -> list[dict]:
    found = []
    predict = each.predict

    def recorded(scores):
        sets = predict(scores)
        found.append(sets)
        return sets

    each.predict = recorded  # the run adds the hindsight sets of the step to this dict, if there are any
    observe.follow(model, engine("qwen2").extend(None, tokens(60), STATISTICS | each.policy.statistics), [each], steps)
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_knows_nothing_of_its_step_or_a_later_one(kind):
    truth = predictions(Liar(100), shadow_of(kind), 5)
    for step in range(5):
        told = predictions(Liar(step), shadow_of(kind), 5)
        for t in range(step + 1):
            assert truth[t]
            assert same(told[t], truth[t]), f"step {t} knew of step {step}"


def test_the_oracle_would_not_pass():
    """Check that the oracle's predictions change with the step itself, so that the test above would detect a policy
    like it."""
    oracle = Oracle("oracle", Policy(), BUDGET, GRANULARITIES, MEMORIES)
    truth, told = (predictions(Liar(step), oracle, 3) for step in (100, 1))
    assert not same(truth[1], told[1])


# cost


class Allocated(TorchDispatchMode):
    """Count the numbers in the tensors that operations return."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.count += tensor.numel()
        return out


def cost(each, n: int) -> tuple[int, int]:
    """Return the numbers allocated and the floating-point operations of products while a shadow begins and predicts a
    step."""
    state, _ = random_state(n, seed=1, layers=1)
    with FlopCounterMode(display=False) as flops, Allocated() as allocated:
        each.begin(Scores(state))
        each.predict(Scores(state))
    return allocated.count, flops.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_cost_grows_at_most_linearly_with_the_cache(kind):
    assert linear(lambda: shadow_of(kind))


def linear(make) -> bool:
    small, large = cost(make(), 600), cost(make(), 1200)
    return all(after <= 2.05 * before for before, after in zip(small, large, strict=True))


@dataclass(frozen=True)
class AllPairs(Policy):
    def score(self, layer, index, k, length, seed):
        return (layer.keys @ layer.keys.mT).sum(-1)


def test_a_policy_that_compares_all_pairs_does_not_pass():
    assert not linear(lambda: shadow_of("all_pairs", AllPairs()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_reads_no_more_than_it_names(kind):
    """Check that a policy is observed without the statistics that it does not declare."""
    state, _ = random_state(60, seed=2)
    policy = policy_of(kind)
    less = tuple(layer.without(STATISTICS - policy.statistics) for layer in state.layers)
    each = shadow_of(kind, policy)
    bare = type(state)(less, state.length, state.logits)
    each.begin(Scores(bare))
    assert each.predict(Scores(bare))
