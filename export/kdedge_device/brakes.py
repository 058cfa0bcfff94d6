"""What slows a machine down: thermal limits, too much current, too little voltage. Read, never changed.

Three kinds of number come together under one name each. A *state* is above 0 while the brake is on. An *event* counts
up for every time that it came on since the start of the machine. An *alarm* is 1 while, or since the last look when, a
limit was exceeded. Python 3.8, standard library.
"""

import re
from typing import Dict, NamedTuple, Optional, Tuple

from kdedge_device.sysfs import paths, read, read_int

__all__ = ["Brakes", "pulled", "read_brakes"]

# Everything else that Linux calls a cooling device is a fan, a warning, or a dimmed display.
_BRAKES = ("throttle-alert", "cpufreq", "devfreq", "processor")
_PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


class Brakes(NamedTuple):
    states: Dict[str, int]
    events: Dict[str, int]
    alarms: Dict[str, int]


def read_brakes(root: str = "/") -> Optional[Brakes]:
    """None where the machine tells of none at all, so that "not throttled" is never guessed."""
    now, since_start = _pi(root)
    brakes = Brakes(
        states={**_cooling(root), **now},
        events={**_over_current(root), **_x86(root), **since_start},
        alarms=_alarms(root),
    )
    return brakes if any(brakes) else None


def pulled(before: Optional[Brakes], after: Optional[Brakes]) -> Dict[str, str]:
    """A sentence for each brake, by its name, that is on or that came on between the two looks."""
    if after is None:
        return {}
    said = {}
    for name, state in after.states.items():
        if state > 0:
            said[name] = f"The brake '{name}' is on (state {state})."
    for name, on in after.alarms.items():
        if on > 0:
            said[name] = f"The alarm '{name}' is on: a limit was exceeded."
    for name, count in after.events.items():
        rise = count - (before.events.get(name, count) if before is not None else count)
        if rise > 0:
            said[name] = f"The counter '{name}' rose by {rise}: the clocks were cut to protect the board."
    return said


def _cooling(root: str) -> Dict[str, int]:
    """The highest state of each name: an x86 machine has a device for every core."""
    found: Dict[str, int] = {}
    for folder in paths(root, "/sys/class/thermal/cooling_device*"):
        kind, state = read(root, f"{folder}/type"), read_int(root, f"{folder}/cur_state")
        if kind is not None and state is not None and any(part in kind.lower() for part in _BRAKES):
            found[kind] = max(found.get(kind, 0), state)
    return found


def _over_current(root: str) -> Dict[str, int]:
    """Jetson Orin and Thor: 1 is too low a voltage, 2 too high a mean current, 3 a moment's."""
    words = {"1": "oc1: under-voltage", "2": "oc2: average over-current", "3": "oc3: instantaneous over-current"}
    found = {}
    for path in paths(root, "/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        number, count = re.sub(r".*/oc(\d+)_event_cnt", r"\1", path), read_int(root, path)
        if count is not None:
            found[words.get(number, f"oc{number}")] = count
    return found


def _x86(root: str) -> Dict[str, int]:
    """Core counters are summed; every core of a package repeats the package's."""
    folder = "/sys/devices/system/cpu/cpu*/thermal_throttle"
    found = {}
    for name, total in (("core", sum), ("package", max)):
        counts = [read_int(root, path) for path in paths(root, f"{folder}/{name}_throttle_count")]
        known = [count for count in counts if count is not None]
        if known:
            found[f"{name} thermal throttling"] = int(total(known))
    return found


def _alarms(root: str) -> Dict[str, int]:
    """Of the current monitors on a Jetson, by rail, and of a Raspberry Pi's supply."""
    found = {}
    for path in paths(root, "/sys/class/hwmon/hwmon*/curr*_*_alarm"):
        folder, file = path.rsplit("/", 1)
        parts = re.fullmatch(r"curr(\d+)_(max|crit)_alarm", file)
        value = read_int(root, path)
        if parts and value is not None and (read(root, f"{folder}/name") or "").startswith("ina"):
            rail = read(root, f"{folder}/in{parts.group(1)}_label") or "all rails"  # curr4 is the chip's sum
            found[f"{rail} {parts.group(2)}"] = value
    for path in paths(root, "/sys/class/hwmon/hwmon*/in0_lcrit_alarm"):
        value = read_int(root, path)
        if value is not None and read(root, path.rsplit("/", 1)[0] + "/name") == "rpi_volt":
            found["supply voltage low"] = value
    return found


def _pi(root: str) -> Tuple[Dict[str, int], Dict[str, int]]:
    """A Raspberry Pi's bits: 0 to 3 are states, and 16 to 19 the same since the start."""
    for path in paths(root, "/sys/devices/platform/*/*firmware/get_throttled"):
        try:
            bits = int(read(root, path) or "", 16)
        except ValueError:
            break
        return (
            {f"pi: {name}": bits >> bit & 1 for bit, name in _PI_BITS.items()},
            {f"pi: {name}, ever": bits >> 16 + bit & 1 for bit, name in _PI_BITS.items()},
        )
    return {}, {}
