"""Power, clocks, temperatures and brakes over time, read by a process of its own while another is timed.

Twenty times a second the power and the GPU's clock, five times the processor's, twice the rest. In the timed process
the reads would stand in its times; in another they only take a core's few hundred microseconds. It ends with the
process that started it, however that ends: it waits on a pipe, which closes even on kill -9. Python 3.8, standard
library.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from kdedge_device.brakes import Brakes, read_brakes
from kdedge_device.children import child
from kdedge_device.meters import find_meter
from kdedge_device.state import cpu_clock_paths, gpu_clock_path, temperatures_c
from kdedge_device.sysfs import read_int

__all__ = ["Sampler", "Trace", "sample", "worth_sampling"]

PERIOD_S = 0.05
CPU_PERIOD_S = 0.2  # of many cores a file each, and on x86 each one is asked
SLOW_PERIOD_S = 0.5
_ANSWER_S = 20.0  # a driver can be slow to answer; longer means that it hangs


class Trace(NamedTuple):
    """What was seen; times are of the monotonic clock, which all processes of a machine share.

    `power`: at each moment the values of `names`, milliwatts, or microjoules where `wraps` says at which value each
    counter starts again. `total`: the names whose sum is the machine's power. `cpu_mhz`: the highest of all clusters.
    """

    source: Optional[str]
    caveat: Optional[str]
    names: List[str]
    total: List[str]
    wraps: Optional[List[int]]
    power: List[Tuple[int, List[float]]]
    gpu_mhz: List[Tuple[int, float]]
    cpu_mhz: List[Tuple[int, float]]
    temperatures_c: List[Tuple[int, Dict[str, float]]]
    brakes: List[Tuple[int, Brakes]]


def worth_sampling(root: str = "/") -> bool:
    """Whether this machine tells anything that changes over time."""
    readers: Tuple[Callable[[str], Any], ...] = (find_meter, gpu_clock_path, temperatures_c, read_brakes)
    return bool(cpu_clock_paths(root)) or any(reader(root) is not None for reader in readers)


class Sampler:
    """`start`, and `stop` with what was seen. One that fails leaves no trace; the measurement is worth more."""

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._process: "Optional[subprocess.Popen[bytes]]" = None

    def start(self) -> bool:
        """Whether it runs. Returns when the first values were read, so that no start-up stands in what follows."""
        command = child("sampler", self._root, str(os.getpid()))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError:
            return False
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_S)
        if ready and self._process.stdout.read(1):
            return True
        self._process.kill()
        self.stop()
        return False

    def stop(self) -> Optional[Trace]:
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            told, _ = process.communicate(timeout=_ANSWER_S)  # closes its input, which ends it
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        try:
            document = json.loads(told.decode("utf-8"))
        except ValueError:
            return None
        document["brakes"] = [(moment, Brakes(*each)) for moment, each in document["brakes"]]
        return Trace(**document)


def sample(root: str, goes_on: Callable[[float], bool], started: Callable[[], None]) -> Trace:
    """Reads until `goes_on(seconds)`, which waits that long, says no. `started` is called after the first reads."""
    meter, clock, cpu_clocks = find_meter(root), gpu_clock_path(root), cpu_clock_paths(root)
    power: List[Tuple[int, List[float]]] = []
    gpu_mhz: List[Tuple[int, float]] = []
    cpu_mhz: List[Tuple[int, float]] = []
    temperatures: List[Tuple[int, Dict[str, float]]] = []
    brakes: List[Tuple[int, Brakes]] = []
    slowest = CPU_PERIOD_S if cpu_clocks else SLOW_PERIOD_S
    period = slowest if meter is None and clock is None else PERIOD_S
    begin = time.monotonic()
    tick, slow_tick, cpu_tick = 0, -1, -1
    try:
        while True:
            now = time.monotonic_ns()
            values = meter.read() if meter is not None else None
            if values is not None:
                power.append((now, values))
            hertz = read_int(root, clock) if clock is not None else None
            if hertz is not None:
                gpu_mhz.append((now, hertz / 1e6))
            if int(tick * period / CPU_PERIOD_S) != cpu_tick:
                cpu_tick = int(tick * period / CPU_PERIOD_S)
                _append(cpu_mhz, now, _highest_mhz(root, cpu_clocks))
            if int(tick * period / SLOW_PERIOD_S) != slow_tick:
                slow_tick = int(tick * period / SLOW_PERIOD_S)
                _append(temperatures, now, temperatures_c(root))
                _append(brakes, now, read_brakes(root))
            if tick == 0:
                started()
            # After a late tick the next one comes at its own time, and none is made up for.
            tick = max(tick + 1, int((time.monotonic() - begin) / period) + 1)
            if not goes_on(max(0.0, begin + tick * period - time.monotonic())):
                break
    finally:
        if meter is not None:
            meter.close()
    source, caveat = (None, None) if meter is None else (meter.source, meter.caveat)
    names, total, wraps = ([], [], None) if meter is None else (meter.names, meter.total, meter.wraps)
    return Trace(source, caveat, names, total, wraps, power, gpu_mhz, cpu_mhz, temperatures, brakes)


def _highest_mhz(root: str, clocks: List[str]) -> Optional[float]:
    """Of all clusters: what computes makes its own run fastest, and takes that along where the scheduler moves it."""
    found = [kilohertz for kilohertz in (read_int(root, path) for path in clocks) if kilohertz is not None]
    return max(found) / 1e3 if found else None


def _append(series: List[Tuple[int, Any]], now: int, value: Any) -> None:
    if value is not None:
        series.append((now, value))


def _main(root: str, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means

    def goes_on(seconds: float) -> bool:
        """False once the parent closed the pipe, or is gone while another child of it holds the pipe open."""
        closed, _, _ = select.select([sys.stdin], [], [], seconds)
        return not closed and os.getppid() == parent

    def started() -> None:
        os.write(1, b"\n")

    trace = sample(root, goes_on, started)
    try:
        sys.stdout.write(json.dumps(trace._asdict()))
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # nobody is left to tell


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
