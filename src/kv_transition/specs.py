"""What each job is told: exactly what its result depends on, and a hash of the code that makes it.

A spec reaches its job as JSON on the command line and its rule as a param, so that a change of anything in it, and of
nothing else, makes the job's files stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kv_transition.budget import Budget
from kv_transition.data.hub import hub_source
from kv_transition.data.records import local_source
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash, content_digest, digest
from kv_transition.settings import Dataset, Settings

FULL = "full"
RECALL = "entropy_recall"
HELD_OUT = 32
"""examples of a task that tau is calibrated on, at most"""
FULL_BUDGET = "r1"


def check(settings: Settings) -> None:
    """What no single key shows: raises UserError where keys contradict each other or name what is not there."""
    for name, options in settings.kv.policies.items():
        kind, _ = catalog.resolve(name, options)
        if (name == FULL) != (kind == FULL):
            raise UserError(f"kv.policies.{name}: the full cache is the policy 'full', and it has no variants")
        if kind == RECALL:
            _check_recall(settings, name)
    if FULL not in settings.kv.policies:
        raise UserError("kv.policies: full is missing, against which all others are compared; add full: {}")
    if settings.dataset:
        _check_dataset(settings, settings.dataset)
    for section in ("observe", "adaptive"):
        if getattr(settings, section).enabled and not settings.dataset:
            raise UserError(f"{section}.enabled: true needs a dataset; add one, or leave it out")
    if settings.observe.enabled:
        _observed(settings)  # raises where there is nothing to observe, or something that cannot be
    _check_model_folder(settings)


def _check_dataset(settings: Settings, dataset: Dataset) -> None:
    if dataset.name == "longbench":
        hub_source(dataset.model_dump())  # raises where it is neither here nor a pinned repository
    if dataset.name == "ruler" and max(dataset.lengths) > settings.model.max_length:
        longest = max(dataset.lengths)
        raise UserError(
            f"model.max_length: {settings.model.max_length} would cut the middle out of documents of {longest} tokens "
            "(dataset.lengths); give at least that"
        )
    for task in dataset.tasks:
        known = get_task(dataset.name, task)
        if "before_question" in settings.kv.modes and not known.has_question:
            raise UserError(f"kv.modes: {task} has no question, so it has no before_question mode; use [after_prompt]")
        local_source(dataset.model_dump(), task)  # raises where a local file is missing
    for key in ("prompts", "max_lengths"):
        path = getattr(dataset, key)
        if path is not None and not Path(path).is_file():
            raise UserError(f"dataset.{key}: there is no file {path}; give one that exists")


def _check_recall(settings: Settings, name: str) -> None:
    """What decides an entropy_recall's moments is given once, and a control names what it is held against."""
    own = _recall(settings, name)
    given = [key for key in ("tau", "tau_quantile") if own[key] is not None]
    if own["moments"] == "entropy" and len(given) != 1:
        raise UserError(
            f"kv.policies.{name}: moments entropy need either tau (nats) or tau_quantile, and not both; "
            "moments: never is the policy that never recalls"
        )
    if own["moments"] != "entropy" and given:
        raise UserError(f"kv.policies.{name}.{given[0]}: moments {own['moments']} have no tau; leave it out")
    if own["moments"] not in ("random", "periodic"):
        if own["like"] is not None:
            raise UserError(f"kv.policies.{name}.like: only moments random and periodic have it; leave it out")
        return
    treated = _recall(settings, own["like"])
    if treated is None or treated["moments"] != "entropy" or treated["inner"] != own["inner"]:
        raise UserError(
            f"kv.policies.{name}.like: {own['like']!r} is no entropy_recall with moments entropy and inner "
            f"{own['inner']}; name the one whose number of moments this control has"
        )


def _recall(settings: Settings, policy: str | None) -> dict[str, Any] | None:
    """The hyper-parameters of an entropy_recall; None of any other policy."""
    if policy not in settings.kv.policies:
        return None
    kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
    return hyper_parameters if kind == RECALL else None


def calibrated(settings: Settings, policy: str) -> bool:
    """Whether a policy's cells take the calibration of their task."""
    own = _recall(settings, policy)
    return own is not None and own["tau_quantile"] is not None


def treated(settings: Settings, policy: str) -> str | None:
    """The policy whose cell a control's cell takes, in the same task, mode, budget and bin; None for all others."""
    own = _recall(settings, policy)
    return None if own is None else own["like"]


def _check_model_folder(settings: Settings) -> None:
    name = settings.model.name
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name: the folder {name} holds no config.json; give a transformers model folder")
        return
    # org/model is a hub id, unless the first part is a folder here: then a path was meant
    if name.count("/") != 1 or name[0] in "./~" or Path(name.split("/")[0]).is_dir():
        raise UserError(f"model.name: there is no folder {name}; give a model folder or a hub id such as org/model")


def cells(settings: Settings) -> list[tuple[str, str, str]]:
    """Every (mode, policy, budget) that is run.

    The full cache, and policies whose footprint is their own, are run once a mode, as budget r1.
    """
    grid = []
    for mode in settings.kv.modes:
        grid.append((mode, FULL, FULL_BUDGET))
        for policy in settings.kv.policies:
            if _once(settings, policy):
                grid.append((mode, policy, FULL_BUDGET))
            elif policy != FULL:
                grid.extend((mode, policy, str(b)) for b in settings.kv.all_budgets() if not b.is_full)
    return grid


