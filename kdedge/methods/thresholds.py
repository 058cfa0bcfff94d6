"""Which pseudo labels count, and how much: FixMatch's fixed threshold and those of its successors.

Each policy is a small final module. Its state (what it has seen so far) is persistent buffers and changes in train mode
only, so that a checkpoint of the method resumes it bit for bit. No gradient flows through any of it, but through the
strong views in FreeMatch's extra loss.

AdaMatch's random logit interpolation is left out: it needs a second pass over the labeled images alone.

B labeled images, U unlabeled images of a step, N all unlabeled images of the run, K classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdedge.config import Config
from kdedge.losses.consistency import fairness

__all__ = ["Policy", "PseudoLabels", "ThresholdConfig", "make_policy"]

Fraction = Annotated[float, Field(ge=0, le=1)]

# The knobs that a policy reads beside its name; `state_*` are also read wherever probabilities are aligned.
_KNOBS = {
    "fixed": {"threshold", "alignment", "alignment_target", "state_decay", "state_warmup"},
    "flexmatch": {"threshold", "alignment", "alignment_target", "state_decay", "state_warmup"},
    "freematch": {"fairness_weight", "global_floor", "global_ceiling", "state_decay", "state_warmup"},
    "softmatch": {"sigmas", "alignment", "alignment_target", "state_decay", "state_warmup"},
    "adamatch": {"threshold", "alignment", "alignment_target", "state_decay", "state_warmup"},
}


class ThresholdConfig(Config):
    """One of five policies and its knobs; a knob that the policy does not read is refused.

    The published settings are the defaults, but for `state_warmup`.
    """

    policy: Literal["fixed", "flexmatch", "freematch", "softmatch", "adamatch"] = "fixed"
    threshold: Annotated[float, Field(ge=0)] = 0.95  # fixed, flexmatch, adamatch; above 1 fixed never keeps a label
    alignment: bool | None = None  # of the predicted classes' shares; null: as published, softmatch and adamatch only
    alignment_target: Literal["labeled", "uniform"] | None = None  # null: as published, uniform for softmatch only
    sigmas: Annotated[float, Field(gt=0)] = 2.0  # softmatch: n of the Gaussian's width
    fairness_weight: Annotated[float, Field(ge=0)] = 0.001  # freematch; 0.001 in the configs of its authors' library
    global_floor: Fraction = 0.0  # freematch: clip of the global threshold; 0.9 and 0.95 are its SVHN settings
    global_ceiling: Fraction = 1.0
    state_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # of all running averages here
    state_warmup: bool = True  # min(state_decay, (1 + k) / (10 + k)): else 300 steps leave 74 % of the arbitrary start

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, field in type(self).model_fields.items():
            if name != "policy" and getattr(self, name) != field.default and name not in _KNOBS[self.policy]:
                raise ValueError(f"The policy {self.policy} has no {name}; leave it at {field.default}.")
        if self.policy == "flexmatch" and self.threshold > 1:
            raise ValueError(f"The threshold of flexmatch is {self.threshold}; at most 1 was expected.")
        if self.alignment_target is not None and not self.aligns:
            raise ValueError("alignment_target is set, but nothing is aligned; set alignment to true.")
        if self.global_floor > self.global_ceiling:
            raise ValueError(f"global_floor {self.global_floor} is above global_ceiling {self.global_ceiling}.")
        return self

    @property
    def aligns(self) -> bool:
        """`alignment`, or what was published."""
        return self.policy in ("softmatch", "adamatch") if self.alignment is None else self.alignment

    @property
    def aligns_to(self) -> str:
        """`alignment_target`, or what was published."""
        return self.alignment_target or ("uniform" if self.policy == "softmatch" else "labeled")


@dataclass(frozen=True)
class PseudoLabels:
    """What the weak views say: label [U], weight [U] in 0..1, and probabilities [U, K], aligned where labels are."""

    label_U: Tensor
    weight_U: Tensor
    probs_UK: Tensor


class Policy(nn.Module, ABC):
    """Abstract; every policy is final."""

    @abstractmethod
    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        """Pseudo labels from the logits of the weak views; `position` is the place of each image among all N."""

    def extra_loss(self, strong_UK: Tensor, pseudo: PseudoLabels) -> Tensor | None:
        """A term to add to the loss, already weighted, from the logits of the strong views."""
        return None


def make_policy(config: ThresholdConfig, classes: int, unlabeled_images: int) -> Policy:
    """The policy that `config` names, at its start. `unlabeled_images` is N, the length of `Pool.unlabeled`."""
    match config.policy:
        case "fixed":
            return _Fixed(config, classes)
        case "flexmatch":
            return _FlexMatch(config, classes, unlabeled_images)
        case "freematch":
            return _FreeMatch(config, classes)
        case "softmatch":
            return _SoftMatch(config, classes)
        case "adamatch":
            return _AdaMatch(config, classes)


def _probs(logits: Tensor) -> Tensor:
    return torch.softmax(logits.detach().float(), dim=1)


def _average(pairs: list[tuple[Tensor, Tensor]], updates: Tensor, config: ThresholdConfig) -> None:
    """average += (1 - decay) * (value - average) for each (average, value), and count one update.

    The decay is tensor arithmetic: reading the count on the host would make every step wait for the device.
    """
    decay = (1 + updates) / (10 + updates) if config.state_warmup else torch.ones_like(updates, dtype=torch.float32)
    rest = 1 - decay.clamp(max=config.state_decay)
    for average, value in pairs:
        average.lerp_(value, rest)
    updates += 1


@final
class _Alignment(nn.Module):
    """p <- normalise(p * target / running mean of p): predicted classes take the shares of the target.

    Distribution alignment, ReMixMatch (arXiv 1911.09785). The target is even, or the running mean of the
    predictions on labeled images (AdaMatch, arXiv 2106.04732).
    """

    model_K: Tensor
    target_K: Tensor
    updates: Tensor

    def __init__(self, config: ThresholdConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("model_K", torch.full((classes,), 1 / classes))
        self.register_buffer("target_K", torch.full((classes,), 1 / classes))
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def forward(self, labeled_probs_BK: Tensor, probs_UK: Tensor) -> Tensor:
        if self.training:
            # The first batch is a better start than even shares, which would leave it as it is.
            self.model_K.copy_(torch.where(self.updates == 0, probs_UK.mean(0), self.model_K))
            pairs = [(self.model_K, probs_UK.mean(0))]
            if self.config.aligns_to == "labeled":
                pairs.append((self.target_K, labeled_probs_BK.mean(0)))
            _average(pairs, self.updates, self.config)
        aligned_UK = probs_UK * (self.target_K + 1e-6) / (self.model_K + 1e-6)  # 1e-6: a class never predicted
        return aligned_UK / aligned_UK.sum(1, keepdim=True)


@final
class _Fixed(Policy):
    """Weight 1 where max q >= threshold (FixMatch, arXiv 2001.07685, eq. 4)."""

    def __init__(self, config: ThresholdConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.alignment = _Alignment(config, classes) if config.aligns else None

    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        probs_UK = _probs(weak_UK)
        if self.alignment is not None:
            probs_UK = self.alignment(_probs(labeled_BK), probs_UK)
        confidence_U, label_U = probs_UK.max(1)
        return PseudoLabels(label_U, (confidence_U >= self.config.threshold).float(), probs_UK)


@final
class _FlexMatch(Policy):
    """Weight 1 where max q >= threshold * M(beta_c) for the predicted class c (arXiv 2110.08263).

    sigma_c is the number of images whose latest prediction of at least `threshold` was c, beta_c = sigma_c /
    max(max sigma, number of images without such a prediction), and M(x) = x / (2 - x). As in the authors' code, a step
    is judged by the counts of the steps before it; the first keeps everything.
    """

    chosen_N: Tensor
    counts: Tensor

    def __init__(self, config: ThresholdConfig, classes: int, unlabeled_images: int) -> None:
        super().__init__()
        self.config = config
        self.alignment = _Alignment(config, classes) if config.aligns else None
        counts = torch.zeros(classes + 1, dtype=torch.long)
        counts[0] = unlabeled_images
        self.register_buffer("counts", counts)  # of each value of chosen, from -1 on
        self.register_buffer("chosen_N", torch.full((unlabeled_images,), -1))  # latest confident prediction, -1: none

    @torch.no_grad()
    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        probs_UK = _probs(weak_UK)
        if self.alignment is not None:
            probs_UK = self.alignment(_probs(labeled_BK), probs_UK)
        confidence_U, label_U = probs_UK.max(1)
        weight_U = (confidence_U >= self.thresholds()[label_U]).float()
        if self.training:
            self._note(position_U, label_U, confidence_U >= self.config.threshold)
        return PseudoLabels(label_U, weight_U, probs_UK)

    def thresholds(self) -> Tensor:
        """The threshold of each class [K], as the next step will use it."""
        beta_K = self.counts[1:] / self.counts.max()
        return self.config.threshold * beta_K / (2 - beta_K)

    def _note(self, position_U: Tensor, label_U: Tensor, confident_U: Tensor) -> None:
        """Where an image is twice in a batch the later one counts; plain indexing would leave that to chance.

        Sums of whole numbers, with 0 for what changes nothing: exact in any order, and nothing of length N is read.
        """
        same_UU = (position_U.unsqueeze(1) == position_U) & confident_U
        noted_U = confident_U & ~same_UU.triu(1).any(1)
        before_U = self.chosen_N[position_U]
        self.counts.index_add_(0, before_U + 1, -noted_U.long())
        self.counts.index_add_(0, label_U + 1, noted_U.long())
        self.chosen_N.index_add_(0, position_U, (label_U - before_U) * noted_U)


@final
class _FreeMatch(Policy):
    """Weight 1 where max q >= tau * p_c / max p for the predicted class c (arXiv 2205.07246).

    tau, p and h are running averages of the mean confidence, of the mean probability of each class and of the shares
    of the predicted classes, all started at 1 / K; the step itself is in them. `extra_loss` is the fairness term.
    """

    global_threshold: Tensor
    mean_K: Tensor
    share_K: Tensor
    updates: Tensor

    def __init__(self, config: ThresholdConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("global_threshold", torch.tensor(1 / classes))
        self.register_buffer("mean_K", torch.full((classes,), 1 / classes))
        self.register_buffer("share_K", torch.full((classes,), 1 / classes))
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        probs_UK = _probs(weak_UK)
        confidence_U, label_U = probs_UK.max(1)
        if self.training:
            share_K = torch.zeros_like(self.share_K).scatter_add_(0, label_U, torch.ones_like(confidence_U))
            pairs = [(self.global_threshold, confidence_U.mean()), (self.mean_K, probs_UK.mean(0))]
            _average([*pairs, (self.share_K, share_K / len(label_U))], self.updates, self.config)
            self.global_threshold.clamp_(self.config.global_floor, self.config.global_ceiling)
        return PseudoLabels(label_U, (confidence_U >= self.thresholds()[label_U]).float(), probs_UK)

    def thresholds(self) -> Tensor:
        """The threshold of each class [K]."""
        return self.global_threshold * self.mean_K / self.mean_K.max()

    def extra_loss(self, strong_UK: Tensor, pseudo: PseudoLabels) -> Tensor | None:
        if self.config.fairness_weight == 0:
            return None
        return self.config.fairness_weight * fairness(strong_UK, pseudo.weight_U, self.mean_K, self.share_K)


@final
class _SoftMatch(Policy):
    """Weight exp(-min(c - mu, 0)^2 / (2 sigma^2 / n^2)) of the confidence c (SoftMatch, arXiv 2301.10921).

    mu and sigma^2 are running averages of mean and variance of c, started at 1 / K and 1; the step itself is in them.
    c, and so mu and sigma, are those of the aligned probabilities, as in the authors' code; labels are the plain ones.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, config: ThresholdConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.alignment = _Alignment(config, classes) if config.aligns else None
        self.register_buffer("mean", torch.tensor(1 / classes))
        self.register_buffer("variance", torch.tensor(1.0))
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        probs_UK = _probs(weak_UK)
        aligned_UK = probs_UK if self.alignment is None else self.alignment(_probs(labeled_BK), probs_UK)
        confidence_U = aligned_UK.amax(1)
        if self.training:
            correction = min(1, len(confidence_U) - 1)  # one image has no unbiased variance
            variance, mean = torch.var_mean(confidence_U, correction=correction)
            _average([(self.mean, mean), (self.variance, variance)], self.updates, self.config)
        short_U = (confidence_U - self.mean).clamp(max=0)
        spread = 2 * self.variance.clamp(min=1e-8) / self.config.sigmas**2  # 0 where all answers are equally sure
        return PseudoLabels(probs_UK.argmax(1), torch.exp(-short_U.square() / spread), probs_UK)


@final
class _AdaMatch(Policy):
    """Weight 1 where max q >= threshold * mean confidence on the labeled images (arXiv 2106.04732)."""

    def __init__(self, config: ThresholdConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.alignment = _Alignment(config, classes) if config.aligns else None

    def forward(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        labeled_probs_BK, probs_UK = _probs(labeled_BK), _probs(weak_UK)
        threshold = self.config.threshold * labeled_probs_BK.amax(1).mean()
        if self.alignment is not None:
            probs_UK = self.alignment(labeled_probs_BK, probs_UK)
        confidence_U, label_U = probs_UK.max(1)
        return PseudoLabels(label_U, (confidence_U >= threshold).float(), probs_UK)
