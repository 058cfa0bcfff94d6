"""SimCLR as a method: what it trains and what not, its queue, its resume, and how it says that nothing is learned."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from toys import DiesAt, Killed, Listens, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.data.store import Resident
from kdedge.methods.simclr import SimCLR, SimCLRConfig, effective_dims
from kdedge.methods.step import Step
from kdedge.models.projection import ProjectionHead
from kdedge.models.zoo import Network, count_macs, projection_layer
from kdedge.train.checkpoint import Checkpoints, tensors_hash
from kdedge.train.engine import EngineConfig, EnginePlan
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig

VIEWS = ContrastiveViewConfig(
    smallest_area=0.4, flip=False, jitter_strength=0.5, grayscale_probability=0.0, blur_probability=0.0
)
OPTIM = OptimConfig(
    total_steps=10,
    labeled_batch=12,
    optimizer="lars",
    schedule="cosine",
    learning_rate=1.0,
    warmup_steps=2,
    momentum=0.9,
    weight_decay=1e-4,
    ema_decay=0.0,
    batch_norm_momentum=0.1,
)


def simclr(**config: Any) -> SimCLR:
    return SimCLR(toy_network(), SimCLRConfig(**{"temperature": 0.5, "dims": 16} | config), (1, 8, 8))


def batches(pool: Any = None, images: int = 12) -> Batches:
    return Batches(pool or toy_pool(), VIEWS, labeled_batch=0, unlabeled_batch=images, seed=0, stage="pretrain")


def train(folder: Path, *, die: int | None = None, display: Any = None, pool: Any = None, **kwargs: Any) -> Any:
    """The average, and the method."""
    config = kwargs.pop("config", {})
    inner = simclr(**config)
    method = inner if die is None else DiesAt(inner, die)
    plan = kwargs.pop("plan", EnginePlan(memory_format="channels-last"))
    average, _ = fit(
        method,
        batches(pool),
        OPTIM.model_copy(update=kwargs.pop("optim", {})),
        EngineConfig(checkpoint_every_s=0, log_every_steps=1),
        plan,
        Checkpoints(folder / "checkpoint", "pretrain"),
        MetricsLog(folder / "metrics.jsonl", display or SilentDisplay()),
        seed=0,
        **kwargs,
    )
    return average, inner


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_projection_head_is_that_of_the_paper() -> None:
    head = ProjectionHead(8, 3, 5)
    assert [len(layer) for layer in head] == [3, 3, 2]
    assert list(projection_layer(8).state_dict()) == list(head[0].state_dict())
    assert all(layer[0].bias is None for layer in head)  # what batch norm takes off again
    assert head[0][1].bias is not None
    assert head[2][1].bias is None
    out = head(torch.randn(6, 8)).detach()
    assert out.shape == (6, 5)
    assert float(out.mean(0).abs().max()) < 1e-5
    assert len(ProjectionHead(8, 2, 5)) == 2
    with pytest.raises(ValueError, match="0 layers was asked for"):
        ProjectionHead(8, 0, 5)


def test_all_but_the_networks_head_is_trained() -> None:
    method = simclr()
    result = method(batches().at(0))
    result.loss.backward()
    assert set(result.logs) == {"contrastive_accuracy", "positive_cosine", "effective_dims"}
    assert not any(value.requires_grad for value in result.logs.values())
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == {"network.head.weight", "network.head.bias"}
    assert not any(p.requires_grad for p in method.network.head.parameters())
    with pytest.raises(ValueError, match="temperature of SimCLR has not been resolved"):
        SimCLR(toy_network(), SimCLRConfig(), (1, 8, 8))


def test_labeled_images_of_a_batch_are_not_looked_at() -> None:
    mixed = Batches(toy_pool(), VIEWS, labeled_batch=4, unlabeled_batch=12, seed=0, stage="pretrain").at(0)
    method = simclr().eval()  # batch norm would see them
    alone = dataclasses.replace(mixed, images=mixed.images[4:], labels_B=mixed.labels_B[:0])
    torch.testing.assert_close(method(mixed).loss, method(alone).loss)


def test_the_chunk_changes_nothing() -> None:
    batch = batches().at(0)
    losses = [simclr(chunk=chunk)(batch).loss for chunk in (5, 1024)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_training_makes_views_of_an_image_alike_and_images_differ(tmp_path) -> None:
    train(tmp_path, optim={"total_steps": 40})
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert logged[-1]["positive_cosine"] > logged[0]["positive_cosine"] + 0.2
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3
    assert logged[-1]["lr"] < 0.01 * max(line["lr"] for line in logged)
    assert not [line for line in lines(tmp_path) if "alarm" in line]


@pytest.mark.parametrize("config", [{}, {"queue": 40, "projection_layers": 2}], ids=["lars", "sgd with a queue"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, config) -> None:
    optim = {"optimizer": "sgd", "learning_rate": 0.05} if config else {}
    whole, method = train(tmp_path / "whole", config=config, optim=optim)
    with pytest.raises(Killed):
        train(tmp_path / "killed", config=config, optim=optim, die=6)
    again, resumed = train(tmp_path / "killed", config=config, optim=optim)
    assert tensors_hash(again.state_dict()) == tensors_hash(whole.state_dict())
    assert tensors_hash(resumed.state_dict()) == tensors_hash(method.state_dict())
    assert any(name.startswith("projection.") for name in method.state_dict())


def test_the_average_without_decay_is_what_the_projection_was_trained_with(tmp_path) -> None:
    average, method = train(tmp_path)
    for mine, trained in zip(average.parameters(), method.network.parameters(), strict=True):
        assert torch.equal(mine, trained)


def test_a_watch_is_logged_and_the_last_average_is_returned(tmp_path) -> None:
    marks: list[float] = []

    def watch(network: Network) -> dict[str, float | None]:
        marks.append(next(network.parameters()).flatten()[0].item())
        return {"knn_accuracy": 1.0 - 0.1 * len(marks)}  # ever worse

    average, _ = train(tmp_path, watch=watch)
    assert next(average.parameters()).flatten()[0].item() == marks[-1] != marks[0]
    logged = [line for line in lines(tmp_path) if "knn_accuracy" in line]
    assert len(logged) == 10
    assert not [line for line in lines(tmp_path) if "val_accuracy" in line]


def test_the_queue_keeps_the_newest_embeddings_of_the_average() -> None:
    method = simclr(queue=30).train()
    memory = method.memory
    assert memory is not None
    macs = count_macs(method.network, 1, 8, 8)  # known before any batch: a resumed stage may have none left
    assert (method.extra_flops_an_image, simclr().extra_flops_an_image) == (2 * macs, 0)
    assert not any(p.requires_grad for p in memory.parameters())
    start = memory.queue_QD.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(30))
    for step in range(2):
        before = [p.detach().clone() for p in memory.parameters()]
        method(batches().at(step)).loss.backward()
        with torch.no_grad():
            for p in method.parameters():
                p += 0.1 * p.sign() * p.requires_grad
    assert int(memory.next) == 2 * 24 - 30
    changed = (memory.queue_QD != start).any(1)
    assert bool(changed.all())  # 48 of 30
    torch.testing.assert_close(memory.queue_QD.norm(dim=1), torch.ones(30))
    moved = zip(memory.network.backbone.parameters(), method.network.backbone.parameters(), strict=True)
    assert any(not torch.equal(mine, trained) for mine, trained in moved)
    assert any(not torch.equal(a, b) for a, b in zip(before, memory.parameters(), strict=True))
    method.eval()
    kept = memory.queue_QD.clone()
    method(batches().at(2))
    assert torch.equal(memory.queue_QD, kept)
    small = simclr(queue=5).train()  # of a batch of 24 the newest fit
    small(batches().at(0))
    assert small.memory is not None
    assert int(small.memory.next) == 0


def test_more_negatives_make_a_harder_task() -> None:
    batch = batches().at(0)
    assert float(simclr(queue=400)(batch).loss.detach()) > float(simclr()(batch).loss.detach()) + 1


def test_directions_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(effective_dims(torch.randn(20_000, 8, generator=generator))) == pytest.approx(8, abs=0.05)
    line = torch.randn(100, 1, generator=generator) * torch.ones(8)
    assert float(effective_dims(line)) == pytest.approx(1, abs=1e-4)
    assert float(effective_dims(torch.ones(9, 4))) == 0
    assert float(effective_dims(torch.zeros(9, 4))) == 0
    assert effective_dims(torch.randn(9, 4).bfloat16()).dtype == torch.float32


def test_images_that_are_all_alike_are_told_and_stop_nothing(tmp_path) -> None:
    pool = dataclasses.replace(toy_pool(), images=Resident(torch.zeros(60, 1, 8, 8, dtype=torch.uint8)))
    display = Listens()
    average, _ = train(tmp_path, pool=pool, display=display)
    assert all(torch.isfinite(p).all() for p in average.parameters())
    (told,) = [sentence for sentence in display.said if "collapsed" in sentence]
    assert "Are the images alike?" in told
    assert [line["alarm"] for line in lines(tmp_path) if "alarm" in line] == [told.partition(": ")[2]]
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line][-1] == pytest.approx(3.135, abs=0.01)  # log 23


def test_a_collapse_is_told_once_and_not_of_the_first_steps() -> None:
    method = simclr()
    lost, sound = (Step(torch.zeros(()), {"effective_dims": torch.tensor(dims)}) for dims in (1.0, 30.0))
    assert method.alarm(lost, 0.01) is None
    assert method.alarm(sound, 0.5) is None
    assert "collapsed" in (method.alarm(lost, 0.5) or "")
    assert method.alarm(lost, 0.6) is None
    resumed = simclr()
    resumed.load_state_dict(method.state_dict())
    assert resumed.alarm(lost, 0.7) is None


def test_a_batch_of_one_image_and_parts_of_a_batch_run(tmp_path) -> None:
    result = simclr().train()(batches(images=1).at(0))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0, abs=1e-6)
    average, _ = train(tmp_path, plan=EnginePlan(parts=2), optim={"total_steps": 2}, config={"queue": 9})
    assert all(torch.isfinite(p).all() for p in average.parameters())


def test_bfloat16_is_nearly_float32(tmp_path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        train(tmp_path / precision, plan=EnginePlan(precision=precision), optim={"total_steps": 3})
        losses.append([line["loss"] for line in lines(tmp_path / precision) if "loss" in line])
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=0.02)
    assert losses[1][2] < losses[1][0]


def test_batch_norm_of_every_kind_follows_the_setting() -> None:
    from kdedge.train.optim import set_batch_norm_momentum

    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2))
    set_batch_norm_momentum(module, 0.25)
    assert [each.momentum for each in module] == [0.25, 0.25]
