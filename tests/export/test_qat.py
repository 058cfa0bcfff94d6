"""QAT of a run: it repairs what calibration broke, never sees the gate, and is the same when it was stopped."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kdedge import recipe_io
from kdedge.data.batches import Batches
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits
from kdedge.errors import ExportError, RecipeError, RunError
from kdedge.models.weights import load_model, save_model
from kdedge.models.zoo import ModelSpec
from kdedge.recipe import resolve
from kdedge.run_pool import describe
from kdedge.runs import Run, read_json
from kdedge.train.optim import OptimConfig
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import Graph
from kdedge_export.images import open_run_images
from kdedge_export.judging.gate import agreement
from kdedge_export.sessions import run_onnx
from kdedge_export.table import RangeTable, natural_weight_scales
from kdedge_export.training import qat
from kdedge_export.training.qat import QATConfig, qat_config, require_teacher, run_qat
from kdedge_export.training.rate import kept
from kdedge_export.training.rounded import rounded_network, trained_model
from kdedge_export.training.torch_graph import TorchGraph

Calibrated = tuple[onnx.ModelProto, Plan, RangeTable]
QUICK = QATConfig(total_steps=100, learning_rate=1e-5, ema_decay=0.9, learn_spans=True)


@pytest.fixture(scope="module")
def calibrated(run_folder: Path) -> Calibrated:
    """The float file of the run's student, its plan, and a table whose ranges hold all of the calibration images."""
    student = load_model(Run(run_folder).student_path)
    model = export_float(student.module, student.preprocess, student.classes)
    plan = make_plan(model)
    x = torch.from_numpy(
        student.preprocess.normalize(open_run_images(Run(run_folder)).calibration.load(student.preprocess))
    )
    with torch.inference_mode():
        _, seen = TorchGraph(model).watch(x, plan.tensors)
    ends = {name: (min(0.0, float(seen[name].min())), max(0.0, float(seen[name].max()))) for name in plan.tensors}
    spans = {name: ends[plan.same_scale.get(name, name)] for name in plan.tensors}
    return model, plan, RangeTable(spans, natural_weight_scales(model, plan.layers))


@pytest.fixture
def saves_every_s(request: pytest.FixtureRequest) -> float:
    return float(getattr(request, "param", 20.0))


@pytest.fixture
def run(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves_every_s: float) -> Run:
    """As the pipeline leaves it: the recipe resolved, how the stages were computed noted."""
    monkeypatch.setattr(qat, "available_cores", lambda: 1)
    run = Run(tmp_path / "run")
    shutil.copytree(run_folder, run.path)
    recipe, source = recipe_io.load(str(run.recipe_path)), open_source("digits")
    splits = Splits.from_json(read_json(run.splits_path), source)
    recipe = resolve(recipe, describe(recipe, source, splits, {}))
    optim = recipe.student.optim.model_copy(update={"labeled_batch": 8, "unlabeled_ratio": 2})
    student = recipe.student.model_copy(update={"optim": optim})
    engine = recipe.engine.model_copy(update={"checkpoint_every_s": saves_every_s})
    recipe = recipe.model_copy(update={"engine": engine, "student": student})
    run.recipe_path.write_text(recipe_io.dump(recipe))
    run.update_manifest(engine_plan={})
    return run


def divergence(run: Run, model: onnx.ModelProto, plan: Plan, table: RangeTable) -> float:
    """Mean KL(FP32 || INT8) on the gate images."""
    student = load_model(run.student_path)
    x = student.preprocess.normalize(open_run_images(run).gate.load(student.preprocess))
    with torch.inference_mode():
        expected = student.module(torch.from_numpy(x)).numpy()
    found = run_onnx(write_int8(model, plan, table).SerializeToString(), x)
    measured = agreement(expected, found, np.full(len(x), -1)).divergence
    assert measured is not None
    return measured


def too_small(plan: Plan, table: RangeTable) -> RangeTable:
    """Three tensors keep a third of what they need."""
    chosen = [name for name in plan.tensors if name not in plan.same_scale][5:20:5]
    assert len(chosen) == 3
    spans = {name: (table.spans[name][0] / 3, table.spans[name][1] / 3) for name in chosen}
    spans |= {name: spans[source] for name, source in plan.same_scale.items() if source in spans}
    return table.with_spans(spans)


def test_learned_ranges_repair_a_calibration_that_clips(run: Run, calibrated: Calibrated) -> None:
    model, plan, table = calibrated
    broken, told = too_small(plan, table), list[str]()
    before = divergence(run, model, plan, broken)
    trained, learned = run_qat(run, model, plan, broken, QUICK, told.append)
    assert divergence(run, trained, plan, learned) < 0.7 * before
    hurt = [name for name in plan.tensors if broken.spans[name] != table.spans[name] and name not in plan.same_scale]
    grown = [learned.spans[name][1] / broken.spans[name][1] for name in hurt if broken.spans[name][1] > 0]
    assert max(grown) > 1.05
    assert set(learned.spans) == set(broken.spans)
    assert learned.weight_scales.keys() == broken.weight_scales.keys()
    assert [each.name for each in trained.graph.initializer] == [each.name for each in model.graph.initializer]
    assert not (run.path / "qat-checkpoint").exists()
    assert any("step 100 of 100" in sentence for sentence in told)


