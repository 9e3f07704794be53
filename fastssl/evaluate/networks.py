"""What can be evaluated: runs, checkpoints, files of weights, models of timm and torchvision."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..augment import HorizontalFlip, Normalize, RandomResizedCrop, View, prepare
from ..extras import require
from ..models import build_backbone


@dataclass(frozen=True)
class Inputs:
    """How images become a network's input."""

    size: int
    """Side of the input in pixels."""
    crop: float = 1.0
    """Side of the centre square as a share of the image's shorter side."""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """None for both: ImageNet's for three channels, else 0.5 and 0.5."""
    channels: int | None = None
    """What the network takes; grey images are repeated in three channels. None: what comes."""

    def __call__(self, images, specs=(), index: Tensor | None = None, seed: int = 0) -> Tensor:
        """(B, C, size, size) float32 of images as sources give them; without `specs`, which are
        those of `prepare`, without randomness."""
        return prepare(
            self.colour(images),
            self.size,
            crop=self.crop,
            interpolation=self.interpolation,
            specs=(*specs, self.normalize),
            index=index,
            seed=seed,
        )

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.mean, self.std)

    def colour(self, images):
        """Images (B, 1, H, W) in three channels, if that is what the network takes."""
        grey = isinstance(images, Tensor) and images.shape[1] == 1 and self.channels == 3
        return images.expand(-1, 3, -1, -1).contiguous() if grey else images

    def training_view(self, mirror: bool) -> View:
        """Crops of 8 to 100 % of the area and, where it means the same thing, the mirror image."""
        crop = RandomResizedCrop(self.size, interpolation=self.interpolation)
        flip = (HorizontalFlip(),) if mirror else ()
        return View(crop, *flip, self.normalize)

    def described(self) -> str:
        part = "centre square" if self.crop == 1 else f"centre square of {self.crop:g} of the side"
        given = "" if self.mean is None else f", mean {self.mean}, std {self.std}"
        return f"{part}, {self.interpolation}{given}"


@dataclass
class Network:
    """A backbone and what one must know to evaluate it."""

    backbone: nn.Module
    inputs: Inputs | None
    """None: the images' own size decides."""
    about: dict[str, Any] = field(default_factory=dict)
    """Part of every protocol."""
    run: Path | None = None
    """The folder that the results belong to."""
    data: str | None = None
    """What it was trained on."""


def open_network(
    what: str | os.PathLike | nn.Module,
    weights: str = "pretrained",
    image_size: int | None = None,
    backbone: str | None = None,
) -> Network:
    """Open what is to be evaluated, in eval mode on the CPU.

    Args:
        what: a run's folder; a file of weights (.safetensors, .pt, .pth, .bin), a run's checkpoint
            among them; `timm:NAME` or `torchvision:NAME`; or a module.
        weights: "pretrained" (of timm and torchvision: the published ones, which are downloaded),
            or "random": the same network before training.
        image_size: S in pixels, where it is not to be the network's own.
        backbone: name of the network a file of weights belongs to, as `build_backbone` takes it;
            files that `fastssl pretrain` wrote know it themselves.

    Raises:
        FileNotFoundError: no such file, or not a run. ValueError: an unknown name, weights that do
            not fit, or a missing `backbone`.
    """
    if isinstance(what, nn.Module):
        return Network(what, Inputs(image_size) if image_size else None, {"weights": "as given"})
    if str(what).partition(":")[0] in ("timm", "torchvision"):
        return _published(str(what), weights, image_size)
    path = Path(what)
    if path.is_file():
        return _file(path, weights, image_size, backbone)
    return _run(path, weights, image_size)


def _run(run: Path, weights: str, image_size: int | None) -> Network:
    from ..train import load_backbone, random_backbone

    backbone, info = (load_backbone if weights == "pretrained" else random_backbone)(run)
    steps = json.loads((run / "summary.json").read_text())["steps"]
    about = {key: info[key] for key in ("method", "backbone")}
    about |= {"pretrained_on": info["source"], "weights": weights}
    about |= {"step": steps if weights == "pretrained" else 0}
    inputs = Inputs(image_size or info["image_size"], channels=info["channels"])
    return Network(backbone, inputs, about, run, info["source"])


def _published(name: str, weights: str, image_size: int | None) -> Network:
    """A model of timm or torchvision with its own input size and normalisation, if it has them."""
    inputs = _own_inputs(name, image_size)
    backbone = _build(name, 3, inputs.size)
    if weights == "pretrained":
        library, _, model = name.partition(":")
        if library == "timm":
            size = {"img_size": inputs.size} if hasattr(backbone, "patch_embed") else {}
            timm = require("timm", "vision")
            published = timm.create_model(model, pretrained=True, num_classes=0, **size)
        else:
            models = require("torchvision.models", "vision")
            published = models.get_model(model, weights="DEFAULT")
        _fill(backbone, published.state_dict(), name)
    about = {"backbone": name, "weights": "published" if weights == "pretrained" else "random"}
    return Network(backbone, inputs, about)


