"""The specs of the grid's jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.budget import Budget
from kv_transition.data.hub import hub_source
from kv_transition.data.records import local_source
from kv_transition.data.tasks import OF_FILES, get_task
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash, digest
from kv_transition.specs.model import content, model, prefill, tokenizer_content
from kv_transition.specs.policies import (
    FULL,
    FULL_BUDGET,
    RECALL,
    budgeted,
    endpoint,
    needs_answers,
    once,
    recall_of,
    resolve,
)

if TYPE_CHECKING:
    from kv_transition.settings import Settings
    from kv_transition.studies.grid.settings import Dataset

_DECODED = {"temperature", "repeats", "batch", "compile", "seed", "compress_every", "budget_of", "max_entries"}

HELD_OUT = 32
"""largest number of examples of a task that tau is calibrated on"""


def cells(settings: Settings) -> list[tuple[str, str, str]]:
    """Return every (mode, policy, budget) that is run, the full cache of each mode first."""
    policies = [FULL, *(policy for policy in settings.kv.policies if policy != FULL)]
    return [(mode, *key) for mode in settings.kv.modes for key in budgeted(settings, policies)]


def aliases(settings: Settings) -> list[tuple[str, str]]:
    """Return the (policy, budget) pairs that keep every entry, for which the full cache's rows are used."""
    full_asked = any(budget.is_full for budget in settings.kv.all_budgets())
    policies = [policy for policy in settings.kv.policies if policy != FULL and not once(settings, policy)]
    return [(policy, FULL_BUDGET) for policy in policies] if full_asked else []


def calibrated(settings: Settings, policy: str) -> bool:
    """Return whether a policy's cells need the calibration of their task."""
    own = recall_of(settings, policy)
    return own is not None and own["tau_quantile"] is not None


def treated(settings: Settings, policy: str) -> str | None:
    """Return the policy whose cell a control reads, in the same task, mode, budget and bin; None for other policies."""
    own = recall_of(settings, policy)
    return None if own is None else own["like"]


def download(settings: Settings) -> dict[str, Any]:
    return {"dataset": _dataset(settings, "path"), "code": code_hash("kv_transition.data.download")}


def prepare(settings: Settings) -> dict[str, Any]:
    named = settings.model.model_dump(include={"name", "revision", "max_length", "chat_template"})
    return {
        "dataset": _dataset(settings, "path", "prompts", "max_lengths"),
        "model": named | {"tokenizer": tokenizer_content(named["name"])},
        "binning": settings.binning.model_dump(),
        "decoding": settings.decoding.model_dump(include={"max_tokens"}),
        "modes": list(settings.kv.modes),
        "code": code_hash("kv_transition.data.prepare"),
    }


def calibrate(settings: Settings) -> dict[str, Any]:
    return {
        "model": model(settings),
        "prepare": prepare(settings),
        "examples": HELD_OUT,
        "code": code_hash("kv_transition.studies.grid.calibrate"),
    }


