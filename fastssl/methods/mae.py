"""MAE: most patches of an image are left out, and a small decoder paints them from the others.

Paper: He et al., "Masked autoencoders are scalable vision learners", arXiv 2111.06377.

Loss: the encoder sees the kept patches v of image x only, floor(L (1 - r)) of L. The decoder gets
their tokens, a learned mask token in each of the other places M, and positions, and predicts
pixels; with norm_pix the target t of a patch is (x - mean) / sqrt(var + 1e-6) of its own pixels:
    loss = mean over i in M of |decoder(encoder(v))_i - t_i|^2 / (pixels of a patch)

Figures: ImageNet-1k, 1600 epochs, fine-tuned top-1 of ViT-B, L, H: 83.66, 85.95, 86.93; linear
probe 68.0, 75.8, 76.6 [authors' release]. Radiographs, recipe thorax, mean AUC on NIH ChestX-ray14
after fine-tuning: ViT-S 82.3; ViT-B of 0.5 M images 83.0 [authors' release].

What differs: a mask is a function of sample and step, the same for any number of ranks; the class
token of the whole image is the representation; learned positions of timm's transformers go on
learning; recipes for small images have a small decoder. The recipe thorax is that of Xiao et al.,
"Delving into masked autoencoders for multi-label thorax disease classification", arXiv 2210.12843:
masks of 0.90, crops of 50 to 100 %, targets not standardised, two blocks of decoder; to be
fine-tuned by `fastssl evaluate --protocol finetune --recipe thorax`.
"""

import torch
from torch import Tensor, nn

from ..augment import View, mae
from ..data import Batch
from ..models import grid_side, patch_size, patch_tokens
from ..models.vit import Block, sincos_positions
from .blocks import batch_mean
from .masking import masked_mse, patchify, random_mask, standardised


class MAE(nn.Module):
    """Args:
    backbone: f, a vision transformer that gives patch tokens: vit_small or timm:vit_...
    mask_ratio: r, share of the patches that are left out.
    norm_pix: each patch is predicted standardised.
    min_crop: smallest crop, a share of the image's area.
    decoder_dim: width of the decoder.
    decoder_depth: its blocks.
    decoder_heads: heads of its attention.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        min_crop: float = 0.2,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.backbone, self.patch = backbone, patch_size(backbone)
        channels = next(p.shape[1] for p in backbone.patch_embed.parameters() if p.ndim == 4)
        self.decoder = Decoder(
            backbone.feature_dim, self.patch**2 * channels, grid_side(backbone),
            dim=decoder_dim, depth=decoder_depth, heads=decoder_heads,
        )  # fmt: skip
        self.mask_ratio, self.norm_pix, self.min_crop = mask_ratio, norm_pix, min_crop

    def views(self, image_size: int, source) -> list[View]:
        return [mae(image_size, flip=source.mirror, scale=(self.min_crop, 1.0))]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.views[0]
        target = patchify(x, self.patch)  # (B, L, P)
        if self.norm_pix:
            target = standardised(target)
        draw = {"seed": batch.seed, "step": batch.step}
        keep, mask = random_mask(batch.index, target.shape[1], self.mask_ratio, **draw)
        cls, seen = patch_tokens(self.backbone, x, keep=keep)  # (B, D), (B, M, D)
        pred = self.decoder(cls, seen, keep)
        return batch_mean(masked_mse(pred, target, mask)), {}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """f(x), (B, feature_dim): the class token of the whole image."""
        return self.backbone(x)


class Decoder(nn.Module):
    """Tokens of the kept patches to P pixels of every patch of a side x side grid."""

    def __init__(self, width: int, pixels: int, side: int, *, dim: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("positions", sincos_positions(side, dim), persistent=False)

    def forward(self, cls: Tensor, seen: Tensor, keep: Tensor) -> Tensor:
        """cls (B, width), seen (B, M, width) of patches keep (B, M) to (B, L, P)."""
        cls, seen = self.embed(cls), self.embed(seen)
        L, dim = self.positions.shape
        patches = self.mask_token.to(seen.dtype).expand(len(seen), L, dim)
        patches = patches.scatter(1, keep[..., None].expand(-1, -1, dim), seen)
        tokens = torch.cat((cls[:, None], patches + self.positions), dim=1)
        return self.predict(self.norm(self.blocks(tokens))[:, 1:])
