"""A `tensorrt` module of any version of trt_api.json: it has the names of the real one, and no others.

What the real one lacks raises AttributeError here too; what it has but is not written below raises
NotImplementedError. The behaviour is written once, over names; a version gets those of its table. An engine is the ONNX
file with a header, run by ONNX Runtime on the fake driver's memory, so its logits can be compared.

Nothing of TensorRT's numerics is shown by it: it shows that our calls exist, in this order, in each version, and what
happens when TensorRT answers None or False.
"""

import ctypes
import enum
import json
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("trt_api.json").read_text())
VERSIONS: list[str] = TABLE["versions"]
MAGIC = b"FAKEPLAN"
TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32}
ORT_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}


@dataclass
class World:
    """What the fake stands on, and what is to go wrong."""

    cuda: Any = None  # the fake driver, a ctypes.CDLL
    capability: str = "8.7"
    fast_int8: bool = True
    no_driver: bool = False
    no_context: bool = False
    fail_run: bool = False
    build_error: str = ""  # the line that is logged when the build then answers None
    refuse_timing: bool = False
    touched: set[tuple[str, str]] = field(default_factory=set)  # (class, name) of everything that was asked for


def make(version: str, world: World) -> types.ModuleType:
    """The module of `version`, which is one of VERSIONS."""
    column = VERSIONS.index(version)
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    classes: dict[str, type] = {}
    behaviour = _behaviour(module, world)
    for name in sorted(TABLE["classes"], key=lambda each: (_depth(each), each)):
        top = name.partition(".")[0]
        if TABLE["module"].get(top, "-" * len(VERSIONS))[column] == "c":
            classes[name] = _class(name, column, classes, behaviour.get(name, {}), world)
    for name, made in classes.items():
        outer, _, inner = name.rpartition(".")
        if outer:
            setattr(classes[outer], inner, made)
        else:
            setattr(module, name, made)
    for name, kinds in TABLE["classes"]["ILogger"]["names"].items():
        if kinds[column] == "v":
            setattr(classes["ILogger"], name, classes["ILogger.Severity"][name])  # type: ignore[index]
    unknown = [(name, each) for name, named in behaviour.items() for each in named if not _known(name, each)]
    assert not unknown, f"no version of TensorRT has {unknown}"
    return module


def _depth(name: str) -> int:
    bases = TABLE["classes"][name].get("bases", {})
    return 1 + max((_depth(base) for base in bases if base in TABLE["classes"]), default=0)


def _known(name: str, each: str) -> bool:
    return each == "__init__" or any(kind in "mp" for kind in TABLE["classes"][name]["names"].get(each, ""))


def _class(name: str, column: int, classes: dict[str, type], written: dict[str, Any], world: World) -> type:
    table = TABLE["classes"][name]
    members = {each: values[column] for each, values in table.get("members", {}).items() if values[column] is not None}
    if members:
        return _enum(name, members)
    kinds = {each: column_of[column] for each, column_of in table.get("names", {}).items() if column_of[column] != "-"}
    space: dict[str, Any] = {"__module__": "tensorrt"}
    for each, kind in kinds.items():
        if kind == "m":
            space[each] = written.get(each) or _unwritten(name, each)
        elif kind == "p":
            space[each] = property(written[each]) if each in written else _Plain(name, each)
    if "__init__" in written:
        space["__init__"] = written["__init__"]

    def setter(self: Any, key: str, value: Any) -> None:
        if type(self).__module__ == "tensorrt" and not key.startswith("_") and not hasattr(type(self), key):
            raise AttributeError(f"'tensorrt.{name}' object has no attribute '{key}'")
        world.touched.add((name, key))
        object.__setattr__(self, key, value)

    def getter(self: Any, key: str) -> Any:
        if not key.startswith("_"):
            world.touched.add((name, key))
        return object.__getattribute__(self, key)

    space["__setattr__"] = setter
    space["__getattribute__"] = getter
    named = [base for base, there in table.get("bases", {}).items() if there[column] == "x"]
    bases = tuple(classes[base] for base in sorted(named, key=_depth, reverse=True))
    return type(name.rpartition(".")[2], bases, space)


def _enum(name: str, members: dict[str, int]) -> type:
    """Like pybind11's: an int only when asked, so that a flag used as a number without int() is caught."""
    return enum.Enum(name.rpartition(".")[2], members, type=_Int)  # type: ignore[no-any-return, call-overload]


class _Int:
    def __int__(self) -> int:
        return int(self.value)  # type: ignore[attr-defined]


