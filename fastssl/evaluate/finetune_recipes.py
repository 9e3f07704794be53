"""What a recipe of fine-tuning says, and what is made of it: optimizer, rates, views, mixing."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..augment import Custom, Resize, View
from ..extras import require
from ..models.classifier import Classifier
from ..optim import LARS, param_groups, param_groups_layer_decay
from .layers import transformer_blocks
from .task import Task


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. `lr` is of the last layers of the backbone for a batch of 256; of B it is
    lr (B / 256)^batch_power."""

    optimizer: str
    lr: float
    batch_power: float
    batch_size: int
    epochs: int
    head_times: float = 1.0
    """Rate of the head over `lr`."""
    milestones: tuple[float, ...] = ()
    """Shares of the epochs after which the rate falls to `gamma` of itself; else it is a cosine."""
    gamma: float = 0.2
    warmup_epochs: int = 0
    last_share: float = 0.0
    """Of the rate, that the cosine ends at."""
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    drop_path: float = 0.0
    """Largest probability of skipping a block, that of the last; it grows from 0 over depth."""
    mixup: float = 0.0
    cutmix: float = 0.0
    """Beta distributions' parameter; 0 is none. With both, one of them in each batch."""
    rand_augment: int = 0
    """Of 10, magnitude of RandAugment; 0 is none."""
    label_smoothing: float = 0.0
    pool: str = "own"
    """Features under the head: the network's own, or "patches", the mean of its last map."""

    def rate_factor(self, epoch: float) -> float:
        """The rate over the first one after so many epochs, also parts of one."""
        if self.milestones:
            return self.gamma ** sum(epoch >= share * self.epochs for share in self.milestones)
        warmup = min(self.warmup_epochs, self.epochs // 2)
        if epoch < warmup:
            return epoch / warmup
        cosine = (1 + math.cos(math.pi * (epoch - warmup) / (self.epochs - warmup))) / 2
        return self.last_share + (1 - self.last_share) * cosine


# Of few-label recipes that differ, the one for 1 % has that in its name.
RECIPES = {
    "vit": Recipe(
        "adamw", 5e-4, 1.0, 1024, 100, warmup_epochs=5, weight_decay=0.05, layer_decay=0.65,
        drop_path=0.1, mixup=0.8, cutmix=1.0, rand_augment=9, label_smoothing=0.1,
    ),
    "thorax": Recipe(
        "adamw", 2.5e-4, 1.0, 1024, 75, warmup_epochs=5, last_share=0.01, weight_decay=0.05,
        layer_decay=0.55, drop_path=0.2, rand_augment=6, pool="patches",
    ),
    "cnn": Recipe("nesterov", 0.01, 1.0, 256, 50, head_times=10, weight_decay=1e-4),
    "simclr": Recipe("nesterov", 0.05, 1.0, 1024, 30),
    "simclr-1%": Recipe("nesterov", 0.05, 1.0, 1024, 60),
    "simclr_v2": Recipe("lars", 0.08, 0.5, 1024, 30),
    "simclr_v2-1%": Recipe("lars", 0.08, 0.5, 1024, 60),
    "swav": Recipe("nesterov", 0.01, 0.0, 256, 20, head_times=20, milestones=(0.6, 0.8)),
    "swav-1%": Recipe("nesterov", 0.02, 0.0, 256, 20, head_times=250, milestones=(0.6, 0.8)),
}  # fmt: skip


def optimizer_of(model: Classifier, r: Recipe, scale: float) -> torch.optim.Optimizer:
    """Over the backbone, the neck and the head, at `scale` times the recipe's rates."""
    lr = r.lr * scale
    if r.layer_decay < 1:
        groups = param_groups_layer_decay(model.backbone, lr, r.weight_decay, r.layer_decay)
    else:
        groups = [g | {"lr": lr} for g in param_groups(model.backbone, r.weight_decay)]
    if len(model.neck):
        groups += [g | {"lr": lr} for g in param_groups(model.neck, r.weight_decay)]
    groups += [g | {"lr": lr * r.head_times} for g in param_groups(model.head, r.weight_decay)]
    if r.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    if r.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=0.9)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def mixing(r: Recipe, num_classes: int):
    """A function of images and labels (B,) that mixes pairs of them; labels become (B, classes)."""
    if not (r.mixup or r.cutmix):
        return lambda x, y: (x, y)
    v2 = require("torchvision.transforms.v2", "vision")
    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, r.mixup), (v2.CutMix, r.cutmix))
        if alpha
    ]
    return v2.RandomChoice(kinds)


def training_views(task: Task, r: Recipe) -> list[View | Custom]:
    """One after the other, each of what the one before has made."""
    inputs = task.inputs
    view = inputs.training_view(task.train.source.mirror)
    if not r.rand_augment:
        return [view]
    v2 = require("torchvision.transforms.v2", "vision")
    bilinear = v2.InterpolationMode.BILINEAR
    # From 0 to 10, not torchvision's 30; empty corners grey.
    change = v2.RandAugment(1, r.rand_augment, 11, interpolation=bilinear, fill=0.5)
    half = v2.RandomApply([change], p=0.5)
    whole = View(Resize(inputs.size), inputs.normalize)
    return [View(*view.specs[:-1]), Custom(v2.Compose([half, half]), inputs.size), whole]


@contextmanager
def dropping_paths(backbone: nn.Module, rate: float):
    """Inside the block each sample skips block i of L with probability rate i / (L - 1); what the
    block adds otherwise is divided by the probability of being kept."""
    blocks = transformer_blocks(backbone)

    def hook(p: float):
        def skip(module, args, output):
            keep = torch.rand(len(output), *[1] * (output.ndim - 1), device=output.device) >= p
            return args[0] + (output - args[0]) * keep / (1 - p)

        return skip

    rates = [rate * i / max(1, len(blocks) - 1) for i in range(len(blocks))]
    hooks = [b.register_forward_hook(hook(p)) for b, p in zip(blocks, rates, strict=True) if p]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
