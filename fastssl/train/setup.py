"""What a run is made of: its settled configuration, what trains, optimizer, schedule, precision."""

import dataclasses
import fnmatch
import os
import sys
import warnings
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import schedules
from ..config import PretrainConfig
from ..data import epoch_order, epoch_size, load
from ..extras import nearest
from ..gradcache import GradCache
from ..methods.recipes import completed, resolve
from ..models.text import TextTower
from ..models.tokens import encode_tokens
from ..optim import (
    LAMB,
    LARS,
    Adam8bit,
    AdamW8bit,
    LAMB8bit,
    LARS8bit,
    Lion,
    Lion8bit,
    SGD8bit,
    param_groups,
    param_groups_layer_decay,
)
from ..optim.blockwise import Blockwise
from . import folder, held_out, weights
from .combinations import check_backbone, check_bf16, check_combinations, check_labels


def settle(config: PretrainConfig, world: int, source=None):
    """Fill every unset field: from the run to be resumed, the recipe, and the data.

    Args:
        config: what is set. world: number of processes.
        source: data in the place of `config.data`, as `fastssl.data.load` takes it.

    Returns:
        The complete configuration and the training source.

    Raises:
        As `fastssl.train.pretrain`.
    """
    if source is not None:
        name = getattr(source, "name", f"python:{type(source).__name__}")
        config = dataclasses.replace(config, data=name)
    saved = folder.saved_config(config)
    config = dataclasses.replace(config, init_from=weights.absolute(config.init_from))
    if saved is None and config.backbone is None and config.init_from:
        config = dataclasses.replace(config, backbone=weights.recorded_backbone(config.init_from))
    if saved is not None:
        saved = completed(saved)
        config = folder.unset_from(config, saved)
    config = resolve(config)
    # Those it may use: a scheduler or container binds it to some; not known but on Linux.
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = max(1, len(affinity) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    check_combinations(config, saved, world, cores)
    source = load(
        config.data if source is None else source, "train", config.image_size, config.max_side
    )
    check_labels(config, source)
    if config.image_size is None:
        check_backbone(config.backbone, source.image_size)
    drawn, _ = held_out.split(source, config.hold_out, config.seed)
    images, batch_size = epoch_size(drawn), config.batch_size
    if batch_size > images >= 2 * world:
        batch_size = images // world * world
        warnings.warn(
            f"batch_size {config.batch_size} exceeds the {images} images; using {batch_size}",
            stacklevel=4,
        )
    epoch_order(images, batch_size, seed=config.seed, epoch=0, world=world)  # refuses misfits
    total_steps = config.epochs * (images // batch_size)
    workers = min(8, cores) if config.workers is None else config.workers
    config = dataclasses.replace(
        config,
        data=source.name,
        image_size=config.image_size or source.image_size,
        batch_size=batch_size,
        workers=workers,
        log_every=config.log_every or min(50, max(1, total_steps // 100)),
    )
    if saved is not None:
        folder.refuse_changes(config, saved)
    return config, source


def freeze(method: nn.Module, patterns: list[str]) -> None:
    """Parameters whose names match take no gradient; BatchNorms of nothing else stay in eval mode.

    Raises:
        ValueError: a pattern that matches nothing, with the nearest names; nothing left to train.
    """
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            known = {*names, *(f"{name.rpartition('.')[0]}.*" for name in names)}
            raise ValueError(
                f"pretrain: freeze must name parameters, got {pattern!r}, which matches none. "
                f"{nearest(pattern, known)}".rstrip()
            )
    for name, p in method.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in method.parameters()):
        raise ValueError(f"pretrain: freeze must leave something to train, got {patterns}.")


def train_mode(method: nn.Module, patterns: list[str]) -> nn.Module:
    """The method in training mode, but for its frozen BatchNorms: their statistics stay."""
    method.train()
    for path, module in method.named_modules():
        if isinstance(module, _BatchNorm):
            own = [f"{path}.{name}" for name, _ in module.named_parameters()]
            own = own or [f"{path}.running_mean"]
            if all(any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns) for n in own):
                module.eval()
    return method


def build_optimizer(config: PretrainConfig, method: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by its name; matrices and kernels decay, early layers and biases may learn
    slower."""
    cls, settings = _OPTIMIZERS[config.optimizer], {}
    own_fields = {"lr", "weight_decay", "max_grad_norm"} & (config.optimizer_args or {}).keys()
    if own_fields:  # the schedules would overrule them
        raise ValueError(
            "pretrain: optimizer_args must leave out what has a setting of its own, got "
            f"{', '.join(sorted(own_fields))}. Use that setting."
        )
    if cls is torch.optim.SGD or cls is SGD8bit:
        settings["momentum"] = 0.9
    if issubclass(cls, Blockwise):
        settings["max_grad_norm"] = config.max_grad_norm or None
    elif cls is not torch.optim.SGD and not (
        {"foreach", "differentiable"} & (config.optimizer_args or {}).keys()
    ):
        # One call for all tensors. torch's fused SGD takes no shards, fails where a gradient comes
        # late, and reads a momentum that nobody wrote where GradScaler skipped the first step.
        settings["fused"] = True
    groups = param_groups(method, config.weight_decay)
    if config.layer_decay != 1:
        layers = param_groups_layer_decay(
            method.backbone, config.lr, config.weight_decay, config.layer_decay
        )
        layered = {id(p) for group in layers for p in group["params"]}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in layered]
        groups = layers + [group for group in groups if group["params"]]
    for group in groups:
        if any(p.ndim < 2 for p in group["params"]):  # with or without a weight_decay to tell
            group["lr"] = group.get("lr", config.lr) * config.bias_lr_factor
    try:
        return cls(groups, lr=config.lr, **settings | (config.optimizer_args or {}))
    except TypeError as error:
        raise ValueError(
            f"pretrain: optimizer_args must fit {config.optimizer}, got {config.optimizer_args}: "
            f"{error}."
        ) from None


_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "lars": LARS,
    "lamb": LAMB,
    "lion": Lion,
    "adamw8bit": AdamW8bit,
    "adam8bit": Adam8bit,
    "sgd8bit": SGD8bit,
    "lars8bit": LARS8bit,
    "lamb8bit": LAMB8bit,
    "lion8bit": Lion8bit,
}


class Schedule:
    """Learning rate and weight decay of every group, by the step; from the groups as they are when
    this is made, whatever a checkpoint brings later."""

    def __init__(
        self,
        config: PretrainConfig,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        total_steps: int,
    ):
        self.config, self.optimizer, self.total_steps = config, optimizer, total_steps
        self.warmup_steps = config.warmup_epochs * steps_per_epoch
        self.initial = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    def apply(self, step: int) -> dict[str, float]:
        """Sets them for this step, from 0; returns those of full rate and full decay."""
        lr, decay = self.learning_rate(step), self.weight_decay(step)
        config = self.config
        for group, (own_lr, own_decay) in zip(
            self.optimizer.param_groups, self.initial, strict=True
        ):
            group["lr"] = lr if own_lr == config.lr else lr * own_lr / config.lr
            group["weight_decay"] = decay if own_decay else 0.0
        moving = config.final_weight_decay != config.weight_decay
        return {"lr": lr, "weight_decay": decay} if moving else {"lr": lr}

    def learning_rate(self, step: int) -> float:
        config, warmup = self.config, self.warmup_steps
        if step + 1 < warmup:
            return config.lr * schedules.warmup(step, warmup)
        progress = (step - warmup) / max(1.0, self.total_steps - warmup)
        return getattr(schedules, config.lr_schedule)(progress, config.lr, config.min_lr)

    def weight_decay(self, step: int) -> float:
        config, progress = self.config, step / self.total_steps
        return schedules.cosine(progress, config.weight_decay, config.final_weight_decay)


def precision(config: PretrainConfig, device: torch.device) -> str:
    """The precision to use: fp32, bf16 or fp16. CPUs stay in fp32 unless told: small networks gain
    nothing there."""
    if config.precision == "bf16":
        check_bf16(device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "pretrain: precision must be fp32 or bf16 on a CPU, got 'fp16', whose products are "
            "slow there."
        )
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class _Encoder(GradCache):
    """A network in chunks where there are gradients, and compiled; its hooks stay outside.

    Evaluation and export, which have none, meet the network as it is.
    """

    def forward(self, *args, **kwargs):
        forward = super().forward if torch.is_grad_enabled() else self.encoder
        return forward(*args, **kwargs)


def encode(method: nn.Module, chunk: int, *, compiled: bool) -> None:
    """How the backbone and a teacher's run, by `forward` and by `patch_tokens`: so many images at a
    time, compiled; and a text tower, so many captions at a time. The names of parameters stay."""
    backbone, teacher = method.backbone, getattr(method, "teacher", None)
    if chunk and any(isinstance(m, _BatchNorm) and m.training for m in backbone.modules()):
        warnings.warn(
            f"chunk: the backbone's BatchNorm takes its statistics from {chunk} images at a time, "
            "not from the whole batch, so that gradients are not exactly those of the batch. They "
            "are with frozen BatchNorms or with none, as in vit_small.",
            stacklevel=4,
        )
    networks = [backbone] if chunk or compiled else []
    if compiled and teacher is not None:
        networks.append(getattr(teacher, "backbone", teacher))
    for network in networks:
        tokens = MethodType(encode_tokens, network)
        for name, function in (("forward", network.forward), ("encode_tokens", tokens)):
            encoder = _Encoder(function, chunk or sys.maxsize)
            if compiled:  # kernels for each size of the views
                encoder.encoder.compile(dynamic=False)
            setattr(network, name, encoder.forward)
    for tower in (m for m in method.modules() if chunk and isinstance(m, TextTower)):
        tower.encode = _Encoder(tower.encode, chunk).forward
