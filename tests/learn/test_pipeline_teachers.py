"""Runs without an outer network, with one that is trained already, and with one that sees what the student sees."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from kdedge import pipeline, recipe_io, stages
from kdedge.errors import RecipeError, RunError
from kdedge.models.weights import load_model, save_model
from kdedge.models.zoo import count_macs
from kdedge.predictions import read_predictions
from kdedge.run_teacher import read_ready_teacher
from kdedge.runs import Run, read_json, sha256_file
from kdedge.trust.select import load_trusted

SMALL = [
    "teacher.optim.total_steps=6",
    "student.arch=wide-resnet-10-1",
    "student.width=1.0",
    "student.optim.total_steps=4",
    "baseline.enabled=false",
    "trust.threshold=0.2",
]


def tiny(*settings: str, **flags: Any) -> Any:
    return recipe_io.load("tiny", [*SMALL, *settings], **flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = pipeline.train(tiny(), tmp_path_factory.mktemp("runs") / "whole")
    return run


def test_without_a_teacher_the_student_is_a_fixmatch_network(whole, tmp_path) -> None:
    run, result = pipeline.train(tiny("teacher=null", "student.method.robust_loss=ce"), tmp_path / "run")
    assert not run.teacher_path.exists()
    assert not run.trusted_path.exists()
    assert (result["teacher"], result["trusted"]) == (None, None)
    assert set(result["training_flops"]) == {"inner", "total"}
    assert sha256_file(run.student_path) != sha256_file(whole.student_path)
    # Resumed it says what it said.
    assert pipeline.train(tiny("teacher=null", "student.method.robust_loss=ce"), run.path, resume=True)[1] == result


def test_nothing_trusted_and_no_distillation_is_fixmatch_whoever_the_teacher_is(whole, tmp_path) -> None:
    """Invariant 1 of KD-FixMatch, through the whole pipeline: the same student, bit for bit."""
    plain = ["student.method.robust_loss=ce"]
    alone, _ = pipeline.train(tiny("teacher=null", *plain), tmp_path / "alone")
    told = [*plain, "trust.filters=none", "student.method.distill.loss=none", f"teacher.ready={whole.teacher_path}"]
    beside, _ = pipeline.train(tiny(*told), tmp_path / "beside")
    assert sha256_file(alone.student_path) == sha256_file(beside.student_path)


def test_flops_are_macs_times_images(whole) -> None:
    result, teacher = read_json(whole.result_path), load_model(whole.teacher_path)
    macs = count_macs(teacher.module, 1, 8, 8)
    images = 20 + 2 * 3 * 20  # of a step: labeled, weak and strong
    assert result["training_flops"]["outer"] == 6 * macs * images * 6
    assert result["training_flops"]["trusted"] == 2 * macs * 1257
    assert result["training_flops"]["total"] == sum(result["training_flops"][s] for s in ("outer", "trusted", "inner"))


def test_a_ready_teacher_replaces_stage_1_and_nothing_else_changes(whole, tmp_path) -> None:
    run, result = pipeline.train(tiny(f"teacher.ready={whole.teacher_path}"), tmp_path / "run")
    assert sha256_file(run.student_path) == sha256_file(whole.student_path)
    assert result["training_flops"]["outer"] == 0
    assert result["teacher"]["test_accuracy"] == read_json(whole.result_path)["teacher"]["test_accuracy"]
    assert not [line for line in run.metrics_path.read_text().splitlines() if '"outer"' in line]


def test_classes_are_matched_by_name(whole, tmp_path) -> None:
    """A file whose classes stand in another order gives the same answers in ours."""
    loaded = load_model(whole.teacher_path)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded.module.head.weight.copy_(loaded.module.head.weight[order])
        loaded.module.head.bias.copy_(loaded.module.head.bias[order])
    turned = tmp_path / "turned.safetensors"
    names = tuple(loaded.classes[i] for i in order)
    save_model(turned, loaded.module, loaded.spec, names, loaded.preprocess)
    again = read_ready_teacher(turned, load_model(whole.teacher_path).classes, 1)
    assert torch.equal(again.module.head.weight, load_model(whole.teacher_path).module.head.weight)
    assert torch.equal(again.module.head.bias, load_model(whole.teacher_path).module.head.bias)


def test_other_classes_are_refused_with_both_lists(whole, tmp_path) -> None:
    loaded = load_model(whole.teacher_path)
    other = tmp_path / "other.safetensors"
    save_model(other, loaded.module, loaded.spec, ("cat", *loaded.classes[1:]), loaded.preprocess)
    with pytest.raises(RunError, match=r"Teacher: cat, 1, 2.*Data: 0, 1, 2"):
        pipeline.train(tiny(f"teacher.ready={other}"), tmp_path / "run")
    with pytest.raises(RunError, match="channels"):
        pipeline.train(tiny(f"teacher.ready={whole.teacher_path}", "data.channels=3"), tmp_path / "run")
    with pytest.raises(RunError, match="does not exist"):
        pipeline.train(tiny("teacher.ready=nowhere.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_ready_teacher_may_read_another_size(whole, tmp_path) -> None:
    run, result = pipeline.train(
        tiny(f"teacher.ready={whole.teacher_path}", "data.image_px=12", "student.method.distill.views=same"),
        tmp_path / "run",
    )
    assert load_model(run.student_path).preprocess.height == 12
    # It answers as it did in the run that made it.
    ours, theirs = (read_predictions(r)["test_logits__teacher"] for r in (run, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    live = 2 * count_macs(load_model(whole.teacher_path).module, 1, 8, 8) * 140 * 4
    student = 6 * count_macs(load_model(run.student_path).module, 1, 12, 12) * 140 * 4
    assert result["training_flops"]["inner"] == student + live


@pytest.mark.parametrize("loss", ["dkd", "dist", "crd", "rkd", "fitnets"])
def test_every_distillation_trains_through_the_pipeline(whole, tmp_path, loss) -> None:
    views = ["student.method.distill.views=same"] if loss == "fitnets" else []
    settings = [f"teacher.ready={whole.teacher_path}", f"student.method.distill.loss={loss}", *views]
    run, _ = pipeline.train(tiny(*settings), tmp_path / "run")
    assert sha256_file(run.student_path) != sha256_file(whole.student_path)
    assert not run.checkpoint_path.exists()
    assert '"loss_distill"' in run.metrics_path.read_text()


def test_a_student_may_start_from_its_teacher(whole, tmp_path) -> None:
    settings = [f"teacher.ready={whole.teacher_path}", "student.init=teacher", "student.optim.learning_rate=1e-30"]
    run, _ = pipeline.train(tiny(*settings), tmp_path / "run")
    ours, theirs = (load_model(path).module.head.weight for path in (run.student_path, whole.teacher_path))
    assert torch.allclose(ours, theirs)
    with pytest.raises(RecipeError, match=r"student is .*1 halvings.* and the teacher .*2 halvings"):
        pipeline.train(tiny(*settings, "student.halvings=1"), tmp_path / "other")
    with pytest.raises(RecipeError, match="teacher is null"):
        pipeline.train(tiny("teacher=null", "student.init=teacher"), tmp_path / "none")


def test_outliers_are_noted_and_teach_nothing(whole, tmp_path) -> None:
    ready = f"teacher.ready={whole.teacher_path}"
    run, result = pipeline.train(tiny(ready, "outliers.score=distance", "outliers.keep=0.8"), tmp_path / "run")
    trusted = load_trusted(run.trusted_path)
    assert 0 < result["data_guards"]["outliers"] == (trusted.why == "outlier").sum() < len(trusted.why)
    assert not trusted.kept[trusted.why == "outlier"].any()
    assert sha256_file(run.student_path) != sha256_file(whole.student_path)
    assert read_json(whole.result_path)["data_guards"] == {
        "duplicates_removed": 0,
        "near_duplicates_looked_for": False,  # 8 px
        "outliers": None,
    }
    _, unguarded = pipeline.train(tiny("data.remove_leaks=false", "teacher=null"), tmp_path / "unguarded")
    assert unguarded["data_guards"]["duplicates_removed"] is None


def test_a_run_is_of_one_ready_teacher(whole, tmp_path, monkeypatch) -> None:
    """Another file under the same name is refused; once the run has its copy, the file may go."""
    ready = tmp_path / "ready.safetensors"
    shutil.copy(whole.teacher_path, ready)
    asked = tiny(f"teacher.ready={ready}")

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("the plug")

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "_outer", stop)
        with pytest.raises(RuntimeError, match="the plug"):
            pipeline.train(asked, tmp_path / "run")
    loaded = load_model(ready)
    with torch.no_grad():
        loaded.module.head.bias.add_(1.0)
    save_model(ready, loaded.module, loaded.spec, loaded.classes, loaded.preprocess)
    with pytest.raises(RunError, match="is not the one that the run"):
        pipeline.train(asked, tmp_path / "run", resume=True)
    shutil.copy(whole.teacher_path, ready)
    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "_select", stop)
        with pytest.raises(RuntimeError, match="the plug"):
            pipeline.train(asked, tmp_path / "run", resume=True)
    ready.unlink()
    run, _ = pipeline.train(asked, tmp_path / "run", resume=True)
    assert sha256_file(run.student_path) == sha256_file(whole.student_path)


def test_what_starts_from_a_tuned_teacher_is_tuned_and_its_baseline_from_the_same_weights(whole, tmp_path) -> None:
    """Chained fine-tuning keeps what the weights know; the baseline may not have the teacher's pseudo labels."""
    same = ["teacher.arch=wide-resnet-10-1", f"teacher.init={whole.teacher_path}", "student.init=teacher"]
    settings = ["teacher.optim.total_steps=3", "student.optim.total_steps=2", "baseline.optim.total_steps=2"]
    run, _ = pipeline.train(
        recipe_io.load("tiny", [*settings, "student.arch=wide-resnet-10-1", "student.width=1.0", *same[1:]]),
        tmp_path / "run",
    )
    resolved = recipe_io.load(str(run.recipe_path))
    rates = {part.optim.learning_rate for part in (resolved.teacher, resolved.student, resolved.baseline)}
    assert rates == {0.0001}
    # After two steps at that rate all three are still near the weights they started from.
    start = load_model(whole.teacher_path).module.backbone.state_dict()["stem.weight"]
    for path in (run.teacher_path, run.student_path, run.baseline_path):
        assert torch.allclose(load_model(path).module.backbone.state_dict()["stem.weight"], start, atol=1e-2)


def test_a_student_reads_images_as_the_ready_teacher_it_starts_from(whole, tmp_path) -> None:
    settings = [f"teacher.ready={whole.teacher_path}", "student.init=teacher"]
    run, _ = pipeline.train(tiny(*settings, seed=1), tmp_path / "run")  # another seed would measure another mean
    assert load_model(run.student_path).preprocess == load_model(whole.teacher_path).preprocess
    assert recipe_io.load(str(run.recipe_path)).student.optim.learning_rate == 0.0001
    with pytest.raises(RecipeError, match=r"the recipe asks for 8 px, \(0.5,\)"):
        pipeline.train(tiny(*settings, "data.mean=[0.5]", "data.std=[0.1]"), tmp_path / "other")
