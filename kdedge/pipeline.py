"""The stages as plain calls: baseline, outer network, trusted set, inner network, one look at the test split.

Each stage leaves a file, and a stage whose file is there is not done again. What comes next always reads the file, so
that a resumed run computes with exactly what an uninterrupted one does.
"""

import contextlib
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdedge import __version__, recipe_io
from kdedge.data import Source, Splits, make_splits, open_source
from kdedge.data.batches import Batches, Pool, step_seed
from kdedge.errors import DeviceError, RecipeError, RunError
from kdedge.methods.fixmatch import FixMatch
from kdedge.methods.kd_fixmatch import KDFixMatch
from kdedge.methods.step import Method
from kdedge.methods.supervised import Supervised
from kdedge.models.weights import StartingWeights, load_model, read_starting_weights, save_model, start_from
from kdedge.models.zoo import ModelSpec, Network, build, num_params
from kdedge.predictions import add_predictions
from kdedge.recipe import DataDescription, Recipe, resolve, resolved_teacher_arch
from kdedge.runs import SCHEMA, Run, read_json, sha256_bytes, sha256_file, write_bytes, write_json
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, as_planned, measure_plan, pick_device
from kdedge.train.evaluate import accuracy, predict, predict_with_features
from kdedge.train.loop import fit
from kdedge.train.metrics import Display, MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig
from kdedge.trust.select import load_trusted, save_trusted, select_trusted
from kdedge_device.preprocess import Preprocess

