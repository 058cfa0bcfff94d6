"""The head that starting weights begin with."""

import numpy as np
import pytest
import torch

from kdedge import pipeline, recipe_io
from kdedge.models.weights import load_model
from kdedge.models.zoo import ModelSpec, build
from kdedge.train.engine import EnginePlan
from kdedge.train.evaluate import accuracy, features, predict
from kdedge.train.probe import fit_head

PLAN = EnginePlan()
MEAN, STD = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.25)


def pictures(classes: int, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright row whose height is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.randint(0, 80, (len(labels), 1, 12, 12), generator=generator)
    for k in range(classes):
        images[labels == k, :, 3 * k : 3 * k + 2] += 150
    return images.to(torch.uint8), labels


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec("wide-resnet-10-1", classes, 1, halvings=2))


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("each", [1, 6])
def test_the_head_knows_the_classes_and_the_backbone_is_as_it_was(classes, each) -> None:
    images, labels = pictures(classes, each)
    net = network(classes)
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    fresh = accuracy(
        predict(net, *pictures(classes, 20, seed=1)[:1], MEAN, STD, PLAN), pictures(classes, 20, seed=1)[1]
    )
    fit_head(net, images, labels, MEAN, STD, PLAN)
    found = accuracy(
        predict(net, *pictures(classes, 20, seed=1)[:1], MEAN, STD, PLAN), pictures(classes, 20, seed=1)[1]
    )
    assert found > max(fresh, 0.8 if each > 1 else 1 / classes)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.backbone.state_dict().items())


def test_its_probabilities_are_those_of_the_regression() -> None:
    """Folding the standardisation into the head changes no probability."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    images, labels = pictures(3, 1)  # one label a class: the strength is fixed
    net = network(3)
    seen = features(net, images, MEAN, STD, PLAN).double().numpy()
    fit_head(net, images, labels, MEAN, STD, PLAN)
    scaler = StandardScaler().fit(seen)
    expected = LogisticRegression(C=1e-2, max_iter=200).fit(scaler.transform(seen), labels.numpy())
    got = torch.softmax(predict(net, images, MEAN, STD, PLAN), 1).numpy()
    np.testing.assert_allclose(got, expected.predict_proba(scaler.transform(seen)), atol=1e-4)


def test_a_class_without_a_label_keeps_its_fresh_weights() -> None:
    images, labels = pictures(3, 4)
    net = network(4)
    before = net.head.weight[3].clone()
    fit_head(net, images, labels, MEAN, STD, PLAN)
    assert torch.equal(net.head.weight[3], before)
    one = network(3)
    kept = one.head.weight.clone()
    fit_head(one, images[labels == 1], labels[labels == 1], MEAN, STD, PLAN)
    assert torch.equal(one.head.weight, kept)


def test_it_is_where_a_fine_tuning_begins(tmp_path) -> None:
    short = ["teacher.optim.total_steps=30", "student.optim.total_steps=2", "baseline.enabled=false"]
    first, _ = pipeline.train(recipe_io.load("tiny", [*short, "trust.threshold=0.2"]), tmp_path / "first")
    init = f"student.init={first.teacher_path}"
    still = ["student.arch=wide-resnet-10-1", "student.width=1.0", "teacher=null", "student.optim.learning_rate=1e-30"]
    seen = {}
    for head in ("probe", "fresh"):
        settings = [*short[1:], *still, init, f"student.head={head}"]
        run, result = pipeline.train(recipe_io.load("tiny", settings), tmp_path / head)
        assert load_model(run.student_path).num_params > 0
        seen[head] = result["student"]["test_accuracy"]
    assert seen["probe"] > seen["fresh"] + 0.2
