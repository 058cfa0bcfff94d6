"""Files that are no images, or only partly: counted, named once, left out; too many are an error."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge.data import open_source
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

RGB = Preprocess(height=8, width=8, channels=3, resize="short-side-crop", mean=(0, 0, 0), std=(1, 1, 1))


def _spoil(root: Path, huge_png: bytes) -> None:
    cat = root / "train" / "cat"
    (cat / "text.jpg").write_text("I am a text file")
    (cat / "empty.png").write_bytes(b"")
    (cat / "huge.png").write_bytes(huge_png)
    whole = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    (cat / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    whole = BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    (cat / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    os.mkfifo(cat / "pipe.jpg")
    (cat / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_each_is_left_out_with_its_reason(class_folders: Path, huge_png: bytes) -> None:
    _spoil(class_folders, huge_png)
    source = open_source(str(class_folders), max_unreadable_fraction=0.2)
    assert len(source) == 42
    reasons = dict(source.unreadable)
    assert sorted(Path(name).name for name in reasons) == [
        "cut.jpg", "cut.png", "drawing.png", "empty.png", "huge.png", "pipe.jpg", "text.jpg",
    ]  # fmt: skip
    assert "no image format" in reasons["train/cat/text.jpg"]
    assert reasons["train/cat/empty.png"] == "the file is empty"
    assert "900 megapixels" in reasons["train/cat/huge.png"]
    assert "truncated" in reasons["train/cat/cut.jpg"]
    assert "cannot be decoded" in reasons["train/cat/cut.png"]
    assert reasons["train/cat/pipe.jpg"] == "it is not a regular file"
    assert "drawing" in reasons["train/cat/drawing.png"]
    said = [warning for warning in source.warnings if "cannot be read" in warning]
    assert len(said) == 1
    assert said[0].startswith("7 of 49 images cannot be read and are left out: train/cat/cut.jpg (")
    assert said[0].endswith("and 4 more.")


def test_too_many_are_an_error_with_counts(class_folders: Path, huge_png: bytes) -> None:
    _spoil(class_folders, huge_png)
    with pytest.raises(DataError) as error:
        open_source(str(class_folders))
    assert "7 of 49 images of my-photos cannot be read (14.3%)" in str(error.value)
    assert "Expected at most 5.0%" in str(error.value)


def test_nothing_readable_is_an_error_at_any_fraction(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_text("text")
    with pytest.raises(DataError, match="1 of 1 images"):
        open_source(str(tmp_path), max_unreadable_fraction=1.0)


def test_a_class_of_unreadable_images_only_is_an_error(class_folders: Path) -> None:
    (class_folders / "train" / "fox").mkdir()
    (class_folders / "train" / "fox" / "1.jpg").write_text("text")
    with pytest.raises(DataError, match="1 class folder without a readable training image: fox"):
        open_source(str(class_folders))


def _damage_middle(path: Path) -> None:
    """Header and end stay whole, so that only decoding shows it."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(bytes(content))


def test_damage_in_the_middle_is_found_by_decodable(class_folders: Path) -> None:
    bad = class_folders / "train" / "dog" / "05.png"
    _damage_middle(bad)
    source = open_source(str(class_folders))
    assert len(source) == 42
    with pytest.raises(DataError, match=r"1 image of my-photos can be opened but not decoded: train/dog/05\.png"):
        source.load(range(len(source)), RGB)
    good = source.decodable()
    assert len(good) == 41
    assert "train/dog/05.png" not in good.ids
    assert [name for name, _ in good.unreadable] == ["train/dog/05.png"]
    assert sum("cannot be read" in warning for warning in good.warnings) == 1
    assert good.fingerprint == source.fingerprint
    assert good.load(range(41), RGB).shape == (41, 3, 8, 8)
    assert good.labels.tolist() == [source.labels[source.ids.index(name)] for name in good.ids]


def test_decodable_counts_what_was_left_out_before(class_folders: Path) -> None:
    (class_folders / "train" / "cat" / "text.jpg").write_text("text")
    _damage_middle(class_folders / "train" / "dog" / "05.png")
    source = open_source(str(class_folders), max_unreadable_fraction=0.03)  # 1 of 43
    with pytest.raises(DataError, match="2 of 43 images"):
        source.decodable()


def test_a_name_that_is_no_utf8_is_left_out(class_folders: Path, picture) -> None:
    made = picture(class_folders / "train" / "cat" / "99.png", 99)
    made.rename(os.fsdecode(os.fsencode(made.parent) + b"/caf\xe9.png"))
    source = open_source(str(class_folders))
    assert source.unreadable == (("train/cat/caf\\xe9.png", "its name is not valid UTF-8"),)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_odd_modes_and_one_pixel_just_work(tmp_path, picture, mode) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    for label in ("aa", "bb"):
        path = tmp_path / label / f"1.{suffix}"
        path.parent.mkdir()
        if mode == "I;16":
            Image.fromarray(np.full((1, 1), 40_000, dtype=np.uint16)).save(path)
        else:
            Image.new(mode, (1, 1)).save(path)
    source = open_source(str(tmp_path))
    assert source.native_px == (1, 1)
    assert source.channels == (1 if mode in ("1", "L", "LA", "I;16") else 3)
    assert source.load([0, 1], RGB).shape == (2, 3, 8, 8)
