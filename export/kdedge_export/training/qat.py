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
from torch import Tensor, nn
from torch.nn import functional

from kdedge import __version__, recipe_io
from kdedge.config import Config
from kdedge.data.batches import Batches, Pool
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits
from kdedge.data.store import open_store
from kdedge.errors import DataError, ExportError
from kdedge.methods.qat import DistilledQAT, DistilledQATConfig
from kdedge.models.weights import LoadedModel, load_model
from kdedge.models.zoo import Network
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
from kdedge_export.graph import Graph, prune
from kdedge_export.table import RangeTable
from kdedge_export.training.fake_quant import round_bias, round_weight
from kdedge_export.training.torch_graph import TorchGraph

__all__ = ["QATConfig", "RoundedHead", "qat_config", "require_teacher", "rounded_network", "run_qat"]

Say = Callable[[str], None]
SPAN_REACH = 1.0  # widths that the end of a range can travel; by chance it goes a tenth of that in a hundred steps
SLOWEST = 3e-4  # below, a hundred steps change nothing: starting weights were tuned with less


class QATConfig(Config):
    """How the rounded network is trained; what is null follows from how the student was."""

    method: DistilledQATConfig = DistilledQATConfig()
    teacher: Literal["student", "teacher"] = "student"  # the student in FP32, or the run's outer network
    total_steps: Annotated[int, Field(gt=0)] | None = None  # null: a tenth of the student's, 100 or more
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # null: a tenth of the student's, at least SLOWEST
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


@final
class RoundedHead(nn.Linear):
    """The last layer, its weight and bias in the roundings of the INT8 file. Its input is rounded already.

    Without a bias it learns none: the file has no place for it.
    """

    scales_K: Tensor

    def __init__(self, weight_KF: Tensor, bias_K: Tensor | None, scales_K: Tensor, input_scale: float) -> None:
        super().__init__(weight_KF.shape[1], weight_KF.shape[0], bias=bias_K is not None)
        _take(self, weight_KF, bias_K)
        self.register_buffer("scales_K", scales_K, persistent=False)
        self._input_scale = input_scale

    def forward(self, x_BF: Tensor) -> Tensor:
        bias_K: Tensor | None = self.bias
        scales_K = self.scales_K
        if bias_K is not None:
            bias_K, scales_K = round_bias(bias_K, scales_K, self._input_scale)
        return functional.linear(x_BF, round_weight(self.weight, scales_K), bias_K)


def _take(head: nn.Linear, weight_KF: Tensor, bias_K: Tensor | None) -> None:
    head.weight = nn.Parameter(weight_KF)
    if bias_K is not None:
        head.bias = nn.Parameter(bias_K)


def rounded_network(model: onnx.ModelProto, plan: Plan, table: RangeTable, span_step: float | None = None) -> Network:
    """The float `model`, whose last node is a Gemm, with the roundings of `plan` and `table`, as backbone and head.

    With `span_step` the ranges are learned (`LearnedSpans`).
    ExportError where it ends otherwise, or in an operator that torch_ops does not know.
    """
    graph = Graph(model)
    last = graph.producer[graph.outputs[0]]
    weight = graph.constant(last.input[1]) if last.op_type == "Gemm" else None
    if weight is None:
        raise ExportError(
            f"The model ends in a {last.op_type}; QAT expects a linear layer there. Export without --qat."
        )
    body = onnx.ModelProto()
    body.CopyFrom(model)
    features = onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None)
    body.graph.output[0].CopyFrom(features)
    prune(body, [node for node in body.graph.node if node.name != last.name])
    backbone = TorchGraph(body, plan, table, span_step=span_step)
    bias = graph.constant(last.input[2]) if _has_bias(last) else None
    weight_KF, bias_K = torch.from_numpy(weight.copy()), None if bias is None else torch.from_numpy(bias.copy())
    if last.name in plan.layers:
        scales_K = torch.from_numpy(np.asarray(table.weight_scales[last.name], np.float32))
        return Network(backbone, RoundedHead(weight_KF, bias_K, scales_K, table.u8(last.input[0]).scale))
    head = nn.Linear(weight_KF.shape[1], weight_KF.shape[0], bias=bias_K is not None)
    _take(head, weight_KF, bias_K)
    return Network(backbone, head)


