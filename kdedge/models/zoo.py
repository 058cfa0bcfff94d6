"""Teachers and students: torchvision's networks and wide residual networks, fitted to the size of the images.

A network is a backbone that gives pooled features and a linear head, whatever its family, so that clustering can
read the features and starting weights can keep the backbone and lose the head. What began by contrastive pre-training
may keep a layer of its projection head between the two.

B batch, C channels, H and W pixels, F features, K classes.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from kdedge.errors import BugError, MissingPackage, RecipeError, did_you_mean

__all__ = [
    "ARCHITECTURES",
    "INT8_SPEEDUP",
    "Architecture",
    "ModelSpec",
    "Network",
    "architecture",
    "build",
    "count_macs",
    "num_params",
    "projection_layer",
]


@dataclass(frozen=True)
class Architecture:
    """What is known of a family before it is built."""

    name: str
    halvings: int  # of the standard network, stem included
    standard_px: int  # of the published weights
    builders: Mapping[float, str]  # width -> torchvision's builder, whose name is also that of its weights
    any_width: bool  # other widths too
    int8_note: str
    learning_rate: float | None = None  # from scratch, where FixMatch's is too high

    @property
    def scalable(self) -> bool:
        """Whether there is a width multiplier."""
        return self.any_width or len(self.builders) > 1


_EASY = "ReLU or ReLU6: integers from end to end"
_SHUFFLE = "ReLU: integers from end to end; its shuffles are folded into the order of weights"
_GATED = "ReLU with squeeze-excite, in integers too"
_HARD = "hard-swish and squeeze-excite, in integers on a CPU; gains less than ReLU families"
_SWISH = "swish and squeeze-excite, in integers on a CPU; gains less than ReLU families; lite0 gains more"

_SHUFFLE_WIDTHS = {width: f"shufflenet_v2_x{width:.1f}".replace(".", "_") for width in (0.5, 1.0, 1.5, 2.0)}
_MNASNET_WIDTHS = {0.5: "mnasnet0_5", 0.75: "mnasnet0_75", 1.0: "mnasnet1_0", 1.3: "mnasnet1_3"}

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("mobilenet-v2", 5, 224, {1.0: "mobilenet_v2"}, True, _EASY),
        Architecture("mobilenet-v3-small", 5, 224, {1.0: "mobilenet_v3_small"}, True, _HARD),
        Architecture("mobilenet-v3-large", 5, 224, {1.0: "mobilenet_v3_large"}, True, _HARD),
        Architecture("efficientnet-b0", 5, 224, {1.0: "efficientnet_b0"}, False, _SWISH),
        Architecture("efficientnet-lite0", 5, 224, {}, False, _EASY),
        Architecture("shufflenet-v2", 5, 224, _SHUFFLE_WIDTHS, False, _SHUFFLE),
        Architecture("mnasnet", 5, 224, _MNASNET_WIDTHS, False, _EASY),
        Architecture("squeezenet", 4, 224, {1.0: "squeezenet1_1"}, False, _EASY, 0.01),  # it has no batch norm
        Architecture("regnet-x-400mf", 5, 224, {1.0: "regnet_x_400mf"}, False, _EASY),
        Architecture("regnet-y-400mf", 5, 224, {1.0: "regnet_y_400mf"}, False, _GATED),
        Architecture("resnet18", 5, 224, {1.0: "resnet18"}, False, _EASY),
        Architecture("resnet34", 5, 224, {1.0: "resnet34"}, False, _EASY),
        Architecture("resnet50", 5, 224, {1.0: "resnet50"}, False, _EASY),
    )
}

INT8_SPEEDUP: dict[str, float] = {
    "mobilenet-v2": 2.1,
    "mobilenet-v3-small": 1.1,
    "mobilenet-v3-large": 1.5,
    "efficientnet-b0": 1.3,
    "efficientnet-lite0": 2.0,
    "shufflenet-v2": 2.1,
    "mnasnet": 1.6,
    "squeezenet": 1.7,
    "regnet-x-400mf": 1.7,
    "regnet-y-400mf": 2.2,
    "resnet18": 3.5,
    "resnet34": 3.5,
    "resnet50": 3.2,
}
"""FP32's latency over INT8's: standard size, one thread, batch 1. A test holds it to the record of
kdedge_bench.int8_families under benchmarks/results; a family that was not measured is not in it."""

_WIDE_RESNET = re.compile(r"wide-resnet-(\d+)-(\d+)")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a network again."""

    arch: str
    classes: int
    channels: int = 3
    width: float = 1.0
    halvings: int = 5  # how often the image is halved; the rest of the strides are 1
    neck: int = 0  # layers of a projection head that stay before the classifier (SimCLRv2, arXiv 2006.10029: 1)


