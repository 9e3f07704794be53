"""SEER: SwAV for very many images that nobody chose, with more prototypes and sharper codes.

Paper: Goyal et al., "Self-supervised pretraining of visual features in the wild", arXiv 2103.01988;
at ten billion parameters, with fairness and robustness: Goyal et al., arXiv 2202.08360.

Loss: SwAV's. The code q_a of a large crop a is Sinkhorn-Knopp's assignment of its scores s_a to
the prototypes, softmax(s_a / epsilon + bias), balanced so that prototype k has a share r_k of the
batch; each other crop v predicts it: the mean over a and v != a of -q_a . log softmax(s_v / tau).
r_k is 1 / K, or, of a long tail, proportional to (k + 1)^-exponent: equal shares cut the frequent
kinds of image into many prototypes and force the rare ones together.

Figures: a billion images, each seen once, then fine-tuned on ImageNet at 384 pixels, top-1:
RegNetY-32GF (156 M parameters) 83.4, 64GF 84.0, 128GF 84.5, 256GF (1.5 B) 85.2, 10 B 85.8
[authors' release]. The same five on Places205: 67.5, 67.4, 67.5, 67.7, 69.0 [authors' release].

What differs: as in `swav`. Weights in shards are `parallel=fsdp`, sixteen bits `precision`; for
activation checkpointing there is `chunk`.
"""

from torch import nn

from ..augment import View, swav
from ..losses import power_law_marginal
from ..models import mlp
from .swav import SwAV


class SEER(SwAV):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim), for both sizes of the crops.
    temperature: tau of the predictions.
    epsilon: of Sinkhorn-Knopp; the lower, the sharper are the codes.
    iterations: of Sinkhorn-Knopp.
    hidden_dim: width of the two hidden layers of the projector g.
    out_dim: width of the projections z.
    num_prototypes: K, many more than there are classes.
    exponent: of the prototypes' shares of a batch, (k + 1)^-exponent; 0: equal shares.
    freeze_steps: so many steps the prototypes stay what they are.
    local_views: small crops of small parts of an image, which have no codes of their own.
    local_size: their side; None: 3/5 of image_size above 64 pixels, else half of it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.03,
        iterations: int = 10,
        hidden_dim: int = 8192,
        out_dim: int = 256,
        num_prototypes: int = 16000,
        exponent: float = 0.0,
        freeze_steps: int = 313,
        local_views: int = 4,
        local_size: int | None = None,
    ):
        super().__init__(
            backbone,
            temperature=temperature,
            epsilon=epsilon,
            iterations=iterations,
            out_dim=out_dim,
            num_prototypes=num_prototypes,
            freeze_steps=freeze_steps,
            queue_size=0,
            local_views=local_views,
            local_size=local_size,
        )
        self.projector = mlp([backbone.feature_dim, hidden_dim, hidden_dim, out_dim], norm=None)
        if exponent:
            self.swav.marginal = power_law_marginal(num_prototypes, exponent)

    def views(self, image_size: int, source) -> list[View]:
        if image_size <= 64:
            return super().views(image_size, source)
        local_size = self.local_size or image_size * 3 // 5
        return swav(image_size, local_size, local_views=self.local_views, flip=source.mirror)
