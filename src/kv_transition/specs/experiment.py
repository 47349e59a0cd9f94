"""Checks of the whole experiment, the statistics that it reads, and the resolved configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.data import gguf
from kv_transition.errors import UserError, shown
from kv_transition.policies import catalog
from kv_transition.specs.policies import FULL, RECALL, recall_of, resolve
from kv_transition.studies import registry

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def check(settings: Settings) -> None:
    """Check combinations of keys. Raises UserError for contradictions and for names of things that do not exist."""
    try:
        _check(settings)
    except OSError as error:  # a name that the file system does not accept
        raise UserError(
            f"{shown(error.filename)} cannot be the name of a file ({error.strerror}); give another path"
        ) from None


def _check(settings: Settings) -> None:
    for name in settings.kv.policies:
        kind, _ = resolve(settings, name)
        if (name == FULL) != (kind == FULL):
            raise UserError(f"kv.policies.{name}: the full cache is the policy 'full', and it has no variants")
        if kind == RECALL:
            _check_recall(settings, name)
    if FULL not in settings.kv.policies:
        raise UserError("kv.policies: full is missing, with which all others are compared; add full: {}")
    for study in registry.studies():
        study.check(settings)
    _check_model_folder(settings)
    _check_output(settings.output.dir)


def statistics(settings: Settings) -> list[str]:
    """Return the attention statistics that some cell of the experiment reads, sorted."""
    if settings.engine.kind == "openai":
        return []
    policies = [catalog.resolve(name, options) for name, options in settings.kv.policies.items()]
    read = [catalog.statistics(*policy) for policy in policies] + [
        study.statistics(settings) for study in registry.studies()
    ]
    return sorted(frozenset().union(*read))


def resolved(settings: Settings) -> dict[str, Any]:
    """Return the whole experiment with every default filled in, as report and exports show it."""
    return settings.model_dump(mode="json")


def _check_model_folder(settings: Settings) -> None:
    name = settings.model.name
    if gguf.is_gguf(name):
        gguf.gguf_file(name)  # raises if there is no such file, or if it cannot be read
        if settings.model.revision is not None:
            raise UserError(
                "model.revision: a GGUF file has no revisions, because its content identifies it; remove this key"
            )
        return
    folder = Path(name).expanduser()
    if folder.exists():
        # an endpoint has the weights; only the tokenizer is needed here
        if settings.engine.kind == "local" and not (folder / "config.json").is_file():
            raise UserError(f"model.name: the folder {name} contains no config.json; give a transformers model folder")
        return
    # org/model is a hub id, unless the first part is an existing folder: then it is a path
    if name.count("/") != 1 or name[0] in "./~" or Path(name.split("/")[0]).is_dir():
        raise UserError(
            f"model.name: there is no folder {name}; give a model folder, a .gguf file or a hub id such as org/model "
            "(`make real` gets a small language model without the hub)"
        )


def _check_output(folder: str) -> None:
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"output.dir: {there} is a file, so {folder} cannot be a folder; give another one")


def _check_recall(settings: Settings, name: str) -> None:
    """Check that tau of an entropy_recall is given once, and that a control names its reference."""
    own = recall_of(settings, name)
    given = [key for key in ("tau", "tau_quantile") if own[key] is not None]
    if own["moments"] == "entropy" and len(given) != 1:
        raise UserError(
            f"kv.policies.{name}: moments entropy need either tau (nats) or tau_quantile, and not both; "
            "use moments: never for a policy that never recalls"
        )
    if own["moments"] != "entropy" and given:
        raise UserError(f"kv.policies.{name}.{given[0]}: moments {own['moments']} have no tau; remove this key")
    if own["moments"] not in ("random", "periodic"):
        if given := [key for key in ("like", "share") if own[key] is not None]:
            raise UserError(f"kv.policies.{name}.{given[0]}: only moments random and periodic use it; remove this key")
        return
    if own["share"] is not None:
        if own["like"] is not None:
            raise UserError(f"kv.policies.{name}: give like or share, and not both")
        return
    treated = recall_of(settings, own["like"])
    if treated is None or treated["moments"] != "entropy" or treated["inner"] != own["inner"]:
        raise UserError(
            f"kv.policies.{name}.like: {own['like']!r} is not an entropy_recall with moments entropy and inner "
            f"{own['inner']}; name the policy whose number of recalls this control copies"
        )
