"""The plan of a SimCLR study: which sets, networks, lengths and label counts, decided before the first run.

A plan is a YAML file; `study_rows` makes the runs of it. The three analyses are those of arXiv 2108.00587.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from kdedge import recipe_io
from kdedge.config import Config
from kdedge.data import Source, open_source
from kdedge.data.source import usual_px
from kdedge.data.views import ViewConfig
from kdedge.errors import DataError, RecipeError, did_you_mean
from kdedge.models.zoo import architecture
from kdedge.recipe import DataConfig
from kdedge.recipe_pretrain import PretrainConfig
from kdedge.recipe_yaml import read_document
from kdedge.run_pool import input_channels
from kdedge.runs import SCHEMA, sha256_bytes
from kdedge.train.engine import EngineConfig
from kdedge.train.optim import OptimConfig
from kdedge_bench.study_rules import RULES
from kdedge_device.preprocess import Preprocess

__all__ = [
    "DistillationConfig",
    "FineTuningConfig",
    "NetworkConfig",
    "StudyConfig",
    "StudyPlan",
    "StudySet",
    "TransferConfig",
    "make_study_plan",
    "shipped_plans",
]

DEFAULT_PLAN = "digits"
Positive = Annotated[int, Field(gt=0)]


def _percent_or_number(labels: int | str) -> int | str:
    if isinstance(labels, int):
        if labels < 1:
            raise ValueError(f"{labels} labels are none. Expected a number from 1, or a share such as 10%.")
        return labels
    number = labels.removesuffix("%").strip()
    try:
        share = float(number) if labels.endswith("%") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise ValueError(f"'{labels}' is no number of labels. Expected a number such as 100, or a share such as 10%.")
    return labels


def _each_once(steps: tuple[int, ...]) -> tuple[int, ...]:
    for count in steps:
        if steps.count(count) > 1:
            raise ValueError(f"{count} steps are named {steps.count(count)} times. Expected each length once.")
    return steps


Lengths = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_each_once)]
Labels = Annotated[int | str, AfterValidator(_percent_or_number)]
"""Labelled images in all, or `10%` of the labelled training images of the set."""


class NetworkConfig(Config):
    """What is built, as a recipe's student says it."""

    arch: Annotated[str, AfterValidator(lambda name: architecture(name).name)]
    width: Annotated[float, Field(gt=0)] = 1.0
    halvings: Annotated[int, Field(ge=0)] | None = None

    @property
    def slug(self) -> str:
        """Part of a run's name."""
        width = "" if self.width == 1 else f"-x{self.width:g}"
        return f"{self.arch.replace('/', '-')}{width}"

    @property
    def family(self) -> str:
        """`resnet` of resnet18, `mobilenet` of mobilenet-v2, `wide` of wide-resnet-10-2."""
        return re.split(r"[-\d]", self.arch.removeprefix("timm/"))[0]


class FineTuningConfig(Config):
    """Analysis 1: what pre-training gives to few labels and to many."""

    labels: Annotated[tuple[Labels, ...], Field(min_length=1)] = ("1%", "10%", "100%")


class DistillationConfig(Config):
    """Analysis 2: which teacher a student learns best from. Teachers are pre-trained, then fine-tuned on `labels`.

    Each teacher is fine-tuned anew for each number of its steps, its head from random weights; of all pairs whose
    accuracies on held-out training images differ by at most `margin_points`, the most accurate one teaches.
    """

    labels: Labels
    student: NetworkConfig
    same: NetworkConfig  # of the student's family
    other: NetworkConfig  # of another
    same_steps: Lengths
    other_steps: Lengths
    margin_points: Annotated[float, Field(gt=0)] = 2.0
    held_out_images: Positive = 2000  # at most
    optim: OptimConfig  # of the students, those on labels only among them
    label_share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # alpha's counterpart: of the labels in the loss with labels
    temperature: Annotated[float, Field(gt=0)] = 1.0  # SimCLRv2: 1 from a larger network
    self_temperature: Annotated[float, Field(gt=0)] = 0.1  # and 0.1 where both are the same
    views: Literal["stored", "same"] = "same"  # as in a recipe's student.method.distill

    @model_validator(mode="after")
    def _families(self) -> Self:
        if self.same.family != self.student.family:
            raise ValueError(f"same is {self.same.arch}, which is not of the student's family, {self.student.arch}.")
        if self.other.family == self.student.family:
            raise ValueError(f"other is {self.other.arch}, which is of the student's own family, {self.student.arch}.")
        return self


