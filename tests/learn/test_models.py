"""Networks: strides, heads, average."""

import pytest
import torch

from kdedge.errors import RecipeError
from kdedge.models.ema import Ema, ema_decay
from kdedge.models.zoo import ARCHITECTURES, ModelSpec, build, count_macs, num_params

ALL = [*ARCHITECTURES, "wide-resnet-10-1"]


@pytest.mark.parametrize("arch", ALL)
def test_every_architecture_builds_for_small_grey_images(arch) -> None:
    network = build(ModelSpec(arch, classes=7, channels=1, halvings=2)).eval()
    x = torch.rand(2, 1, 8, 8)
    maps = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out: maps.append(out.shape[-1]))
        for m in network.modules()
        if isinstance(m, torch.nn.Conv2d)
    ]
    logits = network(x)
    for handle in handles:
        handle.remove()
    assert logits.shape == (2, 7)
    assert max(maps) == 8
    assert maps[-1] == 2 or arch in {"mobilenet-v3-small", "mobilenet-v3-large", "efficientnet-b0"}  # SE ends at 1 x 1
    assert {m for m in maps if m > 1} == {8, 4, 2}
    torch.testing.assert_close(logits, network.head(network.embed(x)))


@pytest.mark.parametrize(("arch", "params", "macs"), [
    # parameters and multiply-adds of the torchvision model table, 1000 classes at 224 px
    ("mobilenet-v2", 3_504_872, 0.30e9),
    ("mobilenet-v3-small", 2_542_856, 0.06e9),
    ("mobilenet-v3-large", 5_483_032, 0.22e9),
    ("resnet18", 11_689_512, 1.81e9),
])  # fmt: skip
def test_the_standard_network_is_torchvisions(arch, params, macs) -> None:
    network = build(ModelSpec(arch, classes=1000))
    assert num_params(network) == params
    assert count_macs(network, 3, 224, 224) == pytest.approx(macs, rel=0.06)


def test_wrn_28_2_has_the_published_size() -> None:
    assert num_params(build(ModelSpec("wide-resnet-28-2", classes=10, halvings=2))) == pytest.approx(1.47e6, rel=0.01)


def test_width_thins_a_mobilenet_and_nothing_else() -> None:
    assert num_params(build(ModelSpec("mobilenet-v2", 10, width=0.5))) == 700_490
    assert num_params(build(ModelSpec("mobilenet-v3-small", 10, width=0.5))) < 800_000
    with pytest.raises(RecipeError, match="no width multiplier"):
        build(ModelSpec("resnet18", 10, width=0.5))


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'mobilenet-v2'"):
        build(ModelSpec("mobilnet-v2", 10))
    with pytest.raises(RecipeError, match="6 n \\+ 4"):
        build(ModelSpec("wide-resnet-27-2", 10))


def test_the_average_follows_its_recursion_buffers_included() -> None:
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
