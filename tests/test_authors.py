"""Compare with the authors' own code of CAKE, KVzip and R-KV at the same K.

``KVT_AUTHORS`` names a folder with checkouts of their repositories: `cakekv`, `KVzip` and `R-KV`. Their functions get
the queries, keys and values of an eager model and return the kept entries; this project must keep the same sets. If
the definitions differ, docs/policies.md says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers.cache_utils
from models import FAMILIES, engine, reference, tokens
from transformers.models.llama import modeling_llama

from kv_transition.engines import reconstruct
from kv_transition.policies.catalog import create

AUTHORS = Path(os.environ.get("KVT_AUTHORS", "/nowhere"))

N, HKV = 400, 2
IDS = tokens(N, seed=3)
KEPT = (320, 240, 160, 80)  # budgets 0.8, 0.6, 0.4 and 0.2


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (AUTHORS / folder).is_dir(), reason=f"there is no checkout of {folder} in the folder KVT_AUTHORS"
    )


def source(name: str, path: Path, **around: object) -> ModuleType:
    """Return the module of a file. If ``name`` has a package, the package contains only the attributes ``around``."""
    package = name.rpartition(".")[0]
    if package:
        sys.modules[package] = ModuleType(package)
        vars(sys.modules[package]).update(around)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def places(kept: torch.Tensor, full: torch.Tensor) -> list[list[int]]:
    """Return for each head the indices of the keys in ``full`` [Hkv, n, d] that ``kept`` [Hkv, K, d] contains."""
    same = (full[:, :, None] == kept[:, None]).all(-1).any(-1)
    assert same.sum(-1).tolist() == [kept.shape[1]] * len(kept)
    return [row.nonzero().flatten().tolist() for row in same]


def ours(kind: str, family: str, k: int, **options) -> list[list[list[int]]]:
    policy = create(kind, options)
    state = policy.compress(engine(family).extend(None, IDS, policy.statistics), k)
    return [[row.tolist() for part in layer.parts for row in part.positions] for layer in state.layers]


# CAKE


@pytest.fixture(scope="module")
def cake():
    """Return the authors' cache and attention modules, imported with stubs for names of an older transformers
    version."""
    stub = ModuleType("modeling_llama")
    vars(stub).update({name: getattr(typing, name) for name in typing.__all__})
    vars(stub).update({name: value for name, value in vars(modeling_llama).items() if not name.startswith("__")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers.models.llama.modeling_llama", stub)
        patch.setattr(transformers.cache_utils, "HybridCache", transformers.cache_utils.DynamicCache, raising=False)
        patch.syspath_prepend(AUTHORS / "cakekv")
        return importlib.import_module("cake.cake_cache"), importlib.import_module("cake.model.modify_llama")


class Given(torch.nn.Module):
    """A projection that returns a given result."""

    def __init__(self, result: torch.Tensor):
        super().__init__()
        self.weight, self.result = result, result

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.result


def kept_by_cake(cake, family: str, k: int, window: int, taus: tuple[float, float], gamma: float, cascading: bool):
    """Return the entries of each layer that the authors' attention keeps after the prompt."""
    caches, attention = cake
    layers = reference(family, IDS)[1]
    count = len(layers)
    evict = caches.CakeprefillKVCache(k, window, num_heads=4, num_layers=count, use_cascading=cascading)
    config = SimpleNamespace(
        key_size=[k - window] * count,
        window_size=[window] * count,
        prefill=[True] * count,
        decoding_evict=[None] * count,
        prefill_cake_evict=[evict] * count,
        tau1=taus[0],
        tau2=taus[1],
        gamma=gamma,
    )
    cache = caches.CakeCache()
    for number, (_, q, key, value) in enumerate(layers):
        flat = [x.transpose(0, 1).reshape(1, N, -1) for x in (q, key, value)]
        module = SimpleNamespace(
            config=config,
            layer_idx=number,
            num_heads=4,
            num_key_value_heads=HKV,
            num_key_value_groups=2,
            head_dim=q.shape[-1],
            attention_dropout=0.0,
            training=False,
            is_causal=True,
            _flash_attn_uses_top_left_mask=False,
            q_proj=Given(flat[0]),
            k_proj=Given(flat[1]),
            v_proj=Given(flat[2]),
            o_proj=torch.nn.Identity(),
        )
        turn = (torch.ones(1, N, q.shape[-1]), torch.zeros(1, N, q.shape[-1]))  # the inputs are rotated already
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_flash_attention_forward", lambda queries, *_, **__: queries)
            attention.llama_attn_forward_cake(module, flat[0], past_key_value=cache, position_embeddings=turn)
    return [places(cache.key_cache[i][0], layers[i][2]) for i in range(count)]


