"""WebDataset shards: read where they lie, listed once, alone or beside labelled folders."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge.data import check, make_splits, open_source, shards
from kdedge.data.leaks import without_leaks
from kdedge.data.pack import pack
from kdedge.data.shards import expand_braces
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

RGB = Preprocess(8, 8, 3, "short-side-crop", (0.0,) * 3, (1.0,) * 3)
MakeShard = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KDEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def _png(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


def _shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def unlabeled(tmp_path) -> str:
    """Three shards of four images each; and what is beside them in real ones."""
    for shard in range(3):
        members = {f"{i:05d}.png": _png(10 * shard + i) for i in range(4)}
        extra = {"00000.json": b"{}", "00001.txt": b"a caption", "._00001.png": b"junk of a Mac"}
        _shard(tmp_path / "pool" / f"shards-{shard:03d}.tar", members | extra)
    return str(tmp_path / "pool" / "shards-{000..002}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
        ("one.tar", ["one.tar"]),
    ],
)
def test_braces_are_those_of_bash(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{5..3}.tar", "runs backwards"),
        ("a-{x}.tar", "is no range"),
        ("a-{0..9999999999}.tar", "more than 100,000 shards"),
        ("a-{0..9999}-{0..9999}.tar", "names 100,000,000 shards"),
    ],
)
def test_braces_that_name_nothing(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(pattern)


def test_images_are_read_where_they_lie(unlabeled: str, tmp_path) -> None:
    before = sorted(tmp_path.rglob("pool/*"))
    source = open_source(unlabeled)
    assert (source.name, len(source), source.native_px, source.channels) == ("shards", 12, (10, 12), 3)
    assert source.ids[:2] == ("shards-000.tar/00000.png", "shards-000.tar/00001.png")
    assert set(source.part) == {"unlabeled"}
    assert "so every image is unlabeled" in source.warnings[0]
    pixels = source.load([11, 4], RGB)
    assert np.array_equal(pixels[0].permute(1, 2, 0), RGB.decode(_png(23)))
    assert np.array_equal(pixels[1].permute(1, 2, 0), RGB.decode(_png(10)))
    assert source.decodable() is source
    assert sorted(tmp_path.rglob("pool/*")) == before
    with pytest.raises(DataError, match="has no labelled training image"):
        make_splits(source)


def test_a_missing_shard_is_named(unlabeled: str) -> None:
    with pytest.raises(DataError, match=r"names 5 shards, of which 2 cannot be found: .*shards-003.tar, .*shards-004"):
        open_source(unlabeled.replace("002}", "004}"))


def test_classes_come_from_cls_members(tmp_path) -> None:
    members: dict[str, bytes] = {}
    for i, label in enumerate(["cat", "dog", "cat", "dog"]):
        members |= {f"set.v1/{i}.png": _png(i), f"set.v1/{i}.cls": f"{label}\n".encode()}
    members |= {"set.v1/4.png": _png(4)}
    source = open_source(str(_shard(tmp_path / "pets.tar", members)))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, -1]
    assert source.part.tolist() == ["train"] * 4 + ["unlabeled"]
    assert source.warnings == ()
    assert make_splits(source, 2).labels == 2


GARBAGE = [b"", b"\xff\xfe", b"two\nlines", b"x" * 2000, b"red\x1b[31m", b"a\rb", "a\u2028b".encode()]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_cls_member_that_holds_no_class(content: bytes, tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {"1.png": _png(1), "1.cls": content, "2.png": _png(2), "2.cls": b"cat"})
    with pytest.raises(
        DataError, match=r"^1 image with a .cls member that holds no class: 1.cls in .*x.tar\. Expected"
    ):
        open_source(str(path))


def test_classes_that_are_not_read_refuse_nothing(picture, tmp_path) -> None:
    picture(tmp_path / "labeled" / "cat" / "1.png", 1)
    _shard(tmp_path / "unlabeled" / "x.tar", {"2.png": _png(2), "2.cls": b""})
    assert open_source(str(tmp_path)).labels.tolist() == [0, -1]


def test_a_pool_of_shards_beside_labelled_folders(unlabeled: str, picture, tmp_path) -> None:
    root = tmp_path / "mixed"
    for label in ("cat", "dog"):
        for i in range(3):
            picture(root / "labeled" / label / f"{i}.png", 100 + 10 * len(label) + i + (label == "dog") * 50)
    (root / "unlabeled").mkdir()
    for shard in Path(unlabeled).parent.glob("*.tar"):
        (root / "unlabeled" / shard.name).symlink_to(shard)
    picture(root / "unlabeled" / "loose.png", 99)
    picture(root / "test" / "cat" / "t.png", 11)  # the second image of the second shard
    source = open_source(str(root))
    assert source.counts() == {"train": 6, "unlabeled": 13, "val": 0, "test": 1}
    assert "unlabeled/shards-001.tar/00001.png" in source.ids
    splits = without_leaks(source, make_splits(source))
    assert [leak["id"] for leak in splits.leaks] == ["unlabeled/shards-001.tar/00001.png"]
    assert len(splits.unlabeled) == 18
    document = check(str(root))
    assert document["images"] == 20
    assert document["found"]["unreadable"] == 0
    out = tmp_path / "mixed.pack"
    pack(source, out, px=8)
    packed = open_source(str(out))
    assert (tuple(packed.ids), packed.fingerprint) == (source.ids, source.fingerprint)
    assert np.array_equal(packed.load(range(20), RGB), source.load(range(20), RGB))


# ---- what shards hold is listed once


def test_a_shard_is_listed_once(unlabeled: str, cache: Path, monkeypatch) -> None:
    first = open_source(unlabeled)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(shards, "_read", None)
    again = open_source(unlabeled)
    assert (again.ids, again.fingerprint) == (first.ids, first.fingerprint)
    assert np.array_equal(again.load(range(12), RGB), first.load(range(12), RGB))


def test_an_altered_shard_or_list_is_listed_again(unlabeled: str, cache: Path) -> None:
    first = open_source(unlabeled)
    for kept in cache.iterdir():
        kept.write_text(kept.read_text()[:-20])
    assert open_source(unlabeled).fingerprint == first.fingerprint
    _shard(Path(unlabeled).parent / "shards-001.tar", {"1.png": _png(7)})
    assert len(open_source(unlabeled)) == 9


def test_a_cache_that_cannot_be_written_costs_time_alone(unlabeled: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert len(open_source(unlabeled)) == 12


# ---- what cannot be read


def test_names_that_point_elsewhere_lead_nowhere(tmp_path, capfd) -> None:
    members = {f"{i}.png": _png(i) for i in range(4)}
    path = _shard(tmp_path / "in" / "x.tar", members | {"../../evil.png": _png(9), "/tmp/evil.png": _png(9)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(str(path), max_unreadable_fraction=0.5)
    assert len(source) == 4
    assert {reason for _, reason in source.unreadable} == {"its name points out of the shard"}
    assert len(source.unreadable) == 2
    assert not list(tmp_path.rglob("evil*"))


def test_a_damaged_member_is_left_out_and_told(tmp_path) -> None:
    members = {f"{i}.png": _png(i) for i in range(30)} | {"30.png": b"no image", "31.png": b""}
    source = open_source(str(_shard(tmp_path / "x.tar", members)), max_unreadable_fraction=0.1)
    assert len(source) == 30
    assert [identity for identity, _ in source.unreadable] == ["x.tar/30.png", "x.tar/31.png"]
    assert "2 of 32 images cannot be read and are left out" in source.warnings[1]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_cut_shard_is_a_sentence(keep: int, tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {f"{i}.png": b"x" * 3000 for i in range(4)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x.tar cannot be read as a tar: .*Expected a whole, uncompressed"):
        open_source(str(path))


# Of four members with 3,000 bytes each, 3,584 with header and padding; the end mark begins at 14,336.
@pytest.mark.parametrize("keep", [3584, 4096, 7168, 10752, 11264, 14336])
def test_a_shard_cut_at_a_block_is_a_sentence(keep: int, tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {f"{i}.png": b"x" * 3000 for i in range(4)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"x.tar (is damaged or cut at byte {keep}|cannot be read as a tar)"):
        open_source(str(path))


@pytest.mark.parametrize("member", range(4))
@pytest.mark.parametrize("damage", [b"X", b"\0" * 512])
def test_a_damaged_header_hides_no_image(member: int, damage: bytes, tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {f"{i}.png": b"x" * 3000 for i in range(4)})
    content = bytearray(path.read_bytes())
    content[3584 * member : 3584 * member + len(damage)] = damage
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x.tar (is damaged or cut at byte {3584 * member}|cannot be read as a tar)"):
        open_source(str(path))


def test_what_is_no_file_is_named(picture, tmp_path) -> None:
    picture(tmp_path / "labeled" / "cat" / "1.png", 1)
    shard = tmp_path / "unlabeled" / "x.tar"
    shard.parent.mkdir()
    os.mkfifo(shard)
    for spec in (tmp_path, shard):
        with pytest.raises(DataError, match=r"x.tar is not a regular file"):
            open_source(str(spec))
    shard.unlink()
    shard.symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"x.tar cannot be read: No such file"):
        open_source(str(tmp_path))


def test_a_shard_is_named_once(unlabeled: str) -> None:
    with pytest.raises(DataError, match=r"names .*shards-000.tar more than once"):
        open_source(unlabeled.replace("{000..002}", "{000,000,001}"))


def test_an_absurd_member_and_an_odd_name_are_unreadable(tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {"1.png": _png(1), "2.png": _png(2)})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        odd = tarfile.TarInfo("3.png")
        odd.pax_headers = {"path": "3\0.png"}
        tar.addfile(odd)
        end = tar.offset
    absurd = tarfile.TarInfo("4.png")
    absurd.size = 2**40
    with path.open("r+b") as file:  # sparse: takes no room
        file.seek(end)
        file.write(absurd.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + 2**40 + 1024)
    source = open_source(str(path), max_unreadable_fraction=0.5)
    assert len(source) == 2
    assert dict(source.unreadable) == {
        "x.tar/3\0.png": "its name holds a zero byte",
        "x.tar/4.png": "it has 1,099,511,627,776 bytes, more than an image can have",
    }


def test_a_shard_cut_after_it_was_listed(unlabeled: str) -> None:
    source = open_source(unlabeled)
    shard = Path(unlabeled).parent / "shards-002.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"can be opened but not decoded: shards-002.tar/00000.png \(.* ends before it"):
        source.load(range(12), RGB)


def test_a_shard_without_images(tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {"readme.txt": b"nothing here"})
    with pytest.raises(DataError, match=r"holds no image. Expected members such as"):
        open_source(str(path))


def test_a_name_that_comes_twice_is_what_it_is_at_last(tmp_path) -> None:
    path = _shard(tmp_path / "x.tar", {"1.png": _png(1)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(_png(2))
        tar.addfile(info, io.BytesIO(_png(2)))
    source = open_source(str(path))
    assert np.array_equal(source.load([0], RGB)[0].permute(1, 2, 0), RGB.decode(_png(2)))
