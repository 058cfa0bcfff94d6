"""A verdict as text: verdict.md, and the rows that the READMEs quote."""

from typing import Any

from kdedge_bench.formats import span
from kdedge_bench.table_text import DASH, accuracy, difference, line
from kdedge_bench.verdict_rows import EQUAL_TOTAL, FULL

__all__ = ["ROWS_HEAD", "SUMMARY_HEAD", "markdown", "markdown_rows", "summary_row"]

TITLES = {
    "supervised": "supervised (labels only)",
    "fixmatch": "FixMatch alone, equal student steps",
    EQUAL_TOTAL: "FixMatch alone, equal total compute",
    "kd-only": "KD only",
    FULL: "KD-FixMatch",
    "no-clustering": "KD-FixMatch without clustering",
    "no-confidence": "KD-FixMatch without confidence",
    "no-sce": "KD-FixMatch without SCE",
    "no-soft-kd": "KD-FixMatch without soft KD",
    "no-simclr": "KD-FixMatch without the SimCLR start",
    "teacher": "its teacher, for information",
}
ORDER = tuple(TITLES)

SUMMARY_HEAD = (
    "| data | labels only | FixMatch, equal steps | FixMatch, equal total | KD only | KD-FixMatch "
    "| gain at equal total compute |"
)
ROWS_HEAD = (
    "| data | row | test accuracy | KD-FixMatch minus row | verdict | student steps | training FLOPs | wall time |"
)


def markdown(document: dict[str, Any]) -> str:
    """verdict.md: the table, what it says in a sentence, and how it was made."""
    planned = len(document["seeds"])
    head = ("row", "test accuracy, %", "KD-FixMatch minus row, points", "verdict", "student steps", "training FLOPs",
            "wall time", "seeds")  # fmt: skip
    lines = [line(head), line(["---"] * len(head))]
    for name in _present(document):
        row = document["rows"].get(name, {"seeds": document["comparisons"].get(name, {}).get("seeds", [])})
        lines.append(line([TITLES[name], *_cells(document, name), f"{len(row['seeds'])} of {planned}"]))
    labels = "all" if document["labels"] is None else document["labels"]
    state = document["status"]
    if state == "partial":
        state = f"partial: {document['runs_finished']} of {document['runs_planned']} runs are finished"
    return "\n".join(
        [
            f"# {document['recipe']} on {document['data']}, {labels} labels: does KD-FixMatch help?",
            "",
            f"State: {state}.",
            "",
            *lines,
            "",
            *(f"- {sentence}" for sentence in _sentences(document)),
            "",
            f"kdedge {document['kdedge']}, {document['date']}, {document['machine']['name']}. "
            f"Command: `{document['command']}`",
            "",
        ]
    )


def _present(document: dict[str, Any]) -> list[str]:
    return [name for name in ORDER if name in document["rows"] or name in document["comparisons"]]


def _cells(document: dict[str, Any], name: str) -> list[str]:
    """Accuracy, difference, word, steps, FLOPs and time of a row; dashes where there is nothing yet."""
    row, comparison = document["rows"].get(name), document["comparisons"].get(name)
    word = comparison["word"] if comparison and comparison["differences"] and name != "teacher" else DASH
    cells = [accuracy(row and row["test_accuracy"]), difference(comparison), word]
    if row is None or not row["seeds"]:
        return [*cells, DASH, DASH, DASH]
    return [*cells, f"{row['student_steps']:,.0f}", _flops(row["training_flops"]), span(row["seconds"])]


def _sentences(document: dict[str, Any]) -> list[str]:
    said = []
    headline = document["comparisons"].get(EQUAL_TOTAL)
    if headline and headline["differences"]:
        seeds = _seeds(len(headline["seeds"]))
        said.append(
            f"At equal total compute KD-FixMatch: **{headline['word']}**, {difference(headline)} points over {seeds}."
        )
    if document["trusted"]["seeds"]:
        said.append(_trusted(document["trusted"]))
    return [
        *said,
        "helps: the 95 % interval of the difference (Student's t over seeds, paired by seed: the same labels, the "
        "same test images) lies above zero; hurts: below; no evidence: neither, or no interval, as for one seed and "
        "where all differences are equal. The comparisons are not corrected for their number.",
        "Training FLOPs and wall time are of all stages; an outer network that several rows use was trained once, and "
        "is counted in each. Wall times are of a machine that may have been doing other things.",
    ]


def _trusted(found: dict[str, Any]) -> str:
    """The trusted set beside the confidence-only one of the same size and class quota."""
    seeds = _seeds(len(found["seeds"]))
    mean, alone = 100 * found["precision"], 100 * found["confidence_only_precision"]
    words = {"helps": "better", "hurts": "worse", "no evidence": "no evidence of a difference"}
    rule = {True: "held", False: "not held", None: "open"}[found["rule_holds"]]
    return (
        f"Trusted set, {mean:.2f} % right; confidence alone at the same size and class quota, {alone:.2f} %: "
        f"difference {difference(found)} points over {seeds}, {words[found['word']]}. The rule (not worse, and better "
        f"where confidence alone is below 97 %) is {rule}."
    )


def summary_row(record: dict[str, Any]) -> str:
    """The record as one row under SUMMARY_HEAD; a test holds the README to it."""
    names = ("supervised", "fixmatch", EQUAL_TOTAL, "kd-only", FULL)
    cells = [accuracy((record["rows"].get(name) or {}).get("test_accuracy")) for name in names]
    headline = record["comparisons"].get(EQUAL_TOTAL)
    gain = f"{difference(headline)}, {headline['word']}" if headline else DASH
    return line([_what(record), *cells, gain])


def markdown_rows(record: dict[str, Any]) -> list[str]:
    """Every row of the record, under ROWS_HEAD."""
    return [line([_what(record), TITLES[name], *_cells(record, name)]) for name in _present(record)]


def _what(record: dict[str, Any]) -> str:
    return f"{record['title']}, {record['labels']} labels, {_seeds(len(record['seeds']))}"


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _flops(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")
