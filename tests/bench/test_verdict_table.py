"""The table of a verdict: its statistics against scipy's, its words, what is shown of a partial one, its records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdedge.errors import RunError
from kdedge.runs import write_json
from kdedge_bench import verdict_record
from kdedge_bench.verdict_rows import ROWS
from kdedge_bench.verdict_table import HELPS, HURTS, NO_EVIDENCE, _trusted, paired
from kdedge_bench.verdict_text import ROWS_HEAD, SUMMARY_HEAD, TITLES, markdown, markdown_rows, summary_row

ROOT = Path(__file__).resolve().parents[2]
NEW = [0.951, 0.948, 0.955, 0.961, 0.944]
OLD = [0.940, 0.946, 0.949, 0.950, 0.931]


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    found = paired([new - old for new, old in zip(NEW, OLD, strict=True)])
    theirs = stats.ttest_rel(NEW, OLD).confidence_interval(0.95)
    assert found["interval_95"] == pytest.approx([theirs.low, theirs.high], abs=1e-12)
    assert found["mean"] == pytest.approx(np.mean(NEW) - np.mean(OLD))
    assert found["word"] == HELPS
    # Unpaired, the same numbers say nothing: the labels that a seed draws move both.
    assert stats.ttest_ind(NEW, OLD).confidence_interval(0.95).low < 0.0


@pytest.mark.parametrize("seed", range(20))
def test_the_word_is_that_of_the_p_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.normal(0.9, 0.02, 5)
    new = old + rng.normal(rng.choice([-0.01, 0.0, 0.01]), 0.006, 5)
    test = stats.ttest_rel(new, old)
    expected = NO_EVIDENCE if test.pvalue > 0.05 else HELPS if test.statistic > 0 else HURTS
    assert paired(list(new - old))["word"] == expected


def test_nothing_is_said_where_there_is_no_interval() -> None:
    assert paired([]) == {"mean": None, "half_width_95": None, "interval_95": None, "word": NO_EVIDENCE}
    assert paired([0.02]) == {"mean": 0.02, "half_width_95": None, "interval_95": None, "word": NO_EVIDENCE}
    equal = paired([0.93 - 0.92, 0.94 - 0.93, 0.95 - 0.94])
    assert (equal["interval_95"], equal["word"]) == (None, NO_EVIDENCE)
    assert equal["mean"] == pytest.approx(0.01)


def trusted(*pairs: tuple[float, float]) -> dict[str, Any]:
    keys = ("precision", "confidence_only_precision")
    return _trusted({seed: {"trusted": dict(zip(keys, pair, strict=True))} for seed, pair in enumerate(pairs)})


def test_the_trusted_set_must_be_better_only_where_confidence_alone_is_not_precise() -> None:
    better, same = ((0.95, 0.93), (0.96, 0.93), (0.95, 0.935)), ((0.95, 0.93), (0.92, 0.93), (0.93, 0.93))
    assert (trusted(*better)["must_be_better"], trusted(*better)["rule_holds"]) == (True, True)
    assert (trusted(*same)["must_be_better"], trusted(*same)["rule_holds"]) == (True, False)
    precise, worse = ((0.99, 0.98), (0.98, 0.985), (0.98, 0.98)), ((0.97, 0.98), (0.97, 0.985), (0.97, 0.98))
    assert (trusted(*precise)["must_be_better"], trusted(*precise)["rule_holds"]) == (False, True)
    assert (trusted(*worse)["must_be_better"], trusted(*worse)["rule_holds"]) == (False, False)
    assert trusted((0.99, 0.98))["rule_holds"] is None
    assert trusted((0.99, 0.99), (0.98, 0.98))["rule_holds"] is True  # the same images: not worse
    unknown = _trusted({0: {"trusted": {"precision": None}}})
    assert (unknown["seeds"], unknown["precision"], unknown["rule_holds"]) == ([], None, None)


def document(status: str = "complete", **changes: Any) -> dict[str, Any]:
    """A verdict of two seeds, of known numbers."""

    def row(name: str, accuracies: list[float]) -> dict[str, Any]:
        cells = [{"seed": seed, "run": f"{name}-s{seed}", "test_accuracy": a} for seed, a in enumerate(accuracies)]
        half = 0.0123 if len(accuracies) > 1 else None
        return {
            "question": "", "settings": [], "seeds": cells, "student_steps": 1550.0, "training_flops": 2.5e15,
            "seconds": 3725.0,
            "test_accuracy": {"mean": sum(accuracies) / len(accuracies), "half_width_95": half} if accuracies else None,
        }  # fmt: skip

    accuracies = {name: [0.9, 0.91] for name in TITLES if name not in ("teacher", "no-sce", "no-soft-kd")}
    accuracies |= {"no-sce": [0.9], "no-soft-kd": []}
    differences = {name: [0.03, 0.02][: len(found)] for name, found in accuracies.items() if name != "kd-fixmatch"}
    differences["teacher"] = [-0.01, -0.02]
    return {
        "schema": 1, "status": status, "runs_finished": 13, "runs_planned": 16, "kdedge": "0", "date": "2026",
        "machine": {"name": "m", "cpu": "c"}, "recipe": "tiny", "data": "digits", "labels": 40, "seeds": [0, 1],
        "command": "kdedge verdict /home/me/tiny.yaml --data /data/digits --out /tmp/v",
        "commands": {"no-sce-s0": "kdedge train-recipe t --set teacher.ready=/a/b/kd-fixmatch-s0/teacher.safetensors"},
        "rows": {name: row(name, found) for name, found in accuracies.items()},
        "comparisons": {
            name: {"question": "", "seeds": list(range(len(found))), "differences": found, **paired(found)}
            for name, found in differences.items()
        },
        "trusted": trusted((0.95, 0.93), (0.96, 0.93)),
    } | changes  # fmt: skip


def test_a_partial_table_has_dashes_and_says_how_far_it_is() -> None:
    shown = markdown(document("partial"))
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in shown.splitlines() if line.startswith("|")}
    assert "State: partial: 13 of 16 runs are finished." in shown
    assert lines["KD-FixMatch without soft KD"].endswith("| - | - | - | - | - | - | 0 of 2 |")
    assert "| +3.00 (no interval) | no evidence |" in lines["KD-FixMatch without SCE"]
    assert lines["KD-FixMatch without SCE"].endswith("| 1 of 2 |")
    assert "90.5 ± 1.2 | +2.50 ± 6.35 | no evidence | 1,550 | 2.50e15 | 1\N{NO-BREAK SPACE}h 2" in lines["KD only"]
    assert lines["its teacher, for information"].startswith("| its teacher, for information | - | -1.50 ± 6.35 | - |")
    assert "not corrected for their number" in shown
    assert "At equal total compute KD-FixMatch: **no evidence**, +2.50 ± 6.35 points over 2 seeds." in shown
    assert {row.name for row in ROWS} == set(TITLES) - {"teacher"}


def test_a_record_says_what_not_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "verdict.json", document())
    verdict_record.main([str(tmp_path), "--out", str(tmp_path / "r.json"), "--title", "small digits"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["command"] == "kdedge verdict tiny.yaml --data digits --out v"
    assert record["commands"]["no-sce-s0"].endswith(" --set teacher.ready=kd-fixmatch-s0/teacher.safetensors")
    shown = capsys.readouterr().out.splitlines()
    assert shown == [SUMMARY_HEAD, summary_row(record), ROWS_HEAD, *markdown_rows(record)]
    assert summary_row(record).startswith("| small digits, 40 labels, 2 seeds | 90.5 ± 1.2 | 90.5 ± 1.2 |")
    assert summary_row(record).endswith("| +2.50 ± 6.35, no evidence |")
    assert summary_row(record).count("|") == SUMMARY_HEAD.count("|")
    assert {line.count("|") for line in markdown_rows(record)} == {ROWS_HEAD.count("|")}


def test_a_partial_verdict_makes_no_record(tmp_path: Path) -> None:
    write_json(tmp_path / "verdict.json", document("partial"))
    with pytest.raises(RunError, match=r"is partial: 13 of 16 runs are finished. Go on with it: kdedge verdict"):
        verdict_record.make_record(tmp_path, None)


# ---- what is committed


def records() -> list[dict[str, Any]]:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/verdict-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def rows_under(head: str, readme: Path) -> list[str]:
    """The rows of the one table with this head; none where there is no such table."""
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert lines.count(head) <= 1
    if head not in lines:
        return []
    rows = lines[lines.index(head) + 2 :]
    return rows[: next((i for i, line in enumerate(rows) if not line.startswith("|")), len(rows))]


def test_the_readmes_quote_every_verdict_and_only_verdicts() -> None:
    """One row a set that asks the README's question in it, every row in that of the benchmarks, to the digit."""
    short, whole = rows_under(SUMMARY_HEAD, ROOT / "README.md"), rows_under(ROWS_HEAD, ROOT / "benchmarks/README.md")
    asked = [record for record in records() if "fixmatch-equal-total" in record["rows"]]
    assert sorted(short) == sorted(summary_row(record) for record in asked)
    assert sorted(whole) == sorted(row for record in records() for row in markdown_rows(record))


def test_the_records_add_up() -> None:
    for record in records():
        assert (record["status"], record["kind"]) == ("complete", "verdict")
        assert record["command"].startswith("kdedge verdict ")
        assert "test_accuracy" not in record  # that is a record of kdedge_bench.seeds
        mine = {cell["seed"]: cell["test_accuracy"] for cell in record["rows"]["kd-fixmatch"]["seeds"]}
        assert sorted(mine) == record["seeds"]
        for name, row in record["rows"].items():
            assert [cell["seed"] for cell in row["seeds"]] == record["seeds"]
            if name == "kd-fixmatch":
                continue
            found = record["comparisons"][name]
            differences = [mine[cell["seed"]] - cell["test_accuracy"] for cell in row["seeds"]]
            assert found["differences"] == pytest.approx(differences, abs=1e-12)
            assert found["word"] == paired(differences)["word"]
