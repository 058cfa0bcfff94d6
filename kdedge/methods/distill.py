"""The distillation term of the inner network: which loss, against which answers, and what it has to remember.

M images of a pass (labeled, weak and strong views together), N all unlabeled images of the run, F features, D numbers
of an embedding, C channels, H and W pixels, K classes.
"""

import math
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from kdedge.config import Config
from kdedge.errors import BugError
from kdedge.losses.crd import crd, log_normalizer, remember_
from kdedge.losses.dist import dist
from kdedge.losses.dkd import dkd
from kdedge.losses.fitnets import fitnets
from kdedge.losses.kd import kd
from kdedge.losses.rkd import rkd_angle, rkd_distance
from kdedge.methods.teacher import Answers, LiveTeacher, Teacher, middle_layer
from kdedge.models.zoo import Network

__all__ = ["DistillConfig", "Distiller"]

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

# CRD 0.8 (with its usual beside-terms) and FitNets 100: HobbitLong/RepDistiller. KD's 1: ours, beside FixMatch's terms.
_WEIGHT = {"none": 0.0, "kd": 1.0, "dkd": 1.0, "dist": 1.0, "crd": 0.8, "rkd": 1.0, "fitnets": 100.0}
# DKD 4: the paper on CIFAR-100. KD and DIST 1: their ImageNet settings; a strong teacher is harmed by more.
_TEMPERATURE = {"kd": 1.0, "dkd": 4.0, "dist": 1.0}
_RKD_IMAGES = 128  # of one comparison, a batch of the paper; its triplets grow with the third power


class DistillConfig(Config):
    """What the student learns from the teacher's answers, on labeled and unlabeled images alike.

    `mixup` with loss kd, views same is function matching (arXiv 2106.05237); set labeled_weight and unlabeled_weight of
    the method to 0 to have it without labels, as published.
    """

    loss: Literal["none", "kd", "dkd", "dist", "crd", "rkd", "fitnets"] = "kd"
    weight: NonNegative | None = None  # null: the loss's default; kd, dkd, dist, rkd 1, crd 0.8, fitnets 100
    temperature: Positive | None = None  # of kd, dkd, dist; null: kd and dist 1, dkd 4
    views: Literal["stored", "same"] = "stored"  # stored: answers on plain images, made once; same: on the very views
    mixup: bool = False  # of the images that both see; a second pass of the student beside FixMatch's
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # the weight grows linearly; 20 of 240 epochs in the paper of dkd
    dkd_alpha: NonNegative = 1.0  # of the target class; arXiv 2203.08679
    dkd_beta: NonNegative = 8.0  # of the other classes; 2 from ResNet-50 to MobileNet on ImageNet
    dist_beta: NonNegative = 1.0  # between the classes of an image; arXiv 2205.10536
    dist_gamma: NonNegative = 1.0  # between the images of a class
    rkd_distance: NonNegative = 25.0  # arXiv 1904.05068
    rkd_angle: NonNegative = 50.0
    crd_negatives: Annotated[int, Field(gt=0)] = 16384  # arXiv 1910.10699; at most the images of the run
    crd_temperature: Positive = 0.07
    crd_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5  # of the remembered embeddings
    crd_dims: Annotated[int, Field(gt=0)] = 128

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss == "fitnets" and self.views == "stored":
            raise ValueError("loss fitnets compares maps, which are too large to store; set views to same.")
        if self.mixup and (self.views == "stored" or self.loss not in ("kd", "dist")):
            raise ValueError(
                f"mixup makes images that have no stored answer and no single class or place: loss kd or dist with "
                f"views same was expected, and these are {self.loss} and {self.views}."
            )
        if self.temperature is not None and self.loss not in _TEMPERATURE:
            raise ValueError(f"The loss {self.loss} has no temperature; leave it at null.")
        return self

    @property
    def needs_features(self) -> bool:
        """Whether stored answers must hold features."""
        return self.loss in ("crd", "rkd")

    @property
    def resolved_weight(self) -> float:
        """`weight`, or the loss's default; 0 without a loss, whatever its weight."""
        return _WEIGHT[self.loss] if self.weight is None or self.loss == "none" else self.weight


