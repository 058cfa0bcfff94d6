"""What ships: INT8 where it decides as FP32 does and is not slower, measured; else FP32. The gate split alone decides.

A point is one image of a hundred. The budget is on disagreement (another class than FP32 gives), which needs no labels
and is never below the loss of accuracy on the same images; where gate images have labels, their loss counts as well.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdedge.intervals import wilson

__all__ = ["Agreement", "Decision", "agreement", "decide"]

Logits = npt.NDArray[np.float32]
MIN_LABELED = 50  # below, one image is more than two points, and a single flip would decide


@dataclass(frozen=True)
class Agreement:
    """INT8 beside FP32 on the gate images, with a 95 % Wilson interval of the disagreement. None: not measured."""

    images: int
    disagreement_points: float | None
    interval_points: tuple[float, float] | None
    labeled_images: int
    accuracy_drop_points: float | None
    # Mean KL(FP32 || INT8) in nats: finer than whole classes, it breaks ties between calibrators.
    divergence: float | None

    @property
    def drop_points(self) -> float | None:
        """The larger of disagreement and loss of accuracy."""
        if self.disagreement_points is None:
            return None
        return max(self.disagreement_points, self.accuracy_drop_points or 0.0)


def agreement(fp32: Logits, int8: Logits, labels: npt.NDArray[np.int64]) -> Agreement:
    """Both logits [N, K]; labels [N] with -1 where the class is not known."""
    if len(fp32) == 0:
        return Agreement(0, None, None, 0, None, None)
    ours, theirs = int8.argmax(1), fp32.argmax(1)
    differ = int((ours != theirs).sum())
    low, high = wilson(differ / len(fp32), len(fp32))
    known = labels >= 0
    drop = None
    if known.sum() >= MIN_LABELED:
        drop = 100 * float((theirs == labels)[known].mean() - (ours == labels)[known].mean())
    log_p, log_q = _log_softmax(fp32), _log_softmax(int8)
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    return Agreement(
        images=len(fp32),
        disagreement_points=100 * differ / len(fp32),
        interval_points=(100 * low, 100 * high),
        labeled_images=int(known.sum()),
        accuracy_drop_points=drop,
        divergence=divergence,
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


@dataclass(frozen=True)
class Decision:
    """`verdict` says what the measurement shows of INT8, `shipped` what is done about it, `why` both in a sentence."""

    shipped: Literal["fp32", "int8"]
    verdict: Literal["pass", "fail", "cannot tell", "undecided"]
    speedup: float | None
    drop_points: float | None
    why: str

    def to_json(self, found: Agreement | None, max_drop_points: float) -> dict[str, Any]:
        compared = asdict(found) if found else {}
        interval = compared.pop("interval_points", None)
        return asdict(self) | {
            "drop_points_interval": list(interval) if interval else None,
            "max_drop_points": max_drop_points,
            "agreement": compared or None,
        }


def decide(found: Agreement | None, speedup: float | None, max_drop_points: float) -> Decision:
    """`found` None: no INT8 file was asked for. `speedup`: FP32's median latency over INT8's; None: not measured."""
    if found is None:
        return Decision("fp32", "undecided", None, None, "FP32 is shipped, because no INT8 file was asked for.")
    drop = found.drop_points
    if drop is None or found.interval_points is None:
        return Decision(
            "fp32",
            "cannot tell",
            speedup,
            None,
            "FP32 is shipped, because there are no gate images to compare INT8 on.",
        )
    told = _told(found)
    if drop > max_drop_points:
        unsure = found.interval_points[0] <= max_drop_points and drop == found.disagreement_points
        why = f"FP32 is shipped, because {told}, and {max_drop_points:g} is allowed."
        return Decision("fp32", "cannot tell" if unsure else "fail", speedup, drop, why)
    if speedup is None:
        why = f"FP32 is shipped, because the latency of INT8 was not measured; {told}."
        return Decision("fp32", "cannot tell", None, drop, why)
    if speedup < 1.0:
        why = f"FP32 is shipped, because INT8 is slower here ({_times(speedup)} the speed of FP32), though {told}."
        return Decision("fp32", "fail", speedup, drop, why)
    unsure = found.interval_points[1] > max_drop_points
    doubt = f"; so few images cannot rule out a drop above {max_drop_points:g}" if unsure else ""
    why = f"INT8 is shipped: it runs at {_times(speedup)} the speed of FP32 here, and {told}{doubt}."
    return Decision("int8", "cannot tell" if unsure else "pass", speedup, drop, why)


def _times(speedup: float) -> str:
    """Two digits, or as many as tell a near tie from a tie."""
    return f"{speedup:.2f} times" if abs(speedup - 1) >= 0.005 else f"{speedup:.4f} times"


def _told(found: Agreement) -> str:
    low, high = found.interval_points or (0.0, 0.0)
    text = (
        f"INT8 gives another class than FP32 for {found.disagreement_points:.2f} of 100 gate images "
        f"(95 % interval {low:.2f} to {high:.2f}, {found.images} images)"
    )
    if found.accuracy_drop_points is not None:
        text += (
            f" and loses {found.accuracy_drop_points:.2f} points of accuracy on {found.labeled_images} labelled ones"
        )
    return text
