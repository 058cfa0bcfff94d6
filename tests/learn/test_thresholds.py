"""Every policy against a slow version of its paper, image by image in plain Python, over steps that build up state."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from kdedge.losses.consistency import fairness
from kdedge.methods.thresholds import Policy, ThresholdConfig, make_policy
from kdedge.train.checkpoint import Checkpoints

CLASSES, IMAGES = 3, 12
Rows = list[list[float]]

CONFIGS = {
    "fixed": {"policy": "fixed", "threshold": 0.7},
    "fixed, aligned": {"policy": "fixed", "threshold": 0.7, "alignment": True},
    "fixed, aligned evenly": {"policy": "fixed", "threshold": 0.6, "alignment": True, "alignment_target": "uniform"},
    "flexmatch": {"policy": "flexmatch", "threshold": 0.8},
    "flexmatch, aligned": {"policy": "flexmatch", "threshold": 0.8, "alignment": True},
    "freematch": {"policy": "freematch"},
    "freematch, clipped": {"policy": "freematch", "global_floor": 0.9, "global_ceiling": 0.95},
    "freematch, exact": {"policy": "freematch", "state_warmup": False, "state_decay": 0.5},
    "softmatch": {"policy": "softmatch"},
    "softmatch, not aligned": {"policy": "softmatch", "alignment": False, "sigmas": 1.0},
    "softmatch, exact": {"policy": "softmatch", "state_warmup": False, "state_decay": 0.9},
    "adamatch": {"policy": "adamatch", "threshold": 0.9},
    "adamatch, not aligned": {"policy": "adamatch", "threshold": 0.9, "alignment": False, "state_warmup": False},
}


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ThresholdConfig:
    return ThresholdConfig(**CONFIGS[request.param])


def steps(count: int = 9, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Labeled logits, weak logits, positions. Class 0 is favoured; some images are twice in a batch."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.tensor([1.0, 0.0, -1.0])
    return [
        (
            3 * torch.randn(4, CLASSES, generator=generator),
            3 * torch.randn(8, CLASSES, generator=generator) + favour,
            torch.randint(0, IMAGES, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def policy_of(config: ThresholdConfig) -> Policy:
    return make_policy(config, CLASSES, IMAGES).train()


# ---- the slow versions


def softmax(row: list[float]) -> list[float]:
    raised = [math.exp(z - max(row)) for z in row]
    return [e / sum(raised) for e in raised]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def argmax(row: list[float]) -> int:
    return row.index(max(row))


class SlowAverage:
    """A running mean; how much of the old one stays follows from the number of updates before."""

    def __init__(self, config: ThresholdConfig, start: float) -> None:
        self.config, self.value, self.count = config, start, 0

    def update(self, value: float) -> float:
        decay = self.config.state_decay
        if self.config.state_warmup:
            decay = min(decay, (1 + self.count) / (10 + self.count))
        self.value = decay * self.value + (1 - decay) * value
        self.count += 1
        return self.value


class SlowAlignment:
    def __init__(self, config: ThresholdConfig) -> None:
        self.to_labeled = config.aligns_to == "labeled"
        self.target = [SlowAverage(config, 1 / CLASSES) for _ in range(CLASSES)]
        self.config, self.model = config, []

    def __call__(self, labeled: Rows, probs: Rows) -> Rows:
        for k in range(CLASSES):
            now = mean([row[k] for row in probs])
            if len(self.model) == k:
                self.model.append(SlowAverage(self.config, now))
            self.model[k].update(now)
            if self.to_labeled:
                self.target[k].update(mean([row[k] for row in labeled]))
        out = []
        for row in probs:
            moved = [row[k] * (self.target[k].value + 1e-6) / (self.model[k].value + 1e-6) for k in range(CLASSES)]
            out.append([p / sum(moved) for p in moved])
        return out


Slow = Callable[[Rows, Rows, list[int]], tuple[list[int], list[float]]]


def slow_policy(config: ThresholdConfig) -> Slow:
    """One step: labeled probabilities, weak probabilities, positions -> labels and weights."""
    alignment = SlowAlignment(config) if config.aligns else lambda labeled, probs: probs
    chosen: dict[int, int] = {}
    tau, mu, variance = SlowAverage(config, 1 / CLASSES), SlowAverage(config, 1 / CLASSES), SlowAverage(config, 1.0)
    local = [SlowAverage(config, 1 / CLASSES) for _ in range(CLASSES)]

    def fixed(labeled: Rows, probs: Rows, positions: list[int]) -> tuple[list[int], list[float]]:
        probs = alignment(labeled, probs)
        return [argmax(p) for p in probs], [float(max(p) >= config.threshold) for p in probs]

    def flexmatch(labeled: Rows, probs: Rows, positions: list[int]) -> tuple[list[int], list[float]]:
        probs = alignment(labeled, probs)
        sigma = [sum(label == k for label in chosen.values()) for k in range(CLASSES)]
        weights = []
        for p in probs:
            beta = sigma[argmax(p)] / max(max(sigma), IMAGES - sum(sigma))
            weights.append(float(max(p) >= config.threshold * beta / (2 - beta)))
        for p, position in zip(probs, positions, strict=True):
            if max(p) >= config.threshold:
                chosen[position] = argmax(p)
        return [argmax(p) for p in probs], weights

    def freematch(labeled: Rows, probs: Rows, positions: list[int]) -> tuple[list[int], list[float]]:
        tau.update(mean([max(p) for p in probs]))
        tau.value = min(max(tau.value, config.global_floor), config.global_ceiling)
        for k in range(CLASSES):
            local[k].update(mean([p[k] for p in probs]))
        most = max(average.value for average in local)
        return [argmax(p) for p in probs], [float(max(p) >= tau.value * local[argmax(p)].value / most) for p in probs]

    def softmatch(labeled: Rows, probs: Rows, positions: list[int]) -> tuple[list[int], list[float]]:
        sure = [max(p) for p in alignment(labeled, probs)]
        variance.update(sum((c - mean(sure)) ** 2 for c in sure) / (len(sure) - 1))
        mu.update(mean(sure))
        spread = 2 * variance.value / config.sigmas**2
        return [argmax(p) for p in probs], [math.exp(-(min(c - mu.value, 0) ** 2) / spread) for c in sure]

    def adamatch(labeled: Rows, probs: Rows, positions: list[int]) -> tuple[list[int], list[float]]:
        threshold = config.threshold * mean([max(p) for p in labeled])
        probs = alignment(labeled, probs)
        return [argmax(p) for p in probs], [float(max(p) >= threshold) for p in probs]

    policies: dict[str, Slow] = {
        "fixed": fixed,
        "flexmatch": flexmatch,
        "freematch": freematch,
        "softmatch": softmatch,
        "adamatch": adamatch,
    }
    return policies[config.policy]


def test_each_policy_is_its_paper_image_by_image_over_steps(config) -> None:
    policy, slow = policy_of(config), slow_policy(config)
    kept = 0.0
    for labeled, weak, position in steps():
        ours = policy(labeled, weak, position)
        rows = [[softmax(row) for row in logits.double().tolist()] for logits in (labeled, weak)]
        labels, weights = slow(rows[0], rows[1], position.tolist())
        assert ours.label_U.tolist() == labels
        assert ours.weight_U.tolist() == pytest.approx(weights, abs=2e-5)
        assert 0 <= float(ours.weight_U.min()) <= float(ours.weight_U.max()) <= 1
        torch.testing.assert_close(ours.probs_UK.sum(1), torch.ones(8))
        kept += sum(weights)
    assert 0 < kept < 9 * 8  # the case says something


def test_state_goes_through_a_checkpoint_bit_for_bit(config, tmp_path) -> None:
    whole, first, second = policy_of(config), policy_of(config), policy_of(config)
    data = steps()
    for step in data[:5]:
        whole(*step), first(*step)
    checkpoints = Checkpoints(tmp_path, "outer")
    checkpoints.save(5, first.state_dict())
    checkpoint, _ = checkpoints.load()
    second.load_state_dict(checkpoint.tensors)
    for step in data[5:]:
        a, b = whole(*step), second(*step)
        assert torch.equal(a.weight_U, b.weight_U)
        assert torch.equal(a.probs_UK, b.probs_UK)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_evaluation_leaves_the_state_as_it_is(config) -> None:
    policy = policy_of(config)
    data = steps()
    policy(*data[0])
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.eval()(*data[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    policy.train()(*data[1])
    assert not before or any(not torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_no_gradient_flows_through_pseudo_labels(config) -> None:
    labeled, weak, position = steps(1)[0]
    pseudo = policy_of(config)(labeled.requires_grad_(), weak.requires_grad_(), position)
    assert not pseudo.label_U.requires_grad
    assert not pseudo.weight_U.requires_grad
    assert not pseudo.probs_UK.requires_grad


# ---- FlexMatch


def logits_for(labels: list[int]) -> torch.Tensor:
    """Logits that are sure of each label."""
    return 20.0 * torch.nn.functional.one_hot(torch.tensor(labels), CLASSES)


def flexmatch_after(labels: list[int], threshold: float = 0.9) -> torch.Tensor:
    """Thresholds [K] when image i was last predicted, surely, as labels[i]."""
    policy = policy_of(ThresholdConfig(policy="flexmatch", threshold=threshold))
    policy(torch.zeros(1, CLASSES), logits_for(labels), torch.arange(len(labels)))
    return policy.thresholds()


def test_flexmatch_with_all_images_used_evenly_is_the_fixed_threshold() -> None:
    torch.testing.assert_close(flexmatch_after([0, 1, 2] * 4), torch.full((3,), 0.9))


def test_flexmatch_maps_nothing_to_nothing_and_the_most_learned_class_to_the_threshold() -> None:
    # sigma 8, 4, 0 and no image unused: beta 1, 1/2, 0 and M(1/2) = 1/3
    torch.testing.assert_close(flexmatch_after([0] * 8 + [1] * 4), torch.tensor([0.9, 0.3, 0.0]))


def test_flexmatch_warms_up_while_most_images_are_unused() -> None:
    # sigma 2, 1, 0 and 9 unused: beta 2/9, 1/9, 0
    expected = torch.tensor([0.9 * (2 / 9) / (2 - 2 / 9), 0.9 * (1 / 9) / (2 - 1 / 9), 0.0])
    torch.testing.assert_close(flexmatch_after([0, 0, 1]), expected)


def test_flexmatch_takes_the_later_of_two_predictions_for_one_image() -> None:
    policy = policy_of(ThresholdConfig(policy="flexmatch"))
    logits = torch.cat([logits_for([0, 1, 2]), torch.zeros(1, 3)])  # the last one is unsure and counts for nothing
    policy(torch.zeros(1, CLASSES), logits, torch.tensor([5, 5, 7, 5]))
    assert policy.chosen_N.tolist() == [-1] * 5 + [1, -1, 2] + [-1] * 4
    assert policy.counts.tolist() == [10, 0, 1, 1]


# ---- running averages


def test_three_hundred_steps_forget_the_start_and_the_published_decay_does_not() -> None:
    weak = torch.log(torch.tensor([[0.8, 0.15, 0.05]]))
    taus = {}
    for warmup in (True, False):
        policy = policy_of(ThresholdConfig(policy="freematch", state_warmup=warmup))
        for _ in range(300):
            policy(weak, weak, torch.tensor([0]))
        taus[warmup] = float(policy.global_threshold)
    assert taus[True] == pytest.approx(0.8, abs=1e-4)
    assert taus[False] == pytest.approx(0.8 - 0.999**300 * (0.8 - 1 / 3), abs=1e-4)


def test_after_9000_steps_the_warm_up_is_over_and_the_decay_is_the_published_one() -> None:
    policy = policy_of(ThresholdConfig(policy="freematch"))
    policy.updates.fill_(9000)
    before = float(policy.global_threshold)
    policy(torch.zeros(1, 3), logits_for([0]), torch.tensor([0]))
    assert float(policy.global_threshold) == pytest.approx(0.999 * before + 0.001 * 1.0, abs=1e-7)


def test_alignment_brings_the_predicted_shares_to_the_target() -> None:
    generator = torch.Generator().manual_seed(1)
    weak = torch.randn(4000, 3, generator=generator) + torch.tensor([2.0, 0.0, 0.0])
    labeled = torch.log(torch.tensor([[0.2, 0.3, 0.5]]))
    for target, expected in (("uniform", [1 / 3] * 3), ("labeled", [0.2, 0.3, 0.5])):
        config = ThresholdConfig(alignment=True, alignment_target=target, state_decay=0.0)
        got = policy_of(config)(labeled, weak, torch.arange(4000)).probs_UK.mean(0)
        before = torch.softmax(weak, 1).mean(0)
        wrong = torch.tensor(expected)
        assert float((got - wrong).abs().sum()) < 0.25 * float((before - wrong).abs().sum())


# ---- FreeMatch's fairness


def slow_fairness(strong: Rows, weights: list[float], mean_k: list[float], share_k: list[float]) -> float:
    """sum_k P_k log Q_k over the classes that some kept strong view names."""
    kept = [softmax(row) for row, weight in zip(strong, weights, strict=True) if weight]
    past = [m / s if s else 0.0 for m, s in zip(mean_k, share_k, strict=True)]
    shares = [mean([float(argmax(p) == k) for p in kept]) for k in range(CLASSES)]
    now = [mean([p[k] for p in kept]) / shares[k] if shares[k] else 0.0 for k in range(CLASSES)]
    return sum(past[k] / sum(past) * math.log(now[k] / sum(now)) for k in range(CLASSES) if now[k])


@pytest.mark.parametrize("history", [[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])
def test_fairness_is_the_negative_cross_entropy_of_the_ratios(history) -> None:
    strong = steps(1)[0][1]
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    mean_K, share_K = torch.tensor([0.4, 0.35, 0.25]), torch.tensor(history)
    ours = fairness(strong, weight, mean_K, share_K)
    expected = slow_fairness(strong.double().tolist(), weight.tolist(), mean_K.tolist(), share_K.tolist())
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert ours.item() < 0


def test_classes_that_no_kept_strong_view_names_contribute_nothing_and_no_nan() -> None:
    strong = logits_for([0, 0, 1, 2]).div(5).requires_grad_()  # the one image of class 2 is not kept
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    even = torch.full((3,), 1 / 3)
    loss = fairness(strong, weight, even, even)
    expected = slow_fairness(strong.tolist(), weight.tolist(), even.tolist(), even.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert torch.isfinite(strong.grad).all()
    assert float(strong.grad[3].abs().sum()) == 0
    nothing = fairness(strong, torch.zeros(4), even, even)
    assert nothing.item() == 0
    assert torch.equal(torch.autograd.grad(nothing, strong)[0], torch.zeros(4, 3))


def descended(sign: float) -> torch.Tensor:
    """Mean strong probabilities [K] after descending sign * extra loss, from a batch that prefers class 0."""
    generator = torch.Generator().manual_seed(0)
    strong = (0.3 * torch.randn(60, 3, generator=generator) + torch.tensor([0.3, 0.0, 0.0])).requires_grad_()
    policy = policy_of(ThresholdConfig(policy="freematch", fairness_weight=1.0)).eval()  # an even history
    pseudo = policy(torch.zeros(1, 3), logits_for([0, 1, 2] * 20), torch.arange(60) % IMAGES)
    for _ in range(40):
        loss = policy.extra_loss(strong, pseudo)
        assert loss is not None
        (gradient,) = torch.autograd.grad(sign * loss, strong)
        strong = (strong - 2.0 * gradient).detach().requires_grad_()
    return torch.softmax(strong, 1).mean(0).detach()


def test_the_fairness_terms_sign_evens_out_the_strong_predictions() -> None:
    def entropy(p: torch.Tensor) -> float:
        return float(-(p * p.log()).sum())

    start, ours, other = descended(0.0), descended(1.0), descended(-1.0)
    assert start.argmax() == 0
    assert entropy(ours) > entropy(start) > entropy(other)
    assert ours[0] < start[0] < other[0]
    assert entropy(ours) > 0.995 * math.log(3)


# ---- the config


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"policy": "softmatch", "threshold": 0.8}, r"softmatch has no threshold; leave it at 0\.95"),
        ({"policy": "freematch", "alignment": True}, "freematch has no alignment"),
        ({"fairness_weight": 0.1}, "fixed has no fairness_weight"),
        ({"policy": "flexmatch", "threshold": 1.01}, "flexmatch is 1.01; at most 1"),
        ({"alignment_target": "uniform"}, "nothing is aligned"),
        ({"policy": "freematch", "global_floor": 0.9, "global_ceiling": 0.8}, r"0\.9 is above global_ceiling 0\.8"),
    ],
)
def test_knobs_that_would_do_nothing_are_refused(knobs, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ThresholdConfig(**knobs)


def test_what_is_published_is_aligned_without_being_told() -> None:
    assert [
        p for p in ("fixed", "flexmatch", "freematch", "softmatch", "adamatch") if ThresholdConfig(policy=p).aligns
    ] == [
        "softmatch",
        "adamatch",
    ]
    assert ThresholdConfig(policy="softmatch").aligns_to == "uniform"
    assert ThresholdConfig(policy="adamatch").aligns_to == "labeled"
