"""One function over many files, on threads: Pillow frees the interpreter while it decodes."""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kdedge_device.record import cores_available

__all__ = ["Progress", "run_threads", "stream_threads"]

Progress = Callable[[int, int], None]  # (images done, images in all)
_CHUNK = 32  # images a task: fewer switches between threads, and still a lively progress display

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_threads(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[_Result]:
    """[function(item) for item in items], in order. The first exception, and Ctrl-C, drop what has not begun."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    results: list[_Result] = []
    # Filters belong to the process: silenced here once, since changing them inside threads is a race. What Pillow
    # has to say of odd files (damaged EXIF, palettes) is not about the pixels.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or min(cores_available(), 16)) as pool:
        warnings.simplefilter("ignore")
        try:
            for done in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
                results.extend(done)
                if progress is not None:
                    progress(len(results), len(items))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def stream_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int | None = None
) -> Generator[_Result, None, None]:
    """function(item) of one item after the other, in order; only a few are made ahead of the one asked for.

    For results too large to be held all at once. An exception, and closing it, drop what has not begun: a loop that may
    be left early goes `with closing(...)`.
    """
    threads = workers or min(cores_available(), 16)
    waiting: deque[Future[_Result]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # see run_threads
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
