"""Test the harness's model type: with policy full it equals `hf`; under a policy it equals the library.

It needs lm-eval, which is not in the development environment: `make test-harness` runs it in a separate environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model, sliding_model, tokens
from project import ROOT
from serving import words

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed here; `make test-harness` runs these tests")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import Registry  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import kv_transition as kvt  # noqa: E402
from kv_transition.engines.local import LocalEngine  # noqa: E402
from kv_transition.harness.model import CompressedLM  # noqa: E402
from kv_transition.policies.catalog import create, hyper_parameters, kinds  # noqa: E402

WORDS = words()


@pytest.fixture(scope="module")
def model():
    ready = random_model("llama")
    ready.set_attn_implementation("sdpa")
    return ready


def tokenizer():
    own = words()
    own.pad_token, own.eos_token, own.bos_token = "w0", "w90", "w91"
    return own


def theirs(model, **options):
    return HFLM(model, tokenizer=tokenizer(), **options)


def ours(model, policy="full", budget=None, **options):
    return CompressedLM(model, policy, budget, tokenizer=tokenizer(), device="cpu", **options)


def text(n, seed):
    return WORDS.decode([t % 89 for t in tokens(n, seed=seed)])


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


# different lengths, a context that two requests share, and an empty context
PAIRS = [(text(20 + i, i), " " + text(1 + i % 4, 50 + i)) for i in range(6)]
PAIRS += [(PAIRS[0][0], " w5 w6 w7"), ("", "w3 w4 w5")]
PROMPTS = [(text(12 + 5 * (i // 2), i), {"until": ["w7"], "max_gen_toks": 8, "do_sample": False}) for i in range(5)]
SHARED = ["full", "snapkv", "h2o", "tova", "entropy_recall", "adakv", "quantized"]


def budget_of(policy):
    return None if policy in ("full", "quantized") else 0.3


def policy_of(policy):
    return {"policy.tau": 1.0} if policy == "entropy_recall" else {}


def acts_each_step(policy):
    return create(policy, hyper_parameters(policy)).acts_each_step


# -- with policy full: the harness's own model


@pytest.mark.parametrize("batch_size", [1, 4])
def test_responses_are_those_of_hf(model, batch_size):
    requests = asked("generate_until", *PROMPTS)
    assert ours(model, batch_size=batch_size).generate_until(requests) == theirs(
        model, batch_size=batch_size
    ).generate_until(requests)


@pytest.mark.parametrize("batch_size", [1, 4, 64, "auto"])
def test_log_likelihoods_are_those_of_hf(model, batch_size):
    requests = asked("loglikelihood", *PAIRS)
    mine = ours(model, batch_size=batch_size).loglikelihood(requests)
    own = theirs(model, batch_size=batch_size).loglikelihood(requests)
    assert [p for p, _ in mine] == pytest.approx([p for p, _ in own], abs=1e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in own]


@pytest.mark.parametrize("max_length", [None, 16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_rolled_as_by_hf(model, max_length, batch_size):
    requests = asked("loglikelihood_rolling", *[(text(n, n),) for n in (1, 15, 60, 61)])
    options = {"max_length": max_length, "batch_size": batch_size}
    mine = ours(model, **options).loglikelihood_rolling(requests)
    assert mine == pytest.approx(theirs(model, **options).loglikelihood_rolling(requests), rel=1e-6, abs=1e-5)


def task(folder, name, **changes):
    rows = [{"context": text(20, i), "gold": i % 2, "answer": text(2, i)} for i in range(6)]
    (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    described = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}},
        "test_split": "test", "doc_to_text": "{{context}}", "metadata": {"version": 1},
    } | changes  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))
    return name


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Return a folder of task files, and the names of one task of each kind."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    generation = {"until": ["w7"], "max_gen_toks": 6, "do_sample": False}
    return folder, [
        task(folder, "choice", output_type="multiple_choice", doc_to_choice=["w1", "w2 w3"], doc_to_target="gold",
             metric_list=[{"metric": "acc"}]),
        task(folder, "said", output_type="generate_until", doc_to_target="{{answer}}", generation_kwargs=generation,
             metric_list=[{"metric": "exact_match"}]),
        task(folder, "rolled", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}",
             metric_list=[{"metric": "word_perplexity"}]),
    ]  # fmt: skip


def evaluated(lm, tasks):
    folder, names = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=10, log_samples=True)


def test_whole_tasks_come_out_as_with_hf(model, tasks):
    mine, own = evaluated(ours(model), tasks), evaluated(theirs(model), tasks)
    for name in tasks[1]:
        scores = {key: value for key, value in own["results"][name].items() if isinstance(value, float)}
        assert {key: mine["results"][name][key] for key in scores} == pytest.approx(scores, rel=1e-5, nan_ok=True)
        assert len(mine["samples"][name]) == 6
        if name == "said":
            answers = [[s["resps"] for s in found["samples"][name]] for found in (mine, own)]
            assert answers[0] == answers[1]


# -- under a policy: the answers of the library


@pytest.mark.parametrize("policy", SHARED)
@pytest.mark.parametrize("mode", ["after_prompt", "before_question"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_responses_are_those_of_the_library(model, policy, mode, batch_size):
    until = {"until": ["w96"], "max_gen_toks": 6, "do_sample": False}
    prompts = [f"{text(20 + 4 * (i // 2), i)} w89 {text(3, i)}" for i in range(4)]
    options = {"mode": mode, "separator": "w89", "batch_size": batch_size} | policy_of(policy)
    got = ours(model, policy, budget_of(policy), **options).generate_until(
        asked("generate_until", *[(prompt, until) for prompt in prompts])
    )
    own, read = kvt.load(model, tokenizer(), chat=False), []
    kind = {"kind": policy} | ({"tau": 1.0} if policy == "entropy_recall" else {})
    for prompt in prompts:
        ids = tokenizer()(prompt).input_ids
        cut = len(ids) - 3 if mode == "before_question" else len(ids) - 1
        reply = own.read(ids[:cut]).ask(ids[cut:], kind, budget_of(policy), mode=mode, max_new_tokens=6)
        read.append(reply.text.split("w90")[0])  # the harness stops at the text of the end token
    assert got == read


@pytest.mark.parametrize("policy", SHARED)
def test_log_likelihoods_are_those_of_the_tokens_that_are_drawn(model, policy):
    """Check that the library's greedy continuation has the highest likelihood and, for full, its exact log
    probability."""
    context = tokenizer()(text(30, 3)).input_ids
    kind = {"kind": policy} | ({"tau": 1.0} if policy == "entropy_recall" else {})
    own = kvt.load(model, tokenizer(), chat=False).read(context[:-1])
    drawn = own.ask(context[-1:], kind, budget_of(policy), mode="after_prompt", max_new_tokens=4)
    lm = ours(model, policy, budget_of(policy), **policy_of(policy))
    other = [*drawn.tokens[:-1], (drawn.tokens[-1] + 1) % 89]
    found = lm._loglikelihood_tokens([(("a", "b"), context, list(drawn.tokens)), (("a", "c"), context, other)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]
    if policy == "full":
        with torch.no_grad():
            logits = (
                model(torch.tensor([context + list(drawn.tokens)])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            )
        assert found[0][0] == pytest.approx(float(logits.max(-1).values.sum()), abs=1e-5)


@cache
def compared(policy, mode):
    """Return the model at batch sizes of 1 and of 5."""
    model = random_model("llama")
    model.set_attn_implementation("sdpa")
    options = {"mode": mode, "separator": "w89"} | policy_of(policy)
    return [ours(model, policy, budget_of(policy), batch_size=size, **options) for size in (1, 5)]


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(3, 40), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("mode", ["after_prompt", "before_question"])
@pytest.mark.parametrize("policy", kinds())
def test_batches_of_log_likelihoods_are_those_of_single_requests(policy, mode, lengths, seed):
    """Check contexts of any lengths, and continuations of several lengths that share them."""
    requests = []
    for i, (n, question, continuations) in enumerate(lengths * 2):  # twice, so that some contexts have equal length
        context = f"{text(n, seed + i)} w89 {text(question, seed + i + 50)}"
        requests += [(context, " " + text(1 + j % 3, seed + 90 + j)) for j in range(continuations)]
    one, several = (lm.loglikelihood(asked("loglikelihood", *requests)) for lm in compared(policy, mode))
    assert [p for p, _ in several] == pytest.approx([p for p, _ in one], abs=1e-5)
    assert [greedy for _, greedy in several] == [greedy for _, greedy in one]


@pytest.mark.parametrize(
    "policy", ["full", *(kind for kind in kinds() if create(kind, hyper_parameters(kind)).acts_each_step)]
)
def test_batches_of_texts_are_those_of_single_texts(policy):
    texts = asked("loglikelihood_rolling", *[(text(n, n),) for n in (1, 9, 30, 30, 31)])
    one, several = (lm.loglikelihood_rolling(texts) for lm in compared(policy, "after_prompt"))
    assert several == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(
    ("policy", "budget", "batch_size", "readings"),
    [
        # for each context, all tokens and then the last one again; continuations of one token need no further reading
        ("snapkv", 0.3, 1, [(1, 25), (1, 1), (1, 25), (1, 1), (1, 20), (1, 1)]),
        # only contexts of equal length together, because padding would enter the statistics
        ("snapkv", 0.3, 8, [(2, 25), (2, 1), (1, 20), (1, 1)]),
        ("full", None, 8, [(3, 25), (3, 1)]),
    ],
)
def test_a_context_is_read_once_and_with_others(model, monkeypatch, policy, budget, batch_size, readings):
    fed, read = [], LocalEngine._read

    def counted(self, state, ids, *more):
        fed.append(tuple(ids.shape))
        return read(self, state, ids, *more)

    monkeypatch.setattr(LocalEngine, "_read", counted)
    contexts = [text(25, 1), text(20, 2), text(25, 3)]
    lm = ours(model, policy, budget, batch_size=batch_size)
    lm.loglikelihood(asked("loglikelihood", *[(context, f" w{i}") for context in contexts for i in range(4)]))
    assert fed == readings


def test_windows_and_moments_keep_prompts_apart():
    """Check that a shorter prompt is not padded if padding would push entries out of a window."""
    _, plain = sliding_model()
    plain.set_attn_implementation("sdpa")
    pairs = asked("loglikelihood", *[(text(n, n), f" {text(3, i)}") for n in (20, 33, 33, 40) for i in range(2)])
    for policy, budget in (("full", None), ("h2o", "t12"), ("expected_attention", 0.4)):
        one, several = (ours(plain, policy, budget, batch_size=size).loglikelihood(pairs) for size in (1, 8))
        assert [p for p, _ in several] == pytest.approx([p for p, _ in one], abs=1e-5)


def test_a_text_is_held_at_its_budget_from_its_first_token(model):
    """Compare with a mask over the whole text in which each token sees only the sinks and the newest tokens."""
    ids = tokenizer()(text(40, 2)).input_ids
    lm = ours(model, "streaming_llm", "t10")
    ((got, _),) = lm._loglikelihood_tokens([(None, [91], ids)])
    read = torch.tensor([[91, *ids]])
    i, j = torch.meshgrid(torch.arange(41), torch.arange(41), indexing="ij")
    seen = (j <= i) & ((j < 4) | (j >= i - 6))
    mask = torch.zeros(1, 1, 41, 41).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(read, attention_mask=mask).logits[0, :-1].log_softmax(-1)
    assert got == pytest.approx(float(logits.gather(1, read[0, 1:, None]).sum()), abs=1e-3)


# -- invalid use


def test_bad_use_is_a_sentence(model):
    with pytest.raises(kvt.UserError, match="snapkv needs a budget"):
        ours(model, "snapkv")
    with pytest.raises(kvt.UserError, match="compresses a prompt, but loglikelihood_rolling has none"):
        ours(model, "snapkv", 0.3).loglikelihood_rolling(asked("loglikelihood_rolling", (text(9, 1),)))
    with pytest.raises(kvt.UserError, match="compresses up to the last 'w89' of a prompt"):
        ours(model, "snapkv", 0.3, mode="before_question", separator="w89").loglikelihood(
            asked("loglikelihood", PAIRS[0])
        )


def test_the_entry_point_is_the_model_type():
    """Check what lm-eval after 0.4.13 does: the name is in its registry until the class is requested."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    registry = Registry("model", base_cls=LM)
    for name, value in declared.items():
        registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert {name: registry.get(name) for name in registry} == {"kv_transition": CompressedLM}


# without a device, the harness's command line uses cuda:0 on any machine
@pytest.mark.slow
@pytest.mark.parametrize("device", ["", ",device=cpu"])
def test_the_command_line_knows_the_model(tmp_path, tasks, device):
    folder, _ = tasks
    random_model("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = f"pretrained={tmp_path / 'model'},policy=snapkv,budget=0.3{device}"
    command = [
        sys.executable, "-m", "kv_transition.harness", "run", "--model", "kv_transition", "--model_args", arguments,
        "--tasks", "choice", "--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--batch_size", "4",
    ]  # fmt: skip
    got = subprocess.run(command, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["choice"]
