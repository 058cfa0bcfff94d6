"""A model from elsewhere with a data SPEC: what a run would have brought along, and what is said where it guesses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge.errors import DataError, ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.foreign import Reading, open_foreign, preprocess_of, spec_images
from kdedge_export.float_form.onnx_import import Imported, import_onnx

from .foreign_files import classifier, saved

NOTE = "The file does not say how its images were normalised: mean 0.485 0.456 0.406 and std 0.229"


@pytest.fixture
def imported(tmp_path: Path) -> Imported:
    return import_onnx(saved(classifier(), tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five classes: 12 train, 4 test images each, 9 unlabeled ones, all different; one test image is in train too."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set"

    def write(path: Path, pixels: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for name in "edcba":
        for part, count in (("train", 12), ("test", 4)):
            for i in range(count):
                write(root / part / name / f"{i}.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for i in range(9):
        write(root / "unlabeled" / f"{i}.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return root


def test_everything_of_an_export(tmp_path: Path, folder: Path) -> None:
    path = saved(classifier(), tmp_path)
    found = open_foreign(path, str(folder))
    assert found.preprocess == Preprocess(8, 8, 3, "short-side-crop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.classes == tuple("abcde")
    assert len(found.notes) == 2
    assert found.notes[0].startswith(NOTE)
    assert found.notes[1] == (
        f"The file does not name its classes: those of {folder} are taken, in the order a, b, c, d, e."
    )
    assert found.max_abs_difference < 1e-5
    images = found.images
    assert (len(images.calibration), len(images.gate), len(images.test)) == (23, 46, 20)
    ids = [set(part.ids) for part in (images.calibration, images.gate, images.test)]
    assert len(set.union(*ids)) == sum(map(len, ids)), "no image is in two parts"
    assert all(identity.startswith("test/") for identity in ids[2])
    assert (images.calibration.labels == -1).all()
    for part in (images.gate, images.test):
        for identity, label in zip(part.ids, part.labels, strict=True):
            assert label == (-1 if identity.startswith("unlabeled") else "abcde".index(identity.split("/")[1]))
    assert (images.gate.labels >= 0).any()
    assert not images.test_is_val
    again = open_foreign(path, str(folder)).images
    assert again.gate.ids == images.gate.ids
    assert again.gate.sha256 == images.gate.sha256 != images.calibration.sha256


def test_copies_of_test_images_are_left_out(imported: Imported, folder: Path) -> None:
    for i in range(12):
        (folder / "train" / "a" / f"{i}.png").write_bytes((folder / "test" / "b" / f"{i % 4}.png").read_bytes())
    _, images, notes = spec_images(imported, str(folder))
    copies = {f"train/a/{i}.png" for i in range(12)}
    assert not copies & {*images.calibration.ids, *images.gate.ids}
    assert len(images.calibration) + len(images.gate) == 57
    assert any("12 unlabeled images are (nearly) in test too: left out" in note for note in notes)


def test_val_is_the_test_where_there_is_no_other(imported: Imported, folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    _, images, _ = spec_images(imported, str(folder))
    assert images.test_is_val
    assert all(identity.startswith("val/") for identity in images.test.ids)


def test_labels_follow_the_names_of_the_file(imported: Imported, folder: Path) -> None:
    own = replace(imported, classes=tuple("cabed"))
    classes, images, notes = spec_images(own, str(folder))
    assert (classes, notes) == (tuple("cabed"), ())
    for identity, label in zip(images.test.ids, images.test.labels, strict=True):
        assert "cabed"[label] == identity.split("/")[1]


def test_labels_of_other_classes_are_not_used(imported: Imported, folder: Path) -> None:
    classes, images, notes = spec_images(replace(imported, classes=tuple("vwxyz")), str(folder))
    assert classes == tuple("vwxyz")
    assert notes == (f"The labels of {folder} are not used: it has 5 classes, the model 5 of other names.",)
    assert (images.test.labels == -1).all()
    assert (images.gate.labels == -1).all()
    classes, images, notes = spec_images(imported, "digits")
    assert classes == ("0", "1", "2", "3", "4")
    assert (images.gate.labels == -1).all()
    assert notes == ("The labels of digits are not used: it has 10 classes, the model 5.",)


def test_options_say_what_the_file_does_not(imported: Imported) -> None:
    found, notes = preprocess_of(imported, Reading((0.5,), (0.1, 0.2, 0.3), "squash"))
    assert found == Preprocess(8, 8, 3, "squash", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert notes == ()
    found, notes = preprocess_of(imported, Reading(mean=(0.5,)))
    assert found.std == (0.229, 0.224, 0.225)
    assert len(notes) == 1
    own = Preprocess(8, 8, 3, "squash", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert preprocess_of(replace(imported, preprocess=own)) == (own, ())
    assert preprocess_of(replace(imported, preprocess=own), Reading(std=(0.5,)))[0] == replace(own, std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("reading", "match"),
    [
        (
            Reading(mean=(0.1, 0.2)),
            "have 2 and 3 numbers; 3 of each were expected.* takes 3 channels of 8 x 8",
        ),
        (Reading(std=(0.0,)), "std above 0, were expected"),
        (Reading(resize="stretch"), "resize is 'stretch'"),
    ],
)
def test_options_that_cannot_be(reading: Reading, match: str, imported: Imported) -> None:
    with pytest.raises(ExportError, match=match):
        preprocess_of(imported, reading)


def test_a_set_without_images_to_calibrate_on(imported: Imported, tmp_path: Path) -> None:
    table = tmp_path / "set.csv"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    table.write_text("path,label,split\na.png,a,test\n")
    with pytest.raises(DataError, match="no training or unlabeled images to calibrate on"):
        spec_images(imported, str(table))


def test_images_that_cannot_be_read_are_told(imported: Imported, folder: Path) -> None:
    (folder / "train" / "a" / "0.png").write_bytes(b"no image")
    assert "1 image of" in spec_images(imported, str(folder))[2][0]
