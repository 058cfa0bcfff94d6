"""What ships, from numbers; no model is run here."""

import json

import numpy as np
import pytest

from kdedge.intervals import tango, wilson
from kdedge_export.judging.gate import Agreement, Candidate, Decision, agreement, fill_in, gate_document, judge
from kdedge_export.judging.latency import Speedup

UNKNOWN = np.full(1000, -1, np.int64)
CPU = "onnxruntime-cpu"


def logits(classes: np.ndarray) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[classes] * 5


def found(images: int = 1000, differ: int = 0, labels: np.ndarray = UNKNOWN) -> Agreement:
    fp32 = np.arange(images) % 10
    other = fp32.copy()
    other[:differ] = (other[:differ] + 1) % 10
    return agreement(logits(fp32), logits(other), labels[:images])


def speed(value: float, spread: float = 0.02) -> Speedup:
    return Speedup(value, value - spread, value + spread, 6)


def int8(differ: int, speedup: Speedup | None, budget: float = 1.0, images: int = 1000) -> Decision:
    return judge(CPU, [Candidate("int8", "int8", found(images, differ), speedup)], budget)


def test_agreement_by_value() -> None:
    each = found(differ=7)
    assert (each.images, each.disagreement_points, each.labeled_images) == (1000, pytest.approx(0.7), 0)
    assert each.interval_points == pytest.approx([100 * end for end in wilson(0.007, 1000)])
    assert (each.accuracy_drop_points, each.accuracy_interval_points) == (None, None)
    assert each.divergence is not None
    assert each.divergence > 0
    assert found(differ=0).divergence == pytest.approx(0.0, abs=1e-9)
    nothing = agreement(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32), np.zeros(0, np.int64))
    assert (nothing.images, nothing.drop_points, nothing.within(100)) == (0, None, False)


def test_without_labels_the_drop_is_the_disagreement() -> None:
    each = found(differ=7)
    assert (each.drop_points, each.drop_interval_points) == (each.disagreement_points, each.interval_points)


def test_with_all_labels_the_drop_is_the_loss_of_accuracy() -> None:
    labels = np.arange(1000) % 10
    labels[:4] = (labels[:4] + 1) % 10  # where INT8 is right and FP32 is not
    labels[4:6] = (labels[4:6] + 5) % 10  # both are wrong, each in its way
    each = found(differ=10, labels=labels)
    assert each.disagreement_points == pytest.approx(1.0)
    assert each.accuracy_drop_points == each.drop_points == pytest.approx(100 * (4 - 4) / 1000)
    assert each.drop_interval_points == each.accuracy_interval_points
    assert each.drop_interval_points == pytest.approx([100 * end for end in tango(4, 4, 1000)])


def test_images_without_a_label_count_as_lost_where_their_class_changes() -> None:
    labels = UNKNOWN.copy()
    labels[:5] = np.arange(5)  # five right answers lost
    labels[5:7] = (np.arange(5, 7) + 1) % 10  # two won, and three more changed that nobody knows
    each = found(differ=10, labels=labels)
    assert (each.labeled_images, each.accuracy_drop_points) == (7, pytest.approx(100 * 3 / 7))
    assert each.drop_points == pytest.approx(100 * (5 + 3 - 2) / 1000)
    assert each.drop_interval_points == pytest.approx([100 * end for end in tango(8, 2, 1000)])
    assert each.disagreement_points is not None
    assert each.drop_points <= each.disagreement_points, "which stays the bound on it"


def test_the_paired_interval_covers() -> None:
    """In 95 of 100 gate splits the interval of the loss of accuracy holds the true loss."""
    rng = np.random.default_rng(0)
    for lost, won in ((0.012, 0.004), (0.03, 0.03), (0.001, 0.0)):
        draws = rng.multinomial(1000, [lost, won, 1 - lost - won], 500)
        intervals = {(a, b): tango(a, b, 1000) for a, b, _ in draws}
        inside = [intervals[a, b][0] <= lost - won <= intervals[a, b][1] for a, b, _ in draws]
        assert np.mean(inside) > 0.93


