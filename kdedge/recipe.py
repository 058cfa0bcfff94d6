"""What to make: the composition of every component's config, and the one function that fits it to the data.

A recipe may leave open (null) whatever follows from the images; `resolve` fills it in, and the result is written to
the run's recipe.yaml, which loads again and says everything.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from kdedge.config import Config
from kdedge.data.source import usual_px
from kdedge.data.views import ViewConfig
from kdedge.errors import BugError, RecipeError
from kdedge.methods.fixmatch import FixMatchConfig
from kdedge.methods.kd_fixmatch import KDFixMatchConfig
from kdedge.methods.supervised import FineTuneConfig
from kdedge.models.weights import StartingWeights
from kdedge.models.zoo import architecture
from kdedge.recipe_fill import filled, in_steps
from kdedge.recipe_pretrain import PretrainConfig, resolved_pretrain
from kdedge.recipe_starts import PRETRAINED, TEACHERS_WEIGHTS, misfit
from kdedge.train.engine import EngineConfig
from kdedge.train.optim import OptimConfig
from kdedge.trust.outliers import OutlierConfig
from kdedge.trust.select import TrustConfig

__all__ = [
    "PRETRAINED",
    "SETTINGS",
    "TEACHERS_WEIGHTS",
    "BaselineConfig",
    "DataConfig",
    "DataDescription",
    "Recipe",
    "StudentConfig",
    "TeacherConfig",
    "resolve",
    "resolved_teacher_arch",
]

Settings = Literal["fixmatch.paper", "fixmatch.short"]

SETTINGS: dict[Settings, OptimConfig] = {
    # arXiv 2001.07685, table 4 and section 2.5; google-research/fixmatch for batch norm (TF momentum 0.999)
    "fixmatch.paper": OptimConfig(
        total_steps=2**20,
        labeled_batch=64,
        unlabeled_ratio=7,
        optimizer="sgd",
        schedule="fixmatch",
        learning_rate=0.03,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=5e-4,
        ema_decay=0.999,
        batch_norm_momentum=0.001,
    ),
    # A few thousand steps: the horizon is the run, batch norm forgets faster, mu 3 halves the cost. The number of
    # steps follows from the data.
    "fixmatch.short": OptimConfig(
        labeled_batch=32,
        unlabeled_ratio=3,
        optimizer="sgd",
        schedule="fixmatch",
        learning_rate=0.03,
        warmup_steps=20,
        momentum=0.9,
        weight_decay=5e-4,
        ema_decay=0.999,
        batch_norm_momentum=0.1,
    ),
}


class DataConfig(Config):
    """Which images, and as what they enter the network."""

    spec: str = "digits"
    classes: tuple[str, ...] | None = None  # of the set, in its order; null: all
    labels: Annotated[int, Field(gt=0)] | None = None  # in all, val included; null: the set's default
    root: str | None = None  # of torchvision's sets; null: KDEDGE_DATA or ~/.cache/kdedge/data
    max_unreadable_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    image_px: Annotated[int, Field(ge=4)] | None = None  # images are square
    channels: Literal[1, 3] | None = None
    # Of training images on the device; a packed set that takes more is streamed. null: half of a GPU's free memory, a
    # quarter of the machine's.
    resident_mib: Annotated[int, Field(ge=0)] | None = None
    remove_leaks: bool = True  # leave out unlabeled images that are, nearly, in val or test too
    mean: tuple[float, ...] | None = None  # of pixel / 255; null: of the training images, or of the starting weights
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None


def _known_architecture(name: str) -> str:
    try:
        architecture(name)
    except RecipeError as error:
        raise ValueError(str(error)) from None
    return name


Arch = Annotated[str, AfterValidator(_known_architecture)]


Head = Literal["probe", "fresh"]
"""Where there are starting weights: the head begins as a linear probe of the labeled images, or at random.

After contrastive pre-training at random, as SimCLRv2 has it: its features vary little in many dimensions, where a probe
has large weights, and FixMatch's rate then blows up (seen on digits within 30 steps).
"""


def _told_by_kind(usual: str) -> Discriminator:
    """Which method a group of keys is, by its `kind`; `usual` where it has none."""

    def kind(value: Any) -> str:
        return str(value.get("kind", usual) if isinstance(value, dict) else getattr(value, "kind", usual))

    return Discriminator(kind)


FineTune = Annotated[FineTuneConfig, Tag("fine-tune")]
TeacherMethod = Annotated[Annotated[FixMatchConfig, Tag("fixmatch")] | FineTune, _told_by_kind("fixmatch")]
StudentMethod = Annotated[Annotated[KDFixMatchConfig, Tag("kd-fixmatch")] | FineTune, _told_by_kind("kd-fixmatch")]

KeptLayers = Literal[0, 1]
"""Of SimCLR's projection head, before the classifier: 1 helps with few labels (SimCLRv2, arXiv 2006.10029)."""


