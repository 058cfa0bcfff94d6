"""The runs of a SimCLR study: each an ordinary recipe, and which of the others' files it starts from.

One pre-training for each network and seed; every other run starts from its pretrained.safetensors, or from nothing.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdedge.train.optim import OptimConfig
from kdedge_bench.study_plan import DistillationConfig, NetworkConfig, StudyPlan, StudySet
from kdedge_bench.work_job import Job

__all__ = [
    "DISTILLATION",
    "FINE_TUNING",
    "FIRST_LAYER",
    "LINEAR",
    "OTHER",
    "PRETRAINING",
    "SAME",
    "SCRATCH",
    "SELF",
    "TRANSFER",
    "TUNED",
    "WAYS",
    "StudyRow",
    "study_jobs",
    "study_rows",
    "subset",
]  # fmt: skip

PRETRAINING, FINE_TUNING, DISTILLATION, TRANSFER = "pre-training", "fine-tuning", "distillation", "transfer"
LINEAR, TUNED, FIRST_LAYER, SCRATCH = "linear", "fine-tuned", "first-layer", "scratch"
SAME, OTHER, SELF = "same", "other", "self"
PROBE_LABELS = 40  # a class, in a run that pre-trains: with 50, a fifth of them would be held back from the pool as val
WAYS = (LINEAR, TUNED, FIRST_LAYER, SCRATCH)


@dataclass(frozen=True)
class StudyRow:
    """One run for each seed. `facts` say what it is in the tables; `start` and `teachers` name rows it reads."""

    name: str
    analysis: str
    on: StudySet
    labels: int | None
    network: NetworkConfig
    method: dict[str, Any]
    optim: OptimConfig
    start: str | None = None  # the row that pre-trains
    layers: int = 0  # of its projection head that are kept
    # Fine-tuning begins with a head at random, as in SimCLR: a probe of features with small spreads has weights so
    # large that the first steps undo the backbone. It is also as good after few steps as after many, so that no two
    # teachers would match.
    head: str = "fresh"
    teachers: tuple[str, ...] = ()  # of these, one teaches; of several, the one that `study_match` finds
    classes: int | None = None  # of the set's, drawn by the seed; None for all
    pretrains: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def input_of(self) -> str | None:
        """The row whose normalisation this one has, whether it starts from its network or not; None for such a row."""
        return None if self.pretrains else _start_of(self.network)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*((self.input_of,) if self.input_of else ()), *self.teachers)


def study_rows(plan: StudyPlan) -> tuple[StudyRow, ...]:
    """Every row of the plan, a row after those it needs."""
    found = [*_fine_tuning(plan), *_distillation(plan), *_transfer(plan)]
    networks = {row.start: row.network for row in found if row.start}
    return (*(_pretraining(plan, network) for network in networks.values()), *found)


def study_jobs(rows: Sequence[StudyRow], seeds: Sequence[int]) -> tuple[Job[StudyRow], ...]:
    """Every run: a whole seed after the other, so that the first answers come early."""
    return tuple(Job(row, seed) for seed in seeds for row in rows)


def subset(classes: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the classes, drawn by the seed; those of a smaller count are among those of a larger."""
    drawn = sorted(classes, key=lambda name: hashlib.sha256(f"{seed}\nclasses\n{name}".encode()).digest())
    return drawn[:count]


def _start_of(network: NetworkConfig) -> str:
    return f"pretrain-{network.slug}"


def _pretraining(plan: StudyPlan, network: NetworkConfig) -> StudyRow:
    """On the pool of the first set. Its labels are for the nearest neighbours and the linear head alone."""
    first = plan.sets[0]
    labels = min(PROBE_LABELS, *first.per_class) * len(first.classes)
    return StudyRow(
        _start_of(network),
        PRETRAINING,
        first,
        labels,
        network,
        {"kind": "fine-tune", "train": "head"},
        plan.config.tune,
        pretrains=True,
    )


def _ways(plan: StudyPlan, row: StudyRow, ways: Sequence[str]) -> Iterator[StudyRow]:
    """`row` once for each way to use the pre-trained network, or none."""
    start = _start_of(row.network)
    for way in ways:
        tuned = replace(row, name=f"{row.name}-{way}", start=start, facts=row.facts | {"way": way})
        if way == LINEAR:
            yield replace(tuned, method={"kind": "fine-tune", "train": "head"})
        elif way == SCRATCH:
            yield replace(tuned, start=None, optim=plan.config.scratch)
        else:
            yield replace(tuned, layers=1 if way == FIRST_LAYER else 0)


