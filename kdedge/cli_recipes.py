"""`kdedge recipes list | show | copy | validate` and `kdedge models`."""

from pathlib import Path

import click

from kdedge.cli_common import Reply, columns, command_output

__all__ = ["models", "recipes"]


@click.group()
def recipes() -> None:
    """What can be made: list, show, copy and check recipes."""


@recipes.command("list")
@command_output
def list_recipes() -> Reply:
    """The recipes that ship with kdedge."""
    from kdedge import recipe_io

    rows = [(name, recipe_io.about(recipe_io.show(name))) for name in recipe_io.names()]
    text = columns(rows) + "\n\nTo change one: kdedge recipes copy NAME my.yaml, then kdedge train-recipe my.yaml"
    return Reply([{"name": name, "about": about} for name, about in rows], text)


@recipes.command("show")
@click.argument("name")
@command_output
def show(name: str) -> Reply:
    """Print the recipe NAME (or a file), comments included."""
    from kdedge import recipe_io

    found = recipe_io.find(name)
    return Reply({"name": found.name, "text": found.text}, found.text)


@recipes.command("copy")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@command_output
def copy(name: str, file: Path) -> Reply:
    """Copy the recipe NAME to FILE, to be changed there.

    An existing file is not overwritten.
    """
    from kdedge import recipe_io

    path = recipe_io.copy(name, file)
    return Reply({"file": str(path)}, f"Wrote {path}. Train it with: kdedge train-recipe {_as_argument(path)}")


@recipes.command("validate")
@click.argument("file")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for train-recipe.")
@command_output
def validate(file: str, settings: tuple[str, ...]) -> Reply:
    """Tell everything that is wrong with the recipe in FILE."""
    from kdedge import recipe_io

    recipe_io.load(file, settings)
    return Reply({"file": file, "valid": True}, f"{file} is a valid recipe.")


_MODELS_NOTE = (
    "Counted at the input shown, with 1000 classes (wide-resnet: 10).\n"
    "Pre-training without labels (pretrain) is for the larger ones: it is poor on small networks (SEED, arXiv "
    "2101.04731). Pre-train a teacher, and distil to the student: kdedge recipes show simclr"
)


@click.command()
@command_output
def models() -> Reply:
    """Students and teachers: size, cost, INT8 notes."""
    from kdedge.cli_models import describe

    rows = describe()
    head = ("name", "parameters", "MACs", "input", "INT8")
    cells = [
        (r["name"], f"{r['params'] / 1e6:.2f} M", f"{r['macs'] / 1e6:.0f} M", f"{r['input_px']} px", r["int8"])
        for r in rows
    ]
    return Reply(rows, f"{columns([head, *cells])}\n\n{_MODELS_NOTE}")


def _as_argument(path: Path) -> str:
    """A file named without a folder or suffix would be taken for the name of a recipe."""
    return str(path) if path.suffix in {".yaml", ".yml"} or "/" in str(path) else f"./{path}"
