"""Compare compiled decoding with the engine's plain loop, token by token; check what causes a new compilation."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, engine, sliding_model, tokens

from kv_transition.cache.state import STATISTICS, same
from kv_transition.engines.compiled import RUN, CompiledDecoder, _attend_one, _rounded
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters

ONCE = ["full", "snapkv", "pyramidkv", "adakv", "knorm", "random", "entropy_merge"]
"""policies that compress once: with equal and unequal counts in layers and heads, and with biased entries"""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs unchanged and counts them."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compressed(local, kind, sizes, budget=0.4):
    policy = create(kind, hyper_parameters(kind) | ({"count_bias": True} if kind == "entropy_merge" else {}))
    states = [local.extend(None, tokens(n, seed=n)) for n in sizes]
    return [policy.compress(state, max(2, int(budget * state.length)), seed=3) for state in states]


def follow(local, decoder, states, steps):
    """Decode greedily in both ways and yield the logits of each step; then compare the final states."""
    plain = [local.extend(state, [5], frozenset()) for state in states]
    decoder.load(plain, steps)
    for _ in range(steps):
        yield decoder.logits, torch.stack([state.logits for state in plain])
        said = [int(state.logits.argmax()) for state in plain]
        decoder.read(dict(enumerate(said)))
        plain = [local.extend(state, [token], frozenset()) for state, token in zip(plain, said, strict=True)]
    yield decoder.logits, torch.stack([state.logits for state in plain])
    for number, state in enumerate(plain):
        assert decoder.entries(number) == state.entries
        mine = decoder.state(number)
        assert mine.nbytes == state.nbytes
        assert mine.total_nbytes == state.total_nbytes
        assert same(mine, state, atol=1e-4)


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_logits_and_states_are_those_of_the_plain_loop(family, kind):
    local = engine(family)
    decoder = CompiledDecoder(local, backend="eager")
    # different lengths, so that all sequences but one are padded
    for got, expected in follow(local, decoder, compressed(local, kind, [90, 41, 70]), 6):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert got.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("sizes", [[9, 90], [90, 60]])
def test_layers_with_a_sliding_window_go_on_forgetting(sizes):
    local, _ = sliding_model()
    decoder = CompiledDecoder(local, backend="eager")
    # more steps than the window size of 16
    for got, expected in follow(local, decoder, compressed(local, "snapkv", sizes), 20):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same():
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="inductor")
    for got, expected in follow(local, decoder, compressed(local, "pyramidkv", [90, 41]), 4):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_one_graph_serves_all_lengths_up_to_its_capacity():
    local, counting = engine("qwen2"), Counting()
    decoder = CompiledDecoder(local, backend=counting)
    for sizes in ([90, 41], [60, 33], [20], [200, 12], [90, 90]):
        for got, expected in follow(local, decoder, compressed(local, "pyramidkv", sizes), 3):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert counting.graphs == 1
    # one more sequence, and a sequence that is longer than the buffers
    for sizes in ([30, 30, 30], [RUN + 20]):
        for got, expected in follow(local, decoder, compressed(local, "full", sizes, budget=1), 3):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert counting.graphs == 3


def test_sequences_that_end_leave_the_others_as_they_were():
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="eager")
    states = compressed(local, "snapkv", [50, 64, 33])
    decoder.load(states, 4)
    decoder.read({0: 1, 1: 2, 2: 3})
    decoder.read({1: 4})
    assert decoder.live == [1]
    alone = local.extend(local.extend(states[1], [2], frozenset()), [4], frozenset())
    assert decoder.logits.shape == (1, VOCABULARY)
    torch.testing.assert_close(decoder.logits[0], alone.logits, rtol=0, atol=1e-4)
    assert same(decoder.state(1), alone, atol=1e-4)


def test_no_more_is_read_than_there_is_room_for():
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="eager")
    decoder.load(compressed(local, "full", [20], budget=1), 1)
    decoder.read({0: 1})
    with pytest.raises(ValueError, match="space for 1"):
        decoder.read({0: 1})


def test_the_states_themselves_are_left_alone():
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="eager")
    states, copies = (compressed(local, "adakv", [50, 64]) for _ in range(2))
    decoder.load(states, 2)
    decoder.read({0: 1, 1: 2})
    assert all(same(a, b) for a, b in zip(states, copies, strict=True))


def test_what_it_cannot_take_is_said():
    """Check that compiled decoding names the reason why it cannot run."""
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="eager")
    assert decoder.refusal(compressed(local, "full", [20])) is None
    assert "quantized" in decoder.refusal(compressed(local, "quantized", [20]))
    # on a CPU, compilation takes minutes and brings no gain
    assert "GPU" in CompiledDecoder(local).refusal(compressed(local, "full", [20]))


def test_a_model_over_several_devices_is_refused(monkeypatch):
    local = engine("qwen2")
    monkeypatch.setattr(local.model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    decoder = CompiledDecoder(local, backend="eager")
    assert "several devices" in decoder.refusal(compressed(local, "full", [20]))


def test_a_model_that_cannot_be_compiled_is_one_sentence():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend=broken)
    with pytest.raises(UserError, match=r"decoding\.compile: .*no compiler here"):
        decoder.load(compressed(local, "full", [20]), 2)


def test_buffers_that_did_not_fit_are_not_kept_for_half_the_batch(monkeypatch):
    local, rows = engine("qwen2"), []
    decoder = CompiledDecoder(local, backend="eager")
    run = decoder._run

    def short_of_memory():
        rows.append(decoder._memory.rows)
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("no memory left")
        return run()

    monkeypatch.setattr(decoder, "_run", short_of_memory)
    states = compressed(local, "full", [20, 30, 40], budget=1)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.load(states, 2)
    decoder.load(states[:2], 2)
    assert rows[0] == 3
    assert set(rows[1:]) == {2}


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_attention_in_runs_is_attention(scale):
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (
        torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((6, 1), (2, 3 * RUN), (2, 3 * RUN))
    )
    bias = torch.randn(2, 2, 3 * RUN, generator=generator)
    bias[0, :, : 2 * RUN + 7] = -torch.inf  # whole runs without attention
    logits = queries.double() @ keys.double().repeat_interleave(3, 1).mT * scale
    weights = (logits + bias.double().repeat_interleave(3, 1).unsqueeze(2)).softmax(-1)
    expected = weights @ values.double().repeat_interleave(3, 1)
    torch.testing.assert_close(_attend_one(queries, keys, values, bias, scale).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 2000, 4097, 16384, 16385, 131_136])
def test_a_capacity_holds_what_is_asked_and_not_much_more(n):
    """Check that the buffer capacity is at least n, a multiple of RUN, and at most about 25 % larger."""
    capacity = _rounded(n)
    assert capacity % RUN == 0
    assert n <= capacity < max(n + RUN, 1.25 * n + 1)


def test_statistics_are_dropped():
    local = engine("qwen2")
    decoder = CompiledDecoder(local, backend="eager")
    decoder.load([local.extend(None, tokens(20))], 1)
    assert all(getattr(layer, name) is None for layer in decoder.state(0).layers for name in STATISTICS)
