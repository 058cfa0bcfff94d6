"""`kdedge study simclr`: the plan, the rows, resumption, equal teachers, refusals. Nothing is trained."""

import dataclasses
import functools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kdedge import recipe_io
from kdedge.cli import run as kdedge
from kdedge.data import make_splits, open_source
from kdedge.data.pack import pack
from kdedge.errors import DataError, RecipeError, RunError
from kdedge.recipe import Recipe
from kdedge.runs import Run, read_json, write_bytes, write_json
from kdedge_bench import study_match, work
from kdedge_bench.study import derived_recipe, study
from kdedge_bench.study_match import closest, held_out
from kdedge_bench.study_plan import StudyPlan, make_study_plan, shipped_plans
from kdedge_bench.study_rows import study_jobs, study_rows, subset
from kdedge_bench.work import Work

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = [ROOT / "benchmarks" / "studies" / "simclr-cpu.yaml"]
FEW = ("fine_tuning=null", "distillation.same_steps=[30, 60]", "distillation.other_steps=[60]", "transfer.classes=[2]")
MEAN = (0.1253,)
GAIN = {"linear": 0.05, "fine-tuned": 0.08, "first-layer": 0.1, "scratch": 0.0}


@functools.cache
def splits_of(labels: int | None, seed: int, spec: str) -> Any:
    source = open_source("digits")
    return make_splits(source, labels, seed).to_json(source) | {"spec": spec}


class FakeTraining:
    """Stands for `kdedge.pipeline.train`: the same files, in a moment. `stop_at` is the run that is cut off."""

    def __init__(self, stop_at: str | None = None, lose: str | None = None) -> None:
        self.made: list[tuple[str, bool]] = []
        self.recipes: dict[str, Recipe] = {}
        self.stop_at, self.lose = stop_at, lose

    def __call__(self, recipe: Recipe, out: Path, *, resume: bool, display: Any) -> None:
        run, name = Run(out), out.name
        assert resume == run.manifest_path.is_file()
        self.made.append((name, resume))
        self.recipes[name] = recipe
        manifest = {"recipe": recipe.model_dump(mode="json"), "device": "cpu", "device_type": "cpu", "stages": {}}
        run.update_manifest(status="running", **manifest)
        if name == self.stop_at:
            raise KeyboardInterrupt
        if name == self.lose:
            write_json(run.failure_path, {"step": 1})
            raise RunError("The loss of stage inner became nan at step 1.")
        measured = {"mean": MEAN, "std": (0.25,)} if recipe.pretrain else {}
        resolved = recipe.model_copy(update={"data": recipe.data.model_copy(update=measured)})
        write_bytes(run.recipe_path, recipe_io.dump(resolved).encode())
        write_json(run.splits_path, splits_of(40, recipe.seed, recipe.data.spec))
        write_json(run.result_path, result(recipe, name))
        run.update_manifest(status="finished")


def result(recipe: Recipe, name: str) -> dict[str, Any]:
    """Known numbers: each way gains its share, less as classes grow; the same family teaches a point better."""
    way = name.rpartition("-s")[0]
    gain = next((value for key, value in GAIN.items() if way.endswith(key)), 0.0)
    if way.startswith(("classes", "to")):
        gain *= 2 / len(recipe.data.classes or range(10))
    if way.startswith("student"):
        gain = {"alone": 0.0, "same": 0.03, "other": 0.02, "self": 0.01}[way.split("-")[1]]
    accuracy = 0.8 + gain + 0.001 * recipe.seed * (1 + 5 * gain)
    return {
        "student": {"arch": "s", "params": 2, "test_accuracy": accuracy},
        "pretrain": {"knn_accuracy": 0.7} if recipe.pretrain else None,
        "training_flops": {"inner": 600, "total": 600},
        "seconds": 10.0,
        "test_images": 540,
    }


def plan(*settings: str, **changes: Any) -> StudyPlan:
    return make_study_plan(settings=settings, **({"seeds": 2} | changes))


@pytest.fixture(autouse=True)
def known_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy on held-out images: the same family's teachers are better, and steps help."""

    def accuracy(run: Run, *_: Any) -> float:
        _, who, rest = run.path.name.split("-", 2)
        return (0.9 if who == "same" else 0.85) + 0.001 * int(rest.partition("-")[0])

    monkeypatch.setattr(study_match, "_accuracy", accuracy)


