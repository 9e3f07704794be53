"""Barlow Twins: the cross-correlation of two views' projections is drawn to the identity.

Paper: Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: self-supervised learning via redundancy
reduction", arXiv 2103.03230.

Loss: with C the correlations, over the batch of all ranks, of the dimensions of one view's
projections with those of the other's,
    loss = sum over i of (1 - C_ii)^2 + lambda sum over i != j of C_ij^2
The diagonal makes views agree, the rest keeps dimensions from saying the same.

Figures: ImageNet, ResNet-50, linear: 73.5 (1000 epochs) [authors' release]; 70.8 (300), 71.8
(1000) [re-implementation]. CIFAR-10, ResNet-18, 1000 epochs: linear 92.1 [re-implementation].

What differs: images of up to 64 pixels have views of one kind with milder crops, no blur and no
solarisation.
"""

from torch import Tensor, nn

from ..augment import View, byol, small
from ..data import Batch
from ..losses import BarlowTwinsLoss
from ..models import mlp
from .blocks import spread


class BarlowTwins(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    lam: lambda, the weight of what is off the diagonal.
    hidden_dim: width of the two hidden layers of the projector g.
    out_dim: width of the projections z; the loss is a sum over its square.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        lam: float = 0.0051,
        hidden_dim: int = 8192,
        out_dim: int = 8192,
    ):
        super().__init__()
        self.backbone = backbone
        dims = [backbone.feature_dim, hidden_dim, hidden_dim, out_dim]
        self.projector = mlp(dims, bias=False)  # the loss takes the mean off
        self.barlow_twins = BarlowTwinsLoss(lam)

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return byol(image_size, flip=source.mirror)
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.projector(self.backbone(x)) for x in batch.views)  # z = g(f(x))
        loss = self.barlow_twins(z0, z1)  # eq. 1, C of eq. 2
        return loss, {"std": spread(z0)}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)
