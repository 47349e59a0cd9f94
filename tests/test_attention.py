"""Attention statistics compared with attention from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import Case, eager
from attention_strategies import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kv_transition.attention import blocks, statistics
from kv_transition.attention.blocks import window_sums
from kv_transition.attention.statistics import attention_statistics, choose
from kv_transition.errors import UserError

BOTH = {"column_sums": True, "entropy": True}


def assert_exact(found: torch.Tensor, true: torch.Tensor, absolute: float = 1e-6) -> None:
    """Check a relative error of 1e-5 and, for values near zero, the absolute error."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=absolute)


def check(case: Case, implementation: str, entropy_error: float = 1e-6) -> None:
    queries, keys, bias = case.tensors()
    found = attention_statistics(
        queries, keys, case.scale, **BOTH, window=case.window, bias=bias, implementation=implementation
    )
    sums, entropy = eager(queries, keys, case.scale, case.window, bias)
    assert_exact(found.column_sums, sums)
    assert_exact(found.entropy, entropy, entropy_error)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_blocks_are_eager_attention(case):
    check(case, "blocks")


@settings(max_examples=30, deadline=None)
@given(cases(plain=True))
def test_flash_is_eager_attention(case):
    queries, keys, _ = case.tensors()
    # The entropy is a difference of two numbers up to the largest logit in size, each rounded to fp32.
    largest = (queries.norm(dim=-1).max() * keys.norm(dim=-1).max()).item() * case.scale
    check(case, "flash", entropy_error=1e-6 + 4 * torch.finfo(torch.float32).eps * largest)


@pytest.mark.parametrize("window", [None, 1, 5, 40, 500])
@pytest.mark.parametrize("q", [2, 63, 300])
def test_small_blocks_meet_without_gaps(monkeypatch, window, q):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", {"cpu": 1000})
    monkeypatch.setattr(blocks, "_MIN_ROWS", 7)
    check(Case(q=q, n=300, window=window, bias="padded", batch=2), "blocks")


@pytest.mark.parametrize("case", [Case(q=1, n=n, window=w, bias=b) for n, w, b in
                                  [(1, None, "none"), (200, None, "none"), (200, 20, "counts"), (200, 20, "padded"),
                                   (3, 20, "padded")]])  # fmt: skip
@pytest.mark.parametrize("implementation", ["auto", "blocks"])
def test_one_query_is_a_row_of_eager_attention(case, implementation):
    check(case, implementation)


