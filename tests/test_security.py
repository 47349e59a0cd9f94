"""Test the guarantees of docs/security.md: no unpickling, no code of a model is run, the server's limits."""

from __future__ import annotations

import ast
import hmac
import inspect
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from serving import served

from kv_transition import cli
from kv_transition.errors import UserError
from kv_transition.serve.app import create_app

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")])
RULES = sorted([*ROOT.glob("workflow/**/*.smk"), ROOT / "Snakefile", ROOT / "workflow" / "Snakefile"])

PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
"""modules that create objects from bytes; processes of multiprocessing communicate in this way"""
UNPICKLES = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle")}
MAKES_CODE = {"eval", "exec", "compile"}
READS_YAML = {"load", "load_all", "unsafe_load", "full_load"}


def faults(source: str) -> list[str]:
    """Return the expressions in a source that create objects or code from external bytes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PICKLING]
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in MAKES_CODE:
            found.append(called.id)
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            loader = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"}
            loader |= {ast.unparse(argument) for argument in node.args[1:2]}
            if (owner, called.attr) in UNPICKLES or (owner == "yaml" and called.attr in READS_YAML and not loader):
                found.append(f"{owner}.{called.attr}")
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not off:
                found.append(keyword.arg)
        name = ast.unparse(called)
        # None: options passed on as a dictionary, which test_code_of_a_model_is_not_run checks
        said = {keyword.arg for keyword in node.keywords} & {"trust_remote_code", None}
        if re.fullmatch(r"(\w+\.)*Auto\w+\.from_pretrained", name) and not said:
            found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "eval(text)", "yaml.load(text)", "f(shell=True)",
     "AutoModel.from_pretrained(x)", "AutoConfig.from_pretrained(x, trust_remote_code=True)", "np.load(f)",
     "AutoModel.from_pretrained(x, trust_remote_code=given)", "import multiprocessing.pool"],
)  # fmt: skip
def test_the_search_finds(source):
    assert faults(source)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_text_becomes_code(file):
    assert faults(file.read_text()) == []


@pytest.mark.parametrize("file", RULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rules_neither(file):
    """Check that rules contain no unpickling, no remote code and no evaluation of text."""
    assert not re.search(r"pickle|torch\.load|trust_remote_code|\beval\(|\bexec\(", file.read_text())


def _folder(tmp_path, **more):
    """Write a model folder that names code of its own; return the path of a file that this code would create."""
    mark = tmp_path / "mark"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    kinds = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": kinds} | more))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": kinds}))
    return mark


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_of_a_model_is_not_run_even_if_a_terminal_says_yes(tmp_path, monkeypatch, answer):
    from kv_transition.data.tokens import load_tokenizer
    from kv_transition.engines.loading import load_model

    mark = _folder(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    for load in (lambda name: load_model(name, device="cpu"), load_tokenizer):
        with pytest.raises(UserError):
            load(str(tmp_path))
    assert not mark.exists()


def test_weights_that_are_a_pickle_are_refused(tmp_path):
    import torch
    from models import random_model

    from kv_transition.engines.loading import load_model

    model = random_model("qwen2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(tmp_path), device="cpu")


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared, compare = [], hmac.compare_digest

    def noted(given, own):
        compared.append((given, own))
        return compare(given, own)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    with TestClient(create_app(served(), api_key="right")) as client:
        for key, status in (("wrong", 401), ("righ", 401), ("right", 200)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
    assert compared == [(key, b"right") for key in (b"wrong", b"righ", b"right")]


def test_the_limits_on_the_page_are_those_of_the_program():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", page, re.MULTILINE))
    options = {name.replace("_", "-"): value.default for name, value in inspect.signature(cli.serve).parameters.items()}
    assert {"host", "max-body-mb", "queue", "batch", "max-length", "prefill-gb", "api-key-env"} <= set(rows)
    for name, said in rows.items():
        default = options[name]
        shown = {None: "none"}.get(default, f"{default:g}" if isinstance(default, float) else str(default))
        assert said.strip().split(" ")[0].rstrip(",") == shown, name
