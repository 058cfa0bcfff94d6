"""The tables of a SimCLR study: what the finished runs say, compared seed by seed, and three answers by rule.

Two rows of a seed had the same labels, the same classes and are asked about the same test images.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdedge import __version__
from kdedge.errors import RunError
from kdedge.runs import SCHEMA
from kdedge_bench.seeds import mean_and_interval
from kdedge_bench.study_match import Match, read_match
from kdedge_bench.study_plan import StudyPlan
from kdedge_bench.study_rows import (
    DISTILLATION,
    FINE_TUNING,
    FIRST_LAYER,
    LINEAR,
    OTHER,
    SAME,
    SCRATCH,
    SELF,
    TRANSFER,
    TUNED,
    StudyRow,
    study_jobs,
)  # fmt: skip
from kdedge_bench.study_rules import FEW_LABELS, H1, H2, QUESTIONS, RULES, judged
from kdedge_bench.verdict_table import paired
from kdedge_bench.work import result_of
from kdedge_bench.work_folder import WorkFolder
from kdedge_bench.work_job import run_name
from kdedge_device.record import machine, now

__all__ = ["StudyCell", "read_cells", "slope_per_doubling", "study_document"]

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class StudyCell:
    """One row for one seed."""

    seed: int
    run: str
    test_accuracy: float
    test_images: int
    training_flops: int  # of this run alone, not of the pre-training it starts from
    seconds: float
    knn_accuracy: float | None = None  # of a row that pre-trains


Cells = Mapping[str, Sequence[StudyCell]]


def read_cells(folder: WorkFolder, row: StudyRow, seeds: Iterable[int]) -> list[StudyCell]:
    """The row's finished runs."""
    found = []
    for seed in seeds:
        run = folder.run(run_name(row.name, seed))
        result = result_of(run)
        if result is None:
            continue
        accuracy = result["student"]["test_accuracy"]
        if accuracy is None:
            raise RunError(f"The run {run.path} has no test accuracy. Expected test images of known class.")
        knn = (result.get("pretrain") or {}).get("knn_accuracy")
        flops, seconds = result["training_flops"]["total"], round(result["seconds"], 2)
        found.append(StudyCell(seed, run.path.name, accuracy, result["test_images"], flops, seconds, knn))
    return found


def study_document(plan: StudyPlan, rows: Sequence[StudyRow], folder: WorkFolder, command: str) -> dict[str, Any]:
    """study.json: the plan, each row with its cells so far, the comparisons of each analysis, the answers."""
    cells = {row.name: read_cells(folder, row, plan.seeds) for row in rows}
    jobs = study_jobs(rows, plan.seeds)
    finished = sum(len(found) for found in cells.values())
    matches = {seed: match for seed in plan.seeds if (match := read_match(folder, seed)) is not None}
    analyses = {
        FINE_TUNING: _fine_tuning(rows, cells),
        DISTILLATION: _distillation(plan, rows, cells, matches),
        TRANSFER: _transfer(plan, rows, cells),
    }
    return {
        "schema": SCHEMA,
        "kind": "study-simclr",
        "status": "complete" if finished == len(jobs) else "partial",
        "runs_finished": finished,
        "runs_planned": len(jobs),
        "command": command,
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "plan": plan.config.name,
        "plan_sha256": plan.sha256,
        "asked": plan.config.model_dump(mode="json", by_alias=True),
        "settings": list(plan.settings),
        "sets": [
            {"name": each.name, "classes": len(each.classes), "fingerprint": each.fingerprint} for each in plan.sets
        ],
        "seeds": list(plan.seeds),
        "seconds": sum(cell.seconds for found in cells.values() for cell in found),
        "analyses": {name: found for name, found in analyses.items() if found is not None},
        "hypotheses": _hypotheses(analyses, matches),
        "rows": {row.name: _row_document(row, cells[row.name]) for row in rows},
    }


def _row_document(row: StudyRow, cells: Sequence[StudyCell]) -> dict[str, Any]:
    return {
        "analysis": row.analysis,
        "network": row.network.slug,
        "set": row.on.name,
        "labels": row.labels,
        **({"facts": row.facts} if row.facts else {}),
        "test_accuracy": mean_and_interval([cell.test_accuracy for cell in cells]) if cells else None,
        "seconds": sum(cell.seconds for cell in cells) / len(cells) if cells else None,
        "seeds": [{k: v for k, v in asdict(cell).items() if v is not None} for cell in cells],
    }