def test_one_query_that_sees_nothing_gives_nothing():
    """Check that a query that sees no entry gives zero column sums and zero entropy."""
    queries, keys, _ = Case(q=1, n=9).tensors()
    bias = torch.full(keys.shape[:-1], -torch.inf)
    found = attention_statistics(queries, keys, 1.0, **BOTH, bias=bias)
    assert found.column_sums.eq(0).all()
    assert found.entropy.eq(0).all()


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_its_rounding(implementation, dtype):
    case = Case(q=200, n=400, d=64, peak=2)
    queries, keys, _ = case.tensors(dtype)
    found = attention_statistics(queries, keys, case.scale, **BOTH, implementation=implementation)
    sums, entropy = eager(queries, keys, case.scale)
    if implementation == "blocks":
        # blocks multiplies in fp32, so that only the inputs are rounded
        assert_exact(found.column_sums, sums)
        assert_exact(found.entropy, entropy)
    else:
        # flash rounds the mean key; the log-sum-exp is stored in several parts and is not rounded
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(found.column_sums.double(), sums, rtol=unit / 16, atol=1e-4)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=4 * unit)


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
@settings(max_examples=15, deadline=None)
@given(case=cases(longest=200, plain=True), data=st.data())
def test_chunks_add_up_to_the_whole(implementation, case, data):
    queries, keys, _ = case.tensors()
    cut = data.draw(st.integers(0, case.q))
    whole = attention_statistics(queries, keys, case.scale, **BOTH, implementation=implementation)
    sums, entropy = torch.zeros_like(whole.column_sums), []
    for start, stop in ((0, cut), (cut, case.q)):
        if start < stop:
            seen = case.n - case.q + stop
            part = attention_statistics(
                queries[:, :, start:stop], keys[:, :, :seen], case.scale, **BOTH, implementation=implementation
            )
            sums[..., :seen] += part.column_sums
            entropy.append(part.entropy)
    torch.testing.assert_close(sums, whole.column_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(entropy, -1), whole.entropy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
def test_known_in_closed_form(implementation):
    # equal logits: the weights of query i are uniform over i + 1 entries
    n = 90
    keys = torch.randn(1, n, 32)
    found = attention_statistics(torch.zeros(2, n, 32), keys, 1.0, **BOTH, implementation=implementation)
    shares = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    assert_exact(found.column_sums[0], shares.flip(0).cumsum(0).flip(0))
    assert_exact(found.entropy, -shares.log(), 1e-5)


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
def test_one_sequence_is_a_batch_of_one(implementation):
    queries, keys, bias = Case(q=30, n=70, bias="counts").tensors()
    bias = bias if implementation == "blocks" else None
    several = attention_statistics(queries, keys, 0.2, **BOTH, bias=bias, implementation=implementation)
    alone = attention_statistics(
        queries[0], keys[0], 0.2, **BOTH, bias=None if bias is None else bias[0], implementation=implementation
    )
    assert torch.equal(alone.column_sums, several.column_sums[0])
    assert torch.equal(alone.entropy, several.entropy[0])


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
@pytest.mark.parametrize("q", [1, 40])
def test_only_what_is_asked_and_nothing_else_touched(implementation, q):
    """Check that only the requested statistics are returned, and that the inputs are unchanged."""
    queries, keys, _ = Case(q=q, n=60).tensors()
    before = queries.clone(), keys.clone()
    both = attention_statistics(queries, keys, 0.2, **BOTH, implementation=implementation)
    sums = attention_statistics(queries, keys, 0.2, column_sums=True, entropy=False, implementation=implementation)
    entropy = attention_statistics(queries, keys, 0.2, column_sums=False, entropy=True, implementation=implementation)
    assert sums.entropy is None
    assert entropy.column_sums is None
    torch.testing.assert_close(sums.column_sums, both.column_sums)
    torch.testing.assert_close(entropy.entropy, both.entropy)
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
def test_any_memory_layout(implementation):
    queries, keys, _ = Case(batch=2, q=40, n=60).tensors()
    # the memory layout of a model: heads interleaved with tokens
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (queries, keys)]
    plain = attention_statistics(queries, keys, 0.2, **BOTH, implementation=implementation)
    found = attention_statistics(*turned, 0.2, **BOTH, implementation=implementation)
    torch.testing.assert_close(found.column_sums, plain.column_sums)
    torch.testing.assert_close(found.entropy, plain.entropy)


