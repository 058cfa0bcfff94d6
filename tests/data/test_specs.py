"""What a SPEC may be, and what is said of everything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdedge.data import NAMES, data_root, open_source
from kdedge.errors import DataError


def test_known_names() -> None:
    assert NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "stl10", "food101")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", r"no data set named 'digit'. Did you mean 'digits'\?.*or a folder: .*digit does not exist"),
        ("cifar-10", "Did you mean 'cifar10'?"),
        ("no/such/folder", "The folder no/such/folder does not exist"),
        ("list.csv", "The CSV file list.csv does not exist"),
        ("", "SPEC is empty"),
        ("  ", "SPEC is empty"),
        ("shards-{000..099}.tar", r"names 100 shards, of which 100 cannot be found: shards-000.tar, shards-001.tar"),
        ("shards-{000..099}.tar.gz", r"names compressed archives, which are not read as they are. Expected plain tars"),
        ("x" * 5000, "cannot be opened|no data set named"),
    ],
)
def test_what_does_not_exist(spec: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos.tar.gz", "is an archive; a folder was expected. Unpack it"),
        ("photos.ZIP", "is an archive"),
        ("photos.tar", "cannot be read as a tar"),
        ("photos.pack", "is a file; a folder of images, a CSV .*, a file made by kdedge data pack, or WebDataset"),
    ],
)
def test_files_that_are_not_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / name))


def test_a_name_wins_over_a_folder_and_says_so(tmp_path, picture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "digits" / "aa" / "1.png")
    assert open_source("digits").warnings[-1].endswith("Write ./digits for the folder.")
    assert open_source("./digits").classes == ("aa",)


def test_opening_and_checking_need_no_torch(class_folders: Path) -> None:
    program = (
        "import sys; from kdedge.data import check, make_splits, open_source; "
        f"make_splits(open_source('digits')); check({str(class_folders)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment())
    assert done.stderr == ""
    assert done.stdout == "False\n"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_where_named_sets_lie(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache" / "kdedge" / "data"
    monkeypatch.setenv("KDEDGE_DATA", "~/sets")
    assert data_root() == tmp_path / "sets"
    assert data_root(Path("/other")) == Path("/other")
