"""Test that continuing from a file equals continuing in memory, token by token: stored prefills and compressed
caches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from models import engine, sliding_model, tokens
from states import identical, plain
from typer.testing import CliRunner

from kv_transition.budget import Budget
from kv_transition.cache.store import PrefillStore
from kv_transition.data.tokens import tokenizer_sha256
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.run import cache as run_cache
from kv_transition.run.cache_commands import app
from kv_transition.studies.grid.run import rows

READER = str(Path(__file__).parent.parent / "resources/tiny-reader")
TEXT = " ".join(f"Person {i} of the town keeps {i * 7 % 13} grey horses and one blue door." for i in range(12))
PROMPT = "\nWho keeps the horses? Person"


@cache
def reader() -> LocalEngine:
    return LocalEngine.from_pretrained(READER, device="cpu")


# stored prefills


@pytest.mark.parametrize("family", ["qwen2", "sliding"])
def test_going_on_from_a_stored_prefill_gives_the_same_bits(tmp_path, family):
    model = sliding_model()[0] if family == "sliding" else engine(family)
    read = model.prefill(tokens(70), tokens(9, seed=1))
    store = PrefillStore(tmp_path / "model", "always")
    store.save("abc", read)
    back = store.load("abc")
    for moment in ("context", "prompt"):
        a, b = (model.extend(getattr(each, moment), [3, 4]) for each in (back, read))
        assert identical(a, b)


def _cell(store: PrefillStore, kind: str, mode: str) -> list[dict]:
    """Return a cell's rows without the columns that differ between runs."""
    encode = reader().tokenizer
    examples = [
        {
            "task": "t",
            "example_id": str(i),
            "bin": 0,
            "prompt_sha256": str(i),
            "max_new_tokens": 8,
            "context_ids": encode(TEXT[: 500 + 60 * i]).input_ids,
            "question_ids": encode(PROMPT, add_special_tokens=False).input_ids,
            "prompt_len": 0,
        }
        for i in range(2)
    ]
    spec = {
        "mode": mode,
        "policy": kind,
        "kind": kind,
        "hyper_parameters": catalog.hyper_parameters(kind),
        "budget": "r0.3",
        "first_token": "compressed",
        "decoding": {"temperature": 0.7, "repeats": 2, "batch": 2, "seed": 1},
    }
    return [
        {name: value for name, value in row.items() if not name.endswith("_s")}
        for row in rows(reader(), examples, spec, store)
    ]


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize("kind", catalog.kinds())
def test_storing_changes_no_cell(tmp_path, kind, mode):
    stores = {name: PrefillStore(tmp_path / name / "model", name) for name in ("never", "always", "auto")}
    cells = {name: _cell(store, kind, mode) for name, store in stores.items()}
    assert cells["never"][0]["text"]
    assert cells["never"] == cells["always"] == cells["auto"]
    assert "0" in stores["always"]
    assert cells["never"] == _cell(stores["always"], kind, mode), "read back"


# compressed caches


CASES = [
    *((kind, {}, "r0.3") for kind in catalog.kinds()),
    ("streaming_llm", {"positions": "cache"}, "r0.3"),
    ("entropy_merge", {"count_bias": True}, "r0.3"),
    ("h2o", {}, "r1"),
    ("quantized", {"bits": 8}, "r1"),
]


@pytest.mark.parametrize(("kind", "options", "budget"), CASES)
def test_going_on_from_a_saved_cache_is_going_on_in_memory(tmp_path, kind, options, budget):
    hyper_parameters = catalog.hyper_parameters(kind) | options
    made = run_cache.create(reader(), TEXT, kind, hyper_parameters, Budget.parse(budget), seed=5)
    run_cache.save(reader(), made, tmp_path / "cache")
    back = run_cache.load(reader(), tmp_path / "cache")
    assert identical(back.state, plain(made.state))
    assert replace(back, state=None) == replace(made, state=None)
    first, second = (run_cache.continue_from(reader(), each, PROMPT, 8, seed=2) for each in (made, back))
    assert first[0] == second[0]
    assert first[1].tokens == second[1].tokens
    assert first[1].kept == second[1].kept
    # the same cache can be used again, also with other settings
    assert run_cache.continue_from(reader(), back, PROMPT, 8, seed=2)[1].tokens == first[1].tokens
    sampled = [run_cache.continue_from(reader(), each, PROMPT, 8, temperature=1.5, seed=2) for each in (made, back)]
    assert sampled[0][1].tokens == sampled[1][1].tokens


