"""Budgets: what passes, what fails, and what nobody measured does not pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdedge.errors import RunError
from kdedge_bench import CompareFailed, compare
from kdedge_bench.stats import paired_difference

MakeRun = Callable[..., Path]


def slow_down(run: Path, factor: float) -> None:
    path = run / "bench" / "example-cpu-int8.json"
    record = json.loads(path.read_text())
    record["latency_ms"]["compute"]["p90"] *= factor
    path.write_text(json.dumps(record))


def test_by_value(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    slow_down(new, 1.25)
    found = compare(base, new)
    assert found["passed"] is True
    assert found["drop_points"] == pytest.approx(100 * 6 / 540)
    assert found["slower_fraction"] == pytest.approx(0.25)
    assert (found["only_base_right"], found["only_new_right"], found["images"]) == (6, 0, 540)
    flags = np.arange(540) < 516
    expected = paired_difference(flags, np.arange(540) < 510)
    assert found["drop_interval"] == pytest.approx([-100 * expected.high, -100 * expected.low])
    assert found["mcnemar_p"] == pytest.approx(2 / 2**6)
    assert found["base"]["artifact"] == found["new"]["artifact"] == "int8"
    assert "Accuracy drop: 1.11 points" in found["text"]
    assert "p90 slower by: 25.0 %" in found["text"]
    json.dumps(found, allow_nan=False)


def test_budgets(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    slow_down(new, 1.25)
    assert compare(base, new, max_drop=1.2, max_slower=0.25)["passed"]
    with pytest.raises(
        CompareFailed, match=r"new does not stand .* loses 1.11 points of accuracy, more than the 1 "
    ) as caught:
        compare(base, new, max_drop=1.0, max_slower=0.3)
    assert caught.value.exit_code == 1
    assert caught.value.document["passed"] is False
    with pytest.raises(CompareFailed, match=r"loses .* and its p90 is 25.0 % slower, more than the 10 % allowed"):
        compare(base, new, max_drop=1.0, max_slower=0.1)
    assert compare(new, base, max_drop=0, max_slower=0)["passed"]  # better and faster


def test_a_budget_that_was_not_measured_does_not_pass(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new")
    shutil.rmtree(new / "bench")
    assert compare(base, new)["slower_fraction"] is None
    with pytest.raises(RunError, match=r"new has no measured latency of Student INT8. Measure it: kdedge bench"):
        compare(base, new, max_slower=0.1)


def test_other_machine_or_threads(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new")
    path = new / "bench" / "example-cpu-int8.json"
    record = json.loads(path.read_text())
    record["conditions"]["threads"] = 4
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"with 1 thread\(s\), the other with 4 thread\(s\)"):
        compare(base, new, max_slower=0.1)
    for path in (new / "bench").iterdir():
        record = json.loads(path.read_text())
        record["machine"]["cpu"] = "Other CPU"
        path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"on Example CPU @ 2\.0 GHz, the other on Other CPU"):
        compare(base, new, max_slower=0.1)


def test_images_are_matched_by_id(make_run: MakeRun) -> None:
    """The order of the images in the file does not matter, and only shared ones count."""
    base, new = make_run("base"), make_run("new")
    with np.load(new / "predictions.npz") as file:
        arrays = {key: file[key] for key in file.files}
    order = np.random.default_rng(1).permutation(540)[:300]
    np.savez(new / "predictions.npz", **{key: value[order] for key, value in arrays.items()})
    found = compare(base, new)
    assert found["images"] == 300
    assert (found["only_base_right"], found["only_new_right"]) == (0, 0)
    assert found["drop_points"] == 0


def test_other_test_images_are_another_exam(make_run: MakeRun) -> None:
    base = make_run("base")
    new = make_run("new", ids=[f"other/{index}" for index in range(540)])
    assert compare(base, new)["drop_points"] is None
    with pytest.raises(RunError, match="share no test image"):
        compare(base, new, max_drop=1)


def test_without_predictions_there_is_no_interval(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    (new / "predictions.npz").unlink()
    found = compare(base, new, max_drop=1.2)
    assert found["drop_points"] == pytest.approx(100 * 6 / 540)
    assert found["drop_interval"] is None
    assert "so no interval" in found["text"]


def test_a_bundle_stands_for_its_run_and_a_file_for_nothing(make_run: MakeRun) -> None:
    run = make_run("base")
    assert compare(run / "bundle", run)["base"]["run"] == "base"
    with pytest.raises(RunError, match="is no folder"):
        compare(run / "recipe.yaml", run)
