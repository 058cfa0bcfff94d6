"""`kdedge verdict`: the rows, their order, resumption, two processes, refusals. Nothing is trained but in one test."""

import contextlib
import itertools
import json
import multiprocessing
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdedge import recipe_io
from kdedge.cli import run as kdedge
from kdedge.errors import RecipeError, RunError
from kdedge.recipe import Recipe
from kdedge.run_folder import check_folder
from kdedge.runs import Run, read_json, sha256_file, write_bytes, write_json
from kdedge_bench.verdict import verdict
from kdedge_bench.verdict_plan import SPELLINGS, Plan, make_plan
from kdedge_bench.verdict_rows import ROWS, choose, equal_total_steps, jobs, merged, settings_of
from kdedge_bench.work_folder import WorkFolder

MAIN = ["kd-fixmatch", "fixmatch", "fixmatch-equal-total", "kd-only"]
ABLATIONS = ["no-clustering", "no-confidence", "no-sce", "no-soft-kd"]
STEPS = 60  # of tiny's student
FLOPS = {"outer": 900, "trusted": 50, "inner": 600}


class FakeTraining:
    """Stands for `kdedge.pipeline.train`: the same files, in a moment. `stop_at` is the run that is cut off."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.made: list[tuple[str, bool]] = []
        self.stop_at = stop_at

    def __call__(self, recipe: Recipe, out: Path, *, resume: bool, display: Any) -> None:
        run, name = Run(out), out.name
        assert resume == run.manifest_path.is_file()
        self.made.append((name, resume))
        manifest = {"recipe": recipe.model_dump(mode="json"), "device": "cpu", "device_type": "cpu", "stages": {}}
        run.update_manifest(status="running", **manifest)
        if name == self.stop_at:
            raise KeyboardInterrupt
        steps = recipe.student.optim.total_steps or 0
        optim = f"optim: {{total_steps: {steps}}}"
        text = f"schema: 1\nname: tiny\ndata: {{image_px: 8}}\nstudent: {{{optim}}}\nbaseline: {{{optim}}}\n"
        run.recipe_path.write_text(text)
        split = {"labeled": {"sha256": f"{recipe.seed}"}, "test": {"sha256": "the same"}}
        write_json(run.splits_path, {"splits": split})
        write_json(run.result_path, result(recipe, steps))
        run.update_manifest(status="finished")


def result(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Known numbers: the student's accuracy falls by a point for each thing that is left out."""
    flops = {"inner": FLOPS["inner"] * steps // STEPS}
    method, teacher = recipe.student.method, recipe.teacher
    lost = [teacher is None, recipe.trust.filters != "confidence+clusters", method.robust_loss == "ce"]
    lost += [method.unlabeled_weight == 0, method.distill.loss == "none"]
    if teacher is not None:
        flops |= {"outer": FLOPS["outer"] if teacher.ready is None else 0, "trusted": FLOPS["trusted"]}
    total = sum(flops.values())
    baseline = {"arch": "a", "params": 1, "test_accuracy": 0.5, "seconds": 7.0} if recipe.baseline.enabled else None
    if baseline:
        flops["baseline"] = 30
    trained = teacher is not None and teacher.ready is None
    return {
        "teacher": teacher and {"arch": "t", "params": 9, "test_accuracy": 0.97, "seconds": 20.0 if trained else 0.0},
        "student": {"arch": "s", "params": 2, "test_accuracy": 0.9 + 0.001 * recipe.seed - 0.01 * sum(lost)},
        "baseline": baseline,
        "trusted": teacher and {"precision": 0.97, "confidence_only_precision": 0.96 - 0.001 * recipe.seed},
        "training_flops": flops | {"total": total},
        "seconds": 10.0 + (20.0 if trained else 0.0) + (7.0 if baseline else 0.0),
        "test_images": 540,
        "input": [1, 8, 8],
    }


def plan(*settings: str, **changes: Any) -> Plan:
    return make_plan("tiny", settings, **({"seeds": (0, 1), "labels": 40} | changes))


def test_the_rows_are_those_of_the_issue_and_bring_what_they_need() -> None:
    assert [row.name for row in choose(None)] == ["kd-fixmatch", "fixmatch", "supervised", *MAIN[2:], *ABLATIONS]
    assert [row.name for row in choose(["supervised"])] == ["kd-fixmatch", "fixmatch", "supervised"]
    assert [row.name for row in choose(["fixmatch-equal-total"])] == MAIN[:3]
    assert [row.name for row in choose(["no-sce"])] == ["kd-fixmatch", "no-sce"]
    with pytest.raises(RecipeError, match=r"'no-sec' is no row of a verdict; .* Did you mean 'no-sce'"):
        choose(["no-sec"])


def test_main_rows_of_all_seeds_come_before_the_ablations() -> None:
    names = [job.name for job in jobs(choose(None), (3, 4))]
    assert names == [f"{row}-s{seed}" for rows in (MAIN, ABLATIONS) for seed in (3, 4) for row in rows]


@pytest.mark.parametrize(
    ("total", "alone", "steps", "expected"),
    [(1550, 600, 60, 155), (1000, 600, 60, 100), (500, 600, 60, 60), (1_006, 600, 60, 101)],
)
def test_equal_total_steps_cost_what_all_stages_did(total: int, alone: int, steps: int, expected: int) -> None:
    assert equal_total_steps(total, alone, steps) == expected


def test_each_row_differs_from_the_recipe_as_it_says(tmp_path: Path) -> None:
    train = FakeTraining()
    verdict(plan("student.method.robust_loss=sce", seeds=(0,)), tmp_path / "v", train=train)
    assert [name for name, _ in train.made] == [f"{row}-s0" for row in (*MAIN, *ABLATIONS)]
    recipes = {row: Run(tmp_path / "v" / f"{row}-s0").read_manifest()["recipe"] for row in (*MAIN, *ABLATIONS)}
    teacher_file = str(tmp_path / "v" / "kd-fixmatch-s0" / "teacher.safetensors")
    asked = plan("student.method.robust_loss=sce", seeds=(0,)).recipe.model_dump(mode="json")
    assert differences(asked, recipes["kd-fixmatch"]) == {"baseline.enabled": False}
    alone = {"teacher": None, "student.method.robust_loss": "ce"}
    assert differences(asked, recipes["fixmatch"]) == alone
    steps = {"student.optim.total_steps": 155, "baseline.enabled": False}  # (900 + 50 + 600) / 600 of 60
    assert differences(asked, recipes["fixmatch-equal-total"]) == alone | steps
    ready = {"baseline.enabled": False, "teacher.ready": teacher_file}
    for row, own in {
        "kd-only": {"trust.filters": "none", "student.method.unlabeled_weight": 0.0},
        "no-clustering": {"trust.filters": "confidence"},
        "no-confidence": {"trust.filters": "clusters"},
        "no-sce": {"student.method.robust_loss": "ce"},
        "no-soft-kd": {"student.method.distill.loss": "none"},
    }.items():
        assert differences(asked, recipes[row]) == ready | own


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = new
    return found


def test_the_command_of_a_row_makes_the_row(tmp_path: Path) -> None:
    asked = plan("teacher.optim.total_steps=9", "student.method.robust_loss=sce", "student.optim.total_steps=50")
    document = verdict(asked, tmp_path / "v", train=FakeTraining())
    assert set(document["commands"]) == {f"{row}-s{seed}" for row in (*MAIN, *ABLATIONS) for seed in (0, 1)}
    for name, command in document["commands"].items():
        words = shlex.split(command)
        assert words[:3] == ["kdedge", "train-recipe", "tiny"]
        assert words[-2:] == ["--out", str(tmp_path / "v" / name)]
        flags = {w.removeprefix("--"): int(v) for w, v in itertools.pairwise(words) if w in ("--labels", "--seed")}
        settings = [value for word, value in itertools.pairwise(words) if word == "--set"]
        made = Run(tmp_path / "v" / name).read_manifest()["recipe"]
        assert recipe_io.load("tiny", settings, **flags).model_dump(mode="json") == made


def own_settings(row: str, *settings: str, steps: int | None = None) -> dict[str, str]:
    recipe = plan(*settings, rows=["fixmatch"]).recipe
    found = next(r for r in ROWS if r.name == row)
    own = settings_of(found, recipe, supervised=True, teacher="t", steps=steps)
    words = [*settings, *(f"{key}={value}" for key, value in own.items())]
    recipe_io.load("tiny", merged(settings, own))  # a recipe that can be trained
    recipe_io.parse(recipe_io.dump(recipe), "tiny", Recipe, words[len(settings) :])
    return own


def test_what_a_row_cannot_mean_is_taken_out_of_it() -> None:
    """FixMatch alone starts from no teacher and learns from its own labels; a duration has one unit; and so on."""
    ready = {"baseline.enabled": "false", "teacher.ready": "t"}
    alone = {"teacher": "null", "student.method.robust_loss": "ce", "baseline.enabled": "true"}
    assert own_settings("fixmatch", "student.init=teacher") == alone | {"student.init": "null"}
    both = own_settings("fixmatch", "teacher.init=w.npz", "student.init=teacher")
    assert both["student.init"] == "w.npz"  # where the outer network began: else FixMatch's row knows less
    assert "student.init" not in own_settings("no-sce", "student.init=teacher")
    assert own_settings("fixmatch", "student.init=w.npz") == alone
    matching = ["student.method.distill.mixup=true", "student.method.distill.views=same"]
    weights = ["student.method.labeled_weight=0", "student.method.unlabeled_weight=0"]
    assert own_settings("fixmatch", *matching, *weights) == alone | dict(
        w.replace("=0", "=1").split("=") for w in weights
    )
    soft = {"student.method.distill.loss": "none"}
    assert own_settings("no-soft-kd", *matching) == ready | soft | {"student.method.distill.mixup": "false"}
    assert own_settings("no-soft-kd", "student.method.distill.temperature=4") == ready | soft | {
        "student.method.distill.temperature": "null"
    }
    assert own_settings("kd-only", "student.method.thresholds.policy=freematch") == ready | {
        "trust.filters": "none",
        "student.method.unlabeled_weight": "0",
        "student.method.thresholds.fairness_weight": "0",
    }
    longer = own_settings("fixmatch-equal-total", "student.optim={total_epochs: 2}", steps=9)
    assert (longer["student.optim.total_steps"], longer["student.optim.total_epochs"]) == ("9", "null")
    assert own_settings("no-sce", "teacher.ready=mine") == {
        "student.method.robust_loss": "ce",
        "baseline.enabled": "false",
    }


def test_what_is_not_trained_is_not_pretrained_either() -> None:
    """The SimCLR start is of the outer network: rows that take a ready one, or none, have nothing to pre-train."""
    simclr = ("pretrain={of: teacher}", "teacher.init=simclr")
    off = {"baseline.enabled": "false"}
    ready = off | {"pretrain": "null", "teacher.init": "null", "teacher.ready": "t"}
    assert own_settings("kd-fixmatch", *simclr) == off
    assert own_settings("no-sce", *simclr) == ready | {"student.method.robust_loss": "ce"}
    assert own_settings("no-simclr", *simclr) == off | {"pretrain": "null", "teacher.init": "null"}
    assert own_settings("fixmatch", *simclr)["pretrain"] == "null"
    both = own_settings("fixmatch", *simclr, "student.init=teacher")
    assert (both["student.init"], both["pretrain.of"]) == ("simclr", "student")  # where the outer network began


def test_the_row_without_the_simclr_start_is_made_where_it_is_named() -> None:
    assert "no-simclr" not in {row.name for row in choose(None)}
    asked = plan("pretrain={of: teacher}", "teacher.init=simclr", rows=["no-simclr"])
    assert [job.name for job in jobs(asked.rows, (0,))] == ["kd-fixmatch-s0", "no-simclr-s0"]
    assert all(not job.needs for job in jobs(asked.rows, (0,)))  # its outer network is its own
    with pytest.raises(RecipeError, match="already what no-simclr would be"):
        plan(rows=["no-simclr"])


def test_a_student_that_is_fine_tuned_is_nothing_to_judge() -> None:
    with pytest.raises(RecipeError, match="learns by fine-tune: there is no KD-FixMatch to judge"):
        plan("student.method={kind: fine-tune}", "student.init=teacher")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return verdict(plan(), tmp_path_factory.mktemp("whole") / "v", train=FakeTraining())


def test_each_row_costs_all_that_was_trained_for_it(whole: dict[str, Any]) -> None:
    """FLOPs and seconds: the outer network in every row that uses it, the baseline in its own alone."""
    costs = {name: [(c["training_flops"], c["seconds"]) for c in row["seeds"]] for name, row in whole["rows"].items()}
    assert costs.pop("fixmatch") == [(600, 10.0)] * 2
    assert costs.pop("supervised") == [(30, 7.0)] * 2
    assert costs.pop("fixmatch-equal-total") == [(1550, 10.0)] * 2
    assert set(costs) == {"kd-fixmatch", "kd-only", *ABLATIONS}
    assert all(cost == [(1550, 30.0)] * 2 for cost in costs.values())
    differences = {name: found["differences"] for name, found in whole["comparisons"].items()}
    assert differences["fixmatch"] == pytest.approx([0.02, 0.02])
    assert differences["supervised"] == pytest.approx([0.4, 0.401])
    assert differences["teacher"] == pytest.approx([-0.07, -0.069])
    assert [one["confidence_only_precision"] for one in whole["trusted"]["seeds"]] == pytest.approx([0.96, 0.959])


@pytest.mark.parametrize("at", [f"{row}-s1" for row in (*MAIN, *ABLATIONS)])
def test_a_verdict_stopped_at_any_row_goes_on_there(at: str, whole: dict[str, Any], tmp_path: Path) -> None:
    first, second = FakeTraining(stop_at=at), FakeTraining()
    with pytest.raises(KeyboardInterrupt):
        verdict(plan(), tmp_path / "v", train=first)
    partial = read_json(tmp_path / "v" / "verdict.json")
    assert partial["status"] == "partial"
    assert partial["runs_finished"] == len(first.made) - 1
    assert "State: partial" in (tmp_path / "v" / "verdict.md").read_text()
    document = verdict(plan(), tmp_path / "v", train=second)
    assert second.made[0] == (at, True)
    assert len(first.made) + len(second.made) == 17  # 16 runs, one of them begun twice
    assert document["status"] == "complete"
    assert document == read_json(tmp_path / "v" / "verdict.json")
    assert {key: document[key] for key in ("comparisons", "trusted")} == {
        key: whole[key] for key in ("comparisons", "trusted")
    }


def test_a_finished_verdict_trains_nothing(tmp_path: Path) -> None:
    verdict(plan(), tmp_path / "v", train=FakeTraining())
    again = FakeTraining()
    assert verdict(plan(), tmp_path / "v", train=again)["status"] == "complete"
    assert again.made == []


@pytest.mark.parametrize(
    "name",
    ["v", "v #2", "a: b", "[x]", "- v", "{v}", "null", "it's", 'the "new" one', "ä 🌷", "*v", "%v", "!v", "v\\n"],
)
def test_a_folder_may_have_any_name_however_it_is_typed_and_be_moved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of one seed share an outer network: the file in this folder, wherever that is now."""
    monkeypatch.chdir(tmp_path)
    asked = plan(rows=["kd-only"], seeds=(0,))
    document = verdict(asked, Path(name), train=FakeTraining())
    made = Run(Path(name) / "kd-only-s0").read_manifest()["recipe"]
    assert made["teacher"]["ready"] == f"{name}/kd-fixmatch-s0/teacher.safetensors"
    words = shlex.split(document["commands"]["kd-only-s0"])
    settings = [value for word, value in itertools.pairwise(words) if word == "--set"]
    assert recipe_io.load("tiny", settings, labels=40).model_dump(mode="json") == made
    again = FakeTraining()
    assert verdict(asked, tmp_path / name, train=again)["status"] == "complete"
    (tmp_path / name).rename(tmp_path / "moved")
    assert verdict(asked, Path("moved"), train=again)["status"] == "complete"
    assert again.made == []


def test_a_run_is_of_its_ready_teachers_content_not_of_its_path(tmp_path: Path) -> None:
    def asked(ready: str) -> Recipe:
        return recipe_io.load("tiny", [f"teacher.ready={ready}"])

    run, cpu = Run(tmp_path / "run"), torch.device("cpu")
    for name, content in {"mine": b"1", "copied": b"1", "other": b"2"}.items():
        write_bytes(tmp_path / f"{name}.safetensors", content)
    mine, copied, other, gone = (str(tmp_path / f"{n}.safetensors") for n in ("mine", "copied", "other", "gone"))
    write_json(run.result_path, {"a": 1})
    begun = {"status": "finished", "recipe": asked(mine).model_dump(mode="json")}
    run.update_manifest(**begun, ready_sha256=sha256_file(Path(mine)))
    for same in (mine, copied, gone):
        assert check_folder(run, asked(same), cpu, resume=True) == {"a": 1}
    with pytest.raises(
        RunError, match=r"another recipe: teacher.ready was '.*mine.*' \(sha256 6b86.*now '.*other.*d473"
    ):
        check_folder(run, asked(other), cpu, resume=True)
    with pytest.raises(RunError, match=r"another recipe: teacher.ready was '.*mine.*', now None"):
        check_folder(run, recipe_io.load("tiny"), cpu, resume=True)
    with pytest.raises(RunError, match=r"another recipe: teacher was .*, now None"):
        check_folder(run, recipe_io.load("tiny", ["teacher=null"]), cpu, resume=True)


def test_what_an_earlier_version_planned_and_began_is_gone_on_with(tmp_path: Path) -> None:
    """earlier_plan.json was written by commit 0a42bc1, from this recipe."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "schema: 1\nname: old\ndata: {labels: 40}\nteacher: {arch: wide-resnet-10-1, head: fresh}\n"
        "student: {width: 0.25}\nengine:\n  plan: {memory_format: channels-last}\n"
    )
    stored = (Path(__file__).parent / "earlier_plan.json").read_bytes()
    run = Run(tmp_path / "run")
    run.update_manifest(status="running", recipe=json.loads(stored)["asked"])
    for settings in ([], ["student.head=probe"], ["engine.plan.layers=torch", "student.projection_layers=0"]):
        folder = tmp_path / f"v{len(settings)}"
        write_bytes(folder / "plan.json", stored)
        asked = make_plan(str(mine), settings, seeds=(0,))
        with pytest.raises(KeyboardInterrupt):
            verdict(asked, folder, train=FakeTraining(stop_at="kd-fixmatch-s0"))
        assert check_folder(run, asked.recipe, torch.device("cpu"), resume=True) is None
    for setting, told in [
        ("teacher.head=null", "teacher.head was 'fresh', now None"),
        ("teacher.head=probe", "teacher.head was 'fresh', now 'probe'"),
        ("student.head=fresh", "student.head was 'probe', now 'fresh'"),
        ("engine.plan.layers=own", "engine.plan.layers was 'torch', now 'own'"),
    ]:
        asked = make_plan(str(mine), [setting], seeds=(0,))
        with pytest.raises(RunError, match=f"planned otherwise: {told}. Go on"):
            verdict(asked, folder, train=FakeTraining())
        with pytest.raises(RunError, match=f"another recipe: {told}. Resume"):
            check_folder(run, asked.recipe, torch.device("cpu"), resume=True)
    assert (folder / "plan.json").read_bytes() == stored


