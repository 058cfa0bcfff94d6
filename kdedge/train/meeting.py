"""Where the processes of a run find each other, also after torchrun has restarted them."""

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not marked so

__all__ = ["meeting_point"]

_PATIENCE = timedelta(minutes=10)
_LOOKS_EVERY_S = 0.1


def meeting_point() -> "tuple[Store, int, int]":
    """A store for this start alone, this process's rank, and how often the first process has been started (or 0).

    torchrun keeps one store over all restarts (pytorch issue 135712), and in it the addresses of processes that have
    died: a restarted group would call those. So the first process opens a store of its own and leaves its port there.
    A port that does not answer is one of a process that has died.
    """
    from torch.distributed import TCPStore, rendezvous  # type: ignore[attr-defined]

    kept, rank, _ = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return kept, rank, 0  # the first process has opened it already
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        kept.set("kdedge/port", str(store.port))
        return store, rank, kept.add("kdedge/starts", 1)
    until_s = time.monotonic() + _PATIENCE.total_seconds()
    while not _answers(host, port := int(kept.get("kdedge/port"))) and time.monotonic() < until_s:
        time.sleep(_LOOKS_EVERY_S)
    return TCPStore(host, port, is_master=False, timeout=_PATIENCE), rank, 0


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE.total_seconds()):
            return True
    except OSError:
        return False
