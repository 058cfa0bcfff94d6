"""The report on INT8: what each file says beside FP32, what it cost and where, from the bundle's own proof."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdedge_bench import formats
from kdedge_bench.facts import Facts
from kdedge_bench.pictures import WRONG_SHOWN, Load, Strip, probabilities, strip_of
from kdedge_bench.report_classes import changes
from kdedge_bench.report_tables import Column, Table
from kdedge_bench.table import artifact_label

__all__ = ["Int8Section", "int8_section"]

CLASSES_SHOWN = 8
NOT_SCORED = Strip(problem="The run has no predictions of FP32 and INT8 on test images of known class.")
NAMES = {
    "torch": "torch",
    "trt": "INT8 for TensorRT 8.5 to 10",
    "trt-fp16": "INT8 for TensorRT 11",
    "fp16": "FP16",
}
WAYS = {
    "calibrated": "calibrated, a way for each tensor",
    "calibrated, mse": "calibrated, least squares for all",
    "calibrated, by images": "calibrated, each image alike",
    "cured": "with the cures that helped",
    "trained": "trained (QAT)",
}


@dataclass(frozen=True)
class Int8Section:
    """Tables without rows where the bundle does not say."""

    files: Table
    images: str
    moved: Table
    change: Table
    ways: Table
    cures: Table
    layers: Table
    sentences: list[str]
    lost: Strip
    lost_images: Table


def int8_section(facts: Facts, load: Load) -> Int8Section | None:
    """None where the bundle has no INT8 file."""
    if "int8" not in ((facts.bundle or {}).get("artifacts") or {}):
        return None
    proof, made = facts.proof or {}, facts.quantization or {}
    files: Mapping[str, Any] = proof.get("files") or {}
    what = f"{formats.count(proof['images'])} {proof['split']} images" if files else ""
    lost = _lost(facts)
    return Int8Section(
        files=_files(files),
        images=what,
        moved=_moved((files.get("int8") or {}).get("classes", [])),
        change=changes(facts),
        ways=_ways(made),
        cures=_cures(made.get("cures") or ()),
        layers=_layers(made),
        sentences=_sentences(proof, made),
        lost=NOT_SCORED if lost is None else strip_of(facts, "int8", [], lost[:WRONG_SHOWN], len(lost), load),
        lost_images=_lost_images(facts, lost or []),
    )


def _files(files: Mapping[str, Any]) -> Table:
    rows = [
        {
            "artifact": name,
            "name": NAMES.get(name) or artifact_label(name),
            "right_fraction": found.get("top1"),
            "another_class_points": found["agreement"].get("disagreement_points"),
            "logit_error_rms_of_span": found["logit_error"]["rms_of_span"],
            "signal_to_noise_db": found["logit_error"].get("sqnr_db"),
        }
        for name, found in files.items()
    ]
    columns = (
        Column("File", ("name",), text=True),
        Column("Right, %", ("right_fraction",), formats.percent),
        Column("Another class, %", ("another_class_points",), _points),
        Column("Logit error, % of span", ("logit_error_rms_of_span",), lambda share: _points(100 * share)),
        Column("Signal to noise, dB", ("signal_to_noise_db",), lambda db: formats.DASH if db is None else f"{db:.0f}"),
    )
    return Table("int8_files", "The files beside FP32", columns, tuple(rows))


def _moved(classes: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("name", "given", "left", "joined", "right_before", "right_after")
    columns = (
        Column("Class", ("name",), text=True),
        Column("Given by FP32", ("given",), formats.count),
        Column("Left it", ("left",), formats.count),
        Column("Joined it", ("joined",), formats.count),
        Column("Right, change", ("right_before", "right_after"), _change),
    )
    rows = tuple({key: found.get(key) for key in keys} for found in classes[:CLASSES_SHOWN])
    return Table("int8_moved", "Answers that INT8 moves between classes", columns, rows)


def _change(before: int | None, after: int | None) -> str:
    return formats.DASH if before is None or after is None else f"{after - before:+d}".replace("-", "\N{MINUS SIGN}")


def _ways(made: Mapping[str, Any]) -> Table:
    rows = [
        {
            "way": WAYS.get(name, name),
            "another_class_points": found.get("disagreement_points"),
            "divergence_nats": found.get("divergence"),
            "taken": name == made.get("chosen"),
        }
        for name, found in (made.get("ways") or {}).items()
    ]
    columns = (
        Column("Way", ("way",), text=True),
        Column("Another class, %", ("another_class_points",), _points),
        Column("Divergence, nats", ("divergence_nats",), _nats),
        Column("Decision", ("taken",), lambda taken: "taken" if taken else "", text=True),
    )
    return Table("int8_ways", "Ways to quantize that were tried", columns, tuple(rows))


def _cures(cures: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        {
            "cure": str(found["cure"]),
            "divergence_before_nats": found["divergence"][0],
            "divergence_after_nats": found["divergence"][1],
            "kept": bool(found["kept"]),
        }
        for found in cures
    ]
    columns = (
        Column("Cure", ("cure",), text=True),
        Column("Divergence before", ("divergence_before_nats",), _nats),
        Column("after", ("divergence_after_nats",), _nats),
        Column("Decision", ("kept",), lambda kept: "kept" if kept else "", text=True),
    )
    return Table("int8_cures", "Cures that were tried", columns, tuple(rows))


def _layers(made: Mapping[str, Any]) -> Table:
    """What each layer costs alone in INT8, the dearest first."""
    left = set((made.get("fallback") or {}).get("left_float") or [])
    rows = [
        {
            "layer": str(found["layer"]),
            "divergence_nats": float(found["divergence"]),
            "left_float": found["layer"] in left,
        }
        for found in sorted(made.get("sensitivity") or [], key=lambda each: -float(each["divergence"]))
    ]
    columns = (
        Column("Layer", ("layer",), text=True),
        Column("Divergence, nats", ("divergence_nats",), lambda nats: f"{nats:.2g}"),
        Column("Runs in", ("left_float",), lambda left: "float" if left else "INT8", text=True),
    )
    return Table("sensitivity", "What each layer costs alone in INT8", columns, tuple(rows))


def _sentences(proof: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    said = []
    images = made.get("images") or {}
    if images:
        said.append(f"Ranges come from {formats.count(images['count'])} images ({images['from']}).")
    fallback = made.get("fallback") or {}
    left = fallback.get("left_float") or []
    if fallback:
        said.append(f"Left in float: {', '.join(left)}." if left else "No layer was left in float.")
    layers = (proof.get("layers") or {}).get("int8") or {}
    first, fall = layers.get("first_to_diverge"), layers.get("steepest_fall")
    if first:
        threshold = f"{layers['threshold_db']:.0f} dB"
        said.append(f"The first layer whose noise comes within {threshold} of its signal is {first['tensor']}.")
    elif layers:
        said.append(f"In no layer does the noise come within {layers['threshold_db']:.0f} dB of the signal.")
    if fall:
        said.append(f"Most is lost at {fall['tensor']} ({fall['operator']}): {fall['fall_db']:.0f} dB.")
    return said


def _lost(facts: Facts) -> list[int] | None:
    """Places of the test images that FP32 gets right and INT8 wrong, those first whose FP32 was surest.

    None where the run has no predictions of both on images of known class.
    """
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    if labels is None or before is None or after is None:
        return None
    lost = np.flatnonzero((before.argmax(1) == labels) & (after.argmax(1) != labels) & (labels >= 0))
    margin = np.take_along_axis(before, labels[:, None], 1)[:, 0] - np.take_along_axis(after, labels[:, None], 1)[:, 0]
    return [int(place) for place in lost[np.argsort(-margin[lost], kind="stable")]]


def _lost_images(facts: Facts, lost: Sequence[int]) -> Table:
    """All of them by id, for CSV and JSON; the page shows pictures."""
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    ids, rows = facts.predictions.get("test_id"), []
    if lost and labels is not None and before is not None and after is not None and ids is not None:
        sure, unsure = probabilities(before[lost]), probabilities(after[lost])
        rows = [
            {
                "image": str(ids[place]),
                "class": facts.classes[int(labels[place])],
                "int8_says": facts.classes[int(after[place].argmax())],
                "fp32_confidence": float(sure[index].max()),
                "int8_confidence": float(unsure[index].max()),
            }
            for index, place in enumerate(lost)
        ]
    columns = (
        Column("Image", ("image",), text=True),
        Column("Class", ("class",), text=True),
        Column("INT8 says", ("int8_says",), text=True),
        Column("FP32 was sure by", ("fp32_confidence",), formats.confidence),
        Column("INT8 is sure by", ("int8_confidence",), formats.confidence),
    )
    return Table("lost_images", "Test images that only FP32 gets right", columns, tuple(rows))


def _points(value: float | None) -> str:
    return formats.DASH if value is None else f"{value:.2f}"


def _nats(value: float | None) -> str:
    return formats.DASH if value is None else f"{value:.4f}"
