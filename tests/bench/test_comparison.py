"""Budgets: what passes, what fails, and what nobody measured does not pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge.errors import RunError
from kdedge.intervals import newcombe
from kdedge_bench import CompareFailed, compare
from kdedge_bench.stats import paired_difference

MakeRun = Callable[..., Path]


def change(run: Path, **changes: object) -> None:
    path = run / "bench" / "example-cpu-int8.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def slow_down(run: Path, factor: float) -> None:
    path = run / "bench" / "example-cpu-int8.json"
    record = json.loads(path.read_text())
    record["latency_ms"]["compute"]["p90"] *= factor
    path.write_text(json.dumps(record))


def in_turn(base: Path, new: Path, factor: float, repeats: int = 20, noise: float = 0.05, seed: int = 0) -> None:
    """Records of one session on a machine that slows down by a third meanwhile, with noise in every repeat."""
    rng = np.random.default_rng(seed)
    drift = 1 + np.arange(repeats) / (3 * repeats)
    for run, times in ((base, 1.0), (new, factor)):
        rounds = 0.07 * times * drift * np.exp(rng.normal(0, noise, repeats))
        change(run, session="one", repeats=repeats, rounds_ms={"p50": list(0.9 * rounds), "p90": list(rounds)})


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
    in_turn(base, new, 1.25)
    with pytest.raises(
        CompareFailed, match=r"new does not stand .* loses 1.11 points of accuracy, at least 0.40, more than the 0.3 "
    ) as caught:
        compare(base, new, max_drop=0.3, max_slower=0.5)
    assert caught.value.exit_code == 1
    document = caught.value.document
    assert document["passed"] is False
    assert document["verdicts"] == {"accuracy": "fail", "latency": "pass"}
    assert "Beyond the 0.3 points allowed." in document["text"]
    assert "Within the 50 % allowed." in document["text"]
    with pytest.raises(CompareFailed, match=r"loses .* and its p90 is 2\d\.\d % slower, at least .* the 10 % allowed"):
        compare(base, new, max_drop=0.3, max_slower=0.1)
    better = compare(new, base, max_drop=0, max_slower=0)
    assert better["verdicts"] == {"accuracy": "pass", "latency": "pass"}


def test_an_interval_that_holds_the_budget_is_no_alarm(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    found = compare(base, new, max_drop=1.0, max_slower=0.1)  # six images of 540; one repeat each
    assert found["verdicts"] == {"accuracy": "cannot tell", "latency": "cannot tell"}
    assert found["passed"] is True
    assert "Cannot tell whether it is within the 1 points allowed; more test images would tell." in found["text"]
    assert (
        "measured on two occasions, which may differ by as much; "
        "about 6 repeats in turn would tell: kdedge bench BASE NEW --repeats 6" in found["text"]
    )
    in_turn(base, new, 1.12, repeats=8, noise=0.1, seed=3)
    found = compare(base, new, max_slower=0.1)
    assert found["verdicts"]["latency"] == "cannot tell"
    wanted = found["repeats_wanted"]
    assert wanted is None or wanted > 8


def test_a_planted_point_on_five_thousand_images_is_caught(make_run: MakeRun) -> None:
    labels = np.arange(5000, dtype=np.int64) % 10
    many = {"labels": labels, "ids": [f"image/{place}" for place in range(5000)]}
    base = make_run("base", right={"int8": 4500}, **many)
    new = make_run("new", right={"int8": 4450}, **many)
    with pytest.raises(CompareFailed, match=r"loses 1\.00 points"):
        compare(base, new, max_drop=0.3)
    assert compare(base, new, max_drop=1.5)["verdicts"]["accuracy"] == "pass"


def test_a_planted_tenth_is_caught_and_equal_files_raise_no_alarm(make_run: MakeRun) -> None:
    """20 repeats in turn on a drifting, noisy machine (a simulated clock), against 3 %."""
    base, new = make_run("base"), make_run("new")
    for seed in range(10):
        in_turn(base, new, 1.10, noise=0.04, seed=seed)
        with pytest.raises(CompareFailed, match="its p90 is"):
            compare(base, new, max_slower=0.03)
        in_turn(base, new, 1.0, noise=0.04, seed=100 + seed)
        assert compare(base, new, max_slower=0.03)["verdicts"]["latency"] in ("pass", "cannot tell")


def test_sessions_of_their_own_are_not_paired(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new")
    in_turn(base, new, 1.2)
    paired = compare(base, new)
    change(new, session="another")
    unpaired = compare(base, new)
    assert (paired["in_turn"], unpaired["in_turn"]) == (True, False)
    width = [each["slower_interval"][1] - each["slower_interval"][0] for each in (paired, unpaired)]
    assert width[0] < width[1]  # the drift is noise then


def of_a_suite(run: Path, **changes: Any) -> Path:
    """The run's records as a suite writes them, with and without batches; those of `kdedge bench` are gone."""
    folder = run / "bench" / "quick" / "records"
    folder.mkdir(parents=True)
    for path in (run / "bench").glob("*.json"):
        record = json.loads(path.read_text()) | changes
        record["suite"] = {"combination": {"model": run.name}}
        record["artifact"]["name"] = record["artifact"]["precision"]
        (folder / path.name).write_text(json.dumps(record))
        record["conditions"] |= {"mode": "offline", "batch": 16}
        record |= {"latency_ms": {"compute": None}, "started_at": "2026-09-09T03:04:05Z"}
        (folder / f"offline-{path.name}").write_text(json.dumps(record))
        path.unlink()
    return folder


