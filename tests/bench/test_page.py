"""The page, parsed: every number in its place, what is missing said, and nothing fetched."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kdedge.errors import DataError, RunError
from kdedge.runs import Run
from kdedge_bench import pseudo, report
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.formats import confidence
from kdedge_bench.pictures import pick, probabilities

from .page_reader import Page

MakeRun = Callable[..., Path]


def digits(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    from sklearn.datasets import load_digits

    images = load_digits().images
    return [np.rint(images[int(name.split("/")[1])] * 255 / 16).astype(np.uint8)[:, :, None] for name in ids]


def photographs(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    return [np.random.default_rng(index).integers(0, 255, (224, 224, 3), np.uint8) for index in range(len(ids))]


def moved(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    raise DataError("The folder photos does not exist.")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the usual run."""
    return Page(report([run_folder], tmp_path_factory.mktemp("page") / "report.html", load=digits))


def test_document(make_run: MakeRun) -> None:
    run = make_run()
    path = report([run], load=digits)
    assert path == run / "report.html"
    page = Page(path)
    assert page.open == []
    assert page.title == "kdedge report: tiny-digits-40-s0"
    assert page.source.startswith("<!DOCTYPE html>")
    assert ("html", "lang", "en") in page.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert len(page.ids) == len(set(page.ids))
    assert re.findall(r"<h1>(.*?)</h1>", page.source) == ["tiny-digits-40-s0"]


def test_nothing_is_fetched_or_run(page: Page) -> None:
    for tag, key, value in page.attributes:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"url\((?!#)", page.source)
    assert "@import" not in page.source
    assert "http" not in page.source


def test_headline(page: Page) -> None:
    assert (
        "Student INT8: 95.6 % of 540 test images right (95 % interval 93.5–97.0), 0.0712 ms an image (p90, 1 thread), "
        "96 KiB. It learned from 40 labels; those labels alone give 74.1 %. "
        "INT8 is shipped: 2.15 times the speed of FP32." in page.text
    )


def test_summary_table(page: Page) -> None:
    assert page.table("Network", "Test accuracy", "95 % interval", "Parameters", "Size", "p50 ms", "p90 ms") == [
        ["Baseline, labels onlymobilenet-v2", "74.1 %", "70.2–77.6", "75,000", "303 KiB", "–", "–"],
        ["Teacherwide-resnet", "97.2 %", "95.5–98.3", "370,000", "1.4 MiB", "–", "–"],
        ["Student FP32mobilenet-v2", "95.7 %", "93.7–97.1", "75,000", "298 KiB", "0.138", "0.153"],
        ["Student INT8 shipsmobilenet-v2", "95.6 %", "93.5–97.0", "75,000", "96 KiB", "0.0641", "0.0712"],
    ]
    assert (
        "Gate of the target onnxruntime-cpu: verdict pass, INT8 at 2.15 times the speed of FP32, a drop of 0.19 points "
        "on the gate images (95 % interval 0.05 to 0.90). INT8 is shipped: it runs at 2.15 times the speed of FP32 "
        "here, and it gives another class for 0.19 of 100 gate images." in page.text
    )


def test_class_table(page: Page, run_folder: Path) -> None:
    rows = page.table("Class", "Test images", "Right", "Recall", "Precision")
    with np.load(run_folder / "predictions.npz") as file:
        labels, guesses = file["test_label"], file["test_logits__int8"].argmax(1)
    for digit, row in enumerate(rows):
        of, right = int((labels == digit).sum()), int(((labels == digit) & (guesses == digit)).sum())
        named = int((guesses == digit).sum())
        assert row[:5] == [str(digit), str(of), str(right), f"{100 * right / of:.1f} %", f"{100 * right / named:.1f} %"]
    assert sum(int(row[2]) for row in rows) == 516


