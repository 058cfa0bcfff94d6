"""What the manifest of a run says of its stages: which are done, and how each is computed."""

from typing import Any, final

from kdedge.runs import Run, sha256_file
from kdedge.train.distributed import ALONE, Ranks
from kdedge.train.engine import EnginePlan

__all__ = ["StageNotes"]


@final
class StageNotes:
    """Stages are pretrain, baseline, outer, trusted and inner.

    The first process writes, and the others wait until it has.
    """

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self.run, self.ranks = run, ranks
        self._files = {
            "pretrain": run.pretrained_path,
            "baseline": run.baseline_path,
            "outer": run.teacher_path,
            "trusted": run.trusted_path,
            "inner": run.student_path,
        }

    def begins(self, stage: str) -> None:
        self._write(stage=stage)

    def finished(self, elapsed_s: float) -> None:
        self._write(status="finished", stage=None, elapsed_s=round(elapsed_s, 2))

    def done(self) -> dict[str, Any]:
        """The stages whose file is there, with the hash that was noted; a removed or altered one is made anew."""
        return {
            stage: facts
            for stage, facts in self.run.read_manifest()["stages"].items()
            if self._files[stage].is_file() and sha256_file(self._files[stage]) == facts["sha256"]
        }

    def note_done(self, stage: str, **facts: Any) -> None:
        """`facts`, and the sha256 of the stage's file, which is there."""
        if self.ranks.is_first:
            facts = {"sha256": sha256_file(self._files[stage])} | facts
        self._write(stages=self.done() | {stage: facts})

    def plan(self, stage: str) -> EnginePlan | None:
        """How the stage is computed, once that has been noted."""
        noted = self.run.read_manifest()["engine_plan"].get(stage)
        return None if noted is None else EnginePlan.model_validate(noted["plan"])

    def plan_of(self, stage: str) -> EnginePlan:
        """As `plan`, of a stage that has one."""
        return EnginePlan.model_validate(self.run.read_manifest()["engine_plan"][stage]["plan"])

    def note_plan(self, stage: str, plan: EnginePlan, timings: list[dict[str, object]]) -> None:
        noted = {"plan": plan.model_dump(), "measured": timings}
        self._write(engine_plan=self.run.read_manifest()["engine_plan"] | {stage: noted})

    def _write(self, **changes: Any) -> None:
        self.ranks.barrier()  # all have read what is changed now
        if self.ranks.is_first:
            self.run.update_manifest(**changes)
        self.ranks.barrier()
