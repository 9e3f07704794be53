"""SwAV: each crop predicts to which clusters the two large ones belong, found as it goes.

Paper: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
arXiv 2006.09882.

Loss: the code q_a of large crop a is Sinkhorn-Knopp's assignment of its scores s_a = C z to the K
prototypes: softmax(s_a / epsilon + bias) with the bias that gives each prototype as much of the
batch, and of the queue. Each other crop v predicts it:
    loss = mean over a and v != a of -q_a . log softmax(s_v / tau)
Codes take no gradient; the rows of C have unit length.

Figures: ImageNet, ResNet-50, linear: 72.1, 73.9, 74.6, 75.3 (100, 200, 400, 800 epochs of batch
4096); 72.7 and 74.3 (200 and 400 of batch 256); 70.1 without small crops (400) [authors' release].
CIFAR-10, ResNet-18, 1000 epochs, two crops: linear 89.2 [re-implementation].

What differs: the queues are filled from the first step, and take part once they are full and
wait_epochs are over (the released code fills them from then on); prototypes are normalised after a
step, not before the next; images of up to 64 pixels have milder colours and no blur.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import View, swav
from ..data import Batch
from ..dist import rank_among, resolve_levels, world_size
from ..losses import SwaVLoss
from ..models import mlp
from ..ops import effective_prototypes, prototype_usage
from ..queue import FeatureQueue
from .blocks import encode, held, multi_crop, spread


class SwAV(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim), for both sizes of the crops.
    temperature: tau of the predictions.
    epsilon: of Sinkhorn-Knopp; the lower, the sharper are the codes.
    iterations: of Sinkhorn-Knopp.
    hidden_dim: width of the hidden layer of the projector g.
    out_dim: width of the projections z.
    num_prototypes: K.
    freeze_steps: so many steps the prototypes stay what they are.
    queue_size: past projections of each large crop that take part in the balance; 0 for none.
    wait_epochs: so long they do not.
    local_views: small crops of small parts of an image, which have no codes of their own.
    local_size: their side; None: 3/7 of image_size above 64 pixels, else half of it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        hidden_dim: int = 2048,
        out_dim: int = 128,
        num_prototypes: int = 3000,
        freeze_steps: int = 313,
        queue_size: int = 3840,
        wait_epochs: float = 15.0,
        local_views: int = 6,
        local_size: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.feature_dim, hidden_dim, out_dim])
        self.prototypes = nn.Linear(out_dim, num_prototypes, bias=False)  # C, rows of unit length
        self._normalize()
        queues = [FeatureQueue(queue_size, out_dim, seed=v) for v in range(2) if queue_size]
        self.queues = nn.ModuleList(queues)
        self.swav = SwaVLoss(temperature, iterations, epsilon)
        self.freeze_steps, self.wait_epochs = freeze_steps, wait_epochs
        self.local_views, self.local_size = local_views, local_size

    def views(self, image_size: int, source) -> list[View]:
        return multi_crop(
            swav, image_size, source, self.local_views, self.local_size,
            whole=(0.3, 1.0), part=(0.1, 0.3),
        )  # fmt: skip

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        network = nn.Sequential(self.backbone, self.projector)
        z = F.normalize(torch.stack(encode(network, batch.views)), dim=2)  # (V, B, out_dim)
        C = held(self.prototypes.weight, batch.step < self.freeze_steps)
        s = F.linear(z, C)  # z^T C, (V, B, K)
        loss = self.swav(s[:2], s[2:], self._queued(batch))  # eq. 2, codes by eq. 3 to 5
        for queue, rows in zip(self.queues, z.detach(), strict=False):
            queue.enqueue(rows)
        epsilon = self.swav.sinkhorn_epsilon
        usage = prototype_usage(s[:2].detach().flatten(0, 1), epsilon)
        return loss, {
            "std": spread(z[0]),
            "prototypes": len(C),
            "effective_prototypes": effective_prototypes(usage),
            "student_temperature": self.swav.temperature,
            "teacher_temperature": epsilon,
        }

    @torch.no_grad()
    def _queued(self, batch: Batch) -> list[Tensor] | None:
        """Scores by the prototypes of now of this rank's share of each queue, (Q / ranks, K)."""
        levels = resolve_levels("SwAV")
        rank, ranks = rank_among(levels), world_size(levels)
        seen = batch.step * ranks * len(batch.index)
        size = len(self.queues[0].features) if self.queues else torch.inf
        if seen < size or batch.epoch < self.wait_epochs:
            return None
        return [self.prototypes(queue.features[rank::ranks]) for queue in self.queues]

    @torch.no_grad()
    def _normalize(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))

    def after_step(self, step: int, total_steps: int) -> None:
        self._normalize()

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)
