"""Many processes that share one run: started by torchrun, joined by PyTorch's own process group.

Every process has the whole batch's labels and places but only its own rows of the images. It runs the backbone on
them; features are gathered, so that head, method, policy and loss see the whole batch in every process and need not
know. Gradients are averaged by DistributedDataParallel; `gather` makes that average exact for backbone and head alike.

B rows of the whole batch, M rows of this process, F features.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

from kdedge.data.batches import Batch, share_rows
from kdedge.errors import BugError, DeviceError, RunError
from kdedge.methods.step import Method, Step
from kdedge.models.zoo import Network
from kdedge.train.meeting import meeting_point
from kdedge.train.shared_layers import Shared, shared_layers

__all__ = ["ALONE", "Ranks"]

# A process that dies closes its connections, and that is noticed at once. This is for waiting while the first process
# does alone what only one may do: download, or choose among a million images.
_PATIENCE = timedelta(hours=12)
_CPU = torch.device("cpu")


def _restarts() -> int:
    """How often torchrun has restarted this run (elastic restart); 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@final
class Ranks:
    """The processes of one run, and which one this is. With one process everything here is the identity.

    As a context it leaves the group at the end, and turns a lost connection into a RunError of one sentence.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device = _CPU, *, restarted: bool = False) -> None:
        """`restarted`: torchrun has started these processes before, and they go on with their run."""
        self.rank, self.world, self.device, self.restarted = rank, world, device, restarted

    @classmethod
    def from_environment(cls, device: torch.device) -> "Ranks":
        """Join the processes that torchrun started; `ranks.device` is this one's: of "cuda" its own GPU.

        DeviceError where there are more processes than GPUs, or where all were given the same one.
        """
        world, again = int(os.environ.get("WORLD_SIZE", "1")), _restarts() > 0
        if world == 1:
            return cls(device=device, restarted=again)
        import torch.distributed as dist

        if device.type == "cuda":
            device = _own_gpu(device)
            torch.cuda.set_device(device)
        # Tensors on the CPU go through gloo in both cases: logits, flags and sums of clusters.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store, rank, starts = meeting_point()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"This process could not join the {world} of its run: {str(error).splitlines()[0]} "
                "Start all of them with torchrun -m kdedge train-recipe ..."
            ) from error
        ranks = cls(rank, world, device)
        # torchrun counts restarts for each machine alone, and none where a machine comes to it.
        ranks.restarted = ranks.any(again or starts > 1)
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files, logs and displays."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's share of `count` rows."""
        return share_rows(count, self.rank, self.world)

    # ---- between processes: every process must call these in the same order

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all processes, in their order; `counts` says how many each of them has."""
        if self.world == 1:
            return rows
        import torch.distributed as dist

        if len(rows) != counts[self.rank]:
            raise BugError(f"rank {self.rank} has {len(rows)} rows, and {counts[self.rank]} were expected")
        most = max(counts)
        # Padded to one length, since not every backend gathers uneven parts.
        mine = torch.cat([rows.detach(), rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether any process says so. What all of them do next must not hang on the clock or signals of one."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process is through the block before the others enter it: what it downloads they find."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def text(self, text: str) -> str:
        """The first process's text, in every process."""
        if self.world == 1:
            return text
        import torch.distributed as dist

        told = [text]
        dist.broadcast_object_list(told, src=0, device=_CPU)
        return told[0]

    # ---- training

    def parallel(self, method: Method) -> Callable[[Batch], Step]:
        """What a step calls: the method, with gradients averaged over processes while the backward pass still runs.

        All processes then have the first one's weights and statistics.
        """
        if self.world == 1:
            return method
        from torch.nn.parallel import DistributedDataParallel

        # Before each step nothing is sent: buffers change in the same way everywhere. torch 2.14 renamed that switch.
        known = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings: dict[str, Any] = {switch: False}
        return DistributedDataParallel(method, **settings)

    @contextmanager
    def sharing(self, method: Method, images: int) -> Iterator[None]:
        """Inside the block the method's networks run this process's rows of a batch of `images` in all.

        Batch norm counts the whole batch, dropout draws for it. The tensors of the method and their names stay.
        RunError where there are more processes than images, where a network already runs in parts, and where the
        method needs images of other processes.
        """
        if self.world == 1:
            yield
            return
        networks = [module for module in method.modules() if isinstance(module, Network)]
        self._refuse(method, networks, images)
        computing = [*networks, *method.asked]
        # A neck, and a head, see the gathered features of the whole batch.
        with shared_layers([network.backbone for network in networks], Shared(self.rows(images), images, self.sum)):
            try:
                for network in computing:
                    network.compute = functools.partial(self._compute, images)
                yield
            finally:
                for network in computing:
                    network.compute = None

    def _refuse(self, method: Method, networks: Sequence[Network], images: int) -> None:
        if images < self.world:
            raise RunError(
                f"{self.world} processes cannot share a batch of {images} images. Start fewer with --nproc-per-node, "
                "or set the stage's optim.labeled_batch higher."
            )
        if any(network.compute is not None for network in networks):
            raise RunError(
                f"A batch that {self.world} processes share is not computed in parts as well (engine.plan.parts). "
                "Start more processes, or set the stage's optim.labeled_batch lower."
            )
        if method.needs_all_images:
            raise RunError(
                f"student.method.distill asks for mixed images (mixup) or maps of a middle layer (loss fitnets), of "
                f"which {self.world} processes have only their own. Train it in one process, or choose another loss."
            )

    def _compute(self, images: int, backbone: nn.Module, x_MCHW: Tensor) -> Tensor:
        """Features [B, F] of the whole batch from this process's images."""
        gathered_BF: Tensor = _GatherRows.apply(backbone(x_MCHW), self, images)
        return gathered_BF

    # ---- the end

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif (told := self.told(error)) is not error:
            raise told from error  # and the group is not left in order: that would wait for the one that is gone

    def told(self, error: BaseException) -> BaseException:
        """A RunError of one sentence where a connection was lost; any other error as it is.

        Where torchrun ends the others it sends SIGTERM, and that may come while the loss is being handled.
        """
        cause: BaseException | None = error if self.world > 1 else None
        while cause is not None and not _lost(cause):
            cause = cause.__context__
        if cause is None:
            return error
        return RunError(
            f"Another process of this run has ended, and process {self.rank} of {self.world} cannot go on without it. "
            "What was trained is kept up to the last checkpoint. The first message above says why; go on with the same "
            "command and --resume (torchrun --max-restarts N does so by itself)."
        )


