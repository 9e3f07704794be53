"""Patch tokens of vision transformers, with patches hidden: for masked objectives."""

from types import MethodType

import torch
from torch import Tensor, nn


def grid_side(backbone: nn.Module, size: int | None = None) -> int:
    """Patches along a side of a square image of `size` pixels; None: of those it was built for.

    Raises:
        ValueError: a backbone without patch tokens, or a size that is no multiple of its patches.
    """
    patch = patch_size(backbone)
    if size is None:
        return backbone.side if hasattr(backbone, "placed") else backbone.patch_embed.grid_size[0]
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

    Notes: a run encodes as it does by `forward`: in chunks of the batch, compiled. Forward hooks of
    the backbone are called with the class token, as those of monitors.
    """
    patch_size(backbone)
    if mask_token is not None:
        mask_token = mask_token.expand(len(x), -1)  # chunks of the batch take rows
    encode = getattr(backbone, "encode_tokens", None) or MethodType(encode_tokens, backbone)
    cls, patches = encode(x, mask, mask_token, keep)
    for hook in backbone._forward_hooks.values():
        hook(backbone, (x,), cls)
    return cls, patches


def encode_tokens(
    backbone: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`patch_tokens`, with a mask token (B, D) for each image: what a run may chunk and compile."""
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
        token = mask_token.view(len(x), *[1] * (embedded.ndim - 2), -1).to(embedded.dtype)
        embedded = torch.where(hidden, token, embedded)
    if not ours:
        return backbone._pos_embed(embedded), backbone.num_prefix_tokens
    return backbone.placed(embedded.flatten(1, 2)), 1


def patch_size(backbone: nn.Module) -> int:
    """Side of its patches in pixels.

    Raises:
        ValueError: a backbone without patch tokens.
    """
    if hasattr(backbone, "placed"):
        return backbone.patch
    # Of timm's with other blocks than these each wants more than the tokens.
    plain = isinstance(getattr(backbone, "blocks", None), nn.Sequential)
    if not (plain and hasattr(backbone, "_pos_embed")):
        raise ValueError(
            f"patch_tokens: backbone must be a vision transformer, got {type(backbone).__name__}. "
            "Use vit_small or timm:vit_..."
        )
    return backbone.patch_embed.patch_size[0]
