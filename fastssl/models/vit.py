"""A small vision transformer for images of 8 to 64 pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_positions(side: int, dim: int, spread: int | None = None) -> Tensor:
    """Fixed positions of a side x side grid, row by row: (side**2, dim) float32.

    Half of the channels encode y and half x, each as sines and cosines of dim / 4 frequencies
    10000**(-i / (dim / 4)). The grid is spread over the square of one of `spread` x `spread`, where
    that is given.
    """
    if dim % 4:
        raise ValueError(f"sincos_positions: dim must be a multiple of 4, got {dim}.")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    ticks = torch.arange(side, dtype=torch.float64)
    if spread is not None:
        ticks = (ticks + 0.5) * (spread / side) - 0.5
    angle = ticks[:, None] * omega  # (side, dim / 4)
    line = torch.cat((angle.sin(), angle.cos()), dim=1)  # (side, dim / 2)
    y = line[:, None].expand(-1, side, -1)
    x = line[None].expand(side, -1, -1)
    return torch.cat((y, x), dim=2).flatten(0, 1).float()


class Block(nn.Module):
    """Pre-norm attention and MLP: (B, L, dim) to (B, L, dim).

    A mask, bool and to be broadcast to (B, heads, L, L), is true where a row's token may look.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, L, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, dim / heads) each
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, dim / heads)
        x = x + self.proj(h.transpose(1, 2).reshape(B, L, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViTSmall(nn.Module):
    """Four blocks of width 96 on 16 to 64 patches, sine-cosine positions, class token.

    Patches have `image_size` / 8 pixels a side, at least 2. About 0.45 M parameters.

    Args:
        in_chans: channels of the images.
        image_size: side of the images in pixels; a multiple of the patch size.

    Paper: Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929; fixed positions as
    in MoCo v3, arXiv 2104.02057.
    """

    def __init__(
        self,
        in_chans: int = 3,
        image_size: int = 32,
        feature_dim: int = 96,
        depth: int = 4,
        heads: int = 3,
    ):
        super().__init__()
        patch = max(2, image_size // 8)
        if image_size % patch:
            raise ValueError(
                f"vit_small: image_size must be a multiple of the patch size {patch}, got "
                f"{image_size}. Use a multiple of 8."
            )
        self.feature_dim = feature_dim
        self.patch, self.side = patch, image_size // patch
        self.patch_embed = nn.Conv2d(in_chans, feature_dim, patch, patch)
        positions = sincos_positions(self.side, feature_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.cls = nn.Parameter(torch.zeros(feature_dim))
        self.blocks = nn.Sequential(*(Block(feature_dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(feature_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, S, S) float to (B, feature_dim): the class token.

        S is image_size, or another multiple of the patch size, on whose patches the positions of
        the image are spread.
        """
        S = x.shape[-1]
        if x.shape[-2] != S or S % self.patch:
            raise ValueError(
                f"vit_small: images must be squares of a multiple of {self.patch} pixels, got "
                f"{tuple(x.shape)}. Resize them or build the network for that size."
            )
        x = self.placed(self.patch_embed(x).flatten(2).transpose(1, 2))
        return self.norm(self.blocks(x)[:, 0])

    def placed(self, patches: Tensor) -> Tensor:
        """Embedded patches (B, side**2, dim) with positions, the class token before them."""
        positions, side = self.positions, math.isqrt(patches.shape[1])
        if side != self.side:
            positions = sincos_positions(side, self.feature_dim, self.side).to(positions.device)
        return torch.cat((self.cls.expand(patches.shape[0], 1, -1), patches + positions), dim=1)
