"""The stages as plain calls: baseline, outer network, trusted set, inner network, one look at the test split.

Each stage leaves a file, and a stage whose file is there is not done again. What comes next always reads the file, so
that a resumed run computes with exactly what an uninterrupted one does.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdedge.data import Splits, make_splits, open_source
from kdedge.data.batches import Batches, step_seed
from kdedge.data.leaks import without_leaks
from kdedge.errors import DeviceError, RunError
from kdedge.losses.consistency import log_prior
from kdedge.methods.fixmatch import FixMatch
from kdedge.methods.health import SliceHealth, slice_health
from kdedge.methods.kd_fixmatch import KDFixMatch
from kdedge.methods.step import Method
from kdedge.methods.supervised import Supervised
from kdedge.methods.thresholds import Policy, ThresholdConfig, make_policy
from kdedge.models.weights import LoadedModel, load_model, save_model
from kdedge.models.zoo import ModelSpec, Network, count_macs
from kdedge.recipe import TEACHERS_WEIGHTS, Recipe, TeacherConfig
from kdedge.run_begin import Begun, begin
from kdedge.run_folder import check_folder, run_folder
from kdedge.run_pool import held_back_truth
from kdedge.run_result import finish
from kdedge.run_teacher import copy_weights, make_teacher, nothing_trusted, outer_answers, targets
from kdedge.runs import Run, read_json, sha256_file
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, available_cores, measure_plan, pick_device
from kdedge.train.evaluate import predict
from kdedge.train.loop import fit
from kdedge.train.metrics import Display, MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig
from kdedge.train.probe import fit_head
from kdedge.train.stop import terminable
from kdedge.trust.outliers import outlier_mask
from kdedge.trust.select import load_trusted, save_trusted, select_trusted
from kdedge_device.preprocess import Preprocess

__all__ = ["Stopped", "train"]


_TRAINING_FLOPS = 6  # for each multiply-add of an image: two forward, four backward
_INFERENCE_FLOPS = 2


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, in a run that can be resumed."""


def train(
    recipe: Recipe, out: Path | None = None, *, resume: bool = False, display: Display | None = None
) -> tuple[Run, dict[str, Any]]:
    """Everything from images to a student, and what result.json says.

    Raises RunError where the folder holds another run, or one without `resume`; DataError and RecipeError where data
    and recipe do not fit; leaves a run that can be resumed whenever it is stopped.
    """
    with terminable():
        return _train(recipe, out, resume, display or SilentDisplay())


def _train(recipe: Recipe, out: Path | None, resume: bool, shown: Display) -> tuple[Run, dict[str, Any]]:
    device = pick_device(recipe.engine.device)
    root = Path(recipe.data.root) if recipe.data.root else None
    source = open_source(
        recipe.data.spec, root=root, max_unreadable_fraction=recipe.data.max_unreadable_fraction
    ).decodable()
    splits = make_splits(source, recipe.data.labels, recipe.seed)
    run = Run(out or run_folder(recipe, source, splits))
    begun = resume and run.splits_path.is_file()
    if begun:
        splits = Splits.from_json(read_json(run.splits_path), source)  # says what changed since
    finished = check_folder(run, recipe, device, resume)
    if finished is not None:
        shown.say(f"The run in {run.path} is finished already; nothing was done.")
        return run, finished
    if recipe.data.remove_leaks and not begun:
        splits = without_leaks(source, splits)
    for sentence in (*source.warnings, *splits.warnings):
        shown.say(sentence)
    with run.lock():
        stages = _Stages(begin(run, recipe, source, splits, device, shown))
        try:
            result = stages.all()
        except KeyboardInterrupt:
            raise Stopped from None  # the manifest goes on saying "running"
        except torch.OutOfMemoryError as error:
            _try_to_note_failure(run, error)
            raise DeviceError(
                f"The memory of {device} is full: {str(error).splitlines()[0]} Set teacher.optim.labeled_batch and "
                "student.optim.labeled_batch, or data.image_px, lower."
            ) from error
        except BaseException as error:
            _try_to_note_failure(run, error)
            raise
    return run, result


