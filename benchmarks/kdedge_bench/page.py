"""The report: one self-contained HTML page of one or several runs. No scripts, no fonts, nothing fetched."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdedge.errors import RunError
from kdedge.runs import Run, write_bytes
from kdedge_bench import charts, formats
from kdedge_bench.confusion import ClassRow, class_rows, confusion_matrix
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.pictures import Load, Strip, strip
from kdedge_bench.records import flags, latency, machine_name
from kdedge_bench.sentences import headline, trusted_sentences
from kdedge_bench.table import HEADINGS, Summary, artifact_label, cells, footnotes, summarize

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
    tradeoff: Figure
    confusion: Figure
    class_rows: list[ClassRow]
    artifact: str
    strip: Strip
    training: list[Figure]
    trusted: list[str]
    trusted_figure: Figure
    latencies: list[tuple[str, ...]]
    conditions: list[tuple[str, str]]
    provenance: list[tuple[str, str]]
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
    environment.filters.update(percent=formats.percent, count=formats.count)
    one = len(chapters) == 1
    return environment.get_template("report.html.j2").render(
        title=f"kdedge report: {chapters[0].name}" if one else f"kdedge report: {len(chapters)} runs",
        chapters=chapters,
        headings=HEADINGS,
        overview=None if one else _overview(chapters),
        overview_rows=[] if one else [(chapter, cells(best)) for chapter in chapters if (best := chapter.summary.best)],
    )


def _overview(chapters: Sequence[Chapter]) -> Figure:
    return Figure(
        charts.tradeoff([chapter.summary for chapter in chapters], "overview"),
        "Test accuracy with its 95 % interval against the latency of one image. Squares are INT8, circles FP32; filled is what ships.",
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
        tradeoff=_tradeoff(found, key),
        confusion=_confusion(facts, matrix, label, key),
        class_rows=class_rows(matrix, facts.classes) if matrix is not None else [],
        artifact=label,
        strip=strip(facts, artifact, load),
        training=_training(facts, key),
        trusted=trusted_sentences(facts),
        trusted_figure=_trusted_figure(facts, key),
        latencies=_latencies(facts),
        conditions=_conditions(facts),
        provenance=_provenance(facts),
        commands=_commands(facts),
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
        gaps.append(f"{facts.stale_records} measurement(s) of files that were exported again since are left out: kdedge bench.")
    if facts.test_labels is None:
        gaps.append("No test image has a known class, so there is no test accuracy.")
    if facts.result and (facts.result.get("student") or {}).get("val_accuracy") is None:
        gaps.append("There was no validation split: nothing was chosen on held-out images, the last averaged weights were taken.")
    return gaps


def _tradeoff(found: Summary, key: str) -> Figure:
    return Figure(
        charts.tradeoff([found], f"{key}-tradeoff"),
        "Test accuracy with its 95 % interval against the latency of one image. Filled is what ships; dashed lines are "
        "networks that are not exported, so they have no latency.",
        "No latency has been measured yet: kdedge bench measures it.",
    )


def _confusion(facts: Facts, matrix: Any, label: str, key: str) -> Figure:
    missing = "There is no confusion matrix: the run has no predictions on test images of known class."
    if matrix is None:
        return Figure(None, "", missing)
    names = "" if len(facts.classes) <= charts.MAX_NAMED else " Classes are numbered as in the table below."
    numbers = "Numbers are images; the" if len(facts.classes) <= charts.MAX_NUMBERED else "The"
    caption = f"Confusion matrix of {label}. {numbers} colour is the share of the true class, from 0 to 100 %.{names}"
    return Figure(charts.confusion(matrix, facts.classes, f"{key}-confusion", label), caption, missing)


def _training(facts: Facts, key: str) -> list[Figure]:
    smooth = "Pale: as logged; strong: running mean."
    long = any(len(curve[3]) >= charts.SMOOTH_FROM for curve in charts.curves(facts, "loss"))
    figures = [
        Figure(charts.loss(facts, f"{key}-loss"), f"Training loss of each stage. {smooth if long else ''}".strip(), "No loss was logged."),
        Figure(charts.learning_rate(facts, f"{key}-lr"), "Learning rate of each stage.", "No learning rate was logged."),
        Figure(
            charts.kept_share(facts, f"{key}-kept"),
            "Kept share: unlabeled images whose pseudo label passes the confidence threshold.",
            "No kept share was logged: no stage learned from unlabeled images.",
        ),
        Figure(
            charts.pseudo_label_accuracy(facts, f"{key}-pseudo"),
            "Accuracy of the kept pseudo labels. The true classes of the unlabeled images are used for this curve only.",
            "The accuracy of the pseudo labels is not known: the true classes of the unlabeled images are not.",
        ),
        Figure(
            charts.validation_accuracy(facts, f"{key}-val"),
            "Accuracy on the validation split, which chooses the weights.",
            "No accuracy was evaluated during training: there is no validation split.",
        ),
    ]
    return figures


def _trusted_figure(facts: Facts, key: str) -> Figure:
    return Figure(
        charts.trusted(facts, facts.classes, f"{key}-trusted"),
        "Trusted images of each class: those the student learns from as if they were labelled.",
        "The sizes of the trusted set by class are not known.",
    )


def _latencies(facts: Facts) -> list[tuple[str, ...]]:
    """Rows of the table of latencies: every part of every measurement."""
    parts = {"compute": "compute", "with_copies": "with copies", "end_to_end": "end to end"}
    rows = []
    for record in sorted(facts.records, key=lambda record: (machine_name(record), str(record["artifact"].get("precision")))):
        for part, name in parts.items():
            times = latency(record, part)
            if times:
                numbers = [formats.milliseconds(times.get(key)) for key in ("p50", "p90", "p99", "min", "max", "mean", "std")]
                rows.append((artifact_label(str(record["artifact"].get("precision"))), name, *numbers, formats.count(times.get("count"))))
    return rows


def _conditions(facts: Facts) -> list[tuple[str, str]]:
    """How the newest measurement was made; the others of the same batch differ in temperature and load only."""
    if not facts.records:
        return []
    record = facts.records[0]
    artifact = record["artifact"]
    rows = [("Machine", machine_name(record))]
    machine = record.get("machine")
    if isinstance(machine, dict):
        rows += [(_words(key), _text(value)) for key, value in machine.items() if value not in (None, "", []) and key != "model"]
    rows.append(("Runtime", f"{artifact.get('runtime') or ''} {artifact.get('version') or ''}".strip() or formats.DASH))
    conditions = record.get("conditions") or {}
    rows += [(_words(key), _text(value)) for key, value in conditions.items() if value not in (None, "", [])]
    rows.append(("Repeats", _text(record.get("repeats"))))
    rows.append(("Flags", ", ".join(flags(record)) or "none"))
    rows.append(("Measured at", _text(record.get("started_at"))))
    absent = [_words(key).lower() for key, value in conditions.items() if value is None]
    if absent:
        rows.append(("Not measured", ", ".join(absent)))
    return rows


def _words(key: str) -> str:
    units = {"c": "°C", "ms": "ms", "mhz": "MHz", "mib": "MiB", "mw": "mW", "w": "W", "s": "s", "bytes": "bytes"}
    acronyms = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "jetpack": "JetPack", "os": "OS", "sha256": "SHA-256", "id": "id"}
    *head, last = key.split("_")
    if head and last in units:
        return f"{_words('_'.join(head))}, {units[last]}"
    text = " ".join(acronyms.get(word, word) for word in (*head, last))
    return text[:1].upper() + text[1:]


def _text(value: Any) -> str:
    if value is None:
        return formats.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(key)).lower()} {_text(item)}" for key, item in value.items() if item is not None)
    return str(value)


def _provenance(facts: Facts) -> list[tuple[str, str]]:
    """Where the run comes from, as its manifest and result say."""
    result = facts.result or {}
    rows = [(_words(key), _text(result.get(key))) for key in ("recipe", "data", "labels", "seed") if key in result]
    if "seconds" in result:
        rows.append(("Training took", formats.span(result["seconds"])))
    skip = ("schema", "status", "stage", "command", "argv")
    rows += [(_words(key), _text(value)) for key, value in facts.manifest.items() if key not in skip and value not in (None, "", {}, [])]
    for name, entry in ((facts.bundle or {}).get("artifacts") or {}).items():
        rows.append((f"SHA-256 of {entry.get('file') or name}", _text(entry.get("sha256"))))
    return rows


def _commands(facts: Facts) -> list[str]:
    """The lines that make this run again."""
    result, command = facts.result, facts.manifest.get("command")
    if isinstance(command, str) and command:
        train = command
    elif result is None:
        return []
    else:
        words = ["kdedge", "train-recipe", str(result.get("recipe")), "--data", str(result.get("data"))]
        if result.get("labels") is not None:
            words += ["--labels", str(result["labels"])]
        train = shlex.join([*words, "--seed", str(result.get("seed", 0))])
    effort = ((facts.records[0].get("conditions") or {}).get("effort") if facts.records else None) or "quick"
    export = "kdedge export" + (" --int8" if "int8" in ((facts.bundle or {}).get("artifacts") or {"int8": 1}) else "")
    return [train, export, f"kdedge bench --effort {effort}", "kdedge report"]
