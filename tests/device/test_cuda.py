"""The ctypes layer over the fake driver: every call really happens, in order, on memory that checks its addresses."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdedge_device import cuda_probe
from kdedge_device.cuda import Cuda
from kdedge_device.cuda_driver import _SIGNATURES, CudaFailure, Driver, Gpu
from kdedge_device.cuda_probe import Probe, probe

FILE = "libcuda.so.1"


@pytest.fixture
def library(fake_cuda: Path) -> str:
    return str(fake_cuda / FILE)


@pytest.fixture
def live(library: str) -> Callable[[], int]:
    """How many allocations, streams, events, graphs and contexts there are."""
    return ctypes.CDLL(library).fake_live  # type: ignore[no-any-return]


def filled(cuda: Cuda, values: bytes) -> "ctypes.Array[ctypes.c_ubyte]":
    host = cuda.allocate_host(len(values))
    host[:] = values  # type: ignore[assignment]
    return host


def test_every_call_of_ours_is_in_the_fake(library: str) -> None:
    loaded = ctypes.CDLL(library)
    assert [name for name in _SIGNATURES if not hasattr(loaded, name)] == []


def test_bytes_go_to_the_device_and_back_and_nothing_is_left(library: str, live: Callable[[], int]) -> None:
    with Cuda(library=library) as cuda:
        assert cuda.gpu == Gpu("Fake Orin", "8.7", 1 << 30, "12.6", None)
        assert cuda.memory() == (1 << 29, 1 << 30)
        stream, device = cuda.stream(), cuda.allocate(8)
        source, target = filled(cuda, b"01234567"), cuda.allocate_host(8)
        cuda.copy_in(device, source, 8, stream)
        cuda.copy_out(target, device, 8, stream)
        assert bytes(target) == bytes(8), "nothing has happened before the stream was waited for"
        cuda.synchronize(stream)
        assert bytes(target) == b"01234567"
        assert cuda.device_address(source) == ctypes.addressof(source) | 1 << 61
        assert live() == 5
    assert live() == 0
    with pytest.raises(CudaFailure, match="not open"):
        cuda.stream()


def test_events_time_what_lies_between_them(library: str) -> None:
    with Cuda(library=library) as cuda:
        stream, start, end = cuda.stream(), cuda.event(), cuda.event()
        with pytest.raises(CudaFailure, match="INVALID_HANDLE"):
            cuda.elapsed_ms(start, end)
        cuda.record(start, stream)
        cuda.record(end, stream)
        with pytest.raises(CudaFailure, match="NOT_READY"):
            cuda.elapsed_ms(start, end)
        cuda.wait(end)
        assert 0 <= cuda.elapsed_ms(start, end) < 1000


def test_a_captured_graph_runs_when_launched(library: str, live: Callable[[], int]) -> None:
    with Cuda(library=library) as cuda:
        stream, device = cuda.stream(), cuda.allocate(4)
        source, target = filled(cuda, b"abcd"), cuda.allocate_host(4)

        def work() -> None:
            cuda.copy_in(device, source, 4, stream)
            cuda.copy_out(target, device, 4, stream)

        graph = cuda.capture(stream, work)
        cuda.synchronize(stream)
        assert bytes(target) == bytes(4), "capturing runs nothing"
        source[:] = b"efgh"  # type: ignore[assignment]
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert bytes(target) == b"efgh"
        with pytest.raises(CudaFailure, match="CAPTURE_UNSUPPORTED"):
            cuda.capture(stream, lambda: cuda.synchronize(stream))
        cuda.synchronize(stream)  # the failed capture has been ended: the stream is usable
    assert live() == 0


def test_a_wrong_address_comes_out_of_the_next_wait(library: str, live: Callable[[], int]) -> None:
    with Cuda(library=library) as cuda:
        stream, host = cuda.stream(), cuda.allocate_host(8)
        cuda.copy_in(ctypes.addressof(host), host, 8, stream)
        with pytest.raises(CudaFailure, match=r"cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS \(error 700\)") as told:
            cuda.synchronize(stream)
        assert (told.value.code, told.value.exit_code) == (700, 6)
    assert live() == 0


@pytest.mark.parametrize("name", ["cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"])
def test_each_step_of_opening_says_what_failed(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", f"{name}:100")
    with (
        pytest.raises(CudaFailure, match=rf"refused {name}: CUDA_ERROR_NO_DEVICE \(error 100\)"),
        Cuda(library=library),
    ):
        pass


def test_memory_that_is_not_there_has_a_remedy(
    library: str, live: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cuda(library=library) as cuda:
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2:2")
        with pytest.raises(CudaFailure, match=r"OUT_OF_MEMORY \(error 2\)\. Close other programs"):
            cuda.allocate(8)
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2:12345")
        with pytest.raises(CudaFailure, match=r"an unknown error \(error 12345\)"):
            cuda.allocate(8)
    assert live() == 0


def test_what_can_be_freed_is_freed(library: str, live: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault every call fails; the fault is told, not what followed from it."""
    cuda = Cuda(library=library).__enter__()
    for make in (cuda.allocate, cuda.allocate_host, lambda size: cuda.stream(), cuda.allocate):
        make(8)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuStreamDestroy_v2:700")
    with pytest.raises(CudaFailure, match=r"refused cuStreamDestroy_v2"):
        cuda.__exit__(None, None, None)
    assert live() == 1, "all but the stream"
    cuda = Cuda(library=library).__enter__()
    cuda.stream()
    cuda.__exit__(ZeroDivisionError, ZeroDivisionError(), None)  # raises nothing of its own
    ctypes.CDLL(library).fake_forget()


def test_libraries_that_are_no_driver(tmp_path: Path) -> None:
    with pytest.raises(CudaFailure, match="No CUDA driver can be loaded"):
        Driver(str(tmp_path / "absent.so"))
    subprocess.run(["gcc", "-shared", "-x", "c", "-o", tmp_path / "old.so", "/dev/null"], check=True)
    with pytest.raises(CudaFailure, match="no cuInit; it is too old"):
        Driver(str(tmp_path / "old.so"))


def test_probe(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(library)
    assert found == Probe((Gpu("Fake Orin", "8.7", 1 << 30, "12.6", None),), "")
    assert found.usable
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuDevicePrimaryCtxRetain:2")
    full = probe(library)
    assert (len(full.gpus), full.usable) == (1, False)
    assert "OUT_OF_MEMORY" in full.reason
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    assert "finds no GPU" in probe(library).reason


def test_probe_survives_a_driver_that_crashes_or_hangs(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_CRASH", "1")
    assert "crashed (SIGABRT)" in probe(library).reason
    assert "did not answer in 0.01 seconds" in probe(library, timeout_seconds=0.01).reason
    monkeypatch.setattr(sys, "executable", "/absent/python")
    assert "No process could be started" in probe(library).reason


def test_probe_needs_no_numpy(library: str) -> None:
    """A machine is looked at before anything is known to work there; and it is quick."""
    code = (
        "import sys; sys.modules['numpy'] = None; from kdedge_device.cuda_probe import _look; "
        f"print(_look({library!r})['reason'])"
    )
    root = str(Path(cuda_probe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


def test_without_a_driver(tmp_path: Path) -> None:
    assert "No CUDA driver can be loaded" in probe(str(tmp_path / "absent.so")).reason
    assert np.size(probe(str(tmp_path / "absent.so")).gpus) == 0
