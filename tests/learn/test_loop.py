"""The loop: resume is bit-exact, damage is survived, a lost loss stops the run."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import SPEC, VIEWS, DiesAt, Killed, Listens, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.health import SliceHealth, pseudo_label_logs
from kdedge.methods.step import Method, Step
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.models.zoo import ModelSpec, Network
from kdedge.train import engine
from kdedge.train.checkpoint import Checkpoints, tensors_hash
from kdedge.train.due import due, to_steps
from kdedge.train.engine import EngineConfig, EnginePlan, prepare
from kdedge.train.loop import fit
from kdedge.train.metrics import MetricsLog, SilentDisplay
from kdedge.train.optim import OptimConfig, learning_rate, make_optimizer

PLAN = EnginePlan(memory_format="channels-last", threads=1)
OPTIM = OptimConfig(
    total_steps=12,
    labeled_batch=6,
    unlabeled_ratio=2,
    learning_rate=0.03,
    warmup_steps=2,
    momentum=0.9,
    weight_decay=5e-4,
    ema_decay=0.999,
    batch_norm_momentum=0.1,
)


class AskedToStopAt(Method):
    """A method whose process gets a signal in the middle of step `at`, counted over its life."""

    def __init__(self, inner: Method, at: int) -> None:
        super().__init__(inner.network)
        self.at, self.count = at, 0
        self.inner = [inner]

    def forward(self, batch: Batch) -> Step:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.count += 1
        return self.inner[0](batch)


class Collapsed(Method):
    """Every pseudo label is of class 1, and wrong for two images of three."""

    def forward(self, batch: Batch) -> Step:
        loss = self.network(batch.images[:2]).float().square().mean()
        kept = torch.ones(len(batch.truth_U))
        return Step(loss, pseudo_label_logs(torch.ones_like(batch.truth_U), kept, batch.truth_U, 3))


def fixmatch(spec: ModelSpec = SPEC) -> FixMatch:
    config = FixMatchConfig(thresholds=ThresholdConfig(threshold=0.5))
    return FixMatch(toy_network(spec=spec), config, make_policy(config.thresholds, 3, 60))


# Dropout is in, so that a resume has to get torch's own generator right as well.
MOBILE = ModelSpec("mobilenet-v2", 3, 1, width=0.25, halvings=2)


def train(
    folder: Path,
    *,
    die: int | None = None,
    spec: ModelSpec = SPEC,
    validate: Any = None,
    inner: Method | None = None,
    display: Any = None,
    every: int = 1,
    save_s: float = 0,
    plan: EnginePlan = PLAN,
    **changes: Any,
) -> Network:
    inner = inner or fixmatch(spec)
    method = inner if die is None else DiesAt(inner, die)
    network, elapsed_s = fit(
        method,
        Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=12, seed=0, stage="outer"),
        OPTIM.model_copy(update=changes),
        EngineConfig(checkpoint_every_s=save_s, log_every_steps=every),
        plan,
        Checkpoints(folder / "checkpoint", "outer"),
        MetricsLog(folder / "metrics.jsonl", display or SilentDisplay()),
        seed=0,
        validate=validate,
        class_names=("top", "middle", "bottom"),
    )
    assert elapsed_s > 0
    return network


def weights(network: Network) -> str:
    return tensors_hash(network.state_dict())


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [entry for line in lines if "loader_wait" not in (entry := json.loads(line))]
    timings = ("images_per_second", "loader_wait_fraction", "checkpoint_blocked_fraction", "memory_peak_mib")
    return [{k: v for k, v in entry.items() if k not in timings} for entry in entries]


OWN = PLAN.model_copy(update={"layers": "own", "update": "fused"})
COMPILED = PLAN.model_copy(update={"compile": "default", "compile_views": "default"})


BETWEEN = (1, 5, 11)  # between two lines: what was counted since the last one is in the checkpoint


@pytest.mark.parametrize(
    ("spec", "plan", "deaths"),
    [(SPEC, PLAN, BETWEEN), (MOBILE, PLAN, BETWEEN), (MOBILE, OWN, BETWEEN), (SPEC, COMPILED, (5,))],
    ids=["wide-resnet", "mobilenet", "own-layers", "compiled"],
)
def test_killed_and_resumed_ends_with_the_same_weights_and_the_same_log(
    tmp_path, monkeypatch, spec, plan, deaths
) -> None:
    monkeypatch.setattr(engine, "_BACKEND", "eager")  # traced, but no C++ compiler is asked
    whole = train(tmp_path / "whole", spec=spec, every=4, plan=plan)
    for die in deaths:
        folder = tmp_path / f"dies-at-{die}"
        with pytest.raises(Killed):
            train(folder, die=die, spec=spec, every=4, plan=plan)
        assert weights(train(folder, spec=spec, every=4, plan=plan)) == weights(whole)
        assert logged(folder) == logged(tmp_path / "whole")


@pytest.mark.parametrize("at", [0, 6, 11], ids=["first", "middle", "last"])
def test_sigterm_saves_the_step_it_came_in_and_the_resumed_run_ends_the_same(tmp_path, at) -> None:
    whole = train(tmp_path / "whole", every=4)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(folder, inner=AskedToStopAt(fixmatch(), at), every=4, save_s=3600)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == [f"outer.{at + 1}.safetensors"]
    assert weights(train(folder, every=4, save_s=3600)) == weights(whole)
    assert logged(folder) == logged(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class NeedsParts(Method):
    """Runs out of memory at step 5, unless its network computes in parts."""

    def __init__(self, inner: Method) -> None:
        super().__init__(inner.network)
        self.count = 0
        self.inner = [inner]

    def forward(self, batch: Batch) -> Step:
        self.count += 1
        if self.count == 5 and self.network.compute is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner[0](batch)


def test_after_running_out_of_memory_it_goes_on_in_parts(tmp_path) -> None:
    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path, inner=NeedsParts(fixmatch()))
    assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdedge")]
    checkpoint, _ = Checkpoints(tmp_path / "checkpoint", "outer").load()
    assert checkpoint is not None
    assert checkpoint.step == 4
    in_two = PLAN.model_copy(update={"parts": 2})
    method = NeedsParts(fixmatch())
    average = train(tmp_path, inner=method, plan=in_two)
    assert method.count == 8
    assert average.compute is None
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 13))


def test_in_parts_too_a_resume_is_exact(tmp_path) -> None:
    in_two = PLAN.model_copy(update={"parts": 2})
    whole = train(tmp_path / "whole", plan=in_two, every=4)
    with pytest.raises(Killed):
        train(tmp_path / "killed", plan=in_two, every=4, die=5)
    assert weights(train(tmp_path / "killed", plan=in_two, every=4)) == weights(whole)
    counters = [tensor for name, tensor in whole.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(counter == 12 for counter in counters)


def test_a_line_tells_of_speed_memory_and_gradient(tmp_path) -> None:
    train(tmp_path, total_steps=2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    positive = ("loss", "lr", "gradient_norm", "images_per_second", "loader_wait_fraction", "memory_peak_mib")
    assert all(line[name] > 0 for name in positive)
    assert 0 < line["checkpoint_blocked_fraction"] < 1


def test_a_line_counts_all_steps_since_the_one_before(tmp_path) -> None:
    train(tmp_path / "each", inner=Collapsed(toy_network()), every=1)
    train(tmp_path / "fourth", inner=Collapsed(toy_network()), every=4)
    each = [line for line in logged(tmp_path / "each") if "kept_fraction" in line]
    fourth = [line for line in logged(tmp_path / "fourth") if "kept_fraction" in line]
    assert (len(each), len(fourth)) == (12, 3)
    for index, line in enumerate(fourth):
        parts = each[4 * index : 4 * index + 4]
        known = [part["pseudo_label_known"][1] for part in parts]
        right = [part["pseudo_label_precision"][1] * n for part, n in zip(parts, known, strict=True)]
        assert line["pseudo_label_known"] == [0, sum(known), 0]
        assert line["pseudo_label_precision"] == [None, pytest.approx(sum(right) / sum(known), abs=1e-5), None]
        assert line["pseudo_label_accuracy"] == pytest.approx(sum(right) / sum(known), abs=1e-5)
        assert line["pseudo_label_histogram"] == [0, 1, 0]


def test_a_collapse_is_said_once_and_logged_the_same_after_a_resume(tmp_path) -> None:
    heard = Listens()
    train(tmp_path / "whole", inner=Collapsed(toy_network()), display=heard, total_steps=40)
    (alarm,) = [line for line in logged(tmp_path / "whole") if "alarm" in line]
    assert alarm["step"] == 6  # the first look after a tenth of the steps
    assert heard.said == [f"Stage outer, step 6 of 40: {alarm['alarm']}"]
    assert alarm["alarm"].startswith(
        "One class takes over the pseudo labels: middle with 100 % of the kept pseudo labels and 33 % of the labels."
    )
    for die in (5, 7):
        folder = tmp_path / f"dies-at-{die}"
        with pytest.raises(Killed):
            train(folder, inner=Collapsed(toy_network()), die=die, total_steps=40)
        train(folder, inner=Collapsed(toy_network()), total_steps=40)
        assert logged(folder) == logged(tmp_path / "whole")


def test_parameters_of_a_method_beside_its_network_are_trained_and_resumed(tmp_path) -> None:
    class WithHead(Method):
        def __init__(self) -> None:
            super().__init__(toy_network())
            self.head = torch.nn.Linear(3, 3)
            self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
            self.left = -1

        def forward(self, batch: Batch) -> Step:
            if self.left == 0:
                raise Killed
            self.left -= 1
            out = self.head(self.network(batch.images).float()) + self.frozen(torch.ones(3))
            return Step(out.square().mean())

    def made() -> WithHead:
        torch.manual_seed(4)
        return WithHead()

    whole = made()
    train(tmp_path / "whole", inner=whole)
    assert not torch.equal(whole.head.weight, made().head.weight)
    assert torch.equal(whole.frozen.weight, made().frozen.weight)
    killed = made()
    killed.left = 7
    with pytest.raises(Killed):
        train(tmp_path / "killed", inner=killed)
    resumed = made()
    train(tmp_path / "killed", inner=resumed)
    assert torch.equal(resumed.head.weight, whole.head.weight)


def test_what_an_evaluation_finds_is_logged(tmp_path) -> None:
    train(tmp_path, validate=lambda network: SliceHealth(0.5, {"val_kept_fraction": torch.tensor(0.25)}))
    lines = [line for line in logged(tmp_path) if "val_accuracy" in line]
    assert len(lines) == 12
    assert all((line["val_accuracy"], line["val_kept_fraction"]) == (0.5, 0.25) for line in lines)


def test_bf16_learns_as_fp32_does(tmp_path) -> None:
    """Autocast may keep the bf16 copies of the first step's weights; a loss that does not move would show it."""
    from kdedge.methods.supervised import Supervised

    losses = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        fit(
            Supervised(toy_network()),
            Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=0, seed=0, stage="t"),
            OPTIM.model_copy(update={"total_steps": 30}),
            EngineConfig(log_every_steps=30),
            PLAN.model_copy(update={"precision": precision}),
            Checkpoints(folder / "checkpoint", "t"),
            MetricsLog(folder / "metrics.jsonl", SilentDisplay()),
            seed=0,
        )
        losses[precision] = logged(folder)[-1]["loss"]
    assert losses["fp32"] < 0.1
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)


