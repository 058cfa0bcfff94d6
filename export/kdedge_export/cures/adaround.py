"""AdaRound: each weight rounded up or down, whichever serves the layer's output on real images.

Nagel et al. 2020 (arXiv 2004.10568), section 3.3 and eq. 21 to 25: a soft rounding h(V) in [0, 1] is trained for each
weight, pressed towards 0 and 1 as training goes on, so that the quantized layer behind its activation, fed with the
quantized network's inputs, makes what the float layer makes of the float ones. Layer by layer, front to back.
S samples (output positions of images), G groups, I inputs of one output (channels of a group x kernel), O outputs of a
group; K = G x O output channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from kdedge_export.cpu.plan import Plan
from kdedge_export.cures.bias_correction import corrected
from kdedge_export.cures.taps import Batches
from kdedge_export.cures.walk import Layer, cure_layers
from kdedge_export.table import RangeTable

__all__ = ["adaround", "round_adaptively"]

IMAGES = 256
POSITIONS = 8  # of each image's output map, as few tell more than many neighbours
SAMPLE_BYTES = 64 << 20  # of one layer's inputs, unfolded
BATCH = 256  # samples in a step
STEPS = 20  # at 8 bits few weights are worth turning: 100 steps gave no smaller divergence (MobileNetV2)
LEARNING_RATE = 0.02
WEIGHT = 0.1  # lambda, where the error is counted in units of that of rounding to nearest
WARM_UP = 0.2  # of the steps without the pressure, as in the paper's appendix
BETA = (20.0, 2.0)
ZETA, GAMMA = 1.1, -0.1  # eq. 23
HELD = 4  # every HELD-th sample judges


def adaround(
    model: onnx.ModelProto,
    plan: Plan,
    table: RangeTable,
    batches: Batches,
    reference: onnx.ModelProto | None = None,
    *,
    steps: int = STEPS,
    say: Callable[[str], None] = lambda sentence: None,
) -> onnx.ModelProto:
    """A copy of the float `model` whose quantized weights are whole multiples of `table.weight_scales`, -127 to 127.

    No weight moves by more than one code from the nearest, and a layer whose held samples are not served better keeps
    the nearest. Biases are corrected on the way. `reference`: the float network to be near; `model` itself unless its
    weights or biases were altered already. The same for the same images: the generator is seeded layer by layer.
    """

    def fix(layer: Layer) -> tuple[Tensor, Tensor | None]:
        shape = (-1, *[1] * (layer.weight.ndim - 1))
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            codes = round_adaptively(layer, steps, generator)
        weight = codes * layer.scales.reshape(shape)
        made = layer.operator.run(layer.read, weight, *([] if layer.bias is None else [layer.bias]))
        assert isinstance(made, Tensor)
        return weight, corrected(layer.bias, made, layer.wanted)

    return cure_layers(model, plan, table, batches, reference or model, fix, IMAGES, say)


@dataclass(frozen=True)
class _Samples:
    """`read_GSI`, what the layer should make `wanted_GSO`, behind its activation, and its bias `bias_G1O`."""

    read_GSI: Tensor
    wanted_GSO: Tensor
    bias_G1O: Tensor
    limits: tuple[float, float]

    def error(self, weight_GOI: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Squared, summed over outputs, mean over samples: eq. 25 without its regulariser."""
        made = self.read_GSI[:, chosen] @ weight_GOI.transpose(1, 2) + self.bias_G1O
        return ((made.clamp(*self.limits) - self.wanted_GSO[:, chosen]) ** 2).sum((0, 2)).mean()


