"""The experiment as one typed, frozen model: the shared sections and those of each study.

Every default of the project is in a section. ``workflow/schemas/config.schema.yaml`` is derived from the sections
(`json_schema`), and config/README.md explains each key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from kv_transition.errors import UserError, shown
from kv_transition.sections import KV, Decoding, Engine, Hardware, Model, Output, Prefill, Report, Section, Statistics
from kv_transition.studies import registry
from kv_transition.yaml_text import parse_yaml, read_yaml


class Shared(Section):
    """The keys that every experiment has, whichever studies it runs."""

    experiment: str = Field(
        "demo",
        description="name of the results folder",
        json_schema_extra={"pattern": "^[A-Za-z0-9_.-]+$", "maxLength": 100},
    )
    model: Model = Model()
    engine: Engine = Engine()
    prefill: Prefill = Prefill()
    kv: KV
    decoding: Decoding = Decoding()
    statistics: Statistics = Statistics()
    report: Report = Report()
    output: Output = Output()
    hardware: Hardware = Hardware()

    @field_validator("experiment")
    @classmethod
    def _a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
            raise ValueError(
                f"{shown(name)} cannot be the name of a folder; give 1 to 100 letters (a to z), digits, '_', '.' or '-'"
            )
        if name in ("prefill", "models", ".", ".."):
            raise ValueError(f"{name!r} cannot be an experiment's name; that folder has another use")
        return name


class Settings(*(study.Fields for study in reversed(registry.load("settings"))), Shared):
    """A whole experiment."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Settings:
        studies = ("dataset", "perplexity", "chat", "harness")
        if all(getattr(self, name, None) is None for name in studies):
            raise ValueError(f"dataset: this key is required, unless there is another of {', '.join(studies)}")
        return self


def parse(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a configuration. Raises UserError with one sentence that names the key and its allowed
    values.
    """
    # A resolved experiment has a section with its provenance; it is removed here, so that the file can be run again.
    sections = {key: value for key, value in _plain(config).items() if key != "provenance"}
    try:
        return Settings.model_validate(sections)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def load(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Return the settings of an experiment file. Nothing is merged into it except the overrides ``key.sub=value``."""
    config = read_yaml(path, "experiment file", advice="see config/config.yaml for the form")
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping of keys; see config/config.yaml for the form")
    return parse(override(config, overrides or []))


def override(config: Mapping[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of the configuration with assignments such as ``model.device=cpu`` applied; values are YAML."""
    result = _plain(config)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"--set {assignment!r} is not of the form key.sub=value, such as model.device=cpu")
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {key}: {parent} is a value, not a section")
        section[last] = parse_yaml(text, f"--set {key}: {text[:80]!r}")
    return result


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of an experiment file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}


def _plain(value: Any) -> Any:
    """Return nested mappings as plain dicts, so that the caller's object is never changed."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _allowed_keys(loc: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Settings
    parts = iter(loc[:-1])
    for part in parts:
        field = section.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return ""
        section = sections[0]
        if get_origin(field.annotation) is dict:
            next(parts, None)  # the name of a section
    return ", ".join(section.model_fields)


# Allowed values of keys with several types, because the library's message covers one type only.
_UNIONS = {
    r"^kv\.budgets\.\d+": "give a fraction in (0, 1] such as 0.2, or {tokens: n} with n of at least 1",
    r"^(decoding|observe)\.max_tokens": "give 'task' or a whole number of at least 1",
    r"^kv\.policies": "give name: {hyper-parameters}, the name of at most 100 letters, digits, '_', '.' and '-'",
}


# Parts that the library adds to a location for the member of a union and for the key of a mapping.
_UNION_MEMBER = re.compile(r"\[key\]|(constrained-)?(int|float)|TokenBudget|literal\[.*\]|function-.*\(.*\)")


def _sentence(error: ValidationError) -> str:
    # A union fails once per member; the deepest location is the member the user meant.
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", e["type"] == "value_error"))
    loc = tuple(part for part in first["loc"] if not _UNION_MEMBER.fullmatch(str(part)))
    key = ".".join(str(part) for part in loc) or "the configuration"
    kind, given = first["type"], first.get("input")
    for pattern, allowed in _UNIONS.items():
        if re.match(pattern, key):
            return f"{key}: {shown(given)} is not allowed; {allowed}"
    if kind == "extra_forbidden":
        return f"{key}: there is no such key; allowed here: {_allowed_keys(loc)}"
    if kind == "missing":
        return f"{key}: this key is required; see config/README.md"
    if kind == "value_error":
        text = str(first["ctx"]["error"])
        if not loc:
            return text
        # the message of a section's validator begins with the name of the wrong key
        inside = re.match(r"([\w.@-]+): ", text)
        return f"{key}.{text}" if inside else f"{key}: {text}"
    if kind == "literal_error":
        return f"{key}: {shown(given)} is not allowed; choose one of {first['ctx']['expected']}"
    if kind == "too_short":
        return f"{key}: give at least {first['ctx']['min_length']} entry, not {shown(given)}"
    if kind == "model_type":
        return f"{key}: this is a section of keys, not {shown(given)}; allowed in it: {_allowed_keys((*loc, ''))}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message.replace('input should', 'it should')}, not {shown(given)}"