ALONE: Final = Ranks()
"""One process."""


def _own_gpu(device: torch.device) -> torch.device:
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise DeviceError(
            f"The device {device} was asked for, and each process of torchrun takes a GPU of its own. "
            "Use --device cuda, and CUDA_VISIBLE_DEVICES to choose among them."
        )
    if local >= count:
        raise DeviceError(
            f"torchrun started at least {local + 1} processes on a machine with {count} GPUs. "
            f"Use --nproc-per-node {count}."
        )
    return torch.device("cuda", local)


def _lost(error: BaseException) -> bool:
    """Whether a collective failed. gloo's errors are plain RuntimeErrors, known by the file they name."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@final
class _GatherRows(torch.autograd.Function):
    """Rows of all processes; backwards each takes its own rows of the gradient, times the number of processes.

    Every process computes the whole loss, so the gradient of the gathered rows is whole in each, and nothing needs to
    be added up. The factor makes good for the average that follows: of what the processes have of the backbone's
    gradient the sum is wanted, of the head's, which is the same everywhere, the average.
    """

    @staticmethod
    def forward(ctx: Any, rows_MF: Tensor, ranks: Ranks, count: int) -> Tensor:
        ctx.rows, ctx.world = ranks.rows(count), ranks.world
        shares = [share_rows(count, rank, ranks.world) for rank in range(ranks.world)]
        return ranks.gather_rows(rows_MF, [share.stop - share.start for share in shares])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_BF,) = gradients
        return gradient_BF[ctx.rows] * ctx.world, None, None
