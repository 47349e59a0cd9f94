"""What no single key shows: keys that contradict each other, or name what is not there."""

from __future__ import annotations

from pathlib import Path

from kv_transition.data import gguf
from kv_transition.data.hub import hub_source
from kv_transition.data.records import local_source
from kv_transition.data.tasks import get_task
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import digest
from kv_transition.settings import Dataset, Settings
from kv_transition.specs.grid import FULL, RECALL, TEXT_DROP, cells, endpoint, observed, recall_of, resolve, scored
from kv_transition.studies.perplexity.corpus import hub_repository


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
        observed(settings)  # raises where there is nothing to observe, or something that cannot be
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


def _check_model_folder(settings: Settings) -> None:
    name = settings.model.name
    if gguf.is_gguf(name):
        gguf.gguf_file(name)  # raises where there is none, or none that can be read
        if settings.model.revision is not None:
            raise UserError("model.revision: a GGUF file has no revisions, its content counts; leave it out")
        return
    folder = Path(name).expanduser()
    if folder.exists():
        # an endpoint has the weights; here the tokenizer counts
        if settings.engine.kind == "local" and not (folder / "config.json").is_file():
            raise UserError(f"model.name: the folder {name} holds no config.json; give a transformers model folder")
        return
    # org/model is a hub id, unless the first part is a folder here: then a path was meant
    if name.count("/") != 1 or name[0] in "./~" or Path(name.split("/")[0]).is_dir():
        raise UserError(
            f"model.name: there is no folder {name}; give a model folder, a .gguf file or a hub id such as org/model "
            "(`make real` gets a small language model without the hub)"
        )


def _check_recall(settings: Settings, name: str) -> None:
    """What decides an entropy_recall's moments is given once, and a control names what it is held against."""
    own = recall_of(settings, name)
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
    treated = recall_of(settings, own["like"])
    if treated is None or treated["moments"] != "entropy" or treated["inner"] != own["inner"]:
        raise UserError(
            f"kv.policies.{name}.like: {own['like']!r} is no entropy_recall with moments entropy and inner "
            f"{own['inner']}; name the one whose number of moments this control has"
        )


def _check_perplexity(settings: Settings) -> None:
    section = settings.perplexity
    if unknown := [name for name in section.policies or [] if name not in settings.kv.policies]:
        known = ", ".join(settings.kv.policies)
        raise UserError(f"perplexity.policies: there is no {unknown[0]!r}; choose from {known}")
    for name in scored(settings):
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


def _check_chat(settings: Settings) -> None:
    path = settings.chat.path
    if path is not None and not Path(path).is_file():
        raise UserError(f"chat.path: there is no file {path}; give the file of conversations")
    for name, options in settings.kv.policies.items():
        kind, _ = catalog.resolve(name, options)
        if catalog.is_press(kind):
            raise UserError(f"kv.policies.{name}: {kind} reads a prompt in one go, so it plays no conversation")
        own = recall_of(settings, name)
        if own and (own["tau_quantile"] is not None or own["like"] is not None):
            raise UserError(f"kv.policies.{name}: conversations have nothing to calibrate on; give tau, in nats")
        if name in settings.chat.controls:
            raise UserError(f"kv.policies.{name}: this name is that of a control in chat.controls; choose another one")


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
        own = recall_of(settings, name)
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
