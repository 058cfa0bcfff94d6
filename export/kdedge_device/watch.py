"""The watch around one measurement: the machine before, during and after it, and whether the number can be trusted.

    with Watch(uses_gpu=True) as watch:      # idle power is measured here, for two seconds, where there are rails
        ...                                  # load, warm up
        watch.mark_start()
        ...                                  # the timed part
        watch.mark_end()
    watch.conditions(), watch.energy(inferences), watch.verdict(summary)

A number is *stable* where nothing that is known to move it moved: then another run tells the same. Python 3.8,
standard library.
"""

import time
from types import TracebackType
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Type

from kdedge_device import state
from kdedge_device.board import identify
from kdedge_device.brakes import Brakes, pulled, read_brakes
from kdedge_device.clock import variation
from kdedge_device.clock_span import Span, moved, span
from kdedge_device.energy import energy_per_inference
from kdedge_device.failures import Failure
from kdedge_device.meters import CounterMeter, RailMeter, find_meter
from kdedge_device.sampler import Sampler, Trace, worth_sampling
from kdedge_device.set_clocks import leftover

__all__ = ["Watch", "snapshot"]

IDLE_S = 2.0


class _Look(NamedTuple):
    """The machine at one moment."""

    power_mode: Optional[Dict[str, Any]]
    clocks_mhz: Optional[Dict[str, Any]]
    temperatures_c: Optional[Dict[str, float]]
    brakes: Optional[Brakes]
    fan: Optional[Dict[str, Optional[int]]]
    memory_mib: Optional[Dict[str, int]]
    uptime_s: Optional[float]


def _look(root: str) -> _Look:
    return _Look(
        state.power_mode(root),
        state.clocks_mhz(root),
        state.temperatures_c(root),
        read_brakes(root),
        state.fan(root),
        state.memory_mib(root),
        state.uptime_s(root),
    )


def snapshot(root: str = "/") -> Dict[str, Any]:
    """The machine now, for people and for JSON: what `Watch.conditions` tells of one moment, and the power in mW."""
    look, meter = _look(root), find_meter(root)
    values = meter.read() if isinstance(meter, RailMeter) else None
    return {
        **look._asdict(),
        "brakes": None if look.brakes is None else look.brakes._asdict(),
        "power_mw": None if meter is None or values is None else dict(zip(meter.names, values)),
        "clocks_left_held": leftover(root),
    }


