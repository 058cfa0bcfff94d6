"""Runs a command as its only child and prints, as JSON, how it ended, its CPU time and the most memory of one process.

python watch.py SECONDS MIB COMMAND...

A process of its own, and a small one: the system starts a program's peak at that of the process it was started from.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

__all__ = ["main"]

LOOK_EVERY_S = 0.05


def main(limit_s: float, limit_mib: float, command: Sequence[str]) -> None:
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=told, stderr=errors, start_new_session=True
            )
        except OSError as error:
            done = {
                "returncode": 127,
                "told": "",
                "last_error": str(error),
                "peak_mib": 0.0,
                "cpu_s": 0.0,
                "killed": None,
            }
            json.dump(done, sys.stdout)
            return
        killed = _watch(child, limit_s, limit_mib)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = {
            "returncode": child.returncode,
            "told": _last_line(told),
            "last_error": _last_line(errors) or "no message",
            "peak_mib": used.ru_maxrss / 2**10,
            "cpu_s": used.ru_utime + used.ru_stime,
            "killed": killed,
        }
    json.dump(done, sys.stdout)


def _watch(child: "subprocess.Popen[bytes]", limit_s: float, limit_mib: float) -> str | None:
    """Wait for its end, or bring it about."""
    until = time.monotonic() + limit_s
    why = None
    while child.poll() is None:
        if time.monotonic() > until:
            why = f"not done within {limit_s:.0f} s"
        elif _resident_mib(child.pid) > limit_mib:
            why = f"needs more than {limit_mib / 2**10:.0f} GiB"
        if why:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return why
        time.sleep(LOOK_EVERY_S)
    return None


def _resident_mib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return 0.0  # ended meanwhile


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
