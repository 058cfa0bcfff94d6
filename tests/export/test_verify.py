"""The proof by value, on logits whose every change is known."""

import json
from typing import Any

import numpy as np
import pytest

from kdedge.errors import BugError, ExportError
from kdedge.intervals import wilson
from kdedge_device.preprocess import Preprocess
from kdedge_export.judging.divergence import Divergence, Layer
from kdedge_export.judging.verify import FileProof, collect, prove

CLASSES = ("ant", "bee", "cow")
BASE = np.array([[5, 1, 0], [4, 2, 0], [1, 5, 0], [0, 3, 1], [0, 1, 4], [2, 0, 5]], np.float32)  # a a b b c c
LABELS = np.array([0, 0, 1, 0, 2, 1])  # four right, two wrong


def of(name: str, found: np.ndarray, labels: np.ndarray = LABELS, **others: Any) -> FileProof:
    proof = prove({"fp32": BASE, name: found}, labels, CLASSES, **others)
    return next(each for each in proof.files if each.name == name)


def test_a_file_that_says_the_same() -> None:
    same = of("int8", BASE.copy())
    assert (same.top1, same.agreement.disagreement_points, same.classes) == (pytest.approx(4 / 6), 0.0, ())
    assert same.top1_interval == pytest.approx(wilson(4 / 6, 6))
    assert (same.logit_error.max, same.logit_error.rms, same.logit_error.sqnr_db) == (0.0, 0.0, None)


def test_logit_error_by_value() -> None:
    error = np.zeros_like(BASE)
    error[0, 0], error[5, 2] = 0.3, -0.4
    found = of("int8", BASE + error).logit_error
    assert found.max == pytest.approx(0.4)
    assert found.rms == pytest.approx(np.sqrt(0.25 / 18))
    assert found.max_of_span == pytest.approx(0.4 / 5)
    assert found.rms_of_span == pytest.approx(found.rms / 5)
    assert found.sqnr_db == pytest.approx(10 * np.log10((BASE**2).sum() / 0.25), rel=1e-4)


def test_classes_that_lose_come_first() -> None:
    changed = BASE.copy()
    changed[0] = [0, 5, 0]  # right "ant" -> bee: lost
    changed[3] = [5, 0, 0]  # wrong "bee" -> ant: won
    changed[4] = [0, 5, 0]  # right "cow" -> bee: lost
    found = of("int8", changed)
    assert found.top1 == pytest.approx(3 / 6)
    told = {each.name: (each.given, each.left, each.joined, each.labeled) for each in found.classes}
    assert told == {"ant": (2, 1, 1, 3), "bee": (2, 1, 2, 2), "cow": (2, 1, 0, 1)}
    rights = {each.name: (each.right_before, each.right_after) for each in found.classes}
    assert rights == {"ant": (2, 2), "bee": (1, 1), "cow": (1, 0)}
    assert found.classes[0].name == "cow"
    assert found.agreement.disagreement_points == pytest.approx(50.0)


def test_the_text() -> None:
    changed = BASE.copy()
    changed[4] = [0, 5, 0]
    layer = Layer("conv1", "Conv", 4.0, 20.0)
    proof = prove(
        {"torch": BASE, "fp32": BASE, "int8": changed}, LABELS, CLASSES, layers={"int8": Divergence((layer,), 8)}
    )
    lines = proof.text().splitlines()
    assert " ".join(lines[0].split()) == "top-1 agrees with FP32 logits off by (rms, largest)"
    assert lines[1].startswith("torch  0.6667  100.00 %          0.00%, 0.00% of their span")
    assert lines[2] == "fp32   0.6667  -                 -"
    assert lines[3].startswith("int8   0.5000  83.33 %")
    assert lines[4] == "int8 loses most in: cow 1 of 1"
    assert lines[5].startswith("int8: the first layer to diverge is conv1 (Conv, 4.0 dB, 20.0 dB below its input)")
    document = proof.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["reference"], document["split"], document["images"]) == ("fp32", "test", 6)
    assert document["layers"]["int8"]["first_to_diverge"]["tensor"] == "conv1"


def test_without_labels_changes_are_told_instead() -> None:
    changed = BASE.copy()
    changed[4] = [0, 5, 0]
    unknown = np.full(6, -1)
    found = of("int8", changed, unknown)
    assert (found.top1, found.top1_interval) == (None, None)
    text = prove({"fp32": BASE, "int8": changed}, unknown, CLASSES).text()
    assert "int8 loses most in: cow 1 of 2" in text
    assert "int8  -" in text


def test_without_images() -> None:
    empty = np.zeros((0, 0), np.float32)
    proof = prove({"fp32": empty, "int8": empty}, np.zeros(0, np.int64), CLASSES)
    assert json.loads(json.dumps(proof.to_json(), allow_nan=False))["images"] == 0
    assert "int8  -" in proof.text()


def test_refusals() -> None:
    with pytest.raises(BugError, match="nothing to compare with"):
        prove({"int8": BASE}, LABELS, CLASSES)
    with pytest.raises(BugError, match=r"logits \(5, 3\) for 6 images"):
        prove({"fp32": BASE, "int8": BASE[:5]}, LABELS, CLASSES)
    broken = BASE.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ExportError, match="int8 gives logits that are not finite for 1 of 6 images"):
        prove({"fp32": BASE, "int8": broken}, LABELS, CLASSES)


def test_all_files_see_the_same_images() -> None:
    """Chunks of any size; each is normalised once and never more than a few images are given at a time."""
    preprocess = Preprocess(2, 2, 1, "squash", (0.5,), (0.5,))
    images = np.arange(100, dtype=np.uint8).repeat(4).reshape(100, 2, 2, 1)
    sizes: list[int] = []

    def double(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        return np.asarray(batch[:, 0, 0, :] * 2)

    found = collect([("a", double), ("b", lambda batch: batch[:, 0, 0, :])], [images[:70], images[70:]], preprocess)
    expected = preprocess.normalize(images)[:, 0, 0, :]
    np.testing.assert_allclose(found["a"], 2 * expected, atol=1e-6)
    np.testing.assert_allclose(found["b"], expected, atol=1e-6)
    assert max(sizes) <= 32
    assert collect([("a", double)], [], preprocess)["a"].shape == (0, 0)
