"""A SimCLR study as text: study.md, and the tables and sentences that its page shows too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdedge_bench.formats import span
from kdedge_bench.study_rows import (
    DISTILLATION,
    FINE_TUNING,
    FIRST_LAYER,
    LINEAR,
    OTHER,
    PRETRAINING,
    SAME,
    SCRATCH,
    SELF,
    TRANSFER,
    TUNED,
)
from kdedge_bench.study_rules import FEW_LABELS, H1, H2
from kdedge_bench.table_text import DASH, accuracy, difference, line

__all__ = ["ANSWERS_HEAD", "WAY_TITLES", "Table", "answer_rows", "answers", "markdown", "tables", "title"]

WAY_TITLES = {
    LINEAR: "linear evaluation",
    TUNED: "fine-tuned",
    FIRST_LAYER: "from the first head layer",
    SCRATCH: "from scratch",
}
TEACHERS = {SAME: "same family", OTHER: "another family", SELF: "itself (self-distillation)"}
ANSWERS_HEAD = "| study | question | answer | points, mean ± 95 % | seeds |"


@dataclass(frozen=True)
class Table:
    """One table; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        return [line(self.head), line(["---"] * len(self.head)), *map(line, self.rows)]


def title(document: Mapping[str, Any]) -> str:
    sets = document["sets"]
    targets = f", then {_listed([each['name'] for each in sets[1:]])}" if sets[1:] else ""
    return f"SimCLR study {document['plan']}: {sets[0]['name']}{targets}"


def markdown(document: Mapping[str, Any]) -> str:
    """study.md: the answers, the tables, and how they were made."""
    parts = [f"# {title(document)}", "", f"State: {state(document)}.", "", *(f"- {said}" for said in answers(document))]
    for table in tables(document):
        parts += ["", f"## {table.title}", "", *table.lines(), *(f"\n{note}" for note in table.notes)]
    parts += ["", "## The rules, as planned", ""]
    parts += [f"- {name}: {found['rule']}" for name, found in document["hypotheses"].items()]
    parts += ["", made(document), "", f"Command: `{document['command']}`", ""]
    return "\n".join(parts)


def state(document: Mapping[str, Any]) -> str:
    if document["status"] == "complete":
        return "complete"
    return f"partial: {document['runs_finished']} of {document['runs_planned']} runs are finished"


def made(document: Mapping[str, Any]) -> str:
    return (
        f"kdedge {document['kdedge']}, {document['date']}, {document['machine']['name']}; {span(document['seconds'])} "
        "of training in all, on a machine that may have been doing other things. Test images are looked at once a run, "
        "at its end, and choose nothing. The comparisons are not corrected for their number."
    )


def answers(document: Mapping[str, Any]) -> list[str]:
    """One sentence a hypothesis."""
    return [_answer(name, found) for name, found in document["hypotheses"].items()]


def _answer(name: str, found: Mapping[str, Any]) -> str:
    said = {
        FEW_LABELS: f"{found.get('at')} labels",
        H1: "taught by the same family minus by another, with labels",
        H2: f"lost with each doubling of the classes, {_listed(found.get('classes', []))}",
    }[name]
    left = found.get("seeds_without_equal_teachers")
    excuse = f"; {left} left out, whose teachers were not equally accurate" if left else ""
    code = "" if name == FEW_LABELS else f" ({name})"
    points = f"{difference(found)} points" if found["seeds"] else "no seed that can be read"
    return f"{found['question']}{code}: **{found['word']}**, {points} ({said}; {_seeds(len(found['seeds']))}{excuse})."


def _listed(words: Sequence[object]) -> str:
    """`2, 5 and 10`."""
    return " and ".join(filter(None, (", ".join(map(str, words[:-1])), *map(str, words[-1:]))))


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def answer_rows(record: Mapping[str, Any]) -> list[str]:
    """The answers of a committed record under ANSWERS_HEAD; a test holds the README to them."""
    return [
        line([record["title"], found["question"], found["word"], difference(found), str(len(found["seeds"]))])
        for found in record["hypotheses"].values()
    ]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Pre-training first, then the tables of each analysis that the plan has."""
    analyses, found = document["analyses"], [_pretraining(document)]
    if FINE_TUNING in analyses:
        found.append(_fine_tuning(document))
    if DISTILLATION in analyses:
        found += [_teachers(document), _students(document)]
    if TRANSFER in analyses:
        found += _transfer(document)
    return found


def _pretraining(document: Mapping[str, Any]) -> Table:
    """Each network's: what its nearest neighbours say, which needs no training."""
    rows = []
    for row in document["rows"].values():
        if row["analysis"] == PRETRAINING:
            knn = [cell["knn_accuracy"] for cell in row["seeds"] if "knn_accuracy" in cell]
            mean = f"{100 * sum(knn) / len(knn):.1f}" if knn else DASH
            seconds = DASH if row["seconds"] is None else span(row["seconds"])
            rows.append((row["network"], row["set"], mean, seconds, str(len(row["seeds"]))))
    head = ("network", "set", "nearest neighbours right, %", "time", "seeds")
    return Table("Pre-training", head, tuple(rows))


