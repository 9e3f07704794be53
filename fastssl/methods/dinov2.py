"""DINOv2: DINO's student learns hidden patches from its teacher too, and spreads its features.

Paper: Oquab et al., "DINOv2: learning robust visual features without supervision",
arXiv 2304.07193. With radiographs: Perez-Garcia et al., "RAD-DINO: exploring scalable medical image
encoders beyond text supervision", arXiv 2401.10815.

Loss: L = L_DINO + L_iBOT + 0.1 L_KoLeo. With q = softmax((t - c) / tau_t) of a teacher's scores t
and p = softmax(s / tau_s) of the student's, L_DINO is the mean of H(q, p) over the pairs of a large
crop and another crop of the same image, by their class tokens. The student sees a learned token in
the place of some patches of the large crops: L_iBOT is the mean over these crops of the mean over
hidden patches of H(q, p), the teacher's q being that of the patch itself (a crop without hidden
patches counts as 0). L_KoLeo = sum over the two large crops of -mean_i log |h_i - h_n(i)|, with
h the student's class tokens of length 1 and n(i) the nearest to i.

What differs: of each image one large crop is masked (in the paper half of all those of a batch, so
of some images both or none), which is the same work for every rank; where no more rectangles fit,
single patches are hidden up to the share that was drawn; nearest neighbours for KoLeo
are those of all ranks; the temperature of the teacher rises by the step, not the epoch; images of
up to 64 pixels have no blur and no solarisation.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .. import schedules
from ..augment import View, dino, rad_dino
from ..data import Batch
from ..losses import DINOLoss, IBOTPatchLoss, KoLeoLoss
from ..models import grid_side, patch_size, patch_tokens
from ..optim import EMA
from .blocks import PrototypeHead, encode, multi_crop, spread, teacher_scalars
from .masking import block_masks_of_pairs


class DINOv2(nn.Module):
    """Args:
    backbone: f, a vision transformer: vit_small or timm's.
    momentum: of the teacher's average at the start; it rises to 1 by a cosine.
    student_temperature: tau_s.
    first_temperature, teacher_temperature: tau_t, which goes from the first to the second in a
        straight line over temperature_epochs.
    temperature_epochs: length of that.
    centering: sinkhorn, a balance of each batch; or mean, a centre c of past batches.
    center_momentum: of the centre's average.
    freeze_epochs: so long the prototypes stay what they are.
    shared_head: one head for class and patch tokens, not one for each.
    hidden_dim: width of the two hidden layers of a head.
    bottleneck_dim: width of the projections z.
    out_dim: K, the number of prototypes of a head.
    patch_weight: of L_iBOT.
    koleo_weight: of L_KoLeo.
    global_area: least share of the image's area that a large crop has, and the most of a small one.
    local_area: least share that a small crop has.
    colors: as DINO's, with hue, grey and solarisation; otherwise brightness and contrast only. No
        difference for grey images of up to 64 pixels.
    local_views: small crops, which only the student sees.
    local_size: their side; None: about 3/7 of image_size above 64 pixels, else half of it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        momentum: float = 0.992,
        student_temperature: float = 0.1,
        first_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        temperature_epochs: float = 30.0,
        centering: str = "sinkhorn",
        center_momentum: float = 0.9,
        freeze_epochs: float = 1.0,
        shared_head: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 65536,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        global_area: float = 0.32,
        local_area: float = 0.05,
        colors: bool = True,
        local_views: int = 8,
        local_size: int | None = None,
    ):
        super().__init__()
        self.patch = patch_size(backbone)
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(backbone.feature_dim))
        dims = [backbone.feature_dim, hidden_dim, hidden_dim, bottleneck_dim]
        # Of class tokens, and the last one of patch tokens.
        self.heads = nn.ModuleList(PrototypeHead(dims, out_dim) for _ in range(2 - shared_head))
        self.ema = EMA(nn.ModuleDict({"backbone": self.backbone, "heads": self.heads}))
        common = {"center_momentum": center_momentum, "centering": centering}
        self.dino = DINOLoss(out_dim, student_temp=student_temperature, **common)
        self.ibot = IBOTPatchLoss(out_dim, student_temp=student_temperature, **common)
        self.koleo = KoLeoLoss()
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.momentum, self.freeze_epochs = momentum, freeze_epochs
        self.temperatures = first_temperature, teacher_temperature
        self.temperature_epochs = temperature_epochs
        self.areas, self.colors = (local_area, global_area, 1.0), colors
        self.local_views, self.local_size = local_views, local_size

    @property
    def teacher(self) -> nn.Module:
        return self.ema.module

    def views(self, image_size: int, source) -> list[View]:
        part, whole = self.areas[:2], self.areas[1:]
        preset = partial(dino if self.colors else rad_dino, scale=whole, local_scale=part)
        share = 3 / 7 if image_size > 64 else 1 / 2
        local_size = self.local_size or self.patch * round(share * image_size / self.patch)
        return multi_crop(
            preset, image_size, source, self.local_views, local_size, whole=whole, part=part
        )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        teacher, hold = self.teacher, batch.epoch < self.freeze_epochs
        progress = batch.epoch / self.temperature_epochs if self.temperature_epochs else 1.0
        tau_t = schedules.linear(progress, *self.temperatures)
        x = torch.cat(batch.views[:2])
        side = grid_side(self.backbone, x.shape[-1])
        mask, count = block_masks_of_pairs(batch.index, side, seed=batch.seed, step=batch.step)
        mask = mask.flatten(0, 1)  # (2B, L)
        # Where it is true, in order: a GPU would have to be waited for by nonzero().
        hidden = mask.flatten().argsort(descending=True, stable=True)[:count]

        h, patches = patch_tokens(self.backbone, x, mask=mask, mask_token=self.mask_token)
        local = encode(lambda x: patch_tokens(self.backbone, x)[0], batch.views[2:])
        h = [*h.chunk(2), *local]  # class tokens, (B, D) each
        z, s = self.heads[0](torch.cat(h), hold)
        _, s_patch = self.heads[-1](patches.flatten(0, 1)[hidden], hold)
        with torch.no_grad():  # the teacher sees all patches
            h_t, patches_t = patch_tokens(teacher.backbone, x)
            _, t = teacher.heads[0](h_t)
            _, t_patch = teacher.heads[-1](patches_t.flatten(0, 1)[hidden])

        told = teacher_scalars(t, self.dino, tau_t)
        L_dino = self.dino(t.chunk(2), s.chunk(len(h)), teacher_temp=tau_t)
        L_ibot = self.ibot(t_patch, s_patch, mask, teacher_temp=tau_t)
        L_koleo = self.koleo(h[0]) + self.koleo(h[1])
        loss = L_dino + self.patch_weight * L_ibot + self.koleo_weight * L_koleo
        parts = {"loss_dino": L_dino, "loss_ibot": L_ibot, "loss_koleo": L_koleo}
        parts = {name: x.detach() for name, x in parts.items()}
        return loss, {"std": spread(z[: len(h[0])]), **parts, **told}

    def after_step(self, step: int, total_steps: int) -> None:
        self.ema.momentum = schedules.cosine(step / total_steps, self.momentum, 1.0)
        self.ema.update()

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): what the backbone gives, the class token."""
        return self.backbone(x)