__all__ = ["Stopped", "run_folder", "train"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C, in a run that can be resumed."""


def run_folder(recipe: Recipe, source: Source, splits: Splits) -> Path:
    """runs/<recipe>-<data>-<labels>-s<seed>, where no --out says otherwise."""
    labels = "all" if splits.labels is None else splits.labels
    return Path("runs") / f"{recipe.name}-{source.name}-{labels}-s{recipe.seed}"


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
    if resume and run.splits_path.is_file():
        splits = Splits.from_json(read_json(run.splits_path), source)  # says what changed since
    finished = _check_folder(run, recipe, device, resume)
    if finished is not None:
        shown.say(f"The run in {run.path} is finished already; nothing was done.")
        return run, finished
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


def _check_folder(run: Run, recipe: Recipe, device: torch.device, resume: bool) -> dict[str, Any] | None:
    """The result where the run is finished; RunError where the folder cannot be used as asked."""
    again = "Go on with it by --resume, or choose another folder with --out."
    if not run.manifest_path.is_file():
        if resume:
            raise RunError(f"There is nothing to resume: {run.path} holds no run. Leave --resume out to start one.")
        if run.path.exists() and (not run.path.is_dir() or any(p.name != ".lock" for p in run.path.iterdir())):
            raise RunError(f"{run.path} exists and is no run of kdedge. It was not touched; choose another --out.")
        return None
    manifest = run.read_manifest()
    if not resume:
        status = manifest.get("status")
        detail = "is finished" if status == "finished" else f"exists already (status: {status})"
        hint = "Choose another --seed or --out, or remove it." if status == "finished" else again
        raise RunError(f"The run in {run.path} {detail}. It was not touched. {hint}")
    differences = _differences(manifest.get("recipe", {}), recipe.model_dump(mode="json"))
    if differences:
        raise RunError(
            f"The run in {run.path} was started with another recipe: {'; '.join(differences)}. "
            "Resume it as it was started, or choose another --out."
        )
    if manifest.get("status") == "finished":
        result: dict[str, Any] = read_json(run.result_path)
        return result
    if manifest.get("device_type", device.type) != device.type:
        before = manifest["device_type"]
        raise RunError(
            f"The run in {run.path} was begun on {before}, and this would go on on {device.type}, with other "
            f"rounding. Resume it with --device {before}, or choose another --out."
        )
    return None


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old, now new` for each value that differs. Where the run computes may change; what it computes may not."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new and name not in {"engine.checkpoint_every_s", "engine.keep_checkpoints"}:
            found.append(f"{name} was {old!r}, now {new!r}")
    return found


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
        starting = {
            who: read_starting_weights(init, arch)
            for who, init, arch in (
                ("teacher", recipe.teacher.init, resolved_teacher_arch(recipe, source.kind)),
                ("student", recipe.student.init, recipe.student.arch),
            )
            if init is not None
        }
        resolved = resolve(recipe, _describe(recipe, source, splits, starting))
        resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update={"labels": splits.labels})})
        px, channels = resolved.data.image_px or 0, resolved.data.channels or 3
        plain = Preprocess(px, px, channels, "short-side-crop", (0.0,) * channels, (1.0,) * channels)
        images = source.load(splits.unlabeled, plain)
        mean, std = resolved.data.mean, resolved.data.std
        if mean is None or std is None:
            measured = _statistics(images)
            mean, std = mean or measured[0], std or measured[1]
            resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update={"mean": mean, "std": std})})
        preprocess = replace(plain, mean=mean, std=std)
        pool = _pool(images, splits, preprocess, device)
        stages = cls(run, resolved, source, splits, device, pool, preprocess, starting, display)
        for who, spec in (("teacher", stages._teacher_spec()), ("student", stages._student_spec())):
            stages._network(spec, who)  # what does not fit is told before anything is written or trained
        # The manifest first: with it, a run that is killed right here can be resumed.
        _begin_manifest(run, recipe, source, device, display)
        if not run.recipe_path.is_file():
            write_bytes(run.recipe_path, recipe_io.dump(resolved).encode())
        if not run.splits_path.is_file():
            write_json(run.splits_path, splits.to_json(source))
        return stages

    def _network(self, spec: ModelSpec, who: str) -> Network:
        """A fresh network, from its starting weights where there are some."""
        network = build(spec)
        if who in self.starting:
            start_from(network, self.starting[who])
        return network

    def _load(self, indices: Any) -> _Images:
        images = self.source.load(indices, self.preprocess)
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
        self._train(
            "outer",
            self.run.teacher_path,
            self._teacher_spec(),
            recipe.teacher.optim,
            lambda network: FixMatch(network, recipe.teacher.method),
            "teacher",
        )
        self._select()
        self._train(
            "inner", self.run.student_path, self._student_spec(), recipe.student.optim, self._inner_method, "student"
        )
        return self._finish(started_at_s)

    def _student_spec(self) -> ModelSpec:
        student = self.recipe.student
        return self._spec(student.arch, student.width or 1.0, student.halvings)

    def _teacher_spec(self) -> ModelSpec:
        teacher = self.recipe.teacher
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
        average, elapsed_s = fit(
            method,
            batches,
            optim,
            self.recipe.engine,
            plan,
            checkpoints,
            self.metrics,
            seed=self.recipe.seed,
            validate=self._validate(plan),
        )
        digest = save_model(path, average, spec, self.source.classes, self.preprocess)
        images = batches.images_per_step * (optim.total_steps or 0)
        self._note_done(
            stage, sha256=digest, seconds=round(elapsed_s, 2), images_per_second=round(images / elapsed_s, 1)
        )
        if not self.recipe.engine.keep_checkpoints:
            checkpoints.clear()

    def _validate(self, plan: EnginePlan) -> Callable[[Network], float] | None:
        val = self.val
        if val is None or not len(val.labels):
            return None
        pool = self.pool

        def score(network: Network) -> float:
            return accuracy(predict(network, val.images, pool.mean, pool.std, plan), val.labels) or 0.0

        return score

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
        plans = self.run.read_manifest()["engine_plan"] | {stage: {"plan": plan.model_dump(), "measured": timings}}
        self.run.update_manifest(engine_plan=plans)
        return plan

    def _stage_plan(self, stage: str) -> EnginePlan:
        return EnginePlan.model_validate(self.run.read_manifest()["engine_plan"][stage]["plan"])

    def _select(self) -> None:
        """The trusted set, unless its file is there already."""
        if "trusted" in self._done():
            return
        self.run.update_manifest(stage="trusted")
        self.display.stage("trusted", 1)
        started_at_s = time.perf_counter()
        plan = self._stage_plan("outer")
        teacher = as_planned(load_model(self.run.teacher_path).module.to(self.device), plan)
        pool = self.pool
        # Pool.images are the unlabeled images, in their order.
        logits, features = predict_with_features(teacher, pool.images, pool.mean, pool.std, plan)
        given = torch.full((len(pool.unlabeled),), -1)
        given[pool.labeled.cpu()] = pool.labels.cpu()  # unlabeled is the whole pool, so places agree
        trusted = select_trusted(logits, features, self.splits.unlabeled, given, self.recipe.trust)
        save_trusted(self.run.trusted_path, trusted)
        self._note_done(
            "trusted", sha256=sha256_file(self.run.trusted_path), seconds=round(time.perf_counter() - started_at_s, 2)
        )
        summary = trusted.summary(_held_back(self.splits), len(self.source.classes))
        self.metrics.write("trusted", 1, total_steps=1, kept_fraction=summary["coverage"])
        self.display.say(f"Trusted pseudo labels: {summary['size']} of {len(trusted.index)} unlabeled images.")

    def _inner_method(self, network: Network) -> Method:
        trusted = load_trusted(self.run.trusted_path)
        label = torch.from_numpy(np.where(trusted.kept, trusted.label, -1))
        return KDFixMatch(network, self.recipe.student.method, label, torch.from_numpy(trusted.logits))

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
            "baseline": None,
        }
        for name, stage, path in (
            ("teacher", "outer", self.run.teacher_path),
            ("student", "inner", self.run.student_path),
            ("baseline", "baseline", self.run.baseline_path),
        ):
            if stage in stages:
                result[name], logits[name] = self._score(path, stage, test, stages[stage]["seconds"])
        trusted = load_trusted(self.run.trusted_path)
        result["trusted"] = trusted.summary(_held_back(self.splits), len(self.source.classes))
        result["images_per_second"] = {s: f["images_per_second"] for s, f in stages.items() if "images_per_second" in f}
        result["seconds"] = round(sum(facts["seconds"] for facts in stages.values()), 2)
        result["test_images"], result["test_is_val"] = len(test.ids), self.splits.test_is_val
        result["input"] = [self.preprocess.channels, self.preprocess.height, self.preprocess.width]
        add_predictions(self.run, "test", test.ids, test.labels.numpy(), {n: z.numpy() for n, z in logits.items()})
        write_json(self.run.result_path, result)
        self.run.update_manifest(status="finished", stage=None, elapsed_s=round(time.perf_counter() - started_at_s, 2))
        if not self.recipe.engine.keep_checkpoints:
            shutil.rmtree(self.run.checkpoint_path, ignore_errors=True)
        return result

    def _score(self, path: Path, stage: str, test: _Images, seconds: float) -> tuple[dict[str, Any], Tensor]:
        plan = self._stage_plan(stage)
        loaded = load_model(path)
        network = as_planned(loaded.module.to(self.device), plan)
        pool, val = self.pool, self.val
        logits = predict(network, test.images, pool.mean, pool.std, plan)
        val_logits = predict(network, val.images, pool.mean, pool.std, plan) if val is not None else None
        return {
            "arch": loaded.arch,
            "params": num_params(network),
            "val_accuracy": None if val is None or val_logits is None else accuracy(val_logits, val.labels),
            "test_accuracy": accuracy(logits, test.labels),
            "seconds": seconds,
        }, logits


def _describe(recipe: Recipe, source: Source, splits: Splits, starting: dict[str, StartingWeights]) -> DataDescription:
    inputs = {(weights.mean, weights.std) for weights in starting.values()}
    if len(inputs) > 1 and (recipe.data.mean is None or recipe.data.std is None):
        raise RecipeError(
            "teacher.init and student.init were trained with different normalisations, and a run has one. "
            "Set data.mean and data.std in the recipe, or leave one init out."
        )
    return DataDescription(
        kind=source.kind,
        channels=source.channels,
        shorter_px=min(source.native_px),
        flip_allowed=source.flip_allowed,
        classes=len(source.classes),
        labeled_images=len(splits.labeled),
        unlabeled_images=len(splits.unlabeled),
        teacher_weights=starting.get("teacher"),
        student_weights=starting.get("student"),
    )


def _statistics(images_u8: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255 for each channel, in whole numbers summed exactly; 4 digits."""
    total = squares = torch.zeros(images_u8.shape[1], dtype=torch.float64)
    for part in torch.split(images_u8, 64):
        values = part.to(torch.float64)
        total = total + values.sum((0, 2, 3))
        squares = squares + values.pow(2).sum((0, 2, 3))
    count = images_u8.numel() / images_u8.shape[1]
    mean = total / count
    std = (squares / count - mean.pow(2)).clamp(min=1.0).sqrt()
    return tuple(round(v, 4) for v in (mean / 255).tolist()), tuple(round(v, 4) for v in (std / 255).tolist())


def _held_back(splits: Splits) -> npt.NDArray[np.int64]:
    """The true class of each unlabeled image, for reports; -1 where unknown, and where the network was given it."""
    truth = splits.truth[splits.unlabeled].copy()
    truth[np.isin(splits.unlabeled, splits.labeled)] = -1
    return truth


def _pool(images: Tensor, splits: Splits, preprocess: Preprocess, device: torch.device) -> Pool:
    labeled = np.searchsorted(splits.unlabeled, splits.labeled)  # labeled is part of unlabeled, and both ascend

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=device).view(-1, 1, 1)

    return Pool(
        images=images.to(device),
        labeled=torch.from_numpy(labeled).to(device),
        labels=torch.from_numpy(splits.truth[splits.labeled]).to(device),
        unlabeled=torch.arange(len(splits.unlabeled), device=device),
        truth=torch.from_numpy(_held_back(splits)).to(device),
        mean=column(preprocess.mean),
        std=column(preprocess.std),
    )


def _begin_manifest(run: Run, recipe: Recipe, source: Source, device: torch.device, display: Display) -> None:
    """Begin the manifest, or go on with the one there is; says so where a package has changed in between."""
    import torchvision

    before = run.read_manifest() if run.manifest_path.is_file() else {}
    versions = {
        "kdedge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
    changed = [
        f"{n} {before['versions'][n]} to {v}" for n, v in versions.items() if before and before["versions"][n] != v
    ]
    if changed:
        display.say(f"Since the run began, {', '.join(changed)}: it goes on, but not bit for bit as it would have.")
    asked = recipe.model_dump(mode="json")
    run.update_manifest(
        status="running",
        stage=before.get("stage"),
        recipe=asked,
        recipe_sha256=sha256_bytes(recipe_io.dump(recipe).encode()),
        data_fingerprint=source.fingerprint,
        seed=recipe.seed,
        versions=versions,
        failure=None,
        host={"system": platform.platform(), "machine": platform.machine()},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        device_type=device.type,
        engine_plan=before.get("engine_plan", {}),
        stages=before.get("stages", {}),
        started_at_s=before.get("started_at_s", round(time.time(), 3)),
    )
