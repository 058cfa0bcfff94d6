"""Networks on disk: our own files, and starting weights made elsewhere.

Nothing read here is executed: safetensors, `weights_only` .pt and .npz without pickle.
"""

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdedge.errors import DataError, MissingPackage, RunError
from kdedge.models.zoo import ModelSpec, Network, architecture, build, num_params
from kdedge.runs import sha256_bytes, write_bytes
from kdedge_device.preprocess import Preprocess

__all__ = [
    "LoadedModel",
    "StartingWeights",
    "load_model",
    "read_starting_weights",
    "save_model",
    "save_pretrained",
    "start_from",
]

SCHEMA = 1
_PRETRAINED = "simclr"
_BACKBONE, _NECK, _PROJECTION = "backbone.", "neck.", "projection."
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode with everything needed to use it. `module` takes normalised float [N, C, H, W]."""

    module: Network
    spec: ModelSpec
    classes: tuple[str, ...]
    preprocess: Preprocess

    @property
    def arch(self) -> str:
        return self.spec.arch

    @property
    def num_params(self) -> int:
        return num_params(self.module)


def save_model(path: Path, network: Network, spec: ModelSpec, classes: tuple[str, ...], preprocess: Preprocess) -> str:
    """Write weights, atomically, with the spec, classes and preprocessing in the header. Returns the file's sha256."""
    header = {"spec": _spec_json(spec), "classes": list(classes), "preprocess": preprocess.to_json()}
    return _save(path, network.state_dict(), header)


def save_pretrained(
    path: Path, backbone: nn.Module, projection: nn.Module, spec: ModelSpec, preprocess: Preprocess
) -> str:
    """Write what contrastive pre-training leaves, atomically: a backbone and its projection head, of no classes.

    `read_starting_weights` reads it. Returns the file's sha256.
    """
    header = {"kind": _PRETRAINED, "spec": _spec_json(spec), "classes": [], "preprocess": preprocess.to_json()}
    tensors = {f"{_BACKBONE}{name}": tensor for name, tensor in backbone.state_dict().items()}
    tensors |= {f"{_PROJECTION}{name}": tensor for name, tensor in projection.state_dict().items()}
    return _save(path, tensors, header)


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes = save(plain, metadata={"kdedge": json.dumps({"schema": SCHEMA, **header})})
    write_bytes(path, content)
    return sha256_bytes(content)


def _spec_json(spec: ModelSpec) -> dict[str, Any]:
    """Without a neck of no layers: files that have none are read by earlier versions too."""
    return {name: value for name, value in asdict(spec).items() if name != "neck" or value}


def load_model(path: Path) -> LoadedModel:
    """Read a file of `save_model`; RunError where it is missing, damaged, of another maker or of a newer kdedge."""
    tensors, metadata = _read_safetensors(path)
    try:
        header = json.loads(metadata["kdedge"])
        if header["schema"] > SCHEMA:
            raise RunError(f"{path} has schema {header['schema']}; this kdedge reads up to {SCHEMA}. Update kdedge.")
        if "kind" in header:
            raise RunError(
                f"{path} holds a pre-trained backbone ({header['kind']}), which knows no classes yet. A "
                "teacher.safetensors or student.safetensors was expected; start one from it with teacher.init or "
                "student.init."
            )
        spec = ModelSpec(**header["spec"])
        preprocess = Preprocess.from_json(header["preprocess"])
        network = build(spec)
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is not a network written by kdedge, or was altered: {error}.") from error
    return LoadedModel(network.eval(), spec, tuple(header["classes"]), preprocess)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as safetensors: {error}. It may be cut off; copy it again.") from error


# ---- starting weights


@dataclass(frozen=True)
class StartingWeights:
    """Tensors under a family's own keys, and the input they were trained with.

    kdedge's own are under `backbone.`, and under `neck.` or `projection.` what fine-tuning may keep before the head.
    """

    name: str
    tensors: dict[str, Tensor]
    px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: float | None = None  # known for kdedge's own files and torchvision's
    halvings: int | None = None
    arch: str | None = None  # known for kdedge's own files
    contrastive: bool = False  # of a stage "pretrain": features that were never told a class


def read_starting_weights(init: str, arch: str) -> StartingWeights:
    """`init` is a file (.safetensors, .pt, .pth, .npz), "pretrained", or a torchvision weights name.

    Input size and normalisation come with torchvision's and timm's weights and with kdedge's own files; other files
    are taken to be trained as the family was published: ImageNet mean and std at its standard size. DataError says
    which path was wanted where there is no such file or no network.
    """
    path = Path(init).expanduser()
    if path.suffix in {".safetensors", ".pt", ".pth", ".npz"}:
        return _from_file(path, arch)
    if arch.startswith("timm/"):
        return _from_timm(init, arch)
    return _from_torchvision(init, arch)


def _from_file(path: Path, arch: str) -> StartingWeights:
    if not path.is_file():
        raise DataError(
            f"The starting weights {path} do not exist; a .safetensors, .pt, .pth or .npz file was expected there "
            f"({path.absolute()})."
        )
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        if "kdedge" in metadata:
            return _from_our_own(path, tensors, json.loads(metadata["kdedge"]))
    elif path.suffix == ".npz":
        tensors = _read_npz(path)
    else:
        tensors = _read_pt(path)
    return StartingWeights(path.name, tensors, architecture(arch).standard_px, IMAGENET_MEAN, IMAGENET_STD)


