"""The inner network: what ties it to FixMatch, what a trusted label is for, and what each option adds."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.errors import BugError
from kdedge.losses.consistency import log_prior
from kdedge.losses.kd import kd
from kdedge.methods.distill import DistillConfig
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.health import COUNTS, counts_line
from kdedge.methods.kd_fixmatch import KDFixMatch, KDFixMatchConfig, TrustedTargets
from kdedge.methods.teacher import LiveTeacher, StoredTeacher, Teacher
from kdedge.methods.thresholds import ThresholdConfig, make_policy

NONE = torch.full((60,), -1)
B, U = 6, 30
SURE = 0.49  # what about half of the toy network's answers reach


@pytest.fixture
def batch() -> Batch:
    return Batches(toy_pool(), VIEWS, labeled_batch=B, unlabeled_batch=U, seed=0, stage="t").at(0)


def inner(
    trusted: Tensor = NONE,
    usable: Tensor | None = None,
    teacher: Teacher | None = None,
    threshold: float = SURE,
    **config: Any,
) -> KDFixMatch:
    """In train mode, with plain cross entropy where nothing else is said."""
    thresholds = config.pop("thresholds", None) or ThresholdConfig(threshold=threshold)
    prior = config.pop("log_prior_K", None)
    made = KDFixMatchConfig(**({"robust_loss": "ce", "thresholds": thresholds} | config))
    targets = TrustedTargets(trusted, torch.ones(60) if usable is None else usable)
    policy = make_policy(made.thresholds, 3, 60)
    return KDFixMatch(toy_network(), made, policy, targets, teacher, prior).train()


def stored(features: int = 7) -> StoredTeacher:
    generator = torch.Generator().manual_seed(3)
    return StoredTeacher(torch.randn(60, 3, generator=generator), torch.randn(60, features, generator=generator))


def live(px: int = 8, shift: float = 0.0) -> LiveTeacher:
    pool = toy_pool()
    return LiveTeacher(
        toy_network(5), mean=pool.mean, std=pool.std, own_mean=pool.mean + shift, own_std=pool.std * 2, own_px=px
    )


def views(method: KDFixMatch, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of labeled, weak and strong views by a copy in the same mode."""
    return copy.deepcopy(method.network)(batch.images).detach().split([B, U, U])


# ---- invariant 1: what it is without an outer network, and with nothing but it


@pytest.mark.parametrize("policy", ["fixed", "flexmatch", "freematch", "softmatch", "adamatch"])
def test_without_trusted_labels_and_teacher_it_is_fixmatch_bit_for_bit(policy, batch) -> None:
    thresholds = ThresholdConfig(policy=policy)
    outer = FixMatch(toy_network(), FixMatchConfig(thresholds=thresholds), make_policy(thresholds, 3, 60)).train()
    same = inner(thresholds=thresholds)
    for _ in range(3):  # the state of the policies moves along
        a, b = outer(batch), same(batch)
        assert torch.equal(a.loss, b.loss)
        assert a.logs.keys() == b.logs.keys()
        a.loss.backward()
        b.loss.backward()
    for p, q in zip(outer.parameters(), same.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_threshold_of_this_file_keeps_some_and_not_all(batch) -> None:
    """Else much of what follows would hold for nothing."""
    kept = counts_line(inner()(batch).logs[COUNTS])["kept_fraction"]
    assert 0.2 < kept < 0.8


def test_with_all_trusted_and_no_own_confidence_it_is_pseudo_label_training_on_strong_views(batch) -> None:
    method = inner(toy_pool().truth, threshold=1.01)
    labeled, _, strong = views(method, batch)
    expected = functional.cross_entropy(labeled, batch.labels_B) + functional.cross_entropy(strong, batch.truth_U)
    step = method(batch)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    line = counts_line(step.logs[COUNTS])
    assert (line["kept_fraction"], line["pseudo_label_accuracy"]) == (1, 1)


# ---- what a trusted label is for (invariant 2)


def slow_unlabeled(method: KDFixMatch, batch: Batch, trusted: Tensor, usable: Tensor, merge: str) -> float:
    """The unlabeled term image by image, from the reconstruction."""
    _, weak, strong = views(method, batch)
    total = 0.0
    for u, place in enumerate(batch.position_U.tolist()):
        if not usable[place]:
            continue
        q = torch.softmax(weak[u], 0)
        own, sure, outer = int(q.argmax()), float(q.max()) >= SURE, int(trusted[place])
        target = None
        if merge == "outer-first":
            target = outer if outer >= 0 else own if sure else None
        elif merge == "heuristic1":
            target = own if sure else outer if outer >= 0 else None
        elif sure:
            target = own
        if target is not None:
            total -= float(torch.log_softmax(strong[u], 0)[target])
    return total / len(batch.position_U)


@pytest.mark.parametrize("merge", ["heuristic1", "outer-first", "separate-term"])
def test_merging_is_the_reconstruction_image_by_image(merge, batch) -> None:
    trusted = torch.where(torch.arange(60) % 4 == 0, -1, torch.arange(60) % 3)
    usable = (torch.arange(60) % 5 > 0).float()
    method = inner(trusted, usable, merge=merge, trusted_weight=0.5)
    labeled, weak, strong = views(method, batch)
    sure = torch.softmax(weak, 1).amax(1) >= SURE
    outer = trusted[batch.position_U]
    assert (sure & (outer >= 0) & (outer != weak.argmax(1))).any()  # the two can disagree
    expected = float(functional.cross_entropy(labeled, batch.labels_B))
    expected += slow_unlabeled(method, batch, trusted, usable, merge)
    if merge == "separate-term":
        rows = [u for u, n in enumerate(batch.position_U.tolist()) if trusted[n] >= 0 and usable[n]]
        expected += 0.5 * float(functional.cross_entropy(strong[rows], outer[rows]))
    step = method(batch)
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)
    assert ("loss_trusted" in step.logs) == (merge == "separate-term")


