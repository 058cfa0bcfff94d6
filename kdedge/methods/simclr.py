"""SimCLR (Chen et al., 2020, arXiv 2002.05709): features from images alone.

U images of a batch, V = 2 U views of them, F features, D numbers of an embedding, Q remembered embeddings.
"""

import copy
from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.contrastive import nt_xent_in_chunks
from kdedge.methods.step import Method, Step
from kdedge.models.projection import ProjectionHead
from kdedge.models.zoo import Network, count_macs

__all__ = ["SimCLR", "SimCLRConfig", "effective_dims"]

_DIMS = "effective_dims"
_COLLAPSED = 1.1  # directions; those of sound embeddings are ten and more
_COLLAPSE_AFTER = 0.1  # of the steps


class SimCLRConfig(Config):
    """The loss and the projection head. Published temperatures: 0.5 for small images, 0.1 for photographs."""

    temperature: Annotated[float, Field(gt=0)] | None = None  # null comes from the stage's settings
    projection_layers: Literal[2, 3] = 3  # 3 in SimCLRv2, 2 in SimCLR; all but the last as wide as the features
    dims: Annotated[int, Field(gt=1)] = 128
    # Embeddings of earlier batches as further negatives, made by an average of the network, as in SimCLRv2 (arXiv
    # 2006.10029: 65,536 and 0.999, a small gain beside large batches). It costs a forward pass a step.
    queue: Annotated[int, Field(ge=0)] = 0
    queue_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    chunk: Annotated[int, Field(gt=0)] = 1024  # views compared at once; less takes less memory, and gives the same


@final
class SimCLR(Method):
    """NT-Xent of the two views of each unlabeled image; labeled images in the batch are not looked at.

    The network's own head takes no part and gets no gradient. `projection` belongs to the backbone as it is trained,
    not to its average: where layers of it are kept, train with an ema_decay of 0.

    Logged: `contrastive_accuracy`, the share of views whose other view is nearest; `positive_cosine`, the mean cosine
    of two views of an image; `effective_dims`, in how many directions embeddings differ.
    """

    alarms: Tensor

    def __init__(self, network: Network, config: SimCLRConfig, image: tuple[int, int, int]) -> None:
        """Of images of (channels, height, width). ValueError where the temperature has not been resolved."""
        super().__init__(network)
        if config.temperature is None:
            raise ValueError("the temperature of SimCLR has not been resolved against the data")
        self.config, self.temperature = config, config.temperature
        # DistributedDataParallel waits for the gradient of everything that asks for one.
        network.head.requires_grad_(False)
        self.projection = ProjectionHead(network.head.in_features, config.projection_layers, config.dims)
        self.register_buffer("alarms", torch.tensor(0))  # told so far: those of a resumed stage too
        self._image = image
        self.memory = _Memory(network, self.projection, config) if config.queue else None

    @property
    def extra_flops_an_image(self) -> int:
        """Of the average that fills the queue, a forward pass."""
        return 0 if self.memory is None else 2 * count_macs(self.memory.network, *self._image)

    def alarm(self, step: Step, done_fraction: float) -> str | None:
        """Told once of a collapse, which is expected of the first steps only."""
        dims = float(step.logs[_DIMS])
        if self.alarms or done_fraction < _COLLAPSE_AFTER or dims >= _COLLAPSED:
            return None
        self.alarms += 1
        return (
            f"The embeddings have collapsed: all views of this step lie along {dims:.2f} directions, of "
            f"{self.config.dims}, and tell no images apart. Are the images alike? If not, try a lower "
            "optim.learning_rate, a longer optim.warmup_steps, or a higher temperature."
        )

    def forward(self, batch: Batch) -> Step:
        labeled = len(batch.labels_B)
        views_VD: Tensor = self.projection(self.network.embed(batch.images))[labeled:]
        first_UD, second_UD = views_VD.tensor_split(2)
        queue_QD = None if self.memory is None else self.memory.queue_QD.clone()  # which the backward pass reads
        loss, accuracy = nt_xent_in_chunks(first_UD, second_UD, self.temperature, queue_QD, self.config.chunk)
        if self.memory is not None and self.training:
            self.memory.follow(self.network, self.projection)
            self.memory.remember(batch.images, labeled)
        with torch.no_grad():
            cosine = functional.cosine_similarity(first_UD.float(), second_UD.float()).mean()
        logs = {"contrastive_accuracy": accuracy, "positive_cosine": cosine, _DIMS: effective_dims(views_VD)}
        return Step(loss, logs)


@final
class _Memory(nn.Module):
    """Embeddings of earlier batches, oldest first to go, by a moving average of the network and its projection head."""

    queue_QD: Tensor
    next: Tensor

    def __init__(self, network: Network, projection: ProjectionHead, config: SimCLRConfig) -> None:
        super().__init__()
        self.decay = config.queue_decay
        self.network, self.projection = copy.deepcopy(network), copy.deepcopy(projection)
        self.requires_grad_(False)
        # Random directions until the first batches have replaced them, as MoCo begins (arXiv 1911.05722).
        self.register_buffer("queue_QD", functional.normalize(torch.randn(config.queue, config.dims)))
        self.register_buffer("next", torch.tensor(0))

    @torch.no_grad()
    def follow(self, network: Network, projection: ProjectionHead) -> None:
        """Batch norm's statistics are those of each batch, as the trained network's are."""
        pairs = ((self.network, network), (self.projection, projection))
        own = [each.data for mine, _ in pairs for each in mine.parameters()]
        theirs = [each.detach() for _, trained in pairs for each in trained.parameters()]
        torch._foreach_lerp_(own, theirs, 1 - self.decay)

    @torch.no_grad()
    def remember(self, images_MCHW: Tensor, labeled: int) -> None:
        """Put the embeddings of all but the first `labeled` images, or as many as there is room for, in the queue."""
        new_VD: Tensor = self.projection(self.network.embed(images_MCHW))[labeled:][-len(self.queue_QD) :]
        place_V = (self.next + torch.arange(len(new_VD), device=new_VD.device)) % len(self.queue_QD)
        self.queue_QD[place_V] = functional.normalize(new_VD.to(self.queue_QD), dim=1)
        self.next.copy_((self.next + len(new_VD)) % len(self.queue_QD))


@torch.no_grad()
def effective_dims(embeddings_VD: Tensor) -> Tensor:
    """In how many directions embeddings differ, 0..D: (trace C)^2 / trace C^2, C the covariance of those of length 1.

    1 where all lie on a line, 0 where all are the same: the two ways to collapse, of which batch norm hides the second.
    """
    with torch.autocast(embeddings_VD.device.type, enabled=False):
        unit_VD = functional.normalize(embeddings_VD.float(), dim=1)
        centred_VD = unit_VD - unit_VD.mean(0)
        covariance_DD = centred_VD.T @ centred_VD / len(centred_VD)
        return covariance_DD.trace().square() / covariance_DD.square().sum().clamp(min=1e-12)
