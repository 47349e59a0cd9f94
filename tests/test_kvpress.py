"""Compare with kvpress, an independent implementation in a separate environment (`make bench-peers`).

kvpress reads the same tokens with the same weights and returns the kept entries; this project must keep the same sets
at the same K. If definitions differ, docs/policies.md says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, random_model
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kv_transition.engines import kvpress_press, reconstruct
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies import catalog

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"

needs_kvpress = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="kvpress is not installed beside us; run `make bench-peers`"),
]

LENGTH = 700
VOCABULARY = 1000
# No token occurs twice, because in the first layer equal tokens have keys of equal norm, and ties would be random.
TOKENS = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[:LENGTH].tolist()
REMOVED = (0.4, 0.5, 0.7, 0.8)  # 420 to 140 of 700 entries are kept, at least twice the window of 64


@dataclass(frozen=True)
class Pair:
    """A policy of this project and the equivalent press."""

    kind: str
    press: str
    hyper_parameters: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    max_pooling: bool = False
    removed: tuple[float, ...] = REMOVED
    shared: bool = False
    """whether all heads of all layers share the budget"""
    chunk: int = reconstruct.CHUNK
    """number of tokens that are repeated at a time"""


WINDOW_64 = {"window": 64, "kernel": 5, "pooling": "mean"}
PAIRS = {
    "snapkv mean": Pair("snapkv", "SnapKVPress", WINDOW_64),
    "snapkv max": Pair(
        "snapkv", "SnapKVPress", {"window": 64, "kernel": 7, "pooling": "max"}, {"kernel_size": 7}, max_pooling=True
    ),
    "streaming_llm": Pair("streaming_llm", "StreamingLLMPress"),
    "tova": Pair("tova", "TOVAPress"),
    "knorm": Pair("knorm", "KnormPress"),
    "keydiff": Pair("keydiff", "KeyDiffPress"),
    "expected_attention": Pair("expected_attention", "ExpectedAttentionPress"),
    "adakv": Pair("adakv", "AdaKVPress(SnapKVPress)", WINDOW_64),
    "criticalkv": Pair("criticalkv", "CriticalKVPress(SnapKVPress)", WINDOW_64),
    # 14 partitions of 46 are scored; each keeps the same number, because kvpress leaves equal ranks unordered
    "lagkv": Pair("lagkv", "LagKVPress", {"lag": 46}, {"lag_size": 46}, removed=(0.4, 0.5, 0.7)),
    # whole chunks of 20 tokens; the window has three chunks
    "chunkkv": Pair(
        "chunkkv",
        "ChunkKVPress(SnapKVPress)",
        {"window": 60, "kernel": 5, "pooling": "mean"},
        {"window_size": 60},
        removed=(0.2, 0.4, 0.6),
    ),
    "kvzip": Pair("kvzip", "KVzipPress", {}, {"chunk_size": reconstruct.CHUNK}, shared=True),
    "kvzip in pieces": Pair("kvzip", "KVzipPress", {}, {"chunk_size": 250}, shared=True, chunk=250),
}


def kept_by_kvpress(n: int, removed: float) -> int:
    return max(1, int(n * (1 - removed)))


def run_peer(script: Path, *arguments: Path, **environment: str) -> None:
    done = subprocess.run(
        [PYTHON, script, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Return the folder of each family's model."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        random_model(family, vocab_size=VOCABULARY).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "tokenizer")
        found[family] = str(folder)
    return found


@pytest.fixture(scope="module")
def engines(folders) -> dict[str, LocalEngine]:
    return {family: LocalEngine.from_pretrained(folder, device="cpu") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def kvpress(folders, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Return the entries that kvpress keeps in every case."""
    folder = tmp_path_factory.mktemp("agreement")
    cases = {
        f"{name} {family} {removed}": {
            "model": folders[family],
            "press": pair.press,
            "arguments": pair.arguments,
            "ratio": removed,
            "max_pooling": pair.max_pooling,
            "question": [1],
            "steps": 1,
        }
        for name, pair in PAIRS.items()
        for family in FAMILIES
        for removed in pair.removed
    }
    (folder / "cases.json").write_text(json.dumps({"tokens": TOKENS, "cases": cases}))
    run_peer(PEERS / "compress.py", folder / "cases.json", folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


def held(layer, n: int) -> torch.Tensor:
    """Return the mask [Hkv, n] of the positions that each head holds."""
    parts = getattr(layer, "parts", (layer,))
    rows = [row for part in parts for row in part.positions]
    mask = torch.zeros(len(rows), n, dtype=torch.bool)
    for head, row in enumerate(rows):
        mask[head, row] = True
    return mask


@pytest.mark.parametrize("family", FAMILIES)
class TestAgreement:
    pytestmark = needs_kvpress

    def test_both_read_the_same_text_alike(self, kvpress, folders, engines, family):
        state = engines[family].extend(None, TOKENS)
        for part in ("keys", "values"):
            ours = torch.stack([getattr(layer, part) for layer in state.layers])
            torch.testing.assert_close(ours, kvpress[f"{folders[family]}.{part}"], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("name", "removed"), [(name, r) for name, pair in PAIRS.items() for r in pair.removed])
    def test_the_same_entries_stay(self, kvpress, engines, monkeypatch, family, name, removed):
        pair = PAIRS[name]
        monkeypatch.setattr(reconstruct, "CHUNK", pair.chunk)
        policy = catalog.create(*catalog.resolve(name, {"kind": pair.kind} | pair.hyper_parameters))
        state = engines[family].extend(None, TOKENS, policy.statistics)
        theirs = kvpress[f"{name} {family} {removed}.kept"]
        k = kept_by_kvpress(LENGTH, removed)
        if pair.shared:  # kvpress rounds down the number of entries evicted over all heads
            heads, entries = theirs.shape[0] * theirs.shape[1], theirs.numel()
            k = (entries - int(entries * removed)) // heads
        compressed = policy.compress(state, k)
        ours = torch.stack([held(layer, LENGTH) for layer in compressed.layers])
        of_layers = theirs.sum((1, 2)).tolist()
        assert sum(of_layers) == k * theirs.shape[1] * theirs.shape[0]
        assert pair.shared == (len(set(of_layers)) > 1)
        different = (ours != theirs).sum((1, 2)) / 2
        assert different.tolist() == [0.0] * len(different), f"entries that differ, by layer: {different.tolist()}"


ADAPTED = {
    "SnapKVPress": {"window_size": 32},
    "StreamingLLMPress": {},
    "TOVAPress": {},
    "KnormPress": {},
    "ExpectedAttentionPress": {"n_future_positions": 64},
    "ObservedAttentionPress": {},
    "PyramidKVPress": {"window_size": 8, "beta": 4},
    "AdaKVPress(SnapKVPress)": {"kernel_size": 3},
}
REFUSED = {
    "KeyRerotationPress(KnormPress)": ({}, "no position in the text"),
    "ThinKPress": ({}, "cannot be given a budget"),
    "AbsentPress": ({}, "kvpress 0.5.5 has no AbsentPress; it has AdaKVPress"),
    "SnapKVPress": ({"window": 32}, "cannot be constructed from {'window': 32}"),
    "KnormPress": ({"compression_ratio": 0.5}, "compression_ratio: remove this key"),
}


@pytest.fixture(scope="module")
def adapted(folders, tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """Return the results of kvpress on a prompt, those of this project's adapter, and the error sentences of
    refusals."""
    folder = tmp_path_factory.mktemp("adapter")
    ways_on = {"max_pooling": False, "question": [5], "steps": 8}  # several tokens need layers of equal length
    cases = {
        f"{press} {family} {k}": ways_on
        | {"model": folders[family], "press": press, "arguments": arguments, "k": k, "ratio": 1 - (k + 1e-6) / LENGTH}
        for press, arguments in ADAPTED.items()
        for family in ("qwen2", "llama")
        for k in (70, 333)
    }
    refused = {
        press: ways_on | {"model": folders["qwen2"], "press": press, "arguments": arguments, "k": 100}
        for press, (arguments, _) in REFUSED.items()
    }
    for name, some in (("theirs", cases), ("ours", cases | refused)):
        (folder / f"{name}.json").write_text(json.dumps({"tokens": TOKENS, "cases": some}))
    run_peer(PEERS / "compress.py", folder / "theirs.json", folder / "theirs.safetensors")
    run_peer(PEERS / "adapter.py", folder / "ours.json", folder / "ours.safetensors", PYTHONPATH=str(ROOT / "src"))
    with safe_open(folder / "ours.safetensors", "pt") as file:
        messages = file.metadata()
    return load_file(folder / "theirs.safetensors"), load_file(folder / "ours.safetensors"), messages


class TestAdapter:
    pytestmark = needs_kvpress

    @pytest.mark.parametrize("k", [70, 333])
    @pytest.mark.parametrize("family", ["qwen2", "llama"])
    @pytest.mark.parametrize("press", ADAPTED)
    def test_a_press_keeps_and_answers_as_in_kvpress(self, adapted, press, family, k):
        theirs, ours, _ = adapted
        name = f"{press} {family} {k}"
        assert torch.equal(ours[f"{name}.kept"], theirs[f"{name}.kept"])
        assert ours[f"{name}.tokens"].tolist() == theirs[f"{name}.tokens"].tolist()
        per_head = ours[f"{name}.kept"].sum(-1).double().mean()
        assert per_head == pytest.approx(k, abs=1 if press == "PyramidKVPress" else 0)

    @pytest.mark.parametrize("press", REFUSED)
    def test_what_has_no_meaning_here_is_refused_in_a_sentence(self, adapted, press):
        message = adapted[2][press]
        assert message.startswith(f"kvpress.{press.partition('(')[0]}")
        assert REFUSED[press][1] in message
        assert "\n" not in message


def test_without_kvpress_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(UserError, match=r"install kvpress 0\.5\.5"):
        kvpress_press.installed_version()


@given(st.integers(1, 200_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_the_ratio_makes_kvpress_keep_k(n_and_k):
    n, k = n_and_k
    ratio = kvpress_press.ratio_for(n, k)
    assert 0 <= ratio < 1
    assert kept_by_kvpress(n, ratio) == k


@given(st.integers(1, 60), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_entries_are_found_again_in_whatever_order_they_are_kept(n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(3, n, 8, generator=generator).to(dtype)
    k = int(torch.randint(1, n + 1, (), generator=generator))
    index = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(3)])
    wide = index.unsqueeze(-1).expand(-1, -1, 8)
    layer = kvpress_press._found(full.gather(1, wide), full.gather(1, wide), full, 1.0, "kvpress.P")
    assert torch.equal(layer.positions, index.sort(-1).values)
    for head in range(3):
        assert torch.equal(layer.keys[head], full[head, layer.positions[head]])
    changed = full.gather(1, wide).clone()
    changed[1, k - 1, 3] += 1
    with pytest.raises(UserError, match="no position in the text"):
        kvpress_press._found(changed, changed, full, 1.0, "kvpress.P")


def test_the_peer_runs_on_our_own_torch_and_transformers():
    pins = [
        dict(re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(), flags=re.MULTILINE))
        for file in (ROOT / "requirements.lock", PEERS / "requirements.txt")
    ]
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        assert pins[0][package] == pins[1][package]
