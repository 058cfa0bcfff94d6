"""Do the guards for real unlabeled data help? Digits, spoiled in a known way, with and without each guard.

python -m kdedge_bench.guards ood --seeds 0 1 2 3 4 --out benchmarks/results/MACHINE/guards-ood.json
python -m kdedge_bench.guards longtail --seeds 0 1 2 3 4 --out benchmarks/results/MACHINE/guards-longtail.json

ood: 0 to 5 are the classes, four labels and 30 images each; the unlabeled pool also has 500 images of 6 to 9, which
are no class here.
longtail: labels and pool fall by a factor of 10 from the most frequent digit to the rarest (which digit is which is
drawn by the seed); the test is balanced.
"""

import argparse
import csv
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge import __version__, recipe_io
from kdedge.data import Source, open_source
from kdedge.pipeline import train
from kdedge.predictions import read_predictions
from kdedge.recipe import Recipe
from kdedge.runs import Run, read_json, write_json
from kdedge.trust.select import OUTLIER, load_trusted
from kdedge_bench.seeds import mean_and_interval
from kdedge_bench.verdict_table import paired
from kdedge_device.record import machine, now

__all__ = ["ARMS", "Arm", "main", "parser", "write_longtail", "write_ood"]

KNOWN = 6  # classes of the out-of-distribution set
LABELS_A_CLASS, POOL_A_CLASS = 4, 30  # the pool holds the labeled ones too; of each other digit it holds all, ~125
RATIO = 10  # of the most frequent class to the rarest
HEAD_LABELS, HEAD_POOL = 10, 120  # of the most frequent class; the pool holds the labeled ones too
TAIL = 3  # the rarest classes, whose accuracy is told beside that of all

_RECIPE = """
schema: 1
name: guards
views: {rotate_degrees: 15.0, shear: 0.2, translate_fraction: 0.125, cutout_fraction: 0.25, geometric_only: true}
teacher: {arch: wide-resnet-10-2, optim: {total_steps: 300, labeled_batch: 16}}
student: {arch: wide-resnet-10-1, optim: {total_steps: 250, labeled_batch: 16}}
baseline: {enabled: false}
engine: {plan: {memory_format: channels-last, threads: 1, precision: fp32}}
"""


@dataclass(frozen=True)
class Arm:
    """One way to train. `teacher_of` names the arm whose outer network is used, where it would be the same one."""

    name: str
    settings: tuple[str, ...] = ()
    clean: bool = False  # the pool without its images of no class
    teacher_of: str | None = None


_DISTANCE = ("outliers.score=distance",)
_ADJUSTED = ("teacher.method.logit_adjustment=1", "student.method.logit_adjustment=1")
_ALIGNED = ("teacher.method.thresholds.alignment=true", "student.method.thresholds.alignment=true")
_BALANCED = ("trust.quota=balanced",)

ARMS = {
    "ood": (
        Arm("no guard"),
        Arm("distance", _DISTANCE, teacher_of="no guard"),
        Arm("clean pool", clean=True),
        Arm("clean pool, distance", _DISTANCE, clean=True, teacher_of="clean pool"),
    ),
    "longtail": (
        Arm("no guard"),
        Arm("balanced quota", _BALANCED, teacher_of="no guard"),
        Arm("all three", _ADJUSTED + _ALIGNED + _BALANCED),
    ),
}
# (new, base)
COMPARISONS = {
    "ood": (("distance", "no guard"), ("clean pool, distance", "clean pool"), ("clean pool", "no guard")),
    "longtail": (("all three", "no guard"), ("balanced quota", "no guard")),
}


