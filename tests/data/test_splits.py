"""Who learns from what: sizes, what may overlap and what may not, and that nothing but ids and seed decides."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kdedge.data import Source, Splits, make_splits, open_source
from kdedge.data.source import ArrayImages
from kdedge.errors import DataError


def _source(per_class: dict[str, list[int]], unlabeled: int = 0, default_labels: int | None = None) -> Source:
    """Images that exist only as numbers: part -> images of class 0, 1, 2 ..."""
    labels, part = [-1] * unlabeled, ["unlabeled"] * unlabeled
    for name, counts in per_class.items():
        for label, count in enumerate(counts):
            labels += [label] * count
            part += [name] * count
    classes = max(len(counts) for counts in per_class.values())
    return Source(
        name="made",
        spec="made",
        classes=tuple(f"class {i}" for i in range(classes)),
        ids=tuple(f"made/{i:05d}" for i in range(len(labels))),
        labels=np.array(labels, dtype=np.int64),
        part=np.array(part, dtype="<U9"),
        channels=1,
        native_px=(4, 4),
        kind="small",
        flip_allowed=True,
        images=ArrayImages((np.zeros((len(labels), 4, 4, 1), dtype=np.uint8),)),
        fingerprint="f" * 64,
        default_labels=default_labels,
    )


def _check_invariants(source: Source, splits: Splits) -> None:
    found = {name: set(indices.tolist()) for name, indices in splits.indices().items()}
    for name, indices in splits.indices().items():
        assert indices.dtype == np.int64
        assert len(found[name]) == len(indices), f"{name} holds an image twice"
    assert found["labeled"] <= found["unlabeled"]
    assert (source.labels[splits.labeled] >= 0).all()
    assert not found["val"] & (found["unlabeled"] | found["test"])
    assert not found["test"] & found["unlabeled"]
    assert not found["calibration"] & found["gate"]
    assert found["calibration"] | found["gate"] <= found["unlabeled"]
    assert found["unlabeled"] | found["val"] | found["test"] == set(range(len(source)))
    assert set(source.part[splits.test].tolist()) <= {"val" if source.test_is_val else "test"}


CASES = {
    "plain": (_source({"train": [30, 30]}), None),
    "40 labels": (_source({"train": [200] * 10, "test": [20] * 10}), 40),
    "one a class": (_source({"train": [200] * 10, "test": [20] * 10}), 10),
    "val carved": (_source({"train": [200] * 4, "test": [20] * 4}), 400),
    "val carved from all": (_source({"train": [200, 50, 77], "test": [2, 3, 4]}), None),
    "val is test": (_source({"train": [100, 100], "val": [10, 10]}), 20),
    "own val": (_source({"train": [100, 100], "val": [10, 10], "test": [10, 10]}), None),
    "unlabeled part": (_source({"train": [5, 5], "test": [5, 5]}, unlabeled=2000), None),
    "tiny": (_source({"train": [1, 1]}), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_invariants(case: str, seed: int) -> None:
    source, labels = CASES[case]
    splits = make_splits(source, labels, seed)
    _check_invariants(source, splits)
    used = len(splits.labeled) + (0 if (source.part == "val").any() else len(splits.val))
    assert used == (labels or int(((source.labels >= 0) & (source.part == "train")).sum()))
    if labels:
        drawn = source.labels[splits.labeled]
        assert len(set(np.bincount(drawn, minlength=len(source.classes)).tolist())) == 1


def test_labels_counts_val_too_and_leaves_an_own_val_out() -> None:
    source = _source({"train": [100, 100], "val": [10, 10], "test": [10, 10]})
    splits = make_splits(source, 120)
    assert (len(splits.labeled), len(splits.val)) == (96, 24)
    assert set(source.part[splits.val].tolist()) == {"train"}
    assert "The 20 images of val/ are left out" in " ".join(splits.warnings)
    few = make_splits(source, 4)
    assert (len(few.labeled), len(few.val)) == (4, 0)


def test_val_needs_ten_a_class_in_every_class() -> None:
    source = _source({"train": [60, 60], "test": [5, 5]})
    splits = make_splits(source, 100)
    assert (len(splits.labeled), len(splits.val)) == (80, 20)
    assert np.bincount(source.labels[splits.val]).tolist() == [10, 10]
    splits = make_splits(source, 98)
    assert (len(splits.labeled), len(splits.val)) == (98, 0)
    uneven = make_splits(_source({"train": [200, 49], "test": [5, 5]}))
    assert len(uneven.val) == 0


def test_sizes_of_calibration_and_gate() -> None:
    small = make_splits(_source({"train": [45, 45]}))
    assert (len(small.calibration), len(small.gate)) == (30, 60)
    large = make_splits(_source({"train": [20, 20]}, unlabeled=3000))
    assert (len(large.calibration), len(large.gate)) == (512, 1000)
    middle = make_splits(_source({"train": [2, 2]}, unlabeled=1507))  # one below 512 + 1000
    assert (len(middle.calibration), len(middle.gate)) == (503, 1000)
    digits = make_splits(open_source("digits"))
    assert (len(digits.calibration), len(digits.gate)) == (419, 838)


def test_digits_by_default() -> None:
    source = open_source("digits")
    splits = make_splits(source)
    _check_invariants(source, splits)
    assert splits.labels == 40
    assert {name: len(indices) for name, indices in splits.indices().items()} == {
        "labeled": 40,
        "unlabeled": 1257,
        "val": 0,
        "test": 540,
        "calibration": 419,
        "gate": 838,
    }
    assert np.bincount(source.labels[splits.labeled]).tolist() == [4] * 10
    # Fixed for ever: reported results belong to these draws.
    assert splits.labeled[:8].tolist() == [2, 12, 17, 55, 85, 114, 201, 248]


def test_the_seed_draws_labels_and_leaves_the_test_alone() -> None:
    source = open_source("digits")
    first, again, other = make_splits(source, 40, 0), make_splits(source, 40, 0), make_splits(source, 40, 1)
    for name, indices in first.indices().items():
        np.testing.assert_array_equal(indices, again.indices()[name])
    assert first.labeled.tolist() != other.labeled.tolist()
    assert first.test.tolist() == other.test.tolist()
    more = make_splits(source, 80, 0)
    assert set(first.labeled) <= set(more.labeled)


def test_the_order_of_the_images_does_not_matter() -> None:
    source = _source({"train": [50, 50]})
    order = np.random.default_rng(0).permutation(100)
    shuffled = replace(
        source,
        ids=tuple(source.ids[i] for i in order),
        labels=source.labels[order],
    )
    ids = {source.ids[i] for i in make_splits(source, 20).labeled}
    assert ids == {shuffled.ids[i] for i in make_splits(shuffled, 20).labeled}


@pytest.mark.parametrize(
    ("labels", "nearest", "why"),
    [
        (42, 40, "cannot be divided evenly among 10 classes"),
        (47, 50, "cannot be divided evenly"),
        (5, 10, "each needs at least one"),
        (0, 10, "each needs at least one"),
        (-20, 10, "each needs at least one"),
        (90, 70, "the smallest class, 'class 3', has 7 labelled training images, so at most 10 x 7 = 70"),
        (100_000, 70, "so at most 10 x 7 = 70"),
    ],
)
def test_labels_that_do_not_work_name_the_nearest_that_does(labels: int, nearest: int, why: str) -> None:
    source = _source({"train": [20, 20, 20, 7, 20, 20, 20, 20, 20, 20], "test": [1] * 10})
    with pytest.raises(DataError) as error:
        make_splits(source, labels)
    assert why in str(error.value)
    assert str(error.value).endswith(f"The nearest number that works is {nearest}: --labels {nearest}.")
    assert len(make_splits(source, nearest).labeled) == nearest


def test_a_class_with_one_image_works() -> None:
    splits = make_splits(_source({"train": [1, 30], "test": [1, 1]}), 2)
    assert len(splits.labeled) == 2
    assert len(splits.unlabeled) == 31


def test_one_class_or_no_label_is_an_error() -> None:
    with pytest.raises(DataError, match="has one class, 'class 0'"):
        make_splits(_source({"train": [10]}))
    with pytest.raises(DataError, match="no labelled training image"):
        make_splits(_source({"test": [10, 10]}))


def test_nothing_unlabeled_is_said() -> None:
    assert any("nothing unlabeled" in note for note in make_splits(_source({"train": [9, 9]})).warnings)
    assert make_splits(_source({"train": [9, 9], "test": [1, 1]}), 2).warnings == ()


def test_json_round_trip() -> None:
    source = _source({"train": [60, 60], "test": [5, 5]}, unlabeled=40)
    splits = make_splits(source, 100, 3)
    document = json.loads(json.dumps(splits.to_json(source)))
    assert document["classes"] == ["class 0", "class 1"]
    assert document["splits"]["test"]["ids"][0] == source.ids[splits.test[0]]
    assert document["splits"]["labeled"]["count"] == 80
    assert len({split["sha256"] for split in document["splits"].values()}) == 6
    back = Splits.from_json(document, source)
    for name, indices in splits.indices().items():
        np.testing.assert_array_equal(back.indices()[name], indices)
    assert (back.labels, back.seed, back.test_is_val) == (100, 3, False)
    np.testing.assert_array_equal(back.truth, source.labels)


def test_ids_and_not_positions_are_what_counts(class_folders, picture) -> None:
    source = open_source(str(class_folders))
    splits = make_splits(source, 6)
    document = splits.to_json(source)
    broken = picture(class_folders / "train" / "cat" / "03.png", 500)
    broken.unlink()
    with pytest.raises(DataError, match=r"1 image missing: train/cat/03\.png"):
        Splits.from_json(document, open_source(str(class_folders)))
    picture(class_folders / "train" / "cat" / "99.png", 501)
    with pytest.raises(DataError, match=r"1 image missing: train/cat/03\.png; 1 image new: train/cat/99\.png"):
        Splits.from_json(document, open_source(str(class_folders)))


def test_other_contents_are_refused(class_folders, picture) -> None:
    source = open_source(str(class_folders))
    document = make_splits(source, 6).to_json(source)
    picture(class_folders / "train" / "cat" / "03.png", 500, size=(33, 33))
    with pytest.raises(DataError, match="has the file names of the run, but other contents"):
        Splits.from_json(document, open_source(str(class_folders)))


def test_what_was_left_out_as_undecodable_is_not_new(class_folders) -> None:
    bad = class_folders / "train" / "dog" / "05.png"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2 :][:20] = bytes(20)
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    bad.write_bytes(bytes(content))
    source = open_source(str(class_folders)).decodable()
    splits = make_splits(source, 6)
    document = splits.to_json(source)
    assert document["unreadable"] == ["train/dog/05.png"]
    reopened = open_source(str(class_folders))
    back = Splits.from_json(document, reopened)
    assert [reopened.ids[i] for i in back.gate] == [source.ids[i] for i in splits.gate]


def test_altered_documents_are_refused() -> None:
    source = _source({"train": [9, 9], "test": [2, 2]})
    good = make_splits(source, 4).to_json(source)
    cases = [
        (good | {"schema": 99}, "has schema 99; this kdedge reads up to 1"),
        ({}, "no integer 'schema'"),
        ([], "no integer 'schema'"),
        (good | {"splits": {}}, "lacks or misspells 'labeled'"),
        (good | {"classes": ["x", "y"]}, "has the classes class 0, class 1; the run was made with x, y"),
    ]
    altered = json.loads(json.dumps(good))
    altered["splits"]["test"]["ids"][0] = altered["splits"]["labeled"]["ids"][0]
    cases.append((altered, "the ids of test do not match their sha256"))
    for document, message in cases:
        with pytest.raises(DataError, match=message):
            Splits.from_json(document, source)
