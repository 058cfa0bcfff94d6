"""Throughput: batch after batch, without a wait between two, and no latency told. MLPerf's offline scenario in kind."""

import time
from typing import Any, Dict

from kdedge_device.bench import Begun, ran_on, told, watched
from kdedge_device.bench_subject import Runner, Subject, input_pool, runner_of
from kdedge_device.clock import Effort, collect, stopwatch, summarize, warm_up
from kdedge_device.failures import Failure
from kdedge_device.record import load_average, now
from kdedge_device.trt_launch import PLAIN, Access
from kdedge_device.trt_runner import TrtRunner
from kdedge_device.watch import IDLE_S

__all__ = ["BATCH", "MLPERF_SAMPLES", "offline"]

BATCH = 16  # where neither the call nor the file says
MLPERF_SAMPLES = 24576  # of an offline run in MLPerf


def offline(
    subject: Subject,
    effort: Effort,
    effort_name: str,
    threads: int = 1,
    batch: int = 0,
    access: Access = PLAIN,
    root: str = "/",
    idle_s: float = IDLE_S,
) -> Dict[str, Any]:
    """The record, with throughput_ips and no latency. `batch` 0: the one the file is made for, else BATCH.

    The effort's runs are images here.
    """
    begun = Begun(now(), load_average(), effort_name)
    with runner_of(subject, threads, access) as runner:
        batch = batch or _own_batch(runner)
        if isinstance(runner, TrtRunner) and runner.computed(batch) != batch:
            raise Failure(f"{runner.model_path} computes {runner.computed(batch)} images a call, not {batch}.")
        pool = input_pool(subject, runner, batch)
        timed = stopwatch(lambda i: runner.run(pool.batches[i % len(pool.batches)]))
        by_batch = effort._replace(runs=-(-effort.runs // batch))
        with watched(runner, effort, root, idle_s) as watch:
            warm = warm_up(timed, by_batch)
            watch.mark_start()
            start = time.perf_counter_ns()
            times = collect(timed, by_batch)
            seconds = (time.perf_counter_ns() - start) / 1e9
            watch.mark_end()
        ran = ran_on(subject, runner, pool, threads, batch)
    samples, spread = batch * len(times), summarize(times)
    more = {
        "mode": "offline",
        "headline": "throughput_ips",
        "warm_up": warm._asdict(),
        "offline": {"samples": samples, "seconds": seconds, "batch_ms": spread},
    }
    document = told(begun, ran, watch, spread, samples, seconds, more)
    document["early_stopping_p90_ms"] = None
    return document


def _own_batch(runner: Runner) -> int:
    if isinstance(runner, TrtRunner):
        return runner.largest_batch
    return int(runner.input_shape[0]) if isinstance(runner.input_shape[0], int) else BATCH
