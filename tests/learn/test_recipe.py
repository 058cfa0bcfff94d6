"""A recipe fitted to its images."""

import dataclasses

import pytest

from kdedge import recipe_io
from kdedge.errors import RecipeError
from kdedge.models.weights import StartingWeights
from kdedge.models.zoo import ModelSpec, build
from kdedge.recipe import DataDescription, Recipe, resolve
from kdedge.recipe_pretrain import PretrainConfig

DIGITS = DataDescription("digits", 1, 8, False, 10, 40, 1257)
MNIST = DataDescription("small", 1, 28, False, 10, 100, 60_000)
CIFAR = DataDescription("small", 3, 32, True, 10, 250, 50_000)
PHOTOS = DataDescription("photo", 3, 300, True, 5, 100, 2934)
FLOWERS = DataDescription("photo", 3, 160, True, 5, 100, 2934)
WEIGHTS = StartingWeights("w", {}, 224, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
PRETRAINED = dataclasses.replace(PHOTOS, student_weights=WEIGHTS)


def recipe(*settings: str) -> Recipe:
    return recipe_io.load("mobilenet", settings)


@pytest.mark.parametrize(
    ("data", "px", "student_halvings", "teacher", "teacher_halvings", "flip"),
    [
        (DIGITS, 8, 2, "wide-resnet-28-2", 2, False),
        (MNIST, 28, 3, "wide-resnet-28-2", 2, False),
        (CIFAR, 32, 3, "wide-resnet-28-2", 2, True),
        (PHOTOS, 224, 5, "resnet18", 5, True),
        (FLOWERS, 160, 5, "resnet18", 5, True),
    ],
    ids=["digits", "mnist", "cifar", "photos", "flowers"],
)
def test_sizes_and_views_follow_the_images(data, px, student_halvings, teacher, teacher_halvings, flip) -> None:
    resolved = resolve(recipe(), data)
    assert (resolved.data.image_px, resolved.data.channels) == (px, data.channels)
    assert (resolved.student.halvings, resolved.teacher.halvings) == (student_halvings, teacher_halvings)
    assert (resolved.teacher.arch, resolved.views.flip) == (teacher, flip)
    assert px / 2**student_halvings >= 2
    for part in (resolved.teacher.optim, resolved.student.optim, resolved.baseline.optim):
        assert part.total_steps
        assert part.total_epochs is part.total_images is None
        assert None not in (part.labeled_batch, part.learning_rate, part.momentum, part.weight_decay, part.ema_decay)
    build(ModelSpec(resolved.student.arch, 10, data.channels, resolved.student.width, student_halvings))


def test_every_open_value_is_filled_and_the_result_loads_again(tmp_path) -> None:
    resolved = resolve(recipe(), PRETRAINED)
    assert None not in resolved.views.model_dump().values()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_io.dump(resolved))
    again = recipe_io.load(str(path))
    assert again == resolved
    assert resolve(again, PRETRAINED) == resolved


def test_what_the_recipe_says_is_never_changed() -> None:
    said = recipe(
        "data.image_px=64", "student.width=0.75", "student.halvings=3", "teacher.arch=resnet34", "views.flip=false",
        "student.optim.total_steps=7", "teacher.optim.learning_rate=0.1",
    )  # fmt: skip
    resolved = resolve(said, CIFAR)
    assert (resolved.data.image_px, resolved.student.width, resolved.student.halvings) == (64, 0.75, 3)
    assert (resolved.teacher.arch, resolved.views.flip) == ("resnet34", False)
    assert resolved.student.optim.total_steps == 7
    assert resolved.teacher.optim.learning_rate == 0.1
    assert resolved.student.optim.learning_rate == 0.03


def test_the_papers_setting_is_the_papers_table() -> None:
    optim = resolve(recipe("teacher.settings=fixmatch.paper"), CIFAR).teacher.optim
    assert optim.model_dump() == {
        "total_steps": 2**20,
        "total_epochs": None,
        "total_images": None,
        "labeled_batch": 64,
        "unlabeled_ratio": 7,
        "optimizer": "sgd",
        "schedule": "fixmatch",
        "learning_rate": 0.03,
        "warmup_steps": 0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "ema_decay": 0.999,
        "batch_norm_momentum": 0.001,
    }
    method = recipe().teacher.method
    assert (method.thresholds.threshold, method.unlabeled_weight) == (0.95, 1.0)


