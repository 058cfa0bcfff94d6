"""The folder layouts, and what lies about in real folders."""

import os
from pathlib import Path

import pytest

from kdedge.data import make_splits, open_source
from kdedge.errors import DataError


def test_train_and_test_of_class_folders(class_folders: Path) -> None:
    source = open_source(str(class_folders))
    assert source.name == "my-photos"
    assert source.classes == ("cat", "dog", "emu")
    assert source.counts() == {"train": 36, "unlabeled": 0, "val": 0, "test": 6}
    assert source.ids[0] == "test/cat/00.png"
    assert list(source.ids) == sorted(source.ids)
    assert source.labels[source.ids.index("train/dog/03.png")] == 1
    assert (source.channels, source.native_px, source.kind) == (3, (10, 12), "small")
    assert (source.flip_allowed, source.default_labels, source.test_is_val) == (True, None, False)
    assert source.warnings == ()


def test_labeled_and_unlabeled_folders(tmp_path, picture) -> None:
    for i, name in enumerate(["labeled/a/1.png", "labeled/b/1.png", "unlabeled/x.png", "unlabeled/deep/er/y.jpg"]):
        picture(tmp_path / name, i, size=(100, 90))
    source = open_source(str(tmp_path))
    assert source.ids == ("labeled/a/1.png", "labeled/b/1.png", "unlabeled/deep/er/y.jpg", "unlabeled/x.png")
    assert source.labels.tolist() == [0, 1, -1, -1]
    assert source.part.tolist() == ["train", "train", "unlabeled", "unlabeled"]
    assert source.kind == "photo"
    splits = make_splits(source)
    assert splits.labeled.tolist() == [0, 1]
    assert splits.unlabeled.tolist() == [0, 1, 2, 3]


def test_plain_class_folders_have_no_test(tmp_path, picture) -> None:
    for i in range(6):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i, mode="L")
    source = open_source(str(tmp_path))
    assert source.counts()["train"] == 6
    assert source.channels == 1
    assert not source.flip_allowed  # single characters: letters
    assert "no test images" in " ".join(make_splits(source).warnings)


def test_val_without_test_is_the_test_and_says_so(tmp_path, picture) -> None:
    for i, name in enumerate(["train/aa/1.png", "train/bb/1.png", "val/aa/2.png", "val/bb/2.png"]):
        picture(tmp_path / name, i)
    source = open_source(str(tmp_path))
    assert source.test_is_val
    assert any("val is used as the test" in warning for warning in source.warnings)
    splits = make_splits(source)
    assert [source.ids[i] for i in splits.test] == ["val/aa/2.png", "val/bb/2.png"]
    assert len(splits.val) == 0
    assert splits.test_is_val


def test_val_beside_test_is_val(tmp_path, picture) -> None:
    for i, name in enumerate(f"{part}/{c}{c}/1.png" for part in ("train", "val", "test") for c in "ab"):
        picture(tmp_path / name, i)
    splits = make_splits(open_source(str(tmp_path)))
    assert (len(splits.labeled), len(splits.val), len(splits.test)) == (2, 2, 2)


def test_two_files_with_one_name_are_two_images(tmp_path, picture) -> None:
    for i, name in enumerate(["cat/1.png", "cat/1.jpg", "dog/1.png"]):
        picture(tmp_path / name, i)
    assert open_source(str(tmp_path)).ids == ("cat/1.jpg", "cat/1.png", "dog/1.png")


def test_stray_and_hidden_files_are_ignored_with_a_count(class_folders: Path) -> None:
    (class_folders / "LICENSE.txt").write_text("free")
    (class_folders / "train" / "list.csv").write_text("a,b")
    (class_folders / "train" / "cat" / "notes.md").write_text("miaow")
    (class_folders / "train" / "cat" / "._00.png").write_bytes(b"\0")
    (class_folders / ".git").mkdir()
    source = open_source(str(class_folders))
    assert len(source) == 42
    assert set(source.ignored) == {"LICENSE.txt", "train/list.csv", "train/cat/notes.md"}
    text = " ".join(source.warnings)
    assert "Ignored 3 stray files (1 .csv, 1 .md, 1 .txt)" in text
    assert "Ignored 2 hidden files or folders" in text


def test_a_folder_that_looks_like_val_is_named(class_folders: Path) -> None:
    (class_folders / "validation").mkdir()
    assert any("call it val/" in warning for warning in open_source(str(class_folders)).warnings)


def test_a_class_may_be_called_train(tmp_path, picture) -> None:
    for i, name in enumerate(["car/1.png", "ship/1.png", "train/1.png"]):
        picture(tmp_path / name, i)
    assert open_source(str(tmp_path)).classes == ("car", "ship", "train")


def test_links_outside_are_read_and_circles_end(tmp_path, picture) -> None:
    root = tmp_path / "root"
    picture(root / "cat" / "1.png", 1)
    picture(root / "dog" / "1.png", 2)
    picture(tmp_path / "elsewhere" / "2.png", 3)
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "single.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "dog" / "up").symlink_to(root)
    (root / "loop").symlink_to(root)
    (root / "dog" / "all").symlink_to("/")
    (root / "dog" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    source = open_source(str(root), max_unreadable_fraction=0.5)
    assert source.ids == ("cat/1.png", "cat/more/2.png", "cat/single.png", "dog/1.png")
    assert source.unreadable == (("dog/nowhere.png", "there is no such file"),)
    assert any("Skipped 4 linked folders" in warning for warning in source.warnings)


def test_the_order_of_the_file_system_does_not_matter(tmp_path, picture, monkeypatch) -> None:
    for i in range(20):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    first = open_source(str(tmp_path))
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listdir(folder)[::-1])
    second = open_source(str(tmp_path))
    assert (first.ids, first.fingerprint) == (second.ids, second.fingerprint)
    assert make_splits(first, 4, 7).labeled.tolist() == make_splits(second, 4, 7).labeled.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], "is empty. Expected labeled/CLASS"),
        (["cat/", "dog/"], "holds 2 folders, but no image"),
        (["1.png", "2.png"], "holds 2 images but no class folders"),
        (["train/1.png", "train/2.png", "test/cat/1.png"], "holds 2 images but no class folders"),
        (["photos.tar"], "Unpack them"),
        (["cat/1.png", "dog/", "emu/notes.txt"], "2 class folders without a readable training image: dog, emu"),
        (["train/cat/1.png", "train/dog/1.png", "test/dogs/1.png"], "Did you mean 'dog'?"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, picture, make, message) -> None:
    for i, name in enumerate(make):
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        elif name.endswith(".png"):
            picture(tmp_path / name, i)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path))
    assert message in str(error.value)


def test_a_test_class_without_images_is_a_warning(class_folders: Path) -> None:
    for path in (class_folders / "test" / "dog").iterdir():
        path.unlink()
    assert "The test part has no image of 1 class: dog." in open_source(str(class_folders)).warnings


def test_left_and_right_are_not_mirrored(tmp_path, picture) -> None:
    picture(tmp_path / "turn_left" / "1.png", 1)
    picture(tmp_path / "turn_right" / "1.png", 2)
    source = open_source(str(tmp_path))
    assert not source.flip_allowed
    assert any("turn_left, turn_right" in warning for warning in source.warnings)


def test_the_fingerprint_follows_names_and_sizes(tmp_path, picture) -> None:
    picture(tmp_path / "aa" / "1.png", 1)
    picture(tmp_path / "bb" / "1.png", 2)
    before = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == before
    picture(tmp_path / "bb" / "1.png", 2, size=(40, 40))
    assert open_source(str(tmp_path)).fingerprint != before
