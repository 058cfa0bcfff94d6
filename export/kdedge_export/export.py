"""A float model and its images -> a bundle: every file asked for, checked and decided on, test scored at the end.

N images, K classes.
"""

import contextlib
import functools
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import ExportError
from kdedge.predictions import add_predictions
from kdedge.runs import Run, write_json
from kdedge_device.alone import alone
from kdedge_device.board import identify
from kdedge_device.record import now
from kdedge_export.bundle import (
    eval_part,
    golden_tolerance,
    name_engines,
    new_bundle,
    write_eval,
    write_golden,
    write_manifest,
)
from kdedge_export.cpu.cpu_form import trt_form
from kdedge_export.elsewhere import Elsewhere, Trials
from kdedge_export.files import Files, TensorRt, make_tensorrt
from kdedge_export.float_form.foreign import Reading
from kdedge_export.judging.divergence import compare_layers
from kdedge_export.judging.gate import Agreement, Candidate, Decision, agreement, gate_document, judge
from kdedge_export.judging.latency import Race, Speedup, measure_alone, race
from kdedge_export.judging.verify import Proof, collect, prove
from kdedge_export.judging.verify import Run as RunBatch
from kdedge_export.pyz import build_pyz
from kdedge_export.quantize import GateImages, Quantized, Train, quantize
from kdedge_export.stored import store
from kdedge_export.subject import Subject, file_subject, run_subject, some_images
from kdedge_export.targets import Target
from kdedge_export.training.qat import qat_config, require_teacher, run_qat
from kdedge_export.trt.emulate import openvino_emulator
from kdedge_export.trt.engines import build_here, engine_logits, require_tensorrt
from kdedge_export.trt.fp16 import overflowing, write_fp16

__all__ = ["CPU", "TENSORRT", "Options", "export_file", "export_run"]

CPU, TENSORRT = "onnxruntime-cpu", "tensorrt"
TENSORRT_FILES: tuple[tuple[str, Literal["int8", "fp16"]], ...] = (
    ("trt", "int8"),
    ("trt-fp16", "int8"),
    ("fp16", "fp16"),
)
GOLDEN_IMAGES = 8
PROVED_IMAGES = 500  # files for TensorRT are emulated, ten times as slowly as a CPU's file runs
PROVED = "proof.npy"  # these, decoded
LAYER_IMAGES = 4
HALF_IMAGES = 16
Say = Callable[[str], None]
Logits = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Options:
    """What is asked of an export. `max_drop_points`: of 100 gate images. `threads`: of the measured latency.

    `settings`: of QAT, as "qat.learn_spans=true".
    """

    int8: bool = False
    fp16: bool = False
    qat: bool = False
    qat_steps: int | None = None
    settings: tuple[str, ...] = ()
    max_drop_points: float = 1.0
    threads: int = 1
    tensorrt: bool = False
    with_eval: int = 0
    uint8_input: bool = False
    targets: tuple[Target, ...] = ()


def export_run(
    run: Run,
    options: Options,
    *,
    out: Path | None = None,
    calibrate: str | None = None,
    there: Elsewhere | None = None,
    display: Say | None = None,
) -> dict[str, Any]:
    """Write the bundle of a finished run and give the document of `kdedge export --json`.

    `calibrate`: a data SPEC to calibrate on instead of the run's own images. `there`: by its times layers go back to
    float, not by this machine's. `display`: told each step in a sentence. Raises RunError, DataError, ExportError; a
    bundle is complete or absent.
    """
    say = display or (lambda sentence: None)
    if options.qat:
        require_teacher(run, qat_config(options.settings, options.qat_steps))
    subject = run_subject(run, calibrate, say)
    return _Export(subject, options, run.bundle_path if out is None else out, there, say).whole()


def export_file(
    path: Path,
    spec: str,
    options: Options,
    *,
    reading: Reading,
    out: Path | None = None,
    there: Elsewhere | None = None,
    display: Say | None = None,
) -> dict[str, Any]:
    """The same for a float ONNX file that was trained elsewhere, calibrated and judged on the images of `spec`."""
    say = display or (lambda sentence: None)
    if options.qat:
        raise ExportError(f"{path} is an ONNX file, and --qat trains the student of a run. Leave it out.")
    subject = file_subject(path, spec, reading, say)
    return _Export(subject, options, path.with_suffix(".bundle") if out is None else out, there, say).whole()


