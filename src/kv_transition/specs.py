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
from kv_transition.data.corpus import hub_repository
from kv_transition.data.hub import hub_source
from kv_transition.data.records import local_source
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash, content_digest, digest
from kv_transition.settings import Dataset, Settings

EVAL = Path(__file__).parent / "eval"
FULL = "full"
RECALL = "entropy_recall"
HELD_OUT = 32
"""examples of a task that tau is calibrated on, at most"""
FULL_BUDGET = "r1"


def check(settings: Settings) -> None:
    """What no single key shows: raises UserError where keys contradict each other or name what is not there."""
    for name, options in settings.kv.policies.items():
        if options.get("kind", name) == TEXT_DROP:
            raise UserError(
                f"kv.policies.{name}: {TEXT_DROP} deletes text and is no cache policy, but a control of conversations; "
                f"give chat.controls: [{TEXT_DROP}]"
            )
        kind, _ = resolve(settings, name)
        if (name == FULL) != (kind == FULL):
            raise UserError(f"kv.policies.{name}: the full cache is the policy 'full', and it has no variants")
        if kind == RECALL:
            _check_recall(settings, name)
    if FULL not in settings.kv.policies:
        raise UserError("kv.policies: full is missing, against which all others are compared; add full: {}")
    if settings.dataset:
        _check_dataset(settings, settings.dataset)
    if settings.perplexity:
        _check_perplexity(settings)
    for section in ("observe", "adaptive"):
        if getattr(settings, section).enabled and not settings.dataset:
            raise UserError(f"{section}.enabled: true needs a dataset; add one, or leave it out")
    if settings.observe.enabled:
        _observed(settings)  # raises where there is nothing to observe, or something that cannot be
    if settings.chat:
        _check_chat(settings)
    if settings.engine.kind == "openai":
        _check_engine(settings)
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


def _check_perplexity(settings: Settings) -> None:
    section = settings.perplexity
    if unknown := [name for name in section.policies or [] if name not in settings.kv.policies]:
        known = ", ".join(settings.kv.policies)
        raise UserError(f"perplexity.policies: there is no {unknown[0]!r}; choose from {known}")
    for name in _scored(settings):
        kind, own = catalog.resolve(name, settings.kv.policies[name])
        where = f"name those that are to be scored in perplexity.policies, without {name}"
        if catalog.is_press(kind):
            raise UserError(f"kv.policies.{name}: a press acts in its own reading of a prompt, not of a text; {where}")
        if kind == RECALL and (own["tau_quantile"] is not None or own["like"] is not None):
            raise UserError(f"kv.policies.{name}: its moments follow from the answers to a task; {where}")
        if section.streaming and name != FULL and (kind == RECALL or not catalog.acts_each_step(kind)):
            raise UserError(
                f"kv.policies.{name}: {kind} does not evict while a text is read, as perplexity.streaming asks; {where}"
            )
    hub_repository(section.model_dump())  # raises where the corpus is neither here nor a pinned repository


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
    kind, hyper_parameters = resolve(settings, policy)
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
        # an endpoint has the weights; here the tokenizer counts
        if settings.engine.kind == "local" and not (folder / "config.json").is_file():
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
    if policy == FULL or _endpoints_own(settings, policy):
        return False
    return catalog.ignores_budget(*catalog.resolve(policy, settings.kv.policies[policy]))


def aliases(settings: Settings) -> list[tuple[str, str]]:
    """(policy, budget) pairs that keep everything: the full cache's rows stand for them."""
    full_asked = any(budget.is_full for budget in settings.kv.all_budgets())
    policies = [policy for policy in settings.kv.policies if policy != FULL and not _once(settings, policy)]
    return [(policy, FULL_BUDGET) for policy in policies] if full_asked else []


def statistics(settings: Settings) -> list[str]:
    """The attention statistics that some cell of the experiment reads, sorted."""
    if settings.engine.kind == "openai":
        return []
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
        "code": code_hash("kv_transition.run.cell", *catalog.modules(kind)),
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
        "code": code_hash("kv_transition.run.remote"),
        "policy_content": catalog.content(kind) if engine.serves else None,
    }


