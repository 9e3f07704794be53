"""Settings that do not go together, explained before a run loads or writes anything."""

import inspect
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PretrainConfig
from ..methods import method_class

_CONVOLUTIONAL = re.compile("resne[x]?t|regnet|convnext|densenet|efficientnet|mobilenet|vgg")
_PATCH = re.compile(r"patch(\d+)|vit_[blh]_(\d+)")


def check_combinations(
    config: PretrainConfig, saved: dict[str, Any] | None, world: int, cores: int
) -> None:
    """Refuse settings that cannot work together, and warn of those that work badly.

    Args:
        config: with the recipe's values. saved: the configuration of the run to be resumed, if any.
        world: processes. cores: those that this process may use.

    Raises:
        ValueError: naming the settings, what is wrong and what to do.
    """
    B = config.batch_size
    if saved is not None and config.init_from != saved.get("init_from"):
        raise ValueError(
            f"pretrain: resume goes on with the run in {config.out}, and init_from "
            f"{config.init_from!r} would start a new one. Leave one of them out, or choose another "
            "out."
        )
    if B % world:
        raise ValueError(
            f"pretrain: batch_size (over all processes) must be a multiple of the {world} "
            f"processes, got {B}. Use {max(1, B // world) * world}."
        )
    if config.min_lr > config.lr:
        raise ValueError(
            f"pretrain: min_lr must be at most lr, which is {config.lr}, got {config.min_lr}."
        )
    if config.final_weight_decay > 0 == config.weight_decay:
        raise ValueError(
            f"pretrain: final_weight_decay must be 0 where weight_decay is, got "
            f"{config.final_weight_decay}. Give a weight_decay to start from."
        )
    if config.chunk and config.parallel == "fsdp" and world > 1:
        raise ValueError(
            f"pretrain: chunk must be 0 with parallel=fsdp, got {config.chunk}: the second "
            "encoding needs whole weights. Use parallel=ddp."
        )
    for name, length in _queues(config).items():
        if 0 < length < B:
            raise ValueError(
                f"pretrain: {name} must be at least batch_size, got {length} and {B}: a step would "
                f"replace all of it. Use a multiple of the batch, as {4 * B}."
            )
    if config.image_size is not None:
        check_backbone(config.backbone, config.image_size)
    if config.warmup_epochs >= config.epochs:
        _warn(
            f"warmup_epochs is {config.warmup_epochs:g} of {config.epochs} epochs: the learning "
            "rate rises to the end and never falls. Set warmup_epochs to a tenth of epochs."
        )
    tuned = "eta" in (config.optimizer_args or {})  # as recipes for small batches do
    if config.optimizer.startswith(("lars", "lamb")) and B < 512 and not tuned:
        _warn(
            f"{config.optimizer} is made for batches of thousands, batch_size is {B}. With small "
            "batches adamw or sgd learn faster."
        )
    if config.workers is not None and config.workers > cores:
        _warn(
            f"workers is {config.workers}, and there are {cores} cores, which the training needs "
            "too. More threads than cores help only where the disk is slow."
        )


def check_backbone(name: str, image_size: int) -> None:
    """The same for a backbone and the side of its images, by its name and without building it."""
    library, _, model = name.rpartition(":")
    if not library:  # the built-in ones say themselves what they take
        return
    patch = _PATCH.search(model)
    patch = int(patch[1] or patch[2]) if patch else 1
    if image_size % patch:
        near = max(patch, round(image_size / patch) * patch)
        raise ValueError(
            f"pretrain: image_size must be a multiple of the patches of {name}, {patch} pixels, "
            f"got {image_size}. Use {near}, or vit_small for small images."
        )
    if image_size <= 64 and _CONVOLUTIONAL.search(model):
        side = max(1, image_size // 32)
        _warn(
            f"{name} is made for images of 224 pixels: of {image_size} its stem leaves "
            f"{image_size // 4} and its last map has {side} x {side}, which costs much accuracy. "
            "Use resnet_small, whose stem keeps the size, or a larger image_size."
        )


def check_labels(config: PretrainConfig, source) -> None:
    """Refuse data without a label an image to a method that `needs_labels`."""
    if not getattr(method_class(config.method), "needs_labels", False):
        return
    several = source.num_classes > 1 and isinstance(source[0][1], Tensor)
    if several or source.num_classes < 2:
        got = "several an image" if several else "none"
        raise ValueError(
            f"pretrain: {config.method} needs data with one label an image, got {source.name}, "
            f"which has {got}. Put the images in a folder for each class, or train a method that "
            "needs no labels."
        )


def check_views(backbone: nn.Module, name: str, views: Sequence, channels: int, size: int) -> None:
    """Refuse views of a side that the backbone cannot take; `size` is what it was built for."""
    sides = {view.size for view in views} - {size}
    mode = backbone.training
    backbone.eval()
    for side in sorted(sides):
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, channels, side, side))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"pretrain: {name}, built for images of {size} pixels, cannot take the method's "
                f"views of {side}: {' '.join(str(error).split())} Make all views of image_size "
                "(local_size, where there are parts), a multiple of the patch size, or take a "
                "convolutional backbone, which has no fixed size."
            ) from error
    backbone.train(mode)


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a GPU that would only emulate it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"pretrain: precision bf16 needs a GPU that computes with it, got "
            f"{torch.cuda.get_device_name(device)}. Use fp32."
        )


def _queues(config: PretrainConfig) -> dict[str, int]:
    """The lengths of a method's queues, by the name of the argument."""
    parameters = inspect.signature(method_class(config.method).__init__).parameters
    lengths = {name: config.method_args.get(name, p.default) for name, p in parameters.items()}
    return {n: v for n, v in lengths.items() if "queue" in n and type(v) is int}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
