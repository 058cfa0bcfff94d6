"""Contrastive views: reproducible, a column an image, and each operation inside its range."""

import colorsys
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_pool

from kdedge.data import contrastive_views
from kdedge.data.batches import Batches
from kdedge.data.colour import blur, hue
from kdedge.data.contrastive_views import ContrastiveViewConfig, contrastive, contrastive_draws

PHOTO = ContrastiveViewConfig(
    smallest_area=0.08, flip=True, jitter_strength=1.0, grayscale_probability=0.2, blur_probability=0.5
)
STILL = ContrastiveViewConfig(
    smallest_area=1.0,
    widest_aspect=1.0,
    flip=False,
    jitter_strength=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)


def images(count: int = 16, channels: int = 3, px: int = 24) -> Tensor:
    """Smooth colours, so that what moves them can be measured."""
    small = torch.randint(0, 256, (count, channels, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    return torch.nn.functional.interpolate(small, px, mode="bilinear").round().to(torch.uint8)


def view(images_u8: Tensor, config: ContrastiveViewConfig, seed: int = 0) -> Tensor:
    draws = contrastive_draws(len(images_u8), config, torch.Generator().manual_seed(seed))
    return contrastive(images_u8, config, draws)


def changed(**values: object) -> ContrastiveViewConfig:
    return STILL.model_copy(update=values)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_draws_give_the_same_views_and_a_share_has_its_rows(channels) -> None:
    x = images(channels=channels)
    before = x.clone()
    whole = view(x, PHOTO, 3)
    assert torch.equal(view(x, PHOTO, 3), whole)
    assert not torch.equal(view(x, PHOTO, 4), whole)
    draws = contrastive_draws(16, PHOTO, torch.Generator().manual_seed(3))
    for rows in (slice(0, 5), slice(5, 16), slice(7, 8), slice(9, 9)):
        assert torch.equal(contrastive(x[rows], PHOTO, draws[:, rows]), whole[rows])
    assert whole.dtype == torch.float32
    assert whole.shape == x.shape
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 255
    assert torch.equal(whole, whole.round())
    assert torch.equal(x, before)


def test_without_freedom_nothing_changes() -> None:
    assert torch.equal(view(images(), STILL), images().float())


def test_what_is_not_resolved_is_refused() -> None:
    with pytest.raises(ValueError, match="has not been resolved"):
        view(images(), ContrastiveViewConfig())


def test_a_part_has_the_area_and_aspect_it_may_have() -> None:
    """Read off where the ramps of two channels begin and end."""
    ramp = (torch.arange(48) * 5.0).to(torch.uint8)
    x = torch.stack([ramp.expand(48, 48), ramp[:, None].expand(48, 48), torch.zeros(48, 48, dtype=torch.uint8)])
    for area, aspect in ((0.08, 4 / 3), (0.5, 2.0), (1.0, 4 / 3)):
        out = view(x.expand(400, -1, -1, -1), changed(smallest_area=area, widest_aspect=aspect)) / 5
        # The middle half of a part, twice: its edges are clamped to bytes.
        sides = torch.stack([out[:, 0, 24, 36] - out[:, 0, 24, 12], out[:, 1, 36, 24] - out[:, 1, 12, 24]]) / 24
        found, shape = sides.prod(0), sides[0] / sides[1]
        assert area - 0.05 <= float(found.min())
        assert float(found.max()) <= 1.05
        assert 0.9 / aspect <= float(shape.min())
        assert float(shape.max()) <= 1.1 * aspect
        if area < 1:
            assert float(found.mean()) == pytest.approx((1 + area) / 2, abs=0.05)
            assert float(found.min()) < area + 0.05  # the whole range is used
            assert float(shape.log().mean()) == pytest.approx(0, abs=0.05)
            centre = torch.stack([out[:, 0, 24, 24], out[:, 1, 24, 24]])
            assert centre.std(1).min() > 2  # and lies anywhere


def test_half_of_the_images_are_mirrored_and_only_where_that_is_allowed() -> None:
    x = images(200)
    out = view(x, changed(flip=True))
    mirrored = [torch.equal(o, i.flip(2)) for o, i in zip(out, x.float(), strict=True)]
    same = [torch.equal(o, i) for o, i in zip(out, x.float(), strict=True)]
    assert sum(mirrored) + sum(same) == 200
    assert 60 < sum(mirrored) < 140


def test_a_part_is_turned_about_its_own_centre_and_no_further_than_allowed() -> None:
    x = torch.arange(48.0).mul(5).expand(300, 3, 48, 48).to(torch.uint8)  # brighter to the right
    out = view(x, changed(rotate_degrees=30.0)) / 5
    across = torch.atan2(out[:, 0, 36, 24] - out[:, 0, 12, 24], out[:, 0, 24, 36] - out[:, 0, 24, 12])
    degrees = across.abs() * 180 / torch.pi
    assert 28 < float(degrees.max()) < 31
    assert float(degrees.mean()) == pytest.approx(15, abs=2)
    assert float((out[:, 0, 23:25, 23:25].mean((1, 2)) - 23.5).abs().max()) < 0.2
    assert 100 < int((across > 0).sum()) < 200
    small = view(x, changed(rotate_degrees=30.0, smallest_area=0.2))
    assert not torch.equal(small, view(x, changed(smallest_area=0.2)))


def test_jitter_is_of_its_share_and_in_every_order(monkeypatch) -> None:
    calls: list[str] = []
    for name in ("brightness", "contrast", "color"):
        monkeypatch.setattr(contrastive_views.augment, name, lambda x, f, n=name: calls.extend([n] * len(x)) or x + 0)
    monkeypatch.setattr(contrastive_views, "hue", lambda x, f: calls.extend(["hue"] * len(x)) or x + 0)
    orders: set[tuple[str, ...]] = set()
    draws = contrastive_draws(400, PHOTO, torch.Generator().manual_seed(0))
    for column in draws.T[:, :, None]:
        calls.clear()
        contrastive(images(1), changed(jitter_strength=0.5), column)
        orders.add(tuple(calls))
    assert len(orders) == 25  # 24, and none
    assert {len(set(order)) for order in orders} == {0, 4}
    assert 280 < sum(float(draw) < 0.8 for draw in draws[5]) < 360


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_factors_of_the_jitter_are_in_their_published_ranges(monkeypatch, strength) -> None:
    seen: dict[str, list[float]] = {"brightness": [], "contrast": [], "color": [], "hue": []}
    for name in ("brightness", "contrast", "color"):
        monkeypatch.setattr(contrastive_views.augment, name, lambda x, f, n=name: seen[n].extend(f.tolist()) or x)
    monkeypatch.setattr(contrastive_views, "hue", lambda x, f: seen["hue"].extend(f.tolist()) or x)
    view(images(1, px=8).expand(2000, -1, -1, -1), changed(jitter_strength=strength))
    for name, factors in seen.items():
        low, high = max(1 - 0.8 * strength, 0), 1 + 0.8 * strength
        if name == "hue":
            low, high = -0.2 * strength, 0.2 * strength
        assert 1450 < len(factors) < 1750
        assert min(factors) >= low - 1e-6
        assert max(factors) <= high + 1e-6
        assert min(factors) == pytest.approx(low, abs=0.02 * strength)
        assert max(factors) == pytest.approx(high, abs=0.02 * strength)


def test_a_fifth_is_grey_and_grey_images_stay_grey() -> None:
    out = view(images(300), changed(grayscale_probability=0.2))
    grey = (out.amax(1) == out.amin(1)).flatten(1).all(1)
    assert 35 < int(grey.sum()) < 90
    photo = images(20, channels=1).expand(-1, 3, -1, -1)
    out = view(photo, PHOTO)
    assert float((out.amax(1) - out.amin(1)).max()) <= 1
    for kind in (images(20, channels=1), photo):  # constant images too
        assert torch.isfinite(view(torch.zeros_like(kind), PHOTO)).all()
        assert torch.isfinite(view(torch.full_like(kind, 255), PHOTO)).all()


def test_one_channel_has_brightness_and_contrast_only() -> None:
    x = images(50, channels=1)
    out = view(x, changed(jitter_strength=1.0, grayscale_probability=1.0))
    assert out.shape == x.shape
    assert not torch.equal(out, x.float())


def test_half_are_blurred_and_no_brightness_is_lost() -> None:
    x = images(200, px=40)
    out = view(x, changed(blur_probability=0.5))
    touched = (out != x.float()).flatten(1).any(1)
    assert 50 < int(touched.sum()) < 140  # the smallest sigmas change no byte
    assert float((out - x.float()).mean().abs()) < 0.1
    assert torch.equal(
        view(images(px=16), changed(blur_probability=1.0)), images(px=16).float()
    )  # a kernel of one pixel


def test_an_image_narrower_than_the_blur_is_mirrored_more_than_once() -> None:
    x, sigma = images(px=16), torch.full((len(images(px=16)),), 2.0)
    for size in (1, 2, 3):
        for narrow in (x[..., :size], x[..., :size, :]):
            tall = narrow.numpy().astype(np.float64)
            weight = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
            for axis in (3, 2):
                both = [(6, 6) if each == axis else (0, 0) for each in range(4)]
                padded = np.pad(tall, both, mode="reflect")
                moved = [padded.take(range(k, k + tall.shape[axis]), axis) for k in range(13)]
                tall = sum(w * m for w, m in zip(weight / weight.sum(), moved, strict=True))
            assert np.abs(blur(narrow.float(), sigma, 6).numpy() - tall).max() <= 0.501


def test_blur_is_the_sum_written_out() -> None:
    x, sigma, radius = images(2, px=12).float(), torch.tensor([0.8, 1.7]), 2
    out = blur(x, sigma, radius)
    for n in range(2):
        weights = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma[n]) ** 2)
        kernel = torch.outer(weights, weights) / weights.sum() ** 2
        padded = torch.nn.functional.pad(x[n : n + 1], (2, 2, 2, 2), mode="reflect")
        expected = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)
        assert float((out[n] - expected[0]).abs().max()) <= 0.5 + 1e-3  # bytes


