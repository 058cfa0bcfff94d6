"""semilearn's FixMatch step (microsoft/Semi-supervised-learning, 0.3.2 from the package index), to race against.

Its own views, data loaders, algorithm and hooks of a step, on the network of the race. What is not its own: the hooks
that need CUDA or write (timer, log, evaluation, checkpoint) are left out, and without CUDA its `.cuda()` does nothing.
0.3.2 imports only beside torch 2.11.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import transforms

__all__ = ["semilearn_step"]

_LEFT_OUT = (
    "TimerHook", "LoggingHook", "EvaluationHook", "CheckpointHook", "DistSamplerSeedHook", "AimHook", "WANDBHook",
)  # fmt: skip


class _Answers(nn.Module):
    """The network as semilearn asks it: logits and features by name, parameters by group."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        features_BF = self.network.embed(x_BCHW)
        return {"logits": self.network.head(features_BF), "feat": features_BF}

    def no_weight_decay(self) -> set[str]:
        """None by name; biases and norms are left out by semilearn itself."""
        return set()


def semilearn_step(
    network: nn.Module,
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[Callable[[], None], dict[str, Any]]:
    """One step, to be called again and again, and what is told of it."""
    from semilearn import get_algorithm, get_config

    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    config = get_config(_config(options, labels, device))
    algorithm = get_algorithm(config, lambda **_: _Answers(copy.deepcopy(network)), tb_log=None, logger=None)
    algorithm.model.to(device).train()
    algorithm.ema_model.to(device)
    hooks = {name: hook for name, hook in algorithm.hooks_dict.items() if type(hook).__name__ not in _LEFT_OUT}
    algorithm._hooks, algorithm.hooks_dict = list(hooks.values()), hooks
    algorithm.call_hook("before_run")
    batches = zip(*_loaders(config, pictures, labels, options), strict=False)

    def step() -> None:
        labeled, unlabeled = next(batches)
        algorithm.call_hook("before_train_step")
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**algorithm.process_batch(**labeled, **unlabeled))
        algorithm.call_hook("after_train_step")
        algorithm.it += 1

    told = {
        "semilearn": version("semilearn"),
        "hooks": sorted({type(hook).__name__ for hook in hooks.values()}),
        "cuda_does_nothing": device.type == "cpu",
    }
    return step, told | {"workers": f"{options.workers} for labeled, {2 * options.workers} for unlabeled images"}


def _config(options: argparse.Namespace, labels: NDArray[np.int64], device: torch.device) -> dict[str, Any]:
    """Its published settings of FixMatch on CIFAR-10, at the batch of the race."""
    return {
        "algorithm": "fixmatch",
        "net": "race",
        "dataset": "none",  # it then makes no data set of its own
        "num_classes": int(labels.max()) + 1,
        "num_labels": len(labels) // 10,
        "epoch": 1,
        "num_train_iter": 2**20,
        "num_warmup_iter": 0,
        "optim": "SGD",
        "lr": 0.03,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "layer_decay": 1.0,
        "ema_m": 0.999,
        "hard_label": True,
        "T": 0.5,
        "p_cutoff": 0.95,
        "ulb_loss_ratio": 1.0,
        "uratio": options.ratio,
        "batch_size": options.labeled,
        "eval_batch_size": options.labeled,
        "num_workers": options.workers,
        "use_cat": True,
        "amp": options.precision != "fp32",
        "clip_grad": 0,
        "gpu": device.index or 0,
        "rank": 0,
        "distributed": False,
        "world_size": 1,
        "save_dir": tempfile.gettempdir(),
        "save_name": "race",
        "img_size": 32,
        "crop_ratio": 0.875,
    }


def _loaders(config: Any, pictures: NDArray[np.uint8], labels: NDArray[np.int64], options: argparse.Namespace) -> Any:
    """Its loaders over its data sets with the views it gives CIFAR-10."""
    from semilearn import get_data_loader
    from semilearn.datasets.augmentation import RandAugment
    from semilearn.datasets.cv_datasets.datasetbase import BasicDataset

    side = config.img_size
    first = [
        transforms.Resize(side),
        transforms.RandomCrop(side, padding=int(side * (1 - config.crop_ratio)), padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
    ]
    last = [transforms.ToTensor(), transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))]
    weak, strong = transforms.Compose([*first, *last]), transforms.Compose([*first, RandAugment(3, 5), *last])
    classes, chosen = config.num_classes, slice(None, None, 10)
    labeled = BasicDataset("fixmatch", pictures[chosen], labels[chosen], classes, weak, False)
    unlabeled = BasicDataset("fixmatch", pictures, labels, classes, weak, True, strong_transform=strong)
    return (
        get_data_loader(config, labeled, config.batch_size, num_workers=options.workers),
        get_data_loader(
            config, unlabeled, config.batch_size * config.uratio, num_workers=2 * options.workers
        ),  # twice, as its algorithm base asks
    )
