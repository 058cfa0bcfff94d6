"""The report on INT8: what each file says beside FP32, what it cost and where, from the bundle's own proof."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdedge_bench import formats
from kdedge_bench.facts import Facts
from kdedge_bench.pictures import WRONG_SHOWN, Load, Strip, strip_of
from kdedge_bench.table import artifact_label

__all__ = ["FILE_HEADINGS", "Int8Section", "int8_section"]

FILE_HEADINGS = ("", "Right, %", "Another class, %", "Logit error, % of span", "Signal to noise, dB")
CLASSES_SHOWN = 8
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
    """Rows as text, in the order of their headings; empty where the bundle does not say."""

    files: list[tuple[str, ...]]
    images: str
    classes: list[tuple[str, ...]]
    ways: list[tuple[str, ...]]
    cures: list[tuple[str, ...]]
    sentences: list[str]
    lost: Strip


def int8_section(facts: Facts, load: Load | None = None) -> Int8Section | None:
    """None where the bundle has no INT8 file."""
    if "int8" not in ((facts.bundle or {}).get("artifacts") or {}):
        return None
    proof, made = facts.proof or {}, facts.quantization or {}
    files: Mapping[str, Any] = proof.get("files") or {}
    what = f"{formats.count(proof['images'])} {proof['split']} images" if files else ""
    return Int8Section(
        files=[_file(name, found) for name, found in files.items()],
        images=what,
        classes=[_class(found) for found in (files.get("int8") or {}).get("classes", [])[:CLASSES_SHOWN]],
        ways=[_way(name, found, name == made.get("chosen")) for name, found in (made.get("ways") or {}).items()],
        cures=[_cure(found) for found in made.get("cures") or ()],
        sentences=_sentences(proof, made),
        lost=_lost(facts, load),
    )


def _file(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    error = found["logit_error"]
    noise = error.get("sqnr_db")
    return (
        NAMES.get(name) or artifact_label(name),
        formats.percent(found.get("top1")),
        _points(found["agreement"].get("disagreement_points")),
        _points(100 * error["rms_of_span"]),
        formats.DASH if noise is None else f"{noise:.0f}",
    )


def _class(found: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = found.get("right_before"), found.get("right_after")
    change = formats.DASH if before is None or after is None else f"{after - before:+d}".replace("-", "\N{MINUS SIGN}")
    return str(found["name"]), str(found["given"]), str(found["left"]), str(found["joined"]), change


def _way(name: str, found: Mapping[str, Any], chosen: bool) -> tuple[str, ...]:
    divergence = found.get("divergence")
    return (
        WAYS.get(name, name),
        _points(found.get("disagreement_points")),
        formats.DASH if divergence is None else f"{divergence:.4f}",
        "taken" if chosen else "",
    )


def _cure(found: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = found["divergence"]
    return (
        str(found["cure"]),
        formats.DASH if before is None else f"{before:.4f}",
        formats.DASH if after is None else f"{after:.4f}",
        "kept" if found["kept"] else "",
    )


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


def _lost(facts: Facts, load: Load | None) -> Strip:
    """Test images that FP32 gets right and INT8 wrong, those first whose FP32 was surest."""
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    if labels is None or before is None or after is None:
        return Strip(problem="The run has no predictions of FP32 and INT8 on test images of known class.")
    lost = np.flatnonzero((before.argmax(1) == labels) & (after.argmax(1) != labels) & (labels >= 0))
    margin = np.take_along_axis(before, labels[:, None], 1)[:, 0] - np.take_along_axis(after, labels[:, None], 1)[:, 0]
    shown = [int(place) for place in lost[np.argsort(-margin[lost], kind="stable")][:WRONG_SHOWN]]
    return strip_of(facts, "int8", [], shown, len(lost), load)


def _points(value: float | None) -> str:
    return formats.DASH if value is None else f"{value:.2f}"
