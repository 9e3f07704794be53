"""The training loop. It knows a method only by views, loss, after_step and features, and whether it
reads captions; and of the scalars beside the loss those that `health` names."""

import dataclasses
import itertools
import json
import sys
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..augment import Packed, augment
from ..config import PretrainConfig
from ..data import (
    Batch,
    batches,
    check_captions,
    draw_captions,
    epoch_order,
    epoch_size,
    resident,
)
from ..methods import method_class
from ..random import step_seed
from . import folder, held_out, parallel, setup, weights
from .backbones import export_backbone, seeded_backbone
from .checkpoint import load_checkpoint, replacing
from .combinations import check_views
from .health import Health
from .kept import Checkpoints
from .metrics import Meter, MetricsLog, Progress, read_metrics
from .monitors import READ_STEPS, Monitor
from .ranks import Ranks
from .stop import StopSignal, stopped
from .trackers import Trackers
from .update import Update


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its folder: config.yaml, metrics.jsonl, metrics.csv, backbone.safetensors, checkpoints/, and
    corrupt.txt where files could not be read: path, tab, reason."""
    metrics: dict[str, Any]
    """Summary: steps, epochs, loss, seconds, images_per_s, corrupt_images, corrupt_paths."""


def pretrain(config: PretrainConfig, source=None) -> Run:
    """Pretrain a backbone without labels.

    One process under plain `python`; under `torchrun` one per rank, with the global batch split
    over them: the loss takes the negatives of all ranks and BatchNorm their statistics, so that
    the weights are those of one process but for rounding. Results do not depend on `workers`; the
    order and the augmentation of the samples do not depend on the number of ranks either.

    An interrupt finishes the current step, saves, says how to resume and raises: KeyboardInterrupt
    for SIGINT, SystemExit(143) for SIGTERM; a second SIGINT stops at once. A resumed run computes
    the same bits as one that was never stopped, given the same machine and number of threads.

    Args:
        config: what to do; unset fields come from the method's recipe for the data.
        source: data given in Python in the place of `config.data`: a source, or any
            `torch.utils.data.Dataset` (`fastssl.data.DatasetSource`).

    Returns:
        The run's folder and a summary; the summary is also in the folder, as summary.json.

    Raises:
        ValueError: a setting that cannot work, or one that differs from the run to be resumed.
        FileExistsError: `out` holds a run and resume is not set. FileNotFoundError: no data, or
            nothing to resume.
        FloatingPointError: a loss or gradient is not finite; bad_batch.json in the run's folder
            names the step, its images and seeds.
        OSError: out cannot be written, or the disk is full. KeyboardInterrupt, SystemExit: stopped
            from outside, after saving.
    """
    ranks = Ranks.start(config.device)
    try:
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return _Training(config, ranks, source).run()
    finally:
        ranks.close()


class _Training:
    """The state of one run in one process."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, source):
        self.ranks = ranks
        config, source = setup.settle(config, ranks.world, source)
        self.config, self.source = config, source
        self.out = Path(config.out)
        self.drawn, self.held = held_out.split(source, config.hold_out, config.seed)
        self.steps_per_epoch = epoch_size(self.drawn) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.precision = setup.precision(config, ranks.device)

        backbone = seeded_backbone(dataclasses.asdict(config), source.channels)
        self.initial = weights.start(config, backbone)
        method = method_class(config.method)(backbone, **config.method_args)
        weights.start_heads(config, method, self.initial)
        self.views = method.views(config.image_size, source)
        self.caption = getattr(method, "reads_captions", None)
        if self.caption:
            check_captions(source, config.method)
        check_views(backbone, config.backbone, self.views, source.channels, config.image_size)
        setup.freeze(method, config.freeze)
        method = parallel.to_ranks(method, config, ranks)
        self.method = setup.train_mode(method, config.freeze)
        setup.encode(method, config.chunk, compiled=config.compile)
        self.feed = resident(source, ranks.device)
        self.optimizer = setup.build_optimizer(config, method)
        self.schedule = setup.Schedule(
            config, self.optimizer, self.steps_per_epoch, self.total_steps
        )
        self.update = Update(config, method, self.optimizer, ranks.device, self.precision)
        self.monitor = Monitor(method.backbone, source, ranks, on=config.monitor)
        self.checkpoints = Checkpoints(self.out, ranks, config.keep)
        self.step, self.seconds, self.corrupt_before = 0, 0.0, {}
        if config.resume:
            self._restore()
        self.objective = parallel.objective(method, config, ranks)

        self.health = Health(config.lr, self.schedule.warmup_steps, self.total_steps)

    def run(self) -> Run:
        settings = dataclasses.asdict(self.config)
        self.trackers = Trackers(
            self.config.trackers, self.out, settings, step=self.step, on=self.ranks.main
        )
        # Every rank has looked for an earlier run before one of them writes.
        self.ranks.barrier()
        started, self.first_step = time.perf_counter() - self.seconds, self.step
        self.log = None
        if self.ranks.main:
            folder.write_description(self.config, self.ranks, self.precision)
            weights.report(self.out, self.initial)
            folder.write_parts(self.out, self.source)
            self.log = MetricsLog(self.out, self.step)
        self.progress = Progress(self.total_steps, self.step, silent=not self.ranks.main)
        self.meter = Meter()
        with StopSignal() as stop, closing(self.progress), self.trackers, self.monitor:
            with closing(self._loader()) as loader:
                for batch in self.meter.waiting(loader):
                    self._train_step(*batch)
                    self.seconds = time.perf_counter() - started
                    received = self.ranks.largest(stop.received)
                    stopping = received if self.step < self.total_steps else 0
                    if stopping or self._is_due(self.config.save_every * self.steps_per_epoch):
                        self._save()
                    if stopping:
                        self._say_stopped()
                        raise stopped(stopping)
        return self._finish(trained=self.step > self.first_step)

    def _loader(self):
        """The batches of all steps to come, on the device, with captions where they are read; what
        is ahead does not end with an epoch."""
        config = self.config
        order, numbers = itertools.tee(self._order())
        loader = batches(self.feed, order, workers=config.workers, device=self.ranks.device)
        with closing(loader):
            for batch, index in zip(loader, numbers, strict=False):
                captions, epoch = None, self.step // self.steps_per_epoch
                if self.caption:
                    captions = draw_captions(
                        self.source, index, self.caption, seed=config.seed, epoch=epoch
                    )
                yield *batch, captions

    def _order(self):
        """The sample numbers of each step to come."""
        config, ranks = self.config, self.ranks
        first, done = divmod(self.step, self.steps_per_epoch)
        for epoch in range(first, config.epochs):
            order = epoch_order(
                self.drawn, config.batch_size, seed=config.seed, epoch=epoch,
                rank=ranks.rank, world=ranks.world,
            )  # fmt: skip
            yield from order[done if epoch == first else 0 :]

    def _is_due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is to be done now."""
        return self.step % every == 0 or self.step == self.total_steps

    def _train_step(
        self,
        images: Tensor | Packed,
        label: Tensor,
        index: Tensor,
        captions: list[str] | None,
    ) -> None:
        """One update of the weights. images (B, C, H, W) or packed, label and index (B,) int64."""
        config = self.config
        epoch = self.step // self.steps_per_epoch
        # A mixture numbers a sample's second time in an epoch otherwise, so that views differ.
        drawn, index = index, index % len(self.source)
        torch.manual_seed(step_seed(config.seed, self.step, self.ranks.rank))
        rates = self.schedule.apply(self.step)
        views = augment(
            images, drawn, self.views, seed=config.seed, epoch=epoch, channels_last=True
        )
        passed = self.step / self.steps_per_epoch
        batch = Batch(
            views, index, label, self.step, self.total_steps, passed, captions, config.seed
        )
        scalars = self.update(self.objective, batch)
        if self.step == self.first_step:
            parallel.refuse_unused(self.objective)
        self.step += 1
        self.method.after_step(self.step, self.total_steps)
        self.monitor.step(label, index)
        self.meter.count(config.batch_size)
        if self._is_due(config.log_every):
            self._log(epoch, rates, scalars)
        self.progress.step(self.step)

    def _log(self, epoch: int, rates: dict[str, float], scalars: dict[str, Tensor | float]) -> None:
        """One line of metrics; scalars are means over the ranks, of this step."""
        self._refuse_bad_step()
        numbers = [torch.as_tensor(x, device=self.ranks.device) for x in scalars.values()]
        means = torch.stack([x.detach().float() for x in numbers])
        values = dict(zip(scalars, self.ranks.mean(means).tolist(), strict=True))
        record = {"step": self.step, "epoch": epoch, "loss": values.pop("loss"), **rates}
        record |= {**self.meter.read(), **values}
        if self._is_due(-(-READ_STEPS // self.config.log_every) * self.config.log_every):
            record |= self.monitor.read()
        if self.log is None:
            return
        self.log.write(record)
        self.trackers.write(record)
        self.progress.record(record)
        for message in self.health.messages(record):
            self.log.warn(self.step, message)
            warnings.warn(message, stacklevel=2)

    def _refuse_bad_step(self) -> None:
        found = self.update.watch.read()
        step = -self.ranks.largest(-found["step"] if found else -self.total_steps - 1)
        if step > self.total_steps:
            return
        config, ranks = self.config, self.ranks
        each = ranks.gather(found)  # the loss may be finite on some ranks
        parts = [part for part in each if part and part["step"] == step]
        what = "loss" if any(part["what"] == "loss" for part in parts) else "gradient"
        parameter = parts[0]["parameter"]
        if ranks.main:
            folder.write_bad_batch(self.out, {
                "step": step,
                "epoch": (step - 1) // self.steps_per_epoch,
                "what": what,
                "parameter": parameter,
                "seed": config.seed,
                "step_seeds": [step_seed(config.seed, step - 1, r) for r in range(ranks.world)],
                "index": [part["index"] if part in parts else None for part in each],
            })  # fmt: skip
        raise FloatingPointError(
            f"pretrain: the {what} is not finite at step {step} (lr {config.lr}, "
            f"{config.optimizer}, {self.precision}, {config.method_args}); the first parameter "
            f"whose gradient is not: {parameter}. Its images and seeds are in "
            f"{self.out}/bad_batch.json. Try a lower lr, more warmup_epochs, max_grad_norm or "
            "a higher temperature; with bf16 or fp16 try precision fp32. No checkpoint is from "
            "after that step."
        )

    def _save(self) -> None:
        self._refuse_bad_step()
        score = self._held_out_top1()  # first: it may meet unreadable files
        corrupt = self._corrupt()
        if self.ranks.main:
            folder.write_corrupt(self.out, corrupt)
        state = {
            "method": self.config.method,
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "update": self.update.state_dict(),
            "monitor": self.monitor.state_dict(),
            "seconds": self.seconds,
            "corrupt": corrupt,
            "score": score,
        }
        self.checkpoints.save(state, sharded=parallel.is_sharded(self.config, self.ranks))

    def _held_out_top1(self) -> float | None:
        if not len(self.held):
            return None
        self.method.eval()
        top1 = held_out.top1_percent(
            self.method.features, self.source, self.drawn.samples, self.held,
            image_size=self.config.image_size, ranks=self.ranks,
            batch_size=self.config.batch_size // self.ranks.world,
        )  # fmt: skip
        setup.train_mode(self.method, self.config.freeze)
        if parallel.is_sharded(self.config, self.ranks):
            self.method.reshard()  # which a backward would have done
        return top1

    def _restore(self) -> None:
        path = self.checkpoints.last()
        if path is None:  # stopped before the first checkpoint: start again
            return
        like = parallel.placement(self.method, self.optimizer)
        state = load_checkpoint(path, method=self.config.method, like=like)
        self.method.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update.load_state_dict(state.get("update", {}))
        self.monitor.load_state_dict(state.get("monitor", {}))
        self.step, self.seconds = state["step"], state["seconds"]
        met = state["corrupt"]  # a list of paths where the run began before reasons were kept
        self.corrupt_before = met if isinstance(met, dict) else dict.fromkeys(met, "")

    def _corrupt(self) -> dict[str, str]:
        """Unreadable files met so far by any rank, also before a resume, and why."""
        met = self.ranks.gather(self.source.corrupt)
        return dict(
            sorted({k: v for d in (self.corrupt_before, *met) for k, v in d.items()}.items())
        )

    def _say_stopped(self) -> None:
        self.progress.close()
        if self.ranks.main:
            print(
                f"Stopped after step {self.step} of {self.total_steps}; saved in {self.out}. "
                "Go on with the same settings and resume=True.",
                file=sys.stderr,
            )

    def _finish(self, trained: bool) -> Run:
        """Export the backbone and write the summary, unless an earlier call has."""
        summary_path, corrupt = self.out / "summary.json", self._corrupt()
        plain = seeded_backbone(dataclasses.asdict(self.config), self.source.channels)
        backbone = parallel.gathered(self.method.backbone, plain)
        if self.ranks.main and (trained or not summary_path.exists()):
            export_backbone(backbone, self.out, self.config, self.source)
            images = self.total_steps * self.config.batch_size
            summary = {
                "steps": self.total_steps,
                "epochs": self.config.epochs,
                "loss": read_metrics(self.out)[-1]["loss"],
                "seconds": self.seconds,
                "images_per_s": images / self.seconds,
                "corrupt_images": len(corrupt),
                "corrupt_paths": list(corrupt),
            }
            if len(self.held):
                step, top1 = self.checkpoints.best()
                summary |= {"best_step": step, "best_held_out_top1_percent": top1}
            with replacing(summary_path) as file:
                file.write(f"{json.dumps(summary, indent=2)}\n".encode())
        self.ranks.barrier()
        return Run(self.out, json.loads(summary_path.read_text()))