@final
class _Export:
    """One export. Its steps in the order of `whole`; what a step leaves for later ones is an attribute."""

    def __init__(self, subject: Subject, options: Options, out: Path, there: Elsewhere | None, say: Say) -> None:
        self.subject, self.options, self.out, self.there, self.say = subject, options, out, there, say
        self.preprocess, self.images = subject.preprocess, subject.images
        self.qat = qat_config(options.settings, options.qat_steps)
        self.raced: dict[str, tuple[bytes, Race]] = {}  # by file; the content that was timed
        self.prove: Callable[[Logits], Proof]  # with the logits of more files on the same images

    def whole(self) -> dict[str, Any]:
        """Everything; an interrupted calibration is kept to be gone on with, one that failed is not."""
        self._check_first()
        try:
            document, test = self._bundle()
        except KeyboardInterrupt:
            self._say_what_is_kept()
            raise
        except Exception:
            with contextlib.suppress(OSError):
                self._state_path.unlink(missing_ok=True)
            raise
        self._state_path.unlink(missing_ok=True)
        if self.subject.run is not None:
            self._add_predictions(self.subject.run, test)
        return document

    def _say_what_is_kept(self) -> None:
        """Of an export that was stopped: what the same command goes on with."""
        if self._state_path.exists():
            self.say(f"The same command goes on with the calibration. To begin anew, delete {self._state_path}.")
        run = self.subject.run
        folder = None if run is None else run.path / "qat-checkpoint"
        if folder is not None and any(folder.glob("qat-*.safetensors")):
            self.say(f"The same command goes on with QAT, from {folder}.")

    def _check_first(self) -> None:
        """What would fail at the end fails now, before anything is calibrated or trained."""
        if self.options.tensorrt:
            require_tensorrt()
        if self.options.with_eval:
            eval_part(self.images.test, self.options.with_eval)

    def _bundle(self) -> tuple[dict[str, Any], Logits]:
        with (
            new_bundle(self.out) as folder,
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".kdedge-export-") as scratch,
        ):
            self.folder, self.scratch = folder, Path(scratch)
            self.trials = self._trials()
            self.files = Files(
                folder, self.preprocess, uint8_input=self.options.uint8_input, threads=self.options.threads
            )
            self.files.write("fp32", self.subject.model)
            self.gate = self._gate_images()
            quantized = self._quantized() if self.options.int8 else None
            tensorrt = self._tensorrt_files(quantized) if quantized else None
            self._fp16_file(required=self.options.fp16, wanted=quantized is not None)
            decisions = self._decisions(quantized)
            golden = self._golden()
            # Every choice is made. Only now the test images are looked at, and nothing below changes because of them.
            test = self._test()
            proof = self._proof(quantized, tensorrt)
            gate = self._write_documents(decisions, quantized, tensorrt, proof)
            self._manifest(decisions[0], golden, test, quantized)
            engines = None
            if self.options.tensorrt:
                engines, proof = self._engines(proof)
            return self._document(decisions[0], gate, test, proof, engines), test

    @property
    def _state_path(self) -> Path:
        """Where an interrupted calibration goes on from: beside the bundle, which does not exist before it is whole."""
        return self.out.parent / f".{self.out.name}-calibration.npz"

    def _trials(self) -> Trials | None:
        if self.there is None:
            return None
        return Trials(self.there, self.scratch / "trial", self.preprocess, self.subject.classes, self.say)

    def _gate_images(self) -> GateImages:
        part = self.images.gate
        stored = store(part, self.preprocess, self.scratch / "gate.npy")
        logits = stored.logits(self.subject.model.SerializeToString(), self.options.threads)
        return GateImages(stored, part.labels, logits, self.options.threads)

    def _quantized(self) -> Quantized:
        found = quantize(
            self.subject.model,
            self.preprocess,
            self.subject.calibration,
            self.gate,
            max_drop_points=self.options.max_drop_points,
            speed=self._speed,
            train=self._train() if self.options.qat else None,
            scratch=self.scratch,
            state=self._state_path,
            say=self.say,
            timed_on=self.there.name if self.there else "this machine",
        )
        self.files.write("int8", found.model)
        self.gate_int8 = self.gate.logits(found.model)
        return found

    def _train(self) -> Train:
        run, config = self.subject.run, self.qat
        assert run is not None
        return lambda model, plan, table: run_qat(run, model, plan, table, config, self.say)

    def _tensorrt_files(self, quantized: Quantized) -> TensorRt:
        made = make_tensorrt(quantized, self._lost)
        self.files.write("trt", made.weak)
        try:
            self._require_half()
            if made.typed is None:
                raise ExportError(made.why_untyped)
            self.files.write("trt-fp16", made.typed)
        except ExportError as error:
            self.say(f"There is no file for TensorRT 11, whose body is FP16: {error}")
        return made

    def _lost(self, model: onnx.ModelProto) -> tuple[float, float]:
        """Of a file for TensorRT, emulated: points lost on the gate images, then how far its answers are."""
        self.files.write("trt", model)
        found = self._agreement("trt")
        return found.drop_points or 0.0, found.divergence or 0.0

    def _fp16_file(self, *, required: bool, wanted: bool) -> None:
        """Where it was not asked for, and the gate only compares with it, a model that FP16 cannot hold has none."""
        if not required and not wanted:
            return
        try:
            self._require_half()
            self.files.write("fp16", write_fp16(self.subject.model))
        except ExportError as error:
            if required:
                raise
            self.say(f"There is no FP16 file to compare with: {error}")

    def _require_half(self) -> None:
        """ONNX Runtime computes FP16 in float32 on a CPU: an overflow would not be seen before a GPU runs the file."""
        if self._too_large:
            name, value = max(self._too_large.items(), key=lambda each: each[1])
            raise ExportError(
                f"The tensor {name} reaches {value:.3g}, and FP16 ends at 65504; activations below half of that were "
                "expected. Export without FP16, or train with batch normalisation or weight decay."
            )

    @functools.cached_property
    def _too_large(self) -> dict[str, float]:
        """Asked for both files with an FP16 body, looked for once."""
        some = some_images(self.images, self.preprocess, HALF_IMAGES)
        return overflowing(self.subject.model, [self.preprocess.normalize(some[i : i + 1]) for i in range(len(some))])

    def _speed(self, model: onnx.ModelProto) -> Speedup | None:
        self.files.write("int8", model)
        if self.trials is not None:
            return self.trials.speed(self.files.path("fp32"), self.files.path("int8"))
        return self._race("int8").speedups["int8"]

    def _race(self, name: str) -> Race:
        """A file against FP32; kept, since the one that the search ends with is most often the last that it timed."""
        content = self.files.path(name).read_bytes()
        if name not in self.raced or self.raced[name][0] != content:
            self.say(f"Measuring FP32 and {name.upper()} in turn")
            with alone(self.say):  # rounds that wait in between for another measurement would not be of one race
                both = race(("fp32", name), lambda each: measure_alone(self.files.path(each), self.options.threads))
            self.raced[name] = content, both
        return self.raced[name][1]

    def _timed(self) -> dict[str, tuple[dict[str, Any], list[float]]]:
        """By file: its record, and the medians of its rounds. FP32's is that of the first race."""
        found: dict[str, tuple[dict[str, Any], list[float]]] = {}
        for _, raced in self.raced.values():
            for name, record in raced.records.items():
                found.setdefault(name, (record, raced.rounds_ms[name]))
        return found

    def _decisions(self, quantized: Quantized | None) -> list[Decision]:
        """What ships on this machine's CPU, and what is known of TensorRT's files before they were timed.

        Where another machine decides, this one is not timed unless a target asks for it, and then judges the same file.
        """
        budget, here = self.options.max_drop_points, []
        names = tuple(name for name in ("int8", "fp16") if name in self.files.names and self._asked(name))
        same = {each.name for each in self.options.targets if self._is_here(each)}
        for name in names:
            found = quantized.searched.agreement if quantized and name == "int8" else self._agreement(name)
            timed = self._race(name).speedups[name] if same or self.there is None else None
            here.append(Candidate(name, name, found, timed))
        known = {each.name: each.agreement for each in here}
        decisions = [judge(CPU, here, budget)]
        if quantized:
            decisions.append(judge(TENSORRT, self._untimed(TENSORRT_FILES, known), budget))
        for target in self.options.targets:
            wanted = target.candidates(self.files.names)
            ours = [each for each in here if (each.name, each.precision) in wanted] if target.name in same else []
            decisions.append(judge(target.name, ours or self._untimed(wanted, known), budget))
        for each in decisions:
            if each.warning:
                self.say(each.warning)
        return decisions

    def _untimed(
        self, wanted: Sequence[tuple[str, Literal["int8", "fp16"]]], known: dict[str, Agreement]
    ) -> list[Candidate]:
        """Candidates of which only the accuracy is known. `known`: by artifact, added to: some have to be emulated."""
        there = [each for each in wanted if each[0] in self.files.names]
        for name, _ in there:
            known[name] = known.get(name) or self._agreement(name)
        return [Candidate(name, precision, known[name]) for name, precision in there]

    def _is_here(self, target: Target) -> bool:
        """Whether what was timed on this machine's CPU is a measurement of `target`."""
        if self.there is not None and target.name == self.there.target:
            return False
        if target.runtime != "onnxruntime" or not target.fits(identify().model, platform.machine()):
            return False
        if target.threads != self.options.threads:
            told = f"takes {target.threads} and {self.options.threads} were measured"
            self.say(f"{target.name} stays undecided: of threads it {told}. Give --threads {target.threads}.")
            return False
        return True

    def _asked(self, name: str) -> bool:
        return self.options.fp16 if name == "fp16" else self.options.int8

    def _agreement(self, name: str) -> Agreement:
        """On the gate images, or the first of them where the file has to be emulated."""
        count = len(self.gate.images.pixels) if name in self.files.runnable else PROVED_IMAGES
        images, run = self.gate.images.first(count), self.files.runner(name)
        found = [run(batch) for batch in images]
        logits = np.concatenate(found) if found else self.gate.fp32
        return agreement(self.gate.fp32[:count], logits, self.gate.labels[:count])

    def _golden(self) -> Logits:
        images = some_images(self.images, self.preprocess, GOLDEN_IMAGES)
        batch = self.preprocess.normalize(images)
        logits = {name: self.files.runner(name)(batch) for name in self.files.names}
        write_golden(self.folder / "golden.npz", images, logits)
        return logits

    def _test(self) -> Logits:
        """Of the files that run here, over all test images, read as a device will read them."""
        part = self.images.test
        self.say(f"Scoring {len(part)} test images")
        names = self.files.runnable
        found = part.logits([self.files.path(name) for name in names], self.preprocess, self.options.threads)
        logits = dict(zip(names, found, strict=True))
        if self.options.with_eval:
            shipped, _ = eval_part(part, self.options.with_eval)
            write_eval(self.folder / "eval.npz", shipped, self.preprocess)
        return logits

    def _proof(self, quantized: Quantized | None, tensorrt: TensorRt | None) -> Proof:
        """Every file, and where the model comes from, on the same images: test ones, or the gate's without a test."""
        part = self.images.test if len(self.images.test) else self.images.gate
        places = np.unique(np.linspace(0, len(part) - 1, min(PROVED_IMAGES, len(part))).round().astype(np.int64))
        some = replace(part, indices=part.indices[places], labels=part.labels[places], sha256=None)
        self.say(f"Comparing {len(self.files.names)} files on {len(some)} images")
        stored = store(some, self.preprocess, self.scratch / PROVED)
        runs = [(name, self.files.runner(name)) for name in self.files.names]
        if self.subject.original is not None:
            runs.insert(0, ("torch", self.subject.original))
        runs += self._second_opinion() if tensorrt else []
        logits = collect(runs, stored.chunks(), self.preprocess)
        images, layers = [batch[:LAYER_IMAGES] for batch in stored[:1]], {}
        if quantized and tensorrt and images:
            form = quantized.numbers.reference
            layers["int8"] = compare_layers(form, quantized.model, images)
            layers["trt"] = compare_layers(trt_form(form), tensorrt.weak, images, optimize=False)
            if tensorrt.typed is not None and "trt-fp16" in self.files.names:  # which FP16 cannot hold is not written
                layers["trt-fp16"] = compare_layers(trt_form(form), tensorrt.typed, images, optimize=False)
        self.prove = lambda more: prove(logits | more, some.labels, self.subject.classes, part.name, layers)
        return self.prove({})

    def _second_opinion(self) -> list[tuple[str, RunBatch]]:
        """The TensorRT file by OpenVINO, where that is installed; it decides nothing, so a refusal is only told."""
        try:
            run = openvino_emulator(self.files.models["trt"].SerializeToString(), self.options.threads)
        except ExportError as error:
            self.say(str(error))
            return []
        return [("trt-openvino", run)] if run is not None else []

    def _write_documents(
        self, decisions: list[Decision], quantized: Quantized | None, tensorrt: TensorRt | None, proof: Proof
    ) -> dict[str, Any]:
        gate = gate_document(decisions, measured=CPU)
        for target in self.options.targets:
            gate["targets"][target.name]["target"] = target.settings()
        if self.raced:
            kept = ("conditions", "repeats", "started_at")
            gate["targets"][CPU]["latency"] = {
                name: {
                    "compute_ms": record["latency_ms"]["compute"],
                    "rounds_ms": rounds_ms,
                    **{key: record[key] for key in kept},
                }
                for name, (record, rounds_ms) in self._timed().items()
            }
        write_json(self.folder / "gate.json", gate)
        write_json(self.folder / "proof.json", proof.to_json())
        if quantized and tensorrt:
            document = quantized.document | {"tensorrt": tensorrt.to_json(quantized)}
            write_json(self.folder / "quantization.json", document)
        build_pyz(self.folder / "run.pyz")
        return gate

    def _accuracy(self, test: Logits) -> dict[str, float | None]:
        """Share of the test images of known class that are right; None where there are none, or it is only emulated."""
        labels, found = self.images.test.labels, dict.fromkeys(self.files.names)
        known = labels >= 0
        if not known.any():
            return found
        return found | {name: float((each.argmax(1) == labels)[known].mean()) for name, each in test.items()}

    def _manifest(self, decision: Decision, golden: Logits, test: Logits, quantized: Quantized | None) -> None:
        accuracy, part = self._accuracy(test), self.images.test
        artifacts: dict[str, dict[str, Any]] = {
            name: {"accuracy": accuracy[name], "golden_tolerance": golden_tolerance(name, golden[name])}
            for name in self.files.names
        }
        artifacts["fp32"] |= self.subject.checked
        scored = {
            "split": "val" if self.images.test_is_val else "test",
            "images": int((part.labels >= 0).sum()),
            "sha256": part.sha256,
            **accuracy,
        }
        calibration = self.subject.calibration
        packages = ("kdedge", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
        provenance = self.subject.provenance | {
            "calibration": {"images": len(calibration), "sha256": calibration.sha256} if quantized else None,
            "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
            "exported_at": now(),
        }
        shipped = decision.artifact
        write_manifest(self.folder, artifacts, self.preprocess, self.subject.classes, shipped, scored, provenance)

    def _engines(self, proof: Proof) -> tuple[dict[str, Any], Proof]:
        """What was built, and the proof with what each engine says of the same images."""
        asked = ("int8", "fp16") if self.options.int8 else ("fp16",) if self.options.fp16 else ("fp32",)
        # FP16 of a model too large for it TensorRT up to 10 would build from the float file, and it would answer inf.
        precisions = [name for name in asked if name != "fp16" or not self._too_large]
        found, images = build_here(self.folder, precisions, self.say), self.scratch / PROVED
        if images.is_file():
            proof = self.prove({f"engine-{name}": engine_logits(self.folder, name, images) for name in found})
            self.say(f"Engines beside FP32 on the same images:\n{proof.text()}")
            write_json(self.folder / "proof.json", proof.to_json())
        name_engines(self.folder)
        return found, proof

    def _add_predictions(self, run: Run, test: Logits) -> None:
        """The logits of the exported files beside those of training."""
        add_predictions(run, "test", self.images.test.ids, self.images.test.labels, test)
        if "int8" in test:
            logits = {"fp32": self.gate.fp32, "int8": self.gate_int8}
            add_predictions(run, "gate", self.images.gate.ids, self.images.gate.labels, logits)

    def _document(
        self, decision: Decision, gate: dict[str, Any], test: Logits, proof: Proof, engines: dict[str, Any] | None
    ) -> dict[str, Any]:
        artifacts: dict[str, dict[str, Any]] = {}
        timed = self._timed()
        for name, value in self._accuracy(test).items():
            artifacts[name] = {"accuracy": value, "bytes": self.files.path(name).stat().st_size}
            if name in timed:
                compute = timed[name][0]["latency_ms"]["compute"]
                artifacts[name] |= {f"latency_ms_{key}": compute[key] for key in ("p50", "p90")}
        return {
            "artifacts": artifacts,
            "drop_points": decision.drop_points,
            "speedup": decision.speedup,
            "shipped": decision.shipped,
            "why": decision.why,
            "targets": gate["targets"],
            "proof": proof.to_json(),
            **({"tensorrt": engines} if engines is not None else {}),
            "bundle": str(self.out),
        }
