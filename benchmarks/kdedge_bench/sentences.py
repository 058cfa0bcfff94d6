"""What the numbers of a run say, in plain sentences."""

import re
from collections import Counter

from kdedge_bench.facts import Facts
from kdedge_bench.formats import count, interval, milliseconds, percent, size, span
from kdedge_bench.table import Row, Summary, decision

__all__ = ["headline", "pretraining_sentence", "trusted_sentences"]


def headline(facts: Facts, found: Summary) -> str:
    """The run in two or three sentences: how good, how fast, how large, what ships."""
    row = found.best
    if row is None:
        return "This run has no result yet."
    sentences = [_how_good(row)]
    labels = (facts.result or {}).get("labels")
    baseline = found.row("baseline")
    if labels and baseline and baseline.accuracy is not None:
        sentences.append(
            f"It learned from {count(labels)} labels; those labels alone give {percent(baseline.accuracy)}."
        )
    elif labels:
        sentences.append(f"It learned from {count(labels)} labels.")
    sentences.append(_what_ships(found))
    return " ".join(filter(None, sentences))


def _what_ships(found: Summary) -> str:
    """In a few words where INT8 ships, as one hopes; with the gate's reason where it does not."""
    shipping = found.shipping
    if shipping is None or shipping.shipped != "int8" or shipping.speedup is None:
        return re.sub(r" \([^()]*\)", "", decision(found))  # intervals and counts stand below the table
    return f"INT8 is shipped: {shipping.speedup:.2f} times the speed of FP32."


def _how_good(row: Row) -> str:
    parts = []
    if row.accuracy is None:
        parts.append("test accuracy not known")
    elif row.images:
        sure = f"95 % interval {interval(row.low, row.high)}"
        parts.append(f"{percent(row.accuracy)} of {count(row.images)} test images right ({sure})")
    else:
        parts.append(f"{percent(row.accuracy)} of the test images right")
    if row.p90_ms is not None:
        threads = f", {row.threads} thread{'s' if row.threads != 1 else ''}" if row.threads else ""
        parts.append(f"{milliseconds(row.p90_ms)} ms an image (p90{threads})")
    if row.bytes is not None:
        parts.append(size(row.bytes))
    return f"{row.name}: {', '.join(parts)}."


def pretraining_sentence(facts: Facts) -> str:
    """What SimCLR did before the labels; empty where there was no such stage."""
    part = (facts.result or {}).get("pretrain")
    if not part:
        return ""
    parts = [f"{count(part.get('steps'))} steps"]
    if part.get("seconds") is not None:
        parts.append(span(part["seconds"]))
    if part.get("knn_accuracy") is not None:
        parts.append(
            f"a vote of the nearest neighbours on its features then gets {percent(part['knn_accuracy'])} right"
        )
    network = f"The {part.get('of') or 'network'} ({part.get('arch')})"
    return f"{network} was pretrained by SimCLR, without labels: {', '.join(parts)}."


def trusted_sentences(facts: Facts) -> list[str]:
    """Size, coverage and precision of the trusted set, and why the other images are not in it."""
    part = (facts.result or {}).get("trusted")
    if not part:
        return []
    precision = part.get("precision")
    known = (
        f"{percent(precision)} of their labels are right"
        if precision is not None
        else "how many of their labels are right is not known"
    )
    covered = f"{count(part.get('size'))} images are trusted, {percent(part.get('coverage'))} of the unlabeled ones"
    sentences = [f"{covered}; {known}. The student learns from them as if they were labelled."]
    if "why" in facts.trusted:
        reasons = Counter(str(why) for why in facts.trusted["why"])
        reasons.pop("kept", None)
        left_out = ", ".join(f"{count(number)} ({why})" for why, number in reasons.most_common())
        sentences.append(f"Left out: {left_out}." if left_out else "None was left out.")
    return sentences
