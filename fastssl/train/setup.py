"""What a run is made of: its settled configuration, optimizer, schedule and precision."""

import dataclasses
import math
import os
import warnings

import torch
from torch import nn

from ..config import PretrainConfig
from ..data import epoch_order, load
from ..methods.recipes import resolve
from ..optim import LARS, AdamW8bit, LARS8bit, SGD8bit, param_groups
from . import folder, held_out


def settle(config: PretrainConfig, world: int):
    """Fill every unset field: from the run to be resumed, the recipe, and the data.

    Returns:
        The complete configuration and the training source.

    Raises:
        As `fastssl.train.pretrain`.
    """
    saved = folder.saved_config(config)
    config = resolve(config if saved is None else folder.unset_from(config, saved))
    source = load(config.data, "train", config.image_size, config.max_side)
    batch_size, n = config.batch_size, len(held_out.split(source, config.hold_out, config.seed)[0])
    if batch_size > n >= 2 * world:
        batch_size = n // world * world
        warnings.warn(
            f"batch_size {config.batch_size} exceeds the {n} images; using {batch_size}",
            stacklevel=4,
        )
    epoch_order(n, batch_size, seed=config.seed, epoch=0, world=world)  # refuses misfits
    total_steps = config.epochs * (n // batch_size)
    # Those it may use: a scheduler or container binds it to some; not known but on Linux.
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = len(affinity) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = min(8, max(1, cores)) if config.workers is None else config.workers
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


def build_optimizer(config: PretrainConfig, method: nn.Module) -> torch.optim.Optimizer:
    """AdamW, LARS, or SGD with momentum 0.9, states of 32 or 8 bits; matrices and kernels decay."""
    classes = {"adamw": torch.optim.AdamW, "lars": LARS, "sgd": torch.optim.SGD}
    classes |= {"adamw8bit": AdamW8bit, "lars8bit": LARS8bit, "sgd8bit": SGD8bit}
    momentum = {"momentum": 0.9} if config.optimizer.startswith("sgd") else {}
    groups = param_groups(method, config.weight_decay)
    return classes[config.optimizer](groups, lr=config.lr, **momentum)


def precision(config: PretrainConfig, device: torch.device) -> str:
    """The precision to use, fp32 or bf16. CPUs stay in fp32: small networks gain nothing there."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def learning_rate(
    config: PretrainConfig, step: int, steps_per_epoch: int, total_steps: int
) -> float:
    """Linear warm-up to `lr`, then half a cosine to zero; `step` counts from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
