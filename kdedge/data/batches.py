"""What a step trains on, as a pure function of (seed, stage, step).

Nothing here holds a stream of random numbers: the images of a step and all draws of its views follow from the step's
number. A run that is stopped and resumed, or that skips to step 700, sees what an uninterrupted run sees there.

B labeled images, U unlabeled images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias, final

import torch
from torch import Tensor

from kdedge.data.contrastive_views import ContrastiveViewConfig, contrastive, contrastive_draws
from kdedge.data.store import Store
from kdedge.data.views import ViewConfig, normalize, strong, strong_draws, weak, weak_draws

__all__ = ["Batch", "Batches", "MakeViews", "Pool", "make_views", "share_rows", "step_seed"]

# Of uint8 images and their draws [D, n], for the first and for the second kind of view: all of them, in that order.
MakeViews: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pool:
    """The training images of a run, on the device that trains.

    `images` gives uint8 [n, C, H, W]; `labeled` and `unlabeled` are positions in it; `labels` belongs to `labeled`.
    `truth` [N] is for reporting only (-1 where unknown); no loss reads it.
    """

    images: Store
    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    truth: Tensor
    mean: Tensor  # [C, 1, 1] of pixel / 255
    std: Tensor


@dataclass(frozen=True)
class Batch:
    """`images` [B + 2 U, C, H, W], normalised: labeled images (weakly), then the unlabeled weakly, then strongly;
    or, where views are contrastive, all three by views of that one kind.

    They are one tensor because they pass through the network together. `position_B` and `position_U` are the places of
    the images in `Pool.unlabeled`: where the outer network's answers are found.

    Where several processes share a step, `images` are the rows of this one (`share_rows`), everything else is whole.
    """

    images: Tensor
    labels_B: Tensor
    position_B: Tensor
    position_U: Tensor
    truth_U: Tensor


def step_seed(*key: int | str) -> int:
    """A 63-bit seed from (seed, stage, step, ...): near keys give unrelated streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=8)
def _permutation(count: int, *key: int | str) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(*key)))


def _draw(count: int, batch: int, step: int, *key: int | str) -> Tensor:
    """Positions [batch]: step after step walks through one permutation of `count` after another.

    A batch may end one permutation and begin the next, so that an image is in it twice: no image is left out of an
    epoch. A contrastive loss then pushes it from itself; a images of one and b of the next share a * b / count on
    average.
    """
    start = step * batch
    parts = [torch.empty(0, dtype=torch.int64)]  # of no images, where the batch has none of this kind
    while (missing := batch - sum(len(part) for part in parts)) > 0:
        epoch, offset = divmod(start, count)
        part = _permutation(count, *key, epoch)[offset : offset + missing]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


def share_rows(count: int, rank: int, world: int) -> slice:
    """The rows of process `rank` of `world`: chunks in order, the first `count % world` of them one longer."""
    each, longer = divmod(count, world)
    start = rank * each + min(rank, longer)
    return slice(start, start + each + (rank < longer))


def make_views(
    views: ViewConfig | ContrastiveViewConfig,
    first_BCHW: Tensor,
    first_DB: Tensor,
    second_UCHW: Tensor,
    second_DU: Tensor,
    *,
    fixed_shapes: bool = False,
) -> Tensor:
    """Weak views of the first images and strong ones of the second, or contrastive ones of both; [B + U, C, H, W].

    `fixed_shapes` is that of `kdedge.data.views.strong`; contrastive views have none.
    """
    if isinstance(views, ContrastiveViewConfig):
        return torch.cat([contrastive(first_BCHW, views, first_DB), contrastive(second_UCHW, views, second_DU)])
    strongly = strong(second_UCHW, views, second_DU, fixed_shapes=fixed_shapes)
    return torch.cat([weak(first_BCHW, views, first_DB), strongly])


