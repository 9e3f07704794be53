"""CLIP: an image and its caption attract, all other pairs of a batch repel.

Paper: Radford et al., "Learning transferable visual models from natural language supervision",
arXiv 2103.00020.

Loss: with I_e = n(f(x) W_i) and T_e = n(g(t) W_t), rows of unit length, and logits Z = s I_e T_e^T,

    L = 1/2 mean_i -log softmax(row i of Z)_i + 1/2 mean_i -log softmax(column i of Z)_i

the image's own among all captions of the batch, and the caption's own among all images. The scale s
is learned, begins at 1 / 0.07 and never exceeds 100.

What differs: crops of 90 to 100 % of the area (the paper's is a square of the image's shorter
side); the image tower is any backbone, without attention pooling.
"""

import math

import torch
from torch import Tensor, nn

from ..augment import View, clip
from ..data import Batch
from ..models import build_text_tower
from ..models.text import Pool
from ..ops import info_nce
from .blocks import caption_ids, spread


class CLIP(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    text: g, `text_small`, `open_clip:NAME`, `open_clip:NAME:TAG` or `transformers:NAME`.
    pool: which token's state is the caption's: eot or cls; or mean or max over them.
    freeze_below: so many blocks of the text tower, and its embeddings, do not train; 0: all do.
    out_dim: width of I_e and T_e.
    temperature: 1 / s at the start.
    spare_equal: equal captions are no negatives of each other.
    """

    reads_captions = "line"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text: str = "text_small",
        pool: Pool = "eot",
        freeze_below: int = 0,
        out_dim: int = 512,
        temperature: float = 0.07,
        spare_equal: bool = False,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"CLIP: temperature must be positive, got {temperature}.")
        self.backbone = backbone
        self.text = build_text_tower(text, pool=pool, freeze_below=freeze_below)
        self.image_projection = nn.Linear(backbone.feature_dim, out_dim, bias=False)  # W_i
        self.text_projection = nn.Linear(self.text.feature_dim, out_dim, bias=False)  # W_t
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.spare_equal = spare_equal

    def views(self, image_size: int, source) -> list[View]:
        return [clip(image_size)]

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image_projection(self.backbone(x))

    def encode_text(self, captions: list[str]) -> Tensor:
        return self.text_projection(self.text(captions))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        I_e, T_e = self.encode_image(batch.views[0]), self.encode_text(batch.captions)
        ids = caption_ids(batch.captions, I_e.device) if self.spare_equal else None
        s = self.log_scale.exp()
        loss = info_nce(I_e, T_e, logit_scale=s, symmetric=True, q_ids=ids, normalize=True)
        scalars = {"std": spread(I_e), "text_std": spread(T_e)}
        return loss, scalars | {"logit_scale": s.detach().squeeze()}

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        self.log_scale.clamp_(max=math.log(100))

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation before the projection."""
        return self.backbone(x)
