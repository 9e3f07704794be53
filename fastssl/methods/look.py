"""LOOK: an image agrees with most of its nearest labelled neighbours, not with all of its class.

Paper: Feng, Jiang, Tang, Jin, Gao, "Rethinking supervised pre-training for better downstream
transferring", arXiv 2110.06014.

Loss: q = n(g(f(x))) of an image of class y meets a queue of keys k_j of classes y_j, which a slowly
moving encoder made; n divides by the length. N is the set of the k keys of largest q . k_j, without
those of the image itself. The loss is that of a kNN classifier that leaves the image out,

    L = -log (sum_{j in N, y_j = y} e^(q . k_j / tau) / sum_{j in N} e^(q . k_j / tau)).

Where no neighbour is of the class, the nearest key of the class joins N.

What differs: the queue alone gives neighbours, from one view of each image; images without a label,
and those whose class the queue does not hold yet, take no part. k, tau, queue and head are not
those of the paper where it does not tell them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import View, mae, small
from ..data import Batch
from ..models import mlp
from ..optim import EMA
from ..queue import FeatureQueue
from .blocks import Branch, batch_mean, spread


class LOOK(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    k: neighbours that an image is to agree with; far fewer than the queue holds of a class.
    temperature: tau.
    momentum: m of the key encoder's average; 0.99 for runs of up to 10,000 steps.
    queue_size: keys of earlier steps.
    hidden_dim: width of the hidden layer of the head g.
    out_dim: width of queries and keys.
    """

    needs_labels = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        k: int = 400,
        temperature: float = 0.1,
        momentum: float = 0.999,
        queue_size: int = 65536,
        hidden_dim: int = 2048,
        out_dim: int = 128,
    ):
        super().__init__()
        if not 1 <= k < queue_size:
            raise ValueError(
                f"LOOK: k must be from 1 to less than queue_size, which is {queue_size}, got {k}. "
                "Take a fraction of what the queue holds of a class."
            )
        self.backbone = backbone
        self.head = mlp([backbone.feature_dim, hidden_dim, out_dim])
        # Its BatchNorms, in training mode, have statistics of their own.
        self.ema = EMA(Branch(self.backbone, self.head), momentum, buffers="keep")
        self.queue = FeatureQueue(queue_size, out_dim, labels=True, ids=True)
        self.k, self.temperature = k, temperature

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return [mae(image_size, flip=source.mirror)]
        return [small(image_size, source.channels, flip=source.mirror)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch.views[0], batch.label
        q = F.normalize(self.ema.model(x).float(), dim=1)  # (B, out_dim)
        self.key = F.normalize(self.ema(x).float(), dim=1), y, batch.index  # without gradient
        near, counts = self._neighbours(q.detach(), y, batch.index)  # (B, k + 1)
        logits = (q.unsqueeze(1) * self.queue.features[near]).sum(2) / self.temperature
        same = counts & (self.queue.labels[near] == y.unsqueeze(1))
        part = same.any(dim=1)  # of the others both sums are taken over all, and the loss is 0
        sums = [logits.masked_fill(~(m | ~part.unsqueeze(1)), -torch.inf) for m in (counts, same)]
        loss = sums[0].logsumexp(dim=1) - sums[1].logsumexp(dim=1)
        return batch_mean(loss, part), {"std": spread(q)}

    @torch.no_grad()
    def _neighbours(self, q: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the queue: the k nearest and the nearest of the class, and which of them count:
        not the image itself nor rows without a label, and the last only if none before it is of
        the class."""
        labels, ids = self.queue.labels, self.queue.ids
        cosines = (q @ self.queue.features.T).masked_fill_(labels < 0, -torch.inf)  # (B, K)
        cosines.masked_fill_(ids == index.unsqueeze(1), -torch.inf)
        nearest, near = cosines.topk(self.k, dim=1)
        lacks = (nearest == -torch.inf) | (labels[near] != y.unsqueeze(1))
        best, last = cosines.masked_fill_(labels != y.unsqueeze(1), -torch.inf).max(1, keepdim=True)
        counts = (best > -torch.inf) & lacks.all(dim=1, keepdim=True)
        return torch.cat([near, last], 1), torch.cat([nearest > -torch.inf, counts], 1)

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.update()
        features, labels, ids = self.key
        self.queue.enqueue(features, labels, ids)

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the head."""
        return self.backbone(x)
