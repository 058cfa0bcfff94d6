"""What a file says of the gate images beside what FP32 says of them: how much it loses, in points of a hundred images.

N images, K classes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.intervals import tango, wilson

__all__ = ["Agreement", "Points", "agreement"]

Logits = npt.NDArray[np.float32]
Points = tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """A file beside FP32 on the same gate images, in points: images of a hundred. None: not measured.

    `drop_points` is what the budget is for: a labelled image counts as lost where only FP32 is right, as won where only
    the file is, an unlabeled one as lost where its class changes. Without labels that is the disagreement, which no
    loss of accuracy can exceed; with all of them it is the loss of accuracy. Each with its 95 % interval: paired (Tango
    1998) where labels count, else Wilson's.
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

    def within(self, max_drop_points: float) -> bool:
        """The point estimate keeps the budget; without images nothing does."""
        return self.drop_points is not None and self.drop_points <= max_drop_points

    def to_json(self) -> dict[str, Any]:
        """With lists for pairs, as it is read back from a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Agreement":
        pairs = {key: tuple(value) for key, value in document.items() if isinstance(value, list)}
        return cls(**{**document, **pairs})


def agreement(fp32: Logits, other: Logits, labels: npt.NDArray[np.int64]) -> Agreement:
    """Both logits [N, K]; labels [N] with -1 where the class is not known."""
    if len(fp32) == 0:
        return Agreement(0, None, None, None, None, 0, None, None, None)
    images = len(fp32)
    ours, theirs = other.argmax(1), fp32.argmax(1)
    known = labels >= 0
    count = int(known.sum())
    differ = int((ours != theirs).sum())
    lost = int(((theirs == labels) & (ours != labels) & known).sum())
    won = int(((theirs != labels) & (ours == labels) & known).sum())
    changed = int(((ours != theirs) & ~known).sum())
    disagreement, interval = 100 * differ / images, _points(wilson(differ / images, images))
    log_p, log_q = _log_softmax(fp32), _log_softmax(other)
    return Agreement(
        images=images,
        drop_points=100 * (lost + changed - won) / images,
        drop_interval_points=_points(tango(lost + changed, won, images)) if count else interval,
        disagreement_points=disagreement,
        interval_points=interval,
        labeled_images=count,
        accuracy_drop_points=100 * (lost - won) / count if count else None,
        accuracy_interval_points=_points(tango(lost, won, count)) if count else None,
        divergence=float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
    )


def _points(fractions: tuple[float, float]) -> Points:
    return 100 * fractions[0], 100 * fractions[1]


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
