"""Layers of the engine: the same numbers as torch's, the same tensors, and gone after the block."""

import pytest
import torch
from torch import Tensor, nn

from kdedge.models.zoo import ModelSpec, build
from kdedge.train.layers import own_layer, replaced
from kdedge.train.parts import in_parts

LAST = torch.channels_last


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters, for a fixed gradient of the output."""
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_depthwise_convolution_has_torchs_numbers_on_maps_of_every_size(kernel: int, side: int) -> None:
    torch.manual_seed(0)
    for stride in (1, 2):
        for padding in (kernel // 2, kernel - 1):
            for bias in (False, True):
                layer = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=bias).double()
                own = own_layer(layer)
                assert own is not None
                x = torch.randn(4, 6, side, side + (side > 2), dtype=torch.float64).contiguous(memory_format=LAST)
                for mine, theirs in zip(gradients(own, x), gradients(layer, x), strict=True):
                    torch.testing.assert_close(mine, theirs)


def test_taps_are_summed_where_the_map_is_smaller_than_the_kernel() -> None:
    """Else the test above could compare torch with itself."""
    names = set()
    for side in (1, 2, 5):
        own = own_layer(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False))
        assert own is not None
        names.add(type(own(torch.rand(2, 4, side, side)).grad_fn).__name__)
    assert names == {"MulBackward0", "_TapSumsBackward", "ConvolutionBackward0"}


@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format])
def test_a_pointwise_convolution_has_torchs_numbers(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    for side in (1, 3):
        for bias in (False, True):
            layer = nn.Conv2d(5, 7, 1, bias=bias).double()
            own = own_layer(layer)
            assert own is not None
            x = torch.randn(4, 5, side, side, dtype=torch.float64).contiguous(memory_format=memory_format)
            for mine, theirs in zip(gradients(own, x), gradients(layer, x), strict=True):
                torch.testing.assert_close(mine, theirs)
            assert own(x).is_contiguous(memory_format=memory_format)
    if memory_format == LAST:
        assert "Convolution" not in type(own(x).permute(0, 2, 3, 1).grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]


def test_relu6_is_the_same_to_the_bit_at_its_corners_too() -> None:
    x = torch.cat([torch.linspace(-3, 9, 97), torch.tensor([0.0, -0.0, 6.0, torch.inf, -torch.inf, torch.nan])])
    found = []
    for kind in (nn.ReLU6(inplace=True), own_layer(nn.ReLU6(inplace=True))):
        assert kind is not None
        leaf = x.clone().requires_grad_()
        y = kind(leaf * 1.0)
        y.backward(torch.linspace(1, 2, len(x)))
        found.append((y.detach(), leaf.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert own_layer(nn.ReLU6()) is None


def test_what_is_derived_or_padded_otherwise_is_left_alone() -> None:
    class Derived(nn.Conv2d):
        pass

    assert own_layer(Derived(4, 4, 1)) is None
    assert own_layer(nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")) is None
    assert own_layer(nn.Conv2d(4, 4, 3, padding="same", groups=4)) is None
    assert own_layer(nn.Conv2d(4, 4, 3, padding=1)) is None
    assert own_layer(nn.Conv2d(4, 8, 3, padding=1, groups=4)) is None
    assert own_layer(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)) is None


def step(network: nn.Module, x: Tensor) -> list[Tensor]:
    network.zero_grad()
    torch.manual_seed(3)  # dropout
    logits = network(x)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("arch", ["mobilenet-v2", "mobilenet-v3-small"])
def test_a_whole_network_learns_the_same_in_parts_too_and_is_itself_again_afterwards(arch: str) -> None:
    torch.manual_seed(0)
    width = 0.25 if arch == "mobilenet-v2" else 1.0
    network = build(ModelSpec(arch, 3, width=width)).double().to(memory_format=LAST).train()
    modules, names = list(network.modules()), list(network.state_dict())
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=LAST)
    for compute in (None, in_parts(2)):
        network.compute = compute
        plain = step(network, x)
        with replaced([network], own_layer):
            own = step(network, x)
            kinds = {type(module).__name__ for module in network.modules()}
            assert list(network.state_dict()) == names
            network.eval()
        assert {"_Pointwise", "_Depthwise"} <= kinds
        assert list(network.modules()) == modules
        assert not any(module.training for module in modules)  # as it was left inside the block
        network.train()
        assert len(own) == len(plain)
        largest = max(float(gradient.norm()) for gradient in plain)
        for mine, theirs in zip(own, plain, strict=True):  # a bias before a batch norm has no gradient but rounding
            assert float((mine - theirs).norm()) < 1e-9 * max(float(theirs.norm()), 1e-3 * largest)


def test_in_bfloat16_gradients_arrive_in_the_weights_own_precision() -> None:
    torch.manual_seed(0)
    network = build(ModelSpec("mobilenet-v2", 3, width=0.25)).to(memory_format=LAST).train()
    x = torch.rand(4, 3, 32, 32).contiguous(memory_format=LAST)
    with replaced([network], own_layer), torch.autocast("cpu", torch.bfloat16):
        network(x).float().square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all())
