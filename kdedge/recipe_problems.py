"""pydantic's errors as sentences: where, which key, which value, what was expected, and the nearest thing known."""

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kdedge.errors import did_you_mean
from kdedge.recipe_yaml import Document, KeyPath, Problem, dotted

__all__ = ["default_group", "key_paths", "problems_of"]

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list, as in [1, 2]",
    "tuple_type": "a list, as in [1, 2]",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "dataclass_type": "a group of keys",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}
"""What was expected, by pydantic's error type; a type that is not here keeps pydantic's own words."""


def problems_of(model: type[BaseModel], errors: Iterable[ErrorDetails], document: Document) -> list[Problem]:
    """One sentence for each key that is wrong."""
    expected: dict[KeyPath, list[str]] = {}
    whole: dict[KeyPath, list[str]] = {}
    for error in errors:
        path = _path_in(document.data, error)
        kind = error["type"]
        if any(path[:depth] in document.refused for depth in range(len(path) + 1)):
            continue  # told already, by the reader
        if kind == "extra_forbidden":
            whole.setdefault(path, []).append(_unknown_key(model, path, error))
        elif kind in {"missing", "union_tag_not_found"}:
            whole.setdefault(path, []).append(f"'{dotted(path)}' is missing, and has no default.")
        elif kind in {"value_error", "assertion_error"}:
            whole.setdefault(path, []).append(_own_sentence(path, error))
        else:
            expected.setdefault(path, []).append(_wanted(error))
    for path, wants in expected.items():
        if path not in whole:  # a union also reports each member that did not fit
            whole[path] = [_wrong_value(path, _value_at(document.data, path), wants)]
    found = [
        Problem(document.place(path) if path else document.origin, sentence)  # of the whole, no line is at fault
        for path, sentences in whole.items()
        for sentence in dict.fromkeys(sentences)
    ]
    return found


def key_paths(model: type[BaseModel]) -> list[KeyPath]:
    """Every key a recipe can have, depth first; the members of a union are merged."""
    paths: dict[KeyPath, None] = {}

    def walk(kinds: list[Any], path: KeyPath) -> None:
        for kind in kinds:
            for name, info in _fields(kind).items():
                paths.setdefault((*path, name))
                if len(path) < 8:  # a recipe is a tree; this only bounds a model that refers to itself
                    walk(_models_in(info.annotation), (*path, name))

    walk([model], ())
    return list(paths)


def default_group(model: type[BaseModel], path: KeyPath) -> dict[str, Any]:
    """What has to be written out when a key is set inside the group `path` that a file leaves out.

    That is where the default differs from its class, and which member of a union it is.
    """
    kinds = [model]
    for part in path[:-1]:
        fields = [_fields(kind)[part] for kind in kinds if part in _fields(kind)]
        kinds = [found for info in fields for found in _models_in(info.annotation)]
    for info in (_fields(kind)[path[-1]] for kind in kinds if path[-1] in _fields(kind)):
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            group = default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            if isinstance(info.discriminator, str):
                group[info.discriminator] = getattr(default, info.discriminator)
            return group
    return {}


def _wanted(error: ErrorDetails) -> str:
    template = _EXPECTED.get(error["type"])
    if template is None:
        message = error["msg"].removeprefix("Input should be ").removeprefix("Value should be ").rstrip(".")
        return message[:1].lower() + message[1:]
    return template.format(**error.get("ctx", {}))


def _wrong_value(path: KeyPath, value: Any, wants: list[str]) -> str:
    wanted = " or ".join(dict.fromkeys(wants))
    hint = ""
    if isinstance(value, str):
        literals = [part.strip(" '") for part in wanted.replace(" or ", ",").split(",")]
        hint = did_you_mean(value, literals) if "'" in wanted else ""
        if "true or false" in wants and value.lower() in {"yes", "no", "on", "off", "y", "n"}:
            meant = "true" if value.lower() in {"yes", "on", "y"} else "false"
            hint = f" In YAML 1.2 '{value}' is text: write {meant}."
    elif isinstance(value, int | float) and wants == ["text"]:
        hint = f' Put it in quotes: "{value}".'
    elif isinstance(value, float) and value.is_integer() and "a whole number" in wants:
        hint = f" Write {int(value)}."
    return f"'{dotted(path)}' is {_shown(value)}; {wanted} was expected.{hint}"


def _own_sentence(path: KeyPath, error: ErrorDetails) -> str:
    """A validator's own message, which already says what was expected."""
    message = str(error.get("ctx", {}).get("error", error["msg"])).strip()
    subject = f"'{dotted(path)}': " if path else ""
    return f"{subject}{message}" + ("" if message.endswith((".", "?", "!")) else ".")


def _unknown_key(model: type[BaseModel], path: KeyPath, error: ErrorDetails) -> str:
    known = key_paths(model)
    if path in known:  # of another member of the union
        kind, group = error["loc"][-2], dotted(path[:-1])
        return (
            f"'{dotted(path)}' ({_shown(error['input'])}) is no key of a {group} of kind '{kind}'. Remove it; or, to "
            f"replace the whole group: --set '{group}={{kind: {kind}}}'."
        )
    return f"'{dotted(path)}' ({_shown(error['input'])}) is no key of a recipe.{_near_key(known, path)}"


def _near_key(known: list[KeyPath], path: KeyPath) -> str:
    """The key whose last part is nearest; one beside `path` is preferred to one elsewhere that is a little nearer."""
    beside = [other for other in known if other[:-1] == path[:-1]]
    nearness = {
        other: difflib.SequenceMatcher(None, str(path[-1]), str(other[-1])).ratio() + 0.15 * (other in beside)
        for other in known
    }
    best = max(nearness, key=lambda other: nearness[other])
    if nearness[best] >= 0.65:
        same = [other for other in known if other[-1] == best[-1]] if best not in beside else []
        shown = " or ".join(f"'{dotted(other)}'" for other in same[:3]) if same else f"'{best[-1]}'"
        return f" Did you mean {shown}?"
    return f" Known here: {', '.join(str(other[-1]) for other in beside)}." if beside else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a group of keys"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path_in(data: Any, error: ErrorDetails) -> KeyPath:
    """pydantic's location without the names of union members, so that it is a path in the file."""
    location, kind = error["loc"], error["type"]
    path: list[str | int] = []
    for i, part in enumerate(location):
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, dict) and part in data):
            path.append(part)
            data = data[part]
        elif i == len(location) - 1 and kind == "missing":
            path.append(part)
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        path.append(str(error.get("ctx", {}).get("discriminator", "")).strip("'()"))  # a function's: kind()
    return tuple(path)


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _fields(model: type[BaseModel]) -> dict[str | int, FieldInfo]:
    """The fields by the names they have in a file."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models a field may hold: through Annotated, unions, optionals and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models_in(get_args(annotation)[0])
    if origin in {Union, types.UnionType, list, tuple, dict}:
        return [found for argument in get_args(annotation) for found in _models_in(argument)]
    return []