class _Plain:
    """A property without behaviour: holds what was set."""

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if "_held" in vars(instance) and self.name in vars(instance)["_held"]:
            return vars(instance)["_held"][self.name]
        raise NotImplementedError(f"the fake tensorrt has no value for {self.owner}.{self.name}")

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance).setdefault("_held", {})[self.name] = value


def _unwritten(owner: str, name: str) -> Any:
    def missing(*arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"the fake tensorrt has no behaviour for {owner}.{name}")

    return missing


class _Memory(bytes):
    """IHostMemory: bytes(it) works."""


def _behaviour(trt: Any, world: World) -> dict[str, dict[str, Any]]:
    """{class: {name: function}}."""

    def major() -> int:
        return int(trt.__version__.split(".")[0])

    def say(logger: Any, severity: str, text: str) -> None:
        logger.log(getattr(trt.ILogger.Severity, severity), text)

    def new(name: str, **held: Any) -> Any:
        made = getattr(trt, name).__new__(getattr(trt, name))
        vars(made).update(held)
        return made

    # ---------------------------------------------------------------- build

    def builder_init(self: Any, logger: Any) -> None:
        vars(self)["_logger"] = logger
        if world.no_driver:
            say(logger, "ERROR", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self: Any, flags: int = 0) -> Any:
        assert isinstance(flags, int)
        return new("INetworkDefinition", _flags=flags, _model=None)

    def parser_init(self: Any, network: Any, logger: Any) -> None:
        vars(self).update(_network=network, _logger=logger, _errors=[])

    def parse(self: Any, content: bytes) -> bool:
        flags = trt.NetworkDefinitionCreationFlag
        explicit = not hasattr(flags, "EXPLICIT_BATCH") or vars(self._network)["_flags"] & 1
        try:
            model = onnx.load_from_string(content)
        except Exception:
            self._errors.append("Failed to parse the ONNX model: invalid protobuf")
            return False
        opset = next(each.version for each in model.opset_import if not each.domain)
        if not explicit:
            self._errors.append(
                "This version of the ONNX parser only supports networks with an explicit batch dimension."
            )
        elif opset > {8: 17, 10: 20, 11: 25}[major()]:
            self._errors.append(f"unsupported opset {opset}")
        vars(self._network).update(_model=model, _content=content)
        return not self._errors

    def tensor(name: str, shape: Any) -> Any:
        return new("ITensor", _name=name, _shape=shape)

    def get_input(self: Any, index: int) -> Any:
        value = self._model.graph.input[index]
        dims = value.type.tensor_type.shape.dim
        return tensor(value.name, tuple(-1 if dim.dim_param else dim.dim_value for dim in dims))

    def set_flag(self: Any, flag: Any) -> None:
        assert isinstance(flag, trt.BuilderFlag)
        vars(self).setdefault("_flags", set()).add(flag.name)

    def set_limit(self: Any, pool: Any, size: int) -> None:
        assert pool is trt.MemoryPoolType.WORKSPACE
        assert size > 0
        vars(self)["_workspace"] = size

    def create_timing_cache(self: Any, content: bytes) -> Any:
        return None if world.refuse_timing and content else new("ITimingCache", _content=content)

    def set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        vars(self)["_timing"] = cache
        return True

    def set_shape(self: Any, name: str, smallest: Any, best: Any, largest: Any) -> None:
        vars(self)["_shapes"] = (name, tuple(smallest), tuple(best), tuple(largest))

    def add_profile(self: Any, profile: Any) -> int:
        vars(self)["_profile"] = profile
        return 0 if hasattr(profile, "_shapes") else -1

    def build(self: Any, network: Any, config: Any) -> Any:
        logger, held = self._logger, vars(config)
        flags, model = held.get("_flags", set()), vars(network)["_model"]
        strongly = trt.NetworkDefinitionCreationFlag
        strong = hasattr(strongly, "STRONGLY_TYPED") and vars(network)["_flags"] >> int(strongly.STRONGLY_TYPED) & 1
        shape = get_input(network, 0)._shape
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        if world.build_error:
            say(logger, "ERROR", world.build_error)
        elif shape[0] < 0 and "_profile" not in held:
            say(logger, "ERROR", "Network has dynamic or shape inputs, but no optimization profile has been defined.")
        elif major() < 11 and quantized and not strong and "INT8" not in flags:
            say(
                logger, "ERROR", "INT8 mode needs to be enabled for networks with QuantizeLayer/DequantizeLayer layers."
            )
        elif major() >= 11 and not strong:
            say(logger, "ERROR", "The network is weakly typed.")
        elif strong and flags & {"INT8", "FP16"}:
            say(logger, "ERROR", "A strongly typed network takes no precision flags.")
        else:
            say(logger, "WARNING", "Using default tactics.")
            header = {
                "version": trt.__version__,
                "capability": world.capability,
                "detailed": config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED,
                "flags": sorted(flags),
                "profile": vars(held["_profile"])["_shapes"] if "_profile" in held else None,
            }
            if "_timing" in held:
                vars(held["_timing"])["_content"] += b"timed;"
            return _Memory(pack(header, vars(network)["_content"]))
        return None

    # ---------------------------------------------------------------- run

    def runtime_init(self: Any, logger: Any) -> None:
        vars(self)["_logger"] = logger

    def deserialize(self: Any, content: bytes) -> Any:
        if not content.startswith(MAGIC):
            say(
                self._logger,
                "ERROR",
                "1: [stdArchiveReader.cpp] Serialization assertion stdVersionRead failed. Magic tag does not match",
            )
            return None
        header, model = unpack(content)
        if header["version"] != trt.__version__:
            expected, found = trt.__version__, header["version"]
            start = "6: The engine plan file is not compatible with this version of TensorRT, expecting library version"
            say(self._logger, "ERROR", f"{start} {expected} got {found}, please rebuild.")
            return None
        if header["capability"] != world.capability:
            expected, found = world.capability, header["capability"]
            start = "6: The engine plan file is generated on an incompatible device, expecting compute"
            say(self._logger, "ERROR", f"{start} {expected} got compute {found}, please rebuild.")
            return None
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph as written
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return new("ICudaEngine", _session=session, _header=header, _logger=self._logger)

    def io(self: Any) -> list[Any]:
        return [*self._session.get_inputs(), *self._session.get_outputs()]

    def one(self: Any, name: str) -> Any:
        return next(each for each in io(self) if each.name == name)

    def mode(self: Any, name: str) -> Any:
        inputs = [each.name for each in self._session.get_inputs()]
        return trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT

    def engine_shape(self: Any, name: str) -> Any:
        return tuple(size if isinstance(size, int) else -1 for size in one(self, name).shape)

    def create_context(self: Any) -> Any:
        if world.no_context:
            say(self._logger, "ERROR", "2: [executionContext.cpp] OutOfMemory (no further information)")
            return None
        return new("IExecutionContext", _engine=self, _addresses={}, _batch=None)

    def set_input_shape(self: Any, name: str, shape: Any) -> bool:
        engine = self._engine
        profile = engine._header["profile"]
        fits = profile is not None and profile[1][0] <= shape[0] <= profile[3][0] and list(shape[1:]) == profile[1][1:]
        if not fits:
            say(engine._logger, "ERROR", f"Supplied binding dimension {tuple(shape)} exceeds the profile's.")
            return False
        vars(self)["_batch"] = shape[0]
        return True

    def context_shape(self: Any, name: str) -> Any:
        shape = engine_shape(self._engine, name)
        return ((self._batch if self._batch else -1), *shape[1:]) if shape[0] < 0 else shape

    def set_address(self: Any, name: str, address: int) -> bool:
        self._addresses[name] = address
        return bool(address)

    def execute(self: Any, stream: int) -> bool:
        engine = self._engine
        (source,), (target,) = engine._session.get_inputs(), engine._session.get_outputs()
        shapes = [context_shape(self, each.name) for each in (source, target)]
        if world.fail_run or any(size < 0 for shape in shapes for size in shape):
            say(engine._logger, "ERROR", "3: [executionContext.cpp] not all shapes are specified")
            return False
        kinds = [TYPES[ORT_TYPES[each.type]] for each in (source, target)]

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        def compute(argument: int) -> int:
            views = []
            for each, shape, kind in zip((source, target), shapes, kinds, strict=True):
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                host = world.cuda.fake_host(ctypes.c_uint64(self._addresses[each.name]), ctypes.c_size_t(size))
                if not host:
                    return 700
                views.append(np.frombuffer((ctypes.c_ubyte * size).from_address(host), kind).reshape(shape))
            views[1][...] = engine._session.run(None, {source.name: views[0].copy()})[0]
            return 0

        vars(self).setdefault("_work", []).append(compute)  # ctypes frees a callback that nobody holds
        return not world.cuda.fake_enqueue(ctypes.c_void_p(stream), compute, None)

    def information(self: Any, form: Any) -> str:
        assert form is trt.LayerInformationFormat.JSON
        context = self.execution_context
        if context_shape(context, self._engine._session.get_inputs()[0].name)[0] < 0:
            return inspected(self._engine._header, self._engine._header["model"], major(), "N/A due to dynamic shapes")
        return inspected(self._engine._header, self._engine._header["model"], major())

    def tensor_profile_shape(self: Any, name: str, index: int) -> Any:
        assert index == 0
        assert isinstance(name, str)
        return [tuple(each) for each in self._header["profile"][1:]]

    return {
        "ILogger": {"__init__": lambda self: None},
        "Builder": {
            "__init__": builder_init,
            "create_network": create_network,
            "create_builder_config": lambda self: new("IBuilderConfig"),
            "create_optimization_profile": lambda self: new("IOptimizationProfile"),
            "build_serialized_network": build,
            "platform_has_fast_int8": lambda self: world.fast_int8,
        },
        "OnnxParser": {
            "__init__": parser_init,
            "parse": parse,
            "num_errors": lambda self: len(self._errors),
            "get_error": lambda self, index: new("ParserError", _text=self._errors[index]),
        },
        "ParserError": {"desc": lambda self: self._text},
        "INetworkDefinition": {
            "num_inputs": lambda self: len(self._model.graph.input),
            "num_outputs": lambda self: len(self._model.graph.output),
            "get_input": get_input,
        },
        "ITensor": {"name": lambda self: self._name, "shape": lambda self: self._shape},
        "IBuilderConfig": {
            "set_flag": set_flag,
            "set_memory_pool_limit": set_limit,
            "create_timing_cache": create_timing_cache,
            "set_timing_cache": set_timing_cache,
            "get_timing_cache": lambda self: vars(self).get("_timing"),
            "add_optimization_profile": add_profile,
        },
        "ITimingCache": {"serialize": lambda self: _Memory(self._content)},
        "IOptimizationProfile": {"set_shape": set_shape},
        "Runtime": {"__init__": runtime_init, "deserialize_cuda_engine": deserialize},
        "ICudaEngine": {
            "num_io_tensors": lambda self: len(io(self)),
            "get_tensor_name": lambda self, index: io(self)[index].name,
            "get_tensor_mode": mode,
            "get_tensor_dtype": lambda self, name: trt.DataType[ORT_TYPES[one(self, name).type]],
            "get_tensor_shape": engine_shape,
            "get_tensor_profile_shape": tensor_profile_shape,
            "create_execution_context": create_context,
            "create_engine_inspector": lambda self: new("EngineInspector", _engine=self),
            "device_memory_size": lambda self: 4096,
            "device_memory_size_v2": lambda self: 4096,
        },
        "IExecutionContext": {
            "set_input_shape": set_input_shape,
            "get_tensor_shape": context_shape,
            "set_tensor_address": set_address,
            "execute_async_v3": execute,
        },
        "EngineInspector": {"get_engine_information": information},
    }


