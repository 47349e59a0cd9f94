"""Test that every value in a range that the server documents is answered or refused, without a fault of the server."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fastapi.testclient import TestClient
from models import tokens
from serving import NAME, ask, served

from kv_transition.engines.local import GREEDY_BELOW
from kv_transition.policies import catalog
from kv_transition.serve.app import create_app

NUMBERS = [0, 1, 2, 3, 64, 10**6, 2**31, 2**63, 10**30, 10**400, -1]
FRACTIONS = [0.0, 5e-324, 1e-300, 1e-9, 0.5, 1.0, 2.0, 1e38, 1e39, 1.7e308, math.inf, -math.inf, math.nan]
FIELDS = [(kind, name) for kind in catalog.kinds() for name in catalog.describe(kind).fields]


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(served()), raise_server_exceptions=False) as client:
        yield client


def post(client, **body):
    """Send JSON that may contain infinities and NaN, which Python's own parser accepts."""
    content = json.dumps({"model": NAME, "temperature": 0, "max_tokens": 3} | body)
    return client.post("/v1/completions", content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=["-".join(field) for field in FIELDS])
def test_any_value_of_a_hyper_parameter_is_used_or_refused(client, kind, name):
    own = catalog.ignores_budget(*catalog.resolve(kind, {"kind": kind}))
    statuses = set()
    for value in [*NUMBERS, *FRACTIONS, None, True, "", "mean", [], {}]:
        policy = {"kind": kind, name: value}
        got = post(
            client, prompt=tokens(40), kv_context=30, kv_policy=policy, **({} if own else {"kv_budget": {"tokens": 9}})
        )
        assert got.status_code in (200, 400), (value, got.text)
        statuses.add(got.status_code)
    assert 400 in statuses


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-7, GREEDY_BELOW / 2])
def test_a_temperature_next_to_zero_is_greedy(client, temperature):
    greedy = ask(client, prompt="w5 w6 w7", max_tokens=12)
    cold = ask(client, prompt="w5 w6 w7", max_tokens=12, temperature=temperature)
    assert cold["kv"]["token_ids"] == greedy["kv"]["token_ids"]
    assert cold["kv"]["seed"] == 0


@pytest.mark.parametrize("temperature", [GREEDY_BELOW, 1e-4, 1e-3, 99, 100])
def test_every_other_temperature_draws(client, temperature):
    """Check that at the lowest of these temperatures the sample is the most likely token, because no two logits are
    close."""
    got = ask(client, prompt="w5 w6 w7", max_tokens=12, temperature=temperature, seed=1)
    if temperature < 1e-3:
        assert got["kv"]["token_ids"] == ask(client, prompt="w5 w6 w7", max_tokens=12)["kv"]["token_ids"]
    assert len(got["kv"]["token_ids"]) == 12


def test_the_engine_draws_from_a_distribution_down_to_its_limit():
    """Check the engine itself, because cells of a configuration may have such a temperature as well."""
    engine = served().engine
    logits = torch.tensor([[-3.0e4, 2.9e4, 3.0e4, 5.0]])
    for temperature in (0.0, 5e-324, 1e-300, 1e-40, GREEDY_BELOW, 1e-3):
        assert engine.next_tokens(logits, temperature, [torch.Generator().manual_seed(0)]) == [2]


@pytest.mark.parametrize("pace", [[0, 0], [1, 1], [3, 65_536], [65_536, 65_536], [2, 1], [0, 10**9], [10**30, 10**30]])
@pytest.mark.parametrize("moments", ["random", "periodic"])
def test_any_pace_is_kept_or_refused(client, pace, moments):
    policy = {"kind": "entropy_recall", "moments": moments}
    got = post(client, prompt=tokens(20), kv_policy=policy, kv_budget=0.5, kv_pace=pace)
    fits = pace[0] <= pace[1] <= 65_536
    assert got.status_code == (200 if fits else 400), got.text
    if not fits:
        assert got.json()["error"]["param"].startswith("kv_pace")


@pytest.mark.parametrize("budget", [5e-324, 1e-10, 1e-9, 0.9999999999, 1, {"tokens": 1}, {"tokens": 10**400}])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "pyramidkv", "adakv", "streaming_llm"])
def test_any_budget_is_kept_or_refused(client, policy, budget):
    for mode in ("after_prompt", "before_question"):
        got = post(client, prompt=tokens(20), kv_context=10, kv_policy=policy, kv_budget=budget, kv_mode=mode)
        assert got.status_code in (200, 400), got.text


def test_a_stop_sequence_as_long_as_a_body_may_be_costs_no_more_than_a_short_one(client):
    """Check that comparisons are limited to the length of the answer; quadratic cost in this length would take
    hours."""
    got = post(client, prompt="w5", stop=["w" * 3_000_000, "w1 " * 1_000_000], max_tokens=6)
    assert got.status_code == 200
