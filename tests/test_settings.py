"""Test that an invalid configuration gives one sentence with the key and the allowed values."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.budget import Budget
from kv_transition.errors import UserError
from kv_transition.studies.grid import specs as grid_specs

GOOD = {
    "experiment": "good",
    "dataset": {"name": "synthetic", "tasks": ["reader_qa"], "lengths": [128, 256], "n_per_length": 3},
    "binning": {"n_bins": 2, "n_per_bin": 3},
    "model": {"name": "org/model", "device": "cpu"},
    "kv": {"policies": {"full": {}, "snapkv": {}}, "budgets": [1.0, 0.5, {"tokens": 64}]},
}
LONGBENCH = {"dataset.name": "longbench", "dataset.path": ".", "dataset.lengths": None, "dataset.n_per_length": None}


def changed(changes: dict) -> dict:
    """Return GOOD with values set at dotted keys; None removes a key."""
    config = copy.deepcopy(GOOD)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
        if value is None:
            del section[last]
    return config


def checked(path) -> settings_module.Settings:
    settings = settings_module.load(path)
    specs.check(settings)
    return settings


@pytest.fixture
def complaint(tmp_path):
    """Return a function that returns the sentence with which a configuration is refused."""

    def of(config: dict | str) -> str:
        path = tmp_path / "experiment.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
        with pytest.raises(UserError) as error:
            checked(path)
        return str(error.value)

    return of


def test_the_good_configuration_is_good(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert checked(path).kv.all_budgets() == [
        Budget(fraction=Fraction(1)),
        Budget(fraction=Fraction(1, 2)),
        Budget(tokens=64),
    ]


KINDS = ["full", "h2o", "knorm", "random", "snapkv", "streaming_llm", "tova"]
SECTIONS = ["experiment", "dataset", "binning", "model", "kv", "decoding", "statistics", "report", "output"]
FRACTION = ["(0, 1]"]

# case: changes, the key at the start of the sentence, other required words (the allowed values)
BAD = {
    # policies
    "unknown policy": ({"kv.policies": {"snapkw": {}}}, "kv.policies.snapkw", ["'snapkw'", *KINDS]),
    "unknown kind": ({"kv.policies": {"mine": {"kind": "snap"}}}, "kv.policies.mine", ["'snap'", *KINDS]),
    "unknown hyper-parameter": (
        {"kv.policies": {"snapkv": {"windows": 16}}},
        "kv.policies.snapkv.windows",
        ["window", "kernel", "pooling"],
    ),
    "hyper-parameter where there is none": (
        {"kv.policies": {"tova": {"window": 1}}},
        "kv.policies.tova.window",
        ["none"],
    ),
    "hyper-parameter of the wrong type": (
        {"kv.policies": {"snapkv": {"window": "wide"}}},
        "kv.policies.snapkv.window",
        ["'wide'", "32"],
    ),
    "no such choice of a hyper-parameter": (
        {"kv.policies": {"snapkv": {"pooling": "sum"}}},
        "kv.policies.snapkv.pooling",
        ["'sum'", "max", "mean"],
    ),
    "even kernel": ({"kv.policies": {"snapkv": {"kernel": 4}}}, "kv.policies.snapkv.kernel", ["4", "1, 3, 5, 7"]),
    "window too wide": ({"kv.policies": {"snapkv": {"window": 65}}}, "kv.policies.snapkv.window", ["65", "1 to 64"]),
    "negative sinks": (
        {"kv.policies": {"streaming_llm": {"n_sink": -1}}},
        "kv.policies.streaming_llm.n_sink",
        ["-1", "0 or more"],
    ),
    "more than all recent": (
        {"kv.policies": {"mine": {"kind": "h2o", "recent_share": 1.5}}},
        "kv.policies.mine.recent_share",
        ["1.5", "0 to 1"],
    ),
    "recent_share that is no number": (
        {"kv.policies": {"h2o": {"recent_share": math.nan}}},
        "kv.policies.h2o.recent_share",
        ["nan", "0 to 1"],
    ),
    "policy named like a type": ({"kv.policies": {"int8": 8}}, "kv.policies.int8", ["{hyper-parameters}"]),
    "policies as a list": ({"kv.policies": ["full"]}, "kv.policies", ["name: {hyper-parameters}"]),
    "policy that is no mapping": ({"kv.policies": {"snapkv": 16}}, "kv.policies.snapkv", ["{hyper-parameters}"]),
    "policy name with a blank": ({"kv.policies": {"my policy": {}}}, "kv.policies.my policy", ["letters, digits"]),
    "no policy": ({"kv.policies": {}}, "kv.policies", ["name: {hyper-parameters}"]),
    "no full cache": ({"kv.policies": {"snapkv": {}}}, "kv.policies", ["full: {}"]),
    "variant of the full cache": ({"kv.policies": {"all": {"kind": "full"}}}, "kv.policies.all", ["'full'"]),
    # budgets
    "budget 0": ({"kv.budgets": [0]}, "kv.budgets", FRACTION),
    "budget 1.5": ({"kv.budgets": [1.5]}, "kv.budgets", ["1.5", *FRACTION]),
    "negative budget": ({"kv.budgets": [-0.2]}, "kv.budgets", ["-0.2", *FRACTION]),
    "budget that is no number": ({"kv.budgets": [math.nan]}, "kv.budgets.0", ["nan", *FRACTION]),
    "endless budget": ({"kv.budgets": [math.inf]}, "kv.budgets.0", FRACTION),
    "budget too fine": ({"kv.budgets": [0.123456789012]}, "kv.budgets", ["10 decimals", *FRACTION]),
    "budget as text": ({"kv.budgets": ["half"]}, "kv.budgets.0", ["'half'", "{tokens: n}", *FRACTION]),
    "budget true": ({"kv.budgets": [0.5, True]}, "kv.budgets.1", ["True", *FRACTION]),
    "budget of no tokens": ({"kv.budgets": [{"tokens": 0}]}, "kv.budgets.0", ["at least 1"]),
    "budget of half a token": ({"kv.budgets": [{"tokens": 1.5}]}, "kv.budgets.0", ["{tokens: n}"]),
    "budget of something else": ({"kv.budgets": [{"token": 3}]}, "kv.budgets.0", ["{tokens: n}"]),
    "budgets as a number": ({"kv.budgets": 0.5}, "kv.budgets", ["list"]),
    "empty budgets": ({"kv.budgets": []}, "kv.budgets", ["at least 1"]),
    "no budgets": ({"kv.budgets": None}, "kv.budgets", ["[1.0, 0.5, 0.2]"]),
    "duplicate budgets": ({"kv.budgets": [0.5, 0.2, 0.50]}, "kv.budgets", ["twice", "r0.5"]),
    "duplicate token budgets": ({"kv.budgets": [{"tokens": 8}, {"tokens": 8}]}, "kv.budgets", ["twice", "t8"]),
    "budgets and compression_ratio": (
        {"kv.compression_ratio": [0.8]},
        "kv.budgets",
        ["budgets", "compression_ratio", "one of"],
    ),
    "everything removed": (
        {"kv.budgets": None, "kv.compression_ratio": [1.0]},
        "kv.compression_ratio",
        ["1.0", "[0, 1)"],
    ),
    # modes
    "a mode that the task does not have": (
        LONGBENCH | {"dataset.tasks": ["gov_report"], "kv.modes": ["before_question"]},
        "kv.modes",
        ["gov_report", "before_question", "after_prompt"],
    ),
    "unknown mode": ({"kv.modes": ["before"]}, "kv.modes.0", ["'before_question'", "'after_prompt'"]),
    "modes as text": ({"kv.modes": "after_prompt"}, "kv.modes", ["list"]),
    "a mode twice": ({"kv.modes": ["after_prompt"] * 2}, "kv.modes", ["twice", "after_prompt"]),
    "no mode": ({"kv.modes": []}, "kv.modes", ["at least 1"]),
    # bins
    "n_bins 0": ({"binning.n_bins": 0}, "binning.n_bins", ["greater than or equal to 1", "0"]),
    "n_bins 51": ({"binning.n_bins": 51}, "binning.n_bins", ["less than or equal to 50", "51"]),
    "n_bins as text": ({"binning.n_bins": "two"}, "binning.n_bins", ["integer", "'two'"]),
    "edges of the wrong count": ({"binning.edges": [0, 512]}, "binning.edges", ["n_bins + 1 = 3", "2"]),
    "edges that fall": ({"binning.edges": [0, 512, 256]}, "binning.edges", ["rise", "[0, 512, 256]"]),
    "negative edge": ({"binning.edges": [-1, 512, 1024]}, "binning.edges.0", ["greater than or equal to 0"]),
    "strict as a number": ({"binning.strict": 1}, "binning.strict", ["boolean"]),
    "no example in a bin": ({"binning.n_per_bin": 0}, "binning.n_per_bin", ["greater than or equal to 1"]),
    # model
    "missing model folder": ({"model.name": "./models/none"}, "model.name", ["./models/none", "folder", "org/model"]),
    "missing absolute model folder": ({"model.name": "/no/such/model"}, "model.name", ["/no/such/model", "org/model"]),
    "a folder without a model": ({"model.name": "."}, "model.name", ["config.json"]),
    "model name as a number": ({"model.name": 3}, "model.name", ["string", "3"]),
    "unknown device": ({"model.device": "gpu"}, "model.device", ["'auto'", "'cpu'", "'cuda'"]),
    "unknown dtype": ({"model.dtype": "float64"}, "model.dtype", ["'float32'", "'bfloat16'", "'float16'"]),
    "max_length as text": ({"model.max_length": "long"}, "model.max_length", ["integer", "'long'"]),
    "max_length too small": ({"model.max_length": 8}, "model.max_length", ["greater than or equal to 16"]),
    # data
    "unknown data set": ({"dataset.name": "pile"}, "dataset.name", ["'synthetic'", "'longbench'", "'jsonl'"]),
    "unknown task": ({"dataset.tasks": ["qa"]}, "dataset.tasks", ["'qa'", "reader_qa"]),
    "unknown longbench task": (LONGBENCH | {"dataset.tasks": ["hotpot"]}, "dataset.tasks", ["'hotpot'", "hotpotqa"]),
    "no task": ({"dataset.tasks": []}, "dataset.tasks", ["at least 1"]),
    "a task twice": ({"dataset.tasks": ["reader_qa", "reader_qa"]}, "dataset.tasks", ["twice"]),
    "missing dataset path": (
        {"dataset": {"name": "jsonl", "tasks": ["mine"], "path": "no/such/folder"}},
        "dataset.path",
        ["no/such/folder", "file or folder"],
    ),
    "missing longbench path": (
        LONGBENCH | {"dataset.tasks": ["hotpotqa"], "dataset.path": "./no/such/folder"},
        "dataset.path",
        ["./no/such/folder", "file or folder"],
    ),
    "a download that is not pinned": (
        LONGBENCH | {"dataset.tasks": ["hotpotqa"], "dataset.path": None},
        "dataset.revision",
        ["commit", "40 hexadecimal digits"],
    ),
    "missing prompts": ({"dataset.prompts": "./none.json"}, "dataset.prompts", ["./none.json", "exists"]),
    "jsonl without a path": ({"dataset": {"name": "jsonl", "tasks": ["mine"]}}, "dataset.path", [".jsonl"]),
    "synthetic without lengths": ({"dataset.lengths": None}, "dataset.lengths", ["[256, 512]", "n_per_length"]),
    "negative seed": ({"dataset.seed": -1}, "dataset.seed", ["greater than or equal to 0"]),
    # decoding and the rest
    "max_tokens 0": ({"decoding.max_tokens": 0}, "decoding.max_tokens", ["'task'", "at least 1"]),
    "max_tokens as another text": ({"decoding.max_tokens": "all"}, "decoding.max_tokens", ["'task'", "'all'"]),
    "negative temperature": ({"decoding.temperature": -1}, "decoding.temperature", ["greater than or equal to 0"]),
    "endless temperature": ({"decoding.temperature": math.inf}, "decoding.temperature", ["finite"]),
    "no repeats": ({"decoding.repeats": 0}, "decoding.repeats", ["greater than or equal to 1"]),
    "confidence in percent": ({"statistics.confidence": 95}, "statistics.confidence", ["less than 1", "95"]),
    "few resamples": ({"statistics.resamples": 10}, "statistics.resamples", ["greater than or equal to 100"]),
    "unknown store": ({"prefill.store": "no"}, "prefill.store", ["'auto'", "'always'", "'never'"]),
    "no room for prefills": ({"prefill.max_gb": 0}, "prefill.max_gb", ["greater than 0"]),
    "the prefills' folder": ({"experiment": "prefill"}, "experiment", ["'prefill'", "another use"]),
    "an experiment in a folder": ({"experiment": "a/b"}, "experiment", ["'a/b'", "letters"]),
    "empty output folder": ({"output.dir": ""}, "output.dir", ["at least 1"]),
    # keys
    "unknown key": ({"policies": {"full": {}}}, "policies", ["no such key", *SECTIONS]),
    "unknown key that begins like a type": ({"interval": 3}, "interval", ["no such key", *SECTIONS]),
    "unknown nested key": ({"model.max_len": 1024}, "model.max_len", ["no such key", "max_length", "device"]),
    "misplaced key": ({"binning.budgets": [0.5]}, "binning.budgets", ["no such key", "n_bins", "edges"]),
    "section as a value": ({"model": "org/model"}, "model", ["'org/model'", "section", "max_length", "device"]),
    "missing section": ({"kv": None}, "kv", ["required", "config/README.md"]),
    "missing data set": ({"dataset": None}, "dataset", ["required"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_one_sentence(complaint, case):
    changes, key, words = BAD[case]
    sentence = complaint(changed(changes))
    assert sentence.startswith((f"{key}:", f"{key}."))
    assert "\n" not in sentence
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not a mapping"]),
        ("# only a comment\n", ["not a mapping"]),
        ("- a\n- b\n", ["not a mapping"]),
        ("experiment: [\nkv: {}\n", ["not valid YAML", "line"]),
        ("a: b: c\n", ["not valid YAML", "line 1"]),
        ("\tkv: {}\n", ["not valid YAML", "line 1"]),
    ],
)
def test_a_file_that_is_no_mapping_is_named(complaint, text, words):
    sentence = complaint(text)
    assert "experiment.yaml" in sentence
    assert "config/config.yaml" in sentence
    assert "\n" not in sentence
    assert [word for word in words if word not in sentence] == []


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"there is no experiment file nowhere\.yaml"):
        settings_module.load("nowhere.yaml")


def test_a_model_folder_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    specs.check(settings_module.parse(changed({"model.name": str(tmp_path)})))


def test_settings_cannot_be_changed():
    settings = settings_module.parse(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        settings.experiment = "other"


def test_a_policy_without_options_may_be_left_empty():
    assert settings_module.parse(changed({"kv.policies": {"full": None}})).kv.policies == {"full": {}}


# ---------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("ratio", "name"), [(0.8, "r0.2"), (0.9, "r0.1"), (0.0, "r1"), (0.5, "r0.5"), (0.93, "r0.07"), (0.7, "r0.3")]
)
def test_compression_ratio_is_the_share_removed(ratio, name):
    kv = settings_module.parse(changed({"kv.budgets": None, "kv.compression_ratio": [ratio]})).kv
    assert [str(budget) for budget in kv.all_budgets()] == [name]
    kept = Budget.of_fraction(name[1:])
    assert kv.all_budgets() == [kept]


@pytest.mark.parametrize(
    ("fraction", "n", "kept"),
    [
        (0.1, 10, 1),  # with floats 0.1 * 30 is 3.0000000000000004, 0.07 * 100 is 7.000000000000001
        (0.1, 30, 3),
        (0.1, 11, 2),
        (0.07, 100, 7),
        (0.2, 4096, 820),
        (0.2, 1, 1),
        (0.55, 100, 55),
        (0.0625, 4096, 256),
        (1.0, 77, 77),
        (1, 77, 77),
        (0.5, 0, 0),
    ],
)
def test_kept_entries_by_hand(fraction, n, kept):
    assert Budget.of_fraction(fraction).kept(n) == kept


@given(digits=st.integers(1, 10**6), n=st.integers(0, 10**6))
def test_kept_is_the_exact_ceiling(digits, n):
    """Check that the float nearest to a decimal of six digits counts as this decimal."""
    kept = Budget.of_fraction(digits / 10**6).kept(n)
    assert kept == -(-digits * n // 10**6)
    assert Fraction(digits, 10**6) * n <= kept < Fraction(digits, 10**6) * n + 1


@given(tokens=st.integers(1, 10**6), n=st.integers(0, 10**6))
def test_token_budgets_keep_no_more_than_there_is(tokens, n):
    budget = Budget.of_tokens(tokens)
    assert budget.kept(n) == sorted([tokens, n])[0]
    assert not budget.is_full


@given(digits=st.integers(1, 10**6))
def test_the_name_of_a_fraction_reads_back(digits):
    budget = Budget.of_fraction(digits / 10**6)
    name = str(budget)
    assert Budget.parse(name) == budget
    assert Fraction(name[1:]) == Fraction(digits, 10**6)
    assert name == "r1" if digits == 10**6 else not name.endswith("0")


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget.of_fraction(0.2), "r0.2"),
        (Budget.of_fraction("0.20"), "r0.2"),
        (Budget.of_fraction(1.0), "r1"),
        (Budget.of_fraction(1), "r1"),
        (Budget.of_fraction(0.0625), "r0.0625"),
        (Budget.of_fraction(1e-05), "r0.00001"),
        (Budget.of_tokens(128), "t128"),
    ],
)
def test_names_are_canonical(budget, name):
    assert str(budget) == name
    assert Budget.parse(name) == budget


@pytest.mark.parametrize("name", ["", "r", "t", "0.2", "r0", "r1.5", "rx", "t0", "t1.5", "x3", "t-1"])
def test_what_is_no_budgets_name(name):
    with pytest.raises(UserError, match="budget"):
        Budget.parse(name)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "12"])
def test_tokens_are_whole_numbers(value):
    with pytest.raises(UserError, match="whole number of at least 1"):
        Budget.of_tokens(value)


def test_a_budget_of_one_is_full_and_runs_no_cell_of_its_own():
    """Check that a budget of 1 is an alias of the full cache and has no cell."""
    settings = settings_module.parse(changed({"kv.modes": ["after_prompt"]}))
    assert grid_specs.cells(settings) == [
        ("after_prompt", "full", "r1"),
        ("after_prompt", "snapkv", "r0.5"),
        ("after_prompt", "snapkv", "t64"),
    ]
    assert grid_specs.aliases(settings) == [("snapkv", "r1")]


# ---------------------------------------------------------------------------------------------------- --set


def test_override_sets_values_as_yaml():
    result = settings_module.override(
        GOOD,
        [
            "model.device=cuda",
            "binning.n_bins=3",
            "kv.budgets=[0.5, {tokens: 8}]",
            "report.title=a = b",
            "binning.edges=null",
            "binning.strict=true",
            "kv.policies.snapkv.window=8",
        ],
    )
    assert result["model"] == {"name": "org/model", "device": "cuda"}
    assert result["binning"] == {"n_bins": 3, "n_per_bin": 3, "edges": None, "strict": True}
    assert result["kv"]["budgets"] == [0.5, {"tokens": 8}]
    assert result["kv"]["policies"] == {"full": {}, "snapkv": {"window": 8}}
    assert result["report"] == {"title": "a = b"}


def test_override_leaves_the_original_alone():
    before = copy.deepcopy(GOOD)
    settings_module.override(GOOD, ["kv.policies.snapkv.window=8", "dataset.tasks=[x]"])
    assert before == GOOD


def test_the_last_assignment_counts():
    assert settings_module.override(GOOD, ["experiment=a", "experiment=b"])["experiment"] == "b"


def test_load_applies_assignments(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert settings_module.load(path, ["model.device=cuda"]).model.device == "cuda"
    with pytest.raises(UserError, match=r"^model\.devices: there is no such key"):
        settings_module.load(path, ["model.devices=cuda"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.device", ["'model.device'", "key.sub=value"]),
        ("=cpu", ["'=cpu'", "key.sub=value"]),
        ("model.name.first=x", ["model.name.first", "name is a value"]),
        ("kv.budgets=[0.5", ["kv.budgets", "YAML"]),
    ],
)
def test_a_bad_assignment_is_one_sentence(assignment, words):
    with pytest.raises(UserError) as error:
        settings_module.override(GOOD, [assignment])
    sentence = str(error.value)
    assert sentence.startswith("--set ")
    assert "\n" not in sentence
    assert [word for word in words if word not in sentence] == []
