"""What is lost is found at its step, told, kept out of checkpoints, and can be replayed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.errors import RunError
from kdedge.methods.step import Method, Step
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EngineConfig, EnginePlan
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig
from kdedge.train.replay import Replay, replay

PLAN = EnginePlan(memory_format="contiguous", threads=1)
OPTIM = OptimConfig(
    total_steps=12,
    labeled_batch=4,
    unlabeled_ratio=1,
    learning_rate=0.03,
    warmup_steps=0,
    momentum=0.9,
    weight_decay=5e-4,
    ema_decay=0.999,
    batch_norm_momentum=0.1,
)


class Loses(Method):
    """Loses its loss, its gradient, or its weights at one step, which it knows by a persistent counter."""

    counted: torch.Tensor

    def __init__(self, what: str = "", at: int = 0) -> None:
        super().__init__(toy_network())
        self.what, self.at = what, at
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Step:
        self.counted += 1
        now = int(self.counted) == self.at
        images = batch.images[:8]
        if now and self.what == "loss":
            images = images.clone()
            images[3, 0, 2, 2] = float("inf")
        loss = self.network(images).float().square().mean()
        if now and self.what == "gradient":  # sqrt has an infinite slope at zero
            loss = loss + (self.network.head.bias[0] * 0).abs().sqrt()
        if now and self.what == "weights":
            loss = loss + (self.network.head.weight * torch.full((), 1e38)).sum()
        return Step(loss, {"loss_labeled": loss.detach() / 2})


def batches() -> Batches:
    return Batches(toy_pool(), VIEWS, labeled_batch=4, unlabeled_batch=4, seed=0, stage="outer")


def train(folder: Path, method: Method, *, log_every: int = 5, save_s: float = 3600.0, rate: float = 0.03) -> None:
    fit(
        method,
        batches(),
        OPTIM.model_copy(update={"learning_rate": rate}),
        EngineConfig(checkpoint_every_s=save_s, log_every_steps=log_every),
        PLAN,
        Checkpoints(folder / "checkpoint", "outer"),
        MetricsLog(folder / "metrics.jsonl", SilentDisplay()),
        seed=0,
    )


def again(folder: Path, method: Method, to_step: int, rate: float = 0.03) -> Replay:
    optim = OPTIM.model_copy(update={"learning_rate": rate})
    return replay(method, batches(), optim, PLAN, Checkpoints(folder / "checkpoint", "outer"), seed=0, to_step=to_step)


def failure(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    return content


@pytest.mark.parametrize("at", [1, 7, 12])
def test_the_first_lost_loss_is_known_exactly_between_two_looks(tmp_path, at) -> None:
    with pytest.raises(RunError, match=rf"loss of stage outer became nan at step {at} of 12 .*--replay"):
        train(tmp_path, Loses("loss", at), log_every=12)
    told, batch = failure(tmp_path), batches().at(at - 1)
    assert (told["stage"], told["step"], told["checkpoint_step"]) == ("outer", at, 0)
    assert told["terms"] == {"loss": "nan", "loss_labeled": "nan"}
    assert told["positions"] == {"labeled": batch.position_B.tolist(), "unlabeled": batch.position_U.tolist()}


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_no_checkpoint_holds_what_is_lost(tmp_path, what) -> None:
    with pytest.raises(RunError, match="The checkpoint of step 6 is kept"):
        train(tmp_path, Loses(what, 7), log_every=12, save_s=0)
    assert failure(tmp_path)["step"] == 7
    checkpoint, notes = Checkpoints(tmp_path / "checkpoint", "outer").load()
    assert notes == []
    assert checkpoint is not None
    assert checkpoint.step == 6
    assert all(bool(torch.isfinite(t).all()) for t in checkpoint.tensors.values())


def test_a_gradient_that_is_lost_at_a_logged_step_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match="gradient of stage outer had the norm nan at step 3 of 12"):
        train(tmp_path, Loses("gradient", 3), log_every=1)
    told = failure(tmp_path)["terms"]
    assert told["gradient_norm"] == "nan"
    assert isinstance(told["loss"], float)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_the_gradient_norm_is_that_of_all_gradients_before_the_update(tmp_path) -> None:
    method = Loses()
    train(tmp_path, method, log_every=1)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    fresh = Loses().train()
    fresh(batches().at(0)).loss.backward()
    squares = sum(float(p.grad.double().square().sum()) for p in fresh.parameters() if p.grad is not None)
    assert first["gradient_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_replay_finds_the_step_and_where_it_begins(tmp_path, what) -> None:
    with pytest.raises(RunError):
        train(tmp_path, Loses(what, 8), log_every=12, save_s=0)
    (tmp_path / "checkpoint" / "outer.7.safetensors").unlink()  # so that a sound step comes first
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = again(tmp_path, Loses(what, 8), to_step=12)
    assert (found.began_after_step, found.step) == (6, 8)
    assert (
        found.lost
        == {
            "loss": ("loss", "gradient", "weights"),
            "gradient": ("gradient", "weights"),
            "weights": ("gradient", "weights"),  # finite each, and beyond all use
        }[what]
    )
    assert found.position_U == tuple(batches().at(7).position_U.tolist())
    if what == "loss":
        convolution = next(n for n, m in Loses().named_modules() if isinstance(m, torch.nn.Conv2d))
        assert found.modules[0] == convolution
        assert f"first: {convolution}," in " ".join(found.sentences())
    if what == "gradient":
        assert found.modules == ()
        assert found.gradients == ("network.head.bias",)
    json.dumps(found.to_json(), allow_nan=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_replay_computes_what_the_run_did(tmp_path) -> None:
    train(tmp_path / "whole", Loses(), log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = again(tmp_path, Loses(), to_step=9)
    assert (found.began_after_step, found.step, found.lost) == (0, 9, ())
    assert round(float(found.terms["loss"]), 6) == lines[8]["loss"]
    assert round(float(found.terms["gradient_norm"]), 6) == lines[8]["gradient_norm"]
    assert "everything is finite" in found.sentences()[0]


def test_a_replay_of_what_the_run_has_passed_is_refused(tmp_path) -> None:
    Checkpoints(tmp_path / "checkpoint", "outer")
    with pytest.raises(RunError):
        train(tmp_path, Loses("loss", 8), save_s=0)
    with pytest.raises(RunError, match="last checkpoint of stage outer is of step 7, and step 5 was to be replayed"):
        again(tmp_path, Loses(), to_step=5)


def test_a_rate_that_is_too_high_is_told(tmp_path) -> None:
    with pytest.raises(RunError, match=r"of stage outer .* at step \d+ of 12 .*optim\.learning_rate"):
        train(tmp_path, Loses(), rate=1e30)
