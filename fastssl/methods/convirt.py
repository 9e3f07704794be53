"""ConVIRT: a radiograph and a sentence of its report attract, all other pairs of a batch repel.

Paper: Zhang, Jiang, Miura, Manning, Langlotz, "Contrastive learning of medical visual
representations from paired images and text", arXiv 2010.00747.

Loss: with v = n(g_v(f_v(x))) and u = n(g_u(f_u(t))), rows of unit length, and a fixed tau,

    L = mean_i lambda l_i(v, u) + (1 - lambda) l_i(u, v)
    l_i(a, b) = -log (exp(<a_i, b_i> / tau) / sum_j exp(<a_i, b_j> / tau))

t is one sentence of the report, drawn anew in every epoch. f_u ends in the maximum over the states
of the sentence's tokens; both heads g have one hidden layer.

What differs: the images' zoom of 5 % is left to the crop; images of up to 64 pixels are not
blurred; the hidden layers of the heads are as wide as the outputs. The rate does not fall on a
plateau but by the run's schedule. For the paper's frozen text tower: --text transformers:NAME
--freeze-below 6, with a clinical BERT.
"""

from torch import Tensor, nn

from ..augment import View, xray
from ..data import Batch
from ..models import build_text_tower, mlp
from ..models.text import Pool
from ..ops import info_nce
from .blocks import caption_ids, spread


class ConVIRT(nn.Module):
    """Args:
    backbone: f_v, (B, C, s, s) to (B, backbone.feature_dim).
    text: f_u, `text_small`, `open_clip:NAME`, `open_clip:NAME:TAG` or `transformers:NAME`.
    pool: how the tokens' states become a sentence's: max; or mean, cls or eot.
    freeze_below: so many blocks of the text tower, and its embeddings, do not train; 0: all do.
    out_dim: width of v and u.
    temperature: tau.
    image_weight: lambda, the share of the images' direction.
    flip: mirror images are drawn too; not where sentences tell left from right.
    spare_equal: equal sentences are no negatives of each other.
    """

    reads_captions = "sentence"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text: str = "text_small",
        pool: Pool = "max",
        freeze_below: int = 0,
        out_dim: int = 512,
        temperature: float = 0.1,
        image_weight: float = 0.75,
        flip: bool = True,
        spare_equal: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.text = build_text_tower(text, pool=pool, causal=False, freeze_below=freeze_below)
        self.image_head, self.text_head = (
            mlp([tower.feature_dim, out_dim, out_dim], norm=None) for tower in (backbone, self.text)
        )
        self.temperature, self.image_weight = temperature, image_weight
        self.flip, self.spare_equal = flip, spare_equal

    def views(self, image_size: int, source) -> list[View]:
        return [xray(image_size, flip=self.flip and source.mirror, blur=image_size > 64)]

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image_head(self.backbone(x))

    def encode_text(self, captions: list[str]) -> Tensor:
        return self.text_head(self.text(captions))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        v, u = self.encode_image(batch.views[0]), self.encode_text(batch.captions)
        ids = caption_ids(batch.captions, v.device) if self.spare_equal else None
        loss = info_nce(  # eq. 4
            v, u, temperature=self.temperature, symmetric=True, row_weight=self.image_weight,
            q_ids=ids, normalize=True,
        )  # fmt: skip
        return loss, {"std": spread(v), "text_std": spread(u)}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f_v(x), (B, feature_dim): the representation before the head."""
        return self.backbone(x)