def test_latency_table_and_conditions(page: Page) -> None:
    rows = page.table("Artifact", "What is timed")
    assert [row[:4] for row in rows] == [
        ["Student FP32", "compute", "0.138", "0.153"],
        ["Student FP32", "end to end", "0.183", "0.203"],
        ["Student INT8", "compute", "0.0641", "0.0712"],
        ["Student INT8", "end to end", "0.109", "0.121"],
    ]
    assert rows[2][4:] == ["0.0997", "0.0570", "0.142", "0.0655", "0.00356", "1,000"]
    for pair in ("Machine Example CPU @ 2.0 GHz", "Model Laptop 7", "Threads 1", "Effort quick", "Flags none",
                 "Runtime onnxruntime 1.23.0", "Load average before 0.4, 0.5, 0.6, after 0.7, 0.5, 0.6",
                 "Temperature, °C before 45, after 46", "Measured at 2026-01-02T03:04:05Z",
                 "Not measured power mode, clocks, MHz"):  # fmt: skip
        assert pair in page.text


def test_trusted_set_and_provenance(page: Page, run_folder: Path) -> None:
    assert "610 images are trusted, 48.5 % of the unlabeled ones; 98.2 % of their labels are right." in page.text
    assert "Left out: 400 (low confidence), 150 (cluster disagrees), 97 (quota)." in page.text
    for part in ("Recipe tiny Data digits Labels 40 Seed 0 Started at 2026-01-02 03:04 UTC Training took 1 min 35 s",
                 "Versions kdedge 0.1.0, torch 2.11.0", "Host system Linux-6.1, machine x86_64", "Device cpu",
                 "kdedge train-recipe tiny --data digits --labels 40 --seed 0 kdedge export --int8 "
                 "kdedge bench --effort quick kdedge report"):  # fmt: skip
        assert part in page.text
    plan = "memory format channels-last, threads 2, precision fp32, compile no"
    assert page.table("Stage", "Steps") == [
        ["baseline", "300", "8.0 s", "3,000", plan],
        ["outer", "600", "30.0 s", "3,900", plan],
        ["trusted", "–", "1.5 s", "–", "–"],
        ["inner", "1,000", "55.5 s", "4,100", plan],
    ]
    manifest = json.loads((run_folder / "bundle" / "manifest.json").read_text())
    recipe = hashlib.sha256((run_folder / "recipe.yaml").read_bytes()).hexdigest()
    assert page.table("SHA-256 of", "Hash") == [
        ["Recipe as asked for", recipe], ["Data set", "d" * 64], ["Ids of the test images", "5" * 64],
        *([entry["file"], entry["sha256"]] for entry in manifest["artifacts"].values()),
    ]  # fmt: skip


def test_pictures(page: Page, run_folder: Path) -> None:
    with np.load(run_folder / "predictions.npz") as file:
        ids, labels, logits = file["test_id"], file["test_label"], file["test_logits__int8"]
    probs = probabilities(logits)
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    surest = wrong[np.argsort(-probs.max(1)[wrong])][:12]
    assert "Wrong: the 12 most confident of 24 mistakes" in page.text
    assert len(page.images) == 12 + 6 + 1  # one is lost to INT8
    for image, index in zip(page.images[:12], surest, strict=True):
        assert image["alt"] == f"Test image of class {labels[index]}, predicted {logits[index].argmax()}"
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        (pixels,) = digits(None, [str(ids[index])])  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels[:, :, 0])
    for image in page.images[12:18]:
        truth, guess = re.findall(r"\d+", image["alt"])
        assert truth == guess
    first = surest[0]
    assert f"{logits[first].argmax()} {confidence(float(probs[first].max()))}".replace("\xa0", " ") in page.text


def test_pictures_are_opened_through_the_data_room(run_folder: Path, tmp_path: Path) -> None:
    """Without a stand-in: the run's recipe names the data set, its bundle the preprocessing."""
    page = Page(report([run_folder], tmp_path / "report.html"))
    expected = Page(report([run_folder], tmp_path / "expected.html", load=digits))
    assert len(page.images) == 19
    assert page.images == expected.images


