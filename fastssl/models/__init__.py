"""Backbones and heads."""

import torch
from torch import nn

from ..extras import nearest, require
from .classifier import Classifier, load_classifier
from .heads import mlp
from .resnet import ResNet18CIFAR, ResNetSmall
from .text import TextTower, build_text_tower
from .tokens import grid_side, patch_size, patch_tokens
from .vit import ViTSmall

__all__ = [
    "Classifier",
    "ResNet18CIFAR",
    "ResNetSmall",
    "TextTower",
    "ViTSmall",
    "build_backbone",
    "build_text_tower",
    "grid_side",
    "load_classifier",
    "mlp",
    "patch_size",
    "patch_tokens",
]

_BUILTIN = {"resnet_small": ResNetSmall, "resnet18_cifar": ResNet18CIFAR, "vit_small": ViTSmall}


def build_backbone(name: str, in_chans: int, image_size: int) -> nn.Module:
    """Build a backbone with random weights from torch's generator.

    Args:
        name: `resnet_small`, `resnet18_cifar`, `vit_small`, `timm:NAME` or `torchvision:NAME`.
        in_chans: channels of the images.
        image_size: side of the images in pixels.

    Returns:
        A module from (B, in_chans, image_size, image_size) to (B, feature_dim), with the attribute
        `feature_dim`. timm and torchvision models keep their own parameter names.

    Raises:
        ValueError: unknown name, or a size or channel count the network cannot take.
        ImportError: timm or torchvision is missing or broken.
    """
    library, _, model = name.rpartition(":")
    if library == "timm":
        return _timm(model, in_chans, image_size)
    if library == "torchvision":
        return _torchvision(model, in_chans, image_size)
    if name not in _BUILTIN:
        raise ValueError(
            f"build_backbone: unknown backbone {name!r}. "
            f"{nearest(name, [*_BUILTIN, 'timm:NAME', 'torchvision:NAME'])}"
        )
    return _BUILTIN[name](in_chans=in_chans, image_size=image_size)


def _timm(name: str, in_chans: int, image_size: int) -> nn.Module:
    timm = require("timm", "vision")
    if not timm.is_model(name):
        raise ValueError(
            f"build_backbone: timm has no model {name!r}. {nearest(name, timm.list_models())}"
        )
    kwargs = {"pretrained": False, "num_classes": 0, "in_chans": in_chans}
    # Only transformers take the image size, and most of them views of other sizes too;
    # convolutional networks work at any.
    for size in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
        try:
            model = timm.create_model(name, **size, **kwargs)
            break
        except TypeError:
            if not size:
                raise
    model.feature_dim = _feature_dim(model, in_chans, image_size, f"timm:{name}")
    return model


def _torchvision(name: str, in_chans: int, image_size: int) -> nn.Module:
    models = require("torchvision.models", "vision")
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"build_backbone: torchvision has no classification model {name!r}. "
            f"{nearest(name, known)}"
        )
    if in_chans != 3:
        raise ValueError(
            f"build_backbone: torchvision:{name} takes 3 channels, the images have {in_chans}. "
            "Use a built-in or a timm: backbone."
        )
    # Only transformers take the image size.
    size = {"image_size": image_size} if name.startswith("vit_") else {}
    model = models.get_model(name, weights=None, **size)
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    model.feature_dim = _feature_dim(model, in_chans, image_size, f"torchvision:{name}")
    return model


def _feature_dim(model: nn.Module, in_chans: int, image_size: int, name: str) -> int:
    """Width of the features, from one image of zeros."""
    model.eval()
    try:
        with torch.no_grad():
            features = model(torch.zeros(1, in_chans, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"build_backbone: {name} cannot take {in_chans} x {image_size} x {image_size} images: "
            f"{error}. Choose another image_size or backbone."
        ) from error
    if features.ndim != 2:
        raise ValueError(
            f"build_backbone: {name} must give features (B, D), got {tuple(features.shape)}. "
            "Choose a classification backbone."
        )
    model.train()
    return features.shape[1]
