"""What several methods are made of."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def held(weight: Tensor, hold: bool) -> Tensor:
    """The weight, with a gradient of zero if it is to be held: DistributedDataParallel waits for a
    gradient of every parameter, so that none at all will not do."""
    return weight.detach() + 0 * weight if hold else weight


def spread(z: Tensor) -> Tensor:
    """Deviation of the normalised rows of z (B, D) times sqrt(D), the scalar `std` of `health`: 1
    over the whole sphere, 0 where all are equal."""
    return F.normalize(z.detach().float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
