"""MoCo v2: a query finds its own key among a queue of keys that a slowly moving encoder made.

Paper: Chen, Fan, Girshick, He, "Improved baselines with momentum contrastive learning",
arXiv 2003.04297; the queue and the moving encoder: He et al., arXiv 1911.05722.

Loss: InfoNCE over a queue. With the query q of one view, the key k that the moving encoder makes
of the other, and the keys n of earlier steps, all normalised:
    l = -log(exp(q . k / tau) / (exp(q . k / tau) + sum over n of exp(q . n / tau)))
and the mean over the batch. Keys and queue take no gradient; the key encoder is theta_k = m
theta_k + (1 - m) theta_q after each step, and the oldest keys of the queue make room for k.

Figures: ImageNet, ResNet-50, linear: 67.5 (200 epochs), 71.1 (800) [authors' release]. CIFAR-10,
ResNet-18, 1000 epochs: linear 92.9 [re-implementation].

What differs: no batch is shuffled over GPUs; BatchNorm takes its statistics over the batch of all
ranks, of queries and keys apart. Queue and key encoder move after the optimizer, not before the
loss. Images of up to 64 pixels get milder crops and no blur.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import FeatureQueue
from ..augment import View, moco_v2, small
from ..data import Batch
from ..losses import QueueNCELoss
from ..models import mlp
from ..optim import EMA
from .blocks import Branch, spread


class MoCoV2(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    temperature: tau of the InfoNCE loss.
    momentum: m of the key encoder's average; 0.99 for runs of up to 10,000 steps.
    queue_size: K, the keys of earlier steps that are negatives.
    hidden_dim: width of the hidden layer of the head g; None: that of the features.
    out_dim: width of queries and keys.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int = 65536,
        hidden_dim: int | None = None,
        out_dim: int = 128,
    ):
        super().__init__()
        self.backbone = backbone
        D = backbone.feature_dim
        self.head = mlp([D, hidden_dim or D, out_dim], norm=None)
        # Its BatchNorms, in training mode, have statistics of their own.
        self.ema = EMA(Branch(self.backbone, self.head), momentum, buffers="keep")
        self.queue = FeatureQueue(queue_size, out_dim)
        self.nce = QueueNCELoss(temperature, normalize=False)

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return [moco_v2(image_size, flip=source.mirror)] * 2
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x_q, x_k = batch.views
        q = F.normalize(self.ema.model(x_q).float(), dim=1)  # (B, out_dim)
        self.k = F.normalize(self.ema(x_k).float(), dim=1)  # without gradient
        loss = self.nce(q, self.k, self.queue.features)  # eq. 1
        return loss, {"std": spread(q)}

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.update()
        self.queue.enqueue(self.k)

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the head."""
        return self.backbone(x)
