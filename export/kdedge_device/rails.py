"""Power rails: which there are, and which of them make up the power that goes into a module.

Jetsons measure with INA3221 chips, three channels each, Thor's input with an INA238 beside them: millivolts and
milliamperes under hwmon from JetPack 5 on, milliwatts under iio in JetPack 4. `tegrastats` prints the same numbers and
is asked where the files are missing. Python 3.8, standard library.
"""

import re
from typing import Dict, List, NamedTuple, Optional

from kdedge_device.sysfs import paths, read, read_int

__all__ = ["Rail", "find_rails", "parse_tegrastats", "rail_milliwatts", "rails_of_total"]

# A rail that feeds all others, first where more than one is there: Orin NX, Nano and Xavier NX; Thor; the first Nano.
_INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")
# A rail that another measured one feeds, and that would be counted twice: AGX Orin's memory.
_FED_BY = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}


class Rail(NamedTuple):
    """Files of one channel: `power`, in units of `power_unit_mw`, where the chip multiplies; else `volt` (mV) and
    `ampere` (mA)."""

    name: str
    volt: Optional[str]
    ampere: Optional[str]
    power: Optional[str]
    power_unit_mw: float = 1.0


def find_rails(root: str = "/") -> List[Rail]:
    """All connected channels, in the order of chips and channels; empty where nothing is measured."""
    rails = []
    for folder in paths(root, "/sys/class/hwmon/hwmon*"):
        if (read(root, f"{folder}/name") or "").startswith("ina"):
            rails += _channels(root, folder)
    return rails or _iio(root)


def _channels(root: str, folder: str) -> List[Rail]:
    """INA3221: in1 to in3 are rails, in4 to in6 shunt voltages, in7 (labelled so) their sum. INA238: one rail."""
    rails = []
    for channel in (1, 2, 3):
        name = read(root, f"{folder}/in{channel}_label") or (read(root, f"{folder}/label") if channel == 1 else None)
        if name is None or name == "NC":
            continue
        power = f"{folder}/power{channel}_input"
        if read_int(root, power) is not None:
            rails.append(Rail(name, None, None, power, 1e-3))  # hwmon tells power in microwatts
        elif read_int(root, f"{folder}/curr{channel}_input") is not None:
            rails.append(Rail(name, f"{folder}/in{channel}_input", f"{folder}/curr{channel}_input", None))
    return rails


def _iio(root: str) -> List[Rail]:
    rails = []
    for path in paths(root, "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"):
        name, number = read(root, path), path.rsplit("_", 1)[1]
        if name is not None and name != "NC":
            rails.append(Rail(name, None, None, path.rsplit("/", 1)[0] + f"/in_power{number}_input"))
    return rails


def rail_milliwatts(root: str, rail: Rail) -> Optional[float]:
    """Now; None where the chip does not answer."""
    if rail.power is not None:
        power = read_int(root, rail.power)
        return None if power is None else power * rail.power_unit_mw
    millivolts, milliamperes = read_int(root, rail.volt or ""), read_int(root, rail.ampere or "")
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e3


def rails_of_total(names: List[str]) -> List[str]:
    """The rails whose sum is the power of the module: the input alone where it is measured, else all that it feeds."""
    for name in _INPUTS:
        if name in names:
            return [name]
    return [name for name in names if _FED_BY.get(name) not in names]


def parse_tegrastats(line: str) -> Dict[str, float]:
    """Milliwatts by rail of one line: "VDD_IN 4952mW/4952mW" since JetPack 5, "VDD_IN 4952/4952" before.

    The first number is the present one, the others are means. RAM and SWAP look alike but for their unit.
    """
    found = re.findall(r"(?<!\S)([A-Z][A-Z0-9_]+) (-?\d+)(?:mW(?:/-?\d+mW)*|/-?\d+)(?!\S)", line)
    return {name: float(value) for name, value in found if name != "NC"}
