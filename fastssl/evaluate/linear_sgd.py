"""Linear probes as papers train them: by gradient steps, all heads of a grid at once."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import epoch_order
from ..extras import nearest
from ..optim import LARS
from .features import frozen, top1_percent
from .layers import LastBlocks, transformer_blocks
from .linear import held_out
from .task import Task, check_one_label, over_seeds


@dataclass(frozen=True)
class Preset:
    """One paper's probe. `rates` are for a batch of 256 where `linear_rule` holds."""

    optimizer: str
    rates: tuple[float, ...]
    linear_rule: bool
    batch_size: int
    epochs: int
    weight_decays: tuple[float, ...] = (0.0,)
    milestones: tuple[float, ...] = ()
    """Shares of the epochs after which the rate falls to a tenth; without, it follows a cosine."""
    by_epoch: bool = False
    """The cosine falls after each epoch, not after each step."""
    warmup_epochs: int = 0
    norm: str = "none"
    """Of the features before the heads, shared by all: none, batch or layer, without weights."""
    last_blocks: int | None = None
    """Of a transformer, the blocks whose class tokens are the features; None: its own output."""


PRESETS = {
    "moco": Preset("sgd", (30.0,), False, 256, 100, milestones=(0.6, 0.8)),
    "simclr": Preset("nesterov", (0.1,), True, 4096, 90),
    "dino": Preset(
        "sgd", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), True, 1024, 100, by_epoch=True,
        last_blocks=4,
    ),
    "mae": Preset("lars", (0.1,), True, 16384, 90, warmup_epochs=10, norm="batch"),
    "lejepa": Preset(
        "adamw", (3e-4, 1e-3, 3e-3), False, 512, 100, weight_decays=(1e-6,), norm="layer",
        last_blocks=2,
    ),
}  # fmt: skip


