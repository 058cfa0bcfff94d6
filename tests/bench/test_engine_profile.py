"""The profile of a step at toy size, and what its floors are made of."""

import json

import pytest
import torch
from torch import nn

from kdedge_bench import engine_profile
from kdedge_bench.engine_parts import PARTS
from kdedge_bench.engine_profile import floors, map_bytes


def test_bytes_of_maps_are_counted_layer_by_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU())
    maps = {"in": 3 * 8 * 8, "out": 8 * 4 * 4}
    assert map_bytes(network, 8) == 4 * (3 * maps["in"] + 2 * maps["out"] + 5 * maps["out"])
    assert network.training


def test_floors_are_work_over_rates() -> None:
    found = {"work": {"gflop": 30.0, "gbyte": 4.0}, "parts_ms": {"forward": 400.0, "backward": 800.0}}
    rates = {"matmul_gflops": 50.0, "convolution_gflops": 60.0, "copy_gbytes_per_second": 10.0}
    assert floors(found, rates) == {
        "by_operations_ms": 500.0,
        "by_bytes_ms": 400.0,
        "times_the_higher_floor": 2.4,
        "times_both_in_turn": 1.33,
    }


def test_a_profile_gives_every_parts_share(tmp_path, monkeypatch) -> None:
    fixed = {"matmul_gflops": 50.0, "convolution_gflops": 60.0, "copy_gbytes_per_second": 10.0}
    monkeypatch.setattr(engine_profile, "measured_rates", lambda device: fixed)
    out = tmp_path / "profile.json"
    words = ["--networks", "wide-resnet-10-1", "--labeled", "2", "--ratio", "2", "--steps", "2", "--threads", "1"]
    engine_profile.main([*words, "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    (found,) = record["networks"]
    assert tuple(found["parts_ms"]) == PARTS
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"], abs=0.1)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.001)
    assert found["work"]["gflop"] > 0
    assert found["step_in_a_row_ms"] > 0
    assert tuple(found["operations"]) == PARTS
    assert min(found["operations"].values()) > 0
    assert found["operations"]["average"] <= 3  # lists, and not one a tensor
    assert record["rates"] == fixed


def test_the_machines_rates_are_measured() -> None:
    assert all(rate > 0 for rate in engine_profile.measured_rates(torch.device("cpu"), side=64).values())
