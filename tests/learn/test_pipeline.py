"""The stages on digits, at toy size: what is written, what is resumed, what is refused."""

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdedge import pipeline, recipe_io, stages
from kdedge.data import open_source
from kdedge.data.pack import pack
from kdedge.errors import DataError, DeviceError, MissingPackage, RunError
from kdedge.models.weights import load_model
from kdedge.predictions import read_predictions
from kdedge.run_folder import check_folder
from kdedge.runs import Run, latest_finished, open_finished, read_json, sha256_file
from kdedge.train.metrics import SilentDisplay

SMALL = [
    "teacher.optim.total_steps=12",
    "student.optim.total_steps=6",
    "baseline.optim.total_steps=4",
    "trust.threshold=0.2",
    "engine.checkpoint_every_s=0",
]


def tiny(*settings: str, **flags: Any) -> Any:
    return recipe_io.load("tiny", [*SMALL, *settings], **flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = pipeline.train(tiny(), tmp_path_factory.mktemp("runs") / "whole")
    return run


def test_a_run_leaves_exactly_the_files_of_the_contract(whole) -> None:
    assert sorted(p.name for p in whole.path.iterdir() if p.name != ".lock") == [
        "baseline.safetensors", "manifest.json", "metrics.jsonl", "predictions.npz", "recipe.yaml", "result.json",
        "splits.json", "student.safetensors", "teacher.safetensors", "trusted.npz",
    ]  # fmt: skip
    manifest = whole.read_manifest()
    assert (manifest["status"], manifest["schema"]) == ("finished", 1)
    assert set(manifest["stages"]) == {"baseline", "outer", "trusted", "inner"}
    for stage, name in (("baseline", "baseline"), ("outer", "teacher"), ("inner", "student")):
        assert manifest["stages"][stage]["sha256"] == sha256_file(whole.path / f"{name}.safetensors")
        assert manifest["engine_plan"][stage]["plan"]["threads"] == 1


def test_the_result_says_what_the_files_hold(whole) -> None:
    result = read_json(whole.result_path)
    assert {"schema", "recipe", "data", "labels", "seed", "teacher", "student", "baseline", "trusted"} <= set(result)
    assert (result["data"], result["labels"], result["seed"]) == ("digits", 40, 0)
    predictions = read_predictions(whole)
    labels = predictions["test_label"]
    assert len(labels) == 540 == result["test_images"]
    for name in ("teacher", "student", "baseline"):
        logits = predictions[f"test_logits__{name}"]
        assert logits.shape == (540, 10)
        assert result[name]["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-12)
        assert result[name]["val_accuracy"] is None  # four labels a class: nothing is chosen
        assert result[name]["params"] == load_model(whole.path / f"{name}.safetensors").num_params


def test_the_student_file_gives_the_logits_that_were_scored(whole) -> None:
    loaded, predictions = load_model(whole.student_path), read_predictions(whole)
    source = open_source("digits")
    index = [source.ids.index(i) for i in predictions["test_id"][:50]]
    images = source.load(index, loaded.preprocess).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        logits = loaded.module(torch.from_numpy(loaded.preprocess.normalize(images)))
    np.testing.assert_allclose(logits, predictions["test_logits__student"][:50], rtol=1e-3, atol=1e-4)


def test_metrics_carry_what_the_report_draws(whole) -> None:
    lines = [json.loads(line) for line in whole.metrics_path.read_text().splitlines()]
    assert [line["stage"] for line in lines if line["step"] == line["total_steps"]] == [
        "baseline", "outer", "trusted", "inner",
    ]  # fmt: skip
    inner = [line for line in lines if line["stage"] == "inner"]
    for line in inner:
        assert 0 <= line["kept_fraction"] <= 1
        assert len(line["pseudo_label_histogram"]) == 10
        assert {"loss", "lr", "loss_labeled", "loss_unlabeled", "images_per_second", "loader_wait_fraction"} <= set(
            line
        )


def test_the_same_seed_gives_the_same_files_and_another_does_not(whole, tmp_path) -> None:
    again, _ = pipeline.train(tiny(), tmp_path / "again")
    other, _ = pipeline.train(tiny(seed=1), tmp_path / "other")
    for name in ("teacher.safetensors", "student.safetensors", "baseline.safetensors"):
        assert sha256_file(again.path / name) == sha256_file(whole.path / name)
        assert sha256_file(other.path / name) != sha256_file(whole.path / name)
    test = [set(read_json(run.splits_path)["splits"]["test"]["ids"]) for run in (whole, other)]
    labeled = [set(read_json(run.splits_path)["splits"]["labeled"]["ids"]) for run in (whole, other)]
    assert test[0] == test[1]  # the seed draws the labels only
    assert labeled[0] != labeled[1]


class Killed(BaseException):
    """Passes through `except Exception`, like a kill."""


class DiesAfter(SilentDisplay.__mro__[1]):  # object: SilentDisplay is final
    """A display that pulls the plug at the n-th line of a stage."""

    def __init__(self, stage: str, lines: int) -> None:
        self.left, self.wanted, self.now = lines, stage, ""

    def stage(self, name: str, total_steps: int) -> None:
        self.now = name
        if self.now == self.wanted and self.left == 0:
            raise Killed

    def step(self, record: Any) -> None:
        if self.now == self.wanted:
            self.left -= 1
            if self.left <= 0:
                raise Killed

    def say(self, sentence: str) -> None:
        pass


@pytest.mark.parametrize(("stage", "lines"), [("outer", 0), ("inner", 1)])
def test_killed_and_resumed_the_files_are_the_same(whole, tmp_path, stage, lines) -> None:
    """On digits; in every stage, at chosen writes and any moment: journeys/test_faults.py."""
    every = "engine.log_every_steps=2"
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        pipeline.train(tiny(every), out, display=DiesAfter(stage, lines))
    assert Run(out).read_manifest()["status"] != "finished"
    run, _ = pipeline.train(tiny(every), out, resume=True)
    for name in ("teacher.safetensors", "student.safetensors", "baseline.safetensors", "trusted.npz"):
        left, right = run.path / name, whole.path / name
        if name == "trusted.npz":  # a zip carries the time of day
            with np.load(left) as a, np.load(right) as b:
                for key in a.files:
                    np.testing.assert_array_equal(a[key], b[key])
        else:
            assert sha256_file(left) == sha256_file(right)
    assert not run.checkpoint_path.exists()


def test_an_existing_run_is_never_overwritten(whole) -> None:
    before = sha256_file(whole.student_path)
    with pytest.raises(RunError, match="is finished"):
        pipeline.train(tiny(), whole.path)
    assert sha256_file(whole.student_path) == before
    _, result = pipeline.train(tiny(), whole.path, resume=True)  # finished: says so, does nothing
    assert result == read_json(whole.result_path)


def test_resume_refuses_another_recipe_and_shows_the_difference(whole, tmp_path) -> None:
    with pytest.raises(RunError, match=r"student\.width was 0\.25, now 0\.5"):
        pipeline.train(tiny("student.width=0.5"), whole.path, resume=True)
    with pytest.raises(RunError, match="nothing to resume"):
        pipeline.train(tiny(), tmp_path / "none", resume=True)


def test_a_folder_that_is_no_run_is_not_touched(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(RunError, match="is no run of kdedge"):
        pipeline.train(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_at_its_first_write_can_be_started_again(tmp_path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.0123abcd.part").write_text("{")
    with pytest.raises(RunError, match="nothing to resume"):
        pipeline.train(tiny(), tmp_path, resume=True)
    assert check_folder(Run(tmp_path), tiny(), torch.device("cpu"), False) is None
    (tmp_path / ".git").mkdir()
    with pytest.raises(RunError, match="is no run of kdedge"):
        pipeline.train(tiny(), tmp_path)


def test_the_latest_finished_run_is_found(whole, tmp_path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        latest_finished(tmp_path)
    shutil.copytree(whole.path, tmp_path / "one")
    (tmp_path / "stray").mkdir()
    assert latest_finished(tmp_path).path == tmp_path / "one"
    Run(tmp_path / "one").update_manifest(status="running")
    with pytest.raises(RunError, match="not finished"):
        open_finished(tmp_path / "one")


def test_a_failure_is_noted_and_what_was_done_is_kept(tmp_path, whole, monkeypatch) -> None:
    broken = tiny("student.optim.learning_rate=1.0e+30")
    with pytest.raises(RunError, match=r"of stage inner (became|had|were no longer)"):
        pipeline.train(broken, tmp_path / "run")
    manifest = Run(tmp_path / "run").read_manifest()
    assert manifest["status"] == "failed"
    assert "learning_rate" in manifest["failure"]
    assert sha256_file(tmp_path / "run" / "teacher.safetensors") == sha256_file(whole.teacher_path)
    before = {path.name: sha256_file(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # a replay logs nothing
    looked_at = tiny("student.optim.learning_rate=1.0e+30", "engine.tensorboard=true", "engine.device=cpu")
    run, replayed = pipeline.replay(looked_at, tmp_path / "run")
    assert {path.name: sha256_file(path) for path in run.path.rglob("*") if path.is_file()} == before
    failure = read_json(run.failure_path)
    assert (replayed.replay.stage, replayed.replay.step) == ("inner", failure["step"])
    assert replayed.replay.lost
    assert len(replayed.labeled) == len(failure["positions"]["labeled"]) > 0
    assert set(replayed.unlabeled) < set(open_source("digits").ids)
    with pytest.raises(RunError, match="has lost no step"):
        pipeline.replay(tiny(), whole.path)


def test_a_removed_or_altered_file_is_made_anew(tmp_path, whole) -> None:
    shutil.copytree(whole.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.update_manifest(status="running")
    run.trusted_path.unlink()
    run.student_path.write_bytes(b"damaged")
    pipeline.train(tiny(), run.path, resume=True)
    assert sha256_file(run.student_path) == sha256_file(whole.student_path)
    assert sha256_file(run.teacher_path) == sha256_file(whole.teacher_path)


def test_reports_of_pseudo_labels_leave_out_what_was_taught(tmp_path) -> None:
    """labeled/ + unlabeled/: nothing is known of the unlabeled ones, so there is no precision to report."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "bright")):
        for folder in (f"labeled/{name}", "unlabeled", f"test/{name}"):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            for i in range(6):
                pixels = (rng.integers(0, 60, (12, 12, 3)) + 150 * k).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{name}{i}.png")
    run, result = pipeline.train(tiny(data=str(tmp_path / "data")), tmp_path / "run")
    assert result["trusted"]["precision"] is None
    assert result["trusted"]["precision_before_filters"] is None
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert {line["pseudo_label_accuracy"] for line in lines if "pseudo_label_accuracy" in line} == {None}


def test_nothing_is_written_where_the_networks_do_not_fit(tmp_path, whole) -> None:
    with pytest.raises(DataError, match="do not fit the network"):
        pipeline.train(tiny(f"teacher.init={whole.teacher_path}", "teacher.arch=wide-resnet-16-2"), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path) -> None:
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match="Another kdedge is training"), Run(tmp_path / "run").lock():
        pass


def test_starting_weights_change_the_run_and_its_input(tmp_path, whole) -> None:
    teacher = str(whole.teacher_path)
    run, _ = pipeline.train(tiny(f"teacher.init={teacher}", seed=1), tmp_path / "run")
    assert sha256_file(run.teacher_path) != sha256_file(whole.teacher_path)
    # the normalisation is that of the weights' own images
    assert load_model(run.teacher_path).preprocess == load_model(whole.teacher_path).preprocess


def test_where_memory_runs_out_the_stage_goes_on_in_smaller_parts(tmp_path, monkeypatch) -> None:
    fitted, said = [], []
    display = SilentDisplay()
    monkeypatch.setattr(display, "say", said.append)

    def short_of_memory(method, batches, optim, engine, plan, checkpoints, *rest, **more):
        fitted.append((checkpoints.stage, plan.parts))
        if checkpoints.stage == "outer" and plan.parts < 4:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return fit(method, batches, optim, engine, plan, checkpoints, *rest, **more)

    fit = stages.fit
    monkeypatch.setattr(stages, "fit", short_of_memory)
    run, _ = pipeline.train(tiny("baseline.enabled=false"), tmp_path / "run", display=display)
    assert fitted == [("outer", 1), ("outer", 2), ("outer", 4), ("inner", 1)]
    assert run.read_manifest()["engine_plan"]["outer"]["plan"]["parts"] == 4
    assert sum("20 GiB" in sentence and "parts" in sentence for sentence in said) == 2


def test_where_memory_runs_out_while_plans_are_measured_the_batch_is_halved_too(tmp_path, monkeypatch) -> None:
    def short_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(stages, "measure_plan", short_of_memory)
    run, _ = pipeline.train(tiny("baseline.enabled=false", "engine.plan=null"), tmp_path / "run")
    plans = run.read_manifest()["engine_plan"]
    assert [plans[stage]["plan"]["parts"] for stage in ("outer", "inner")] == [2, 2]


def test_memory_that_does_not_suffice_for_one_image_is_an_error(tmp_path, monkeypatch) -> None:
    def short_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(stages, "fit", short_of_memory)
    with pytest.raises(DeviceError, match="20 GiB"):
        pipeline.train(tiny(), tmp_path / "run")


def test_images_streamed_from_a_packed_file_train_the_same_weights(whole, tmp_path) -> None:
    pack(open_source("digits"), tmp_path / "digits.kdpack")
    packed = {"data": str(tmp_path / "digits.kdpack"), "labels": 40}
    run, _ = pipeline.train(tiny("data.resident_mib=0", **packed), tmp_path / "run")
    for name in ("baseline", "teacher", "student"):
        ours, theirs = run.path / f"{name}.safetensors", whole.path / f"{name}.safetensors"
        assert sha256_file(ours) == sha256_file(theirs)
    with pytest.raises(DataError, match="kdedge data pack digits"):
        pipeline.train(tiny("data.resident_mib=0"), tmp_path / "unpacked")


def test_a_run_reads_a_packed_set_as_it_was_packed(tmp_path) -> None:
    draw = np.random.default_rng(0)
    for k, i in np.ndindex(2, 8):
        path = tmp_path / "set" / f"class-{k}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    pack(open_source(str(tmp_path / "set")), tmp_path / "grey.kdpack", px=16, channels=1)
    recipe = tiny("data.image_px=null", data=str(tmp_path / "grey.kdpack"), labels=4)
    _, result = pipeline.train(recipe, tmp_path / "run")
    assert result["input"] == [1, 16, 16]


def test_a_missing_package_ends_a_run_that_can_be_gone_on_with(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackage, match="tensorboard"):
        pipeline.train(tiny("engine.tensorboard=true"), tmp_path / "run")
    assert Run(tmp_path / "run").read_manifest()["status"] == "failed"
