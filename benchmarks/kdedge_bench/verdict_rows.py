"""The rows of a verdict: how each differs from the recipe, and in which order they are made.

The rows are the ablation grid that the natural questions ask for: what do labels alone give, what does FixMatch add,
what the outer network, and what each part of KD-FixMatch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdedge.errors import BugError, RecipeError, did_you_mean
from kdedge.methods.kd_fixmatch import KDFixMatchConfig
from kdedge.recipe import PRETRAINED, TEACHERS_WEIGHTS, Recipe
from kdedge.recipe_yaml import read_value
from kdedge_bench import work_job
from kdedge_bench.work_job import Job

__all__ = [
    "EQUAL_TOTAL",
    "FIXMATCH",
    "FULL",
    "NO_SIMCLR",
    "READY",
    "ROWS",
    "SUPERVISED",
    "Row",
    "choose",
    "equal_total_steps",
    "jobs",
    "merged",
    "run_name",
    "settings_of",
]

FULL, SUPERVISED, FIXMATCH, EQUAL_TOTAL = "kd-fixmatch", "supervised", "fixmatch", "fixmatch-equal-total"
NO_SIMCLR = "no-simclr"
READY = "teacher.ready"


@dataclass(frozen=True)
class Row:
    """One row. `question` is what its difference to KD-FixMatch answers; `needs` are rows whose runs it reads."""

    name: str
    question: str
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = (FULL,)
    ablation: bool = False
    only_named: bool = False  # of few recipes: made where --rows names it

    @property
    def ready_teacher(self) -> bool:
        """It uses the outer network of the full row of its seed, which is trained once, and counted in each."""
        return "teacher=null" not in self.settings and self.name not in {FULL, SUPERVISED, NO_SIMCLR}


ROWS = (
    Row(FULL, "the recipe itself", needs=()),
    Row(FIXMATCH, "equal student steps", ("teacher=null", "student.method.robust_loss=ce"), needs=()),
    # Made by no run of its own: it is the baseline in FixMatch's.
    Row(SUPERVISED, "labels only, to its own convergence", needs=(FIXMATCH,)),
    Row(EQUAL_TOTAL, "equal total compute", ("teacher=null", "student.method.robust_loss=ce"), needs=(FULL, FIXMATCH)),
    Row("kd-only", "distillation without pseudo labels", ("trust.filters=none", "student.method.unlabeled_weight=0")),
    Row("no-clustering", "the cluster filter", ("trust.filters=confidence",), ablation=True),
    Row("no-confidence", "the confidence filter", ("trust.filters=clusters",), ablation=True),
    Row("no-sce", "symmetric cross entropy", ("student.method.robust_loss=ce",), ablation=True),
    Row("no-soft-kd", "soft distillation", ("student.method.distill.loss=none",), ablation=True),
    # Its outer network is trained anew, as long as the recipe says, from random weights.
    Row(
        NO_SIMCLR, "the SimCLR start", ("pretrain=null", "teacher.init=null"), needs=(), ablation=True, only_named=True
    ),
)


def run_name(row: str, seed: int) -> str:
    """The run's folder inside the verdict's; the supervised network is in FixMatch's."""
    return work_job.run_name(FIXMATCH if row == SUPERVISED else row, seed)


def choose(names: Sequence[str] | None) -> tuple[Row, ...]:
    """The rows of these names and those they need, in the order of ROWS; KD-FixMatch is always there.

    None stands for all but those that are made only where they are named.
    """
    known = {row.name: row for row in ROWS}
    wanted = {FULL, *((row.name for row in ROWS if not row.only_named) if names is None else names)}
    for name in wanted - known.keys():
        hint = did_you_mean(name, known)
        raise RecipeError(f"--rows: '{name}' is no row of a verdict; there are {', '.join(known)}.{hint}")
    for row in reversed(ROWS):  # what a row needs stands before it
        if row.name in wanted:
            wanted |= set(row.needs)
    return tuple(row for row in ROWS if row.name in wanted)


