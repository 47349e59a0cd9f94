"""Compare packed tensors with rounding number by number, and test general properties."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transition.cache.quantize import Packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_and_bytes_are_those_of_the_definition(bits):
    """Compare with level = round((x - min) / scale) in fp32, one group of 8 channels; the first channel has the lowest
    bits."""
    x = vectors(3, 8)
    packed = Packed.pack(x, bits)
    for row in range(3):
        numbers = [float(v) for v in x[row]]
        least, levels = min(numbers), 2**bits - 1
        scale = (max(numbers) - least) / levels
        codes = [round((v - least) / scale) for v in numbers]
        a_byte = 8 // bits
        expected = [sum(c << (bits * i) for i, c in enumerate(codes[b : b + a_byte])) for b in range(0, 8, a_byte)]
        assert packed.codes[row].tolist() == expected
        assert packed.dense()[row].tolist() == pytest.approx([least + c * scale for c in codes], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    d=st.sampled_from([8, 64, 80, 96, 128, 192, 256]),
    n=st.integers(0, 5),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_no_number_is_further_than_half_a_level_from_its_own(bits, dtype, d, n, lead, size, seed):
    x = (vectors(*lead, n, d, seed=seed) * size).to(dtype)
    packed = Packed.pack(x, bits)
    assert packed.shape == x.shape
    dense = packed.dense()
    assert dense.dtype == dtype
    groups = packed.scale.shape[-1]
    assert d % groups == 0
    assert d // groups <= 64
    own = x.float().unflatten(-1, (groups, -1))
    spread = own.amax(-1) - own.amin(-1) if n else own.sum(-1)
    # half a level, plus the rounding of scale and zero point, plus the rounding of the result
    coarse = 0.0 if dtype == torch.float32 else 2.0**-10
    bound = spread / (2**bits - 1) / 2 + (own.abs().amax(-1) if n else 0) * (2 * coarse + torch.finfo(dtype).eps) + 1e-6
    error = (dense.float().unflatten(-1, (groups, -1)) - own).abs()
    assert (error <= bound.unsqueeze(-1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_appending_is_packing_all_at_once_and_cutting_undoes_it(bits, dtype):
    x = vectors(2, 9, 80, dtype=dtype)
    whole = Packed.pack(x, bits)
    grown = Packed.pack(x[:, :5], bits).append(x[:, 5:8]).append(x[:, 8:])
    for name, tensor in whole.tensors().items():
        assert torch.equal(grown.tensors()[name], tensor)
    assert torch.equal(grown.cut(0, 5).dense(), Packed.pack(x[:, :5], bits).dense())
    assert torch.equal(grown.cut(2, 7).dense(), whole.dense()[:, 2:7])


@pytest.mark.parametrize(
    ("bits", "dtype", "d", "expected"),
    [
        # per vector: codes, and a scale and a zero point for each group
        (4, torch.bfloat16, 128, 64 + 2 * 4),
        (8, torch.bfloat16, 128, 128 + 2 * 4),
        (4, torch.float16, 64, 32 + 4),
        (4, torch.float32, 32, 16 + 8),
        (4, torch.float32, 80, 40 + 2 * 8),  # two groups of 40
    ],
)
def test_bytes_are_what_the_tensors_take(bits, dtype, d, expected):
    assert Packed.pack(vectors(2, 7, d, dtype=dtype), bits).nbytes == 14 * expected


def test_equal_values_and_values_beyond_half_precision():
    constant = torch.full((1, 2, 8), 0.37)
    assert torch.equal(Packed.pack(constant, 4).dense(), constant)
    huge = torch.tensor([[1e30, -1e30, 0.0, 5.0] * 2], dtype=torch.bfloat16)
    dense = Packed.pack(huge, 8).dense().float()
    assert dense.isfinite().all()
    assert dense[0, 0] == pytest.approx(65504, rel=0.01)
    # fp32 is not clamped
    assert float(Packed.pack(huge.float(), 8).dense()[0, 0]) == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_facts_bring_it_back(dtype):
    packed = Packed.pack(vectors(2, 3, 16, dtype=dtype), 4)
    facts = json.loads(json.dumps(packed.facts()))
    again = Packed.from_tensors(packed.tensors(), facts)
    assert torch.equal(again.dense(), packed.dense())
    assert again.dense().dtype == dtype


def test_a_batch_is_joined_and_taken_apart():
    each = [Packed.pack(vectors(2, 3, 16, seed=seed), 4) for seed in range(3)]
    batch = each[0].joined(each)
    assert batch.shape == (3, 2, 3, 16)
    assert torch.equal(batch.map(lambda t: t[1]).dense(), each[1].dense())
    assert torch.equal(batch.append(vectors(3, 2, 1, 16)).dense()[:, :, :3], batch.dense())


@pytest.mark.parametrize(("d", "bits"), [(8, 3), (7, 4), (8, 16)])
def test_what_does_not_fill_bytes_is_refused(d, bits):
    with pytest.raises(ValueError, match="whole bytes"):
        Packed.pack(vectors(1, d), bits)


def test_more_bits_lose_less():
    x = vectors(64, 128)
    errors = [float((Packed.pack(x, bits).dense() - x).norm()) for bits in (2, 4, 8)]
    # one more bit halves the step between levels
    assert math.log2(errors[0] / errors[1]) == pytest.approx(math.log2(15 / 3), abs=0.3)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(math.log2(255 / 15), abs=0.3)
