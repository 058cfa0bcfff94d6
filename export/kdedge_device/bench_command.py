"""`run.pyz bench`: its arguments, and the record it prints. numpy is imported when it runs, not when it is listed."""

import argparse
import contextlib
import json
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from kdedge_device.alone import alone
from kdedge_device.clock import EFFORTS, ROUNDS, Effort, told_effort, usual_rounds
from kdedge_device.cuda_access import WAYS, chosen_way
from kdedge_device.failures import Failure
from kdedge_device.record import now
from kdedge_device.trt_launch import BUFFERS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only `bench` takes; --bundle, --artifact, --threads, --json and --out every command has."""
    add = parser.add_argument
    add("model", nargs="?", help="a bundle folder, or an .onnx or .engine file; --artifact all: the bundle's, in turn")
    add("--effort", choices=sorted(EFFORTS), default="quick", help="quick 2 s, standard 60 s, mlperf 600 s, unbroken")
    add("--seconds", type=float, help="instead of the effort's; of each round")
    add("--runs", type=int, help="instead of the effort's; of each round")
    add("--warm-up", type=float, metavar="SECONDS", help="instead of the effort's")
    add("--batch", type=int, help="images a call (default 1; with --offline what the file is for, else 16)")
    add("--rounds", type=int, help=f"processes that share the effort (default 1; of all {ROUNDS}, but 1 of mlperf)")
    add("--offline", action="store_true", help="throughput of batch after batch instead of latency")
    add(
        "--runtime",
        choices=("auto", "tensorrt", "openvino"),
        default="auto",
        help="tensorrt: --artifact names an engine",
    )
    add("--engines", metavar="FOLDER", help="where engines are looked for before the bundle")
    add("--build", action="store_true", help="with --artifact all: build the engines that are missing first")
    add("--workspace-mib", type=int, default=None, help="of --build: what a kernel may use (default 512)")
    add("--cuda", choices=WAYS, help="how CUDA is reached (default ctypes, or what KDEDGE_CUDA says)")
    add("--buffers", choices=BUFFERS, default="auto", help="auto: zero-copy where GPU and CPU share memory")
    add("--no-cuda-graph", action="store_true", help="launch an engine call by call")
    add("--set-clocks", action="store_true", help="hold the clocks of a Jetson meanwhile (root); given back after")
    add("--power-mode", metavar="NAME", help="with --set-clocks: measure in this power mode")
    add("--trtexec", metavar="PATH", help="cross-check an engine with this trtexec; 'off' for never")
    # For the processes of rounds: where to note every time, and that power at rest is known from an earlier round.
    add("--times", metavar="FILE", help=argparse.SUPPRESS)
    add("--idle", type=float, metavar="SECONDS", help=argparse.SUPPRESS)


class _Work(NamedTuple):
    """What is to be measured, and how hard: `effort` is of one round."""

    path: str
    effort: Effort
    name: str
    rounds: int


def run(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    """The document, the text for people, and the exit code."""
    path = options.model or options.bundle
    if path is None:
        raise Failure("Nothing to measure was named; give a bundle folder or an .onnx file.")
    if options.power_mode and not options.set_clocks:
        raise Failure("--power-mode changes the board's power mode, which needs --set-clocks, too.")
    chosen_way(options.cuda)
    _refuse_trtexec(options)
    every = options.artifact == "all"
    if options.build and not every:
        raise Failure("--build goes with --artifact all; build one engine with: python run.pyz build")
    if options.workspace_mib is not None and not options.build:
        raise Failure("--workspace-mib is of engines that are built, which needs --build, too.")
    rounds = options.rounds if options.rounds is not None else usual_rounds(options.effort) if every else 1
    if rounds < 1:
        raise Failure(f"{rounds} rounds were asked for; at least 1 is needed.")
    work = _Work(path, *_effort(options, rounds), rounds)
    with alone(_say), _clocks(options):
        if every:
            return _all(options, work)
        return _rounds(options, work) if rounds > 1 else _one(options, work)


def _refuse_trtexec(options: argparse.Namespace) -> None:
    """Before anything is measured, not after."""
    if options.trtexec is not None:
        from kdedge_device.trt_exec import find_trtexec

        find_trtexec(options.trtexec)


def _effort(options: argparse.Namespace, rounds: int) -> Tuple[Effort, str]:
    """What is asked for explicitly is of each round; an effort is shared among them."""
    effort, name = EFFORTS[options.effort].split(rounds), told_effort(options.effort, rounds)
    if options.offline and options.effort == "mlperf":
        from kdedge_device.bench_offline import MLPERF_SAMPLES

        effort = effort._replace(runs=-(-MLPERF_SAMPLES // rounds))
    if options.seconds is not None or options.runs is not None:
        seconds = effort.seconds if options.seconds is None else options.seconds
        runs = effort.runs if options.runs is None else options.runs
        if runs < 1 or not 0 <= seconds < 1e6:
            raise Failure(f"{runs} runs and {seconds} seconds were asked for; at least 1 run is needed.")
        effort, name = Effort(seconds, runs, min(effort.warm_up_seconds, seconds)), "custom"
    if options.warm_up is not None:
        if not 0 <= options.warm_up < 1e6:
            raise Failure(f"A warm-up of {options.warm_up} seconds was asked for; 0 or more is needed.")
        effort = effort._replace(warm_up_seconds=options.warm_up)
    return effort, name


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def _clocks(options: argparse.Namespace) -> Any:
    from kdedge_device.set_clocks import leftover, locked

    if not options.set_clocks:
        if not options.times:
            _say(leftover() or "")
        return contextlib.nullcontext()
    return locked("/", _say, options.power_mode)


def _one(options: argparse.Namespace, work: _Work) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.bench import measure
    from kdedge_device.bench_offline import offline
    from kdedge_device.bench_subject import open_subject
    from kdedge_device.trt_launch import Access
    from kdedge_device.watch import IDLE_S

    tensorrt = options.runtime == "tensorrt"
    batch = 1 if options.batch is None and not options.offline else options.batch
    openvino = options.runtime == "openvino"
    subject = open_subject(work.path, options.artifact, batch or 1, tensorrt, options.engines, openvino)
    if options.runtime == "auto" and not subject.model_path.endswith(".engine") and _engines_beside(subject.model_path):
        _say("There are engines, too: --runtime tensorrt measures one of them, --artifact all every one that fits.")
    access = Access(chosen_way(options.cuda), options.buffers, not options.no_cuda_graph)
    idle_s = IDLE_S if options.idle is None else max(0.0, options.idle)
    if options.offline:
        document = offline(subject, work.effort, work.name, options.threads, batch or 0, access, "/", idle_s)
        _cross_check(options, work, document)
        return document, _lines([document]), 0
    done = measure(subject, work.effort, work.name, options.threads, batch, access, "/", idle_s)
    if options.times:  # a round of several: between them another program would heat the machine
        with open(options.times, "w", encoding="utf-8") as file:
            json.dump(done.times_ns, file)
    else:
        _cross_check(options, work, done.record)
    return done.record, _lines([done.record]), 0


def _cross_check(options: argparse.Namespace, work: _Work, record: Dict[str, Any]) -> None:
    """Adds it to the record: null where it is not of an engine, or there is no trtexec."""
    from kdedge_device.trt_exec import cross_check

    folders = [options.engines, work.path if os.path.isdir(work.path) else os.path.dirname(work.path)]
    paths = [os.path.join(folder, record["artifact"]["file"]) for folder in folders if folder is not None]
    path = next((path for path in paths if os.path.isfile(path)), "")
    record["cross_check"] = cross_check(path, record, work.effort, options.trtexec, _say)


def _engines_beside(path: str) -> bool:
    return any(name.endswith(".engine") for name in os.listdir(os.path.dirname(path) or "."))


def _passed_on(options: argparse.Namespace, effort: Effort) -> List[str]:
    """The arguments of one round's process."""
    words = ["--seconds", repr(effort.seconds), "--runs", str(effort.runs), "--warm-up", repr(effort.warm_up_seconds)]
    words += ["--threads", str(options.threads), "--buffers", options.buffers, "--cuda", chosen_way(options.cuda)]
    words += ["--batch", str(options.batch)] if options.batch is not None else []
    words += ["--offline"] if options.offline else []
    return words + (["--no-cuda-graph"] if options.no_cuda_graph else [])


