"""The report: one self-contained HTML page of one or several runs. No scripts, no fonts, nothing fetched."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdedge.errors import RunError
from kdedge.runs import Run, write_bytes
from kdedge_bench import charts, formats, pseudo
from kdedge_bench.appendix import commands, conditions, hashes, latencies, provenance, stages
from kdedge_bench.confusion import ClassRow, class_rows, confusion_matrix
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.int8_section import FILE_HEADINGS, Int8Section, int8_section
from kdedge_bench.pictures import Load, Strip, strip
from kdedge_bench.sentences import headline, trusted_sentences
from kdedge_bench.table import HEADINGS, Summary, artifact_label, cells, decision, footnotes, summarize

__all__ = ["report"]


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption, or, where there is none, the line that says why."""

    svg: str | None
    caption: str
    missing: str


@dataclass(frozen=True)
class Chapter:
    """Everything the template shows of one run."""

    key: str
    name: str
    headline: str
    summary: Summary
    rows: list[tuple[str, ...]]
    notes: list[str]
    decision: str
    tradeoff: Figure
    confusion: Figure
    class_rows: list[ClassRow]
    artifact: str
    strip: Strip
    int8: Int8Section | None
    int8_figures: list[Figure]
    training: list[Figure]
    alarms: list[str]
    pseudo: list[Figure]
    pseudo_rows: list[tuple[str, ...]]
    trusted: list[str]
    trusted_rows: list[tuple[str, str, str]]
    trusted_figure: Figure
    latencies: list[tuple[str, ...]]
    conditions: list[tuple[str, str]]
    stages: list[tuple[str, ...]]
    provenance: list[tuple[str, str]]
    hashes: list[tuple[str, str]]
    commands: list[str]
    recipe: str
    gaps: list[str] = field(default_factory=list)


def report(runs: Sequence[Run | Path], out: Path | None = None, *, load: Load | None = None) -> Path:
    """Write the page of `runs` and return its path: `out`, else report.html in the folder of the only run.

    What a run lacks is told in one line where it would stand. RunError where a folder is no run, a file in it is
    damaged, or the page cannot be written. `load` replaces how test images are opened.
    """
    folders = [run if isinstance(run, Run) else Run(run) for run in runs]
    if not folders:
        raise RunError("No run was named; a report needs at least one. Make one with: kdedge train-recipe mobilenet")
    target = out or (folders[0].report_path if len(folders) == 1 else Path("report.html"))
    chapters = [_chapter(read_facts(run), f"run{index}", load) for index, run in enumerate(folders, 1)]
    write_bytes(target, _render(chapters).encode("utf-8"))
    return target


