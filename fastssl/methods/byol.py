"""BYOL: the student predicts what its own moving average makes of another view; no negatives.

Paper: Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning",
arXiv 2006.07733.

Loss: with the prediction p = q(g(f(x))) of one view and the teacher's projection t = g(f(x)) of
the other, which takes no gradient:
    |p / |p| - t / |t||^2 = 2 - 2 cos(p, t)
the mean over images and both directions. The teacher is the student's moving average, whose m
rises to 1. Nothing holds images apart: the predictor and the slow teacher keep them from
collapsing.

Figures: ImageNet, ResNet-50, 200 epochs: linear 71.8 [re-implementation]. CIFAR-10, ResNet-18,
1000 epochs: linear 92.6 [re-implementation].

What differs: both views go through a network in one forward, so that its BatchNorms see them
together; the loss is the mean over the two directions (the paper's sum is twice that); images of
up to 64 pixels have views of one kind with milder crops, no blur and no solarisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schedules
from ..augment import View, byol, small
from ..data import Batch
from ..models import mlp
from ..optim import EMA
from .blocks import Branch, batch_mean, encode, spread


class BYOL(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    momentum: m of the teacher's average at the start; it rises to 1 by a cosine.
    hidden_dim: width of the hidden layers of the projector g and the predictor q.
    out_dim: width of the projections z.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        momentum: float = 0.99,
        hidden_dim: int = 4096,
        out_dim: int = 256,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.feature_dim, hidden_dim, out_dim])
        self.predictor = mlp([out_dim, hidden_dim, out_dim])
        # Its BatchNorms, in training mode, have statistics of their own.
        self.ema = EMA(Branch(self.backbone, self.projector), momentum, buffers="keep")
        self.momentum = momentum

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return byol(image_size, flip=source.mirror)
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = encode(self.ema.model, batch.views)  # z = g(f(x)), (B, out_dim) each
        p0, p1 = self.predictor(torch.cat(z)).chunk(2)
        t0, t1 = encode(self.ema, batch.views)  # the teacher's, without gradient
        loss = (_distance(p0, t1) + _distance(p1, t0)) / 2  # eq. 2
        return loss, {"std": spread(z[0])}

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.momentum = schedules.cosine(step / total_steps, self.momentum, 1.0)
        self.ema.update()

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)


def _distance(p: Tensor, t: Tensor) -> Tensor:
    """|p / |p| - t / |t||^2 = 2 - 2 cos(p, t), the mean over the rows."""
    return batch_mean(2 - 2 * F.cosine_similarity(p.float(), t.float(), dim=1))
