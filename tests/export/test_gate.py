"""What ships, from numbers; no model is run here."""

import numpy as np
import pytest

from kdedge.intervals import wilson
from kdedge_export.gate import Agreement, agreement, decide

UNKNOWN = np.full(1000, -1, np.int64)


def logits(classes: np.ndarray) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[classes] * 5


def found(images: int = 1000, differ: int = 0, labels: np.ndarray = UNKNOWN) -> Agreement:
    fp32 = np.arange(images) % 10
    int8 = fp32.copy()
    int8[:differ] = (int8[:differ] + 1) % 10
    return agreement(logits(fp32), logits(int8), labels[:images])


def test_agreement_by_value() -> None:
    each = found(differ=7)
    assert (each.images, each.disagreement_points, each.labeled_images) == (1000, pytest.approx(0.7), 0)
    assert each.accuracy_drop_points is None
    assert each.divergence is not None
    assert each.divergence > 0
    assert found(differ=0).divergence == pytest.approx(0.0, abs=1e-9)
    nothing = agreement(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32), np.zeros(0, np.int64))
    assert (nothing.images, nothing.drop_points) == (0, None)


def test_accuracy_counts_where_enough_labels_are_known() -> None:
    labels = UNKNOWN.copy()
    labels[:100] = np.arange(100) % 10
    each = found(differ=7, labels=labels)
    assert (each.labeled_images, each.accuracy_drop_points) == (100, pytest.approx(7.0))
    assert each.drop_points == pytest.approx(7.0)
    labels[20:] = -1
    few = found(differ=7, labels=labels)
    assert (few.labeled_images, few.accuracy_drop_points) == (20, None), "one image of 20 is five points"
    right = labels.copy()
    right[:20] = (np.arange(20) + 1) % 10
    assert found(differ=20, labels=right).drop_points == 2.0


def test_int8_ships_when_it_agrees_and_is_faster() -> None:
    decision = decide(found(differ=2), 1.5, 1.0)
    assert (decision.shipped, decision.verdict, decision.speedup) == ("int8", "pass", 1.5)
    assert decision.drop_points == pytest.approx(0.2)
    assert decision.why == (
        "INT8 is shipped: it runs at 1.50 times the speed of FP32 here, and INT8 gives another class than FP32 for "
        "0.20 of 100 gate images (95 % interval 0.05 to 0.73, 1000 images)."
    )
    assert decide(found(differ=2), 1.0, 1.0).shipped == "int8", "as fast is fast enough"


def test_float_ships_when_int8_is_slower_or_disagrees() -> None:
    slower = decide(found(differ=0), 0.99, 1.0)
    assert (slower.shipped, slower.verdict) == ("fp32", "fail")
    assert "INT8 is slower here (0.99 times the speed of FP32)" in slower.why
    assert "(0.9970 times the speed" in decide(found(differ=0), 0.997, 1.0).why, "a near tie is not told as 1.00"
    apart = decide(found(differ=50), 3.0, 1.0)
    assert (apart.shipped, apart.verdict, apart.drop_points) == ("fp32", "fail", 5.0)
    assert "for 5.00 of 100 gate images" in apart.why
    assert "and 1 is allowed" in apart.why
    assert decide(found(differ=50), 3.0, 6.5).shipped == "int8"


def test_what_cannot_be_told() -> None:
    near = decide(found(differ=8), 2.0, 1.0)
    assert (near.shipped, near.verdict) == ("int8", "cannot tell")
    assert "so few images cannot rule out a drop above 1" in near.why
    above = decide(found(differ=12), 2.0, 1.0)
    assert (above.shipped, above.verdict) == ("fp32", "cannot tell")
    assert decide(found(differ=0), None, 1.0).verdict == "cannot tell"
    none = decide(found(images=0), 2.0, 1.0)
    assert (none.shipped, none.verdict) == ("fp32", "cannot tell")
    unasked = decide(None, None, 1.0)
    assert (unasked.shipped, unasked.verdict, unasked.drop_points) == ("fp32", "undecided", None)


def test_document() -> None:
    each = found(differ=2)
    document = decide(each, 1.5, 1.0).to_json(each, 1.0)
    assert {"shipped", "verdict", "speedup", "drop_points", "drop_points_interval", "why"} <= set(document)
    assert document["drop_points_interval"] == pytest.approx([100 * end for end in wilson(0.002, 1000)])
    assert decide(None, None, 1.0).to_json(None, 1.0)["drop_points_interval"] is None
