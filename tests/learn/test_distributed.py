"""Several processes that share a run: two real gloo processes on this machine agree with one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

sys.path.insert(0, str(Path(__file__).parent))
from ranks_worker import EXPERIMENTS, fixmatch, kd_fixmatch, scored, trained
from toys import toy_network

from kdedge.errors import BugError, DeviceError, RunError
from kdedge.methods.distill import DistillConfig
from kdedge.methods.fixmatch import FixMatch
from kdedge.train.distributed import ALONE, Ranks
from kdedge.train.shared_layers import Shared, SharedBatchNorm2d, shared_layers

WORKER = Path(__file__).parent / "ranks_worker.py"


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a group of two left what it found."""
    folder, port = tmp_path_factory.mktemp("together"), free_port()
    command = [sys.executable, "-W", "error", str(WORKER), str(folder)]
    workers = [subprocess.Popen(command, env=environment(rank, 2, port), stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        said = [worker.communicate(timeout=400)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 9], said
    return folder


@pytest.fixture(scope="module")
def found(together: Path) -> list[dict[str, dict[str, Tensor]]]:
    return [torch.load(together / f"found.{rank}.pt", weights_only=True) for rank in (0, 1)]


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| over |expected|, of all floating-point tensors as one vector."""
    floats = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    error = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in floats)
    return float((error / sum(float(expected[n].double().square().sum()) for n in floats)) ** 0.5)


@pytest.mark.parametrize(
    "name",
    ["fixmatch", "freematch", "kd-fixmatch", "live-teacher", "frozen", "dropout", "simclr", "simclr-queue"],
)
def test_two_processes_train_in_float64_what_one_does(found, tmp_path, name) -> None:
    """Uneven shares too: 35 images a step, but 30 for freematch."""
    alone, (first, second) = EXPERIMENTS[name](ALONE, tmp_path), (each[name] for each in found)
    assert first.keys() == alone.keys()
    assert difference(first, alone) <= 1e-10
    assert all(torch.equal(first[key], second[key]) for key in alone)  # both have the same bits
    counters = [key for key in alone if key.endswith("num_batches_tracked")]
    assert counters
    assert all(torch.equal(first[key], alone[key]) for key in counters)


def test_the_comparison_can_fail(found, tmp_path) -> None:
    """Statistics of each process's own rows are another training."""
    half = trained(ALONE, fixmatch("fixed"), steps=20, labeled=6)
    assert difference(found[0]["fixmatch"], half) > 1e-3


def test_two_processes_go_through_the_loop_as_one_does(found, together, tmp_path) -> None:
    alone, (first, second) = EXPERIMENTS["loop"](ALONE, tmp_path), (each["loop"] for each in found)
    assert len(alone["loss"]) == len(first["loss"]) == 10  # one of them writes
    torch.testing.assert_close(first["loss"], alone["loss"], rtol=1e-4, atol=1e-5)
    assert torch.equal(first["val_accuracy"], alone["val_accuracy"])
    assert difference(first, alone) < 1e-4
    assert all(torch.equal(first[key], second[key]) for key in alone)
    assert len(list((together / "checkpoint").iterdir())) == len(list((tmp_path / "checkpoint").iterdir()))


def test_scoring_is_dealt_out_and_gives_the_bits_of_one_process(found, tmp_path) -> None:
    alone = scored(ALONE, tmp_path)
    assert alone["logits"].shape == (35, 3)
    for each in found:
        assert all(torch.equal(each["scored"][key], tensor) for key, tensor in alone.items())


def test_clustering_is_dealt_out_and_finds_what_one_process_finds(found, tmp_path) -> None:
    alone = EXPERIMENTS["clustered"](ALONE, tmp_path)
    assert len(alone["cluster"].unique()) == 3
    for each in found:
        torch.testing.assert_close(each["clustered"]["centroids"], alone["centroids"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(each["clustered"]["spread"], alone["spread"])
        for key in ("assignment", "cluster", "kept"):
            assert torch.equal(each["clustered"][key], alone[key])
    assert torch.equal(*(each["clustered"]["centroids"] for each in found))


def test_rows_of_all_kinds_are_gathered_in_order(found, tmp_path) -> None:
    alone = EXPERIMENTS["rows"](ALONE, tmp_path)
    for each in found:
        assert all(torch.equal(each["rows"][key], tensor) for key, tensor in alone.items())


def test_a_process_that_dies_is_told_in_one_sentence(together) -> None:
    said = (together / "lost.txt").read_text()
    assert said.startswith("Another process of this run has ended, and process 0 of 2 cannot go on without it. ")
    assert "--resume" in said
    assert "\n" not in said


# ---- one process


def test_alone_everything_is_the_identity(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks, rows, method = Ranks.from_environment(torch.device("cpu")), torch.ones(3, 2), fixmatch("fixed")
    assert (ranks.rank, ranks.world, ranks.is_first) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    assert ranks.sum(rows) is rows
    assert ranks.gather_rows(rows, [3]) is rows
    assert ranks.parallel(method) is method
    assert ranks.rows(5) == slice(0, 5)
    assert (ranks.any(True), ranks.any(False), ranks.text("a")) == (True, False, "a")
    modules = list(method.modules())
    with ranks, ranks.first_before_others(), ranks.sharing(method, 1):
        ranks.barrier()
        assert list(method.modules()) == modules
        assert method.network.compute is None
    error = RuntimeError("gloo")
    assert ranks.told(error) is error


def test_a_lost_connection_is_told_though_sigterm_comes_while_it_is_handled() -> None:
    lost, stopped, other = RuntimeError("[gloo/pair.cc] Connection closed"), KeyboardInterrupt(), ValueError("gloo")
    stopped.__context__ = lost
    assert all(isinstance(Ranks(0, 2).told(error), RunError) for error in (lost, stopped))
    assert Ranks(0, 2).told(other) is other
    assert isinstance(Ranks(0, 2).told(KeyboardInterrupt()), KeyboardInterrupt)


def test_restarts_of_torchrun_are_known(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for count, restarted in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert Ranks.from_environment(torch.device("cpu")).restarted is restarted
    assert not ALONE.restarted


def test_shared_layers_keep_tensors_and_names_and_go_again() -> None:
    from torchvision.models import efficientnet_b0

    for network in (toy_network(), efficientnet_b0()):
        modules, tensors = dict(network.named_modules()), network.state_dict(keep_vars=True)
        with shared_layers([network], Shared(slice(0, 2), 4, lambda tensor: tensor)):
            inside = network.state_dict(keep_vars=True)
            assert list(inside) == list(tensors)
            assert all(inside[name] is tensor for name, tensor in tensors.items())
            assert {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {SharedBatchNorm2d}
            assert all(m.p == 0 for m in network.modules() if isinstance(m, nn.Dropout | StochasticDepth))
            network.eval()
        assert dict(network.named_modules()) == modules
        assert not any(module.training for module in network.modules())


def test_a_shared_batch_norm_is_batch_norm_where_the_share_is_everything() -> None:
    """Gradients too, and in bfloat16 as near as its digits allow."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        plain = nn.BatchNorm2d(3).to(torch.promote_types(dtype, torch.float32))
        x = (5 + torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
        slopes = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = []
        for shared in (False, True):
            network = nn.Sequential(plain).train()
            plain.reset_running_stats()
            plain.zero_grad()
            leaf = x.clone().requires_grad_(True)
            if shared:
                with shared_layers([network], Shared(slice(0, 4), 4, lambda tensor: tensor)):
                    assert isinstance(network[0], SharedBatchNorm2d)
                    y = network(leaf)
            else:
                y = network(leaf)
            y.backward(slopes)
            found.append([y, leaf.grad, plain.weight.grad, plain.bias.grad, plain.running_mean, plain.running_var])
            found[-1] = [tensor.detach().clone() for tensor in found[-1]]
        for mine, expected in zip(*reversed(found), strict=True):
            assert mine.dtype == expected.dtype
            torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def test_what_cannot_be_shared_is_refused_with_a_sentence(monkeypatch) -> None:
    method = fixmatch("fixed")
    with pytest.raises(RunError, match=r"^8 processes cannot share a batch of 6 images\. .*labeled_batch higher"):
        Ranks(0, 8).sharing(method, 6).__enter__()
    method.network.compute = lambda backbone, x: backbone(x)
    with pytest.raises(RunError, match=r"^A batch that 2 processes share is not computed in parts as well"):
        Ranks(0, 2).sharing(method, 6).__enter__()
    method.network.compute = None
    monkeypatch.setattr(FixMatch, "needs_all_images", True)
    with pytest.raises(RunError, match=r"mixed images \(mixup\) .*, of which 2 processes have only their own"):
        Ranks(0, 2).sharing(method, 6).__enter__()
    odd = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(RunError, match="a layer BatchNorm1d, whose statistics several processes cannot share"):
        shared_layers([odd], Shared(slice(0, 1), 2, lambda tensor: tensor)).__enter__()
    with pytest.raises(BugError, match="rank 0 has 3 rows, and 2 were expected"):
        Ranks(0, 2).gather_rows(torch.ones(3, 1), [2, 1])


def test_a_method_knows_what_it_reads_of_the_batch() -> None:
    whole = {"mixup": DistillConfig(views="same", mixup=True), "maps": DistillConfig(views="same", loss="fitnets")}
    for method in (kd_fixmatch(DistillConfig(views="same", loss=loss)) for loss in ("kd", "rkd")):
        assert not method.needs_all_images
        assert len(method.asked) == 1
    assert all(kd_fixmatch(config).needs_all_images for config in whole.values())
    assert not fixmatch("fixed").needs_all_images
    assert not kd_fixmatch().asked


def test_gpus_go_round_or_it_is_said(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"at least 4 processes on a machine with 2 GPUs\. Use --nproc-per-node 2"):
        Ranks.from_environment(torch.device("cuda"))
    with pytest.raises(DeviceError, match="cuda:1 was asked for, and each process of torchrun takes a GPU of its own"):
        Ranks.from_environment(torch.device("cuda:1"))


def test_a_group_that_cannot_be_joined_is_told(monkeypatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"could not join the 2 of its run: .* torchrun -m kdedge"):
        Ranks.from_environment(torch.device("cpu"))
