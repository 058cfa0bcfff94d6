"""Distillation losses against slow versions written from the formulas, and the invariants of the papers."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_network, toy_pool

from kdedge.losses.crd import crd, log_normalizer, remember_
from kdedge.losses.dist import dist
from kdedge.losses.dkd import dkd, non_target_kd, target_kd
from kdedge.losses.fitnets import fitnets
from kdedge.losses.kd import kd
from kdedge.losses.rkd import rkd_angle, rkd_distance
from kdedge.methods.distill import DistillConfig, Distiller
from kdedge.methods.teacher import Answers, LiveTeacher, StoredTeacher, ask, middle_layer
from kdedge.models.zoo import ModelSpec, build


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def student() -> Tensor:
    return noise(12, 5) * 3


@pytest.fixture
def teacher() -> Tensor:
    return noise(12, 5, seed=1) * 3


TARGET = torch.arange(12) % 5


def probs_of(row: Tensor) -> list[float]:
    exps = [math.exp(v) for v in row.tolist()]
    return [e / sum(exps) for e in exps]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# ---- DKD


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_its_two_divergences_written_out(student, teacher, temperature) -> None:
    total = 0.0
    for s, t, k in zip(student / temperature, teacher / temperature, TARGET.tolist(), strict=True):
        p, q = probs_of(t), probs_of(s)
        target = divergence([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        rest_p = [a / (1 - p[k]) for j, a in enumerate(p) if j != k]
        rest_q = [a / (1 - q[k]) for j, a in enumerate(q) if j != k]
        total += 0.7 * target + 8.0 * divergence(rest_p, rest_q)
    ours = dkd(student, teacher, TARGET, temperature, alpha=0.7, beta=8.0)
    assert float(ours) == pytest.approx(temperature**2 * total / 12, rel=1e-9)


def test_kd_is_tckd_and_1_minus_p_target_times_nckd_image_by_image(student, teacher) -> None:
    """Invariant 10."""
    p_target = torch.softmax(teacher, 1).gather(1, TARGET[:, None]).squeeze(1)
    split = target_kd(student, teacher, TARGET) + (1 - p_target) * non_target_kd(student, teacher, TARGET)
    for row in range(12):
        whole = kd(student[row : row + 1], teacher[row : row + 1], 1.0)
        assert float(split[row]) == pytest.approx(float(whole), rel=1e-9)


def test_dkd_and_its_gradient_stay_finite_where_both_are_sure(student) -> None:
    """In float32, 1 - p_target would be 0 and its log would be lost."""
    sure = (student.float() * 0).scatter(1, TARGET[:, None], 200.0)
    other = (sure * 0.5).requires_grad_()
    loss = dkd(other, sure, TARGET, 1.0, 1.0, 8.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(other.grad).all()


# ---- DIST


def correlation(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_its_correlations_written_out(student, teacher, temperature) -> None:
    s = [probs_of(row) for row in student / temperature]
    t = [probs_of(row) for row in teacher / temperature]
    rows = sum(1 - correlation(a, b) for a, b in zip(s, t, strict=True)) / 12
    columns = sum(1 - correlation([r[k] for r in s], [r[k] for r in t]) for k in range(5)) / 5
    ours = dist(student, teacher, temperature, beta=2.0, gamma=0.5)
    assert float(ours) == pytest.approx(temperature**2 * (2.0 * rows + 0.5 * columns), rel=1e-6)


def test_dist_is_0_where_the_student_is_an_affine_transform_of_the_teacher(teacher) -> None:
    """Invariant 11: probabilities pulled halfway to even are 0.5 p + 0.5 / K, in rows and in columns."""
    probs = torch.softmax(teacher, 1)
    halfway = (0.5 * probs + 0.1).log()
    assert float(dist(halfway, teacher, 1.0, 1.0, 1.0)) == pytest.approx(0, abs=1e-9)
    assert float(dist(halfway.flip(0), teacher, 1.0, 1.0, 1.0)) > 0.1
    assert float(kd(halfway, teacher, 1.0)) > 0.1  # which KD would not forgive


def test_dist_survives_a_class_that_no_image_is_given_to() -> None:
    one_class = torch.zeros(6, 4).index_fill(1, torch.tensor(2), 300.0).requires_grad_()
    loss = dist(one_class, one_class.detach(), 1.0, 1.0, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(one_class.grad).all()


# ---- RKD


def smooth_l1(d: float) -> float:
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def slow_distances(x: np.ndarray) -> np.ndarray:
    d = np.array([[math.dist(a, b) for b in x] for a in x])
    return d / d[d > 0].mean()


def slow_cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
    a, b = x[i] - x[j], x[k] - x[j]
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths > 0 else 0.0


def test_rkd_is_its_pairs_and_triplets_written_out() -> None:
    s, t = noise(7, 4) + 5, noise(7, 6, seed=1) * 2
    t[5] = t[2]  # two images may have the same features
    a, b = s.numpy(), t.numpy()
    difference = (slow_distances(a) - slow_distances(b)).reshape(-1)
    assert float(rkd_distance(s, t)) == pytest.approx(sum(map(smooth_l1, difference)) / 49, rel=1e-6)
    angles = [
        smooth_l1(slow_cosine(a, i, j, k) - slow_cosine(b, i, j, k))
        for i in range(7)
        for j in range(7)
        for k in range(7)
    ]
    assert float(rkd_angle(s, t)) == pytest.approx(sum(angles) / 343, rel=1e-6)


def test_rkd_is_0_where_the_student_is_a_turned_and_scaled_teacher() -> None:
    t = noise(9, 4)
    turn, _ = torch.linalg.qr(noise(4, 4, seed=2))
    s = (3.0 * t @ turn + 1.0).requires_grad_()
    loss = rkd_distance(s, t) + rkd_angle(s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.isfinite(s.grad).all()
    assert float(rkd_distance(noise(9, 4, seed=3), t)) > 1e-3


def test_rkd_has_a_gradient_where_two_images_coincide() -> None:
    s = noise(5, 3)
    s[1] = s[0]
    s = s.requires_grad_()
    (rkd_distance(s, noise(5, 3, seed=1)) + rkd_angle(s, noise(5, 3, seed=1))).backward()
    assert torch.isfinite(s.grad).all()


# ---- CRD


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(noise(*shape, seed=seed), dim=1)


def test_crd_is_its_chances_written_out() -> None:
    anchor, bank = unit(4, 3), unit(10, 3, seed=1)
    place, negative = torch.tensor([2, 7, 0, 7]), torch.tensor([1, 2, 5, 7, 7, 9])
    z, tau = 1.7, 0.5
    c = len(negative) / len(bank)
    total = 0.0
    for row in range(4):

        def chance(n: int, row: int = row) -> float:
            e = math.exp(float(anchor[row] @ bank[n]) / tau) / z
            return e / (e + c)

        own = int(place[row])
        total -= math.log(chance(own))
        total -= sum(math.log(1 - chance(n)) for n in negative.tolist() if n != own)
    ours = crd(anchor, bank, place, negative, tau, torch.tensor(z).log())
    assert float(ours) == pytest.approx(total / 4, rel=1e-6)


def test_the_normalizer_is_n_times_the_mean() -> None:
    anchor, bank, negative = unit(4, 3), unit(10, 3, seed=1), torch.tensor([0, 3, 3])
    exps = [math.exp(float(a @ bank[n]) / 0.5) for a in anchor for n in negative.tolist()]
    assert float(log_normalizer(anchor, bank, negative, 0.5)) == pytest.approx(math.log(10 * sum(exps) / 12), rel=1e-9)


def test_the_memory_moves_towards_the_first_view_of_each_image() -> None:
    bank, new = unit(6, 3), unit(4, 3, seed=1)
    after = bank.clone()
    remember_(after, new, torch.tensor([4, 1, 4, 1]), 0.25)
    for place, view in ((4, 0), (1, 1)):
        moved = 0.25 * bank[place] + 0.75 * new[view]
        torch.testing.assert_close(after[place], moved / moved.norm())
    assert torch.equal(after[[0, 2, 3, 5]], bank[[0, 2, 3, 5]])


def crd_distiller(**config: int) -> Distiller:
    torch.manual_seed(0)
    stored = StoredTeacher(torch.zeros(60, 3), noise(60, 7).float())
    return Distiller(DistillConfig(loss="crd", **config), toy_network(), stored, 60).train()


def test_crd_learns_to_tell_images_apart() -> None:
    """Its own row becomes the likeliest for most images, from a start where it is one of 60."""
    distiller, place, features = crd_distiller(), torch.arange(60), noise(60, 64, seed=4).float()
    teacher = Answers(torch.zeros(60, 3), noise(60, 7).float())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.3, momentum=0.9)

    def hits() -> float:
        anchor = nn.functional.normalize(distiller.student_projection(features))
        return float(((anchor @ distiller.teacher_bank_ND.T).argmax(1) == place).double().mean())

    assert hits() < 0.2
    for _ in range(60):
        loss = distiller(Answers(torch.zeros(60, 3), features), teacher, place, place)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert hits() > 0.8


def test_crd_draws_no_more_negatives_than_there_are_images() -> None:
    """With all 60 as negatives nothing is drawn, so that torch's generator does not matter."""
    losses = {}
    for negatives in (16384, 20):
        for seed in (1, 2):
            distiller = crd_distiller(crd_negatives=negatives)
            torch.manual_seed(seed)
            answers = Answers(torch.zeros(4, 3), noise(4, 64).float()), Answers(torch.zeros(4, 3), noise(4, 7).float())
            losses[negatives, seed] = distiller(*answers, torch.arange(4), torch.arange(4)).item()
    assert losses[16384, 1] == losses[16384, 2]
    assert losses[20, 1] != losses[20, 2]


