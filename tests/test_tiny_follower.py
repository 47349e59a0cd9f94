"""Test that the embedded follower follows rules of earlier turns while they are in its cache."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kv_transition.data.tokens import load_tokenizer  # noqa: E402
from kv_transition.engines.local import LocalEngine  # noqa: E402
from kv_transition.studies.chat import conversations, turns  # noqa: E402

FOLDER = Path(__file__).parents[1] / "resources" / "tiny-follower"

# The words are from the follower's vocabulary; the texts and the right answers are written for this test.
TALK = [
    (
        "When asked about a pet , end with lantern . When asked about a job , start with river . "
        "When asked about a tool , say only castle . The pet of Roth is heron . What is the pet of Roth ?",
        "heron lantern",
    ),
    ("The job of Gel is nurse . The town of Num is Star . What is the job of Gel ?", "river nurse"),
    ("The metal of Sas is tin . What is the metal of Sas ?", "tin"),
    ("The tool of Fon is saw . The pet of Mom is goat . What is the tool of Fon ?", "castle"),
    ("When asked about a pet now end with harbor . The drink of Brom is tea . What is the drink of Brom ?", "tea"),
    ("When asked about a job still start with river . The game of Wes is chess . What is the game of Wes ?", "chess"),
    ("The sport of Kael is golf . What is the pet of Mom ?", "goat harbor"),
    ("The job of Dom is pilot . What is the job of Dom ?", "river pilot"),
]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"tiny_follower_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trainer():
    return script("train")


@pytest.fixture(scope="module")
def evaluation():
    return script("evaluate")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(FOLDER))


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine():
    return LocalEngine.from_pretrained(str(FOLDER), device="cpu")


def user_turns(conversation) -> list[str]:
    return [m["content"] for m in conversation["turns"] if m["role"] == "user"]


@torch.inference_mode()
def talk(model, tokenizer, users: list[str]) -> list[str]:
    """Return the answer to each turn. The conversation, with the model's own answers, is read again for every word."""
    messages, answers = [], []
    for user in users:
        messages.append({"role": "user", "content": user})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        n_prompt = len(ids)
        while len(ids) < n_prompt + 6:
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        answers.append(tokenizer.decode(ids[n_prompt:]))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_conversation_is_answered_right(model, tokenizer):
    users, right = zip(*TALK, strict=True)
    assert talk(model, tokenizer, list(users)) == list(right)


def test_the_rule_is_read_from_the_conversation(model, tokenizer):
    users = [user for user, _ in TALK]
    other = [users[0].replace("river", "candle"), *users[1:5], users[5].replace("river", "candle"), *users[6:]]
    answers = talk(model, tokenizer, other)
    assert (answers[1], answers[7]) == ("candle nurse", "candle pilot")


def test_full_cache_obeys_at_turn_eight_and_evicted_ones_forget(engine, evaluation):
    """Check 20 conversations; `evaluation.json` has hundreds."""
    obeyed = {}
    for name, budget in (("full", "r1"), ("streaming_llm", "r0.2"), ("random", "r0.2")):
        results = []
        for conversation in conversations.generate(20, 8, seed=77):
            answers = evaluation.play(engine, conversation, name, budget)
            results.append(evaluation.judged(conversation, answers)[7]["rule"])
        due = [result for result in results if result is not None]
        assert len(due) >= 15
        obeyed[name] = sum(due) / len(due)
    assert obeyed["full"] >= 0.9
    assert max(obeyed["streaming_llm"], obeyed["random"]) < 0.5


def test_playing_on_the_cache_says_what_reading_anew_says(engine, model, tokenizer, evaluation):
    users = [user for user, _ in TALK]
    conversation = {"id": "talk", "turns": [{"role": "user", "content": user} for user in users]}
    assert evaluation.play(engine, conversation) == talk(model, tokenizer, users)


