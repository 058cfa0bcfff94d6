"""Images as folders really hold them become the same small arrays everywhere; what cannot be read says why."""

import contextlib
import pickle
import struct
import threading
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge_device.failures import Failure
from kdedge_device.images import MAX_PIXELS, read_header
from kdedge_device.preprocess import ImageUnreadable, Preprocess

RGB4 = Preprocess(4, 4, 3, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
GREY4 = Preprocess(4, 4, 1, "squash", (0.0,), (1.0,))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_cmyk_is_converted() -> None:
    cyan = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert RGB4.decode(cyan)[0, 0].tolist() == [0, 255, 255]
    jpeg = RGB4.decode(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
    assert np.abs(jpeg[0, 0].astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]] * 4, dtype=np.uint16)
    decoded = GREY4.decode(saved(Image.fromarray(values), form))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_pixels_of_unknown_range_are_refused() -> None:
    assert GREY4.decode(saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"))[0, 0, 0] == 128
    with pytest.raises(ImageUnreadable, match=r"float pixels lie in \[-3, -3\]"):
        GREY4.decode(saved(Image.fromarray(np.full((4, 4), -3, np.float32)), "TIFF"))


def test_palette_and_one_bit() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert RGB4.decode(saved(palette, "PNG"))[2, 2].tolist() == [10, 200, 30]
    assert GREY4.decode(saved(Image.new("1", (4, 4), 1), "PNG"))[0, 0, 0] == 255


def test_transparency_lies_over_white() -> None:
    half_black = saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert RGB4.decode(half_black)[0, 0].tolist() == [127, 127, 127]
    assert GREY4.decode(saved(Image.new("LA", (4, 4), (0, 0)), "PNG"))[0, 0, 0] == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert RGB4.decode(saved(palette, "PNG", transparency=bytes([255, 0])))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation(form: str, orientation: int) -> None:
    """The oracle is Pillow's own exif_transpose."""
    from PIL import ImageOps

    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = (255, 0, 0)
    pixels[8:, 16:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(pixels), form, exif=exif)
    with Image.open(BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    preprocess = Preprocess(expected.shape[0], expected.shape[1], 3, "squash", (0, 0, 0), (1, 1, 1))
    np.testing.assert_array_equal(preprocess.decode(data), expected)
    if form != "PNG":
        assert read_header(data)[:2] == expected.shape[:2]


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert RGB4.decode(data)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_image() -> None:
    assert (RGB4.decode(saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")) == [1, 2, 3]).all()
    crop = Preprocess(7, 3, 3, "short-side-crop", (0, 0, 0), (1, 1, 1))
    assert crop.decode(saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).shape == (7, 3, 3)


def test_truncated_text_empty_missing_and_folder(tmp_path: Path) -> None:
    whole = saved(Image.effect_noise((64, 64), 50), "JPEG")
    cases = {
        "cut.jpg": (whole[: len(whole) // 2], "cannot be decoded .*truncated"),
        "text.jpg": (b"hello, this is no picture", "no image format .*b'hello, this is n'"),
        "empty.png": (b"", "the file is empty"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageUnreadable, match=reason) as caught:
            RGB4.decode(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
        assert caught.value.exit_code == 2
    with pytest.raises(ImageUnreadable, match="no such file"):
        RGB4.decode(tmp_path / "absent.png")
    with pytest.raises(ImageUnreadable, match="folder"):
        RGB4.decode(tmp_path)


def test_every_cut_of_a_file_is_read_or_refused() -> None:
    """No cut raises anything but ImageUnreadable, and no warning escapes."""
    picture = Image.effect_noise((24, 24), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        data = saved(picture, form, exif=exif) if form in ("JPEG", "PNG", "TIFF", "WEBP") else saved(picture, form)
        for length in range(0, len(data), max(1, len(data) // 60)):
            with contextlib.suppress(ImageUnreadable):
                assert RGB4.decode(data[:length]).shape == (4, 4, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def test_900_megapixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    for function in (RGB4.decode, read_header):
        with pytest.raises(ImageUnreadable, match="30000 x 30000 = 900 megapixels; the limit is 200"):
            function(png_header(30000, 30000))


def test_between_pillows_limit_and_ours_no_warning() -> None:
    assert read_header(png_header(14000, 14000)).width == 14000
    data = saved(Image.new("1", (13000, 14000), 1), "TIFF", compression="group4")
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS >= MAX_PIXELS
    assert read_header(data)[:2] == (14000, 13000)


def test_a_drawing_is_refused() -> None:
    with pytest.raises(ImageUnreadable, match="EPS is a drawing"):
        RGB4.decode(saved(Image.new("RGB", (4, 4)), "EPS"))


def test_short_side_crop_keeps_the_middle() -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 200
    crop = Preprocess(4, 4, 3, "short-side-crop", (0, 0, 0), (1, 1, 1))
    assert (crop.fit(pixels) == 200).all()
    assert crop.fit(pixels.transpose(1, 0, 2)).shape == (4, 4, 3)
    np.testing.assert_array_equal(crop.decode(saved(Image.fromarray(pixels), "PNG")), crop.fit(pixels))


def test_shrinking_averages() -> None:
    """Antialiased: a fine checkerboard becomes grey, where plain bilinear would pick single pixels."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = GREY4.fit(board)
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_fit_is_the_identity_where_the_size_fits() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(RGB4.fit(pixels), pixels)
    np.testing.assert_array_equal(RGB4.fit(pixels[:, :, 0]), np.repeat(pixels[:, :, :1], 3, axis=2))
    assert GREY4.fit(pixels).shape == (4, 4, 1)
    np.testing.assert_array_equal(GREY4.fit(pixels)[:, :, 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_a_large_jpeg_decoded_small_is_close_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC
    )
    small = Preprocess(32, 32, 3, "squash", (0, 0, 0), (1, 1, 1))
    data = saved(coarse, "JPEG", quality=95)
    with Image.open(BytesIO(data)) as image:
        whole = small.fit(np.asarray(image))
    assert np.abs(small.decode(data).astype(int) - whole).mean() < 1.0


def test_normalize_by_value() -> None:
    preprocess = Preprocess(2, 2, 3, "squash", (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    batch = np.array([0, 51, 255], np.uint8) * np.ones((1, 2, 2, 1), np.uint8)
    values = preprocess.normalize(batch)
    assert values.dtype == np.float32
    assert values.shape == (1, 3, 2, 2)
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values[0, :, 0, 0], [-1.0, -0.2, 1.0], atol=1e-6)
    with pytest.raises(Failure, match="float32"):
        preprocess.normalize(values)


def test_json_round_trip_and_refusals() -> None:
    preprocess = Preprocess(2, 3, 1, "short-side-crop", [0.5], [0.25])  # type: ignore[arg-type]
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    assert hash(preprocess) == hash(Preprocess.from_json(preprocess.to_json()))
    good = preprocess.to_json()
    for change in (
        {"resize": "stretch"},
        {"std": [0.0]},
        {"channels": 2},
        {"mean": [0.1, 0.2]},
        {"height": 0},
        {"extra": 1},
    ):
        with pytest.raises(Failure):
            Preprocess.from_json({**good, **change})


def test_unreadable_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(ImageUnreadable("a.jpg", "it is empty")))
    assert (error.path, error.reason, str(error)) == (
        "a.jpg",
        "it is empty",
        "Cannot read the image a.jpg: it is empty",
    )


def test_threads() -> None:
    good = saved(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG")
    seen: list[object] = []

    def work() -> None:
        for _ in range(50):
            seen.append(RGB4.decode(good)[0, 0].tolist())
            with pytest.raises(ImageUnreadable):
                RGB4.decode(png_header(30000, 30000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[9, 8, 7]] * 200