def endpoint(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """``base_url``, ``model`` and ``extra_body`` of what stands for a (policy, budget).

    Raises UserError if nothing does: the full cache, and a server that takes the policy with the request, stand at the
    engine's own address; every other needs an entry.
    """
    engine = settings.engine
    key = next((key for key in (f"{policy}@{budget}", policy) if key in engine.endpoints), None)
    if key is None and policy != FULL and not engine.serves:
        raise UserError(
            f"engine.endpoints: nothing stands for {policy} at {budget}; add '{policy}@{budget}', or '{policy}' where "
            "it has one budget, with the base_url, the model or the extra_body of what serves it"
        )
    own = engine.endpoints[key] if key else None
    return {
        "base_url": (own and own.base_url) or engine.base_url,
        "model": (own and own.model) or engine.model or settings.model.name,
        "extra_body": engine.extra_body | (own.extra_body if own else {}),
    }


def resolve(settings: Settings, policy: str) -> tuple[str, dict[str, Any]]:
    """Kind and hyper-parameters of a policy; those of a kind that only its endpoint knows as they are given."""
    options = settings.kv.policies[policy]
    if _endpoints_own(settings, policy):
        return options.get("kind", policy), {key: value for key, value in options.items() if key != "kind"}
    return catalog.resolve(policy, options)


def _endpoints_own(settings: Settings, policy: str) -> bool:
    """Whether a policy is one of the endpoint's, which this project knows by name only."""
    declared = settings.engine.kind == "openai" and not settings.engine.serves
    kind = settings.kv.policies[policy].get("kind", policy)
    return declared and isinstance(kind, str) and kind not in catalog.kinds()


def _check_engine(settings: Settings) -> None:
    engine = settings.engine
    for section, there in (
        ("observe.enabled", settings.observe.enabled),
        ("perplexity", settings.perplexity),
        ("chat", settings.chat),
    ):
        if there:
            raise UserError(f"{section}: this needs the model itself; set engine.kind to local, or leave it out")
    for name in settings.kv.policies:
        own = _recall(settings, name)
        if own and (own["tau_quantile"] is not None or own["like"] is not None):
            raise UserError(f"kv.policies.{name}: an endpoint has nothing to calibrate it on; give tau, in nats")
    if engine.serves:
        if engine.endpoints:
            raise UserError(
                "engine.endpoints: a server of kv_transition takes the policy with each request; leave this out, "
                "or set engine.serves to null"
            )
        return
    if "before_question" in settings.kv.modes:
        raise UserError(
            "kv.modes: an endpoint gets the whole prompt at once, so it cannot forget before the question; use "
            "[after_prompt], or engine.serves: kv_transition"
        )
    used, there = set(), {}
    for _, policy, budget in cells(settings):
        used |= {f"{policy}@{budget}", policy}
        other = there.setdefault(digest(endpoint(settings, policy, budget)), f"{policy} at {budget}")
        if other != f"{policy} at {budget}":
            raise UserError(
                f"engine.endpoints: {other} and {policy} at {budget} have the same server, model and fields; say what "
                "tells them apart"
            )
    if strange := [key for key in engine.endpoints if key not in used]:
        raise UserError(f"engine.endpoints.{strange[0]}: the experiment has no such policy and budget; leave it out")


TEXT_DROP = "text_drop"


def chat_cells(settings: Settings) -> list[tuple[str, str]]:
    """Every (policy, budget) that conversations are played under.

    The full cache, and policies whose footprint is their own, once, as budget r1; all others and the controls at each
    budget below 1.
    """
    if settings.chat is None:
        return []
    budgets = [str(budget) for budget in settings.kv.all_budgets() if not budget.is_full]
    once = [policy for policy in settings.kv.policies if policy == FULL or _once(settings, policy)]
    others = [policy for policy in settings.kv.policies if policy not in once] + settings.chat.controls
    return [(policy, FULL_BUDGET) for policy in once] + [(policy, b) for policy in others for b in budgets]


def _check_chat(settings: Settings) -> None:
    path = settings.chat.path
    if path is not None and not Path(path).is_file():
        raise UserError(f"chat.path: there is no file {path}; give the file of conversations")
    for name, options in settings.kv.policies.items():
        kind, _ = catalog.resolve(name, options)
        if catalog.is_press(kind):
            raise UserError(f"kv.policies.{name}: {kind} reads a prompt in one go, so it plays no conversation")
        own = _recall(settings, name)
        if own and (own["tau_quantile"] is not None or own["like"] is not None):
            raise UserError(f"kv.policies.{name}: conversations have nothing to calibrate on; give tau, in nats")
        if name in settings.chat.controls:
            raise UserError(f"kv.policies.{name}: this name is that of a control in chat.controls; choose another one")


def conversations(settings: Settings) -> dict[str, Any]:
    """The spec of the job that brings conversations into one form."""
    chat = settings.chat
    modules = ["kv_transition.data.multiturn"]
    if chat.source == "generated":
        modules.append("kv_transition.data.conversations")
    return {
        "chat": chat.model_dump(include={"source", "path", "n", "seed", "max_turns"}) | {"name": chat.set},
        "content": _content(chat.path) if chat.path else None,
        "code": code_hash(*modules),
    }


def chat(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """The spec of the conversations of a (policy, budget); its digest is the ``chat_hash`` of their rows."""
    if policy in settings.chat.controls:
        kind, hyper_parameters, modules, content = policy, {}, [f"kv_transition.run.{policy}"], None
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
        "code": code_hash("kv_transition.run.chat", *modules),
        "policy_content": content,
    }


def judge(settings: Settings) -> dict[str, Any]:
    """The spec of the job that asks the judge; the answers that it judges are its input."""
    return {
        "judge": settings.chat.judge.model_dump(),
        "rubric": _content(str(EVAL / "rubric.txt")),
        "code": code_hash("kv_transition.eval.judge"),
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


def _scored(settings: Settings) -> list[str]:
    """Names of the policies that texts are scored under."""
    chosen = settings.perplexity.policies
    return [name for name in settings.kv.policies if chosen is None or name in chosen or name == FULL]


def perplexity_cells(settings: Settings) -> list[tuple[str, str]]:
    """Every (policy, budget) that texts are scored under, by the same rules as `cells`; none without the section."""
    grid = []
    for policy in _scored(settings) if settings.perplexity else []:
        if policy == FULL or _once(settings, policy):
            grid.append((policy, FULL_BUDGET))
        else:
            grid.extend((policy, str(b)) for b in settings.kv.all_budgets() if not b.is_full)
    return grid


def windows(settings: Settings) -> dict[str, Any]:
    """The spec of the windows of a corpus."""
    section = settings.perplexity.model_dump(exclude={"policies", "streaming", "streaming_chunk"})
    path = section["path"]
    model = settings.model.model_dump(include={"name", "revision"})
    return {
        "perplexity": section,
        "content": _content(path) if path and Path(path).exists() else None,
        "model": model | {"tokenizer": _tokenizer_content(model["name"])},
        "code": code_hash("kv_transition.data.windows"),
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
        "code": code_hash("kv_transition.run.perplexity", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def resolved(settings: Settings) -> dict[str, Any]:
    """The whole experiment with every default filled in, as the report and the exports show it."""
    return settings.model_dump(mode="json")
