"""From an encoded image of any kind to 8-bit grey or RGB. Pillow is imported late: a board without it runs on arrays.

Pillow decodes; what resizing and grey mean is said in resize.py. Where Pillow does the same, bit by bit, it is quicker.

Every surprise of real folders is met here, once: rotation noted in EXIF, CMYK, 16 bits, palettes, transparency,
animation, truncated files, text named .jpg, and pictures too large to decode.
"""

import functools
import os
import threading
import warnings
from io import BytesIO
from typing import Any, NamedTuple, Tuple, Union

import numpy as np

from kdedge_device.failures import Failure, RuntimeFailure
from kdedge_device.resize import Box, resize, to_grey

__all__ = [
    "MAX_PIXELS",
    "Header",
    "ImageUnreadable",
    "Source",
    "decode_image",
    "open_image",
    "picture_of",
    "pillow_agrees",
    "read_header",
    "shrink",
    "to_eight_bits",
]

MAX_PIXELS = 200_000_000  # 800 MB once decoded: more than any camera gives, less than most machines have
Source = Union[str, "os.PathLike[str]", bytes]

_VECTOR_FORMATS = ("EPS", "WMF", "EMF")  # drawn by an external program (EPS by Ghostscript): reading must run nothing
_ORIENTATION = 0x0112  # the EXIF tag
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_OPEN_LOCK = threading.Lock()


class ImageUnreadable(Failure):
    """`path` (or "<bytes>") cannot be used as an image, and `reason` says why in half a sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Cannot read the image {path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> Tuple[Any, ...]:  # crosses process borders in loaders
        return (type(self), (self.path, self.reason))


class Header(NamedTuple):
    """What the file says of itself, without decoding it. Size as seen after EXIF rotation."""

    height: int
    width: int
    mode: str  # Pillow's name: "L", "RGB", "P", "CMYK", "I;16" ...


def pillow() -> Any:
    """The Pillow package; RuntimeFailure with the install command where it is absent."""
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeFailure(
            "The package Pillow is not installed; image files cannot be decoded without it. "
            "Install it with: pip install pillow, or give raw arrays (.npy, .npz), which need no package."
        ) from None
    return Image


def _name(source: Source) -> str:
    return "<bytes>" if isinstance(source, bytes) else os.fspath(source)


def open_image(source: Source) -> Any:
    """The image with its header read and its pixels not yet decoded; the caller closes it.

    Raises ImageUnreadable for what is no image, is a vector drawing, or has more than MAX_PIXELS pixels.
    """
    module = pillow()
    # Pillow's own limit warns from 89 megapixels and raises from 179; ours is checked right below. Limit and warning
    # filter belong to the process, so they change under a lock, for the microseconds of reading a header. Afterwards
    # the limit is ours, since some decoders ask again.
    with _OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = module.MAX_IMAGE_PIXELS
        module.MAX_IMAGE_PIXELS = None
        try:
            image = module.open(BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
        except Exception as error:  # plugins raise anything on a damaged header: SyntaxError, struct.error, KeyError
            raise ImageUnreadable(_name(source), _why_not_opened(source, error)) from None
        finally:
            module.MAX_IMAGE_PIXELS = None if limit is None else max(limit, MAX_PIXELS)
    reason = _refusal(image)
    if reason:
        image.close()
        raise ImageUnreadable(_name(source), reason)
    return image


def _orientation(image: Any) -> int:
    """EXIF orientation, 1 to 8. For a PNG, which may note it behind the pixels, Pillow decodes the image to answer."""
    with _OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF says nothing about the pixels
            return 1
    return value if value in (2, 3, 4, 5, 6, 7, 8) else 1


def _refusal(image: Any) -> str:
    """Why this opened image is not decoded, or an empty string."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} = {width * height / 1e6:.0f} megapixels"
        return f"it has {size}; the limit is {MAX_PIXELS / 1e6:.0f}. Make it smaller"
    if image.format in _VECTOR_FORMATS:
        return f"{image.format} is a drawing, not pixels. Save it as PNG or JPEG"
    return ""