def test_another_recipe_data_or_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    verdict(plan(), tmp_path / "v", train=FakeTraining())
    before = (tmp_path / "v" / "plan.json").read_bytes()
    for other, told in [
        (plan("student.method.unlabeled_weight=2"), "student.method.unlabeled_weight was 1.0, now 2.0"),
        (plan(seeds=(0, 1, 2)), r"seeds was \[0, 1\], now \[0, 1, 2\]"),
        (plan(labels=50), "labels was 40, now 50"),
        (plan(rows=["kd-only"]), "rows was .*, now \\['kd-fixmatch', 'kd-only'\\]"),
    ]:
        with pytest.raises(RunError, match=f"planned otherwise: .*{told}"):
            verdict(other, tmp_path / "v", train=FakeTraining())
    assert (tmp_path / "v" / "plan.json").read_bytes() == before
    # How runs are kept, and how the recipe is called, may change.
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipe_io.show("tiny"))
    kept = make_plan(str(mine), ["engine.keep_checkpoints=true"], seeds=(0, 1), labels=40)
    verdict(kept, tmp_path / "v", train=FakeTraining())


def test_a_folder_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(RunError, match="exists and is no verdict"):
        verdict(plan(), tmp_path / "photos", train=FakeTraining())
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["a.jpg"]


