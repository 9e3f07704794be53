"""VICReg: two views agree, every dimension varies over the batch, and no two of them correlate.

Paper: Bardes, Ponce, LeCun, "VICReg: variance-invariance-covariance regularization for
self-supervised learning", arXiv 2105.04906.

Loss: of the embeddings z, z' (B, D) of two views, not normalised,
    lambda mean((z - z')^2) + mu v + nu (c(z) + c(z'))
    v: the mean over dimensions of max(0, 1 - sqrt(var + 1e-4)), the mean of both views'
    c(z): the sum of the squared covariances of different dimensions, over D
Variance keeps the images apart, covariance the dimensions; both are over the batch of all ranks.

Figures: ImageNet, linear, 1000 epochs: ResNet-50 73.2, twice as wide 75.5, ResNet-200 twice as
wide 77.3 [authors' release]. CIFAR-10, ResNet-18, 1000 epochs: linear 92.1 [re-implementation].

What differs: as in the released code invariance is a mean over the dimensions, not a sum, and
variance the mean of the two views'; images of up to 64 pixels have views of one kind with milder
crops, no blur and no solarisation.
"""

from torch import Tensor, nn

from ..augment import View, byol, small
from ..data import Batch
from ..losses import VICRegLoss
from ..models import mlp
from .blocks import spread


class VICReg(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    sim: lambda, the weight of invariance.
    std: mu, the weight of variance.
    cov: nu, the weight of covariance.
    hidden_dim: width of the two hidden layers of the expander h.
    out_dim: width of the embeddings z.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sim: float = 25.0,
        std: float = 25.0,
        cov: float = 1.0,
        hidden_dim: int = 8192,
        out_dim: int = 8192,
    ):
        super().__init__()
        self.backbone = backbone
        dims = [backbone.feature_dim, hidden_dim, hidden_dim, out_dim]
        self.expander = mlp(dims, bias=False)  # a last bias would drop out of all three terms
        self.vicreg = VICRegLoss(sim, std, cov)

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return byol(image_size, flip=source.mirror)
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.expander(self.backbone(x)) for x in batch.views)  # z = h(f(x)), (B, out_dim)
        loss = self.vicreg(z0, z1)  # eq. 6
        return loss, {"std": spread(z0)}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """y = f(x), (B, feature_dim): the representation before the expander."""
        return self.backbone(x)