def test_int8_ships_when_it_agrees_and_is_faster() -> None:
    decision = int8(2, speed(1.5))
    assert (decision.shipped, decision.artifact, decision.verdict, decision.warning) == ("int8", "int8", "pass", None)
    assert (decision.speedup, decision.drop_points) == (1.5, pytest.approx(0.2))
    assert decision.why == (
        "INT8 is shipped on onnxruntime-cpu: it runs at 1.50 times the speed of FP32 (95 % interval 1.48 to 1.52), and "
        "gives another class than FP32 for 0.20 of 100 gate images (95 % interval 0.05 to 0.73, 1000 images)."
    )


def test_float_ships_when_int8_is_slower_or_disagrees() -> None:
    slower = int8(0, speed(0.9))
    assert (slower.shipped, slower.artifact, slower.verdict) == ("fp32", "fp32", "fail")
    assert "FP32 is shipped on onnxruntime-cpu, because INT8 runs at 0.90 times the speed of FP32" in slower.why
    assert "0.9970 times the speed" in int8(0, speed(0.997)).why, "a near tie is not told as 1.00"
    apart = int8(50, speed(3.0))
    assert (apart.shipped, apart.verdict, apart.drop_points, apart.speedup) == ("fp32", "fail", 5.0, 3.0)
    assert "for 5.00 of 100 gate images" in apart.why
    assert "where 1 is allowed, though it runs at 3.00 times" in apart.why
    assert int8(50, speed(3.0), budget=7.0).verdict == "pass"
    both = int8(50, speed(0.5))
    assert "where 1 is allowed, and runs at 0.50 times" in both.why, "both numbers are told"


@pytest.mark.parametrize(
    ("differ", "speedup", "shipped"),
    [
        (8, speed(2.0), "int8"),  # 0.8 points, up to 1.57
        (12, speed(2.0), "fp32"),  # 1.2 points, from 0.69
        (0, speed(1.01), "int8"),  # from 0.99
        (0, speed(0.99), "fp32"),  # up to 1.01
        (12, speed(0.99), "fp32"),
    ],
)
def test_what_cannot_be_told_ships_on_the_point(differ: int, speedup: Speedup, shipped: str) -> None:
    decision = int8(differ, speedup)
    assert (decision.shipped, decision.verdict) == (shipped, "cannot tell")
    assert (decision.warning is not None) == (shipped == "int8")


def test_one_side_that_surely_fails_is_enough() -> None:
    assert int8(12, speed(0.5)).verdict == "fail"
    assert int8(50, speed(0.99)).verdict == "fail"


def test_warnings_say_what_is_not_sure() -> None:
    doubtful = int8(8, speed(1.01))
    assert doubtful.warning == (
        "INT8 is shipped on the point estimate: 6 rounds cannot tell whether it is faster "
        "and so few images cannot rule out a drop above 1."
    )
    assert "; 6 rounds cannot tell whether it is faster" in doubtful.why


def test_labels_tell_changes_from_losses() -> None:
    """Fifteen classes change, as many for the better as for the worse but one."""
    labels = np.arange(1000) % 10
    labels[:7] = (labels[:7] + 1) % 10
    each = Candidate("int8", "int8", found(differ=15, labels=labels), speed(2.0))
    decision = judge(CPU, [each], 1.0)
    assert (decision.shipped, decision.drop_points) == ("int8", pytest.approx(0.1))
    assert "and loses 0.10 points on 1000 gate images, all labelled (95 % interval" in decision.why
    assert "lost; another class than FP32 for 1.50 of 100)" in decision.why
    unknown = judge(CPU, [Candidate("int8", "int8", found(differ=15), speed(2.0))], 1.0)
    assert (unknown.shipped, unknown.verdict, unknown.drop_points) == ("fp32", "cannot tell", pytest.approx(1.5))
    labels[20:] = -1
    mixed = judge(CPU, [Candidate("int8", "int8", found(differ=18, labels=labels), speed(2.0))], 1.0)
    assert "loses 0.40 points on 1000 gate images, 20 of them labelled" in mixed.why
    better = judge(CPU, [Candidate("int8", "int8", found(differ=6, labels=labels), speed(2.0))], 1.0)
    assert "wins 0.60 points" in better.why


def test_without_images_or_measurement() -> None:
    assert (int8(0, speed(2.0), images=0).shipped, int8(0, speed(2.0), images=0).verdict) == ("fp32", "cannot tell")
    assert int8(0, speed(2.0), images=0).why.endswith("there are no gate images.")
    later = judge("tensorrt", [Candidate("trt", "int8", found(differ=2))], 1.0)
    assert (later.shipped, later.verdict, later.speedup) == ("fp32", "undecided", None)
    assert "INT8 has not been timed there yet; it gives another class" in later.why
    assert judge("tensorrt", [Candidate("trt", "int8", found(differ=500))], 1.0).verdict == "undecided"
    unasked = judge(CPU, [], 1.0)
    assert (unasked.shipped, unasked.verdict, unasked.drop_points) == ("fp32", "undecided", None)


