"""`python run.pyz info | check | build | bench | eval | predict`, also `python -m kdedge_device ...`.

With --json exactly one JSON document goes to standard output, also when it fails.

Exit codes: 0 done; 1 ran, and a check failed; 2 something the user can fix; 3 wrong version; 4 wrong device;
5 corrupt or altered; 6 no driver or runtime.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, TextIO, Tuple

from kdedge_device import bench_command, board
from kdedge_device.failures import Failure, RuntimeFailure

__all__ = ["SCHEMA", "main"]

SCHEMA = 1  # of every document that has none of its own
_NO_READER = 128 + int(signal.SIGPIPE)  # as a shell tells it; `run.pyz check | head -1` is no failed check
_BUG = 70  # as sysexits.h has it; Python's own 1 would say that a check failed
_Answer = Tuple[Dict[str, Any], str, int]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command and returns the exit code; --help ends the process by itself."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # Python flushes both at its end, and would tell of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return _NO_READER
    return code


def _run(given: List[str]) -> int:
    options, stream = argparse.Namespace(json="--json" in given, out=None), sys.stdout
    try:
        options = _parser().parse_args(given)
        if options.out:
            _refuse_place(options.out)
        document, text, code = options.command(options)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        (document, text, code), stream = _told(error), sys.stderr
    else:
        document, code = _kept(options.out, document, code)
    if options.json:
        print(json.dumps(_numbered(document), indent=1, allow_nan=False))
    else:
        _print(text, stream)
    return int(code)


def _kept(path: Optional[str], document: Dict[str, Any], code: int) -> Tuple[Dict[str, Any], int]:
    """`document` in the file as well. Where that fails, it is still printed: it took minutes."""
    if not path:
        return document, code
    try:
        _write(path, _numbered(document))
    except Failure as error:
        told, text, code = _told(error)
        _print(text, sys.stderr)
        return {**document, **told}, code
    return document, code


def _numbered(document: Dict[str, Any]) -> Dict[str, Any]:
    return {"schema": SCHEMA, **document}


def _told(error: Exception) -> _Answer:
    """Whatever is no Failure is a bug of this program: told with its traceback, and not with a code of the contract."""
    if isinstance(error, MemoryError):
        error = Failure("This machine has not enough free memory for it. Close other programs, or take fewer images.")
    if isinstance(error, Failure):
        sentence, code = str(error), error.exit_code
    else:
        traceback.print_exc(file=sys.stderr)
        sentence, code = f"This is a bug in kdedge, please report it: {type(error).__name__}: {error}", _BUG
    return {"error": sentence, "class": type(error).__name__, "exit_code": code}, f"Error: {sentence}", code


def _print(text: str, stream: TextIO) -> None:
    """File and class names come from anywhere: nothing in them moves the cursor, and none stops the program."""
    shown = "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
    encoding = stream.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)


class _Parser(argparse.ArgumentParser):
    """Tells a wrong argument as every other failure is told, and guesses none: --js is not --json."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message[:1].upper()}{message[1:]}. Try: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.pyz", description="Inspect, check, time and use a kdedge bundle.")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    here = os.path.dirname(os.path.abspath(sys.argv[0])) if sys.argv[0].endswith(".pyz") else None
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="exactly one JSON document on standard output")
    shared.add_argument("--out", metavar="FILE", help="also write the JSON document to FILE")
    shared.add_argument("--bundle", default=here, help="bundle folder (default: where run.pyz lies)")
    shared.add_argument("--artifact", help="fp32, int8, ... (default: the shipped one; of build: trt)")
    shared.add_argument("--threads", type=int, default=1, help="threads inside an operator (default 1)")
    runtime = _Parser(add_help=False)
    runtime.add_argument(
        "--runtime",
        choices=("onnxruntime", "tensorrt", "openvino"),
        help="tensorrt: an engine that `build` made, by precision (default: what the artifact is for)",
    )

    def add(name: str, command: Callable[[argparse.Namespace], _Answer], text: str, *more: Any) -> Any:
        child = commands.add_parser(name, parents=[shared, *more], help=text, description=text)
        child.set_defaults(command=command if command is _info else lambda options: _on_this_board(command, options))
        return child

    add("info", _info, "what this machine is and can run, and what the bundle holds")
    add("check", _check, "hash every file and compare the logits of the golden images")
    build = add("build", _build, "a TensorRT engine for this machine's GPU, kept for as long as it fits")
    build.add_argument("model", nargs="?", metavar="BUNDLE", help="a bundle folder (default: --bundle)")
    build.add_argument("--batch", type=int, default=1, help="images a call (default 1)")
    build.add_argument("--workspace-mib", type=int, default=512, help="what a kernel may use (default 512)")
    build.add_argument("--engines", metavar="FOLDER", help="where engines are kept (default: in the bundle)")
    build.add_argument("--rebuild", action="store_true", help="also where an engine that fits is there")
    bench_command.add_arguments(add("bench", bench_command.run, "latency of one artifact: the record as JSON"))
    evaluate = add("eval", _eval, "accuracy on labelled images, in all and class by class", runtime)
    evaluate.add_argument(
        "--data", help="a folder of class folders, or an .npz with images and labels (default: the bundle's eval.npz)"
    )
    predict = add("predict", _predict, "classes of images", runtime)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="a JPEG, PNG, ..., .npy, or an .npz with images")
    return parser