def test_a_cache_is_what_the_policy_makes_of_the_text():
    made = run_cache.create(reader(), TEXT, "streaming_llm", {"n_sink": 4, "recent": None}, Budget.parse("t40"))
    n = len(reader().tokenizer(TEXT).input_ids)
    assert made.state.length == n
    expected = [*range(4), *range(n - 36, n)]
    assert made.state.layers[0].positions[0].tolist() == expected
    # the cache stays at K entries while it decodes
    said, answer = run_cache.continue_from(reader(), made, PROMPT, 5)
    assert set(answer.kept) == {40.0}
    assert said == reader().tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_a_cache_of_another_model_or_dtype_or_tokenizer_is_refused(tmp_path, monkeypatch):
    made = run_cache.create(reader(), TEXT, "knorm", {}, Budget.parse("r0.5"))
    run_cache.save(reader(), made, tmp_path / "cache")
    half = LocalEngine.from_pretrained(READER, dtype="bfloat16", device="cpu")
    with pytest.raises(UserError, match=r"another dtype \(float32, not bfloat16\)"):
        run_cache.load(half, tmp_path / "cache")
    other = LocalEngine.from_pretrained(READER, device="cpu")
    next(p for name, p in other.model.named_parameters() if "v_proj" in name).data.mul_(1.01)
    with pytest.raises(UserError, match="another model"):
        run_cache.load(other, tmp_path / "cache")
    sha = tokenizer_sha256(reader().tokenizer)
    monkeypatch.setattr(run_cache, "tokenizer_sha256", lambda _: sha[::-1])
    with pytest.raises(UserError, match="another tokenizer"):
        run_cache.load(reader(), tmp_path / "cache")


def test_empty_texts_are_refused():
    with pytest.raises(UserError, match="the text is empty"):
        run_cache.create(reader(), "", "knorm", {}, Budget.parse("r0.5"))
    made = run_cache.create(reader(), TEXT, "knorm", {}, Budget.parse("r0.5"))
    with pytest.raises(UserError, match="the prompt is empty"):
        run_cache.continue_from(reader(), made, "", 5)


# the commands


@pytest.fixture
def create(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def call(**changes):
        options = {
            "--model": READER,
            "--device": "cpu",
            "--text": str(tmp_path / "text.txt"),
            "--policy": "snapkv",
            "--budget": "0.2",
            "--option": "window=16",
            "--output": str(tmp_path / "cache.safetensors"),
        } | changes
        return CliRunner().invoke(app, ["create", *(word for pair in options.items() for word in pair)])

    return call


def test_the_commands_do_what_the_functions_do(tmp_path, create):
    done = create()
    assert done.exit_code == 0, done.output
    made = run_cache.create(
        reader(), TEXT, "snapkv", catalog.hyper_parameters("snapkv") | {"window": 16}, Budget.parse("r0.2")
    )
    assert identical(run_cache.load(reader(), tmp_path / "cache.safetensors").state, made.state)
    asked = f"--model {READER} --device cpu --max-tokens 12".split()
    said = CliRunner().invoke(app, ["continue", str(tmp_path / "cache.safetensors"), "--prompt", PROMPT, *asked])
    assert said.exit_code == 0, said.output
    assert said.stdout == run_cache.continue_from(reader(), made, PROMPT, 12)[0] + "\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--policy": "snapkw"}, "there is no policy 'snapkw'"),
        (
            {"--policy": "kvpress.SnapKVPress"},
            "--policy: kvpress.SnapKVPress compresses only during the prefill of a prompt",
        ),
        ({"--option": "window"}, "--option: 'window' is not of the form name=value"),
        ({"--option": "windows=3"}, "snapkv has no such hyper-parameter"),
        ({"--budget": "2"}, "--budget: 2 lies outside (0, 1]"),
        ({"--budget": "t0"}, "tokens must be a whole number"),
        ({"--text": "nowhere.txt"}, "--text: there is no text file nowhere.txt"),
        ({"--dtype": "int8"}, "--dtype: 'int8' is not allowed"),
        ({"--model": "no/such/model"}, "model.name: 'no/such/model'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_file(tmp_path, create, changes, sentence):
    done = create(**changes)
    assert done.exit_code == 2
    assert sentence in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "cache.safetensors").exists()


def test_a_cache_that_is_none_is_said_before_a_model_is_loaded(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = CliRunner().invoke(app, ["continue", str(tmp_path / "text.txt"), "--model", "nowhere", "--prompt", "Hello"])
    assert done.exit_code == 2
    assert "is incomplete or damaged; create the cache again" in done.output
