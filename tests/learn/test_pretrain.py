"""Pre-training, what starts from it, and fine-tuning on the labels alone, through whole runs at toy size."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdedge import pipeline, recipe_io
from kdedge.errors import DataError, RecipeError, RunError
from kdedge.methods.supervised import FineTuneConfig
from kdedge.models.weights import load_model, read_starting_weights
from kdedge.recipe import Recipe
from kdedge.run_folder import check_folder
from kdedge.runs import Run, read_json, sha256_file
from kdedge.train.metrics import SilentDisplay

TEXT = """
schema: 1
name: toy
data: {image_px: 8}
pretrain: {of: student, batch: 16, optim: {total_steps: 5}}
teacher: null
student:
  arch: wide-resnet-10-1
  init: simclr
  projection_layers: 1
  method: {kind: fine-tune}
  optim: {total_steps: 4, labeled_batch: 8}
baseline: {enabled: false}
engine:
  checkpoint_every_s: 0
  log_every_steps: 1
  plan: {memory_format: channels-last, threads: 1, precision: fp32}
"""


def toy(*settings: str) -> Recipe:
    return recipe_io.parse(TEXT, "toy.yaml", Recipe, settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = pipeline.train(toy(), tmp_path_factory.mktemp("runs") / "whole")
    return run


def test_the_stages_are_pre_training_and_the_student_alone(whole) -> None:
    manifest, result = whole.read_manifest(), read_json(whole.result_path)
    assert list(manifest["stages"]) == ["pretrain", "inner"]
    assert manifest["stages"]["pretrain"]["sha256"] == sha256_file(whole.pretrained_path)
    assert (result["teacher"], result["trusted"], result["baseline"]) == (None, None, None)
    pretrain = result["pretrain"]
    assert (pretrain["of"], pretrain["arch"], pretrain["steps"]) == ("student", "wide-resnet-10-1", 5)
    assert 0 <= pretrain["knn_accuracy"] <= 1
    assert set(result["training_flops"]) == {"pretrain", "inner", "total"}
    lines = [json.loads(line) for line in whole.metrics_path.read_text().splitlines()]
    told = [line for line in lines if line["stage"] == "pretrain"]
    assert {"knn_accuracy", "contrastive_accuracy"} <= set().union(*told)
    assert not any("kept_fraction" in line for line in lines if line["stage"] == "inner")


def test_its_file_holds_backbone_and_projection_and_no_classes(whole) -> None:
    tensors = load_file(whole.pretrained_path)
    assert {name.split(".")[0] for name in tensors} == {"backbone", "projection"}
    with pytest.raises(RunError, match="knows no classes yet"):
        load_model(whole.pretrained_path)
    weights = read_starting_weights(str(whole.pretrained_path), "resnet18")  # its own header knows better
    assert (weights.arch, weights.contrastive, weights.px, weights.halvings) == ("wide-resnet-10-1", True, 8, 2)


def test_the_student_starts_from_all_that_it_keeps(whole, tmp_path) -> None:
    """Linear evaluation changes the head alone, so that the start can be read from the student's file."""
    file = f"student.init={whole.pretrained_path}"
    run, _ = pipeline.train(toy("pretrain=null", file, "student.method.train=head"), tmp_path / "run")
    start, student = load_file(whole.pretrained_path), load_file(run.student_path)
    for name, tensor in student.items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, start[name.replace("neck.", "projection.")], rtol=0, atol=0)
    assert {name.split(".")[0] for name in student} == {"backbone", "neck", "head"}
    assert read_json(run.result_path)["pretrain"] is None
    loaded = load_model(run.student_path)
    assert loaded.spec.neck == 1
    assert loaded.num_params == sum(t.numel() for n, t in student.items() if "running" not in n and "tracked" not in n)


def test_another_runs_file_gives_what_the_runs_own_stage_gives(whole, tmp_path) -> None:
    # The head's fresh values, which a probe replaces, are drawn in the stage either way.
    run, _ = pipeline.train(toy("pretrain=null", f"student.init={whole.pretrained_path}"), tmp_path / "run")
    ours, theirs = load_file(run.student_path), load_file(whole.student_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    """Passes through `except Exception`, like a kill."""


class DiesIn(SilentDisplay.__mro__[1]):  # object: SilentDisplay is final
    """A display that pulls the plug at the second line of a stage."""

    def __init__(self, stage: str) -> None:
        self.wanted, self.now, self.lines = stage, "", 0

    def stage(self, name: str, total_steps: int) -> None:
        self.now = name

    def step(self, record: Any) -> None:
        self.lines += self.now == self.wanted
        if self.lines >= 3:
            raise Killed

    def say(self, sentence: str) -> None:
        pass


@pytest.mark.parametrize("stage", ["pretrain", "inner"])
def test_killed_and_resumed_the_files_are_the_same(whole, tmp_path, stage) -> None:
    with pytest.raises(Killed):
        pipeline.train(toy(), tmp_path / "run", display=DiesIn(stage))
    assert any(path.name.startswith(stage) for path in Run(tmp_path / "run").checkpoint_path.iterdir())
    run, _ = pipeline.train(toy(), tmp_path / "run", resume=True)
    for path in (run.pretrained_path, run.student_path):
        assert sha256_file(path) == sha256_file(whole.path / path.name)


def test_a_teacher_is_pre_trained_tuned_and_distilled_from_without_labels(tmp_path) -> None:
    """SimCLRv2's road, and self-distillation: the student has the teacher's architecture."""
    recipe = toy(
        "pretrain.of=teacher",
        "teacher={arch: wide-resnet-10-1, init: simclr, method: {kind: fine-tune}, optim: {total_steps: 3}}",
        "trust.filters=none",
        "student.init=null",
        "student.projection_layers=0",
        "student.method={labeled_weight: 0, unlabeled_weight: 0, distill: {views: same, temperature: 0.1}}",
    )
    run, result = pipeline.train(recipe, tmp_path / "run")
    assert list(run.read_manifest()["stages"]) == ["pretrain", "outer", "trusted", "inner"]
    assert result["teacher"]["arch"] == result["student"]["arch"]
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines() if '"inner"' in line]
    for line in lines:
        if "loss_distill" in line:
            assert line["loss"] == pytest.approx(line["loss_distill"])  # labels have no part in it


