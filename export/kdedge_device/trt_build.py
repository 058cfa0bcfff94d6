"""An ONNX file -> an engine, where TensorRT and a GPU are.

Up to TensorRT 10 the builder picks kernels of the precisions its flags allow, INT8 where the graph has Q/DQ; from 11 on
the types written in the graph are the precisions. Every None and False that TensorRT answers is a failure here.
"""

import hashlib
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from kdedge_device.failures import DeviceFailure, Failure
from kdedge_device.state import power_mode
from kdedge_device.trt import Here, Log, flag_bits, load_tensorrt, new_log
from kdedge_device.trt_errors import classify, must
from kdedge_device.trt_inspect import count_layers
from kdedge_device.trt_timing import TimingCache

__all__ = ["PRECISIONS", "BuildOptions", "build_engine"]

# The flags of each precision where there are any. INT8 with FP16: what has no INT8 kernel, or a slower one, takes FP16.
_FLAGS: Dict[str, Tuple[str, ...]] = {"int8": ("INT8", "FP16"), "fp16": ("FP16",), "fp32": ()}
PRECISIONS = tuple(_FLAGS)


class BuildOptions(NamedTuple):
    """`batch`: (smallest, best, largest) images a call; three equal numbers make a static engine, the faster kind.

    `workspace_mib` is what a kernel may use beside its tensors; a Jetson shares it with everything else.
    """

    precision: str = "int8"
    batch: Tuple[int, int, int] = (1, 1, 1)
    workspace_mib: int = 512

    def checked(self) -> "BuildOptions":
        """Itself; Failure where a value makes no sense."""
        if self.precision not in PRECISIONS:
            raise Failure(
                "The precision is {!r}; one of {} was expected.".format(self.precision, ", ".join(PRECISIONS))
            )
        if len(self.batch) != 3 or not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise Failure(f"The batch is {self.batch}; (smallest, best, largest), each at least 1, was expected.")
        if self.workspace_mib < 1:
            raise Failure(f"The workspace is {self.workspace_mib} MiB; at least 1 was expected.")
        return self


def build_engine(
    onnx_path: str, options: BuildOptions, here: Optional[Here] = None, timing_folder: Optional[str] = None
) -> Tuple[bytes, Dict[str, Any]]:
    """The engine, and a report: {onnx_sha256, flags, batch, seconds, bytes, layers, memory_bytes, timing_cache, ...}.

    `here` is where to build, `load_tensorrt()` where not given. `timing_folder` keeps what the builder measured, so
    that the next build on this GPU is faster. Raises RuntimeFailure, VersionFailure, DeviceFailure or Failure.
    """
    options = options.checked()
    here = load_tensorrt() if here is None else here
    content = _read(onnx_path)
    log = new_log(here.trt)
    builder = _builder(here, log, options)
    network, parser = _parsed(here, log, builder, content, onnx_path)
    config, flags = _config(here, log, builder, options)
    name = _set_batch(builder, config, network, options, onnx_path)
    mode = (power_mode() or {}).get("name")
    timing = TimingCache(timing_folder, here, mode)
    timing.lend(config)
    started = time.monotonic()
    what = f"TensorRT {here.version} could not build {onnx_path} ({options.precision})"
    engine = bytes(must(builder.build_serialized_network(network, config), log.errors, what))
    timing.take_back(config)
    del parser  # TensorRT's parser owns the weights of the network: it may go only now
    report = {
        "onnx_sha256": hashlib.sha256(content).hexdigest(),
        "precision": options.precision,
        "strongly_typed": not here.weakly_typed,
        "flags": flags,
        "batch": list(options.batch),
        "workspace_mib": options.workspace_mib,
        "seconds": round(time.monotonic() - started, 3),
        "bytes": len(engine),
        "timing_cache": timing.state,
        "power_mode": mode,
        "warnings": log.warnings[:20],
    }
    report.update(_looked_at(here, engine, name, options))
    return engine, report


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror}); an ONNX file was expected.") from None


def _builder(here: Here, log: Log, options: BuildOptions) -> Any:
    what = f"TensorRT {here.version} cannot build here"
    try:
        builder = here.trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # pybind11: "factory function returned nullptr"
        raise classify(log.errors or [str(error)], what) from None
    # Asked up to 10 only; 11 runs on no GPU without INT8.
    if options.precision == "int8" and getattr(builder, "platform_has_fast_int8", True) is False:
        raise DeviceFailure(
            f"{here.gpu.name} (compute capability {here.gpu.capability}) has no INT8 kernels. "
            "Build an FP16 engine with --artifact fp16."
        )
    return builder


def _parsed(here: Here, log: Log, builder: Any, content: bytes, path: str) -> Tuple[Any, Any]:
    trt = here.trt
    names = ("EXPLICIT_BATCH",) if here.weakly_typed else ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    flags = flag_bits(trt.NetworkDefinitionCreationFlag, *names)
    network = must(builder.create_network(flags), log.errors, f"TensorRT {here.version} cannot make a network")
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(content):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise classify(errors + log.errors, f"TensorRT {here.version} cannot read {path}")
    if (network.num_inputs, network.num_outputs) != (1, 1):
        raise Failure(
            f"{path} has {network.num_inputs} inputs and {network.num_outputs} outputs; one image input and one output "
            "with the logits were expected."
        )
    return network, parser


def _config(here: Here, log: Log, builder: Any, options: BuildOptions) -> Tuple[Any, List[str]]:
    trt = here.trt
    config = must(builder.create_builder_config(), log.errors, f"TensorRT {here.version} cannot be configured")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells no types
    flags = [name for name in _FLAGS[options.precision] if hasattr(trt.BuilderFlag, name)]
    for name in flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    return config, flags


def _set_batch(builder: Any, config: Any, network: Any, options: BuildOptions, path: str) -> str:
    """The name of the input. Where it leaves the batch open, that of `options` is taken; else the two must agree."""
    tensor = network.get_input(0)
    shape = tuple(tensor.shape)
    if shape[0] >= 0:
        if options.batch != (shape[0],) * 3:
            raise Failure(
                f"{path} takes batches of {shape[0]} only; {options.batch} was asked for. Use --batch {shape[0]}."
            )
        return str(tensor.name)
    if any(size < 0 for size in shape[1:]):
        raise Failure(f"{path} takes an input of shape {shape}; only the batch may be left open.")
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, *((batch,) + shape[1:] for batch in options.batch))
    if config.add_optimization_profile(profile) < 0:
        raise Failure(f"TensorRT refuses batches of {options.batch} for {path}.")
    return str(tensor.name)


def _looked_at(here: Here, content: bytes, name: str, options: BuildOptions) -> Dict[str, Any]:
    """What the finished engine says of itself: layers by type, memory for its tensors. It is loaded, but never run."""
    trt, log = here.trt, new_log(here.trt)
    what = f"TensorRT {here.version} cannot load the engine that it has just built"
    runtime = trt.Runtime(log.logger)
    engine = must(runtime.deserialize_cuda_engine(content), log.errors, what)
    memory = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    # The memory formats of an engine for several shapes are known only to a context that has one.
    context = must(engine.create_execution_context(), log.errors, what)
    shape = tuple(engine.get_tensor_shape(name))
    if shape[0] < 0:
        must(context.set_input_shape(name, options.batch[1:2] + shape[1:]), log.errors, what)
    inspector = must(engine.create_engine_inspector(), log.errors, what)
    inspector.execution_context = context
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return {"layers": count_layers(information), "memory_bytes": int(memory)}
