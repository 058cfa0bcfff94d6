"""A graph that says what 8-bit forms of a tensor do to what reads it: the float model with branches, one run an image.

For a tensor t [1, ...] and M scales: e [M, ...] = DQ(Q(t)) - t, one row a scale, by Q and DQ that have axis 0 for their
scales. Then each reader of t that is linear is applied to e without its bias, and rows are squared and summed. An
activation f is judged by f(DQ(Q(t))) - f(t).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.ranges import Form
from kdedge_export.cpu.plan import MOVES
from kdedge_export.graph import Graph, constant_tensor, prune
from kdedge_export.images import Images
from kdedge_export.sessions import open_session
from kdedge_export.table import TINY, U8, Span, s8_scale

__all__ = ["Errors", "Judge", "Options"]

CURVES = ("Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
"""Operators that are not linear, but cheap: they are applied to the 8-bit values themselves."""
CHUNK = 16  # images decoded at a time


@dataclass(frozen=True)
class Options:
    """The different 8-bit forms among a tensor's candidates, (scale, zero point); `place`: method -> which of them."""

    forms: tuple[tuple[float, int], ...]
    place: Mapping[str, int]

    @classmethod
    def among(cls, spans: Mapping[str, Span], form: Form) -> "Options":
        made = {method: _eight_bits(span, form) for method, span in spans.items()}
        forms = tuple(dict.fromkeys(made.values()))
        return cls(forms, {method: forms.index(each) for method, each in made.items()})


def _eight_bits(span: Span, form: Form) -> tuple[float, int]:
    if form == "s8":
        return s8_scale(span), 0
    found = U8.over(span)
    return found.scale, found.zero_point


@dataclass(frozen=True)
class Errors:
    """Of each option of one tensor, summed over what reads it: squared error in units of the reader's own squares.

    `summed`: both sums over all images. `alike`: of each image for itself, 1 at most, and then the mean.
    """

    summed: tuple[float, ...]
    alike: tuple[float, ...]

    def and_in(self, other: "Errors") -> "Errors":
        """With the errors in one more reader."""
        pairs = ((self.summed, other.summed), (self.alike, other.alike))
        return Errors(*(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in pairs))