def _has_bias(gemm: onnx.NodeProto) -> bool:
    return len(gemm.input) > 2 and bool(gemm.input[2])


def _trained(network: Network, model: onnx.ModelProto, table: RangeTable) -> tuple[onnx.ModelProto, RangeTable]:
    """The float model and the range table that the network has become.

    A range that was learned is the one for symmetric codes too: what was chosen for them was chosen for other weights,
    and does not know where the network has learned to clip.
    """
    backbone, graph = network.backbone, Graph(model)
    assert isinstance(backbone, TorchGraph)
    last = graph.producer[graph.outputs[0]]
    made = backbone.to_onnx(model)
    head = {last.input[1]: network.head.weight, **({last.input[2]: network.head.bias} if _has_bias(last) else {})}
    for place, each in enumerate(made.graph.initializer):
        if each.name in head:
            value = head[each.name].detach().cpu().contiguous().numpy()
            made.graph.initializer[place].CopyFrom(onnx.numpy_helper.from_array(value, each.name))
    symmetric = {name: span for name, span in table.s8_spans.items() if name not in backbone.spans}
    return made, replace(table.with_spans(backbone.spans), s8_spans=symmetric)


def run_qat(
    run: Run, model: onnx.ModelProto, plan: Plan, table: RangeTable, config: QATConfig, say: Say
) -> tuple[onnx.ModelProto, RangeTable]:
    """Train `model`, the float form of the run's student, under the roundings of `plan` and `table`.

    Gives the float model with its new weights and the table to write it with. A second call with the same arguments
    goes on with a stopped one, from the checkpoints in RUN/qat-checkpoint; they are removed at the end, and where it
    failed, since it would fail again. Raises RunError where the loss is no longer finite, DataError where the run's
    images are gone, ExportError as above.
    """
    recipe, student = recipe_io.load(str(run.recipe_path)), load_model(run.student_path)
    device = pick_device(recipe.engine.device)
    pool, names = _pool(run, recipe, student, device)
    teacher = student if config.teacher == "student" else load_model(run.teacher_path)
    optim = _optim(recipe, config, pool)
    assert optim.total_steps is not None
    network = rounded_network(model, plan, table, _span_step(optim) if config.learn_spans else None)
    method = DistilledQAT(network, config.method, live_teacher(teacher, pool, device)).to(device)
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
            average, _ = fit(
                method,
                batches,
                optim,
                recipe.engine,
                engine_plan,
                Checkpoints(folder, f"qat-{asked[:12]}"),
                MetricsLog(folder / "metrics.jsonl", _Told(say)),
                seed=recipe.seed,
                class_names=names,
            )
        except Exception:  # but not Ctrl-C
            shutil.rmtree(folder)
            raise
    shutil.rmtree(folder)
    return _trained(average, model, table)


def _pool(run: Run, recipe: Recipe, student: LoadedModel, device: torch.device) -> tuple[Pool, tuple[str, ...]]:
    """What the run was trained on, without the images of the gate."""
    data = recipe.data
    root = Path(data.root) if data.root else None
    source = open_source(data.spec, root=root, max_unreadable_fraction=data.max_unreadable_fraction)
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


def _span_step(optim: OptimConfig) -> float:
    """Such that an end that is pushed one way all the time travels SPAN_REACH widths, whatever the learning rate."""
    total, peak, momentum = optim.total_steps or 0, optim.learning_rate or 0.0, optim.momentum or 0.0
    rates = sum(learning_rate(step, total, peak, 0) for step in range(total))
    return SPAN_REACH * (1 - momentum) / rates


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
