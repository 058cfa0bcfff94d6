"""From a recipe, its images and a folder to a run that has begun, or to a sentence why it cannot."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from kdedge import recipe_io
from kdedge.data import Source, Splits
from kdedge.data.batches import Pool
from kdedge.data.store import open_store
from kdedge.errors import RecipeError, RunError
from kdedge.models.weights import LoadedModel, StartingWeights, read_starting_weights, start_from
from kdedge.models.zoo import ModelSpec, Network, build, num_params
from kdedge.recipe import PRETRAINED, TEACHERS_WEIGHTS, Recipe, TeacherConfig, resolve
from kdedge.run_folder import begin_manifest
from kdedge.run_pool import describe, make_pool, pixel_statistics, read_starting
from kdedge.run_stages import StageNotes
from kdedge.run_teacher import read_ready_teacher, refuse_other_start
from kdedge.runs import Run, sha256_file, write_bytes, write_json
from kdedge.train.distributed import Ranks
from kdedge.train.metrics import Display
from kdedge_device.preprocess import Preprocess

__all__ = ["Begun", "SplitImages", "begin"]

_ENOUGH_TO_PRETRAIN = 10_000_000  # parameters: SEED's small networks have 2 to 12 million, ResNet-18 the most


@dataclass(frozen=True)
class SplitImages:
    """uint8 images [N, C, H, W] and known labels [N] of a split."""

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]


@final
@dataclass(frozen=True)
class Begun:
    """A run with its recipe resolved, and its training images on the device."""

    run: Run
    recipe: Recipe
    source: Source
    splits: Splits
    pool: Pool
    preprocess: Preprocess
    starting: dict[str, StartingWeights]
    display: Display
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def notes(self) -> StageNotes:
        return StageNotes(self.run, self.ranks)

    def student_spec(self) -> ModelSpec:
        student = self.recipe.student
        return self._spec(student.arch, student.width or 1.0, student.halvings, student.projection_layers)

    def teacher_spec(self, teacher: TeacherConfig) -> ModelSpec:
        return self._spec(teacher.arch or "", teacher.width, teacher.halvings, teacher.projection_layers)

    def pretrained_spec(self, of: str) -> ModelSpec:
        """Of the network that is pre-trained: that of "teacher" or "student", without a neck."""
        if of == "student":
            return replace(self.student_spec(), neck=0)
        assert self.recipe.teacher is not None
        return replace(self.teacher_spec(self.recipe.teacher), neck=0)

    def _spec(self, arch: str, width: float, halvings: int | None, neck: int) -> ModelSpec:
        return ModelSpec(arch, len(self.source.classes), self.preprocess.channels, width, halvings or 0, neck)

    def network(self, spec: ModelSpec, who: str, stage: str = "") -> Network:
        """A fresh network of "teacher" or "student", from its starting weights where there are some.

        Those that the run pre-trains are there only once it is in a `stage` that starts from them.
        """
        network = build(spec)
        if self.starts_from_own(stage, who):
            start_from(network, read_starting_weights(str(self.run.pretrained_path), spec.arch))
        elif who in self.starting:
            start_from(network, self.starting[who])
        return network

    def starts_from_own(self, stage: str, who: str) -> bool:
        """Whether a stage starts from what the run has pre-trained; the baseline, on labels only, never does."""
        config = self.recipe.teacher if who == "teacher" else self.recipe.student
        return stage in ("outer", "inner") and config is not None and config.init == PRETRAINED

    def head_is_probed(self, stage: str, who: str) -> bool:
        """Whether the network's head begins as a linear probe."""
        config = self.recipe.teacher if who == "teacher" else self.recipe.student
        if stage == "pretrain" or (stage == "inner" and self.recipe.student.init == TEACHERS_WEIGHTS):
            return False  # it needs none, or has the teacher's
        started = who in self.starting or self.starts_from_own(stage, who)
        return started and config is not None and config.head == "probe"

    def load(self, indices: Any, preprocess: Preprocess | None = None) -> SplitImages:
        """Images of the source as the run reads them, or as `preprocess` says."""
        images = self.source.load(indices, preprocess or self.preprocess)
        labels = torch.from_numpy(self.source.labels[indices])
        return SplitImages(images, labels, tuple(self.source.ids[i] for i in indices))

    def ready_teacher(self, ready: str) -> LoadedModel:
        """The file that the recipe names, or the run's copy, once there is one."""
        begun = self.run.manifest_path.is_file()
        path = self.run.teacher_path if begun and "outer" in self.notes.done() else Path(ready).expanduser()
        return read_ready_teacher(path, self.source.classes, self.preprocess.channels)