def cell(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """Return the spec of every cell of a (mode, policy, budget); its digest is the ``cell_hash`` of the rows."""
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
        "match": settings.kv.match,
        "first_token": settings.kv.first_token,
        "decoding": settings.decoding.model_dump(include=_DECODED),
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.grid.run", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def _remote_cell(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """Return the spec of a cell of an endpoint. It contains what the experiment declares about the endpoint,
    unverified.
    """
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


def _dataset(settings: Settings, *files: str) -> dict[str, Any]:
    """Return the data set's keys, with the content of local ``files``, which may change under the same name."""
    dataset = settings.dataset.model_dump(exclude={"tasks", "path", "prompts", "max_lengths"} - set(files))
    contents = {key: content(dataset[key]) for key in files if dataset[key] and Path(dataset[key]).exists()}
    return dataset | {"content": contents}


def check(settings: Settings) -> None:
    """Raise UserError if the keys of the grid contradict each other or name something that does not exist."""
    if settings.adaptive.enabled and not settings.dataset:
        raise UserError("adaptive.enabled: true needs a dataset; add one, or remove this key")
    _check_pace(settings)
    if settings.kv.match != "none" and settings.decoding.compress_every is not None:
        raise UserError(
            "kv.match: with decoding.compress_every the cache grows and is compressed again and again; use none"
        )
    if settings.dataset:
        _check_dataset(settings, settings.dataset)
        if settings.engine.kind == "openai":
            _check_engine(settings)


def _check_pace(settings: Settings) -> None:
    """Raise UserError if keys of compression while decoding are incomplete, or if a policy or engine does not support
    it.
    """
    decoding = settings.decoding
    if decoding.compress_every is None:
        for key, default in (("budget_of", "prompt"), ("max_entries", None)):
            if getattr(decoding, key) != default:
                raise UserError(
                    f"decoding.{key}: this key needs compress_every; set compress_every, or remove this key"
                )
        return
    if settings.engine.kind == "openai":
        raise UserError(
            "decoding.compress_every: an endpoint decodes by itself; remove this key, or set engine.kind to local"
        )
    for name in settings.kv.policies:
        kind, _ = resolve(settings, name)
        if catalog.is_press(kind) or kind == RECALL:
            raise UserError(
                f"decoding.compress_every: {name} cannot compress again while it decodes; remove one of the two"
            )


def _check_dataset(settings: Settings, dataset: Dataset) -> None:
    if dataset.name == "longbench" or dataset.name in OF_FILES:
        hub_source(dataset.model_dump())  # raises if it is neither a local path nor a pinned repository
    if dataset.name == "ruler" and max(dataset.lengths) > settings.model.max_length:
        longest = max(dataset.lengths)
        raise UserError(
            f"model.max_length: {settings.model.max_length} would cut the middle out of documents of {longest} tokens "
            "(dataset.lengths); give at least that number"
        )
    for task in dataset.tasks:
        known = get_task(dataset.name, task)
        if "before_question" in settings.kv.modes and not known.has_question:
            raise UserError(f"kv.modes: {task} has no question, so it has no mode before_question; use [after_prompt]")
        local_source(dataset.model_dump(), task)  # raises if a local file is missing
    for key in ("prompts", "max_lengths"):
        path = getattr(dataset, key)
        if path is not None and not Path(path).is_file():
            raise UserError(f"dataset.{key}: there is no file {path}; give one that exists")


def _check_engine(settings: Settings) -> None:
    engine = settings.engine
    if settings.kv.match != "none":
        raise UserError("kv.match: an endpoint chooses K by itself, so footprints cannot be matched; use none")
    for name in settings.kv.policies:
        if needs_answers(settings, name):
            raise UserError(f"kv.policies.{name}: it cannot be calibrated on an endpoint; give tau, in nats")
    if engine.serves:
        if engine.endpoints:
            raise UserError(
                "engine.endpoints: a server of kv_transition receives the policy with each request; remove this key, "
                "or set engine.serves to null"
            )
        return
    if "before_question" in settings.kv.modes:
        raise UserError(
            "kv.modes: an endpoint gets the whole prompt at once, so it cannot evict entries before the question; use "
            "[after_prompt], or engine.serves: kv_transition"
        )
    used, there = set(), {}
    for _, policy, budget in cells(settings):
        used |= {f"{policy}@{budget}", policy}
        other = there.setdefault(digest(endpoint(settings, policy, budget)), f"{policy} at {budget}")
        if other != f"{policy} at {budget}":
            raise UserError(
                f"engine.endpoints: {other} and {policy} at {budget} have the same server, model and fields; give them "
                "different ones"
            )
    if strange := [key for key in engine.endpoints if key not in used]:
        raise UserError(f"engine.endpoints.{strange[0]}: the experiment has no such policy and budget; remove this key")