def test_fp16_ships_only_where_it_is_measured_faster() -> None:
    def three(int8_speed: Speedup, fp16_speed: Speedup | None, differ: int = 0) -> Decision:
        candidates = [
            Candidate("int8", "int8", found(differ=differ), int8_speed),
            Candidate("fp16", "fp16", found(), fp16_speed),
        ]
        return judge(CPU, candidates, 1.0)

    slow = three(speed(2.0), speed(0.3))
    assert (slow.shipped, slow.verdict) == ("int8", "pass")
    assert "Not shipped: FP16 runs at 0.30 times the speed of FP32" in slow.why
    assert three(speed(2.0), None).shipped == "int8"
    assert three(speed(0.8), speed(0.3)).shipped == "fp32"
    tie = three(speed(0.8), speed(1.01))
    assert (tie.shipped, tie.judged[1].verdict) == ("fp32", "cannot tell"), "FP16 ships only where it is surely faster"
    instead = three(speed(2.0), speed(1.4), differ=50)
    assert (instead.shipped, instead.artifact, instead.verdict) == ("fp16", "fp16", "fail")
    assert (instead.speedup, instead.drop_points) == (2.0, 5.0), "of what was asked for"
    assert "FP16 is shipped on onnxruntime-cpu: it runs at 1.40" in instead.why
    assert "Not shipped: INT8 gives another class than FP32 for 5.00" in instead.why
    beaten = three(speed(1.4), speed(1.6))
    assert (beaten.shipped, beaten.verdict) == ("fp16", "fail")
    assert three(speed(1.40), speed(1.41)).verdict == "cannot tell", "the intervals of the two overlap"


def test_document() -> None:
    here = int8(2, speed(1.5))
    there = judge("tensorrt", [Candidate("trt", "int8", found(differ=2)), Candidate("fp16", "fp16", found())], 1.0)
    document = gate_document([here, there], CPU)
    assert (document["schema"], document["shipped"], list(document["targets"])) == (1, "int8", [CPU, "tensorrt"])
    assert json.loads(json.dumps(document)) == document, "what is told is what can be read back"
    entry = document["targets"][CPU]
    assert {"shipped", "verdict", "speedup", "drop_points", "drop_points_interval", "why"} <= set(entry)
    assert entry["drop_points_interval"] == pytest.approx([100 * end for end in wilson(0.002, 1000)])
    assert entry["speedup_interval"] == [1.48, 1.52]
    assert entry["candidates"]["int8"]["verdict"] == "pass"
    assert document["targets"]["tensorrt"]["verdict"] == "undecided"
    assert judge(CPU, [], 1.0).to_json()["drop_points_interval"] is None


def test_a_target_is_filled_in_when_it_was_measured() -> None:
    labels = np.arange(1000) % 10
    candidates = [
        Candidate("trt", "int8", found(differ=2, labels=labels)),
        Candidate("fp16", "fp16", found(labels=labels)),
    ]
    decisions = [int8(2, speed(1.5)), judge("tensorrt", candidates, 1.0)]
    document = gate_document(decisions, CPU)
    document["targets"]["tensorrt"]["note"] = "kept"
    filled = fill_in(document, "tensorrt", {"trt": speed(2.1)})
    expected = judge(
        "tensorrt", [Candidate("trt", "int8", found(differ=2, labels=labels), speed(2.1)), candidates[1]], 1.0
    )
    assert filled["targets"]["tensorrt"] == {**expected.to_json(), "note": "kept"}
    assert (filled["targets"]["tensorrt"]["artifact"], filled["shipped"]) == ("trt", "int8")
    assert filled["targets"][CPU] == document["targets"][CPU]
    again = fill_in(filled, "tensorrt", {"fp16": speed(2.5)})["targets"]["tensorrt"]
    assert (again["shipped"], again["candidates"]["trt"]["speedup"]) == ("fp16", 2.1)
    with pytest.raises(KeyError, match="no candidates"):
        fill_in(document, "tensorrt", {"int8": speed(2.0)})