def _by_seed(cells: Cells, row: str | None) -> dict[int, float]:
    return {cell.seed: cell.test_accuracy for cell in cells[row]} if row else {}


def _less(first: BySeed, second: BySeed) -> dict[str, Any]:
    """first minus second over the seeds that both have."""
    shared = [seed for seed in first if seed in second]
    differences = [first[seed] - second[seed] for seed in shared]
    return {"seeds": shared, "differences": differences} | paired(differences)


def _named(rows: Sequence[StudyRow], analysis: str, **facts: Any) -> str | None:
    """The row with these facts; None where the plan has none."""
    for row in rows:
        if row.analysis == analysis and all(row.facts.get(key) == value for key, value in facts.items()):
            return row.name
    return None


def _fine_tuning(rows: Sequence[StudyRow], cells: Cells) -> list[dict[str, Any]] | None:
    """One entry a label count: the row of each way, and what each gains over scratch."""
    mine = [row for row in rows if row.analysis == FINE_TUNING]
    found = []
    for count in dict.fromkeys(row.facts["labels"] for row in mine):
        ways = {row.facts["way"]: row.name for row in mine if row.facts["labels"] == count}
        asked = next(row.facts["asked"] for row in mine if row.facts["labels"] == count)
        found.append({"labels": count, "asked": asked, "rows": ways, "gains": _gains(ways, cells)})
    return sorted(found, key=lambda each: each["labels"]) or None


def _gains(ways: Mapping[str, str], cells: Cells) -> dict[str, Any]:
    scratch = _by_seed(cells, ways[SCRATCH])
    return {way: _less(_by_seed(cells, name), scratch) for way, name in ways.items() if way != SCRATCH}


def _distillation(
    plan: StudyPlan, rows: Sequence[StudyRow], cells: Cells, matches: Mapping[int, Match]
) -> dict[str, Any] | None:
    """The students, the matched teachers, and the comparisons that were planned."""
    if plan.config.distillation is None:
        return None

    def student(teacher: str | None, labels: bool) -> str:
        name = _named(rows, DISTILLATION, teacher=teacher, labels=labels)
        assert name is not None
        return name

    students = {
        f"{who} {'with' if labels else 'without'} labels": student(who, labels)
        for who in (SAME, OTHER, SELF)
        for labels in (True, False)
    }
    alone = student(None, True)
    pairs = {
        "same minus other, with labels": (student(SAME, True), student(OTHER, True)),
        "same minus other, without labels": (student(SAME, False), student(OTHER, False)),
        "same minus self, with labels": (student(SAME, True), student(SELF, True)),
        "with minus without labels, same": (student(SAME, True), student(SAME, False)),
    }
    pairs |= {f"{said} minus labels only": (name, alone) for said, name in students.items()}
    return {
        "students": {"labels only": alone} | students,
        "teachers": _teachers(rows, cells, matches),
        "comparisons": {said: _less(_by_seed(cells, a), _by_seed(cells, b)) for said, (a, b) in pairs.items()},
        "matches": {str(seed): asdict(match) for seed, match in matches.items()},
        "margin_points": plan.config.distillation.margin_points,
    }


def _teachers(rows: Sequence[StudyRow], cells: Cells, matches: Mapping[int, Match]) -> dict[str, Any]:
    """Held-out and test accuracy of the teachers that were chosen, and by how much they differ."""
    found: dict[str, Any] = {}
    tests: dict[str, dict[int, float]] = {}
    for who in (SAME, OTHER):
        chosen = {seed: match.chosen(who) for seed, match in matches.items()}
        tests[who] = {
            seed: _by_seed(cells, name)[seed] for seed, name in chosen.items() if seed in _by_seed(cells, name)
        }
        held = [match.accuracies[match.chosen(who)] for match in matches.values()]
        found[who] = {
            "chosen": {str(seed): name for seed, name in chosen.items()},
            "held_out_accuracy": mean_and_interval(held) if held else None,
            "test_accuracy": mean_and_interval(list(tests[who].values())) if tests[who] else None,
        }
    own = _named(rows, DISTILLATION, teaches=SELF)
    mine = list(_by_seed(cells, own).values())
    found[SELF] = {"chosen": own, "held_out_accuracy": None, "test_accuracy": mean_and_interval(mine) if mine else None}
    found["held_out_difference"] = paired([match.difference for match in matches.values()])
    found["test_difference"] = _less(tests[SAME], tests[OTHER])
    return found


