"""From indices to a tensor: the pixels of the device, row by row, within the memory there is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdedge.data import memory, open_source
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess


def _preprocess(height: int, width: int, channels: int, resize: str = "short-side-crop") -> Preprocess:
    return Preprocess(height, width, channels, resize, (0.0,) * channels, (1.0,) * channels)


def test_files_come_as_preprocess_decodes_them(class_folders: Path) -> None:
    source = open_source(str(class_folders))
    preprocess = _preprocess(9, 7, 3)
    images = source.load([40, 0, 0], preprocess, workers=2)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 9, 7)
    expected = preprocess.decode(class_folders / source.ids[40])
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(images[1], images[2])


def test_threads_do_not_change_the_result(class_folders: Path) -> None:
    source = open_source(str(class_folders))
    preprocess = _preprocess(8, 8, 1)
    assert torch.equal(
        source.load(range(42), preprocess, workers=1),
        source.load(range(42), preprocess, workers=8),
    )


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 3), (16, 16, 1), (32, 24, 3)])
def test_arrays_come_as_preprocess_fits_them(height: int, width: int, channels: int) -> None:
    source = open_source("digits")
    preprocess = _preprocess(height, width, channels)
    images = source.load([5, 1700], preprocess)
    native = source.load([1700], _preprocess(8, 8, 1))[0, 0].numpy()
    np.testing.assert_array_equal(images[1].permute(1, 2, 0).numpy(), preprocess.fit(native))


def test_no_images_is_an_empty_tensor(class_folders: Path) -> None:
    assert open_source(str(class_folders)).load([], _preprocess(8, 8, 3)).shape == (0, 3, 8, 8)
    assert open_source("digits").load([], _preprocess(8, 8, 1)).shape == (0, 1, 8, 8)


def test_progress_reaches_the_end(class_folders: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_source(str(class_folders)).load(range(42), _preprocess(8, 8, 3), progress=lambda *done: seen.append(done))
    assert seen[-1] == (42, 42)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_ctrl_c_stops_loading(class_folders: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(str(class_folders)).load(range(42), _preprocess(8, 8, 3), progress=interrupt)


def test_a_set_that_does_not_fit_is_refused_with_the_figure(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000_000)
    source = open_source("digits")
    with pytest.raises(DataError) as error:
        source.load(range(1797), _preprocess(640, 640, 3))
    assert "Loading 1,797 images of 3 x 640 x 640 needs 2.21 GB of memory; 1.00 GB are available" in str(error.value)
    assert "smaller input size" in str(error.value)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)  # not known: nothing to refuse
    assert source.load([0], _preprocess(8, 8, 1)).shape == (1, 1, 8, 8)


def test_available_memory_is_a_plausible_number() -> None:
    available = memory.available_bytes()
    assert available is not None
    assert 10**8 < available < 10**14


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
)
def test_a_container_limit_counts(tmp_path: Path, names: tuple[str, str, str]) -> None:
    assert memory._container_bytes(tmp_path) is None
    (tmp_path / "memory").mkdir()
    for name, content in zip(names, ("1000", "700", "anon 1\ninactive_file 200\n"), strict=True):
        (tmp_path / name).write_text(content)
    assert memory._container_bytes(tmp_path) == 500
    (tmp_path / names[0]).write_text("max")
    assert memory._container_bytes(tmp_path) is None
