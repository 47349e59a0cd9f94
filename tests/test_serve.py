"""Test that the server returns the answers of cells over HTTP in every form of the API, and reads each prompt once."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from models import tokens
from serving import NAME, ask, chat_body, listening, served, words

from kv_transition.cache.state import STATISTICS
from kv_transition.cache.store import PrefillStore
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.openai_compat import Client
from kv_transition.policies import catalog
from kv_transition.run import command
from kv_transition.serve.app import create_app
from kv_transition.serve.model import Served
from kv_transition.serve.prefills import Prefills
from kv_transition.serve.transcript import Transcript
from kv_transition.studies.grid import remote
from kv_transition.studies.grid import run as cell

KINDS = [kind for kind in catalog.kinds() if kind != "entropy_recall"]
POLICIES = [{"kind": kind} for kind in KINDS] + [
    {"kind": "entropy_recall", "tau": 1.0},
    {"kind": "entropy_recall", "moments": "always", "inner": "tova"},
    {"kind": "quantized", "bits": 4},
    {"kind": "snapkv", "window": 4, "kernel": 3},
]
SAME = (
    "text", "finish_reason", "prompt_tokens", "completion_tokens", "budget_entries", "protected", "kept_final",
    "kept_mean", "cache_bytes", "total_bytes", "full_bytes", "raw",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return served()


@pytest.fixture(scope="module")
def client(model):
    with TestClient(create_app(model)) as client:
        yield client


@pytest.fixture(scope="module")
def url(model):
    with listening(model) as url:
        yield url


def events(client, path="completions", **body):
    """Return the chunks of a streamed answer; the stream must end with [DONE]."""
    body = {"model": NAME, "temperature": 0, "max_tokens": 6, "stream": True} | body
    got = client.post(f"/v1/{path}", json=body)
    assert got.status_code == 200, got.text
    lines = got.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def as_row(answer):
    """Return an answer in the columns of a cell's table."""
    kv = answer["kv"]
    raw = {"token_ids": kv["token_ids"]} | kv["record"]
    choice, usage = answer["choices"][0], answer["usage"]
    own = {
        "text": choice["text"],
        "finish_reason": choice["finish_reason"],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "raw": json.dumps(raw),
    }
    return {name: own.get(name, kv.get(name)) for name in SAME}


def spec(policy, budget, mode, temperature=0.0, first_token="compressed"):
    kind, hyper_parameters = catalog.resolve(policy["kind"], policy)
    return {
        "mode": mode, "policy": "mine", "kind": kind, "hyper_parameters": hyper_parameters, "budget": budget,
        "first_token": first_token, "decoding": {"temperature": temperature, "repeats": 1, "batch": 1, "seed": 3},
    }  # fmt: skip


def example(i=0, n=60, question=5):
    context, rest = tokens(n, seed=i), tokens(question, seed=100 + i)
    return {
        "task": "t", "example_id": f"e{i}", "bin": 0, "prompt_sha256": f"sha{i}", "prompt_len": n + question,
        "context_ids": context, "question_ids": rest, "max_new_tokens": 8,
    }  # fmt: skip


def row_of(engine, one, made):
    """Return the row that the cell's own code computes, without a store."""
    return cell.rows(engine, [one], made, PrefillStore(Path("nowhere"), mode="never"))[0]


def request_of(one, made):
    seed = command.answer_seed(made["decoding"]["seed"], one["example_id"], 0)
    budget = made["budget"]
    return {
        "prompt": one["context_ids"] + one["question_ids"],
        "max_tokens": one["max_new_tokens"],
        "temperature": made["decoding"]["temperature"],
        "kv_seed": seed,
        "kv_context": len(one["context_ids"]),
        "kv_mode": made["mode"],
        "kv_first_token": made["first_token"],
        "kv_policy": {"kind": made["kind"]} | made["hyper_parameters"],
        "kv_budget": float(budget[1:]) if budget[0] == "r" else {"tokens": int(budget[1:])},
    }


# -- the same answers


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy.values())))
def test_a_request_is_answered_as_the_cell_is(client, model, policy, mode):
    """Compare tokens, entries and bytes, although the server stores the prompt with all statistics."""
    resolved = catalog.resolve(policy["kind"], policy)
    own = policy["kind"] == "full" or catalog.ignores_budget(*resolved)
    for budget in ["r1"] if own else ["r0.3", "t16"]:
        made = spec(policy, budget, mode)
        expected = row_of(model.engine, example(), made)
        for _ in range(2):  # first a prompt that is read, then a stored one
            got = as_row(ask(client, **request_of(example(), made)))
            assert got == {name: expected[name] for name in SAME}


