"""NT-Xent against the formula written out with plain numbers, and what it must and must not depend on."""

import math

import pytest
import torch
from torch import Tensor

from kdedge.losses.contrastive import Contrast, nt_xent, nt_xent_in_chunks

TINY = 1e-9


def embeddings(count: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def written_out(first: Tensor, second: Tensor, temperature: float, queue: Tensor | None) -> tuple[float, float]:
    """Equation 1 for each ordered pair, in Python's numbers; and how often the other view is strictly the nearest."""
    views = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in [*first.tolist(), *second.tolist()]]
    others = [] if queue is None else queue.tolist()
    images, total, nearest = len(first), 0.0, 0
    for i, mine in enumerate(views):
        j = (i + images) % (2 * images)
        cosines = {k: sum(a * b for a, b in zip(mine, view, strict=True)) for k, view in enumerate(views) if k != i}
        cosines |= {-1 - q: sum(a * b for a, b in zip(mine, row, strict=True)) for q, row in enumerate(others)}
        total -= math.log(
            math.exp(cosines[j] / temperature) / sum(math.exp(cosine / temperature) for cosine in cosines.values())
        )
        nearest += all(cosine < cosines[j] for k, cosine in cosines.items() if k != j)
    return total / len(views), nearest / len(views)


def everywhere(first: Tensor, second: Tensor, temperature: float, queue: Tensor | None = None) -> list[Tensor]:
    """The loss of the plain form and of several chunks, with the gradients of both views."""
    found = []
    for chunk in (None, 1, 3, 1000):
        leaves = [each.clone().requires_grad_() for each in (first, second)]
        if chunk is None:
            loss = nt_xent(*leaves, temperature, queue)
        else:
            loss = nt_xent_in_chunks(*leaves, temperature, queue, chunk).loss
        found.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in torch.autograd.grad(loss, leaves))]))
    return found


@pytest.mark.parametrize("images", [1, 2, 5, 8])
@pytest.mark.parametrize("dims", [2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("remembered", [None, 0, 4])
def test_nt_xent_is_the_formula_written_out(images, dims, temperature, remembered) -> None:
    first, second = embeddings(images, dims), embeddings(images, dims, 1)
    queue = None if remembered is None else unit(embeddings(remembered, dims, 2))
    loss, accuracy = written_out(first, second, temperature, queue)
    assert nt_xent(first, second, temperature, queue).item() == pytest.approx(loss, rel=1e-9, abs=TINY)
    for chunk in (1, 3, 1000):
        found = nt_xent_in_chunks(first, second, temperature, queue, chunk)
        assert found.loss.item() == pytest.approx(loss, rel=1e-9, abs=TINY)
        assert found.accuracy.item() == pytest.approx(accuracy, abs=TINY)


@pytest.mark.parametrize("remembered", [0, 6])
def test_chunks_have_the_gradient_of_the_whole(remembered) -> None:
    first, second, queue = embeddings(7, 5), embeddings(7, 5, 1), unit(embeddings(remembered, 5, 2))
    plain, *chunked = everywhere(first, second, 0.3, queue)
    assert float(plain[1:].abs().max()) > 0.01
    for each in chunked:
        torch.testing.assert_close(each, plain, rtol=1e-12, atol=1e-14)
    leaves = tuple(each.clone().requires_grad_() for each in (first, second))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent_in_chunks(a, b, 0.3, queue, 4).loss, leaves)


def test_nothing_flows_into_the_queue() -> None:
    queue = unit(embeddings(3, 4)).requires_grad_()
    for loss in (nt_xent(*pair(), 0.5, queue), nt_xent_in_chunks(*pair(), 0.5, queue).loss):
        (loss + 0 * queue.sum()).backward()
        assert queue.grad is not None
        assert not queue.grad.any()


def pair() -> tuple[Tensor, Tensor]:
    return embeddings(6, 4, 3).requires_grad_(), embeddings(6, 4, 4).requires_grad_()


def test_neither_order_nor_length_of_embeddings_matters() -> None:
    first, second = embeddings(6, 4), embeddings(6, 4, 1)
    loss = nt_xent_in_chunks(first, second, 0.5).loss
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    for changed in (
        (second, first),
        (first[order], second[order]),
        (first * 7.0, second * torch.rand(6, 1, dtype=torch.float64)),
        (first.roll(1, 1), second.roll(1, 1)),
    ):
        torch.testing.assert_close(nt_xent_in_chunks(*changed, 0.5).loss, loss, rtol=1e-12, atol=0)
    assert not torch.isclose(nt_xent_in_chunks(first, second[order], 0.5).loss, loss)  # other pairs


def test_alike_embeddings_lose_the_logarithm_of_the_others_and_none_is_nearest() -> None:
    alike = torch.ones(5, 3, dtype=torch.float64)
    for temperature in (0.01, 1.0, 100.0):
        found = nt_xent_in_chunks(alike, alike, temperature, unit(alike)[:4], 3)
        assert found.loss.item() == pytest.approx(math.log(2 * 5 - 1 + 4), rel=1e-12)
        assert found.accuracy.item() == 0


def test_one_image_alone_has_nothing_to_lose() -> None:
    for found in everywhere(embeddings(1, 4), embeddings(1, 4, 1), 0.5):
        assert float(found.abs().max()) < TINY


def test_the_limits_of_the_temperature() -> None:
    """Hot: all others weigh the same. Cold: only the nearest other counts, and the loss is a distance to it."""
    first, second = embeddings(6, 4), embeddings(6, 4, 1)
    assert nt_xent_in_chunks(first, second, 1e6).loss.item() == pytest.approx(math.log(11), abs=1e-5)
    views = unit(torch.cat([first, second]))
    cosines = (views @ views.T).fill_diagonal_(-2)
    behind = cosines.amax(1) - cosines.gather(1, torch.arange(12).roll(6)[:, None]).squeeze(1)
    temperature = 1e-3
    assert temperature * nt_xent_in_chunks(first, second, temperature).loss.item() == pytest.approx(
        float(behind.mean()), abs=1e-2 * float(behind.mean())
    )


def test_views_that_agree_and_differ_from_all_others_lose_nothing() -> None:
    apart = torch.eye(6, dtype=torch.float64)
    assert nt_xent_in_chunks(apart, apart, 0.02).loss.item() < 1e-15
    assert nt_xent_in_chunks(apart, apart, 0.02).accuracy.item() == 1


def test_under_autocast_nothing_is_rounded_forwards_or_backwards() -> None:
    first, second = (each.float() for each in (embeddings(9, 16), embeddings(9, 16, 1)))

    def found(enabled: bool) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (first, second)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            contrast: Contrast = nt_xent_in_chunks(*leaves, 0.1, unit(second)[:4], 5)
            contrast.loss.backward()
        return [contrast.loss.detach(), *(leaf.grad for leaf in leaves)]

    for rounded, exact in zip(found(True), found(False), strict=True):
        assert torch.equal(rounded, exact)
    halves = nt_xent_in_chunks(first.bfloat16(), second.bfloat16(), 0.1)
    assert halves.loss.dtype == torch.float32


def test_an_embedding_that_is_no_number_is_not_hidden() -> None:
    first, second = embeddings(4, 3), embeddings(4, 3, 1)
    first[2, 1] = math.nan
    assert nt_xent_in_chunks(first, second, 0.5).loss.isnan()
    zero = torch.zeros(4, 3, requires_grad=True)
    nt_xent_in_chunks(zero, zero, 0.5).loss.backward()
    assert zero.grad is not None
    assert not zero.grad.any()
