"""A backbone in parts: less memory, the same mathematics."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_network

from kdedge.methods.teacher import MiddleLayer, ask
from kdedge.models.zoo import Network
from kdedge.train.optim import set_batch_norm_momentum
from kdedge.train.parts import in_parts


def plain_network(dropout: float = 0.0) -> Network:
    """Without batch norm, in float64."""
    torch.manual_seed(1)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Network(backbone, nn.Linear(6, 3)).double()


def images(count: int = 10) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(network: Network, compute: Callable[[nn.Module, Tensor], Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a loss that compares every image with every other."""
    network.compute = compute
    network.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    logits_BK = network(images().to(next(network.parameters()).dtype))
    loss = (logits_BK @ logits_BK.T).softmax(1).square().sum() + logits_BK.square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters() if p.grad is not None]


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert len(found[1]) == len(expected[1])
    for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64])
def test_without_batch_norm_gradients_are_those_of_the_whole_batch(parts) -> None:
    network = plain_network()
    assert_same(gradients(network, in_parts(parts)), gradients(network, None))


def test_with_frozen_batch_norms_too_and_their_statistics_stay() -> None:
    network = toy_network().double().train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    set_batch_norm_momentum(network, 0.0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    whole = gradients(network, None)
    assert_same(gradients(network, in_parts(3)), whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_dropout_draws_the_same_in_the_repetition() -> None:
    def chunked(backbone: nn.Module, x_BCHW: Tensor) -> Tensor:
        return torch.cat([backbone(chunk) for chunk in x_BCHW.tensor_split(3)])

    network = plain_network(dropout=0.5).train()
    assert_same(gradients(network, in_parts(3)), gradients(network, chunked))
    state = torch.get_rng_state()
    gradients(network, chunked)
    assert torch.equal(torch.get_rng_state(), state)  # what a step draws afterwards does not move either


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_move_once_a_step(momentum) -> None:
    network = Network(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), nn.Linear(64, 3)).double().train()
    (norm,) = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    norm.momentum = momentum
    norm.running_mean.fill_(0.7)
    norm.running_var.fill_(2.0)
    gradients(network, in_parts(4))
    chunks = images().tensor_split(4)
    assert [len(chunk) for chunk in chunks] == [3, 3, 2, 2]
    mean = sum(len(chunk) / 10 * chunk.mean() for chunk in chunks)
    var = sum(len(chunk) / 10 * chunk.var() for chunk in chunks)
    torch.testing.assert_close(mean, images().mean())
    torch.testing.assert_close(norm.running_mean, ((1 - momentum) * 0.7 + momentum * mean).reshape(1))
    torch.testing.assert_close(norm.running_var, ((1 - momentum) * 2.0 + momentum * var).reshape(1))
    assert norm.momentum == momentum
    assert norm.num_batches_tracked == 1


def test_no_chunk_is_of_one_image_which_batch_norm_cannot_normalise() -> None:
    seen = []
    network = Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), nn.Linear(64, 3)).double().train()
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for parts in (4, 5, 8, 64):
        seen.clear()
        gradients(network, in_parts(parts))
        assert min(seen) >= 2


def test_each_chunk_is_normalised_by_its_own_statistics() -> None:
    network = toy_network().double().train()

    def chunked(backbone: nn.Module, x_BCHW: Tensor) -> Tensor:
        return torch.cat([backbone(chunk) for chunk in x_BCHW.tensor_split(2)])

    parts, chunks, whole = (gradients(network, compute) for compute in (in_parts(2), chunked, None))
    assert_same(parts, chunks)
    assert not torch.allclose(parts[0], whole[0], rtol=1e-6)


def test_what_is_read_inside_the_backbone_is_whole_and_has_its_gradient() -> None:
    """FitNets compares a layer in the middle, which a hook reads once a part."""
    network = plain_network()
    middle = MiddleLayer("3", 6)
    found = []
    for compute in (None, in_parts(3)):
        network.compute = compute
        network.zero_grad(set_to_none=True)
        answers = ask(network, images(), middle)
        assert answers.map_MCHW is not None
        (answers.map_MCHW.square().mean() + answers.logits_MK.square().mean()).backward()
        gradients_found = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([answers.map_MCHW.detach(), *gradients_found])
    assert len(found[0]) == len(found[1]) == 7
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def kept_bytes(network: Network, compute: Any) -> int:
    """What the forward pass keeps for the backward pass, parameters aside, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.compute = compute
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(images(32).float()).sum()
    loss.backward()
    return sum(kept.values())


def test_activations_are_not_kept() -> None:
    network = toy_network().train()
    whole, parts = kept_bytes(network, None), kept_bytes(network, in_parts(4))
    assert parts < whole / 20


def test_a_chunk_is_computed_again_right_before_its_own_backward_pass() -> None:
    """So that no two chunks are in memory together."""
    events: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            events.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            events.append(f"backward of {len(x)}")
            return gradient * 2

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Watched.apply(x)

    network = Network(nn.Sequential(nn.Conv2d(1, 2, 3), Layer(), nn.Flatten()), nn.Linear(72, 3)).double()
    gradients(network, in_parts(3))
    assert events[:3] == ["forward"] * 3
    assert events[3:] == ["forward", "backward of 3", "forward", "backward of 3", "forward", "backward of 4"]