def _supervised(plan: StudyPlan, name: str, analysis: str, on: StudySet, labels: int | None) -> StudyRow:
    return StudyRow(name, analysis, on, labels, plan.config.network, {"kind": "fine-tune"}, plan.config.tune)


def _fine_tuning(plan: StudyPlan) -> Iterator[StudyRow]:
    config, first = plan.config.fine_tuning, plan.sets[0]
    same: dict[int, list[int | str]] = {}  # of few images, 1% and 10% are one number
    for asked in dict.fromkeys(config.labels if config else ()):
        labels = first.labels(asked)
        same.setdefault(sum(first.per_class) if labels is None else labels, []).append(asked)
    for count, ways_to_ask in same.items():
        labels = first.labels(ways_to_ask[0])
        name = "labels-all" if labels is None else f"labels-{labels}"
        facts = {"labels": count, "asked": ", ".join(map(str, ways_to_ask))}
        row = replace(_supervised(plan, name, FINE_TUNING, first, labels), facts=facts)
        yield from _ways(plan, row, WAYS)


def _distillation(plan: StudyPlan) -> Iterator[StudyRow]:
    config, first = plan.config.distillation, plan.sets[0]
    if config is None:
        return
    labels = first.labels(config.labels)
    plain = _supervised(plan, "", DISTILLATION, first, labels)
    teachers = {
        SAME: tuple(_teacher(plain, SAME, config.same, each) for each in config.same_steps),
        OTHER: tuple(_teacher(plain, OTHER, config.other, each) for each in config.other_steps),
        SELF: (_teacher(plain, SELF, config.student, max(config.same_steps)),),
    }
    yield from (row for rows in teachers.values() for row in rows)
    student = replace(plain, network=config.student, optim=config.optim)
    yield replace(student, name="student-alone", facts={"teacher": None, "labels": True})
    for who in teachers:
        matched = (SAME, OTHER) if who != SELF else (SELF,)
        names = tuple(row.name for each in matched for row in teachers[each])
        for labeled in (True, False):
            yield replace(
                student,
                name=f"student-{who}{'' if labeled else '-unlabeled'}",
                method=_taught(config, labeled, config.self_temperature if who == SELF else config.temperature),
                teachers=names,
                facts={"teacher": who, "labels": labeled},
            )


def _teacher(plain: StudyRow, who: str, network: NetworkConfig, steps: int) -> StudyRow:
    optim = plain.optim.model_copy(update={"total_steps": steps, "total_epochs": None, "total_images": None})
    return replace(
        plain,
        name=f"teacher-{who}-{steps}",
        network=network,
        optim=optim,
        start=_start_of(network),
        layers=1,
        facts={"teaches": who, "steps": steps},
    )


def _taught(config: DistillationConfig, labeled: bool, temperature: float) -> dict[str, Any]:
    """SimCLRv2's loss, (1 - alpha) labels + alpha distillation, by the terms of a recipe.

    The term of distillation has a gradient as small as its temperature below 1. LARS, which the paper trains with, does
    not mind; SGD does, so its weight is divided by it.
    """
    share = config.label_share if labeled else 0.0
    distill = {
        "loss": "kd",
        "views": config.views,
        "weight": (1 - share) / min(temperature, 1.0),
        "temperature": temperature,
    }
    return {"kind": "kd-fixmatch", "unlabeled_weight": 0.0, "labeled_weight": share, "distill": distill}


def _transfer(plan: StudyPlan) -> Iterator[StudyRow]:
    config, counted = plan.config.transfer, plan.many_classes
    if config is None or counted is None:
        return
    ways = (LINEAR, TUNED, SCRATCH)
    for target in plan.targets:
        labels = config.labels_per_class * len(target.classes)
        row = _supervised(plan, f"to-{_slug(target.name)}", TRANSFER, target, labels)
        yield from _ways(plan, replace(row, facts={"target": target.name, "of": len(target.classes)}), ways)
    everything = len(counted.classes)
    counts = sorted({count for count in config.classes if count < everything} | {everything})
    for count in counts:
        if count == everything and counted in plan.targets:
            continue  # made above
        row = _supervised(plan, f"classes-{count}", TRANSFER, counted, config.labels_per_class * count)
        facts = {"target": counted.name, "of": count}
        yield from _ways(plan, replace(row, classes=None if count == everything else count, facts=facts), ways)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "set"
