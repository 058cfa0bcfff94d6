"""The report's section on INT8 by value, and what it says where the bundle does not."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdedge.runs import Run
from kdedge_bench import charts, report
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.int8_section import int8_section

MakeRun = Callable[..., Path]


def black(facts: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    return [np.zeros((8, 8, 1), np.uint8) for _ in ids]


def test_by_value(run_folder: Path) -> None:
    facts = read_facts(Run(run_folder))
    found = int8_section(facts, black)
    assert found is not None
    assert found.images == "540 test images"
    files = found.files.texts()
    assert [row[0] for row in files] == ["Student FP32", "Student INT8"]
    assert files[1] == ("Student INT8", "95.6\N{NO-BREAK SPACE}%", "0.19", "0.20", "31")
    assert found.moved.texts() == [("3", "54", "2", "1", "\N{MINUS SIGN}1")]
    assert found.ways.texts()[1] == ("with the cures that helped", "0.25", "0.0012", "taken")
    assert found.cures.texts() == [("bias correction", "0.0020", "0.0012", "kept")]
    assert found.layers.texts()[:2] == [("backbone.layer0", "0.01", "float"), ("backbone.layer1", "0.005", "INT8")]
    assert len(found.layers.rows) == 15
    assert " ".join(found.sentences) == (
        "Ranges come from 256 images (calibration). Left in float: backbone.layer0. "
        "In no layer does the noise come within 10 dB of the signal. Most is lost at layer3 (Conv): 9 dB."
    )


def test_lost_images_are_those_that_only_fp32_gets_right(run_folder: Path) -> None:
    facts = read_facts(Run(run_folder))
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    assert labels is not None
    assert before is not None
    assert after is not None
    lost = {
        str(facts.predictions["test_id"][place])
        for place in range(len(labels))
        if before[place].argmax() == labels[place] != after[place].argmax()
    }
    found = int8_section(facts, black)
    assert found is not None
    assert {picture.id for picture in found.lost.wrong} == lost
    assert found.lost.wrong_in_all == len(lost) > 0
    assert {row["image"] for row in found.lost_images.rows} == lost
    assert all(row["class"] != row["int8_says"] for row in found.lost_images.rows)


def test_figures(run_folder: Path) -> None:
    facts = read_facts(Run(run_folder))
    drawn = charts.sensitivity(facts.quantization, "k")
    assert drawn is not None
    assert ">layer0<" in drawn
    assert ">layer12<" not in drawn  # the twelve most sensitive ones
    line = charts.fidelity(facts.proof, "k")
    assert line is not None
    assert "INT8, ONNX Runtime: 29 dB at the logits" in line
    assert charts.sensitivity(None, "k") is charts.fidelity({}, "k") is None


def test_on_the_page_and_without(make_run: MakeRun) -> None:
    run = make_run()
    page = report([run], load=black).read_text(encoding="utf-8")
    assert "What INT8 changes" in page
    assert "that only FP32 gets right" in page
    (run / "bundle" / "proof.json").unlink()
    (run / "bundle" / "quantization.json").unlink()
    page = report([run], load=black).read_text(encoding="utf-8")
    assert "The bundle has no proof.json: export it again" in page
    assert "The layers were not weighed one by one" in page
