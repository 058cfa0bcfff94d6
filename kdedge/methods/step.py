"""What a method owes the loop."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kdedge.data.batches import Batch
from kdedge.models.zoo import Network

__all__ = ["Method", "Step"]


@dataclass(frozen=True)
class Step:
    """The loss to descend, and scalars or small vectors to log. Logs carry no gradient."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """Abstract; every concrete method is final, and none inherits from another.

    `network` is what is trained, averaged, evaluated and exported. Whatever else a resume needs is a persistent
    buffer of the method; what can be made again from files (the outer network's answers) is not persistent.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, batch: Batch) -> Step:
        """The loss of one batch."""

    def alarm(self, step: Step, done_fraction: float) -> str | None:
        """One sentence on what is wrong with a training of which `done_fraction` is done; asked a few times a stage."""
        return None

    @property
    def asked(self) -> Sequence[Network]:
        """Networks beside `network` that a step runs on the images of the batch, and does not train."""
        return ()

    @property
    def needs_all_images(self) -> bool:
        """Whether a step looks at images of the batch together, or at maps: several processes have only their own."""
        return False

    @property
    def passes(self) -> int:
        """How often an image of the batch passes through the network."""
        return 1

    @property
    def extra_flops_an_image(self) -> int:
        """Of networks beside `network`, for each image of the batch."""
        return 0