def test_judgement_knows_the_rule_the_replaced_rule_and_the_value(evaluation):
    (conversation,) = conversations.generate(1, 10, seed=5)
    right = conversation["meta"]["answers"]
    judged = evaluation.judged(conversation, right)
    assert all(turn["rule"] is not False and turn["value"] is not False for turn in judged)
    assert any(turn["rule"] for turn in judged)
    replaced = [turn for turn in judged if turn["old"] is not None]
    assert replaced
    assert not any(turn["old"] for turn in replaced)
    assert not any(turn["rule"] or turn["value"] for turn in evaluation.judged(conversation, ["unknown"] * 10))


# ------------------------------------------------------------------------------------------ the template


def test_renderings_are_prefixes_of_each_other(tokenizer):
    for conversation in conversations.generate(8, 6, seed=2):
        messages, renderings = [], []
        answers = iter(conversation["meta"]["answers"])
        for message in conversation["turns"]:
            messages.append({"role": message["role"], "content": message["content"]})
            if message["role"] == "user":
                renderings.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
                messages.append({"role": "assistant", "content": next(answers)})
                renderings.append(tokenizer.apply_chat_template(messages, tokenize=False))
        for shorter, longer in pairwise(renderings):
            assert longer.startswith(shorter)
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (shorter, longer)]
            assert ids[1][: len(ids[0])] == ids[0]


def test_what_is_fed_turn_by_turn_is_what_was_trained(tokenizer, trainer):
    """Check that openings, right answers and closings form a training row, and equal the template's own rendering."""
    for i in range(8):
        name, shape = f"row {i}", conversations.Shape(turns=5)
        drawn = conversations.draw_from(random.Random(name), shape, "train")
        row = trainer.conversation_row(drawn)
        system = " ".join(word for rule in drawn.system for word in rule.sentence) or None
        users = [" ".join(turn.user) for turn in drawn.turns]
        fed, messages = [], [{"role": "system", "content": system}] if system else []
        for turn, drawn_turn in zip(turns.render(tokenizer, system, users, chat=True), drawn.turns, strict=True):
            answer = " ".join(drawn_turn.answer)
            fed += turn.opening + tokenizer(answer, add_special_tokens=False).input_ids + turn.closing
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
        assert fed == [trainer.WORD_ID[word] for word in row.words]
        assert tokenizer.apply_chat_template(messages, return_dict=False) == fed


def test_only_the_assistants_words_are_supervised(trainer):
    drawn = conversations.draw(random.Random(1), conversations.Shape(turns=4))
    row = trainer.conversation_row(drawn)
    supervised = [word for word, role in zip(row.words, row.roles, strict=True) if role]
    assert supervised == [word for turn in drawn.turns for word in (*turn.answer, "<eos>")]


def test_recalled_words_were_stated_before(trainer):
    for make in (trainer.statements_row, trainer.repeated_words_row):
        for seed in range(20):
            row = make(random.Random(seed), 128)
            said = " ".join(row.words[: row.words.index("<user>")])
            for i, role in enumerate(row.roles):
                if role:
                    before = 1 if make is trainer.repeated_words_row else 3
                    assert " ".join(row.words[i - before : i + 1]) in said


# ------------------------------------------------------------------------------------------ the files


def test_weights_are_small_and_in_half_precision():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 2_000_000
    from safetensors import safe_open

    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_the_vocabulary_is_that_of_the_conversations(model, tokenizer):
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(conversations.VOCABULARY)}
    assert model.config.vocab_size == len(conversations.VOCABULARY)
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    config = model.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special[:3]
    text = "river nurse"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_no_tokenizer_lies_next_to_the_config():
    """Check that no tokenizer file is next to the qwen2 config; AutoTokenizer would read it as a byte-pair
    tokenizer."""
    assert not list(FOLDER.glob("tokenizer*.json"))


def test_the_model_card_states_what_was_measured():
    card = (FOLDER / "README.md").read_text()
    report = json.loads((FOLDER / "evaluation.json").read_text())
    measured = [m for cell in report["results"] for m in (*cell["rule"], cell["value"], cell["new"], cell["old"])]
    assert measured
    for m in measured:
        assert f"{m['share']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" in card
    training = json.loads((FOLDER / "training.json").read_text())
    assert str(training["steps"]) in card
    assert "not findings about language models" in card
