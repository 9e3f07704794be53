"""SimCLR: two views of an image attract, all other images in the batch repel.

Paper: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
representations", arXiv 2002.05709.

Loss: NT-Xent. For each of the 2 B views i of B images, with its other view p, and z normalised,
s_ij = z_i . z_j / tau:
    l_i = -log(exp(s_ip) / sum over j != i of exp(s_ij))
and the mean over i: every other view in the batch, of all ranks, is a negative.

Figures: ImageNet, linear: ResNet-50 64.5 (100 epochs), 69.1 (1000); twice and four times as wide
74.2 and 76.6 [authors' release]. CIFAR-10, ResNet-18, 1000 epochs: linear about 91 [authors'
release], 90.7 [re-implementation].

What differs: the loss is the mean over the 2 B views (the released code sums the two halves); the
head has no normalisation after its last layer; images of up to 64 pixels get milder crops and no
blur.
"""

from torch import Tensor, nn

from ..augment import View, simclr, small
from ..data import Batch
from ..losses import NTXentLoss
from ..models import mlp
from .blocks import spread


class SimCLR(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    temperature: tau of the NT-Xent loss.
    hidden_dim: width of the hidden layer of the head g; None: that of the features.
    out_dim: width of the projections z.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        hidden_dim: int | None = None,
        out_dim: int = 128,
    ):
        super().__init__()
        self.backbone = backbone
        D = backbone.feature_dim
        self.head = mlp([D, hidden_dim or D, out_dim])
        self.ntxent = NTXentLoss(temperature=temperature)

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return [simclr(image_size, flip=source.mirror)] * 2
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.head(self.backbone(x)) for x in batch.views)  # z = g(f(x)), (B, out_dim)
        loss = self.ntxent(z0, z1)  # eq. 1, mean over both views
        return loss, {"std": spread(z0)}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the head."""
        return self.backbone(x)
