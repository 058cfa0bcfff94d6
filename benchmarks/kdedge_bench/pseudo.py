"""What became of the pseudo labels of a run: alarms, the end of each stage, what each filter of the trusted set left.

A run that was made before one of these was logged lacks it here, and nothing else.
"""

from typing import Any

import numpy as np

from kdedge_bench.facts import Facts
from kdedge_bench.formats import count, percent
from kdedge_bench.report_tables import Column, Table

__all__ = ["alarms", "filters", "guards", "stage_ends"]

STAGES = {"outer": "Outer network (teacher)", "inner": "Inner network (student)"}


def alarms(facts: Facts) -> list[str]:
    """What was said while it trained, oldest first."""
    return [
        f"{STAGES.get(str(line.get('stage')), str(line.get('stage')))}, step {count(line.get('step'))}: {line['alarm']}"
        for line in facts.metrics
        if isinstance(line.get("alarm"), str)
    ]


def stage_ends(facts: Facts) -> Table:
    """A row a stage: kept and right share of its last logged pseudo labels, and the same two on the held-back slice."""
    rows: list[dict[str, Any]] = []
    for stage, name in STAGES.items():
        pool = _last(facts, stage, "kept_fraction")
        if pool:
            held_back = _last(facts, stage, "val_kept_fraction")
            rows.append(
                {"stage": stage, "name": name}
                | {key: pool.get(key) for key in ("step", "kept_fraction", "pseudo_label_accuracy")}
                | {key: held_back.get(key) for key in ("val_kept_fraction", "val_pseudo_label_accuracy")}
            )
    columns = (
        Column("At the end of", ("name",), text=True),
        Column("Kept", ("kept_fraction",), percent),
        Column("Right", ("pseudo_label_accuracy",), percent),
        Column("Held-back: kept", ("val_kept_fraction",), percent),
        Column("Held-back: right", ("val_pseudo_label_accuracy",), percent),
    )
    return Table("pseudo_labels", "Pseudo labels at the end of each stage", columns, tuple(rows))


def _last(facts: Facts, stage: str, key: str) -> dict[str, Any]:
    lines = [line for line in facts.metrics if line.get("stage") == stage and key in line]
    return lines[-1] if lines else {}


def filters(facts: Facts) -> Table:
    """A row a filter of the trusted set: how many images are left after it, and the right share of their labels."""
    part, why = (facts.result or {}).get("trusted"), facts.trusted.get("why")
    rows: list[dict[str, Any]] = []
    if part and why is not None:
        passed = ~np.isin(why, ("outlier", "its label differs", "low confidence"))
        agreed = passed & (why != "cluster disagrees")
        found = [
            ("All pseudo labels", len(why), "precision_before_filters"),
            ("Confident", int(passed.sum()), "precision_after_confidence"),
            ("Confident, and their cluster agrees", int(agreed.sum()), "precision_after_clusters"),
            ("Trusted", part.get("size"), "precision"),
            ("By confidence alone, as many of each class", part.get("size"), "confidence_only_precision"),
        ]
        rows = [{"kept": name, "images": size, "right_fraction": part[key]} for name, size, key in found if key in part]
    columns = (
        Column("Unlabeled images", ("kept",), text=True),
        Column("Images", ("images",), count),
        Column("Labels right", ("right_fraction",), percent),
    )
    # The size alone stands in a sentence.
    return Table(
        "trusted_set", "What each filter of the trusted set leaves", columns, tuple(rows if len(rows) > 1 else ())
    )


def guards(facts: Facts) -> list[str]:
    """What was found in the unlabeled images that does not belong there."""
    found = (facts.result or {}).get("data_guards") or {}
    sentences = []
    removed, outliers = found.get("duplicates_removed"), found.get("outliers")
    looked = found.get("near_duplicates_looked_for")  # not written before; a zero then says nothing, not even "exactly"
    lookalikes = (facts.splits or {}).get("lookalikes") or 0
    alike = "exactly" if looked is False or lookalikes else "nearly"
    if removed:
        images = f"{count(removed)} unlabeled image{'' if removed == 1 else 's'}"
        were = "was" if removed == 1 else "were"
        sentences.append(f"{images} {alike} the same as a validation or test image {were} removed.")
    elif removed == 0 and looked is not None:
        sentences.append(f"No unlabeled image is {alike} the same as a validation or test image.")
    if lookalikes:
        images = f"{count(lookalikes)} unlabeled image{' looks' if lookalikes == 1 else 's look'}"
        sentences.append(f"{images} nearly like a validation or test image: left in, too many to be accidental copies.")
    if outliers is not None:
        images = f"{count(outliers)} unlabeled image{' was' if outliers == 1 else 's were'}"
        sentences.append(
            f"{images} found to be of none of the classes, and taught nothing."
            if outliers
            else "No unlabeled image was found to be of none of the classes."
        )
    return sentences
