"""One run of an engine, put on a stream: plainly, or as a CUDA graph that was captured once and costs one call.

As trtexec does it: a plain run first, then the capture, and plain runs where it fails. Python 3.8, standard library.
"""

from typing import Callable, Dict, NamedTuple, Optional

from kdedge_device.cuda_access import CudaAccess
from kdedge_device.failures import Failure

__all__ = ["BUFFERS", "PLAIN", "Access", "Launcher"]

BUFFERS = ("auto", "pinned", "zero-copy")


class Access(NamedTuple):
    """How an engine is run: the way to CUDA (`cuda_access.chosen_way`), the buffers, and whether as a CUDA graph.

    `buffers` "auto" is zero-copy where the GPU shares the CPU's memory, else pinned.
    """

    cuda: Optional[str] = None
    buffers: str = "pinned"
    graph: bool = False


PLAIN = Access()


class Launcher:
    """`enqueue` puts one run on `stream`. A graph freezes addresses and shapes, so each number of images
    has its own.
    """

    def __init__(self, cuda: CudaAccess, stream: int, enqueue: Callable[[], None], graph: bool) -> None:
        self._cuda = cuda
        self._stream = stream
        self._enqueue = enqueue
        self._wanted = graph
        self._start, self._end = cuda.event(), cuda.event()
        self._graphs: Dict[int, Optional[int]] = {}
        self._failure: Optional[str] = None

    @property
    def captured(self) -> bool:
        """Whether runs are launched as graphs; known after the first."""
        return any(graph is not None for graph in self._graphs.values())

    @property
    def why_not(self) -> Optional[str]:
        """Why no graph could be captured, where one was wanted."""
        return None if self.captured else self._failure

    def launch(self, images: int) -> None:
        """Begins one run on `images` images."""
        graph = self._graph(images) if self._wanted else None
        if graph is None:
            self._enqueue()
        else:
            self._cuda.launch(graph, self._stream)

    def compute_ns(self, images: int) -> int:
        """One run, waited for: the nanoseconds between two events around it, on the GPU's own clock."""
        self._cuda.record(self._start, self._stream)
        self.launch(images)
        self._cuda.record(self._end, self._stream)
        self._cuda.wait(self._end)
        return round(self._cuda.elapsed_ms(self._start, self._end) * 1e6)

    def _graph(self, images: int) -> Optional[int]:
        if images not in self._graphs:
            self._enqueue()  # a first run allocates and sets up, which no graph can hold
            self._cuda.synchronize(self._stream)
            try:
                self._graphs[images] = self._cuda.capture(self._stream, self._enqueue)
            except Failure as error:
                self._graphs[images], self._failure = None, str(error)
        return self._graphs[images]
