"""`kdedge compare` as CI calls it: the exit code is the gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdedge.cli import run as kdedge

MakeRun = Callable[..., Path]


def test_the_exit_code_is_the_gate(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    base, new = make_run("base"), make_run("new", right={"int8": 510})
    sides = ["compare", str(base), str(new)]
    assert kdedge([*sides, "--max-drop", "0.3", "--json"]) == 1
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["verdicts"]["accuracy"], document["passed"]) == ("fail", False)
    assert "new does not stand the comparison with base: it loses 1.11 points" in shown.err
    assert kdedge([*sides, "--max-drop", "3"]) == 0
    assert "Within the 3 points allowed." in capsys.readouterr().out
    assert kdedge([*sides, "--max-drop", "1", "--max-slower", "0.1"]) == 0, "what nobody can tell raises no alarm"
    told = capsys.readouterr().out
    assert told.count("Cannot tell whether it is within the") == 2
    assert "--repeats 6" in told
    shutil.rmtree(new / "bench")
    assert kdedge([*sides, "--max-slower", "0.1"]) == 2
    assert "Measure it: kdedge bench" in capsys.readouterr().err
