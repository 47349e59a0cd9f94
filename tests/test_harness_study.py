"""Test the study of lm-evaluation-harness's tasks: settings, jobs, analysis and report, from an output written by hand.

The last test runs the workflow and needs lm-eval: `make test-harness`.
"""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import polars as pl
import pytest
import yaml
from project import ROOT, Project

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata, rows_to_table, write_table
from kv_transition.report.section import Source
from kv_transition.stats import paired
from kv_transition.studies.harness import plots, report, run, study
from kv_transition.studies.harness.tables import DOCUMENTS

INSTALLED = importlib.util.find_spec("lm_eval") is not None
KV = {"policies": {"full": {}, "snapkv": {}, "h2o": {}}, "budgets": [0.5, {"tokens": 16}], "modes": ["after_prompt"]}
EXPERIMENT = {
    "model": {"name": str(ROOT / "resources/tiny-reader"), "device": "cpu"}, "kv": KV, "harness": {"tasks": ["choice"]},
}  # fmt: skip


def parsed(**changes):
    settings = settings_module.parse(EXPERIMENT | {"harness": EXPERIMENT["harness"] | changes})
    specs.check(settings)
    return settings


# -- settings and jobs


def test_an_experiment_may_be_all_harness():
    assert set(study.cells(parsed())) == {
        ("after_prompt", "full", "r1"),
        *(("after_prompt", policy, budget) for policy in ("snapkv", "h2o") for budget in ("r0.5", "t16")),
    }


def test_policies_budgets_and_modes_are_chosen():
    chosen = parsed(policies=["h2o"], budgets=["t16"], modes=["before_question", "after_prompt"])
    # the full cache is run once, because no mode changes its answers
    assert set(study.cells(chosen)) == {
        ("after_prompt", "full", "r1"), ("before_question", "h2o", "t16"), ("after_prompt", "h2o", "t16"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": []}, "harness.tasks: give at least 1 entry"),
        ({"tasks": ["a", "a"]}, "harness.tasks: a name is listed twice in a, a; give each once"),
        ({"policies": ["tova"]}, "harness.policies: there is no 'tova'; choose from full, snapkv, h2o"),
        ({"budgets": ["r0.3"]}, "harness.budgets: there is no 'r0.3'; choose from r0.5, t16"),
        ({"include_path": "no/such"}, "harness.include_path: there is no folder no/such; give one with task files"),
    ],
)
def test_bad_settings_are_a_sentence(changes, sentence):
    with pytest.raises(UserError) as error:
        parsed(**changes)
    assert str(error.value).startswith(sentence)


def test_a_spec_notices_the_content_of_task_files(tmp_path):
    from kv_transition.specs.model import content

    def found():
        content.cache_clear()
        return study.spec(parsed(include_path=str(tmp_path)), "after_prompt", "h2o", "r0.5")

    (tmp_path / "choice.yaml").write_text("task: choice")
    first = found()
    assert found() == first
    (tmp_path / "choice.yaml").write_text("task: choice\nnum_fewshot: 2")
    assert found() != first


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed here")
def test_without_the_harness_a_job_says_how_to_get_it(tmp_path):
    spec = study.spec(parsed(), "after_prompt", "h2o", "r0.5")
    with pytest.raises(UserError, match="with the extra lm-eval \\(`make lm-eval` creates one\\)"):
        run.main(["--spec", json.dumps(spec), "--output", str(tmp_path / "out.parquet")])
    assert not list(tmp_path.iterdir())


# -- an output of the harness, written by hand: four documents, two of them right


def output(right, mean, stderr):
    """Return the output of `lm_eval.simple_evaluate` for a multiple-choice task with accuracy and perplexity."""
    samples = [
        {
            "doc_id": i, "doc_hash": f"hash{i}", "filter": "none", "metrics": ["acc", "word_perplexity"],
            "target": i % 2, "filtered_resps": [[-1.5, False], [-0.5, True]], "acc": float(value),
            "word_perplexity": (-3.0, 4),
        }
        for i, value in enumerate(right)
    ]  # fmt: skip
    return {
        "results": {"choice": {
            "alias": "choice", "acc,none": mean, "acc_stderr,none": stderr, "word_perplexity,none": 2.5,
            "word_perplexity_stderr,none": "N/A",
        }},
        "samples": {"choice": samples},
        "n-samples": {"choice": {"original": 9, "effective": len(right)}},
        "higher_is_better": {"choice": {"acc": True, "word_perplexity": False}},
    }  # fmt: skip


def test_scores_and_documents_are_those_of_the_harness():
    found = output([1, 1, 0, 0], 0.5, 0.29)
    acc, perplexity = run.scores(found)
    assert acc == {"task": "choice", "metric": "acc", "filter": "none", "score": 0.5, "stderr": 0.29, "n": 4,
                   "higher_is_better": True}  # fmt: skip
    assert (perplexity["score"], perplexity["stderr"], perplexity["higher_is_better"]) == (2.5, None, False)
    rows = run.documents(found)
    assert len(rows) == 8
    assert [row["value"] for row in rows if row["metric"] == "acc"] == [1, 1, 0, 0]
    assert {row["value"] for row in rows if row["metric"] == "word_perplexity"} == {None}
    assert json.loads(rows[0]["response"]) == [[-1.5, False], [-0.5, True]]


