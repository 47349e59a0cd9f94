"""Compare policies that use attention with loops over explicit attention matrices."""

from __future__ import annotations

import math

import pytest
import torch
from models import VOCABULARY, engine, reference, tokens
from policy_states import GROUP, HKV, H, best, grown, positions_of, random_state, rotated

from kv_transition.cache.state import SplitLayer
from kv_transition.policies.catalog import create, hyper_parameters

N = 75


@pytest.fixture(scope="module")
def prompt():
    """Return a prompt read by the engine, and its attention by definition: weights [H, N, N], q, k, v of each layer."""
    # no token twice: rotation preserves norms, so equal tokens would tie up to rounding
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(11))[:N].tolist()
    return engine("qwen2").extend(None, ids), reference("qwen2", ids)[1]


def chosen(kind: str, state, k: int, **options) -> list[list[list[int]]]:
    return positions_of(create(kind, hyper_parameters(kind) | options).compress(state, k))


def group_mean(weights: torch.Tensor, head: int, rows, column: int) -> float:
    """Return the attention to an entry, summed over queries and averaged over the two query heads of a KV head."""
    return sum(float(weights[2 * head + g, i, column]) for i in rows for g in range(2)) / 2


@pytest.mark.parametrize("k", [1, 2, 9, 40])
@pytest.mark.parametrize(("kind", "share"), [("h2o", 0.5), ("h2o_heavy", 0.0), ("h2o", 0.3)])
def test_h2o_keeps_the_most_attended_and_the_recent(prompt, k, kind, share):
    state, layers = prompt
    for (weights, *_), got in zip(layers, chosen(kind, state, k, recent_share=share), strict=True):
        for head in range(2):
            scores = [group_mean(weights, head, range(N), j) for j in range(N)]
            for j in range(N - int(k * share), N):
                scores[j] = math.inf
            assert got[head] == best(scores, k)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("kind", ["h2o", "h2o_heavy", "tova"])
def test_decoding_evicts_as_the_loop_of_the_definition_does(family, kind):
    """Compare a real decode of forced tokens with a loop; each token sees the entries that the loop keeps."""
    prompt_length, steps, k = 40, 25, 12
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[: prompt_length + steps].tolist()
    policy = create(kind, {})
    layers = 3
    state = engine(family).extend(None, ids[:prompt_length])
    masks = [torch.ones(len(ids), len(ids), dtype=torch.bool).tril().repeat(HKV, 1, 1) for _ in range(layers)]
    _, attention = reference(family, ids[:prompt_length])
    held = [[list(range(prompt_length)) for _ in range(HKV)] for _ in range(layers)]
    sums = [
        [[group_mean(attention[n][0], h, range(prompt_length), j) for j in range(prompt_length)] for h in range(HKV)]
        for n in range(layers)
    ]

    def evict(last: int, attention) -> None:
        for number in range(layers):
            weights = attention[number][0]
            for head in range(HKV):
                mine = held[number][head]
                if kind == "tova":
                    scores = [math.inf if j == last else float(weights[:, last, j].mean()) for j in mine]
                else:
                    recent = k // 2 if kind == "h2o" else 0
                    scores = [math.inf if j > last - recent else sums[number][head][j] for j in mine]
                held[number][head] = [mine[i] for i in best(scores, k)]

    state = policy.compress(state, k)
    evict(prompt_length - 1, attention)
    assert positions_of(state) == held
    for step in range(prompt_length, prompt_length + steps):
        for number in range(layers):
            for head in range(HKV):
                masks[number][head, step] = False
                masks[number][head, step, [*held[number][head], step]] = True
        visible = [mask[:, : step + 1, : step + 1] for mask in masks]
        logits, attention = reference(family, ids[: step + 1], visible)
        state = engine(family).extend(state, [ids[step]], policy.statistics)
        torch.testing.assert_close(state.logits, logits[-1], rtol=0, atol=1e-4)
        for number in range(layers):
            for head in range(HKV):
                row = [group_mean(attention[number][0], head, [step], j) for j in range(step + 1)]
                sums[number][head].append(0.0)
                sums[number][head] = [s + r for s, r in zip(sums[number][head], row, strict=True)]
                held[number][head].append(step)
        state = policy.compress(state, k)
        evict(step, attention)
        assert positions_of(state) == held


