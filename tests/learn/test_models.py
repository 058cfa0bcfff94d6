"""Networks: strides, heads, average."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from kdedge.errors import RecipeError
from kdedge.models.ema import Ema, ema_decay
from kdedge.models.zoo import ARCHITECTURES, ModelSpec, architecture, build, count_macs, num_params

ALL = [*ARCHITECTURES, "wide-resnet-10-1"]


def map_sizes(network: nn.Module, x: torch.Tensor) -> list[int]:
    """Sides of the maps that convolutions and poolings make, larger ones first; 1 is squeeze-excite's, or the end."""
    sizes: set[int] = set()
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    handles = [
        m.register_forward_hook(lambda _m, _i, out: sizes.add(out.shape[-1]))
        for m in network.modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        network.eval()(x)
    for handle in handles:
        handle.remove()
    return sorted(sizes - {1}, reverse=True)


@pytest.mark.parametrize("arch", ALL)
def test_every_architecture_builds_for_small_grey_images(arch) -> None:
    network = build(ModelSpec(arch, classes=7, channels=1, halvings=2))
    x = torch.rand(2, 1, 8, 8)
    assert map_sizes(network, x) == [8, 4, 2]
    logits = network(x)
    assert logits.shape == (2, 7)
    assert torch.equal(logits, network(x)), "nothing is drawn in eval mode"
    assert network.embed(x).shape == (2, network.head.in_features)
    torch.testing.assert_close(logits, network.head(network.embed(x)))
    network.train()(x).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name not in {"resnet34", "resnet50"}])
def test_the_last_halvings_stay_whatever_the_size(arch) -> None:
    """28 and 32 px are halved three times, 64 px four; SqueezeNet rounds otherwise and has four in all."""
    odd = arch == "squeezenet"
    three = build(ModelSpec(arch, classes=3, halvings=3))
    assert map_sizes(three, torch.zeros(1, 3, 28, 28)) == [28, 14, 7, 3 if odd else 4]
    assert map_sizes(three, torch.zeros(1, 3, 32, 32)) == [32, 16, 8, 4]
    four = build(ModelSpec(arch, classes=3, halvings=4))
    assert map_sizes(four, torch.zeros(1, 3, 64, 64)) == ([31, 15, 7, 3] if odd else [64, 32, 16, 8, 4])
    whole = build(ModelSpec(arch, classes=3, halvings=architecture(arch).halvings))
    assert map_sizes(whole, torch.zeros(1, 3, 224, 224)) == ([111, 55, 27, 13] if odd else [112, 56, 28, 14, 7])


@pytest.mark.parametrize("arch", ALL)
def test_a_state_dict_fits_a_fresh_network(arch) -> None:
    """As a plain dict of tensors, which is what .safetensors and checkpoints keep (MNASNet's own class refuses it)."""
    spec = ModelSpec(arch, classes=3, channels=1, halvings=2)
    network, other = build(spec).eval(), build(spec).eval()
    other.load_state_dict(dict(network.state_dict()))
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(network(x), other(x))


@pytest.mark.parametrize(("arch", "width", "params", "macs"), [
    # parameters and multiply-adds of the torchvision model table, 1000 classes at 224 px
    ("mobilenet-v2", 1.0, 3_504_872, 0.30e9),
    ("mobilenet-v3-small", 1.0, 2_542_856, 0.06e9),
    ("mobilenet-v3-large", 1.0, 5_483_032, 0.22e9),
    ("efficientnet-b0", 1.0, 5_288_548, 0.39e9),
    ("efficientnet-lite0", 1.0, 4_652_008, 0.385e9),  # timm 1.0.31: its own efficientnet_lite0, counted the same way
    ("shufflenet-v2", 0.5, 1_366_792, 0.04e9),
    ("shufflenet-v2", 1.0, 2_278_604, 0.145e9),
    ("shufflenet-v2", 1.5, 3_503_624, 0.296e9),
    ("shufflenet-v2", 2.0, 7_393_996, 0.583e9),
    ("mnasnet", 0.5, 2_218_512, 0.104e9),
    ("mnasnet", 0.75, 3_170_208, 0.215e9),
    ("mnasnet", 1.0, 4_383_312, 0.314e9),
    ("mnasnet", 1.3, 6_282_256, 0.526e9),
    ("squeezenet", 1.0, 1_235_496, 0.349e9 - 0.086e9),  # its head reads the mean, not all of 13 x 13: 512000 x 168 less
    ("regnet-x-400mf", 1.0, 5_495_976, 0.414e9),
    ("regnet-y-400mf", 1.0, 4_344_144, 0.402e9),
    ("resnet18", 1.0, 11_689_512, 1.81e9),
])  # fmt: skip
def test_the_standard_network_has_the_published_size(arch, width, params, macs) -> None:
    with torch.device("meta"):
        network = build(ModelSpec(arch, classes=1000, width=width, halvings=architecture(arch).halvings))
    assert num_params(network) == params
    assert count_macs(network, 3, 224, 224) == pytest.approx(macs, rel=0.06)