def _try_to_note_failure(run: Run, error: BaseException) -> None:
    with contextlib.suppress(RunError):  # the disk is full: the first error is the one to tell
        run.update_manifest(status="failed", failure=f"{type(error).__name__}: {error}")


@final
class _Stages:
    """The stages of a run that has begun, in their order."""

    def __init__(self, begun: Begun) -> None:
        self.begun, self.notes = begun, begun.notes
        self.run, self.recipe, self.source, self.pool = begun.run, begun.recipe, begun.source, begun.pool
        self.metrics = MetricsLog(self.run.metrics_path, begun.display)
        self.val = begun.load(begun.splits.val) if len(begun.splits.val) else None

    def all(self) -> dict[str, Any]:
        started_at_s = time.perf_counter()
        run, recipe, student = self.run, self.recipe, self.begun.student_spec()
        if recipe.baseline.enabled:
            self._train("baseline", "student", run.baseline_path, student, recipe.baseline.optim, Supervised)
        if recipe.teacher is not None:
            self._outer(recipe.teacher)
            self._select()
        self._train("inner", "student", run.student_path, student, recipe.student.optim, self._inner_method)
        result = finish(self.begun, self.val)
        run.update_manifest(status="finished", stage=None, elapsed_s=round(time.perf_counter() - started_at_s, 2))
        return result

    def _outer(self, teacher: TeacherConfig) -> None:
        """The outer network, unless its file is there already: trained, or taken as it is."""
        if teacher.ready is None:
            spec, path = self.begun.teacher_spec(teacher), self.run.teacher_path
            self._train("outer", "teacher", path, spec, teacher.optim, self._outer_method)
        elif "outer" not in self.notes.done():
            ready = self.begun.ready_teacher(teacher.ready)
            digest = save_model(self.run.teacher_path, ready.module, ready.spec, ready.classes, ready.preprocess)
            plan = self.recipe.engine.plan or EnginePlan(threads=available_cores())
            self.notes.note_plan("outer", plan, [])
            self.notes.note_done("outer", sha256=digest, seconds=0.0, flops=0, ready=teacher.ready)
            self.begun.display.say(f"The outer network is {teacher.ready}; stage 1 is left out.")

    def _outer_method(self, network: Network) -> Method:
        assert self.recipe.teacher is not None
        config = self.recipe.teacher.method
        return FixMatch(network, config, self._policy(config.thresholds), self._log_prior())

    def _policy(self, config: ThresholdConfig) -> Policy:
        return make_policy(config, len(self.source.classes), len(self.pool.unlabeled))

    def _log_prior(self) -> Tensor:
        return log_prior(self.pool.labels, len(self.source.classes))

    def _train(
        self,
        stage: str,
        who: str,
        path: Path,
        spec: ModelSpec,
        optim: OptimConfig,
        make_method: Callable[[Network], Method],
    ) -> None:
        """Train one network, unless its file is there already; from its last checkpoint where memory ran out."""
        if stage in self.notes.done():
            return
        self.notes.begins(stage)
        while True:
            try:
                self._fit(stage, who, path, spec, optim, make_method)
                return
            except torch.OutOfMemoryError as error:
                plan = self.notes.plan(stage)
                if plan is None or 4 * plan.parts > (optim.labeled_batch or 0):  # batch norm needs two images
                    raise
                reason = str(error).splitlines()[0]
            # Outside of the handler, where the step's tensors are no longer held by the traceback.
            self.notes.note_plan(stage, plan.model_copy(update={"parts": 2 * plan.parts}), [])
            self.begun.display.say(
                f"{stage}: the memory of {self.begun.device} is full ({reason}). A batch now passes through the "
                f"network in {2 * plan.parts} parts, from the last checkpoint on: the same gradients, but that batch "
                "norm sees one part at a time."
            )

    def _fit(
        self,
        stage: str,
        who: str,
        path: Path,
        spec: ModelSpec,
        optim: OptimConfig,
        make_method: Callable[[Network], Method],
    ) -> None:
        torch.manual_seed(step_seed(self.recipe.seed, stage, "init"))
        method = make_method(self.begun.network(spec, who)).to(self.begun.device)
        batch = optim.labeled_batch or 0
        batches = Batches(
            self.pool,
            self.recipe.views,
            labeled_batch=batch,
            unlabeled_batch=0 if stage == "baseline" else batch * (optim.unlabeled_ratio or 0),
            seed=self.recipe.seed,
            stage=stage,
        )
        plan = self._plan(stage, method, batches)
        checkpoints = Checkpoints(self.run.checkpoint_path, stage)
        if self.begun.head_is_probed(stage, who) and checkpoints.load()[0] is None:
            pool = self.pool
            self.begun.display.say(f"{stage}: the head begins as a linear probe of {len(pool.labels)} labeled images.")
            fit_head(method.network, pool.images.rows(pool.labeled), pool.labels, pool.mean, pool.std, plan)
        average, elapsed_s = fit(
            method,
            batches,
            optim,
            self.recipe.engine,
            plan,
            checkpoints,
            self.metrics,
            seed=self.recipe.seed,
            validate=self._validate(stage, plan),
            class_names=self.source.classes,
        )
        digest = save_model(path, average, spec, self.source.classes, self.begun.preprocess)
        images = batches.images_per_step * (optim.total_steps or 0)
        macs = method.passes * _macs(average, self.begun.preprocess)
        self.notes.note_done(
            stage,
            sha256=digest,
            seconds=round(elapsed_s, 2),
            images_per_second=round(images / elapsed_s, 1),
            flops=images * (_TRAINING_FLOPS * macs + method.extra_flops_an_image),
        )
        if not self.recipe.engine.keep_checkpoints:
            checkpoints.clear()

    def _validate(self, stage: str, plan: EnginePlan) -> Callable[[Network], SliceHealth] | None:
        val = self.val
        if val is None or not len(val.labels):
            return None
        pool = self.pool

        threshold = self._threshold(stage)

        def score(network: Network) -> SliceHealth:
            return slice_health(predict(network, val.images, pool.mean, pool.std, plan), val.labels, threshold)

        return score

    def _threshold(self, stage: str) -> float | None:
        """What a stage's pseudo labels are held to, for reports on the validation split."""
        teacher = self.recipe.teacher
        if stage == "outer" and teacher is not None:
            return teacher.method.thresholds.threshold
        return self.recipe.student.method.thresholds.threshold if stage == "inner" else None

    def _plan(self, stage: str, method: Method, batches: Batches) -> EnginePlan:
        """The plan that was noted, the recipe's, or one measured now; written down."""
        noted, plan = self.notes.plan(stage), self.recipe.engine.plan
        if noted is not None:
            return noted
        timings: list[dict[str, object]] = []
        if plan is None:
            plan, timings = measure_plan(method, batches, self.begun.device)
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
        )
        save_trusted(self.run.trusted_path, trusted)
        features_path.unlink()
        summary = trusted.summary(held_back_truth(self.begun.splits), len(self.source.classes))
        # The line before the note: a run killed between the two writes it once, and not never.
        self.metrics.rewind("trusted", 0)
        self.metrics.write("trusted", 1, total_steps=1, kept_fraction=summary["coverage"])
        self.notes.note_done(
            "trusted",
            sha256=sha256_file(self.run.trusted_path),
            seconds=round(time.perf_counter() - started_at_s, 2),
            flops=_INFERENCE_FLOPS * _macs(loaded.module, loaded.preprocess) * len(pool.unlabeled),
        )
        self.begun.display.say(f"Trusted pseudo labels: {summary['size']} of {len(trusted.index)} unlabeled images.")

    def _outer_answers(self, loaded: LoadedModel) -> tuple[Tensor, np.memmap, Path]:
        """Logits, features and the file that holds the features, to be removed."""
        features_path, plan = self.run.checkpoint_path / "features.npy", self.notes.plan_of("outer")
        logits, features = outer_answers(
            loaded, self.source, self.begun.splits, self.pool, self.begun.preprocess, plan, features_path
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
            features_path.unlink()
        teacher = make_teacher(config.distill, loaded, torch.from_numpy(trusted.logits), features, self.pool)
        return KDFixMatch(network, config, policy, targets(trusted), teacher, prior)


def _macs(network: Network, preprocess: Preprocess) -> int:
    return count_macs(network, preprocess.channels, preprocess.height, preprocess.width)
