"""DINO: the student finds in every crop what its own moving average makes of the two large ones.

Paper: Caron et al., "Emerging properties in self-supervised vision transformers",
arXiv 2104.14294.

Loss: the teacher's distribution over K prototypes for a large crop a is t_a = softmax((scores_a -
c) / tau_t), sharpened and centred, without gradient; the student's for crop v is s_v =
softmax(scores_v / tau_s). Over the 2 (V - 1) pairs a != v
    loss = mean of -sum over k of t_a log s_v
The centre c is a moving average of the teacher's scores, the teacher one of the student. Centring
alone would make all images alike, sharpening alone would put all on one prototype.

Figures: ImageNet, ViT-S/16: kNN 69.3 and linear 74.0 (100 epochs), 74.5 and 77.0 (800); ViT-S/8:
kNN 78.3; ResNet-50: linear 75.3 [authors' release]. CIFAR-10, ResNet-18, 1000 epochs: linear 89.5
[re-implementation].

What differs: the temperature of the teacher rises by the step, not the epoch; the magnitudes of
the last layer never train (the released code can free them); crops of a size go through a network
in one forward, so that BatchNorms, where the backbone has them, see them together; images of up to
64 pixels have no blur and no solarisation.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .. import schedules
from ..augment import View, dino
from ..data import Batch
from ..losses import DINOLoss
from ..optim import EMA
from .blocks import Prototypes, dino_projector, encode, multi_crop, spread, teacher_scalars


class DINO(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim), for both sizes of the crops.
    momentum: l of the teacher's average at the start; it rises to 1 by a cosine.
    student_temperature: tau_s.
    first_temperature, teacher_temperature: tau_t, which goes from the first to the second in a
        straight line over temperature_epochs.
    temperature_epochs: length of that.
    centering: mean, the teacher's centre; or sinkhorn, a balance of each batch in its place.
    center_momentum: m of the centre's average.
    freeze_epochs: so long the prototypes stay what they are.
    hidden_dim: width of the two hidden layers of the projector g.
    bottleneck_dim: width of the projections z.
    batch_norm: in the projector, as convolutional backbones need it in short runs.
    out_dim: K, the number of prototypes.
    local_views: small crops of small parts of an image, which only the student sees.
    local_size: their side; None: 3/7 of image_size above 64 pixels, else half of it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        momentum: float = 0.996,
        student_temperature: float = 0.1,
        first_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        temperature_epochs: float = 30.0,
        centering: str = "mean",
        center_momentum: float = 0.9,
        freeze_epochs: float = 1.0,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
        out_dim: int = 65536,
        local_views: int = 8,
        local_size: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        dims = [backbone.feature_dim, hidden_dim, hidden_dim, bottleneck_dim]
        self.projector = dino_projector(dims, "bn" if batch_norm else None)
        self.prototypes = Prototypes(bottleneck_dim, out_dim, bias=False)
        parts = {name: getattr(self, name) for name in ("backbone", "projector", "prototypes")}
        # BatchNorms of the teacher, in training mode, have statistics of their own.
        self.ema = EMA(nn.Sequential(OrderedDict(parts)), buffers="keep")
        self.dino = DINOLoss(
            out_dim, student_temp=student_temperature, center_momentum=center_momentum,
            centering=centering,
        )  # fmt: skip
        self.momentum, self.freeze_epochs = momentum, freeze_epochs
        self.temperatures = first_temperature, teacher_temperature
        self.temperature_epochs = temperature_epochs
        self.local_views, self.local_size = local_views, local_size

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        return multi_crop(
            dino, image_size, source, self.local_views, self.local_size,
            whole=(0.4, 1.0), part=(0.1, 0.4),
        )  # fmt: skip

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        z = encode(self.ema.model[:2], batch.views)  # z = g(f(x)), (B, bottleneck_dim) each
        s = self.prototypes(torch.cat(z), hold=batch.epoch < self.freeze_epochs)
        t = torch.stack(encode(self.ema, batch.views[:2]))  # the teacher's, without gradient
        progress = batch.epoch / self.temperature_epochs if self.temperature_epochs else 1.0
        tau_t = schedules.linear(progress, *self.temperatures)
        told = teacher_scalars(t.flatten(0, 1), self.dino, tau_t)
        loss = self.dino(t, s.chunk(len(z)), teacher_temp=tau_t)  # eq. 3; moves the centre, eq. 4
        return loss, {"std": spread(z[0]), **told}

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.momentum = schedules.cosine(step / total_steps, self.momentum, 1.0)
        self.ema.update()

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projector."""
        return self.backbone(x)