def test_what_a_suite_measured_is_compared(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new")
    slow_down(new, 1.25)
    folders = [of_a_suite(run) for run in (base, new)]
    assert compare(base, new)["slower_fraction"] == pytest.approx(0.25)
    for one, other in (folders, [base / "bench", new / "bench"]):
        found = compare(one, other, artifact="int8")
        assert found["slower_fraction"] == pytest.approx(0.25)
        assert found["base"]["batch"] == 1
    for folder in folders:
        (folder.parent / "suite.json").write_text('{"schema": 1}')
    found = compare(folders[0].parent, folders[1].parent, artifact="fp32")
    assert found["slower_fraction"] == 0


def test_models_of_one_suite_are_told_apart(make_run: MakeRun) -> None:
    base, other = make_run("base"), make_run("other")
    slow_down(other, 1.25)
    folder, more = of_a_suite(base), of_a_suite(other)
    for path in more.iterdir():
        shutil.copy(path, folder / f"other-{path.name}")
    with pytest.raises(RunError, match=r"has records of base-fp32, base-int8, other-fp32, other-int8\. Say which"):
        compare(folder, folder)
    assert compare(folder, folder, artifact="other-int8")["new"]["latency_ms_p90"] == pytest.approx(0.0712 * 1.25)


def test_records_that_say_most_about_each_other_are_compared(make_run: MakeRun, tmp_path: Path) -> None:
    """Rather than the newest of each: those under the same conditions, in turn where there are such."""
    base, new = make_run("base"), make_run("new")
    in_turn(base, new, 1.5)
    path = new / "bench" / "example-cpu-int8.json"
    record = json.loads(path.read_text())
    record |= {"session": "later", "started_at": "2026-09-09T03:04:05Z"}
    (new / "bench" / "later.json").write_text(json.dumps(record))
    record["conditions"]["threads"] = 4
    (new / "bench" / "threads.json").write_text(json.dumps(record))
    assert compare(base, new)["in_turn"] is True
    path.unlink()
    found = compare(base, new)
    assert (found["in_turn"], found["new"]["threads"]) == (False, 1)
    record |= {"accuracy": {"value": 0.5, "images": 540, "sha256": "5" * 64}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(record))
    found = compare(tmp_path / "a", tmp_path / "b", max_drop=10)
    assert (found["drop_points"], found["base"]["accuracy"]) == (0, 0.5)


def test_the_runtime_a_file_is_made_for_comes_before_another(make_run: MakeRun) -> None:
    """A suite measures OpenVINO last, so that its record is the newest."""
    base, new = make_run("base"), make_run("new")
    slow_down(new, 1.25)
    for run in (base, new):
        path = run / "bench" / "example-cpu-int8.json"
        record = json.loads(path.read_text()) | {"started_at": "2026-09-09T03:04:05Z"}
        record["artifact"]["runtime"] = "openvino"
        record["latency_ms"]["compute"]["p90"] = 9.0
        (run / "bench" / "later.json").write_text(json.dumps(record))
    found = compare(base, new)
    assert found["slower_fraction"] == pytest.approx(0.25)
    assert (found["base"]["runtime"], found["new"]["runtime"]) == ("onnxruntime", "onnxruntime")
    assert "openvino" not in found["text"]
    (new / "bench" / "example-cpu-int8.json").unlink()
    found = compare(base, new)
    assert (found["base"]["runtime"], found["new"]["runtime"]) == ("openvino", "openvino"), "in one, if no other"
    assert found["text"].count("p90 9.00 ms (openvino)") == 2


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


def test_other_power_modes(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new")
    conditions = json.loads((base / "bench" / "example-cpu-int8.json").read_text())["conditions"]
    modes = [conditions | {"power_mode": {"id": number, "name": name}} for number, name in ((0, "MAXN"), (2, "15W"))]
    change(base, conditions=modes[0])
    with pytest.raises(RunError, match=r"in power mode MAXN, the other in power mode unknown\. Measure both"):
        compare(base, new, max_slower=0.1)
    change(new, conditions=modes[1])
    with pytest.raises(RunError, match=r"in power mode MAXN, the other in power mode 15W\. Measure both alike"):
        compare(base, new, max_slower=0.1)
    change(new, conditions=modes[0])
    assert compare(base, new, max_slower=0.1)["verdicts"]["latency"] == "cannot tell"


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


def test_without_predictions_the_interval_is_that_of_two_shares(make_run: MakeRun) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    paired = compare(base, new)["drop_interval"]
    (new / "predictions.npz").unlink()
    found = compare(base, new, max_drop=1.2)
    assert found["drop_points"] == pytest.approx(100 * 6 / 540)
    low, high = newcombe((516 / 540, 540), (510 / 540, 540))
    assert found["drop_interval"] == pytest.approx([100 * low, 100 * high])
    assert high - low > (paired[1] - paired[0]) / 100
    assert "not image by image" in found["text"]
    assert found["verdicts"]["accuracy"] == "cannot tell"


def test_a_bundle_stands_for_its_run_and_a_file_for_nothing(make_run: MakeRun) -> None:
    run = make_run("base")
    assert compare(run / "bundle", run)["base"]["run"] == "base"
    with pytest.raises(RunError, match="is no folder"):
        compare(run / "recipe.yaml", run)


def test_a_bundle_and_records_that_left_their_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("base")
    bundle = tmp_path / "away"
    shutil.copytree(run / "bundle", bundle)
    shutil.copytree(run / "bench", bundle / "bench")
    found = compare(bundle, run, max_drop=0.0)
    assert (found["base"]["run"], found["base"]["artifact"]) == ("away", "int8")
    assert found["drop_points"] == 0
    assert found["verdicts"]["accuracy"] == "cannot tell"
    assert found["slower_fraction"] == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    for folder, exam in ((bundle, "a" * 64), (run / "bundle", "b" * 64)):
        scored = {"accuracy": {"images": 540, "sha256": exam}}
        (folder / "manifest.json").write_text(json.dumps(json.loads((folder / "manifest.json").read_text()) | scored))
    assert compare(bundle, run)["drop_points"] is None, "other test images are another exam"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    records = tmp_path / "records"
    shutil.copytree(run / "bench", records)
    with pytest.raises(RunError, match=r"has records of fp32, int8. Say which to compare with --artifact NAME"):
        compare(records, run)
    found = compare(records, run, artifact="fp32")
    assert found["base"]["artifact"] == found["new"]["artifact"] == "fp32"
    assert (found["drop_points"], found["slower_fraction"]) == (None, 0)
    with pytest.raises(RunError, match=r"has no artifact 'int4'. Expected one of: "):
        compare(records, run, artifact="int4")
    with pytest.raises(RunError, match=r"no artifact 'int4'"):
        compare(bundle, run, artifact="int4")
