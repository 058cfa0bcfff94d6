"""Images of val and test among the unlabeled ones: found, left out, and the same after a resume."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from kdedge.data import Source, Splits, leaks, make_splits, open_source
from kdedge.data.duplicates import Shapes, nearest
from kdedge.data.leaks import looks_for_near, without_leaks
from kdedge.data.source import ArrayImages
from kdedge.errors import DataError


def _photo(path: Path, number: int, size: tuple[int, int] = (60, 50), **how: int) -> None:
    """Smooth shapes, different for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(30, 200, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **how)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """8 labeled, 72 unlabeled and 8 test images, no two alike."""
    number = 0
    for folder, count in (("labeled/cat", 4), ("labeled/dog", 4), ("unlabeled", 24), ("test/cat", 4), ("test/dog", 4)):
        for i in range(count):
            _photo(tmp_path / folder / f"{i:02d}.png", number)
            number += 1
    for i in range(100, 148):
        _photo(tmp_path / f"unlabeled/{i}.png", i)
    return tmp_path


def _splits(root: Path) -> tuple[Source, Splits]:
    source = open_source(str(root))
    return source, without_leaks(source, make_splits(source))


def _ids(source: Source, indices) -> set[str]:
    return {source.ids[i] for i in indices}


def test_nothing_leaks_and_nothing_changes(photos: Path) -> None:
    source = open_source(str(photos))
    before = make_splits(source)
    assert without_leaks(source, before) is before


def test_exact_and_recoded_images_of_test_are_left_out(photos: Path) -> None:
    shutil.copy(photos / "test/cat/01.png", photos / "unlabeled/same bytes.png")
    _photo(photos / "unlabeled/recoded.jpg", 33, quality=40)
    _photo(photos / "unlabeled/smaller.png", 36, size=(40, 34))
    picture = np.asarray(Image.open(photos / "test/dog/03.png"))
    Image.fromarray((picture * 0.5 + 90).astype(np.uint8)).save(photos / "unlabeled/pale.png")
    source, splits = _splits(photos)
    gone = {"unlabeled/same bytes.png", "unlabeled/recoded.jpg", "unlabeled/smaller.png", "unlabeled/pale.png"}
    found = {leak["id"]: leak for leak in splits.leaks}
    assert {name: leak["like"] for name, leak in found.items()} == {
        "unlabeled/same bytes.png": "test/cat/01.png",
        "unlabeled/recoded.jpg": "test/cat/01.png",
        "unlabeled/smaller.png": "test/dog/00.png",
        "unlabeled/pale.png": "test/dog/03.png",
    }
    assert [name for name, leak in found.items() if leak["exact"]] == ["unlabeled/same bytes.png"]
    assert {leak["split"] for leak in splits.leaks} == {"test"}
    before = make_splits(source)
    assert _ids(source, splits.unlabeled) == _ids(source, before.unlabeled) - gone
    for name in ("calibration", "gate"):
        expected = [i for i in before.indices()[name] if source.ids[i] not in gone]
        assert splits.indices()[name].tolist() == expected
    for name in ("labeled", "val", "test"):
        np.testing.assert_array_equal(splits.indices()[name], before.indices()[name])
    assert (np.diff(splits.unlabeled) > 0).all()
    assert splits.warnings[0].startswith(
        "4 unlabeled images are (nearly) in test too: left out (unlabeled/pale.png is "
    )


def test_a_labeled_image_is_kept_and_told(photos: Path) -> None:
    _photo(photos / "labeled/cat/leak.jpg", 33, quality=60)
    source, splits = _splits(photos)
    assert "labeled/cat/leak.jpg" in _ids(source, splits.labeled) & _ids(source, splits.unlabeled)
    assert [leak["labeled"] for leak in splits.leaks] == [True]
    assert len(splits.unlabeled) == len(make_splits(source).unlabeled)
    assert splits.warnings == (
        "1 labeled image is (nearly) in test too: kept, and flatter the accuracy there; remove one of each pair "
        "(labeled/cat/leak.jpg is test/cat/01.png).",
    )


