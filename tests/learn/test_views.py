"""Views: reproducible, inside the range, and no further than the config says."""

import pytest
import torch

from kdedge.data.augment import shift
from kdedge.data.views import OPERATIONS, ViewConfig, normalize, strong, strong_draws, weak, weak_draws

PHOTO = ViewConfig(
    flip=True,
    shift_fraction=0.125,
    rotate_degrees=30.0,
    shear=0.3,
    translate_fraction=0.3,
    cutout_fraction=0.5,
    fill=127.0,
    geometric_only=False,
)


def images(count: int = 64, channels: int = 3, px: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, px, px), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def weakly(images_u8: torch.Tensor, config: ViewConfig, seed: int = 0) -> torch.Tensor:
    return weak(images_u8, config, weak_draws(len(images_u8), torch.Generator().manual_seed(seed)))


def strongly(images_u8: torch.Tensor, config: ViewConfig, seed: int = 0) -> torch.Tensor:
    return strong(images_u8, config, strong_draws(len(images_u8), config, torch.Generator().manual_seed(seed)))


def test_the_same_generator_gives_the_same_views_and_another_gives_others() -> None:
    for view in (weakly, strongly):
        assert torch.equal(view(images(), PHOTO, 3), view(images(), PHOTO, 3))
        assert not torch.equal(view(images(), PHOTO, 3), view(images(), PHOTO, 4))


def test_a_share_of_a_batch_has_the_rows_of_the_whole() -> None:
    draws = strong_draws(64, PHOTO, torch.Generator().manual_seed(0))
    whole = strong(images(), PHOTO, draws)
    for rows in (slice(0, 21), slice(21, 64), slice(5, 6), slice(7, 7)):
        assert torch.equal(strong(images()[rows], PHOTO, draws[:, rows]), whole[rows])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"geometric_only": True, "flip": False}], ids=["photo", "digits"])
def test_fixed_shapes_give_the_same_views(channels, changes) -> None:
    x, config = images(120, channels), PHOTO.model_copy(update=changes)
    draws = strong_draws(len(x), config, torch.Generator().manual_seed(5))
    assert torch.equal(strong(x, config, draws, fixed_shapes=True), strong(x, config, draws))


def test_views_stay_in_range_and_leave_their_input_alone() -> None:
    before = images()
    for view in (weakly, strongly):
        given = before.clone()
        out = view(given, PHOTO)
        assert out.dtype == torch.float32
        assert out.shape == before.shape
        assert 0 <= float(out.min()) <= float(out.max()) <= 255
        assert torch.equal(given, before)


def test_a_weak_view_is_one_of_the_shifts_mirrored_or_not() -> None:
    x = images(8, px=16)
    candidates = [shift(x.float(), torch.tensor([[i, j]]).expand(8, 2), 2) for i in range(5) for j in range(5)]
    candidates += [c.flip(3) for c in candidates]
    out = weakly(x, PHOTO)
    assert all(any(torch.equal(out[i], c[i]) for c in candidates) for i in range(8))


def test_without_freedom_nothing_moves() -> None:
    still = ViewConfig(
        flip=False,
        shift_fraction=0.0,
        rotate_degrees=0.0,
        shear=0.0,
        translate_fraction=0.0,
        cutout_fraction=0.0,
        fill=0.0,
        geometric_only=True,
    )
    assert torch.equal(strongly(images(), still), images().float())


def test_every_operation_is_drawn_equally_often_and_applied_to_its_images(monkeypatch) -> None:
    import kdedge.data.views as module

    counts = dict.fromkeys(OPERATIONS, 0)
    photometric, matrices = module._photometric, module._matrices

    def counting(name, x, magnitude):
        counts[name] += len(x)
        return photometric(name, x, magnitude)

    def counting_geometric(signed, *rest):
        for name, part in zip(OPERATIONS[-len(signed) :], signed, strict=True):
            counts[name] += len(part)
        return matrices(signed, *rest)

    monkeypatch.setattr(module, "_photometric", counting)
    monkeypatch.setattr(module, "_matrices", counting_geometric)
    strongly(images(7000, px=8), PHOTO)  # two operations an image
    assert sum(counts.values()) == 14_000
    assert len(OPERATIONS) == 14
    assert all(abs(count - 1000) < 130 for count in counts.values()), counts  # four standard deviations


def test_a_strong_view_differs_more_than_a_weak_one() -> None:
    smooth = torch.nn.functional.interpolate(images(64, px=4).float(), 32, mode="bilinear").to(torch.uint8)
    reference = smooth.float()
    config = PHOTO.model_copy(update={"flip": False})
    weak_change = (weakly(smooth, config) - reference).abs().mean()
    strong_change = (strongly(smooth, config) - reference).abs().mean()
    assert strong_change > 1.5 * weak_change


def test_normalize_is_that_of_the_device() -> None:
    from kdedge_device.preprocess import Preprocess

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = images(4)
    ours = normalize(x.float(), torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))
    theirs = Preprocess(16, 16, 3, "squash", mean, std).normalize(x.permute(0, 2, 3, 1).numpy())
    assert float((ours - torch.from_numpy(theirs)).abs().max()) < 1e-5