class TeacherConfig(Config):
    """The outer network, trained by FixMatch or on the labels alone; or, with `ready`, one that is trained already."""

    ready: str | None = None  # a teacher.safetensors or student.safetensors of the same classes: stage 1 is left out
    arch: Arch | None = None
    width: Annotated[float, Field(gt=0)] = 1.0
    halvings: Annotated[int, Field(ge=0)] | None = None  # how often the image is halved on its way
    init: str | None = None  # a file, "pretrained", torchvision's name of the weights, or "simclr": see pretrain
    head: Head | None = None  # null: fresh after SimCLR, else probe
    projection_layers: KeptLayers = 0
    settings: Settings = "fixmatch.short"
    method: TeacherMethod = FixMatchConfig()
    optim: OptimConfig = OptimConfig()


class StudentConfig(Config):
    """The inner network: what is exported."""

    arch: Arch = "mobilenet-v2"
    width: Annotated[float, Field(gt=0)] | None = None
    halvings: Annotated[int, Field(ge=0)] | None = None
    init: str | None = None  # as the teacher's, or "teacher": the outer network's own weights (same architecture)
    head: Head | None = None  # null: fresh after SimCLR, else probe
    projection_layers: KeptLayers = 0
    settings: Settings = "fixmatch.short"
    method: StudentMethod = KDFixMatchConfig()
    optim: OptimConfig = OptimConfig()


class BaselineConfig(Config):
    """The student's network on the labels only, for as many steps as its loss needs to vanish."""

    enabled: bool = True
    optim: OptimConfig = OptimConfig()


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"'{name}' cannot be part of a folder's name. Letters, digits, '.', '_' and '-' were expected."
        )
    return name


class Recipe(Config):
    """A recipe ends where training ends; export options live in kdedge_export."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Annotated[str, AfterValidator(_folder_name)]  # part of the run folder's name
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    views: ViewConfig = ViewConfig()
    pretrain: PretrainConfig | None = None  # null: nothing is pre-trained here
    teacher: TeacherConfig | None = TeacherConfig()  # null: no outer network, the student learns by FixMatch alone
    trust: TrustConfig = TrustConfig()
    outliers: OutlierConfig = OutlierConfig()
    student: StudentConfig = StudentConfig()
    baseline: BaselineConfig = BaselineConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if sentence := misfit(self):
            raise ValueError(sentence)
        return self


@dataclass(frozen=True)
class DataDescription:
    """What `resolve` knows of the images."""

    kind: Literal["digits", "small", "photo"]  # digits: few grey levels, no mirror; small: up to 64 px
    channels: Literal[1, 3]
    shorter_px: int  # median shorter side
    flip_allowed: bool
    classes: int
    labeled_images: int
    unlabeled_images: int
    teacher_weights: StartingWeights | None = None
    student_weights: StartingWeights | None = None
    ready: StartingWeights | None = None  # of the ready teacher that the student, but not its baseline, starts from

    @property
    def weights(self) -> StartingWeights | None:
        """Those that say what the input is; the student's where both networks start from some."""
        return self.student_weights or self.teacher_weights or self.ready


Who = Literal["baseline", "teacher", "student"]
_WHO: tuple[Who, ...] = ("baseline", "teacher", "student")
Start = Literal["scratch", "weights", "simclr"]