def pack(header: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + content


def unpack(plan: bytes) -> tuple[dict[str, Any], bytes]:
    start = len(MAGIC) + 4
    end = start + int.from_bytes(plan[len(MAGIC) : start], "little")
    header = json.loads(plan[start:end])
    header["model"] = onnx.load_from_string(plan[end:])
    return header, plan[end:]


def inspected(header: dict[str, Any], model: onnx.ModelProto, major: int, unknown: str = "") -> str:
    """The inspector's JSON as versions up to 10, or 11, lay it out; what reads a DequantizeLinear is INT8."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    rest = ("FP16", "Half") if "FP16" in header["flags"] else ("FP32", "Float")
    layers: list[Any] = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        description, short = ("Int8", "Int8") if makers.get(node.input[0]) == "DequantizeLinear" else rest
        form = f"Thirty-two wide channel vectorized row major {description} format"
        if unknown:
            form = short = unknown
        typed = {"Format": form, "DataType": short} if major >= 11 else {"Format/Datatype": form}
        kind = {"Conv": "CaskConvolution"}.get(node.op_type, node.op_type)
        tensor = {"Name": node.input[0], "Location": "Device", "Dimensions": [1], **typed}
        layers.append({"Name": node.name, "LayerType": kind, "Inputs": [tensor], "Outputs": []})
    layers.append({"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [], "Outputs": []})
    if not header["detailed"]:
        layers = [layer["Name"] for layer in layers]
    names = [each.name for each in (*model.graph.input, *model.graph.output)]
    ends = {"I/O Tensors": [{"Name": name} for name in names]} if major >= 11 else {"Bindings": names}
    return json.dumps({"Layers": layers, **ends})
