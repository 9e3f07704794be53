"""What can be evaluated: runs, checkpoints, files of weights, models of timm and torchvision."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..augment import HorizontalFlip, Normalize, RandomResizedCrop, View, prepare
from ..extras import require
from ..models import build_backbone
from ..train.checkpoint import load_checkpoint
from ..train.weights import PUBLISHERS, fit, published, read_weights, split_role


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
        given = f"mean {self.mean}, std {self.std}"
        if self.mean is None:
            given = "ImageNet's mean and std for three channels, else 0.5"
        return f"{part}, {self.interpolation}, {given}"


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
        what: a run's folder; one of its checkpoints, or a file of weights (.safetensors, .pt,
            .pth, .bin); each may end in `:teacher` or `:student`; `timm:NAME` or
            `torchvision:NAME`; or a module.
        weights: "pretrained" (of timm and torchvision: the published ones, which are downloaded),
            or "random": the same network before training.
        image_size: S in pixels, where it is not to be the network's own.
        backbone: name of the network a file of weights belongs to, as `build_backbone` takes it;
            files that `fastssl pretrain` wrote know it themselves.

    Raises:
        FileNotFoundError: no such file, or not a run. ValueError: an unknown name, weights that do
            not fit, or a missing `backbone`. OSError: published weights that cannot be had.

    Example:
        >>> open_network(torch.nn.Flatten(), image_size=32).inputs.size
        32
    """
    if isinstance(what, nn.Module):
        return Network(what, Inputs(image_size) if image_size else None, {"weights": "as given"})
    if str(what).partition(":")[0] in PUBLISHERS:
        return _published(str(what), weights, image_size)
    path, role = split_role(str(what))
    path = Path(path).expanduser()
    if path.is_file() or (path / "state.pt").is_file():
        return _file(path, role, weights, image_size, backbone)
    return _run(path, role, weights, image_size)


def _run(run: Path, role: str | None, weights: str, image_size: int | None) -> Network:
    from ..train import load_backbone, random_backbone

    if weights == "random":
        backbone, info = random_backbone(run)
    else:
        backbone, info = load_backbone(run, role or "student")
    steps = json.loads((run / "summary.json").read_text())["steps"]
    about = {key: info[key] for key in ("method", "backbone")}
    about |= {"pretrained_on": info["source"], "weights": weights}
    about |= {"step": steps if weights == "pretrained" else 0}
    if role == "teacher" and weights == "pretrained":
        about["weights"] = "pretrained, teacher"
    inputs = Inputs(image_size or info["image_size"], channels=info["channels"])
    return Network(backbone, inputs, about, run, info["source"])


def _published(name: str, weights: str, image_size: int | None) -> Network:
    """A model of timm or torchvision with its own input size and normalisation, if it has them."""
    inputs = _own_inputs(name, image_size)
    backbone = _build(name, 3, inputs.size)
    about = {"backbone": name, "weights": "published" if weights == "pretrained" else "random"}
    if weights == "pretrained":
        _fill(backbone, published(name, name.partition(":")[0]), name, None)
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


def _file(
    path: Path, role: str | None, weights: str, image_size: int | None, backbone: str | None
) -> Network:
    """A backbone whose weights lie in a file or a checkpoint, under whatever names."""
    state, known = _read(path, role)
    name, size = backbone or known.get("backbone"), image_size or known.get("image_size")
    if name is None:
        raise ValueError(
            f"evaluate: {path} must say which network it is of, got none. Give backbone "
            "(--backbone), for instance timm:resnet50."
        )
    channels = known.get("channels")
    if channels is None:  # of the first convolution
        channels = next((w.shape[1] for w in state.values() if w.ndim == 4), 3)
    ours = known.get("backbone") == name  # trained on centre squares normalised our way
    if ours or name.partition(":")[0] not in PUBLISHERS:
        inputs = Inputs(int(size or 32), channels=int(channels))
    else:
        inputs = _own_inputs(name, image_size)
    network = _build(name, int(channels), inputs.size)
    about = {"backbone": name, "weights": weights, "file": str(path)}
    about |= {key: known[key] for key in ("method", "data", "step") if key in known}
    if weights == "pretrained":
        about |= _fill(network, state, str(path), role)
    return Network(network, inputs, about, data=known.get("data"))


def _read(path: Path, role: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what the file says about them."""
    if path.suffix == ".safetensors":
        with require("safetensors", "train").safe_open(path, "pt") as file:
            return read_weights(path, role), file.metadata() or {}
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:  # somebody else's
        return read_weights(path, role), {}
    known = {key: checkpoint["config"][key] for key in ("backbone", "image_size", "data")}
    known |= {key: checkpoint[key] for key in ("method", "step")}
    return checkpoint["model"], known


def _fill(
    network: nn.Module, state: dict[str, Tensor], where: str, role: str | None
) -> dict[str, Any]:
    """Load all of the network's weights; return what is to be said of it."""
    found = fit(network, state, where, role, caller="evaluate")
    missing = [name for name in found["missing"] if not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"evaluate: {where} must hold all weights of the network, got no {missing[0]!r} "
            f"({len(missing)} of {found['of']} are missing). Name the right backbone."
        )
    return {key: found[key] for key in ("before_names", "names", "resized") if found[key]}


def _build(name: str, channels: int, image_size: int) -> nn.Module:
    """With the same random weights every time, leaving torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(name, channels, image_size).eval()
