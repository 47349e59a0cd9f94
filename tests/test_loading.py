"""Test kinds of models: quantized to 4 bit, distributed over devices, part of a multimodal model, incomplete."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from models import FAMILIES, engine, random_model, sliding_model, tokens

from kv_transition.cache.batch import stack
from kv_transition.cache.state import same
from kv_transition.data import model_files
from kv_transition.engines import loading
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters

NF4 = {"kind": "nf4", "double_quantization": True, "compute_dtype": "float32"}

needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def saved(model, folder):
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return saved(random_model("qwen2"), tmp_path / "model")


@torch.no_grad()
def full_logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def gemma():
    """Return a model that is wide enough for 4-bit weights."""
    config = sliding_model()[1].config
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(5)
    return type(sliding_model()[1])(type(config)(**config.to_dict() | shape)).eval()


# 4 bit


@needs_accelerate
@needs_bitsandbytes
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize(
    "quantization",
    [
        NF4,
        {"kind": "fp4", "double_quantization": False, "compute_dtype": "float32"},
        {"kind": "nf4", "double_quantization": False, "compute_dtype": "bfloat16"},
    ],
    ids=["nf4-double", "fp4", "nf4-bf16"],
)
def test_a_model_in_4_bit_reads_as_its_dequantized_twin(tmp_path, family, quantization):
    # bitsandbytes packs 64 numbers at a time
    plain = gemma() if family == "gemma3" else random_model(family, hidden_size=64, intermediate_size=128)
    path = saved(plain, tmp_path / "model")
    model = loading.load_model(path, device="cpu", quantization=quantization)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.quant_type == quantization["kind"]
    assert layer.weight.quant_state.nested is quantization["double_quantization"]
    assert layer.compute_dtype == getattr(torch, quantization["compute_dtype"])

    from bitsandbytes.functional import dequantize_4bit

    # before the first forward pass, which packs the weights again
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert weights
    unquantized = full_logits(plain, [*tokens(40), 3])
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight.float()
    local = LocalEngine(model)
    state = local.extend(local.extend(None, tokens(40)), [3])
    expected = full_logits(plain, [*tokens(40), 3])
    # on a CPU bitsandbytes computes in bfloat16, whatever compute_dtype says
    error, effect = ((state.logits - other).norm() for other in (expected, unquantized))
    assert error < 0.1 * effect


@needs_accelerate
@needs_bitsandbytes
def test_a_model_in_4_bit_can_be_evicted(tmp_path):
    path = saved(random_model("qwen2", hidden_size=64, intermediate_size=128), tmp_path / "model")
    local = LocalEngine(loading.load_model(path, device="cpu", quantization=NF4))
    state = local.extend(None, tokens(40))
    for kind in ("h2o", "snapkv", "expected_attention"):
        kept = create(kind, hyper_parameters(kind)).compress(state, 10)
        assert kept.entries == 10
        assert local.extend(kept, [1, 2]).logits.isfinite().all()


@pytest.mark.parametrize("package", ["accelerate", "bitsandbytes"])
def test_what_4_bit_needs_is_named(folder, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(UserError, match=rf"model\.quantization: the package {package} is not installed"):
        loading.load_model(folder, device="cpu", quantization=NF4)


# several devices


@needs_accelerate
def test_a_model_laid_out_by_accelerate_reads_as_it_does_whole(folder):
    whole = LocalEngine(loading.load_model(folder, device="cpu"))
    laid_out = LocalEngine(loading.load_model(folder, device="cpu", device_map="auto"))
    assert same(whole.extend(None, tokens(40)), laid_out.extend(None, tokens(40)), atol=1e-6)


@needs_accelerate
@pytest.mark.parametrize("aside", ["model.layers.1", "model.embed_tokens"])
def test_weights_put_aside_come_back_for_their_layer(folder, tmp_path, aside):
    """Check that a layer whose weights are on the disk computes on the CPU, and that its cache is there as well."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, attention_function)
    names = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu", aside: "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=places,
        offload_folder=str(tmp_path / "aside"),
        attn_implementation=ATTENTION,
    )
    assert any(weight.device.type == "meta" for weight in model.parameters())
    assert loading.input_device(model).type == "cpu"
    assert [device.type for device in loading.layer_devices(model)] == ["cpu"] * 3
    state = LocalEngine(model).extend(None, tokens(40))
    assert same(state, LocalEngine(loading.load_model(folder, device="cpu")).extend(None, tokens(40)), atol=1e-6)


