"""Features of many images, in chunks: a million take no more memory than a thousand.

N images, C images of a chunk, R some of them, F features.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdedge.errors import RunError

__all__ = ["WHOLE", "ScaledFeatures", "Share", "scaled_features"]

_CHUNK_IMAGES = 1024  # of 512 features 2 MiB, which stays in the cache of a core


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@final
@dataclass(frozen=True)
class Share:
    """Which chunks are this process's, where several share the work, and how a tensor is summed over all of them."""

    rank: int
    world: int
    total: Callable[[Tensor], Tensor]


WHOLE: Final = Share(0, 1, _as_it_is)
"""All chunks: there is one process."""


@final
@dataclass(frozen=True)
class ScaledFeatures:
    """Features of unit length, divided by `spread`, so that squared distances to the common mean average 1.

    The Student kernel with one degree of freedom expects distances of order 1.
    """

    features_NF: npt.NDArray[Any]  # as the network gave them: an array, or the memory map of a file
    spread: float
    chunk_images: int
    share: Share = WHOLE

    def __len__(self) -> int:
        return len(self.features_NF)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slice and features [C, F], float32, of this process's images in their order: chunks are dealt in turn."""
        for start in range(self.share.rank * self.chunk_images, len(self), self.share.world * self.chunk_images):
            part = slice(start, min(start + self.chunk_images, len(self)))
            yield part, self._scaled(self.features_NF[part])

    def rows(self, rows_R: npt.NDArray[np.int64]) -> Tensor:
        """Features [R, F] of some images, in the order asked for. All are in memory."""
        ascending = np.argsort(rows_R)  # a file is read forwards
        found_RF = np.empty((len(rows_R), self.features_NF.shape[1]), dtype=np.float32)
        for start in range(0, len(rows_R), self.chunk_images):
            part_R = ascending[start : start + self.chunk_images]
            found_RF[part_R] = self._scaled(self.features_NF[rows_R[part_R]]).numpy()
        return torch.from_numpy(found_RF)

    def _scaled(self, raw_CF: npt.NDArray[Any]) -> Tensor:
        features_CF = torch.from_numpy(np.array(raw_CF)).float()  # a copy: torch takes no read-only map
        _release(self.features_NF)
        return torch.nn.functional.normalize(features_CF, dim=1) / self.spread


def scaled_features(
    features_NF: npt.NDArray[Any], chunk_images: int = _CHUNK_IMAGES, share: Share = WHOLE
) -> ScaledFeatures:
    """Measure the spread, in two passes with sums in float64.

    RunError where a feature is not a finite number, or where all images have the same features.
    """
    unit = ScaledFeatures(features_NF, 1.0, chunk_images, share)
    total_F = torch.zeros(features_NF.shape[1], dtype=torch.float64)
    for part, unit_CF in unit.chunks():
        bad_C = ~torch.isfinite(unit_CF).all(1)
        if bad_C.any():
            raise RunError(
                f"The outer network's features of unlabeled image {part.start + int(bad_C.int().argmax())} are not "
                "finite numbers. Its training diverged: lower teacher.optim.learning_rate and train it again."
            )
        total_F += unit_CF.double().sum(0)
    mean_F = (share.total(total_F) / max(len(unit), 1)).float()
    squares = torch.zeros((), dtype=torch.float64)
    for _, unit_CF in unit.chunks():
        squares += (unit_CF - mean_F).pow(2).sum(dtype=torch.float64)
    spread = (float(share.total(squares)) / max(len(unit), 1)) ** 0.5
    if spread < 1e-6:  # what rounding to float32 leaves of equal features
        raise RunError(
            f"The outer network gives all {len(unit)} unlabeled images the same features, which no clustering can "
            "tell apart. It collapsed: look at its lines in metrics.jsonl, or set trust.filters=confidence."
        )
    return ScaledFeatures(features_NF, spread, chunk_images, share)


def _release(features_NF: npt.NDArray[Any]) -> None:
    """Give the pages of a mapped file back to the system, which still has them cached.

    Otherwise every page that was ever read counts as memory of this process.
    """
    if isinstance(features_NF.base, mmap.mmap):
        features_NF.base.madvise(mmap.MADV_DONTNEED)
