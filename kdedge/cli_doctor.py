"""`kdedge doctor`: what works on this machine, and the exact reason for what does not."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from kdedge.cli_common import Reply, command_output
from kdedge.cli_probes import PROBES, Probe

__all__ = ["doctor"]

LIMIT_S = 120.0
"""For all that one process looks at; a driver may hang."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `detail` is the version, or the reason in the words of whoever refused."""

    name: str
    works: bool
    needed: bool
    detail: str
    used_for: str


@click.command()
@command_output
def doctor() -> Reply:
    """What works on this machine, and why the rest does not.

    Exits with 1 where kdedge itself cannot run.
    """
    findings = _findings()
    commands = [_command(text, needs, findings) for text, needs in _COMMANDS]
    broken = [finding.name for finding in findings if finding.needed and not finding.works]
    end = f"kdedge cannot run here: {', '.join(broken)}." if broken else "kdedge can train, export and measure here."
    lines = [*map(_line, findings), "", *map(_line, commands), "", end]
    return Reply([asdict(f) for f in (*findings, *commands)], "\n".join(lines), exit_code=int(bool(broken)))


# What a command needs beyond Python and the small packages, by the names of the findings.
_NETWORKS = ("python", "packages", "torch", "torchvision")
_COMMANDS = (
    ("kdedge train-recipe", (*_NETWORKS, "disk")),
    ("kdedge train-recipe --device cuda", (*_NETWORKS, "cuda", "disk")),
    ("kdedge verdict, study", (*_NETWORKS, "disk")),
    ("kdedge export --int8", (*_NETWORKS, "onnx", "onnxruntime", "disk")),
    ("kdedge export --tensorrt", (*_NETWORKS, "onnx", "onnxruntime", "tensorrt", "disk")),
    ("kdedge bench", ("python", "packages", "onnxruntime", "disk")),
    ("kdedge bench --suite", (*_NETWORKS, "onnx", "onnxruntime", "disk")),
    ("kdedge bench, export --on ssh://...", ("python", "packages", "ssh", "disk")),
    ("kdedge report", ("python", "packages", "disk")),
    ("kdedge compare", ("python", "packages")),
    ("kdedge predict, eval", (*_NETWORKS, "onnxruntime")),
    ("kdedge data check, data pack", ("python", "packages")),
    ("kdedge recipes, models", _NETWORKS),
)


def _findings() -> list[Finding]:
    """All probes; where one takes its process with it, or hangs, that is what is found, and another goes on."""
    found: list[Finding] = []
    while len(found) < len(PROBES):
        answers, end = _answers(len(found))
        for works, detail in answers:
            found.append(_finding(PROBES[len(found)], works, detail))
        if len(found) < len(PROBES):
            found.append(_finding(PROBES[len(found)], False, end))
    return found


def _finding(probe: Probe, works: bool, detail: str) -> Finding:
    return Finding(probe.name, works, probe.needed, detail.strip(), probe.used_for)


def _answers(first: int) -> tuple[list[tuple[bool, str]], str]:
    """What the probes from `first` on said, and how their process ended."""
    from kdedge_device.children import python

    # The path is this process's own, since a checkout may be on it by PYTHONPATH or as the current folder.
    statements = "sys.path[:] = sys.argv[2:]\nfrom kdedge.cli_probes import tell\ntell(int(sys.argv[1]))"
    command = python(statements, str(first), *sys.path)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        return _read(error.stdout), f"it did not answer within {LIMIT_S:g} seconds; restart the machine"
    except OSError as error:
        return [], f"no process could be started to look at it ({error})"
    if done.returncode >= 0:
        return _read(done.stdout), f"looking at it ended with exit code {done.returncode}; install it anew"
    name = signal.Signals(-done.returncode).name
    return _read(done.stdout), f"it ends Python with {name}; install it anew, in a build for this processor and driver"


def _read(said: bytes | None) -> list[tuple[bool, str]]:
    lines = (said or b"").decode("utf-8", "replace").splitlines(keepends=True)
    return [(works, detail) for works, detail in (json.loads(line) for line in lines if line.endswith("\n"))]


def _command(text: str, needs: tuple[str, ...], findings: Sequence[Finding]) -> Finding:
    lacking = [f"for want of {f.name}: {f.detail}" for f in findings if f.name in needs and not f.works]
    return Finding(text, not lacking, False, "; ".join(lacking), "")


def _line(finding: Finding) -> str:
    width = 36 if finding.name.startswith("kdedge ") else 14
    line = f"{finding.name:<{width}} {'works' if finding.works else 'does not':<9} {finding.detail}".rstrip()
    return line if finding.works or not finding.used_for else f"{line} (for {finding.used_for})"
