"""What measures power on this machine: rails, a processor's energy counter, or tegrastats; one shape for the three.

`read` gives the present value of each name in `names`, or None where nothing new is known. Milliwatts, but of the
counter microjoules since some moment. Python 3.8, standard library.
"""

import os
import subprocess
from typing import List, Optional, Union

from kdedge_device.rails import Rail, find_rails, parse_tegrastats, rail_milliwatts, rails_of_total
from kdedge_device.state import program
from kdedge_device.sysfs import paths, read, read_int

__all__ = ["CounterMeter", "Meter", "RailMeter", "TegrastatsMeter", "find_meter"]


class RailMeter:
    source = "power rails (sysfs)"
    caveat = (
        "The rails of the module, as its own monitors measure them: less than what the supply draws from the wall, and "
        "with all that the board did at the time, not the model alone."
    )

    def __init__(self, root: str, rails: List[Rail]) -> None:
        self.names = [rail.name for rail in rails]
        self.total = rails_of_total(self.names)
        self.wraps: Optional[List[int]] = None
        self._root = root
        self._rails = rails

    def read(self) -> Optional[List[float]]:
        values = [rail_milliwatts(self._root, rail) for rail in self._rails]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None

    def close(self) -> None:
        pass


class CounterMeter:
    """Intel and AMD processors count the energy of each package; newer kernels let only root read it."""

    source = "intel-rapl (sysfs)"
    caveat = (
        "The processor package as it models itself, without memory, disks, fans and supply; with all that the machine "
        "did at the time, not the model alone."
    )

    def __init__(self, root: str, folders: List[str]) -> None:
        self.names = [read(root, f"{folder}/name") or folder.rsplit("/", 1)[1] for folder in folders]
        self.total = list(self.names)
        # The counter starts again at 0 after this value.
        self.wraps: Optional[List[int]] = [read_int(root, f"{f}/max_energy_range_uj") or 0 for f in folders]
        self._root = root
        self._folders = folders

    def read(self) -> Optional[List[float]]:
        values = [read_int(self._root, f"{folder}/energy_uj") for folder in self._folders]
        known = [float(value) for value in values if value is not None]
        return known if len(known) == len(values) else None

    def close(self) -> None:
        pass


class TegrastatsMeter:
    """A tegrastats process, from the first `read` until `close`; ten lines a second."""

    source = "tegrastats"
    caveat = RailMeter.caveat

    def __init__(self, path: str) -> None:
        self.names: List[str] = []
        self.total: List[str] = []
        self.wraps: Optional[List[int]] = None
        self._path = path
        self._process: "Optional[subprocess.Popen[bytes]]" = None
        self._rest = b""

    def read(self) -> Optional[List[float]]:
        """Of the last whole line that came since the last call. The first line with rails gives the names."""
        *lines, self._rest = (self._rest + self._new()).split(b"\n")
        if not lines:
            return None
        values = parse_tegrastats(lines[-1].decode("utf-8", "replace"))
        if not self.names:
            self.names = list(values)
            self.total = rails_of_total(self.names)
        return [values[name] for name in self.names] if values and set(self.names) <= set(values) else None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _new(self) -> bytes:
        if self._process is None:
            self._process = subprocess.Popen(
                [self._path, "--interval", "100"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            os.set_blocking(self._process.stdout.fileno(), False)  # type: ignore[union-attr]  # it is a pipe
        try:
            return os.read(self._process.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
        except BlockingIOError:
            return b""


Meter = Union[RailMeter, CounterMeter, TegrastatsMeter]


def find_meter(root: str = "/") -> Optional[Meter]:
    """None where nothing measures power, or nothing may be read. Nothing is started before it is read."""
    rails = [rail for rail in find_rails(root) if rail_milliwatts(root, rail) is not None]
    if rails:
        return RailMeter(root, rails)
    packages = [
        folder
        for folder in paths(root, "/sys/class/powercap/intel-rapl:*")
        if (read(root, f"{folder}/name") or "").startswith("package")
    ]
    if packages and all(read_int(root, f"{folder}/energy_uj") is not None for folder in packages):
        return CounterMeter(root, packages)
    path = program(root, "tegrastats")
    return TegrastatsMeter(path) if path else None
