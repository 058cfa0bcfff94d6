"""YAML 1.2 as plain data, with the line every value stands on.

ruamel.yaml parses into nodes and nothing is ever constructed from a tag, so a recipe cannot execute anything. PyYAML is
not used: it reads `3e-4` as text, `no` as false, `012` as 10, and lets a duplicate key win silently.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kdedge.errors import RecipeError

__all__ = ["MAX_BYTES", "Document", "KeyPath", "Problem", "dotted", "raise_problems", "read_document", "read_value"]

MAX_BYTES = 256 * 1024
"""A recipe is a page of text; anything larger is another kind of file, or an attack on the parser."""

MAX_VALUES = 10_000
"""Aliases are expanded, so a small file could name billions of values."""

KeyPath = tuple[str | int, ...]

_CORE = "tag:yaml.org,2002:"
_SCALARS = {"str", "int", "float", "bool", "null", "timestamp"}  # a date is read as text: no knob is a date


@dataclass(frozen=True)
class Problem:
    """One thing wrong: where (`recipe.yaml, line 3` or `--set a=b`) and what, as one sentence."""

    where: str
    sentence: str


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and, for each key path, where its value was written."""

    origin: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> str:
        """Where `path` was written; for a key that is absent, where the nearest group around it begins."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.origin)


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def raise_problems(origin: str, problems: list[Problem]) -> None:
    """RecipeError with every problem, one line each; returns where there is none."""
    if not problems:
        return
    lines = [f"{problem.where}: {problem.sentence}" for problem in problems]
    if len(lines) == 1:
        raise RecipeError(lines[0])
    raise RecipeError("\n".join([f"{len(lines)} problems in {origin}:", *(f"  {line}" for line in lines)]))


def read_document(text: str, origin: str) -> Document:
    """The mapping in `text`. RecipeError where it cannot be read at all; what else is wrong (a key given twice, a
    foreign tag, a number that is not finite) is kept in `problems`, to be told together with the schema's."""
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(
            f"{origin} has more than {MAX_BYTES:,} bytes; a recipe is a page of text. Is it another kind of file?"
        )
    node = _compose(text, origin)
    if node is None:
        raise RecipeError(
            f"{origin} is empty; keys and values were expected. A working one: kdedge recipes show mobilenet"
        )
    if not isinstance(node, MappingNode):
        raise RecipeError(
            f"{origin}, line {node.start_mark.line + 1}: the file holds {_kind(node)}; keys with values were expected "
            "at the top, as in: kdedge recipes show mobilenet"
        )
    reader = _Reader(origin, with_lines=True)
    places: dict[KeyPath, str] = {}
    return Document(origin, reader.convert(node, (), places), places, reader.problems, reader.refused)


def read_value(text: str, origin: str, path: KeyPath = ()) -> Any:
    """The value in `--set KEY=text`, by the same rules as in a file (so `3e-4` is a number and `no` is text)."""
    node = _compose(text, origin)
    if node is None:
        return None
    reader = _Reader(origin, with_lines=False)
    value = reader.convert(node, path, {})
    raise_problems(origin, reader.problems)
    return value


def _compose(text: str, origin: str) -> Node | None:
    if re.match(r"(\s*#[^\n]*\n|\s*\n)*%", text):
        # A `%YAML 1.1` line would switch `no` back to false.
        raise RecipeError(
            f"{origin}: a directive ('%...') stands at the top; a recipe is YAML 1.2 without any. Remove the line."
        )
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
        return node
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None and origin[:2] != "--" else ""
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{origin}{line}: this is not YAML: {what}.{_hint(what)}") from error
    except RecursionError:
        raise RecipeError(f"{origin}: brackets are nested too deeply to be a recipe.") from None
    except YAMLError as error:
        raise RecipeError(f"{origin}: this is not YAML: {str(error).splitlines()[0]}.") from error


def _hint(what: str) -> str:
    if "mapping values are not allowed" in what:
        return " Is a value with a colon in it missing its quotes, or a line indented too far?"
    if r"\t" in what:
        return " Indent with spaces, not with tabs."
    if "expected a single document" in what:
        return " Keep one recipe in a file (no second '---')."
    return ""


def _kind(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a group of keys"
    return "a list" if isinstance(node, SequenceNode) else "a single value"


class _Reader:
    """Turns nodes into plain data and collects what is wrong on the way."""

    def __init__(self, origin: str, *, with_lines: bool) -> None:
        self.origin = origin
        self.with_lines = with_lines
        self.problems: list[Problem] = []
        self.refused: set[KeyPath] = set()
        self._open: set[int] = set()
        self._values = 0

    def convert(self, node: Node, path: KeyPath, places: dict[KeyPath, str]) -> Any:
        places.setdefault(path, self._where(node))
        self._values += 1
        if self._values > MAX_VALUES:
            raise RecipeError(
                f"{self.origin} names more than {MAX_VALUES:,} values once its aliases are written out; "
                "a recipe has a few dozen."
            )
        if id(node) in self._open:
            return self._refuse_value(node, path, "contains itself through an alias")
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path, places)
            if _short_tag(node) != "seq":
                return self._refuse_value(node, path, f"has the tag {node.tag}; remove it: a recipe is plain data")
            return [self.convert(item, (*path, i), places) for i, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, path: KeyPath, places: dict[KeyPath, str]) -> dict[str, Any]:
        if _short_tag(node) != "map":
            self._refuse_value(node, path, f"has the tag {node.tag}; remove it: a recipe is plain data")
        values: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if _short_tag(key_node) == "merge":
                self._refuse(key_node, "the merge key '<<' is not read; write the keys out.")
                continue
            if not isinstance(key_node, ScalarNode) or _short_tag(key_node) not in _SCALARS:
                self._refuse(key_node, f"{_kind(key_node)} stands where a key belongs.")
                continue
            key = key_node.value
            here: KeyPath = (*path, key)
            if key in first_line:
                twice = f"is given twice, on lines {first_line[key]} and {line}"
                self._refuse(key_node, f"'{dotted(here)}' {twice}; keep one.")
                continue
            first_line[key] = line
            places[here] = self._where(key_node)
            values[key] = self.convert(value_node, here, places)
        return values

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text, tag = node.value, _short_tag(node)
        try:
            if tag == "null":
                return None
            if tag == "bool":
                return text.lower() == "true"
            if tag == "int":
                return _integer(text)
            if tag == "float":
                return _finite(text)
        except ValueError:
            return self._refuse_value(node, path, f"is {text[:40]}; a finite number was expected")
        if tag in _SCALARS:
            return text
        return self._refuse_value(node, path, f"has the tag {node.tag}; remove it: a recipe is plain data")

    def _where(self, node: Node) -> str:
        return f"{self.origin}, line {node.start_mark.line + 1}" if self.with_lines else self.origin

    def _refuse_value(self, node: Node, path: KeyPath, why: str) -> None:
        self.refused.add(path)
        self._refuse(node, f"'{dotted(path)}' {why}.")

    def _refuse(self, node: Node, sentence: str) -> None:
        self.problems.append(Problem(self._where(node), sentence))


def _short_tag(node: Node) -> str:
    return str(node.tag).removeprefix(_CORE)


def _integer(text: str) -> int:
    plain = text.replace("_", "")
    sign, digits = (-1, plain[1:]) if plain.startswith("-") else (1, plain.removeprefix("+"))
    base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2].lower(), 10)
    return sign * int(digits, base)


def _finite(text: str) -> float:
    value = float(text.replace("_", ""))
    if not math.isfinite(value):
        raise ValueError(text)
    return value