@pytest.mark.parametrize("first_token", ["compressed", "full"])
def test_a_drawn_answer_is_the_cells(client, model, first_token):
    made = spec({"kind": "random"}, "r0.5", "after_prompt", temperature=0.8, first_token=first_token)
    expected = row_of(model.engine, example(4), made)
    assert as_row(ask(client, **request_of(example(4), made))) == {name: expected[name] for name in SAME}


def test_answers_do_not_depend_on_what_was_asked_before(model):
    """Check another order of requests, prompts that are evicted from the store, and prefills without extra
    statistics."""
    order = [(i, policy) for policy in ("h2o", "snapkv", "full") for i in range(4)]
    made = {policy: spec({"kind": policy}, "r1" if policy == "full" else "r0.3", "after_prompt") for policy in
            ("h2o", "snapkv", "full")}  # fmt: skip
    size = 0
    answers = []
    for max_bytes, statistics in ((10**9, STATISTICS), (0, frozenset()), (60_000, frozenset())):
        own = served(max_bytes=max_bytes, statistics=statistics)
        with TestClient(create_app(own)) as client:
            asked = order if max_bytes else order[::-1]
            got = {key: as_row(ask(client, **request_of(example(key[0]), made[key[1]]))) for key in asked}
        answers.append([got[key] for key in order])
        size = max(size, len(own.prefills))
    assert size == 8  # context and prompt of four examples
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("stream", [False, True])
def test_the_pipelines_cells_over_http_have_the_rows_of_the_local_engine(model, url, tmp_path, stream):
    examples = [example(i) | {"context_text": "", "question_text": ""} for i in range(3)]
    endpoint = {
        "base_url": f"{url}/v1", "model": NAME, "extra_body": {}, "api": "completions", "send": "auto",
        "serves": "kv_transition", "timeout_s": 60.0, "stream": stream,
    }  # fmt: skip
    client = Client(endpoint["base_url"], stream=stream)
    grid = [("full", "r1"), ("quantized", "r1"), ("random", "r0.3"), ("adakv", "t16")]
    for policy, budget in [({"kind": kind}, budget) for kind, budget in grid]:
        for mode in ("before_question", "after_prompt"):
            made = spec(policy, budget, mode, temperature=0.7 if stream else 0.0)
            with remote.journal_of(str(tmp_path / "cell.parquet")) as journal:
                got = remote.rows(examples, made | {"endpoint": endpoint}, client, journal, 3)
            for one, row in zip(examples, got, strict=True):
                expected = row_of(model.engine, one, made)
                assert row["engine"] == "openai"
                assert json.loads(row["raw"])["token_ids"] == json.loads(expected["raw"])["token_ids"]
                for name in set(SAME) - {"raw"}:
                    assert row[name] == expected[name], name


@pytest.mark.slow
def test_the_embedded_reader_answers_as_in_its_cells():
    """Compare prompts as text and as token ids, with the reader's own tokenizer."""
    from kv_transition.data.prompts import PromptBuilder, Template
    from kv_transition.data.tasks import get_task

    folder = Path(__file__).parents[1] / "resources" / "tiny-reader"
    engine = LocalEngine.from_pretrained(str(folder), device="cpu")
    own = Served(NAME, engine, Prefills(engine, 10**9, STATISTICS), 8192)
    template = Template.parse(get_task("synthetic", "reader_qa").template, "t")
    context = "Passage 1 : Dikuna Bank . Dikuna Bank dates from 1911 . Dikuna Bank operates in Nisovis . " * 6
    prompt = PromptBuilder(engine.tokenizer, template, 4352, chat=False)(context, "In which city is Dikuna Bank based?")
    one = example() | {
        "context_ids": prompt.context_ids, "question_ids": prompt.question_ids, "prompt_len": prompt.prompt_len,
    }  # fmt: skip
    with TestClient(create_app(own)) as client:
        for kind in ("full", "random", "streaming_llm", "h2o", "snapkv", "tova"):
            for mode in ("before_question", "after_prompt"):
                made = spec({"kind": kind}, "r1" if kind == "full" else "r0.2", mode)
                expected = row_of(engine, one, made)
                body = request_of(one, made)
                assert as_row(ask(client, **body)) == {name: expected[name] for name in SAME}
                text = {"prompt": prompt.context_text + prompt.question_text, "kv_context": len(prompt.context_text)}
                assert as_row(ask(client, **body | text)) == {name: expected[name] for name in SAME}


# -- forms of a prompt and of an answer


