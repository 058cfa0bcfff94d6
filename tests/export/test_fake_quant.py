"""Roundings with gradients, each against the formula written out by hand."""

import numpy as np
import pytest
import torch

from kdedge_export.calibration.ranges import quantize_weight
from kdedge_export.table import U8
from kdedge_export.training.fake_quant import LearnedSpans, round_between, round_bias, round_u8, round_weight


def test_a_tensor_is_rounded_as_its_table_says_and_gradients_pass_inside() -> None:
    u8 = U8.over((-1.0, 2.0))
    x = torch.linspace(-3.0, 4.0, 1001, requires_grad=True)
    upstream = torch.linspace(0.5, 1.5, 1001)
    rounded = round_u8(x, u8)
    rounded.backward(upstream)
    values = x.detach().numpy()
    assert np.allclose(rounded.detach().numpy(), u8.apply(values), rtol=1e-6, atol=0)
    half = u8.scale / 2
    inside = (values >= u8.low - half) & (values <= u8.high + half)
    assert 0.3 < inside.mean() < 0.6
    assert x.grad is not None
    assert np.array_equal(x.grad.numpy(), np.where(inside, upstream.numpy(), 0))


def test_ties_go_to_the_even_code_as_in_onnx() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, 254.5, 255.5])
    assert round_u8(x, U8(1.0, 0)).tolist() == [0, 2, 2, 4, 254, 255]


def test_weights_and_biases_are_those_of_the_file() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 3, 3, 3)).astype(np.float32) * np.float32([1, 0.01, 10, 1e-9]).reshape(
        4, 1, 1, 1
    )
    bias = np.float32([0.3, -2.0, 0.0, 5.0])  # the last channel's weights vanish beside its bias
    scales = np.abs(weight).reshape(4, -1).max(1) / 127
    scales[0] /= 2  # clips
    codes, coarse, integers = quantize_weight(weight, scales, bias, 0.02)
    assert integers is not None
    found_bias, found_scales = round_bias(torch.from_numpy(bias), torch.from_numpy(scales), 0.02)
    leaf = torch.from_numpy(weight).requires_grad_()
    found = round_weight(leaf, found_scales)
    found.sum().backward()
    assert np.allclose(found_scales.numpy(), coarse, rtol=1e-6)
    assert np.allclose(found.detach().numpy(), codes * coarse.reshape(4, 1, 1, 1), rtol=1e-6)
    assert np.allclose(found_bias.numpy(), integers * (0.02 * coarse), rtol=1e-6)
    assert leaf.grad is not None
    clipped = np.abs(np.rint(weight / coarse.reshape(4, 1, 1, 1))) > 127
    assert 0 < clipped.sum() < clipped.size
    assert np.array_equal(leaf.grad.numpy() == 0, clipped)


def test_the_ends_of_a_range_have_the_gradients_of_lsq() -> None:
    scale, zero_point = 0.0125, 51  # both ends are codes, so that the zero point is not rounded
    ends = [torch.tensor(code * scale, dtype=torch.float64, requires_grad=True) for code in (-zero_point, 204)]
    x = torch.linspace(-2.0001, 4.0002, 997, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(-1.0, 2.0, 997, dtype=torch.float64)
    rounded = round_between(x, *ends)
    rounded.backward(upstream)
    codes = (x / scale).detach()
    below, above = codes.round() < -zero_point, codes.round() > 204
    inside = (codes.round() - codes) / 255
    by_high = torch.where(above, 1.0, torch.where(below, 0.0, inside))
    by_low = torch.where(below, 1.0, torch.where(above, 0.0, -inside))
    assert ends[0].grad is not None
    assert ends[1].grad is not None
    assert ends[0].grad.item() == pytest.approx(float((upstream * by_low).sum()), rel=1e-9)
    assert ends[1].grad.item() == pytest.approx(float((upstream * by_high).sum()), rel=1e-9)
    assert torch.equal(x.grad, torch.where(below | above, 0.0, upstream))  # type: ignore[arg-type]
    assert torch.allclose(rounded.float(), round_u8(x.detach().float(), U8(scale, zero_point)), atol=1e-6)


def test_a_clipped_value_moves_with_its_end() -> None:
    """By finite differences, which see nothing of the rounding."""

    def clipped(low: float, high: float) -> float:
        x = torch.tensor([-9.0, 9.0], dtype=torch.float64)
        ends = (torch.tensor(each, dtype=torch.float64) for each in (low, high))
        return float((round_between(x, *ends) * torch.tensor([2.0, 3.0])).sum())

    ends = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (-0.5, 1.0)]
    (round_between(torch.tensor([-9.0, 9.0]), *ends) * torch.tensor([2.0, 3.0])).sum().backward()
    step = 0.4
    by_low = (clipped(-0.5 + step, 1.0) - clipped(-0.5 - step, 1.0)) / (2 * step)
    by_high = (clipped(-0.5, 1.0 + step) - clipped(-0.5, 1.0 - step)) / (2 * step)
    assert [float(each.grad) for each in ends if each.grad is not None] == pytest.approx([by_low, by_high], rel=0.02)