def test_starting_weights_bring_size_strides_and_normalisation() -> None:
    resolved = resolve(recipe(), PRETRAINED)
    assert (resolved.data.image_px, resolved.student.halvings) == (224, 5)
    assert (resolved.data.mean, resolved.data.std) == ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    grey = DataDescription("small", 1, 64, False, 3, 30, 300, student_weights=WEIGHTS)
    assert resolve(recipe("data.image_px=96"), grey).data.channels == 3
    ours = dataclasses.replace(WEIGHTS, px=8, mean=(0.3,), std=(0.2,), width=0.25, halvings=2)
    own = resolve(recipe(), dataclasses.replace(DIGITS, student_weights=ours))
    assert (own.student.width, own.student.halvings, own.data.channels, own.data.mean) == (0.25, 2, 1, (0.3,))


def test_only_the_network_that_starts_from_weights_is_fine_tuned() -> None:
    scratch, student = resolve(recipe(), PHOTOS), resolve(recipe(), PRETRAINED)
    teacher = resolve(recipe(), dataclasses.replace(PHOTOS, teacher_weights=WEIGHTS))
    assert student.teacher.optim == scratch.teacher.optim
    assert teacher.student.optim == scratch.student.optim
    for tuned, part in ((student.student, scratch.student), (teacher.teacher, scratch.teacher)):
        assert (tuned.optim.learning_rate, tuned.optim.batch_norm_momentum) == (0.0001, 0.0)
        assert tuned.optim.total_steps < part.optim.total_steps
    assert student.baseline.optim.learning_rate == 0.0001  # the same network, the same start


def test_a_family_without_widths_needs_none() -> None:
    assert resolve(recipe("student.arch=resnet18"), DIGITS).student.width == 1.0


def test_durations_in_other_units_become_steps() -> None:
    resolved = resolve(recipe("teacher.optim.total_epochs=2", "student.optim.total_images=640"), DIGITS)
    assert resolved.teacher.optim.total_steps == 27  # 2 x 1257 images in batches of 96
    assert resolved.student.optim.total_steps == 20


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("teacher.optim={total_epochs: 2, total_steps: 3}", "total_steps and total_epochs are both set"),
        ("student.arch=mobilnet-v2", "Did you mean 'mobilenet-v2'"),
        ("engine.device=gpu", "engine.device"),
        ("data.std=[0.0]", "data.std"),
        ("name=../../x", "name"),
        ("views.shift_fraction=0.9", "views.shift_fraction"),
    ],
)
def test_what_can_be_known_wrong_is_told_when_the_recipe_is_read(setting, said) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(setting)


def test_strides_that_leave_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="3 halvings of 8 px leave a map below 2 x 2"):
        resolve(recipe("student.halvings=3"), DIGITS)
    with pytest.raises(RecipeError, match="at most 3 times"):
        resolve(recipe("teacher.halvings=4"), CIFAR)


def test_a_network_without_batch_norm_has_a_lower_rate_everywhere() -> None:
    resolved = resolve(recipe("student.arch=squeezenet", "teacher.arch=squeezenet", "data.image_px=32"), PHOTOS)
    assert {part.optim.learning_rate for part in (resolved.teacher, resolved.student, resolved.baseline)} == {0.01}
    tuned = resolve(recipe("student.arch=squeezenet", "data.image_px=32"), PRETRAINED)
    assert tuned.student.optim.learning_rate == tuned.baseline.optim.learning_rate == 0.0001


