"""One run as the report shows it: sentences, tables and figures, of which the page, CSV, JSON and Markdown are made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from kdedge_bench import charts, formats, pseudo
from kdedge_bench.appendix import commands, conditions, hashes, provenance, stages
from kdedge_bench.confusion import class_rows, class_table, confusion_matrix
from kdedge_bench.facts import Facts
from kdedge_bench.int8_section import Int8Section, int8_section
from kdedge_bench.pareto import latency_fields, size_fields
from kdedge_bench.pareto_chart import LATENCY, SIZE, Plot, plot
from kdedge_bench.pictures import Load, Strip, strip
from kdedge_bench.report_classes import change
from kdedge_bench.report_latency import energy, latencies, spreads, throughput
from kdedge_bench.report_tables import Column, Table
from kdedge_bench.report_verdict import verdict
from kdedge_bench.sentences import headline, pretraining_sentence, trusted_sentences
from kdedge_bench.table import HEADINGS, Summary, artifact_label, decision, footnotes, summarize

__all__ = ["Chapter", "Figure", "chapter"]


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption, or, where there is none, the line that says why."""

    svg: str | None
    caption: str
    missing: str


@dataclass(frozen=True)
class Chapter:
    """Everything that is told of one run. `tables` are by key, those without rows among them."""

    key: str
    name: str
    facts: Facts
    summary: Summary
    headline: str
    tables: Mapping[str, Table]
    notes: list[str]
    decision: str
    verdict: str
    plots: list[Plot]
    confusion: Figure
    artifact: str
    strip: Strip
    int8: Int8Section | None
    int8_figures: list[Figure]
    spreads: list[Figure]
    pretraining: str
    training: list[Figure]
    alarms: list[str]
    pseudo: list[Figure]
    trusted: list[str]
    trusted_figure: Figure
    conditions: list[tuple[str, str]]
    provenance: list[tuple[str, str]]
    hashes: list[tuple[str, str]]
    commands: list[str]
    recipe: str
    gaps: list[str] = field(default_factory=list)


def chapter(facts: Facts, name: str, key: str, load: Load) -> Chapter:
    """`name` is what the run is called among the others, `key` its id in the page; `load` opens test images."""
    found = replace(summarize(facts), run=name)
    artifact = _shown_artifact(facts, found)
    label = artifact_label(artifact)
    matrix = _matrix(facts, artifact)
    int8 = int8_section(facts, load)
    tables = _tables(facts, found, matrix, label, int8)
    return Chapter(
        key=key,
        name=name,
        facts=facts,
        summary=found,
        headline=headline(facts, found),
        tables=tables,
        notes=footnotes(found),
        decision=_decision(found),
        verdict=_verdict(found),
        plots=_plots(facts, found),
        confusion=_confusion(facts, matrix, label, key),
        artifact=label,
        strip=strip(facts, artifact, load),
        int8=int8,
        int8_figures=_int8_figures(facts, tables, key),
        spreads=_spreads(tables["latencies"]),
        pretraining=pretraining_sentence(facts),
        training=_training(facts, key),
        alarms=pseudo.alarms(facts),
        pseudo=_pseudo(facts, key),
        trusted=trusted_sentences(facts) + pseudo.guards(facts),
        trusted_figure=_trusted_figure(facts, key),
        conditions=conditions(facts),
        provenance=provenance(facts),
        hashes=hashes(facts),
        commands=commands(facts),
        recipe=facts.run.recipe_path.read_text(encoding="utf-8") if facts.run.recipe_path.is_file() else "",
        gaps=_gaps(facts, found),
    )


def _tables(facts: Facts, found: Summary, matrix: Any, label: str, int8: Int8Section | None) -> dict[str, Table]:
    rows = class_rows(matrix, facts.classes) if matrix is not None else []
    classes = class_table(rows, f"Class by class, {label}", len(rows) > charts.MAX_NAMED)
    every = [_networks(found), verdict(facts), classes]
    if int8:
        every += [int8.files, int8.change, int8.layers, int8.lost_images, int8.moved, int8.ways, int8.cures]
    every += [latencies(facts), throughput(facts), energy(facts)]
    every += [pseudo.stage_ends(facts), pseudo.filters(facts), stages(facts)]
    return {table.key: table for table in every}


def _networks(found: Summary) -> Table:
    columns = (
        Column("Network", ("name",), text=True),
        Column(HEADINGS[1], ("accuracy",), formats.percent),
        Column(HEADINGS[2], ("low", "high"), formats.interval),
        Column(HEADINGS[3], ("params",), formats.count),
        Column(HEADINGS[4], ("bytes",), formats.size),
        Column(HEADINGS[5], ("p50_ms",), formats.milliseconds),
        Column(HEADINGS[6], ("p90_ms",), formats.milliseconds),
        Column("Ships", ("shipped",), lambda shipped: "ships" if shipped else "", text=True),
    )
    return Table("networks", "Networks", columns, tuple(asdict(row) for row in found.rows))


def _plots(facts: Facts, found: Summary) -> list[Plot]:
    """Accuracy against latency, once for each machine and its conditions, and against size."""
    across = [row for row in found.rows if row.key in ("baseline", "teacher")]
    both = [(LATENCY, field) for field in latency_fields([(facts, found)])]
    plots = [plot(field, cost, across) for cost, field in both]
    return plots + [plot(field, SIZE) for field in size_fields([(facts, found)])]


def _spreads(table: Table) -> list[Figure]:
    caption = (
        "How the times are spread on {machine}. Tall lines: p50, p90 and p99, from left to right; band: where most of "
        "the queries lie; thin line: from the shortest to the longest; dots: p90 of each round."
    )
    return [Figure(svg, caption.format(machine=machine), "") for machine, svg in spreads(table)]


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


def _verdict(found: Summary) -> str:
    """The gate's word, for those who read one line only."""
    shipping = found.shipping
    if shipping is None or not shipping.shipped:
        return "Undecided."
    ships = f"{shipping.shipped.upper()} ships"
    if shipping.verdict == "pass" and shipping.shipped == "int8":
        return "INT8 passes and ships."
    said = {"pass": "INT8 passes", "fail": "INT8 fails", "cannot tell": "Cannot tell"}
    return f"{said.get(str(shipping.verdict), 'Undecided')}; {ships}."


def _points(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


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
    neighbours = charts.neighbours_accuracy(facts, f"{key}-knn")
    if neighbours is not None:  # of pretraining only
        figures.append(
            Figure(neighbours, "Accuracy of a vote of the nearest neighbours' labels on the features: it watches.", "")
        )
    validation = charts.validation_accuracy(facts, f"{key}-val")
    if validation is not None:  # without a validation split there is none, which the summary says
        figures.append(Figure(validation, "Accuracy on the validation split, which chooses the weights.", ""))
    return figures


def _int8_figures(facts: Facts, tables: Mapping[str, Table], key: str) -> list[Figure]:
    svg, caption = (change(tables["int8_classes"]) if "int8_classes" in tables else None) or (None, "")
    scored = bool(tables.get("int8_classes"))
    return [
        Figure(
            svg,
            caption,
            "INT8 changes no answer from right to wrong or back."
            if scored
            else "Without predictions of FP32 and INT8 on test images of known class nothing is known class by class.",
        ),
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
