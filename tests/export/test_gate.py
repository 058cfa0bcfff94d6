"""What ships, from numbers; no model is run here."""

import json

import numpy as np
import pytest

from kdedge.intervals import tango, wilson
from kdedge_export.judging.agreement import _loss_interval, temperature
from kdedge_export.judging.gate import Agreement, Candidate, Decision, agreement, fill_in, gate_document, judge
from kdedge_export.judging.latency import Speedup

UNKNOWN = np.full(1000, -1, np.int64)
CPU = "onnxruntime-cpu"
NEARLY_5 = pytest.approx(5.0, rel=1e-4)


def logits(classes: np.ndarray) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[classes] * 5


def found(images: int = 1000, differ: int = 0, labels: np.ndarray = UNKNOWN) -> Agreement:
    """Each class that changes costs nearly a point of 100: FP32 is sure of its own."""
    fp32 = np.arange(images) % 10
    other = fp32.copy()
    other[:differ] = (other[:differ] + 1) % 10
    return agreement(3 * logits(fp32), 3 * logits(other), labels[:images])


def speed(value: float, spread: float = 0.02) -> Speedup:
    return Speedup(value, value - spread, value + spread, 6)


def int8(differ: int, speedup: Speedup | None, budget: float = 1.0, images: int = 1000) -> Decision:
    return judge(CPU, [Candidate("int8", "int8", found(images, differ), speedup)], budget)


def test_agreement_by_value() -> None:
    each = found(differ=7)
    assert (each.images, each.disagreement_points, each.labeled_images) == (1000, pytest.approx(0.7), 0)
    assert each.interval_points == pytest.approx([100 * end for end in wilson(0.007, 1000)])
    assert (each.accuracy_drop_points, each.accuracy_interval_points, each.temperature) == (None, None, 1.0)
    assert each.divergence is not None
    assert each.divergence > 0
    assert found(differ=0).divergence == pytest.approx(0.0, abs=1e-9)
    nothing = agreement(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32), np.zeros(0, np.int64))
    assert (nothing.images, nothing.drop_points, nothing.within(100)) == (0, None, False)


def test_a_class_that_changes_costs_what_fp32_thought_of_it() -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]], np.float32)
    other = np.eye(3, dtype=np.float32)[[1, 2, 0, 0]]
    expected = 100 * ((0.6 - 0.3) + (0.4 - 0.25)) / 4
    for outputs in (np.log(probs), np.log(probs) + 7.0, probs):
        each = agreement(outputs.astype(np.float32), other, np.full(4, -1))
        assert each.drop_points == pytest.approx(expected, rel=1e-4), "of logits, and of probabilities themselves"
        assert each.disagreement_points == 50.0


def test_sure_changes_cost_what_they_are() -> None:
    each = found(differ=7)
    assert each.drop_points == pytest.approx(each.disagreement_points, rel=1e-4)
    assert each.drop_interval_points == pytest.approx(each.interval_points, rel=1e-2)
    assert found(differ=0).drop_interval_points == pytest.approx([100 * end for end in wilson(0.0, 1000)])


