"""Test that invalid input gives one sentence and exit status 2."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from project import ROOT, SMALL
from typer.testing import CliRunner

from kv_transition import cli, parsing, preflight, settings, yaml_text
from kv_transition.data import model_files
from kv_transition.data.records import read_file
from kv_transition.errors import UserError
from kv_transition.studies.chat import rules
from kv_transition.studies.chat.checks import validate

READER = ROOT / "resources/tiny-reader"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that runs `check` on a file of these bytes, or on SMALL with other sections, and returns its
    sentence."""
    monkeypatch.chdir(ROOT)

    def run(content: bytes | dict, *more: str, status: int = 2) -> str:
        path = tmp_path / "experiment.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(copy.deepcopy(SMALL) | {"output": {"dir": str(tmp_path / "results")}} | content)
            content = content.encode()
        path.write_bytes(content)
        done = CliRunner().invoke(cli.app, ["check", "-c", str(path), *more])
        assert done.exit_code == status, done.output
        assert not done.exception or isinstance(done.exception, SystemExit)
        return done.output.strip()

    return run


GOOD = yaml.safe_dump(SMALL).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title: Übersicht\n".encode("latin-1"), ["byte 8", "line 1", "not UTF-8"]),
        (GOOD.decode().encode("utf-16"), ["UTF-16", "UTF-8"]),
        (bytes(range(256)), ["not UTF-8"]),
        (b"experiment: a\0b\n", ["binary"]),
        (b'experiment: "a\\0b"\n', ["NUL"]),
        (b"kv: &kv [*kv]\n", ["line 1", "*kv", "refers to"]),
        (b"kv: &kv {policies: *kv}\n", ["line 1", "refers to"]),
        (b"kv: " + b"[" * 3000 + b"]" * 3000, ["nested too deeply"]),
        (b"experiment: a\nkv: {}\nexperiment: b\n", ["'experiment'", "twice", "lines 1 and 3"]),
        (b"kv: {policies: {full: {}, full: {}}}\n", ["'full'", "twice", "line 1"]),
        (b"experiment: !!python/object:os.system x\n", ["line 1"]),
        (b"experiment: !!bool maybe\n", ["line 1", "bool"]),
        (b"experiment: !!timestamp x\n", ["line 1", "timestamp"]),
        (b"experiment: " + b"1" * 5000 + b"\n", ["line 1", "int"]),
        (b"? [a]\n: b\n", ["line 1"]),
        (b'experiment: "\\ud800"\n', ["surrogate"]),
        (b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)), ["aliases"]),
    ],
)  # fmt: skip
def test_a_configuration_that_is_no_text_or_no_yaml_is_one_sentence(check, content, words):
    sentence = check(content)
    assert len(sentence.splitlines()) == 1
    assert "experiment.yaml" in sentence
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize("given", [".", ""])
def test_a_folder_in_place_of_the_configuration_is_one_sentence(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["check", "-c", given])
    assert done.exit_code == 2
    assert "is a folder" in done.output


def test_yaml_that_is_good_reads_as_pyyaml_reads_it():
    for path in [ROOT / "config/config.yaml", *(ROOT / "config/experiments").glob("*.yaml")]:
        assert yaml_text.read_yaml(path) == yaml.safe_load(path.read_text())


def test_a_date_stays_a_text_and_merged_keys_are_there():
    """Check that a YAML date stays a string and that merge keys are applied."""
    assert yaml_text.parse_yaml("a: 2024-01-01", "x") == {"a": "2024-01-01"}
    assert yaml_text.parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}", "x")["c"] == {"b": 1, "d": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a":' * 200 + "1" + "}" * 200, ["nested too deeply"]),
        ('{"n": ' + "9" * 5000 + "}", ["digits"]),
        ('{"id": 1, "id": 2}', ["'id'", "twice"]),
        ('{"a": "\\ud800"}', ["surrogate"]),
        ("{", ["malformed JSON", "character"]),
    ],
)
def test_json_that_cannot_be_read_names_its_line(tmp_path, text, words):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": "a"}\n' + text + "\n")
    with pytest.raises(UserError) as error:
        list(read_file(path))
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"experiment": "../../etc/x"}, "experiment", ["letters", "digits"]),
        ({"experiment": "x" * 300}, "experiment", ["1 to 100"]),
        ({"kv": {"policies": {"full": {}, "..": {"kind": "h2o"}}, "budgets": [0.5]}}, "kv.policies", ["'..'", "name"]),
        ({"dataset": SMALL["dataset"] | {"n_per_length": 10**12}}, "dataset.n_per_length", ["100000"]),
        ({"dataset": SMALL["dataset"] | {"lengths": [128, 128]}}, "dataset.lengths", ["twice"]),
        ({"adaptive": {"cap": 10**12}}, "adaptive.cap", ["100000"]),
        ({"binning": {"n_bins": 2, "n_per_bin": 10**12}}, "binning.n_per_bin", ["100000"]),
        ({"output": {"dir": str(ROOT / "README.md")}}, "output.dir", ["README.md", "file"]),
        ({"output": {"dir": str(ROOT / "README.md/results")}}, "output.dir", ["README.md", "file"]),
        ({"output": {"dir": "/proc/results"}}, "output.dir", ["/proc", "cannot be written to"]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_at_check(check, sections, key, words):
    sentence = check(sections)
    assert sentence.startswith(key)
    assert len(sentence.splitlines()) == 1
    assert [word for word in words if word not in sentence] == []


def test_longer_prompts_than_the_model_was_made_for_are_a_warning_with_the_number(check):
    said = check({"model": SMALL["model"] | {"max_length": 9000}}, status=0)
    assert "9,000" in said
    assert "8,192" in said


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({}, None),
    ],
)  # fmt: skip
def test_positions_are_those_of_the_models_cards(config, positions):
    """Compare with the model cards: Qwen2.5 has 131,072 tokens by yarn with factor 4, Llama 3.1 has 128k."""
    assert model_files.positions(config) == positions