def test_a_run_of_another_recipe_in_the_folder_is_refused(tmp_path: Path) -> None:
    verdict(plan(seeds=(0,)), tmp_path / "v", train=FakeTraining())
    run = Run(tmp_path / "v" / "kd-only-s0")
    manifest = run.read_manifest()
    manifest["recipe"]["seed"] = 5
    write_json(run.manifest_path, manifest)
    with pytest.raises(RunError, match="kd-only-s0 was started with another recipe: seed was 5, now 0"):
        verdict(plan(seeds=(0,)), tmp_path / "v", train=FakeTraining())


def test_what_cannot_be_judged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no teacher"):
        plan("teacher=null")
    with pytest.raises(RecipeError, match="--first-seed"):
        plan("seed=3")
    with pytest.raises(
        RecipeError, match=r"already what no-sce would be. Leave that out: --rows kd-fixmatch,no-soft-kd"
    ):
        plan("student.method.robust_loss=ce", rows=["no-sce", "no-soft-kd"])


def test_no_budget_is_called_equal_to_one_that_is_unknown() -> None:
    """What the training of the recipe's own ready teacher cost, nobody says."""
    with pytest.raises(
        RecipeError,
        match=r"no equal total compute.*: --rows kd-fixmatch,fixmatch,supervised,kd-only,no-clustering,.*kd$",
    ):
        plan("teacher.ready=mine", "student.method.robust_loss=sce")
    with pytest.raises(RecipeError, match=r"no equal total compute.*: --rows kd-fixmatch,fixmatch$"):
        plan("teacher.ready=mine", rows=["fixmatch-equal-total"])
    assert plan("teacher.ready=mine", rows=["fixmatch", "kd-only"])