def _cell(document: Mapping[str, Any], name: str | None) -> str:
    return accuracy(document["rows"][name]["test_accuracy"]) if name else DASH


def _gain(found: Mapping[str, Any]) -> str:
    return f"{difference(found)}, {found['word']}" if found["differences"] else DASH


def _fine_tuning(document: Mapping[str, Any]) -> Table:
    entries = document["analyses"][FINE_TUNING]
    rows = []
    for entry in entries:
        named = f"{entry['labels']:,}" + (f" ({entry['asked']})" if "%" in entry["asked"] else "")
        ways = [_cell(document, entry["rows"].get(way)) for way in WAY_TITLES]
        rows.append((named, *ways, _gain(entry["gains"][TUNED]), _gain(entry["gains"][FIRST_LAYER])))
    head = ("labels", *WAY_TITLES.values(), "fine-tuned minus scratch", "first layer minus scratch")
    return Table("Analysis 1: fine-tuning", head, tuple(rows), (_LEGEND,))


_LEGEND = (
    "Test accuracy in percent, gains in points: mean ± 95 % over seeds (Student's t; gains paired by seed). helps, "
    "hurts: the interval is clear of zero."
)


def _teachers(document: Mapping[str, Any]) -> Table:
    analysis = document["analyses"][DISTILLATION]
    teachers, rows = analysis["teachers"], []
    for who in (SAME, OTHER, SELF):
        found = teachers[who]
        chosen = found["chosen"]
        steps = sorted({name.rpartition("-")[2] for name in chosen.values()}, key=int) if who != SELF and chosen else []
        network = next(r["network"] for r in document["rows"].values() if r.get("facts", {}).get("teaches") == who)
        held, test = accuracy(found["held_out_accuracy"]), accuracy(found["test_accuracy"])
        rows.append((TEACHERS[who], network, " or ".join(steps) or DASH, held, test))
    note = (
        f"Same minus another on held-out training images: {difference(teachers['held_out_difference'])} points; on "
        f"test images: {difference(teachers['test_difference'])}. Of the pairs of lengths that differ by at most "
        f"{analysis['margin_points']:g} points on the held-out images, the most accurate one taught."
    )
    head = ("teacher", "network", "steps of fine-tuning", "held-out images right, %", "test images right, %")
    return Table("Analysis 2: the teachers", head, tuple(rows), (note,))


def _students(document: Mapping[str, Any]) -> Table:
    analysis = document["analyses"][DISTILLATION]
    comparisons, rows = analysis["comparisons"], []
    for said, name in analysis["students"].items():
        who, _, how = said.partition(" ")
        named = f"{TEACHERS[who]}, {how}" if who in TEACHERS else said
        over = comparisons.get(f"{said} minus labels only")
        rows.append((named, _cell(document, name), _gain(over) if over else DASH))
    others = [said for said in comparisons if not said.endswith("minus labels only")]
    notes = tuple(f"{said[0].upper()}{said[1:]}: {_gain(comparisons[said])}." for said in others)
    head = ("taught by", "test accuracy, %", "minus labels only")
    return Table("Analysis 2: the students", head, tuple(rows), notes)


def _transfer(document: Mapping[str, Any]) -> list[Table]:
    analysis = document["analyses"][TRANSFER]
    ways = (LINEAR, TUNED, SCRATCH)
    head = ("classes", *(WAY_TITLES[way] for way in ways), "linear minus scratch", "fine-tuned minus scratch")

    def row(entry: Mapping[str, Any], named: str) -> tuple[str, ...]:
        cells = [_cell(document, entry["rows"].get(way)) for way in ways]
        return (named, *cells, _gain(entry["gains"][LINEAR]), _gain(entry["gains"][TUNED]))

    targets = [row(entry, f"{entry['target']} ({entry['classes']})") for entry in analysis["targets"]]
    subsets = [row(entry, str(entry["classes"])) for entry in analysis["subsets"]]
    trends = tuple(
        f"The gain of {WAY_TITLES[way]} over scratch changes by {difference(found)} points with each doubling of the "
        f"classes ({_seeds(len(found['seeds']))})."
        for way, found in analysis["trends"].items()
    )
    unseen = f"Whether test images of these are among the images of {analysis['from']} was not looked for."
    return [
        Table(
            f"Analysis 3: from {analysis['from']} to other sets",
            ("target (classes)", *head[1:]),
            tuple(targets),
            (unseen,) if targets else (),
        ),
        Table(f"Analysis 3: to some classes of {analysis['counted']}", head, tuple(subsets), trends),
    ]
