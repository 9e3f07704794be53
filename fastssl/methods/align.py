"""ALIGN: CLIP's objective for noisy captions, with smoothed targets and a learned temperature.

Paper: Jia et al., "Scaling up visual and vision-language representation learning with noisy text
supervision", arXiv 2102.05918.

Loss: with x = n(f(image)) and y = n(W g(text)), rows of unit length, and logits Z = x y^T / tau,

    L = mean_i CE(q_i, row i of Z) + mean_i CE(q_i, column i of Z)

the sum of the two directions, not their mean. q_i is 1 - e + e / B at i and e / B elsewhere, B the
pairs of the batch and e = 0.1. tau is learned, as log tau, and begins at 1. The text goes through a
bidirectional tower, whose first token's state is the caption's; the image has no projection.

What differs: the image tower is any backbone and the text tower small unless named; the data are
not filtered here (the paper drops short and frequent texts, and small images).
"""

import math

import torch
from torch import Tensor, nn

from ..augment import View, align
from ..data import Batch
from ..models import build_text_tower
from ..models.text import Pool
from ..ops import info_nce
from .blocks import spread


class ALIGN(nn.Module):
    """Args:
    backbone: f, (B, C, s, s) to (B, backbone.feature_dim).
    text: g, `text_small`, `open_clip:NAME`, `open_clip:NAME:TAG` or `transformers:NAME`.
    pool: how the tokens' states become a caption's: cls; or eot, mean or max.
    freeze_below: so many blocks of the text tower, and its embeddings, do not train; 0: all do.
    temperature: tau at the start.
    label_smoothing: e.
    flip: mirror images are drawn too; not where captions tell left from right.
    """

    reads_captions = "line"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text: str = "text_small",
        pool: Pool = "cls",
        freeze_below: int = 0,
        temperature: float = 1.0,
        label_smoothing: float = 0.1,
        flip: bool = True,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"ALIGN: temperature must be positive, got {temperature}.")
        self.backbone = backbone
        self.text = build_text_tower(text, pool=pool, causal=False, freeze_below=freeze_below)
        self.text_projection = nn.Linear(self.text.feature_dim, backbone.feature_dim)  # W
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))
        self.label_smoothing, self.flip = label_smoothing, flip

    def views(self, image_size: int, source) -> list[View]:
        return [align(image_size, flip=self.flip and source.mirror)]

    def encode_image(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def encode_text(self, captions: list[str]) -> Tensor:
        return self.text_projection(self.text(captions))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = self.encode_image(batch.views[0]), self.encode_text(batch.captions)
        tau = self.log_temperature.exp()
        mean = info_nce(  # of eq. 1 and 2
            x, y, temperature=tau, symmetric=True, label_smoothing=self.label_smoothing,
            normalize=True,
        )  # fmt: skip
        scalars = {"std": spread(x), "text_std": spread(y)}
        return 2 * mean, scalars | {"temperature": tau.detach().squeeze()}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim), which is compared with the texts itself."""
        return self.backbone(x)
