"""Test CriticalKV and KVzip, which also use the model's projections and a second reading of the text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import VOCABULARY, engine, random_model, reference
from policy_states import HKV, best, positions_of, random_state

from kv_transition.engines import reconstruct
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create

N = 60
IDS = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(5))[:N].tolist()
GROUP = 2


def test_the_output_norm_is_that_of_each_value_as_the_model_projects_it():
    """Compare with the model's own output projection of one value at a time, with all other channels zero."""
    state = engine("qwen2").extend(None, IDS, frozenset({"output_norm"}))
    model = random_model("qwen2")
    _, layers = reference("qwen2", IDS)
    for number, layer in enumerate(state.layers):
        values = layers[number][3]
        projection = model.model.layers[number].self_attn.o_proj
        d = values.shape[-1]
        for head in range(HKV):
            for j in (0, 17, N - 1):
                norms = []
                for g in range(GROUP):
                    alone = torch.zeros(1, projection.in_features)
                    own = (head * GROUP + g) * d
                    alone[0, own : own + d] = layer.values[head, j]
                    norms.append(projection(alone).abs().sum().item())
                assert float(layer.output_norm[head, j]) == pytest.approx(sum(norms) / GROUP, rel=1e-5)
    longer = engine("qwen2").extend(state, [1, 2], frozenset({"output_norm"}))
    assert torch.equal(longer.layers[0].output_norm[:, :N], state.layers[0].output_norm)
    assert (longer.layers[0].output_norm[:, N:] > 0).all()