def test_the_separate_term_is_0_where_no_image_of_the_batch_is_trusted(batch) -> None:
    step = inner(merge="separate-term")(batch)
    assert step.logs["loss_trusted"] == 0
    assert torch.equal(step.loss, inner()(batch).loss)


def test_a_soft_weight_below_1_leaves_the_image_to_the_trusted_label(batch) -> None:
    """SoftMatch never gives weight 0: confident means full weight."""
    trusted = toy_pool().truth
    step = inner(trusted, thresholds=ThresholdConfig(policy="softmatch"))(batch)
    line = counts_line(step.logs[COUNTS])
    assert line["kept_fraction"] == 1  # own labels of full weight, trusted ones for the rest
    assert line["pseudo_label_accuracy"] > 0.4  # its own labels alone: 0.2


# ---- the parts of the loss


def test_symmetric_cross_entropy_with_alpha_1_and_beta_0_is_cross_entropy(batch) -> None:
    """Invariant 7, through the method."""
    truth = toy_pool().truth
    plain, same = inner(truth)(batch), inner(truth, robust_loss="sce", sce_alpha=1.0, sce_beta=0.0)(batch)
    assert same.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert inner(truth, robust_loss="sce")(batch).loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


def test_weights_scale_their_terms(batch) -> None:
    parts = inner(teacher=stored())(batch).logs
    step = inner(teacher=stored(), labeled_weight=0.0, unlabeled_weight=2.0, distill=DistillConfig(weight=3.0))(batch)
    expected = 2.0 * parts["loss_unlabeled"] + 3.0 * parts["loss_distill"]
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logit_adjustment_adds_the_prior_to_the_labeled_logits_only(batch) -> None:
    prior = log_prior(torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    method = inner(logit_adjustment=0.5, log_prior_K=prior)
    labeled, _, _ = views(method, batch)
    step, plain = method(batch), inner()(batch)
    expected = functional.cross_entropy(labeled + 0.5 * prior, batch.labels_B)
    assert step.logs["loss_labeled"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(step.logs["loss_unlabeled"], plain.logs["loss_unlabeled"])
    with pytest.raises(BugError, match="log prior"):
        inner(logit_adjustment=0.5)


def test_no_gradient_flows_through_the_weak_views(batch) -> None:
    """Invariant 5: the gradient is that of the strong views against fixed targets."""
    method = inner(toy_pool().truth, labeled_weight=0.0, merge="outer-first").eval()  # eval: views do not meet
    method(batch).loss.backward()
    other = toy_network().eval()
    functional.cross_entropy(other(batch.images[B + U :]), batch.truth_U).backward()
    for a, b in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
        assert a.grad.abs().sum() > 0


# ---- distillation, wired


def test_distillation_is_on_all_views_against_the_answers_of_their_images(batch) -> None:
    method, teacher = inner(teacher=stored()), stored()
    places = torch.cat([batch.position_B, batch.position_U, batch.position_U])
    expected = kd(torch.cat(views(method, batch)), teacher.answers(batch.images, places).logits_MK, 1.0)
    step, without = method(batch), inner()(batch)
    assert step.logs["loss_distill"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert step.loss.item() == pytest.approx(without.loss.item() + expected.item(), rel=1e-6)


def test_outliers_count_0_in_distillation_and_labeled_images_stay(batch) -> None:
    usable = (torch.arange(60) % 5 > 0).float()
    assert usable[batch.position_B].min() == 0
    method = inner(usable=usable, teacher=stored())
    keep = torch.cat([torch.ones(B), usable[batch.position_U], usable[batch.position_U]]) > 0
    places = torch.cat([batch.position_B, batch.position_U, batch.position_U])
    answers = stored().answers(batch.images, places).logits_MK
    expected = kd(torch.cat(views(method, batch))[keep], answers[keep], 1.0)
    assert method(batch).logs["loss_distill"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_weight_0_and_loss_none_leave_the_teacher_out(batch) -> None:
    for distill in (DistillConfig(weight=0.0), DistillConfig(loss="none")):
        method = inner(teacher=stored(), distill=distill)
        assert torch.equal(method(batch).loss, inner()(batch).loss)


def test_a_live_teacher_sees_the_very_views_in_its_own_normalisation_and_size(batch) -> None:
    same = DistillConfig(views="same")
    for px, shift in ((8, 0.0), (8, 0.2), (12, 0.1)):
        pool, method = toy_pool(), inner(teacher=live(px, shift), distill=same)
        pixels = batch.images * pool.std + pool.mean
        own = (pixels - (pool.mean + shift)) / (pool.std * 2)
        if px != 8:
            own = functional.interpolate(own, [px, px], mode="bilinear", antialias=True)
        with torch.no_grad():
            answers = toy_network(5).eval()(own)
        expected = kd(torch.cat(views(method, batch)), answers, 1.0)
        assert method(batch).logs["loss_distill"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert method.extra_flops_an_image > 0
    assert inner(teacher=stored()).extra_flops_an_image == 0


@pytest.mark.parametrize("loss", ["kd", "crd", "fitnets"])
def test_the_teacher_is_frozen_in_eval_mode_and_in_no_checkpoint(loss, batch) -> None:
    method = inner(teacher=live(), distill=DistillConfig(loss=loss, views="same"))
    teacher = method.teacher
    assert isinstance(teacher, LiveTeacher)
    before = copy.deepcopy(teacher.network.state_dict())
    method.train()
    method(batch).loss.backward()
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    assert not any(module.training for module in teacher.network.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items())
    frozen = {id(p) for p in teacher.network.parameters()}
    assert not frozen & {id(p) for p in method.parameters()}
    assert all(name.split(".")[0] in ("network", "policy", "distiller") for name in method.state_dict())


def test_the_teacher_follows_its_method_to_another_format() -> None:
    method = inner(teacher=live(), distill=DistillConfig(views="same")).to(memory_format=torch.channels_last)
    assert isinstance(method.teacher, LiveTeacher)
    kernels = [p for p in method.teacher.network.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert len(kernels) > 3
    double = inner(teacher=stored()).double()
    assert double.teacher is not None
    assert double.teacher.answers(torch.empty(0), torch.arange(2)).logits_MK.dtype == torch.float64


def test_stored_answers_and_trusted_labels_are_in_no_checkpoint() -> None:
    method = inner(toy_pool().truth, teacher=stored())
    assert {name.split(".")[0] for name in method.state_dict()} == {"network", "distiller"}
    assert list(method.distiller.state_dict()) == ["steps"]


# ---- function matching: mixup, the same for both


def test_function_matching_mixes_the_images_that_both_see(batch, monkeypatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.3))
    distill = DistillConfig(views="same", mixup=True)
    mixed = torch.stack([0.3 * batch.images[i] + 0.7 * batch.images[i - 1] for i in range(B + 2 * U)])
    only = inner(teacher=live(), distill=distill, labeled_weight=0.0, unlabeled_weight=0.0)
    with torch.no_grad():
        answers = toy_network(5).eval()(live()._as_own_input(mixed))
        expected = kd(copy.deepcopy(only.network)(mixed), answers, 1.0)
    step = only(batch)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.logs.keys() == {"loss_distill"}
    beside = inner(teacher=live(), distill=distill)
    assert (only.passes, beside.passes) == (1, 2)
    logs = beside(batch).logs
    assert torch.equal(logs["loss_labeled"], inner()(batch).logs["loss_labeled"])
    assert logs["loss_distill"].item() == pytest.approx(expected.item(), rel=0.2)  # batch norm has moved


def test_a_method_that_mixes_repeats_a_step_by_its_seed(batch) -> None:
    losses = []
    for seed in (1, 1, 2):
        method = inner(teacher=live(), distill=DistillConfig(views="same", mixup=True))
        torch.manual_seed(seed)
        losses.append(method(batch).loss.item())
    assert losses[0] == losses[1] != losses[2]


# ---- resume, and what is refused


@pytest.mark.parametrize("loss", ["kd", "dkd", "crd", "fitnets"])
def test_a_resumed_method_goes_on_bit_for_bit(loss) -> None:
    """Memories, heads, warm-up and the state of the policy are in the state_dict."""
    batches = Batches(toy_pool(), VIEWS, labeled_batch=B, unlabeled_batch=U, seed=0, stage="t")
    views = "same" if loss == "fitnets" else "stored"

    def fresh() -> tuple[KDFixMatch, torch.optim.SGD]:
        method = inner(
            teacher=live() if views == "same" else stored(),
            distill=DistillConfig(loss=loss, views=views, weight=0.5, warmup_steps=5, crd_negatives=20),
            thresholds=ThresholdConfig(policy="flexmatch"),
        )
        return method, torch.optim.SGD(method.parameters(), lr=0.05)

    def go(method: KDFixMatch, optimizer: torch.optim.SGD, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            loss = method(batches.at(step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    whole = fresh()
    losses = go(*whole, range(6))
    first, second = fresh(), fresh()
    go(*first, range(3))
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    assert go(*second, range(3, 6)) == losses[3:]
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"loss": "fitnets"}, "set views to same"),
        ({"mixup": True}, "views same was expected"),
        ({"loss": "crd", "views": "same", "mixup": True}, "loss kd or dist"),
        ({"loss": "rkd", "temperature": 2.0}, "rkd has no temperature"),
        ({"weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_sentence(given, sentence) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DistillConfig(**given)


def test_a_teacher_that_does_not_fit_the_settings_is_a_bug() -> None:
    with pytest.raises(BugError, match="views is same"):
        inner(teacher=stored(), distill=DistillConfig(views="same"))
    with pytest.raises(BugError, match="views is stored"):
        inner(teacher=live())
    with pytest.raises(BugError, match="needs features"):
        inner(teacher=StoredTeacher(torch.zeros(60, 3)), distill=DistillConfig(loss="rkd"))


@pytest.mark.parametrize("policy", ["flexmatch", "freematch", "softmatch", "adamatch"])
def test_outliers_do_not_steer_the_thresholds(policy, batch) -> None:
    """The policy's state after a step is that of a batch without them."""
    usable = (torch.arange(60) % 3 > 0).float()
    kept = usable[batch.position_U] > 0
    method = inner(usable=usable, thresholds=ThresholdConfig(policy=policy))
    labeled, weak, _ = views(method, batch)
    alone = make_policy(ThresholdConfig(policy=policy), 3, 60).train()
    expected = alone(labeled, weak[kept], batch.position_U[kept])
    method(batch)
    for name, state in alone.state_dict().items():
        assert torch.equal(method.policy.state_dict()[name], state), name
    again = inner(usable=usable, thresholds=ThresholdConfig(policy=policy))._own_labels(labeled, weak, batch.position_U)
    assert torch.equal(again.weight_U[kept], expected.weight_U)
    assert not again.weight_U[~kept].any()
    nobody = inner(usable=torch.zeros(60), thresholds=ThresholdConfig(policy=policy))
    assert torch.isfinite(nobody(batch).loss)


def test_no_loss_has_no_weight_and_asks_no_teacher() -> None:
    config = DistillConfig(loss="none", weight=3.0, views="same")
    assert config.resolved_weight == 0
    assert inner(teacher=live(), distill=config).teacher is None