def _render(chapters: Sequence[Chapter]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdedge_bench", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=formats.percent, confidence=formats.confidence, count=formats.count)
    one = len(chapters) == 1
    return environment.get_template("report.html.j2").render(
        title=f"kdedge report: {chapters[0].name}" if one else f"kdedge report: {len(chapters)} runs",
        chapters=chapters,
        headings=HEADINGS,
        max_named=charts.MAX_NAMED,
        file_headings=FILE_HEADINGS,
        overview=None if one else _overview(chapters),
        overview_rows=[] if one else [(chapter, cells(best)) for chapter in chapters if (best := chapter.summary.best)],
    )


def _overview(chapters: Sequence[Chapter]) -> Figure:
    return Figure(
        charts.tradeoff([chapter.summary for chapter in chapters], "overview"),
        "Test accuracy with its 95 % interval against the latency of one image. "
        "Squares are INT8, circles FP32; filled is what ships.",
        "No run has a latency yet: kdedge bench measures it.",
    )


def _chapter(facts: Facts, key: str, load: Load | None) -> Chapter:
    found = summarize(facts)
    artifact = _shown_artifact(facts, found)
    label = artifact_label(artifact)
    matrix = _matrix(facts, artifact)
    return Chapter(
        key=key,
        name=facts.name,
        headline=headline(facts, found),
        summary=found,
        rows=[cells(row) for row in found.rows],
        notes=footnotes(found),
        decision=_decision(found),
        tradeoff=_tradeoff(found, key),
        confusion=_confusion(facts, matrix, label, key),
        class_rows=class_rows(matrix, facts.classes) if matrix is not None else [],
        artifact=label,
        strip=strip(facts, artifact, load),
        int8=int8_section(facts, load),
        int8_figures=_int8_figures(facts, key),
        training=_training(facts, key),
        alarms=pseudo.alarms(facts),
        pseudo=_pseudo(facts, key),
        pseudo_rows=pseudo.stage_ends(facts),
        trusted=trusted_sentences(facts) + pseudo.guards(facts),
        trusted_rows=pseudo.filters(facts),
        trusted_figure=_trusted_figure(facts, key),
        latencies=latencies(facts),
        conditions=conditions(facts),
        stages=stages(facts),
        provenance=provenance(facts),
        hashes=hashes(facts),
        commands=commands(facts),
        recipe=facts.run.recipe_path.read_text(encoding="utf-8") if facts.run.recipe_path.is_file() else "",
        gaps=_gaps(facts, found),
    )


def _shown_artifact(facts: Facts, found: Summary) -> str:
    """What ships, else the last step on the way there that has predictions."""
    shipped = found.shipping.shipped if found.shipping else None
    for artifact in (shipped, "int8", "fp32", "student"):
        if artifact and facts.logits(artifact) is not None:
            return artifact
    return shipped or "student"


def _matrix(facts: Facts, artifact: str) -> Any:
    labels, logits = facts.test_labels, facts.logits(artifact)
    if labels is None or logits is None or len(labels) != len(logits):
        return None
    return confusion_matrix(labels, np.asarray(logits.argmax(1), dtype=np.int64), len(facts.classes))


def _gaps(facts: Facts, found: Summary) -> list[str]:
    """What the run lacks, each with the command that makes it."""
    gaps = []
    if facts.result is None:
        gaps.append("The run has no result.json: its training has not finished.")
    elif not facts.result.get("baseline"):
        gaps.append("No baseline on the labels alone was trained, so what the unlabeled images gained is not known.")
    if facts.bundle is None:
        gaps.append("The student is not exported yet: kdedge export --int8.")
    elif found.row("int8") is not None and "int8" not in facts.bundle.get("artifacts", {}):
        gaps.append("The bundle has no INT8 file: kdedge export --int8.")
    if facts.stale_records:
        gaps.append(
            f"{facts.stale_records} measurement(s) of files that were exported again since are left out: kdedge bench."
        )
    if (facts.splits or {}).get("test_is_val"):
        gaps.append("The data has no test split: the test images of this page are its validation images.")
    if facts.test_labels is None:
        gaps.append("No test image has a known class, so there is no test accuracy.")
    if facts.result and (facts.result.get("student") or {}).get("val_accuracy") is None:
        gaps.append(
            "There was no validation split: no held-out images chose anything, the last averaged weights were taken."
        )
    return gaps


def _decision(found: Summary) -> str:
    """What the gate measured and why it decided so; empty before an export."""
    shipping = found.shipping
    if shipping is None:
        return ""
    said = [f"verdict {shipping.verdict or 'undecided'}"]
    if shipping.speedup is not None:
        said.append(f"INT8 at {shipping.speedup:.2f} times the speed of FP32")
    if shipping.drop_points is not None:
        low_high = shipping.drop_interval
        sure = f" (95 % interval {_points(low_high[0])} to {_points(low_high[1])})" if low_high else ""
        said.append(f"a drop of {_points(shipping.drop_points)} points on the gate images{sure}")
    return f"Gate of the target {shipping.target}: {', '.join(said)}. {decision(found)}"


def _points(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _tradeoff(found: Summary, key: str) -> Figure:
    return Figure(
        charts.tradeoff([found], f"{key}-tradeoff"),
        "Test accuracy with its 95 % interval against the latency of one image. Filled is what ships. Lines across are "
        "networks that are not exported and so have no latency.",
        "No latency has been measured yet: kdedge bench measures it.",
    )


def _confusion(facts: Facts, matrix: Any, label: str, key: str) -> Figure:
    missing = "There is no confusion matrix: the run has no predictions on test images of known class."
    if matrix is None:
        return Figure(None, "", missing)
    names = "" if len(facts.classes) <= charts.MAX_NAMED else " Classes are numbered as in the table below."
    numbers = "Numbers are images; the" if len(facts.classes) <= charts.MAX_NUMBERED else "The"
    scale = "colour is the share of the true class, on a square-root scale so that rare mistakes show."
    caption = f"Confusion matrix of {label}. {numbers} {scale}{names}"
    return Figure(charts.confusion(matrix, facts.classes, f"{key}-confusion", label), caption, missing)


def _training(facts: Facts, key: str) -> list[Figure]:
    smooth = "Pale: as logged; strong: running mean."
    long = any(len(curve[3]) >= charts.SMOOTH_FROM for curve in charts.curves(facts, "loss"))
    figures = [
        Figure(
            charts.loss(facts, f"{key}-loss"),
            f"Training loss of each stage. {smooth if long else ''}".strip(),
            "No loss was logged.",
        ),
        Figure(
            charts.learning_rate(facts, f"{key}-lr"), "Learning rate of each stage.", "No learning rate was logged."
        ),
    ]
    validation = charts.validation_accuracy(facts, f"{key}-val")
    if validation is not None:  # without a validation split there is none, which the summary says
        figures.append(Figure(validation, "Accuracy on the validation split, which chooses the weights.", ""))
    return figures


def _int8_figures(facts: Facts, key: str) -> list[Figure]:
    return [
        Figure(
            charts.sensitivity(facts.quantization, f"{key}-sensitivity"),
            "The layers that lose most when they alone are INT8. Grey ones were left in float.",
            "The layers were not weighed one by one: all of them in INT8 kept the budget.",
        ),
        Figure(
            charts.fidelity(facts.proof, f"{key}-fidelity"),
            "Signal over noise beside FP32, tensor by tensor, on a few images. A step down is where digits are lost.",
            "The tensors of the INT8 files were not compared with FP32's.",
        ),
    ]


def _pseudo(facts: Facts, key: str) -> list[Figure]:
    return [
        Figure(
            charts.kept_share(facts, f"{key}-kept"),
            "Kept share: unlabeled images whose pseudo label is confident enough to learn from, by its weight.",
            "No kept share was logged: no stage learned from unlabeled images.",
        ),
        Figure(
            charts.pseudo_label_accuracy(facts, f"{key}-pseudo"),
            "Accuracy of the kept pseudo labels. The true classes of unlabeled images are used in reports only.",
            "The accuracy of the pseudo labels is not known: the true classes of the unlabeled images are not.",
        ),
        Figure(
            charts.pseudo_label_classes(facts, facts.classes, f"{key}-classes"),
            "Classes of the kept pseudo labels, at the end of each stage.",
            "The classes of the pseudo labels were not logged.",
        ),
        Figure(
            charts.precision_by_class(facts, facts.classes, f"{key}-precision"),
            "Right share of the kept pseudo labels of each class, at the end of each stage. A dash: none was kept, or "
            "none of known class.",
            "The right share by class was not logged, or the true classes are not known.",
        ),
    ]


def _trusted_figure(facts: Facts, key: str) -> Figure:
    return Figure(
        charts.trusted(facts, facts.classes, f"{key}-trusted"),
        "Trusted images of each class.",
        "The sizes of the trusted set by class are not known.",
    )
