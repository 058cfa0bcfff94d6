"""Small pools and networks for tests."""

import torch

from kdedge.data.batches import Pool
from kdedge.data.store import Resident
from kdedge.data.views import ViewConfig
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
