"""The three questions of a SimCLR study and the rule that answers each; plan.json holds them before the first run.

A rule reads one difference a seed. Its 95 % interval over seeds (Student's t) decides, and nothing else does.
"""

from collections.abc import Sequence
from typing import Any

from kdedge_bench.verdict_table import HELPS, HURTS, paired
from kdedge_bench.verdict_table import NO_EVIDENCE as UNKNOWN

__all__ = ["CONTRADICTED", "FEW_LABELS", "H1", "H2", "NO_EVIDENCE", "QUESTIONS", "RULES", "SUPPORTED", "judged"]

SUPPORTED, NO_EVIDENCE, CONTRADICTED = "supported", "no evidence", "contradicted"
FEW_LABELS, H1, H2 = "few-labels", "H1", "H2"

QUESTIONS = {
    FEW_LABELS: "Pre-training helps where labels are few",
    H1: "A teacher of the student's own family teaches better than an equally accurate one of another",
    H2: "What pre-training gives on another set falls as its classes grow",
}
_INTERVAL = (
    "Supported where the 95 % interval over seeds (Student's t, paired by seed) lies above zero, contradicted where it "
    "lies below, else no evidence; no evidence with fewer than two seeds, too."
)
RULES = {
    FEW_LABELS: (
        "Test accuracy at the plan's fewest labels: fine-tuned from the first layer of the projection head, minus from "
        f"scratch with the same steps and images. {_INTERVAL}"
    ),
    H1: (
        "Test accuracy of the student with labels: taught by its own family, minus taught by the other. Only seeds "
        "count where the two teachers' accuracies on held-out training images differ by at most the plan's margin. "
        f"{_INTERVAL}"
    ),
    H2: (
        "Gain: test accuracy fine-tuned minus from scratch, with as many labels a class at each number of classes. One "
        "slope a seed, by least squares over the logarithm of the number of classes; its negative is what is read, in "
        f"points lost for each doubling. {_INTERVAL}"
    ),
}


def judged(differences: Sequence[float]) -> dict[str, Any]:
    """Mean, half width, interval and word of one difference a seed, in which positive speaks for the hypothesis."""
    found = paired(differences)
    return found | {"word": _WORDS[found["word"]]}


_WORDS = {HELPS: SUPPORTED, HURTS: CONTRADICTED, UNKNOWN: NO_EVIDENCE}
