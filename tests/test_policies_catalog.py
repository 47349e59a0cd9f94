"""Test the available policies: this project's, those in files, of other packages and of kvpress."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from policy_states import positions_of, random_state

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash, imported_modules

VNORM = """
from dataclasses import dataclass
from typing import Annotated
from kv_transition.policies.base import Policy

@dataclass(frozen=True)
class VNorm(Policy):
    statistics = frozenset({"attn_sum"})
    acts_each_step = True
    ignores_budget = ("share", 0.5)

    share: Annotated[float, (0, 1)] = 1.0
    name: str | None = None

    def score(self, layer, index, k, length, seed):
        return layer.values.float().norm(dim=-1)
"""


@pytest.fixture(autouse=True)
def _fresh():
    """Clear the caches of parsed sources, because files differ between tests."""
    yield
    for remembered in (catalog.describe, catalog._entry_points, catalog._parsed, catalog._read):
        remembered.cache_clear()


@pytest.fixture
def vnorm(tmp_path) -> str:
    (tmp_path / "vnorm.py").write_text(VNORM)
    return str(tmp_path / "vnorm.py")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("snapkw", {}, ["snapkw", "snapkv", "h2o"]),
        ("mine", {"kind": "nothing"}, ["mine", "nothing", "streaming_llm"]),
        ("mine", {"kind": 3}, ["kv.policies.mine.kind", "3"]),
        ("snapkv", {"windows": 3}, ["kv.policies.snapkv.windows", "window", "kernel", "pooling"]),
        ("snapkv", {"window": "wide"}, ["kv.policies.snapkv.window", "'wide'", "32"]),
        ("snapkv", {"window": 65}, ["kv.policies.snapkv.window", "65", "1 to 64"]),
        ("snapkv", {"pooling": "median"}, ["kv.policies.snapkv.pooling", "max, mean"]),
        ("random", {"per_head": 1}, ["kv.policies.random.per_head", "True"]),
        ("streaming_llm", {"recent": "many"}, ["kv.policies.streaming_llm.recent", "many", "whole number or null"]),
        ("streaming_llm", {"recent": True}, ["kv.policies.streaming_llm.recent", "True"]),
        ("streaming_llm", {"positions": "mine"}, ["kv.policies.streaming_llm.positions", "original, cache"]),
        ("quantized", {"bits": 3}, ["kv.policies.quantized.bits", "4, 8"]),
        ("entropy_merge", {"threshold": 1.5}, ["kv.policies.entropy_merge.threshold", "0 to 1"]),
        ("kvpress.SnapKVPress", {"press": {"a": 1}}, ["kv.policies.kvpress.SnapKVPress.press", "plain"]),
        ("mine", {"kind": "none/there.py"}, ["kv.policies.mine", "no file none/there.py"]),
    ],
)
def test_a_wrong_policy_is_named_with_what_would_be_right(name, options, words):
    with pytest.raises(UserError) as error:
        catalog.resolve(name, options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_variant_inherits_defaults_and_keeps_its_name():
    kind, options = catalog.resolve("snapkv_w16", {"kind": "snapkv", "window": 16})
    assert (kind, options["window"], options["kernel"], options["pooling"]) == ("snapkv", 16, 7, "max")
    assert options["allocation"] == "uniform"
    assert catalog.resolve("streaming_llm", {"recent": None})[1] == {
        "n_sink": 4,
        "recent": None,
        "positions": "original",
    }
    assert catalog.resolve("steep", {"kind": "pyramidkv", "beta": 40})[1]["beta"] == 40


def test_what_ignores_the_budget():
    """Check which policies and settings ignore the budget."""
    assert catalog.ignores_budget("quantized", {"bits": 8})
    assert catalog.ignores_budget("entropy_drop", {"target": "threshold"})
    assert not catalog.ignores_budget("entropy_drop", {"target": "budget"})
    assert not catalog.ignores_budget("snapkv", {})
    assert not catalog.ignores_budget("kvpress.SnapKVPress", {})


def test_a_policy_from_a_file(vnorm):
    kind, options = catalog.resolve("mine", {"kind": vnorm, "share": 0.5})
    assert (kind, options) == (vnorm, {"share": 0.5, "name": None})
    assert catalog.resolve("mine", {"kind": f"{vnorm}:VNorm", "name": "x"})[1]["name"] == "x"
    assert catalog.statistics(kind) == {"attn_sum"}
    assert catalog.acts_each_step(kind)
    assert catalog.ignores_budget(kind, options)
    assert not catalog.ignores_budget(kind, {"share": 0.4})
    assert catalog.source(kind) == Path(vnorm)
    state, _ = random_state(30)
    kept = positions_of(catalog.create(kind, options).compress(state, 7))
    for layer, heads in zip(state.layers, kept, strict=True):
        for values, own in zip(layer.values, heads, strict=True):
            assert own == values.norm(dim=-1).topk(7).indices.sort().values.tolist()


def test_the_code_that_decides_is_told(vnorm):
    """Check the modules and the file content that enter the code hash of a policy."""
    assert catalog.modules("adakv") == ["kv_transition.policies.adakv"]
    assert catalog.content("adakv") is None
    assert catalog.modules(vnorm) == ["kv_transition.policies.base"]
    before = catalog.content(vnorm)
    Path(vnorm).write_text(VNORM + "X = 1\n")
    assert catalog.content(vnorm) != before
    assert "kv_transition.engines.kvpress_press" in imported_modules(*catalog.modules("kvpress.SnapKVPress"))
    for kind in catalog.kinds():
        code_hash(*catalog.modules(kind))


def test_a_file_may_build_on_a_kind_of_ours(tmp_path):
    file = tmp_path / "wide.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from kv_transition.policies.snapkv import SnapKV\n\n"
        "@dataclass(frozen=True)\n"
        "class Wide(SnapKV):\n"
        "    window: int = 64\n"
        "    extra: bool = False\n\n"
        "@dataclass(frozen=True)\n"
        "class Wider(Wide):\n"
        "    kernel: int = 11\n"
    )
    ours = catalog.hyper_parameters("snapkv")
    assert catalog.hyper_parameters(f"{file}:Wide") == ours | {"window": 64, "extra": False}
    assert catalog.hyper_parameters(f"{file}:Wider")["kernel"] == 11
    assert catalog.statistics(f"{file}:Wider") == {"recent_queries"}
    assert catalog.modules(f"{file}:Wide") == ["kv_transition.policies.base", "kv_transition.policies.snapkv"]
    assert catalog.create(f"{file}:Wider", {"window": 5}).window == 5
    with pytest.raises(UserError, match=r"defines 2 policies; say which: .*wide\.py:Wide"):
        catalog.resolve("mine", {"kind": str(file)})
    with pytest.raises(UserError, match=r"defines no policy Narrow; .* in it are: Wide, Wider"):
        catalog.resolve("mine", {"kind": f"{file}:Narrow"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("X = 1\n", "defines no policy; derive a class"),
        ("class A:\n    pass\n", "defines no policy; derive a class"),
        ("def f(:\n", "is not valid Python"),
        (VNORM.replace("@dataclass(frozen=True)\n", ""), "put @dataclass"),
        (VNORM.replace("= 1.0", "= [].pop()"), "VNorm.share has no default that is a plain value"),
        (VNORM.replace(" = 1.0", ""), "VNorm.share has no default that is a plain value"),
        (VNORM.replace('frozenset({"attn_sum"})', "SUMS"), "VNorm.statistics is not written out"),
    ],
)
def test_a_file_that_will_not_do_is_told_why(tmp_path, text, words):
    (tmp_path / "p.py").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        catalog.resolve("mine", {"kind": str(tmp_path / "p.py")})
    assert "p.py" in str(error.value)
    assert "kv.policies.mine" in str(error.value)


def test_code_that_fails_when_imported_is_one_sentence(tmp_path):
    (tmp_path / "broken.py").write_text(VNORM + "raise RuntimeError('no')\n")
    kind, options = catalog.resolve("mine", {"kind": str(tmp_path / "broken.py")})
    with pytest.raises(UserError, match=r"broken\.py cannot be imported: RuntimeError: no"):
        catalog.create(kind, options)


def entry_points(monkeypatch, *points: tuple[str, str]) -> None:
    found = [metadata.EntryPoint(name, value, catalog.GROUP) for name, value in points]
    monkeypatch.setattr(catalog.metadata, "entry_points", lambda group: found if group == catalog.GROUP else [])
    catalog._entry_points.cache_clear()


def test_a_policy_of_an_installed_package(tmp_path, monkeypatch):
    """Check that it is found by its entry point and read without importing its package."""
    package = tmp_path / "somebodys_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "vnorm.py").write_text(VNORM)
    monkeypatch.syspath_prepend(tmp_path)
    entry_points(monkeypatch, ("vnorm", "somebodys_package.inner.vnorm:VNorm"))
    assert "vnorm" in catalog.kinds()
    assert catalog.resolve("vnorm", {"share": 0.25}) == ("vnorm", {"share": 0.25, "name": None})
    assert catalog.source("vnorm") == package / "inner" / "vnorm.py"
    assert catalog.content("vnorm") is not None
    with pytest.raises(UserError, match="cannot be imported: RuntimeError: imported"):
        catalog.create("vnorm", {})
    (package / "__init__.py").write_text("")
    assert catalog.create("vnorm", {"share": 0.25}).share == 0.25


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([("snapkv", "a.b:C")], "'snapkv' of a.b:C has the name of a kind of this project"),
        ([("mine", "a.b:C"), ("mine", "d.e:F")], "'mine' of d.e:F has the name of that of a.b:C"),
    ],
)
def test_two_policies_of_one_name_are_refused(monkeypatch, points, words):
    entry_points(monkeypatch, *points)
    with pytest.raises(UserError, match=words):
        catalog.kinds()


def test_an_entry_point_to_nowhere(monkeypatch):
    entry_points(monkeypatch, ("mine", "no_such_package.policy:P"))
    with pytest.raises(UserError, match=r"names the module no_such_package\.policy, which has no source"):
        catalog.resolve("mine", {})


def test_a_press_is_passed_through():
    options = {"window_size": 32, "alpha": 0.5, "x": None}
    assert catalog.resolve("kvpress.SnapKVPress", options) == ("kvpress.SnapKVPress", options)
    assert catalog.resolve("small", {"kind": "kvpress.SnapKVPress", "window_size": 8})[1] == {"window_size": 8}
    assert catalog.is_press("kvpress.SnapKVPress")
    assert not catalog.is_press("kvpress")
    assert catalog.statistics("kvpress.SnapKVPress") == frozenset()
    with pytest.raises(ValueError, match="reads the prompt itself"):
        catalog.create("kvpress.SnapKVPress", {})


def test_looking_up_imports_no_torch(vnorm):
    script = (
        "import sys; from kv_transition.policies import catalog, describe; "
        f"[catalog.resolve(k, {{}}) for k in [*catalog.kinds(), {vnorm!r}]]; describe.page(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_created_policies_hold_their_hyper_parameters():
    assert catalog.create("snapkv", {"window": 3}).window == 3
    assert torch.is_tensor(catalog.create("h2o", {}).compress(random_state(9)[0], 4).layers[0].keys)
