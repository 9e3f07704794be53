"""What several methods are made of."""

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import View, small
from ..dist import resolve_levels
from ..losses.ranks import global_mean
from ..models import mlp
from ..ops import effective_prototypes, prototype_usage


class Branch(nn.Module):
    """g(f(x)), the part of which a teacher is an average."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def encode(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """The network's output for every view, with one forward for all views of a size.

    Args:
        network: (N, C, s, s) to (N, ...), for each s among the views.
        views: V of (B, C, s, s).

    Returns:
        V of (B, ...), in the order of the views.

    Notes: BatchNorm in training mode takes its statistics over all views of a size together.
    """
    sizes: dict[torch.Size, list[int]] = {}
    for v, x in enumerate(views):
        sizes.setdefault(x.shape[2:], []).append(v)
    out = {}
    for numbers in sizes.values():
        y = network(torch.cat([views[v] for v in numbers]))
        out |= zip(numbers, y.chunk(len(numbers)), strict=True)
    return [out[v] for v in range(len(views))]


def batch_mean(x: Tensor, part: Tensor | None = None) -> Tensor:
    """The mean of x (B,) over the rows of all ranks that take part (B,), equal on each rank; 0 if
    none does. None: all do."""
    part = torch.ones_like(x, dtype=torch.bool) if part is None else part
    return global_mean((x * part).sum(), part.sum(), resolve_levels("batch_mean"))


def multi_crop(
    preset: Callable[..., list[View]],
    image_size: int,
    source,
    local_views: int,
    local_size: int | None,
    *,
    whole: tuple[float, float],
    part: tuple[float, float],
) -> list[View]:
    """Two large crops, then the local ones: the preset's above 64 pixels, below it milder ones.

    Args:
        preset: `fastssl.augment.dino`, or another of its arguments.
        local_size: side of the local views; None: 3/7 of image_size above 64 pixels, else half.
        whole, part: shares of the area that large and local crops have up to 64 pixels.
    """
    flip = source.mirror
    if image_size > 64:
        return preset(
            image_size, local_size or image_size * 3 // 7, local_views=local_views, flip=flip
        )
    large = small(image_size, source.channels, flip=flip, scale=whole)
    local = small(local_size or image_size // 2, source.channels, flip=flip, scale=part)
    return [large] * 2 + [local] * local_views


def held(weight: Tensor, hold: bool) -> Tensor:
    """The weight, with a gradient of zero if it is to be held: DistributedDataParallel waits for a
    gradient of every parameter, so that none at all will not do."""
    return weight.detach() + 0 * weight if hold else weight


def caption_ids(captions: Sequence[str], device: torch.device) -> Tensor:
    """(B,) int32, equal for equal captions, on all ranks."""
    return torch.tensor([crc32(c.encode()) - 2**31 for c in captions], dtype=torch.int32).to(device)


def dino_projector(dims: Sequence[int], norm: str | None = None) -> nn.Sequential:
    """An MLP with GELU, of DINO's small random weights: (B, dims[0]) to (B, dims[-1])."""
    projector = mlp(dims, norm=norm, act="gelu")
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return projector


class Prototypes(nn.Linear):
    """Cosines of z (B, D) with K prototypes: a weight-normed layer whose magnitudes are 1."""

    def forward(self, z: Tensor, hold: bool = False) -> Tensor:
        return F.linear(F.normalize(z), F.normalize(held(self.weight, hold)))


class PrototypeHead(nn.Module):
    """DINO's: z = g(h) and the scores of its prototypes, (N, D) to (N, dims[-1]) and (N, K)."""

    def __init__(self, dims: Sequence[int], K: int):
        super().__init__()
        self.projector = dino_projector(dims)
        self.prototypes = Prototypes(dims[-1], K, bias=False)

    def forward(self, h: Tensor, hold: bool = False) -> tuple[Tensor, Tensor]:
        z = self.projector(h)
        return z, self.prototypes(z, hold)


def teacher_scalars(t: Tensor, dino: nn.Module, tau_t: float) -> dict[str, Tensor | float]:
    """What `health` and monitors read of scores t (N, K) of a teacher and of their `DINOLoss`, to
    be called before the loss moves its centre."""
    bias = -dino.center.flatten() / tau_t  # stays 0 with sinkhorn
    return {
        "prototypes": t.shape[1],
        "effective_prototypes": effective_prototypes(prototype_usage(t, tau_t, bias)),
        "student_temperature": dino.student_temp,
        "teacher_temperature": tau_t,
    }


def spread(z: Tensor) -> Tensor:
    """Deviation of the normalised rows of z (B, D) times sqrt(D), the scalar `std` of `health`: 1
    over the whole sphere, 0 where all are equal."""
    return F.normalize(z.detach().float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