def linear_sgd(
    task: Task,
    preset: str = "simclr",
    augmentation: bool = True,
    epochs: int | None = None,
    train_batch_size: int | None = None,
    rates: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
    last_blocks: Sequence[int] | None = None,
    seeds: int = 1,
) -> dict:
    """Top-1 accuracy after the last epoch of a linear head trained as a paper does it.

    All heads of the grid (rates x weight decays x numbers of last blocks) see the same batches and
    are one product. With more than one, a tenth of the training split is held out class by class,
    the head that does best on it after its last epoch is chosen, and trained again on all of it.

    | preset | features, norm | optimizer | rate | batch, epochs |
    |---|---|---|---|---|
    | moco | output | SGD 0.9 | 30, a tenth after 60 and 80 % | 256, 100 |
    | simclr | output | Nesterov 0.9 | 0.1 B/256, cosine | 4096, 90 |
    | dino | class tokens of 4 blocks; from width 768 on of one, and mean patch | SGD 0.9 | grid
      around 0.001 B/256, cosine by epoch | 1024, 100 |
    | mae | output, BatchNorm | LARS 0.9 | 0.1 B/256, 10 epochs warm-up, cosine | 16384, 90 |
    | lejepa | class tokens of 2 blocks, LayerNorm | AdamW | grid around 1e-3, cosine | 512, 100 |

    Args:
        task: network and images.
        preset: the paper.
        augmentation: crops of 8 to 100 % and, where it means the same, the mirror image, through
            the frozen network in every epoch, as in all papers; False: features of the whole
            images, computed once.
        epochs, train_batch_size, rates, weight_decays: instead of the preset's; batches are at most
            the training split.
        last_blocks: numbers of last blocks, each a candidate; of a transformer.
        seeds: of the heads' first weights, the order and the augmentation; from 2 on the deviation
            is given.

    Returns:
        `top1_percent`, of several seeds `sd_percent`, and the `protocol`.

    Raises:
        ValueError: an unknown preset, a value out of range, images without one label each, or a
            grid where no class has two samples. RuntimeError: the backbone changes meanwhile.

    Notes: the heads of a network without transformer blocks take its output. Under torchrun each
        rank computes its part of every batch's features; the heads are the same on all.

    Example:
        >>> from fastssl.evaluate import evaluate
        >>> found = evaluate(torch.nn.Flatten(), "digits", ["linear-sgd"], preset="moco", epochs=1)
        >>> found["linear-sgd"]["protocol"]["rates"]
        (30.0,)

    Paper: MoCo 1911.05722, SimCLR 2002.05709, DINO 2104.14294, MAE 2111.06377, LeJEPA 2511.08544
    (arXiv); rates beside the middle of a grid are ours.
    """
    if preset not in PRESETS:
        known = nearest(preset, PRESETS)
        raise ValueError(f"linear-sgd: preset must be a known one, got {preset!r}. {known}")
    check_one_label("linear-sgd", task.train, task.test)
    p = PRESETS[preset]
    given = {"epochs": epochs, "batch_size": train_batch_size}
    given |= {"rates": rates, "weight_decays": weight_decays}
    for name, value in given.items():
        if value is not None and (value < 1 if isinstance(value, int) else not value):
            raise ValueError(f"linear-sgd: {name} must be at least 1 or hold numbers, got {value}.")
    p = dataclasses.replace(p, **{key: v for key, v in given.items() if v is not None})
    net, blocks, columns = _features_of(task.network.backbone, p, last_blocks)
    grid = [(r, wd, n) for n in blocks for r in p.rates for wd in p.weight_decays]

    everything, held, about = torch.arange(len(task.train)), None, {}
    if len(grid) > 1:
        held = held_out(task.train.labels)
        if not held.any():
            raise ValueError(
                "linear-sgd: train_y must hold at least two samples of some class to choose among "
                f"{len(grid)} heads, got one of each. Give one rate."
            )

    def once(seed: int) -> dict[str, float]:
        chosen = grid[0]
        if held is not None:
            heads = _train(task, net, p, grid, columns, everything[~held], augmentation, seed)
            h, y = task.features("train", net)
            scores = [top1_percent(z, y[held]) for z in heads.predict(h[held])]
            chosen = grid[max(range(len(grid)), key=scores.__getitem__)]
            about.setdefault("held_out_top1_percent", []).append(
                {_named(setting): score for setting, score in zip(grid, scores, strict=True)}
            )
        heads = _train(task, net, p, [chosen], columns, everything, augmentation, seed)
        h, y = task.features("test", net)
        about.setdefault("chosen", []).append(_named(chosen))
        return {f"linear-{preset}": top1_percent(heads.predict(h)[0], y)}

    found = over_seeds(once, seeds)
    result = {"top1_percent": found["mean"]}
    if "sd" in found:
        result |= {"sd_percent": found["sd"], "top1_percent_by_seed": found["each"]}
    batch_size = min(p.batch_size, len(task.train))
    about |= {
        "preset": preset,
        **dataclasses.asdict(p),
        "batch_size": batch_size,
        "rate_times": batch_size / 256 if p.linear_rule else 1.0,
        "momentum": 0.9,
        "first_weights": "normal, deviation 0.01; bias 0",
        "augmentation": (
            str(task.inputs.training_view(task.train.source.mirror)) if augmentation else "none"
        ),
        "last_blocks": list(blocks),
        "mean_patch_token": isinstance(net, LastBlocks) and net.patch_mean,
        "epoch": "last",
        "heads": len(grid),
        "chosen_on": "no choice"
        if held is None
        else f"{int(held.sum())} of the {len(task.train)} training samples, held out",
        "fitted_on": len(task.train),
        "seeds": seeds,
    }
    return result | {"protocol": about}


def _named(setting: tuple[float, float, int | None]) -> str:
    rate, decay, blocks = setting
    return f"rate {rate:g}, weight decay {decay:g}" + (f", {blocks} blocks" if blocks else "")


def _features_of(backbone: nn.Module, p: Preset, last_blocks: Sequence[int] | None):
    """The network whose output the heads see, the candidates, and the columns each of them sees."""
    depth = len(transformer_blocks(backbone))
    if depth == 0 and last_blocks:
        raise ValueError(
            "linear-sgd: last_blocks needs a transformer with blocks, got "
            f"{type(backbone).__name__}. Leave it out."
        )
    if depth == 0 or not (last_blocks or p.last_blocks):
        return backbone, (None,), {}
    wide = getattr(backbone, "feature_dim", 0) >= 768 and p.last_blocks == 4  # DINO's ViT-B
    if not last_blocks:
        last_blocks = (1 if wide else min(p.last_blocks, depth),)
    net = LastBlocks(backbone, max(last_blocks), patch_mean=wide)
    return net, tuple(last_blocks), {n: (n + wide) / (max(last_blocks) + wide) for n in last_blocks}


