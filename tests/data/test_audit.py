"""`kdedge data check`: duplicates, leaks, conflicts, unreadable files, odd modes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge.data import check, duplicates
from kdedge.data.duplicates import exact_groups, near_pairs, perceptual_hashes


def _photo(path: Path, number: int, quality: int = 95, brighter: int = 0) -> None:
    """Smooth shapes, as photographs have, different for each number; 120 x 100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 200, (7, 9, 3), dtype=np.uint8) + np.uint8(brighter)
    Image.fromarray(coarse).resize((120, 100), Image.Resampling.BICUBIC).save(path, quality=quality)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    number = 0
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for i in range(6):
                _photo(tmp_path / part / label / f"{i}.jpg", number)
                number += 1
    return tmp_path


def test_a_clean_set(photos: Path) -> None:
    found = check(str(photos))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["ok"]
    assert found["problems"] == []
    assert found["images"] == 24
    assert found["classes"]["dog"] == {"train": 6, "unlabeled": 0, "val": 0, "test": 6}
    assert found["counts"] == {"train": 12, "unlabeled": 0, "val": 0, "test": 12}
    assert found["exact_duplicates"] == found["near_duplicates"] == found["leaks"] == found["unreadable"] == []
    assert found["modes"] == {"RGB": 24}
    assert found["native_px"] == [100, 120]


def test_exact_duplicates_leaks_and_conflicts(photos: Path) -> None:
    shutil.copy(photos / "train/cat/0.jpg", photos / "train/cat/copy.jpg")
    shutil.copy(photos / "train/cat/1.jpg", photos / "train/dog/other label.jpg")
    shutil.copy(photos / "train/dog/2.jpg", photos / "test/dog/leaked.jpg")
    found = check(str(photos))
    assert not found["ok"]
    assert [entry["ids"] for entry in found["exact_duplicates"]] == [
        ["test/dog/leaked.jpg", "train/dog/2.jpg"],
        ["train/cat/0.jpg", "train/cat/copy.jpg"],
        ["train/cat/1.jpg", "train/dog/other label.jpg"],
    ]
    assert found["exact_duplicates"][0]["parts"] == ["test", "train"]
    assert [entry["ids"] for entry in found["leaks"]] == [["test/dog/leaked.jpg", "train/dog/2.jpg"]]
    assert [entry["labels"] for entry in found["label_conflicts"]] == [["cat", "dog"]]
    assert found["near_duplicates"] == []  # an exact one is not told twice
    assert len(found["problems"]) == 2


def test_near_duplicates_survive_recoding_resizing_and_light(photos: Path) -> None:
    _photo(photos / "test/cat/recoded.jpg", 0, quality=40)
    _photo(photos / "train/cat/brighter.jpg", 1, brighter=30)
    Image.open(photos / "train/dog/0.jpg").resize((60, 50)).save(photos / "train/dog/smaller.png")
    found = check(str(photos))
    pairs = {tuple(entry["ids"]) for entry in found["near_duplicates"]}
    assert pairs == {
        ("test/cat/recoded.jpg", "train/cat/0.jpg"),
        ("train/cat/1.jpg", "train/cat/brighter.jpg"),
        ("train/dog/0.jpg", "train/dog/smaller.png"),
    }
    assert [entry["ids"] for entry in found["leaks"]] == [["test/cat/recoded.jpg", "train/cat/0.jpg"]]


def test_unreadable_files_and_odd_modes(photos: Path) -> None:
    (photos / "train/cat/text.jpg").write_text("text")
    damaged = photos / "train/cat/damaged.png"
    Image.open(photos / "train/cat/0.jpg").resize((50, 50)).save(damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    damaged.write_bytes(bytes(content))
    Image.new("CMYK", (99, 77), 90).save(photos / "train/dog/print.jpg")
    found = check(str(photos))
    assert [entry["file"] for entry in found["unreadable"]] == ["train/cat/text.jpg", "train/cat/damaged.png"]
    assert found["unreadable_fraction"] == pytest.approx(2 / 27)
    assert found["modes"] == {"CMYK": 1, "RGB": 24}
    assert found["problems"] == ["2 images cannot be read (7.4%, more than 5.0%)."]
    assert check(str(photos), max_unreadable_fraction=0.1)["ok"]


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    _photo(tmp_path / "aa" / "0.jpg", 0)
    _photo(tmp_path / "bb" / "0.jpg", 1)
    for i in range(1, 22):  # 21 * 22 / 2 = 231 near pairs among the images that differ in brightness only
        _photo(tmp_path / "aa" / f"{i}.jpg", 0, brighter=i)
    found = check(str(tmp_path))
    assert found["found"]["near_duplicates"] == 231
    assert len(found["near_duplicates"]) == 200


def test_digits_are_clean_and_too_small_for_near_duplicates() -> None:
    found = check("digits")
    assert found["ok"]
    assert found["near_duplicates"] is None
    assert found["modes"] == {"L": 1797}


def test_exact_groups() -> None:
    assert exact_groups([b"a", b"b", b"a", b"", b"", b"c", b"b"]) == [[0, 2], [1, 6]]


def test_near_pairs_equal_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    noisy = np.clip(base[:15].astype(int) + rng.integers(-9, 10, (15, 32, 32)), 0, 255).astype(np.uint8)
    thumbnails = np.concatenate([base, noisy])
    hashes = [int(value) for value in perceptual_hashes(thumbnails)]
    slow = []
    for i in range(len(hashes)):
        for j in range(i + 1, len(hashes)):
            bits = (hashes[i] ^ hashes[j]).bit_count()
            alike = np.corrcoef(thumbnails[i].ravel(), thumbnails[j].ravel())[0, 1]
            if bits <= 8 and alike >= 0.99:
                slow.append((i, j, bits))
    assert {(i, j) for i, j, _ in slow} == {(i, 40 + i) for i in range(15)}
    assert sorted(near_pairs(thumbnails)) == slow


def test_flat_images_and_films_end(monkeypatch) -> None:
    flat = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 32, 32), dtype=np.uint8)
    assert near_pairs(flat) == []
    film = np.random.default_rng(0).integers(0, 256, (1, 32, 32), dtype=np.uint8).repeat(60, axis=0)
    assert len(near_pairs(film)) == 60 * 59 // 2
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 100)
    assert len(near_pairs(film)) == 100
