"""Every recipe that ships loads, explains itself and stands in the catalog."""

import re
from pathlib import Path

import pytest

from kdedge import recipe_io

ROOM = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = [
    "efficientnet",
    "mnasnet",
    "mobilenet",
    "mobilenet-v3",
    "regnet",
    "resnet",
    "shufflenet",
    "simclr",
    "squeezenet",
    "tiny",
    "tiny-simclr",
]


def test_the_recipes_are_those_named_here() -> None:
    # Counted, so that this file can never come to check nothing.
    assert recipe_io.names() == SHIPPED
    assert {path.relative_to(ROOM).as_posix() for path in ROOM.rglob("*.y*ml")} == {
        f"kdedge_recipes/{name}.yaml" for name in SHIPPED
    }


def test_the_catalog_lists_each_once() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\)", (ROOM / "README.md").read_text(), re.MULTILINE)
    assert rows == [(name, f"kdedge_recipes/{name}.yaml") for name in SHIPPED]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_loads_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = recipe_io.load(name)
    (tmp_path / "again.yaml").write_text(recipe_io.dump(recipe))
    assert recipe_io.load(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_begins_with_what_it_makes_and_the_command(name: str) -> None:
    text = recipe_io.show(name)
    head = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert len(recipe_io.about(text)) > 20
    assert f"kdedge train-recipe {name}" in head
