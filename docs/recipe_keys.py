"""Tables of every key of a recipe, read from the classes that read them: key, what it may be, default, comment."""

import ast
import html
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator

from pydantic import BaseModel

from kdedge.recipe import Recipe

__all__ = ["tables"]


def tables() -> str:
    """Markdown: a heading for each part of a recipe, in the order of the file."""
    return "\n\n".join(_part(name, model) for name, model in _parts(Recipe, ""))


def _parts(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *typing.get_args(field.annotation)) if isinstance(each, type)]
        configs = [each for each in inner if issubclass(each, BaseModel)]
        for config in configs:
            kind = f" ({config.__name__})" if len(configs) > 1 else ""
            yield from _parts(config, f"{prefix}.{name}{kind}".lstrip("."))


def _part(name: str, model: type[BaseModel]) -> str:
    lines = [f"### {name or 'A recipe'}", "", inspect.getdoc(model) or "", ""]
    lines += ["| key | may be | unless given | |", "| --- | --- | --- | --- |"]
    for key, (may_be, default, comment) in _fields(model).items():
        parts = (_code(key), _code(may_be), _code(default), comment.replace("|", "&#124;"))
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    # An entity, since a table's cell ends at a bar, also within backticks.
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>" if text else ""


def _fields(model: type[BaseModel]) -> dict[str, tuple[str, str, str]]:
    """Key -> (what it may be, default, comment), from the source of the class."""
    source = textwrap.dedent(inspect.getsource(model))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            key = model.model_fields[node.target.id].alias or node.target.id
            default = "" if node.value is None else ast.unparse(node.value)
            default = (
                ""
                if default.endswith("()")
                else {"None": "null", "True": "true", "False": "false"}.get(default, default)
            )
            found[key] = (_plain(node.annotation), default, _comment(comments, node))
    return found


def _plain(annotation: ast.expr) -> str:
    """`Annotated[int, Field(gt=0)] | None` as `int > 0 | null`."""
    if isinstance(annotation, ast.BinOp):
        return f"{_plain(annotation.left)} | {_plain(annotation.right)}"
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return "null"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return " | ".join(ast.unparse(part).strip("'") for part in parts)
    if ast.unparse(annotation).endswith("Config"):
        return "its own keys, below"
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        name, parts = ast.unparse(annotation.value), annotation.slice.elts
        if name == "Annotated":
            return " ".join([_plain(parts[0]), *(_bounds(part) for part in parts[1:])]).strip()
    return ast.unparse(annotation)


def _bounds(field: ast.expr) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    keywords = field.keywords if isinstance(field, ast.Call) else []
    return ", ".join(f"{signs[k.arg]} {ast.unparse(k.value)}" for k in keywords if k.arg in signs)


def _comment(comments: dict[int, tokenize.TokenInfo], node: ast.AnnAssign) -> str:
    """Behind the field, or on the lines of their own above it."""
    found = [comments[node.end_lineno]] if node.end_lineno in comments else []
    line = node.lineno - 1
    while not (found and found[-1].start[0] == node.end_lineno) and line in comments:
        if not comments[line].line.strip().startswith("#"):
            break
        found.insert(0, comments[line])
        line -= 1
    return " ".join(token.string.lstrip("# ") for token in found)
