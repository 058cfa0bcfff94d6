"""Latency of one model in this process: computing alone, with copies, and all the way from an encoded image to logits.

One query is in flight. One process measures one artifact: two sessions in one process share its thread pool and caches
and spoil each other.
"""

import os
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from kdedge_device.bench_subject import Pool, Runner, Subject, encoded, input_pool, open_subject, runner_of
from kdedge_device.clock import (
    EFFORTS,
    Effort,
    Timed,
    collect,
    early_stopping_p90,
    quantiles,
    stopwatch,
    summarize,
    warm_up,
)
from kdedge_device.evaluate import input_of
from kdedge_device.failures import Failure
from kdedge_device.manifest import sha256_file
from kdedge_device.record import load_average, now, record
from kdedge_device.trt_launch import PLAIN, Access
from kdedge_device.trt_runner import TrtRunner
from kdedge_device.watch import IDLE_S, Watch

__all__ = ["Begun", "Measured", "Ran", "bench", "measure", "open_subject", "ran_on", "told", "watched"]

_SHORTEST_FOR_ENERGY_S = 1.0  # a rail is read some 20 times a second


class Measured(NamedTuple):
    """The record, and every time behind it: nanoseconds by part, None for a part that was not measured."""

    record: Dict[str, Any]
    times_ns: Dict[str, Optional[List[int]]]


def bench(
    subject: Subject,
    effort: Effort,
    effort_name: str,
    threads: int = 1,
    batch: int = 1,
    access: Access = PLAIN,
    root: str = "/",
) -> Dict[str, Any]:
    """The record of `subject`. End to end is null without Pillow or without the images of a bundle."""
    return measure(subject, effort, effort_name, threads, batch, access, root).record


def measure(
    subject: Subject,
    effort: Effort,
    effort_name: str,
    threads: int = 1,
    batch: int = 1,
    access: Access = PLAIN,
    root: str = "/",
    idle_s: float = IDLE_S,
) -> Measured:
    """`root` is where the machine's state is read from; its power at rest is measured for `idle_s` before all else.

    The part that is one query as a program makes it (with copies, where there are any) gets all of the effort, and
    energy, clocks and the verdict are of it; the others get at most the standard one.
    """
    if batch < 1:
        raise Failure(f"A batch of {batch} was asked for; at least 1 is needed.")
    begun = Begun(now(), load_average(), effort_name)
    times: Dict[str, Optional[List[int]]] = dict.fromkeys(("compute", "with_copies", "end_to_end"))
    with runner_of(subject, threads, access) as runner:
        _refuse_padding(runner, batch)
        pool = input_pool(subject, runner, batch)
        parts = _parts(subject, runner, pool, batch)
        headline = "with_copies" if "with_copies" in parts else "compute"
        with watched(runner, effort, root, idle_s) as watch:
            for part, timed in parts.items():
                if part == headline:
                    warm = warm_up(timed, effort)
                    watch.mark_start()
                    times[part] = collect(timed, effort)
                    watch.mark_end()
                else:
                    warm_up(timed, _capped(effort))
                    times[part] = collect(timed, _capped(effort))
        ran = ran_on(subject, runner, pool, threads, batch)
    queries = times[headline] or []
    more = {
        "mode": "single stream",
        "headline": headline,
        "warm_up": warm._asdict(),
        "end_to_end_from": "PNG bytes in memory, at the input's size" if times["end_to_end"] else None,
    }
    document = told(begun, ran, watch, summarize(queries), batch * len(queries), sum(queries) / 1e9, more)
    document["latency_ms"] = {part: None if each is None else summarize(each) for part, each in times.items()}
    document["quantiles_ms"] = {part: None if each is None else quantiles(each) for part, each in times.items()}
    document["early_stopping_p90_ms"] = early_stopping_p90(queries)
    return Measured(document, times)


class Begun(NamedTuple):
    """What is noted before anything else."""

    at: str
    load_average: Optional[List[float]]
    effort: str


class Ran(NamedTuple):
    """What is known of a runner while it is open."""

    artifact: Dict[str, Any]
    conditions: Dict[str, Any]
    gpu: Optional[str]
    driver: Optional[str]


