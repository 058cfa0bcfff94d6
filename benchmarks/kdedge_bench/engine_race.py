"""Unlabeled images per second of our FixMatch step beside the published way, semilearn and a plain step, as one record.

python -m kdedge_bench.engine_race --out benchmarks/results/NAME/engine-race.json

Every side is a process of its own (`kdedge_bench.engine_sides`) on the same network, input, batch and precision. Sides
take turns within each round and are stopped, loader processes and all, while others run; ratios are those of a round.
A side that cannot run, or ends in the middle, is in the record with how it ended: signal, exit code, its last words.
Every side computes with `--threads` threads, ours with the plan that is measured at its start, or with `--plan`. The
machine should do nothing else meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from kdedge import __version__
from kdedge.models.zoo import architecture
from kdedge.runs import write_json
from kdedge.train.engine import available_cores, pick_device
from kdedge.train.stop import terminable
from kdedge_bench.engine_sides import PX
from kdedge_device.record import load_average, machine, now

__all__ = ["ROWS_HEAD", "main", "markdown_row", "parser", "race", "ratios"]

ROWS_HEAD = (
    "| network at 32 px | labeled + unlabeled | ours, unlabeled images/s | over Pillow in workers | over semilearn "
    "| of a plain step |"
)

_PEERS = ("published", "semilearn", "supervised")
_PROGRAM = (sys.executable, "-m", "kdedge_bench.engine_sides")


@final
class _Side:
    """A process that does steps on request and is stopped between requests."""

    def __init__(self, name: str, flags: Sequence[str], stack: contextlib.ExitStack) -> None:
        command = [*_PROGRAM, "--side", name, *flags]
        self._said = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - the stack closes it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
        )
        stack.callback(self._end)
        self.told = self._answer()  # with "failed" where it cannot run, or as soon as it has ended
        self._signal(signal.SIGSTOP)

    @property
    def failed(self) -> bool:
        return "failed" in self.told

    def run(self, seconds: float) -> float | None:
        """Steps a second, over at least `seconds`; None where the side has ended instead."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.write(f"{seconds}\n")
                self._process.stdin.flush()
        found = self._answer()
        self._signal(signal.SIGSTOP)
        if "failed" in found:
            self.told |= found
            return None
        return float(found["steps"] / found["elapsed_s"])

    def _answer(self) -> dict[str, Any]:
        if self._process.stdout is not None and (line := self._process.stdout.readline()):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._said.seek(0)
        last = [line.strip() for line in self._said.read().splitlines() if line.strip()][-1:]
        ended = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
        return {"failed": ended | {"last_line": last[0] if last else None}}

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # its loader processes too

    def _end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: the median and the extremes."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def race(network: str, halvings: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network at one precision: rates of every side in every round, and our ratios to them."""
    shape = {"network": network, "halvings": halvings, "precision": precision}
    shared = {name: getattr(options, name) for name in ("labeled", "ratio", "device", "threads", "workers")}
    flags = [word for name, value in (shape | shared).items() for word in (f"--{name}", str(value))]
    with contextlib.ExitStack() as stack:
        given = [] if options.plan is None else ["--plan", options.plan]
        sides = {"ours": _Side("ours", [*flags, *given], stack)}
        if sides["ours"].failed:
            return shape | {"failed": sides["ours"].told["failed"]}
        plan = json.dumps(sides["ours"].told["plan"])
        for name in (name for name in _PEERS if name in options.sides):
            sides[name] = _Side(name, [*flags, "--plan", plan], stack)
        rates = _rates(sides, options)
        told = {name: side.told for name, side in sides.items()}
    if sides["ours"].failed:
        return shape | {"failed": sides["ours"].told["failed"]}
    found: dict[str, Any] = {"unlabeled_images_per_second": _rounded(rates), "ours_over": {}, "sides": told}
    for name in rates:
        if name not in ("ours", "supervised"):
            found["ours_over"][name] = ratios(rates["ours"], rates[name])
    if "supervised" in rates:
        found["share_of_supervised"] = ratios(rates["ours"], rates["supervised"])
    return shape | {"labeled": options.labeled, "unlabeled": options.labeled * options.ratio, "px": PX} | found


