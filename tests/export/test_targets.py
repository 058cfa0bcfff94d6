"""Targets: those that ship are complete and explain themselves; a user's own is checked as strictly as a recipe."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kdedge.errors import ExportError
from kdedge_export.bundle import ARTIFACTS
from kdedge_export.targets import Why, for_board, load, names

FOLDER = Path(__file__).resolve().parents[2] / "export" / "kdedge_export" / "targets"
SHIPPED = [
    "jetson-agx-orin", "jetson-agx-xavier", "jetson-orin-nano", "jetson-orin-nx", "jetson-thor", "jetson-xavier-nx",
    "raspberry-pi", "x86-cpu",
]  # fmt: skip
ALL = tuple(ARTIFACTS)
NANO = (FOLDER / "jetson-orin-nano.yaml").read_text(encoding="utf-8")


def test_the_targets_are_those_named_here() -> None:
    assert names() == SHIPPED
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_is_complete(name: str) -> None:
    target = load(name)
    assert target.name == name
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"# Command: kdedge export --int8 --target {name}" in text
    assert max(map(len, text.splitlines())) <= 120
    for sentence in target.why.model_dump().values():
        assert sentence[0].isupper() or sentence[0].isdigit()
        assert sentence.endswith(".")
    assert set(target.settings()) == {
        "about", "runtime", "forms", "precisions", "batch", "workspace_mib", "threads", "why",
    }  # fmt: skip
    assert set(target.settings()["why"]) == set(Why.model_fields)


def test_candidates_are_the_files_that_are_there() -> None:
    nano, thor, cpu = load("jetson-orin-nano"), load("jetson-thor"), load("x86-cpu")
    assert nano.candidates(ALL) == [("trt", "int8"), ("fp16", "fp16")]
    assert thor.candidates(["fp32", "trt-fp16", "int8"]) == [("trt-fp16", "int8")], "the next form of the precision"
    assert load("jetson-xavier-nx").candidates(["fp32", "trt-fp16"]) == [], "TensorRT 11 is on no Xavier"
    assert cpu.candidates(ALL) == [("int8", "int8")], "FP16 is no gain on x86"
    assert load("raspberry-pi").candidates(ALL) == [("int8", "int8"), ("fp16", "fp16")]
    assert cpu.candidates(["fp32"]) == []


BOARDS = {
    "NVIDIA Jetson Orin Nano Developer Kit": "jetson-orin-nano",
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super": "jetson-orin-nano",
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit": "jetson-orin-nx",
    "NVIDIA Jetson AGX Orin Developer Kit": "jetson-agx-orin",
    "NVIDIA Jetson Xavier NX Developer Kit": "jetson-xavier-nx",
    "Jetson-AGX": "jetson-agx-xavier",
    "NVIDIA Jetson AGX Thor Developer Kit": "jetson-thor",
    "Raspberry Pi 5 Model B Rev 1.0": "raspberry-pi",
}


def test_a_board_is_found_by_its_own_name() -> None:
    shipped = [load(name) for name in names()]
    for model, name in BOARDS.items():
        found = [target.name for target in shipped if target.fits(model, "aarch64")]
        assert found == [name], model
    for model in ("NVIDIA Jetson Nano Developer Kit", "A carrier board", None):
        assert for_board(shipped, model, "aarch64") is None
    nano = load("jetson-orin-nano")
    assert for_board([nano, load("x86-cpu")], "A carrier board", "aarch64") is nano, "no other can be meant"
    found_here = for_board(shipped, "Raspberry Pi 5", "x86_64")
    assert found_here is not None
    assert found_here.name == "x86-cpu"
    named = load("x86-cpu").model_copy(update={"name": "mine", "boards": ("Super Server",)})
    assert for_board([*shipped, named], "A Super Server 9", "x86_64") is named, "a name says more than none"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "camera.yaml"
    path.write_text(NANO.replace("name: jetson-orin-nano", "name: camera").replace("batch: 1", "batch: 4"))
    assert (load(str(path)).name, load(str(path)).batch) == ("camera", 4)
    with pytest.raises(ValidationError):
        load(str(path)).batch = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("batch: 1", "batch: 0", "line 12: 'batch' is 0; 1 or more was expected."),
        ("batch: 1", "batch: 1.5", "'batch' is 1.5; a whole number was expected."),
        ("threads: null", "threads: null\nthread: 4", "'thread' (4) is no key of a target. Did you mean 'threads'?"),
        ("about: ", "# about: ", "'about' is missing, and has no default."),
        ("runtime: tensorrt", "runtime: tensorflow", "was expected. Did you mean 'tensorrt'?"),
        ("[model.trt.onnx,", "[model.tr.onnx,", "is no file for tensorrt. Did you mean 'model.trt.onnx'?"),
        ("[model.trt.onnx,", "[model.int8.onnx,", "'forms' names model.int8.onnx, which is no file for tensorrt."),
        ("[model.trt.onnx,", "[model.onnx,", "names one twice"),
        ("[int8, fp16, fp32]", "[int8, fp32]", "are int8, fp32, and the files of 'forms' are of int8, fp16"),
        ("threads: null", "threads: 2", "'threads' null: it is not used there"),
        ("workspace_mib: 512", "workspace_mib: null", "'workspace_mib' has to be a number for tensorrt"),
        ("name: jetson-orin-nano", "name: tensorrt", "'name' is tensorrt, which every bundle has already"),
        ("name: jetson-orin-nano", "name: ../../etc", "text of the form"),
        ("schema: 1", "schema: 2", "'schema' is 2; 1 was expected"),
        ("  batch: A", "  batsh: A", "'why.batsh'"),
        ("schema: 1", "schema: 1\nschema: 1", "'schema' is given twice, on lines 4 and 5; keep one."),
        ("schema: 1", "schema: !!python/name:os.system 1", "has the tag"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    assert old in NANO
    path = tmp_path / "mine.yaml"
    path.write_text(NANO.replace(old, new, 1))
    with pytest.raises(ExportError) as caught:
        load(str(path))
    assert sentence in str(caught.value)
    assert "recipe" not in str(caught.value)


def test_fp32_is_always_compared_with(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(NANO.replace(", model.onnx]", "]").replace(", fp32]", "]"))
    with pytest.raises(ExportError, match=r"'precisions' lacks fp32.*Add model\.onnx"):
        load(str(path))


def test_an_unknown_name_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no target 'jetson-orin-nona'.*Did you mean 'jetson-orin-nano'\?"):
        load("jetson-orin-nona")
    with pytest.raises(ExportError, match=r"'jetson-nano': the last JetPack for that board is 4.*from JetPack 5 on"):
        load("jetson-nano")
    for path, why in (("no/such.yaml", "No such file"), (f"{tmp_path}/", "Is a directory")):
        with pytest.raises(ExportError, match=f"cannot be read: {why}"):
            load(path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ExportError, match="not text in UTF-8"):
        load(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ExportError, match=r"a\.yaml is empty"):
        load(str(tmp_path / "a.yaml"))


def test_the_page_on_jetsons_names_each() -> None:
    page = (FOLDER.parents[1] / "JETSON.md").read_text(encoding="utf-8")
    listed = page.partition("[Targets](kdedge_export/targets): ")[2].partition(", or the path")[0]
    assert sorted(name.strip("`") for name in listed.replace("\n", " ").split(", ")) == SHIPPED
