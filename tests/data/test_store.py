"""Images on the device and images in a file answer alike."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdedge.data import open_source
from kdedge.data import store as store_module
from kdedge.data.pack import pack
from kdedge.data.store import Resident, Store, Streamed, open_store
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), dtype=np.uint8)
PLACES = np.random.default_rng(1).permutation(50)[:30]


class Shelf:
    """Pixels in an array; notes what is read, and waits for `gate`."""

    def __init__(self, images: NDArray[np.uint8] = IMAGES, damaged: int = -1) -> None:
        self.images, self.damaged = images, damaged
        self.read: list[list[int]] = []
        self.gate, self.done = threading.Event(), threading.Semaphore(0)
        self.gate.set()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.images), 3, 4, 5)

    def read_into(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        assert self.gate.wait(30)
        self.read.append(rows.tolist())
        self.done.release()
        if self.damaged in rows:
            raise DataError(f"image {self.damaged} is damaged")
        out[:] = self.images[rows]


def _streamed(shelf: Shelf, places: NDArray[np.int64] | None = None) -> Streamed:
    return Streamed(shelf, torch.device("cpu"), places)


STORES: dict[str, Callable[[], Store]] = {
    "resident": lambda: Resident(torch.from_numpy(IMAGES[PLACES])),
    "streamed": lambda: _streamed(Shelf(IMAGES[PLACES])),
    "streamed places": lambda: _streamed(Shelf(), PLACES),
}


@pytest.mark.parametrize("kind", STORES)
def test_both_stores_answer_alike(kind: str) -> None:
    store, asked = STORES[kind](), torch.tensor([29, 0, 3, 3, 17])
    store.expect(asked)
    assert (len(store), store.shape, store.device.type) == (30, (30, 3, 4, 5), "cpu")
    assert torch.equal(store.rows(asked), torch.from_numpy(IMAGES[PLACES[asked.numpy()]]))
    assert store.rows(asked[:0]).shape == (0, 3, 4, 5)
    parts = list(store.chunks(8))
    assert [len(part) for part in parts] == [8, 8, 8, 6]
    assert torch.equal(torch.cat(parts), torch.from_numpy(IMAGES[PLACES]))


def test_expected_images_are_read_once_and_before_they_are_asked_for() -> None:
    shelf = Shelf()
    store = _streamed(shelf)
    first, second = torch.tensor([1, 2]), torch.tensor([5, 4])
    store.expect(first)
    store.expect(first)
    store.expect(second)
    for _ in range(2):
        assert shelf.done.acquire(timeout=30)  # nobody has asked for rows yet
    assert torch.equal(store.rows(second), torch.from_numpy(IMAGES[[5, 4]]))
    assert torch.equal(store.rows(first), torch.from_numpy(IMAGES[[1, 2]]))
    assert shelf.read == [[1, 2], [5, 4]]
    store.rows(second)
    assert shelf.read[2:] == [[5, 4]]


def test_what_is_never_asked_for_does_not_pile_up() -> None:
    shelf = Shelf()
    store = _streamed(shelf)
    shelf.gate.clear()
    for start in range(20):
        store.expect(torch.tensor([start, start]))
    shelf.gate.set()
    store.rows(torch.tensor([40]))
    assert len(shelf.read) <= 6  # the one in flight, the last four, and the one asked for


def test_waiting_is_counted() -> None:
    shelf = Shelf()
    store = _streamed(shelf)
    shelf.gate.clear()
    threading.Timer(0.01, shelf.gate.set).start()
    store.rows(torch.tensor([1]))
    waited_s = store.waited_s
    assert waited_s > 0
    store.rows(torch.tensor([2]))
    assert store.waited_s > waited_s
    assert Resident(torch.from_numpy(IMAGES)).waited_s == 0


def test_an_error_of_the_thread_is_raised_where_the_images_are_asked_for() -> None:
    store = _streamed(Shelf(damaged=13))
    store.expect(torch.tensor([1, 13]))
    with pytest.raises(DataError, match="13 is damaged"):
        store.rows(torch.tensor([1, 13]))
    assert store.rows(torch.tensor([2])).shape == (1, 3, 4, 5)


CPU = torch.device("cpu")
DIGITS = Preprocess(8, 8, 1, "short-side-crop", (0.0,), (1.0,))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("packed") / "digits.pack"
    pack(open_source("digits"), out)
    return str(out)


def test_packed_images_are_streamed_where_they_are_more_than_allowed(packed: str, monkeypatch) -> None:
    chosen = np.array([1700, 3, 44])
    monkeypatch.setattr(store_module, "available_bytes", lambda: 4 * 3 * 64)
    resident = open_store(open_source(packed), chosen, DIGITS, CPU)
    monkeypatch.setattr(store_module, "available_bytes", lambda: 4 * 3 * 64 - 1)
    streamed = open_store(open_source(packed), chosen, DIGITS, CPU)
    assert isinstance(resident, Resident)
    assert isinstance(streamed, Streamed)
    asked = torch.tensor([2, 0])
    assert torch.equal(streamed.rows(asked), resident.rows(asked))
    assert torch.equal(next(streamed.chunks(3)), open_source("digits").load(chosen, DIGITS))


def test_the_limit_of_a_recipe_counts_instead_of_what_is_free(packed: str, monkeypatch) -> None:
    everything = np.arange(1797)  # 0.11 MiB
    assert isinstance(open_store(open_source(packed), everything, DIGITS, CPU, resident_mib=0), Streamed)
    monkeypatch.setattr(store_module, "available_bytes", lambda: 1000)
    assert isinstance(open_store(open_source(packed), everything, DIGITS, CPU, resident_mib=1), Resident)


def test_what_is_not_packed_and_does_not_fit_is_told_how_to_be_packed(packed: str, monkeypatch) -> None:
    digits, everything = open_source("digits"), np.arange(1797)
    with pytest.raises(DataError, match=r"1,797 training images of 1 x 8 x 8 take 0\.1 MiB, and .*mib allows 0"):
        open_store(digits, everything, DIGITS, CPU, resident_mib=0)
    monkeypatch.setattr(store_module, "available_bytes", lambda: 2 * 1797 * 64)
    assert isinstance(open_store(digits, everything, DIGITS, CPU), Resident)  # more than usual, and it fits
    monkeypatch.setattr(store_module, "available_bytes", lambda: 1797 * 64)
    with pytest.raises(DataError, match=r"may be taken.*kdedge data pack digits --out FILE --px 8 --channels 1, then"):
        open_store(digits, everything, DIGITS, CPU)
    with pytest.raises(DataError, match=r"kdedge data pack '\{0..9\}.tar' --out"):
        open_store(replace(digits, spec="{0..9}.tar"), everything, DIGITS, CPU)
    smaller = Preprocess(6, 6, 1, "short-side-crop", (0.0,), (1.0,))
    with pytest.raises(DataError, match="--px 6"):  # packed, but at another size
        open_store(open_source(packed), everything, smaller, CPU, resident_mib=0)