def _transfer(plan: StudyPlan, rows: Sequence[StudyRow], cells: Cells) -> dict[str, Any] | None:
    """Each target, the subsets of one, and for each seed how the gain changes when the classes double."""
    mine = [row for row in rows if row.analysis == TRANSFER]
    counted = plan.many_classes
    if not mine or counted is None:
        return None
    entries = []
    for target, classes in dict.fromkeys((row.facts["target"], row.facts["of"]) for row in mine):
        ways = {r.facts["way"]: r.name for r in mine if (r.facts["target"], r.facts["of"]) == (target, classes)}
        entries.append({"target": target, "classes": classes, "rows": ways, "gains": _gains(ways, cells)})
    subsets = sorted((each for each in entries if each["target"] == counted.name), key=lambda each: each["classes"])
    trends = {way: _trend(subsets, way) for way in (LINEAR, TUNED)}
    return {
        "from": plan.sets[0].name,
        "counted": counted.name,
        "targets": [each for each in entries if each["target"] != counted.name or each is subsets[-1]],
        "subsets": subsets,
        "trends": trends,
    }


def _trend(subsets: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any]:
    """The gain's slope of each seed that has every subset; negative where the gain falls."""
    gains = [(each["classes"], _differences(each["gains"][way])) for each in subsets]
    shared = [seed for seed in (gains[0][1] if gains else {}) if all(seed in found for _, found in gains)]
    slopes = [slope_per_doubling([(count, found[seed]) for count, found in gains]) for seed in shared]
    known = [(seed, slope) for seed, slope in zip(shared, slopes, strict=True) if slope is not None]
    return {"seeds": [s for s, _ in known], "slopes": [v for _, v in known]} | paired([v for _, v in known])


def _differences(found: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(found["seeds"], found["differences"], strict=True))


def slope_per_doubling(points: Sequence[tuple[int, float]]) -> float | None:
    """Least squares of the gain over log2 of the number of classes; None for fewer than two numbers of classes."""
    if len({count for count, _ in points}) < 2:
        return None
    places = [math.log2(count) for count, _ in points]
    middle, mean = sum(places) / len(places), sum(gain for _, gain in points) / len(points)
    spread = sum((place - middle) ** 2 for place in places)
    return sum((x - middle) * (gain - mean) for x, (_, gain) in zip(places, points, strict=True)) / spread


def _hypotheses(analyses: Mapping[str, Any], matches: Mapping[int, Match]) -> dict[str, Any]:
    """One answer for each analysis of the plan: question, rule, numbers, word."""
    found: dict[str, Any] = {}
    if analyses[FINE_TUNING]:
        fewest = analyses[FINE_TUNING][0]
        found[FEW_LABELS] = _answer(FEW_LABELS, _differences(fewest["gains"][FIRST_LAYER])) | {"at": fewest["labels"]}
    if analyses[DISTILLATION]:
        differences = _differences(analyses[DISTILLATION]["comparisons"]["same minus other, with labels"])
        within = {seed: value for seed, value in differences.items() if matches[seed].within}
        found[H1] = _answer(H1, within) | {"seeds_without_equal_teachers": len(differences) - len(within)}
    if analyses[TRANSFER]:
        trend = analyses[TRANSFER]["trends"][TUNED]
        counts = [each["classes"] for each in analyses[TRANSFER]["subsets"]]
        fallen = {seed: -slope for seed, slope in zip(trend["seeds"], trend["slopes"], strict=True)}
        found[H2] = _answer(H2, fallen) | {"classes": counts}
    return found


def _answer(hypothesis: str, differences: BySeed) -> dict[str, Any]:
    values = list(differences.values())
    numbers = {"seeds": list(differences), "differences": values} | judged(values)
    return {"question": QUESTIONS[hypothesis], "rule": RULES[hypothesis]} | numbers