def learned_by(factor: float, step: float, passes: int) -> LearnedSpans:
    """After some steps of plain descent on a loss that wants both ranges wider, `factor` times as much."""
    learned = LearnedSpans({"sum": (-1.0, 3.0), "small": (0.0, 0.02)}, dict.fromkeys(("sum", "small"), FREE), {}, step)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.01)
    for _ in range(passes):
        optimizer.zero_grad()
        ends = learned.ends()
        wide = learned.round("sum", torch.tensor([-9.0, 9.0]), ends) * torch.tensor([1.0, -1.0])
        # In widths the small one has four times the gradient of each end of the other.
        small = learned.round("small", torch.tensor([9.0]), ends) * 4 * 4 / 0.02
        (factor * (wide.sum() - small.sum())).backward()
        optimizer.step()
    return learned


FREE = (-np.inf, np.inf)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_learned_ranges_step_by_their_width_whatever_the_size_of_the_loss(factor: float) -> None:
    """The end with the largest gradient moves by learning rate x step x width each time, the others by their share."""
    found = learned_by(factor, step=2.0, passes=5).spans()
    assert found["sum"] == pytest.approx((-1.0 - 5 * 0.01 * 2 * 4 / 4, 3.0 + 5 * 0.01 * 2 * 4 / 4), rel=1e-4)
    assert found["small"] == pytest.approx((0.0, 0.02 * (1 + 5 * 0.02)), rel=1e-4)


def test_the_running_size_is_that_of_adam() -> None:
    """Against torch's own, without its momentum, on gradients of any size and sign: the larger end's size is taken."""
    gradients = torch.randn(12, 2, 1, generator=torch.Generator().manual_seed(0)) * 50
    gradients[:, 1] = 0.3 * gradients[:, 0]
    learned = LearnedSpans({"a": (-1.0, 1.0)}, {"a": FREE}, {}, step=1.0)
    twin = torch.nn.Parameter(learned.ends_2T.detach()[:1].clone())
    ours = torch.optim.SGD(learned.parameters(), lr=0.01)
    theirs = torch.optim.Adam([twin], lr=0.01, betas=(0.0, 0.9), eps=1e-20)
    before = learned.ends_2T.detach().clone()
    for gradient_2T in gradients:
        ours.zero_grad()
        (learned.ends() * gradient_2T).sum().backward()
        ours.step()
        twin.grad = gradient_2T[:1] * 2  # a width is 2
        theirs.step()
    assert torch.allclose(learned.ends_2T[:1], twin, rtol=1e-5)
    moved = learned.ends_2T.detach() - before
    assert torch.allclose(moved[1], 0.3 * moved[0], rtol=1e-4)


def test_learned_ranges_stay_inside_their_limits() -> None:
    spans = {"relu6": (0.0, 5.0), "sum": (-1.0, 1.0)}
    learned = LearnedSpans(spans, {"relu6": (0.0, 6.0), "sum": FREE}, {"moved": "relu6"}, step=1.0)
    assert "moved" in learned
    assert "else" not in learned
    assert learned.spans() == {**spans, "moved": (0.0, 5.0)}
    with torch.no_grad():
        learned.ends_2T += torch.tensor([[-1.0, -0.5], [1.0, 0.5]])
    found = learned.spans()
    assert found["moved"] == found["relu6"] == (0.0, 6.0)
    assert found["sum"] == pytest.approx((-2.0, 2.0))
    x = torch.linspace(-9, 9, 7)
    assert torch.equal(learned.round("moved", x, learned.ends()), learned.round("relu6", x, learned.ends()))
