"""Compare what the engine reads with the eager attention of many kinds of models, and check that others are refused."""

from __future__ import annotations

import pytest
import torch
from models import SHAPE, tokens
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kv_transition.cache.batch import stack
from kv_transition.engines import loading
from kv_transition.engines.last_token import mlp_of_last_token
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError

PROMPT = 50
SPECIAL = {"head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
DENSE = ["apertus", "arcee", "bitnet", "cohere", "ernie4_5", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite",
         "helium", "llama", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
         "starcoder2"]  # fmt: skip
OF_EXPERTS = ["ernie4_5_moe", "glm4_moe", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
REFUSED = {
    "doge": "an attention mask of its own",
    "falcon": "attention cannot be replaced",
    "stablelm": "does not pass on",
}


def model_of(family: str) -> PreTrainedModel:
    """Return a random model of the family with eager attention, in which each layer changes the logits."""
    shape = SHAPE | SPECIAL | (EXPERTS if family in OF_EXPERTS else {})
    if family == "falcon":  # computes the size of its heads
        del shape["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape), attn_implementation="eager").eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2)
    return model.requires_grad_(False)


def engine_of(model: PreTrainedModel) -> LocalEngine:
    AttentionInterface.register(ATTENTION, attention_function)
    model.set_attn_implementation(ATTENTION)
    return LocalEngine(model)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", DENSE + OF_EXPERTS)
def test_a_prompt_read_in_pieces_has_the_logits_of_one_eager_pass(family):
    model, ids = model_of(family), tokens(PROMPT)
    expected = model(torch.tensor([ids])).logits[0].float()
    engine, state = engine_of(model), None
    for start, stop in ((0, 30), (30, 31), (31, PROMPT)):
        state = engine.extend(state, ids[start:stop])
        torch.testing.assert_close(state.logits, expected[stop - 1], **CLOSE)
    torch.testing.assert_close(engine.logits(None, ids)[1], expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2_moe", "granitemoe"])
def test_a_batch_of_prompts_has_the_logits_of_one_eager_pass(family):
    model, ids = model_of(family), [tokens(PROMPT, seed) for seed in (1, 2)]
    expected = model(torch.tensor(ids)).logits[:, -1].float()
    engine, none = engine_of(model), frozenset()
    begun = stack([engine.extend(None, own[:30], none) for own in ids], none)
    state = engine.extend(begun, [own[30:] for own in ids], none)
    torch.testing.assert_close(state.logits, expected, **CLOSE)


class _Experts(torch.nn.Module):
    """An MLP that also returns which expert it chose, as some models have it."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * hidden, hidden.argmax(-1)


def test_an_mlp_that_returns_its_choice_of_experts_computes_the_last_token():
    model = model_of("llama")
    model.get_decoder().layers[-1].mlp = _Experts()
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with mlp_of_last_token(model, 5, last_only=True):
        output, chosen = model.get_decoder().layers[-1].mlp(hidden)
    assert torch.equal(output, 2 * hidden[:, -1:].expand(-1, 5, -1))
    assert chosen.shape == (1, 1)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_answer_wrongly_is_refused(family, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^model.name: .*{REFUSED[family]}.*choose") as refusal:
        LocalEngine(loading.load_model(str(tmp_path))).extend(None, [3, 4, 5])
    assert "\n" not in str(refusal.value)