def _why_not_opened(source: Source, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(source, bytes):
        start = source[:16]
    else:
        with open(source, "rb") as file:
            start = file.read(16)
    if not start:
        return "the file is empty"
    return f"this is no image format known to Pillow (it starts with {start!r})"


def read_header(source: Source) -> Header:
    """Size and mode without decoding. Raises ImageUnreadable as `open_image` does."""
    with open_image(source) as image:
        width, height = image.size
        # PNG would have to be decoded to know; Pillow turns TIFF by itself.
        if image.format not in ("PNG", "TIFF") and _orientation(image) >= 5:
            width, height = height, width
        return Header(height, width, image.mode)


def decode_image(source: Source, channels: int, wanted: Tuple[int, int]) -> Any:
    """The first frame as a Pillow image of mode L (channels 1) or RGB (3), upright.

    `wanted` (height, width) is the size it will be shrunk to: a JPEG is decoded at 1/2, 1/4 or 1/8 where that still
    leaves twice as many pixels along each side, which the antialiased resize then averages. So a JPEG differs a little
    from its own pixels fitted as an array: less than one grey level on average, on photographs.
    """
    with open_image(source) as image:
        try:
            image.draft(None, (2 * max(wanted), 2 * max(wanted)))
            image.load()
            return _upright(to_eight_bits(image, channels), _orientation(image))
        except Exception as error:  # OSError for a truncated file, but plugins raise anything on damaged data
            reason = f"its pixels cannot be decoded ({str(error) or type(error).__name__})"
            raise ImageUnreadable(_name(source), reason) from None


def _upright(image: Any, orientation: int) -> Any:
    """Undo the rotation or mirroring that EXIF notes. Pillow's own exif_transpose would read the tags a second time."""
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(
        orientation
    )  # the numbers of Image.Transpose, old and new Pillow
    return image if method is None else image.transpose(method)


def to_eight_bits(image: Any, channels: int) -> Any:
    """A decoded Pillow image of any mode as mode L (channels 1) or RGB (3); transparency is laid over white.

    Raises ValueError for pixels whose range is unknown (32-bit integers above 65535, floats outside [0, 255]).
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = pillow().fromarray(_scaled(np.asarray(image)))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = pillow().alpha_composite(pillow().new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode == "P":
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _scaled(pixels: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """16-bit grey to 8 bits by 1/257 (65535 becomes 255; a plain conversion would clip at 255), floats from [0, 1]."""
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "f":
        if not (low >= 0.0 and high <= 255.0):
            raise ValueError(f"its float pixels lie in [{low:g}, {high:g}]; [0, 1] or [0, 255] was expected")
        return np.asarray(np.rint(pixels * (255.0 if high <= 1.0 else 1.0)), dtype=np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"its integer pixels lie in [{low:g}, {high:g}]; 8 or 16 bits were expected")
    return np.asarray((pixels.astype(np.uint32) + 128) // 257, dtype=np.uint8)


def shrink(picture: Any, height: int, width: int, box: Box) -> "np.ndarray[Any, Any]":
    """`resize` of a Pillow image of mode L or RGB by Pillow itself: uint8 [H, W, C]. Only where `pillow_agrees`."""
    if picture.size != (width, height):
        left, top, right, bottom = box
        # One direction a call: in a single call newer versions of Pillow choose which one goes first.
        picture = picture.resize((width, picture.size[1]), 2, box=(left, 0, right, picture.size[1]))  # 2: bilinear
        picture = picture.resize((width, height), 2, box=(0, top, width, bottom))
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def picture_of(pixels: "np.ndarray[Any, Any]") -> Any:
    """A Pillow image of uint8 [h, w, 1 or 3]."""
    return pillow().fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


@functools.lru_cache(maxsize=None)
def pillow_agrees() -> bool:
    """Whether Pillow is here and computes what resize.py does: tried once, on small noise.

    Not all do: some builds for speed have weights of fewer digits, and Pillow 6 did not round its grey.
    """
    try:
        pillow()
    except RuntimeFailure:
        return False
    noise = np.random.RandomState(0).randint(0, 256, (61, 43, 3)).astype(np.uint8)
    if not np.array_equal(np.asarray(picture_of(noise).convert("L"))[:, :, None], to_grey(noise)):
        return False
    cases = ((17, 29, (0.0, 8.5, 43.0, 52.25)), (90, 20, (3.3, 0.0, 40.1, 61.0)), (31, 70, (0.0, 0.0, 43.0, 61.0)))
    return all(np.array_equal(shrink(picture_of(noise), *case), resize(noise, *case)) for case in cases)