def test_every_plan_is_one_and_its_rows_are_recipes() -> None:
    """Those that ship, and those that are committed, whose sets are not here: digits stands for each."""
    assert set(shipped_plans()) == {"digits"}
    for origin in [*shipped_plans(), *map(str, COMMITTED)]:
        whole = make_study_plan(origin, data=["digits"])
        for row in study_rows(whole):
            assert derived_recipe(whole, row, 0, "a", "b").name == row.name


def test_each_network_is_pretrained_once_and_comes_before_what_starts_from_it() -> None:
    asked = plan()
    rows, names = study_rows(asked), [job.name for job in study_jobs(study_rows(asked), (3, 4))]
    assert names[:3] == [
        f"pretrain-{name}-s3" for name in ("wide-resnet-10-1", "wide-resnet-10-2", "shufflenet-v2-x0.5")
    ]
    assert [row.name for row in rows if row.pretrains] == [name.removesuffix("-s3") for name in names[:3]]
    assert len(names) == len(set(names)) == 2 * len(rows)
    for job in study_jobs(rows, (3,)):
        assert all(names.index(need) < names.index(job.name) for need in job.needs)


def test_each_row_is_the_recipe_it_says(tmp_path: Path) -> None:
    train = FakeTraining()
    study(plan(seeds=1), tmp_path / "v", Work(train=train))
    made, folder = train.recipes, tmp_path / "v"
    start = str(folder / "pretrain-wide-resnet-10-1-s0" / "pretrained.safetensors")

    def student(name: str) -> Any:
        return made[name].student

    assert made["pretrain-wide-resnet-10-1-s0"].pretrain is not None
    assert student("pretrain-wide-resnet-10-1-s0").init == "simclr"
    ways = {way: student(f"labels-10-{way}-s0") for way in GAIN}
    assert {way: each.init for way, each in ways.items()} == dict.fromkeys(GAIN, start) | {"scratch": None}
    assert [ways[way].projection_layers for way in GAIN] == [0, 0, 1, 0]
    assert [ways[way].method.train for way in GAIN] == ["head", "all", "all", "all"]
    assert all(made[f"labels-10-{way}-s0"].pretrain is None for way in GAIN)
    assert {made[f"labels-10-{way}-s0"].data.labels for way in GAIN} == {10}
    few = made["classes-2-fine-tuned-s0"].data
    assert (few.labels, list(few.classes or ())) == (8, subset([str(digit) for digit in range(10)], 2, 0))
    assert made["classes-10-scratch-s0"].data.classes is None
    taught, alone = made["student-same-unlabeled-s0"], made["student-alone-s0"]
    assert taught.student.optim == alone.student.optim
    assert taught.trust.filters == "none"
    assert taught.student.method.labeled_weight == 0
    assert (alone.teacher, alone.student.init, taught.student.init) == (None, None, None)


def test_the_classes_of_a_subset_are_drawn_and_nested() -> None:
    names = [str(digit) for digit in range(10)]
    for seed in range(5):
        assert set(subset(names, 2, seed)) < set(subset(names, 5, seed)) < set(names)
    assert len({tuple(subset(names, 2, seed)) for seed in range(5)}) > 1


def test_the_most_accurate_pair_within_the_margin_teaches() -> None:
    same, other = {"a": 0.7, "b": 0.8, "c": 0.9}, {"x": 0.69, "y": 0.81}
    assert closest(same, other, 0.02) == ("b", "y")
    assert closest(same, other, 0.1) == ("c", "y")
    assert closest(same, other, 0.005) == ("a", "x")  # none is within: the closest
    assert closest({"a": 0.5}, {"x": 0.9}, 0.02) == ("a", "x")


def test_teachers_are_matched_on_images_that_are_not_labeled(tmp_path: Path) -> None:
    source = open_source("digits")
    splits = make_splits(source, 500, 1)
    found = held_out(splits, 300, 1)
    assert len(set(found)) == 300
    assert not set(found) & {*splits.labeled, *splits.val, *splits.test}
    train = FakeTraining()
    document = study(plan(seeds=1), tmp_path / "v", Work(train=train))
    match = document["analyses"]["distillation"]["matches"]["0"]
    # 0.9 + steps / 1000 against 0.85 + steps / 1000: 0.96 and 0.97 are a point apart
    assert (match["same"], match["other"], match["within"]) == ("teacher-same-60", "teacher-other-120", True)
    ready = {name: (train.recipes[f"student-{name}-s0"].teacher or Any).ready for name in ("same", "other", "self")}
    taught_by = {name: Path(file or "").parent.name for name, file in ready.items()}
    assert taught_by == {"same": "teacher-same-60-s0", "other": "teacher-other-120-s0", "self": "teacher-self-60-s0"}
    with pytest.raises(DataError, match="no two teachers can be found equally accurate"):
        held_out(dataclasses.replace(splits, unlabeled=splits.labeled), 300, 1)