# Steps of (baseline, teacher, student) where the recipe names none: for digits chosen to be minutes on a laptop CPU.
# The baseline's loss is gone after 300, its accuracy grows until about 1000: a shorter one would flatter the student.
_STEPS = {"digits": (1000, 800, 350), "small": (4000, 8000, 8000), "photo": (2000, 2000, 2000)}
_STEPS_FROM_WEIGHTS = (400, 400, 400)
# FixMatch's 0.03, and batch norm over a batch of a few photographs and their strong views, unlearn what the weights
# know: on held-back training photographs of flowers5 at 96 px the linear probe is at 72 %, 40 steps take it to 76 %
# with these, 100 steps at 0.003 with statistics of the batch to 44 %, and frozen statistics at 0.001 diverge.
_FROM_WEIGHTS = {"learning_rate": 0.0001, "batch_norm_momentum": 0.0}
# Features that were pre-trained on the run's own images, at their size, take FixMatch's own settings: of held-back
# training digits (40 labels, wide-resnet-10-2, one seed) the probe knows 90.8 %, 100 steps of FixMatch with these take
# it to 92.0 %, with those for weights it stays at 90.8 %, and frozen statistics at 0.003 take it to 90.2 %. Fine-tuned
# on the labels alone it stays within 2 points of the probe at any rate from 0.0001 to 0.03, but with frozen statistics
# at 0.03 it falls to 76 %.
_FROM: dict[Start, dict[str, float]] = {"scratch": {}, "weights": _FROM_WEIGHTS, "simclr": {}}
_PHOTO_BATCH = 8  # 56 images a step: 4 GiB of activations for MobileNetV2 at 224 px; 32 would be 16 GiB

_VIEWS = {
    "digits": ViewConfig(
        flip=False,
        shift_fraction=0.125,
        rotate_degrees=15.0,
        shear=0.2,
        translate_fraction=0.125,
        cutout_fraction=0.25,
        fill=0.0,
        geometric_only=True,
    ),
    "small": ViewConfig(
        shift_fraction=0.125,  # 4 of 32 pixels
        rotate_degrees=30.0,
        shear=0.3,
        translate_fraction=0.3,
        cutout_fraction=0.5,
        fill=127.0,
        geometric_only=False,
    ),
}
_VIEWS["photo"] = _VIEWS["small"]


def resolve(recipe: Recipe, data: DataDescription) -> Recipe:
    """`recipe` with every open value filled in from the images. What the recipe says itself is never changed.

    Input size, channels and normalisation; how often the networks halve the image (the final map is at least 2 x 2);
    width; which views are allowed and how far they go; the named settings; the number of steps.
    """
    known = data.weights
    px = recipe.data.image_px or _image_px(data)
    input_values: dict[str, object] = {
        "image_px": px,
        "channels": len(known.mean) if known else data.channels,
        "mean": known.mean if known else None,
        "std": known.std if known else None,
    }
    student, fine_tuned = recipe.student, isinstance(recipe.student.method, FineTuneConfig)
    start = "weights" if student.init == TEACHERS_WEIGHTS else _start(student.init, data.student_weights)
    student_values: dict[str, object] = {
        "width": _student_width(student, data),
        "halvings": _halvings(student.halvings, student.arch, px, data.student_weights or data.ready, "student"),
        "head": student.head or _head(start),
        "optim": _optim(student.optim, student.settings, student.arch, data, "student", start, fine_tuned),
    }
    # The baseline sees the labels only: it does not start from what the run has pre-trained on all images.
    start = _start(None, data.student_weights)
    baseline_optim = _optim(recipe.baseline.optim, "fixmatch.short", student.arch, data, "baseline", start, True)
    return recipe.model_copy(
        update={
            "data": filled(recipe.data, **input_values),
            "views": _views(recipe.views, data),
            "pretrain": _pretrain(recipe, data),
            "teacher": _teacher(recipe, px, data),
            "student": student.model_copy(update=student_values),
            "baseline": recipe.baseline.model_copy(update={"optim": baseline_optim}),
        }
    )


def resolved_teacher_arch(teacher: TeacherConfig, kind: str, weights: StartingWeights | None = None) -> str:
    """The recipe's, else that of weights made by kdedge, else ResNet-18 for photographs and for published weights, else
    WRN-28-2."""
    if teacher.arch or (weights is not None and weights.arch):
        return teacher.arch or (weights.arch if weights else None) or ""
    published = teacher.init not in (None, PRETRAINED)
    return "resnet18" if kind == "photo" or published else "wide-resnet-28-2"


def _pretrain(recipe: Recipe, data: DataDescription) -> PretrainConfig | None:
    if recipe.pretrain is None:
        return None
    return resolved_pretrain(
        recipe.pretrain, kind=data.kind, flip_allowed=data.flip_allowed, images=data.unlabeled_images
    )


def _head(start: Start) -> Head:
    return "fresh" if start == "simclr" else "probe"


