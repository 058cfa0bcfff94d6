"""`python run.pyz info | check | build | bench | eval | predict`, also `python -m kdedge_device ...`.

With --json exactly one JSON document goes to standard output, also when it fails.

Exit codes: 0 done; 1 ran, and a check failed; 2 something the user can fix; 3 wrong version; 4 wrong device;
5 corrupt or altered; 6 no driver or runtime.
"""

import argparse
import json
import os
import platform
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

from kdedge_device import bench_command
from kdedge_device.failures import Failure

__all__ = ["main"]

_ENGINES = {"trt": "int8", "int8": "int8", "fp16": "fp16", "fp32": "fp32"}  # what --artifact names -> its precision


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command and returns the exit code. argparse itself exits with 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        document, text, code = options.command(options)
        if options.out:
            _write(options.out, document)
    except Failure as error:
        document, text, code = _told(error)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print(text, file=sys.stderr if "error" in document else sys.stdout)
    return int(code)


def _told(error: Failure) -> Tuple[Dict[str, Any], str, int]:
    document = {"error": str(error), "class": type(error).__name__, "exit_code": error.exit_code}
    return document, f"Error: {error}", error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.pyz", description="Inspect, check, time and use a kdedge bundle.")
    commands = parser.add_subparsers(dest="name", required=True)
    here = os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv[0].endswith(".pyz") else None
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="exactly one JSON document on standard output")
    shared.add_argument("--out", metavar="FILE", help="also write the JSON document to FILE")
    shared.add_argument("--bundle", default=here, help="bundle folder (default: where run.pyz lies)")
    shared.add_argument("--artifact", help="fp32, int8, ... (default: the shipped one; of build: trt)")
    shared.add_argument("--threads", type=int, default=1, help="threads inside an operator (default 1)")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        child = commands.add_parser(name, parents=[shared], help=text, description=text)
        child.set_defaults(command=command)
        return child

    add("info", _info, "what the bundle holds, and what this machine can run")
    add("check", _check, "hash every file and compare the logits of the golden images")
    build = add("build", _build, "a TensorRT engine for this machine's GPU, kept for as long as it fits")
    build.add_argument("model", nargs="?", metavar="BUNDLE", help="a bundle folder (default: --bundle)")
    build.add_argument("--batch", type=int, default=1, help="images a call (default 1)")
    build.add_argument("--workspace-mib", type=int, default=512, help="what a kernel may use (default 512)")
    build.add_argument("--engines", metavar="FOLDER", help="where engines are kept (default: in the bundle)")
    build.add_argument("--rebuild", action="store_true", help="also where an engine that fits is there")
    bench_command.add_arguments(add("bench", bench_command.run, "latency of one artifact: the record as JSON"))
    evaluate = add("eval", _eval, "accuracy on labelled images")
    evaluate.add_argument("--data", required=True, help="a folder of class folders, or an .npz with images and labels")
    predict = add("predict", _predict, "classes of images")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    return parser


def _bundle(options: argparse.Namespace) -> Any:
    from kdedge_device.manifest import Bundle

    if options.bundle is None:
        raise Failure("No bundle was named; give one with --bundle FOLDER.")
    return Bundle(options.bundle)


def _info(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    bundle = _bundle(options)
    try:
        import onnxruntime

        runtime = onnxruntime.__version__
    except ImportError:
        runtime = None
    document = {
        "bundle": bundle.path,
        "manifest": bundle.document,
        "python": platform.python_version(),
        "runtimes": {"onnxruntime": runtime},
    }
    lines = ["{}: {} classes, {}".format(bundle.path, len(bundle.classes), ", ".join(bundle.classes))]
    for name, entry in sorted(bundle.artifacts.items()):
        mark = "  (shipped)" if name == bundle.shipped else ""
        lines.append(
            "{:5} {}  {} bytes  test accuracy {}{}".format(
                name, entry["file"], entry["bytes"], entry.get("accuracy"), mark
            )
        )
    lines.append("onnxruntime: {}".format(runtime or "not installed"))
    return document, "\n".join(lines), 0


def _check(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.evaluate import check

    document = check(_bundle(options), options.threads)
    lines = ["{} files unaltered".format(len(document["files"]))]
    for name, each in document["golden"].items():
        lines.append(
            "{}: differs by {max_abs_difference:.3g}, tolerated {tolerance:.3g}, same class {same_class:.0%}".format(
                name, **each
            )
        )
    for name, why in document.get("not_run", {}).items():
        lines.append(f"{name}: not run here, {why}")
    return document, "\n".join(lines), 0


def _build(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.trt_build import BuildOptions
    from kdedge_device.trt_bundle import build_for_bundle

    options.bundle = options.model or options.bundle
    wanted = options.artifact or "trt"
    if wanted not in _ENGINES:
        raise Failure(f"There is no engine '{wanted}'; --artifact takes one of {', '.join(_ENGINES)}.")
    choice = BuildOptions(_ENGINES[wanted], (options.batch,) * 3, options.workspace_mib)
    document = build_for_bundle(_bundle(options), choice, options.engines, options.rebuild)
    report = document["side"]["report"]
    layers = report.get("layers", {})
    told = ", ".join(f"{layers.get(kind)} {kind}" for kind in ("int8", "fp16", "fp32", "other", "reformats"))
    how = "kept" if document["reused"] else "built in {} s".format(report.get("seconds"))
    lines = ["{} ({})".format(document["engine"], how), f"layers: {told}"]
    if choice.precision == "int8" and layers.get("int8") == 0:
        lines.append("Not one layer runs in INT8: an FP16 engine (--artifact fp16) is as fast.")
    return document, "\n".join(lines), 0


def _eval(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.evaluate import evaluate

    document = evaluate(_bundle(options), options.data, options.artifact, options.threads)
    text = "accuracy {accuracy:.4f} ({correct} of {images})".format(**document)
    return document, text + "".join("\nskipped {path}: {error}".format(**each) for each in document["unreadable"]), 0


def _predict(options: argparse.Namespace) -> Tuple[Dict[str, Any], str, int]:
    from kdedge_device.evaluate import predict

    answers = predict(_bundle(options), options.images, options.artifact, options.threads)
    lines: List[str] = []
    for each in answers:
        lines.append(
            "{path}: cannot be read, {error}".format(**each)
            if "error" in each
            else "{path}: {class} {probability:.1%}".format(**each)
        )
    return {"predictions": answers}, "\n".join(lines), 2 if any("error" in each for each in answers) else 0


def _write(path: str, document: Dict[str, Any]) -> None:
    temporary = path + ".part"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror}. Choose another place with --out.") from None


if __name__ == "__main__":
    sys.exit(main())
