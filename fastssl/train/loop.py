"""The training loop. It knows a method only by views, loss, after_step and features."""

import dataclasses
import json
import math
import sys
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..augment import augment
from ..augment.random import step_seed
from ..config import PretrainConfig
from ..data import Batch, batches, epoch_order, load
from ..methods import method_class
from ..methods.recipes import resolve
from ..optim import LARS, param_groups
from . import folder
from .backbones import export_backbone, seeded_backbone
from .checkpoint import load_checkpoint, save_checkpoint
from .metrics import Meter, MetricsLog, Progress
from .ranks import Ranks
from .stop import StopSignal

COLLAPSED_STD = 0.2
"""A method's `std` scalar below this (1 is healthy) means all projections are becoming equal."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its folder: config.yaml, metrics.jsonl, metrics.csv, backbone.safetensors, checkpoints/."""
    metrics: dict[str, Any]
    """Summary: steps, epochs, loss, seconds, images_per_s, corrupt_images, corrupt_paths."""


def pretrain(config: PretrainConfig) -> Run:
    """Pretrain a backbone without labels.

    One process under plain `python`; under `torchrun` one per rank, with the global batch split
    over them. Results do not depend on `workers`; the order and the augmentation of the samples
    do not depend on the number of ranks either. BatchNorm statistics are per rank on the CPU and
    shared over ranks on CUDA, where torch can do it.

    An interrupt (SIGINT or SIGTERM) finishes the current step, saves, says how to resume and raises
    KeyboardInterrupt; a second SIGINT stops at once. A resumed run computes the same bits as one
    that was never stopped, given the same machine and number of threads.

    Args:
        config: what to do; unset fields come from the method's recipe for the data.

    Returns:
        The run's folder and a summary; the summary is also in the folder, as summary.json.

    Raises:
        ValueError: a setting that cannot work, or one that differs from the run to be resumed.
        FileExistsError: `out` holds a run and resume is not set. FileNotFoundError: no data, or
            nothing to resume.
        FloatingPointError: the loss is not finite.
        OSError: the disk is full. KeyboardInterrupt: stopped from outside, after saving.
    """
    ranks = Ranks.start(config.device)
    try:
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return _pretrain(config, ranks)
    finally:
        ranks.close()


