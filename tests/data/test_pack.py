"""A packed file is the source it was made of: the same images, labels and splits; and damage is found."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import resource
import signal
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdedge.cli import run
from kdedge.data import check, make_splits, open_source, packpart
from kdedge.data import pack as pack_module
from kdedge.data.leaks import without_leaks
from kdedge.data.pack import pack
from kdedge.data.packfile import PIXELS_AT, Ids
from kdedge.data.source import PackedImages, usual_px
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess


def _preprocess(px: int, channels: int = 3) -> Preprocess:
    return Preprocess(px, px, channels, "short-side-crop", (0.0,) * channels, (1.0,) * channels)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(packpart, "_BLOCK_BYTES", 5 * 3 * 8 * 8)  # five images of 8 px


@pytest.fixture
def packed(class_folders: Path, tmp_path, small_blocks) -> Path:
    out = tmp_path / "out" / "photos.pack"
    pack(open_source(str(class_folders)), out, px=8)
    return out


def test_a_packed_folder_is_the_folder(class_folders: Path, packed: Path) -> None:
    folder, source = open_source(str(class_folders)), open_source(str(packed))
    for name in ("name", "classes", "ids", "channels", "native_px", "kind", "flip_allowed", "fingerprint", "ignored"):
        found, expected = getattr(source, name), getattr(folder, name)
        assert (tuple(found) if name == "ids" else found) == expected, name
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.part.tolist() == folder.part.tolist()
    assert source.spec == str(packed)
    assert isinstance(source.images, PackedImages)
    chosen = [40, 0, 0, 7]
    assert np.array_equal(source.load(chosen, _preprocess(8)), folder.load(chosen, _preprocess(8)))
    everything = range(len(folder))
    assert np.array_equal(source.load(everything, _preprocess(8)), folder.load(everything, _preprocess(8)))
    assert source.decodable() is source
    assert [path.name for path in packed.parent.iterdir()] == ["photos.pack"]


def test_splits_are_those_of_the_folder(class_folders: Path, packed: Path) -> None:
    folder, source = open_source(str(class_folders)), open_source(str(packed))
    before, after = make_splits(folder, 6, seed=3), make_splits(source, 6, seed=3)
    for name, indices in before.indices().items():
        assert after.indices()[name].tolist() == indices.tolist(), name
    document = before.to_json(folder)
    assert type(before).from_json(document, source).labeled.tolist() == before.labeled.tolist()
    assert without_leaks(source, after).leaks == ()


@pytest.mark.parametrize(("spec", "px"), [("digits", 8)])
def test_arrays_are_packed_too(spec: str, px: int, tmp_path) -> None:
    report = pack(open_source(spec), tmp_path / "x.pack")
    assert report.shape == (1797, 1, px, px)
    source, packed = open_source(spec), open_source(str(tmp_path / "x.pack"))
    assert packed.default_labels == source.default_labels
    assert np.array_equal(packed.load([1700, 3], _preprocess(px, 1)), source.load([1700, 3], _preprocess(px, 1)))
    assert make_splits(packed).labeled.tolist() == make_splits(source).labeled.tolist()


def test_the_file_can_be_mapped_as_it_says(packed: Path, class_folders: Path) -> None:
    images = np.memmap(packed, np.uint8, "r", offset=PIXELS_AT, shape=(42, 3, 8, 8))
    assert np.array_equal(images, open_source(str(class_folders)).load(range(42), _preprocess(8)))


def test_without_a_size_it_is_that_of_a_run() -> None:
    assert [usual_px("photo", px) for px in (40, 160, 191, 192, 3000)] == [160, 160, 160, 192, 224]
    assert usual_px("small", 28) == 28


def test_ids_are_a_sequence_of_strings() -> None:
    names = ["a/ä.png", "b.png", "", "c/长.png"]
    ids = Ids("\0".join(names).encode(), 4)
    assert list(ids) == names
    assert (ids[-1], ids[1:3], ids.index("b.png"), "x" in ids) == (names[-1], names[1:3], 1, False)
    assert [len(Ids(b"", count)) for count in (0, 1)] == [0, 1]
    with pytest.raises(IndexError):
        ids[4]


@pytest.mark.parametrize("name", ["q.csv", "q.tar", "q"])
def test_a_packed_file_is_known_by_what_it_holds(name: str, packed: Path) -> None:
    assert isinstance(open_source(str(packed.rename(packed.with_name(name)))).images, PackedImages)


# ---- another size


def test_another_size(packed: Path, class_folders: Path) -> None:
    source = open_source(str(packed))
    assert source.remark(_preprocess(8)) == ""
    assert "is packed at 8 x 8 px with 3 channels, and is resized to 6 x 6 with 3" in source.remark(_preprocess(6))
    expected = _preprocess(6).fit(np.ascontiguousarray(source.load([3], _preprocess(8))[0].permute(1, 2, 0).numpy()))
    assert np.array_equal(source.load([3], _preprocess(6))[0].permute(1, 2, 0), expected)
    with pytest.raises(DataError, match=r"packed at 8 x 8 px with 3 channels; 12 x 12 .* --px 12 .*data.image_px=8"):
        source.load([3], _preprocess(12))
    with pytest.raises(DataError, match="12 x 12 with 3 are asked for"):
        pack(source, packed.with_name("larger.pack"), px=12)


def test_colours_that_were_left_out_are_not_invented(class_folders: Path, tmp_path) -> None:
    folder = open_source(str(class_folders))
    pack(folder, tmp_path / "grey.pack", px=8, channels=1)
    grey = open_source(str(tmp_path / "grey.pack"))
    assert np.array_equal(grey.load([5], _preprocess(8, 1)), folder.load([5], _preprocess(8, 1)))
    with pytest.raises(DataError, match=r"--channels 3, or train with .* --set data.channels=1"):
        grey.load([5], _preprocess(8, 3))


def test_a_pack_of_a_pack_at_a_smaller_size_says_what_it_is(packed: Path) -> None:
    report = pack(open_source(str(packed)), packed.with_name("smaller.pack"), px=6)
    assert "resized twice" in report.warnings[-1]
    assert report.warnings == open_source(str(report.path)).warnings


# ---- what cannot be read


def test_what_cannot_be_decoded_is_left_out_and_told(class_folders: Path, tmp_path, small_blocks) -> None:
    broken = class_folders / "train" / "dog" / "05.png"
    broken.write_bytes(broken.read_bytes()[:200] + b"\0" * 50 + broken.read_bytes()[250:])
    folder = replace(open_source(str(class_folders)), max_unreadable_fraction=0.05)
    report = pack(folder, tmp_path / "x.pack", px=8)
    assert [identity for identity, _ in report.unreadable] == ["train/dog/05.png"]
    source, decodable = open_source(str(report.path)), folder.decodable()
    assert (tuple(source.ids), source.fingerprint) == (decodable.ids, decodable.fingerprint)
    assert source.unreadable[0][0] == "train/dog/05.png"
    assert "1 of 42 images cannot be read and are left out" in source.warnings[-1]
    assert np.array_equal(source.load(range(41), _preprocess(8)), decodable.load(range(41), _preprocess(8)))
    with pytest.raises(DataError, match=r"1 of 42 images of .* cannot be read"):
        pack(replace(folder, max_unreadable_fraction=0.0), tmp_path / "y.pack", px=8)
    assert not (tmp_path / "y.pack").exists()


# ---- stopped, killed, full


def _stop_after(blocks: int):
    def progress(done: int, total: int) -> None:
        if done >= 5 * blocks:
            raise KeyboardInterrupt

    return progress


def test_a_stopped_pack_goes_on_where_it_stopped(class_folders: Path, packed: Path, tmp_path, monkeypatch) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "again.pack"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, px=8, progress=_stop_after(3))
    assert not out.exists()
    decoded = []
    monkeypatch.setattr(pack_module, "_decode", _counting(pack_module._decode, decoded))
    report = pack(folder, out, px=8)
    assert report.kept == 15
    assert [indices.start for indices in decoded] == [15, 20, 25, 30, 35, 40]
    assert out.read_bytes() == packed.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again.pack"]


def _counting(function, decoded: list[range]):
    def counted(source, preprocess, indices):
        decoded.append(indices)
        return function(source, preprocess, indices)

    return counted


@pytest.mark.parametrize(
    ("kept", "damage"),
    [
        (5, lambda part, log: _flip(part, PIXELS_AT + 6 * 192)),  # in the second block
        (10, lambda part, log: part.write_bytes(part.read_bytes()[:-1])),
        (10, lambda part, log: log.write_text(log.read_text()[:-5])),  # a torn line
        (15, lambda part, log: part.write_bytes(part.read_bytes() + b"more")),
        (0, lambda part, log: part.unlink()),
    ],
)
def test_what_a_stopped_pack_left_is_checked(kept: int, damage, class_folders: Path, packed: Path, tmp_path) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "again.pack"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, px=8, progress=_stop_after(3))
    damage(tmp_path / "again.pack.part", tmp_path / "again.pack.part.log")
    assert pack(folder, out, px=8).kept == kept
    assert out.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        (r"again.pack.part is no pack of kdedge", lambda part, log: log.unlink()),
        (r"again.pack.part is no pack of kdedge", lambda part, log: log.write_text("")),
        (r"again.pack.part.log is no pack of kdedge", lambda part, log: log.write_text("my notes")),
        (
            r"again.pack.part is what a stopped pack of other images, or at another --px or --channels, has left",
            lambda part, log: log.write_text(log.read_text().replace('"images": 42', '"images": 43')),
        ),
    ],
)
def test_what_this_pack_did_not_write_is_not_touched(message: str, damage, class_folders: Path, tmp_path) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "again.pack"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, px=8, progress=_stop_after(1))
    damage(tmp_path / "again.pack.part", tmp_path / "again.pack.part.log")
    before = {path: path.read_bytes() for path in tmp_path.glob("again*")}
    with pytest.raises(DataError, match=message):
        pack(folder, out, px=8)
    assert {path: path.read_bytes() for path in tmp_path.glob("again*")} == before


def test_files_of_the_user_are_not_written(class_folders: Path, tmp_path) -> None:
    folder, film = open_source(str(class_folders)), tmp_path / "film.part"
    film.write_bytes(b"a film")
    (tmp_path / "link.part").symlink_to(film)
    for name in ("film", "link"):
        with pytest.raises(DataError, match=rf"{name}.part is no pack of kdedge and was not touched. Move it, or"):
            pack(folder, tmp_path / name, px=8)
    assert film.read_bytes() == b"a film"
    assert not list(tmp_path.glob("*.log"))


def test_a_full_disk_does_not_cost_the_log(class_folders: Path, packed: Path, tmp_path, monkeypatch) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "again.pack"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, px=8, progress=_stop_after(2))
    log = tmp_path / "again.pack.part.log"
    log.write_text(log.read_text()[:-5])  # a torn line, which is to be dropped
    before = log.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kdedge.runs.os.fsync", full)
    with pytest.raises(DataError, match=r"Cannot write .*again.pack: No space left on device.*run the same command"):
        pack(folder, out, px=8)
    assert log.read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(packpart, "_BLOCK_BYTES", 5 * 3 * 8 * 8)
    assert pack(folder, out, px=8).kept == 5
    assert out.read_bytes() == packed.read_bytes()


def test_a_pack_that_ends_before_the_lock_is_not_cut(class_folders: Path, packed: Path, monkeypatch) -> None:
    """Between opening FILE.part and locking it the other pack gives it its name."""
    folder, part, whole = open_source(str(class_folders)), packed.with_name("photos.pack.part"), packed.read_bytes()
    packed.rename(part)
    lock = fcntl.flock

    def late(file, how: int) -> None:
        part.replace(packed)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="was made meanwhile and was not touched"):
        pack(folder, packed, px=8)
    assert packed.read_bytes() == whole


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _pack_and_be_killed(folder: str, out: str) -> None:
    def die(done: int, total: int) -> None:
        if done >= 20:
            signal.raise_signal(signal.SIGKILL)

    packpart._BLOCK_BYTES = 5 * 3 * 8 * 8
    pack(open_source(folder), Path(out), px=8, progress=die)


def test_a_killed_pack_goes_on(class_folders: Path, packed: Path, tmp_path) -> None:
    out = tmp_path / "killed.pack"
    folder, spawn = str(class_folders), multiprocessing.get_context("spawn")
    child = spawn.Process(target=_pack_and_be_killed, args=(folder, str(out)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert pack(open_source(folder), out, px=8).kept == 20
    assert out.read_bytes() == packed.read_bytes()


def test_a_full_disk_is_a_sentence_and_leaves_nothing_under_the_name(class_folders, packed, tmp_path) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "full.pack"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PIXELS_AT + 12 * 192, limits[1]))  # two blocks and a part of a third
    try:
        with pytest.raises(DataError, match=r"Cannot write .*full.pack: File too large.*the same command again"):
            pack(folder, out, px=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists()
    assert pack(folder, out, px=8).kept == 10
    assert out.read_bytes() == packed.read_bytes()


def test_a_disk_too_small_is_told_before_anything_is_decoded(class_folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packpart.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    monkeypatch.setattr(pack_module, "_decode", None)
    with pytest.raises(DataError, match=r"needs 0.00 GB more, and 0.00 GB are free"):
        pack(open_source(str(class_folders)), tmp_path / "x.pack", px=8)


def test_two_packs_into_one_file(class_folders: Path, tmp_path) -> None:
    folder, out = open_source(str(class_folders)), tmp_path / "x.pack"
    with pytest.raises(DataError, match="Another kdedge packs into"):
        pack(folder, out, px=8, progress=lambda done, total: pack(folder, out, px=8))


# ---- damage


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (PIXELS_AT + 17 * 192 + 5, "is damaged: its images 15 to 19 are not those that were packed"),
        (PIXELS_AT + 42 * 192 + 3, "its list of images is not what was packed"),
        (-3, "its header is not what was packed"),
        (56, "its header is not what was packed"),  # the header's hash itself
    ],
)
def test_a_flipped_byte_is_found(place: int, message: str, packed: Path, capsys) -> None:
    _flip(packed, place)
    with pytest.raises(DataError, match=message):
        open_source(str(packed)).load(range(42), _preprocess(8))
    assert run(["data", "check", str(packed)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_only_what_is_read_is_hashed(packed: Path) -> None:
    _flip(packed, PIXELS_AT + 17 * 192)
    source = open_source(str(packed))
    assert source.load([0, 41, 14, 20], _preprocess(8)).shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match="images 15 to 19"):
        source.load([18], _preprocess(8))


def test_a_cut_file_is_found_before_it_is_read_and_while(packed: Path) -> None:
    source, whole = open_source(str(packed)), packed.read_bytes()
    packed.write_bytes(whole[: PIXELS_AT + 192])
    with pytest.raises(DataError, match="is cut: it ends before byte"):
        source.load([30], _preprocess(8))
    for length in (PIXELS_AT + 192, 40, 20):
        packed.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is cut"):
            open_source(str(packed))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (2, "is packed by schema 2; this kdedge reads up to 1. Update kdedge."),
        (0, "by schema 0, which no kdedge wrote"),
    ],
)
def test_another_schema_is_refused(schema: int, message: str, packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[16:20] = struct.pack("<I", schema)
    packed.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(str(packed))


# ---- the command line


def test_check_says_the_same_of_a_packed_set(packed: Path, class_folders: Path) -> None:
    before, after = check(str(class_folders)), check(str(packed))
    for name in ("images", "counts", "classes", "fingerprint", "found", "problems", "ok"):
        assert after[name] == before[name], name


def test_the_command(class_folders: Path, tmp_path, capsys) -> None:
    out = tmp_path / "x.pack"
    assert run(["data", "pack", str(class_folders), "--out", str(out), "--px", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(out)
    assert (document["images"], document["channels"], document["px"], document["kept_images"]) == (42, 3, [8, 8], 0)
    assert document["counts"] == {"train": 36, "unlabeled": 0, "val": 0, "test": 6}
    assert document["bytes"] == out.stat().st_size
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert run(["data", "pack", str(class_folders), "--out", str(out), "--px", "8", "--json"]) == 2
    refused = capsys.readouterr()
    assert "exists and was not touched" in json.loads(refused.out)["error"]
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
    assert run(["data", "pack", "digits", "--out", str(tmp_path / "d.pack"), "--workers", "1"]) == 0
    assert f"--data {tmp_path / 'd.pack'}" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(class_folders: Path, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "x.pack"

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "_decode", stopped)
    assert run(["data", "pack", str(class_folders), "--out", str(out), "--px", "8"]) == 130
    assert f"What is packed is kept in {out}.part; the same command goes on there." in capsys.readouterr().err
    monkeypatch.undo()
    assert run(["data", "pack", str(class_folders), "--out", str(out), "--px", "8"]) == 0


def test_more_unreadable_images_than_usual_can_be_packed(class_folders: Path, tmp_path, capsys) -> None:
    for i in range(4):
        (class_folders / "train" / "cat" / f"{i:02d}.png").write_bytes(b"no image")
    command = ["data", "pack", str(class_folders), "--out", str(tmp_path / "x.pack"), "--px", "8"]
    assert run(command) == 2
    assert "--max-unreadable F of kdedge data pack" in capsys.readouterr().err
    assert run([*command, "--max-unreadable", "0.1"]) == 0
    assert len(open_source(str(tmp_path / "x.pack"))) == 38


def test_the_name_is_looked_at_before_the_images(tmp_path, capsys) -> None:
    (tmp_path / "x.pack").touch()
    assert run(["data", "pack", "no/such/folder", "--out", str(tmp_path / "x.pack")]) == 2
    assert "exists and was not touched" in capsys.readouterr().err


def test_braces_that_the_shell_expanded(capsys) -> None:
    assert run(["data", "check", "a-0.tar", "a-1.tar"]) == 2
    assert "2 SPECs were given, a-0.tar to a-1.tar; one was expected. Quote the braces" in capsys.readouterr().err


def test_a_terminated_pack_says_how_to_go_on(class_folders: Path, tmp_path, monkeypatch, capsys) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pack_module.Part, "check_space", lambda part: signal.raise_signal(signal.SIGTERM))
    out = tmp_path / "x.pack"
    assert run(["data", "pack", str(class_folders), "--out", str(out), "--px", "8"]) == 130
    assert f"Stopped. What is packed is kept in {out}.part" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
