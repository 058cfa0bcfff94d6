"""The plan of a verdict: what was asked for, and what can be refused before hours are spent on it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdedge import recipe_io
from kdedge.data import open_source
from kdedge.data.splits import make_splits
from kdedge.errors import DataError, RecipeError
from kdedge.methods.kd_fixmatch import KDFixMatchConfig
from kdedge.recipe import PRETRAINED, TEACHERS_WEIGHTS, Recipe
from kdedge.recipe_yaml import read_value
from kdedge.runs import SCHEMA, sha256_bytes
from kdedge_bench.verdict_rows import EQUAL_TOTAL, FULL, Row, choose
from kdedge_bench.work_folder import flat

__all__ = ["SPELLINGS", "Plan", "make_plan"]

SPELLINGS = ("recipe", "recipe_sha256", "settings")
"""Keys of plan.json that may differ: the recipe as asked for counts, however it was named or spelled."""


@dataclass(frozen=True)
class Plan:
    """What was asked for. `flags` are those of `kdedge train-recipe` that every row is made with."""

    recipe_name: str  # or path
    recipe: Recipe  # as asked for, with the first seed
    settings: tuple[str, ...]
    flags: dict[str, Any]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    data: str  # the set's name
    data_fingerprint: str
    labels: int | None  # of the set, where none were asked for

    @functools.cached_property
    def recipe_sha256(self) -> str:
        return sha256_bytes(recipe_io.dump(self.recipe).encode())

    @property
    def default_folder(self) -> Path:
        labels = "all" if self.labels is None else self.labels
        return Path("runs") / f"verdict-{self.recipe.name}-{self.data}-{labels}"

    def has_row(self, name: str) -> bool:
        return any(row.name == name for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """What plan.json says, but for how runs are kept, which may change."""
        asked = _but_for_how_runs_are_kept(self.recipe.model_dump(mode="json", by_alias=True))
        return {
            "schema": SCHEMA,
            "recipe": self.recipe_name,
            "recipe_sha256": self.recipe_sha256,
            "asked": asked,
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "labels": self.labels,
            "seeds": list(self.seeds),
            "rows": [row.name for row in self.rows],
            "settings": list(self.settings),
        }

    def as_now(self, before: dict[str, Any]) -> dict[str, Any]:
        """The plan.json `before`, which an earlier kdedge may have written, in the keys of this one."""
        asked = recipe_io.as_now(before["asked"], self.recipe)
        return before | {"asked": _but_for_how_runs_are_kept(asked)}


def _but_for_how_runs_are_kept(asked: dict[str, Any]) -> dict[str, Any]:
    kept = ("checkpoint_every_s", "keep_checkpoints")
    return asked | {"engine": {key: value for key, value in asked["engine"].items() if key not in kept}}


def make_plan(
    recipe_name: str,
    settings: Sequence[str],
    *,
    seeds: Sequence[int],
    rows: Sequence[str] | None = None,
    **flags: Any,
) -> Plan:
    """The plan for `seeds`. RecipeError and DataError for what can be known before hours are spent on it."""
    recipe = recipe_io.load(recipe_name, settings, seed=seeds[0], **flags)
    if recipe.teacher is None:
        raise RecipeError(
            f"The recipe {recipe_name} has no teacher: it is FixMatch alone, and there is nothing to judge."
        )
    if not isinstance(recipe.student.method, KDFixMatchConfig):
        raise RecipeError(
            f"The student of the recipe {recipe_name} learns by {recipe.student.method.kind}: there is no KD-FixMatch "
            "to judge. What pre-training and fine-tuning give, kdedge study simclr asks."
        )
    if any(setting.partition("=")[0].strip() == "seed" for setting in settings):
        raise RecipeError("--set seed=... fixes the seed that a verdict varies. Use --first-seed and --seeds.")
    chosen = choose(rows)
    _refuse_rows_that_change_nothing(chosen, recipe)
    _refuse_an_unknown_budget(chosen, recipe)
    _refuse_different_inputs(chosen, recipe)
    root = Path(recipe.data.root) if recipe.data.root else None
    most = recipe.data.max_unreadable_fraction
    source = open_source(recipe.data.spec, root=root, max_unreadable_fraction=most, classes=recipe.data.classes)
    splits = make_splits(source, recipe.data.labels, seeds[0])
    if not len(splits.test):
        raise DataError(f"{source.name} has no test images, so nothing can be judged. Add test/CLASS/ folders.")
    return Plan(
        recipe_name,
        recipe,
        tuple(settings),
        flags,
        chosen,
        tuple(seeds),
        source.name,
        source.fingerprint,
        splits.labels,
    )


def _refuse_rows_that_change_nothing(rows: Sequence[Row], recipe: Recipe) -> None:
    """An ablation of what the recipe does not have would be trained to differ from KD-FixMatch by nothing."""
    asked = flat(recipe.model_dump(mode="json"))

    def is_so(setting: str) -> bool:
        key, _, value = setting.partition("=")
        return key in asked and bool(asked[key] == read_value(value, f"--set {setting}", tuple(key.split("."))))

    same = [row.name for row in rows if (row.ready_teacher or row.only_named) and all(map(is_so, row.settings))]
    if same:
        left = ",".join(row.name for row in rows if row.name not in same)
        raise RecipeError(
            f"The recipe {recipe.name} is already what {' and '.join(same)} would be. Leave that out: --rows {left}"
        )


def _refuse_an_unknown_budget(rows: Sequence[Row], recipe: Recipe) -> None:
    """What the training of the recipe's own ready teacher cost is unknown, so nothing can cost as much."""
    names = [row.name for row in rows]
    if recipe.teacher is not None and recipe.teacher.ready is not None and EQUAL_TOTAL in names:
        left = ",".join(name for name in names if name != EQUAL_TOTAL)
        raise RecipeError(
            f"The recipe {recipe.name} has a teacher.ready, and what its training cost is unknown, so there is no "
            f"equal total compute. Leave teacher.ready out, or name the other rows: --rows {left}"
        )


def _refuse_different_inputs(rows: Sequence[Row], recipe: Recipe) -> None:
    """Where the outer network alone decides the input, the rows that do not start it would be given another.

    It does where it starts from weights and the student from none, and where the student starts from a ready one.
    """
    teacher, student = recipe.teacher, recipe.student
    if teacher is None or all(row.name == FULL for row in rows):
        return
    if teacher.ready is None:
        decides = teacher.init not in (None, PRETRAINED) and student.init is None
    else:
        decides = student.init == TEACHERS_WEIGHTS
    missing = [f"data.{key}" for key in ("mean", "std", "image_px", "channels") if getattr(recipe.data, key) is None]
    if decides and missing:
        *others, last = missing
        keys = f"{', '.join(others)} and {last}" if others else last
        raise RecipeError(
            f"In the recipe {recipe.name} the teacher's weights alone say what the input is, so that rows without "
            f"them would see other images and could not be compared. Write {keys} into the recipe."
        )
