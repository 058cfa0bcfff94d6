"""The plan that is measured: the fastest of its candidates, on a method that is left as it was."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.errors import RunError
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.train import engine, fastest
from kdedge.train.checkpoint import tensors_hash
from kdedge.train.engine import EnginePlan, arranged
from kdedge.train.fastest import measure_plan

CPU = torch.device("cpu")


def fixmatch() -> FixMatch:
    config = FixMatchConfig(thresholds=ThresholdConfig(threshold=0.5))
    return FixMatch(toy_network(), config, make_policy(config.thresholds, 3, 60))


def batches() -> Batches:
    return Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=12, seed=0, stage="outer")


def plan_in(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name in EnginePlan.model_fields}


def test_measuring_a_plan_leaves_the_method_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr(fastest, "available_cores", lambda: 2)
    method = fixmatch()
    before, modules = tensors_hash(method.state_dict()), list(method.modules())
    plan, timings = measure_plan(method, batches(), CPU)
    assert tensors_hash(method.state_dict()) == before
    assert list(method.modules()) == modules
    assert all(p.grad is None for p in method.parameters())
    steps, updates = [t for t in timings if "step_ms" in t], [t for t in timings if "update_ms" in t]
    formats = {(t["memory_format"], t["layers"]) for t in steps}
    assert formats == {("contiguous", "torch"), ("channels-last", "torch"), ("channels-last", "own")}
    assert [t["threads"] for t in steps] == [2, 2, 2, 2, 1]
    best = min(steps[:3], key=lambda t: t["step_ms"])  # type: ignore[arg-type, return-value]
    assert (plan.memory_format, plan.layers) == (best["memory_format"], best["layers"])
    assert plan.update == min(updates, key=lambda t: t["update_ms"])["update"]  # type: ignore[arg-type, return-value]
    assert plan.compile == "none"


@pytest.mark.parametrize(("fewer_s", "chosen"), [(0.95, 2), (0.85, 1)])
def test_fewer_threads_must_gain_a_tenth(monkeypatch, fewer_s: float, chosen: int) -> None:
    monkeypatch.setattr(fastest, "available_cores", lambda: 2)
    seconds = iter(([1.0, 0.5, 0.7], [1.0, fewer_s], [0.2, 0.1]))
    monkeypatch.setattr(fastest, "_in_turns", lambda *_: next(seconds))
    plan, timings = measure_plan(fixmatch(), batches(), CPU)
    assert plan == EnginePlan(memory_format="channels-last", threads=chosen, update="fused")
    assert [t["of"] for t in timings if "of" in t] == ["cpu"] * 3 + ["clock"] * 2


def test_each_candidate_takes_its_turn_and_its_fastest_counts(monkeypatch) -> None:
    clock, calls = iter(range(1000)), list[str]()
    monkeypatch.setattr(fastest, "_BUDGET_S", 1e9)
    found = fastest._in_turns([lambda: calls.append("a"), lambda: calls.append("b")], lambda: float(next(clock)))
    assert calls == ["a", "b"] * 6
    assert found == [1.0, 1.0]


def test_what_cannot_be_compiled_is_no_candidate_and_says_why(monkeypatch) -> None:
    """On a GPU: here the device says so, and the compiler refuses in one mode."""
    tried = []

    def steps(_method, _batch, plan, *_):
        tried.append(plan.compile)
        if plan.compile == "default":
            raise RuntimeError("no Triton here\nand more")
        return lambda: None

    monkeypatch.setattr(fastest, "_steps", steps)
    timings = fastest.Timings()
    found = fastest._compiled(fixmatch(), batches().at(0), EnginePlan(), torch.device("cuda"), timings)
    assert tried == ["default", "reduce-overhead"]
    assert [plan.compile for plan in found] == ["reduce-overhead"]
    assert [(t["compile"], t["failed"]) for t in timings] == [("default", "no Triton here")]
    deterministic = EnginePlan(deterministic=True)
    assert not fastest._compiled(fixmatch(), batches().at(0), deterministic, torch.device("cuda"), timings)
    assert not fastest._compiled(fixmatch(), batches().at(0), EnginePlan(), CPU, timings)


def test_a_compiled_backbone_is_compiled_inside_the_block_only(monkeypatch) -> None:
    monkeypatch.setattr(engine, "_BACKEND", "eager")
    method, x = fixmatch(), torch.rand(4, 1, 8, 8)
    plain = method.network(x)
    with arranged([method], EnginePlan(compile="default")):
        assert method.network.backbone._compiled_call_impl is not None
        torch.testing.assert_close(method.network(x), plain)
    assert method.network.backbone._compiled_call_impl is None
    with pytest.raises(RunError, match=r"torch\.compile \(default\).*in parts.*Set engine\.plan\.compile to none"):
        arranged([method], EnginePlan(compile="default", parts=2)).__enter__()


def test_runs_of_before_the_choice_have_compile_false() -> None:
    assert EnginePlan.model_validate({"threads": 2, "compile": False}) == EnginePlan(threads=2)
    assert EnginePlan.model_validate({"threads": 2, "compile": False}).layers == "torch"
