"""Test cells of entropy_recall in the grid: their inputs from other jobs, and their configuration."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from models import engine, tokens

from kv_transition import specs
from kv_transition.cache.store import PrefillStore
from kv_transition.errors import UserError
from kv_transition.provenance import rows_to_table
from kv_transition.settings import parse
from kv_transition.studies.grid import run as cell
from kv_transition.studies.grid import specs as grid_specs
from kv_transition.studies.grid.calibrate import step_entropies
from kv_transition.studies.grid.tables import CELLS

TREATED = {"kind": "entropy_recall", "tau_quantile": 0.9}
SPEC = {
    "mode": "after_prompt",
    "policy": "mine",
    "kind": "entropy_recall",
    "budget": "t9",
    "first_token": "compressed",
    "decoding": {"temperature": 0.0, "repeats": 1, "batch": 3, "seed": 0},
}


def experiment(**policies):
    dataset = {"name": "synthetic", "tasks": ["reader_qa"], "lengths": [256], "n_per_length": 4}
    kv = {"policies": {"full": {}, **policies}, "budgets": [0.2]}
    return parse({"experiment": "try", "dataset": dataset, "kv": kv})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either tau"),
        ({"tau": 1.0, "tau_quantile": 0.5}, "either tau"),
        ({"moments": "always", "tau": 1.0}, "mine.tau: moments always"),
        ({"tau": 1.0, "like": "treated"}, "mine.like: only"),
        ({"moments": "random"}, "mine.like: None"),
        ({"moments": "random", "like": "treated", "share": 0.5}, "not both"),
        ({"tau": 1.0, "share": 0.5}, "mine.share: only"),
        ({"moments": "random", "like": "nobody"}, "'nobody'"),
        ({"moments": "random", "like": "h2o"}, "'h2o'"),
        ({"moments": "periodic", "like": "mine"}, "'mine'"),
        ({"moments": "periodic", "like": "treated", "inner": "tova"}, "inner tova"),
    ],
)
def test_what_contradicts_itself_is_refused_by_its_key(options, words):
    with pytest.raises(UserError, match=words):
        specs.check(experiment(h2o={}, treated=TREATED, mine={"kind": "entropy_recall", **options}))


def test_cells_take_the_calibration_and_the_treated_cell_where_they_need_them():
    control = {"kind": "entropy_recall", "moments": "random", "like": "treated"}
    settings = experiment(h2o={}, treated=TREATED, control=control, fixed={"kind": "entropy_recall", "tau": 1.0})
    specs.check(settings)
    policies = settings.kv.policies
    assert [name for name in policies if grid_specs.calibrated(settings, name)] == ["treated"]
    assert {name: grid_specs.treated(settings, name) for name in policies if grid_specs.treated(settings, name)} == {
        "control": "treated"
    }


class Words:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def test_a_cell_is_calibrated_and_its_control_has_as_many_moments(tmp_path, monkeypatch):
    model = engine("qwen2")
    monkeypatch.setattr(model, "tokenizer", Words())
    examples = [
        {
            "task": "t", "example_id": f"e{i}", "bin": 0, "prompt_sha256": f"sha{i}", "prompt_len": 55,
            "context_ids": tokens(50, seed=i), "question_ids": tokens(5, seed=9), "max_new_tokens": 12,
        }
        for i in range(3)
    ]  # fmt: skip
    store = PrefillStore(tmp_path / "model")
    calibration = tmp_path / "calibration.json"
    steps = [step_entropies(model, e["context_ids"], e["question_ids"], 12) for e in examples]
    entropies = sorted(entropy for each in steps for entropy in each)
    calibration.write_text(json.dumps({"entropies": entropies}))
    options = {"inner": "h2o", "moments": "entropy", "tau": None, "tau_quantile": 0.5, "like": None}
    rows = cell.rows(model, examples, SPEC | {"hyper_parameters": options}, store, str(calibration))
    facts = [json.loads(row["raw"]) for row in rows]
    assert [row["batch_size"] for row in rows] == [1, 1, 1]
    assert {fact["tau"] for fact in facts} == {entropies[len(entropies) // 2]}
    assert len({fact["triggers"] for fact in facts}) > 1

    treated = tmp_path / "bin0.parquet"
    pq.write_table(rows_to_table(rows, CELLS), treated)
    for moments in ("random", "periodic"):
        options |= {"moments": moments, "tau_quantile": None, "like": "treated"}
        controls = cell.rows(model, examples, SPEC | {"hyper_parameters": options}, store, None, str(treated))
        assert [json.loads(row["raw"])["triggers"] for row in controls] == [fact["triggers"] for fact in facts]
