"""Compare the entries that policies would hold beside a full cache with loops over eager attention."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, engine, reference, sliding_model, tokens
from policy_states import best as best_of

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.budget import Budget
from kv_transition.cache.store import PrefillStore
from kv_transition.errors import UserError
from kv_transition.policies.base import top
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.provenance import write_table
from kv_transition.run.decode import Setting
from kv_transition.run.decode import answer as answer_plainly
from kv_transition.studies.recall import run as observe
from kv_transition.studies.recall import specs as recall_specs
from kv_transition.studies.recall.analysis import write_entropy_recall
from kv_transition.studies.recall.checks import check, write_checks
from kv_transition.studies.recall.plots import write_entropy_recall_plots
from kv_transition.studies.recall.ranking import Ranking, without_lowest
from kv_transition.studies.recall.shadow import GRANULARITIES, MEMORIES, thinned
from kv_transition.studies.recall.step_logs import write_logs
from kv_transition.studies.recall.tables import OBSERVATION_CHECKS, OBSERVATION_LAYERS, OBSERVATIONS

N, STEPS = 40, 8
BUDGETS = ("r0.1", "r0.2", "r0.3", "r0.5")
# No token occurs twice, because equal tokens have keys of equal norm up to rounding.
PROMPT = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[:N].tolist()
WRITTEN = ("h2o", "h2o_heavy", "streaming_llm", "snapkv", "knorm", "tova")

SPEC = {
    "policies": {
        kind: {"kind": kind, "hyper_parameters": {} if kind == "oracle" else hyper_parameters(kind)}
        for kind in (*WRITTEN, "pyramidkv", "adakv", "oracle")
    },
    "budgets": list(BUDGETS),
    "granularities": list(GRANULARITIES),
    "memories": list(MEMORIES),
    "max_tokens": STEPS,
    "entropy_gap_every": 0,
    "reasoning": False,
    "continuations": False,
    "seed": 0,
}


def spec_of(*policies: str, **changes) -> dict:
    return SPEC | {"policies": {name: SPEC["policies"][name] for name in policies}} | changes


def followed(model, ids, spec, steps=STEPS, gap=0):
    """Return the trace of a prompt, and the predicted and gold sets of every step by key."""
    recorded = []
    compare = observe._compare

    def record(trace, shadows, predictions, *rest):
        golds = compare(trace, shadows, predictions, *rest)
        preds = {
            (s.name, str(s.budget), *at): mask
            for s, sets in zip(shadows, predictions, strict=True)
            for at, mask in sets.items()
        }
        recorded.append((as_sets(preds), as_sets(golds)))
        return golds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "_compare", record)
        trace = observe.follow(model, model.extend(None, ids), observe.shadows_of(spec, 3), steps, gap)
    return trace, recorded


def as_sets(masks):
    return {key: [row.nonzero().flatten().tolist() for row in mask] for key, mask in masks.items()}


class Definition:
    """The full attention of a whole text, and the policies' scores written from their definitions."""

    def __init__(self, family: str, ids: list[int]):
        _, layers = reference(family, ids)
        # [L * Hkv, T, T], mean over the group of each KV head
        self.rows = torch.cat([w.view(2, -1, *w.shape[1:]).mean(1) for w, *_ in layers])
        self.layers = len(layers)
        self.keys = torch.cat([k for _, _, k, _ in layers]).double()

    def averaged(self, scores: torch.Tensor, granularity: str) -> list[list[float]]:
        return scores.mean(0, keepdim=True).tolist() if granularity == "global" else scores.tolist()

    def attention(self, n: int) -> torch.Tensor:
        return self.rows[:, n, :n]

    def score(self, kind: str, n: int, k: int) -> torch.Tensor:
        """Return scores [L * Hkv, n] from the first ``n`` tokens."""
        place = torch.arange(n).expand(len(self.rows), -1)
        if kind in ("h2o", "h2o_heavy"):
            recent = k // 2 if kind == "h2o" else 0
            return self.rows[:, :n, :n].sum(1).masked_fill(place >= n - recent, math.inf)
        if kind == "streaming_llm":
            return place.double().masked_fill(place < min(4, k // 2), math.inf)
        if kind == "knorm":
            return -self.keys[:, :n].norm(dim=-1)
        if kind == "tova":
            of_layers = self.rows[:, n - 1, :n].view(self.layers, -1, n).mean(1)
            return of_layers.repeat_interleave(2, 0).masked_fill(place == n - 1, math.inf)
        window = min(32, k // 2)
        seen = self.rows[:, n - max(1, window) : n, :n].sum(1).masked_fill(place >= n - window, 0)
        pooled = torch.stack([seen[:, max(0, j - 3) : j + 4].amax(-1) for j in range(n)], -1)
        return pooled.masked_fill(place >= n - window, math.inf)


def predicted(truth: Definition, kind: str, budget: str, granularity: str, memory: str) -> list[list[list[int]]]:
    """Return the sets of every step by row, from loops over lists."""
    held: list[list[int]] | None = None
    steps = []
    for t in range(STEPS):
        n = N + t
        k = math.ceil(round(float(budget[1:]) * n, 9))
        if kind in ("snapkv", "knorm"):  # compresses once: scores are those of the prompt
            k0 = math.ceil(round(float(budget[1:]) * N, 9))
            scores = truth.averaged(truth.score(kind, N, k0), granularity)
            generated = list(range(N, n))[-k:]
            steps.append([sorted(best_of(row, k - len(generated)) + generated) for row in scores])
            continue
        scores = truth.averaged(truth.score(kind, n, k), granularity)
        if memory == "ideal" or held is None:
            held = [best_of(row, k) for row in scores]
        else:
            candidates = [[*row, n - 1] for row in held]
            held = [
                sorted(sorted(own, key=lambda j, row=row: (-row[j], j))[:k])
                for own, row in zip(candidates, scores, strict=True)
            ]
        steps.append(held)
    return steps


@pytest.fixture(scope="module")
def runs():
    found = {}
    for family in FAMILIES:
        trace, recorded = followed(engine(family), PROMPT, spec_of(*WRITTEN, "oracle"))
        found[family] = trace, recorded, Definition(family, PROMPT + trace.token_id)
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gold_is_what_the_steps_own_attention_weighs_most(runs, family, granularity):
    trace, recorded, truth = runs[family]
    assert trace.n == list(range(N, N + STEPS))
    for t, (preds, golds) in enumerate(recorded):
        rows = truth.averaged(truth.attention(N + t), granularity)
        for budget in BUDGETS:
            k = math.ceil(round(float(budget[1:]) * (N + t), 9))
            expected = [best_of(row, k) for row in rows]
            assert golds[granularity, budget] == expected
            assert preds["oracle", budget, granularity, "ideal"] == expected


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_definition(runs, family, kind, memory):
    trace, recorded, truth = runs[family]
    for granularity in GRANULARITIES:
        if (kind, granularity) == ("tova", "global"):
            assert (kind, "r0.1", granularity, memory) not in recorded[0][0]
            continue
        for budget in BUDGETS:
            key = kind, budget, granularity, memory
            expected = predicted(truth, *key)
            assert [preds[key] for preds, _ in recorded] == expected, key
            at = trace.keys.index(key)
            for t, sets in enumerate(expected):
                rows = truth.averaged(truth.attention(N + t), granularity)
                k = trace.k[t][at]
                golds = [set(best_of(row, k)) for row in rows]
                recall = [len(gold & set(own)) / k for gold, own in zip(golds, sets, strict=True)]
                mass = [sum(row[j] for j in own) / sum(row) for row, own in zip(rows, sets, strict=True)]
                assert trace.recall[t][at] == pytest.approx(np.mean(recall), abs=1e-12)
                assert trace.gold_mass_kept[t][at] == pytest.approx(np.mean(mass), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_more_of_knowledge_would_change_the_prediction(runs, family):
    """Check that sums that include the current attention row would give other sets, so the exact test detects a
    leak."""
    _, recorded, truth = runs[family]
    leaked = 0
    for t, (preds, _) in enumerate(recorded):
        n = N + t
        for budget in BUDGETS:
            k = math.ceil(round(float(budget[1:]) * n, 9))
            late = truth.rows[:, : n + 1, :n].sum(1).tolist()
            leaked += preds["h2o_heavy", budget, "per_head", "ideal"] != [best_of(row, k) for row in late]
    assert leaked > STEPS


class Overturning:
    """An engine whose next token attends to entry 1 only, independent of the model, and adds this to the sums."""

    eos = frozenset()

    def extend(self, state, ids, statistics, room=0, seen=None):
        after = engine("qwen2").extend(state, ids, statistics, room)
        row = torch.zeros(2, state.length + 1)
        row[:, 1] = 9.0
        seen.extend([row] * len(after.layers))
        grown = [torch.nn.functional.pad(layer.attn_sum, (0, 1)) + row for layer in state.layers]
        pairs = zip(after.layers, grown, strict=True)
        return replace(after, layers=tuple(replace(layer, attn_sum=own) for layer, own in pairs))


def test_a_step_that_overturns_the_ranking_is_not_foreseen():
    """Check that entry 2, with the most attention so far, is predicted although the step attends to entry 1 only.

    Only a prediction that uses the step's own attention would hold entry 1.
    """
    state = engine("qwen2").extend(None, tokens(6))
    sums = torch.tensor([0.1, 0.2, 3.0, 0.1, 0.1, 0.0])
    state = replace(state, layers=tuple(replace(layer, attn_sum=sums.expand(2, -1)) for layer in state.layers))
    shadows = observe.shadows_of(spec_of("h2o_heavy", "oracle", budgets=["r0.1"]), 0)
    trace = observe.follow(Overturning(), state, shadows, 2)
    recall = [dict(zip(trace.keys, row, strict=True)) for row in trace.recall]
    for granularity in GRANULARITIES:
        for memory in MEMORIES:
            assert recall[0]["h2o_heavy", "r0.1", granularity, memory] == 0
            assert recall[0]["oracle", "r0.1", granularity, memory] == 1
        # known at the next step, but an irreversible policy has already evicted the entry
        assert recall[1]["h2o_heavy", "r0.1", granularity, "ideal"] == 1
        assert recall[1]["h2o_heavy", "r0.1", granularity, "irreversible"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_are_those_of_the_distributions_that_produce_the_tokens(runs, family):
    trace, _, _ = runs[family]
    logits, _ = reference(family, PROMPT + trace.token_id)
    for t, (token, own) in enumerate(zip(trace.token_id, trace.entropy, strict=True)):
        p = logits[N + t - 1].double().softmax(-1)
        assert token == int(p.argmax())
        assert own == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_says_what_plain_decoding_says(runs, family):
    """Check that observation generates the same tokens as plain decoding with the full cache."""
    trace, _, _ = runs[family]
    model = engine(family)
    prefill = model.prefill(PROMPT[:30], PROMPT[30:])
    setting = Setting(create("full", {}), Budget.parse("r1"), "after_prompt")
    assert trace.token_id == answer_plainly(model, prefill, PROMPT[30:], setting, STEPS, 0).tokens


def test_the_end_token_is_not_read(monkeypatch):
    model = engine("llama")
    free, _ = followed(model, PROMPT, spec_of("h2o"))
    monkeypatch.setattr(model, "eos", frozenset([free.token_id[3]]))
    stopped, _ = followed(model, PROMPT, spec_of("h2o"))
    first = free.token_id.index(free.token_id[3])
    assert stopped.token_id == free.token_id[:first]
    assert stopped.finish_reason == "stop"
    assert stopped.recall == free.recall[:first]


def test_what_is_irreversible_never_comes_back():
    """Check that with irreversible memory no evicted entry returns."""
    names = [name for name in SPEC["policies"] if name not in ("pyramidkv", "adakv")]
    _, recorded = followed(engine("mistral"), PROMPT, spec_of(*names), steps=12)
    for key in recorded[0][0]:
        if key[3] == "irreversible":
            sets = [preds[key] for preds, _ in recorded]
            for t in range(1, len(sets)):
                for before, now in zip(sets[t - 1], sets[t], strict=True):
                    assert set(now) <= {*before, N + t - 1}, key


def test_every_set_has_the_size_of_the_budget():
    trace, recorded = followed(engine("qwen2"), PROMPT, SPEC, steps=12)
    for t, (preds, golds) in enumerate(recorded):
        for (name, budget, granularity, _), sets in preds.items():
            k = Budget.parse(budget).kept(N + t)
            sizes = [len(own) for own in sets]
            assert all(len(own) == k for own in golds[granularity, budget])
            # heads or layers share a budget, whose mean is K
            assert sum(sizes) == k * len(sizes) if name in ("pyramidkv", "adakv") else set(sizes) == {k}
    assert all(value is None for row in trace.entropy_gap for value in row)
    assert trace.gold_new[0] == [None] * len(trace.keys)
    assert all(0 <= value <= 1 for row in trace.gold_new[1:] for value in row)


def test_a_policy_without_the_asked_granularity_adds_no_set():
    """Check that the steps are recorded although TOVA has no global sets."""
    trace, recorded = followed(engine("qwen2"), PROMPT, spec_of("tova", granularities=["global"]), steps=3)
    assert trace.n == [N, N + 1, N + 2]
    assert trace.recall == [[], [], []]
    assert recorded == [({}, {})] * 3


def test_a_policy_that_acts_once_holds_the_newest_of_what_it_generated():
    """Check that the newest K tokens remain, and no prompt token, if more tokens were generated than the budget
    holds."""
    _, recorded = followed(engine("qwen2"), tokens(20), spec_of("knorm", budgets=["r0.1"]), steps=14)
    for t, (preds, _) in enumerate(recorded):
        k = math.ceil(0.1 * (20 + t))
        if t >= k:
            assert preds["knorm", "r0.1", "global", "ideal"] == [list(range(20 + t - k, 20 + t))]


@pytest.mark.parametrize("kind", ["pyramidkv", "adakv", "entropy_drop"])
def test_a_budget_that_the_generated_tokens_exceed_leaves_nothing_of_the_prompt(kind):
    options = {"kind": kind, "hyper_parameters": hyper_parameters(kind)}
    spec = SPEC | {"policies": {kind: options}, "budgets": ["r0.1"]}
    _, recorded = followed(engine("qwen2"), tokens(20), spec, steps=9)
    newest = recorded[-1][0][kind, "r0.1", "per_head", "ideal"]
    assert newest == [[25, 26, 27]] * 6


def test_entropy_gaps_are_divergences_of_the_models_own_distributions():
    """Compare with one pass over the whole text in which the last token attends only to the entries of the set."""
    trace, recorded = followed(engine("llama"), PROMPT, spec_of("h2o_heavy"), steps=5, gap=2)
    for t, (preds, golds) in enumerate(recorded):
        for at, key in enumerate(trace.keys):
            if t % 2:
                assert trace.entropy_gap[t][at] is None
                continue
            for sets, measured, negated in (
                (preds[key], trace.entropy_gap[t][at], False),
                (golds[key[2], key[1]], trace.entropy_gap_gold[t][at], True),
            ):
                ids = PROMPT + trace.token_id[: t + 1]
                assert measured == pytest.approx(divergence("llama", ids, sets, negated), rel=2e-2, abs=2e-4)


def divergence(family: str, ids: list[int], sets: list[list[int]], negated: bool) -> float:
    n = len(ids) - 1
    visible = []
    for layer in range(3):
        mask = torch.ones(2, n + 1, n + 1, dtype=torch.bool).tril()
        for head in range(2):
            own = torch.zeros(n, dtype=torch.bool)
            own[sets[0] if len(sets) == 1 else sets[2 * layer + head]] = True
            mask[head, n, :n] = ~own if negated else own
        visible.append(mask)
    whole, less = (reference(family, ids, v)[0][-1].double().log_softmax(-1) for v in (None, visible))
    return float((whole.exp() * (whole - less)).sum())


def test_layers_with_a_sliding_window_are_in_no_set():
    model, _ = sliding_model()
    trace, recorded = followed(model, PROMPT, spec_of("h2o", "snapkv", "adakv"), steps=4, gap=1)
    assert len(recorded[0][0]["h2o", "r0.5", "per_head", "ideal"]) == 2  # one full layer of two KV heads
    assert trace.recall
    assert all(value >= -1e-9 for row in trace.entropy_gap for value in row)


scores = st.lists(st.lists(st.integers(-3, 3), min_size=9, max_size=9), min_size=1, max_size=4)


@given(scores, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans())
def test_best_keeps_what_the_policies_own_choice_keeps(rows, sizes, several):
    """Check that a ranking selects the same entries as the policies' own `top`, for one size after the other."""
    score = torch.tensor(rows, dtype=torch.float32)
    ranking = Ranking(score, several)
    for k in sizes:
        expected = torch.zeros_like(score, dtype=torch.bool)
        if k:
            expected.scatter_(-1, top(score, k), True)
        assert torch.equal(ranking.best(k), expected)
        assert torch.equal(ranking.places < k, expected)


@given(scores, st.integers(1, 9))
@settings(deadline=None)
def test_dropping_the_lowest_of_what_is_held_is_keeping_the_best_of_it(rows, k):
    """Check that evicting the lowest entry equals keeping the k - 1 best entries."""
    score = torch.tensor(rows, dtype=torch.float32)
    held = Ranking(score.flip(-1)).best(k)
    expected = Ranking(score.masked_fill(~held, -torch.inf)).best(k - 1) & held
    assert torch.equal(without_lowest(score, held), expected)


def test_thinned_layers_hold_the_sets_of_their_heads():
    state = engine("qwen2").extend(None, tokens(12))
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(6, 12, generator=generator) < 0.5
    parts = [p for layer in thinned(state, mask).layers for part in layer.parts for p in part.positions]
    assert [p.tolist() for p in parts] == [row.nonzero().flatten().tolist() for row in mask]


# the job


EXAMPLES = [
    {
        "task": "t", "example_id": f"e{i}", "bin": 1, "prompt_sha256": f"sha{i}", "meta": json.dumps(meta),
        "context_ids": tokens(30, seed=i), "question_ids": tokens(5, seed=9), "max_new_tokens": 4,
    }
    for i, meta in enumerate([{"kind": "chain"}, {}])
]  # fmt: skip


def sequences(tmp_path, **changes) -> list:
    store = PrefillStore(tmp_path / "store")
    return list(observe.observed(engine("qwen2"), EXAMPLES, spec_of("h2o", "snapkv", **changes), store))


def test_rows_are_one_for_each_step_and_key(tmp_path):
    found = sequences(tmp_path, max_tokens="task")
    assert [kind for _, kind, _ in found] == ["chain", "t"]
    table = pl.DataFrame(observe.steps_table(*found[0]))
    assert table.columns == OBSERVATIONS.names
    assert len(table) == 4 * 2 * 4 * 2 * 2
    assert table.unique(["policy", "budget", "granularity", "memory", "step"]).height == len(table)
    trace = found[0][2]
    key = ("snapkv", "r0.3", "per_head", "irreversible")
    own = table.filter(policy="snapkv", budget="r0.3", granularity="per_head", memory="irreversible")
    at = trace.keys.index(key)
    assert own["recall"].to_list() == [row[at] for row in trace.recall]
    assert own["entropy"].to_list() == trace.entropy
    layers = pl.DataFrame(observe.layers_table(*found[0])).filter(policy="snapkv", budget="r0.3", memory=key[3])
    assert layers.columns == OBSERVATION_LAYERS.names
    assert layers["recall"].mean() == pytest.approx(own["recall"].mean())


def test_a_context_goes_on_without_its_question(tmp_path):
    """Check that a continuation is observed after the context without the question."""
    found = sequences(tmp_path, continuations=True)
    assert [kind for _, kind, _ in found] == ["chain", "continuation", "t", "continuation"]
    assert found[1][2].n[0] == 30
    assert found[0][2].n[0] == 35


def test_reasoning_is_begun_after_the_prompt(tmp_path, monkeypatch):
    class Words:
        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": [1, 2, 3]})()

    monkeypatch.setattr(engine("qwen2"), "tokenizer", Words())
    (_, kind, trace), _ = sequences(tmp_path, reasoning=True)
    assert (kind, trace.n[0]) == ("chain", 38)
    whole = engine("qwen2").extend(None, EXAMPLES[0]["context_ids"] + EXAMPLES[0]["question_ids"] + [1, 2, 3])
    assert trace.token_id[0] == int(whole.logits.argmax())


# checks and logs


def observations(recall: Callable[[int], float] = lambda step: 0.5, **changes) -> pl.DataFrame:
    rows = [
        {
            "task": "t", "bin": 0, "example_id": e, "prompt_kind": "t", "policy": "h2o", "budget": budget,
            "granularity": "global", "memory": "ideal", "step": step, "token_id": 1, "entropy": 0.1 * step, "n": 9,
            "k": 3, "recall": recall(step), "gold_mass_kept": 0.5, "gold_new": 0.3 if step else None,
            "entropy_gap": None, "entropy_gap_gold": None,
        } | changes
        for e in "ab" for budget in ("r0.1", "r0.5") for step in range(4)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=pl.DataFrame(OBSERVATIONS.empty_table()).schema)


THERE = {("a", "t"): (4, "length"), ("b", "t"): (4, "stop")}


@pytest.mark.parametrize(
    ("table", "there", "flag", "count"),
    [
        (observations(lambda step: 0.0), THERE, "recall_always_0", 2),
        (observations(lambda step: 1.0), THERE, "recall_always_1", 2),
        (observations(entropy=9.0), THERE, "entropy_outside", 8),
        (observations(entropy=-0.1), THERE, "entropy_outside", 8),
        (observations(entropy=math.nan), THERE, "entropy_outside", 8),
        (observations(gold_new=0.0), THERE, "gold_never_changes", 2),
        (observations().filter(~((pl.col("step") == 2) & (pl.col("example_id") == "b"))), THERE, "steps_missing", 1),
        (observations(), THERE | {("c", "t"): (5, "length")}, "steps_missing", 1),
        (observations(), THERE | {("c", "t"): (0, "length")}, "steps_missing", 1),
    ],
)  # fmt: skip
def test_what_a_reviewer_would_look_for_is_found(table, there, flag, count):
    """Check that each kind of damaged observation raises exactly its own flag."""
    rows = check(table, 100, there).to_dicts()
    flags = {name for name in OBSERVATION_CHECKS.names if name.endswith(("0", "1", "changes", "missing", "outside"))}
    assert len(rows) == 2
    for row in rows:
        assert row[flag] == count
        assert row["concern"]
        assert all(row[other] == 0 for other in flags - {flag})


def test_sound_observations_raise_no_concern():
    assert check(observations(), 100, THERE)["concern"].to_list() == [None, None]
    at_once = check(observations(), 100, THERE | {("c", "t"): (0, "stop")})
    assert at_once["concern"].to_list() == [None, None]
    oracle = check(observations(lambda step: 1.0, policy="oracle"), 100, THERE)
    assert oracle["concern"].to_list() == [None, None]


@pytest.fixture
def files(tmp_path):
    facts = {
        "vocab_size": 100, "sequences": [["a", "t", 4, "length"], ["b", "t", 4, "stop"]], "model": "org/m",
        "model_revision": None, "dataset": "d", "split": "test", "max_length": 64, "attention": "sdpa",
        "attention_version": "2", "dtype": "float32",
    }  # fmt: skip
    paths = []
    for i, example in enumerate("ab"):
        table = observations(lambda step: step / 4).filter(example_id=example)
        paths.append(str(tmp_path / f"bin{i}.parquet"))
        write_table(paths[-1], table.to_arrow().cast(OBSERVATIONS), facts)
    return paths


def test_checks_are_written_for_a_task(files, tmp_path):
    write_checks(files, str(tmp_path / "checks.parquet"))
    table = pl.read_parquet(tmp_path / "checks.parquet")
    assert table["sequences"].to_list() == [2, 2]
    assert table["concern"].to_list() == [None, None]


def test_logs_have_the_studys_names_and_fields(files, tmp_path):
    out = tmp_path / "logs"
    write_logs(files, str(out))
    (file,) = out.glob("t_budget_0.1_*.jsonl")
    first, *steps = [json.loads(line) for line in file.read_text().splitlines()]
    metadata = first["metadata"]
    assert {"model", "model_path", "dataset", "split", "max_length", "attention", "attention_version"} <= set(metadata)
    assert (metadata["model"], metadata["max_length"], metadata["budget"]) == ("m", 64, 0.1)
    assert metadata["timestamp"]
    assert len(steps) == 8
    assert {"step", "entropy", "recall_10", "recall_50"} <= set(steps[0])
    assert [step["recall_10"] for step in steps] == [0, 0.25, 0.5, 0.75] * 2
    same = json.loads((out / "t_budget_0.1" / "logs.json").read_text())
    assert same == {"metadata": metadata, "steps": steps}
    assert (out / "t_budget_0.5" / "plots" / "entropy_recall.svg").read_text().startswith("<svg")
    assert (out / "t_budget_0.5" / "plots" / "entropy_recall.png").read_bytes()[:4] == b"\x89PNG"


def test_each_task_gets_the_logs_of_its_own_observations(files, tmp_path):
    write_entropy_recall(files, str(tmp_path / "table.parquet"), {"resamples": 50})
    steps = {}
    for task, path in zip("xy", files, strict=True):
        (tmp_path / task).mkdir()
        steps[task] = str(shutil.copy(path, tmp_path / task / "bin0.parquet"))
    folders = [str(tmp_path / task / "logs") for task in steps]
    write_entropy_recall_plots(str(tmp_path / "table.parquet"), list(steps.values()), 0.95, {}, folders)
    for folder, example in zip(folders, "ab", strict=True):
        (log,) = Path(folder).glob("*_budget_0.1/logs.json")
        assert {step["example_id"] for step in json.loads(log.read_text())["steps"]} == {example}


# settings


def configured(**observed):
    from project import SMALL

    return settings_module.parse(SMALL | {"observe": {"enabled": True} | observed})


def test_what_can_be_observed_is_observed():
    assert list(recall_specs.observe(configured())["policies"]) == ["h2o", "h2o_heavy", "snap", "oracle"]
    assert recall_specs.observe(configured(budgets=[0.25]))["budgets"] == ["r0.25"]
    assert "attn_sum" in specs.statistics(configured())


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        ({"policies": ["full"]}, "observe.policies: full keeps everything"),
        ({"policies": ["nope"]}, "observe.policies: there is no 'nope'"),
        ({"budgets": [1.0]}, "observe.budgets: 1.0 is not in"),
        ({"budgets": [0.1, 0.1]}, "observe.budgets: a value is listed twice"),
        ({"max_tokens": 0}, "observe.max_tokens: 0 is not allowed"),
        ({"granularities": ["heads"]}, "observe.granularities"),
    ],
)
def test_what_cannot_be_observed_is_named(observed, words):
    with pytest.raises(UserError, match=words):
        specs.check(configured(**observed))


# whole runs


@pytest.mark.slow
def test_a_killed_job_is_run_again_to_the_same_table(finished, tmp_path):
    import os
    import signal
    import subprocess
    import sys

    spec = recall_specs.observe(configured(max_tokens=6, continuations=True)) | {"code": "x"}
    spec["model"] = spec["model"] | {"name": str(finished.folder / "resources/tiny-reader")}

    def command(name: str) -> list[str]:
        bin_file = finished.results / "data/reader_qa/bin1.parquet"
        out = ["--output", str(tmp_path / name / "steps.parquet"), "--layers", str(tmp_path / name / "layers.parquet")]
        module = [sys.executable, "-m", "kv_transition.studies.recall.run"]
        return [*module, "--spec", json.dumps(spec), "--bin", str(bin_file), *out]

    environment = os.environ | {
        "PYTHONPATH": str(finished.folder / "src"), "KVT_PREFILL_STORE": f"{tmp_path}/store:always:1",
    }  # fmt: skip
    subprocess.run(command("undisturbed"), env=environment, check=True)
    with subprocess.Popen(command("killed"), env=environment, stderr=subprocess.PIPE, text=True) as process:
        while "observed 1 of" not in process.stderr.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "killed").glob("*.parquet"))
    subprocess.run(command("killed"), env=environment, check=True)
    for name in ("steps", "layers"):
        tables = [pl.read_parquet(tmp_path / run / f"{name}.parquet") for run in ("undisturbed", "killed")]
        assert tables[0].equals(tables[1])
        assert len(tables[0])


@pytest.mark.slow
def test_a_change_of_what_is_observed_runs_observations_only(tmp_path):
    from project import SMALL, Project

    project = Project(tmp_path)
    small = SMALL | {"observe": {"enabled": True, "budgets": [0.2], "max_tokens": 4, "policies": ["h2o", "oracle"]}}
    project.configure(small)
    project.run()
    assert pl.read_parquet(project.results / "observations/reader_qa/checks.parquet").height
    own = {"observe": 2, "observation_checks": 1, "entropy_recall_plots": 1}
    for change in ({"budgets": [0.2, 0.5]}, {"policies": ["h2o", "snap", "oracle"]}):
        project.configure(small | {"observe": small["observe"] | change})
        planned = project.planned()
        assert {rule: planned[rule] for rule in own} == own
        assert not {"prefill", "cell", "score", "aggregate", "transition"} & set(planned)