def test_the_data_is_opened_once_and_without_the_recipe(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing a large folder takes seconds; and the keys of an old recipe may be no keys any more."""
    from kdedge import data

    run, opened = make_run(), []
    really = data.open_source
    monkeypatch.setattr(data, "open_source", lambda spec, **options: (opened.append(spec), really(spec, **options))[1])
    (run / "recipe.yaml").write_text("schema: 1\nname: tiny\nno_key_any_more: 1\n")
    page = Page(report([run]))
    assert opened == ["digits"]
    assert len(page.images) == 19


@pytest.mark.parametrize(
    ("spec", "sentence"), [("digit", "The test images cannot be opened from here."), ("digits", "has no image 'x/")]
)
def test_data_that_has_changed_is_said(make_run: MakeRun, spec: str, sentence: str) -> None:
    run = make_run(data=spec, ids=[f"x/{index}" for index in range(540)])
    page = Page(report([run]))
    assert sentence in page.text
    assert page.images == []


def test_pick_spreads_over_the_classes_and_leaves_out_the_unknown() -> None:
    labels = np.array([0, 0, 1, 2, -1, 1])
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 0, 2, 2]] * np.array([[1], [2], [1], [5], [9], [3]], np.float32)
    right, wrong, count = pick(labels, logits)
    assert right == [0, 2]
    assert wrong == [3, 5, 1]
    assert count == 3


def test_large_photographs_are_made_small(make_run: MakeRun) -> None:
    def photos(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
        return [np.full((224, 160, 3), 200, np.uint8) for _ in ids]

    page = Page(report([make_run()], load=photos))
    content = base64.b64decode(page.images[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(content)).size == (91, 128)
    assert "class" not in page.images[0]


def drop(file: str) -> Callable[[Path], None]:
    return lambda run: (run / file).unlink()


def no_baseline(run: Path) -> None:
    edit(run / "result.json", lambda result: result.update(baseline=None))


def val_is_test(run: Path) -> None:
    edit(run / "splits.json", lambda splits: splits.update(test_is_val=True))


def drop_bundle(run: Path) -> None:
    shutil.rmtree(run / "bundle")


def drop_bench(run: Path) -> None:
    shutil.rmtree(run / "bench")


def drop_int8(run: Path) -> None:
    edit(run / "bundle" / "manifest.json", lambda manifest: manifest["artifacts"].pop("int8"))


def no_test_labels(run: Path) -> None:
    with np.load(run / "predictions.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays["test_label"] = np.full(540, -1)
    np.savez(run / "predictions.npz", **arrays)
    edit(
        run / "result.json",
        lambda result: [result[key].update(test_accuracy=None) for key in ("baseline", "teacher", "student")],
    )
    edit(
        run / "bundle" / "manifest.json",
        lambda manifest: [entry.update(accuracy=None) for entry in manifest["artifacts"].values()],
    )


def unknown_truth(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"pseudo_label_accuracy": None}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    edit(run / "result.json", lambda result: result["trusted"].update(precision=None))


def with_health(run: Path) -> None:
    """What runs log since pseudo labels are watched."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    precision = {"outer": [0.9, None, *[0.8] * 8], "inner": [0.95, 0.4, *[0.9] * 8]}
    for line in lines:
        if line["stage"] in precision:
            line |= {"pseudo_label_precision": precision[line["stage"]], "pseudo_label_known": [9.0] * 10}
    val = {"val_accuracy": 0.9, "val_kept_fraction": 0.805, "val_pseudo_label_accuracy": 0.941}
    lines.append({"stage": "inner", "step": 1000, "total_steps": 1000} | val)
    lines.append({"stage": "outer", "step": 1400, "total_steps": 600, "alarm": "One class <b>takes</b> over."})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {"precision_before_filters": 0.9, "precision_after_confidence": 0.95, "precision_after_clusters": 0.97,
            "confidence_only_precision": 0.961}  # fmt: skip
    edit(run / "result.json", lambda result: result["trusted"].update(more))
    guards = {"duplicates_removed": 3, "outliers": 1}
    edit(run / "result.json", lambda result: result.update(data_guards=guards))


def test_pseudo_labels(make_run: MakeRun) -> None:
    run = make_run()
    with_health(run)
    page = Page(report([run], load=digits))
    alarm = "Alarm. Outer network (teacher), step 1,400: One class <b>takes</b> over."
    assert page.text.index(alarm) < page.text.index("Test accuracy")
    assert page.table("At the end of") == [
        ["Outer network (teacher)", "90.0 %", "96.0 %", "–", "–"],
        ["Inner network (student)", "90.0 %", "96.0 %", "80.5 %", "94.1 %"],
    ]
    assert page.table("Unlabeled images") == [
        ["All pseudo labels", "1,257", "90.0 %"],
        ["Confident", "857", "95.0 %"],
        ["Confident, and their cluster agrees", "707", "97.0 %"],
        ["Trusted", "610", "98.2 %"],
        ["By confidence alone, as many of each class", "610", "96.1 %"],
    ]
    assert "3 unlabeled images nearly the same as a validation or test image were removed." in page.text
    assert "1 unlabeled image was found to be of none of the classes, and taught nothing." in page.text


def test_a_run_from_before_pseudo_labels_were_watched(page: Page) -> None:
    assert "Alarm" not in page.text
    assert "The right share by class was not logged" in page.text
    assert page.table("At the end of")[1] == ["Inner network (student)", "90.0 %", "96.0 %", "–", "–"]
    assert not any(table[0][0] == "Unlabeled images" for table in page.tables)
    assert "nearly the same" not in page.text


EXACTLY = "No unlabeled image is exactly the same as a validation or test image."
NEARLY = "No unlabeled image is nearly the same as a validation or test image."


@pytest.mark.parametrize(
    ("removed", "looked", "lookalikes", "sentences"),
    [
        (0, True, 0, [NEARLY]),
        (0, False, 0, [EXACTLY]),
        (2, False, 0, ["2 unlabeled images exactly the same as a validation or test image were removed."]),
        (None, True, 0, []),  # data.remove_leaks=false
        (None, None, 0, []),
        (0, None, 0, []),  # a result of before: nobody wrote down whether, and how, they were looked for
        (1, None, 0, ["1 unlabeled image nearly the same as a validation or test image was removed."]),
        (0, True, 9, [EXACTLY, "9 unlabeled images look nearly like a validation or test image: left in, too many to "
                               "be accidental copies."]),
    ],
)  # fmt: skip
def test_duplicates_are_told_as_they_were_looked_for(
    make_run: MakeRun, removed: int | None, looked: bool | None, lookalikes: int, sentences: list[str]
) -> None:
    run = make_run()
    guards = {"duplicates_removed": removed} | ({} if looked is None else {"near_duplicates_looked_for": looked})
    edit(run / "result.json", lambda result: result.update(data_guards=guards))
    if lookalikes:
        edit(run / "splits.json", lambda splits: splits.update(lookalikes=lookalikes))
    assert pseudo.guards(read_facts(Run(run))) == sentences
    page = Page(report([run], load=digits))
    assert all(sentence in page.text for sentence in sentences)
    assert sentences or "the same as a validation" not in page.text


def test_a_student_trained_alone_has_no_teacher_and_no_trusted_set(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "result.json", lambda result: result.update(teacher=None, trusted=None, data_guards={"outliers": None}))
    (run / "trusted.npz").unlink()
    (run / "teacher.safetensors").unlink()
    page = Page(report([run], load=digits))
    assert "The run has no trusted set." in page.text
    assert "None" not in page.text
    assert "Student INT8: 95.6 %" in page.text


@pytest.mark.parametrize(
    ("remove", "sentences"),
    [
        (drop_bundle, ["The student is not exported yet: kdedge export --int8."]),
        (drop_bench, ["No latency was measured for this run", "Latency (–) is not measured yet"]),
        (drop_int8, ["The bundle has no INT8 file: kdedge export --int8."]),
        (drop("metrics.jsonl"), ["No loss was logged.", "No learning rate was logged.", "No kept share"]),
        (drop("predictions.npz"), ["There is no confusion matrix", "no predictions on test images"]),
        (drop("result.json"), ["its training has not finished", "The run has no trusted set."]),
        (drop("recipe.yaml"), ["Student INT8: 95.6 %"]),
        (drop("splits.json"), ["Student INT8: 95.6 %"]),
        (no_baseline, ["No baseline on the labels alone was trained"]),
        (val_is_test, ["the test images of this page are its validation images"]),
        (no_test_labels, ["No test image has a known class", "There is no confusion matrix", "accuracy not known"]),
        (unknown_truth, ["accuracy of the pseudo labels is not known", "their labels are right is not known"]),
    ],
)
def test_what_is_missing_is_said(make_run: MakeRun, remove: Callable[[Path], object], sentences: list[str]) -> None:
    run = make_run()
    remove(run)
    page = Page(report([run], load=digits))
    assert page.open == []
    for sentence in sentences:
        assert sentence in page.text
    assert "None" not in page.text.replace("None was left out", "")
    assert "nan" not in page.text.lower().split()


def test_only_a_manifest_is_still_a_page(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "manifest.json").write_text('{"schema": 1, "status": "failed"}')
    page = Page(report([run]))
    assert "its training has not finished" in page.text
    assert "test accuracy not known" in page.text


def test_images_that_are_gone_are_said(make_run: MakeRun) -> None:
    page = Page(report([make_run()], load=moved))
    assert "The test images cannot be opened from here. The folder photos does not exist." in page.text
    assert page.images == []


def test_several_runs(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("first"), make_run("second", right={"int8": 500}), make_run("third")]
    shutil.rmtree(runs[2] / "bench")
    page = Page(report(runs, tmp_path / "all.html", load=digits))
    assert page.title == "kdedge report: 3 runs"
    assert page.table("Run", "Network", "Test accuracy") == [
        ["first", "Student INT8", "95.6 %", "93.5–97.0", "75,000", "96 KiB", "0.0641", "0.0712"],
        ["second", "Student INT8", "92.6 %", "90.1–94.5", "75,000", "96 KiB", "0.0641", "0.0712"],
        ["third", "Student INT8", "95.6 %", "93.5–97.0", "75,000", "96 KiB", "–", "–"],
    ]
    assert len(page.ids) == len(set(page.ids))
    links = [value for tag, key, value in page.attributes if tag == "a" and key == "href"]
    assert set(links) == {"#content", "#run1", "#run2", "#run3"} <= {f"#{name}" for name in page.ids}


def test_hostile_names_are_text(make_run: MakeRun) -> None:
    names = [f"<script>alert({index})</script>" for index in range(10)]
    run = make_run(classes=names)
    page = Page(report([run], load=digits))
    assert not any(tag == "script" for tag, _, _ in page.attributes)
    assert "<script" not in page.source
    assert "<script>alert(3)</script>" in page.text


def test_a_hundred_classes_with_long_names(make_run: MakeRun) -> None:
    names = [f"number {index} of the very long names that a flower may have" for index in range(100)]
    labels = np.arange(1000) % 100
    run = make_run(classes=names, labels=labels, ids=[f"x/{index}.jpg" for index in range(1000)],
                   right={"baseline": 500, "teacher": 930, "student": 900, "fp32": 900, "int8": 893})  # fmt: skip
    page = Page(report([run], load=photographs))
    rows = page.table("Class", "No.", "Test images", "Right")
    assert [row[:3] for row in rows] == [[name, str(index), "10"] for index, name in enumerate(names)]
    assert sum(int(row[3]) for row in rows) == 893
    assert "Classes are numbered as in the table below." in page.text
    assert len(page.images) == 12 + 6 + 7
    assert len(page.source) < 1_000_000  # though noise is the worst of photographs


def test_the_same_run_makes_the_same_page(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    first = report([run], tmp_path / "1.html", load=digits).read_bytes()
    assert report([run], tmp_path / "2.html", load=digits).read_bytes() == first


def test_errors(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No run was named"):
        report([])
    with pytest.raises(RunError, match="is not a run folder"):
        report([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        report([make_run()], tmp_path / "file" / "x.html", load=moved)
