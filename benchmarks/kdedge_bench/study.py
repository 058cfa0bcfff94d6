"""`kdedge study simclr`: the runs of a plan one after the other, and the tables and answers so far after each."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdedge import recipe_io
from kdedge.recipe import Recipe
from kdedge.recipe_yaml import Document
from kdedge.runs import Run, write_bytes, write_json
from kdedge_bench.study_match import match_teachers
from kdedge_bench.study_page import page
from kdedge_bench.study_plan import StudyPlan
from kdedge_bench.study_rows import OTHER, SAME, StudyRow, study_jobs, study_rows, subset
from kdedge_bench.study_table import study_document
from kdedge_bench.study_text import markdown
from kdedge_bench.work import Work, make_runs
from kdedge_bench.work_folder import WorkFolder
from kdedge_bench.work_job import Job, run_name

__all__ = ["KIND", "command_of", "derived_recipe", "study"]

KIND = "study"
PAGE_EVERY_S = 30.0
"""At most: its figures take as long to draw as a short run to train. The tables are written after every run."""


def study(plan: StudyPlan, out: Path | None = None, work: Work | None = None) -> dict[str, Any]:
    """Make every run of the plan that is not finished, and what study.json says in the end.

    Raises RunError where the folder holds another study, RecipeError where a run of the plan is no recipe, and whatever
    training raises; what was finished stays, and the same call goes on.
    """
    folder = WorkFolder(out or plan.default_folder, KIND)
    rows = study_rows(plan)
    for row in rows:  # all of them are possible, before the first is made
        derived_recipe(plan, row, plan.seeds[0], start="a file", teacher="a file")
    folder.begin(plan.to_json(), ("plan_sha256",))

    drawn: list[float] = []  # when

    def recipe_of(job: Job[StudyRow]) -> Recipe:
        start = str(folder.run(run_name(job.row.start, job.seed)).pretrained_path) if job.row.start else None
        reads = folder.run(run_name(job.row.input_of, job.seed)) if job.row.input_of else None
        return derived_recipe(plan, job.row, job.seed, start, _teacher(plan, rows, folder, job), reads)

    def write() -> dict[str, Any]:
        with folder.lock("table"):  # so that an older view never replaces a newer one
            document = study_document(plan, rows, folder, command_of(plan, folder.path))
            write_json(folder.json_path, document)
            write_bytes(folder.text_path, markdown(document).encode())
            if document["status"] == "complete" or not drawn or time.monotonic() - drawn[-1] > PAGE_EVERY_S:
                write_bytes(folder.path / "study.html", page(document).encode())
                drawn.append(time.monotonic())
        return document

    return make_runs(folder, study_jobs(rows, plan.seeds), recipe_of, write, work or Work())


def derived_recipe(
    plan: StudyPlan, row: StudyRow, seed: int, start: str | None, teacher: str | None, reads: Run | None = None
) -> Recipe:
    """The recipe of a row for a seed; `start` and `teacher` are the files it begins with.

    `reads` is the finished run whose input it has, to the normalisation: what starts from scratch is then compared with
    what was pre-trained on the very same pixels.
    """
    config = plan.config
    data = config.data.model_dump(mode="json") | {"spec": row.on.spec, "labels": row.labels}
    if reads is not None:
        known = recipe_io.load(str(reads.recipe_path)).data.model_dump(mode="json")
        data |= {key: known[key] for key in ("image_px", "channels", "mean", "std")}
    if row.classes is not None:
        data["classes"] = subset(row.on.classes, row.classes, seed)
    student = {**row.network.model_dump(mode="json"), "method": row.method, "optim": row.optim.model_dump(mode="json")}
    document: dict[str, Any] = {
        "schema": 1,
        "name": row.name,
        "seed": seed,
        "data": data,
        "views": config.views.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json"),
        "teacher": {"ready": teacher} if row.teachers else None,
        "trust": {"filters": "none"},
        "student": student,
        "baseline": {"enabled": False},
    }
    if row.pretrains:
        document["pretrain"] = config.pretrain.model_dump(mode="json") | {"of": "student"}
        student["init"] = "simclr"
    elif start is not None and row.start is not None:
        student |= {"init": start, "projection_layers": row.layers, "head": row.head}
    return recipe_io.validate(Document(f"the run {row.name} of the plan {plan.origin}", document), Recipe)


def _teacher(plan: StudyPlan, rows: Sequence[StudyRow], folder: WorkFolder, job: Job[StudyRow]) -> str | None:
    """The network that teaches this run: the only one it names, or the one of its kind that was matched."""
    names = job.row.teachers
    if not names:
        return None
    chosen = names[0]
    if len(names) > 1 and plan.config.distillation is not None:
        known = {row.name: row.facts["teaches"] for row in rows if row.name in names}
        teachers = {
            who: [(name, folder.run(run_name(name, job.seed))) for name in names if known[name] == who]
            for who in (SAME, OTHER)
        }
        data = plan.config.data.model_copy(update={"spec": job.row.on.spec})
        match = match_teachers(folder, job.seed, teachers, data, plan.config.distillation)
        chosen = match.chosen(job.row.facts["teacher"])
    return str(folder.run(run_name(chosen, job.seed)).student_path)


def command_of(plan: StudyPlan, folder: Path) -> str:
    """The command of the whole study, which also goes on with it."""
    words = ["kdedge", "study", "simclr", "--plan", plan.origin]
    words += [word for spec in plan.data for word in ("--data", spec)]
    words += ["--seeds", str(len(plan.seeds))] + (["--first-seed", str(plan.seeds[0])] if plan.seeds[0] else [])
    words += [word for setting in plan.settings for word in ("--set", setting)]
    return shlex.join([*words, "--out", str(folder)])
