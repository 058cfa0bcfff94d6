"""Teachers and students: torchvision's networks and wide residual networks, fitted to the size of the images.

A network is a backbone that gives pooled features and a linear head, whatever its family, so that clustering can
read the features and starting weights can keep the backbone and lose the head.

B batch, C channels, H and W pixels, F features, K classes.
"""

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from kdedge.errors import BugError, MissingPackage, RecipeError, did_you_mean

__all__ = ["ARCHITECTURES", "Architecture", "ModelSpec", "Network", "architecture", "build", "count_macs", "num_params"]


@dataclass(frozen=True)
class Architecture:
    """What is known of a family before it is built."""

    name: str
    halvings: int  # of the standard network, stem included
    standard_px: int  # of the published weights
    scalable: bool  # takes a width multiplier
    torchvision: str | None  # name of the torchvision builder and of its weights
    int8_note: str


_EASY = "ReLU or ReLU6: quantizes and fuses well"
_HARD = "hard-swish and squeeze-excite: INT8 may be slower than float on a CPU and loses more accuracy"

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("mobilenet-v2", 5, 224, True, "mobilenet_v2", _EASY),
        Architecture("mobilenet-v3-small", 5, 224, True, "mobilenet_v3_small", _HARD),
        Architecture("mobilenet-v3-large", 5, 224, True, "mobilenet_v3_large", _HARD),
        Architecture("efficientnet-b0", 5, 224, False, "efficientnet_b0", _HARD),
        Architecture("resnet18", 5, 224, False, "resnet18", _EASY),
        Architecture("resnet34", 5, 224, False, "resnet34", _EASY),
        Architecture("resnet50", 5, 224, False, "resnet50", _EASY),
    )
}
_WIDE_RESNET = re.compile(r"wide-resnet-(\d+)-(\d+)")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a network again."""

    arch: str
    classes: int
    channels: int = 3
    width: float = 1.0
    halvings: int = 5  # how often the image is halved; the rest of the strides are 1


@final
class Network(nn.Module):
    """A backbone [B, C, H, W] -> [B, F] and a linear head [B, F] -> [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features [B, F], what the head reads."""
        features: Tensor = self.backbone(x_BCHW)
        return features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x_BCHW))
        return logits


def architecture(name: str) -> Architecture:
    """The architecture called `name`; RecipeError with the nearest known name."""
    if match := _WIDE_RESNET.fullmatch(name):
        if (int(match[1]) - 4) % 6 or int(match[1]) < 10:
            raise RecipeError(f"'{name}': the depth of a wide-resnet must be 10, 16, 22, 28, ... (6 n + 4).")
        return Architecture(name, 2, 32, False, None, _EASY + "; leaky ReLU stays a float island in some runtimes")
    if name.startswith("timm/"):
        return Architecture(name, 5, 224, False, None, "see the family's own documentation")
    if name not in ARCHITECTURES:
        known = [*ARCHITECTURES, "wide-resnet-28-2"]
        raise RecipeError(
            f"There is no architecture '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(known)} (any depth and width)."
        )
    return ARCHITECTURES[name]


def build(spec: ModelSpec) -> Network:
    """A freshly initialised network for `spec`, drawn from torch's global generator."""
    known = architecture(spec.arch)
    if spec.width != 1.0 and not known.scalable:
        raise RecipeError(
            f"'{spec.arch}' has no width multiplier, but width {spec.width} was asked for. Leave width at 1.0."
        )
    if match := _WIDE_RESNET.fullmatch(spec.arch):
        return _wide_resnet(int(match[1]), int(match[2]), spec)
    if spec.arch.startswith("timm/"):
        return _timm(spec)
    backbone = _torchvision_backbone(known, spec.width)
    _keep_last_halvings(backbone, spec.halvings)
    if spec.channels != 3:
        _replace_stem(backbone, spec.channels)
    features = _cut_head(backbone)
    return Network(backbone, nn.Linear(features, spec.classes))


def _wide_resnet(depth: int, width: int, spec: ModelSpec) -> Network:
    from kdedge.models.wide_resnet import WideResNet

    strides = (2 if spec.halvings > 2 else 1, 2 if spec.halvings > 1 else 1, 2 if spec.halvings > 0 else 1)
    backbone = WideResNet(depth, width, spec.channels, strides)
    return Network(backbone, nn.Linear(backbone.num_features, spec.classes))


def _timm(spec: ModelSpec) -> Network:
    """timm's network as it is: its strides are not changed."""
    try:
        import timm
    except ImportError:
        raise MissingPackage("timm", f"the architecture {spec.arch}", "pip install 'kdedge[timm]'") from None
    name = spec.arch.removeprefix("timm/")
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model '{name}'.{did_you_mean(name, timm.list_models())}")
    backbone = timm.create_model(name, num_classes=0, in_chans=spec.channels)
    return Network(backbone, nn.Linear(backbone.num_features, spec.classes))


def _torchvision_backbone(known: Architecture, width: float) -> nn.Module:
    from torchvision import models
    from torchvision.models import mobilenetv3

    if width == 1.0:
        backbone: nn.Module = models.get_model_builder(known.torchvision)()
    elif known.name == "mobilenet-v2":
        backbone = models.MobileNetV2(width_mult=width)
    else:  # torchvision's V3 builders take no width; its configuration helper does
        backbone = models.MobileNetV3(*mobilenetv3._mobilenet_v3_conf(known.torchvision, width_mult=width))
    return backbone


def _halving_groups(backbone: nn.Module) -> list[list[nn.Conv2d | nn.MaxPool2d]]:
    """The layers that halve the image, in order; those that must stay equal (conv and shortcut) in one group."""
    groups: dict[str, list[nn.Conv2d | nn.MaxPool2d]] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and module.stride in (2, (2, 2)):
            # A ResNet stage strides in its first block twice: on the main path and on the shortcut.
            stage = name.split(".")[0] if re.match(r"layer\d", name) else name
            groups.setdefault(stage, []).append(module)
    return list(groups.values())


def _keep_last_halvings(backbone: nn.Module, keep: int) -> None:
    """Set the stride of all but the last `keep` halvings to 1: small images stay large where features are cheap."""
    groups = _halving_groups(backbone)
    for group in groups[: max(len(groups) - keep, 0)]:
        for module in group:
            if isinstance(module, nn.MaxPool2d):
                module.stride, module.kernel_size, module.padding = 1, 1, 0  # an identity, as in ResNets for CIFAR
            else:
                module.stride = (1, 1)


def _replace_stem(backbone: nn.Module, channels: int) -> None:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
            stem = nn.Conv2d(channels, module.out_channels, kernel, stride, padding, bias=module.bias is not None)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out")
            parent, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(parent), leaf, stem)
            return
    raise BugError("the backbone has no convolution")


def _cut_head(backbone: nn.Module) -> int:
    """Replace the last linear layer by nothing and return how many features it read."""
    name, head = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, nn.Identity())
    return int(head.in_features)


def num_params(module: nn.Module) -> int:
    """Trainable numbers in `module`."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def count_macs(network: nn.Module, channels: int, height: int, width: int) -> int:
    """Multiply-adds of one image through the convolutions and linear layers, counted by torch's FLOP counter."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(network.parameters()).device
    counter = FlopCounterMode(display=False)
    was_training = network.training
    network.eval()
    with counter:
        network(torch.zeros(1, channels, height, width, device=device))
    network.train(was_training)
    return int(counter.get_total_flops()) // 2