def _start(init: str | None, weights: StartingWeights | None) -> Start:
    if init == PRETRAINED or (weights is not None and weights.contrastive):
        return "simclr"
    return "scratch" if weights is None else "weights"


def _teacher(recipe: Recipe, px: int, data: DataDescription) -> TeacherConfig | None:
    """What a ready teacher is, its own file says."""
    teacher = recipe.teacher
    if teacher is None or teacher.ready is not None:
        return teacher
    arch = resolved_teacher_arch(teacher, data.kind, data.teacher_weights)
    start, fine_tuned = _start(teacher.init, data.teacher_weights), isinstance(teacher.method, FineTuneConfig)
    values: dict[str, object] = {
        "arch": arch,
        "halvings": _halvings(teacher.halvings, arch, px, data.teacher_weights, "teacher"),
        "head": teacher.head or _head(start),
        "optim": _optim(teacher.optim, teacher.settings, arch, data, "teacher", start, fine_tuned),
    }
    return teacher.model_copy(update=values)


def _views(given: ViewConfig, data: DataDescription) -> ViewConfig:
    """The views of the kind of images; what moves into grey images (digits, garments) is their black background."""
    kind = _VIEWS[data.kind].model_dump(exclude={"operations"}) | {"flip": data.flip_allowed}
    return filled(given, **kind | ({"fill": 0.0} if data.channels == 1 else {}))


def _image_px(data: DataDescription) -> int:
    """Small images as they are; photographs at 160 to 224 px, or the size of the starting weights if smaller."""
    if data.ready is not None:
        return data.ready.px
    px = usual_px(data.kind, data.shorter_px)
    return min(px, data.weights.px) if data.weights and data.kind == "photo" else px


def _student_width(student: StudentConfig, data: DataDescription) -> float:
    """The recipe's, else that of the starting weights, else half for digits where the family has widths."""
    if student.width is not None:
        return student.width
    if (known := data.student_weights or data.ready) is not None:
        return known.width or 1.0
    return 0.5 if data.kind == "digits" and architecture(student.arch).scalable else 1.0


def _halvings(given: int | None, arch: str, px: int, weights: StartingWeights | None, who: str) -> int:
    """As many halvings as leave a map of some size; starting weights keep the strides they were trained with."""
    known = architecture(arch)
    most = 3 if arch.startswith("wide-resnet") else known.halvings
    if weights is not None:
        fitting = (weights.halvings if weights else None) or known.halvings
    elif px <= 16:
        fitting = 2  # 8 px end at 2 x 2
    else:
        fitting = min(3 if px <= 32 else 4 if px <= 64 else 5, known.halvings if px <= 32 else most)
    if given is not None and given > most:
        raise RecipeError(f"{who}.halvings is {given}; {arch} halves the image at most {most} times.")
    chosen = fitting if given is None else given
    if px / 2**chosen < 2:
        raise RecipeError(
            f"{chosen} halvings of {px} px leave a map below 2 x 2 for {arch}. "
            f"Set {who}.halvings lower or data.image_px higher."
        )
    return chosen


def _optim(
    given: OptimConfig, settings: Settings, arch: str, data: DataDescription, who: Who, start: Start, labels_only: bool
) -> OptimConfig:
    """The named settings with what the recipe says on top, the duration in steps.

    What starts from weights, its teacher's too, is tuned: trained less, and with care for what the weights know.
    """
    named, rate = SETTINGS[settings], architecture(arch).learning_rate
    defaults = named.model_dump(exclude={"total_steps", "total_epochs", "total_images"})
    defaults |= {"learning_rate": rate} if rate else {}
    if settings == "fixmatch.short":
        defaults |= {"labeled_batch": _PHOTO_BATCH} if data.kind == "photo" else {}
        defaults |= _FROM[start]
    resolved = filled(given, **defaults)
    ratio, batch = resolved.unlabeled_ratio, resolved.labeled_batch
    if ratio is None or batch is None:
        raise BugError(f"the settings {settings} leave the batch open")
    tuned = start == "weights" or (start == "simclr" and labels_only)
    usual = _STEPS_FROM_WEIGHTS if tuned else _STEPS[data.kind]
    steps = usual[_WHO.index("baseline" if labels_only else who)]
    epoch = (data.labeled_images, batch) if labels_only else (data.unlabeled_images, ratio * batch)
    return in_steps(
        resolved, named.total_steps or steps, batch=batch, images_an_epoch=epoch[0], batch_of_epoch=epoch[1]
    )
