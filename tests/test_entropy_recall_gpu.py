"""Test evicted entries in host memory while the other entries are on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_states import HKV, layer_of, written

from kv_transition.cache.state import LayerCache
from kv_transition.cache.tiers import TieredLayer, offload
from kv_transition.policies.entropy_recall import EntropyRecall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on(layer: LayerCache, device: str) -> LayerCache:
    tensors = {name: value.to(device) for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return replace(layer, **tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_recalls_what_a_cpu_recalls_and_the_store_stays_with_the_host(dtype):
    whole = layer_of(written(200, seed=1), dtype)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(200, generator=generator)[:50].sort().values for _ in range(HKV)])
    query, key = (torch.randn(heads, 1, 8, generator=generator).to(dtype) for heads in (4, HKV))
    layers: dict[str, TieredLayer] = {}
    for device in ("cpu", "cuda"):
        layer = on(whole, device)
        layer = offload(layer, layer.select(kept.to(device)))
        layer = EntropyRecall(moments="always").recalled(layer, query.to(device), key.to(device))
        layers[device] = offload(layer, layer.cut(0, 49))
    ours, theirs = layers["cuda"], layers["cpu"]
    assert ours.keys.device.type == "cuda"
    assert ours.cold.keys.device.type == "cpu"
    assert (ours.moved, ours.recalled) == (theirs.moved, theirs.recalled)
    for name in ("keys", "values", "positions", "attn_sum"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
        assert torch.equal(getattr(ours.cold, name), getattr(theirs.cold, name))