@final
class Distiller(nn.Module):
    """The term, already weighted. Its heads are trained with the student, resumed, and never exported."""

    steps: Tensor
    student_bank_ND: Tensor
    teacher_bank_ND: Tensor
    student_log_normalizer: Tensor
    teacher_log_normalizer: Tensor

    def __init__(self, config: DistillConfig, student: Network, teacher: Teacher, unlabeled_images: int) -> None:
        """`unlabeled_images` is N, the length of `Pool.unlabeled`."""
        super().__init__()
        if isinstance(teacher, LiveTeacher) != (config.views == "same"):
            raise BugError(f"views is {config.views}, and the teacher is a {type(teacher).__name__}")
        self.config = config
        self.student_middle = self.teacher_middle = None
        self.register_buffer("steps", torch.tensor(0))
        teacher_features = teacher.num_features
        if config.needs_features and teacher_features is None:
            raise BugError(f"the loss {config.loss} needs features, and the teacher's answers hold none")
        if config.loss == "crd":
            self._remember(student.head.in_features, teacher_features or 0, unlabeled_images)
        if isinstance(teacher, LiveTeacher) and config.loss == "fitnets":
            self.student_middle, self.teacher_middle = middle_layer(student), middle_layer(teacher.network)
            self.regressor = nn.Conv2d(self.student_middle.channels, self.teacher_middle.channels, 1)

    def _remember(self, student_features: int, teacher_features: int, images: int) -> None:
        """Projections to D numbers and, of both networks, the embedding of each image; random directions at first."""
        dims = self.config.crd_dims
        self.student_projection = nn.Linear(student_features, dims)
        self.teacher_projection = nn.Linear(teacher_features, dims)
        for name in ("student_bank_ND", "teacher_bank_ND"):
            self.register_buffer(name, functional.normalize(torch.randn(images, dims)))
        for name in ("student_log_normalizer", "teacher_log_normalizer"):
            self.register_buffer(name, torch.tensor(math.nan))  # until the first step

    def forward(self, student: Answers, teacher: Answers, target_M: Tensor, position_M: Tensor) -> Tensor:
        """`target`: the class of each image, for dkd; `position`: its place in `Pool.unlabeled`, for crd."""
        share = (self.steps + 1).clamp(max=self.config.warmup_steps) / max(self.config.warmup_steps, 1)
        weight = self.config.resolved_weight * (share if self.config.warmup_steps else 1.0)
        if self.training:
            self.steps += 1
        # bf16 loses what the relations and odds below are made of: small differences of large sums.
        with torch.autocast(student.logits_MK.device.type, enabled=False):
            return weight * self._loss(student, teacher, target_M, position_M)

    def _loss(self, student: Answers, teacher: Answers, target_M: Tensor, position_M: Tensor) -> Tensor:
        config, student_MK, teacher_MK = self.config, student.logits_MK, teacher.logits_MK
        temperature = config.temperature or _TEMPERATURE.get(config.loss, 1.0)
        match config.loss:
            case "none":
                return student_MK.new_zeros(())
            case "kd":
                return kd(student_MK, teacher_MK, temperature)
            case "dkd":
                return dkd(student_MK, teacher_MK, target_M, temperature, config.dkd_alpha, config.dkd_beta)
            case "dist":
                return dist(student_MK, teacher_MK, temperature, config.dist_beta, config.dist_gamma)
            case "crd":
                return self._crd(_known(student.features_MF), _known(teacher.features_MF), position_M)
            case "rkd":
                return self._rkd(_known(student.features_MF), _known(teacher.features_MF))
            case "fitnets":
                return fitnets(self.regressor(_known(student.map_MCHW)), _known(teacher.map_MCHW))

    def _rkd(self, student_MF: Tensor, teacher_MF: Tensor) -> Tensor:
        """Averaged over parts of the batch, in its order, of at most as many images as the paper compares."""
        parts = math.ceil(len(student_MF) / _RKD_IMAGES)
        pairs = zip(student_MF.tensor_split(parts), teacher_MF.tensor_split(parts), strict=True)
        distance, angle = self.config.rkd_distance, self.config.rkd_angle
        losses = [distance * rkd_distance(s, t) + angle * rkd_angle(s, t) for s, t in pairs]
        return torch.stack(losses).mean()

    def _crd(self, student_MF: Tensor, teacher_MF: Tensor, position_M: Tensor) -> Tensor:
        """Both ways: the student's embedding against the teacher's of all images, and the other way round."""
        config = self.config
        student_MD = functional.normalize(self.student_projection(student_MF))
        teacher_MD = functional.normalize(self.teacher_projection(teacher_MF))
        images = len(self.student_bank_ND)
        negative_J = torch.arange(images, device=position_M.device)
        if config.crd_negatives < images:
            # Drawn on the CPU, so that a step is the same on every device.
            negative_J = torch.randint(images, (config.crd_negatives,)).to(position_M.device, non_blocking=True)
        loss = student_MD.new_zeros(())
        for anchor_MD, bank_ND, normalizer in (
            (student_MD, self.teacher_bank_ND, self.student_log_normalizer),
            (teacher_MD, self.student_bank_ND, self.teacher_log_normalizer),
        ):
            now = log_normalizer(anchor_MD, bank_ND, negative_J, config.crd_temperature)
            now = torch.where(normalizer.isnan(), now, normalizer)  # no branch: that would wait for the device
            loss = loss + crd(anchor_MD, bank_ND, position_M, negative_J, config.crd_temperature, now)
            if self.training:
                normalizer.copy_(now)
        if self.training:
            for bank_ND, embedding_MD in ((self.student_bank_ND, student_MD), (self.teacher_bank_ND, teacher_MD)):
                remember_(bank_ND, embedding_MD, position_M, config.crd_momentum)
        return loss


def _known(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise BugError("the answers lack what the loss compares")
    return tensor
