"""SimCLRv2: SimCLR with a deeper head, the first layer of which is kept for the labels to come.

Paper: Chen, Kornblith, Swersky, Norouzi, Hinton, "Big self-supervised models are strong
semi-supervised learners", arXiv 2006.10029.

Loss: NT-Xent. For each of the 2 B views i with its partner p, l_ij = z_i . z_j / temperature of
normalised z: log(sum over j != i of e^l_ij) - l_ip, and the mean over i. With a memory the sum also
runs over the keys in it: what a slowly moving average of the network made of earlier images.

Three steps make the method: this one on all images; `evaluate --protocol finetune --from-head 1`
on few labels, which keeps f and the first layer of the head; and `distill`, in which the
fine-tuned network labels all images for a student.

Figures: ImageNet, top-1 with 1 % of the labels, 10 %, all, and linear: ResNet-50 57.9, 68.4, 76.3,
71.7; with selective kernels 64.5, 72.1, 78.7, 74.6; ResNet-152, three times as wide, with selective
kernels 74.9, 80.1, 83.1, 79.8 [authors' release]. ResNet-50 distilled from the last: 73.9 (1 %),
77.5 (10 %) [secondary].

What differs: as in `simclr`. The networks are those of timm (`timm:skresnet50`), none three times
as wide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import FeatureQueue
from ..augment import View, simclr, small
from ..data import Batch
from ..dist import rank_among, resolve_levels, world_size
from ..models import mlp
from ..ops import info_nce
from ..optim import EMA
from .blocks import Branch, spread


class SimCLRv2(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    temperature: tau of the NT-Xent loss.
    hidden_dim: width of the two hidden layers of the head g; None: that of the features.
    out_dim: width of the projections z.
    queue_size: keys of earlier images that are negatives too; 0: no memory. Paper: 65536.
    momentum: of the average that makes these keys.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        queue_size: int = 0,
        momentum: float = 0.999,
    ):
        super().__init__()
        self.backbone, self.temperature = backbone, temperature
        D = backbone.feature_dim
        self.head = mlp([D, hidden_dim or D, hidden_dim or D, out_dim])
        self.ema = self.queue = None
        if queue_size:
            # Its BatchNorms, in training mode, have statistics of their own.
            self.ema = EMA(Branch(self.backbone, self.head), momentum, buffers="keep")
            self.queue = FeatureQueue(queue_size, out_dim)

    @property
    def teacher(self) -> nn.Module | None:
        return self.ema and self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return [simclr(image_size, flip=source.mirror)] * 2
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = torch.cat([self.head(self.backbone(x)) for x in batch.views])  # g(f(x)), (2 B, out_dim)
        z = F.normalize(z.float(), dim=1)
        B, options = len(batch.index), {"temperature": self.temperature}
        partner = torch.arange(2 * B, device=z.device).roll(B)
        if self.queue is None:
            loss = info_nce(z, target=partner, **options)  # eq. 1
        else:
            # Each rank brings its rows and its share of the queue, which all have, to the keys.
            levels = resolve_levels("SimCLRv2")
            rank, ranks = rank_among(levels), world_size(levels)
            keys = torch.cat([z, self.queue.features[rank::ranks]])
            ids = torch.arange(len(keys), device=z.device) * ranks + rank  # no row meets itself
            loss = info_nce(z, keys, target=partner, q_ids=ids[: 2 * B], k_ids=ids, **options)
            self.k = F.normalize(self.ema(batch.views[0]).float(), dim=1)  # without gradient
        return loss, {"std": spread(z[:B])}

    def after_step(self, step: int, total_steps: int) -> None:
        if self.queue is not None:
            self.ema.update()
            self.queue.enqueue(self.k)

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the head."""
        return self.backbone(x)
