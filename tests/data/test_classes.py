"""Some classes of a set, as if there were no others."""

import numpy as np
import pytest
from PIL import Image

from kdedge.data import make_splits, open_source
from kdedge.data.source import LEFT_OUT
from kdedge.data.splits import Splits
from kdedge.errors import DataError


def test_classes_keep_the_order_of_the_set_and_labels_are_drawn_from_them() -> None:
    whole, some = open_source("digits"), open_source("digits", classes=["7", "1"])
    assert (some.name, some.classes, some.default_labels) == ("digits-2of10", ("1", "7"), 8)
    ones, sevens = (some.labels == k for k in (0, 1))
    np.testing.assert_array_equal(ones, whole.labels == 1)
    np.testing.assert_array_equal(sevens, whole.labels == 7)
    np.testing.assert_array_equal(some.part == LEFT_OUT, ~(ones | sevens))
    assert "1,436 images of other classes" in some.warnings[-1]
    splits, all_splits = make_splits(some, None, seed=3), make_splits(whole, None, seed=3)
    assert len(splits.labeled) == 8
    for name, indices in splits.indices().items():
        assert np.isin(whole.labels[indices], (1, 7)).all(), name
    # Nested: whoever is labeled among two classes is so among ten.
    assert np.isin(splits.labeled, all_splits.labeled).all()


def test_splits_of_some_classes_are_read_back_and_not_taken_for_all() -> None:
    some = open_source("digits", classes=["3", "5", "8"])
    document = make_splits(some, 6, seed=0).to_json(some)
    again = Splits.from_json(document, some)
    assert again.labels == 6
    with pytest.raises(DataError, match="the run was made with 3, 5, 8"):
        Splits.from_json(document, open_source("digits"))


def test_all_classes_are_the_set_itself() -> None:
    source = open_source("digits")
    assert source.only(tuple(reversed(source.classes))) is source


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["7", "77"], "'77', which is no class of digits. Did you mean '7'"),
        (["7", "7"], "'7' twice"),
        (["7"], "names 1 class; expected at least two"),
        ([], "names 0 classes"),
    ],
)
def test_what_cannot_be_chosen(classes, said) -> None:
    with pytest.raises(DataError, match=said):
        open_source("digits", classes=classes)


def test_files_of_other_classes_are_not_decoded_and_unlabeled_ones_stay(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for place in ("labeled/cat", "labeled/dog", "labeled/owl", "unlabeled"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / place / f"{i}.png")
    damaged = (tmp_path / "labeled/owl/0.png").read_bytes()
    (tmp_path / "labeled/owl/0.png").write_bytes(damaged[:60] + bytes(20) + damaged[80:])  # its end is whole
    assert len(open_source(str(tmp_path), max_unreadable_fraction=0.5).decodable().unreadable) == 1
    some = open_source(str(tmp_path), classes=["dog", "cat"]).decodable()
    assert (some.classes, some.unreadable) == (("cat", "dog"), ())
    assert some.counts() == {"train": 6, "unlabeled": 3, "val": 0, "test": 0}
    assert "and 3 without a label kept" in some.warnings[-1]
