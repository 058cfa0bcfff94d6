"""A batch is a function of (seed, stage, step) alone."""

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_pool

from kdedge.data.batches import Batches, make_views, share_rows
from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.data.store import Resident


def batches(
    seed: int = 0, stage: str = "outer", labeled: int = 4, unlabeled: int = 12, share: tuple[int, int] = (0, 1)
) -> Batches:
    sizes = {"labeled_batch": labeled, "unlabeled_batch": unlabeled}
    return Batches(toy_pool(), VIEWS, **sizes, seed=seed, stage=stage, share=share)


def test_a_step_can_be_asked_for_in_any_order() -> None:
    one, other = batches(), batches()
    forward = [one.at(step) for step in range(12)]
    for step in (11, 3, 7, 0):
        again = other.at(step)
        assert torch.equal(forward[step].images, again.images)
        assert torch.equal(forward[step].position_U, again.position_U)


def test_seed_and_stage_change_what_is_drawn() -> None:
    reference = batches().at(5)
    for other in (batches(seed=1), batches(stage="inner")):
        assert not torch.equal(reference.position_U, other.at(5).position_U)
        assert not torch.equal(reference.images, other.at(5).images)


def test_every_unlabeled_image_comes_once_an_epoch() -> None:
    drawn = torch.cat([batches().at(step).position_U for step in range(10)])  # 120 of 60: two epochs
    assert torch.bincount(drawn, minlength=60).tolist() == [2] * 60
    assert torch.bincount(drawn[:60], minlength=60).tolist() == [1] * 60


def test_a_batch_larger_than_the_set_goes_around() -> None:
    batch = batches(labeled=20).at(0)  # six labeled images
    assert batch.labels_B.shape == (20,)
    counts = torch.bincount(batch.labels_B, minlength=3)
    assert counts.sum() == 20
    assert int(counts.min()) >= 6


def test_labels_and_truth_belong_to_their_images() -> None:
    """The brightest third of each image tells its class."""
    batch = batches().at(2)
    labeled, weak, _ = batch.images.split([4, 12, 12])
    for views, classes in ((labeled, batch.labels_B), (weak, batch.truth_U)):
        thirds = torch.stack([views[:, 0, 3 * k : 3 * k + 2].mean((1, 2)) for k in range(3)], 1)
        assert torch.equal(thirds.argmax(1), classes)
    assert torch.equal(batch.truth_U, toy_pool().truth[batch.position_U])


def test_labels_only_gives_no_unlabeled_views() -> None:
    only = batches(unlabeled=0)
    assert only.images_per_step == 4
    assert only.at(0).images.shape == (4, 1, 8, 8)
    assert batches().images_per_step == 28 == len(batches().at(0).images)


def test_share_rows_are_chunks_in_order_and_even() -> None:
    for count in (0, 1, 5, 28):
        for world in (1, 2, 3, 7):
            shares = [range(count)[share_rows(count, rank, world)] for rank in range(world)]
            assert [row for share in shares for row in share] == list(range(count))
            sizes = [len(share) for share in shares]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(("world", "unlabeled"), [(2, 12), (3, 12), (5, 12), (3, 0)])
def test_processes_that_share_a_step_have_together_what_one_has(world, unlabeled) -> None:
    whole = batches(unlabeled=unlabeled).at(3)
    shared = [batches(unlabeled=unlabeled, share=(rank, world)).at(3) for rank in range(world)]
    assert torch.equal(torch.cat([share.images for share in shared]), whole.images)
    for share in shared:
        for field in dataclasses.fields(whole)[1:]:
            assert torch.equal(getattr(share, field.name), getattr(whole, field.name)), field.name


def test_views_are_the_same_whatever_the_step_computes_in() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = batches().at(3).images
    assert found.dtype == torch.float32
    assert torch.equal(found, batches().at(3).images)


def test_places_are_those_of_the_batch() -> None:
    labeled, unlabeled = batches().places(5)
    batch = batches().at(5)
    assert torch.equal(labeled, batch.position_B)
    assert torch.equal(unlabeled, batch.position_U)


class _NeverWaits(TorchDispatchMode):
    """Refuses copies for which torch waits until the device has done all that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in ("aten::_to_copy", "aten::copy_") and args[name == "aten::copy_"].device != made.device:
            self.sent += 1
            assert (kwargs or {}).get("non_blocking") or True in args[2:], f"{name} of {args} waits for the device"
        return made


def _of_fixed_shapes(first: Tensor, first_DB: Tensor, second: Tensor, second_DU: Tensor) -> Tensor:
    """What `kdedge.train.engine` compiles, and sends the draws for."""
    draws = (each.to("meta", non_blocking=True) for each in (first_DB, second_DU))
    return make_views(VIEWS, first, next(draws), second, next(draws), fixed_shapes=True)


COLOURS = ContrastiveViewConfig(
    smallest_area=0.1, flip=True, jitter_strength=1.0, grayscale_probability=0.2, blur_probability=0.5
)


@pytest.mark.parametrize(
    ("views", "make"),
    [(VIEWS, None), (VIEWS, _of_fixed_shapes), (COLOURS, None)],
    ids=["grouped", "fixed-shapes", "contrastive"],
)
def test_a_step_never_waits_for_its_device(views, make, monkeypatch) -> None:
    """On one whose tensors cannot be read, so that any look at one of them fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which that device has not
    plain, there = toy_pool(), {}
    for name in ("labels", "truth", "unlabeled", "mean", "std"):
        there[name] = getattr(plain, name).to("meta")
    pool = dataclasses.replace(plain, images=Resident(plain.images.images_u8.to("meta").expand(-1, 3, -1, -1)), **there)
    made = Batches(pool, views, labeled_batch=4, unlabeled_batch=40, seed=0, stage="outer")
    made.make_views = make or made.make_views
    with _NeverWaits() as watched:
        batch = made.at(1)
    assert batch.images.shape == (84, 3, 8, 8)
    assert watched.sent > 0
