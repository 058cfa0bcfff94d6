"""One answer everywhere: numpy's resize is the definition, Pillow and torch are held to it."""

import hashlib
import sys
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from torchvision.transforms.v2 import functional as tv

from kdedge.data.views import normalize
from kdedge_device import images as images_module
from kdedge_device.images import pillow_agrees, shrink
from kdedge_device.preprocess import Preprocess
from kdedge_device.resize import Box, resize, to_grey

Pixels = NDArray[np.uint8]

SIZES = [1, 2, 3, 7, 16, 33, 64, 97, 150]
WANTED = [(1, 1), (8, 8), (17, 31), (32, 32), (90, 40)]


def noise(height: int, width: int, channels: int, seed: int = 0) -> Pixels:
    """Half of it black and white: the steepest edges show the smallest differences."""
    rng = np.random.default_rng([seed, height, width, channels])
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[: height // 2] = np.where(pixels[: height // 2] < 128, 0, 255)
    return pixels


def pairs() -> Iterator[tuple[Pixels, tuple[int, int], str]]:
    """Every height with every width, grey and RGB in turn, to each size wanted, squashed and cropped in turn."""
    for i, height in enumerate(SIZES):
        for j, width in enumerate(SIZES):
            for k, wanted in enumerate(WANTED):
                channels = (1, 3)[(i + j + k) % 2]
                yield noise(height, width, channels), wanted, ("squash", "short-side-crop")[(i + k) % 2]


def preprocess(height: int, width: int, channels: int, way: str) -> Preprocess:
    return Preprocess(height, width, channels, way, (0.5,) * channels, (0.25,) * channels)


def slowly(image: Pixels, height: int, width: int, box: Box) -> NDArray[np.float64]:
    """The same triangles in real numbers, one result at a time and nothing rounded between the directions."""

    def direction(values: NDArray[np.float64], low: float, high: float, wanted: int) -> NDArray[np.float64]:
        scale = (high - low) / wanted
        reach, rows = max(scale, 1.0), []
        for i in range(wanted):
            centre = low + (i + 0.5) * scale
            weights = np.maximum(0, 1 - np.abs(np.arange(len(values)) + 0.5 - centre) / reach)
            rows.append(np.tensordot(weights / weights.sum(), values, 1))
        return np.stack(rows)

    across = direction(image.transpose(1, 0, 2).astype(np.float64), box[0], box[2], width)
    return direction(across.transpose(1, 0, 2), box[1], box[3], height)


def test_it_is_the_formula() -> None:
    for image, (height, width), way in list(pairs())[::4]:
        box = preprocess(height, width, image.shape[2], way)._box(image.shape[1], image.shape[0])
        far = np.abs(resize(image, height, width, box) - slowly(image, height, width, box)).max()
        assert far <= 1.0 + 1e-3, (image.shape, height, width, way, far)


def test_pillow_computes_the_same_bits() -> None:
    count = 0
    for image, (height, width), way in pairs():
        box = preprocess(height, width, image.shape[2], way)._box(image.shape[1], image.shape[0])
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        np.testing.assert_array_equal(resize(image, height, width, box), shrink(picture, height, width, box))
        count += 1
    assert count == 405
    assert pillow_agrees()


@pytest.mark.parametrize("seed", range(4))
def test_pillow_computes_the_same_bits_in_any_box(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        height, width, wanted_height, wanted_width = (int(v) for v in rng.integers(1, 200, 4))
        image = noise(height, width, int(rng.choice([1, 3])), seed)
        left, right = sorted(rng.random(2) * width)
        top, bottom = sorted(rng.random(2) * height)
        box = (left, top, right, bottom)
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        ours = resize(image, wanted_height, wanted_width, box)
        np.testing.assert_array_equal(ours, shrink(picture, wanted_height, wanted_width, box))


def test_large_and_long_images() -> None:
    """In bands, of which the last is short; and where one row alone is more than a band."""
    for shape, wanted in (((701, 1203, 3), (96, 96)), ((3, 50_000, 3), (2, 64)), ((50_000, 3, 1), (64, 2))):
        image = noise(*shape)
        box = (0.0, 0.0, float(shape[1]), float(shape[0]))
        picture = Image.fromarray(image[:, :, 0] if shape[2] == 1 else image)
        np.testing.assert_array_equal(resize(image, *wanted, box), shrink(picture, *wanted, box))


def test_the_bytes_are_these_on_every_machine() -> None:
    """The same as under an emulated arm64 (cortex-a76), with numpy 1.17 and with numpy 2."""
    content, rng = hashlib.sha256(), np.random.RandomState(4)
    for _ in range(60):
        height, width, wanted_height, wanted_width = (int(v) for v in rng.randint(1, 120, 4))
        image = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
        content.update(resize(image, wanted_height, wanted_width, (0.0, 0.0, float(width), float(height))).tobytes())
    assert content.hexdigest()[:16] == "94a83adc20eed884"


def test_grey_is_pillows() -> None:
    image = noise(300, 301, 3)
    np.testing.assert_array_equal(to_grey(image)[:, :, 0], np.asarray(Image.fromarray(image).convert("L")))


def test_constants_stay() -> None:
    """Rounded weights do not add up to 1 exactly, and must not show."""
    for value in (0, 1, 127, 254, 255):
        image = np.full((977, 613, 1), value, np.uint8)
        assert (resize(image, 31, 7, (0.0, 0.0, 613.0, 977.0)) == value).all()


def test_torch_is_within_one_grey_level() -> None:
    """torch's own kernel on pixels, torchvision's on a tensor, and in real numbers what a live teacher does."""
    for image, (height, width), way in pairs():
        fitting = preprocess(height, width, image.shape[2], way)
        left, top, right, bottom = (round(end) for end in fitting._box(image.shape[1], image.shape[0]))
        if right == left or bottom == top:
            continue
        kept = np.ascontiguousarray(image[top:bottom, left:right])  # torch cuts whole pixels only
        ours = preprocess(height, width, image.shape[2], "squash").fit(kept).astype(np.int64)
        x = torch.from_numpy(kept).permute(2, 0, 1)[None]
        bytes_ = functional.interpolate(x, [height, width], mode="bilinear", antialias=True)
        vision = tv.resize(x, [height, width], antialias=True)
        floats = functional.interpolate(x.float(), [height, width], mode="bilinear", antialias=True)
        for theirs in (bytes_, vision, floats):
            far = np.abs(theirs[0].permute(1, 2, 0).double().numpy() - ours).max()
            assert far <= 1.0 + 1e-3, (image.shape, height, width, far)


def test_torch_normalizes_as_the_device_does() -> None:
    fitting = Preprocess(9, 7, 3, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = np.stack([noise(9, 7, 3, seed) for seed in range(3)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (fitting.mean, fitting.std))
    theirs = normalize(torch.from_numpy(batch).permute(0, 3, 1, 2).float(), mean, std)
    np.testing.assert_allclose(fitting.normalize(batch), theirs.numpy(), atol=1e-6)


@pytest.fixture(params=["with Pillow", "another Pillow"])
def pillow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is; or one that computes otherwise, so that numpy resizes what it decodes."""
    if request.param == "another Pillow":
        monkeypatch.setattr("kdedge_device.preprocess.pillow_agrees", lambda: False)


@pytest.mark.usefixtures("pillow")
@pytest.mark.parametrize("way", ["squash", "short-side-crop"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_and_its_array_are_the_same_input(channels: int, way: str) -> None:
    for shape in ((37, 53, 3), (53, 37, 1), (8, 90, 3), (13, 9, 1)):
        image = noise(*shape)
        buffer = BytesIO()
        Image.fromarray(image[:, :, 0] if shape[2] == 1 else image).save(buffer, "PNG")
        fitting = preprocess(24, 20, channels, way)
        expected = to_grey(image) if channels == 1 and shape[2] == 3 else image
        expected = resize(expected, 24, 20, fitting._box(shape[1], shape[0]))
        expected = np.repeat(expected, channels // expected.shape[2], axis=2)
        np.testing.assert_array_equal(fitting.fit(image), expected)
        np.testing.assert_array_equal(fitting.decode(buffer.getvalue()), expected)


def test_without_pillow_arrays_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(31, 45, 3)
    fittings = [preprocess(16, 12, channels, way) for channels in (1, 3) for way in ("squash", "short-side-crop")]
    before = [fitting.fit(image) for fitting in fittings]
    pillow_agrees.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    try:
        assert not pillow_agrees()
        for fitting, expected in zip(fittings, before, strict=True):
            np.testing.assert_array_equal(fitting.fit(image), expected)
    finally:
        pillow_agrees.cache_clear()


def test_a_pillow_of_other_arithmetic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_agrees.cache_clear()
    right = images_module.shrink

    def one_off(picture: Image.Image, height: int, width: int, box: Box) -> Pixels:
        found = right(picture, height, width, box)
        found[-1, -1] ^= 1
        return found

    monkeypatch.setattr(images_module, "shrink", one_off)
    try:
        assert not pillow_agrees()
    finally:
        pillow_agrees.cache_clear()
