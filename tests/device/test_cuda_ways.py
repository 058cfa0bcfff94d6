"""The three ways to CUDA do the same calls: one set of tests for all, on the fake driver and names of real packages."""

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kdedge_device.cuda_access import VARIABLE, WAYS, CudaAccess, chosen_way, open_cuda
from kdedge_device.cuda_driver import CudaFailure, Gpu
from kdedge_device.failures import Failure

from .fake_cuda_modules import TABLE, make_cuda_python, make_pycuda

TOO_OLD, *PYCUDAS = TABLE["pycuda"]["versions"]
EVERY = [("ctypes", ""), *(("pycuda", version) for version in PYCUDAS)]
EVERY += [("cuda-python", version) for version in TABLE["cuda-python"]["versions"]]
LATEST = [("ctypes", ""), ("pycuda", TABLE["pycuda"]["versions"][-1])]
LATEST += [("cuda-python", TABLE["cuda-python"]["versions"][-1])]
Open = Callable[[], CudaAccess]


@pytest.fixture
def driver(fake_cuda: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(fake_cuda / "libcuda.so.1"))


@pytest.fixture
def way(request: pytest.FixtureRequest, driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens CUDA in one way, of one version; in the end nothing may be left on the device."""
    name, version = request.param
    driver.cuCtxSetCurrent(None)
    install(
        {"pycuda": make_pycuda, "cuda-python": make_cuda_python}[name](version, driver) if version else {}, monkeypatch
    )
    return lambda: open_cuda(name, 0, driver._name)


def install(modules: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("cuda", "pycuda")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("way", EVERY, indirect=True, ids=str)
def test_one_round_trip_by_each_version_of_each_way(
    way: Open, driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_INTEGRATED", "1")
    with way() as cuda:
        assert cuda.gpu == Gpu("Fake Orin", "8.7", 1 << 30, "12.6", None, integrated=True)
        assert cuda.memory() == (1 << 29, 1 << 30)
        stream, device, start, end = cuda.stream(), cuda.allocate(8), cuda.event(), cuda.event()
        source, target = cuda.allocate_host(8), cuda.allocate_host(8)
        source[:] = b"01234567"  # type: ignore[assignment]
        assert cuda.device_address(source) == ctypes.addressof(source) | 1 << 61
        cuda.record(start, stream)
        cuda.copy_in(device, source, 8, stream)
        cuda.copy_out(target, device, 4, stream)
        cuda.record(end, stream)
        assert bytes(target) == bytes(8), "nothing has happened before it was waited for"
        cuda.wait(end)
        assert bytes(target) == b"0123\0\0\0\0"
        assert 0 <= cuda.elapsed_ms(start, end) < 1000
        copied = partial(cuda.copy_out, target, device, 8, stream)
        if cuda.how == "pycuda":
            with pytest.raises(CudaFailure, match=r"pycuda has no CUDA graphs"):
                cuda.capture(stream, copied)
            with pytest.raises(CudaFailure, match=r"pycuda has no CUDA graphs"):
                cuda.launch(1, stream)
        else:
            graph = cuda.capture(stream, copied)
            cuda.synchronize(stream)
            assert bytes(target) == b"0123\0\0\0\0", "capturing runs nothing"
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            assert bytes(target) == b"01234567"
    assert driver.fake_live() == 0


@pytest.mark.parametrize("way", LATEST, indirect=True, ids=str)
def test_what_fails_is_told_and_nothing_is_left(
    way: Open, driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = way()
    for call in (lambda: cuda.stream(), lambda: cuda.allocate(1), lambda: cuda.gpu, lambda: cuda.memory()):
        with pytest.raises(CudaFailure, match=r"not open; use it in a with statement"):
            call()
    with cuda:
        stream, host = cuda.stream(), cuda.allocate_host(8)
        with pytest.raises(CudaFailure, match=r"(?i)cuMemAlloc.*invalid.value"):
            cuda.allocate(0)
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemHostAlloc:2")
        with pytest.raises(CudaFailure, match=r"(?i)cuMemHostAlloc.*out.of.memory"):
            cuda.allocate_host(8)
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemGetInfo_v2:12345")
        with pytest.raises(CudaFailure, match=r"cuMemGetInfo"):
            cuda.memory()
        monkeypatch.delenv("FAKE_CUDA_FAIL")
        cuda.copy_in(ctypes.addressof(host), host, 8, stream)
        with pytest.raises(CudaFailure, match=r"(?i)cuStreamSynchronize.*illegal.address"):
            cuda.synchronize(stream)
    gc.collect()  # a failure's traceback holds objects of pycuda's, which go with their last reference
    assert driver.fake_live() == 0
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with pytest.raises(CudaFailure, match=r"GPU 0 was asked for; this machine has 0"), way():
        pass
    monkeypatch.delenv("FAKE_CUDA_DEVICES")
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuCtxSetCurrent:100")
    with pytest.raises(CudaFailure, match=r"(?i)no.device"), way():
        pass
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    gc.collect()
    assert driver.fake_live() == 0


@pytest.mark.parametrize("way", [LATEST[0], LATEST[2]], indirect=True, ids=str)
def test_a_capture_that_fails_leaves_a_stream_that_works(way: Open, driver: ctypes.CDLL) -> None:
    with way() as cuda:
        stream = cuda.stream()
        with pytest.raises(CudaFailure, match=r"CAPTURE_UNSUPPORTED"):
            cuda.capture(stream, lambda: cuda.synchronize(stream))
        cuda.synchronize(stream)
    assert driver.fake_live() == 0


@pytest.mark.parametrize("way", [LATEST[0], LATEST[2]], indirect=True, ids=str)  # pycuda cannot make nothing current
def test_the_context_that_was_current_is_current_again(way: Open, driver: ctypes.CDLL) -> None:
    current = ctypes.c_void_p(1)
    with way():
        driver.cuCtxGetCurrent(ctypes.byref(current))
        assert current.value
    driver.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value is None
    assert "pycuda.autoinit" not in sys.modules


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install({"cuda": None, "pycuda": None}, monkeypatch)
    with (
        pytest.raises(CudaFailure, match=r"pip install cuda-python, .* ctypes needs no package"),
        open_cuda("cuda-python"),
    ):
        pass
    with pytest.raises(CudaFailure, match=r"pycuda cannot be loaded .*pip install pycuda"), open_cuda("pycuda"):
        pass


@pytest.mark.parametrize("way", [("pycuda", TOO_OLD)], indirect=True, ids=str)
def test_a_pycuda_without_primary_contexts_is_told(way: Open) -> None:
    with pytest.raises(CudaFailure, match=r"pycuda is older than 2020\.1 .*update it"), way():
        pass


def test_how_a_way_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert [chosen_way(asked) for asked in (None, *WAYS)] == ["ctypes", *WAYS]
    monkeypatch.setenv(VARIABLE, "pycuda")
    assert (chosen_way(), chosen_way("ctypes")) == ("pycuda", "ctypes")
    monkeypatch.setenv(VARIABLE, "opencl")
    with pytest.raises(Failure, match=r"KDEDGE_CUDA is 'opencl'; one of ctypes, pycuda, cuda-python was expected"):
        chosen_way()
