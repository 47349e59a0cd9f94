"""Compare the documentation of the configuration with the settings."""

from __future__ import annotations

import importlib
import re
import types
import typing
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kv_transition import settings as settings_module
from kv_transition.data import tasks
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "config/README.md").read_text(encoding="utf-8")
EXPERIMENTS = [ROOT / "config/config.yaml", *sorted((ROOT / "config/experiments").glob("*.yaml"))]


def sections_in(annotation) -> list[type[BaseModel]]:
    """Return the sections that a type mentions, at any depth."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in typing.get_args(annotation) for section in sections_in(part)]


def keys(section: type[BaseModel] = Settings, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every key that holds a value, by its dotted name."""
    found = {}
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        if inner != [field.annotation]:
            found[prefix + name] = field
        for part in inner:
            found |= keys(part, f"{prefix}{name}.")
    return found


def rows() -> dict[str, list[str]]:
    """Return the rows of the tables of keys: the first cell without its backticks, then the other cells."""
    lines = [line for line in README.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first.strip("` "): rest for first, *rest in cells}


def test_the_walk_sees_every_depth():
    assert {"experiment", "dataset.name", "kv.budgets.tokens", "hardware.mem_gb"} <= set(keys())
    assert "binning" not in keys()


@pytest.mark.parametrize("key", keys())
def test_every_key_is_documented_with_its_default_and_choices(key):
    field = keys()[key]
    kind, default, meaning = rows()[key]
    if field.is_required():
        assert default == "required"
    else:
        assert yaml.safe_load(default.strip("`")) == field.default
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        assert kind == "choice"
        for choice in typing.get_args(annotation):
            assert f"`{choice}`" in meaning


def test_nothing_is_documented_that_does_not_exist():
    documented = {key for key, cells in rows().items() if len(cells) == 3}
    assert documented == set(keys())
    for section in re.findall(r"^### (`.*?)(?::.*)?$", README, flags=re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", section)) <= set(Settings.model_fields)


def test_every_policy_is_documented_with_its_hyper_parameters():
    documented = {kind: cells[0] for kind, cells in rows().items() if len(cells) == 2}
    assert set(documented) == set(catalog.kinds())
    for kind, cell in documented.items():
        given = [yaml.safe_load(part) for part in re.findall(r"`([^`]*)`", cell)]
        own = {key: field.default for key, field in catalog.own_fields(kind).items()}
        assert {key: value for part in given for key, value in part.items()} == own


def test_every_longbench_task_is_documented():
    line = re.search(r"Tasks of longbench: (.*?)\.\s+Those without.*?mode: (.*?)\.", README, flags=re.DOTALL)
    named, without_question = (set(re.findall(r"`(\w+)`", part)) for part in line.groups())
    for task in named:
        assert tasks.get_task("longbench", task).has_question == (task not in without_question)
    with pytest.raises(UserError, match="choose from") as error:
        tasks.get_task("longbench", "none")
    assert named == set(str(error.value).split("choose from ")[1].split(", "))


def test_the_schema_file_is_that_of_the_settings():
    written = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    assert written == settings_module.json_schema(), "run `make schema`"
    jsonschema.Draft202012Validator.check_schema(written)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_file_is_valid(path):
    settings_module.load(path)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(config, settings_module.json_schema(), jsonschema.Draft202012Validator)


def test_every_experiment_has_a_folder_of_its_own():
    names = [settings_module.load(path).experiment for path in EXPERIMENTS]
    assert len(set(names)) == len(names)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_example_with_your_own_documents_is_valid():
    example = next(block for block in blocks(README, "yaml") if "jsonl" in block)
    assert settings_module.parse(yaml.safe_load(example)).dataset.name == "jsonl"


def test_the_policy_of_the_contributing_guide_runs(tmp_path, monkeypatch):
    import torch

    from kv_transition.cache.state import CacheState, LayerCache

    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = next(block for block in blocks(contributing, "python") if "(Policy)" in block)
    (tmp_path / "vnorm_of_the_guide.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    policy = importlib.import_module("vnorm_of_the_guide").VNorm(n_sink=1)

    # One layer, one KV head, six entries; the norms of their values are 1, 9, 2, 8, 3, 7.
    norms = torch.tensor([1.0, 9, 2, 8, 3, 7])
    layer = LayerCache(
        keys=torch.zeros(1, 6, 2),
        values=torch.stack([norms, torch.zeros(6)], dim=-1)[None],
        positions=torch.arange(6)[None],
        attn_sum=torch.zeros(1, 6),
        recent_queries=torch.zeros(1, 6, 2),
        scale=1.0,
    )
    kept = policy.compress(CacheState(layers=(layer,), length=6), 3)
    assert kept.layers[0].positions.tolist() == [[0, 1, 3]]