def begin(
    run: Run, recipe: Recipe, source: Source, splits: Splits, ranks: Ranks, display: Display, *, writes: bool = True
) -> Begun:
    """Resolve the recipe against the images, load them, and, unless it only looks, write what a run begins with.

    That is recipe.yaml, splits.json and the manifest.

    RecipeError, DataError and RunError where something does not fit, before anything is written or trained.
    """
    starting = read_starting(recipe, source.kind)
    resolved = resolve(recipe, describe(recipe, source, splits, starting))
    resolved = _with_data(resolved, labels=splits.labels)
    px, channels = resolved.data.image_px or 0, resolved.data.channels or 3
    plain = Preprocess(px, px, channels, "short-side-crop", (0.0,) * channels, (1.0,) * channels)
    if remark := source.remark(plain):
        display.say(remark)
    images = open_store(source, splits.unlabeled, plain, ranks.device, resolved.data.resident_mib)
    mean, std = resolved.data.mean, resolved.data.std
    if mean is None or std is None:
        measured = pixel_statistics(images)
        mean, std = mean or measured[0], std or measured[1]
        resolved = _with_data(resolved, mean=mean, std=std)
    preprocess = replace(plain, mean=mean, std=std)
    pool = make_pool(images, splits, preprocess)
    begun = Begun(run, resolved, source, splits, pool, preprocess, starting, display, ranks)
    _refuse_what_does_not_fit(begun)
    if sentence := _small_to_pretrain(begun):
        display.say(sentence)
    ranks.barrier()  # all have looked
    if ranks.is_first and writes:
        _write(begun, recipe)
    ranks.barrier()
    if not run.manifest_path.is_file():
        raise RunError(
            f"Process {ranks.rank} of {ranks.world} does not see {run.path}, which the first one has written. "
            "Processes on several machines need a folder that they share: name one with --out."
        )
    return begun


def _write(begun: Begun, asked: Recipe) -> None:
    run, resolved = begun.run, begun.recipe
    # The manifest first: with it, a run that is killed right here can be resumed.
    begin_manifest(run, asked, begun.source, begun.device, begun.display, begun.ranks.world)
    if resolved.teacher is not None and resolved.teacher.ready is not None:
        _note_ready_teacher(begun, Path(resolved.teacher.ready).expanduser())
    if not run.recipe_path.is_file():
        write_bytes(run.recipe_path, recipe_io.dump(resolved).encode())
    if not run.splits_path.is_file():
        write_json(run.splits_path, begun.splits.to_json(begun.source))


def _with_data(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=values)})


def _refuse_what_does_not_fit(begun: Begun) -> None:
    teacher, from_teacher = begun.recipe.teacher, begun.recipe.student.init == TEACHERS_WEIGHTS
    begun.network(begun.student_spec(), "student")
    if teacher is None:
        if from_teacher:
            raise RecipeError("student.init is 'teacher', but the recipe has none (teacher is null).")
        return
    reads = None
    if teacher.ready is not None:
        ready = begun.ready_teacher(teacher.ready)
        spec, reads = ready.spec, ready.preprocess
    else:
        spec = begun.teacher_spec(teacher)
        begun.network(spec, "teacher")
    if from_teacher:
        refuse_other_start(begun.student_spec(), spec, begun.preprocess, reads)


def _small_to_pretrain(begun: Begun) -> str | None:
    pretrain = begun.recipe.pretrain
    if pretrain is None or pretrain.of != "student":
        return None
    spec = begun.pretrained_spec("student")
    with torch.device("meta"):
        params = num_params(build(spec).backbone)
    if params >= _ENOUGH_TO_PRETRAIN:
        return None
    return (
        f"The student, {spec.arch} with {params / 1e6:.1f} M parameters, is pre-trained itself, and contrastive "
        "pre-training is poor on small networks (SEED, arXiv 2101.04731). What it found to help: pre-train a larger "
        "teacher, and distil to the student. kdedge recipes show simclr"
    )


def _note_ready_teacher(begun: Begun, path: Path) -> None:
    """A run is of one teacher: another file under the same name is refused."""
    if "outer" in begun.notes.done():
        return
    known, found = begun.run.read_manifest().get("ready_sha256"), sha256_file(path)
    if known is not None and known != found:
        raise RunError(
            f"The teacher {path} is not the one that the run in {begun.run.path} was started with (sha256 "
            f"{found[:12]}, {known[:12]} was expected). Restore it, or choose another --out."
        )
    begun.run.update_manifest(ready_sha256=found)