def on_two_devices(state):
    """Return the same state with its upper layers on the meta device, which stores shapes only."""
    layers = []
    for number, layer in enumerate(state.layers):
        moved = {
            f.name: value.to("meta")
            for f in dataclasses.fields(layer)
            if isinstance(value := getattr(layer, f.name), torch.Tensor)
        }
        layers.append(dataclasses.replace(layer, room=None, **moved) if number else layer)
    return dataclasses.replace(state, layers=tuple(layers))


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("kind", ["streaming_llm", "h2o", "h2o_heavy", "tova", "snapkv", "knorm", "keydiff", "random"])
def test_each_layer_is_thinned_out_where_it_lies(kind, batch):
    """Check that each layer is compressed on its own device."""
    policy = create(kind, hyper_parameters(kind))
    if batch and not policy.acts_each_step:
        pytest.skip("policies that compress once never see a batch")
    state = engine("qwen2").extend(None, tokens(20))
    if batch:
        state = stack([state, engine("qwen2").extend(None, tokens(20, seed=1))], policy.statistics)
    kept = policy.compress(on_two_devices(state), 8)
    assert [layer.keys.device.type for layer in kept.layers] == ["cpu", "meta", "meta"]
    assert kept.entries == 8


# kinds of checkpoints


def multimodal(folder, **changes):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = sliding_model()[1].config.to_dict() | changes
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = [1, 5]
    return model, saved(model, folder)


def test_a_multimodal_gemma_answers_text_as_its_plain_twin(tmp_path):
    twin, path = multimodal(tmp_path / "model")
    local = LocalEngine(loading.load_model(path, device="cpu"))
    assert local.windows == [16] * 5 + [None]
    assert all(local.rotaries)
    ids, state = tokens(40), None
    state = local.extend(None, ids)
    for _ in range(8):
        expected = full_logits(twin, ids)
        torch.testing.assert_close(state.logits, expected, rtol=0, atol=1e-5)
        ids = [*ids, int(expected.argmax())]
        state = local.extend(state, ids[-1:])


def test_every_end_token_of_the_generation_config_ends_an_answer(tmp_path):
    _, path = multimodal(tmp_path / "model")
    assert LocalEngine(loading.load_model(path, device="cpu")).eos == {1, 5}


def test_end_tokens_are_found_without_a_generation_config(tmp_path):
    model = random_model("llama")
    model.config.eos_token_id = [2, 9]
    path = saved(model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert LocalEngine(loading.load_model(path, device="cpu")).eos == {2, 9}


# defects of a checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path, family):
    path = saved(random_model(family), tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.name: .*tokenizer"):
        LocalEngine.from_pretrained(path, device="cpu")


def test_a_missing_weight_is_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load_model(folder, device="cpu")


def test_a_weight_of_another_shape_is_one_sentence(folder):
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"model\.name: .*do not match its config\.json"):
        loading.load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "family",
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "qwen2",
        "qwen3",
        "smollm3",
        "qwen3_moe",
    ],
)
def test_shapes_of_the_header_are_compared_with_those_of_the_config(family, tmp_path):
    """What transformers saves is accepted, in one file and in several."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 60, "head_dim": 16}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = AutoConfig.for_model(family, **shape, **ends, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "one")
    model_files.check(str(tmp_path / "one"))
    model.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    model_files.check(str(tmp_path / "several"))
    if family == "qwen3_moe":
        return  # its shapes are not among those that are known
    file = tmp_path / "several/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head_dim": 8}))
    with pytest.raises(UserError, match=r"self_attn\..* instead of"):
        model_files.check(str(tmp_path / "several"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_one_sentence(folder, value):
    from safetensors.torch import load_file, save_file

    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4:6] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"damaged, 2 entries of model\.layers\.1\.mlp\.up_proj\.weight are NaN or inf"):
        loading.load_model(folder, device="cpu")


def test_a_model_that_does_not_fit_is_told_what_would(folder, monkeypatch):
    def full(self, *_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(UserError, match=r"does not fit .* model\.quantization"):
        loading.load_model(folder, device="cpu")


def test_flash_attention_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"model\.attn_implementation: flash_attention_2 needs"):
        LocalEngine(random_model("qwen2"), attention="flash_attention_2")


def test_a_device_that_is_not_there_is_one_sentence(folder):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"model\.device"):
        loading.load_model(folder, device="cuda")
