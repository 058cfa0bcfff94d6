"""The published way of a FixMatch step, to race against: Pillow's RandAugment in DataLoader workers, NCHW, plain torch.

Written from the description of kekmodel/FixMatch-pytorch (its commit 040be3b, which runs on CUDA only): two loaders
with `workers` processes each; weak views are a mirror and a shift, strong ones are drawn apart from them, then two
operations of RandAugment, each left out half of the time, then a hole of half the side; one pass over the interleaved
views; SGD with Nesterov momentum, and an average kept parameter by parameter.

B labeled images, U unlabeled images, K classes.
"""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

__all__ = ["Average", "interleave", "published_step", "rand_augment"]

_GREY = (127, 127, 127)
_LEVELS = 10

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(picture: Image.Image, *data: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, data)


def _signed(value: float) -> float:
    return value if random.random() < 0.5 else -value


# name: (what is done, the value at the highest level, the value at level 0)
_POOL: dict[str, tuple[Operation, float, float]] = {
    "autocontrast": (lambda p, v: ImageOps.autocontrast(p), 0, 0),
    "brightness": (lambda p, v: ImageEnhance.Brightness(p).enhance(v), 0.9, 0.05),
    "color": (lambda p, v: ImageEnhance.Color(p).enhance(v), 0.9, 0.05),
    "contrast": (lambda p, v: ImageEnhance.Contrast(p).enhance(v), 0.9, 0.05),
    "equalize": (lambda p, v: ImageOps.equalize(p), 0, 0),
    "identity": (lambda p, v: p, 0, 0),
    "posterize": (lambda p, v: ImageOps.posterize(p, int(v)), 4, 4),
    "rotate": (lambda p, v: p.rotate(_signed(v)), 30, 0),
    "sharpness": (lambda p, v: ImageEnhance.Sharpness(p).enhance(v), 0.9, 0.05),
    "shear_x": (lambda p, v: _affine(p, 1, _signed(v), 0, 0, 1, 0), 0.3, 0),
    "shear_y": (lambda p, v: _affine(p, 1, 0, 0, _signed(v), 1, 0), 0.3, 0),
    "solarize": (lambda p, v: ImageOps.solarize(p, 256 - int(v)), 256, 0),
    "translate_x": (lambda p, v: _affine(p, 1, 0, _signed(v) * p.size[0], 0, 1, 0), 0.3, 0),
    "translate_y": (lambda p, v: _affine(p, 1, 0, 0, 0, 1, _signed(v) * p.size[1]), 0.3, 0),
}


def rand_augment(picture: Image.Image) -> Image.Image:
    """Two operations of the pool, each done half of the time, then a grey square of half the side."""
    for operation, most, least in random.choices(list(_POOL.values()), k=2):
        level = int(np.random.randint(1, _LEVELS))
        if random.random() < 0.5:
            picture = operation(picture, level * most / _LEVELS + least)
    width, height = picture.size
    side = width // 2
    left, top = (int(max(0, np.random.uniform(0, size) - side / 2)) for size in (width, height))
    picture = picture.copy()
    corner = (min(width, left + side), min(height, top + side))
    ImageDraw.Draw(picture).rectangle((left, top, *corner), _GREY)
    return picture


class _Views(Dataset[Any]):
    """Pictures uint8 [N, H, W, 3] as (weak, label) or, where `strong`, as ((weak, strong), label)."""

    def __init__(self, pictures: NDArray[np.uint8], labels: NDArray[np.int64], *, strong: bool) -> None:
        self.pictures, self.labels = pictures, labels
        side = pictures.shape[1]
        shift = transforms.RandomCrop(side, padding=side // 8, padding_mode="reflect")
        weak = transforms.Compose([transforms.RandomHorizontalFlip(), shift])
        end = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])
        self.views = [transforms.Compose([weak, end])]
        if strong:
            self.views.append(transforms.Compose([weak, rand_augment, end]))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        picture = Image.fromarray(self.pictures[index])
        return [view(picture) for view in self.views], int(self.labels[index])


def _endless(views: _Views, batch: int, workers: int) -> Iterator[Any]:
    sampler = RandomSampler(views, num_samples=2**24)  # no epoch ends within a race: workers start once
    yield from DataLoader(views, batch_size=batch, sampler=sampler, num_workers=workers, drop_last=True)


def interleave(x: Tensor, groups: int) -> Tensor:
    """Rows 0, n/groups, 2n/groups, ... first: each part of the batch then holds labeled and unlabeled images."""
    return x.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)  # type: ignore[no-untyped-call, no-any-return]


class Average:
    """The moving average, one parameter after the other; statistics are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(network).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for weight, new in zip(self.network.parameters(), network.parameters(), strict=True):
            weight.copy_(weight * self.decay + (1 - self.decay) * new)
        for statistic, new_statistic in zip(self.network.buffers(), network.buffers(), strict=True):
            statistic.copy_(new_statistic)


def published_step(
    network: nn.Module,
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    labeled: int,
    ratio: int,
    workers: int,
    device: torch.device,
    bf16: bool,
) -> Callable[[], None]:
    """One step of B `labeled` and B * `ratio` unlabeled images, to be called again and again."""
    network.to(device).train()
    decayed = [p for n, p in network.named_parameters() if "bias" not in n and "bn" not in n]
    others = [p for n, p in network.named_parameters() if "bias" in n or "bn" in n]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)
    average = Average(network, 0.999)
    labeled_batches = _endless(_Views(pictures, labels, strong=False), labeled, workers)
    unlabeled_batches = _endless(_Views(pictures, labels, strong=True), labeled * ratio, workers)

    def step() -> None:
        (x_BCHW,), y_B = next(labeled_batches)
        (weak_UCHW, strong_UCHW), _ = next(unlabeled_batches)
        images = interleave(torch.cat([x_BCHW, weak_UCHW, strong_UCHW]), 2 * ratio + 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = interleave(network(images), len(images) // (2 * ratio + 1)).float()
        labeled_BK, weak_UK, strong_UK = logits.tensor_split([labeled, labeled + labeled * ratio])
        best = torch.softmax(weak_UK.detach(), dim=1).max(1)
        loss_x = functional.cross_entropy(labeled_BK, y_B.to(device))
        loss_u = functional.cross_entropy(strong_UK, best.indices, reduction="none")
        loss_u = (loss_u * best.values.ge(0.95).float()).mean()
        loss = loss_x + loss_u
        loss.backward()  # type: ignore[no-untyped-call]
        _ = loss.item(), loss_x.item(), loss_u.item()
        optimizer.step()
        average.update(network)
        network.zero_grad()

    return step
