"""The stages as plain calls: baseline, outer network, trusted set, inner network, one look at the test split.

Each stage leaves a file, and a stage whose file is there is not done again. What comes next always reads the file, so
that a resumed run computes with exactly what an uninterrupted one does.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdedge import recipe_io
from kdedge.data import Source, Splits, make_splits, open_source
from kdedge.data.batches import Batches, Pool, step_seed
from kdedge.data.leaks import looks_for_near, without_leaks
from kdedge.data.views import columns
from kdedge.errors import DeviceError, RecipeError, RunError
from kdedge.losses.consistency import log_prior
from kdedge.methods.fixmatch import FixMatch
from kdedge.methods.health import SliceHealth, slice_health
from kdedge.methods.health import summary as pseudo_label_summary
from kdedge.methods.kd_fixmatch import KDFixMatch
from kdedge.methods.step import Method
from kdedge.methods.supervised import Supervised
from kdedge.methods.thresholds import Policy, ThresholdConfig, make_policy
from kdedge.models.weights import LoadedModel, StartingWeights, load_model, save_model, start_from
from kdedge.models.zoo import ModelSpec, Network, build, count_macs, num_params
from kdedge.predictions import add_predictions
from kdedge.recipe import TEACHERS_WEIGHTS, Recipe, TeacherConfig, resolve
from kdedge.run_folder import begin_manifest, check_folder, run_folder
from kdedge.run_pool import (
    describe,
    held_back_truth,
    make_pool,
    pixel_statistics,
    read_starting,
)
from kdedge.run_teacher import (
    copy_weights,
    make_teacher,
    nothing_trusted,
    outer_answers,
    read_ready_teacher,
    refuse_other_start,
    targets,
)
from kdedge.runs import SCHEMA, Run, read_json, sha256_file, write_bytes, write_json
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, as_planned, available_cores, measure_plan, pick_device
from kdedge.train.evaluate import accuracy, predict
from kdedge.train.loop import fit
from kdedge.train.metrics import Display, MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig
from kdedge.train.probe import fit_head
from kdedge.trust.outliers import outlier_mask
from kdedge.trust.select import OUTLIER, compare_with_confidence, load_trusted, save_trusted, select_trusted
from kdedge_device.preprocess import Preprocess

__all__ = ["Stopped", "train"]


_TRAINING_FLOPS = 6  # for each multiply-add of an image: two forward, four backward
_INFERENCE_FLOPS = 2


class Stopped(KeyboardInterrupt):
    """Ctrl-C, in a run that can be resumed."""


def train(
    recipe: Recipe, out: Path | None = None, *, resume: bool = False, display: Display | None = None
) -> tuple[Run, dict[str, Any]]:
    """Everything from images to a student, and what result.json says.

    Raises RunError where the folder holds another run, or one without `resume`; DataError and RecipeError where data
    and recipe do not fit; leaves a run that can be resumed whenever it is stopped.
    """
    shown = display or SilentDisplay()
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
        stages = _Stages.begin(run, recipe, source, splits, device, shown)
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


@dataclass(frozen=True)
class _Images:
    """uint8 images and known labels of a split."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