INPUT = {"mean": "[0.5]", "std": "[0.2]", "image_px": "8", "channels": "1"}


@pytest.mark.parametrize("row", ["fixmatch", "supervised", "kd-only", "no-sce"])
def test_a_teacher_that_alone_decides_the_input_is_refused_until_the_recipe_says_it(row: str) -> None:
    """Else each row would be trained, and then none could be compared with another."""
    init = ["student.method.robust_loss=sce", "teacher.init=w.npz", "student.init=null"]
    init += ["data.image_px=null"]  # tiny's is 8
    told = {key: f"data.{key}={value}" for key, value in INPUT.items()}
    with pytest.raises(
        RecipeError, match=r"compared\. Write data.mean, data.std, data.image_px and data.channels into"
    ):
        plan(*init, rows=[row])
    init.pop()
    for key in INPUT:
        with pytest.raises(RecipeError, match=rf"Write data\.{key} into the recipe"):
            plan(*init, *(told | {key: f"data.{key}=null"}).values(), rows=[row])
    assert plan(*init, *told.values(), rows=[row])
    assert plan(*init, rows=["kd-fixmatch"])  # nothing to compare it with


def test_an_input_that_all_rows_share_is_not_refused() -> None:
    assert plan("teacher.init=w.npz", "student.init=w.npz", rows=["fixmatch"])  # FixMatch's too
    assert plan("student.init=w.npz", rows=["fixmatch"])
    assert plan("teacher.init=w.npz", "student.init=teacher", rows=["fixmatch"])  # where the teacher began
    assert plan("teacher.ready=mine", "teacher.init=w.npz", rows=["fixmatch"])  # it is not read
    with pytest.raises(RecipeError, match="could not be compared"):  # the ready one's weights say it
        plan("teacher.ready=mine", "student.init=teacher", rows=["fixmatch"])