class _Largest(TorchDispatchMode):
    """Record the size in bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("implementation", ["blocks", "flash"])
def test_no_tensor_grows_with_the_square(implementation, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", {"cpu": 1 << 16})

    def largest(n: int) -> int:
        queries, keys, _ = Case(q=n, n=n, kv_heads=1, group=2).tensors()
        with _Largest() as seen:
            attention_statistics(queries, keys, 0.2, **BOTH, implementation=implementation)
        return seen.bytes

    sizes = [largest(n) for n in (512, 1024, 2048)]
    assert sizes[1] <= 2.2 * sizes[0]
    assert sizes[2] <= 2.2 * sizes[1]
    assert sizes[2] < 0.1 * 4 * 2 * 2048**2


@settings(max_examples=40, deadline=None)
@given(cases(longest=200), st.data())
def test_window_sums_over_what_is_left(case, data):
    """Compare a few queries on a cache after eviction with a loop over queries and heads."""
    queries, keys, bias = case.tensors()
    w = min(case.q, data.draw(st.integers(1, 9)))
    queries, at = queries[:, :, -w:], torch.arange(case.n - w, case.n)
    kept = data.draw(st.integers(1, case.n))
    generator = torch.Generator().manual_seed(case.seed)
    # every head of every sequence holds different entries
    positions = torch.rand(case.batch, case.kv_heads, case.n, generator=generator).topk(kept).indices.sort().values
    keys = keys.gather(2, positions[..., None].expand(-1, -1, -1, case.d))
    bias = None if bias is None else bias.gather(2, positions)
    found = window_sums(queries, at, keys, positions, case.scale, bias)
    true = torch.zeros(case.batch, case.kv_heads, kept, dtype=torch.float64)
    for b in range(case.batch):
        for h in range(case.kv_heads * case.group):
            kv = h // case.group
            for i in range(w):
                logits = keys[b, kv].double() @ queries[b, h, i].double() * case.scale
                logits += 0 if bias is None else bias[b, kv]
                weights = torch.where(positions[b, kv] <= at[i], (logits - logits.clamp_min(-1e3).max()).exp(), 0)
                if weights.sum() > 0:
                    true[b, kv] += weights / weights.sum() / case.group
    assert_exact(found, true)
    single = window_sums(queries[0], at, keys[0], positions[0], case.scale, None if bias is None else bias[0])
    torch.testing.assert_close(single, found[0])
    each = window_sums(queries, at.expand(case.batch, w), keys, positions, case.scale, bias)
    assert torch.equal(each, found)


def test_count_bias_is_as_good_as_copies():
    """Check that an entry with bias log m receives as much attention as m equal entries together."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 3, 32, generator=generator), torch.randn(2, 8, 32, generator=generator)
    m = 5
    copies = torch.cat([keys[:, :1].expand(-1, m, -1), keys[:, 1:]], 1)
    bias = torch.zeros(2, 8)
    bias[:, 0] = math.log(m)
    merged = attention_statistics(queries, keys, 0.2, **BOTH, bias=bias).column_sums
    apart = attention_statistics(queries, copies, 0.2, **BOTH).column_sums
    torch.testing.assert_close(merged[:, 0], apart[:, :m].sum(1))
    torch.testing.assert_close(merged[:, 1:], apart[:, m:])


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU with Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(statistics, "_ampere", lambda: True)
    monkeypatch.setattr(statistics, "_triton_installed", lambda: True)
    return monkeypatch


def test_auto_takes_triton_where_it_can_run(gpu):
    assert choose("cuda", torch.bfloat16) == "triton"
    assert choose("cuda", torch.float16, window=8, bias=True, head_dim=256) == "triton"
    assert choose("cuda", torch.bfloat16, head_dim=512) == "blocks"
    assert choose("cuda", torch.float32) == "blocks"
    assert choose("cpu", torch.bfloat16) == "blocks"
    gpu.setattr(statistics, "_ampere", lambda: False)
    assert choose("cuda", torch.bfloat16) == "blocks"
    gpu.setattr(statistics, "_ampere", lambda: True)
    gpu.setattr(statistics, "_triton_installed", lambda: False)
    assert choose("cuda", torch.bfloat16) == "blocks"


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "more"),
    [
        ("flash", "cpu", torch.float32, {"window": 8}),
        ("flash", "cpu", torch.float32, {"bias": True}),
        ("flash", "cuda", torch.float32, {}),
        ("flash", "cuda", torch.bfloat16, {"head_dim": 256}),
        ("flash", "cuda", torch.bfloat16, {"head_dim": 60}),
        ("triton", "cpu", torch.float32, {}),
        ("triton", "cuda", torch.float32, {}),
        ("triton", "cuda", torch.bfloat16, {"head_dim": 512}),
        ("eager", "cpu", torch.float32, {}),
    ],
)
def test_what_cannot_serve_is_refused_by_its_key(gpu, implementation, device, dtype, more):
    """Check that an implementation that cannot run is refused with the key model.attention_statistics."""
    with pytest.raises(UserError, match=r"model\.attention_statistics.*auto"):
        choose(device, dtype, implementation=implementation, **more)


def test_a_refused_call_raises():
    queries, keys, _ = Case().tensors()
    with pytest.raises(UserError, match=r"model\.attention_statistics: flash does not support a sliding window"):
        attention_statistics(queries, keys, 0.2, **BOTH, window=8, implementation="flash")
