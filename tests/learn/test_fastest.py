"""The plan that is measured: the fastest of its candidates, on a method that is left as it was."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.data.store import Streamed
from kdedge.errors import RunError
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.models.ema import Ema
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


def test_on_a_gpu_backbone_and_views_are_candidates_in_both_modes() -> None:
    cuda, both = torch.device("cuda"), ["default", "reduce-overhead"]
    given, plan = batches(), EnginePlan(compile="default")
    assert [p.compile for p in fastest._backbone_compiled(EnginePlan(), given, cuda)] == both
    views = fastest._views_compiled(plan, given, cuda)
    assert [(p.compile, p.compile_views) for p in views] == [("default", mode) for mode in both]
    contrasting = Batches(toy_pool(), ContrastiveViewConfig(), labeled_batch=0, unlabeled_batch=4, seed=0, stage="x")
    assert not fastest._views_compiled(plan, contrasting, cuda)
    for candidates in (fastest._backbone_compiled, fastest._views_compiled):
        assert not candidates(plan, given, CPU)
        assert not candidates(EnginePlan(deterministic=True), given, cuda)


@pytest.mark.parametrize("fails_at", [0, 2], ids=["compiling", "replaying"])
def test_what_cannot_be_compiled_is_no_candidate_and_says_why(monkeypatch, fails_at: int) -> None:
    """The compiler refuses in one mode, at once, or a CUDA graph when it is replayed."""
    calls = list[str]()

    def steps(_method, _batches, plan, *_):
        def step() -> None:
            calls.append(plan.compile)
            if plan.compile == "default" and calls.count("default") > fails_at:
                raise AssertionError("no Triton here\nand more")

        return step

    monkeypatch.setattr(fastest, "_steps", steps)
    timings, cuda = fastest.Timings(), torch.device("cuda")
    plans = [EnginePlan(), *fastest._backbone_compiled(EnginePlan(), batches(), cuda)]
    assert fastest._fastest(fixmatch(), batches(), plans, cuda, timings) in (plans[0], plans[2])
    assert [(t["compile"], t.get("failed")) for t in timings] == [
        ("default", "no Triton here"),
        ("none", None),
        ("reduce-overhead", None),
    ]
    assert calls.count("default") == fails_at + 1


def test_what_is_measured_is_the_whole_step_of_training(monkeypatch) -> None:
    """Views, network, update and average, of copies: another candidate makes the views of these batches otherwise."""
    given, method, done = batches(), fixmatch(), list[str]()
    before = tensors_hash(method.state_dict())
    for kind, name in ((Batches, "at"), (FixMatch, "forward"), (torch.optim.SGD, "step"), (Ema, "update")):
        monkeypatch.setattr(kind, name, noting(getattr(kind, name), name, done))
    arranging = []
    monkeypatch.setattr(fastest, "arranged", lambda *things: arranging.append(things) or contextlib.nullcontext())
    with contextlib.ExitStack() as stack:
        fastest._steps(method, given, EnginePlan(), CPU, stack)()
    assert done == ["at", "forward", "step", "update"]
    (((network,), _, ahead),) = arranging
    assert network is not method
    assert ahead is not given
    assert tensors_hash(method.state_dict()) == before


def test_each_candidate_finds_its_images_read_ahead(monkeypatch) -> None:
    """Else one would wait for the disk, since another took what had been read."""
    pool, found = toy_pool(), list[bool]()
    pixels = pool.images.images_u8.numpy()  # type: ignore[union-attr]
    lying = SimpleNamespace(shape=pixels.shape, read_into=lambda rows, out: np.copyto(out, pixels[rows]))
    rows = Streamed.rows

    def noted(store: Streamed, positions: torch.Tensor) -> torch.Tensor:
        found.append(positions.numpy().tobytes() in store._ahead)
        return rows(store, positions)

    monkeypatch.setattr(Streamed, "rows", noted)
    monkeypatch.setattr(fastest, "_BUDGET_S", 0.0)  # one round
    streamed = dataclasses.replace(pool, images=Streamed(lying, CPU))
    given = Batches(streamed, VIEWS, labeled_batch=6, unlabeled_batch=12, seed=0, stage="outer")
    plans = [EnginePlan(), EnginePlan(memory_format="channels-last"), EnginePlan(layers="own")]
    fastest._fastest(fixmatch(), given, plans, CPU, fastest.Timings())
    assert found == [False] * 3 + [True] * 3, "the first call of each, which is not counted, then the timed one"


def noting(function: Any, name: str, done: list[str]) -> Any:
    def noted(*words: Any) -> Any:
        done.append(name)
        return function(*words)

    return noted


def test_what_is_compiled_is_so_inside_the_block_only(monkeypatch) -> None:
    monkeypatch.setattr(engine, "_BACKEND", "eager")
    method, given = fixmatch(), batches()
    plain, uncompiled = given.at(3), given.make_views
    logits = method.network(plain.images)
    with arranged([method], EnginePlan(compile="default", compile_views="default"), given):
        assert method.network.backbone._compiled_call_impl is not None
        assert given.make_views is not uncompiled
        again = given.at(3)
        assert torch.equal(again.images, plain.images)  # the same kernels, in another order
        torch.testing.assert_close(method.network(again.images), logits)
    assert method.network.backbone._compiled_call_impl is None
    assert given.make_views is uncompiled
    with pytest.raises(RunError, match=r"torch\.compile \(default\).*in parts.*Set engine\.plan\.compile to none"):
        arranged([method], EnginePlan(compile="default", parts=2)).__enter__()
    contrasting = Batches(toy_pool(), ContrastiveViewConfig(), labeled_batch=0, unlabeled_batch=4, seed=0, stage="x")
    with pytest.raises(RunError, match=r"contrastive views.*Set engine\.plan\.compile_views to none"):
        arranged([method], EnginePlan(compile_views="default"), contrasting).__enter__()


def test_runs_of_before_the_choice_of_views_leave_them_as_they_were() -> None:
    old = {"memory_format": "channels-last", "threads": 2, "compile": "reduce-overhead", "update": "fused"}
    assert EnginePlan.model_validate(old).compile_views == "none"


def test_runs_of_before_the_choice_have_compile_false() -> None:
    assert EnginePlan.model_validate({"threads": 2, "compile": False}) == EnginePlan(threads=2)
    assert EnginePlan.model_validate({"threads": 2, "compile": False}).layers == "torch"