def test_wrn_28_2_has_the_published_size() -> None:
    assert num_params(build(ModelSpec("wide-resnet-28-2", classes=10, halvings=2))) == pytest.approx(1.47e6, rel=0.01)


def test_width_thins_a_mobilenet_and_nothing_else() -> None:
    assert num_params(build(ModelSpec("mobilenet-v2", 10, width=0.5))) == 700_490
    assert num_params(build(ModelSpec("mobilenet-v3-small", 10, width=0.5))) < 800_000
    with pytest.raises(RecipeError, match="no width multiplier"):
        build(ModelSpec("resnet18", 10, width=0.5))
    for arch, widths in (("shufflenet-v2", "0.5, 1.0, 1.5, 2.0"), ("mnasnet", "0.5, 0.75, 1.0, 1.3")):
        with pytest.raises(RecipeError, match=f"'{arch}' comes in the widths {widths}, but 0.6"):
            build(ModelSpec(arch, 10, width=0.6))


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'mobilenet-v2'"):
        build(ModelSpec("mobilnet-v2", 10))
    with pytest.raises(RecipeError, match="6 n \\+ 4"):
        build(ModelSpec("wide-resnet-27-2", 10))


class Timms(nn.Module):
    """A network as timm makes them: a shortcut that strides too, and a head that is wider than `num_features`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.main = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.pool, self.shortcut = nn.AvgPool2d(2, 2), nn.Conv2d(4, 8, 1)
        self.last, self.wide = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 12)
        self.num_features, self.head_hidden_size = 8, 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.main(x) + self.shortcut(self.pool(x))
        return self.wide(self.last(x).mean((2, 3)))


class OneSize(Timms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 224, "224 px were expected"
        return super().forward(x)


def test_a_network_of_timm_keeps_its_last_halvings_and_its_wide_head(monkeypatch) -> None:
    timm = ModuleType("timm")
    timm.is_model = lambda name: True  # type: ignore[attr-defined]
    made = {"plain": Timms, "one_size": OneSize}
    timm.create_model = lambda name, num_classes, in_chans: made[name](in_chans)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    network = build(ModelSpec("timm/plain", 5, channels=1, halvings=2))
    assert map_sizes(network, torch.zeros(1, 1, 16, 16)) == [16, 8, 4]
    assert network.head.in_features == 12
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 5)
    build(ModelSpec("timm/one_size", 5, halvings=5))
    with pytest.raises(RecipeError, match="strides of 'timm/one_size' cannot be changed \\(224 px were expected"):
        build(ModelSpec("timm/one_size", 5, halvings=2))


def test_the_average_follows_its_recursion_buffers_included() -> None:
    torch.manual_seed(0)  # of other draws one in some thousands ends near zero, where the tolerance is too small
    network = build(ModelSpec("wide-resnet-10-1", 3, 1, halvings=2))
    ema = Ema(network, ceiling=0.9)
    expected = {n: t.clone() for n, t in network.state_dict().items()}
    for step in range(4):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        network.train()(torch.rand(4, 1, 8, 8))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
            else:
                expected[name] = tensor.clone()
    for name, tensor in ema.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not ema.network.training
    assert [ema_decay(k, 0.999) for k in (0, 90)] == [0.1, 0.91]
    assert ema_decay(10**6, 0.999) == 0.999
