"""What each job is told: exactly what its result depends on, and a hash of the code that makes it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from kv_transition.budget import Budget
from kv_transition.data import gguf
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash, content_digest, digest
from kv_transition.settings import Settings
from kv_transition.specs.grid import ORACLE, endpoint, observed, resolve

RUBRIC = Path(__file__).parents[1] / "studies" / "chat" / "rubric.txt"
HELD_OUT = 32
"""examples of a task that tau is calibrated on, at most"""


def download(settings: Settings) -> dict[str, Any]:
    return {"dataset": _dataset(settings, "path"), "code": code_hash("kv_transition.data.download")}


def prepare(settings: Settings) -> dict[str, Any]:
    model = settings.model.model_dump(include={"name", "revision", "max_length", "chat_template"})
    return {
        "dataset": _dataset(settings, "path", "prompts", "max_lengths"),
        "model": model | {"tokenizer": _tokenizer_content(model["name"])},
        "binning": settings.binning.model_dump(),
        "decoding": settings.decoding.model_dump(include={"max_tokens"}),
        "modes": list(settings.kv.modes),
        "code": code_hash("kv_transition.data.prepare"),
    }


def prefill(settings: Settings) -> dict[str, Any]:
    return {"model": _model(settings), "code": code_hash("kv_transition.run.prefill")}


def calibrate(settings: Settings) -> dict[str, Any]:
    return {
        "model": _model(settings),
        "prepare": prepare(settings),
        "examples": HELD_OUT,
        "code": code_hash("kv_transition.studies.grid.calibrate"),
    }


def cell(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """The spec of every cell of a (mode, policy, budget); its digest is the ``cell_hash`` of their rows."""
    if settings.engine.kind == "openai":
        return _remote_cell(settings, mode, policy, budget)
    kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
    reading = prefill(settings)
    return {
        "mode": mode,
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        "first_token": settings.kv.first_token,
        "decoding": settings.decoding.model_dump(include={"temperature", "repeats", "batch", "compile", "seed"}),
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.grid.run", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def _remote_cell(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """It depends on what the endpoint was declared to be; whether it is that cannot be known here."""
    kind, hyper_parameters = resolve(settings, policy)
    engine = settings.engine
    return {
        "mode": mode,
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        "first_token": settings.kv.first_token,
        "decoding": settings.decoding.model_dump(include={"temperature", "repeats", "seed"}),
        "endpoint": endpoint(settings, policy, budget)
        | engine.model_dump(include={"api", "send", "serves"})
        | engine.request.model_dump(include={"timeout_s", "stream"}),
        "code": code_hash("kv_transition.studies.grid.remote"),
        "policy_content": catalog.content(kind) if engine.serves else None,
    }


def observe(settings: Settings) -> dict[str, Any]:
    """The spec of every observation; its digest is the ``observe_hash`` of their files."""
    reading = prefill(settings)
    policies = observed(settings)
    kinds = [options["kind"] for options in policies.values() if options["kind"] != ORACLE]
    section = settings.observe.model_dump(exclude={"enabled", "policies", "budgets"})
    return section | {
        "policies": policies,
        "budgets": [str(budget) for budget in settings.observe.all_budgets()],
        "seed": settings.decoding.seed,
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.recall.run", *(m for kind in kinds for m in catalog.modules(kind))),
        "policy_content": {kind: catalog.content(kind) for kind in kinds},
    }


def windows(settings: Settings) -> dict[str, Any]:
    """The spec of the windows of a corpus."""
    section = settings.perplexity.model_dump(exclude={"policies", "streaming", "streaming_chunk"})
    path = section["path"]
    model = settings.model.model_dump(include={"name", "revision"})
    return {
        "perplexity": section,
        "content": _content(path) if path and Path(path).exists() else None,
        "model": model | {"tokenizer": _tokenizer_content(model["name"])},
        "code": code_hash("kv_transition.studies.perplexity.windows"),
    }


def perplexity(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """The spec of every length bin of a (policy, budget); its digest is the ``perplexity_hash`` of their rows."""
    kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
    if kind == "streaming_llm" and "positions" not in settings.kv.policies[policy]:
        # the paper's way, and the only one for texts that are longer than the model was trained for
        hyper_parameters |= {"positions": "cache"}
    reading = prefill(settings)
    return {
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        **settings.perplexity.model_dump(include={"streaming", "streaming_chunk", "seed"}),
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.perplexity.run", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def conversations(settings: Settings) -> dict[str, Any]:
    """The spec of the job that brings conversations into one form."""
    chat = settings.chat
    modules = ["kv_transition.studies.chat.multiturn"]
    if chat.source == "generated":
        modules.append("kv_transition.studies.chat.conversations")
    return {
        "chat": chat.model_dump(include={"source", "path", "n", "seed", "max_turns"}) | {"name": chat.set},
        "content": _content(chat.path) if chat.path else None,
        "code": code_hash(*modules),
    }


def chat(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """The spec of the conversations of a (policy, budget); its digest is the ``chat_hash`` of their rows."""
    if policy in settings.chat.controls:
        kind, hyper_parameters, modules, content = policy, {}, [f"kv_transition.studies.chat.{policy}"], None
    else:
        kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
        modules, content = catalog.modules(kind), catalog.content(kind)
    return {
        "chat_set": settings.chat.set,
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        "max_tokens": settings.chat.max_tokens,
        "max_length": settings.model.max_length,
        "chat_template": settings.model.chat_template,
        "hold": settings.chat.hold,
        "answer_nll": settings.chat.answer_nll,
        "seed": settings.decoding.seed,
        "model": _model(settings),
        "code": code_hash("kv_transition.studies.chat.run", *modules),
        "policy_content": content,
    }


def judge(settings: Settings) -> dict[str, Any]:
    """The spec of the job that asks the judge; the answers that it judges are its input."""
    return {
        "judge": settings.chat.judge.model_dump(),
        "rubric": _content(str(RUBRIC)),
        "code": code_hash("kv_transition.studies.chat.judge"),
    }


def resolved(settings: Settings) -> dict[str, Any]:
    """The whole experiment with every default filled in, as the report and the exports show it."""
    return settings.model_dump(mode="json")


def _dataset(settings: Settings, *files: str) -> dict[str, Any]:
    """The data set's keys, with the content of local ``files``: it may change while its name does not."""
    dataset = settings.dataset.model_dump(exclude={"tasks", "path", "prompts", "max_lengths"} - set(files))
    contents = {key: _content(dataset[key]) for key in files if dataset[key] and Path(dataset[key]).exists()}
    return dataset | {"content": contents}


def _model(settings: Settings) -> dict[str, Any]:
    model = settings.model.model_dump(exclude={"max_length", "chat_template"})
    return model | {
        "chunk_tokens": settings.prefill.chunk_tokens,
        "fingerprint": _fingerprint(model["name"], model["revision"]),
    }


@cache
def _content(path: str) -> str:
    return content_digest(path)


@cache
def _tokenizer_content(name: str) -> str | None:
    """Of a local model's folder without its weights; None for a hub id, whose revision says it."""
    if gguf.is_gguf(name):
        return gguf.content_sha256(name)
    return content_digest(name, (".json", ".model", ".jinja")) if Path(name).is_dir() else None


@cache
def _fingerprint(name: str, revision: str | None) -> str:
    """What tells one model from another: a hub id and its revision, or the contents of a folder or GGUF file."""
    if gguf.is_gguf(name):
        return gguf.content_sha256(name)[:16]
    if not Path(name).is_dir():
        return digest([name, revision])
    return content_digest(name, (".json", ".safetensors", ".bin", ".model"))
