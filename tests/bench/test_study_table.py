"""What a SimCLR study says: slopes, rules, tables, the page. On runs whose numbers are known; nothing is trained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import RunError
from kdedge.runs import write_json
from kdedge_bench import study_match, study_record
from kdedge_bench.study import study
from kdedge_bench.study_match import Match
from kdedge_bench.study_page import page
from kdedge_bench.study_plan import StudyPlan
from kdedge_bench.study_rules import CONTRADICTED, NO_EVIDENCE, SUPPORTED, judged
from kdedge_bench.study_table import slope_per_doubling
from kdedge_bench.study_text import ANSWERS_HEAD, answer_rows, answers, markdown, tables
from kdedge_bench.work import Work
from tests.bench.test_study import FEW, FakeTraining, plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.02, 0.03, 0.025], SUPPORTED),
        ([-0.02, -0.03, -0.025], CONTRADICTED),
        ([0.02, -0.03, 0.025], NO_EVIDENCE),
        ([0.5], NO_EVIDENCE),  # one seed has no interval
        ([0.02, 0.02, 0.02], NO_EVIDENCE),  # nothing was learned about the spread
        ([], NO_EVIDENCE),
    ],
)
def test_the_interval_decides(differences: list[float], word: str) -> None:
    assert judged(differences)["word"] == word


def test_the_slope_is_of_a_doubling() -> None:
    assert slope_per_doubling([(2, 0.3), (4, 0.2), (8, 0.1)]) == pytest.approx(-0.1)
    assert slope_per_doubling([(2, 0.3), (8, 0.1)]) == pytest.approx(-0.1)
    assert slope_per_doubling([(2, 0.1), (4, 0.4), (8, 0.1)]) == pytest.approx(0)
    assert slope_per_doubling([(2, 0.3)]) is None


def made(folder: Path, asked: StudyPlan) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_match, "_accuracy", lambda run, *_: 0.9 if "same" in run.path.name else 0.885)
        return study(asked, folder, Work(train=FakeTraining()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "v"
    return folder, made(folder, plan("fine_tuning.labels=[10, 120]", *FEW[1:3]))


def test_the_answers_are_those_of_the_numbers(whole: tuple[Path, dict[str, Any]]) -> None:
    """FakeTraining: 10 points of gain at the fewest labels, a point for the same family, less for more classes."""
    found = whole[1]["hypotheses"]
    assert {name: each["word"] for name, each in found.items()} == dict.fromkeys(("few-labels", "H1", "H2"), SUPPORTED)
    assert found["few-labels"]["differences"] == pytest.approx([0.1, 0.1005])
    assert found["H1"]["differences"] == pytest.approx([0.01, 0.01005])
    # 8, 3.2 and 1.6 points at 2, 5 and 10 classes
    assert found["H2"]["differences"][0] == pytest.approx(0.0281, abs=1e-4)
    assert answers(whole[1])[1].endswith("(taught by the same family minus by another, with labels; 2 seeds).")


def test_a_seed_without_equal_teachers_does_not_count_for_h1(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, asked = tmp_path / "v", plan(*FEW)
    document = made(folder, asked)
    assert len(document["hypotheses"]["H1"]["seeds"]) == 2
    match = json.loads((folder / "teachers-s0.json").read_text())
    assert Match(**match).within
    write_json(folder / "teachers-s0.json", match | {"within": False, "difference": 0.2})
    found = study(asked, folder, Work(train=FakeTraining()))["hypotheses"]["H1"]
    assert (found["seeds"], found["word"]) == ([1], NO_EVIDENCE)
    assert found["seeds_without_equal_teachers"] == 1


def test_every_number_of_the_tables_is_on_the_page(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, document = whole
    html, text = (folder / "study.html").read_text(), (folder / "study.md").read_text()
    assert text == markdown(document)
    assert html == page(document)
    for table in tables(document):
        for cell in {cell for row in table.rows for cell in row}:
            assert cell in html
        assert all(line in text for line in table.lines())
    assert html.count("<svg") == 3
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    assert len(re.findall(r'id="([^"]+)"', html)) == len(set(re.findall(r'id="([^"]+)"', html)))


def test_a_study_with_no_run_yet_is_a_page_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(plan(), tmp_path / "v", Work(train=FakeTraining("pretrain-wide-resnet-10-1-s0")))
    text = (tmp_path / "v" / "study.md").read_text()
    assert "State: partial: 0 of 76 runs" in text
    assert "**no evidence**, no seed that can be read" in text
    assert "<svg" not in (tmp_path / "v" / "study.html").read_text()


def test_a_record_says_what_not_where(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "study-digits.json"
    study_record.main([str(whole[0]), "--out", str(out), "--title", "small digits"])
    record = json.loads(out.read_text())
    assert record["title"] == "small digits"
    assert str(whole[0].parent) not in out.read_text()
    assert all(
        row.startswith("| small digits |") and row.count("|") == ANSWERS_HEAD.count("|") for row in answer_rows(record)
    )
    write_json(tmp_path / "study.json", whole[1] | {"status": "partial"})
    with pytest.raises(RunError, match="is partial"):
        study_record.make_record(tmp_path, None)


def test_the_readme_quotes_every_study_and_only_studies() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/study-*.json"))
    expected = [row for path in paths for row in answer_rows(json.loads(path.read_text()))]
    lines = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(ANSWERS_HEAD) == bool(expected)
    start = lines.index(ANSWERS_HEAD) + 2 if expected else 0
    assert lines[start : start + len(expected)] == expected
    if expected:
        assert not lines[start + len(expected)].startswith("|")