def test_another_seed_of_the_network_ends_elsewhere(tmp_path) -> None:
    """The hash can tell networks apart, and one step more is another network."""
    assert weights(train(tmp_path / "a")) != weights(train(tmp_path / "b", total_steps=13))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path) -> None:
    whole = train(tmp_path / "whole")
    for damage in ("cut", "altered"):
        folder = tmp_path / damage
        with pytest.raises(Killed):
            train(folder, die=6)
        newest = max((folder / "checkpoint").glob("outer.*"), key=lambda p: int(p.name.split(".")[1]))
        content = bytearray(newest.read_bytes())
        content[-20] ^= 1
        newest.write_bytes(content[:-100] if damage == "cut" else content)
        checkpoint, notes = Checkpoints(folder / "checkpoint", "outer").load()
        assert checkpoint is not None
        assert checkpoint.step == 5
        assert len(notes) == 1
        assert newest.name in notes[0]
        assert weights(train(folder)) == weights(whole)


def test_two_checkpoints_are_kept(tmp_path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, die=7)
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["outer.6.safetensors", "outer.7.safetensors"]


def test_the_best_average_on_val_is_returned_and_resumed(tmp_path) -> None:
    scores = [0.2, 0.9, 0.5, 0.9, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    seen: dict[float, list[str]] = {}

    def validating() -> Any:
        steps = iter(scores[len(seen.get(-1.0, [])) :])

        def score(network: Network) -> SliceHealth:
            value = next(steps)
            seen.setdefault(value, []).append(weights(network))
            seen.setdefault(-1.0, []).append("")
            return SliceHealth(value)

        return score

    with pytest.raises(Killed):
        train(tmp_path, die=6, validate=validating())
    result = train(tmp_path, validate=validating())
    assert weights(result) == seen[0.9][1]  # the later of two equals


def test_the_schedule_ends_at_a_fifth_of_its_peak() -> None:
    assert learning_rate(1000, 1000, 0.03, 0) == pytest.approx(0.00585, abs=1e-5)
    assert learning_rate(0, 1000, 0.03, 0) == 0.03
    warm = [learning_rate(k, 10_000, 0.03, 4) for k in range(5)]
    assert warm == pytest.approx([0.006, 0.012, 0.018, 0.024, 0.03], rel=1e-4)


def test_weight_decay_spares_biases_and_batch_norms() -> None:
    network = toy_network()
    kernels, others = make_optimizer(network, 0.03, 0.9, 5e-4).param_groups
    assert kernels["weight_decay"] == 5e-4
    assert others["weight_decay"] == 0
    assert {p.ndim for p in kernels["params"]} == {2, 4}
    assert {p.ndim for p in others["params"]} == {1}
    assert sum(len(g["params"]) for g in (kernels, others)) == len(list(network.parameters()))


def test_durations_become_steps_at_the_border() -> None:
    assert to_steps(5, None, None, batch=8, images_an_epoch=100) == 5
    assert to_steps(None, 2, None, batch=8, images_an_epoch=100) == 25
    assert to_steps(None, None, 65, batch=64, images_an_epoch=1) == 2
    assert to_steps(None, None, None, batch=8, images_an_epoch=100) is None
    with pytest.raises(ValueError, match="total_steps and total_images are both set"):
        to_steps(5, None, 65, batch=64, images_an_epoch=1)
    assert [k for k in range(1, 11) if due(k, 4, 10)] == [4, 8, 10]


def test_one_channel_really_becomes_channels_last() -> None:
    """torch calls [B, 1, H, W] both formats at once; the convolution must see the one that was asked for."""
    x = prepare(torch.rand(4, 1, 8, 8), PLAN)
    out = torch.nn.Conv2d(1, 8, 3)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


def test_with_momentum_0_statistics_stay_as_they_came(tmp_path) -> None:
    """In training too: the loss of a step is that of the network in eval mode, and no statistic moves."""
    from torch import nn

    from kdedge.train.optim import set_batch_norm_momentum

    network = toy_network().train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    x = toy_pool().images.images_u8[:12].float()
    moving = network(x)
    for module, mean in zip(norms, before, strict=True):
        module.running_mean.copy_(mean)
        module.running_var.fill_(1.0)
    set_batch_norm_momentum(network.train(), 0.0)
    still = network(x)
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before, strict=True))
    assert torch.equal(still, network.eval()(x))
    assert not torch.allclose(still, moving)
    set_batch_norm_momentum(network.train(), 0.1)
    assert all(m.training and m.momentum == 0.1 for m in norms)