def _train(
    task: Task,
    net: nn.Module,
    p: Preset,
    grid: list[tuple],
    columns: dict[int, float],
    positions: Tensor,
    augmentation: bool,
    seed: int,
) -> "Heads":
    """Heads for every setting of the grid, fitted on the training images at these positions."""
    batch_size = min(p.batch_size, len(positions))
    scale = batch_size / 256 if p.linear_rule else 1.0
    view = task.inputs.training_view(task.train.source.mirror)
    net.to(task.device)
    whole = None if augmentation else task.features("train", net)
    split, heads = task.train[positions], None
    with frozen(net):
        for epoch in range(p.epochs):
            order = epoch_order(len(positions), batch_size, seed=seed, epoch=epoch)
            if whole is None:
                numbers = [split.index[batch] for batch in order]
                pairs = task.view_batches(net, numbers, view, seed=seed, epoch=epoch)
            else:
                pairs = ((whole[0][positions[b]], whole[1][positions[b]]) for b in order)
            for step, (h, y) in enumerate(pairs):
                if heads is None:
                    classes = task.num_classes
                    heads = Heads(h.shape[1], classes, grid, columns, p, scale, seed, task.device)
                at = epoch if p.by_epoch or p.milestones else epoch + step / len(order)
                heads.step(h.to(task.device), y.to(task.device), rate_factor(p, at))
    return heads


def rate_factor(p: Preset, epoch: float) -> float:
    """Rate at this time over the base rate."""
    if p.milestones:
        return 0.1 ** sum(epoch >= share * p.epochs for share in p.milestones)
    warmup = min(p.warmup_epochs, p.epochs // 2)
    if epoch < warmup:
        return epoch / warmup
    return (1 + math.cos(math.pi * (epoch - warmup) / (p.epochs - warmup))) / 2


class Heads:
    """Linear heads on the same features, each with its own rate, decay and part of the columns.

    Weights lie side by side, (heads, classes, D), so that all logits are one product; optimizers
    see each head as parameters of their own, which are views of it.
    """

    def __init__(self, width, num_classes, grid, columns, preset, scale=1.0, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        first = 0.01 * torch.randn(num_classes, width, generator=generator)
        self.weight = first.repeat(len(grid), 1, 1).to(device)
        self.bias = torch.zeros(len(grid), num_classes, device=device)
        self.mask = torch.ones(len(grid), 1, width, device=device)
        for head, (_, _, blocks) in enumerate(grid):
            if blocks in columns:  # fewer blocks: the first columns alone
                self.mask[head, :, round(columns[blocks] * width) :] = 0
        self.weight *= self.mask
        self.norm = {
            "none": nn.Identity(),
            "batch": nn.BatchNorm1d(width, affine=False, eps=1e-6),
            "layer": nn.LayerNorm(width, elementwise_affine=False),
        }[preset.norm].to(device)
        self.own = [
            (nn.Parameter(w), nn.Parameter(b)) for w, b in zip(self.weight, self.bias, strict=True)
        ]
        groups = [
            {"params": list(own), "lr": scale * rate, "weight_decay": decay}
            for own, (rate, decay, _) in zip(self.own, grid, strict=True)
        ]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
            "nesterov": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
            "lars": lambda: LARS(groups, lr=0.1, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups),
        }[preset.optimizer]()

    def step(self, h: Tensor, y: Tensor, factor: float) -> None:
        """One step of every head on features h (B, D) and labels y (B,)."""
        with torch.enable_grad():
            weight, bias = self.weight.requires_grad_(), self.bias.requires_grad_()
            logits = self._logits(h)
            labels = y[:, None].expand(logits.shape[:2])
            # The sum over heads: each has the gradient that it would have alone.
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(weight)
            dw, db = torch.autograd.grad(loss, (weight, bias))
        self.weight, self.bias = weight.detach(), bias.detach()
        dw *= self.mask
        for (w, b), w_grad, b_grad in zip(self.own, dw, db, strict=True):
            w.grad, b.grad = w_grad, b_grad
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, h: Tensor) -> Tensor:
        """Most likely classes (heads, N) of features h (N, D)."""
        self.norm.eval()
        logits = [self._logits(rows.to(self.weight.device)) for rows in h.split(4096)]
        return torch.cat(logits).argmax(2).T.cpu()

    def _logits(self, h: Tensor) -> Tensor:
        """(B, heads, classes) by one product."""
        out = self.norm(h) @ self.weight.flatten(0, 1).T
        return out.unflatten(1, self.bias.shape) + self.bias