def _own_inputs(name: str, image_size: int | None) -> Inputs:
    library, _, model = name.partition(":")
    if library == "timm":
        timm = require("timm", "vision")
        if not timm.is_model(model):  # build_backbone says what is known
            return Inputs(image_size or 224)
        config = timm.models.get_pretrained_cfg(model).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=config)
        kind = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        size, crop = config["input_size"][1], config["crop_pct"]
        mean, std = config["mean"], config["std"]
    else:
        models = require("torchvision.models", "vision")
        if model not in models.list_models(module=models):
            return Inputs(image_size or 224)
        own = models.get_model_weights(model).DEFAULT.transforms()
        kind = "bicubic" if own.interpolation.value == "bicubic" else "bilinear"
        size, crop = own.crop_size[0], own.crop_size[0] / own.resize_size[0]
        mean, std = own.mean, own.std
    return Inputs(image_size or size, min(1.0, crop), kind, tuple(mean), tuple(std), 3)


def _file(path: Path, weights: str, image_size: int | None, backbone: str | None) -> Network:
    """A backbone whose weights lie in one file, under whatever prefix."""
    state, known = _read(path)
    name, size = backbone or known.get("backbone"), image_size or known.get("image_size")
    if name is None:
        raise ValueError(
            f"evaluate: {path} must say which network it is of, got none. Give backbone "
            "(--backbone), for instance timm:resnet50."
        )
    if str(name).partition(":")[0] in ("timm", "torchvision"):
        inputs = _own_inputs(name, int(size) if size else None)
    else:
        inputs = Inputs(int(size or 32))
    channels = known.get("channels")
    if channels is None:  # of the first convolution
        channels = next((w.shape[1] for w in state.values() if w.ndim == 4), 3)
    inputs = dataclasses.replace(inputs, channels=int(channels))
    if known.get("backbone") == name:  # trained here, on centre squares normalised as ours
        inputs = Inputs(inputs.size, channels=int(channels))
    network = _build(name, int(channels), inputs.size)
    about = {"backbone": name, "weights": weights, "file": str(path)}
    about |= {key: known[key] for key in ("method", "data", "step") if key in known}
    if weights == "pretrained":
        about["keys"] = _fill(network, state, str(path))
    return Network(network, inputs, about, data=known.get("data"))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what the file says about them."""
    if path.suffix == ".safetensors":
        with require("safetensors", "train").safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many types
        raise ValueError(
            f"evaluate: {path} must be a file of weights, got {type(error).__name__}: "
            f"{str(error).splitlines()[0]}. Save a state_dict of tensors."
        ) from error
    known = {}
    if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping):
        config = content["config"]
        known = {key: config[key] for key in ("backbone", "image_size", "method", "data")}
        known["step"] = content.get("step")
    tensors = dict(_tensors(content, ""))
    if not tensors:
        raise ValueError(f"evaluate: {path} must hold tensors, got none. Save a state_dict.")
    return tensors, known


def _tensors(content: Any, prefix: str):
    """Tensors of nested dictionaries with their path as the name, without optimizers' states."""
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if key not in ("optimizer", "optimizer_state_dict"):
                yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _fill(network: nn.Module, state: dict[str, Tensor], where: str) -> str:
    """Load `state` into the network, whatever stands before its names; return what that was."""
    own = network.state_dict()
    wanted = [key for key in own if not key.endswith("num_batches_tracked")]
    anchor = max(wanted, key=len)
    prefixes = {key[: -len(anchor)]: 0 for key in state if key.endswith(anchor)} or {"": 0}
    for prefix in prefixes:
        prefixes[prefix] = sum(prefix + key in state for key in wanted)
    prefix = max(prefixes, key=prefixes.get)
    missing = [key for key in wanted if prefix + key not in state]
    if missing:
        raise ValueError(
            f"evaluate: {where} must hold the weights of the network, got no {missing[0]!r} "
            f"({len(missing)} of {len(wanted)} are missing). Name the right backbone."
        )
    for key in own:
        found = state.get(prefix + key, own[key])
        if found.shape != own[key].shape:
            raise ValueError(
                f"evaluate: {where} must fit the network, got {tuple(found.shape)} for {key!r} of "
                f"{tuple(own[key].shape)}. Give the image_size and backbone it was trained with."
            )
        own[key] = found
    network.load_state_dict(own)
    return prefix


def _build(name: str, channels: int, image_size: int) -> nn.Module:
    """With the same random weights every time, leaving torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(name, channels, image_size).eval()
