"""How a step is computed: what a plan switches on, and switches off again after it."""

import os

import pytest
import torch

from kdedge.train import engine
from kdedge.train.engine import EngineConfig, EnginePlan, available_cores, using

CPU = torch.device("cpu")


def test_a_deterministic_plan_refuses_other_kernels_and_only_inside_its_block(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for asked in (False, True):
        with using(EnginePlan(deterministic=asked), CPU):
            assert torch.are_deterministic_algorithms_enabled() == asked
        assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(ZeroDivisionError), using(EnginePlan(deterministic=True, threads=2), CPU):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_either_switch_makes_a_given_plan_deterministic() -> None:
    assert EngineConfig(deterministic=True).fixed_plan is None
    assert EngineConfig(plan=EnginePlan()).fixed_plan == EnginePlan()
    assert EngineConfig(plan=EnginePlan(threads=2), deterministic=True).fixed_plan == EnginePlan(
        threads=2, deterministic=True
    )
    assert EngineConfig(plan=EnginePlan(deterministic=True)).fixed_plan == EnginePlan(deterministic=True)


def test_processes_that_torchrun_started_share_the_cores(monkeypatch) -> None:
    monkeypatch.setattr(engine, "cores_available", lambda: 8)
    monkeypatch.setattr(engine, "Path", lambda _: (_ for _ in ()).throw(OSError))  # no quota
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_cores() == 8
    for processes, each in ((1, 8), (3, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert available_cores() == each
