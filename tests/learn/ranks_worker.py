"""What one process and two of a group compute alike: called here with `ALONE`, and as a script by each of the two.

Every experiment is a function of the ranks and of a folder, and gives tensors.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from toys import SPEC, VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.errors import RunError
from kdedge.methods.distill import DistillConfig
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.health import slice_health
from kdedge.methods.kd_fixmatch import KDFixMatch, KDFixMatchConfig, TrustedTargets
from kdedge.methods.simclr import SimCLR, SimCLRConfig
from kdedge.methods.step import Method
from kdedge.methods.teacher import LiveTeacher, StoredTeacher, Teacher
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.models.zoo import ModelSpec
from kdedge.train import evaluate
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.distributed import Ranks
from kdedge.train.engine import EngineConfig, EnginePlan
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig, make_optimizer, set_batch_norm_momentum
from kdedge.trust import dec
from kdedge.trust.select import TrustConfig, select_trusted
from kdedge.trust.stream import Share, scaled_features

MOBILE = ModelSpec("mobilenet-v2", 3, 1, width=0.25, halvings=2)  # with dropout
PLAN = EnginePlan(memory_format="channels-last", threads=1)
evaluate._BATCH = 16  # so that the toy pool makes several


def fixmatch(policy: Any, spec: ModelSpec = SPEC) -> FixMatch:
    thresholds = ThresholdConfig(policy=policy, **({} if policy == "freematch" else {"threshold": 0.5}))
    return FixMatch(toy_network(spec=spec), FixMatchConfig(thresholds=thresholds), make_policy(thresholds, 3, 60))


def kd_fixmatch(distill: DistillConfig | None = None) -> KDFixMatch:
    """With a teacher, and some images that show none of the classes."""
    pool, generator = toy_pool(), torch.Generator().manual_seed(1)
    trusted = TrustedTargets(torch.randint(-1, 3, (60,), generator=generator), (torch.arange(60) % 7 > 0).float())
    config = KDFixMatchConfig(thresholds=ThresholdConfig(policy="softmatch"), distill=distill or DistillConfig())
    if config.distill.views == "stored":
        teacher: Teacher = StoredTeacher(torch.randn(60, 3, generator=generator))
    else:
        own, mean, std = toy_network(seed=5), pool.mean, pool.std
        teacher = LiveTeacher(own.double(), mean=mean, std=std, own_mean=mean, own_std=std, own_px=8)
    return KDFixMatch(toy_network().double(), config, make_policy(config.thresholds, 3, 60), trusted, teacher)


def simclr(queue: int) -> SimCLR:
    return SimCLR(toy_network(), SimCLRConfig(temperature=0.5, dims=16, queue=queue, chunk=11), (1, 8, 8)).double()


def pairs(ranks: Ranks) -> Batches:
    """Two views of 13 images: the first of two ranks has both of none."""
    views = ContrastiveViewConfig(
        smallest_area=0.4, flip=True, jitter_strength=0.5, grayscale_probability=0.2, blur_probability=0.0
    )
    share = (ranks.rank, ranks.world)
    return Batches(toy_pool(), views, labeled_batch=0, unlabeled_batch=13, seed=0, stage="pretrain", share=share)


def batches(ranks: Ranks, labeled: int) -> Batches:
    share = (ranks.rank, ranks.world)
    return Batches(
        toy_pool(), VIEWS, labeled_batch=labeled, unlabeled_batch=2 * labeled, seed=0, stage="outer", share=share
    )


def trained(
    ranks: Ranks,
    method: Method,
    *,
    steps: int,
    labeled: int = 7,
    momentum: float = 0.1,
    drawn: Batches | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """In float64: weights, statistics and state after some steps of 5 * `labeled` images, and the loss of each."""
    method.train().network.double()
    set_batch_norm_momentum(method.network, momentum)
    drawn = drawn or batches(ranks, labeled)
    optimizer = optimizer or make_optimizer(method, 0.03, 0.9, 5e-4)
    step_of, losses = ranks.parallel(method), []
    with ranks.sharing(method, drawn.images_per_step):
        for step in range(steps):
            torch.manual_seed(step)
            batch = drawn.at(step)
            result = step_of(dataclasses.replace(batch, images=batch.images.double()))
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            optimizer.step()
            losses.append(result.loss.detach())
    return {**method.state_dict(), "losses": torch.stack(losses)}


def contrasted(ranks: Ranks, queue: int) -> dict[str, Tensor]:
    method = simclr(queue)
    lars = make_optimizer(method, 1.0, 0.9, 1e-4, "lars")
    return trained(ranks, method, steps=6, drawn=pairs(ranks), optimizer=None if queue else lars)


def fitted(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """THE loop in float32: its average, its logged losses and its accuracies on a validation split."""
    optim = OptimConfig(
        total_steps=10,
        labeled_batch=7,
        unlabeled_ratio=2,
        learning_rate=0.03,
        warmup_steps=2,
        momentum=0.9,
        weight_decay=5e-4,
        ema_decay=0.999,
        batch_norm_momentum=0.1,
    )
    pool, metrics_path = toy_pool(), folder / "metrics.jsonl"

    def validate(network: Any) -> Any:
        logits = evaluate.predict(network, pool.images, pool.mean, pool.std, PLAN, ranks)
        return slice_health(logits, pool.truth, 0.5)

    average, _ = fit(
        fixmatch("fixed"),
        batches(ranks, 7),
        optim,
        EngineConfig(checkpoint_every_s=0, log_every_steps=1),
        PLAN,
        Checkpoints(folder / "checkpoint", "outer", writes=ranks.is_first),
        MetricsLog(metrics_path, SilentDisplay(), writes=ranks.is_first),
        seed=0,
        validate=validate,
        ranks=ranks,
    )
    ranks.barrier()
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    found = {name: torch.tensor([line[name] for line in lines if name in line]) for name in ("loss", "val_accuracy")}
    return {**average.state_dict(), **found}


def scored(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """35 images: two rounds of batches for two ranks, and in the second only one has a batch."""
    pool, network = toy_pool(), toy_network()
    images = pool.images.rows(torch.arange(35))
    logits = evaluate.predict(network, images, pool.mean, pool.std, PLAN, ranks)
    again, stored = evaluate.predict_with_features(
        network, images, pool.mean, pool.std, PLAN, folder / "features.npy", ranks
    )
    return {"logits": logits, "again": again, "features": torch.from_numpy(np.array(stored))}


def clustered(ranks: Ranks, _: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    truth = torch.arange(150) % 3
    found = (2 + torch.eye(16)[truth] + 0.5 * torch.randn(150, 16, generator=generator)).numpy()
    share = Share(ranks.rank, ranks.world, ranks.sum)
    whole, features = scaled_features(found), scaled_features(found, 7, share)
    start = torch.stack([whole.rows(np.flatnonzero(truth == k)[:5]).mean(0) for k in range(3)])
    assignment, centroids = dec.cluster(features, start)
    logits = torch.eye(3)[truth] * torch.randint(2, 9, (150, 1), generator=generator)
    none = torch.full_like(truth, -1)  # so that k-means finds the start
    trusted = select_trusted(logits, found, np.arange(150), none, TrustConfig(), seed=0, share=share)
    kept = {"cluster": torch.from_numpy(trusted.cluster), "kept": torch.from_numpy(trusted.kept)}
    return {"assignment": assignment, "centroids": centroids, "spread": torch.tensor(features.spread), **kept}


def rows(ranks: Ranks, _: Path) -> dict[str, Tensor]:
    """Five rows, of which the first of two ranks has three."""
    whole = torch.arange(10).reshape(5, 2)
    counts = [5] if ranks.world == 1 else [3, 2]
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    return {str(kind): ranks.gather_rows(whole.to(kind)[ranks.rows(5)], counts) for kind in kinds}


EXPERIMENTS: dict[str, Callable[[Ranks, Path], dict[str, Tensor]]] = {
    "fixmatch": lambda ranks, _: trained(ranks, fixmatch("fixed"), steps=20),
    "freematch": lambda ranks, _: trained(ranks, fixmatch("freematch"), steps=20, labeled=6),
    "kd-fixmatch": lambda ranks, _: trained(ranks, kd_fixmatch(), steps=6),
    "live-teacher": lambda ranks, _: trained(ranks, kd_fixmatch(DistillConfig(views="same")), steps=4),
    "frozen": lambda ranks, _: trained(ranks, fixmatch("fixed"), steps=3, momentum=0.0),
    "dropout": lambda ranks, _: trained(ranks, fixmatch("fixed", MOBILE), steps=3),
    "simclr": lambda ranks, _: contrasted(ranks, 0),
    "simclr-queue": lambda ranks, _: contrasted(ranks, 40),
    "loop": fitted,
    "scored": scored,
    "clustered": clustered,
    "rows": rows,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with Ranks.from_environment(torch.device("cpu")) as ranks:
        found = {name: experiment(ranks, folder) for name, experiment in EXPERIMENTS.items()}
        torch.save(found, folder / f"found.{ranks.rank}.pt")
        ranks.barrier()
        if ranks.rank == 1:
            os._exit(9)  # as a kill would
        try:
            with ranks:
                for _ in range(2):
                    ranks.barrier()
        except RunError as error:
            (folder / "lost.txt").write_text(str(error))
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
