"""Recipes as files: what a person gets wrong is told all at once, with the place and the way out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdedge import recipe_io
from kdedge.errors import RecipeError
from kdedge.recipe_yaml import MAX_BYTES, read_document, read_value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FixMatch(Strict):
    name: Literal["fixmatch"] = "fixmatch"
    threshold: float = Field(0.95, gt=0, lt=1)


class Distill(Strict):
    name: Literal["distill"] = "distill"
    temperature: float = 4.0


class Network(Strict):
    arch: Literal["mobilenet-v2", "mobilenet-v3"] = "mobilenet-v2"
    total_steps: int | None = Field(None, ge=1)
    total_epochs: int | None = Field(None, ge=1)
    strides: tuple[int, ...] = (1, 2)
    flip: bool | None = None
    init: Path | None = None
    method: Annotated[FixMatch | Distill, Field(discriminator="name")] = FixMatch()

    @model_validator(mode="after")
    def _one_duration(self) -> "Network":
        if self.total_steps and self.total_epochs:
            raise ValueError("total_steps and total_epochs are both given; keep one")
        return self


class Toy(Strict):
    schema_: Literal[1] = Field(1, alias="schema")
    seed: int
    note: str = ""
    student: Network = Network()
    teacher: Network = Network()


def parse(text: str, *settings: str) -> Toy:
    return recipe_io.parse(text, "my.yaml", Toy, settings)


def problems(text: str, *settings: str) -> list[str]:
    """The lines of the message, without the heading."""
    with pytest.raises(RecipeError) as caught:
        parse(text, *settings)
    lines = str(caught.value).splitlines()
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} problems in my.yaml:"
    return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]


def test_values_are_those_of_yaml_1_2() -> None:
    text = (
        "a: 3e-4\nb: no\nc: 012\nd: 1_000\ne: 2024-01-01\nf: 0x1F\ng: ~\nh: -1.5\ni: True\nj: 'x'\nk: 0o17\nl: 1:30\n"
    )
    assert read_document(text, "x").data == {
        "a": 3e-4, "b": "no", "c": 12, "d": 1000, "e": "2024-01-01", "f": 31, "g": None, "h": -1.5, "i": True,
        "j": "x", "k": 15, "l": "1:30",
    }  # fmt: skip


def test_aliases_are_data() -> None:
    assert read_document("a: &x [1, 2]\nb: *x\n", "x").data == {"a": [1, 2], "b": [1, 2]}


def test_lists_become_tuples_and_text_paths() -> None:
    recipe = parse("seed: 1\nstudent: {strides: [2, 2, 1], init: w.npz}\n")
    assert recipe.student.strides == (2, 2, 1)
    assert recipe.student.init == Path("w.npz")


def test_every_problem_is_told_at_once() -> None:
    text = """\
seed: 1.0
student:
  total_stepz: 3
  total_steps: 1e3
  flip: no
  arch: mobilenet-v1
  strides: [1, a]
  method:
    name: fixmatch
    treshold: 3
    threshold: 1.5
threshold: 3
seed: 2
teacher:
  method: {name: fixmach}