class Watch:
    """For one measurement. `uses_gpu`: the GPU's clock counts for the verdict, else the processor's.

    `energy` off: no process beside it.
    """

    def __init__(self, root: str = "/", energy: bool = True, uses_gpu: bool = False, idle_s: float = IDLE_S) -> None:
        self._root = root
        self._uses_gpu = uses_gpu
        self._judged = "gpu" if uses_gpu else "cpu"
        self._idle_s = idle_s
        self._sampler = Sampler(root) if energy and worth_sampling(root) else None
        self._trips = state.trips(root)
        self._before: Optional[_Look] = None
        self._after: Optional[_Look] = None
        self._trace: Optional[Trace] = None
        self._idle: Optional[Tuple[int, int]] = None
        self._start_ns: Optional[int] = None
        self._end_ns: Optional[int] = None
        self._brakes: Optional[Brakes] = None  # when the timed part began

    def __enter__(self) -> "Watch":
        self._before = _look(self._root)
        if self._sampler is not None and self._sampler.start() and find_meter(self._root) is not None:
            begin = time.monotonic_ns()
            time.sleep(self._idle_s)
            self._idle = (begin, time.monotonic_ns())
        return self

    def mark_start(self) -> None:
        self._brakes = read_brakes(self._root)
        self._start_ns = time.monotonic_ns()

    def mark_end(self) -> None:
        """Right behind the timed part: what is read here belongs to it, while the machine is still warm."""
        self._end_ns = time.monotonic_ns()
        self._after = _look(self._root)

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._sampler is not None:
            self._trace = self._sampler.stop()
        if self._after is None:
            self._after = _look(self._root)

    def conditions(self) -> Dict[str, Any]:
        """For the record; None where the machine does not tell."""
        before, after = self._looks()
        clocks: Dict[str, Any] = {"before": before.clocks_mhz, "after": after.clocks_mhz}
        clocks.update({f"{which}_while_timed": self._span(which) for which in ("gpu", "cpu")})
        brakes = {"before": before.brakes, "after": after.brakes}
        return {
            "power_mode": after.power_mode,
            "clocks_mhz": {**clocks, "judged": self._judged} if any(clocks.values()) else None,
            "temperature_c": {"before": before.temperatures_c, "after": after.temperatures_c},
            "throttle": {when: None if each is None else each._asdict() for when, each in brakes.items()},
            "fan": after.fan,
            "memory_mib": before.memory_mib,
            "uptime_s": before.uptime_s,
            "board": dict(identify(self._root)._asdict()),
        }

    def energy(self, inferences: int) -> Dict[str, Any]:
        """{"energy_mj_per_inference", "energy_source"} of the timed part, which answered `inferences` images."""
        self._looks()
        trace = self._trace
        if trace is not None and self._uses_gpu and trace.source == CounterMeter.source:
            trace = None  # the processor's counter knows nothing of a graphics card, which does the work
        return energy_per_inference(trace, self._window(), self._idle, inferences)

    def verdict(self, summary: Dict[str, Any]) -> Dict[str, Any]:
        """{"stable", "why", "throttled", "unstable"} of a summary of times (`clock.summarize`).

        `why` has a sentence for each thing that speaks against it. `throttled` is None where the machine cannot tell.
        """
        brakes = self._pulled()
        why = brakes + self._crossed() + self._moved() + variation(summary)
        unknown = not brakes and all(look.brakes is None for look in self._looks())
        return {
            "stable": not why,
            "why": why,
            "throttled": None if unknown else bool(brakes),
            "unstable": bool(why),
        }

    def _looks(self) -> Tuple[_Look, _Look]:
        if self._before is None or self._after is None:
            raise Failure("The watch was asked before its measurement ended; ask it behind its with statement.")
        return self._before, self._after

    def _window(self) -> Optional[Tuple[int, int]]:
        if self._start_ns is None or self._end_ns is None:
            return None
        return self._start_ns, self._end_ns

    def _pulled(self) -> List[str]:
        """Also of a brake that was on in between only."""
        _, after = self._looks()
        start, end = self._window() or (0, 0)
        series = [] if self._trace is None else [each for moment, each in self._trace.brakes if start <= moment <= end]
        said: Dict[str, str] = {}
        for look in [*series, *([] if after.brakes is None else [after.brakes])]:
            said.update(pulled(self._brakes, look))  # counters rise, so that the last sentence says most
        return list(said.values())

    def _crossed(self) -> List[str]:
        """The hottest moment of each zone that reached a trip point while it was timed."""
        _, after = self._looks()
        start, end = self._window() or (0, 0)
        looks = [after.temperatures_c or {}]
        if self._trace is not None:
            looks += [each for moment, each in self._trace.temperatures_c if start <= moment <= end]
        said = []
        for trip in self._trips:
            hottest = max((look[trip.zone] for look in looks if trip.zone in look), default=None)
            if hottest is not None and hottest >= trip.celsius:
                said.append(
                    f"{trip.zone} reached {hottest:.1f} degrees C, and its {trip.kind} trip point is at "
                    f"{trip.celsius:.1f}: cool the board, or choose a lower power mode."
                )
        return said

    def _span(self, which: str) -> Optional[Span]:
        start, end = self._window() or (0, 0)
        looks = [] if self._trace is None else {"gpu": self._trace.gpu_mhz, "cpu": self._trace.cpu_mhz}[which]
        return span([mhz for moment, mhz in looks if start <= moment <= end])

    def _moved(self) -> List[str]:
        """Settings that changed under the measurement."""
        before, after = self._looks()
        said = []
        if before.power_mode != after.power_mode:
            names = [(mode or {}).get("name") for mode in (before.power_mode, after.power_mode)]
            said.append(f"The power mode changed from {names[0]} to {names[1]}.")
        clock = moved(self._judged, self._span(self._judged))
        return said + ([clock] if clock else [])
