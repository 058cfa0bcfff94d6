"""What a board says it is, on trees of each generation, and who is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdedge_device import board as board_module
from kdedge_device import too_old
from kdedge_device.board import Board, identify, jetpack_of_l4t, refuse_unsupported
from kdedge_device.failures import VersionFailure
from kdedge_device.record import machine, record

from . import boards


@pytest.mark.parametrize(
    ("name", "family", "l4t", "jetpack", "cuda", "tensorrt"),
    [
        ("xavier_nx", "xavier", "35.4.1", "5.1.2", "11.4.19", "8.5.2"),
        ("agx_xavier", "xavier", "35.3.1", "5.1.1", None, None),
        ("orin_nano", "orin", "36.4.3", "6.2", "12.6.68", "10.3.0"),
        ("agx_orin", "orin", "36.3.0", "6.0", None, None),
        ("thor", "thor", "38.4.0", "7.1", None, None),
        ("raspberry_pi", "raspberry-pi", None, None, None, None),
        ("jetpack_4", "nano", "32.7.1", "4", "10.2.300", None),
    ],
)
def test_each_generation(
    tmp_path: Path, name: str, family: str, l4t: str | None, jetpack: str | None, cuda: str | None, tensorrt: str | None
) -> None:
    found = identify(str(boards.ALL[name](tmp_path)))
    assert (found.family, found.l4t, found.jetpack, found.cuda, found.tensorrt) == (
        family,
        l4t,
        jetpack,
        cuda,
        tensorrt,
    )
    assert found.model == (tmp_path / "proc/device-tree/model").read_text(encoding="utf-8").rstrip("\0")
    json.dumps(found._asdict(), allow_nan=False)


def test_what_is_installed_counts_more_than_the_table(tmp_path: Path) -> None:
    """TensorRT 10.7 beside 10.3 on JetPack 6, and a JetPack package that says more than its L4T."""
    root = boards.orin_nano(tmp_path)
    boards.put(root, {"/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.7.0": ""})
    boards.put(root, boards._dpkg(nvidia_jetpack="6.2.1+b38"))
    found = identify(str(root))
    assert (found.tensorrt, found.jetpack, found.jetpack_from) == ("10.7.0", "6.2.1", "the package nvidia-jetpack")


def test_a_container_has_the_package_and_not_the_release_file(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    (root / "etc/nv_tegra_release").unlink()
    boards.put(root, boards._dpkg(nvidia_l4t_core="36.4.3-20250107174145"))
    found = identify(str(root))
    assert (found.l4t, found.jetpack, found.jetpack_from) == ("36.4.3", "6.2", "L4T")


def test_a_maker_of_carrier_boards_names_the_model_as_he_likes(tmp_path: Path) -> None:
    boards.put(tmp_path, boards._tree("reComputer J4012", "seeed,recomputer", "nvidia,tegra234"))
    assert identify(str(tmp_path)).family == "orin"
    boards.put(tmp_path, boards._tree("NVIDIA Jetson T9000", "nvidia,p9999", "nvidia,tegra999"))
    assert identify(str(tmp_path)).family == "jetson", "of a chip after Thor no more is known"


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4.7", "6.2.1"),
        ("36.5.0", "6.2.2"),
        ("38.2.2", "7.0"),
        ("39.2.0", "7.2"),
        ("35.6.0", "5.1.4"),
        ("35.9.9", "5"),
        ("39.9", "7"),
        ("41.1", None),
    ],
)
def test_names_of_jetpack(l4t: str, jetpack: str | None) -> None:
    assert jetpack_of_l4t(l4t) == jetpack


def test_an_empty_tree_is_no_error(tmp_path: Path) -> None:
    found = identify(str(tmp_path))
    assert (found.model, found.l4t, found.jetpack, found.cuda) == (None, None, None, None)
    refuse_unsupported(found)


def test_jetpack_4_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VersionFailure, match=r"Jetson Nano.*L4T 32\.7\.1.*JetPack 5 or newer.*newer board") as caught:
        refuse_unsupported(identify(str(boards.jetpack_4(tmp_path))))
    assert caught.value.exit_code == 3
    assert str(caught.value).count(". ") == 0, "one sentence"
    boards.put(tmp_path, boards._tree("Jetson-AGX", "nvidia,p2972-0000", "nvidia,tegra194"))
    with pytest.raises(VersionFailure, match="flash this board with JetPack 5"):
        refuse_unsupported(identify(str(tmp_path)))


def test_newer_jetpacks_are_not_refused(tmp_path: Path) -> None:
    for name in ("xavier_nx", "orin_nano", "thor", "raspberry_pi", "x86"):
        refuse_unsupported(identify(str(boards.ALL[name](tmp_path / name))))


def test_a_python_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module.sys, "version_info", (3, 7, 9))
    with pytest.raises(VersionFailure, match=r"3\.8 or newer"):
        refuse_unsupported(Board(*[None] * 2, "x", *[None] * 6, "3.7.9", "6.1", None))  # type: ignore[arg-type]


def test_the_sentence_of_python_3_6(tmp_path: Path) -> None:
    release = str(boards.jetpack_4(tmp_path) / "etc/nv_tegra_release")
    assert "JetPack 4" in too_old.sentence((3, 6, 15), release)
    assert too_old.sentence((3, 7, 0), str(tmp_path / "absent")).endswith("python3.8 run.pyz")
    assert too_old.sentence((3, 8, 0)) is None
    assert too_old.sentence() is None


def test_stop_answers_in_json_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(too_old, "sentence", lambda: "Too old.")
    assert too_old.stop(["run.pyz", "check", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "error": "Too old.",
        "class": "VersionFailure",
        "exit_code": 3,
    }
    assert too_old.stop(["run.pyz", "check"]) == 3
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "Error: Too old.\n")


def test_interpreters_that_are_too_old_read_the_file() -> None:
    """The syntax is held on every machine, and tried under each such interpreter that is installed."""
    folder = Path(board_module.__file__).parent
    for name in ("too_old.py", "__init__.py"):
        text = (folder / name).read_text(encoding="utf-8")
        assert not any(mark in text for mark in ('f"', "->", ":=", "import typing", "from typing")), name
    lines = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(folder.parent)!r}); "
    lines += "from kdedge_device import too_old; sys.exit(too_old.stop([]) if too_old.sentence() else 0)"
    for python in Path.home().glob(".pyenv/versions/[23].[67].*/bin/python"):
        done = subprocess.run([str(python), "-c", lines], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        assert "3.8 or newer is needed" in done.stderr


def test_a_record_fills_what_is_unknown_with_null() -> None:
    document = record({"sha256": "0"}, {}, {"threads": 1}, "2026-01-01T00:00:00Z", unstable=False)
    assert document["energy_mj_per_inference"] is None
    assert document["energy_source"] is None
    assert document["stability"] is None
    assert document["flags"] == {"throttled": None, "unstable": False}
    assert document["conditions"]["threads"] == 1
    assert {"power_mode", "clocks_mhz", "temperature_c", "throttle", "fan", "board"} <= set(document["conditions"])
    assert document["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_record_takes_what_the_watch_saw() -> None:
    document = record(
        {"sha256": "0"},
        {},
        {"power_mode": {"id": 0, "name": "MAXN"}},
        "2026-01-01T00:00:00Z",
        unstable=True,
        throttled=True,
        stability={"stable": False, "why": ["hot"], "throttled": True, "unstable": True},
        energy={"energy_mj_per_inference": 1.5, "energy_source": {"source": "x"}},
        gpu="Orin",
        driver="540.4.0",
    )
    assert document["energy_mj_per_inference"] == 1.5
    assert document["energy_source"] == {"source": "x"}
    assert document["stability"] == {"stable": False, "why": ["hot"]}
    assert document["flags"] == {"throttled": True, "unstable": True}
    assert document["conditions"]["power_mode"] == {"id": 0, "name": "MAXN"}
    assert (document["machine"]["gpu"], document["machine"]["driver"]) == ("Orin", "540.4.0")
    assert machine()["gpu"] is None