@final
class Batches:
    """The batches of one stage. `unlabeled_batch` of 0 gives labels only, `labeled_batch` of 0 images without.

    `views` says what is made of the images: weak and strong views, or two contrastive ones. `share` is (rank,
    processes).
    """

    def __init__(
        self,
        pool: Pool,
        views: ViewConfig | ContrastiveViewConfig,
        *,
        labeled_batch: int,
        unlabeled_batch: int,
        seed: int,
        stage: str,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.pool, self.views = pool, views
        self.labeled_batch, self.unlabeled_batch = labeled_batch, unlabeled_batch
        self.share = share
        self.make_views: MakeViews = partial(make_views, views)  # or one that is compiled (kdedge.train.engine)
        self._labeled = pool.labeled.cpu()
        self._key = (seed, stage)

    @property
    def images_per_step(self) -> int:
        """Images that pass through the network, in all processes together: labeled, weak and strong."""
        return self.labeled_batch + 2 * self.unlabeled_batch

    def at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        pool, device = self.pool, self.pool.images.device
        labeled, position_M = self._positions(step)
        images = self._images(step, position_M)
        pool.images.expect(self._read(self._positions(step + 1)[1]))
        position_B, position_U = position_M.to(device, non_blocking=True).tensor_split([self.labeled_batch])
        labels_B = pool.labels[labeled.to(device, non_blocking=True)]
        return Batch(images, labels_B, position_B, position_U, pool.truth[pool.unlabeled[position_U]])

    def places(self, step: int) -> tuple[Tensor, Tensor]:
        """Places in `Pool.unlabeled` of the labeled [B] and unlabeled [U] images of `step`; nothing is read."""
        labeled, unlabeled = self._positions(step)[1].tensor_split([self.labeled_batch])
        return labeled, unlabeled

    def _positions(self, step: int) -> tuple[Tensor, Tensor]:
        """Which labeled images [B], and the places in the pool of labeled and unlabeled images [B + U]; on the CPU."""
        labeled = _draw(len(self._labeled), self.labeled_batch, step, *self._key, "labeled")
        parts = [self._labeled[labeled]]  # Pool.unlabeled counts through Pool.images, so places agree
        if self.unlabeled_batch:
            parts.append(_draw(len(self.pool.unlabeled), self.unlabeled_batch, step, *self._key, "unlabeled"))
        return labeled, torch.cat(parts)

    def _rows(self) -> tuple[slice, slice]:
        """This process's images among the [B + U] that are viewed weakly, and among the [U] viewed strongly."""
        weakly = self.labeled_batch + self.unlabeled_batch
        rows = share_rows(self.images_per_step, *self.share)
        return (
            slice(min(rows.start, weakly), min(rows.stop, weakly)),
            slice(max(rows.start - weakly, 0), max(rows.stop - weakly, 0)),
        )

    def _read(self, position_M: Tensor) -> Tensor:
        """The places [R] that this process reads: each once, though most are viewed twice."""
        weakly, strongly = self._rows()
        places: Tensor = torch.unique(torch.cat([position_M[weakly], position_M[self.labeled_batch :][strongly]]))
        return places

    def _images(self, step: int, position_M: Tensor) -> Tensor:
        """The rows of this process, normalised. All draws are made whole, so these are rows of the whole."""
        generator = torch.Generator().manual_seed(step_seed(*self._key, "views", step))
        labeled, unlabeled = self.labeled_batch, len(position_M) - self.labeled_batch
        first_DM = torch.cat([self._draws(count, generator, 0) for count in (labeled, unlabeled)], dim=1)
        second_DU = self._draws(unlabeled, generator, 1)
        weakly, strongly = self._rows()
        read = self._read(position_M)
        images_R = self.pool.images.rows(read)
        row_M = torch.searchsorted(read, position_M).clamp_(max=len(read) - 1)
        row_M = row_M.to(images_R.device, non_blocking=True)
        first, second = images_R[row_M[weakly]], images_R[row_M[self.labeled_batch :][strongly]]
        # In float32 whatever the step computes in: else a plan would change what the network sees.
        with torch.autocast(images_R.device.type, enabled=False):
            views = self.make_views(first, first_DM[:, weakly], second, second_DU[:, strongly])
            return normalize(views, self.pool.mean, self.pool.std)

    def _draws(self, count: int, generator: torch.Generator, which: int) -> Tensor:
        """For the first or the second view of `count` images, [D, count]."""
        if isinstance(self.views, ContrastiveViewConfig):
            return contrastive_draws(count, self.views, generator)
        return strong_draws(count, self.views, generator) if which else weak_draws(count, generator)