@final
class Network(nn.Module):
    """A backbone [B, C, H, W] -> [B, F], a neck [B, F] -> [B, F] where there is one, a linear head [B, F] -> [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        # How the backbone is run in training where that is not plainly at once: in parts, to save memory, or on the
        # share of this process (kdedge.train). Never part of the weights, and absent from averages and loaded networks.
        self.compute: Callable[[nn.Module, Tensor], Tensor] | None = None

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features [B, F], what the head reads: after the neck, where there is one."""
        features: Tensor = self.backbone(x_BCHW) if self.compute is None else self.compute(self.backbone, x_BCHW)
        if self.neck is not None:
            features = self.neck(features)
        return features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(x_BCHW))
        return logits


def architecture(name: str) -> Architecture:
    """The architecture called `name`; RecipeError with the nearest known name."""
    if match := _WIDE_RESNET.fullmatch(name):
        if (int(match[1]) - 4) % 6 or int(match[1]) < 10:
            raise RecipeError(f"'{name}': the depth of a wide-resnet must be 10, 16, 22, 28, ... (6 n + 4).")
        return Architecture(name, 2, 32, {}, False, "leaky ReLU stays in float: meant as a teacher")
    if name.startswith("timm/"):
        return Architecture(name, 5, 224, {}, False, "see the family's own documentation")
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
    _require_width(known, spec.width)
    if match := _WIDE_RESNET.fullmatch(spec.arch):
        return _wide_resnet(int(match[1]), int(match[2]), spec)
    if spec.arch.startswith("timm/"):
        backbone, features = _timm_backbone(spec)
    else:
        backbone = _torchvision_backbone(known, spec.width)
        features = _cut_head(backbone)
    if spec.halvings < known.halvings:
        _keep_last_halvings(backbone, spec)
    if spec.channels != 3 and not spec.arch.startswith("timm/"):
        _replace_stem(backbone, spec.channels)
    return Network(backbone, nn.Linear(features, spec.classes), _neck(spec, features))


def projection_layer(features: int) -> nn.Sequential:
    """A layer of SimCLR's projection head but its last: as wide as the features, and without a bias of its own.

    google-research/simclr, model_util.py: what batch norm takes off again is not added first.
    """
    return nn.Sequential(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())


def _neck(spec: ModelSpec, features: int) -> nn.Module | None:
    return nn.Sequential(*(projection_layer(features) for _ in range(spec.neck))) if spec.neck else None


def _require_width(known: Architecture, width: float) -> None:
    if known.any_width or width == 1.0 or width in known.builders:
        return
    if not known.scalable:
        raise RecipeError(
            f"'{known.name}' has no width multiplier, but width {width} was asked for. Leave width at 1.0."
        )
    widths = ", ".join(str(each) for each in known.builders)
    raise RecipeError(f"'{known.name}' comes in the widths {widths}, but {width} was asked for. Choose one of them.")


def _wide_resnet(depth: int, width: int, spec: ModelSpec) -> Network:
    from kdedge.models.wide_resnet import WideResNet

    strides = (2 if spec.halvings > 2 else 1, 2 if spec.halvings > 1 else 1, 2 if spec.halvings > 0 else 1)
    backbone = WideResNet(depth, width, spec.channels, strides)
    head = nn.Linear(backbone.num_features, spec.classes)
    nn.init.xavier_normal_(head.weight)  # google-research/fixmatch, libml/models.py
    nn.init.zeros_(head.bias)
    return Network(backbone, head, _neck(spec, backbone.num_features))


def _timm_backbone(spec: ModelSpec) -> tuple[nn.Module, int]:
    """timm's network without its head, and how many features it gives."""
    try:
        import timm
    except ImportError:
        raise MissingPackage("timm", f"the architecture {spec.arch}", "pip install 'kdedge[timm]'") from None
    name = spec.arch.removeprefix("timm/")
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model '{name}'.{did_you_mean(name, timm.list_models())}")
    backbone = timm.create_model(name, num_classes=0, in_chans=spec.channels)
    # num_features is what enters the head, and MobileNetV3 and V4 widen it there before the last layer.
    return backbone, int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def _torchvision_backbone(known: Architecture, width: float) -> nn.Module:
    """torchvision's network under torchvision's names, so that its weights fit; still with its last linear layer."""
    from torchvision import models

    if known.name == "efficientnet-lite0":
        return _efficientnet_lite0()
    if known.name.startswith("regnet"):
        return _regnet_400mf(known.name)
    if known.any_width and width != 1.0:
        return _thinner_mobilenet(known, width)
    made = models.get_model_builder(known.builders[width])()
    if known.name == "squeezenet":
        # The published head is a 1 x 1 convolution, ReLU, then the mean. Ours is linear after the mean, without the
        # ReLU: as many weights, logits of either sign, and pooled features that clustering can read.
        return _pooled("features", made.features, "classifier", nn.Linear(512, 1000))
    if known.name == "mnasnet":
        # torchvision's class refuses every state_dict without its own version mark, which .safetensors cannot carry.
        return _pooled("layers", made.layers, "classifier", made.classifier)
    backbone: nn.Module = made
    return backbone


