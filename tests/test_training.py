"""Test the training helper of the embedded models, for a few steps of each recipe."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

RESOURCES = Path(__file__).resolve().parent.parent / "resources"


@pytest.fixture(scope="module", params=["tiny-reader", "tiny-follower"])
def script(request):
    """Return the training script of one model as a module."""
    spec = importlib.util.spec_from_file_location(
        request.param.replace("-", "_") + "_train", RESOURCES / request.param / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe(script):
    return replace(script.RECIPE, processes=1)


def test_a_few_steps_lower_the_loss(script, recipe):
    class NoWarmUp(script.Curriculum):
        WARM_UP_STEPS = 1

    run = script.training.Run(replace(recipe, curriculum=NoWarmUp), seed=0)
    losses = [run.step()[0] for _ in range(10)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] > 0.9 * math.log(len(recipe.vocabulary)), "an untrained model knows nothing"
    assert sum(losses[-3:]) / 3 < losses[0] - 0.25


def test_a_resumed_run_continues_as_if_it_had_not_stopped(script, recipe, tmp_path):
    run = script.training.Run(recipe, seed=1)
    run.step()
    run.save(tmp_path / "checkpoint.pt")
    resumed = script.training.Run(recipe, seed=1)
    resumed.load(tmp_path / "checkpoint.pt")
    assert run.step() == resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(run.parameters, resumed.parameters, strict=True))
    assert (run.steps, run.tokens) == (resumed.steps, resumed.tokens)


def test_a_checkpoint_of_another_seed_is_refused(script, recipe, tmp_path):
    script.training.Run(recipe, seed=1).save(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="made with seed 1, not 2"):
        script.training.Run(recipe, seed=2).load(tmp_path / "checkpoint.pt")


def test_the_exported_model_is_the_one_that_was_trained(script, recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = script.training.Run(recipe, seed=0)
    run.save(tmp_path / "checkpoint.pt")
    script.training.export(recipe, tmp_path / "checkpoint.pt", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for trained, saved in zip(run.parameters, loaded.parameters(), strict=True):
        torch.testing.assert_close(trained.detach(), saved.detach(), atol=2e-3, rtol=1e-3)  # fp16
    word = recipe.vocabulary[100]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    assert tokenizer(word, add_special_tokens=False).input_ids == [100]


def test_long_failure_to_learn_ends_the_run(script):
    curriculum = script.Curriculum(stage_steps=script.Curriculum.MAX_STAGE_STEPS - 2)
    wrong, count = dict.fromkeys(script.Row.ROLES, 0.0), dict.fromkeys(script.Row.ROLES, 1.0)
    assert not curriculum.update(wrong, count, True)
    with pytest.raises(RuntimeError, match="is not learned"):
        curriculum.update(wrong, count, True)


def test_the_curriculum_advances_when_all_is_right(script):
    curriculum, steps = script.Curriculum(), 0
    right = dict.fromkeys(script.Row.ROLES, 1.0)
    while not curriculum.final:
        curriculum.update(right, right, True)
        steps += 1
    assert steps == len(curriculum.SIZES) * curriculum.MIN_STAGE_STEPS
    assert not curriculum.finished
    first = curriculum.learning_rate(10_000)
    curriculum.stage_steps = curriculum.FINAL_STEPS
    assert curriculum.finished
    assert curriculum.learning_rate(10_000) == pytest.approx(0.05 * first)
