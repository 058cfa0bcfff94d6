"""Networks on disk and starting weights; nothing read is executed."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torchvision import models

from kdedge.errors import DataError, RunError
from kdedge.models.weights import load_model, read_starting_weights, save_model, start_from
from kdedge.models.zoo import ModelSpec, architecture, build
from kdedge_device.preprocess import Preprocess

SPEC = ModelSpec("mobilenet-v2", classes=3, channels=3, width=1.0)
PREPROCESS = Preprocess(32, 32, 3, "short-side-crop", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def test_a_network_comes_back_with_all_that_is_needed_to_use_it(tmp_path) -> None:
    network = build(ModelSpec("wide-resnet-10-1", 3, 3, halvings=2)).eval()
    path = tmp_path / "student.safetensors"
    save_model(path, network, ModelSpec("wide-resnet-10-1", 3, 3, halvings=2), ("a", "b", "ç"), PREPROCESS)
    loaded = load_model(path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.module(x), network(x))
    assert (loaded.classes, loaded.preprocess) == (("a", "b", "ç"), PREPROCESS)


def test_damage_is_told(tmp_path) -> None:
    path = tmp_path / "student.safetensors"
    save_model(
        path, build(ModelSpec("wide-resnet-10-1", 3)), ModelSpec("wide-resnet-10-1", 3), ("a", "b", "c"), PREPROCESS
    )
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"not a model at all"):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"student\.safetensors"):
            load_model(path)


@pytest.mark.parametrize("suffix", ["npz", "pt", "pth", "safetensors"])
def test_torchvision_weights_in_any_container_start_the_backbone(tmp_path, suffix) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    original = models.mobilenet_v2(num_classes=11)
    state, path = original.state_dict(), tmp_path / f"weights.{suffix}"
    if suffix == "npz":
        np.savez(path, **{n: t.numpy() for n, t in state.items()})
    elif suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    weights = read_starting_weights(str(path), "mobilenet-v2")
    assert (weights.px, weights.mean) == (224, (0.485, 0.456, 0.406))
    network = build(SPEC)
    head = network.head.weight.clone()
    start_from(network, weights)
    assert torch.equal(network.head.weight, head)  # three classes, not eleven
    x = torch.rand(2, 3, 64, 64)
    original.classifier = torch.nn.Identity()
    torch.testing.assert_close(network.eval().embed(x), original.eval()(x))


@pytest.mark.parametrize(("arch", "builder", "width"), [
    ("shufflenet-v2", "shufflenet_v2_x0_5", 0.5),
    ("mnasnet", "mnasnet0_75", 0.75),
    ("squeezenet", "squeezenet1_1", 1.0),
    ("regnet-x-400mf", "regnet_x_400mf", 1.0),
    ("regnet-y-400mf", "regnet_y_400mf", 1.0),
    ("efficientnet-b0", "efficientnet_b0", 1.0),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_the_weights_of_each_family_start_it(tmp_path, arch, builder, width, suffix) -> None:
    """By value on the features, which torchvision's head reads: its input is caught on the way."""
    torch.manual_seed(0)
    original = models.get_model(builder, num_classes=11).eval()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "npz":
        np.savez(path, **{n: t.numpy() for n, t in original.state_dict().items()})
    else:
        torch.save(original.state_dict(), path)
    network = build(ModelSpec(arch, 3, width=width, halvings=architecture(arch).halvings)).eval()
    start_from(network, read_starting_weights(str(path), arch))
    seen = []
    kind = torch.nn.Conv2d if arch == "squeezenet" else torch.nn.Linear
    head = [m for m in original.modules() if isinstance(m, kind)][-1]
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        original(x)
        features = seen[0].mean((2, 3)) if arch == "squeezenet" else seen[0]
        torch.testing.assert_close(network.embed(x), features)


def test_a_name_of_weights_brings_its_width(tmp_path, monkeypatch) -> None:
    """Published weights as if they had been downloaded before: nothing is fetched."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.shufflenet_v2_x0_5().state_dict(), tmp_path / "checkpoints" / published.url.rsplit("/", 1)[-1])
    weights = read_starting_weights("shufflenet_v2_x0_5", "shufflenet-v2")
    assert (weights.width, weights.px) == (0.5, 224)
    start_from(build(ModelSpec("shufflenet-v2", 3, width=0.5)), weights)
    with pytest.raises(DataError, match="timm/efficientnet_lite0"):
        read_starting_weights("pretrained", "efficientnet-lite0")


def test_our_own_file_brings_its_input_along(tmp_path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_model(path, build(SPEC), SPEC, ("a", "b", "c"), PREPROCESS)
    weights = read_starting_weights(str(path), "mobilenet-v2")
    assert (weights.px, weights.mean, weights.std) == (32, PREPROCESS.mean, PREPROCESS.std)
    start_from(build(SPEC), weights)


def test_weights_of_another_network_are_refused_with_an_example(tmp_path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(models.mobilenet_v2(num_classes=2).state_dict(), path)
    weights = read_starting_weights(str(path), "mobilenet-v2")
    with pytest.raises(DataError, match="another shape"):
        start_from(build(ModelSpec("mobilenet-v2", 3, width=0.5)), weights)
    with pytest.raises(DataError, match="tensors are missing"):
        start_from(build(ModelSpec("resnet18", 3)), weights)


class Evil:
    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_pickled_code_is_refused_and_not_run(tmp_path, suffix) -> None:
    trace, path = tmp_path / "was-here", tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        path.write_bytes(pickle.dumps({"a": Evil(str(trace))}))
    else:
        np.savez(path, a=np.array([Evil(str(trace))], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        read_starting_weights(str(path), "mobilenet-v2")
    assert not trace.exists()


def test_missing_weights_name_the_wanted_path(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz do not exist"):
        read_starting_weights(str(tmp_path / "nothing.npz"), "mobilenet-v2")
    with pytest.raises(DataError, match="IMAGENET1K_V1"):
        read_starting_weights("imagenet", "mobilenet-v2")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(DataError, match=str(tmp_path / "checkpoints" / "mobilenet_v2")):
        read_starting_weights("pretrained", "mobilenet-v2")


def test_a_newer_schema_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "student.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"kdedge": json.dumps({"schema": 99})})
    with pytest.raises(RunError, match="schema 99"):
        load_model(path)