def test_a_resumed_run_sees_the_same(photos: Path) -> None:
    shutil.copy(photos / "test/cat/01.png", photos / "unlabeled/leak.png")
    source, splits = _splits(photos)
    document = json.loads(json.dumps(splits.to_json(source)))
    assert document["left_out"] == ["unlabeled/leak.png"]
    again = Splits.from_json(document, open_source(str(photos)))
    for name, indices in splits.indices().items():
        np.testing.assert_array_equal(again.indices()[name], indices)
    assert (again.leaks, again.warnings) == (splits.leaks, splits.warnings)
    del document["leaks"], document["left_out"]  # a run of an earlier version, whose unlabeled images were all used
    with pytest.raises(DataError, match=r"1 image new: unlabeled/leak\.png"):
        Splits.from_json(document, open_source(str(photos)))


def test_an_own_val_that_is_not_used_survives_a_resume(class_folders, picture) -> None:
    for label in ("cat", "dog", "emu"):
        picture(class_folders / "val" / label / "0.png", sum(map(ord, label)))
    source = open_source(str(class_folders))
    splits = make_splits(source, 6)
    assert "are left out" in splits.warnings[0]
    again = Splits.from_json(json.loads(json.dumps(splits.to_json(source))), source)
    np.testing.assert_array_equal(again.unlabeled, splits.unlabeled)


def test_images_that_were_left_out_are_missed_when_they_vanish(photos: Path) -> None:
    shutil.copy(photos / "test/cat/01.png", photos / "unlabeled/leak.png")
    source, splits = _splits(photos)
    document = splits.to_json(source)
    (photos / "unlabeled/leak.png").unlink()
    with pytest.raises(DataError, match=r"1 image missing: unlabeled/leak\.png"):
        Splits.from_json(document, open_source(str(photos)))


