"""The stages of a run as plain calls: baseline, outer network, trusted set, inner network, one look at the test split.

Each stage leaves a file, and a stage whose file is there is not done again. What comes next always reads the file, so
that a resumed run computes with exactly what an uninterrupted one does. Where processes share a run, all of them go
through the same calls; the first writes, and what it wrote the others read.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdedge.data.batches import Batches, step_seed
from kdedge.losses.consistency import log_prior
from kdedge.methods.fixmatch import FixMatch
from kdedge.methods.health import SliceHealth, slice_health
from kdedge.methods.kd_fixmatch import KDFixMatch
from kdedge.methods.step import Method
from kdedge.methods.supervised import Supervised
from kdedge.methods.thresholds import Policy, ThresholdConfig, make_policy
from kdedge.models.weights import LoadedModel, load_model, save_model
from kdedge.models.zoo import ModelSpec, Network, count_macs
from kdedge.recipe import TEACHERS_WEIGHTS, TeacherConfig
from kdedge.run_begin import Begun
from kdedge.run_pool import held_back_truth
from kdedge.run_result import finish
from kdedge.run_teacher import copy_weights, make_teacher, nothing_trusted, outer_answers, targets
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, available_cores, measure_plan
from kdedge.train.evaluate import predict
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog
from kdedge.train.optim import OptimConfig
from kdedge.train.probe import fit_head
from kdedge.train.replay import Replay, replay
from kdedge.trust.outliers import outlier_mask
from kdedge.trust.select import load_trusted, save_trusted, select_trusted
from kdedge.trust.stream import Share
from kdedge_device.preprocess import Preprocess

__all__ = ["Stages"]

_TRAINING_FLOPS = 6  # for each multiply-add of an image: two forward, four backward
_INFERENCE_FLOPS = 2


@dataclass(frozen=True)
class _Training:
    """A stage that trains a network: the "student" or the "teacher", from what, how long, and the file it goes to."""

    stage: str
    who: str
    path: Path
    spec: ModelSpec
    optim: OptimConfig
    make_method: Callable[[Network], Method]


@dataclass(frozen=True)
class _Ready:
    """What a training stage starts with; the same after every stop."""

    method: Method
    batches: Batches
    plan: EnginePlan
    checkpoints: Checkpoints


@final
class Stages:
    """The stages of a run that has begun, in their order."""

    def __init__(self, begun: Begun, *, logs: bool = True) -> None:
        self.begun, self.notes = begun, begun.notes
        self.run, self.recipe, self.source, self.pool = begun.run, begun.recipe, begun.source, begun.pool
        self.ranks = begun.ranks
        self.metrics = MetricsLog(
            self.run.metrics_path,
            begun.display,
            writes=self.ranks.is_first and logs,
            tensorboard=self.recipe.engine.tensorboard,
        )
        self.val = begun.load(begun.splits.val) if len(begun.splits.val) else None

    def all(self) -> dict[str, Any]:
        """Everything that is not done yet; what result.json says."""
        started_at_s = time.perf_counter()
        if self.recipe.baseline.enabled:
            self._train(self._training("baseline"))
        if self.recipe.teacher is not None:
            self._outer(self.recipe.teacher)
            self._select()
        self._train(self._training("inner"))
        result = finish(self.begun, self.val)
        self.notes.finished(time.perf_counter() - started_at_s)
        return result

    def replay(self, stage: str, step: int) -> Replay:
        """A lost step of a stage once more; see `kdedge.train.replay`."""
        training = self._training(stage)
        ready = self._ready(training)
        return replay(
            ready.method,
            ready.batches,
            training.optim,
            ready.plan,
            ready.checkpoints,
            seed=self.recipe.seed,
            to_step=step,
        )

    def _training(self, stage: str) -> _Training:
        begun, recipe = self.begun, self.recipe
        if stage == "outer":
            assert recipe.teacher is not None
            spec, path = begun.teacher_spec(recipe.teacher), self.run.teacher_path
            return _Training(stage, "teacher", path, spec, recipe.teacher.optim, self._outer_method)
        spec = begun.student_spec()
        if stage == "baseline":
            return _Training(stage, "student", self.run.baseline_path, spec, recipe.baseline.optim, Supervised)
        return _Training(stage, "student", self.run.student_path, spec, recipe.student.optim, self._inner_method)

    def _outer(self, teacher: TeacherConfig) -> None:
        """The outer network, unless its file is there already: trained, or taken as it is."""
        if teacher.ready is None:
            self._train(self._training("outer"))
        elif "outer" not in self.notes.done():
            ready = self.begun.ready_teacher(teacher.ready)
            if self.ranks.is_first:
                save_model(self.run.teacher_path, ready.module, ready.spec, ready.classes, ready.preprocess)
            engine = self.recipe.engine
            plan = engine.fixed_plan or EnginePlan(threads=available_cores(), deterministic=engine.deterministic)
            self.notes.note_plan("outer", plan, [])
            self.notes.note_done("outer", seconds=0.0, flops=0, ready=teacher.ready)
            self.begun.display.say(f"The outer network is {teacher.ready}; stage 1 is left out.")

    def _outer_method(self, network: Network) -> Method:
        assert self.recipe.teacher is not None
        config = self.recipe.teacher.method
        return FixMatch(network, config, self._policy(config.thresholds), self._log_prior())

    def _policy(self, config: ThresholdConfig) -> Policy:
        return make_policy(config, len(self.source.classes), len(self.pool.unlabeled))

    def _log_prior(self) -> Tensor:
        return log_prior(self.pool.labels, len(self.source.classes))

    def _train(self, training: _Training) -> None:
        """Train one network, unless its file is there already; from its last checkpoint where memory ran out."""
        stage = training.stage
        if stage in self.notes.done():
            return
        self.notes.begins(stage)
        while True:
            try:
                self._fit(training)
                return
            except torch.OutOfMemoryError as error:
                plan = self.notes.plan(stage)
                # Batch norm needs two images; and processes that share a batch do not cut it further.
                if plan is None or self.ranks.world > 1 or 4 * plan.parts > (training.optim.labeled_batch or 0):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler, where the step's tensors are no longer held by the traceback.
            self.notes.note_plan(stage, plan.model_copy(update={"parts": 2 * plan.parts}), [])
            self.begun.display.say(
                f"{stage}: the memory of {self.begun.device} is full ({reason}). A batch now passes through the "
                f"network in {2 * plan.parts} parts, from the last checkpoint on: the same gradients, but that batch "
                "norm sees one part at a time."
            )

    def _ready(self, training: _Training) -> _Ready:
        stage, optim, pool = training.stage, training.optim, self.pool
        torch.manual_seed(step_seed(self.recipe.seed, stage, "init"))
        method = training.make_method(self.begun.network(training.spec, training.who)).to(self.begun.device)
        batches = self._batches(stage, optim)
        plan = self._plan(stage, method, optim)
        checkpoints = Checkpoints(self.run.checkpoint_path, stage, writes=self.ranks.is_first)
        if self.begun.head_is_probed(stage, training.who) and checkpoints.load()[0] is None:
            self.begun.display.say(f"{stage}: the head begins as a linear probe of {len(pool.labels)} labeled images.")
            fit_head(method.network, pool.images.rows(pool.labeled), pool.labels, pool.mean, pool.std, plan)
        return _Ready(method, batches, plan, checkpoints)

    def _batches(self, stage: str, optim: OptimConfig, shares: int = 1) -> Batches:
        """The batches of a stage, this process's share of each; or, of `shares`, whole ones of a share's size."""
        labeled = optim.labeled_batch or 0
        unlabeled = 0 if stage == "baseline" else labeled * (optim.unlabeled_ratio or 0)
        return Batches(
            self.pool,
            self.recipe.views,
            labeled_batch=-(-labeled // shares),
            unlabeled_batch=-(-unlabeled // shares),
            seed=self.recipe.seed,
            stage=stage,
            share=(self.ranks.rank, self.ranks.world) if shares == 1 else (0, 1),
        )

    def _fit(self, training: _Training) -> None:
        stage, ready = training.stage, self._ready(training)
        average, elapsed_s = fit(
            ready.method,
            ready.batches,
            training.optim,
            self.recipe.engine,
            ready.plan,
            ready.checkpoints,
            self.metrics,
            seed=self.recipe.seed,
            validate=self._validate(stage, ready.plan),
            class_names=self.source.classes,
            ranks=self.ranks,
        )
        if self.ranks.is_first:
            save_model(training.path, average, training.spec, self.source.classes, self.begun.preprocess)
        images = ready.batches.images_per_step * (training.optim.total_steps or 0)
        macs = ready.method.passes * _macs(average, self.begun.preprocess)
        self.notes.note_done(
            stage,
            seconds=round(elapsed_s, 2),
            images_per_second=round(images / elapsed_s, 1),
            flops=images * (_TRAINING_FLOPS * macs + ready.method.extra_flops_an_image),
        )
        if self.ranks.is_first:
            self.run.failure_path.unlink(missing_ok=True)  # a step was lost, and has been got through since
        if not self.recipe.engine.keep_checkpoints:
            ready.checkpoints.clear()

    def _validate(self, stage: str, plan: EnginePlan) -> Callable[[Network], SliceHealth] | None:
        val = self.val
        if val is None or not len(val.labels):
            return None
        pool, threshold = self.pool, self._threshold(stage)

        def score(network: Network) -> SliceHealth:
            logits = predict(network, val.images, pool.mean, pool.std, plan, self.ranks)
            return slice_health(logits, val.labels, threshold)

        return score

    def _threshold(self, stage: str) -> float | None:
        """What a stage's pseudo labels are held to, for reports on the validation split."""
        teacher = self.recipe.teacher
        if stage == "outer" and teacher is not None:
            return teacher.method.thresholds.threshold
        return self.recipe.student.method.thresholds.threshold if stage == "inner" else None

    def _plan(self, stage: str, method: Method, optim: OptimConfig) -> EnginePlan:
        """The plan that was noted, the recipe's, or one measured now; written down."""
        noted, plan = self.notes.plan(stage), self.recipe.engine.fixed_plan
        if noted is not None:
            return noted
        timings: list[dict[str, object]] = []
        if plan is None:
            # A method takes whole batches; one of a share's size costs what this process will pay.
            batches = self._batches(stage, optim, shares=self.ranks.world)
            deterministic = self.recipe.engine.deterministic
            plan, timings = measure_plan(method, batches, self.begun.device, deterministic=deterministic)
            plan = EnginePlan.model_validate_json(self.ranks.text(plan.model_dump_json()))
        self.notes.note_plan(stage, plan, timings)
        return plan

    def _select(self) -> None:
        """The trusted set, unless its file is there already."""
        if "trusted" in self.notes.done():
            return
        self.notes.begins("trusted")
        self.begun.display.stage("trusted", 1)
        started_at_s = time.perf_counter()
        pool, loaded = self.pool, load_model(self.run.teacher_path)
        logits, features, features_path = self._outer_answers(loaded)
        given = torch.full((len(pool.unlabeled),), -1)
        given[pool.labeled.cpu()] = pool.labels.cpu()  # unlabeled is the whole pool, so places agree
        outlier, _ = outlier_mask(logits, features, given, self.recipe.outliers)
        trusted = select_trusted(
            logits,
            features,
            self.begun.splits.unlabeled,
            given,
            self.recipe.trust,
            seed=self.recipe.seed,
            outlier_N=outlier,
            share=Share(self.ranks.rank, self.ranks.world, self.ranks.sum),
        )
        self.ranks.barrier()  # all have read the features
        if self.ranks.is_first:
            save_trusted(self.run.trusted_path, trusted)
            features_path.unlink()
        summary = trusted.summary(held_back_truth(self.begun.splits), len(self.source.classes))
        # The line before the note: a run killed between the two writes it once, and not never.
        self.metrics.rewind("trusted", 0)
        self.metrics.write("trusted", 1, total_steps=1, kept_fraction=summary["coverage"])
        self.notes.note_done(
            "trusted",
            seconds=round(time.perf_counter() - started_at_s, 2),
            flops=_INFERENCE_FLOPS * _macs(loaded.module, loaded.preprocess) * len(pool.unlabeled),
        )
        self.begun.display.say(f"Trusted pseudo labels: {summary['size']} of {len(trusted.index)} unlabeled images.")

    def _outer_answers(self, loaded: LoadedModel) -> tuple[Tensor, np.memmap, Path]:
        """Logits, features and the file that holds the features, to be removed."""
        features_path, plan = self.run.checkpoint_path / "features.npy", self.notes.plan_of("outer")
        logits, features = outer_answers(
            loaded, self.source, self.begun.splits, self.pool, self.begun.preprocess, plan, features_path, self.ranks
        )
        return logits, features, features_path

    def _inner_method(self, network: Network) -> Method:
        """FixMatch alone where there is no outer network."""
        recipe, config = self.recipe, self.recipe.student.method
        policy, prior = self._policy(config.thresholds), self._log_prior()
        if recipe.teacher is None:
            return KDFixMatch(network, config, policy, nothing_trusted(len(self.pool.unlabeled)), None, prior)
        if recipe.student.init == TEACHERS_WEIGHTS:
            copy_weights(network, self.run.teacher_path)
        trusted, loaded = load_trusted(self.run.trusted_path), load_model(self.run.teacher_path)
        features = None
        if config.distill.needs_features and config.distill.views == "stored":
            _, stored, features_path = self._outer_answers(loaded)
            features = torch.from_numpy(np.array(stored, dtype=np.float32))
            self.ranks.barrier()  # all have read it
            if self.ranks.is_first:
                features_path.unlink()
        teacher = make_teacher(config.distill, loaded, torch.from_numpy(trusted.logits), features, self.pool)
        return KDFixMatch(network, config, policy, targets(trusted), teacher, prior)


def _macs(network: Network, preprocess: Preprocess) -> int:
    return count_macs(network, preprocess.channels, preprocess.height, preprocess.width)