@final
class _Stages:
    """One run, begun: the resolved recipe, the images on the device, and the stages in their order."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        source: Source,
        splits: Splits,
        device: torch.device,
        pool: Pool,
        preprocess: Preprocess,
        starting: dict[str, StartingWeights],
        display: Display,
    ) -> None:
        self.run, self.recipe, self.source, self.splits = run, recipe, source, splits
        self.device, self.pool, self.preprocess, self.starting = device, pool, preprocess, starting
        self.display = display
        self.metrics = MetricsLog(run.metrics_path, display)
        self.val = self._load(splits.val) if len(splits.val) else None

    @classmethod
    def begin(
        cls, run: Run, recipe: Recipe, source: Source, splits: Splits, device: torch.device, display: Display
    ) -> "_Stages":
        """Resolve the recipe against the images, load them, and write recipe.yaml, splits.json and the manifest."""
        starting = read_starting(recipe, source.kind)
        resolved = resolve(recipe, describe(recipe, source, splits, starting))
        resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update={"labels": splits.labels})})
        px, channels = resolved.data.image_px or 0, resolved.data.channels or 3
        plain = Preprocess(px, px, channels, "short-side-crop", (0.0,) * channels, (1.0,) * channels)
        images = source.load(splits.unlabeled, plain)
        mean, std = resolved.data.mean, resolved.data.std
        if mean is None or std is None:
            measured = pixel_statistics(images)
            mean, std = mean or measured[0], std or measured[1]
            resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update={"mean": mean, "std": std})})
        preprocess = replace(plain, mean=mean, std=std)
        pool = make_pool(images, splits, preprocess, device)
        stages = cls(run, resolved, source, splits, device, pool, preprocess, starting, display)
        stages._refuse_what_does_not_fit()  # before anything is written or trained
        # The manifest first: with it, a run that is killed right here can be resumed.
        begin_manifest(run, recipe, source, device, display)
        if resolved.teacher is not None and resolved.teacher.ready is not None:
            stages._note_ready_teacher(resolved.teacher.ready)
        if not run.recipe_path.is_file():
            write_bytes(run.recipe_path, recipe_io.dump(resolved).encode())
        if not run.splits_path.is_file():
            write_json(run.splits_path, splits.to_json(source))
        return stages

    def _refuse_what_does_not_fit(self) -> None:
        teacher, from_teacher = self.recipe.teacher, self.recipe.student.init == TEACHERS_WEIGHTS
        self._network(self._student_spec(), "student")
        if teacher is None:
            if from_teacher:
                raise RecipeError("student.init is 'teacher', but the recipe has none (teacher is null).")
            return
        reads = None
        if teacher.ready is not None:
            ready = self._ready_teacher(teacher.ready)
            spec, reads = ready.spec, ready.preprocess
        else:
            spec = self._teacher_spec(teacher)
            self._network(spec, "teacher")
        if from_teacher:
            refuse_other_start(self._student_spec(), spec, self.preprocess, reads)

    def _ready_teacher(self, ready: str) -> LoadedModel:
        """The file that the recipe names, or the run's copy, once there is one."""
        begun = self.run.manifest_path.is_file()
        path = self.run.teacher_path if begun and "outer" in self._done() else Path(ready).expanduser()
        return read_ready_teacher(path, self.source.classes, self.preprocess.channels)

    def _note_ready_teacher(self, ready: str) -> None:
        """A run is of one teacher: another file under the same name is refused."""
        manifest, path = self.run.read_manifest(), Path(ready).expanduser()
        known = manifest.get("ready_sha256")
        if "outer" in self._done():
            return
        found = sha256_file(path)
        if known is not None and known != found:
            raise RunError(
                f"The teacher {path} is not the one that the run in {self.run.path} was started with (sha256 "
                f"{found[:12]}, {known[:12]} was expected). Restore it, or choose another --out."
            )
        self.run.update_manifest(ready_sha256=found)

    def _network(self, spec: ModelSpec, who: str) -> Network:
        """A fresh network, from its starting weights where there are some."""
        network = build(spec)
        if who in self.starting:
            start_from(network, self.starting[who])
        return network

    def _probes(self, stage: str, who: str) -> bool:
        """Whether the network's head begins as a linear probe."""
        config = self.recipe.teacher if who == "teacher" else self.recipe.student
        if stage == "inner" and self.recipe.student.init == TEACHERS_WEIGHTS:
            return False  # it has the teacher's head
        return who in self.starting and config is not None and config.head == "probe"

    def _load(self, indices: Any, preprocess: Preprocess | None = None) -> _Images:
        images = self.source.load(indices, preprocess or self.preprocess)
        labels = torch.from_numpy(self.source.labels[indices])
        return _Images(images, labels, tuple(self.source.ids[i] for i in indices))

    # ---- the stages

    def all(self) -> dict[str, Any]:
        started_at_s = time.perf_counter()
        recipe = self.recipe
        if recipe.baseline.enabled:
            self._train(
                "baseline", self.run.baseline_path, self._student_spec(), recipe.baseline.optim, Supervised, "student"
            )
        if recipe.teacher is not None:
            self._outer(recipe.teacher)
            self._select()
        self._train(
            "inner", self.run.student_path, self._student_spec(), recipe.student.optim, self._inner_method, "student"
        )
        return self._finish(started_at_s)

    def _outer(self, teacher: TeacherConfig) -> None:
        """The outer network, unless its file is there already: trained, or taken as it is."""
        if teacher.ready is None:
            self._train(
                "outer",
                self.run.teacher_path,
                self._teacher_spec(teacher),
                teacher.optim,
                lambda network: FixMatch(
                    network, teacher.method, self._policy(teacher.method.thresholds), self._log_prior()
                ),
                "teacher",
            )
        elif "outer" not in self._done():
            ready = self._ready_teacher(teacher.ready)
            digest = save_model(self.run.teacher_path, ready.module, ready.spec, ready.classes, ready.preprocess)
            plan = self.recipe.engine.plan or EnginePlan(threads=available_cores())
            self._note_plan("outer", plan, [])
            self._note_done("outer", sha256=digest, seconds=0.0, flops=0, ready=teacher.ready)
            self.display.say(f"The outer network is {teacher.ready}; stage 1 is left out.")

    def _policy(self, config: ThresholdConfig) -> Policy:
        return make_policy(config, len(self.source.classes), len(self.pool.unlabeled))

    def _log_prior(self) -> Tensor:
        return log_prior(self.pool.labels, len(self.source.classes))

    def _student_spec(self) -> ModelSpec:
        student = self.recipe.student
        return self._spec(student.arch, student.width or 1.0, student.halvings)

    def _teacher_spec(self, teacher: TeacherConfig) -> ModelSpec:
        return self._spec(teacher.arch or "", teacher.width, teacher.halvings)

    def _spec(self, arch: str, width: float, halvings: int | None) -> ModelSpec:
        return ModelSpec(arch, len(self.source.classes), self.preprocess.channels, width, halvings or 0)

    def _train(
        self,
        stage: str,
        path: Path,
        spec: ModelSpec,
        optim: OptimConfig,
        make_method: Callable[[Network], Method],
        who: str,
    ) -> None:
        """Train one network, unless its file is there already."""
        if stage in self._done():
            return
        self.run.update_manifest(stage=stage)
        torch.manual_seed(step_seed(self.recipe.seed, stage, "init"))
        method = make_method(self._network(spec, who)).to(self.device)
        ratio = 0 if stage == "baseline" else optim.unlabeled_ratio or 0
        batch = optim.labeled_batch or 0
        batches = Batches(
            self.pool,
            self.recipe.views,
            labeled_batch=batch,
            unlabeled_batch=ratio * batch,
            seed=self.recipe.seed,
            stage=stage,
        )
        plan = self._plan(stage, method, batches)
        checkpoints = Checkpoints(self.run.checkpoint_path, stage)
        if self._probes(stage, who) and checkpoints.load()[0] is None:
            pool = self.pool
            self.display.say(f"{stage}: the head begins as a linear probe of {len(pool.labels)} labeled images.")
            fit_head(method.network, pool.images[pool.labeled], pool.labels, pool.mean, pool.std, plan)
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
        digest = save_model(path, average, spec, self.source.classes, self.preprocess)
        images = batches.images_per_step * (optim.total_steps or 0)
        macs = method.passes * _macs(average, self.preprocess)
        self._note_done(
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
        """The recipe's plan, the one measured at the first start, or one measured now and written down."""
        if self.recipe.engine.plan is not None:
            plan = self.recipe.engine.plan
            timings: list[dict[str, object]] = []
        else:
            noted = self.run.read_manifest()["engine_plan"].get(stage)
            if noted is not None:
                return EnginePlan.model_validate(noted["plan"])
            plan, timings = measure_plan(method, batches, self.device)
        self._note_plan(stage, plan, timings)
        return plan

    def _note_plan(self, stage: str, plan: EnginePlan, timings: list[dict[str, object]]) -> None:
        plans = self.run.read_manifest()["engine_plan"] | {stage: {"plan": plan.model_dump(), "measured": timings}}
        self.run.update_manifest(engine_plan=plans)

    def _stage_plan(self, stage: str) -> EnginePlan:
        return EnginePlan.model_validate(self.run.read_manifest()["engine_plan"][stage]["plan"])

    def _select(self) -> None:
        """The trusted set, unless its file is there already."""
        if "trusted" in self._done():
            return
        self.run.update_manifest(stage="trusted")
        self.display.stage("trusted", 1)
        started_at_s = time.perf_counter()
        pool, loaded = self.pool, load_model(self.run.teacher_path)
        logits, features, features_path = self._outer_answers(loaded)
        given = torch.full((len(pool.unlabeled),), -1)
        given[pool.labeled.cpu()] = pool.labels.cpu()  # unlabeled is the whole pool, so places agree
        outlier, _ = outlier_mask(logits, features, given, self.recipe.outliers)
        trusted = select_trusted(
            logits,
            features,
            self.splits.unlabeled,
            given,
            self.recipe.trust,
            seed=self.recipe.seed,
            outlier_N=outlier,
        )
        save_trusted(self.run.trusted_path, trusted)
        features_path.unlink()
        self._note_done(
            "trusted",
            sha256=sha256_file(self.run.trusted_path),
            seconds=round(time.perf_counter() - started_at_s, 2),
            flops=_INFERENCE_FLOPS * _macs(loaded.module, loaded.preprocess) * len(pool.unlabeled),
        )
        summary = trusted.summary(held_back_truth(self.splits), len(self.source.classes))
        self.metrics.write("trusted", 1, total_steps=1, kept_fraction=summary["coverage"])
        self.display.say(f"Trusted pseudo labels: {summary['size']} of {len(trusted.index)} unlabeled images.")

    def _outer_answers(self, loaded: LoadedModel) -> tuple[Tensor, np.memmap, Path]:
        """Logits, features and the file that holds the features, to be removed."""
        features_path, plan = self.run.checkpoint_path / "features.npy", self._stage_plan("outer")
        logits, features = outer_answers(
            loaded, self.source, self.splits, self.pool, self.preprocess, plan, features_path
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

    # ---- bookkeeping

    def _done(self) -> dict[str, Any]:
        """The stages whose file is there, with the hash that was noted; a removed or altered one is made anew."""
        files = {
            "baseline": self.run.baseline_path,
            "outer": self.run.teacher_path,
            "trusted": self.run.trusted_path,
            "inner": self.run.student_path,
        }
        return {
            stage: facts
            for stage, facts in self.run.read_manifest()["stages"].items()
            if files[stage].is_file() and sha256_file(files[stage]) == facts["sha256"]
        }

    def _note_done(self, stage: str, **facts: Any) -> None:
        self.run.update_manifest(stages=self._done() | {stage: facts})

    # ---- the end

    def _finish(self, started_at_s: float) -> dict[str, Any]:
        """Score every network on the test split, once, and write predictions.npz and result.json."""
        stages = self._done()
        test = self._load(self.splits.test)
        logits: dict[str, Tensor] = {}
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "recipe": self.recipe.name,
            "data": self.source.name,
            "labels": self.splits.labels or len(self.splits.labeled) + len(self.splits.val),
            "seed": self.recipe.seed,
            "teacher": None,
            "baseline": None,
            "trusted": None,
        }
        for name, stage, path in (
            ("teacher", "outer", self.run.teacher_path),
            ("student", "inner", self.run.student_path),
            ("baseline", "baseline", self.run.baseline_path),
        ):
            if stage in stages:
                result[name], logits[name] = self._score(path, stage, test, stages[stage]["seconds"])
        looked = self.recipe.data.remove_leaks
        guards: dict[str, int | bool | None] = {
            "duplicates_removed": sum(not leak["labeled"] for leak in self.splits.leaks) if looked else None,
            "near_duplicates_looked_for": looked and looks_for_near(self.source),
            "outliers": None,
        }
        if "trusted" in stages:
            trusted = load_trusted(self.run.trusted_path)
            truth = held_back_truth(self.splits)
            result["trusted"] = trusted.summary(truth, len(self.source.classes))
            if self.recipe.outliers.score != "none":
                guards["outliers"] = int((trusted.why == OUTLIER).sum())
            result["trusted"] |= compare_with_confidence(trusted, truth, self.recipe.seed)
        result["pseudo_labels"] = pseudo_label_summary(self.run.metrics_path)
        flops = {stage: facts["flops"] for stage, facts in stages.items()}
        result["training_flops"] = flops | {"total": sum(flops.values()) - flops.get("baseline", 0)}
        result["images_per_second"] = {s: f["images_per_second"] for s, f in stages.items() if "images_per_second" in f}
        result["seconds"] = round(sum(facts["seconds"] for facts in stages.values()), 2)
        result["data_guards"] = guards
        result["test_images"], result["test_is_val"] = len(test.ids), self.splits.test_is_val
        result["input"] = [self.preprocess.channels, self.preprocess.height, self.preprocess.width]
        add_predictions(self.run, "test", test.ids, test.labels.numpy(), {n: z.numpy() for n, z in logits.items()})
        write_json(self.run.result_path, result)
        self.run.update_manifest(status="finished", stage=None, elapsed_s=round(time.perf_counter() - started_at_s, 2))
        if not self.recipe.engine.keep_checkpoints:
            shutil.rmtree(self.run.checkpoint_path, ignore_errors=True)
        return result

    def _score(self, path: Path, stage: str, test: _Images, seconds: float) -> tuple[dict[str, Any], Tensor]:
        plan, loaded, val = self._stage_plan(stage), load_model(path), self.val
        network = as_planned(loaded.module.to(self.device), plan)
        if loaded.preprocess != self.preprocess:  # a ready teacher of another input size
            test = self._load(self.splits.test, loaded.preprocess)
            val = None if val is None else self._load(self.splits.val, loaded.preprocess)
        mean, std = columns(loaded.preprocess, self.device)
        logits = predict(network, test.images, mean, std, plan)
        val_logits = predict(network, val.images, mean, std, plan) if val is not None else None
        return {
            "arch": loaded.arch,
            "params": num_params(network),
            "val_accuracy": None if val is None or val_logits is None else accuracy(val_logits, val.labels),
            "test_accuracy": accuracy(logits, test.labels),
            "seconds": seconds,
        }, logits


def _macs(network: Network, preprocess: Preprocess) -> int:
    return count_macs(network, preprocess.channels, preprocess.height, preprocess.width)