def test_a_run_that_another_process_is_at_is_left_to_it_and_read_afterwards(tmp_path: Path) -> None:
    folder, other, mine = WorkFolder(tmp_path / "v", "verdict"), FakeTraining(), FakeTraining()
    asked = plan(rows=MAIN, seeds=(0, 1))
    folder.begin(asked.to_json(), SPELLINGS)
    held = contextlib.ExitStack()
    first = jobs(asked.rows, asked.seeds)[0]
    assert held.enter_context(folder.claim(first.name))
    waited: list[list[str]] = []

    def wait(seconds: float) -> None:
        """By now only what needs the other's run is left; the other finishes it."""
        waited.append([name for name, _ in mine.made])
        recipe = recipe_io.parse(
            recipe_io.dump(asked.recipe), "tiny", Recipe, ["baseline.enabled=false", f"seed={first.seed}"]
        )
        other(recipe, folder.run(first.name).path, resume=False, display=None)
        held.close()

    document = verdict(asked, folder.path, train=mine, wait=wait)
    assert [name for name, _ in other.made] == ["kd-fixmatch-s0"]
    assert len(waited) == 1
    assert waited[0] == ["fixmatch-s0", "kd-fixmatch-s1", "fixmatch-s1", "fixmatch-equal-total-s1", "kd-only-s1"]
    assert [name for name, _ in mine.made[5:]] == ["fixmatch-equal-total-s0", "kd-only-s0"]
    assert document["status"] == "complete"


