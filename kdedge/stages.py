"""The stages of a run as plain calls: pre-training, baseline, outer network, trusted set, inner network, one look at
the test split. What a recipe does not ask for is left out.

Each stage leaves a file, and a stage whose file is there is not done again. What comes next always reads the file, so
that a resumed run computes with exactly what an uninterrupted one does. Where processes share a run, all of them go
through the same calls; the first writes, and what it wrote the others read.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch

from kdedge.data.batches import Batches, step_seed
from kdedge.methods.health import SliceHealth, slice_health
from kdedge.methods.simclr import SimCLR
from kdedge.methods.step import Method
from kdedge.methods.supervised import FineTuneConfig
from kdedge.models.weights import load_model, save_model, save_pretrained
from kdedge.models.zoo import Network, count_macs
from kdedge.recipe import TeacherConfig
from kdedge.run_begin import Begun
from kdedge.run_pool import held_back_truth
from kdedge.run_result import finish
from kdedge.run_training import Training, stored_answers, training_of
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, available_cores
from kdedge.train.evaluate import features, predict
from kdedge.train.fastest import measure_plan
from kdedge.train.knn import features_of_some, knn_accuracy
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog
from kdedge.train.probe import fit_head
from kdedge.train.replay import Replay, replay
from kdedge.trust.outliers import outlier_mask
from kdedge.trust.select import save_trusted, select_trusted
from kdedge.trust.stream import Share
from kdedge_device.preprocess import Preprocess

__all__ = ["Stages"]

_TRAINING_FLOPS = 6  # for each multiply-add of an image: two forward, four backward
_INFERENCE_FLOPS = 2


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
        started_at_s, recipe = time.perf_counter(), self.recipe
        if recipe.pretrain is not None:
            self._train(training_of(self.begun, "pretrain"))
        if recipe.baseline.enabled:
            self._train(training_of(self.begun, "baseline"))
        if recipe.teacher is not None:
            self._outer(recipe.teacher)
            if not isinstance(recipe.student.method, FineTuneConfig):
                self._select()
        self._train(training_of(self.begun, "inner"))
        result = finish(self.begun, self.val)
        self.notes.finished(time.perf_counter() - started_at_s)
        return result

    def replay(self, stage: str, step: int) -> Replay:
        """A lost step of a stage once more; see `kdedge.train.replay`."""
        training = training_of(self.begun, stage)
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

    def _outer(self, teacher: TeacherConfig) -> None:
        """The outer network, unless its file is there already: trained, or taken as it is."""
        if teacher.ready is None:
            self._train(training_of(self.begun, "outer"))
        elif "outer" not in self.notes.done():
            ready = self.begun.ready_teacher(teacher.ready)
            if self.ranks.is_first:
                save_model(self.run.teacher_path, ready.module, ready.spec, ready.classes, ready.preprocess)
            self._plan_unmeasured("outer")
            self.notes.note_done("outer", seconds=0.0, flops=0, ready=teacher.ready)
            self.begun.display.say(f"The outer network is {teacher.ready}; stage 1 is left out.")

    def _train(self, training: Training) -> None:
        """Train one network, unless its file is there already; from its last checkpoint where memory ran out."""
        stage = training.stage
        if stage in self.notes.done():
            return
        self.notes.begins(stage)
        if training.head_only:
            self._fit_head(training)
            return
        while True:
            try:
                self._fit(training)
                return
            except torch.OutOfMemoryError as error:
                plan = self._plan_so_far(stage)  # memory may have run out while plans were measured
                # Batch norm needs two images; and processes that share a batch do not cut it further.
                if self.ranks.world > 1 or 4 * plan.parts > (training.labeled or training.unlabeled):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler, where the step's tensors are no longer held by the traceback.
            smaller = {"parts": 2 * plan.parts, "compile": "none", "compile_views": "none"}  # parts are not compiled
            self.notes.note_plan(stage, plan.model_copy(update=smaller), [])
            self.begun.display.say(
                f"{stage}: the memory of {self.begun.device} is full ({reason}). A batch now passes through the "
                f"network in {2 * plan.parts} parts, from the last checkpoint on: the same gradients, but that batch "
                "norm sees one part at a time."
            )

    def _fit_head(self, training: Training) -> None:
        """Linear evaluation: the head is fitted once, and everything else stays as it started."""
        stage, pool, started_at_s = training.stage, self.pool, time.perf_counter()
        network, plan = self._method(training).network, self._plan_unmeasured(stage)
        self.begun.display.stage(stage, 1)
        fit_head(network, pool.images.rows(pool.labeled), pool.labels, pool.mean, pool.std, plan)
        if self.ranks.is_first:
            save_model(training.path, network.eval(), training.spec, self.source.classes, self.begun.preprocess)
        self.metrics.rewind(stage, 0)
        self.metrics.write(stage, 1, total_steps=1)
        self.notes.note_done(
            stage,
            seconds=round(time.perf_counter() - started_at_s, 2),
            flops=_INFERENCE_FLOPS * _macs(network, self.begun.preprocess) * len(pool.labels),
        )

    def _method(self, training: Training) -> Method:
        """The method with its network as the stage starts, on the device."""
        torch.manual_seed(step_seed(self.recipe.seed, training.stage, "init"))
        network = self.begun.network(training.spec, training.who, training.stage)
        return training.make_method(network).to(self.begun.device)

    def _ready(self, training: Training) -> _Ready:
        stage, pool = training.stage, self.pool
        method = self._method(training)
        batches = self._batches(training)
        plan = self._plan(training, method)
        checkpoints = Checkpoints(self.run.checkpoint_path, stage, writes=self.ranks.is_first)
        if self.begun.head_is_probed(stage, training.who) and checkpoints.load()[0] is None:
            self.begun.display.say(f"{stage}: the head begins as a linear probe of {len(pool.labels)} labeled images.")
            fit_head(method.network, pool.images.rows(pool.labeled), pool.labels, pool.mean, pool.std, plan)
        return _Ready(method, batches, plan, checkpoints)

    def _batches(self, training: Training, shares: int = 1) -> Batches:
        """The batches of a stage, this process's share of each; or, of `shares`, whole ones of a share's size."""
        return Batches(
            self.pool,
            training.views,
            labeled_batch=-(-training.labeled // shares),
            unlabeled_batch=-(-training.unlabeled // shares),
            seed=self.recipe.seed,
            stage=training.stage,
            share=(self.ranks.rank, self.ranks.world) if shares == 1 else (0, 1),
        )

    def _fit(self, training: Training) -> None:
        stage, ready = training.stage, self._ready(training)
        watch = self._watch(training, ready.plan)
        average, elapsed_s = fit(
            ready.method,
            ready.batches,
            training.optim,
            self.recipe.engine,
            ready.plan,
            ready.checkpoints,
            self.metrics,
            seed=self.recipe.seed,
            validate=self._validate(training, ready.plan),
            watch=watch,
            class_names=self.source.classes,
            ranks=self.ranks,
        )
        if self.ranks.is_first:
            self._save(training, average, ready.method)
        images = ready.batches.images_per_step * (training.optim.total_steps or 0)
        macs = ready.method.passes * _macs(average, self.begun.preprocess)
        self.notes.note_done(
            stage,
            seconds=round(elapsed_s, 2),
            images_per_second=round(images / elapsed_s, 1),
            flops=images * (_TRAINING_FLOPS * macs + ready.method.extra_flops_an_image),
            **({} if watch is None else {"steps": training.optim.total_steps, **watch(average)}),
        )
        if self.ranks.is_first:
            self.run.failure_path.unlink(missing_ok=True)  # a step was lost, and has been got through since
        if not self.recipe.engine.keep_checkpoints:
            ready.checkpoints.clear()

    def _save(self, training: Training, average: Network, method: Method) -> None:
        preprocess = self.begun.preprocess
        if isinstance(method, SimCLR):
            save_pretrained(training.path, average.backbone, method.projection, training.spec, preprocess)
        else:
            save_model(training.path, average, training.spec, self.source.classes, preprocess)

    def _validate(self, training: Training, plan: EnginePlan) -> Callable[[Network], SliceHealth] | None:
        val = self.val
        if val is None or not len(val.labels) or training.stage == "pretrain":
            return None
        pool, threshold = self.pool, training.threshold

        def score(network: Network) -> SliceHealth:
            logits = predict(network, val.images, pool.mean, pool.std, plan, self.ranks)
            return slice_health(logits, val.labels, threshold)

        return score

    def _watch(self, training: Training, plan: EnginePlan) -> Callable[[Network], dict[str, float | None]] | None:
        """For features that were never told a class: how well the nearest labeled images tell it.

        Of val where there is one, else of each labeled image by the others. It is logged, and chooses nothing.
        """
        if training.stage != "pretrain":
            return None
        pool, val = self.pool, self.val

        def look(network: Network) -> dict[str, float | None]:
            bank = features_of_some(network, pool.images, pool.labeled, pool.mean, pool.std, plan, self.ranks)
            labels = pool.labels.cpu()
            if val is None or not len(val.labels):
                return {"knn_accuracy": knn_accuracy(bank, labels)}
            query = features(network, val.images, pool.mean, pool.std, plan, self.ranks)
            return {"knn_accuracy": knn_accuracy(query, val.labels, bank, labels)}

        return look

    def _plan(self, training: Training, method: Method) -> EnginePlan:
        """The plan that was noted, the recipe's, or one measured now; written down."""
        stage = training.stage
        noted, plan = self.notes.plan(stage), self.recipe.engine.fixed_plan
        if noted is not None:
            return noted
        timings: list[dict[str, object]] = []
        if plan is None:
            # A method takes whole batches; one of a share's size costs what this process will pay.
            batches = self._batches(training, shares=self.ranks.world)
            deterministic = self.recipe.engine.deterministic
            plan, timings = measure_plan(method, batches, self.begun.device, deterministic=deterministic)
            plan = EnginePlan.model_validate_json(self.ranks.text(plan.model_dump_json()))
        self.notes.note_plan(stage, plan, timings)
        return plan

    def _plan_unmeasured(self, stage: str) -> EnginePlan:
        """For a stage without steps; written down."""
        plan = self._plan_so_far(stage)
        self.notes.note_plan(stage, plan, [])
        return plan

    def _plan_so_far(self, stage: str) -> EnginePlan:
        """The plan that was noted, the recipe's, or a plain one."""
        engine = self.recipe.engine
        plain = EnginePlan(threads=available_cores(), deterministic=engine.deterministic)
        return self.notes.plan(stage) or engine.fixed_plan or plain

    def _select(self) -> None:
        """The trusted set, unless its file is there already."""
        if "trusted" in self.notes.done():
            return
        self.notes.begins("trusted")
        self.begun.display.stage("trusted", 1)
        started_at_s = time.perf_counter()
        pool, loaded = self.pool, load_model(self.run.teacher_path)
        logits, features, features_path = stored_answers(self.begun, loaded)
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
        if self.recipe.trust.filters != "none":
            kept, count = summary["size"], len(trusted.index)
            self.begun.display.say(f"Trusted pseudo labels: {kept} of {count} unlabeled images.")


def _macs(network: Network, preprocess: Preprocess) -> int:
    return count_macs(network, preprocess.channels, preprocess.height, preprocess.width)
