"""Compare answers, token by token, of the local engine and of real servers in separate processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_transition.cache.store import PrefillStore
from kv_transition.data.prompts import PromptBuilder, Template
from kv_transition.data.tokens import load_tokenizer
from kv_transition.engines.openai_compat import Client
from kv_transition.policies.catalog import hyper_parameters
from kv_transition.run import job
from kv_transition.studies.grid import remote
from kv_transition.studies.grid import run as cell

pytestmark = pytest.mark.slow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog while seven grey owls watch from a tall old oak tree"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a tiny Qwen2 with random weights and a byte-level BPE of ASCII, in which each token is whole
    characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_served")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=special)
    bpe.train_from_iterator([TEXT] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, **ids,
    )  # fmt: skip
    weights = Qwen2ForCausalLM(config)
    with torch.no_grad():  # so that logits differ clearly, and no answer depends on rounding
        weights.lm_head.weight.mul_(30)
    weights.generation_config = GenerationConfig(**ids, do_sample=False)
    weights.save_pretrained(folder)
    return folder


def examples(model: Path, *, chat: bool) -> list[dict]:
    build = PromptBuilder(load_tokenizer(str(model)), Template.parse("{context}\nquestion: {input}", "t"), 1500, chat)
    rows = []
    for i in range(4):
        text = " ".join(WORDS[(i + j * (i + 3)) % len(WORDS)] for j in range(60 + 20 * i))
        prompt = build(text, f"who watch the {WORDS[i]}")
        start, end = prompt.content
        rows.append({
            "task": "t", "example_id": f"e{i}", "bin": 0, "prompt_sha256": prompt.sha256,
            "prompt_len": prompt.prompt_len, "context_text": prompt.context_text,
            "question_text": prompt.question_text, "content_start": start, "content_end": end,
            "context_ids": prompt.context_ids, "question_ids": prompt.question_ids, "max_new_tokens": 16,
        })  # fmt: skip
    return rows


def spec_of(policy: str, budget: str, mode: str, **endpoint) -> dict:
    return {
        "mode": mode, "policy": policy, "kind": policy, "hyper_parameters": hyper_parameters(policy), "budget": budget,
        "first_token": "compressed", "decoding": {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0},
        "endpoint": {
            "extra_body": {}, "api": "completions", "send": "auto", "serves": None, "timeout_s": 120.0, "stream": True,
        } | endpoint,
    }  # fmt: skip


@pytest.fixture(scope="module")
def local(model, tmp_path_factory):
    """Return a function that computes rows with the local engine."""
    settings = dict.fromkeys(("revision", "quantization", "device_map", "chunk_tokens"))
    automatic = {"attn_implementation": "auto", "attention_statistics": "auto"}
    engine = job.load_engine({"name": str(model), "dtype": "float32", "device": "cpu"} | settings | automatic, 1)
    store = PrefillStore(tmp_path_factory.mktemp("store"), "never")

    def answered(rows: list[dict], policy: str, budget: str, mode: str) -> list[dict]:
        return cell.rows(engine, rows, spec_of(policy, budget, mode), store)

    return answered


@contextlib.contextmanager
def served(*command: str, log: Path, **variables: str) -> Iterator[str]:
    """Yield the address of a server in a separate process once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(remote.__file__).parents[2])} | variables
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)], env=environment, stdout=out, stderr=out
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # the server runs, whatever status it gives for the path
        except OSError:
            time.sleep(0.3)
        else:
            return


def remote_rows(url: str, rows: list[dict], spec: dict, folder: Path, concurrency: int = 2) -> list[dict]:
    client = Client(url, timeout_s=120, retries=1, stream=spec["endpoint"]["stream"])
    spec["endpoint"]["base_url"] = url
    with remote.journal_of(str(folder / "cell.parquet")) as journal:
        return remote.rows(rows, spec, client, journal, concurrency)


def test_transformers_serve_gives_the_answers_of_the_full_cache(model, local, tmp_path):
    (tmp_path / "hf" / "hub").mkdir(parents=True)  # the server's list of models fails without this folder
    command = ("transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1")
    options = ("--device", "cpu", "--dtype", "float32")
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    with served(*command, *options, log=tmp_path / "log", **variables) as url:
        for chat, api, stream in ((True, "chat", True), (True, "completions", True), (False, "completions", False)):
            rows = examples(model, chat=chat)
            expected = local(rows, "full", "r1", "after_prompt")
            spec = spec_of("full", "r1", "after_prompt", model=str(model), api=api, stream=stream)
            got = remote_rows(url, rows, spec, tmp_path)
            assert [row["text"] for row in got] == [row["text"] for row in expected], (chat, api)
            assert len({row["text"] for row in got}) > 1
            for name in ("prompt_tokens", "finish_reason"):
                assert [row[name] for row in got] == [row[name] for row in expected], (name, chat, api)
            assert all(json.loads(row["raw"])["http"]["concerns"] == [] for row in got)


def test_the_server_of_kv_transition_gives_the_rows_of_the_local_engine(model, local, tmp_path):
    """Compare policies, budgets and modes in the request, over both paths, and the cache sizes with each answer."""
    command = ("kv_transition", "serve", "--model", str(model), "--dtype", "float32", "--device", "cpu")
    grid = [
        ("full", "r1", "after_prompt"), ("full", "r1", "before_question"), ("snapkv", "r0.3", "after_prompt"),
        ("h2o", "t40", "before_question"), ("random", "r0.5", "before_question"), ("tova", "r0.2", "after_prompt"),
    ]  # fmt: skip
    same = ["text", "finish_reason", "prompt_tokens", "completion_tokens", "budget_entries", "protected", "kept_final"]
    same += ["kept_mean", "cache_bytes", "total_bytes", "full_bytes", "example_id", "prompt_sha256"]
    with served(*command, log=tmp_path / "log") as url:
        with urllib.request.urlopen(f"{url}/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        for chat, api in ((True, "chat"), (False, "completions")):
            rows = examples(model, chat=chat)
            for policy, budget, mode in grid:
                expected = local(rows, policy, budget, mode)
                spec = spec_of(policy, budget, mode, model=name, api=api, serves="kv_transition")
                got = remote_rows(url, rows, spec, tmp_path)
                for column in same:
                    where = (column, policy, budget, mode, api)
                    assert [row.get(column) for row in got] == [row.get(column) for row in expected], where
                for mine, theirs in zip(got, expected, strict=True):
                    assert json.loads(mine["raw"])["token_ids"] == json.loads(theirs["raw"])["token_ids"]
                    total = mine["prefill_s"] + mine["compress_s"] + mine["decode_s"]
                    assert mine["latency_s"] == pytest.approx(total)
