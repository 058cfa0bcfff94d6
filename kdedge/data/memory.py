"""How much memory is left, so that a set that does not fit is refused in a sentence and not by the kernel."""

import os
from pathlib import Path

from kdedge.errors import DataError

__all__ = ["MOST_FRACTION", "available_bytes", "require_memory"]

MOST_FRACTION = 0.8  # of what is available; the rest is for the networks and the batches


def _number(path: Path) -> int | None:
    """The whole number in a file of the kernel, or None ("max", no such file)."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _meminfo_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # macOS has no MemAvailable; all of the memory is the best that is known without a package
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _container_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the container's limit leaves (cgroup v2, then v1). Page cache counts as free: the kernel gives it back."""
    for limit_name, used_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit, used = _number(root / limit_name), _number(root / used_name)
        if limit is None or used is None:
            continue
        cached = 0
        try:
            stat = dict(line.split() for line in (root / stat_name).read_text(encoding="ascii").splitlines())
            cached = int(stat.get("inactive_file", 0))
        except (OSError, ValueError):
            pass
        return max(0, limit - used + cached)
    return None


def available_bytes() -> int | None:
    """Bytes a program can still take on this machine, inside its container; None where it cannot be known."""
    known = [value for value in (_meminfo_bytes(), _container_bytes()) if value is not None]
    return min(known) if known else None


def require_memory(needed_bytes: int, what: str) -> None:
    """DataError where `needed_bytes` are more than MOST_FRACTION of what is available."""
    available = available_bytes()
    if available is not None and needed_bytes > MOST_FRACTION * available:
        raise DataError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB of memory; {available / 1e9:.2f} GB are available, of which at "
            f"most {MOST_FRACTION:.0%} may be used. Choose a smaller input size, use fewer images, or a machine with "
            "more memory."
        )
