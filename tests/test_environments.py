"""Test that environments, project metadata and lock file agree, and that each environment has its rules' imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from kv_transition.provenance import PACKAGE, SOURCE, imported_modules, is_neutral

ROOT = Path(__file__).parents[1]
ENVS = {path.stem: path for path in sorted((ROOT / "envs").glob("*.yaml"))}
LOCK = ROOT / "requirements.lock"

PYTHON = "3.11.15"
# conda's name: name on PyPI
ON_PYPI = {"pytorch-gpu": "torch"}
# name of the import: name on PyPI
DISTRIBUTION = {
    "yaml": "pyyaml",
    "vl_convert": "vl-convert-python",
    "huggingface_hub": "huggingface-hub",
    "pynvml": "nvidia-ml-py",
    "flash_attn": "flash-attn",
}
# docs/environments.md gives the reason
EXCEPTION = ("inference", "torch")
WITH_A_MODEL = ("inference", "harness")
# packages that are needed although no module of the package imports them, and their use
UNSEEN = {
    "data": {"jinja2": "transformers' chat templates"},
    "inference": {
        "accelerate": "models over several GPUs and in 4 bit",
        "bitsandbytes": "models in 4 bit",
        "jinja2": "transformers' chat templates",
    },
    "analysis": {},
    "harness": {
        "accelerate": "models over several GPUs and in 4 bit",
        "bitsandbytes": "models in 4 bit",
        "jinja2": "chat templates",
        "peft": "imported by the harness's hf model",
        "pip": "installs the harness, of which PyPI has the version",
    },
}

# packages that are imported if they are installed, and their use
OPTIONAL = {
    "gguf": "models in GGUF files; the extra gguf",
    "lm-eval": "the harness; the extra lm-eval, in an environment of its own",
    "flash-attn": "attention on GPUs; built from source by pip, so it comes with conda",
    "kvpress": "its presses; in an environment of its own",
    "triton": "statistics on GPUs, where torch brings it along",
}

PIN = re.compile(r"(?P<name>[a-z0-9_.-]+) =(?P<version>\d+(\.\w+)+)")
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[\w,]+\])?==(?P<version>[^\s;+\\]+)")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(env: str) -> dict[str, str]:
    """Return the versions of the packages of an environment by their name on PyPI, without Python."""
    found: dict[str, str] = {}
    for dependency in yaml.safe_load(ENVS[env].read_text(encoding="utf-8"))["dependencies"]:
        if isinstance(dependency, dict):  # packages from PyPI
            found |= requirements(dependency["pip"])
            continue
        match = PIN.fullmatch(dependency)
        assert match, f"{env}: {dependency!r} is not of the form 'name =version'"
        found[normal(ON_PYPI.get(match["name"], match["name"]))] = match["version"]
    assert found.pop("python") == PYTHON
    return found


def requirements(lines: list[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        assert match, f"{line!r} is not of the form name==version"
        found[normal(match["name"])] = match["version"]
    return found


def project() -> dict[str, str]:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = metadata["optional-dependencies"]
    return requirements(metadata["dependencies"] + optional["dev"] + optional["quantization"] + optional["serve"])


def harness() -> dict[str, str]:
    """Return the pins of the extra lm-eval, which has a separate environment and is not in the lock."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return requirements(metadata["optional-dependencies"]["lm-eval"])


def lock() -> dict[str, str]:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return requirements([line for line in lines if line and not line.startswith(("#", "-", " "))])