def _rates(sides: Mapping[str, _Side], options: argparse.Namespace) -> dict[str, list[float]]:
    """Unlabeled images a second of every side, round by round, without the sides that ended before the last one."""
    rates: dict[str, list[float]] = {name: [] for name, side in sides.items() if not side.failed}
    for turn in _turns(list(rates), options.rounds):
        for name in turn:
            if name in rates and (steps_a_second := sides[name].run(options.seconds)) is not None:
                rates[name].append(steps_a_second * options.labeled * options.ratio)
            else:
                rates.pop(name, None)
    return rates


def markdown_row(found: Mapping[str, Any]) -> str:
    """One race under `ROWS_HEAD`: medians and extremes of the ratios over the rounds; of a side that ended, how."""

    def told(ratio: Mapping[str, float] | None, name: str) -> str:
        if ratio is not None:
            return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        ended = found["sides"].get(name, {}).get("failed")
        if not isinstance(ended, Mapping):
            return "-"
        return f"ended: {ended.get('signal') or 'exit code ' + str(ended['exit_code'])}"

    over = found["ours_over"]
    rate = statistics.median(found["unlabeled_images_per_second"]["ours"])
    network = f"{found['network']}, {found['halvings']} halvings, {found['precision']}"
    cells = [told(over.get(name), name) for name in ("published", "semilearn")]
    cells.append(told(found.get("share_of_supervised"), "supervised"))
    return f"| {network} | {found['labeled']} + {found['unlabeled']} | {rate:.0f} | {' | '.join(cells)} |"


def _turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Each round in another order, so that none always follows the same one."""
    orders = itertools.cycle(range(len(names)))
    for _, first in zip(range(rounds), orders, strict=False):
        yield [*names[first:], *names[:first]]


def _rounded(rates: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [round(rate, 2) for rate in each] for name, each in rates.items()}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.engine_race", description=__doc__)
    flags.add_argument("--networks", nargs="+", default=["mobilenet-v2", "mobilenet-v2:4", "wide-resnet-28-2"])
    flags.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    flags.add_argument("--sides", nargs="*", choices=_PEERS, default=list(_PEERS), help="beside ours")
    flags.add_argument("--labeled", type=int, default=64)
    flags.add_argument("--ratio", type=int, default=7, help="unlabeled images for each labeled one")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0, help="of each side in a round, and at least one step")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--threads", type=int, default=available_cores())
    flags.add_argument("--workers", type=int, default=2, help="of each of a peer's two loaders")
    flags.add_argument("--plan", metavar="JSON", help="of our side; measured unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Race every network at every precision and write the record after each."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.device = str(pick_device(options.device))
    with terminable():  # so that SIGTERM ends the sides too, which stand still in sessions of their own
        _race_all(options, arguments)


def _race_all(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    before, races = load_average(), list[dict[str, Any]]()
    for asked, precision in itertools.product(options.networks, options.precisions):
        network, _, halvings = asked.partition(":")  # NAME:4 keeps the last four halvings: a stem of stride 1
        races.append(race(network, int(halvings or architecture(network).halvings), precision, options))
        print(json.dumps(races[-1]), file=sys.stderr, flush=True)
        record = {
            "schema": 1,
            "command": " ".join(["python", "-m", "kdedge_bench.engine_race", *arguments]),
            "date": now(),
            "machine": machine(),
            "kdedge": __version__,
            "torch": torch.__version__,
            "conditions": {
                "rounds": options.rounds,
                "seconds": options.seconds,
                "threads": options.threads,
                "workers_of_each_loader": options.workers,
                "device": options.device,
                "load_average": {"before": before, "after": load_average()},
            },
            "races": races,
        }
        write_json(options.out, record)


if __name__ == "__main__":
    main()
