"""Compare the Triton kernels with attention from its definition, interpreted; compile them for other GPUs.

Triton decides at import time whether it interprets kernels, so the tests named ``interpreted`` run in a separate
process. They use fp32 only, because the interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

from attention_cases import Case, eager  # noqa: E402
from attention_strategies import cases  # noqa: E402
from hypothesis import given, settings  # noqa: E402

from kv_transition.attention import triton_kernels  # noqa: E402
from kv_transition.attention.statistics import attention_statistics  # noqa: E402

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.skipif(INTERPRETS, reason="starts that process")
def test_in_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "-k",
            "interpreted",
            __file__,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def check(case: Case) -> None:
    queries, keys, bias = case.tensors()
    found = attention_statistics(
        queries,
        keys,
        case.scale,
        column_sums=True,
        entropy=True,
        window=case.window,
        bias=bias,
        implementation="triton",
    )
    sums, entropy = eager(queries, keys, case.scale, case.window, bias)
    torch.testing.assert_close(found.column_sums.double(), sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Use small tiles, so that few tokens give many tiles."""
    tiles = triton_kernels.tiles
    monkeypatch.setattr(triton_kernels, "tiles", lambda d: {**tiles(d), "BQ": 32, "BK": 16})


@interpreted
@pytest.mark.parametrize("bias", ["none", "padded"])
@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("q", [2, 131])
def test_interpreted_tiles_meet_without_gaps(small_tiles, q, window, bias):
    check(Case(batch=2, kv_heads=1, group=2, q=q, n=131, window=window, bias=bias))


@interpreted
@pytest.mark.parametrize("d", [80, 256])
def test_interpreted_with_the_tiles_of_a_gpu(d):
    check(Case(kv_heads=2, group=2, q=150, n=330, d=d))


@interpreted
@settings(max_examples=10, deadline=None)
@given(cases(longest=150, group=4))
def test_interpreted_is_eager_attention(case):
    check(case)


@interpreted
def test_interpreted_any_memory_layout():
    queries, keys, _ = Case(batch=2, q=40, n=60).tensors()
    layouts = [
        (queries, keys),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (queries, keys)),
        tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (queries, keys)),
    ]
    first, *others = (
        attention_statistics(q, k, 0.2, column_sums=True, entropy=True, implementation="triton") for q, k in layouts
    )
    for other in others:
        assert torch.equal(first.column_sums, other.column_sums)
        assert torch.equal(first.entropy, other.entropy)


@interpreted
@pytest.mark.parametrize("wanted", [("column_sums",), ("entropy",)])
def test_interpreted_only_what_is_asked(wanted):
    queries, keys, _ = Case(q=40, n=60).tensors()
    found = attention_statistics(
        queries[0],
        keys[0],
        0.2,
        **{name: name in wanted for name in ("column_sums", "entropy")},
        implementation="triton",
    )
    both = attention_statistics(queries[0], keys[0], 0.2, column_sums=True, entropy=True, implementation="triton")
    for name in ("column_sums", "entropy"):
        value = getattr(found, name)
        assert (value is not None) == (name in wanted)
        assert value is None or torch.equal(value, getattr(both, name))


@pytest.mark.skipif(INTERPRETS, reason="compiles")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("d", "plain"), [(128, True), (80, False), (256, True)])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_rows", "_columns"])
def test_compiles_for_a_gpu_that_is_not_here(kernel, capability, d, plain, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    options = triton_kernels.tiles(d)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GROUP": 7, "BIAS": not plain, "WINDOW": not plain, "ENTROPY": True, **options}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {"Q": "*bf16", "K": "*bf16", "scale": "fp32"} | dict.fromkeys(("Bias", "LSE", "Entropy", "Sums"), "*fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    assert compiled.asm["cubin"]
    # the memory that a multiprocessor of the smallest such GPU (compute capability 8.6) can give one program
    assert compiled.metadata.shared <= 99 * 1024