def _rounds(options: argparse.Namespace, work: _Work) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.bench_rounds import Job

    words = [work.path, "--runtime", options.runtime, *_passed_on(options, work.effort)]
    words += ["--artifact", options.artifact] if options.artifact else []
    words += ["--engines", options.engines] if options.engines else []
    name = options.artifact or os.path.basename(os.path.abspath(work.path))
    records, failed, _ = _measured([Job(name, words)], work)
    for error in failed.values():
        raise error
    _cross_check(options, work, records[0])
    return records[0], _lines(records), 0


def _measured(jobs: Sequence[Any], work: _Work) -> Tuple[List[Dict[str, Any]], Dict[str, Failure], str]:
    from kdedge_device.bench_pool import pooled
    from kdedge_device.bench_rounds import Job, Told, in_turn, new_session, one_round

    session, begun = new_session(now()), set()

    def measure(job: Job) -> Told:
        later = ["--idle", "0"] if job.name in begun else []
        begun.add(job.name)
        return one_round(job._replace(arguments=[*job.arguments, *later]))

    told, failed = in_turn(jobs, work.rounds, measure, _say)
    records = [pooled(each, session) for each in told.values()]
    for record in records:
        record["conditions"]["effort"] = work.name
    return records, failed, session


def _all(options: argparse.Namespace, work: _Work) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.bench_all import Wish, field
    from kdedge_device.manifest import Bundle

    if os.path.isfile(work.path):
        raise Failure(f"{work.path} is a file; --artifact all measures those of a bundle folder.")
    bundle = Bundle(work.path)
    batch = options.batch or (0 if options.offline else 1)
    wish = Wish(batch, options.engines, options.build)
    wish = wish if options.workspace_mib is None else wish._replace(workspace_mib=options.workspace_mib)
    jobs, not_run, unbuilt = field(bundle, _passed_on(options, work.effort), wish)
    records, unmeasured, session = _measured(jobs, work)
    failed = {**unbuilt, **unmeasured}
    for record in records:
        _cross_check(options, work, record)
    document = {
        "schema": 1,
        "session": session,
        "records": records,
        "failed": {name: str(error) for name, error in failed.items()},
        "not_run": not_run,
    }
    lines = [f"{name}: failed, {error}" for name, error in failed.items()]
    lines += [f"{name}: not run here, {why}" for name, why in not_run.items()]
    first: Optional[Failure] = next(iter(failed.values()), None)
    code = 0 if records else 6 if first is None else first.exit_code
    return document, "\n".join([_lines(records), *lines]).strip(), code


def _lines(records: Sequence[Dict[str, Any]]) -> str:
    lines = []
    for record in records:
        name = record["artifact"]["name"] or record["artifact"]["file"]
        for part, summary in record["latency_ms"].items():
            if summary is not None:
                words = "{:10} {:11} p90 {p90:.3f} ms  p50 {p50:.3f} ms  {count} runs"
                lines.append(words.format(name, part, **summary))
        if record["conditions"]["mode"] == "offline":
            lines.append("{:10} {:.1f} images a second".format(name, record["throughput_ips"]))
        if record["energy_mj_per_inference"] is not None:
            lines.append("{:10} {:.2f} mJ an inference".format(name, record["energy_mj_per_inference"]))
        if (record["stability"] or {}).get("stable"):
            lines.append(f"{name:10} stable")
        lines += [f"{name:10} not stable: {why}" for why in (record["stability"] or {"why": []})["why"]]
    return "\n".join(lines)
