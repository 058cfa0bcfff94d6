"""Energy of one inference: mean power while it was timed, times the time, by the number of inferences.

Beside it the same above idle, which is what the model adds to a board that is on anyway. Both belong to the board and
its mode; see the caveat that each carries. Python 3.8, standard library.
"""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

from kdedge_device.sampler import Trace

__all__ = ["Power", "energy_per_inference", "mean_milliwatts", "mean_power", "pooled_energy"]

MIN_SAMPLES = 10  # half a second; fewer say nothing about a mean

Window = Tuple[int, int]  # nanoseconds of the monotonic clock


class Power(NamedTuple):
    """Mean over a window, in milliwatts. `seconds`: between the first and the last of its `samples`."""

    milliwatts: float
    by_name: Dict[str, float]
    samples: int
    seconds: float


def mean_milliwatts(times_ns: Sequence[int], values: Sequence[float], wrap: Optional[int] = None) -> float:
    """Over at least two moments, of milliwatts or, with `wrap`, of a counter of microjoules.

    Milliwatts: the area under straight lines, by the time, so that a stretch with few samples counts for its length.
    A counter: its rise, by the time; it starts again at 0 after `wrap`.
    """
    seconds = (times_ns[-1] - times_ns[0]) / 1e9
    pairs = list(zip(zip(times_ns, values), zip(times_ns[1:], values[1:])))
    if wrap is None:
        return sum((t1 - t0) / 1e9 * (v0 + v1) / 2 for (t0, v0), (t1, v1) in pairs) / seconds
    microjoules = sum(v1 - v0 if v1 >= v0 else v1 - v0 + wrap for (_, v0), (_, v1) in pairs)
    return microjoules / seconds / 1e3


def mean_power(trace: Trace, window: Window) -> Optional[Power]:
    """None with fewer than two samples in the window."""
    start, end = window
    inside = [(moment, values) for moment, values in trace.power if start <= moment <= end]
    if len(inside) < 2:
        return None
    times = [moment for moment, _ in inside]
    by_name = {
        name: mean_milliwatts(times, [values[i] for _, values in inside], trace.wraps[i] if trace.wraps else None)
        for i, name in enumerate(trace.names)
    }
    seconds = (times[-1] - times[0]) / 1e9
    return Power(sum(by_name[name] for name in trace.total), by_name, len(inside), seconds)


def energy_per_inference(
    trace: Optional[Trace], timed: Optional[Window], idle: Optional[Window], inferences: int
) -> Dict[str, Any]:
    """{"energy_mj_per_inference", "energy_source"}.

    Both are None where nothing measures power; the first also where too few samples were taken, as the source says.
    """
    if trace is None or trace.source is None or timed is None or inferences < 1:
        return {"energy_mj_per_inference": None, "energy_source": None}
    power = mean_power(trace, timed)
    samples = 0 if power is None else power.samples
    source: Dict[str, Any] = {"source": trace.source, "samples": samples, "caveat": trace.caveat}
    if power is None or samples < MIN_SAMPLES:
        source["why_not"] = f"{samples} samples of power were taken while it was timed; {MIN_SAMPLES} are needed."
        return {"energy_mj_per_inference": None, "energy_source": source}
    at_rest = mean_power(trace, idle) if idle is not None else None
    seconds = (timed[1] - timed[0]) / 1e9
    above = None if at_rest is None else (power.milliwatts - at_rest.milliwatts) * seconds / inferences
    source.update(
        {
            "summed": trace.total,
            "mean_mw": power.milliwatts,
            "mean_mw_by_name": power.by_name,
            "seconds": seconds,
            "inferences": inferences,
            "samples_per_second": _rate(power),
            "idle_mw": None if at_rest is None else at_rest.milliwatts,
            "above_idle_mj_per_inference": above,
        }
    )
    return {"energy_mj_per_inference": power.milliwatts * seconds / inferences, "energy_source": source}


def pooled_energy(rounds: Sequence[Tuple[Optional[float], Optional[Dict[str, Any]]]]) -> Dict[str, Any]:
    """As `energy_per_inference`, of several measurements' numbers and sources: all millijoules by all inferences.

    The number is None where one of them has none, or was measured by something else. Power at rest is the mean of those
    that looked at it.
    """
    sources = [source for _, source in rounds if source is not None]
    if len(sources) < len(rounds):
        return {"energy_mj_per_inference": None, "energy_source": None}
    first = sources[0]
    without = sum(energy is None for energy, _ in rounds)
    if without or any(source["source"] != first["source"] for source in sources):
        why = f"{without} of {len(rounds)} rounds have none." if without else "The rounds were measured differently."
        pooled = {**first, "samples": sum(source["samples"] for source in sources), "why_not": why}
        kept = ("source", "samples", "caveat", "why_not")
        return {"energy_mj_per_inference": None, "energy_source": {key: pooled.get(key) for key in kept}}
    seconds = sum(source["seconds"] for source in sources)
    inferences = sum(source["inferences"] for source in sources)

    def mean(values: Sequence[float]) -> float:
        return float(sum(value * source["seconds"] for value, source in zip(values, sources)) / seconds)

    milliwatts = mean([source["mean_mw"] for source in sources])
    at_rest = [source["idle_mw"] for source in sources if source.get("idle_mw") is not None]
    idle_mw = sum(at_rest) / len(at_rest) if at_rest else None
    source = {
        **first,
        "samples": sum(source["samples"] for source in sources),
        "mean_mw": milliwatts,
        "mean_mw_by_name": {
            name: mean([source["mean_mw_by_name"][name] for source in sources]) for name in first["mean_mw_by_name"]
        },
        "seconds": seconds,
        "inferences": inferences,
        "samples_per_second": round(mean([source["samples_per_second"] for source in sources]), 2),
        "idle_mw": idle_mw,
        "above_idle_mj_per_inference": None if idle_mw is None else (milliwatts - idle_mw) * seconds / inferences,
    }
    return {"energy_mj_per_inference": milliwatts * seconds / inferences, "energy_source": source}


def _rate(power: Power) -> float:
    return round((power.samples - 1) / power.seconds, 2)
