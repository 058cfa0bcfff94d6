"""CSV files: path,label[,split]."""

from pathlib import Path

import pytest

from kdedge.data import make_splits, open_source
from kdedge.errors import DataError


def _csv(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "list.csv"
    path.write_text(text, encoding=encoding)
    return str(path)


@pytest.fixture
def pictures(tmp_path, picture) -> Path:
    for i in range(8):
        picture(tmp_path / "img" / f"{i}.png", i)
    return tmp_path


def test_labels_splits_and_empty_labels(pictures: Path) -> None:
    absolute = pictures / "img" / "5.png"
    text = (
        "path,label,split\nimg/0.png,cat,train\n./img/1.png,dog,\nimg/2.png,,\nimg/3.png,cat,unlabeled\n"
        f"img/4.png,cat,test\n{absolute},dog,val\n"
    )
    source = open_source(_csv(pictures, text))
    assert source.name == "list"
    assert source.classes == ("cat", "dog")
    found = dict(zip(source.ids, zip(source.labels.tolist(), source.part.tolist(), strict=True), strict=True))
    assert found == {
        "img/0.png": (0, "train"),
        "img/1.png": (1, "train"),
        "img/2.png": (-1, "unlabeled"),
        "img/3.png": (-1, "unlabeled"),
        "img/4.png": (0, "test"),
        str(absolute): (1, "val"),
    }
    assert len(make_splits(source).val) == 1


def test_columns_in_any_order_and_a_byte_order_mark(pictures: Path) -> None:
    source = open_source(_csv(pictures, 'Label,Path\r\n"a, or b",img/0.png\r\nc,img/1.png\r\n', "utf-8-sig"))
    assert source.classes == ("a, or b", "c")
    assert source.ids == ("img/0.png", "img/1.png")


def test_a_missing_file_counts_as_unreadable(pictures: Path) -> None:
    text = "path,label\nimg/0.png,cat\nimg/1.png,dog\nimg/gone.png,dog\n"
    assert open_source(_csv(pictures, text), max_unreadable_fraction=0.4).unreadable == (
        ("img/gone.png", "there is no such file"),
    )
    with pytest.raises(DataError, match="1 of 3 images of list cannot be read"):
        open_source(_csv(pictures, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns \(none\); path,label or path,label,split was expected"),
        ("path;label\nimg/0.png;cat\n", "Separate columns with commas"),
        ("file,label\nimg/0.png,cat\n", "columns file, label"),
        ("path,label\n", "has a header but no images"),
        ("path,label,split\nimg/0.png,cat,tests\n", "line 2: split 'tests' is none of .* Did you mean 'test'"),
        ("path,label,split\nimg/0.png,,test\n", "line 2: split test needs a label"),
        ("path,label\n,cat\n", "line 2: its path is empty"),
        ("path,label\nimg/0.png,cat,x\n", "line 2: it has more fields than the header"),
        ("path,label\nimg/0.png,cat\n./img/0.png,dog\n", "line 3: img/0.png is there already, in line 2"),
        ("path,label\nimg/0\0.png,cat\n", "line 2: its path or label holds a zero byte"),
        ('path,label\n"img/0.png,cat\n', "Expected comma-separated values"),
    ],
)
def test_bad_lines_are_named(pictures: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(_csv(pictures, text))


def test_every_bad_line_is_told(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"has 2 bad lines: line 2: .* line 4: "):
        open_source(_csv(pictures, "path,label\n,cat\nimg/0.png,cat\n,dog\n"))


def test_another_encoding_is_a_sentence(pictures: Path) -> None:
    with pytest.raises(DataError, match="is not UTF-8 text"):
        open_source(_csv(pictures, "path,label\nimg/0.png,Käse\n", "latin-1"))
