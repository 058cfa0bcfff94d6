"""Small pictures, each different, made where a test wants them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakePicture = Callable[..., Path]


def _make(path: Path, number: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """A picture of noise drawn from `number`; width x height; the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture(scope="session")
def picture() -> MakePicture:
    return _make


@pytest.fixture(scope="session")
def huge_png() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels, in a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """train/ of three classes with 12 images each, test/ with 2 each."""
    root = tmp_path / "my photos"
    number = 0
    for part, count in (("train", 12), ("test", 2)):
        for label in ("cat", "dog", "emu"):
            for i in range(count):
                _make(root / part / label / f"{i:02d}.png", number)
                number += 1
    return root
