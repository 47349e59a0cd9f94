"""Compare LagKV, ChunkKV, CAKE and R-KV with their papers' formulas, entry by entry."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from policy_states import GROUP, HKV, D, H, best, grown, positions_of, random_state, rotated

from kv_transition.policies._allocation import by_preference
from kv_transition.policies.catalog import create

N = 90


@pytest.fixture(scope="module")
def world():
    return random_state(N, seed=4)


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    powers = [math.exp(x - most) for x in row]
    return [p / sum(powers) for p in powers]


def pooled(row: list[float], kernel: int, how) -> list[float]:
    """Return pooled scores, padded with zeros at both ends as in the authors' code."""
    padded = [0.0] * (kernel // 2) + row + [0.0] * (kernel // 2)
    return [how(padded[j : j + kernel]) for j in range(len(row))]


def kept(kind: str, state, k: int, **options) -> list[list[list[int]]]:
    return positions_of(create(kind, options).compress(state, k))


# LagKV


def lag_scores(vectors: list[list[float]], lag: int) -> list[list[float]]:
    """Return the scores of each partition but the last, from the partition after it (paper, equations 2 to 5)."""
    parts = [vectors[i : i + lag] for i in range(0, len(vectors) - lag + 1, lag)]
    scores = []
    for part, after in itertools.pairwise(parts):
        least = [min(v[c] for v in after) for c in range(D)]
        most = [max(v[c] for v in after) for c in range(D)]
        spread = [statistics.stdev([(v[c] - least[c]) / (most[c] - least[c]) for c in range(D)]) for v in part]
        scores.append(softmax(spread))
    return scores


@pytest.mark.parametrize(("lag", "k"), [(5, 27), (5, 44), (8, 60), (11, 54)])
def test_lagkv_keeps_each_partitions_least_foretold_entries(world, lag, k):
    state, truths = world
    sinks = 4
    parts = (N - sinks) // lag
    tail = lag + (N - sinks) % lag
    for truth, got in zip(truths, kept("lagkv", state, k, lag=lag), strict=True):
        keys = rotated(truth.keys, range(N))
        for head in range(HKV):
            of_keys = lag_scores(keys[head].tolist()[sinks:], lag)
            of_values = lag_scores(truth.values[head].tolist()[sinks:], lag)
            ranks = {}
            for p in range(parts - 1):
                both = [(a + b) / 2 for a, b in zip(of_keys[p], of_values[p], strict=True)]
                for rank, j in enumerate(sorted(range(lag), key=lambda j: -both[j])):
                    ranks[sinks + p * lag + j] = rank
            places = sorted(ranks, key=lambda j: (ranks[j], j))[: k - sinks - tail]
            assert got[head] == sorted([*range(sinks), *places, *range(N - tail, N)])


def test_lagkv_shortens_its_partitions_where_the_budget_is_small(world):
    state, _ = world
    policy = create("lagkv", {})
    for k in range(1, 90):
        assert policy.protected(k) <= k // 2
        for layer in policy.compress(state, k).layers:
            assert layer.n == k
            assert all(row[-1] == N - 1 for row in layer.positions.tolist()) or k < 12


# ChunkKV


@pytest.mark.parametrize(("chunk", "window", "k"), [(10, 10, 40), (7, 8, 33), (20, 5, 50), (200, 4, 30)])
def test_chunkkv_keeps_whole_chunks_of_all_heads(world, chunk, window, k):
    state, truths = world
    got = kept("chunkkv", state, k, chunk=chunk, window=window, kernel=5, pooling="mean")
    for truth, layer in zip(truths, got, strict=True):
        scores = []
        for head in range(HKV):
            rows = [truth.weights[head * GROUP + g, i] for g in range(GROUP) for i in range(N - window, N)]
            sums = [sum(float(row[j]) for row in rows) / GROUP for j in range(N - window)]
            scores.append(pooled(sums, 5, lambda span: sum(span) / 5))
        means = []
        for start in range(0, N, chunk):
            own = [s[j] for s in scores for j in range(start, min(start + chunk, N - window))]
            means.append(sum(own) / len(own) if own else 0.0)
        expected: list[int] = []
        for c in sorted(range(len(means)), key=lambda c: (-means[c], c)):
            expected += range(c * chunk, min((c + 1) * chunk, N - window))
        expected = sorted(expected[: k - window]) + list(range(N - window, N))
        assert layer == [expected] * HKV


# CAKE


def window_rows(truth, window: int) -> torch.Tensor:
    return truth.weights[:, N - window :, : N - window]


def preference_of(truth, window: int, tau1: float, tau2: float) -> float:
    rows = window_rows(truth, window)
    entropy = -sum(float(p) * math.log(float(p) + 1e-10) for p in rows.flatten())
    variance = sum(statistics.variance(rows[h, :, j].tolist()) for h in range(H) for j in range(N - window))
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def authors_budgets(preferences: list[float], total: int, most: int) -> list[int]:
    """Return the budgets of the authors' adjust_budgets: floor, cap, then excess and rest are distributed equally."""
    budgets = [int(p / sum(preferences) * total) for p in preferences]
    excess = sum(max(b - most, 0) for b in budgets)
    budgets = [min(b, most) for b in budgets]
    for given in (excess, None):
        left = total - sum(budgets) if given is None else given
        able = [i for i, b in enumerate(budgets) if b < most]
        if left and able:
            for rank, i in enumerate(able):
                budgets[i] += left // len(able) + (rank < left % len(able))
    return budgets


@pytest.mark.parametrize(("k", "tau1", "tau2"), [(40, 1.0, 1.0), (50, 1.6, 0.4), (30, 0.7, 3.0)])
@pytest.mark.parametrize("gamma", [0.0, 200.0])
def test_cake_shares_the_budget_by_preference_and_keeps_by_mean_and_variance(world, k, tau1, tau2, gamma):
    state, truths = world
    window = 6
    preferences = [preference_of(truth, window, tau1, tau2) for truth in truths]
    budgets = authors_budgets(preferences, (k - window) * len(truths), N - window)
    assert sum(budgets) == (k - window) * len(truths)
    assert len(set(budgets)) > 1
    assert min(budgets) >= window  # so that no layer's window is shortened
    got = kept("cake", state, k, window=window, tau1=tau1, tau2=tau2, gamma=gamma)
    for truth, budget, layer in zip(truths, budgets, got, strict=True):
        rows = window_rows(truth, window)
        for head in range(HKV):
            scores = [0.0] * (N - window)
            for g in range(GROUP):
                own = rows[head * GROUP + g]
                each = [
                    float(own[:, j].mean()) + gamma * statistics.variance(own[:, j].tolist()) for j in range(N - window)
                ]
                scores = [s + e / GROUP for s, e in zip(scores, each, strict=True)]
            smooth = pooled(scores, 5, lambda span: sum(span) / 5)
            assert layer[head] == best(smooth, budget) + list(range(N - window, N))


@pytest.mark.parametrize(
    ("preferences", "k", "sizes", "base", "expected"),
    [
        ([1, 1, 2], 10, [100] * 3, 2, [8, 8, 14]),
        ([1, 2, 4], 10, [100] * 3, 3, [6, 9, 15]),  # 21 to share: 3, 6, 12
        ([1, 0, 0], 10, [20, 20, 20], 4, [20, 5, 5]),  # the first can use 16 of 18, the others get 1 each
        ([5, 1, 0], 10, [12, 12, 12], 2, [12, 11, 7]),  # 20, 4 and 0 of 24: the first can use 10, the others get 5 each
        ([0, 0, 0], 5, [9, 9, 9], 1, [5, 5, 5]),
        ([3, 3, 3], 5, [4, 9, 3], 1, [4, 8, 3]),
    ],
)
def test_shares_by_preference_are_as_worked_by_hand(preferences, k, sizes, base, expected):
    assert by_preference(k, preferences, sizes, base) == expected


# R-KV


def r_kv_scores(truth, head: int, window: int, weight: float, similar: float, horizon: int | None) -> list[float]:
    keys = rotated(truth.keys, range(N))[head]
    queries = rotated(truth.queries, range(N))
    mean = [0.0] * (N - window)
    for i in range(N - window, N):
        logits = [
            max(float(queries[head * GROUP + g, i] @ keys[j]) * truth.scale for g in range(GROUP))
            for j in range(N - window)
        ]
        mean = [m + p / window for m, p in zip(mean, softmax(logits), strict=True)]
    attention = pooled(mean, 7, max)
    unit = [key / key.norm() for key in keys]
    cosines = [[0.0 if i == j else float(unit[i] @ unit[j]) for j in range(N)] for i in range(N)]
    for i in range(N):
        low = 0 if horizon is None else N - horizon
        alike = [j for j in range(low, N) if cosines[i][j] > similar]
        cosines[i][alike[-1] if alike else 0] = 0.0
    redundancy = softmax([sum(cosines[i][j] for i in range(N)) / N for j in range(N)])
    return [weight * a - (1 - weight) * s for a, s in zip(attention, redundancy, strict=False)]


@pytest.mark.parametrize(("similar", "horizon"), [(0.5, None), (0.5, 30), (0.9, None), (-1.0, 1)])
@pytest.mark.parametrize(("k", "weight"), [(20, 0.07), (50, 0.5), (40, 0.0)])
def test_r_kv_keeps_what_is_attended_to_and_not_redundant(world, k, weight, similar, horizon):
    state, truths = world
    window = 8
    got = kept("r_kv", state, k, weight=weight, similar=similar, horizon=horizon)
    for truth, layer in zip(truths, got, strict=True):
        for head in range(HKV):
            scores = r_kv_scores(truth, head, window, weight, similar, horizon)
            assert layer[head] == best(scores, k - window) + list(range(N - window, N))


def test_r_kv_waits_until_enough_has_been_generated():
    state, _ = random_state(60)
    policy = create("r_kv", {"every": 10})
    state = policy.compress(state, 30)
    seen = []
    for step in range(25):
        state = policy.hold(grown(state, 1, seed=step), 30)
        seen.append(int(state.entries))
    assert seen == [*range(31, 40), 30, *range(31, 40), 30, *range(31, 36)]


# options of score policies


@pytest.mark.parametrize("k", [9, 30, 61])
def test_a_protected_window_and_sinks_are_parts_of_any_score_policy(world, k):
    state, truths = world
    got = kept("knorm", state, k, window=10, n_sink=5)
    w = min(10, k // 2)
    s = min(5, k // 2 - w)
    for truth, layer in zip(truths, got, strict=True):
        for head in range(HKV):
            scores = [-float(truth.keys[head, j].norm()) for j in range(N)]
            scores[:s] = [math.inf] * s
            scores[N - w :] = [math.inf] * w
            assert layer[head] == best(scores, k)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_pooling_is_a_part_of_any_score_policy(world, pooling):
    """Check that scores are padded with their minimum at both ends, because scores may be negative."""
    state, truths = world
    got = kept("knorm", state, 40, kernel=3, pooling=pooling)
    for truth, layer in zip(truths, got, strict=True):
        for head in range(HKV):
            raw = [-float(truth.keys[head, j].norm()) for j in range(N)]
            padded = [min(raw), *raw, min(raw)]
            spans = [padded[j : j + 3] for j in range(N)]
            scores = [max(span) if pooling == "max" else sum(span) / 3 for span in spans]
            # equal maxima are exactly equal here too; means may differ by rounding in a near-tie
            assert len(set(layer[head]) ^ set(best(scores, 40))) <= (0 if pooling == "max" else 2)


@pytest.mark.parametrize("kind", ["knorm", "keydiff", "expected_attention", "lagkv"])
def test_any_score_policy_shares_a_layers_budget_among_its_heads(world, kind):
    """Compare with the best entries of both heads together, including each head's best 20 %."""
    state, _ = world
    k = 30
    policy = create(kind, {})
    shared = create(kind, {"allocation": "adaptive"}).compress(state, k)
    lengths = set()
    for number, (layer, after) in enumerate(zip(state.layers, shared.layers, strict=True)):
        scores = policy.score(layer, number, k, N, 0).tolist()
        floors = [best(row, int(0.2 * k)) for row in scores]
        rest = sorted((-scores[h][j], j, h) for h in range(HKV) for j in range(N) if j not in floors[h])
        for _, j, h in rest[: HKV * k - sum(map(len, floors))]:
            floors[h].append(j)
        assert [part.positions[0].tolist() for part in after.parts] == [sorted(own) for own in floors]
        lengths |= {len(own) for own in floors}
    assert kind == "lagkv" or len(lengths) > 1


def test_any_score_policy_can_have_a_pyramid_of_layers(world):
    state, _ = world
    lengths = [layer.n for layer in create("knorm", {"allocation": "pyramid", "window": 8}).compress(state, 30).layers]
    steep = [create("pyramidkv", {"window": 8}).layer_budget(30, layer, 3, N) for layer in range(3)]
    assert lengths == steep
