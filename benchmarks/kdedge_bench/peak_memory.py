"""The most memory that this process has held."""

import contextlib
import resource
import sys
from pathlib import Path

__all__ = ["peak_mib"]


def peak_mib(*, reset: bool = False) -> float:
    """The largest resident set of this process so far, files it mapped included; with `reset` it starts from now."""
    if reset:
        with contextlib.suppress(OSError):  # proc(5): VmHWM is set to what it is now; elsewhere it stays the peak
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