def drawn(sharpness: float, noise: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits of FP32, of a file that is off by `noise`, labels drawn from FP32's own probabilities); FP32's logits
    are `sharpness` times too large."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(count, 10)) * 1.5
    probs = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = (rng.random(count)[:, None] > probs.cumsum(1)).sum(1)
    off = true + rng.normal(size=true.shape) * noise
    return (true * sharpness).astype(np.float32), (off * sharpness).astype(np.float32), labels


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_the_expected_loss_is_that_of_accuracy_and_surer(noise: float) -> None:
    """Over many gate splits the two have one mean, and the expected one has a fraction of the spread."""
    pairs = []
    for seed in range(60):
        each = agreement(*drawn(1.0, noise, 1000, seed))
        pairs.append((each.drop_points, each.accuracy_drop_points))
    expected, counted = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    assert expected.mean() == pytest.approx(counted.mean(), abs=3 * counted.std() / np.sqrt(len(pairs)))
    assert expected.std() < 0.3 * counted.std()


def test_its_interval_covers() -> None:
    true = np.mean([agreement(*drawn(1.0, 0.3, 20000, 1000 + seed)).drop_points or 0.0 for seed in range(3)])
    inside = 0
    for seed in range(150):
        low, high = agreement(*drawn(1.0, 0.3, 500, seed)).drop_interval_points or (0.0, 0.0)
        inside += low <= true <= high
    assert inside >= 0.9 * 150


def test_fewer_changes_are_never_less_sure() -> None:
    """Of 100 images, near ties: the upper end grows with each change, and none is no proof of a tenth of a point."""
    highs = []
    for changed in (0, 1, 3, 10):
        fp32, other = np.zeros((100, 3), np.float32), np.zeros((100, 3), np.float32)
        fp32[:, 0], other[:, 0] = 4.0, 4.0
        fp32[:changed], other[:changed] = (0.01, 0.0, -9.0), (0.0, 0.01, -9.0)
        interval = agreement(fp32, other, np.zeros(100, np.int64)).drop_interval_points
        assert interval is not None
        highs.append(interval[1])
    assert highs[0] == pytest.approx(100 * wilson(0.0, 100)[1])
    assert min(highs) > 1.0


@pytest.mark.parametrize(("images", "share"), [(200, 0.02), (1000, 0.005), (100, 0.05)])
def test_its_upper_end_covers_where_few_images_change(images: int, share: float) -> None:
    """Most changes are near ties and few are dear: so few of them that a sample often has none of the dear ones."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        costs = np.where(rng.random(images) < 0.1, 0.9, 0.1 * rng.random(images))[rng.random(images) < share]
        missed += _loss_interval(costs, images)[1] < share * (0.1 * 0.9 + 0.9 * 0.05)
    assert missed <= 0.05 * 400


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_labels_say_how_sharp_fp32_is(sharpness: float) -> None:
    fp32, other, labels = drawn(sharpness, 0.4, 1000, 0)
    assert temperature(fp32, labels) == pytest.approx(sharpness, rel=0.12)
    right, other_right, same_labels = drawn(1.0, 0.4, 1000, 0)
    plain = agreement(right, other_right, same_labels).drop_points
    assert agreement(fp32, other, labels).drop_points == pytest.approx(plain, rel=0.12)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.01])
def test_without_labels_a_change_costs_at_least_a_tenth(scale: float) -> None:
    """Small logits, as those of a head without scale, promise that no change costs anything."""
    fp32, other, labels = drawn(scale, 1.0, 1000, 0)
    each = agreement(fp32, other, np.full(1000, -1))
    assert each.disagreement_points is not None
    assert each.drop_points is not None
    assert each.drop_points >= 0.1 * each.disagreement_points > 3.0
    assert not each.within(3.0)
    few = np.where(np.arange(1000) < 49, labels, -1)
    assert not agreement(fp32, other, few).within(3.0), "49 labels do not tell either"


def test_few_labels_do_not_move_the_temperature_far() -> None:
    fp32, _, labels = drawn(1.0, 0.0, 1000, 1)
    right = np.where(fp32.argmax(1) == labels, labels, -1)
    right[np.flatnonzero(right >= 0)[10:]] = -1
    assert 0.4 < temperature(fp32, right) < 1.0, "ten that are right"
    wrong = np.where(fp32.argmax(1) != labels, labels, -1)
    wrong[np.flatnonzero(wrong >= 0)[4:]] = -1
    assert 1.0 < temperature(fp32, wrong) < 2.0, "four that are not"


def test_labels_refute_what_probabilities_promise() -> None:
    """FP32 is sure of nothing here, so changes seem to cost nothing; its right answers are lost all the same."""
    labels = np.arange(1000) % 10
    other = labels.copy()
    other[:50] = (other[:50] + 1) % 10
    each = agreement(logits(labels) / 5e4, logits(other) / 5e4, labels)
    assert each.drop_points is not None
    assert each.drop_points < 0.1
    assert each.accuracy_drop_points == pytest.approx(5.0)
    assert each.refuted(1.0)
    assert not each.within(1.0)
    assert each.within(5.0)
    decision = judge(CPU, [Candidate("int8", "int8", each, speed(2.0))], 1.0)
    assert (decision.shipped, decision.verdict) == ("fp32", "fail")
    assert "1000 labels say +5.00" in decision.why


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
    assert (decision.speedup, decision.drop_points) == (1.5, pytest.approx(0.2, rel=1e-4))
    assert decision.why == (
        "INT8 is shipped on onnxruntime-cpu: it runs at 1.50 times the speed of FP32 (95 % interval 1.48 to 1.52), and "
        "is expected to lose 0.20 points (95 % interval 0.05 to 0.73): 0.20 of 100 gate images get another class than "
        "from FP32 (1000 images)."
    )


def test_float_ships_when_int8_is_slower_or_disagrees() -> None:
    slower = int8(0, speed(0.9))
    assert (slower.shipped, slower.artifact, slower.verdict) == ("fp32", "fp32", "fail")
    assert "FP32 is shipped on onnxruntime-cpu, because INT8 runs at 0.90 times the speed of FP32" in slower.why
    assert "0.9970 times the speed" in int8(0, speed(0.997)).why, "a near tie is not told as 1.00"
    apart = int8(50, speed(3.0))
    assert (apart.shipped, apart.verdict, apart.drop_points, apart.speedup) == ("fp32", "fail", NEARLY_5, 3.0)
    assert "expected to lose 5.00 points" in apart.why
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


def test_why_tells_what_labels_say() -> None:
    """Fifteen classes change, as many for the better as for the worse but one; FP32 was near a tie in all."""
    classes, labels = np.arange(1000) % 10, np.arange(1000) % 10
    labels[:7] = (labels[:7] + 1) % 10
    other = classes.copy()
    other[:15] = (other[:15] + 1) % 10
    fp32 = 3 * logits(classes)
    fp32[np.arange(15), other[:15]] = 14.8
    each = agreement(fp32, 3 * logits(other), labels)
    decision = judge(CPU, [Candidate("int8", "int8", each, speed(2.0))], 1.0)
    assert decision.shipped == "int8"
    assert decision.drop_points == pytest.approx(1.5 * np.tanh(0.1 / (each.temperature or 0)), rel=1e-3)
    assert "1.50 of 100 gate images get another class than from FP32 (1000 images; 1000 labels say +0.10, " in (
        decision.why
    )


def test_without_images_or_measurement() -> None:
    assert (int8(0, speed(2.0), images=0).shipped, int8(0, speed(2.0), images=0).verdict) == ("fp32", "cannot tell")
    assert int8(0, speed(2.0), images=0).why.endswith("there are no gate images.")
    later = judge("tensorrt", [Candidate("trt", "int8", found(differ=2))], 1.0)
    assert (later.shipped, later.verdict, later.speedup) == ("fp32", "undecided", None)
    assert "INT8 has not been timed there yet; it is expected to lose 0.20 points" in later.why
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
    assert (instead.speedup, instead.drop_points) == (2.0, NEARLY_5), "of what was asked for"
    assert "FP16 is shipped on onnxruntime-cpu: it runs at 1.40" in instead.why
    assert "Not shipped: INT8 is expected to lose 5.00 points" in instead.why
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
    assert entry["drop_points_interval"] == pytest.approx([100 * end for end in wilson(0.002, 1000)], rel=1e-2)
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


def test_a_target_runs_one_file_of_a_precision() -> None:
    """TensorRT 11 runs `trt-fp16`, up to 10 `trt`: what cannot be timed there has no say, and is kept as it was."""
    candidates = [
        Candidate("trt", "int8", found(differ=2)),
        Candidate("trt-fp16", "int8", found(differ=3)),
        Candidate("fp16", "fp16", found()),
    ]
    document = gate_document([int8(2, speed(1.5)), judge("tensorrt", candidates, 1.0)], CPU)
    filled = fill_in(document, "tensorrt", {"trt-fp16": speed(2.1), "fp16": speed(1.6)})["targets"]["tensorrt"]
    assert (filled["shipped"], filled["artifact"], filled["verdict"]) == ("int8", "trt-fp16", "pass")
    assert (filled["speedup"], filled["drop_points"]) == (2.1, pytest.approx(0.3, rel=1e-3)), "of what runs there"
    assert "timed" not in filled["why"]
    assert list(filled["candidates"]) == ["trt", "trt-fp16", "fp16"]
    assert filled["candidates"]["trt"] == document["targets"]["tensorrt"]["candidates"]["trt"]
    slow = fill_in(document, "tensorrt", {"trt-fp16": speed(0.9), "fp16": speed(1.6)})["targets"]["tensorrt"]
    assert (slow["shipped"], slow["artifact"], slow["verdict"]) == ("fp16", "fp16", "fail")
    alone = fill_in(document, "tensorrt", {"fp16": speed(1.6)})["targets"]["tensorrt"]
    assert (alone["shipped"], alone["artifact"]) == ("fp16", "fp16")