def rules() -> list[tuple[str, str, list[str], str]]:
    """Return (rule, environment, modules it runs, its text) of every rule that runs a module."""
    found = []
    for file in sorted((ROOT / "workflow").rglob("*")):
        if file.suffix != ".smk":
            continue
        begins = r"^(?= *(?:rule|checkpoint) \w+:)"
        for text in re.split(begins, file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = re.match(r" *(?:rule|checkpoint) (\w+):", text)[1]
            env = re.search(r"envs/(\w+)\.yaml", text)
            modules = re.findall(r"python -m(?: kv_transition\.worker)? (kv_transition[\w.]*\w)", text)
            modules += re.findall(r'calling\("(kv_transition[\w.]*):', text)
            if env:
                found.append((name, env[1], modules, text))
    return found


def imports_of(file: Path, package: str | None = None) -> set[str]:
    """Return the modules that a file imports: full names of one package, or top-level names of third-party packages."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    tops = {name.partition(".")[0] for name in names}
    if package:
        return {name for name in names if name.startswith(f"{package}.") and file_of(name)}
    return {top for top in tops if top not in sys.stdlib_module_names and top != PACKAGE}


def file_of(module: str) -> Path | None:
    base = SOURCE.joinpath(*module.split(".")[1:])
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)


def modules_run(env: str) -> set[str]:
    roots = {module for _, its_env, modules, _ in rules() if its_env == env for module in modules}
    if env in WITH_A_MODEL:  # policies are loaded by name, as the configuration requires
        roots |= {f"{PACKAGE}.policies.{file.stem}" for file in (SOURCE / "policies").glob("*.py")}
    found = imported_modules(*roots)
    # neutral modules are left out of code hashes, but they are run
    neutral = {m for module in found for m in imports_of(file_of(module), PACKAGE) if is_neutral(m)}
    return found | {m for m in roots | neutral if file_of(m)}


def needed(env: str) -> set[str]:
    tops = {top for module in modules_run(env) for top in imports_of(file_of(module))}
    return {normal(DISTRIBUTION.get(top, top)) for top in tops}


def test_there_are_four():
    assert set(ENVS) == {"data", "inference", "analysis", "harness"}


@pytest.mark.parametrize("env", ENVS)
def test_every_dependency_is_pinned_exactly(env):
    assert set(yaml.safe_load(ENVS[env].read_text(encoding="utf-8"))) == {"channels", "dependencies"}
    assert pins(env)


@pytest.mark.parametrize("env", ENVS)
def test_only_conda_forge_is_asked(env):
    assert yaml.safe_load(ENVS[env].read_text(encoding="utf-8"))["channels"] == ["conda-forge", "nodefaults"]


def test_a_package_has_one_version_in_all_environments():
    versions: dict[str, set[str]] = {}
    for env in ENVS:
        for name, version in pins(env).items():
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("env", ENVS)
def test_environments_agree_with_the_project(env):
    declared = project() | harness()
    differing = {name for name, version in pins(env).items() if declared.get(name) != version}
    allowed = {EXCEPTION[1], "flash-attn"} if env in WITH_A_MODEL else set()
    allowed |= {"pip"} & set(pins(env))
    assert differing == allowed


def test_the_one_exception_is_documented():
    text = (ROOT / "docs/environments.md").read_text(encoding="utf-8")
    for version in (pins("inference")["torch"], pins("inference")["flash-attn"], project()["torch"]):
        assert version in text


def test_the_lock_holds_what_the_project_declares():
    locked = lock()
    assert {name: version for name, version in project().items() if locked.get(name) != version} == {}


@pytest.mark.parametrize("env", ENVS)
def test_environments_agree_with_the_lock(env):
    locked = lock()
    differing = {name for name, version in pins(env).items() if locked.get(name, version) != version}
    assert differing == ({EXCEPTION[1]} if env in WITH_A_MODEL else set())


def test_every_rule_that_runs_something_has_an_environment():
    for name, env, modules, text in rules():
        assert env in ENVS, name
        assert modules, f"{name} runs no module of the package: {text}"


@pytest.mark.parametrize("env", ENVS)
def test_an_environment_holds_what_its_rules_import_and_no_more(env):
    assert set(pins(env)) - OPTIONAL.keys() == (needed(env) | set(UNSEEN[env])) - OPTIONAL.keys()


def test_only_what_runs_a_model_needs_torch():
    assert all("torch" in needed(env) for env in WITH_A_MODEL)
    assert "torch" not in needed("data") | needed("analysis")


def test_the_package_declares_what_it_imports():
    everything = {normal(DISTRIBUTION.get(top, top)) for file in SOURCE.rglob("*.py") for top in imports_of(file)}
    assert everything - OPTIONAL.keys() <= set(project())
