"""`run.pyz bench`: its arguments, and the record it prints. numpy is imported when it runs, not when it is listed."""

import argparse
from typing import Any, Dict, Tuple

from kdedge_device.clock import EFFORTS, Effort
from kdedge_device.failures import Failure

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only `bench` takes; --bundle, --artifact, --threads, --json and --out every command has."""
    parser.add_argument("model", nargs="?", help="a bundle folder or an .onnx file")
    parser.add_argument("--effort", choices=sorted(EFFORTS), default="quick")
    parser.add_argument("--seconds", type=float, help="instead of the effort's")
    parser.add_argument("--runs", type=int, help="instead of the effort's")
    parser.add_argument("--batch", type=int, default=1)


def run(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    """The document, the text for people, and the exit code."""
    from kdedge_device.bench import bench, open_subject

    path = options.model or options.bundle
    if path is None:
        raise Failure("Nothing to measure was named; give a bundle folder or an .onnx file.")
    effort, name = EFFORTS[options.effort], options.effort
    if options.seconds is not None or options.runs is not None:
        seconds = effort.seconds if options.seconds is None else options.seconds
        runs = effort.runs if options.runs is None else options.runs
        if runs < 1 or seconds < 0:
            raise Failure(f"{runs} runs and {seconds} seconds were asked for; at least 1 run is needed.")
        effort, name = Effort(seconds, runs, min(effort.warm_up_seconds, seconds)), "custom"
    document = bench(open_subject(path, options.artifact), effort, name, options.threads, options.batch)
    lines = []
    for part, summary in document["latency_ms"].items():
        if summary is not None:
            lines.append("{:11} p50 {p50:.3f} ms  p90 {p90:.3f} ms  {count} runs".format(part, **summary))
    return document, "\n".join(lines), 0
