"""Small pools and networks for tests."""

from typing import Any

import torch

from kdedge.data.batches import Batch, Pool
from kdedge.data.store import Resident
from kdedge.data.views import ViewConfig
from kdedge.methods.step import Method, Step
from kdedge.models.zoo import ModelSpec, Network, build

VIEWS = ViewConfig(
    flip=False,
    shift_fraction=0.125,
    rotate_degrees=15.0,
    shear=0.2,
    translate_fraction=0.125,
    cutout_fraction=0.25,
    fill=0.0,
    geometric_only=False,
)
SPEC = ModelSpec("wide-resnet-10-1", classes=3, channels=1, halvings=2)


def toy_pool(count: int = 60) -> Pool:
    """Three classes: a bright top, middle or bottom, in noise. Every tenth image is labeled."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    for k in range(3):
        images[truth == k, :, 3 * k : 3 * k + 2] += 150
    labeled = torch.arange(0, count, 10)
    return Pool(
        images=Resident(images.to(torch.uint8)),
        labeled=labeled,
        labels=truth[labeled],
        unlabeled=torch.arange(count),
        truth=truth,
        mean=torch.full((1, 1, 1), 0.3),
        std=torch.full((1, 1, 1), 0.25),
    )


def toy_network(seed: int = 0, spec: ModelSpec = SPEC) -> Network:
    torch.manual_seed(seed)
    return build(spec)


class Killed(Exception):
    pass


class DiesAt(Method):
    """A method that is killed before step `die`, counted over its life; in a checkpoint it is the method itself."""

    def __init__(self, inner: Method, die: int) -> None:
        super().__init__(inner.network)
        for name, module in inner.named_children():
            self.add_module(name, module)
        for name, buffer in inner.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in inner.state_dict())
        self.die, self.count = die, 0
        self.inner = [inner]  # in a list, so that its network is not a second submodule

    def forward(self, batch: Batch) -> Step:
        if self.count == self.die:
            raise Killed
        self.count += 1
        return self.inner[0](batch)


class Listens:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, name: str, total_steps: int) -> None:
        pass

    def step(self, record: Any) -> None:
        pass

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
