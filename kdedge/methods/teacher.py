"""The teacher of a distillation: stored answers, or a frozen network that sees the student's own views.

N all unlabeled images of the run, M images of a pass, C channels, H and W pixels, F features, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdedge.errors import BugError
from kdedge.models.zoo import Network, count_macs

__all__ = ["Answers", "LiveTeacher", "MiddleLayer", "StoredTeacher", "Teacher", "ask", "middle_layer"]


@dataclass(frozen=True)
class Answers:
    """Logits [M, K], pooled features [M, F], and the map [M, C, H, W] of the middle layer where it was asked for."""

    logits_MK: Tensor
    features_MF: Tensor | None
    map_MCHW: Tensor | None = None

    def rows(self, rows: Tensor) -> "Answers":
        """The answers for some of the images."""
        parts = (self.features_MF, self.map_MCHW)
        return Answers(self.logits_MK[rows], *(None if part is None else part[rows] for part in parts))


@dataclass(frozen=True)
class MiddleLayer:
    """A layer of a backbone by name, and the channels of the map it gives."""

    name: str
    channels: int


def ask(network: Network, images_MCHW: Tensor, middle: MiddleLayer | None = None) -> Answers:
    """One pass of `network`, in float32 whatever it computes in; the logits are those of `network(images)`."""
    with _watched(network.backbone, middle) as maps:
        features_MF = network.embed(images_MCHW)
    map_MCHW = torch.cat(maps).float() if maps else None  # one of each part (kdedge.train.parts)
    return Answers(network.head(features_MF).float(), features_MF.float(), map_MCHW)


@contextmanager
def _watched(backbone: nn.Module, middle: MiddleLayer | None) -> Iterator[list[Tensor]]:
    """The middle layer's map, once the backbone has run inside the block.

    By a hook that lives as long as the block: backbones are torchvision's and timm's, whose forward cannot be entered
    half way, and tracing them into graphs does not work for all.
    """
    maps: list[Tensor] = []
    if middle is None:
        yield maps
        return
    handle = backbone.get_submodule(middle.name).register_forward_hook(lambda _, __, output: maps.append(output))
    try:
        yield maps
    finally:
        handle.remove()


@torch.no_grad()
def middle_layer(network: Network) -> MiddleLayer:
    """The last block of the backbone before the second half of its halvings: 32, 16, 8 px give the one of 16.

    Found by one image of 64 px: of the layers whose map has that side, the last among those nested least deeply.
    """
    seen: list[tuple[str, int, int]] = []  # name, side, channels, in the order in which layers finish

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:  # 1: squeeze and excite
                seen.append((name, output.shape[2], output.shape[1]))

        return hook

    backbone = network.backbone
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    image = first.weight.new_zeros(1, first.in_channels, 64, 64)
    handles = [module.register_forward_hook(note(name)) for name, module in backbone.named_modules() if name]
    was_training = network.training
    try:
        network.eval()(image)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    sides = sorted({side for _, side, _ in seen}, reverse=True)
    candidates = [(name, channels) for name, side, channels in seen if side == sides[len(sides) // 2]]
    depth = min(name.count(".") for name, _ in candidates)
    name, channels = [c for c in candidates if c[0].count(".") == depth][-1]
    return MiddleLayer(name, channels)


class Teacher(ABC):
    """Abstract; every teacher is final. Not a module: no optimizer, checkpoint or `train()` can reach it."""

    @property
    @abstractmethod
    def num_features(self) -> int | None:
        """F, or None where there are no features."""

    @property
    def flops_an_image(self) -> int:
        """What an answer costs during training."""
        return 0

    @abstractmethod
    def answers(self, images_MCHW: Tensor, position_M: Tensor, middle: MiddleLayer | None = None) -> Answers:
        """The teacher's answers for these views of the images at `position` of `Pool.unlabeled`, without gradient."""

    @abstractmethod
    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Follow the method to another device or memory format."""


@final
class StoredTeacher(Teacher):
    """Answers made once, on images without views. They cost a step nothing."""

    def __init__(self, logits_NK: Tensor, features_NF: Tensor | None = None) -> None:
        """In the order of `Pool.unlabeled`."""
        self._logits_NK = logits_NK.detach().float()
        self._features_NF = None if features_NF is None else features_NF.detach().float()

    @property
    def num_features(self) -> int | None:
        return None if self._features_NF is None else self._features_NF.shape[1]

    def answers(self, images_MCHW: Tensor, position_M: Tensor, middle: MiddleLayer | None = None) -> Answers:
        if middle is not None:
            raise BugError("stored answers hold no maps of a middle layer")
        features_NF = self._features_NF
        return Answers(self._logits_NK[position_M], None if features_NF is None else features_NF[position_M])

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        self._logits_NK = convert(self._logits_NK)
        if self._features_NF is not None:
            self._features_NF = convert(self._features_NF)


@final
class LiveTeacher(Teacher):
    """A frozen network in eval mode that answers for the very views the student sees.

    Consistent teaching, Beyer et al., CVPR 2022, arXiv 2106.05237: stored answers are for another picture.
    """

    def __init__(
        self, network: Network, *, mean: Tensor, std: Tensor, own_mean: Tensor, own_std: Tensor, own_px: int
    ) -> None:
        """`mean` and `std` [C, 1, 1] of pixel / 255 normalise the run's images; what is `own` is the teacher's."""
        self.network: Network = network.eval().requires_grad_(False)
        self._px = own_px
        # (x std + mean - own_mean) / own_std in one multiplication and one addition
        self._scale, self._offset = std / own_std, (mean - own_mean) / own_std
        self._same_input = bool(torch.equal(mean, own_mean) and torch.equal(std, own_std))

    @property
    def num_features(self) -> int:
        return self.network.head.in_features

    @property
    def flops_an_image(self) -> int:
        return 2 * count_macs(self.network, len(self._scale), self._px, self._px)

    @torch.no_grad()
    def answers(self, images_MCHW: Tensor, position_M: Tensor, middle: MiddleLayer | None = None) -> Answers:
        return ask(self.network, self._as_own_input(images_MCHW), middle)

    def _as_own_input(self, images_MCHW: Tensor) -> Tensor:
        if not self._same_input:
            images_MCHW = images_MCHW * self._scale + self._offset
        if images_MCHW.shape[2:] != (self._px, self._px):
            size = [self._px, self._px]
            images_MCHW = functional.interpolate(images_MCHW, size, mode="bilinear", antialias=True)
        return images_MCHW

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        self.network._apply(convert)  # type: ignore[no-untyped-call]
        self._scale, self._offset = convert(self._scale), convert(self._offset)