@pytest.mark.parametrize("k", [1, 2, 9, 30, 51])
@pytest.mark.parametrize("kind", ["snapkv", "knorm"])
def test_the_second_half_of_the_budget_goes_by_score_times_norm(kind, k):
    state, _ = random_state(N, seed=8)
    options = {"window": 6} if kind == "snapkv" else {}
    got = positions_of(create(kind, options | {"weighting": "projected_values"}).compress(state, k))
    plain = create(kind, options)
    for number, (layer, heads) in enumerate(zip(state.layers, got, strict=True)):
        scores = plain.score(layer, number, k, N, 0).tolist()
        for head in range(HKV):
            own, norms = scores[head], layer.output_norm[head].tolist()
            least = min(0.0, *own)
            first = best(own, max(1, k // 2))
            queries = min(6, k // 2) or 1 if kind == "snapkv" else 1  # queries whose attention the score of snapkv sums
            product = [(s - least + 1e-4 * queries) * norm for s, norm in zip(own, norms, strict=True)]
            rest = [j for j in best([-1.0 if i in first else p for i, p in enumerate(product)], k) if j not in first]
            rest = sorted(rest, key=lambda j: (-product[j], j))[: k - len(first)]
            protected = {j for j in range(N) if own[j] == float("inf")}
            assert set(heads[head]) == set(first) | set(rest)
            assert protected <= set(heads[head])


def test_with_adaptive_heads_the_budgets_follow_from_the_scores_alone():
    """Check that values' norms change the kept entries but not the number of entries of each head."""
    state, _ = random_state(N, seed=8)
    plain = create("adakv", {"window": 6}).compress(state, 20)
    weighted = create("adakv", {"window": 6, "weighting": "projected_values"}).compress(state, 20)
    assert [[p.n for p in x.parts] for x in plain.layers] == [[p.n for p in x.parts] for x in weighted.layers]
    assert positions_of(plain) != positions_of(weighted)


def repeated(ids: list[int], start: int, stop: int, sinks: int, before: int) -> list[torch.Tensor]:
    """Return per layer [Hkv, stop - start] the maximum attention to ids[start:stop] while an eager model repeats it.

    The repetition follows all of ``ids``. Attention is normalized over the sinks, the chunk and the repeated tokens.
    """
    said = [*ids[start - before : start], *ids[start:stop]]
    found = []
    for weights, *_ in reference("qwen2", [*ids, *said])[1]:
        rows = weights[:, len(ids) :]
        columns = [*range(sinks), *range(start, stop), *range(len(ids), len(ids) + len(said))]
        share = rows[:, :, columns] / rows[:, :, columns].sum(-1, keepdim=True)
        most = share[:, :, sinks : sinks + stop - start].amax(1)
        found.append(most.view(HKV, GROUP, -1).amax(1))
    return found


def test_the_reconstruction_is_the_greatest_attention_while_the_text_is_repeated():
    state = engine("qwen2").extend(None, IDS, frozenset({"reconstruction"}))
    for layer, expected in zip(state.layers, repeated(IDS, 0, N, 0, 0), strict=True):
        torch.testing.assert_close(layer.reconstruction, expected.float(), rtol=1e-3, atol=1e-5)
    plain = engine("qwen2").extend(None, IDS, frozenset())
    assert state.length == plain.length
    assert torch.equal(state.logits, plain.logits)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(state.layers, plain.layers, strict=True))


def test_a_long_text_is_repeated_in_pieces(monkeypatch):
    monkeypatch.setattr(reconstruct, "CHUNK", 25)
    monkeypatch.setattr(reconstruct, "_ROWS", 7)
    state = engine("qwen2").extend(None, IDS, frozenset({"reconstruction"}))
    pieces = [repeated(IDS, 0, 25, 0, 0), repeated(IDS, 25, 50, 4, 8), repeated(IDS, 50, 60, 4, 8)]
    for number, layer in enumerate(state.layers):
        expected = torch.cat([piece[number] for piece in pieces], -1)
        torch.testing.assert_close(layer.reconstruction, expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 16])
def test_an_engine_that_reads_in_pieces_finds_the_same_reconstruction(chunk):
    state = LocalEngine(engine("qwen2").model, chunk_tokens=chunk).extend(None, IDS, frozenset({"reconstruction"}))
    for layer, expected in zip(state.layers, repeated(IDS, 0, N, 0, 0), strict=True):
        torch.testing.assert_close(layer.reconstruction, expected.float(), rtol=1e-3, atol=1e-5)


def test_what_is_read_later_is_repeated_by_itself_and_a_single_token_is_not():
    """Check that text that is read later is repeated on its own, and that a single token is not repeated."""
    kept = frozenset({"reconstruction"})
    first = engine("qwen2").extend(None, IDS[:40], kept)
    both = engine("qwen2").extend(first, IDS[40:], kept)
    one = engine("qwen2").extend(both, [3], kept)
    for before, after, last in zip(first.layers, both.layers, one.layers, strict=True):
        assert torch.equal(before.reconstruction, after.reconstruction[:, :40])
        assert (after.reconstruction <= 1).all()
        assert last.reconstruction[:, -1].isinf().all()


@pytest.mark.parametrize("k", [1, 5, 20, 45])
def test_kvzip_keeps_the_best_of_all_heads_of_all_layers(k):
    state, _ = random_state(N, seed=3)
    compressed = create("kvzip", {}).compress(state, k)
    sinks = min(4, k // 2)
    ranked = []
    for number, layer in enumerate(state.layers):
        for head in range(HKV):
            own = layer.reconstruction[head].tolist()
            mine = [float("inf") if j < sinks else own[j] for j in range(N)]
            mine[best(mine, 1)[0]] = float("inf")
            ranked += [(-mine[j], j, number * HKV + head) for j in range(N)]
    expected: list[list[int]] = [[] for _ in range(len(state.layers) * HKV)]
    for _, j, row in sorted(ranked)[: k * len(expected)]:
        expected[row].append(j)
    got = [row for layer in positions_of(compressed) for row in layer]
    assert got == [sorted(own) for own in expected]
    assert compressed.entries == k
    assert k in (1,) or len({len(own) for own in got}) > 1


def test_what_was_not_kept_up_is_missed_in_a_sentence():
    state, _ = random_state(30)
    for kind, name in (("kvzip", "reconstruction"), ("criticalkv", "output_norm")):
        bare = replace(state, layers=tuple(layer.without(frozenset({name})) for layer in state.layers))
        with pytest.raises(UserError, match=f"{kind} reads {name}"):
            create(kind, {}).compress(bare, 10)