class TransferConfig(Config):
    """Analysis 3: what pre-training on one set gives on another, and on fewer of its classes."""

    labels_per_class: Positive = 10
    classes: tuple[Annotated[int, Field(ge=2)], ...] = (2, 5, 10)
    subsets_of: str | None = None  # one of `sets`; null: the target with most classes


class StudyConfig(Config):
    """A plan as written. `data`, `views`, `engine` and `pretrain` are those of a recipe; every run has them."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    seeds: Positive = 5
    sets: Annotated[tuple[str, ...], Field(min_length=1)]  # the first is pre-trained on, the others are targets
    data: DataConfig = DataConfig()
    most_px: Positive | None = None  # larger images are made this small, where data.image_px is left open
    views: ViewConfig = ViewConfig()
    engine: EngineConfig = EngineConfig()
    network: NetworkConfig  # of analyses 1 and 3
    pretrain: PretrainConfig = PretrainConfig(of="student")
    tune: OptimConfig  # from the pre-trained network
    scratch: OptimConfig  # and without: as many steps of as many images
    fine_tuning: FineTuningConfig | None = None
    distillation: DistillationConfig | None = None
    transfer: TransferConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        fixed = [key for key in ("labels", "classes") if getattr(self.data, key) is not None]
        if fixed or self.data.spec != DataConfig().spec:
            raise ValueError(f"data.{(fixed or ['spec'])[0]} is what the runs of a study differ in; use `sets`.")
        budgets = [(o.total_steps, o.total_epochs, o.total_images, o.labeled_batch) for o in (self.tune, self.scratch)]
        if budgets[0] != budgets[1]:
            raise ValueError("tune and scratch differ in length or batch; a comparison needs the same budget in both.")
        if not (self.fine_tuning or self.distillation or self.transfer):
            raise ValueError("The plan holds none of fine_tuning, distillation and transfer.")
        return self


@dataclass(frozen=True)
class StudySet:
    """What is known of one of the sets."""

    spec: str
    name: str  # unique in the plan
    classes: tuple[str, ...]
    fingerprint: str
    per_class: tuple[int, ...]  # labelled training images
    all_by_default: bool  # where no number of labels is asked for, every label is kept
    px: int  # that a run would choose
    channels: int
    greyed: bool  # colour images that are packed as grey ones

    def labels(self, asked: int | str) -> int | None:
        """The number of labels that a run is asked for, evenly over the classes; None for all of them."""
        if isinstance(asked, int):
            return asked
        share = float(asked.removesuffix("%")) / 100
        if share == 1 and self.all_by_default:
            return None
        each = max(1, int(share * sum(self.per_class) / len(self.per_class)))
        return min(*self.per_class, each) * len(self.classes)


@dataclass(frozen=True)
class StudyPlan:
    """A plan with its sets opened, for some seeds."""

    origin: str  # a name or a path, as typed
    config: StudyConfig
    sets: tuple[StudySet, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # sets that were asked for in place of the plan's

    @functools.cached_property
    def sha256(self) -> str:
        return sha256_bytes(recipe_io.dump(self.config).encode())

    @property
    def default_folder(self) -> Path:
        return Path("runs") / f"study-simclr-{self.config.name}"

    @property
    def targets(self) -> tuple[StudySet, ...]:
        return self.sets[1:]

    @property
    def many_classes(self) -> StudySet | None:
        """The set whose classes are counted: a target, or the only set there is."""
        if self.config.transfer is None:
            return None
        asked = self.config.transfer.subsets_of
        if asked is not None:
            return next(each for each in self.sets if each.spec == asked)
        return max(self.targets or self.sets, key=lambda each: len(each.classes))

    def to_json(self) -> dict[str, Any]:
        """What plan.json says, but for how runs are kept, which may change."""
        asked = self.config.model_dump(mode="json", by_alias=True)
        for key in ("checkpoint_every_s", "keep_checkpoints"):
            del asked["engine"][key]
        return {
            "schema": SCHEMA,
            "plan_sha256": self.sha256,
            "asked": asked,
            "fingerprints": {each.name: each.fingerprint for each in self.sets},
            "seeds": list(self.seeds),
            "rules": RULES,
        }


def shipped_plans() -> dict[str, str]:
    """Name -> text of the plans that come with kdedge."""
    files = recipe_io.shipped("kdedge_bench", "study_plans")
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}


def make_study_plan(
    origin: str | None = None,
    *,
    data: Sequence[str] = (),
    seeds: int | None = None,
    first_seed: int = 0,
    settings: Sequence[str] = (),
) -> StudyPlan:
    """The plan called or lying at `origin` (None: the default), with `data` in place of its sets.

    RecipeError and DataError for what can be known before hours are spent on it.
    """
    origin = origin or DEFAULT_PLAN
    document = read_document(_text(origin), origin)
    if data:
        document.data["sets"] = list(data)
        if isinstance(document.data.get("transfer"), dict):
            document.data["transfer"].pop("subsets_of", None)
    recipe_io.override(document, settings, StudyConfig)
    config = recipe_io.validate(document, StudyConfig)
    chosen = tuple(range(first_seed, first_seed + (seeds or config.seeds)))
    sources = _sources(config)
    sets = _study_sets(config.sets, sources)
    config = _one_input(config, sets)
    plan = StudyPlan(origin, config, sets, chosen, tuple(settings), tuple(data))
    _refuse(plan)
    for source in sources:
        source.require_packed(_input(config))
    return plan


def _text(origin: str) -> str:
    shipped = shipped_plans()
    if origin in shipped:
        return shipped[origin]
    path = Path(origin).expanduser()
    if not path.is_file():
        known = f"there are {', '.join(shipped)}, and any path to a .yaml file"
        raise RecipeError(f"There is no study plan '{origin}'; {known}.{did_you_mean(origin, shipped)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text in UTF-8: {error}.") from error


def _sources(config: StudyConfig) -> list[Source]:
    root, share = Path(config.data.root) if config.data.root else None, config.data.max_unreadable_fraction
    return [open_source(spec, root=root, max_unreadable_fraction=share) for spec in config.sets]


def _study_sets(specs: Sequence[str], sources: Sequence[Source]) -> tuple[StudySet, ...]:
    found: list[StudySet] = []
    for spec, source in zip(specs, sources, strict=True):
        same = sum(each.name.partition("~")[0] == source.name for each in found)
        found.append(_study_set(spec, source, f"{source.name}~{same + 1}" if same else source.name))
    return tuple(found)


def _one_input(config: StudyConfig, sets: Sequence[StudySet]) -> StudyConfig:
    """The same size and channels for every run, else what starts from scratch would see another set's images larger.

    Colours where a set has some, unless a pack has lost them.
    """
    px = min(sets[0].px, config.most_px or sets[0].px)
    channels = 1 if any(each.greyed for each in sets) else max(each.channels for each in sets)
    open_values = {"image_px": px, "channels": channels}
    values = {key: value for key, value in open_values.items() if getattr(config.data, key) is None}
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def _input(config: StudyConfig) -> Preprocess:
    px, channels = config.data.image_px or 0, config.data.channels or 3
    return Preprocess(px, px, channels, "short-side-crop", (0.0,) * channels, (1.0,) * channels)


def _study_set(spec: str, source: Source, name: str) -> StudySet:
    if not (np.isin(source.part, ["test", "val"]) & (source.labels >= 0)).any():
        raise DataError(f"{source.name} has no test images, so nothing can be compared on it. Add test/CLASS/ folders.")
    train = source.labels[source.part == "train"]
    counts = np.bincount(train[train >= 0], minlength=len(source.classes))
    every = source.default_labels is None
    px = usual_px(source.kind, source.readable_px)
    per_class = tuple(map(int, counts))
    channels, greyed = source.channels, input_channels(source) < source.channels
    return StudySet(spec, name, source.classes, source.fingerprint, per_class, every, px, channels, greyed)


def _refuse(plan: StudyPlan) -> None:
    """What a run in the middle of the study would refuse hours later."""
    transfer, specs = plan.config.transfer, [each.spec for each in plan.sets]
    if len(set(specs)) < len(specs):
        raise RecipeError(f"A set is named twice: {', '.join(specs)}. Name each once; the first is pre-trained on.")
    if transfer is not None and transfer.subsets_of is not None and transfer.subsets_of not in specs:
        known = ", ".join(specs)
        raise RecipeError(f"transfer.subsets_of is {transfer.subsets_of}, which is none of the sets: {known}.")
    first = plan.sets[0]
    for asked in plan.config.fine_tuning.labels if plan.config.fine_tuning else ():
        _require_labels(first, asked, len(first.classes))
    if plan.config.distillation:
        _require_labels(first, plan.config.distillation.labels, len(first.classes))
    if transfer is not None:
        counted = plan.many_classes
        for target in dict.fromkeys([*plan.targets, *([counted] if counted else [])]):
            _require_labels(target, transfer.labels_per_class * len(target.classes), 1)


def _require_labels(of: StudySet, asked: int | str, multiple: int) -> None:
    wanted = of.labels(asked)
    most = min(of.per_class) * len(of.classes)
    if wanted is not None and (wanted % multiple or wanted > most):
        raise DataError(
            f"{asked} labels do not work for {of.name}: a multiple of its {len(of.classes)} classes was expected, and "
            f"at most {most}. Change the plan, or name other sets."
        )
