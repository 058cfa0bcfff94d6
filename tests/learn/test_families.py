"""New families through the stages, as teacher and as student, at toy size."""

from pathlib import Path

import pytest

from kdedge import pipeline, recipe_io
from kdedge.models.weights import load_model

SMALL = [
    "teacher.optim.total_steps=3",
    "student.optim.total_steps=3",
    "baseline.enabled=false",
    "trust.threshold=0.0",
    "data.labels=40",
]


@pytest.mark.parametrize(("teacher", "student"), [("squeezenet", "shufflenet-v2"), ("shufflenet-v2", "mnasnet")])
def test_a_family_is_teacher_and_student(teacher: str, student: str, tmp_path: Path) -> None:
    settings = [f"teacher.arch={teacher}", f"student.arch={student}", "student.width=0.5"]
    run, result = pipeline.train(recipe_io.load("tiny", [*SMALL, *settings]), tmp_path / "run")
    assert (result["teacher"]["arch"], result["student"]["arch"]) == (teacher, student)
    for file, arch, width in (("teacher", teacher, 1.0), ("student", student, 0.5)):
        loaded = load_model(run.path / f"{file}.safetensors")
        assert (loaded.arch, loaded.spec.width, loaded.spec.halvings) == (arch, width, 2)
        assert loaded.num_params == result[file]["params"]