def _once(settings: Settings, policy: str) -> bool:
    return policy != FULL and catalog.ignores_budget(*catalog.resolve(policy, settings.kv.policies[policy]))


def aliases(settings: Settings) -> list[tuple[str, str]]:
    """(policy, budget) pairs that keep everything: the full cache's rows stand for them."""
    full_asked = any(budget.is_full for budget in settings.kv.all_budgets())
    policies = [policy for policy in settings.kv.policies if policy != FULL and not _once(settings, policy)]
    return [(policy, FULL_BUDGET) for policy in policies] if full_asked else []


def statistics(settings: Settings) -> list[str]:
    """The attention statistics that some cell of the experiment reads, sorted."""
    kinds = [catalog.resolve(name, options)[0] for name, options in settings.kv.policies.items()]
    # an observation follows the attention received whatever the policies read
    observed = ["attn_sum"] if settings.observe.enabled else []
    return sorted(frozenset(observed).union(*(catalog.statistics(kind) for kind in kinds)))


def _dataset(settings: Settings, *files: str) -> dict[str, Any]:
    """The data set's keys, with the content of local ``files``: it may change while its name does not."""
    dataset = settings.dataset.model_dump(exclude={"tasks", "path", "prompts", "max_lengths"} - set(files))
    contents = {key: _content(dataset[key]) for key in files if dataset[key] and Path(dataset[key]).exists()}
    return dataset | {"content": contents}


@cache
def _content(path: str) -> str:
    return content_digest(path)


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


@cache
def _tokenizer_content(name: str) -> str | None:
    """Of a local model's folder without its weights; None for a hub id, whose revision says it."""
    return content_digest(name, (".json", ".model", ".jinja")) if Path(name).is_dir() else None


def _model(settings: Settings) -> dict[str, Any]:
    model = settings.model.model_dump(exclude={"max_length", "chat_template"})
    return model | {
        "chunk_tokens": settings.prefill.chunk_tokens,
        "fingerprint": _fingerprint(model["name"], model["revision"]),
    }


@cache
def _fingerprint(name: str, revision: str | None) -> str:
    """What tells one model from another: a hub id and its revision, or the contents of a folder."""
    if not Path(name).is_dir():
        return digest([name, revision])
    return content_digest(name, (".json", ".safetensors", ".bin", ".model"))


def prefill(settings: Settings) -> dict[str, Any]:
    return {"model": _model(settings), "code": code_hash("kv_transition.run.prefill")}


def calibrate(settings: Settings) -> dict[str, Any]:
    return {
        "model": _model(settings),
        "prepare": prepare(settings),
        "examples": HELD_OUT,
        "code": code_hash("kv_transition.run.calibrate"),
    }


def cell(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """The spec of every cell of a (mode, policy, budget); its digest is the ``cell_hash`` of their rows."""
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
        "code": code_hash("kv_transition.run.cell", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


ORACLE = "oracle"
_UNOBSERVED = {
    FULL: "keeps everything",
    "entropy_merge": "holds entries that stand for several",
    "entropy_recall": "chooses by the step's own query",
}


def why_not_observed(kind: str, hyper_parameters: Mapping[str, Any]) -> str | None:
    """Why what a policy holds cannot be compared with what a step needs; None if it can."""
    if catalog.is_press(kind):
        return "reads the prompt itself"
    if catalog.ignores_budget(kind, hyper_parameters):
        return "has a footprint of its own"
    return _UNOBSERVED.get(kind)


def _observed(settings: Settings) -> dict[str, dict[str, Any]]:
    """Kind and hyper-parameters of each policy that is observed, by its name.

    Raises UserError if one is asked for that is not there or cannot be observed.
    """
    if ORACLE in settings.kv.policies:
        raise UserError("kv.policies.oracle: this name is that of observation's upper bound; choose another one")
    there = {name: catalog.resolve(name, options) for name, options in settings.kv.policies.items()}
    why = {name: reason for name, resolved in there.items() if (reason := why_not_observed(*resolved))}
    there[ORACLE] = ORACLE, {}
    fitting = [name for name in there if name not in why]
    for name in settings.observe.policies or []:
        if name in why:
            raise UserError(f"observe.policies: {name} {why[name]}, so that it has no recall; leave it out")
        if name not in there:
            raise UserError(f"observe.policies: there is no {name!r}; choose from {', '.join(fitting)}")
    names = settings.observe.policies or fitting
    return {name: {"kind": there[name][0], "hyper_parameters": there[name][1]} for name in names}


def observe(settings: Settings) -> dict[str, Any]:
    """The spec of every observation; its digest is the ``observe_hash`` of their files."""
    reading = prefill(settings)
    policies = _observed(settings)
    kinds = [options["kind"] for options in policies.values() if options["kind"] != ORACLE]
    section = settings.observe.model_dump(exclude={"enabled", "policies", "budgets"})
    return section | {
        "policies": policies,
        "budgets": [str(budget) for budget in settings.observe.all_budgets()],
        "seed": settings.decoding.seed,
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.run.observe", *(m for kind in kinds for m in catalog.modules(kind))),
        "policy_content": {kind: catalog.content(kind) for kind in kinds},
    }


def resolved(settings: Settings) -> dict[str, Any]:
    """The whole experiment with every default filled in, as the report and the exports show it."""
    return settings.model_dump(mode="json")