def test_a_student_that_starts_from_its_teacher_is_tuned_whoever_trained_that() -> None:
    here = resolve(recipe("student.init=teacher"), DIGITS)
    ready = resolve(
        recipe("student.init=teacher", "teacher.ready=t.safetensors"), dataclasses.replace(DIGITS, ready=WEIGHTS)
    )
    assert here.student.optim == ready.student.optim
    assert (here.student.optim.learning_rate, here.student.optim.batch_norm_momentum) == (0.0001, 0.0)
    assert here.baseline.optim.learning_rate == here.teacher.optim.learning_rate == 0.03


def pretraining(data: DataDescription, *settings: str) -> PretrainConfig:
    pretrain = resolve(recipe("pretrain.of=teacher", "teacher.init=simclr", *settings), data).pretrain
    assert pretrain is not None
    return pretrain


def test_published_pre_training_is_googles_command() -> None:
    """google-research/simclr, README.md and run.py: rates are for 256 images, the warm-up is 10 epochs."""
    small = pretraining(CIFAR, "pretrain.settings=simclr.small")
    assert (small.batch, small.method.temperature, small.method.projection_layers) == (512, 0.5, 3)
    assert (small.optim.total_steps, small.optim.warmup_steps, small.optim.learning_rate) == (97_657, 977, 2.0)
    assert (small.optim.optimizer, small.optim.schedule, small.optim.weight_decay) == ("lars", "cosine", 1e-4)
    assert (small.views.smallest_area, small.views.jitter_strength, small.views.blur_probability) == (0.08, 0.5, 0.0)
    imagenet = DataDescription("photo", 3, 400, True, 1000, 12_811, 1_281_167)
    large = pretraining(imagenet, "pretrain.settings=simclr.imagenet")
    assert (large.batch, large.method.temperature, large.optim.total_steps) == (4096, 0.1, 31_279)
    assert large.optim.learning_rate == pytest.approx(4.8)
    assert (large.views.jitter_strength, large.views.blur_probability, large.views.flip) == (1.0, 0.5, True)


def test_short_pre_training_follows_the_images_and_says_everything() -> None:
    for data in (DIGITS, MNIST, CIFAR, PHOTOS):
        found = pretraining(data)
        assert None not in found.views.model_dump().values()
        unresolved = {name for name, value in found.optim.model_dump().items() if value is None}
        assert unresolved == {"total_epochs", "total_images", "labeled_batch", "unlabeled_ratio"}
        assert found.views.flip is data.flip_allowed
        assert found.optim.learning_rate == pytest.approx(2.0 * found.batch / 256)
    assert pretraining(dataclasses.replace(DIGITS, unlabeled_images=100)).batch == 100
    assert pretraining(CIFAR, "pretrain.optim.total_epochs=2", "pretrain.batch=100").optim.total_steps == 1000


def test_what_starts_from_simclr_trains_as_from_scratch_but_fewer_steps_on_labels_alone() -> None:
    scratch = resolve(recipe(), DIGITS).teacher.optim
    contrastive = dataclasses.replace(
        WEIGHTS, contrastive=True, arch="resnet34", halvings=2, px=8, mean=(0.3,), std=(0.2,)
    )
    file = resolve(recipe(), dataclasses.replace(DIGITS, teacher_weights=contrastive)).teacher
    own = resolve(recipe("pretrain.of=teacher", "teacher.init=simclr"), DIGITS).teacher
    assert scratch == own.optim == file.optim
    assert own.head == file.head == "fresh"
    assert resolve(recipe("pretrain.of=teacher", "teacher={init: simclr, head: probe}"), DIGITS).teacher.head == "probe"
    assert resolve(recipe(), PRETRAINED).student.head == "probe"
    assert (own.arch, file.arch) == ("wide-resnet-28-2", "resnet34")
    tuned = resolve(recipe("pretrain.of=teacher", "teacher={init: simclr, method: {kind: fine-tune}}"), DIGITS)
    assert (tuned.teacher.optim.total_steps, tuned.teacher.optim.learning_rate) == (400, 0.03)
    epochs = "teacher={init: simclr, method: {kind: fine-tune}, optim: {total_epochs: 60}}"
    # of 40 labels, in batches of 32
    assert resolve(recipe("pretrain.of=teacher", epochs), DIGITS).teacher.optim.total_steps == 75
