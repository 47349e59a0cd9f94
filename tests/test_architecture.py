"""Test the architecture: allowed imports, modules that must import fast, and code hashes that cover all imported
code."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from kv_transition import provenance
from kv_transition.provenance import code_hash, imported_modules, is_neutral
from kv_transition.studies import registry

SOURCE = Path(provenance.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# from the highest layer to the lowest; modules on one line may import each other
LAYERS = [
    {"cli", "__main__", "quickstart"},
    {"doctor"},
    {"preflight"},
    {"plan"},
    {"outputs"},
    {"studies"},
    {"harness"},
    {"api"},
    {"report", "eval"},
    {"plotting"},
    {"stats"},
    {"serve"},
    {"run"},
    {"engines"},
    {"policies"},
    {"cache"},
    {"attention"},
]
FACES = {"kv_transition.studies.registry", "kv_transition.studies.study"}
BESIDE = {
    "data",
    "sections",
    "registry",
    "settings",
    "paths",
    "provenance",
    "errors",
    "parsing",
    "yaml_text",
    "locks",
    "budget",
    "tables",
    "labels",
    "script",
    "worker",
    "specs",
}
# specs lists the dependencies of every job, so it reads the catalog of policies
MAY_LOOK_UP = {"specs": {"policies"}}


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """Return the layer of a module; the modules that register the studies belong below all layers."""
    return "registry" if module in FACES else [*module.split("."), ""][1]


def imports(file: Path) -> set[str]:
    """Return all modules that a file imports at run time; imports under TYPE_CHECKING are for type checkers only."""
    found = set()
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports a module; any other name is an attribute of the package
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES) | ({node.module} if names - MODULES else set())
        todo += ast.iter_child_nodes(node)
    return found


MODULES = {module_name(file) for file in FILES}


def level(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_one_way(file):
    mine = part(module_name(file))
    for other in {part(m) for m in imports(file) if m.startswith("kv_transition.")} - {mine, ""}:
        assert other in BESIDE or level(other) is not None, f"{other} has no place in the plan"
        if mine in BESIDE:
            assert other in BESIDE | MAY_LOOK_UP.get(mine, set()), f"{mine} stands beside the layers, not on {other}"
        elif level(mine) is not None and level(other) is not None:
            assert level(mine) <= level(other), f"{mine} lies below {other}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module_name(file): imports(file) & MODULES for file in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).static_order())


@pytest.mark.parametrize("file", [f for f in FILES if "studies" in f.relative_to(SOURCE).parts], ids=module_name)
def test_a_study_takes_only_tables_from_another(file):
    mine = module_name(file).split(".")[2:3]
    for module in imports(file):
        other = module.split(".")
        if other[:2] == ["kv_transition", "studies"] and len(other) > 3 and other[2:3] != mine:
            assert other[3] == "tables", f"{module} belongs to another study"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_is_longer_than_400_lines(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("study", registry.STUDIES)
def test_every_study_has_the_same_shape(study):
    needed = {"settings", "study", "run", "report"}
    if study in ("grid", "recall", "perplexity", "chat"):
        needed |= {"specs", "tables", "plan", "analysis", "plots"}
    assert {f"kv_transition.studies.{study}.{name}" for name in needed} <= set(MODULES)


@pytest.mark.parametrize("file", [f for f in FILES if part(module_name(f)) in ("attention", "cache", "policies")])
def test_the_core_needs_only_torch(file):
    allowed = {"torch", "triton", "safetensors", "kv_transition"} | set(sys.stdlib_module_names)
    assert {module.split(".")[0] for module in imports(file)} <= allowed


def loaded_modules(code: str) -> set[str]:
    # a package without __init__.py, for example a study, has no file and contains no code
    names = "*(name for name, module in sys.modules.items() if getattr(module, '__file__', None))"
    script = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {code}; print({names})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("kv_transition", {"torch", "transformers", "polars", "altair", "numpy", "pydantic"}),
        (
            "kv_transition.cli, kv_transition.specs",
            {"torch", "transformers", "polars", "pyarrow", "scipy", "altair", "fastapi", "uvicorn"},
        ),
        ("kv_transition.data.prepare, kv_transition.data.download", {"torch", "scipy", "polars", "datasets"}),
        ("kv_transition.studies.perplexity.windows", {"torch", "transformers", "scipy", "polars", "datasets"}),
        ("kv_transition.studies.grid.run", {"transformers", "polars", "scipy", "altair", "pydantic", "datasets"}),
        ("kv_transition.studies.grid.remote", {"torch", "transformers", "polars", "scipy", "altair", "datasets"}),
        ("kv_transition.worker.client", {"torch", "transformers", "polars", "pyarrow", "numpy", "pydantic", "asyncio"}),
        ("kv_transition.studies.chat.run", {"transformers", "polars", "scipy", "altair", "pydantic", "datasets"}),
    ],
)
def test_light_paths_stay_light(modules, heavy):
    assert not loaded_modules(f"import {modules}") & heavy


@pytest.mark.parametrize(
    "roots",
    [
        ["kv_transition.studies.grid.run", "kv_transition.policies.h2o_heavy"],
        ["kv_transition.run.prefill"],
        ["kv_transition.data.prepare"],
        ["kv_transition.data.download"],
        ["kv_transition.studies.perplexity.windows"],
        ["kv_transition.studies.grid.score"],
        ["kv_transition.studies.grid.analysis.aggregate"],
        ["kv_transition.studies.grid.analysis.transition"],
        ["kv_transition.studies.grid.plots"],
        ["kv_transition.studies.grid.analysis.adaptive"],
        ["kv_transition.studies.recall.checks"],
        ["kv_transition.studies.recall.step_logs"],
        ["kv_transition.studies.recall.analysis"],
        ["kv_transition.studies.recall.plots"],
        ["kv_transition.studies.recall.moments"],
        ["kv_transition.studies.perplexity.analysis"],
        ["kv_transition.studies.perplexity.plots"],
        ["kv_transition.studies.recall.run", "kv_transition.policies.h2o"],
        ["kv_transition.studies.grid.calibrate"],
        ["kv_transition.studies.chat.judge"],
        ["kv_transition.studies.chat.verdicts"],
        ["kv_transition.studies.chat.analysis"],
        ["kv_transition.studies.chat.memory_table"],
        ["kv_transition.studies.chat.plots"],
        ["kv_transition.studies.perplexity.run", "kv_transition.policies.snapkv"],
        ["kv_transition.studies.grid.remote"],
        ["kv_transition.studies.chat.run", "kv_transition.policies.streaming_llm"],
        ["kv_transition.studies.chat.run", "kv_transition.studies.chat.text_drop"],
        ["kv_transition.studies.chat.multiturn"],
        ["kv_transition.outputs.build", *registry.modules("report")],
        ["kv_transition.outputs.exports"],
    ],
    ids=lambda roots: roots[-1].removeprefix("kv_transition."),
)
def test_the_code_hash_covers_what_is_really_imported(roots):
    loaded = {m for m in loaded_modules(f"import {', '.join(roots)}") if m.startswith("kv_transition")}
    assert {m for m in loaded if not is_neutral(m)} <= imported_modules(*roots)


def test_a_cells_hash_leaves_out_what_cannot_change_it():
    covered = imported_modules("kv_transition.studies.grid.run", "kv_transition.policies.snapkv")
    assert "kv_transition.policies.snapkv" in covered
    assert not any(part(m) in ("settings", "paths", "report", "analysis", "eval") for m in covered)
    assert not covered & {"kv_transition.policies.h2o", "kv_transition.policies.catalog", "kv_transition.specs"}


def test_code_hash_ignores_words_and_notices_code(tmp_path, monkeypatch):
    package = tmp_path / "kv_transition"
    package.mkdir()
    monkeypatch.setattr(provenance, "SOURCE", package)

    def hashed(main: str, helper: str) -> str:
        provenance._parsed.cache_clear()
        provenance._reached.cache_clear()
        (package / "main.py").write_text(main)
        (package / "helper.py").write_text(helper)
        return code_hash("kv_transition.main")

    main, helper = "from kv_transition import helper\nX = helper.f(1)\n", "def f(x):\n    return x + 1\n"
    first = hashed(main, helper)
    assert hashed(main, '"""Doc."""\n\n\ndef f(x):  # why\n    """More."""\n    return x + 1\n') == first
    assert hashed(main, "def f(x):\n    return x + 2\n") != first
    provenance._parsed.cache_clear()
    provenance._reached.cache_clear()
