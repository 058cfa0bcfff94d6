"""What to tell a user when ssh or the board says no: what happened, and what to type."""

import shlex
import signal
from collections.abc import Mapping
from typing import Any

from kdedge.errors import BudgetFailed, BundleError, DeviceError, KdedgeError
from kdedge_bench.measured import reasons
from kdedge_bench.remote_place import Place, shown

__all__ = ["explained", "failed", "lacking"]


def explained(
    place: Place, code: int, told: str, settings: Mapping[str, str] | None = None
) -> tuple[DeviceError, bool]:
    """ssh ended with `code` and said `told`: the error, and whether another try may help.

    `settings`: what `ssh -G` says of the place, whose host may be an alias.
    """
    text, words = told.lower(), shown(told)
    if "kdedge-python" in text:
        return DeviceError(_too_old(place, words.partition("kdedge-python ")[2])), False
    if code == 127 or "command not found" in text:
        return DeviceError(
            f"{place.name} has no python3. Install Python 3.8 or newer there; "
            "on Debian and Ubuntu: sudo apt install python3 python3-venv"
        ), False
    if code != 255:
        return DeviceError(
            f"{place.name} answers, but not as a board should (exit code {code}): {words or 'nothing'}. "
            f"Does this print a version? {place.by_hand} python3 --version"
        ), False
    if "identification has changed" in text or "has changed and you have requested" in text:
        return DeviceError(
            f"The host key of {place.name} is not the one in known_hosts: the board was set up anew, or somebody is in "
            f"between. If you know it was set up anew: {_forget(place, settings or {})}, then log in once by hand: "
            f"{place.by_hand}"
        ), False
    if "host key" in text:
        return DeviceError(
            f"The host key of {place.name} is not known here, and kdedge trusts none by itself. "
            f"Log in once by hand and compare its fingerprint: {place.by_hand}"
        ), False
    if "permission denied" in text or "too many authentication failures" in text:
        port = f"-p {place.port} " if place.port is not None else ""
        return DeviceError(
            f"{place.name} accepts none of your keys ({words}). kdedge never asks for a password. "
            f"Copy a key there once: ssh-copy-id {port}{place.name}; a key with a passphrase goes into ssh-agent."
        ), False
    return DeviceError(
        f"{place.name} cannot be reached: {words or 'the connection was closed'}. "
        f"Is it on and in this network, and does this work? {place.by_hand}"
    ), True


def _forget(place: Place, settings: Mapping[str, str]) -> str:
    """What to type so that a host key is known no longer: by the name, and in the file, that ssh keeps it under."""
    host, port = settings.get("hostname", place.host), settings.get("port", str(place.port or 22))
    known = settings.get("hostkeyalias") or (host if port == "22" else f"[{host}]:{port}")
    file = settings.get("userknownhostsfile", "").split(" ")[0]
    elsewhere = "" if not file or file.endswith("/.ssh/known_hosts") else f" -f {shlex.quote(file)}"
    return f"ssh-keygen -R {shlex.quote(known)}{elsewhere}"


def _too_old(place: Place, found: str) -> str:
    """`found`: the version, and the first line of /etc/nv_tegra_release where the board is a Jetson."""
    version, _, release = found.partition(" ")
    if "# R32" in release or "# R28" in release:
        return (
            f"{place.name} runs JetPack 4 or older (L4T {release.partition('# ')[2].split(' ')[0]}, Python {version}); "
            "kdedge needs JetPack 5: Python 3.8 and TensorRT 8.5."
        )
    return (
        f"{place.name} has Python {version}; kdedge needs 3.8 or newer. Install one there that `python3` starts, "
        "in ssh too."
    )


def lacking(place: Place, command: str, seen: Mapping[str, Any], info: Mapping[str, Any]) -> DeviceError | None:
    """What to install, where `run.pyz info` says that the board cannot do `command`; None where it can.

    `seen`: the answer to "look". A runtime is named that the board can have: TensorRT comes with JetPack alone.
    """
    can = info.get("can")
    reason = can.get(command) if isinstance(can, dict) else None
    if reason is None:
        return None
    runtimes = info.get("runtimes")
    runtimes = runtimes if isinstance(runtimes, dict) else {}
    packages = [] if runtimes.get("numpy") else ["numpy"]
    if not (runtimes.get("onnxruntime") or runtimes.get("tensorrt")):
        packages.append("onnxruntime")
    if not packages:
        return DeviceError(f"{place.name} cannot {command}: {shown(str(reason))}")
    jetson = isinstance(info.get("board"), dict) and info["board"].get("l4t")
    commands = [_install(packages, seen)]
    if jetson and "onnxruntime" in packages:
        commands.insert(0, "sudo apt install nvidia-jetpack python3-numpy (TensorRT), or ONNX Runtime alone:")
    lacks = " and ".join({"numpy": "numpy", "onnxruntime": "ONNX Runtime or TensorRT"}[name] for name in packages)
    return DeviceError(
        f"{place.name} has Python {seen['python']} but no {lacks}{_broken(info, packages)}, so it cannot {command}. "
        f"Install there: {' '.join(commands)}"
    )


def _broken(info: Mapping[str, Any], packages: list[str]) -> str:
    """Of packages that are there and still cannot be used, why not."""
    problems = info.get("problems")
    reasons = [problems.get(name) for name in packages] if isinstance(problems, dict) else []
    told = [shown(str(reason)) for reason in reasons if reason and reason != "it is not installed"]
    return f" that works ({'; '.join(told)})" if told else ""


def _install(packages: list[str], seen: Mapping[str, Any]) -> str:
    """The command for this very board: many systems refuse pip outside of an environment (PEP 668)."""
    names = " ".join(packages)
    if seen["pip"] and not seen["managed"] and not seen["venv"]:
        return f"python3 -m pip install --user {names}"
    venv = [] if seen["venv"] else ["python3 -m venv --system-site-packages ~/.kdedge/venv"]
    if not seen["ensurepip"] and not seen["venv"] and seen["apt"]:
        venv.insert(0, "sudo apt install python3-venv")
    return " && ".join([*venv, f"~/.kdedge/venv/bin/python3 -m pip install {names}"])


def failed(place: Place, ended: Mapping[str, Any], document: Any) -> KdedgeError:
    """The error of a program that ended other than well: its own sentence, else what can be known."""
    code, last = ended.get("exit_code"), shown(str(ended.get("stderr", "")))
    if isinstance(document, dict) and isinstance(document.get("error"), str):
        kind: type[KdedgeError] = {1: BudgetFailed, 5: BundleError}.get(code or 0, DeviceError)
        return kind(f"{place.name}: {shown(document['error'], 2000)}")
    why = reasons(document, "failed", "not_run") if isinstance(document, dict) else []
    if why and code:
        return DeviceError(f"{place.name}: {' '.join(why)}")
    if code == 2 and "usage:" in last:
        return BundleError(f"The bundle's run.pyz is of another kdedge ({last}). Make it again: kdedge export")
    error = DeviceError(f"{place.name}: the measurement {_ending(ended)}{f' It said: {last}' if last else ''}")
    error.exit_code = 1
    return error


def _ending(ended: Mapping[str, Any]) -> str:
    code = ended.get("exit_code")
    if ended["state"] == "none":
        return "was stopped by another call."
    if code is None:
        full = " Its disk is full." if ended.get("free_bytes", 1 << 30) < 1 << 20 else ""
        return f"ended without a result: the board was restarted, or ended what a session leaves behind.{full}"
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else str(-code)
        memory = ", most likely for lack of memory" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{memory}."
    return f"ended with code {code} and no result."
