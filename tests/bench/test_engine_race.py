"""The race of steps: its sides at toy size, its turns and ratios. Nothing is timed."""

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdedge.train.engine import EnginePlan
from kdedge_bench import engine_published, engine_race, engine_sides
from kdedge_bench.engine_published import Average, interleave, rand_augment

TOY = ["--network", "wide-resnet-10-1", "--halvings", "2", "--labeled", "2", "--ratio", "2", "--threads", "1"]


@pytest.mark.parametrize("side", ["ours", "published", "supervised"])
def test_a_step_of_each_side_moves_the_network(side, monkeypatch) -> None:
    built = []
    monkeypatch.setattr(engine_sides, "measure_plan", lambda *_: (EnginePlan(), []))
    monkeypatch.setattr(engine_sides, "build", lambda spec: built.append(nn_of(spec)) or built[0])
    step, told = engine_sides.make_side(engine_sides.parser().parse_args(["--side", side, *TOY, "--workers", "0"]))
    before = {name: tensor.clone() for name, tensor in built[0].state_dict().items()}
    step()
    json.dumps(told)
    after = built[0].state_dict()
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert any(not torch.equal(before[name], after[name]) for name in before if "running_mean" in name)


def nn_of(spec) -> nn.Module:
    from kdedge.models.zoo import build

    return build(spec)


def test_interleaving_is_undone_by_interleaving_with_the_other_number() -> None:
    x = torch.arange(15)
    mixed = interleave(x, 5)
    assert mixed.tolist() == [0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14]
    assert torch.equal(interleave(mixed, 3), x)


def test_the_average_follows_slowly_and_copies_statistics() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(network, 0.75)
    start = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 4
        network[1].running_mean += 4
    average.update(network)
    assert torch.allclose(average.network[0].weight, start + 1)
    assert torch.equal(average.network[1].running_mean, network[1].running_mean)


def test_the_published_views_use_every_operation_and_leave_a_hole() -> None:
    random.seed(0)
    np.random.seed(0)
    counts = dict.fromkeys(engine_published._POOL, 0)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    for name, (operation, most, least) in engine_published._POOL.items():
        for level in (1, 9):
            assert operation(white, level * most / 10 + least).size == (32, 32)
        counts[name] += 1
    assert len(counts) == 14
    holes = [(np.array(rand_augment(white)) == 127).all(2).sum() for _ in range(20)]
    assert all(81 <= hole <= 17 * 17 for hole in holes)  # at the border only a quarter of it


def test_ratios_are_taken_round_by_round() -> None:
    assert engine_race.ratios([2, 30, 4], [1, 10, 4]) == {"median": 2, "min": 1, "max": 3}


def test_every_side_is_first_in_turn() -> None:
    turns = list(engine_race._turns(["a", "b", "c"], 4))
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


SIDE = """
import json, os, sys
name = sys.argv[2]
if name == "semilearn" and "wide-resnet-10-1" in sys.argv:
    sys.exit("Traceback (most recent call last):\\nModuleNotFoundError: No module named 'semilearn'\\n")
print(json.dumps({"plan": {"threads": 1}}), flush=True)
for line in sys.stdin:
    if name == "semilearn":
        os.kill(os.getpid(), 9)  # as the kernel does where memory is short
    steps = {"ours": 6, "published": 2, "supervised": 8}[name]
    print(json.dumps({"steps": steps, "elapsed_s": float(line)}), flush=True)
"""


def test_a_race_gives_a_record_with_the_side_that_ended_and_how(tmp_path, monkeypatch) -> None:
    """Sides are processes of a few lines here: they start at once and are as fast as they say."""
    (tmp_path / "side.py").write_text(SIDE)
    monkeypatch.setattr(engine_race, "_PROGRAM", (sys.executable, str(tmp_path / "side.py")))
    out = tmp_path / "race.json"
    words = ["--networks", "wide-resnet-10-1", "mobilenet-v2:4", "--labeled", "2", "--ratio", "5", "--rounds", "2"]
    engine_race.main([*words, "--seconds", "2", "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [(found["network"], found["halvings"]) for found in record["races"]] == [
        ("wide-resnet-10-1", 2),
        ("mobilenet-v2", 4),
    ]
    for found in record["races"]:
        rates = {"ours": [30.0, 30.0], "published": [10.0, 10.0], "supervised": [40.0, 40.0]}
        assert found["unlabeled_images_per_second"] == rates
        assert found["ours_over"] == {"published": {"median": 3, "min": 3, "max": 3}}
        assert found["share_of_supervised"]["median"] == 0.75
    absent, killed = (found["sides"]["semilearn"]["failed"] for found in record["races"])
    assert absent == {"exit_code": 1, "last_line": "ModuleNotFoundError: No module named 'semilearn'"}
    assert killed == {"signal": "SIGKILL", "last_line": None}
    cells = [engine_race.markdown_row(found).split(" | ")[4] for found in record["races"]]
    assert cells == ["ended: exit code 1", "ended: SIGKILL"]
    assert record["command"].startswith("python -m kdedge_bench.engine_race --networks wide-resnet-10-1")


def test_a_side_does_steps_for_as_long_as_it_is_told(monkeypatch, capsys) -> None:
    steps = []
    monkeypatch.setattr(engine_sides, "make_side", lambda options: (lambda: steps.append(1), {"told": options.side}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n0.01\n"))
    engine_sides.main(["--side", "ours"])
    told, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["told"] == "ours"
    assert first["steps"] == 1
    assert second["elapsed_s"] >= 0.01
    assert len(steps) == 2 + second["steps"]  # one of them to get ready


def test_our_side_that_ends_is_told_and_nothing_is_compared_with_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "side.py").write_text(SIDE.replace('name == "semilearn"', 'name == "ours"'))
    monkeypatch.setattr(engine_race, "_PROGRAM", (sys.executable, str(tmp_path / "side.py")))
    words = ["--networks", "mobilenet-v2", "--seconds", "1", "--sides", "--device", "cpu", "--plan", '{"threads": 1}']
    engine_race.main([*words, "--out", str(tmp_path / "race.json")])
    (found,) = json.loads((tmp_path / "race.json").read_text())["races"]
    assert found == {
        "network": "mobilenet-v2",
        "halvings": 5,
        "precision": "fp32",
        "failed": {"signal": "SIGKILL", "last_line": None},
    }


def test_our_plan_may_be_given_and_takes_the_threads_of_the_race(monkeypatch) -> None:
    monkeypatch.setattr(engine_sides, "measure_plan", None)
    plan = EnginePlan(layers="own", update="fused", threads=7).model_dump_json()
    _, told = engine_sides.make_side(engine_sides.parser().parse_args(["--side", "ours", *TOY, "--plan", plan]))
    assert told["plan"] == EnginePlan(layers="own", update="fused", threads=1).model_dump()


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_readme_tells_what_was_recorded() -> None:
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert engine_race.ROWS_HEAD in readme
    table = readme.partition(engine_race.ROWS_HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/engine-race*.json"))]
    assert len(records) >= 4
    assert sorted(table) == sorted(engine_race.markdown_row(found) for record in records for found in record["races"])


def test_the_environment_of_the_race_is_pinned() -> None:
    pins = (RESULTS.parent / "engine" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in pins if not line.startswith("#")]
    assert {"semilearn==0.3.2", "torch==2.11.0"} <= set(lines)
    assert all("==" in line and "/" not in line for line in lines), "versions, and no hosts"
