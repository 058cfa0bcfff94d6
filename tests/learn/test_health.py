"""Pseudo-label health: counts against slow loops, and alarms that fire on a collapse and on nothing else."""

import json
import math

import pytest
import torch
from torch import Tensor

from kdedge.methods.health import COUNTS, Tally, collapse, counts_line, pseudo_label_logs, slice_health, summary

EVEN = torch.full((10,), 4)  # labeled images of each class


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_of(*kept: float, given: float | None = None) -> Tensor:
    """Counts [4, K] with these kept labels; `given` images in all, by default twice as many as are kept."""
    kept_K = torch.tensor(kept, dtype=torch.float64)
    total = 2 * float(kept_K.sum()) if given is None else given
    given_K = torch.full_like(kept_K, total / len(kept))
    return torch.stack([given_K, kept_K, torch.zeros_like(kept_K), torch.zeros_like(kept_K)])


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    label_U = torch.randint(0, 3, (40,), generator=seeded(seed))
    weight_U = torch.rand(40, generator=seeded(seed + 1))
    truth_U = torch.randint(-1, 3, (40,), generator=seeded(seed + 2))
    return label_U, weight_U, truth_U


def test_counts_of_two_batches_add_up_and_agree_with_a_slow_loop() -> None:
    counts = torch.zeros(4, 4, dtype=torch.float64)
    slow = [[0.0] * 4 for _ in range(4)]
    for seed in (0, 10):
        label_U, weight_U, truth_U = batch(seed)
        counts += pseudo_label_logs(label_U, weight_U, truth_U, 4)[COUNTS]
        for label, weight, truth in zip(label_U.tolist(), weight_U.tolist(), truth_U.tolist(), strict=True):
            slow[0][label] += 1
            slow[1][label] += weight
            slow[2][label] += weight if truth >= 0 else 0
            slow[3][label] += weight if truth == label else 0
    torch.testing.assert_close(counts, torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    line = counts_line(counts)
    assert float(line["kept_fraction"]) == pytest.approx(sum(slow[1]) / 80)
    assert line["pseudo_label_histogram"].tolist() == pytest.approx([k / sum(slow[1]) for k in slow[1]])
    assert float(line["pseudo_label_accuracy"]) == pytest.approx(sum(slow[3]) / sum(slow[2]))
    assert line["pseudo_label_precision"].tolist()[:3] == pytest.approx([slow[3][k] / slow[2][k] for k in range(3)])
    assert math.isnan(line["pseudo_label_precision"][3])
    assert line["pseudo_label_known"].tolist() == pytest.approx(slow[2])


def test_counts_carry_no_gradient() -> None:
    weight_U = torch.rand(5, requires_grad=True)
    logs = pseudo_label_logs(torch.zeros(5, dtype=torch.int64), weight_U, torch.zeros(5), 2)
    assert not logs[COUNTS].requires_grad


def test_what_is_not_known_is_not_guessed() -> None:
    label_U, weight_U, _ = batch(0)
    line = counts_line(pseudo_label_logs(label_U, weight_U, torch.full((40,), -1), 3)[COUNTS])
    assert line["pseudo_label_precision"] is line["pseudo_label_known"] is None
    assert math.isnan(line["pseudo_label_accuracy"])
    none_kept = counts_line(pseudo_label_logs(label_U, torch.zeros(40), label_U, 3)[COUNTS])
    assert none_kept["kept_fraction"] == 0
    assert none_kept["pseudo_label_histogram"].tolist() == [0, 0, 0]
    assert counts_line(torch.zeros(4, 3)) == {}


def test_the_held_back_slice_image_by_image() -> None:
    logits_MK = 3 * torch.randn(60, 4, generator=seeded(5))
    labels_M = torch.randint(-1, 4, (60,), generator=seeded(6))
    found = slice_health(logits_MK, labels_M, 0.8)
    known = kept = right = right_kept = 0
    of_class, right_of_class = [0] * 4, [0] * 4
    for logits, label in zip(logits_MK, labels_M.tolist(), strict=True):
        if label < 0:
            continue
        probs = (logits - logits.logsumexp(0)).exp().tolist()
        guess = probs.index(max(probs))
        known, right = known + 1, right + (guess == label)
        if max(probs) >= 0.8:
            kept, right_kept = kept + 1, right_kept + (guess == label)
            of_class[guess] += 1
            right_of_class[guess] += guess == label
    assert 0 < kept < known < 60
    assert found.accuracy == right / known
    assert float(found.logs["val_kept_fraction"]) == pytest.approx(kept / known)
    assert float(found.logs["val_pseudo_label_accuracy"]) == pytest.approx(right_kept / kept)
    assert found.logs["val_pseudo_label_known"].tolist() == of_class
    expected = [r / n for r, n in zip(right_of_class, of_class, strict=True)]
    assert found.logs["val_pseudo_label_precision"].tolist() == pytest.approx(expected)


def test_a_slice_without_threshold_or_labels() -> None:
    logits = torch.eye(3)
    assert slice_health(logits, torch.tensor([0, 1, 0]), None).logs == {}
    assert slice_health(logits, torch.tensor([0, 1, 0]), None).accuracy == pytest.approx(2 / 3)
    nothing = slice_health(logits, torch.full((3,), -1), 0.5)
    assert (nothing.accuracy, nothing.logs) == (0.0, {})


def test_one_class_that_takes_over_is_told_by_name_and_number() -> None:
    names = ["cat", *(f"bird {index}" for index in range(9))]
    (alarm,) = collapse(kept_of(800, *[22] * 9), EVEN, 10_000, 0.3, names)
    assert alarm.classes == (0,)
    assert alarm.sentence.startswith(
        "One class takes over the pseudo labels: cat with 80 % of the kept pseudo labels and 10 % of the labels."
    )
    assert "thresholds.alignment=true" in alarm.sentence
    (unnamed,) = collapse(kept_of(*[22] * 9, 800), EVEN, 10_000, 0.3)
    assert "class 9 with 80 %" in unnamed.sentence


@pytest.mark.parametrize(
    ("counts", "labeled", "images", "done"),
    [
        (kept_of(*[100] * 10), EVEN, 10_000, 1.0),
        (kept_of(800, *[22] * 9), EVEN, 10_000, 0.1),  # the easy class comes first
        (kept_of(6, *[0] * 9), EVEN, 10_000, 0.4),  # six labels are chance
        (kept_of(800, *[22] * 9, given=160_000), EVEN, 1_000, 0.3),  # the same thousand images, drawn 160 times
        (kept_of(800, *[22] * 9), torch.tensor([80, *[2] * 9]), 10_000, 0.9),  # the labels are as long-tailed
        (kept_of(500, *[55] * 9), EVEN, 10_000, 0.4),  # skewed, and no collapse
        (kept_of(*[1000] * 9, 0), EVEN, 20_000, 0.5),  # a hard class may come late
        (kept_of(*[90] * 9, 0), EVEN, 20_000, 1.0),  # of 810 images a hundredth may be missing by chance
        (kept_of(*[1000] * 9, 0), torch.tensor([*[4] * 9, 0]), 20_000, 1.0),  # nobody labelled it
        (torch.zeros(4, 10), EVEN, 10_000, 1.0),
        (kept_of(*[0] * 10, given=1000), EVEN, 10_000, 1.0),
    ],
)
def test_no_alarm(counts, labeled, images, done) -> None:
    assert collapse(counts, labeled, images, done) == []


def test_a_tail_class_that_swallows_the_head_alarms() -> None:
    """The share that is normal for the head is a collapse for the tail."""
    labeled = torch.tensor([80, *[2] * 9])
    assert collapse(kept_of(800, *[22] * 9), labeled, 10_000, 0.9) == []
    (alarm,) = collapse(kept_of(*[22] * 9, 800), labeled, 10_000, 0.4)
    assert alarm.classes == (9,)


def test_vanished_classes_are_told_in_one_sentence_and_once() -> None:
    counts = kept_of(*[1000] * 3, *[0] * 7)
    (alarm,) = collapse(counts, EVEN, 20_000, 0.8)
    assert alarm.classes == tuple(range(3, 10))
    assert alarm.sentence.startswith(
        "7 classes vanish from the pseudo labels: class 3, class 4, class 5, class 6, class 7 and 2 more with 0.0 % of "
        "the kept pseudo labels and 70 % of the labels."
    )
    (rest,) = collapse(counts, EVEN, 20_000, 0.8, told=range(3, 9))
    assert rest.sentence.startswith("One class vanishes from the pseudo labels: class 9 with 0.0 %")
    assert collapse(counts, EVEN, 20_000, 0.8, told=range(3, 10)) == []


def test_chance_does_not_alarm() -> None:
    """Honest labels of 10 classes, even and long-tailed, in windows from 5 to 500 images."""
    for prior in (torch.ones(10), 0.6 ** torch.arange(10.0)):
        labeled = prior / prior.sum() * 1000
        for seed in range(300):
            size = 5 + 495 * (seed % 10) // 9
            drawn = torch.multinomial(prior, size, replacement=True, generator=seeded(seed))
            kept = torch.bincount(drawn, minlength=10)
            assert collapse(kept_of(*kept.tolist()), labeled, 10_000, 0.9) == []


def test_a_tally_begins_again_after_each_look_and_is_restored() -> None:
    tally = Tally(10, torch.device("cpu"))
    logs = {COUNTS: kept_of(820, *[22] * 9).float()}
    tally.add(logs)
    tally.add({"loss": torch.ones(())})
    copy = Tally(10, torch.device("cpu"))
    copy.restore({name: tensor.clone() for name, tensor in tally.tensors.items()}, tally.alarmed)
    for each in (tally, copy):
        assert float(each.line()["kept_fraction"]) == pytest.approx(0.5)
        assert each.line() == {}
        assert [alarm.classes for alarm in each.alarms(EVEN, 10_000, 0.5)] == [(0,)]
        assert each.alarmed == [0]
        each.add(logs)
        assert each.alarms(EVEN, 10_000, 0.6) == []  # told already


def test_few_labels_are_judged_together_with_the_next_ones() -> None:
    """Thirty kept labels may be chance; sixty of two looks are not."""
    tally, few = Tally(5, torch.device("cpu")), kept_of(24, 2, 2, 1, 1, given=300).float()
    labeled = torch.full((5,), 4)
    said = []
    for look in range(1, 11):
        tally.add({COUNTS: few})
        if tally.alarms(labeled, 10_000, look / 20):
            said.append(look)
    assert said == [4]  # the first two are of the first tenth, which is forgotten
    assert collapse(few, labeled, 10_000, 0.5) == []


def test_the_summary_takes_the_last_line_of_each_stage(tmp_path) -> None:
    def line(stage: str, step: int, **values: object) -> str:
        return json.dumps({"stage": stage, "step": step, "total_steps": 20} | values)

    def pseudo(kept: float, accuracy: float | None, precision: object = None) -> dict[str, object]:
        return {"kept_fraction": kept, "pseudo_label_histogram": [0.5, 0.5], "pseudo_label_accuracy": accuracy,
                "pseudo_label_precision": precision}  # fmt: skip

    path = tmp_path / "metrics.jsonl"
    lines = [
        line("baseline", 20, loss=1.0),
        line("outer", 10, **pseudo(0.1, 0.6, [0.6, None])),
        line("outer", 10, alarm="One class takes over."),
        line("outer", 20, **pseudo(0.7, 0.9, [0.8, 1.0])),
        line("outer", 20, val_accuracy=0.5),
        line("trusted", 1, kept_fraction=0.4),
        line("inner", 10, **pseudo(0.8, None)),
        '{"stage": "inner", "st',
    ]
    path.write_text("\n".join(lines))
    assert summary(path) == {
        "outer": {
            "kept_fraction": 0.7,
            "accuracy": 0.9,
            "per_class_precision": [0.8, 1.0],
            "alarms": [{"step": 10, "sentence": "One class takes over."}],
        },
        "inner": {"kept_fraction": 0.8, "accuracy": None, "per_class_precision": None, "alarms": []},
    }
    assert summary(tmp_path / "absent.jsonl") == {}