@pytest.mark.parametrize("at", ["pretrain-wide-resnet-10-2-s0", "teacher-other-60-s1", "student-same-s0"])
def test_a_study_stopped_anywhere_goes_on_there(at: str, tmp_path: Path) -> None:
    first, second = FakeTraining(stop_at=at), FakeTraining()
    asked = plan(*FEW)
    with pytest.raises(KeyboardInterrupt):
        study(asked, tmp_path / "v", Work(train=first))
    partial = read_json(tmp_path / "v" / "study.json")
    assert (partial["status"], partial["runs_finished"]) == ("partial", len(first.made) - 1)
    assert "partial" in (tmp_path / "v" / "study.html").read_text()
    document = study(asked, tmp_path / "v", Work(train=second))
    assert second.made[0] == (at, True)
    assert len(first.made) + len(second.made) == document["runs_planned"] + 1
    assert document == read_json(tmp_path / "v" / "study.json")
    third = FakeTraining()
    assert study(asked, tmp_path / "v", Work(train=third))["status"] == "complete"
    assert third.made == []


def test_a_run_whose_numbers_are_lost_costs_only_those_that_need_it(tmp_path: Path) -> None:
    train, told = FakeTraining(lose="teacher-self-60-s0"), list[str]()
    with pytest.raises(RunError, match=r"teacher-self-60-s0, student-self-s0, student-self-unlabeled-s0 could not be"):
        study(plan(*FEW, seeds=1), tmp_path / "v", Work(train=train, say=told.append))
    document = read_json(tmp_path / "v" / "study.json")
    assert document["runs_planned"] - document["runs_finished"] == 3
    assert train.made[-1][0] == "classes-10-scratch-s0"
    assert any(said.startswith("teacher-self-60, seed 0 is lost: The loss") for said in told)
    again = FakeTraining()
    assert study(plan(*FEW, seeds=1), tmp_path / "v", Work(train=again))["status"] == "complete"
    assert [name for name, _ in again.made] == ["teacher-self-60-s0", "student-self-s0", "student-self-unlabeled-s0"]


