"""Figures: what is in them by value, and that they can stand in one page."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kdedge.runs import Run
from kdedge_bench import charts
from kdedge_bench.confusion import class_rows, confusion_matrix
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.svg import drawing, to_svg

MakeRun = Callable[..., Path]


@pytest.fixture
def facts(make_run: MakeRun) -> Facts:
    return read_facts(Run(make_run()))


def parse(svg: str) -> ElementTree.Element:
    """The element; inline SVG leaves the declaration of xlink to the HTML parser."""
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def texts(svg: str) -> list[str]:
    return [("".join(element.itertext())).strip() for element in parse(svg).iter("text")]


def test_every_figure_is_well_formed_and_self_contained(facts: Facts) -> None:
    matrix = np.eye(10, dtype=np.int64) * 5
    drawn = [
        charts.loss(facts, "a"), charts.learning_rate(facts, "b"), charts.kept_share(facts, "c"),
        charts.pseudo_label_accuracy(facts, "d"), charts.sensitivity(facts.quantization, "e"),
        charts.confusion(matrix, facts.classes, "f", "Student INT8"), charts.trusted(facts, facts.classes, "g"),
        charts.pseudo_label_classes(facts, facts.classes, "h"),
    ]  # fmt: skip
    ids: list[str] = []
    for svg in drawn:
        assert svg is not None
        root = parse(svg)
        assert root.attrib["viewBox"].startswith("0 0 331.2 ")
        assert [child.tag for child in root[:2]] == ["title", "desc"]
        assert "<style" not in svg  # inline, a sheet of its own would style the page
        assert "http" not in svg
        found = re.findall(r'\bid="([^"]+)"', svg)
        targets = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert set(targets) <= set(found)
        ids += found
    assert len(ids) == len(set(ids))


def test_colours_are_those_of_the_page(facts: Facts) -> None:
    """So that one drawing serves light, dark and print."""
    matrix = np.eye(3, dtype=np.int64)
    drawn = [charts.loss(facts, "a"), charts.trusted(facts, facts.classes, "b"),
             charts.confusion(matrix, ["x", "y", "z"], "c", "Student")]  # fmt: skip
    for svg in drawn:
        assert svg is not None
        assert "var(--ink)" in svg
        # But for the white of numbers in dark cells, and of nothing else.
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) <= {"#fefefe"}


def test_the_same_figure_twice_is_the_same_text(facts: Facts) -> None:
    assert charts.loss(facts, "a") == charts.loss(facts, "a")


def test_curves_by_value(facts: Facts) -> None:
    kept = charts.curves(facts, "kept_fraction")
    assert [curve[0] for curve in kept] == ["outer (teacher)", "inner (student)"]
    assert kept[0][2] == [float(step) for step in range(20, 601, 20)]
    assert kept[1][3][-1] == pytest.approx(0.9)
    assert "inner (student): 0.9 at step 1,000" in (charts.kept_share(facts, "k") or "")


def test_nothing_logged_is_no_figure(facts: Facts) -> None:
    assert charts.validation_accuracy(facts, "v") is None
    assert charts.curves(facts, "absent") == []


def test_precision_by_class_takes_the_last_line_and_marks_what_is_not_known(facts: Facts) -> None:
    assert charts.precision_by_class(facts, facts.classes, "p") is None
    lines = (
        {"stage": "outer", "step": 1, "pseudo_label_precision": [0.1] * 10},
        {"stage": "outer", "step": 2, "pseudo_label_precision": [0.5, None, *[0.9] * 8]},
        {"stage": "inner", "step": 1, "pseudo_label_precision": None},
        {"stage": "inner", "step": 1, "val_pseudo_label_precision": [0.75] * 10},
    )
    svg = charts.precision_by_class(replace(facts, metrics=lines), facts.classes, "p") or ""
    assert "outer (teacher): 50.0\xa0% to 90.0\xa0%; inner (student): 75.0\xa0% to 75.0\xa0%." in svg
    assert texts(svg).count("–") == 1
    many = ({"stage": "inner", "step": 1, "pseudo_label_precision": [None, *[0.9] * 99]},)
    assert "–" not in texts(charts.precision_by_class(replace(facts, metrics=many), facts.classes, "p") or "")


def test_confusion_shows_every_count() -> None:
    matrix = np.array([[52, 2, 0], [0, 47, 1], [3, 0, 999]])
    found = texts(charts.confusion(matrix, ["zero", "$one$", "a & <b>"], "c", "Student"))
    assert sorted(text for text in found if text.isdigit()) == sorted(["52", "2", "47", "1", "3", "999"])
    for name in ("zero", "$one$", "a & <b>"):
        assert found.count(name) == 2


def test_confusion_of_many_classes_has_no_numbers_in_cells() -> None:
    names = [f"class {index}" for index in range(100)]
    svg = charts.confusion(np.eye(100, dtype=np.int64) * 7, names, "c", "Student")
    assert "7" not in texts(svg)
    assert not any("class" in text and text[-1].isdigit() for text in texts(svg))
    assert "700 of 700 images lie on the diagonal of 100 classes" in svg


def test_class_names_in_any_script_draw_without_warning() -> None:
    svg = charts.confusion(np.eye(2, dtype=np.int64), ["犬", "кошка"], "c", "Student")
    assert "犬" in texts(svg)


def test_text_is_escaped() -> None:
    with drawing() as (figure, _):
        svg = to_svg(figure, "k", 'a "title" <b>', "x & y")
    assert "&quot;title&quot; &lt;b&gt;" in svg
    assert parse(svg)[1].text == "x & y"


def test_confusion_matrix_counts_and_class_rows() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, -1])
    guesses = np.array([0, 1, 1, 1, 0, 2, 2])
    matrix = confusion_matrix(labels, guesses, 4)
    assert matrix.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    rows = class_rows(matrix, ["a", "b", "c", "d"])
    assert [(row.images, row.right) for row in rows] == [(3, 1), (2, 1), (1, 1), (0, 0)]
    assert [row.recall for row in rows] == [pytest.approx(1 / 3), 0.5, 1.0, None]
    assert [row.precision for row in rows] == [0.5, pytest.approx(1 / 3), 1.0, None]
    assert [(row.taken_for, row.taken_for_count) for row in rows] == [("b", 2), ("a", 1), (None, 0), (None, 0)]
