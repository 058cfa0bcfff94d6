"""Recipes as files: find, read, override, validate, copy, write.

The schema is `kdedge.recipe.Recipe`; it is imported late, because listing recipes needs no torch.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from kdedge.errors import RecipeError, did_you_mean
from kdedge.recipe_problems import default_group, key_paths, problems_of
from kdedge.recipe_yaml import MAX_BYTES, Document, KeyPath, dotted, raise_problems, read_document, read_value
from kdedge.runs import write_bytes

if TYPE_CHECKING:
    from kdedge.recipe import Recipe

__all__ = [
    "Found",
    "about",
    "as_now",
    "copy",
    "dump",
    "find",
    "load",
    "names",
    "override",
    "parse",
    "read_text",
    "shipped",
    "show",
    "validate",
]

FLAGS = {"data": "data.spec", "labels": "data.labels", "seed": "seed", "device": "engine.device"}
"""The training flags of the command line, and the key each one sets."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Found:
    """A recipe's text; `origin` is what messages call it: a file name, or `recipe mobilenet`."""

    name: str
    origin: str
    text: str


def names() -> list[str]:
    """The recipes that ship with kdedge, by name."""
    return sorted(shipped("kdedge_recipes"))


def find(name_or_path: str) -> Found:
    """A shipped recipe by name, or a file (anything with a slash or .yaml in it); RecipeError with the nearest name."""
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        return _read_file(Path(name_or_path))
    if file := shipped("kdedge_recipes").get(name_or_path):
        return Found(name_or_path, f"recipe {name_or_path}", file.read_text(encoding="utf-8"))
    hint = did_you_mean(name_or_path, names())
    if Path(name_or_path).is_file():
        hint = f" For the file of that name, write ./{name_or_path}"
    known = f"there are {', '.join(names())}, and any path to a .yaml file"
    raise RecipeError(f"There is no recipe '{name_or_path}'; {known}.{hint}")


def show(name_or_path: str) -> str:
    """The recipe's text, comments included."""
    return find(name_or_path).text


def about(text: str) -> str:
    """What a recipe makes: the comment it starts with, up to an empty line or the line `# Command: ...`."""
    lines: list[str] = []
    for line in text.splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#") or (lines and not words) or words.startswith("Command:"):
            break
        if words:
            lines.append(words)
    return " ".join(lines)


def copy(name_or_path: str, target: Path) -> Path:
    """Copy a recipe byte for byte to `target`, a file or a folder to put it in; never over an existing file."""
    found = find(name_or_path)
    path = target / f"{found.name}.yaml" if target.is_dir() else target
    if path.suffix not in {".yaml", ".yml"}:
        raise RecipeError(f"The copy would be called {path.name}; a recipe's file name ends in .yaml: {path}.yaml")
    if path.exists():
        raise RecipeError(f"{path} exists already and was not touched. Choose another name, or remove it first.")
    write_bytes(path, found.text.encode())
    return path


def load(name_or_path: str, overrides: Sequence[str] = (), **flags: Any) -> "Recipe":
    """The validated recipe.

    `overrides` are `KEY=VALUE` texts as after --set; `flags` are those of FLAGS, where None means not given. Raises
    RecipeError with every problem at once.
    """
    from kdedge.recipe import Recipe

    found = find(name_or_path)
    document = read_document(found.text, found.origin)
    for flag, value in flags.items():
        if value is not None:
            _put(document, Recipe, tuple(FLAGS[flag].split(".")), value, f"--{flag} {value}")
    override(document, overrides, Recipe)
    return validate(document, Recipe)


def override(document: Document, settings: Sequence[str], model: type[BaseModel]) -> None:
    """Write each `KEY=VALUE` into `document`. That the key exists and the value fits is checked by `validate`."""
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            near = did_you_mean(key, map(dotted, key_paths(model)))
            raise RecipeError(f"--set {setting}: KEY=VALUE was expected, as in --set seed=1.{near}")
        if key in given:
            raise RecipeError(f"--set gives '{key}' twice, as '{given[key]}' and as '{value}'; keep one.")
        given[key] = value
        where = f"--set {setting}"
        path: KeyPath = tuple(key.split("."))
        _put(document, model, path, read_value(value, where, path), where)


def parse(text: str, origin: str, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """`text` with `overrides` as a `model`; RecipeError with every problem at once."""
    document = read_document(text, origin)
    override(document, overrides, model)
    return validate(document, model)


def validate(document: Document, model: type[Model]) -> Model:
    """`document` as a `model`; RecipeError with every problem at once.

    Through JSON, because strict pydantic then takes a list for a tuple and text for a path, as a file must.
    """
    problems = list(document.problems)
    try:
        valid = model.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        problems += problems_of(model, error.errors(include_url=False), document)
    order = {place: i for i, place in enumerate(dict.fromkeys(document.places.values()))}
    raise_problems(document.origin, sorted(problems, key=lambda problem: order.get(problem.where, -1)))
    return valid


def dump(recipe: BaseModel) -> str:
    """The recipe as YAML that `load` reads back to an equal recipe."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None  # lists and groups without groups inside stand on one line
    yaml.sort_base_mapping_type_on_output = False  # keys in the order of the schema
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json", by_alias=True), stream)
    return stream.getvalue()


def as_now(stored: dict[str, Any], asked: "Recipe") -> dict[str, Any]:
    """The recipe `stored` by this or an earlier kdedge, with the keys there are now, to be held against `asked`.

    What came later has its default, which is what was done before. What is no recipe of today stays as it is.
    """
    from kdedge.recipe import Recipe

    groups = {"teacher": asked.teacher, "student": asked.student}
    if "pretrain" not in stored:  # from before a head could be left open: "probe" was the default, and what open means
        for who, group in groups.items():
            part = stored.get(who)
            if isinstance(part, dict) and part.get("head") == "probe" and group is not None and group.head is None:
                stored = stored | {who: part | {"head": None}}
    with contextlib.suppress(ValidationError):
        return Recipe.model_validate_json(json.dumps(stored)).model_dump(mode="json")
    return stored


def _put(document: Document, model: type[BaseModel], path: KeyPath, value: Any, where: str) -> None:
    data = document.data
    for depth, part in enumerate(path[:-1], start=1):
        inner = data.get(str(part))
        if inner is None:
            inner = data[str(part)] = default_group(model, path[:depth])
            document.places[path[:depth]] = where
        if not isinstance(inner, dict):
            group = dotted(path[:depth])
            raise RecipeError(f"{where}: '{group}' is {inner!r}, which has no keys inside; set '{group}' itself.")
        data = inner
    data[str(path[-1])] = value
    document.places[path] = where


def shipped(package: str, *folders: str) -> dict[str, Traversable]:
    """Name -> file of the .yaml files that ship in a folder of `package`."""
    files = resources.files(package).joinpath(*folders).iterdir()
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def read_text(path: Path, what: str) -> str:
    """The text of a user's file, which messages call `what`: no more of it than the reader takes. RecipeError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text in UTF-8. Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"The {what} {path} cannot be read: {error.strerror}.") from None


def _read_file(path: Path) -> Found:
    hint = did_you_mean(path.stem, names()) if path.parent == Path() else ""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; the path of a .yaml file was expected.")
    if not path.exists():
        start = f"A copy to start from: kdedge recipes copy mobilenet {path}"
        raise RecipeError(f"The recipe file {path} does not exist.{hint} {start}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return Found(path.stem, str(path), content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise RecipeError(f"{path} is not text in UTF-8 ({where}). Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
