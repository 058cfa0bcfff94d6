"""`kdedge export`, `bench`, `report` and `compare`: what happens to a finished run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdedge.cli_common import Interrupted, Reply, columns, command_output, finished_run, note
from kdedge.errors import DeviceError, ExportError, KdedgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdedge.runs import Run
    from kdedge_bench.remote import Place
    from kdedge_export.elsewhere import Elsewhere
    from kdedge_export.export import Options

__all__ = ["bench", "compare", "export", "report"]

_PATH = click.Path(path_type=Path)


def _numbers(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Numbers between commas, one a channel."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of numbers such as 0.485,0.456,0.406.") from None


@click.command()
@click.argument("run", metavar="[RUN|MODEL.onnx]", required=False, type=_PATH)
@click.option("--int8", is_flag=True, help="Also write INT8, for ONNX Runtime and for TensorRT.")
@click.option("--fp16", is_flag=True, help="Also write FP16, and let it compete where it runs.")
@click.option("--qat", is_flag=True, help="Train INT8 by the FP32 student's answers; kept where that is better.")
@click.option(
    "--qat-steps", type=click.IntRange(min=1), metavar="N", help="Of --qat; a tenth of the student's unless given."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of --qat: qat.learn_spans=true, qat.teacher=teacher, qat.method.labeled_weight=0.5.",
)
@click.option("--calibrate", metavar="SPEC", help="Calibrate on these images; a MODEL.onnx has no others.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0, max=100),
    default=1.0,
    show_default=True,
    metavar="POINTS",
    help="Ship INT8 only if it is expected to lose at most this much accuracy, in points of 100.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="For the latency of the gate."
)
@click.option("--strict", is_flag=True, help="Exit with 1 where INT8 was asked for and something else is shipped.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="Decide for such a device too (jetson-orin-nano...)."
)
@click.option("--tensorrt", is_flag=True, help="Build TensorRT engines for the GPU of this machine.")
@click.option("--with-eval", type=click.IntRange(min=1), metavar="N", help="Take N labelled test images along.")
@click.option("--uint8-input", is_flag=True, help="The files take pixels, uint8 NHWC, and normalise them.")
@click.option("--mean", callback=_numbers, metavar="R,G,B", help="MODEL.onnx: subtracted from pixel / 255.")
@click.option("--std", callback=_numbers, metavar="R,G,B", help="MODEL.onnx: divided by.")
@click.option("--resize", type=click.Choice(["short-side-crop", "squash"]), help="MODEL.onnx: how images are fitted.")
@click.option("--px", type=click.IntRange(min=4), help="MODEL.onnx: height and width where the file leaves them open.")
@click.option(
    "--on",
    metavar="MACHINE",
    help="Where files are timed, for layers to leave in float and for what ships: ssh://user@board; here unless given.",
)
@click.option("--out", type=_PATH, metavar="DIR", help="The bundle's folder; RUN/bundle or MODEL.bundle unless given.")
@command_output
def export(
    run: Path | None, calibrate: str | None, strict: bool, on: str | None, out: Path | None, **asked: Any
) -> Reply:
    """Write the student as ONNX, and INT8, into a bundle.

    The bundle is complete, says what it is and checks itself. RUN left out is the latest finished run. A float
    MODEL.onnx from elsewhere needs --calibrate SPEC.
    """
    place = _place(on, asked)
    reading = {name: asked.pop(name) for name in ("mean", "std", "resize", "px")}
    if asked["qat_steps"] and not asked["qat"]:
        raise ExportError("--qat-steps says how long --qat trains; give both.")
    if asked["settings"] and not asked["qat"]:
        raise ExportError("--set says how --qat trains; give both.")
    if asked["qat"] and not asked["int8"]:
        raise ExportError("--qat trains the INT8 file; give --int8 too.")
    from kdedge_export.export import Options
    from kdedge_export.targets import load

    targets = tuple(load(name) for name in dict.fromkeys(asked.pop("targets")))
    asked |= {"max_drop_points": asked.pop("max_drop"), "with_eval": asked.pop("with_eval") or 0}
    options = Options(targets=targets, **asked)
    if run is not None and (run.is_file() or run.suffix == ".onnx"):
        if calibrate is None:
            raise ExportError(f"{run} brings no images; name some of its kind with --calibrate SPEC.")
        bundle = out or run.with_suffix(".bundle")
        there = _elsewhere(place, bundle, options)
        document = _exported_file(run, options, calibrate, reading, bundle, there)
    else:
        given = [f"--{name}" for name, value in reading.items() if value is not None]
        if given:
            raise ExportError(f"{', '.join(given)}: a run knows its own preprocessing; these are for a MODEL.onnx.")
        finished = finished_run(run)
        bundle = out or finished.bundle_path
        there = _elsewhere(place, bundle, options)
        document = _exported_run(finished, options, calibrate, bundle, there)
    if place is not None:
        document = _decided_there(document, bundle, place, options)
    missed = strict and options.int8 and document["shipped"] != "int8"
    if missed:
        note(f"--strict: INT8 was asked for, and {document['shipped'].upper()} is shipped.")
    return Reply(document, _export_text(document, bundle), exit_code=int(missed))


def _place(on: str | None, asked: dict[str, Any]) -> "Place | None":
    """Reached before anything is exported: a board that does not answer would be a pity afterwards."""
    if on in (None, "local"):
        return None
    if not (asked["int8"] or asked["fp16"]):
        raise ExportError("--on decides between FP32 and smaller files; ask for one with --int8 or --fp16.")
    from kdedge_bench.remote import Place, reach

    place = Place.parse(str(on))
    reach(place, note)
    return place


def _elsewhere(place: "Place | None", bundle: Path, options: "Options") -> "Elsewhere | None":
    """What that machine runs, asked before anything is exported; None where it has no say in the search."""
    if place is None:
        return None
    from kdedge_bench.gate_on import elsewhere
    from kdedge_bench.remote import run_remote

    def run(folder: Path, arguments: "Sequence[str]", keep: bool) -> dict[str, Any]:
        # What is kept lies there where the bundle will: FP32 travels once.
        return run_remote(place, folder, arguments, say=note, clean=not keep, known_as=bundle if keep else None)

    there = elsewhere(run, options.targets, options.threads, say=note)
    if there is None and not options.int8:
        raise ExportError(f"{place.name} has TensorRT, for which files are compared with --int8 only; give that, too.")
    return there


def _decided_there(document: dict[str, Any], bundle: Path, place: "Place", options: "Options") -> dict[str, Any]:
    """The document with that machine's decision and times on top; this machine's stay among the targets."""
    from kdedge_bench.gate_on import decide_there
    from kdedge_bench.remote import run_remote

    def run(arguments: "Sequence[str]") -> dict[str, Any]:
        return run_remote(place, bundle, arguments, say=note)

    try:
        name, entry = decide_there(bundle, run, options.targets, options.threads, say=note)
    except KdedgeError:
        note(f"The bundle is written: {bundle}. Only what ships on {place.name} is undecided.")
        raise
    top = {key: entry[key] for key in ("shipped", "speedup", "drop_points", "why")}
    artifacts = {
        artifact: {key: value for key, value in each.items() if not key.startswith("latency_ms_")}
        for artifact, each in document["artifacts"].items()
    }
    for artifact, times in entry["latency"].items():
        artifacts[artifact] |= {f"latency_ms_{key}": times["compute_ms"][key] for key in ("p50", "p90")}
    targets = {**document["targets"], name: entry}
    return {**document, **top, "artifacts": artifacts, "targets": targets}


def _exported_run(
    run: "Run", options: "Options", calibrate: str | None, bundle: Path, there: "Elsewhere | None"
) -> dict[str, Any]:
    from kdedge_export.export import export_run

    return export_run(run, options, out=bundle, calibrate=calibrate, there=there, display=note)


def _exported_file(
    path: Path, options: "Options", spec: str, reading: dict[str, Any], bundle: Path, there: "Elsewhere | None"
) -> dict[str, Any]:
    from kdedge_export.export import export_file
    from kdedge_export.float_form.foreign import Reading

    return export_file(path, spec, options, reading=Reading(**reading), out=bundle, there=there, display=note)


def _export_text(document: dict[str, Any], bundle: Path) -> str:
    proved = document["proof"]["files"]
    rows = [("", "accuracy", "agrees with FP32", "bytes", "p50")]
    for name, artifact in document["artifacts"].items():
        accuracy, latency = artifact.get("accuracy"), artifact.get("latency_ms_p50")
        differ = proved[name]["agreement"]["disagreement_points"]
        rows.append(
            (
                name,
                "-" if accuracy is None else f"{accuracy:.4f}",
                "-" if name == "fp32" or differ is None else f"{100 - differ:.1f} %",
                f"{artifact['bytes']:,}",
                "-" if latency is None else f"{latency:.3f} ms",
            )
        )
    seen = f"Agreement: on {document['proof']['images']} images"
    emulated = "; trt files are emulated, their engines are built on the device" if "trt" in proved else ""
    named = [
        each["why"] for each in document["targets"].values() if "target" in each and each["why"] != document["why"]
    ]
    return "\n".join([columns(rows), f"{seen}{emulated}.", "", document["why"], *named, f"Bundle: {bundle}"])


@click.command()
@click.argument("paths", metavar="[RUN|BUNDLE|MODEL.onnx|ENGINE]...", nargs=-1, type=_PATH)
@click.option(
    "--on", multiple=True, default=("local",), show_default=True, metavar="MACHINE",
    help="Where to measure: local, or ssh://user@board[:port].",
)  # fmt: skip
@click.option("--suite", metavar="NAME|FILE.yaml", help="A named set of measurements: quick, edge-224, or your own.")
@click.option(
    "--effort",
    type=click.Choice(["quick", "standard", "mlperf"]),
    show_default="standard, or what the suite says",
    help="quick: 2 s and 1,000 runs; standard: 60 s and 2,000; mlperf: 600 s, unbroken.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    help="Of each file, in turn, that share the effort; 6, or 1 of mlperf, unless given.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), show_default="1, or what the suite says", help="Inside an operator."
)
@click.option("--out", type=_PATH, metavar="DIR", help="Where the records go; RUN/bench unless given.")
@command_output
def bench(
    paths: tuple[Path, ...],
    on: tuple[str, ...],
    suite: str | None,
    effort: str | None,
    threads: int | None,
    **asked: Any,
) -> Reply:
    """Measure the latency of each artifact, here or on a board.

    One process for each measurement, the files in turn. Nothing named is the latest finished run. A board needs ssh,
    python3, numpy, and TensorRT or ONNX Runtime. A suite measures many combinations in one session and tells ratios;
    paths take the place of its models.
    """
    if suite is not None:
        return _suite(suite, paths, on, effort=effort, threads=threads, **asked)
    chosen = list(paths) or [finished_run(None).path]
    from kdedge_bench import bench as measure
    from kdedge_bench.latency import BoardsFailed

    try:
        records = measure(
            chosen, effort or "standard", asked["out"], threads=threads or 1, on=on, repeats=asked["repeats"], say=note
        )
    except BoardsFailed as failed:
        note(str(failed))
        return Reply(failed.records, _bench_text(failed.records), exit_code=failed.exit_code)
    return Reply(records, _bench_text(records))


def _suite(name: str, paths: tuple[Path, ...], on: tuple[str, ...], **asked: Any) -> Reply:
    """Where a round is stopped by Ctrl-C, those before it are kept, and it is said how to go on."""
    from kdedge_bench.suite_run import Stopped, run_suite

    machines = list(dict.fromkeys(on))
    if len(machines) > 1:
        raise DeviceError(f"A suite is measured on one machine, and {len(machines)} were named; leave one --on.")
    from kdedge_bench.remote_place import Place

    place = None if machines[0] == "local" else Place.parse(machines[0])
    try:
        found = run_suite(name, paths, on=place, say=note, **asked)
    except Stopped as stopped:
        raise Interrupted(str(stopped)) from None
    return Reply(found.document, found.text, exit_code=found.exit_code)


def _bench_text(records: list[dict[str, Any]]) -> str:
    """A line a record, with the machine where there is more than one and energy where it was measured."""
    from kdedge_bench.records import flags, latency, machine_name

    several = len({machine_name(record) for record in records}) > 1
    energetic = any(record.get("energy_mj_per_inference") is not None for record in records)
    rows: list[tuple[str, ...]] = [
        (
            "",
            *["machine"] * several,
            "compute p50",
            "p90",
            "end to end p50",
            "p90",
            *["energy"] * energetic,
            "threads",
            "",
        )
    ]
    for record in records:
        artifact, energy = record["artifact"], record.get("energy_mj_per_inference")
        times = [latency(record, part).get(key) for part in ("compute", "end_to_end") for key in ("p50", "p90")]
        name = str(artifact.get("name") or artifact.get("precision"))
        told = ["-" if energy is None else f"{energy:.3g} mJ"] * energetic
        shown = ["-" if time is None else f"{time:.3f} ms" for time in times]
        rows.append(
            (
                name,
                *[machine_name(record)] * several,
                *shown,
                *told,
                str(record["conditions"].get("threads") or "-"),
                ", ".join(flags(record)),
            )
        )
    whys = [
        f"{row[0]} is not stable: {why}"
        for row, record in zip(rows[1:], records, strict=True)
        for why in (record.get("stability") or {}).get("why", ())
    ]
    return "\n".join([columns(rows), *whys])


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=_PATH)
@click.option("--out", type=_PATH, metavar="FILE.html", help="The page; report.html in the (first) run unless given.")
@click.option(
    "--tables", type=_PATH, metavar="DIR", help="Write the same numbers there: report.json, report.md and CSV files."
)
@command_output
def report(runs: tuple[Path, ...], out: Path | None, tables: Path | None) -> Reply:
    """Write one self-contained page on a run, or on several side by side.

    Its table is printed too. RUN left out is the latest finished run.
    """
    chosen: list[Run] = [finished_run(run) for run in runs] or [finished_run(None)]
    from kdedge_bench import as_text, summary
    from kdedge_bench import report as write_report

    page = write_report(chosen, out or chosen[0].report_path, tables=tables)
    found = [summary(run) for run in chosen]
    document = {"report": str(page), "tables": tables and str(tables), "runs": [each.to_json() for each in found]}
    told = f"\nReport: {page}" + (f"\nTables: {tables}" if tables else "")
    return Reply(document, "\n".join(map(as_text, found)) + told)


@click.command()
@click.argument("base", type=_PATH)
@click.argument("new", type=_PATH)
@click.option(
    "--max-drop", type=click.FloatRange(min=0), metavar="POINTS", help="Fail where NEW loses more points of accuracy."
)
@click.option(
    "--max-slower", type=click.FloatRange(min=0), metavar="FRACTION", help="Fail where p90 grows by more than this."
)
@click.option("--artifact", metavar="NAME", help="Compare this one of both, not what each ships.")
@command_output
def compare(base: Path, new: Path, max_drop: float | None, max_slower: float | None, artifact: str | None) -> Reply:
    """Check that a run is as accurate and fast as another.

    BASE and NEW are runs, bundles or folders of records. Exits with 1 where the 95 % interval of what NEW loses lies
    wholly beyond a budget. Measure both in turn: kdedge bench BASE NEW.
    """
    from kdedge_bench import CompareFailed
    from kdedge_bench import compare as judge

    try:
        document = judge(base, new, max_drop, max_slower, artifact)
    except CompareFailed as failed:
        note(str(failed))
        return Reply(failed.document, failed.document["text"], exit_code=failed.exit_code)
    return Reply(document, document["text"])
