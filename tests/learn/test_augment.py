"""Each operation against Pillow, image by image: on made-up extremes, and the whole pool of 14 on photographs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from kdedge.data import augment, views
from kdedge.data.views import OPERATIONS, ViewConfig


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


FILL, MARGIN, HEIGHT, WIDTH = 127, 24, 32, 40

# The published ranges (arXiv 2001.07685, table 12).
POOL = ViewConfig(rotate_degrees=30.0, shear=0.3, translate_fraction=0.3, fill=float(FILL), geometric_only=False)

# Grey levels (of 255) by which a pixel may differ from Pillow's.
TOLERANCE = {
    "identity": 0,
    "autocontrast": 1,  # float32 for Pillow's double: 1 in 100 pixels falls on the other side of a whole number
    "equalize": 0,
    "brightness": 1,  # likewise
    "color": 0,
    "contrast": 0,
    "sharpness": 0,
    "posterize": 0,
    "solarize": 0,
    "rotate": 1,  # these round where Pillow cuts off
    "shear_x": 1,
    "shear_y": 1,
    "translate_x": 1,
    "translate_y": 1,
}


def fill_of(picture: Image.Image) -> int | tuple[int, int, int]:
    return FILL if picture.mode == "L" else (FILL,) * 3


def moved(picture: Image.Image, move: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`move` on a canvas wide enough that what comes in from outside is the fill, mixed in at the edge.

    On the bare picture Pillow would repeat the edge's pixels for half a pixel, and take the fill whole after that.
    """
    canvas = ImageOps.expand(picture, MARGIN, fill_of(picture))
    return move(canvas).crop((MARGIN, MARGIN, MARGIN + WIDTH, MARGIN + HEIGHT))


def affine(picture: Image.Image, *data: float) -> Image.Image:
    def move(canvas: Image.Image) -> Image.Image:
        kind, mode = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return canvas.transform(canvas.size, kind, data, mode, fillcolor=fill_of(picture))

    return moved(picture, move)


def rotated(picture: Image.Image, degrees: float) -> Image.Image:
    return moved(picture, lambda c: c.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill_of(picture)))


# (picture, magnitude 0..1, sign) as FixMatch applies them; shears are about the top left corner of the picture.
PILLOW: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "identity": lambda p, m, s: p,
    "autocontrast": lambda p, m, s: ImageOps.autocontrast(p),
    "equalize": lambda p, m, s: ImageOps.equalize(p),
    "brightness": lambda p, m, s: ImageEnhance.Brightness(p).enhance(0.05 + 0.9 * m),
    "color": lambda p, m, s: ImageEnhance.Color(p).enhance(0.05 + 0.9 * m),
    "contrast": lambda p, m, s: ImageEnhance.Contrast(p).enhance(0.05 + 0.9 * m),
    "sharpness": lambda p, m, s: ImageEnhance.Sharpness(p).enhance(0.05 + 0.9 * m),
    "posterize": lambda p, m, s: ImageOps.posterize(p, int(4 + 4 * m)),
    "solarize": lambda p, m, s: ImageOps.solarize(p, 256 * m),
    "rotate": lambda p, m, s: rotated(p, 30 * m * s),
    "shear_x": lambda p, m, s: affine(p, 1, 0.3 * m * s, -0.3 * m * s * MARGIN, 0, 1, 0),
    "shear_y": lambda p, m, s: affine(p, 1, 0, 0, 0.3 * m * s, 1, -0.3 * m * s * MARGIN),
    "translate_x": lambda p, m, s: affine(p, 1, 0, 0.3 * m * s * WIDTH, 0, 1, 0),
    "translate_y": lambda p, m, s: affine(p, 1, 0, 0, 0, 1, 0.3 * m * s * HEIGHT),
}


@pytest.fixture(scope="module", params=["RGB", "L"])
def photographs(request: pytest.FixtureRequest) -> torch.Tensor:
    """[12, C, 32, 40]: random parts of scikit-learn's two photographs, from detail to the whole scene."""
    rng, parts = np.random.default_rng(0), []
    for picture in load_sample_images().images:
        for side in (32, 96, 320):
            for _ in range(2):
                y, x = rng.integers(0, picture.shape[0] - side), rng.integers(0, picture.shape[1] - side)
                part = Image.fromarray(picture[y : y + side, x : x + side])
                parts.append(from_pillow(part.resize((WIDTH, HEIGHT)).convert(request.param)))
    return torch.stack(parts)