class Judge:
    """Build once, `add` tensors, `run` once."""

    def __init__(self, model: onnx.ModelProto, form: Form = "u8", moved: frozenset[str] = frozenset()) -> None:
        """`moved`: names of nodes that hand 8-bit values on; where they only move them, their outputs are judged."""
        self.graph = Graph(model)
        self.form = form
        self.moved = moved
        self.copy = onnx.ModelProto()
        self.copy.CopyFrom(model)
        self.nodes = list(self.graph.nodes)
        self.squared: set[str] = set()
        self.terms: list[tuple[str, str, str]] = []  # tensor that is chosen for, its reader's sum of squares, errors'

    def add(self, tensor: str, chosen_for: str, options: Options) -> None:
        """Judge `options` in the readers of `tensor`; the errors count for `chosen_for`, whose range it shares."""
        readers = [node for node in self.graph.readers(tensor) if not self._moves(node)]
        if len(options.forms) < 2 or not readers:
            return
        rounded, error = self._error(tensor, options)
        through = [node for node in readers if self._linear(node, tensor) or node.op_type in CURVES]
        for node in through:
            made = self._moved(node, rounded) if node.op_type in CURVES else self._passed(node, tensor, error)
            self.terms.append((chosen_for, self._squares(node.output[0]), self._squares(made)))
        if len(through) < len(readers):  # an Add, a Concat or whatever takes the error as it is
            self.terms.append((chosen_for, self._squares(tensor), self._squares(error)))

    def run(self, images: Images, preprocess: Preprocess, threads: int = 1) -> dict[str, Errors]:
        """Tensor that is chosen for -> what each of its options costs. Sums over images are exact, so that their order
        does not matter.
        """
        names = list(dict.fromkeys(name for _, *both in self.terms for name in both))
        if not names:
            return {}
        session: Any = open_session(self._model(names), threads)
        seen: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
        for chunk in images.chunks(preprocess, CHUNK):
            for image in chunk:
                values = session.run(names, {self.graph.inputs[0]: preprocess.normalize(image[None])})
                for name, value in zip(names, values, strict=True):
                    seen[name].append(value)
        found: dict[str, Errors] = {}
        for chosen_for, value, error in self.terms:
            errors = _shares(np.array(seen[value], np.float64)[:, :1], np.array(seen[error], np.float64))
            found[chosen_for] = found[chosen_for].and_in(errors) if chosen_for in found else errors
        return found

    def _moves(self, node: onnx.NodeProto) -> bool:
        return node.op_type in MOVES and node.name in self.moved

    def _linear(self, node: onnx.NodeProto, tensor: str) -> bool:
        """Whether `node` makes of `tensor` with an error what it makes of each, added up, but for its bias."""
        if node.op_type == "GlobalAveragePool":
            return True
        if node.op_type == "Mul":
            return list(node.input).count(tensor) == 1
        weighted = node.op_type in ("Conv", "Gemm") and node.input[1] in self.graph.initializers
        return weighted and node.input[0] == tensor

    def _passed(self, node: onnx.NodeProto, tensor: str, error: str) -> str:
        """What the linear `node` makes of `error` in the place of `tensor`."""
        made = f"{tensor}.judged.{node.name}"
        branch = self._copied(node, list(node.input).index(tensor), error, made)
        del branch.input[2:]  # the bias is there with and without the error
        return made

    def _moved(self, node: onnx.NodeProto, rounded: str) -> str:
        """By how much the output of `node` moves where its input is `rounded`."""
        made = f"{rounded}.{node.name}"
        self._copied(node, 0, rounded, f"{made}.rounded")
        self._node("Sub", [f"{made}.rounded", node.output[0]], made)
        return made

    def _copied(self, node: onnx.NodeProto, place: int, taken: str, made: str) -> onnx.NodeProto:
        branch = onnx.NodeProto()
        branch.CopyFrom(node)
        branch.name, branch.input[place], branch.output[0] = made, taken, made
        self.nodes.append(branch)
        return branch

    def _error(self, tensor: str, options: Options) -> tuple[str, str]:
        """[M, ...] each: the M forms of `tensor` [1, ...], and what they add to it."""
        prefix = f"{tensor}.judged"
        code = np.uint8 if self.form == "u8" else np.int8
        scales, zeros = zip(*options.forms, strict=True)
        self._constant(f"{prefix}.scales", np.array(scales, np.float32))
        self._constant(f"{prefix}.zeros", np.array(zeros, code))
        parameters = [f"{prefix}.scales", f"{prefix}.zeros"]
        self._node("Concat", [tensor] * len(scales), f"{prefix}.rows", axis=0)
        self._node("QuantizeLinear", [f"{prefix}.rows", *parameters], f"{prefix}.q", axis=0)
        self._node("DequantizeLinear", [f"{prefix}.q", *parameters], f"{prefix}.dq", axis=0)
        self._node("Sub", [f"{prefix}.dq", tensor], f"{prefix}.error")
        return f"{prefix}.dq", f"{prefix}.error"

    def _squares(self, tensor: str) -> str:
        """[rows]: the sum of squares of each row of `tensor`."""
        made = f"{tensor}.squares"
        if made not in self.squared:
            self.squared.add(made)
            self._node("Flatten", [tensor], f"{tensor}.flat", axis=1)
            self._node("ReduceSumSquare", [f"{tensor}.flat"], made, axes=[1], keepdims=0)
        return made

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _constant(self, name: str, value: npt.NDArray[Any]) -> None:
        self.copy.graph.initializer.append(constant_tensor(name, value))

    def _model(self, outputs: Sequence[str]) -> bytes:
        del self.copy.graph.output[:]
        self.copy.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in outputs
        )
        prune(self.copy, self.nodes)
        return bytes(self.copy.SerializeToString())


def _shares(squares_N1: npt.NDArray[np.float64], errors_NM: npt.NDArray[np.float64]) -> Errors:
    """Of N images: the reader's own squares, and those of its errors with each of M options."""
    own = max(math.fsum(squares_N1[:, 0]), TINY)
    shares_NM = np.minimum(errors_NM / np.maximum(squares_N1, TINY), 1.0)  # what is off by as much as it is, is lost
    return Errors(
        tuple(math.fsum(column) / own for column in errors_NM.T),
        tuple(math.fsum(column) / len(shares_NM) for column in shares_NM.T),
    )
