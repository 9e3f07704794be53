"""Which patches a method hides, and images as rows of patches."""

import math

import torch
from torch import Tensor

from ..random import MASK, words


def random_mask(
    index: Tensor, L: int, ratio: float, *, step: int, view: int = 0
) -> tuple[Tensor, Tensor]:
    """Hide a share of each image's patches, all sets of that size being equally likely.

    Args:
        index: (B,) int64, the samples' numbers.
        L: patches of an image. ratio: share to hide, in (0, 1); floor(L (1 - ratio)) are kept.
        step: of the run. view: number of the view.

    Returns:
        keep: (B, M) int64, the patches that stay, in random order.
        mask: (B, L) bool, true where a patch is hidden.

    Raises:
        ValueError: a ratio that keeps none or hides none.

    Notes: a function of index, step and view alone, whatever the batch and the rank.
    """
    M = math.floor(L * (1 - ratio) + 1e-6)  # 10 (1 - 0.9) is just below 1
    if not 1 <= M < L:
        raise ValueError(
            f"random_mask: ratio must keep some of L={L} patches and hide some, got {ratio}, which "
            f"keeps {M}."
        )
    order = words(0, MASK, step, index, view, L).argsort(dim=1, stable=True)
    keep = order[:, :M]
    return keep, torch.ones_like(order, dtype=torch.bool).scatter(1, keep, False)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, h p, w p) to (B, h w, p p C), p = patch: patches row by row, and so the pixels of
    each, channels last."""
    B, C = x.shape[:2]
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)


def standardised(patches: Tensor) -> Tensor:
    """Each patch of (B, L, P) less its mean, over its deviation: (x - mean) / sqrt(var + 1e-6)."""
    var, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(B,) float32, of each image: the mean over its hidden patches, mask (B, L) bool, of the mean
    square error of pred and target (B, L, P)."""
    errors = (pred.float() - target.float()).square().mean(dim=2)
    return (errors * mask).sum(dim=1) / mask.sum(dim=1)
