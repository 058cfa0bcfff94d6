"""Each operation against Pillow, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from kdedge.data import augment


@pytest.fixture(params=[3, 1], ids=["rgb", "grey"])
def images(request: pytest.FixtureRequest) -> torch.Tensor:
    """uint8-valued float [6, C, 20, 24]: noise, a ramp, a constant, two levels, dark, bright."""
    rng = np.random.default_rng(0)
    channels = request.param
    noise = rng.integers(0, 256, (channels, 20, 24))
    ramp = np.broadcast_to(np.arange(480).reshape(20, 24) // 2, (channels, 20, 24))
    constant = np.full((channels, 20, 24), 77)
    levels = rng.choice([40, 200], (channels, 20, 24))
    dark, bright = rng.integers(3, 60, (channels, 20, 24)), rng.integers(180, 250, (channels, 20, 24))
    return torch.from_numpy(np.stack([noise, ramp, constant, levels, dark, bright])).float()


def to_pillow(x_CHW: torch.Tensor) -> Image.Image:
    array = x_CHW.to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def from_pillow(picture: Image.Image) -> torch.Tensor:
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).float()


def worst(ours: torch.Tensor, theirs: list[Image.Image]) -> float:
    return float((ours - torch.stack([from_pillow(picture) for picture in theirs])).abs().max())


ENHANCE = [
    (augment.brightness, ImageEnhance.Brightness),
    (augment.color, ImageEnhance.Color),
    (augment.contrast, ImageEnhance.Contrast),
    (augment.sharpness, ImageEnhance.Sharpness),
]


@pytest.mark.parametrize(("ours", "theirs"), ENHANCE, ids=lambda f: f.__name__)
def test_enhancements_are_pillows_with_a_factor_for_each_image(ours, theirs, images) -> None:
    factors = torch.tensor([0.05, 0.3, 0.5, 0.71, 0.95, 1.0])
    expected = [theirs(to_pillow(x)).enhance(float(f)) for x, f in zip(images, factors, strict=True)]
    assert worst(ours(images, factors), expected) <= 1  # float32 against Pillow's rounding


def test_histogram_operations_are_pillows_exactly(images) -> None:
    pictures = [to_pillow(x) for x in images]
    assert worst(augment.equalize(images), [ImageOps.equalize(p) for p in pictures]) == 0
    assert worst(augment.autocontrast(images), [ImageOps.autocontrast(p) for p in pictures]) <= 1


def test_posterize_and_solarize_are_pillows_exactly(images) -> None:
    bits = torch.tensor([4.0, 5.2, 6.9, 7.0, 8.0, 4.99])
    expected = [ImageOps.posterize(to_pillow(x), int(b)) for x, b in zip(images, bits, strict=True)]
    assert worst(augment.posterize(images, bits), expected) == 0
    threshold = torch.tensor([0.0, 64.0, 128.0, 200.0, 255.0, 256.0])
    expected = [ImageOps.solarize(to_pillow(x), int(t)) for x, t in zip(images, threshold, strict=True)]
    assert worst(augment.solarize(images, threshold), expected) == 0


@pytest.mark.parametrize("name", ["rotation", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_affine_moves_pixels_as_pillow_does(name, images) -> None:
    amounts = {
        "rotation": [-30.0, -7.5, 0.0, 12.0, 29.0, 90.0],
        "translate_x": [-3.0, -1.0, 0.0, 2.0, 5.0, 30.0],
        "translate_y": [-3.0, -1.0, 0.0, 2.0, 5.0, 30.0],
    }.get(name, [-0.3, -0.1, 0.0, 0.1, 0.2, 0.3])
    matrices = getattr(augment, name)(torch.tensor(amounts))
    ours = augment.affine(images, matrices, fill=50.0)
    for x, matrix, moved in zip(images, matrices.double(), ours, strict=True):
        # Pillow's AFFINE counts pixels from the corner; ours is about the centre.
        centre = torch.tensor([12.0, 10.0], dtype=torch.float64)
        offset = matrix[:, 2] + centre - matrix[:, :2] @ centre
        data = (*matrix[0, :2].tolist(), offset[0].item(), *matrix[1, :2].tolist(), offset[1].item())
        # Compare inside: at the border Pillow takes the fill whole, we mix it in.
        padded = torch.nn.functional.pad(x, (8, 8, 8, 8), value=50.0)
        data = (*data[:2], data[2], *data[3:5], data[5])
        theirs = from_pillow(
            to_pillow(padded).transform(
                (24, 20),
                Image.Transform.AFFINE,
                (data[0], data[1], data[2] + 8, data[3], data[4], data[5] + 8),
                Image.Resampling.BILINEAR,
                fillcolor=50 if x.shape[0] == 1 else (50,) * 3,
            )
        )
        assert float((moved - theirs).abs().max()) <= 1.01


def test_shift_cuts_a_window_of_the_padded_image() -> None:
    x = torch.arange(2 * 1 * 4 * 5).float().view(2, 1, 4, 5)
    offsets = torch.tensor([[0, 4], [3, 1]])
    for fill in (None, 9.0):
        for image, offset, moved in zip(x, offsets, augment.shift(x, offsets, 2, fill), strict=True):
            pad = {"mode": "reflect"} if fill is None else {"mode": "constant", "constant_values": fill}
            padded = np.pad(image[0].numpy(), 2, **pad)
            np.testing.assert_array_equal(moved[0], padded[offset[0] :][:4, offset[1] :][:, :5])


def test_flip_mirrors_only_the_marked_images() -> None:
    x = torch.rand(3, 3, 4, 5)
    out = augment.flip(x, torch.tensor([True, False, True]))
    assert torch.equal(out, torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))


def test_cutout_fills_a_square_and_nothing_else() -> None:
    x = torch.full((2, 3, 8, 10), 200.0)
    out = augment.cutout(x, torch.tensor([[4.0, 5.0], [0.0, 0.0]]), torch.tensor([4.0, 4.0]), fill=7.0)
    expected = torch.full((8, 10), 200.0)
    expected[2:6, 3:7] = 7
    assert torch.equal(out[0], expected.expand(3, -1, -1))
    assert int((out[1, 0] == 7).sum()) == 4  # a quarter of the square lies inside
    assert torch.equal(augment.cutout(x, torch.zeros(2, 2) + 4, torch.zeros(2), 7.0), x)