def _from_our_own(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> StartingWeights:
    try:
        spec, seen = ModelSpec(**header["spec"]), Preprocess.from_json(header["preprocess"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} was written by kdedge, but is no network (its header lacks or misspells {error}). "
            "A teacher.safetensors, student.safetensors or pretrained.safetensors was expected."
        ) from None
    return StartingWeights(
        path.name,
        tensors,
        min(seen.height, seen.width),
        seen.mean,
        seen.std,
        spec.width,
        spec.halvings,
        spec.arch,
        contrastive=header.get("kind") == _PRETRAINED,
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz without executing anything: {error}.") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an unusual pickle protocol; what matters is told below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read with weights_only, which executes nothing: {first} "
            "Save the state_dict alone, or convert it to .safetensors."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):  # what trainers wrap it in
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise DataError(f"{path} holds {type(content).__name__}, not a state_dict of tensors.")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _from_torchvision(init: str, arch: str) -> StartingWeights:
    from torchvision import models

    known = architecture(arch)
    if not known.builders:
        elsewhere = "Set arch to timm/efficientnet_lite0, or give" if arch == "efficientnet-lite0" else "Give"
        raise DataError(
            f"torchvision has no weights for '{arch}'. {elsewhere} a file of kdedge's own, .safetensors, .pt or .npz."
        )
    width = next((w for w, builder in known.builders.items() if init == builder), 1.0)
    enum = models.get_model_weights(known.builders[width])
    names = [weights.name for weights in enum]
    if init not in {"pretrained", known.builders[width], *names}:
        raise DataError(
            f"init is '{init}', which is no file and no weights of {arch}. Expected a file, 'pretrained', or one of "
            f"{', '.join([*known.builders.values(), *names])}."
        )
    weights = enum[init] if init in names else enum.DEFAULT
    transforms = weights.transforms()
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # torchvision's file names end in the first digits of their sha256
            torch.hub.download_url_to_file(
                weights.url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False
            )
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            raise DataError(
                f"The weights {weights.name} of {arch} are not on this machine and cannot be downloaded ({error}). "
                f"Put the file {path.name} at {path}, or set init to a file you have."
            ) from None
    return StartingWeights(
        str(weights), _read_pt(path), int(transforms.crop_size[0]), tuple(transforms.mean), tuple(transforms.std), width
    )


def _from_timm(init: str, arch: str) -> StartingWeights:
    try:
        import timm
    except ImportError:
        raise MissingPackage("timm", f"the architecture {arch}", "pip install 'kdedge[timm]'") from None
    if init != "pretrained":
        raise DataError(f"init is '{init}'; with {arch} a file or 'pretrained' was expected.")
    try:
        model = timm.create_model(arch.removeprefix("timm/"), pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"The weights of {arch} are not on this machine and cannot be downloaded ({type(error).__name__}). "
            "Copy Hugging Face's cache (HF_HOME, ~/.cache/huggingface unless set) from a machine that has them, or set "
            "init to a .safetensors or .pt file you have."
        ) from None
    config = model.pretrained_cfg
    return StartingWeights(
        arch, model.state_dict(), int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"])
    )


def start_from(network: Network, weights: StartingWeights) -> None:
    """Copy the backbone's weights into `network`, and the neck's where it has one; its head keeps its fresh values.

    DataError where a tensor of the backbone is missing or has another shape (another family or width), and where the
    network has a neck and the weights have no projection head.
    """
    _copy(network.backbone, _below(weights.tensors, _BACKBONE, otherwise=True), weights)
    if network.neck is None:
        return
    layers = _below(weights.tensors, _PROJECTION) | _below(weights.tensors, _NECK)
    if not layers:
        raise DataError(
            f"The starting weights {weights.name} have no projection head to keep layers of. Set projection_layers to "
            "0, or start from the pretrained.safetensors of a run with pretrain."
        )
    _copy(network.neck, layers, weights)


def _below(tensors: Mapping[str, Tensor], prefix: str, *, otherwise: bool = False) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it; with `otherwise` those under none too, as other makers have them."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if otherwise or name.startswith(prefix)}


def _copy(part: nn.Module, theirs: Mapping[str, Tensor], weights: StartingWeights) -> None:
    mine = part.state_dict()
    missing = [name for name in mine if name not in theirs and not name.endswith("num_batches_tracked")]
    differing = [name for name in mine if name in theirs and mine[name].shape != theirs[name].shape]
    if missing or differing:
        example = (
            f"{differing[0]} is {tuple(theirs[differing[0]].shape)}, {tuple(mine[differing[0]].shape)} was expected"
            if differing
            else f"{missing[0]} is missing"
        )
        made_for = "they were made for" if weights.arch is None else f"they are of: {weights.arch}"
        made_for += "" if weights.arch is None or weights.width is None else f", width {weights.width:g}"
        raise DataError(
            f"The starting weights {weights.name} do not fit the network: {len(missing)} tensors are missing and "
            f"{len(differing)} have another shape ({example}). Choose the architecture and width {made_for}."
        )
    part.load_state_dict({n: theirs[n].to(mine[n].dtype) for n in mine if n in theirs}, strict=False)
