"""Test attention statistics on a GPU: each implementation compared with attention from its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, eager

from kv_transition.attention import statistics
from kv_transition.attention.statistics import attention_statistics, choose
from kv_transition.errors import UserError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOTH = {"column_sums": True, "entropy": True}
CASES = [
    Case(q=700, n=700, d=64),
    Case(q=700, n=700, d=128, kv_heads=4, group=7),
    Case(q=130, n=900, d=128, peak=4),
    Case(q=2, n=900, d=128),
    Case(q=1, n=900, d=128),
    Case(q=300, n=300, d=96, batch=2),
    Case(q=300, n=300, d=256),
    Case(q=300, n=500, d=64, window=70),
    Case(q=300, n=500, d=64, bias="counts", batch=2),
    Case(q=300, n=500, d=64, bias="padded", window=400, batch=2),
]


def served(implementation: str, case: Case, dtype: torch.dtype) -> None:
    try:
        choose(
            "cuda", dtype, window=case.window, bias=case.bias != "none", head_dim=case.d, implementation=implementation
        )
    except UserError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", statistics.IMPLEMENTATIONS)
def test_is_eager_attention(implementation, case, dtype):
    served(implementation, case, dtype)
    queries, keys, bias = case.tensors(dtype, "cuda")
    found = attention_statistics(
        queries, keys, case.scale, **BOTH, window=case.window, bias=bias, implementation=implementation
    )
    sums, entropy = eager(queries, keys, case.scale, case.window, bias)
    # flash rounds the mean key; all other values have at least fp32 precision
    unit = torch.finfo(dtype).eps
    rounded = implementation == "flash" and case.q > 1
    torch.testing.assert_close(found.column_sums.double(), sums, rtol=unit / 16 if rounded else 1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=4 * unit if rounded else 1e-5)


@pytest.mark.parametrize("implementation", statistics.IMPLEMENTATIONS)
def test_runs_are_equal(implementation):
    case = Case(q=1000, n=1500, d=128, kv_heads=4, group=7)
    served(implementation, case, torch.bfloat16)
    queries, keys, _ = case.tensors(torch.bfloat16, "cuda")
    first, second = (
        attention_statistics(queries, keys, case.scale, **BOTH, implementation=implementation) for _ in range(2)
    )
    assert torch.equal(first.column_sums, second.column_sums)
    assert torch.equal(first.entropy, second.entropy)


@pytest.mark.parametrize("implementation", statistics.IMPLEMENTATIONS)
def test_memory_grows_with_the_length(implementation, monkeypatch):
    monkeypatch.setattr("kv_transition.attention.blocks._BLOCK_BYTES", {"cuda": 1 << 20})
    served(implementation, Case(d=128), torch.bfloat16)

    def peak(n: int) -> int:
        queries, keys, _ = Case(q=n, n=n, d=128, kv_heads=4, group=7).tensors(torch.bfloat16, "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention_statistics(queries, keys, 0.1, **BOTH, implementation=implementation)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peaks = [peak(n) for n in (4096, 8192, 16384)]
    assert peaks[1] <= 2.2 * peaks[0]
    assert peaks[2] <= 2.2 * peaks[1]


def test_auto_is_triton_where_it_is_installed():
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert choose("cuda", torch.bfloat16, head_dim=128) == "triton"
