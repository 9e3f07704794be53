"""LeJEPA: views of an image agree, and their projections are normal along every direction.

Paper: Balestriero, LeCun, "LeJEPA: provable and scalable self-supervised learning without the
heuristics", arXiv 2511.08544.

Loss: with mu the mean of the projections z of an image's global views,
    (1 - lambda) mean over all views of (z - mu)^2 + lambda SIGReg(z)
SIGReg draws random directions, and in each compares the characteristic function of the batch's
projections of a view with that of the normal distribution (Epps and Pulley's test). No teacher, no
stopped gradient, no predictor, no queue.

Figures: ImageNet, ViT-H/14: linear 79 [secondary]. Imagenette, ViT-S/8 at 128 pixels, 800 epochs:
linear 90.7 [authors' release].

What differs: images of up to 64 pixels have views of one size with milder crops, no blur and no
solarisation; the defaults of the projector are those of small backbones.
"""

import torch
from torch import Tensor, nn

from ..augment import View, lejepa, small
from ..data import Batch
from ..losses import LeJEPALoss
from ..models import mlp


class LeJEPA(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    lam: lambda, the share of SIGReg in the loss.
    hidden_dim: width of the two hidden layers of the projector g.
    out_dim: width of the projections z.
    global_views: views of most of an image, whose mean is what all views are drawn to.
    local_views: views of small parts of it.
    local_size: their side; None: 7/16 of image_size above 64 pixels. Most transformers need it all.
    num_slices: random directions, other ones every step.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        lam: float = 0.05,
        hidden_dim: int = 512,
        out_dim: int = 64,
        global_views: int = 2,
        local_views: int = 6,
        local_size: int | None = None,
        num_slices: int = 1024,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.feature_dim, hidden_dim, hidden_dim, out_dim])
        self.lejepa = LeJEPALoss(lam, sigreg_num_vectors=num_slices)
        self.lam, self.local_size = lam, local_size
        self.global_views, self.local_views = global_views, local_views

    def views(self, image_size: int, source) -> list[View]:
        Vg, Vl = self.global_views, self.local_views
        if image_size > 64:
            local_size = self.local_size or image_size * 7 // 16
            return lejepa(
                image_size, local_size, global_views=Vg, local_views=Vl, flip=source.mirror
            )
        sizes = [image_size] * Vg + [self.local_size or image_size] * Vl
        return [small(size, source.channels, flip=source.mirror) for size in sizes]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        Vg, V = self.global_views, len(batch.views)
        sizes = filter(None, (batch.views[:Vg], batch.views[Vg:]))
        h = torch.cat([self.backbone(torch.cat(views)) for views in sizes])
        z = self.projector(h).unflatten(0, (V, -1))  # z = g(f(x)), (V, B, out_dim)
        inv, sigreg = self.lejepa.terms(global_proj=z[:Vg], local_proj=z[Vg:] if V > Vg else None)
        loss = self.lam * sigreg + (1 - self.lam) * inv
        std = z.detach().float().std(dim=1).mean()
        return loss, {"inv": inv.detach(), "sigreg": sigreg.detach(), "std": std}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)