def _on_this_board(command: Callable[[argparse.Namespace], _Answer], options: argparse.Namespace) -> _Answer:
    """What every command but `info` needs, asked first: a board that is not too old, and numpy."""
    board.refuse_unsupported(board.identify())
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise RuntimeFailure(f"numpy cannot be loaded ({error}). Install it with: pip install numpy") from None
    return command(options)


def _bundle(options: argparse.Namespace) -> Any:
    from kdedge_device.manifest import Bundle

    if options.bundle is None:
        raise Failure("No bundle was named; give one with --bundle FOLDER.")
    return Bundle(options.bundle)


def _info(options: argparse.Namespace) -> _Answer:
    from kdedge_device.info import info

    return info(options.bundle)


def _check(options: argparse.Namespace) -> _Answer:
    from kdedge_device.check import check

    document = check(_bundle(options), options.threads)
    lines = ["{} files unaltered".format(len(document["files"]))]
    lines.extend(f"{file}: {state}" for file, state in document["engines"].items())
    for name, each in document["golden"].items():
        lines.append(
            "{}: differs by {max_abs_difference:.3g}, tolerated {tolerance:.3g}, same class {same_class:.0%}".format(
                name, **each
            )
        )
    for name, why in document["not_run"].items():
        lines.append(f"{name}: not run here, {why}")
    if not document["golden"]:
        lines.append(
            "No answer was compared, since nothing of the bundle can be run here yet. Where TensorRT is, build an "
            "engine first: python run.pyz build"
        )
    return document, "\n".join(lines), 0


def _build(options: argparse.Namespace) -> _Answer:
    from kdedge_device.trt_build import BuildOptions
    from kdedge_device.trt_bundle import ENGINES, build_for_bundle

    options.bundle = options.model or options.bundle
    wanted = options.artifact or "trt"
    if wanted not in ENGINES:
        raise Failure(f"There is no engine '{wanted}'; --artifact takes one of {', '.join(ENGINES)}.")
    choice = BuildOptions(ENGINES[wanted], (options.batch,) * 3, options.workspace_mib)
    document = build_for_bundle(_bundle(options), choice, options.engines, options.rebuild)
    report = document["side"]["report"]
    layers = report.get("layers", {})
    told = ", ".join(f"{layers.get(kind)} {kind}" for kind in ("int8", "fp16", "fp32", "other", "reformats"))
    how = "kept" if document["reused"] else "built in {} s".format(report.get("seconds"))
    lines = ["{} ({})".format(document["engine"], how), f"layers: {told}"]
    if choice.precision == "int8" and layers.get("int8") == 0:
        lines.append("Not one layer runs in INT8: an FP16 engine (--artifact fp16) is as fast.")
    return document, "\n".join(lines), 0


def _eval(options: argparse.Namespace) -> _Answer:
    from kdedge_device.evaluate import evaluate

    document = evaluate(_bundle(options), options.data, options.artifact, options.threads, options.runtime)
    lines = ["{artifact}: accuracy {accuracy:.4f} ({correct} of {images})".format(**document)]
    for name, (correct, images) in document["per_class"].items():
        lines.append("  {:20} {}".format(name, f"{correct / images:.4f} ({correct} of {images})" if images else "none"))
    lines.extend("skipped {path}: {error}".format(**each) for each in document["unreadable"])
    return document, "\n".join(lines), 0


def _predict(options: argparse.Namespace) -> _Answer:
    from kdedge_device.evaluate import predict

    answers = predict(_bundle(options), options.images, options.artifact, options.threads, options.runtime)
    lines: List[str] = []
    for each in answers:
        lines.append(
            "{path}: cannot be read, {error}".format(**each)
            if "error" in each
            else "{path}: {class} {probability:.1%}".format(**each)
        )
    return {"predictions": answers}, "\n".join(lines), 2 if any("error" in each for each in answers) else 0


def _refuse_place(path: str) -> None:
    """Before anything is done: where `path` cannot be written, or is a device that a file would take the place of."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        reason = "it is no plain file"
    elif not os.path.isdir(folder):
        reason = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"the folder {folder} cannot be written"
    else:
        return
    raise Failure(f"Cannot write {path}: {reason}. Choose another place with --out.")


def _write(path: str, document: Dict[str, Any]) -> None:
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # a link of that name would lead elsewhere
            json.dump(document, file, indent=1, allow_nan=False)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise Failure(f"Cannot write {path}: {error.strerror}. Choose another place with --out.") from None


if __name__ == "__main__":
    sys.exit(main())