"""
    assert problems(text, "teacher.arch=resnet") == [
        "my.yaml, line 13: 'seed' is given twice, on lines 1 and 13; keep one.",
        "my.yaml, line 1: 'seed' is 1.0; a whole number was expected. Write 1.",
        "my.yaml, line 3: 'student.total_stepz' (3) is no key of a recipe. Did you mean 'total_steps'?",
        "my.yaml, line 4: 'student.total_steps' is 1000.0; a whole number was expected. Write 1000.",
        "my.yaml, line 5: 'student.flip' is 'no'; true or false was expected. In YAML 1.2 'no' is text: write false.",
        "my.yaml, line 6: 'student.arch' is 'mobilenet-v1'; 'mobilenet-v2' or 'mobilenet-v3' was expected."
        " Did you mean 'mobilenet-v3'?",
        "my.yaml, line 7: 'student.strides.1' is 'a'; a whole number was expected.",
        "my.yaml, line 10: 'student.method.treshold' (3) is no key of a recipe. Did you mean 'threshold'?",
        "my.yaml, line 11: 'student.method.threshold' is 1.5; less than 1.0 was expected.",
        "my.yaml, line 12: 'threshold' (3) is no key of a recipe."
        " Did you mean 'student.method.threshold' or 'teacher.method.threshold'?",
        "my.yaml, line 15: 'teacher.method.name' is 'fixmach'; 'fixmatch', 'distill' was expected."
        " Did you mean 'fixmatch'?",
        "--set teacher.arch=resnet: 'teacher.arch' is 'resnet'; 'mobilenet-v2' or 'mobilenet-v3' was expected.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nschema: 2\n", "my.yaml, line 2: 'schema' is 2; 1 was expected."),
        ("seed: 1\nshema: 1\n", "my.yaml, line 2: 'shema' (1) is no key of a recipe. Did you mean 'schema'?"),
        ("{}", "my.yaml, line 1: 'seed' is missing, and has no default."),
        (
            "seed: 1\nstudent:\n  total_steps: 1\n  total_epochs: 1\n",
            "my.yaml, line 2: 'student': total_steps and total_epochs are both given; keep one.",
        ),
        (
            "seed: 1\nstudent: {method: {threshold: 0.5}}",
            "my.yaml, line 2: 'student.method.name' is missing, and has no default.",
        ),
        ("seed: 1\nstudent: 3\n", "my.yaml, line 2: 'student' is 3; a group of keys was expected."),
        ("seed: 1\nnote: [a]\n", "my.yaml, line 2: 'note' is ['a']; text was expected."),
        (
            "seed: !!python/object/apply:os.system [x]\n",
            "my.yaml, line 1: 'seed' has the tag tag:yaml.org,2002:python/object/apply:os.system; "
            "remove it: a recipe is plain data.",
        ),
        ("seed: .inf\n", "my.yaml, line 1: 'seed' is .inf; a finite number was expected."),
        ("seed: 1e999\n", "my.yaml, line 1: 'seed' is 1e999; a finite number was expected."),
        ("<<: {seed: 1}\nseed: 1\n", "my.yaml, line 1: the merge key '<<' is not read; write the keys out."),
        (
            "seed: 1\nnote: a: b\n",
            "my.yaml, line 2: this is not YAML: mapping values are not allowed here. "
            "Is a value with a colon in it missing its quotes, or a line indented too far?",
        ),
        (
            "seed: 1\n---\nseed: 2\n",
            "my.yaml, line 2: this is not YAML: expected a single document in the stream; but found another document. "
            "Keep one recipe in a file (no second '---').",
        ),
        (
            "# c\n%YAML 1.1\n---\nseed: 1\n",
            "my.yaml: a directive ('%...') stands at the top; a recipe is YAML 1.2 without any. Remove the line.",
        ),
        (
            "# nothing\n",
            "my.yaml is empty; keys and values were expected. A working one: kdedge recipes show mobilenet",
        ),
        (
            "- 1\n",
            "my.yaml, line 1: the file holds a list; keys with values were expected at the top, "
            "as in: kdedge recipes show mobilenet",
        ),
        ("seed: " + "[" * 50_000, "my.yaml: brackets are nested too deeply to be a recipe."),
    ],
)
def test_one_problem_is_one_line(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_an_alias_that_contains_itself_is_refused() -> None:
    assert problems("seed: 1\nstudent: &s {strides: [*s]}\n") == [
        "my.yaml, line 2: 'student.strides.0' contains itself through an alias."
    ]


def test_aliases_cannot_multiply_without_end() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert problems("\n".join(lines)) == [
        "my.yaml names more than 10,000 values once its aliases are written out; a recipe has a few dozen."
    ]


def test_a_large_file_is_not_parsed() -> None:
    assert "more than 262,144 bytes" in problems("a: " + "x" * MAX_BYTES)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("no", "no"), ("true", True), ("", None), ("[1, 2]", [1, 2]), ("{a: 1}", {"a": 1}), ("'1'", "1")],
)
def test_settings_are_yaml(text: str, value: Any) -> None:
    assert read_value(text, "--set") == value


def test_settings_reach_into_groups_that_the_file_leaves_out() -> None:
    recipe = parse("seed: 1\n", "student.method.threshold=0.5", "seed=7")
    assert (recipe.seed, recipe.student.method, recipe.teacher) == (7, FixMatch(threshold=0.5), Network())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "student.treshold=1",
            "'student.treshold' (1) is no key of a recipe."
            " Did you mean 'student.method.threshold' or 'teacher.method.threshold'?",
        ),
        ("studnt.arch=x", "'studnt' (a group of keys) is no key of a recipe. Did you mean 'student'?"),
        ("seed.x=3", "'seed' is 1, which has no keys inside; set 'seed' itself."),
        ("seed", "KEY=VALUE was expected, as in --set seed=1. Did you mean 'seed'?"),
        ("=3", "KEY=VALUE was expected, as in --set seed=1."),
        ("seed=[1", "this is not YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'."),
        (
            "seed=!!python/name:x y",
            "'seed' has the tag tag:yaml.org,2002:python/name:x; remove it: a recipe is plain data.",
        ),
    ],
)
def test_a_wrong_setting_is_named(setting: str, expected: str) -> None:
    assert problems("seed: 1\n", setting) == [f"--set {setting}: {expected}"]


def test_a_setting_can_choose_another_member_of_a_union() -> None:
    recipe = parse("seed: 1\n", "teacher.method.name=distill", "teacher.method.temperature=2.0")
    assert recipe.teacher.method == Distill(temperature=2.0)


def test_a_setting_given_twice_is_refused() -> None:
    assert problems("seed: 1\n", "seed=2", "seed=3") == ["--set gives 'seed' twice, as '2' and as '3'; keep one."]


def test_what_is_dumped_loads_again() -> None:
    recipe = parse("seed: 3\nnote: 'no'\nstudent: {method: {name: distill, temperature: 1e-5}, init: a b.npz}\n")
    text = recipe_io.dump(recipe)
    assert parse(text) == recipe
    assert text.splitlines()[:3] == ["schema: 1", "seed: 3", "note: no"]


def test_a_file_is_found_by_its_path_and_a_recipe_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# What it makes.\n# More.\n# Command: x\n# Cost.\nseed: 1\n")
    found = recipe_io.find(str(file))
    assert (found.name, found.origin, found.text) == ("mine", str(file), file.read_text())
    assert recipe_io.about(found.text) == "What it makes. More."


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mobilnet", ["There is no recipe 'mobilnet'", "mobilenet", "Did you mean 'mobilenet'?"]),
        ("nowhere/x.yaml", ["The recipe file nowhere/x.yaml does not exist."]),
        ("mobilnet.yaml", ["The recipe file mobilnet.yaml does not exist.", "Did you mean 'mobilenet'?"]),
    ],
)
def test_a_recipe_that_is_not_there(name: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_io.find(name)
    assert all(part in str(caught.value) for part in parts)


def test_a_folder_and_a_picture_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        recipe_io.find(f"{tmp_path}/")
    (tmp_path / "x.yaml").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(RecipeError, match=r"is not text in UTF-8 \(byte 0 is 0x89\)"):
        recipe_io.find(str(tmp_path / "x.yaml"))


def test_a_copy_is_exact_and_never_overwrites(tmp_path: Path) -> None:
    source = tmp_path / "a.yaml"
    source.write_bytes("# é\r\nseed: 1\n".encode())
    target = tmp_path / "b.yaml"
    assert recipe_io.copy(str(source), target) == target
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(RecipeError, match="exists already and was not touched"):
        recipe_io.copy(str(source), target)
    with pytest.raises(RecipeError, match=r"b\.yml2\.yaml"):
        recipe_io.copy(str(source), tmp_path / "b.yml2")
    (tmp_path / "folder").mkdir()
    assert recipe_io.copy(str(source), tmp_path / "folder") == tmp_path / "folder" / "a.yaml"
