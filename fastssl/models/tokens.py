"""Patch tokens of vision transformers, with patches hidden: for masked objectives."""

import torch
from torch import Tensor, nn


def grid_side(backbone: nn.Module, size: int) -> int:
    """Patches along a side of a square image of `size` pixels.

    Raises:
        ValueError: a backbone without patch tokens, or a size that is no multiple of its patches.
    """
    patch = _patch(backbone)
    if size % patch:
        raise ValueError(
            f"grid_side: size must be a multiple of the patches of {patch} pixels, got {size}."
        )
    return size // patch


def patch_tokens(
    backbone: nn.Module,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The class token and the patch tokens after the last normalisation.

    Args:
        backbone: `vit_small` or a timm vision transformer, D wide.
        x: (B, C, s, s) float, of L patches.
        mask: (B, L) bool, true where `mask_token` takes the patch's place before the positions are
            added (iBOT).
        mask_token: (D,).
        keep: (B, M) int64, the patches that are seen at all, in this order (MAE); None: all.

    Returns:
        (B, D) and (B, L, D), or (B, M, D) with `keep`. A network without class token gives the mean
        of its patches for it.

    Raises:
        ValueError: a backbone without patch tokens.
    """
    _patch(backbone)
    tokens, prefix = _embedded(backbone, x, mask, mask_token)
    if keep is not None:
        kept = keep[..., None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix:].gather(1, kept)), dim=1)
    tokens = getattr(backbone, "norm_pre", nn.Identity())(tokens)
    tokens = backbone.norm(backbone.blocks(tokens))
    patches = tokens[:, prefix:]
    return tokens[:, 0] if prefix else patches.mean(dim=1), patches


def _embedded(
    backbone: nn.Module, x: Tensor, mask: Tensor | None, mask_token: Tensor | None
) -> tuple[Tensor, int]:
    """(B, prefix + L, D) with positions, and the number of tokens before the patches."""
    embedded = backbone.patch_embed(x)  # (B, D, h, w) of ours, (B, h, w, D) or (B, L, D) of timm's
    ours = not hasattr(backbone, "_pos_embed")
    if ours:
        embedded = embedded.movedim(1, 3)
    if mask is not None:
        hidden = mask.view(*embedded.shape[:-1], 1)
        embedded = torch.where(hidden, mask_token.to(embedded.dtype), embedded)
    if not ours:
        return backbone._pos_embed(embedded), backbone.num_prefix_tokens
    return backbone.placed(embedded.flatten(1, 2)), 1


def _patch(backbone: nn.Module) -> int:
    """Side of its patches in pixels."""
    if hasattr(backbone, "placed"):
        return backbone.patch
    if not (hasattr(backbone, "_pos_embed") and hasattr(backbone, "blocks")):
        raise ValueError(
            f"patch_tokens: backbone must be a vision transformer, got {type(backbone).__name__}. "
            "Use vit_small or timm:vit_..."
        )
    return backbone.patch_embed.patch_size[0]