def told(
    begun: Begun, ran: Ran, watch: Watch, spread: Dict[str, Any], samples: int, seconds: float, more: Dict[str, Any]
) -> Dict[str, Any]:
    """The record without latencies. `spread` summarizes the times that the verdict is on, of `samples` in `seconds`."""
    verdict = watch.verdict(spread)
    loads = {"before": begun.load_average, "after": load_average()}
    return record(
        artifact=ran.artifact,
        latency_ms={},
        conditions={
            **watch.conditions(),
            **ran.conditions,
            **more,
            "effort": begun.effort,
            "load_average": loads,
        },
        started_at=begun.at,
        unstable=verdict["unstable"],
        throttled=verdict["throttled"],
        stability=verdict,
        energy=watch.energy(samples),
        throughput_ips=samples / seconds,
        gpu=ran.gpu,
        driver=ran.driver,
    )


def watched(runner: Runner, effort: Effort, root: str, idle_s: float) -> Watch:
    return Watch(root, effort.seconds >= _SHORTEST_FOR_ENERGY_S, isinstance(runner, TrtRunner), idle_s)


def _capped(effort: Effort) -> Effort:
    return effort._replace(seconds=min(effort.seconds, EFFORTS["standard"].seconds))


def _refuse_padding(runner: Runner, batch: int) -> None:
    """An engine of a larger batch fills up a smaller one: its time would be that of more images than were asked for."""
    computed = runner.computed(batch) if isinstance(runner, TrtRunner) else batch
    if computed > batch:
        raise Failure(
            f"{runner.model_path} computes {computed} images a call, also for {batch}. Measure it with --batch "
            f"{computed}, or build another: python run.pyz build --batch {batch}"
        )


def _parts(subject: Subject, runner: Runner, pool: Pool, batch: int) -> Dict[str, Timed]:
    """In this order. On a CPU nothing is copied, so that there is no part with copies."""
    inputs = pool.batches
    whole_run = stopwatch(lambda i: runner.run(inputs[i % len(inputs)]))
    parts: Dict[str, Timed] = {}
    if not isinstance(runner, TrtRunner):
        parts["compute"] = whole_run
    else:
        engine = runner
        engine.put(inputs[0])
        parts["compute"] = lambda i: engine.compute_ns()
        parts["with_copies"] = whole_run
    files = encoded(subject) if batch == 1 else []
    if files:
        parts["end_to_end"] = stopwatch(lambda i: _whole(subject, runner, files[i % len(files)]))
    return parts


def _whole(subject: Subject, runner: Runner, file: bytes) -> "np.ndarray[Any, Any]":
    assert subject.preprocess is not None
    return runner.run(input_of(runner, subject.preprocess, subject.preprocess.decode(file)[None]))


def ran_on(subject: Subject, runner: Runner, pool: Pool, threads: int, batch: int) -> Ran:
    """Null for what does not apply. Of an engine the precision is in its side file; a bare ONNX file does not say."""
    artifact: Dict[str, Any] = {
        "name": subject.name,
        "file": os.path.basename(subject.model_path),
        "sha256": sha256_file(subject.model_path),
        "bytes": os.path.getsize(subject.model_path),
        "precision": subject.precision,
        "runtime": runner.runtime,
        "version": runner.version,
    }
    conditions: Dict[str, Any] = {
        "threads": None,
        "batch": batch,
        "input_shape": list(pool.batches[0].shape),
        "input_name": None,
        "input_declared": runner.input_shape,
        "inputs": pool.source,
        "input_samples": pool.samples,
        "cuda": None,
        "buffers": None,
        "cuda_graph": None,
        "cuda_graph_why_not": None,
        "timed_by": {"compute": "the host's clock", "with_copies": None},
    }
    if not isinstance(runner, TrtRunner):
        return Ran(artifact, {**conditions, "threads": threads}, None, None)
    timed_by = {"compute": "CUDA events", "with_copies": "the host's clock, from array to array"}
    artifact["precision"] = subject.precision or runner.precision
    artifact["onnx_sha256"] = runner.side["fingerprint"].get("onnx_sha256")  # by which a bundle knows its engines
    gpu = runner.here.gpu
    return Ran(artifact, {**conditions, **runner.conditions(), "timed_by": timed_by}, gpu.name, gpu.driver)
