"""Which patches a method hides, and images as rows of patches."""

import math

import torch
from torch import Tensor

from ..dist import rank_among, resolve_levels, world_size
from ..random import MASK, uniform, words

_TRIES, _FAILURES = 32, 10  # rectangles that are tried, and those that may fail one after another
_GOLDEN = (math.sqrt(5) - 1) / 2


def random_mask(
    index: Tensor, L: int, ratio: float, *, seed: int, step: int, view: int = 0
) -> tuple[Tensor, Tensor]:
    """Hide a share of each image's patches, all sets of that size being equally likely.

    Args:
        index: (B,) int64, the samples' numbers.
        L: patches of an image. ratio: share to hide, in (0, 1); floor(L (1 - ratio)) are kept.
        seed, step: of the run. view: number of the view.

    Returns:
        keep: (B, M) int64, the patches that stay, in random order.
        mask: (B, L) bool, true where a patch is hidden.

    Raises:
        ValueError: a ratio that keeps none or hides none.

    Notes: a function of seed, index, step and view alone, whatever the batch and the rank.
    """
    M = math.floor(L * (1 - ratio) + 1e-6)  # 10 (1 - 0.9) is just below 1
    if not 1 <= M < L:
        raise ValueError(
            f"random_mask: ratio must keep some of L={L} patches and hide some, got {ratio}, which "
            f"keeps {M}."
        )
    order = words(seed, MASK, step, index, view, L).argsort(dim=1, stable=True)
    keep = order[:, :M]
    return keep, torch.ones_like(order, dtype=torch.bool).scatter(1, keep, False)


def block_masks(u: Tensor, count: Tensor, side: int) -> Tensor:
    """Masks of up to `count` patches that are the union of rectangles.

    A rectangle has an area between 4 and what is left of the count, uniform, a ratio of its sides
    between 0.3 and 1 / 0.3, log-uniform, and a place. It is taken if it fits, hides something new
    and no more than what is left. An image is done when 10 in a row have not been taken.

    Args:
        u: (N, T, 4) float64 in (0, 1), for T rectangles that are tried.
        count: (N,) int64. side: of the grid of patches.

    Returns:
        (N, side * side) bool, true where a patch is hidden.

    Paper: BEiT, arXiv 2106.08254; as in DINOv2, arXiv 2304.07193.
    """
    place = torch.arange(side, device=u.device)
    mask = torch.zeros(len(u), side, side, dtype=torch.bool, device=u.device)
    left, failures = count.clone(), torch.zeros_like(count)
    for for_area, for_ratio, for_top, for_start in u.movedim(0, 2):  # (N,) each
        area = 4 + for_area * (left - 4)
        ratio = torch.exp((2 * for_ratio - 1) * math.log(1 / 0.3))
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, start = (for_top * (side - h + 1)).floor(), (for_start * (side - w + 1)).floor()
        rows = (place >= top[:, None]) & (place < (top + h)[:, None])  # (N, side)
        columns = (place >= start[:, None]) & (place < (start + w)[:, None])
        block = rows[:, :, None] & columns[:, None, :] & ~mask
        new = block.sum((1, 2))
        taken = (h < side) & (w < side) & (new > 0) & (new <= left) & (failures < _FAILURES)
        mask |= block & taken[:, None, None]
        left = left - new * taken
        failures = torch.where(taken, 0, failures + 1)
    return mask.flatten(1)


def block_masks_of_pairs(
    index: Tensor, side: int, *, seed: int, step: int, least: float = 0.1, most: float = 0.5
) -> tuple[Tensor, int]:
    """Block-wise masks for one of two crops of each image; the other one stays whole.

    The shares to hide are stratified: of the B images of all ranks one has a share in each of B
    equal slices of [least, most]. What the rectangles of `block_masks` leave of a share are patches
    anywhere, so that the number of hidden ones is known before the masks are.

    Args:
        index: (b,) int64, the samples' numbers, this rank's part of those of a step.
        side: of the grid of patches.
        seed, step: of the run.

    Returns:
        (2, b, side * side) bool, true where a patch is hidden; and how many of them are.

    Notes: a function of the samples' numbers, their places in the batch of all ranks, and the step,
    for any number of ranks. Nothing waits for the device.
    """
    levels = resolve_levels("block_masks_of_pairs")
    b, first = len(index), rank_among(levels) * len(index)
    B = b * world_size(levels)
    # By the order of multiples of the golden ratio: each slice once, and those of a rank spread
    # evenly, so that all ranks have about as much to do.
    places = torch.arange(B)
    slices = (places * _GOLDEN % 1).argsort().argsort()[first : first + b]
    within = uniform(seed, MASK, step, places[first : first + b], 1, 1)[:, 0]
    share = least + (most - least) * (slices + within) / B
    on_host = (share * side**2).long()  # (b,)
    count = on_host.to(index.device, non_blocking=True)
    u = uniform(seed, MASK, step, index, 0, 4 + 4 * _TRIES)  # (b, ..)
    masks = block_masks(u[:, 4:].unflatten(1, (_TRIES, 4)), count, side)
    anywhere = words(seed, MASK, step, index, 2, side**2) + (~masks * 2**32)  # hidden ones first
    masks = anywhere.argsort(dim=1).argsort(dim=1) < count[:, None]
    second = (u[:, 1] < 0.5)[:, None]
    return torch.stack((masks & ~second, masks & second)), int(on_host.sum())


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
