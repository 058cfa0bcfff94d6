"""The command line from outside: what it prints where, and how it exits."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from kdedge import cli as command_line
from kdedge.cli_common import Reply, columns, command_output
from kdedge.errors import BudgetFailed, BugError, DataError, MissingPackage
from kdedge_device.failures import CorruptFailure

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Adds a command `fail` that raises what it is given."""

    def add(error: BaseException) -> None:
        @click.command("fail")
        @command_output
        def fail() -> Reply:
            print("a library talks")
            raise error

        monkeypatch.setitem(command_line.cli.commands, "fail", fail)

    return add


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (DataError("The folder x is empty."), 2, "The folder x is empty."),
        (MissingPackage("timm", "timm weights", "pip install timm"), 2, "Install it with: pip install timm"),
        (BudgetFailed("Too slow."), 1, "Too slow."),
        (CorruptFailure("model.onnx was altered."), 2, "model.onnx was altered."),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C."),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "No space left on device: runs/x."),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "Permission denied: runs/x."),
        (BugError("state 3"), 1, "BugError: state 3\nThis is our bug, not yours."),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero\nThis is our bug, not yours."),
    ],
)
def test_an_error_is_a_sentence_and_a_code(
    failing: Callable[[BaseException], None], capsys: Capture, error: BaseException, code: int, part: str
) -> None:
    failing(error)
    assert command_line.run(["fail"]) == code
    shown = capsys.readouterr()
    assert part in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_with_json_an_error_is_a_document(failing: Callable[[BaseException], None], capsys: Capture) -> None:
    failing(DataError("The folder x is empty."))
    assert command_line.run(["fail", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "The folder x is empty.", "exit_code": 2}
    assert shown.err == "a library talks\nThe folder x is empty.\n"


def test_debug_shows_the_traceback(failing: Callable[[BaseException], None], capsys: Capture) -> None:
    failing(DataError("The folder x is empty."))
    assert command_line.run(["fail", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian-recipe"], "No such command 'trian-recipe'. (Did you mean one of: 'recipes', 'train-recipe'?)"),
        (["recipes", "lst"], "Did you mean 'list'?"),
        (["train-recipe", "tiny", "--labls", "3"], "Did you mean '--labels'?"),
        (["train-recipe", "tny"], "There is no recipe 'tny'; there are efficientnet, mnasnet, mobilenet, "),
        (["train-recipe", "tiny", "--labels", "0"], "Invalid value for '--labels'"),
        (["train-recipe", "tiny", "--set", "student.widht=1"], "Did you mean 'width'?"),
        (["train-recipe", "tiny", "--device", "gpu"], "There is no device 'gpu'. Expected auto, cpu, cuda or cuda:N."),
        (["train-recipe"], "Missing argument 'RECIPE'"),
        (["eval", "x"], "Missing option '--data'"),
        (["export", "nowhere"], "The run folder nowhere does not exist."),
        (["export", "model.onnx"], "model.onnx brings no images; name some of its kind"),
        (["bench", "nowhere"], "nowhere does not exist."),
        (["report", "nowhere"], "The run folder nowhere does not exist."),
        (["report"], "There is no finished run under"),
        (["predict", "nowhere", "x.png"], "nowhere does not exist; a run folder, a bundle folder or an .onnx file"),
        (["compare", "a", "b"], "a is no folder."),
        (["data", "check", "nowhere/at/all"], "nowhere/at/all"),
        (["recipes", "validate", "nowhere.yaml"], "The recipe file nowhere.yaml does not exist."),
    ],
)
def test_a_mistake_is_told_and_exits_with_2(
    arguments: list[str], part: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.run([*arguments, "--json"]) == 2
    shown = capsys.readouterr()
    assert part in shown.err
    assert part in json.loads(shown.out)["error"]
    assert list(tmp_path.iterdir()) == []


def test_help_goes_to_standard_output(capsys: Capture) -> None:
    assert command_line.run(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: kdedge ")


def test_a_reader_that_has_gone_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from kdedge.cli import main; main()", "--help"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == command_line.BROKEN_PIPE


def test_recipes_list_show_copy_validate(capsys: Capture, tmp_path: Path) -> None:
    assert command_line.run(["recipes", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == [
        "efficientnet", "mnasnet", "mobilenet", "mobilenet-v3", "regnet", "resnet", "shufflenet", "simclr",
        "squeezenet", "tiny", "tiny-simclr",
    ]  # fmt: skip
    assert command_line.run(["recipes", "show", "tiny"]) == 0
    shown = capsys.readouterr().out
    mine = tmp_path / "mine.yaml"
    assert command_line.run(["recipes", "copy", "tiny", str(mine)]) == 0
    assert mine.read_text() == shown
    assert command_line.run(["recipes", "copy", "tiny", str(mine)]) == 2
    assert command_line.run(["recipes", "validate", str(mine)]) == 0
    mine.write_text(shown + "seed: 1\nseeds: 2\nseed: 3\n")
    capsys.readouterr()
    assert command_line.run(["recipes", "validate", str(mine), "--json"]) == 2
    last = shown.count("\n")
    assert json.loads(capsys.readouterr().out)["error"].splitlines() == [
        f"2 problems in {mine}:",
        f"  {mine}, line {last + 3}: 'seed' is given twice, on lines {last + 1} and {last + 3}; keep one.",
        f"  {mine}, line {last + 2}: 'seeds' (2) is no key of a recipe. Did you mean 'seed'?",
    ]


def test_models_are_counted(capsys: Capture) -> None:
    assert command_line.run(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # torchvision's published numbers: https://docs.pytorch.org/vision/stable/models.html
    assert (rows["mobilenet-v2"]["params"], rows["mobilenet-v2"]["input_px"]) == (3_504_872, 224)
    assert rows["mobilenet-v2"]["macs"] == pytest.approx(0.30e9, rel=0.02)
    assert rows["resnet18"]["params"] == 11_689_512
    assert rows["resnet18"]["macs"] == pytest.approx(1.81e9, rel=0.01)
    assert (rows["shufflenet-v2"]["widths"], rows["mobilenet-v2"]["widths"]) == ([0.5, 1.0, 1.5, 2.0], None)
    assert all(row["int8"] for row in rows.values())


def test_data_check_counts_and_exits_with_1_where_something_is_wrong(capsys: Capture, tmp_path: Path) -> None:
    from PIL import Image

    assert command_line.run(["data", "check", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": 1257, "unlabeled": 0, "val": 0, "test": 540}
    for part, name, tone in (("train", "a", 10), ("train", "b", 200), ("test", "a", 10), ("test", "b", 100)):
        folder = tmp_path / "photos" / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (tone, tone, 0)).save(folder / f"{part}.png")
    assert command_line.run(["data", "check", str(tmp_path / "photos")]) == 1
    shown = capsys.readouterr().out
    assert "leaks between parts: " in shown
    assert "test/a/test.png (test) = train/a/train.png (train)" in shown


def test_columns_are_aligned() -> None:
    assert columns([("a", "b"), ("long", "c")], indent=1) == " a     b\n long  c"
