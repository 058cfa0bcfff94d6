"""Plain lines: what is said is shown at once, and a line of metrics without facts is not."""

import pytest

from kdedge.cli_display import PlainDisplay


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    display.stage("outer", 20)
    display.step({"step": 10, "total_steps": 20, "loss": 1.5, "kept_fraction": 0.25})  # not yet ten seconds
    display.say("Stage outer, step 10 of 20: One class takes over the pseudo labels.")
    display.step({"step": 20, "total_steps": 20, "loss": 0.5, "kept_fraction": 0.75, "images_per_second": 1234.0})
    display.step({"step": 20, "total_steps": 20, "alarm": "One class takes over the pseudo labels."})
    display.step({"step": 20, "total_steps": 20, "val_accuracy": 0.9})
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["outer: 20 steps", "Stage outer, step 10 of 20: One class takes over the pseudo labels."]
    assert said[2].startswith("outer: step 20 of 20")
    assert said[2].endswith(", 1,234 images/s, loss 0.500, kept 75 %")
    assert len(said) == 3
