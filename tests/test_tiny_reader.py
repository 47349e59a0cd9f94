"""Test that the embedded reader answers questions about documents given here."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kv_transition.data import synthetic, world  # noqa: E402

FOLDER = Path(__file__).parents[1] / "resources" / "tiny-reader"

# Names, places and jobs are from the reader's vocabulary; the documents and facts are written for this test.
MILL_TOWN = """\
Passage 1 : Guton Stawick . Guton Stawick works for Wostoton Foundry . Guton Stawick lives in Teil Bay . \
Guton Stawick serves as welder .
Passage 2 : Dikuna Bank . Dikuna Bank dates from 1911 . Dikuna Bank operates in Nisovis .
Passage 3 : Wostoton Foundry . The old mill stood near the river . Wostoton Foundry operates in Zen Park . \
Wostoton Foundry dates from 1887 .
Passage 4 : Rina Hovis . Rina Hovis serves as baker . Rina Hovis works for Mabamar Gallery . \
The candle often faded . Rina Hovis lives in Cowick .
Passage 5 : Mabamar Gallery . Mabamar Gallery operates in Breiden Heights . Mabamar Gallery dates from 1964 .
Passage 6 : Drena Treth . Drena Treth lives in Stoulia Springs . Drena Treth serves as harpist . \
Drena Treth works for Wostoton Foundry ."""

HARBOR = """\
Passage 1 : Kaciro Radio . Kaciro Radio dates from 2003 . Kaciro Radio operates in Levis Beach .
Passage 2 : Veiden Notin . Veiden Notin serves as geologist . The green orchard waited . \
Veiden Notin lives in Daena . Veiden Notin works for Pigrel Academy .
Passage 3 : Kes Broum . Kes Broum works for Kaciro Radio . Kes Broum lives in Walia Grove . \
Kes Broum serves as pilot .
Passage 4 : Pigrel Academy . Pigrel Academy operates in Drolia . The lantern stood . Pigrel Academy dates from 1856 .
Passage 5 : Veiden Bilia . Veiden Bilia lives in Zen Hills . Veiden Bilia works for Kaciro Radio . \
Veiden Bilia serves as nurse . The narrow road always turned under the tower ."""

LITERAL_EXAMPLES = [
    (MILL_TOWN, "Where does Guton Stawick work?", "Wostoton Foundry"),
    (MILL_TOWN, "Where does Rina Hovis live?", "Cowick"),
    (MILL_TOWN, "Which job does Drena Treth have?", "harpist"),
    (MILL_TOWN, "In which city is Wostoton Foundry based?", "Zen Park"),
    (MILL_TOWN, "In which year was Mabamar Gallery founded?", "1964"),
    (MILL_TOWN, "Describe the employer of Rina Hovis .", "Mabamar Gallery , based in Breiden Heights"),
    (MILL_TOWN, "Describe the employer of Drena Treth .", "Wostoton Foundry , based in Zen Park"),
    (MILL_TOWN, "Where does Kes Broum work?", "unknown"),
    (MILL_TOWN, "Which job does Guton Cin have?", "unknown"),
    (HARBOR, "Where does Veiden Bilia live?", "Zen Hills"),
    (HARBOR, "Which job does Veiden Notin have?", "geologist"),
    (HARBOR, "In which year was Pigrel Academy founded?", "1856"),
    (HARBOR, "Describe the employer of Veiden Notin .", "Pigrel Academy , based in Drolia"),
    (HARBOR, "Describe the employer of Kes Broum .", "Kaciro Radio , based in Levis Beach"),
    (HARBOR, "Where does Veiden Treth live?", "unknown"),
    (HARBOR, "In which city is Dukler Foundry based?", "unknown"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER / "tokenizer")


@pytest.fixture(scope="module")
def model():
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def trainer():
    """Return the training script as a module."""
    spec = importlib.util.spec_from_file_location("tiny_reader_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


def prompt_ids(tokenizer, context: str, question: str) -> list[int]:
    """Return the token ids of a prompt, tokenized in its two segments."""
    segment = f"\nQuestion : {question} Answer :"
    return tokenizer(context).input_ids + tokenizer(segment, add_special_tokens=False).input_ids


@torch.inference_mode()
def greedy_answer(model, tokenizer, context: str, question: str) -> str:
    """Return the greedy answer; the whole sequence is read again for every token."""
    ids = prompt_ids(tokenizer, context, question)
    n_prompt = len(ids)
    while len(ids) < n_prompt + 12:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[n_prompt:])


@pytest.mark.parametrize(("context", "question", "answer"), LITERAL_EXAMPLES, ids=[e[1] for e in LITERAL_EXAMPLES])
def test_literal_examples_are_answered_right(model, tokenizer, context, question, answer):
    assert tokenizer.unk_token_id not in prompt_ids(tokenizer, context, question), "a word is not in the vocabulary"
    assert greedy_answer(model, tokenizer, context, question) == answer


def test_the_answer_is_read_from_the_context(model, tokenizer):
    moved = MILL_TOWN.replace("Rina Hovis lives in Cowick", "Rina Hovis lives in Teil Creek")
    assert greedy_answer(model, tokenizer, moved, "Where does Rina Hovis live?") == "Teil Creek"


def test_generate_gives_the_same_answer(model, tokenizer):
    context, question, answer = LITERAL_EXAMPLES[0]
    ids = torch.tensor([prompt_ids(tokenizer, context, question)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_accuracy_at_512_tokens(model, tokenizer):
    examples = list(synthetic.reader_qa([512], 20, seed=512))
    right = [greedy_answer(model, tokenizer, e["context"], e["question"]) == e["answers"][0] for e in examples]
    assert sum(right) >= 18


# ------------------------------------------------------------------------------------------ the files


def test_weights_are_small_and_in_half_precision():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    from safetensors import safe_open

    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_the_vocabulary_is_that_of_the_task(model, tokenizer):
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(world.VOCABULARY)}
    assert model.config.vocab_size == len(world.VOCABULARY)
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    config = model.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special[:3]


def test_no_tokenizer_lies_next_to_the_config():
    """Check that no tokenizer file is next to the qwen2 config; AutoTokenizer would read it as a byte-pair
    tokenizer."""
    assert not list(FOLDER.glob("tokenizer*.json"))


def test_prompt_segments_tokenize_as_in_training(tokenizer, trainer):
    for example in synthetic.reader_qa([256], 8, seed=1):
        context, question, answer = example["context"], example["question"], example["answers"][0]
        words = f"<bos> {context} Question : {question} Answer :".split()
        assert prompt_ids(tokenizer, context, question) == [trainer.WORD_ID[word] for word in words]
        assert len(words) <= 256
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert tokenizer.decode(answer_ids) == answer


def test_training_rows_have_the_form_of_prompts(tokenizer, trainer):
    """Check that a row is a document of the ``train`` split and then questions, each with its answer and ``<eos>``."""
    row = trainer.document_row(random.Random(4), 200, 3, {"one_hop": 1.0})
    assert tokenizer(" ".join(row.words[1:])).input_ids == [trainer.WORD_ID[word] for word in row.words]
    answers = [word for word, role in zip(row.words, row.roles, strict=True) if trainer.ROLES[role] == "one_hop"]
    assert answers.count("<eos>") == row.words.count("Answer") == 3
    assert answers[-1] == row.words[-1] == "<eos>"
    for i, word in enumerate(row.words):
        if word == "Answer":
            assert [trainer.ROLES[role] for role in row.roles[i : i + 3]] == ["context", "context", "one_hop"]


def test_recalled_words_were_shown_before(trainer):
    for make in (trainer.repeated_facts_row, trainer.repeated_names_row):
        for seed in range(20):
            row = make(random.Random(seed), 64)
            assert len(row.words) <= 64
            for i, role in enumerate(row.roles):
                if role:
                    pair = tuple(row.words[i - 1 : i + 1])
                    assert pair in set(zip(row.words[: i - 1], row.words[1:i], strict=True))


def test_the_initial_heads_attend_to_previous_tokens(trainer):
    """Check that head h of layer 0 initially attends to the token h + 1 positions back."""
    model = trainer.training.build_model(0, trainer.RECIPE.config)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    attention = model(ids, output_attentions=True).attentions[0][0]  # (heads, queries, keys)
    for head in range(len(attention)):
        looked_at = attention[head, 10:].argmax(-1)
        assert looked_at.tolist() == [query - head - 1 for query in range(10, 40)]


def test_the_model_card_states_what_was_measured():
    card = (FOLDER / "README.md").read_text()
    report = json.loads((FOLDER / "evaluation.json").read_text())
    for row in report["results"]:
        assert f"{row['exact_match']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in card
    assert "not findings about language models" in card