def _thinner_mobilenet(known: Architecture, width: float) -> nn.Module:
    from torchvision import models
    from torchvision.models import mobilenetv3

    backbone: nn.Module
    if known.name == "mobilenet-v2":
        backbone = models.MobileNetV2(width_mult=width)
    else:  # torchvision's V3 builders take no width; its configuration helper does
        backbone = models.MobileNetV3(*mobilenetv3._mobilenet_v3_conf(known.builders[1.0], width_mult=width))
    return backbone


def _pooled(name: str, maps: nn.Module, head_name: str, head: nn.Module) -> nn.Module:
    """Maps, their mean, and the head that reads it; the names are torchvision's."""
    mean: list[tuple[str, nn.Module]] = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    return nn.Sequential(OrderedDict([(name, maps), *mean, (head_name, head)]))


def _efficientnet_lite0() -> nn.Module:
    """EfficientNet-B0 without squeeze-excite and with ReLU6 (Google's EfficientNet-Lite, 2020: made for INT8).

    The lite family also keeps stem and head while it grows; at size 0 they are B0's anyway.
    """
    from torchvision.models import efficientnet

    def nothing(*_: Any, **__: Any) -> nn.Module:
        return nn.Identity()

    settings, last = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=1.0, depth_mult=1.0)
    for each in settings:
        each.block = partial(efficientnet.MBConv, se_layer=nothing)
    network: nn.Module = efficientnet.EfficientNet(settings, dropout=0.2, last_channel=last)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.SiLU):
            _replace(network, name, nn.ReLU6(inplace=True))
    return network


def _regnet_400mf(name: str) -> nn.Module:
    """RegNetX or RegNetY of 400 MFLOPs (arXiv 2003.13678, tables 8 and 9), stage by stage.

    torchvision's builders compute these numbers with tensors, which have no values where nothing is initialised.
    """
    from torchvision.models import regnet

    gated = name.startswith("regnet-y")
    stages = regnet.BlockParams(
        depths=[1, 3, 6, 6] if gated else [1, 2, 7, 12],
        widths=[48, 104, 208, 440] if gated else [32, 64, 160, 400],
        group_widths=[8 if gated else 16] * 4,
        bottleneck_multipliers=[1.0] * 4,
        strides=[2] * 4,
        se_ratio=0.25 if gated else None,
    )
    network: nn.Module = regnet.RegNet(stages)
    return network


_HALVINGS: dict[tuple[str, float], list[list[str]]] = {}
"""`_halving_groups` by architecture and width: to follow the shapes takes longer than to build the network."""


@torch.no_grad()
def _halving_groups(backbone: nn.Module) -> list[list[str]]:
    """Names of the layers that halve the image, in order; those that read maps of one size (conv and shortcut) in one
    group.
    """
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    names = [name for name, m in backbone.named_modules() if isinstance(m, kinds) and m.stride in (2, (2, 2))]
    if not names:
        return []
    shapes = copy.deepcopy(backbone).eval().to("meta")  # shapes without numbers: nothing is computed or drawn
    groups: dict[int, list[str]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        groups.setdefault(inputs[0].shape[-1], []).append(name)

    for name in names:
        shapes.get_submodule(name).register_forward_hook(partial(note, name))
    stem = next(m for m in shapes.modules() if isinstance(m, nn.Conv2d))
    shapes(torch.zeros(1, stem.in_channels, 256, 256, device="meta"))
    return list(groups.values())


def _keep_last_halvings(backbone: nn.Module, spec: ModelSpec) -> None:
    """Set the stride of all but the last `spec.halvings` to 1: small images stay large where features are cheap."""
    known = (spec.arch, spec.width)
    try:
        groups = _HALVINGS[known] if known in _HALVINGS else _halving_groups(backbone)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # timm has networks of one input size
        raise RecipeError(
            f"The strides of '{spec.arch}' cannot be changed ({error}). Set its halvings to 5 and data.image_px to its "
            "size."
        ) from error
    _HALVINGS[known] = groups
    changed = [name for group in groups[: max(len(groups) - spec.halvings, 0)] for name in group]
    for module in map(backbone.get_submodule, changed):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.padding = (1, 1)  # SqueezeNet's stem has none and would eat a border of each small image
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            module.stride, module.kernel_size, module.padding = 1, 1, 0  # an identity, as in ResNets for CIFAR


def _replace_stem(backbone: nn.Module, channels: int) -> None:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
            stem = nn.Conv2d(channels, module.out_channels, kernel, stride, padding, bias=module.bias is not None)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out")
            _replace(backbone, name, stem)
            return
    raise BugError("the backbone has no convolution")


def _cut_head(backbone: nn.Module) -> int:
    """Replace the last linear layer by nothing and return how many features it read."""
    name, head = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)][-1]
    _replace(backbone, name, nn.Identity())
    return int(head.in_features)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


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