@pytest.mark.parametrize("cores", ["0", "-1", "some", ""])
def test_cores_that_are_none_are_refused(cores):
    with pytest.raises(UserError, match=r"^--cores: .*at least 1"):
        preflight.check_cores(cores)


@pytest.mark.parametrize("device", ["gpu", "cuda0", ""])
def test_a_device_of_another_name_is_refused_by_the_options_name(device):
    done = CliRunner().invoke(cli.app, ["serve", "--model", str(READER), "--device", device])
    assert done.exit_code == 2
    assert done.output.startswith(f"--device: {device!r} is not allowed")


# models


def _edit(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "config that contradicts itself": (lambda f: _edit(f, num_hidden_layers=3), "layer_types has 4"),
    "config with a text for a number": (lambda f: _edit(f, num_hidden_layers="four"), "num_hidden_layers: 'four'"),
    "config without heads": (lambda f: _edit(f, num_attention_heads=0), "num_attention_heads: 0"),
    "config of another vocabulary": (lambda f: _edit(f, vocab_size=100), r"\[1723, 128\] instead of \[100, 128\]"),
    "config of another width": (
        lambda f: _edit(f, intermediate_size=40), r"mlp\.down_proj\.weight is \[128, 256\] instead of \[128, 40\]"),
    "config of other heads": (
        lambda f: _edit(f, num_key_value_heads=4), r"self_attn\.k_proj\.weight is \[64, 128\] instead of \[128, 128\]"),
    "config of fewer layers": (
        lambda f: _edit(f, num_hidden_layers=3, layer_types=["full_attention"] * 3), "3 and the weights have 4 layers"),
    "config of very many layers": (
        lambda f: _edit(f, num_hidden_layers=10**15, layer_types=None), f"{10**15} and the weights have 4 layers"),
    "config cut": (lambda f: _cut(f / "config.json"), "malformed JSON"),
    "config in UTF-16": (
        lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")), "UTF-16"),
    "weights cut": (lambda f: _cut(f / "model.safetensors"), "truncated"),
    "weights of nothing": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
    "weights with a long header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"), "truncated"),
    "weights with a header that is no JSON": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope"), "damaged"),
    "index that names what is not there": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part1.safetensors"}}'),
        "part1.safetensors is missing"),
    "tokenizer cut": (lambda f: _cut(f / "tokenizer/tokenizer.json"), "malformed JSON"),
    "tokenizer of something else": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "not a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_sentence_at_check(check, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(READER, folder)
    spoil, words = DAMAGE[damage]
    spoil(folder)
    sentence = check({"model": SMALL["model"] | {"name": str(folder)}})
    assert len(sentence.splitlines()) == 1
    with pytest.raises(UserError, match=words):
        raise UserError(sentence)


def test_a_damaged_model_is_refused_by_serve_before_it_is_loaded(tmp_path, monkeypatch):
    """transformers ignores the weights of layers that config.json does not count."""
    from kv_transition.engines.local import LocalEngine

    folder = tmp_path / "model"
    shutil.copytree(READER, folder)
    DAMAGE["config of fewer layers"][0](folder)
    monkeypatch.setattr(LocalEngine, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(cli.app, ["serve", "--model", str(folder), "--port", "0"])
    assert done.exit_code == 2
    assert done.output.strip().endswith("3 and the weights have 4 layers, 0 to 3; download it again")


@pytest.mark.parametrize("kind", [["qwen2"], {}, None, 2])
def test_a_model_type_that_is_no_text_is_left_to_the_load(tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(READER, folder)
    _edit(folder, model_type=kind)
    model_files.check(str(folder))


def test_the_embedded_models_are_whole():
    for name in ("tiny-reader", "tiny-follower"):
        model_files.check(str(ROOT / "resources" / name))


def test_shapes_are_those_that_safetensors_reads():
    from safetensors import safe_open

    found = model_files.read_header(READER / "model.safetensors")
    with safe_open(READER / "model.safetensors", framework="pt") as stored:
        assert {key: stored.get_slice(key).get_shape() for key in stored.keys()} == {  # noqa: SIM118, not a mapping
            key: shape for key, (shape, _) in found.items()
        }


# results


def test_a_pipe_is_no_configuration(tmp_path):
    """Check that a named pipe is refused as a configuration file."""

    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        parsing.read_text(tmp_path / "pipe", "experiment file")


def test_a_duplicate_in_a_value_given_by_set_is_refused():
    with pytest.raises(UserError, match="twice"):
        settings.override({}, ["kv={a: 1, a: 2}"])


# regular expressions of chat checks


def test_an_expression_that_takes_too_long_leaves_its_check_undecided(monkeypatch, capsys):
    monkeypatch.setattr(rules, "MATCH_S", 0.1)
    check = validate({"kind": "matches", "value": "(x+x+)+y"}, "conversation a")
    assert rules.passes(check, "x" * 5000) is None
    assert rules.passes(check, "xy") is None  # given up for all later answers, to limit the total time
    assert "takes too long" in capsys.readouterr().err


@pytest.mark.parametrize("expression", ["(?:a{6000}){6000}", "a" * 2000, "(", "a{999999999999}"])
def test_an_expression_that_is_too_large_is_refused_before_it_is_compiled(expression):
    with pytest.raises(UserError, match=r"^conversation a: check c1: "):
        validate({"kind": "matches", "value": expression}, "conversation a")
