"""Suites as files: what is read, and how everything that is wrong is told."""

from pathlib import Path

import click
import pytest

from kdedge.cli_deploy import bench
from kdedge.errors import RecipeError
from kdedge_bench.suite import Base, Suite, load, names
from kdedge_bench.suite_plan import base_of, combinations, way

GOOD = """
models: [{path: a.onnx}, {zoo: mobilenet-v2, px: 32}]
precisions: [fp32, int8]
threads: [1, 2]
offline: [4]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_those_that_ship() -> None:
    assert names() == ["edge-224", "quick"]
    told = next(option.help for option in bench.params if isinstance(option, click.Option) and option.name == "suite")
    assert all(name in str(told) for name in names())
    quick, edge = load("quick").suite, load("edge-224").suite
    assert [model.run for model in quick.models] == ["latest"]
    assert (quick.effort, quick.single_stream, quick.offline) == ("quick", (1,), (16,))
    families = ["mobilenet-v2", "mobilenet-v3-large", "efficientnet-lite0", "efficientnet-b0", "resnet18"]
    assert [model.zoo for model in edge.models] == [*families, "shufflenet-v2"]
    assert (edge.effort, edge.count) == ("standard", 24)
    assert {model.px for model in edge.models} == {None}, "the families' own 224"


def test_a_file_with_its_defaults(tmp_path: Path) -> None:
    found = load(written(tmp_path, GOOD))
    assert (found.name, found.folder) == ("my", tmp_path)
    suite = found.suite
    assert (suite.runtimes, suite.single_stream, suite.effort, suite.repeats) == (
        ("onnxruntime",),
        (1,),
        "standard",
        None,
    )
    assert suite.count == 2 * 2 * 2 * 2 == len(combinations(suite, ["a", "mobilenet-v2-32px"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("precision: [fp32]\nmodels: [{run: latest}]", r"line 1: 'precision' .* no key of a suite.*'precisions'"),
        ("models: [{zoo: mobilnet-v2}]", r"line 1: 'models.0': .*no architecture 'mobilnet-v2'.*'mobilenet-v2'"),
        ("models: [{zoo: resnet18, run: latest}]", "it has zoo and run; exactly one"),
        ("models: [{name: x}]", "it has none of them; exactly one"),
        ("models: [{path: a.onnx, px: 32}]", "'px' is of a network of the zoo"),
        ("models: []", "'models' is empty, so that nothing would be measured"),
        ("models: [{run: newest}]", "'models.0.run' is 'newest'; 'latest' was expected"),
        ("models: [{run: latest}]\nprecisions: [int4]", "'precisions.0' is 'int4'.*'int8'"),
        ("models: [{run: latest}]\nsingle_stream: []", "both empty, so that nothing would be measured"),
        ("models: [{run: latest}]\nthreads: [1, 1]", "'threads' has 1 twice"),
        ("models: [{run: latest}, {run: latest}]", "'models' has .*twice"),
        ("models: [{run: latest}]\nthreads: [0]", "'threads.0' is 0; 1 or more was expected"),
        ("models: [{run: latest}]\nbase: {precision: fp16}", "'base.precision' is fp16, which is not measured"),
        ("models: [{run: latest}]\nschema: 2", "'schema' is 2"),
        ("", "is empty"),
        ("models: [", "this is not YAML"),
    ],
)  # fmt: skip
def test_wrong_suites_are_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        load(written(tmp_path, text))
    assert "recipe" not in str(caught.value)


def test_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 problems in") as caught:
        load(written(tmp_path, "models: [{run: latest}]\nefort: quick\nthreads: [one]"))
    assert "line 2: 'efort'" in str(caught.value)
    assert "line 3: 'threads.0' is 'one'; a whole number was expected" in str(caught.value)


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'quik' is not known; there are edge-224, quick.*Did you mean 'quick'\?"):
        load("quik")
    with pytest.raises(RecipeError, match=r"absent\.yaml cannot be read: No such file"):
        load(str(tmp_path / "absent.yaml"))
    (tmp_path / "latin.yaml").write_bytes("# caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        load(str(tmp_path / "latin.yaml"))


def test_what_a_row_is_compared_with() -> None:
    settings = {"models": [{"run": "latest"}], "precisions": ["fp32", "int8"], "threads": [1, 2], "offline": [4, 8]}
    suite = Suite.model_validate(settings, strict=False)
    rows = combinations(suite, ["a", "b"])
    last = rows[-1]
    assert (last.name, way(last, suite)) == ("b-int8-onnxruntime-t2-b8-offline", "INT8, 2 threads, offline, batch 8")
    assert base_of(last, suite).name == "b-fp32-onnxruntime-t2-b8-offline"
    assert base_of(rows[0], suite) == rows[0]
    other = suite.model_copy(update={"base": Base(model="a", precision="fp32", threads=1)})
    assert base_of(last, other).name == "a-fp32-onnxruntime-t1-b8-offline"
    assert len({row.name for row in rows}) == len(rows) == suite.count * 2


def test_the_suite_in_the_readme(tmp_path: Path) -> None:
    readme = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"
    _, _, rest = readme.read_text(encoding="utf-8").partition("```yaml\n")
    found = load(written(tmp_path, rest.partition("```")[0])).suite
    assert (len(found.models), found.count, found.base.threads) == (2, 2 * 2 * 3 * 2 * 2, 1)