def test_hue_is_that_of_colorsys() -> None:
    x, turn = images(6, px=6).float(), torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.35, 0.5])
    out = hue(x, turn)
    assert torch.equal(out[2], x[2])
    for n in range(6):
        for row in range(6):
            for column in range(6):
                h, s, v = colorsys.rgb_to_hsv(*(x[n, :, row, column] / 255).tolist())
                expected = torch.tensor(colorsys.hsv_to_rgb((h + float(turn[n])) % 1, s, v)) * 255
                assert float((out[n, :, row, column] - expected).abs().max()) <= 0.5 + 1e-3


def batches(share: tuple[int, int] = (0, 1), labeled: int = 0) -> Batches:
    config = changed(smallest_area=0.5, jitter_strength=0.5)
    return Batches(toy_pool(), config, labeled_batch=labeled, unlabeled_batch=13, seed=0, stage="pretrain", share=share)


def test_a_batch_has_two_different_views_of_each_image() -> None:
    batch = batches().at(3)
    first, second = batch.images.split(13)
    assert len(batch.labels_B) == len(batch.position_B) == 0
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for views in (first, second):  # of the image that position_U names: the brightest third is its class's
        thirds = torch.stack([views[:, 0, 3 * k : 3 * k + 2].mean((1, 2)) for k in range(3)], 1)
        assert (thirds.argmax(1) == batch.truth_U).float().mean() > 0.8
    again = batches().at(3)
    assert torch.equal(again.images, batch.images)
    assert not torch.equal(batches().at(4).images, batch.images)


@pytest.mark.parametrize(("world", "labeled"), [(2, 0), (3, 0), (5, 4)])
def test_processes_that_share_a_step_have_together_what_one_has(world, labeled) -> None:
    whole = batches(labeled=labeled).at(2)
    shared = [batches((rank, world), labeled).at(2) for rank in range(world)]
    assert torch.equal(torch.cat([share.images for share in shared]), whole.images)
    assert all(torch.equal(share.position_U, whole.position_U) for share in shared)