def test_crd_remembers_in_train_mode_only() -> None:
    distiller = crd_distiller()
    answers = Answers(torch.zeros(4, 3), noise(4, 64).float()), Answers(torch.zeros(4, 3), noise(4, 7).float())
    before = {name: tensor.clone() for name, tensor in distiller.state_dict().items()}
    distiller.eval()(*answers, torch.arange(4), torch.arange(4))
    assert all(torch.equal(before[n], t) or before[n].isnan().all() for n, t in distiller.state_dict().items())
    distiller.train()(*answers, torch.arange(4), torch.arange(4))
    assert not torch.equal(before["student_bank_ND"], distiller.student_bank_ND)
    anchor = nn.functional.normalize(distiller.student_projection(answers[0].features_MF))
    first = log_normalizer(anchor, before["teacher_bank_ND"], torch.arange(60), 0.07)
    distiller(*answers, torch.arange(4), torch.arange(4))
    torch.testing.assert_close(distiller.student_log_normalizer, first)  # that of the first step is kept


# ---- FitNets


def test_fitnets_is_the_squared_difference_at_the_smaller_size() -> None:
    s, t = noise(2, 3, 4, 4), noise(2, 3, 2, 2, seed=1)
    total = 0.0
    for n in range(2):
        for c in range(3):
            for y in range(2):
                for x in range(2):
                    block = s[n, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
                    total += float(block - t[n, c, y, x]) ** 2
    assert float(fitnets(s, t)) == pytest.approx(total / 24, rel=1e-9)


@pytest.mark.parametrize(
    ("arch", "halvings", "name", "side"),
    [("wide-resnet-16-1", 2, "blocks.3", 8), ("resnet18", 3, "layer3", 4), ("mobilenet-v2", 5, "features.6", 2)],
)
def test_the_middle_layer_is_a_whole_block_half_way_down(arch, halvings, name, side) -> None:
    network = build(ModelSpec(arch, 3, 1, halvings=halvings)).eval()
    middle = middle_layer(network)
    assert middle.name == name
    images = torch.rand(2, 1, 16, 16)
    answers = ask(network, images, middle)
    assert answers.map_MCHW is not None
    assert answers.map_MCHW.shape == (2, middle.channels, side, side)
    assert torch.equal(answers.logits_MK, network(images))
    assert not any(module._forward_hooks for module in network.modules())


# ---- all of them, wired


@pytest.mark.parametrize("loss", ["kd", "dkd", "dist", "crd", "rkd", "fitnets"])
def test_the_student_gets_a_gradient_and_the_teacher_none(loss) -> None:
    views = "same" if loss == "fitnets" else "stored"
    pool, network, taught = toy_pool(), toy_network().train(), toy_network(5)
    live = LiveTeacher(taught, mean=pool.mean, std=pool.std, own_mean=pool.mean, own_std=pool.std, own_px=8)
    logits, features = noise(60, 3).float().requires_grad_(), noise(60, 7).float().requires_grad_()
    teacher = live if views == "same" else StoredTeacher(logits, features)
    distiller = Distiller(DistillConfig(loss=loss, views=views), network, teacher, 60)
    images, place = torch.rand(8, 1, 8, 8), torch.arange(8)
    answers = teacher.answers(images, place, distiller.teacher_middle)
    student = ask(network, images, distiller.student_middle)
    distiller(student, answers, torch.arange(8) % 3, place).backward()
    assert logits.grad is None
    assert features.grad is None
    assert all(p.grad is None for p in taught.parameters())
    first = next(network.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(not tensor.requires_grad for tensor in (answers.logits_MK, answers.map_MCHW) if tensor is not None)


@pytest.mark.parametrize("loss", ["kd", "dkd", "dist", "rkd"])
def test_a_student_that_answers_as_the_teacher_has_nothing_to_learn(loss) -> None:
    logits, features = noise(60, 3), noise(60, 64)
    teacher = StoredTeacher(logits, features)
    distiller = Distiller(DistillConfig(loss=loss), toy_network(), teacher, 60)
    same = Answers(logits.float() + 2.0, features.float())  # a constant on all logits changes nothing
    term = distiller(same, teacher.answers(torch.empty(0), torch.arange(60)), torch.arange(60) % 3, torch.arange(60))
    assert float(term) == pytest.approx(0, abs=1e-5)


def test_the_weight_warms_up_over_its_steps() -> None:
    teacher = StoredTeacher(noise(60, 3))
    answers = Answers(noise(4, 3, seed=1).float(), None), teacher.answers(torch.empty(0), torch.arange(4))

    def terms(**config: int) -> list[float]:
        distiller = Distiller(DistillConfig(loss="dkd", **config), toy_network(), teacher, 60).train()
        return [distiller(*answers, torch.zeros(4, dtype=torch.long), torch.arange(4)).item() for _ in range(6)]

    whole = terms()
    assert len(set(whole)) == 1
    assert terms(warmup_steps=4) == pytest.approx([whole[0] * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_large_batches_are_compared_in_parts() -> None:
    """130 images are two parts of 65."""
    s, t = noise(130, 64).float(), noise(130, 7, seed=1).float()
    distiller = Distiller(DistillConfig(loss="rkd"), toy_network(), StoredTeacher(torch.zeros(130, 3), t), 130)
    term = distiller(Answers(s[:, :3], s), Answers(s[:, :3], t), torch.zeros(130, dtype=torch.long), torch.arange(130))
    parts = [25 * rkd_distance(a, b) + 50 * rkd_angle(a, b) for a, b in ((s[:65], t[:65]), (s[65:], t[65:]))]
    assert float(term) == pytest.approx(float(sum(parts)) / 2, rel=1e-5)


def test_relations_are_computed_in_float32_under_bf16() -> None:
    s, t = noise(20, 64).float(), noise(20, 7, seed=1).float()
    distiller = Distiller(DistillConfig(loss="rkd"), toy_network(), StoredTeacher(torch.zeros(20, 3), t), 20)
    given = (Answers(s[:, :3], s), Answers(s[:, :3], t), torch.zeros(20, dtype=torch.long), torch.arange(20))
    with torch.autocast("cpu", torch.bfloat16):
        under = distiller(*given)
    assert torch.equal(under, distiller(*given))
    assert float(under) == pytest.approx(float(25 * rkd_distance(s, t) + 50 * rkd_angle(s, t)), rel=1e-6)