def test_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(plan(), tmp_path / "v", Work(train=FakeTraining("labels-10-linear-s0")))
    with pytest.raises(RunError, match=r"The study in .* was planned otherwise: .*tune.total_steps was 60, now 61"):
        study(plan("tune.total_steps=61", "scratch.total_steps=61"), tmp_path / "v", Work(train=FakeTraining()))
    with pytest.raises(RunError, match=r"seeds was \[0, 1\], now \[0\]"):
        study(plan(seeds=1), tmp_path / "v", Work(train=FakeTraining()))
    rules = read_json(tmp_path / "v" / "plan.json")["rules"]
    assert set(rules) == {"few-labels", "H1", "H2"}  # what answers is in the plan, before the first run


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["tune.total_steps=61"], "the same budget"),
        (["distillation.other={arch: wide-resnet-16-1}"], "of the student's own family"),
        (["distillation.same={arch: mobilenet-v2}"], "not of the student's family"),
        (["data.labels=40"], "use `sets`"),
        (["distillation.same_steps=[15, 30, 15]"], "15 steps are named 2 times"),
        (["fine_tuning.labels=[]"], "fine_tuning.labels"),
        (["fine_tuning.labels=['0%']"], "'0%' is no number of labels"),
        (["fine_tuning=null", "distillation=null", "transfer=null"], "none of fine_tuning, distillation and transfer"),
        (["transfer.subsets_of=mnist"], "none of the sets: digits"),
        (["networks={}"], "network"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_sentence(settings: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        plan(*settings)


def colours(folder: Path, px: int) -> str:
    """3 classes of 5 images, and as many test images."""
    for part in ("train", "test"):
        for kind in range(3):
            for number in range(5):
                path = folder / part / f"c{kind}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (px, px), (40 * kind, number, 9)).save(path)
    return str(folder)


SMALL = ("fine_tuning=null", "distillation=null", "transfer.labels_per_class=2")


def test_every_run_sees_images_of_one_size(tmp_path: Path) -> None:
    """Else what starts from scratch on another set would see it at that set's own."""
    photos, icons = colours(tmp_path / "photos", 90), colours(tmp_path / "icons", 20)
    for sets, input_px, channels in (([photos, icons, "digits"], 32, 3), ([icons, photos], 20, 3), (["digits"], 8, 1)):
        asked = plan(*SMALL, data=sets)
        for row in study_rows(asked):
            data = derived_recipe(asked, row, 0, "a", "b").data
            assert (data.image_px, data.channels) == (input_px, channels)
    with pytest.raises(RecipeError, match="A set is named twice"):
        plan(*SMALL, data=[photos, photos])
    train = FakeTraining()
    study(
        plan(*SMALL, "pretrain.optim.total_steps=2", data=["digits", icons], seeds=1), tmp_path / "v", Work(train=train)
    )
    ways = [train.recipes[f"to-icons-{way}-s0"].data for way in ("linear", "fine-tuned", "scratch")]
    assert ways[0] == ways[1] == ways[2]
    assert "are among the images of digits was not looked for" in (tmp_path / "v" / "study.md").read_text()
    # what starts from scratch, on whatever set, is normalised as what was pre-trained
    assert {(data.mean, data.std) for name, data in read_by(train) if "pretrain" not in name} == {(MEAN, (0.25,))}


def read_by(train: FakeTraining) -> list[tuple[str, Any]]:
    return [(name, recipe.data) for name, recipe in train.recipes.items()]


def test_what_a_pack_has_lost_is_not_asked_for(tmp_path: Path) -> None:
    colours(tmp_path / "icons", 20)
    packed, grey = str(tmp_path / "icons.pack"), str(tmp_path / "grey.pack")
    pack(open_source(str(tmp_path / "icons")), Path(packed), px=12)
    pack(open_source(str(tmp_path / "icons")), Path(grey), px=20, channels=1)
    assert plan(*SMALL, data=["digits", grey]).config.data.channels == 1
    with pytest.raises(DataError, match=r"packed at 12 x 12 px .*; 20 x 20 with 3 are asked for"):
        plan(*SMALL, data=[str(tmp_path / "icons"), packed])


def test_label_counts_that_are_one_number_are_one_row(tmp_path: Path) -> None:
    """Else some jobs are counted twice and the study never ends."""
    asked = plan("fine_tuning.labels=[10, '1%', 120, 10]", "distillation=null", "transfer=null", seeds=1)
    names = [row.name for row in study_rows(asked)]
    assert len(names) == len(set(names)) == 1 + 2 * 4
    document = study(asked, tmp_path / "v", Work(train=FakeTraining()))
    assert document["status"] == "complete"
    assert "| 10 (10, 1%) |" in (tmp_path / "v" / "study.md").read_text()


def test_labels_that_a_set_does_not_have_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"15 labels do not work for digits: a multiple of its 10 classes"):
        plan("fine_tuning.labels=[15]")
    with pytest.raises(DataError, match="at most 1220"):
        plan("distillation.labels=5000")
    only = colours(tmp_path / "icons", 20)  # the set whose classes are counted, where there is no other
    with pytest.raises(DataError, match=r"18 labels do not work for icons.*at most 15"):
        plan(*SMALL[:2], "transfer.labels_per_class=6", data=[only])


def test_a_plan_that_does_not_exist_has_a_hint() -> None:
    with pytest.raises(RecipeError, match=r"There is no study plan 'digit'; there are digits.*Did you mean 'digits'"):
        plan(origin="digit")


def test_the_command_goes_on_with_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained_by(train: FakeTraining) -> None:
        monkeypatch.setattr(work, "Work", lambda display, say: Work(display, say, train))

    trained_by(FakeTraining("labels-10-linear-s0"))
    left_out = ["--set", "distillation=null", "--set", "transfer=null"]
    words = ["study", "simclr", "--seeds", "1", *left_out, "--out", str(tmp_path / "v"), "--json"]
    assert kdedge(words) == 130
    again = json.loads(capsys.readouterr().out)["error"].partition("Go on with: kdedge ")[2]
    assert shlex.split(again)[:2] == ["study", "simclr"]
    trained_by(FakeTraining())
    assert kdedge([*shlex.split(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "complete"