def test_the_pool_is_the_14_operations() -> None:
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 14
    assert set(PILLOW) == set(TOLERANCE) == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_the_pool_is_pillows_on_photographs_over_its_whole_range(name, photographs) -> None:
    pictures = [to_pillow(x) for x in photographs]
    index = torch.full((len(pictures),), OPERATIONS.index(name))
    changed = False
    for magnitude in np.linspace(0, 1, 9).tolist():
        for sign in (-1.0, 1.0):
            ours = views._apply(
                photographs,
                index,
                torch.full((len(pictures),), magnitude),
                torch.full((len(pictures),), sign),
                POOL,
            )
            expected = [PILLOW[name](picture, magnitude, sign) for picture in pictures]
            assert worst(ours, expected) <= TOLERANCE[name], (magnitude, sign)
            changed = changed or not torch.equal(ours, photographs)
    assert changed == (name != "identity" and not (name == "color" and photographs.shape[1] == 1))


def test_a_batch_of_mixed_operations_and_magnitudes_is_pillows_image_by_image(photographs) -> None:
    generator = torch.Generator().manual_seed(0)
    x = photographs.repeat(6, 1, 1, 1)
    operation = torch.arange(len(x)) % 14
    magnitude = torch.rand(len(x), generator=generator)
    sign = torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
    ours = views._apply(x, operation, magnitude, sign, POOL)
    for i, k in enumerate(operation.tolist()):
        expected = PILLOW[OPERATIONS[k]](to_pillow(x[i]), float(magnitude[i]), float(sign[i]))
        assert worst(ours[i : i + 1], [expected]) <= TOLERANCE[OPERATIONS[k]], OPERATIONS[k]


def test_quarter_turns_and_whole_pixels_are_exact(images) -> None:
    square = images[:, :, :, :20]
    turned = augment.affine(square, augment.rotation(torch.full((6,), 90.0)), fill=50.0).round()
    assert worst(turned, [to_pillow(x).transpose(Image.Transpose.ROTATE_90) for x in square]) == 0
    moved_x = augment.affine(images, augment.translate_x(torch.tensor([-3.0, -1.0, 0.0, 2.0, 5.0, 30.0])), fill=50.0)
    for x, ours, pixels in zip(images, moved_x.round(), (-3, -1, 0, 2, 5, 30), strict=True):
        expected = torch.full_like(x, 50.0)
        for column in range(24):
            if 0 <= column + pixels < 24:
                expected[:, :, column] = x[:, :, column + pixels]
        assert torch.equal(ours, expected)


def test_shift_cuts_a_window_of_the_padded_image() -> None:
    x = torch.arange(2 * 1 * 4 * 5).float().view(2, 1, 4, 5)
    offsets = torch.tensor([[0, 4], [3, 1]])
    for fill in (None, 9.0):
        for image, offset, moved in zip(x, offsets, augment.shift(x, offsets, 2, fill), strict=True):
            pad = {"mode": "reflect"} if fill is None else {"mode": "constant", "constant_values": fill}
            padded = np.pad(image[0].numpy(), 2, **pad)
            np.testing.assert_array_equal(moved[0], padded[offset[0] :][:4, offset[1] :][:, :5])


def test_only_the_marked_images_are_mirrored_after_the_shift() -> None:
    x, marked, offsets = (
        torch.rand(3, 3, 4, 5),
        torch.tensor([True, False, True]),
        torch.tensor([[0, 2], [1, 0], [2, 1]]),
    )
    for most, fill in ((0, None), (1, None), (1, 9.0)):
        at = offsets if most else torch.zeros_like(offsets)
        plain = augment.shift(x, at, most, fill)
        mirrored = augment.shift(x, at, most, fill, marked)
        assert torch.equal(mirrored, torch.stack([plain[0].flip(2), plain[1], plain[2].flip(2)]))


@pytest.mark.parametrize("side", [0, 1, 7, 16, 20])
def test_cutout_is_pillows_rectangle(side, photographs) -> None:
    rng = np.random.default_rng(side)
    corners = rng.integers(-side, [HEIGHT, WIDTH], (len(photographs), 2))  # some reach over the border
    centres = torch.from_numpy(corners + side / 2).float()
    ours = augment.cutout(photographs, centres, torch.full((len(photographs),), float(side)), FILL)
    for x, hole, (top, left) in zip(photographs, ours, corners.tolist(), strict=True):
        picture = to_pillow(x)
        if side:
            box = (left, top, left + side - 1, top + side - 1)  # Pillow's rectangle has its last row and column
            ImageDraw.Draw(picture).rectangle(box, fill_of(picture))
        assert torch.equal(hole, from_pillow(picture))


def test_cutout_fills_a_square_and_nothing_else() -> None:
    x = torch.full((2, 3, 8, 10), 200.0)
    out = augment.cutout(x, torch.tensor([[4.0, 5.0], [0.0, 0.0]]), torch.tensor([4.0, 4.0]), fill=7.0)
    expected = torch.full((8, 10), 200.0)
    expected[2:6, 3:7] = 7
    assert torch.equal(out[0], expected.expand(3, -1, -1))
    assert int((out[1, 0] == 7).sum()) == 4  # a quarter of the square lies inside
    assert torch.equal(augment.cutout(x, torch.zeros(2, 2) + 4, torch.zeros(2), 7.0), x)