def job(folder, mode, policy, budget, found):
    about = {"mode": mode, "policy": policy, "budget": budget, "harness_hash": f"{policy}-{mode}"}
    path = str(folder / f"{policy}-{mode}.parquet")
    rows = rows_to_table([about | row for row in run.documents(found)], DOCUMENTS)
    write_table(path, rows, {"harness": about | {"scores": run.scores(found), "version": "0.4.13"}, "model": "tiny"})
    return path, about["harness_hash"]


FULL_RIGHT, OWN_RIGHT = [1, 1, 1, 0] * 5, [1, 0, 1, 0] * 5


@pytest.fixture
def made(tmp_path):
    files = dict([
        job(tmp_path, "after_prompt", "full", "r1", output(FULL_RIGHT, 0.75, 0.1)),
        job(tmp_path, "after_prompt", "h2o", "r0.5", output(OWN_RIGHT, 0.5, 0.11)),
        job(tmp_path, "before_question", "h2o", "r0.5", output(FULL_RIGHT, 0.75, 0.1)),
    ])  # fmt: skip
    return files, str(tmp_path / "harness.parquet")


def test_a_policy_is_compared_with_full_on_the_same_documents(made):
    files, path = made
    report.write_harness(list(files), path, files, 0.95)
    acc = pl.read_parquet(path).filter(metric="acc")
    full, own, same = acc.rows(named=True)
    assert (full["mode"], full["difference"], full["paired"], full["score"]) == (None, None, None, 0.75)
    assert (own["mode"], own["score"], own["stderr"], own["n"], own["paired"]) == ("after_prompt", 0.5, 0.11, 20, 20)
    # five of twenty documents are lost; interval and p are those of the project's inference for pairs
    test = paired.difference(np.array([np.subtract(OWN_RIGHT, FULL_RIGHT)], dtype=float))
    interval = test.interval(0.95)
    assert own["difference"] == pytest.approx(-0.25)
    assert own["difference_low"] == pytest.approx(interval.low[0])
    assert own["difference_high"] == pytest.approx(interval.high[0])
    assert own["p_value"] == pytest.approx(test.p[0])
    assert own["p_holm"] == pytest.approx(min(1, 2 * test.p[0]))
    assert same["difference"] == 0
    assert same["difference_low"] < 0 < same["difference_high"]
    # perplexity has a score, but no value per document
    rolled = pl.read_parquet(path).filter(metric="word_perplexity", mode="after_prompt").row(0, named=True)
    assert (rolled["score"], rolled["paired"], rolled["difference"], rolled["p_value"]) == (2.5, 0, None, None)
    assert "harness" not in read_metadata(path)


def test_documents_that_only_one_of_both_has_are_left_out(tmp_path):
    files = dict([
        job(tmp_path, "after_prompt", "full", "r1", output([1, 1, 1, 1], 1.0, 0.0)),
        job(tmp_path, "after_prompt", "h2o", "r0.5", output([0, 1, 1], 2 / 3, 0.3)),
    ])  # fmt: skip
    report.write_harness(list(files), str(tmp_path / "out.parquet"), files, 0.95)
    own = pl.read_parquet(tmp_path / "out.parquet").filter(metric="acc", policy="h2o").row(0, named=True)
    assert (own["n"], own["paired"]) == (3, 3)
    assert own["difference"] == pytest.approx(-1 / 3)


def test_values_outside_of_0_and_1_have_an_interval_and_no_p():
    both = pl.DataFrame({"value": [12.0, 15.0, 11.0], "value_full": [14.0, 16.0, 14.0]})
    found = report.compared(both, 0.95, "any")
    # mean of -2, -1, -3; Student's t with two degrees of freedom: 4.302653 * 1 / sqrt(3)
    assert found["difference"] == pytest.approx(-2)
    assert found["difference_high"] - found["difference"] == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert "p_value" not in found


def test_a_file_of_other_settings_is_named(made):
    files, path = made
    first = next(iter(files))
    with pytest.raises(UserError, match=f"{first} was computed with other settings"):
        report.write_harness(list(files), path, files | {first: "another"}, 0.95)


def test_the_section_shows_score_difference_and_n(made):
    files, path = made
    report.write_harness(list(files), path, files, 0.95)
    section = report.build(Source(None, {}, extra={"harness": pl.read_parquet(path)}))
    acc, perplexity = section["tables"]
    assert acc["heading"] == "choice: acc, higher is better"
    assert perplexity["heading"] == "choice: word_perplexity, lower is better"
    full, own, _ = ([str(cell) for cell in row] for row in acc["rows"])
    assert full[:5] == ["full", "100 %", "–", "0.750 ± 0.100", "20"]
    assert own[:5] == ["h2o", "50 %", "after the prompt", "0.500 ± 0.110", "20"]
    assert own[5].startswith("−0.250 [−0.")
    assert str(perplexity["rows"][1][5]) == "–"
    assert report.build(Source(None, {})) is None


