"""Distilled QAT of a finished run: the FP32 student's own answers, on all its images, teach its INT8 self.

It starts from calibrated ranges and ends in another range table and other float weights, from which every file is then
written. NVIDIA's recipe (pytorch-quantization's user guide, TensorRT 8.6.1): a calibrated start, about a tenth of the
schedule, a small learning rate, batch normalisation frozen (here it is folded), scales not moved at every step (unless
they are learned).

Images of the gate split are left out: it decides afterwards between QAT and what there was before.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import onnx
import torch
from pydantic import Field

from kdedge import __version__, recipe_io
from kdedge.config import Config
from kdedge.data.batches import Batches, Pool
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits
from kdedge.data.store import open_store
from kdedge.errors import DataError, ExportError, RunError
from kdedge.methods.qat import DistilledQAT, DistilledQATConfig
from kdedge.models.weights import LoadedModel, load_model
from kdedge.recipe import Recipe
from kdedge.run_pool import make_pool
from kdedge.run_stages import StageNotes
from kdedge.run_teacher import live_teacher
from kdedge.runs import Run, read_json, sha256_file
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, available_cores, pick_device
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog
from kdedge.train.optim import OptimConfig, learning_rate
from kdedge_export.cpu.plan import Plan
from kdedge_export.table import RangeTable
from kdedge_export.training.rate import kept, sound_rate
from kdedge_export.training.rounded import rounded_network, trained_model

__all__ = ["QATConfig", "qat_config", "require_teacher", "run_qat"]

Say = Callable[[str], None]
SPAN_REACH = 1.0  # widths that the end of a range can travel
SLOWEST = 3e-4  # below, a hundred steps change nothing: starting weights were tuned with less


class QATConfig(Config):
    """How the rounded network is trained; what is null follows from how the student was."""

    method: DistilledQATConfig = DistilledQATConfig()
    teacher: Literal["student", "teacher"] = "student"  # the student in FP32, or the run's outer network
    total_steps: Annotated[int, Field(gt=0)] | None = None  # null: a tenth of the student's, 100 or more
    # null: a tenth of the student's, at least SLOWEST, or less where that proves too much
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    learn_spans: bool = False


class _Asked(Config):
    qat: QATConfig = QATConfig()


def qat_config(settings: Sequence[str], steps: int | None = None) -> QATConfig:
    """The defaults with KEY=VALUE texts as after --set, such as qat.learn_spans=true; RecipeError with every problem.

    `steps` is qat.total_steps by its own flag.
    """
    given = [*settings, *([f"qat.total_steps={steps}"] if steps is not None else [])]
    return recipe_io.parse("{}", "--set", _Asked, given).qat


def require_teacher(run: Run, config: QATConfig) -> None:
    """ExportError where `config` names a teacher that the run does not have."""
    if config.teacher == "teacher" and not run.teacher_path.is_file():
        raise ExportError(
            f"qat.teacher is teacher, and {run.teacher_path} does not exist: this run has no outer network. "
            "Leave that setting out, and the student in FP32 is the teacher."
        )


def run_qat(
    run: Run, model: onnx.ModelProto, plan: Plan, table: RangeTable, config: QATConfig, say: Say
) -> tuple[onnx.ModelProto, RangeTable]:
    """Train `model`, the float form of the run's student, under the roundings of `plan` and `table`.

    Gives the float model with its new weights and the table to write it with. A second call with the same arguments
    goes on with a stopped one, from the checkpoints in RUN/qat-checkpoint. They are removed at the end, and where
    training lost its way, since it would again; what else fails leaves them. Raises RunError where the loss is no
    longer finite, DataError where the run's images are gone, ExportError as above.
    """
    recipe, student = recipe_io.load(str(run.recipe_path)), load_model(run.student_path)
    device = pick_device(recipe.engine.device)
    pool, names = _pool(run, recipe, student, device)
    teacher = student if config.teacher == "student" else load_model(run.teacher_path)
    asked_of, optim = live_teacher(teacher, pool, device), _optim(recipe, config, pool)

    def method_at(rate: float) -> DistilledQAT:
        span_step = _span_step(optim, rate) if config.learn_spans else None
        return DistilledQAT(rounded_network(model, plan, table, span_step), config.method, asked_of).to(device)

    batches = Batches(
        pool,
        recipe.views,
        labeled_batch=optim.labeled_batch or 0 if config.method.labeled_weight else 0,
        unlabeled_batch=(optim.labeled_batch or 0) * (optim.unlabeled_ratio or 0),
        seed=recipe.seed,
        stage="qat",
    )
    inner = StageNotes(run).plan("inner") or EnginePlan()
    # In bf16 there are fewer digits than codes.
    engine_plan = inner.model_copy(update={"precision": "fp32", "threads": available_cores()})
    if config.learn_spans:  # their gradients are divided by their size once a step, not once a part of its images
        engine_plan = engine_plan.model_copy(update={"parts": 1})
    folder = run.path / "qat-checkpoint"
    asked = _fingerprint(run, model, plan, table, config)
    say(f"QAT: {optim.total_steps} steps on {len(pool.unlabeled)} images ({device})")
    with Run(folder).lock():
        try:
            chosen = folder / f"qat-{asked[:12]}.rate.json"
            rate = config.learning_rate or kept(chosen, lambda: sound_rate(method_at, batches, optim))
            if rate != optim.learning_rate:
                say(f"QAT: a learning rate of {optim.learning_rate:g} would undo the calibration; {rate:g} is taken")
            average, _ = fit(
                method_at(rate),
                batches,
                optim.model_copy(update={"learning_rate": rate}),
                recipe.engine,
                engine_plan,
                Checkpoints(folder, f"qat-{asked[:12]}"),
                MetricsLog(folder / "metrics.jsonl", _Told(say)),
                seed=recipe.seed,
                class_names=names,
            )
        except RunError:
            shutil.rmtree(folder)
            raise
    shutil.rmtree(folder)
    return trained_model(average, model, table)


def _pool(run: Run, recipe: Recipe, student: LoadedModel, device: torch.device) -> tuple[Pool, tuple[str, ...]]:
    """What the run was trained on, without the images of the gate."""
    data = recipe.data
    root = Path(data.root) if data.root else None
    most = data.max_unreadable_fraction
    source = open_source(data.spec, root=root, max_unreadable_fraction=most, classes=data.classes)
    splits = Splits.from_json(read_json(run.splits_path), source)
    labeled, unlabeled = (np.setdiff1d(each, splits.gate) for each in (splits.labeled, splits.unlabeled))
    splits = replace(splits, labeled=labeled, unlabeled=unlabeled)
    if not len(unlabeled):
        raise DataError(f"All images of {run.path} are in its gate split, so none are left for QAT; leave --qat out.")
    images = open_store(source, splits.unlabeled, student.preprocess, device, data.resident_mib)
    return make_pool(images, splits, student.preprocess), source.classes


def _optim(recipe: Recipe, config: QATConfig, pool: Pool) -> OptimConfig:
    """The student's batches. No weight decay: batch normalisation no longer makes up for what it shrinks."""
    student = recipe.student.optim
    if config.method.labeled_weight and not len(pool.labels):
        raise DataError("labeled_weight of QAT is above 0, but all labeled images are in the gate split; set it to 0.")
    return OptimConfig(
        total_steps=config.total_steps or max(100, (student.total_steps or 0) // 10),
        labeled_batch=student.labeled_batch,
        unlabeled_ratio=student.unlabeled_ratio,
        learning_rate=config.learning_rate or max(SLOWEST, 0.1 * (student.learning_rate or 0.0)),
        warmup_steps=0,
        momentum=config.momentum,
        weight_decay=0.0,
        ema_decay=config.ema_decay,
        batch_norm_momentum=0.0,
    )


def _span_step(optim: OptimConfig, peak: float) -> float:
    """Such that an end that is pushed one way all the time travels SPAN_REACH widths, whatever the learning rate."""
    total = optim.total_steps or 0
    travelled = sum(learning_rate(step, total, peak, 0) for step in range(total)) / (1 - (optim.momentum or 0.0))
    return SPAN_REACH / travelled


def _fingerprint(run: Run, model: onnx.ModelProto, plan: Plan, table: RangeTable, config: QATConfig) -> str:
    """Of everything that a checkpoint must agree with: one of other weights, ranges or settings is not gone on with.

    Nor one of other versions: the same steps would not be computed alike.
    """
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    planned = [(each.name, _in_order(getattr(plan, each.name))) for each in fields(plan)]
    spans = sorted((name, *span) for name, span in table.spans.items())
    scales = sorted((name, each.tobytes().hex()) for name, each in table.weight_scales.items())
    read = [run.recipe_path, run.splits_path, run.student_path]
    read += [run.teacher_path] if config.teacher == "teacher" else []
    files = [sha256_file(path) for path in read]
    versions = __version__, torch.__version__
    digest.update(repr((planned, spans, scales, files, versions, config.model_dump_json())).encode())
    return digest.hexdigest()


def _in_order(value: tuple[str, ...] | frozenset[str] | dict[str, Any]) -> list[Any]:
    return list(value) if isinstance(value, tuple) else sorted(value.items() if isinstance(value, dict) else value)


@final
class _Told:
    """The loop's display: a sentence at every tenth of the way, with the time left."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self._began_at_s, self._first, self._tenths = time.perf_counter(), 0, 0

    def stage(self, name: str, total_steps: int) -> None:
        self._began_at_s = time.perf_counter()

    def step(self, record: Mapping[str, Any]) -> None:
        done, total = record["step"], record["total_steps"]
        self._first = self._first or done
        if "loss_distill" not in record or 10 * done // total == self._tenths:
            return
        self._tenths = 10 * done // total
        elapsed_s, steps = time.perf_counter() - self._began_at_s, done - self._first
        left = f", about {elapsed_s / steps * (total - done):.0f} s left" if steps > 0 and done < total else ""
        self.say(
            f"QAT: step {done} of {total}{left}; on its batch INT8 gives FP32's class for {record['agreement']:.1%}"
        )