@needs("cakekv")
@pytest.mark.parametrize("cascading", [False, True])
@pytest.mark.parametrize(("taus", "gamma"), [((1.0, 1.0), 200.0), ((1.6, 0.4), 5.0)])
@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_cake_keeps_what_its_authors_code_keeps(cake, capsys, family, k, taus, gamma, cascading):
    window = 8
    theirs = kept_by_cake(cake, family, k, window, taus, gamma, cascading)
    assert sum(len(layer[0]) for layer in theirs) == k * len(theirs)
    assert len({len(layer[0]) for layer in theirs}) > 1
    assert ours("cake", family, k, window=window, tau1=taus[0], tau2=taus[1], gamma=gamma) == theirs


# KVzip


def kept_by_kvzip(kvzip, family: str, k: int, chunk: int) -> list[list[list[int]]]:
    """Return the entries kept by the authors' score and threshold, with an eager model that repeats the text after
    itself."""
    layers = len(reference(family, IDS)[1])
    score = kvzip.KVScore()
    score.n_layers, score.n_heads_kv, score.dtype, score.device = layers, HKV, torch.float32, "cpu"
    score.init_score()
    score.sink = 0  # there is no system prompt
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        score.start_idx, score.end_idx = start, stop
        said = [*IDS[max(0, start - 8) : start], *IDS[start:stop]]
        for number, (_, q, key, _) in enumerate(reference(family, [*IDS, *said])[1]):
            score._get_score(q[None, :, N:], key[None], number)
    # the threshold keeps one entry fewer than the given share
    valid, _ = score._threshold(score.score, (k * layers * HKV + 1.5) / (layers * HKV * N))
    return [[row.nonzero().flatten().tolist() for row in layer[0]] for layer in valid]


@needs("KVzip")
@pytest.mark.parametrize("chunk", [2000, 150])
@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_kvzip_keeps_what_its_authors_code_keeps(monkeypatch, family, k, chunk):
    monkeypatch.setattr(reconstruct, "CHUNK", chunk)
    monkeypatch.setattr(reconstruct, "_SINKS", 0)  # the authors' sinks are the tokens of the system prompt
    theirs = kept_by_kvzip(source("kvzip_score", AUTHORS / "KVzip/attention/score.py"), family, k, chunk)
    assert sum(len(row) for layer in theirs for row in layer) == k * len(theirs) * HKV
    assert ours("kvzip", family, k, n_sink=0) == theirs


# R-KV


@pytest.fixture(scope="module")
def r_kv():
    utils = source("r_kv_utils", AUTHORS / "R-KV/rkv/utils.py")
    around = {name: getattr(utils, name) for name in ("cal_similarity", "compute_attention_scores")}
    return source("r_kv_compression.r1_kv", AUTHORS / "R-KV/rkv/compression/r1_kv.py", **around).R1KV


@needs("R-KV")
@pytest.mark.parametrize("weight", [0.07, 0.5])
@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_r_kv_keeps_what_its_authors_code_keeps(r_kv, family, k, weight):
    """Compare the kept entries after the prompt, and again after 128 more tokens are read on top of the kept
    entries."""
    policy = create("r_kv", {"weight": weight})
    theirs = r_kv(budget=k, window_size=8, mix_lambda=weight)
    state = engine(family).extend(None, IDS, policy.statistics)
    for turn in range(2):
        after = policy.compress(state, k)
        for layer, left in zip(state.layers, after.layers, strict=True):
            keys, _ = theirs.update_kv(layer.keys[None], layer.recent_queries[None, :, -8:], layer.values[None])
            chosen = places(keys[0], layer.keys)
            assert left.positions.tolist() == [
                layer.positions[head][own].tolist() for head, own in enumerate(chosen)
            ], turn
        for token in tokens(128, seed=11):
            after = engine(family).extend(after, [token], policy.statistics)
        state = after
