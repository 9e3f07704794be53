"""MoCo v3: each view's prediction finds the other view's key among those of the batch.

Paper: Chen, Xie, He, "An empirical study of training self-supervised vision transformers",
arXiv 2104.02057.

Loss: InfoNCE both ways, with the keys of the batch. q = p(g(f(x))) of the trained network, k =
g(f(x)) of its moving average, normalised, both of both views:
    ctr(q, k) = -2 tau log(exp(q_i . k_i / tau) / sum over j of exp(q_i . k_j / tau)),   mean over i
    loss = ctr(q0, k1) + ctr(q1, k0)
Keys come from all ranks and take no gradient.

Figures: ImageNet, linear: ResNet-50 68.9, 72.8, 74.6 (100, 300, 1000 epochs); ViT-S 73.2, ViT-B
76.7; fine-tuned ViT-S 81.4, ViT-B 83.2 [authors' release]. CIFAR-10, ResNet-18, 1000 epochs:
linear 93.1 [re-implementation].

What differs: the heads are those of the paper's transformers for every backbone; images of up to 64
pixels have views of one kind with milder crops, no blur and no solarisation.
"""

from torch import Tensor, nn

from .. import schedules
from ..augment import View, byol, small
from ..data import Batch
from ..losses import InfoNCELoss
from ..models import mlp
from ..optim import EMA
from .blocks import Branch, spread


class MoCoV3(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    temperature: tau of the InfoNCE loss.
    momentum: m of the key encoder's average at the start; it rises to 1 by a cosine.
    freeze_patches: keep a transformer's patch embedding, its `patch_embed`, as it was initialised.
    hidden_dim: width of the hidden layers of the projector g (two) and the predictor p (one).
    out_dim: width of queries and keys.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patches: bool = True,
        hidden_dim: int = 4096,
        out_dim: int = 256,
    ):
        super().__init__()
        self.backbone = backbone
        dims = [backbone.feature_dim, hidden_dim, hidden_dim, out_dim]
        self.projector = mlp(dims, last_norm="bn_noaffine")
        self.predictor = mlp([out_dim, hidden_dim, out_dim], last_norm="bn_noaffine")
        if freeze_patches and hasattr(backbone, "patch_embed"):
            backbone.patch_embed.requires_grad_(False)
        # Its BatchNorms, in training mode, have statistics of their own.
        self.ema = EMA(Branch(self.backbone, self.projector), buffers="keep")
        self.nce = InfoNCELoss(temperature)
        self.momentum = momentum

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        if image_size > 64:
            return byol(image_size, flip=source.mirror)
        return [small(image_size, source.channels, flip=source.mirror)] * 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        q0, q1 = (self.predictor(self.ema.model(x)) for x in batch.views)  # p(g(f(x)))
        k0, k1 = (self.ema(x) for x in batch.views)  # without gradient
        loss = 2 * self.nce.temperature * (self.nce(q0, k1) + self.nce(q1, k0))  # algorithm 1
        return loss, {"std": spread(q0)}

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.momentum = schedules.cosine(step / total_steps, self.momentum, 1.0)
        self.ema.update()

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)