def test_a_rate_that_destroys_the_student_is_not_taken(
    run: Run, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the recipe's is far too much for this one, whose logits are large."""
    model, plan, table = calibrated
    before, taken = divergence(run, model, plan, table), list[float]()
    fit = qat.fit

    def fits(method: object, batches: object, optim: OptimConfig, *rest: object, **named: object) -> object:
        taken.append(optim.learning_rate or 0.0)
        return fit(method, batches, optim, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(qat, "fit", fits)
    trained, learned = run_qat(run, model, plan, table, QATConfig(total_steps=20, ema_decay=0.9), lambda _: None)
    assert taken in ([pytest.approx(share * 0.1 * 0.03)] for share in (0.1, 0.01))
    assert divergence(run, trained, plan, learned) < 2 * before, "at the recipe's own it is ten times as much"
    assert not (run.path / "qat-checkpoint").exists()


def test_the_outer_network_can_be_asked_instead(run: Run, calibrated: Calibrated) -> None:
    """An outer network with the student's own weights teaches the same, one with others does not."""
    model, plan, table = calibrated
    student = load_model(run.student_path)
    spec = ModelSpec("mobilenet-v2", classes=10, channels=1, width=0.25, halvings=2)

    def trained(teacher: str) -> onnx.ModelProto:
        config = QATConfig.model_validate({"total_steps": 2, "learning_rate": 1e-3, "teacher": teacher})
        return run_qat(run, model, plan, table, config, lambda _: None)[0]

    by_student = trained("student")
    save_model(run.teacher_path, student.module, spec, student.classes, student.preprocess)
    assert trained("teacher") == by_student
    with torch.no_grad():
        student.module.head.weight.neg_()
    save_model(run.teacher_path, student.module, spec, student.classes, student.preprocess)
    assert trained("teacher") != by_student


def test_a_rate_is_found_once(tmp_path: Path) -> None:
    found = iter([0.003, 0.0])
    for _ in range(2):
        assert kept(tmp_path / "rate.json", lambda: next(found)) == 0.003


@pytest.mark.parametrize("saves_every_s", [0.0], indirect=True)
def test_what_was_stopped_ends_as_if_it_had_not_been(
    run: Run, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, table = calibrated
    config = QUICK.model_copy(update={"total_steps": 6})
    expected, expected_table = run_qat(run, model, plan, table, config, lambda _: None)
    at = Batches.at

    def stops(self: Batches, step: int) -> object:
        if step == 4:
            raise KeyboardInterrupt
        return at(self, step)

    monkeypatch.setattr(Batches, "at", stops)
    with pytest.raises(KeyboardInterrupt):
        run_qat(run, model, plan, table, config, lambda _: None)
    assert list((run.path / "qat-checkpoint").glob("qat-*.4.safetensors"))
    steps = list[int]()
    monkeypatch.setattr(Batches, "at", lambda self, step: (steps.append(step), at(self, step))[1])
    found, found_table = run_qat(run, model, plan, table, config, lambda _: None)
    assert steps == [4, 5]
    assert found.SerializeToString() == expected.SerializeToString()
    assert found_table.spans == expected_table.spans


def test_the_gate_is_never_trained_on(run: Run) -> None:
    student = load_model(run.student_path)
    recipe = recipe_io.load(str(run.recipe_path))
    pool, _ = qat._pool(run, recipe, student, torch.device("cpu"))
    splits = read_json(run.splits_path)["splits"]
    kept = sorted(set(splits["unlabeled"]["indices"]) - set(splits["gate"]["indices"]))
    assert 0 < len(kept) < len(splits["unlabeled"]["indices"])
    source = open_run_images(run).gate.source
    assert torch.equal(pool.images.rows(torch.arange(len(kept))), source.load(np.array(kept), student.preprocess))
    labeled = sorted(set(splits["labeled"]["indices"]) & set(kept))
    assert [kept[place] for place in pool.labeled.tolist()] == labeled


@pytest.mark.parametrize("span_step", [None, 1.0])
def test_the_trained_network_is_the_int8_file(run: Run, calibrated: Calibrated, span_step: float | None) -> None:
    model, plan, table = calibrated
    student = load_model(run.student_path)
    x = student.preprocess.normalize(open_run_images(run).gate.load(student.preprocess))[:16]
    network = rounded_network(model, plan, table, span_step)
    with torch.inference_mode():
        found = network(torch.from_numpy(x)).numpy()
    expected = run_onnx(write_int8(model, plan, table).SerializeToString(), x, optimize=False)
    assert np.abs(found - expected).mean() <= 0.01 * np.abs(expected).max()
    if span_step is None:
        with torch.inference_mode():
            assert np.allclose(found, TorchGraph(model, plan, table)(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_a_head_without_bias_learns_none(run: Run, calibrated: Calibrated) -> None:
    """The file has no place for it, so what a network learned there would be lost."""
    model, plan, table = calibrated
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.node[-1].input[2:]
    student = load_model(run.student_path)
    x = student.preprocess.normalize(open_run_images(run).gate.load(student.preprocess))[:16]
    for planned in (plan, replace(plan, layers=plan.layers - {bare.graph.node[-1].name})):
        network = rounded_network(bare, planned, table)
        assert network.head.bias is None
        with torch.no_grad():
            network.head.weight *= 1.5
        trained, _ = trained_model(network, bare, table)
        with torch.inference_mode():
            found = network(torch.from_numpy(x)).numpy()
        expected = run_onnx(write_int8(trained, planned, table).SerializeToString(), x, optimize=False)
        assert np.abs(found - expected).mean() <= 0.02 * np.abs(expected).max()


def test_what_failed_leaves_no_checkpoint(run: Run, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        (run.path / "qat-checkpoint" / "qat.1.safetensors").touch()
        raise RunError("The loss is not finite.")

    monkeypatch.setattr(qat, "fit", fails)
    with pytest.raises(RunError):
        run_qat(run, *calibrated, QUICK, lambda _: None)
    assert not (run.path / "qat-checkpoint").exists()


def test_a_disk_that_is_full_costs_no_steps(run: Run, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        (run.path / "qat-checkpoint" / "qat.1.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qat, "fit", fails)
    with pytest.raises(OSError, match="No space left"):
        run_qat(run, *calibrated, QUICK, lambda _: None)
    assert (run.path / "qat-checkpoint" / "qat.1.safetensors").exists()
    shutil.rmtree(run.path / "qat-checkpoint")


def test_a_checkpoint_of_anything_else_is_not_gone_on_with(
    run: Run, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, table = calibrated
    by_teacher = QUICK.model_copy(update={"teacher": "teacher"})
    run.teacher_path.write_bytes(b"one")

    def keys() -> list[str]:
        others = replace(plan, layers=plan.layers - {"head"}), replace(plan, known={"input": (0.0, 1.0)})
        found = [qat._fingerprint(run, model, each, table, QUICK) for each in (plan, *others)]
        return [*found, qat._fingerprint(run, model, plan, table, by_teacher)]

    first = keys()
    assert len({*first}) == 4
    assert keys() == first
    assert qat._fingerprint(run, model, make_plan(model), table, QUICK) == first[0]
    run.teacher_path.write_bytes(b"another")
    assert [one == other for one, other in zip(first, keys(), strict=True)] == [True, True, True, False]
    monkeypatch.setattr(torch, "__version__", "9.0")
    assert not {*first} & {*keys()}


def test_learned_ranges_replace_those_of_symmetric_codes(calibrated: Calibrated) -> None:
    model, plan, table = calibrated
    learned = rounded_network(model, plan, table, 1.0).backbone
    assert isinstance(learned, TorchGraph)
    chosen = next(iter(learned.spans))
    table = replace(table, s8_spans={chosen: (-0.1, 0.1), "of TensorRT alone": (-3.0, 3.0)})
    for span_step, expected in ((1.0, learned.spans[chosen]), (None, (-0.1, 0.1))):
        _, found = trained_model(rounded_network(model, plan, table, span_step), model, table)
        assert found.s8_span(chosen) == pytest.approx(expected)
        assert found.s8_spans["of TensorRT alone"] == (-3.0, 3.0)


def test_settings_by_name(run: Run) -> None:
    found = qat_config(["qat.learn_spans=true", "qat.teacher=teacher", "qat.method.labeled_weight=0.5"], steps=7)
    assert (found.learn_spans, found.teacher, found.method.labeled_weight, found.total_steps) == (
        True,
        "teacher",
        0.5,
        7,
    )
    assert qat_config([]) == QATConfig()
    with pytest.raises(RecipeError, match=r"(?s)Did you mean 'learn_spans'.*'student' or 'teacher' was expected"):
        qat_config(["qat.learn_span=true", "qat.teacher=ema"])
    require_teacher(run, QATConfig())
    with pytest.raises(ExportError, match=r"teacher\.safetensors does not exist"):
        require_teacher(run, found)


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(calibrated: Calibrated) -> None:
    model, plan, table = calibrated
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output[0].name = Graph(model).producer["logits"].input[0]
    with pytest.raises(ExportError, match="ends in a Flatten"):
        rounded_network(copy, plan, table)