def jobs(rows: Sequence[Row], seeds: Sequence[int]) -> tuple[Job[Row], ...]:
    """Every run, in the order of making: the main rows of all seeds, then the ablations of all seeds."""
    own = [row for row in rows if row.name != SUPERVISED]
    return tuple(Job(row, seed) for late in (False, True) for seed in seeds for row in own if row.ablation is late)


def settings_of(row: Row, recipe: Recipe, *, supervised: bool, teacher: str, steps: int | None) -> dict[str, str]:
    """Key -> value of what a row changes in `recipe`, as after --set.

    `supervised`: FixMatch's run also trains the baseline; `teacher` is the file of the seed's outer network; `steps`
    are those of the row at equal total compute, else None.
    """
    own = dict(setting.split("=", 1) for setting in row.settings)
    own["baseline.enabled"] = "true" if row.name == FIXMATCH and supervised else "false"
    if row.ready_teacher and recipe.teacher is not None and recipe.teacher.ready is None:
        own[READY] = _as_yaml(teacher)
    if steps is not None:
        own["student.optim.total_steps"] = str(steps)
    return own | _no_longer_possible(own, recipe)


def _as_yaml(text: str) -> str:
    """`text` as it is written after --set KEY=: in quotes where YAML would read anything else."""
    try:
        understood = read_value(text, "--set") == text
    except RecipeError:
        understood = False
    return text if understood else json.dumps(text, ensure_ascii=False)


def _no_longer_possible(own: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
    """What the recipe says and the row cannot mean: set to what the row stands for without it."""
    student, method = recipe.student, recipe.student.method
    found = _without_its_pretraining(own, recipe)
    if not isinstance(method, KDFixMatchConfig):
        raise BugError(f"a verdict of a student that learns by {method.kind}")
    if "teacher" in own:  # FixMatch alone has no outer network to start from, and learns from labels and its own
        if student.init == TEACHERS_WEIGHTS:  # it starts from where the outer network did
            start = recipe.teacher.init if recipe.teacher is not None else None
            if start == PRETRAINED:
                found = {"pretrain.of": "student"}
            found["student.init"] = "null" if start is None else _as_yaml(start)
        found |= {
            f"student.method.{name}": "1"
            for name in ("labeled_weight", "unlabeled_weight")
            if getattr(method, name) == 0
        }
    if own.get("student.method.unlabeled_weight") == "0" and method.thresholds.policy == "freematch":
        found["student.method.thresholds.fairness_weight"] = "0"  # pseudo labels' too, though no part of their term
    if own.get("student.method.distill.loss") == "none":
        found |= {"student.method.distill.mixup": "false"} if method.distill.mixup else {}
        found |= {"student.method.distill.temperature": "null"} if method.distill.temperature is not None else {}
    if "student.optim.total_steps" in own:  # a duration has one unit
        found |= {
            f"student.optim.{unit}": "null"
            for unit in ("total_epochs", "total_images")
            if getattr(student.optim, unit) is not None
        }
    return found


def _without_its_pretraining(own: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
    """An outer network that the row does not train is not pre-trained for it either."""
    if recipe.pretrain is None or recipe.pretrain.of != "teacher" or not {"teacher", READY} & own.keys():
        return {}
    return {"pretrain": "null"} | ({"teacher.init": "null"} if READY in own else {})


def merged(settings: Sequence[str], own: Mapping[str, str]) -> tuple[str, ...]:
    """The --set words of a command that has both: those asked for, without what the row says otherwise."""

    def overridden(setting: str) -> bool:
        key = setting.partition("=")[0].strip()
        return any(key == other or key.startswith(f"{other}.") for other in own)

    return (*(s for s in settings if not overridden(s)), *(f"{key}={value}" for key, value in own.items()))


def equal_total_steps(total_flops: float, fixmatch_flops: float, fixmatch_steps: int) -> int:
    """Steps of FixMatch alone that cost as many training FLOPs as all stages of KD-FixMatch; at least its own steps.

    One step costs what it did in the FixMatch run: the inner network's step may hold a live teacher's forward pass.
    """
    return max(fixmatch_steps, round(total_flops * fixmatch_steps / fixmatch_flops))
