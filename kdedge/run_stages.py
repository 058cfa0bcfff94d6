"""What the manifest of a run says of its stages: which are done, and how each is computed."""

from typing import Any, final

from kdedge.runs import Run, sha256_file
from kdedge.train.engine import EnginePlan

__all__ = ["StageNotes"]


@final
class StageNotes:
    """Stages are baseline, outer, trusted and inner."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._files = {
            "baseline": run.baseline_path,
            "outer": run.teacher_path,
            "trusted": run.trusted_path,
            "inner": run.student_path,
        }

    def begins(self, stage: str) -> None:
        self.run.update_manifest(stage=stage)

    def done(self) -> dict[str, Any]:
        """The stages whose file is there, with the hash that was noted; a removed or altered one is made anew."""
        return {
            stage: facts
            for stage, facts in self.run.read_manifest()["stages"].items()
            if self._files[stage].is_file() and sha256_file(self._files[stage]) == facts["sha256"]
        }

    def note_done(self, stage: str, **facts: Any) -> None:
        """`facts` hold the sha256 of the stage's file."""
        self.run.update_manifest(stages=self.done() | {stage: facts})

    def plan(self, stage: str) -> EnginePlan | None:
        """How the stage is computed, once that has been noted."""
        noted = self.run.read_manifest()["engine_plan"].get(stage)
        return None if noted is None else EnginePlan.model_validate(noted["plan"])

    def plan_of(self, stage: str) -> EnginePlan:
        """As `plan`, of a stage that has one."""
        return EnginePlan.model_validate(self.run.read_manifest()["engine_plan"][stage]["plan"])

    def note_plan(self, stage: str, plan: EnginePlan, timings: list[dict[str, object]]) -> None:
        plans = self.run.read_manifest()["engine_plan"] | {stage: {"plan": plan.model_dump(), "measured": timings}}
        self.run.update_manifest(engine_plan=plans)
