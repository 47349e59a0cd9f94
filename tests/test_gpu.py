"""Compare the engine on a GPU with the CPU and with attention from its definition.

This needs only torch, transformers, triton, safetensors, pyarrow and pytest: ``pytest -m gpu``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from itertools import pairwise

import pytest
import torch
from models import engine, random_model, reference, sliding_model, tokens
from transformers import AttentionInterface

from kv_transition.budget import Budget
from kv_transition.cache.state import CacheState, SplitLayer, same
from kv_transition.cache.store import PrefillStore
from kv_transition.engines import loading
from kv_transition.engines.compiled import CompiledDecoder
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.run.decode import Answer, Setting, answer, answer_all
from kv_transition.studies.grid import run as cell

DEVICE = "cuda"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 65536,
    "initializer_range": 0.007,
}
"""64 channels per head, as GPU kernels require, and attention that is not more peaked than in the small models"""


def made(device: str, family: str = "qwen2", dtype: torch.dtype = torch.float32, *, statistics="auto", **shape):
    AttentionInterface.register(ATTENTION, attention_function)
    model = random_model(family, **shape).to(device, dtype).requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    return LocalEngine(model, statistics=statistics)


def policy(kind: str):
    return create(kind, hyper_parameters(kind))


def on_cpu(state: CacheState) -> CacheState:
    def moved(layer):
        if isinstance(layer, SplitLayer):
            return SplitLayer(tuple(moved(part) for part in layer.parts))
        tensors = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
        return dataclasses.replace(
            layer, room=None, **{n: t.cpu() for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        )

    return dataclasses.replace(state, layers=tuple(map(moved, state.layers)), logits=state.logits.cpu())


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_states_are_those_of_the_cpu(family):
    local = made(DEVICE, family)
    here, there = (e.extend(e.extend(None, tokens(90)), tokens(7, seed=1)) for e in (engine(family), local))
    assert all(layer.keys.device.type == DEVICE for layer in there.layers)
    assert same(here, on_cpu(there), rtol=1e-3, atol=1e-3)


def test_layers_with_a_sliding_window_are_those_of_the_cpu():
    ids = tokens(90)
    here = sliding_model()[0].extend(None, ids)
    moved, _ = sliding_model()
    there = LocalEngine(moved.model.to(DEVICE)).extend(None, ids)
    assert same(here, on_cpu(there), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_no_further_off_than_on_the_cpu(dtype):
    ids = tokens(400)
    exact = made("cpu", **WIDE).extend(None, ids)
    yardstick, got = (made(device, dtype=dtype, **WIDE).extend(None, ids) for device in ("cpu", DEVICE))
    got = on_cpu(got)

    def error(state, of):
        return float((of(state).float() - of(exact).float()).norm())

    of_layer = {name: lambda s, n=name: getattr(s.layers[0], n) for name in ("keys", "attn_sum", "query_entropy")}
    for of in (lambda s: s.logits, *of_layer.values()):
        assert error(got, of) <= 3 * error(yardstick, of) + 1e-3


def visible(state: CacheState, total: int) -> list[torch.Tensor]:
    """Return masks in which tokens after ``state`` see only the entries that it holds and each other."""
    masks = []
    for layer in state.layers:
        rows = [head for part in layer.parts for head in part.positions.cpu()]
        mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
        for head, positions in enumerate(rows):
            gone = torch.ones(state.length, dtype=torch.bool)
            gone[positions] = False
            mask[head, state.length :, : state.length] &= ~gone
        masks.append(mask)
    return masks


@pytest.mark.parametrize("kind", ["snapkv", "h2o", "tova", "streaming_llm", "adakv", "pyramidkv", "knorm"])
def test_eviction_is_masking(kind):
    local = made(DEVICE)
    state = policy(kind).compress(local.extend(None, tokens(60)), 20)
    after = [5, 9, 3, 1]
    expected = reference("qwen2", [*tokens(60), *after], visible(state, 64))[0][60:]
    got = []
    for token in after:
        state = local.extend(state, [token], frozenset())
        got.append(state.logits.cpu())
    torch.testing.assert_close(torch.stack(got), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("kind", "sizes"), [("full", [50, 33, 70]), ("snapkv", [50, 33, 70]), ("h2o", [50, 50, 50])])
def test_a_batch_answers_as_one_by_one(kind, sizes):
    local = made(DEVICE)
    chosen = policy(kind)
    budget = Budget.parse("r1" if kind == "full" else "r0.4")
    setting = Setting(policy=chosen, budget=budget, mode="before_question")
    question = tokens(4, seed=50)
    read = [local.prefill(tokens(n, seed=i), question) for i, n in enumerate(sizes)]
    together = answer_all(local, read, [question] * 3, setting, [Answer(0, 12) for _ in sizes])
    alone = [answer(local, each, question, setting, 12, 0) for each in read]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.kept for a in together] == [a.kept for a in alone]


@pytest.mark.parametrize("implementation", ["flash", "triton"])
def test_statistics_are_those_of_blocks(implementation):
    ids = tokens(700)
    try:
        got = made(DEVICE, dtype=torch.bfloat16, statistics=implementation, **WIDE)
        got = got.extend(got.extend(None, ids[:500]), ids[500:])
    except UserError as error:
        pytest.skip(str(error))
    blocks = made(DEVICE, dtype=torch.bfloat16, statistics="blocks", **WIDE)
    expected = blocks.extend(blocks.extend(None, ids[:500]), ids[500:])
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        assert (mine.attn_sum - theirs.attn_sum).norm() <= 0.01 * theirs.attn_sum.norm()
        assert (mine.query_entropy - theirs.query_entropy).norm() <= 0.02 * theirs.query_entropy.norm()


def test_memory_grows_with_the_prompt_and_not_with_its_square():
    local = made(DEVICE, dtype=torch.bfloat16, **WIDE)
    local.extend(None, tokens(4096))
    weights = torch.cuda.memory_allocated() / 2**20
    peaks = []
    for n in (4096, 8192, 16384):
        local.peak_memory_mb()
        local.extend(None, tokens(n))
        peaks.append(local.peak_memory_mb() - weights)
    assert peaks[0] > 0
    assert all(after <= 2.2 * before for before, after in pairwise(peaks)), peaks


class Words:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def test_what_does_not_fit_is_a_row_and_the_others_are_answered(tmp_path):
    local = made(DEVICE, dtype=torch.bfloat16, **WIDE)
    local.tokenizer = Words()
    examples = [
        {
            "task": "t", "example_id": f"e{n}", "bin": 0, "prompt_sha256": f"sha{n}", "prompt_len": n + 5,
            "context_ids": tokens(n), "question_ids": tokens(5, seed=9), "max_new_tokens": 4,
        }
        for n in (50, 60_000, 40)
    ]  # fmt: skip
    spec = {
        "mode": "before_question", "policy": "snapkv", "kind": "snapkv", "hyper_parameters": {}, "budget": "r0.5",
        "first_token": "compressed", "decoding": {"temperature": 0.0, "repeats": 1, "batch": 3, "seed": 0},
    }  # fmt: skip
    local.extend(None, tokens(64))
    torch.cuda.empty_cache()
    # The allocator refuses memory like a full card, without taking memory from other processes.
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        rows = cell.rows(local, examples, spec, PrefillStore(tmp_path / "model", "never"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert [row.get("error", "")[:4] for row in rows] == ["", "OOM:", ""]
    assert rows[0]["peak_mem_mb"] > 0


@pytest.mark.parametrize(
    ("kind", "sliding", "dtype"),
    [("pyramidkv", False, torch.float32), ("snapkv", True, torch.float32), ("adakv", False, torch.bfloat16)],
)
def test_compiled_decoding_is_the_plain_loop(kind, sliding, dtype):
    local = LocalEngine(sliding_model()[0].model.to(DEVICE, dtype)) if sliding else made(DEVICE, dtype=dtype, **WIDE)
    decoder = CompiledDecoder(local)
    # the second batch replays the graph that was recorded for the first
    for sizes in ([400, 90], [230, 41]):
        plain = [policy(kind).compress(local.extend(None, tokens(n, seed=n)), n // 3) for n in sizes]
        decoder.load(plain, 8)
        for _ in range(8):
            expected = torch.stack([state.logits for state in plain])
            atol = 1e-3 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
            torch.testing.assert_close(decoder.logits, expected, rtol=0, atol=atol)
            said = [int(state.logits.argmax()) for state in plain]
            decoder.read(dict(enumerate(said)))
            plain = [local.extend(state, [token], frozenset()) for state, token in zip(plain, said, strict=True)]
        for number, state in enumerate(plain):
            mine = decoder.state(number)
            assert (mine.nbytes, mine.length, mine.entries) == (state.nbytes, state.length, state.entries)
            if dtype == torch.float32:
                assert same(on_cpu(mine), on_cpu(state), atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_2_is_sdpa():
    ids = tokens(300)
    flash = made(DEVICE, dtype=torch.bfloat16, **WIDE)
    assert flash.attention == "flash_attention_2"
    plain = LocalEngine(flash.model, attention="sdpa")
    a, b = (e.extend(e.extend(None, ids[:200]), ids[200:]).logits for e in (flash, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(b.abs().max()))


def test_a_model_in_4_bit_reads_and_forgets(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    random_model("qwen2", **WIDE).save_pretrained(tmp_path)
    nf4 = {"kind": "nf4", "double_quantization": True, "compute_dtype": "bfloat16"}
    model = loading.load_model(str(tmp_path), dtype="bfloat16", device=DEVICE, quantization=nf4)
    local = LocalEngine(model)
    exact = made("cpu", **WIDE).extend(None, tokens(100))
    state = local.extend(None, tokens(100))
    assert torch.cosine_similarity(state.logits.cpu(), exact.logits, dim=0) > 0.8
    kept = policy("snapkv").compress(state, 30)
    assert local.extend(kept, [1], frozenset()).entries == 31