def _process(folder: Path, barrier: Any, made: Any) -> None:
    train = FakeTraining()

    def noted(recipe: Recipe, out: Path, **options: Any) -> None:
        train(recipe, out, **options)

    barrier.wait()
    verdict(plan(rows=MAIN), folder, train=noted, wait=lambda seconds: None)
    made.put([name for name, _ in train.made])


def test_two_processes_make_each_run_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_process, args=(tmp_path / "v", barrier, made)) for _ in range(2)]
    for process in processes:
        process.start()
    names = made.get(timeout=60) + made.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(names) == sorted(f"{row}-s{seed}" for row in MAIN for seed in (0, 1))
    assert read_json(tmp_path / "v" / "verdict.json")["status"] == "complete"


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def at(name: str) -> None:
        monkeypatch.setattr("kdedge_bench.verdict.verdict.__kwdefaults__", {**KEYWORDS, "train": FakeTraining(name)})

    from kdedge_bench.verdict import verdict as judge

    KEYWORDS = dict(judge.__kwdefaults__ or {})
    return at


def test_ctrl_c_is_a_sentence_that_says_how_to_go_on(tmp_path: Path, interrupted: Any, capsys: Any) -> None:
    interrupted("fixmatch-s0")
    words = [
        "verdict",
        "tiny",
        "--labels",
        "40",
        "--seeds",
        "1",
        "--rows",
        "kd-only,fixmatch",
        "--out",
        str(tmp_path / "v"),
    ]
    assert kdedge([*words, "--json"]) == 130
    shown = capsys.readouterr()
    assert "Stopped by Ctrl-C. What was trained is kept" in shown.err
    again = json.loads(shown.out)["error"].partition("Go on with: kdedge ")[2]
    assert shlex.split(again)[:2] == ["verdict", "tiny"]
    interrupted("nothing")
    assert kdedge([*shlex.split(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "complete"


def test_a_real_verdict_of_the_main_rows(tmp_path: Path) -> None:
    """Trained, at toy size: the teacher once a seed, the same exam for all, and the cost that was promised."""
    few = ["teacher.optim.total_steps=6", "student.optim.total_steps=3", "baseline.optim.total_steps=2"]
    few += [f"{who}.optim.labeled_batch=4" for who in ("teacher", "student", "baseline")]
    few += ["student.arch=wide-resnet-10-1", "student.width=1"]  # built faster than a MobileNet
    few += ["trust.threshold=0.1", "trust.filters=confidence"]  # clusters of what six steps learned take long to settle
    asked = plan(*few, rows=[*MAIN, "supervised"])
    document = verdict(asked, tmp_path / "v")
    assert document["status"] == "complete"
    assert all(len(row["seeds"]) == 2 for row in document["rows"].values())
    for seed in (0, 1):
        runs = {row: Run(tmp_path / "v" / f"{row}-s{seed}") for row in MAIN}
        full = read_json(runs["kd-fixmatch"].result_path)
        cells = {name: row["seeds"][seed] for name, row in document["rows"].items()}
        assert cells["kd-fixmatch"]["training_flops"] == full["training_flops"]["total"]
        assert cells["kd-only"]["training_flops"] == full["training_flops"]["total"]  # its outer network is counted
        step = cells["fixmatch"]["training_flops"] / cells["fixmatch"]["student_steps"]
        missed = cells["fixmatch-equal-total"]["training_flops"] - full["training_flops"]["total"]
        assert abs(missed) <= step / 2
        assert (
            cells["supervised"]["test_accuracy"] == read_json(runs["fixmatch"].result_path)["baseline"]["test_accuracy"]
        )
        assert cells["supervised"]["student_steps"] == 2
        taught = [read_json(runs[row].result_path)["teacher"]["test_accuracy"] for row in ("kd-fixmatch", "kd-only")]
        assert taught[0] == taught[1]
        exams = {read_json(run.splits_path)["splits"]["test"]["sha256"] for run in runs.values()}
        assert len(exams) == 1
    trained = [read_json(Run(tmp_path / "v" / f"kd-only-s{s}").result_path)["training_flops"]["outer"] for s in (0, 1)]
    assert trained == [0, 0]


def test_rows_that_were_asked_about_other_images_are_refused(tmp_path: Path) -> None:
    """Where the outer network's starting weights decide the input, FixMatch alone would see another."""

    class OtherInput(FakeTraining):
        def __call__(self, recipe: Recipe, out: Path, *, resume: bool, display: Any) -> None:
            super().__call__(recipe, out, resume=resume, display=display)
            if recipe.teacher is None:
                text = Run(out).recipe_path.read_text().replace("image_px: 8", "image_px: 12")
                write_bytes(Run(out).recipe_path, text.encode())

    with pytest.raises(RunError, match="fixmatch-s0 and kd-fixmatch-s0 cannot be compared: they differ in input"):
        verdict(plan(rows=["fixmatch"], seeds=(0,)), tmp_path / "v", train=OtherInput())
