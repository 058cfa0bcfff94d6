"""What a file says of the gate images beside what FP32 says: how much accuracy it loses, in points of a hundred.

*Expected loss.* Where FP32 says class a and the file says b, as many right answers are lost as images are a, and won as
are b: p(a) - p(b) by FP32's own probabilities, none where the class is the same. That needs no labels, and it is far
surer than counting them. On 1,000 gate images of six families (21 files) labels tell the loss within 0.2 to 1.1 points,
one standard error, and this within 0.005 to 0.22: what was lost by luck or won by luck is not in it. So it cannot be
searched for luck. An EfficientNet-B0 that changed 15 of 100 classes lost 2.2 points by those labels (0.4 to 4.1); a
search over its layers found a file that lost 0.7 by them, and 12 of 100 classes still changed. This says 1.7 of the
first, and 1.9 of 2,000 other images, half of them known to training, whose labels say 3.3 (1.9 to 4.7). Files of the
other families: 0.01 to 0.26 here; labels -0.3 to 0.5, each within 0.4.

Probabilities have to be right for that, and labels say how sharp they are: one temperature (Guo et al. 2017, arXiv
1706.04599, section 4.2), near 1 where labels are few. On images that training knew, as labelled ones are, it comes out
too sharp rather than too flat, which makes the loss larger, not smaller. With fewer labels than FEW nobody can say, and
logits of a small scale would promise that no change costs anything; there a change costs at least a tenth of an image.
That is what the costliest of seven students paid: 0.43 points for 4.9 of 100 classes changed, the others 0.02 to 0.09.

N images, K classes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.intervals import tango, wilson

__all__ = ["Agreement", "Points", "agreement", "temperature"]

Logits = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]
Points = tuple[float, float]
TEMPERATURES = np.geomspace(0.01, 20.0, 153)
FEW = 50  # labels; fewer do not tell how sharp FP32 is
LEAST_COST = 0.1  # of a changed class where labels are few, in images
SPREAD = 0.5  # of log T before any label is seen: most trained networks lie between 0.6 and 1.6
LEAST = 1e-12  # of a probability, where a file gives these and not logits


@dataclass(frozen=True)
class Agreement:
    """A file beside FP32 on the same gate images, in points: images of a hundred. None: not measured.

    `drop_points` is what the budget is for: the expected loss of accuracy (above). It never exceeds the disagreement.
    `accuracy_drop_points`: of labelled images, those only FP32 has right, less those only the file has. Each with its
    95 % interval: Wilson's for shares, Tango's (1998) for the paired difference.
    """

    images: int
    drop_points: float | None
    drop_interval_points: Points | None
    disagreement_points: float | None
    interval_points: Points | None
    labeled_images: int
    accuracy_drop_points: float | None
    accuracy_interval_points: Points | None
    # Mean KL(FP32 || the file) in nats: finer than whole classes, it breaks ties between calibrators.
    divergence: float | None
    temperature: float | None = None

    def within(self, max_drop_points: float) -> bool:
        """The point estimate keeps the budget, and no labels refute it; without images nothing does."""
        return (
            self.drop_points is not None and self.drop_points <= max_drop_points and not self.refuted(max_drop_points)
        )

    def refuted(self, max_drop_points: float) -> bool:
        """Labels are sure of a loss beyond the budget, whatever FP32's probabilities promise."""
        return self.accuracy_interval_points is not None and self.accuracy_interval_points[0] > max_drop_points

    def surely_beyond(self, max_drop_points: float) -> bool:
        low = self.drop_interval_points[0] if self.drop_interval_points else 0.0
        return low > max_drop_points or self.refuted(max_drop_points)

    def to_json(self) -> dict[str, Any]:
        """With lists for pairs, as it is read back from a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Agreement":
        pairs = {key: tuple(value) for key, value in document.items() if isinstance(value, list)}
        return cls(**{**document, **pairs})


def agreement(fp32: Logits, other: Logits, labels: npt.NDArray[np.int64]) -> Agreement:
    """Both logits [N, K], or both probabilities; labels [N] with -1 where the class is not known."""
    if len(fp32) == 0:
        return Agreement(0, None, None, None, None, 0, None, None, None)
    images = len(fp32)
    ours, theirs = other.argmax(1), fp32.argmax(1)
    known = labels >= 0
    count = int(known.sum())
    differ = float((ours != theirs).mean())
    lost = int(((theirs == labels) & (ours != labels) & known).sum())
    won = int(((theirs != labels) & (ours == labels) & known).sum())
    probabilities = _are_probs(fp32)  # of FP32; a file that clips them ends in the same kind
    log_p, log_q = _log_probs(fp32, probabilities), _log_probs(other, probabilities)
    sharp = temperature(fp32, labels)
    probs, each = np.exp(_log_softmax(log_p / sharp)), np.arange(images)
    losses = probs[each, theirs] - probs[each, ours]
    if count < FEW:
        losses = np.where(ours == theirs, 0.0, np.maximum(losses, LEAST_COST))
    return Agreement(
        images=images,
        drop_points=100 * float(losses.mean()),
        drop_interval_points=_points(_loss_interval(losses[ours != theirs], images)),
        disagreement_points=100 * differ,
        interval_points=_points(wilson(differ, images)),
        labeled_images=count,
        accuracy_drop_points=100 * (lost - won) / count if count else None,
        accuracy_interval_points=_points(tango(lost, won, count)) if count else None,
        divergence=float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
        temperature=sharp,
    )


def temperature(logits: Logits, labels: npt.NDArray[np.int64]) -> float:
    """The T for which softmax(logits / T) fits the known `labels` (-1: not known) best; 1 without any.

    The most probable one where log T is normal around 0 with SPREAD: a few labels that are all right must not make
    FP32 sure of everything, nor a few wrong ones of nothing.
    """
    known = labels >= 0
    if not known.any():
        return 1.0
    log_p, chosen = _log_probs(logits[known], _are_probs(logits)), labels[known]
    costs = [
        float(-np.take_along_axis(_log_softmax(log_p / t), chosen[:, None], 1).sum()) + (np.log(t) / SPREAD) ** 2 / 2
        for t in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(costs))])


def _loss_interval(costs: Reals, images: int) -> tuple[float, float]:
    """95 % interval of the loss an image, from what each changed class of `images` costs, 0 to 1.

    Wilson's, for as many trials as would spread like them. That one knows nothing of costs it has not met, so its end
    is at least that of the share of changes times their mean cost with one more that costs a whole image: without that,
    one change near a tie among 100 would look surer than none.
    """
    changed = len(costs)
    values = np.concatenate([costs, np.zeros(images - changed)])
    mean, variance = float(values.mean()), float(values.var())
    low, high = wilson(mean, images * (mean * (1 - mean) / variance if variance > 0 else 1.0))
    dearest = (float(costs.sum()) + 1) / (changed + 1)
    return low, max(high, wilson(changed / images, images)[1] * dearest)


def _points(fractions: tuple[float, float]) -> Points:
    return 100 * fractions[0], 100 * fractions[1]


def _are_probs(outputs: Logits) -> bool:
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(1), 1.0, atol=1e-3))


def _log_probs(outputs: Logits, probs: bool) -> Reals:
    """Of logits; of probabilities, which networks trained elsewhere may end in, their own logarithms."""
    values = outputs.astype(np.float64)
    return _log_softmax(np.log(np.maximum(values, LEAST)) if probs else values)


def _log_softmax(values: Reals) -> Reals:
    shifted = values - values.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