def round_adaptively(layer: Layer, steps: int, generator: torch.Generator) -> Tensor:
    """The codes of the layer's weight, float32 in its shape: those found, or the nearest where they are no worse."""
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    quotients = layer.weight / layer.scales.reshape(shape)
    samples = _samples(layer, generator)
    groups = len(samples.read_GSI)
    scales_GO1 = layer.scales.reshape(groups, -1, 1)
    quotients_GOI = quotients.reshape(groups, -1, samples.read_GSI.shape[2])
    nearest_GOI = quotients_GOI.round().clamp(-127, 127)
    held = torch.arange(samples.read_GSI.shape[1]) % HELD == 0
    learned_GOI = _learn(samples, quotients_GOI, scales_GO1, (~held).nonzero()[:, 0], steps, generator)
    with torch.no_grad():
        better = samples.error(learned_GOI * scales_GO1, held) < samples.error(nearest_GOI * scales_GO1, held)
    return (learned_GOI if better else nearest_GOI).reshape(layer.weight.shape)


def _learn(
    samples: _Samples, quotients_GOI: Tensor, scales_GO1: Tensor, places: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    floor = quotients_GOI.floor()
    soft = ((quotients_GOI - floor - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)
    logits = torch.log(soft / (1 - soft)).requires_grad_()  # V, so that h(V) is what rounding would lose
    optimizer = torch.optim.Adam([logits], LEARNING_RATE)
    nearest = quotients_GOI.round().clamp(-127, 127) * scales_GO1
    with torch.no_grad():
        unit = samples.error(nearest, places).clamp(min=1e-20)
    for step in range(steps):
        chosen = places[torch.randint(len(places), (min(BATCH, len(places)),), generator=generator)]
        h = _rectified(logits)
        loss = samples.error((floor + h).clamp(-127, 127) * scales_GO1, chosen) / unit
        progress = (step / steps - WARM_UP) / (1 - WARM_UP)
        if progress > 0:
            beta = BETA[0] + (BETA[1] - BETA[0]) * progress
            loss = loss + WEIGHT * (1 - (2 * h - 1).abs() ** beta).mean()  # eq. 24
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return (floor + (_rectified(logits) >= 0.5)).clamp(-127, 127)


def _rectified(logits: Tensor) -> Tensor:
    """Eq. 23."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _samples(layer: Layer, generator: torch.Generator) -> _Samples:
    limits = layer.limits
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
    if layer.weight.ndim == 2:
        return _Samples(layer.read[None], layer.wanted.clamp(*limits)[None], bias[None, None], limits)
    groups = int(layer.operator.attribute("group", 1))
    count, channels, height, width = layer.wanted.shape
    each = max(1, min(POSITIONS, height * width, SAMPLE_BYTES // (4 * count * layer.weight[0].numel() * groups)))
    places = torch.stack([torch.randperm(height * width, generator=generator)[:each] for _ in range(count)])
    wanted_NCP = layer.wanted.flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
    windows = _windows(layer, places)  # N, P, C, kernel
    read = windows.flatten(0, 1).reshape(count * each, groups, -1)
    wanted = wanted_NCP.transpose(1, 2).reshape(count * each, groups, -1).clamp(*limits)
    return _Samples(
        read.transpose(0, 1).contiguous(), wanted.transpose(0, 1).contiguous(), bias.reshape(groups, 1, -1), limits
    )


def _windows(layer: Layer, places_NP: Tensor) -> Tensor:
    """What the kernel covers at the output positions, [N, P, C, kh, kw]."""
    operator = layer.operator
    top, left, bottom, right = operator.pads()
    (down, across), (step_y, step_x) = operator.attribute("strides", [1, 1]), operator.attribute("dilations", [1, 1])
    padded = functional.pad(layer.read, (left, right, top, bottom))
    rows, columns = layer.weight.shape[2:]
    wide = layer.wanted.shape[3]
    y = (places_NP // wide * down)[:, :, None, None] + torch.arange(rows)[:, None] * step_y
    x = (places_NP % wide * across)[:, :, None, None] + torch.arange(columns) * step_x
    image = torch.arange(len(places_NP))[:, None, None, None]
    return padded.permute(0, 2, 3, 1)[image, y, x].permute(0, 1, 4, 2, 3)