def test_the_baseline_starts_from_nothing(whole, tmp_path) -> None:
    small = ["baseline={enabled: true, optim: {total_steps: 2, labeled_batch: 8}}", "student.projection_layers=0"]
    own, _ = pipeline.train(toy(*small), tmp_path / "own")
    scratch, _ = pipeline.train(toy(*small, "pretrain=null", "student.init=null"), tmp_path / "scratch")
    assert sha256_file(own.baseline_path) == sha256_file(scratch.baseline_path)
    assert sha256_file(own.student_path) != sha256_file(scratch.student_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["pretrain=null"], r"student\.init is 'simclr', and the recipe has no pretrain"),
        (["pretrain.of=teacher"], r"pretrain\.of is 'teacher': a run pre-trains one"),
        (["student.init=null", "student.projection_layers=0"], "nothing starts from that: student.init is null"),
        (["pretrain=null", "student.init=null"], "there is no projection head to keep"),
        (
            ["pretrain=null", "student.init=null", "student.projection_layers=0", "student.method.train=head"],
            "features would be those of random weights",
        ),
        (["teacher={}"], "a teacher that nobody would ask"),
        (["student.method.kind=tune"], "'kd-fixmatch', 'fine-tune' was expected. Did you mean 'fine-tune'"),
        (["student.method.robust_loss=ce"], "is no key of a student.method of kind 'fine-tune'"),
        (["pretrain.optim.labeled_batch=4"], "set pretrain.batch instead"),
        (["pretrain.optim.ema_decay=0.9"], "is not averaged"),
        (
            ["pretrain.of=teacher", "teacher={ready: t.safetensors, init: simclr}", "student.init=teacher"],
            "one that is trained already",
        ),
    ],
)
def test_what_cannot_be_meant_is_told_when_the_recipe_is_read(settings, said) -> None:
    with pytest.raises(RecipeError, match=said):
        toy(*settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (
            ["pretrain=null", "student.init=FILE", "student.arch=wide-resnet-10-2"],
            DataError,
            "are of: wide-resnet-10-1",
        ),
        (["pretrain.batch=2000"], RecipeError, "there are 1257 training"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(whole, tmp_path, settings, error, said) -> None:
    with pytest.raises(error, match=said):
        pipeline.train(toy(*(each.replace("FILE", str(whole.pretrained_path)) for each in settings)), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_weights_without_a_projection_head_have_no_layer_to_keep(tmp_path, whole) -> None:
    plain, _ = pipeline.train(
        toy("pretrain=null", "student.init=null", "student.projection_layers=0"), tmp_path / "plain"
    )
    with pytest.raises(DataError, match="no projection head to keep layers of"):
        pipeline.train(toy("pretrain=null", f"student.init={plain.student_path}"), tmp_path / "run")
    # What was fine-tuned with one has it.
    tuned, _ = pipeline.train(toy("pretrain=null", f"student.init={whole.student_path}"), tmp_path / "tuned")
    assert load_model(tuned.student_path).spec.neck == 1


def test_old_recipes_mean_what_they_meant() -> None:
    recipe = recipe_io.parse(
        "schema: 1\nname: old\nstudent: {method: {robust_loss: ce}}\nteacher: {method: {unlabeled_weight: 0.5}}\n",
        "old.yaml",
        Recipe,
    )
    assert recipe.teacher is not None
    assert (recipe.teacher.method.kind, recipe.student.method.kind) == ("fixmatch", "kd-fixmatch")
    assert toy().student.method == FineTuneConfig()


def test_a_run_of_before_there_was_pre_training_is_gone_on_with(whole) -> None:
    recipe = recipe_io.load("tiny", ["baseline.enabled=false"])
    older = recipe.model_dump(mode="json")
    for gone in (older, older["teacher"], older["student"], older["teacher"]["method"], older["student"]["method"]):
        for key in ("pretrain", "kind", "projection_layers"):
            gone.pop(key, None)
    older["teacher"]["head"] = older["student"]["head"] = "probe"  # it was the default
    run = Run(whole.path.parent / "older")
    run.path.mkdir()
    run.update_manifest(recipe=older, status="running")
    assert check_folder(run, recipe, torch.device("cpu"), True) is None
    with pytest.raises(RunError, match=r"student\.width was 0\.25, now 0\.5"):
        check_folder(
            run, recipe_io.load("tiny", ["baseline.enabled=false", "student.width=0.5"]), torch.device("cpu"), True
        )