def test_messages_are_rendered_by_the_models_template(client):
    said = "w1 system w7 w8 w9 w2 w1 user w10 w11 w2 w1"
    plain = ask(client, prompt=said, max_tokens=8)
    chat = ask(client, **chat_body("w7 w8 w9", "w10 w11"), max_tokens=8)
    assert chat["choices"][0]["message"] == {
        "role": "assistant",
        "content": plain["choices"][0]["text"],
        "refusal": None,
    }
    assert chat["usage"]["prompt_tokens"] == len(said.split())


@pytest.mark.parametrize(
    ("at", "context"),
    [
        (1, "w1 system w7 w8 w9"),
        (2, "w1 system w7 w8 w9 w2 w1 user w10 w11"),
        ({"message": 0, "characters": 6}, "w1 system w7 w8"),
        ({"message": 1, "characters": 4}, "w1 system w7 w8 w9 w2 w1 user w10"),
    ],
)
def test_the_context_ends_where_the_request_says(client, at, context):
    kv = {"kv_policy": "knorm", "kv_budget": 0.5, "kv_mode": "before_question"}
    whole = "w1 system w7 w8 w9 w2 w1 user w10 w11 w2 w1"
    ids = words()(whole).input_ids
    expected = ask(client, prompt=ids, kv_context=len(context.split()), **kv)
    assert ask(client, prompt=whole, kv_context=len(context), **kv)["kv"]["token_ids"] == expected["kv"]["token_ids"]
    chat = ask(client, **chat_body("w7 w8 w9", "w10 w11", kv_context=at, **kv))
    assert chat["kv"]["token_ids"] == expected["kv"]["token_ids"]
    assert chat["kv"]["budget_entries"] == -(-len(context.split()) // 2)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_says_what_the_answer_says(client, path):
    kv = {"kv_policy": "tova", "kv_budget": {"tokens": 6}}
    body = {"prompt": "w5 w6 w7 w8 w9 w10"} if path == "completions" else chat_body("w7 w8 w9", "w10 w11 w12")
    body = {**body, "path": path} | kv
    whole = ask(client, **body)
    chunks = events(client, stream_options={"include_usage": True}, **body)
    *said, last, usage = chunks
    assert len({chunk["id"] for chunk in chunks}) == 1
    if path == "completions":
        assert "".join(c["choices"][0]["text"] for c in said) == whole["choices"][0]["text"]
    else:
        assert said[0]["choices"][0]["delta"]["role"] == "assistant"
        text = "".join(c["choices"][0]["delta"]["content"] for c in said)
        assert text == whole["choices"][0]["message"]["content"]
    assert len(said) > 2
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["kv"]["token_ids"] == whole["kv"]["token_ids"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all("usage" not in chunk for chunk in events(client, **body))


def test_a_stop_sequence_ends_the_answer(client):
    free = ask(client, prompt="w5 w6 w7", max_tokens=12)["choices"][0]["text"].split()
    assert len(free) == 12
    word = free[4]
    at = free.index(word)
    got = ask(client, prompt="w5 w6 w7", max_tokens=12, stop=[f" {word}", "never"])
    assert got["choices"][0] == {
        "index": 0, "text": " ".join(free[:at]), "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert len(got["kv"]["token_ids"]) == at + 1
    chunks = events(client, prompt="w5 w6 w7", max_tokens=12, stop=f" {word}")
    assert "".join(c["choices"][0]["text"] for c in chunks) == " ".join(free[:at])


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may be split over tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


@given(
    text=st.text(alphabet="abé€", max_size=12),
    stops=st.lists(st.text(alphabet="abé€", min_size=1, max_size=3), max_size=3),
)
def test_what_was_said_is_never_taken_back(text, stops):
    ids = list(text.encode())
    transcript, said, heard = Transcript(Bytes(), stops), "", 0
    while heard < len(ids) and not transcript.stopped:
        heard += 1
        said += transcript.hear(ids[:heard])
        assert text.startswith(said)
    said += transcript.rest()
    assert said == transcript.text
    # By definition, the first token after which the text contains a stop sequence ends the text before that sequence.
    for n in range(len(ids) + 1):
        there = ids[:n]
        places = [Bytes().decode(there, True).find(stop) for stop in stops]
        if any(place >= 0 for place in places):
            assert said == Bytes().decode(there, True)[: min(p for p in places if p >= 0)]
            assert heard == n
            return
    assert said == text


def test_a_prompt_of_one_token_is_answered(client):
    one = ask(client, prompt=[5], max_tokens=4)
    assert one["usage"]["prompt_tokens"] == 1
    assert ask(client, prompt="w5", max_tokens=4)["kv"]["token_ids"] == one["kv"]["token_ids"]


def test_a_seed_makes_a_draw_come_again(client):
    def draw(**more):
        return ask(client, prompt="w5 w6 w7", temperature=1.5, max_tokens=12, **more)

    assert draw(seed=3)["kv"]["token_ids"] == draw(kv_seed=3, seed=9)["kv"]["token_ids"]
    free = draw()
    assert draw(seed=free["kv"]["seed"])["kv"]["token_ids"] == free["kv"]["token_ids"]
    assert len({tuple(draw()["kv"]["token_ids"]) for _ in range(4)}) > 1


def test_the_official_client_works_unchanged(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    said = client.completions.create(model=NAME, prompt="w5 w6 w7", max_tokens=5, temperature=0)
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == 5
    messages = [{"role": "user", "content": "w5 w6 w7 w8 w9"}]
    kv = {"kv_policy": "snapkv", "kv_budget": 0.5}
    chat = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=5, temperature=0, extra_body=kv
    )
    assert chat.model_extra["kv"]["kept_final"] < chat.usage.total_tokens
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=5, temperature=0, stream=True, extra_body=kv,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="there is no policy 'best'"):
        client.completions.create(model=NAME, prompt="w5", extra_body={"kv_policy": "best"})
    with pytest.raises(openai.NotFoundError, match="'gpt-4o'"):
        client.completions.create(model="gpt-4o", prompt="w5")


# -- prompts are read once


def count_reading(monkeypatch, engine):
    """Return the list of the lengths that an engine reads without a previous state, from now on."""
    read, extend = [], engine.extend

    def counting(state, tokens, *arguments, **options):
        if state is None:
            read.append(len(tokens))
        return extend(state, tokens, *arguments, **options)

    monkeypatch.setattr(engine, "extend", counting)
    return read


def test_a_grid_over_one_document_reads_it_once(monkeypatch):
    own = served()
    read = count_reading(monkeypatch, own.engine)
    grid = [spec({"kind": kind}, budget, mode) for kind in ("random", "h2o", "snapkv", "expected_attention")
            for budget in ("r0.5", "r0.2") for mode in ("before_question", "after_prompt")]  # fmt: skip
    with TestClient(create_app(own)) as client:
        answers = [ask(client, **request_of(example(), made)) for made in grid]
        other = example() | {"question_ids": tokens(7, seed=5)}
        answers.append(ask(client, **request_of(other, grid[1])))
    assert read == [60]
    assert [answer["kv"]["reused"] for answer in answers] == [False] + [True] * 16
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[:4] == [0, 60, 60, 65]  # the context, also for the prompt of the other mode; then the whole prompt
    assert cached[-1] == 60


def test_a_prompt_is_read_again_for_a_statistic_that_it_lacks(monkeypatch):
    own = served(statistics=frozenset())
    read = count_reading(monkeypatch, own.engine)
    with TestClient(create_app(own)) as client:
        for kind in ("knorm", "random", "h2o", "knorm", "snapkv", "h2o", "snapkv"):
            ask(client, **request_of(example(), spec({"kind": kind}, "r0.5", "before_question")))
    # once without statistics, once with attn_sum, once with both; not again
    assert read == [60] * 3


def test_the_least_recently_used_prompts_go_first(model):
    one, made = example(0), spec({"kind": "knorm"}, "r0.5", "before_question")
    alone = served()
    with TestClient(create_app(alone)) as client:
        ask(client, **request_of(one, made))
    size = alone.prefills.nbytes
    assert size >= alone.engine.extend(None, one["context_ids"]).nbytes
    own = served(max_bytes=round(2.5 * size))
    with TestClient(create_app(own)) as client:

        def reused(i):
            answer = ask(client, **request_of(example(i), made))
            assert own.prefills.nbytes <= 2.5 * size
            assert client.get("/health").json()["prefill_bytes"] == own.prefills.nbytes
            return answer["kv"]["reused"]

        assert [reused(i) for i in (0, 1, 0, 2, 0, 1)] == [False, False, True, False, True, False]
        assert len(own.prefills) == 2


def test_what_is_shared_counts_once():
    """Check that keys and values shared by a context and its prompt are counted once."""
    own = served(statistics=frozenset())
    context, question = tokens(60), tokens(5, seed=9)
    own.prefills.after_context(context, frozenset(), len(question))
    own.prefills.after_prompt(context, question, frozenset())
    keys_and_values = own.engine.extend(None, context + question).nbytes
    assert keys_and_values <= own.prefills.nbytes < 1.5 * keys_and_values
