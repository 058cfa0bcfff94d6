"""The image folders of the planned verdicts, from small sources of the same form; and the plan's recipes."""

import gzip
import hashlib
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge import recipe_io
from kdedge.data import make_splits, open_source
from kdedge.errors import DataError
from kdedge_bench import verdict_sets

PLANS = Path(__file__).parents[2] / "benchmarks" / "verdicts"


def write_idx(path: Path, values: np.ndarray) -> str:
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write_tar(path: Path, images: dict[str, Image.Image], mode: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, image in images.items():
            buffer = io.BytesIO()
            image.save(buffer, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = buffer.tell()
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (12, 5, 5), dtype=np.uint8)
    monkeypatch.setattr(
        verdict_sets, "_MNIST_TRAIN_MD5", write_idx(tmp_path / "mnist/train-images-idx3-ubyte.gz", digits)
    )
    write_idx(tmp_path / "mnist/train-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8) % 2)
    write_idx(tmp_path / "mnist/t10k-images-idx3-ubyte.gz", digits[:4])
    write_idx(tmp_path / "mnist/t10k-labels-idx1-ubyte.gz", np.arange(4, dtype=np.uint8) % 2)
    picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    names = [f"cifar10/{part}/{k}/{i:04d}.jpg" for part in ("train", "test") for k in ("cat", "dog") for i in range(5)]
    flowers = [f"flowers5/{part}/{k}/{i}.jpg" for part in ("train", "val") for k in ("rose", "tulip") for i in range(3)]
    monkeypatch.setitem(
        verdict_sets._SHA256,
        "cifar10/cifar10_jpeg.tar.xz",
        write_tar(tmp_path / "cifar10/cifar10_jpeg.tar.xz", dict.fromkeys(names, picture), "w:xz"),
    )
    monkeypatch.setitem(
        verdict_sets._SHA256,
        "flowers5/flowers5_160.tar",
        write_tar(tmp_path / "flowers5/flowers5_160.tar", dict.fromkeys(flowers, picture), "w"),
    )
    kept = {("mnist", "train"): 3, ("cifar10", "train"): 3, ("cifar10", "test"): 4}
    monkeypatch.setattr(verdict_sets, "_A_CLASS", kept)
    return tmp_path


def test_pools_are_cut_evenly_and_tests_as_planned(sources, tmp_path) -> None:
    out = tmp_path / "sets"
    verdict_sets.main(["--from", str(sources), "--out", str(out)])
    counts = {
        name: [len([p for p in (out / name / part).rglob("*") if p.is_file()]) for part in parts]
        for name, parts in (
            ("mnist", ("train", "test")),
            ("cifar10", ("train", "test")),
            ("flowers5", ("train", "val")),
        )
    }
    assert counts == {"mnist": [6, 4], "cifar10": [6, 8], "flowers5": [6, 6]}
    source = open_source(str(out / "mnist"))
    assert source.classes == ("0", "1")
    assert len(make_splits(source, 2, 0).unlabeled) == 6


def test_pixels_are_those_of_the_source(sources, tmp_path) -> None:
    verdict_sets.mnist(sources, tmp_path / "m")
    digits = np.random.default_rng(0).integers(0, 256, (12, 5, 5), dtype=np.uint8)
    for path in (tmp_path / "m" / "train").rglob("*.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), digits[int(path.stem)])
        assert path.parent.name == str(int(path.stem) % 2)


def test_a_set_that_is_there_is_left_and_another_source_is_refused(sources, tmp_path, capsys) -> None:
    out = tmp_path / "sets"
    verdict_sets.main(["--from", str(sources), "--out", str(out)])
    (out / "mnist" / "mine.txt").write_text("kept")
    verdict_sets.main(["--from", str(sources), "--out", str(out)])
    assert "is there already" in capsys.readouterr().out
    assert (out / "mnist" / "mine.txt").exists()
    (sources / "cifar10/cifar10_jpeg.tar.xz").write_bytes(b"other")
    with pytest.raises(DataError, match="the plan was made with"):
        verdict_sets.cifar10(sources, tmp_path / "again")


def test_every_plan_loads_and_stands_in_the_table() -> None:
    plans = sorted(PLANS.glob("*.yaml"))
    assert plans
    table = (PLANS / "README.md").read_text(encoding="utf-8")
    for path in plans:
        recipe = recipe_io.load(str(path))
        assert recipe.teacher is not None
        row = next(line for line in table.splitlines() if line.startswith(f"| {path.stem} |") and "WRN" in line)
        steps = f"{recipe.teacher.optim.total_steps}, {recipe.student.optim.total_steps}"
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1] == str(recipe.data.labels)
        assert cells[8] == steps
        assert cells[7] == f"{recipe.student.optim.labeled_batch}, {recipe.student.optim.unlabeled_ratio or 3}"
        assert re.search(rf"kdedge verdict benchmarks/verdicts/{path.name} --seeds 5", path.read_text())