# -- the figure


def test_the_figure_shows_scores_with_the_intervals_of_the_harness(made, tmp_path):
    files, path = made
    report.write_harness(list(files), path, files, 0.9)
    spec = plots.scores_figure(pl.read_parquet(path), 0.9)
    drawn = [row for rows in spec["datasets"].values() for row in rows]
    for metric, mode in (("acc", "after_prompt"), ("acc", "before_question"), ("word_perplexity", "after_prompt")):
        assert any(row["metric"] == metric and row["mode"] == mode for row in drawn)
    own = next(row for row in drawn if row["metric"] == "acc" and row["mode"] == "after_prompt")
    # the 95th percentile of the normal distribution is 1.644854
    assert (own["estimate"], own["n"], own["kept"]) == (0.5, 20, "50 %")
    assert own["high"] - 0.5 == pytest.approx(0.5 - own["low"]) == pytest.approx(1.644854 * 0.11, rel=1e-6)
    bare = next(row for row in drawn if row["metric"] == "word_perplexity" and row["policy"] == "h2o")
    assert (bare["estimate"], bare["low"], bare["high"]) == (2.5, None, None)
    panels = [panel["title"] for row in spec["vconcat"] for panel in row["hconcat"]]
    assert [(panel["text"], panel["subtitle"]) for panel in panels] == [
        ("choice: acc", ["after the prompt, n = 20"]), ("choice: acc", ["before the question, n = 20"]),
        ("choice: word_perplexity", ["after the prompt, n = 20"]),
        ("choice: word_perplexity", ["before the question, n = 20"]),
    ]  # fmt: skip
    assert "90 % intervals from the standard errors" in spec["title"]["subtitle"][0]
    plots.write_harness_plots(path, 0.9, {"harness_scores_svg": str(tmp_path / "drawn.svg")})
    drawing = (tmp_path / "drawn.svg").read_text()
    assert "choice: acc" in drawing
    assert "h2o" in drawing


def test_a_figure_without_policies_says_so(tmp_path):
    files = dict([job(tmp_path, "after_prompt", "full", "r1", output([1, 1, 0, 0], 0.5, 0.29))])
    report.write_harness(list(files), str(tmp_path / "out.parquet"), files, 0.95)
    spec = plots.scores_figure(pl.read_parquet(tmp_path / "out.parquet"), 0.95)
    assert "No policy was run beside the full cache." in spec["description"]


# -- the workflow, if lm-eval is installed


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed here; `make test-harness` runs this test")
def test_the_workflow_runs_the_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    tasks = project.folder / "tasks"
    tasks.mkdir()
    rows = [{"context": f"Ann went to the park . Ben has {i} cups . " * 4, "gold": i % 2} for i in range(5)]
    (tasks / "choice.json").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "choice.yaml").write_text(yaml.safe_dump({
        "task": "choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "choice.json")}}, "test_split": "test",
        "doc_to_text": "{{context}}", "output_type": "multiple_choice", "doc_to_choice": ["Ann", "the park"],
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
    }))  # fmt: skip
    project.configure({
        "experiment": "small", "model": {"name": "resources/tiny-reader", "device": "cpu"},
        "kv": {"policies": {"full": {}, "snapkv": {}}, "budgets": [1.0, 0.3], "modes": ["after_prompt"]},
        "harness": {"tasks": ["choice"], "include_path": "tasks", "limit": 4},
    })  # fmt: skip
    project.run()
    assert not project.planned()

    table = pl.read_parquet(project.results / "harness.parquet")
    assert table.select("policy", "budget", "mode", "n", "paired").rows() == [
        ("full", "r1", None, 4, None), ("snapkv", "r0.3", "after_prompt", 4, 4),
    ]  # fmt: skip
    # the same task with the harness's own command line and model type, without the workflow
    import lm_eval
    from lm_eval.tasks import TaskManager

    import kv_transition.harness.model  # noqa: F401

    answered = {}
    for row in table.iter_rows(named=True):
        arguments = {"pretrained": str(ROOT / "resources/tiny-reader"), "policy": row["policy"], "device": "cpu"}
        arguments |= {} if row["policy"] == "full" else {"budget": 0.3}
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = lm_eval.simple_evaluate("kv_transition", arguments, ["choice"], task_manager=manager, limit=4)
        assert row["score"] == found["results"]["choice"]["acc,none"]
        assert row["stderr"] == pytest.approx(found["results"]["choice"]["acc_stderr,none"])
        rows = pl.read_parquet(project.results / f"harness/after_prompt/{row['policy']}/{row['budget']}.parquet")
        answers = [json.dumps(s["filtered_resps"], default=str) for s in found["samples"]["choice"]]
        answered[row["policy"]] = rows.sort("doc_id")["response"].to_list()
        assert answered[row["policy"]] == answers
    assert answered["full"] != answered["snapkv"]
    page = (project.results / "report.md").read_text()
    assert "## Tasks of lm-evaluation-harness" in page
    assert "plots/harness_scores.svg" in page