def _pretrain(config: PretrainConfig, ranks: Ranks) -> Run:
    saved = folder.saved_config(config)
    config = resolve(config if saved is None else folder.unset_from(config, saved))
    source = load(config.data, "train", config.image_size)
    config = _fit_to_data(config, source, ranks.world)
    if saved is not None:
        folder.refuse_changes(config, saved)
    steps_per_epoch = len(source) // config.batch_size
    total_steps = config.epochs * steps_per_epoch

    backbone = seeded_backbone(dataclasses.asdict(config), source.channels)
    method = method_class(config.method)(backbone, **config.method_args)
    method = method.to(ranks.device, memory_format=torch.channels_last)
    if ranks.world > 1 and ranks.device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = _build_optimizer(config, method)
    step, corrupt = _restore(config, method, optimizer)
    precision = _precision(config, ranks.device)

    # Every rank has looked for an earlier run before one of them writes.
    ranks.barrier()
    out = Path(config.out)
    log = None
    if ranks.main:
        folder.write_description(config, ranks.device, ranks.world, precision)
        log = MetricsLog(out, step)

    views = method.views(config.image_size, source)
    objective = _Objective(method)
    if ranks.world > 1:
        objective = DistributedDataParallel(objective)
    device_type = ranks.device.type
    first_bad = torch.zeros((), dtype=torch.int64, device=ranks.device)  # step, 0: none
    meter, started, record = Meter(), time.perf_counter(), {}
    progress = Progress(total_steps, step, silent=not ranks.main)

    def save() -> None:
        if ranks.main:
            state = _state(config, method, optimizer, step, sorted({*corrupt, *source.corrupt}))
            save_checkpoint(folder.checkpoint_path(out), state)
        ranks.barrier()

    method.train()
    with StopSignal() as stop, closing(progress):
        while step < total_steps:
            epoch, done = divmod(step, steps_per_epoch)
            order = epoch_order(
                len(source),
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                rank=ranks.rank,
                world=ranks.world,
            )
            loader = batches(source, order[done:], workers=config.workers)
            with closing(loader):
                for _ in range(done, steps_per_epoch):
                    before = time.perf_counter()
                    images, label, index = next(loader)
                    images = images.to(ranks.device, non_blocking=True)
                    meter.count(config.batch_size, time.perf_counter() - before)

                    torch.manual_seed(step_seed(config.seed, step, ranks.rank))
                    lr = _learning_rate(config, step, steps_per_epoch, total_steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    with torch.no_grad():
                        x = augment(images, index, views, seed=config.seed, epoch=epoch)
                    batch = Batch(x, index.to(ranks.device), label.to(ranks.device))
                    with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
                        loss, scalars = objective(batch)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    step += 1
                    # Where, not if: the device is not made to wait for the host.
                    bad = ~loss.detach().isfinite() & (first_bad == 0)
                    first_bad = torch.where(bad, step, first_bad)
                    logging = step % config.log_every == 0 or step == total_steps
                    if logging:
                        grad_norm = _grad_norm(method)
                    optimizer.step()
                    method.after_step(step)

                    stopping = ranks.largest(stop.received)
                    epoch_ends = step % (config.save_every * steps_per_epoch) == 0
                    saving = epoch_ends or step == total_steps or bool(stopping)
                    if logging or saving:
                        _refuse_bad_loss(ranks.largest(int(first_bad)), config)
                    if logging:
                        values = {"loss": loss, **scalars, "grad_norm": grad_norm}
                        record = _record(step, epoch, lr, values, meter, ranks)
                        if log is not None:
                            log.write(record)
                        progress.record(record)
                        _warn_of_collapse(record, config, ranks)
                    progress.step(step)
                    if saving:
                        save()
                    if stopping:
                        progress.close()
                        if ranks.main and step < total_steps:
                            print(_how_to_resume(config, step, total_steps), file=sys.stderr)
                        raise KeyboardInterrupt
    return _finish(config, method, source, corrupt, total_steps, record, started, ranks)


class _Objective(nn.Module):
    """A method as DistributedDataParallel wants it: `forward` is the loss."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.loss(batch)


def _fit_to_data(config: PretrainConfig, source, world: int) -> PretrainConfig:
    """Settle what depends on the data: sizes, names and how often to log."""
    batch_size = config.batch_size
    if batch_size > len(source) >= 2 * world:
        batch_size = len(source) // world * world
        warnings.warn(
            f"batch_size {config.batch_size} exceeds the {len(source)} images; using {batch_size}",
            stacklevel=4,
        )
    epoch_order(len(source), batch_size, seed=config.seed, epoch=0, world=world)  # checks
    total_steps = config.epochs * (len(source) // batch_size)
    return dataclasses.replace(
        config,
        data=source.name,
        image_size=config.image_size or source.image_size,
        batch_size=batch_size,
        log_every=config.log_every or min(50, max(1, total_steps // 100)),
    )


def _build_optimizer(config: PretrainConfig, method: nn.Module) -> torch.optim.Optimizer:
    groups = param_groups(method, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "lars":
        return LARS(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


def _precision(config: PretrainConfig, device: torch.device) -> str:
    """ "fp32" or "bf16". CPUs stay in fp32: small networks gain nothing there."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _learning_rate(
    config: PretrainConfig, step: int, steps_per_epoch: int, total_steps: int
) -> float:
    """Linear warm-up to `lr`, then half a cosine to zero; `step` counts from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def _grad_norm(method: nn.Module) -> Tensor:
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _record(
    step: int, epoch: int, lr: float, values: dict[str, Tensor], meter: Meter, ranks: Ranks
) -> dict[str, Any]:
    """One line of metrics. Scalars are means over the ranks, of this step."""
    means = ranks.mean(torch.stack([v.detach().float() for v in values.values()])).tolist()
    scalars = dict(zip(values, means, strict=True))
    loss = scalars.pop("loss")
    return {"step": step, "epoch": epoch, "loss": loss, "lr": lr, **meter.read(), **scalars}


def _refuse_bad_loss(step: int, config: PretrainConfig) -> None:
    if step:
        raise FloatingPointError(
            f"pretrain: the loss is not finite at step {step} (learning rate {config.lr}, "
            f"{config.optimizer}, temperature and other arguments {config.method_args}). Try a "
            "lower lr, more warmup_epochs or a higher temperature; with precision bf16 try fp32. "
            "The last checkpoint is from before that step."
        )


def _warn_of_collapse(record: dict[str, Any], config: PretrainConfig, ranks: Ranks) -> None:
    std = record.get("std", 1.0)
    if ranks.main and std < COLLAPSED_STD:
        warnings.warn(
            f"step {record['step']}: the projections are collapsing (std {std:.3f} of a healthy 1, "
            f"alarm below {COLLAPSED_STD}): all images get nearly the same features. Try a lower "
            f"lr than {config.lr} or a longer warm-up.",
            stacklevel=3,
        )


def _state(config, method, optimizer, step: int, corrupt: list[str]) -> dict[str, Any]:
    return {
        "method": config.method,
        "config": dataclasses.asdict(config),
        "step": step,
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "corrupt": corrupt,
    }


def _restore(config: PretrainConfig, method: nn.Module, optimizer) -> tuple[int, list[str]]:
    """Step to go on from and the unreadable files met so far; 0 and none without a checkpoint."""
    path = folder.checkpoint_path(config.out)
    if not config.resume or not path.exists():
        return 0, []
    state = load_checkpoint(path, method=config.method)
    method.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["corrupt"]


def _how_to_resume(config: PretrainConfig, step: int, total_steps: int) -> str:
    return (
        f"Stopped after step {step} of {total_steps}; saved in {config.out}. "
        "Run the same command with --resume (resume=True) to go on."
    )


def _finish(
    config, method, source, corrupt: list[str], steps: int, record, started: float, ranks: Ranks
) -> Run:
    """Export, summarise."""
    out = Path(config.out)
    corrupt = sorted({*corrupt, *source.corrupt})
    seconds = time.perf_counter() - started
    summary = {
        "steps": steps,
        "epochs": config.epochs,
        "loss": record.get("loss"),
        "images_per_s": record.get("images_per_s"),
        "seconds": seconds,
        "corrupt_images": len(corrupt),
        "corrupt_paths": corrupt,
    }
    if ranks.main and (record or not (out / "backbone.safetensors").exists()):
        export_backbone(method.backbone, out, config, source)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    elif (out / "summary.json").exists():  # the run was complete before this call
        summary = json.loads((out / "summary.json").read_text())
    ranks.barrier()
    return Run(out, summary)