def _write(folder: Path, name: str, source: Source, rows: Sequence[tuple[int, str]]) -> Path:
    """`name`.csv of (image, part): the labels of train and test are written, those of unlabeled are not."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    images = source.images
    for index, _ in rows:
        path = folder / f"{index:04d}.png"
        if not path.is_file():
            Image.fromarray(images.rows(np.array([index]))[0, :, :, 0]).save(path)  # type: ignore[union-attr]
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for index, part in rows:
            writer.writerow([f"{index:04d}.png", "" if part == "unlabeled" else source.labels[index], part])
    return folder / f"{name}.csv"


def _drawn(source: Source, part: str, seed: int) -> list[npt.NDArray[np.int64]]:
    """The images of each class in `part`, in an order drawn by the seed."""
    generator = np.random.default_rng(seed)
    classes = range(len(source.classes))
    return [generator.permutation(np.flatnonzero((source.part == part) & (source.labels == k))) for k in classes]


def write_ood(folder: Path, source: Source, seed: int, clean: bool) -> Path:
    """The CSV of `ood`; `clean` leaves out the images of no class."""
    rows = []
    for k, images in enumerate(_drawn(source, "train", seed)):
        if k < KNOWN:
            rows += [(int(i), "train") for i in images[:LABELS_A_CLASS]]
            rows += [(int(i), "unlabeled") for i in images[LABELS_A_CLASS:POOL_A_CLASS]]
        elif not clean:
            rows += [(int(i), "unlabeled") for i in images]
    rows += [(int(i), "test") for images in _drawn(source, "test", seed)[:KNOWN] for i in images]
    return _write(folder, f"ood-{'clean-' if clean else ''}s{seed}", source, sorted(rows))


def tail_of(classes: int, seed: int) -> npt.NDArray[np.int64]:
    """Classes from the most frequent to the rarest."""
    return np.random.default_rng([seed, 1]).permutation(classes)


def write_longtail(folder: Path, source: Source, seed: int) -> Path:
    """The CSV of `longtail`."""
    classes = len(source.classes)
    drawn, rows = _drawn(source, "train", seed), []
    for rank, k in enumerate(tail_of(classes, seed)):
        share = RATIO ** (-rank / (classes - 1))
        labeled, pool = max(1, round(HEAD_LABELS * share)), max(1, round(HEAD_POOL * share))
        rows += [(int(i), "train") for i in drawn[k][:labeled]]
        rows += [(int(i), "unlabeled") for i in drawn[k][labeled:pool]]
    rows += [(int(i), "test") for images in _drawn(source, "test", seed) for i in images]
    return _write(folder, f"longtail-s{seed}", source, sorted(rows))


def _run(scenario: str, arm: Arm, seed: int, runs: Path, source: Source, settings: Sequence[str]) -> Run:
    """Train the arm, or go on with it, or find it finished."""
    images = runs / "images"
    spec = write_ood(images, source, seed, arm.clean) if scenario == "ood" else write_longtail(images, source, seed)
    given = [f"data.spec={spec}", f"seed={seed}", *arm.settings, *settings]
    if arm.teacher_of is not None:
        given.append(f"teacher.ready={_folder(runs, scenario, arm.teacher_of, seed) / 'teacher.safetensors'}")
    recipe = recipe_io.parse(_RECIPE, "the recipe of kdedge_bench.guards", Recipe, given)
    out = _folder(runs, scenario, arm.name, seed)
    return train(recipe, out, resume=(out / "manifest.json").is_file())[0]


def _folder(runs: Path, scenario: str, arm: str, seed: int) -> Path:
    return runs / f"{scenario}-{re.sub('[^a-z]+', '-', arm)}-s{seed}"


def _facts(scenario: str, run: Run, source: Source, seed: int) -> dict[str, Any]:
    """What is said of one run. True classes are known here, and were not in training."""
    result, trusted = read_json(run.result_path), load_trusted(run.trusted_path)
    names = read_json(run.splits_path)["splits"]
    truth = source.labels[[int(Path(identity).stem) for identity in names["unlabeled"]["ids"]]]
    labeled = np.isin(names["unlabeled"]["ids"], names["labeled"]["ids"])
    right = trusted.kept & (trusted.label == truth) & ~labeled
    kept = trusted.kept & ~labeled
    facts: dict[str, Any] = {
        "seed": seed,
        "student": result["student"]["test_accuracy"],
        "teacher": result["teacher"]["test_accuracy"],
        "trusted": int(kept.sum()),
        "trusted_precision": float(right.sum() / max(1, kept.sum())),
        "seconds": result["seconds"],
    }
    if scenario == "ood":
        foreign = truth >= KNOWN
        dropped = trusted.why == OUTLIER
        facts |= {
            "known_dropped": float(dropped[~foreign & ~labeled].mean()),
            "foreign_dropped": float(dropped[foreign].mean()) if foreign.any() else None,
            "foreign_trusted": int((trusted.kept & foreign).sum()),
        }
    else:
        said = read_predictions(run)
        tail = np.isin(said["test_label"], tail_of(len(source.classes), seed)[-TAIL:])
        hits = said["test_logits__student"].argmax(1) == said["test_label"]
        facts |= {"student_tail": float(hits[tail].mean())}
    return facts


def _summary(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = {name for name in facts[0] if name not in ("seed", "seconds") and facts[0][name] is not None}
    return {name: mean_and_interval([float(one[name]) for one in facts]) for name in facts[0] if name in numbers}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m kdedge_bench.guards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("scenario", choices=sorted(ARMS))
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    flags.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for all arms")
    flags.add_argument("--runs", type=Path, default=Path("runs/guards"), help="where the runs go; finished ones count")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every arm for every seed, and write the record."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    scenario, source, arms = options.scenario, open_source("digits"), ARMS[options.scenario]
    facts: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for seed in options.seeds:
        for arm in arms:
            run = _run(scenario, arm, seed, options.runs, source, options.settings)
            facts[arm.name].append(_facts(scenario, run, source, seed))
            print(f"seed {seed}, {arm.name}: {facts[arm.name][-1]}", file=sys.stderr, flush=True)
    metrics = ("student",) if scenario == "ood" else ("student", "student_tail")
    comparisons = [
        {"metric": metric, "new": new, "base": base}
        | paired([a[metric] - b[metric] for a, b in zip(facts[new], facts[base], strict=True)])
        for new, base in COMPARISONS[scenario]
        for metric in metrics
    ]
    write_json(
        options.out,
        {
            "schema": 1,
            "command": shlex.join(["python", "-m", "kdedge_bench.guards", *(Path(w).name for w in given)]),
            "date": now(),
            "machine": machine(),
            "kdedge": __version__,
            "scenario": scenario,
            "recipe": _RECIPE.strip().splitlines(),
            "comparisons": comparisons,
            "arms": {arm.name: _summary(facts[arm.name]) for arm in arms},
            "runs": facts,
        },
    )
    for found in comparisons:
        half = found["half_width_95"]
        spread = "" if half is None else f" ± {100 * half:.1f}"
        words = (
            f"{found['new']} against {found['base']}: {100 * found['mean']:+.1f}{spread} points of {found['metric']}"
        )
        print(f"{words}: {found['word']}")


if __name__ == "__main__":
    main()
