"""Two teachers of equal accuracy: found among those fine-tuned for different lengths, on images held out of that.

The images are of the training pool, of known class, and in no labelled split. Test images have no say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdedge.data import Source, Splits, open_source
from kdedge.data.source import Indices
from kdedge.data.views import columns
from kdedge.errors import DataError
from kdedge.models.weights import load_model
from kdedge.recipe import DataConfig
from kdedge.runs import Run, read_json, write_json
from kdedge.train.engine import EnginePlan, as_planned
from kdedge.train.evaluate import accuracy, predict
from kdedge_bench.study_rows import OTHER, SAME
from kdedge_bench.work_folder import WorkFolder

__all__ = ["Match", "closest", "held_out", "match_teachers", "read_match"]


@dataclass(frozen=True)
class Match:
    """The two teachers of a seed, rows by name, and how accurate every candidate is on the held-out images."""

    same: str
    other: str
    difference: float  # same minus other, a fraction
    within: bool  # the plan's margin
    images: int
    accuracies: dict[str, float]

    def chosen(self, who: str) -> str:
        return self.same if who == SAME else self.other


def closest(same: Mapping[str, float], other: Mapping[str, float], margin: float) -> tuple[str, str]:
    """The most accurate pair that differs by at most `margin`, by the weaker of the two; else the closest pair."""
    pairs = [(a, b) for a in same for b in other]

    def apart(pair: tuple[str, str]) -> float:
        return abs(same[pair[0]] - other[pair[1]])

    near = [pair for pair in pairs if apart(pair) <= margin + 1e-12]
    if near:
        return max(near, key=lambda pair: (min(same[pair[0]], other[pair[1]]), -apart(pair)))
    return min(pairs, key=apart)


def match_teachers(
    folder: WorkFolder, seed: int, teachers: Mapping[str, Sequence[tuple[str, Run]]], data: DataConfig, plan: Any
) -> Match:
    """The match of a seed, made once and kept beside the runs. `teachers`: same and other -> rows and their runs.

    DataError where no image of the pool beyond the labelled ones has a known class.
    """
    known = read_match(folder, seed)
    if known is not None:
        return known
    root = Path(data.root) if data.root else None
    source = open_source(data.spec, root=root, max_unreadable_fraction=data.max_unreadable_fraction).decodable()
    splits = Splits.from_json(read_json(teachers[SAME][0][1].splits_path), source)
    indices = held_out(splits, plan.held_out_images, seed)
    found = {
        who: {name: _accuracy(run, source, indices) for name, run in candidates} for who, candidates in teachers.items()
    }
    margin = plan.margin_points / 100
    same, other = closest(found[SAME], found[OTHER], margin)
    difference = found[SAME][same] - found[OTHER][other]
    within = abs(difference) <= margin + 1e-12
    match = Match(same, other, difference, within, len(indices), found[SAME] | found[OTHER])
    write_json(_path(folder, seed), asdict(match))
    return match


def read_match(folder: WorkFolder, seed: int) -> Match | None:
    """The match of a seed; None before it is made."""
    path = _path(folder, seed)
    return Match(**read_json(path)) if path.is_file() else None


def _path(folder: WorkFolder, seed: int) -> Path:
    return folder.path / f"teachers-s{seed}.json"


def held_out(splits: Splits, most: int, seed: int) -> Indices:
    """At most `most` images of the pool that are in no labelled split and have a known class; drawn by the seed."""
    pool = np.setdiff1d(splits.unlabeled, np.concatenate([splits.labeled, splits.val]))
    pool = pool[splits.truth[pool] >= 0]
    if not len(pool):
        raise DataError(
            "No training image beyond the labelled ones has a known class, so no two teachers can be found equally "
            "accurate. Name a set of class folders, or leave `distillation` out of the plan."
        )
    return np.sort(np.random.default_rng(seed).permutation(pool)[:most])


def _accuracy(run: Run, source: Source, indices: Indices) -> float:
    """Of the run's student."""
    loaded = load_model(run.student_path)
    plan = EnginePlan.model_validate(run.read_manifest()["engine_plan"]["inner"]["plan"])
    device = torch.device("cpu")
    network = as_planned(loaded.module.to(device), plan)
    mean, std = columns(loaded.preprocess, device)
    logits = predict(network, source.load(indices, loaded.preprocess), mean, std, plan)
    found = accuracy(logits, torch.from_numpy(source.labels[indices]))
    assert found is not None  # `held_out` gives images of known class, and some
    return found