@pytest.mark.parametrize("k", [2, 9, 40, 70])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("window", "kernel"), [(32, 7), (8, 5), (16, 1)])
def test_snapkv_pools_what_the_window_attends_to(prompt, k, pooling, window, kernel):
    state, layers = prompt
    got = chosen("snapkv", state, k, window=window, kernel=kernel, pooling=pooling)
    for (weights, *_), got_layer in zip(layers, got, strict=True):
        for head in range(2):
            w = min(window, k // 2)
            expected = best(pooled(weights, head, w, kernel, pooling), k - w) + list(range(N - w, N))
            # max pooling gives exact ties; with mean pooling, the order of summation may only swap near-ties
            if pooling == "mean":
                assert len(set(got_layer[head]) ^ set(expected)) <= 2
            else:
                assert got_layer[head] == expected


def pooled(weights: torch.Tensor, head: int, w: int, kernel: int = 7, pooling: str = "max") -> list[float]:
    """Return SnapKV's score of the entries before a window of ``w``; if w is 0, only the last query observes."""
    n = weights.shape[-1]
    prefix = [group_mean(weights, head, range(n - max(w, 1), n), j) for j in range(n - w)]
    padded = [0.0] * (kernel // 2) + prefix + [0.0] * (kernel // 2)
    spans = [padded[j : j + kernel] for j in range(n - w)]
    return [max(span) if pooling == "max" else sum(span) / kernel for span in spans]


@pytest.mark.parametrize("k", [2, 9, 40])
def test_tova_keeps_one_set_a_layer_by_the_last_query(prompt, k):
    state, layers = prompt
    for (weights, *_), got in zip(layers, chosen("tova", state, k), strict=True):
        scores = [float(weights[:, N - 1, j].mean()) for j in range(N)]
        scores[N - 1] = math.inf
        assert got == [best(scores, k)] * 2


@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("beta", [1, 5, 20])
@pytest.mark.parametrize("layers", [1, 2, 3, 28])
def test_pyramidkv_budgets_lie_on_the_line_and_add_up(window, beta, layers):
    policy = create("pyramidkv", {"window": window, "beta": beta})
    for n in (3, 50, 4096):
        for k in {1, 2, 3, n // 20 + 1, n // 5 + 1, n // 2 + 1, n - 1, n}:
            if not 1 <= k <= n:
                continue
            got = [policy.layer_budget(k, layer, layers, n) for layer in range(layers)]
            assert sum(got) == k * layers
            assert got == sorted(got, reverse=True)
            assert min(got) >= 1
            assert max(got) <= n
            w = max(1, min(window, k // 2))
            least = (k - w) / beta
            most = 2 * (k - w) - least
            if most > n - w:
                most = n - w
                least = 2 * (k - w) - most
            for layer, budget in enumerate(got):
                share = k - w if layers == 1 else most - (most - least) * layer / (layers - 1)
                assert abs(budget - w - share) < 1 + 1e-9


@pytest.mark.parametrize("k", [2, 9, 30, 60])
def test_pyramidkv_chooses_as_snapkv_does_with_each_layers_budget(prompt, k):
    state, layers = prompt
    policy = create("pyramidkv", {"window": 8})
    got = positions_of(policy.compress(state, k))
    assert sum(len(layer[0]) for layer in got) == 3 * k
    for number, ((weights, *_), heads) in enumerate(zip(layers, got, strict=True)):
        own = policy.layer_budget(k, number, 3, N)
        w = min(8, own // 2)
        for head in range(2):
            assert heads[head] == best(pooled(weights, head, w), own - w) + list(range(N - w, N))


def test_a_pyramid_that_is_compressed_again_never_exceeds_its_budget():
    state, _ = random_state(80, layers=6)
    policy = create("pyramidkv", {})
    for turn, k in enumerate([40, 45, 50, 20]):
        state = policy.compress(state, k)
        assert state.entries <= k
        assert [layer.n for layer in state.layers] == sorted([layer.n for layer in state.layers], reverse=True)
        state = grown(state, 20, seed=turn)


def shared(scores: list[list[float]], positions: list[list[int]], k: int, share: float, window: int) -> list[list[int]]:
    """Return the kept entries of Ada-KV by its definition: windows, each head's floor, then the best of all heads.

    Ties go to the lower position.
    """
    length = max(p[-1] for p in positions) + 1
    kept: list[set[int]] = []
    for own, places in zip(scores, positions, strict=True):
        mine = {i for i, p in enumerate(places) if p >= length - window}
        ranked = sorted(range(len(own)), key=lambda i: (i not in mine, -own[i], i))
        kept.append(mine | set(ranked[: max(1, int(share * k))]))
    rest = [
        (-scores[h][i], positions[h][i], h, i)
        for h in range(len(scores))
        for i in range(len(scores[h]))
        if i not in kept[h]
    ]
    for _, _, h, i in sorted(rest)[: k * len(scores) - sum(map(len, kept))]:
        kept[h].add(i)
    return [[positions[h][i] for i in sorted(mine)] for h, mine in enumerate(kept)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 2, 9, 30, 60])
def test_adakv_shares_a_layers_budget_among_its_heads(prompt, k, share):
    state, layers = prompt
    policy = create("adakv", {"window": 8, "floor": share})
    compressed = policy.compress(state, k)
    w = min(8, k // 2)
    lengths = set()
    for (weights, *_), layer in zip(layers, compressed.layers, strict=True):
        scores = [pooled(weights, head, w) + [0.0] * w for head in range(2)]
        got = [row for part in layer.parts for row in part.positions.tolist()]
        assert got == shared(scores, [list(range(N))] * 2, k, share, w)
        assert isinstance(layer, SplitLayer)
        assert sum(map(len, got)) == 2 * k
        # memory is freed: as many bytes as entries
        assert layer.nbytes == 2 * k * (layer.parts[0].keys.shape[-1] * 2) * 4
        lengths |= {len(own) for own in got}
    if share < 0.5 and k in (9, 30):
        assert len(lengths) > 1


def test_adakv_shares_again_among_heads_that_differ_already():
    state, _ = random_state(60)
    policy = create("adakv", {"window": 4, "kernel": 1})
    once = grown(policy.compress(state, 30), 10)
    twice = policy.compress(once, 20)
    assert twice.entries == 20
    for old, new in zip(once.layers, twice.layers, strict=True):
        scores, positions = [], []
        for part in old.parts:
            w = 4
            rows = (part.recent_queries[:, -w:].double() @ part.keys[0].double().T) * part.scale
            future = part.positions[0][None] > torch.arange(70 - w, 70)[:, None]
            attention = rows.masked_fill(future, -torch.inf).softmax(-1).sum(1).mean(0)
            positions.append(part.positions[0].tolist())
            scores.append([0.0 if p >= 70 - w else float(a) for p, a in zip(positions[-1], attention, strict=True)])
        got = [part.positions[0].tolist() for part in new.parts]
        assert got == shared(scores, positions, 20, 0.2, 4)


def test_a_part_of_a_split_layer_has_its_own_heads_statistics():
    state, truths = random_state(40)
    layer = create("adakv", {}).compress(state, 20).layers[0]
    truth = truths[0]
    for head, part in enumerate(layer.parts):
        own = slice(head * GROUP, (head + 1) * GROUP)
        queries = rotated(truth.queries, range(40))[own]
        torch.testing.assert_close(part.recent_queries.double(), queries, rtol=0, atol=1e-5)
        torch.testing.assert_close(part.query_mean.double(), truth.queries[own, 4:].mean(1), rtol=0, atol=1e-5)
        assert part.query_cov.shape == (H // HKV, 8, 8)


def test_decoding_goes_on_from_heads_of_different_lengths(prompt):
    """Compare the next tokens' logits with those of a full cache in which the evicted entries are masked."""
    state = engine("qwen2").extend(None, tokens(60))
    compressed = create("adakv", {"window": 4}).compress(state, 20)
    more = tokens(6, seed=5)
    mask = [torch.ones(66, 66, dtype=torch.bool).tril().repeat(HKV, 1, 1) for _ in range(3)]
    for number, heads in enumerate(positions_of(compressed)):
        for head, kept in enumerate(heads):
            mask[number][head, 60:, :60] = False
            mask[number][head, 60:, kept] = True
    logits, _ = reference("qwen2", tokens(60) + more, mask)
    for step, token in enumerate(more):
        compressed = engine("qwen2").extend(compressed, [token])
        torch.testing.assert_close(compressed.logits, logits[60 + step], rtol=0, atol=1e-4)