def _arrays(px: int, channels: int) -> Source:
    """80 training and 20 test images as arrays; training image 7 is test image 95, and 9 nearly test image 90."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (100, 4, 4, channels), dtype=np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(px // 4, axis=1).repeat(px // 4, axis=2))
    pixels[7] = pixels[95]
    pixels[9] = np.clip(pixels[90].astype(int) + rng.integers(-3, 4, pixels[90].shape), 0, 255)
    return Source(
        name="made",
        spec="made",
        classes=("a", "b"),
        ids=tuple(f"made/{i:03d}" for i in range(100)),
        labels=np.arange(100) % 2,
        part=np.array(["train"] * 80 + ["test"] * 20),
        channels=3 if channels == 3 else 1,
        native_px=(px, px),
        kind="small",
        flip_allowed=True,
        images=ArrayImages((pixels[:30], pixels[30:])),
        fingerprint="f" * 64,
    )


def test_simple_pictures_are_not_near_by_chance_and_their_copies_are() -> None:
    """Handwritten digits, enlarged: none was written twice."""
    data = sklearn.datasets.load_digits()
    small = (data.images * (255 / 16)).astype(np.uint8)
    digits = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in small])
    known = Shapes.of(digits[1400:])
    flagged = nearest(Shapes.of(digits[:1400]), known)[0] >= 0
    assert flagged.mean() < 0.02
    assert max(flagged[data.target[:1400] == label].mean() for label in range(10)) < 0.05
    match, _ = nearest(Shapes.of(np.stack([_recoded(image) for image in digits[1400:]])), known)
    assert (match == np.arange(len(match))).mean() > 0.99


def _recoded(image: np.ndarray) -> np.ndarray:
    """Twice as large, paler, as JPEG, and back."""
    content = io.BytesIO()
    large = np.asarray(Image.fromarray(image).resize((64, 64)))
    Image.fromarray((large * 0.8 + 20).astype(np.uint8)).save(content, "JPEG", quality=70)
    return np.asarray(Image.open(content).resize((32, 32)))


@pytest.mark.parametrize(("near", "left_in"), [(4, 0), (5, 5)])
def test_more_near_images_than_accidents_make_are_left_in_and_told(near: int, left_in: int) -> None:
    """A twentieth of 80 is 4; image 7, the same as image 95, goes anyway."""
    source = _arrays(32, 1)
    assert isinstance(source.images, ArrayImages)
    pixels = np.concatenate(source.images.blocks)
    for copy in range(10, 9 + near):  # with image 9
        pixels[copy] = pixels[copy + 70] // 2 + 60
    source = replace(source, images=ArrayImages((pixels,)))
    splits = replace(make_splits(source, 2), labeled=np.array([0, 9]))
    cleaned = without_leaks(source, splits)
    gone = [7] if left_in else [7, *range(10, 9 + near)]  # 9 is labeled and stays
    assert sorted(set(splits.unlabeled) - set(cleaned.unlabeled)) == gone
    assert cleaned.lookalikes == left_in
    assert [leak["id"] for leak in cleaned.leaks if not leak["labeled"]] == [f"made/{i:03d}" for i in gone]
    told = [sentence for sentence in cleaned.warnings if "left in" in sentence]
    assert told == (
        [
            "5 images of the 80 unlabeled ones (6.2%) look nearly like one of test: left in, too many to be accidental "
            "copies (made/009 and made/090, made/010 and made/080, made/011 and made/081, and 2 more)."
        ]
        if left_in
        else []
    )
    again = Splits.from_json(json.loads(json.dumps(cleaned.to_json(source))), source)
    assert (again.lookalikes, again.leaks) == (cleaned.lookalikes, cleaned.leaks)


@pytest.mark.parametrize(("px", "looks"), [((31, 400), False), ((32, 32), True)])
def test_near_ones_are_looked_for_in_images_large_enough(px: tuple[int, int], looks: bool) -> None:
    assert looks_for_near(replace(_arrays(8, 1), native_px=px)) is looks


@pytest.mark.parametrize(("px", "channels", "found"), [(8, 1, [7]), (32, 1, [7, 9]), (32, 3, [7, 9]), (64, 3, [7, 9])])
def test_arrays_and_what_is_too_small_to_be_near(monkeypatch, px: int, channels: int, found: list[int]) -> None:
    monkeypatch.setattr(leaks, "_CHUNK", 13)
    source = _arrays(px, channels)
    splits = replace(make_splits(source, 2), labeled=np.array([0, 1]))
    cleaned = without_leaks(source, splits)
    assert sorted(set(splits.unlabeled) - set(cleaned.unlabeled)) == found
    assert [leak["like"] for leak in cleaned.leaks] == ["made/095", "made/090"][: len(found)]


def test_small_files_are_compared_by_their_pixels(tmp_path: Path, picture) -> None:
    for number, name in enumerate(("labeled/a/0", "labeled/b/0", "unlabeled/0", "unlabeled/1", "test/a/0", "test/b/0")):
        picture(tmp_path / f"{name}.png", number)
    Image.open(tmp_path / "test/b/0.png").save(tmp_path / "unlabeled/other format.bmp")
    source = open_source(str(tmp_path))
    (tmp_path / "unlabeled/1.png").write_bytes(b"")  # damage that shows only when it is decoded
    splits = without_leaks(source, make_splits(source))
    assert [(leak["id"], leak["like"], leak["exact"]) for leak in splits.leaks] == [
        ("unlabeled/other format.bmp", "test/b/0.png", True)
    ]


def test_val_is_guarded_too_and_digits_are_clean(photos: Path) -> None:
    for label, start in (("cat", 200), ("dog", 210)):
        for i in range(3):
            _photo(photos / f"val/{label}/{i}.png", start + i)
    shutil.copy(photos / "val/dog/1.png", photos / "unlabeled/leak.png")
    _, splits = _splits(photos)
    assert [leak["split"] for leak in splits.leaks] == ["val"]
    digits = open_source("digits")
    drawn = make_splits(digits)
    assert without_leaks(digits, drawn) is drawn
