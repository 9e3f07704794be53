"""The random numbers of a batch of views, drawn on the CPU from counters."""

import math
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from .random import AUGMENT, uniform
from .views import View

# Parameter numbers. They are part of what a seed means: append, never renumber.
_TRIES = 10
_CROP = 0  # area and aspect of ten tries: 0 .. 19
_POSITION = 20  # x and y
_ANGLE = 22
_FLIP = 23
_JITTER = 24  # whether, then brightness, contrast, saturation, hue: 24 .. 28
_ORDER = 29
_GRAY = 30
_BLUR = 31  # whether, then sigma
_SOLARIZE = 33
_COUNT = 34
_NOISE = 64  # one number a pixel and channel from here on

_ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4)


@dataclass(frozen=True)
class Draws:
    """Parameters of one view of B images; all on the CPU."""

    box: Tensor
    """(B, 4) float32: x0, y0, x1, y1 of the crop in fractions of the image."""
    angle: Tensor
    """(B,) float32, radians."""
    flip: Tensor
    """(B,) bool."""
    factors: Tensor
    """(B, 4) float32: brightness, contrast, saturation factors and hue shift in turns."""
    order: Tensor
    """(B, 4) int64: which of the four colour operations comes 1st, 2nd, 3rd, 4th; -1: none."""
    gray: Tensor
    """(B,) bool."""
    sigma: Tensor
    """(B,) float32: standard deviation of the blur in pixels, 0 where there is none."""
    solarize: Tensor
    """(B,) bool."""
    noise: Tensor | None
    """(B, C, size, size) float32, to be added; None without noise."""


def draw(
    view: View,
    index: Tensor,
    *,
    seed: int,
    epoch: int,
    number: int,
    shape: tuple[int, int, int],
) -> Draws:
    """Draw the parameters of one view.

    Args:
        view: what to draw.
        index: (B,) int64, the samples' numbers in their data set.
        seed, epoch, number: of the run, of the pass over the data, and of the view (0, 1, ...).
        shape: (C, H, W) of the images in pixels.
    """
    index = index.cpu()
    u = uniform(seed, AUGMENT, epoch, index, number, _COUNT)  # (B, 34) float64
    low = 1 - torch.tensor(view.jitter, dtype=u.dtype)
    low[:3] = low[:3].clamp_min(0)
    high = 1 + torch.tensor(view.jitter, dtype=u.dtype)
    factors = low + (high - low) * u[:, _JITTER + 1 : _JITTER + 5]
    factors[:, 3] -= 1  # hue is a shift about zero
    order = _ORDERS[(u[:, _ORDER] * len(_ORDERS)).long()]
    applied = (u[:, _JITTER] < view.jitter_p)[:, None] & (torch.tensor(view.jitter) > 0)[order]
    sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * u[:, _BLUR + 1]
    return Draws(
        box=_boxes(view, u, shape[2] / shape[1]).float(),
        angle=(math.radians(view.rotate) * (2 * u[:, _ANGLE] - 1)).float(),
        flip=u[:, _FLIP] < view.flip,
        factors=factors.float(),
        order=torch.where(applied, order, -1),
        gray=u[:, _GRAY] < view.gray_p,
        sigma=torch.where(u[:, _BLUR] < view.blur_p, sigma, 0.0).float(),
        solarize=u[:, _SOLARIZE] < view.solarize_p,
        noise=_noise(view, index, seed, epoch, number, shape[0]),
    )


def _boxes(view: View, u: Tensor, image_ratio: float) -> Tensor:
    """Random-resized-crop boxes (B, 4): the first of ten tries that fits, else the largest centred.

    As torchvision's, without rounding to whole pixels. `image_ratio` is width over height.
    """
    low, high = view.crop_scale
    area = low + (high - low) * u[:, _CROP : _CROP + 2 * _TRIES : 2]  # (B, 10)
    log_ratio = [math.log(r) for r in view.crop_ratio]
    ratio = log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[:, _CROP + 1 : _CROP + 2 * _TRIES : 2]
    ratio = ratio.exp() / image_ratio  # width over height in fractions of the image
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    aspect = min(max(image_ratio, view.crop_ratio[0]), view.crop_ratio[1]) / image_ratio
    any_fits = fits.any(dim=1)
    width = torch.where(any_fits, width.gather(1, first)[:, 0], min(1.0, aspect))
    height = torch.where(any_fits, height.gather(1, first)[:, 0], min(1.0, 1 / aspect))
    x_free, y_free = 1 - width, 1 - height
    x0 = torch.where(any_fits, x_free * u[:, _POSITION], x_free / 2)
    y0 = torch.where(any_fits, y_free * u[:, _POSITION + 1], y_free / 2)
    box = torch.stack((x0, y0, x0 + width, y0 + height), dim=1)
    return box * (1 + 2 * view.pad) - view.pad


def _noise(
    view: View, index: Tensor, seed: int, epoch: int, number: int, channels: int
) -> Tensor | None:
    """Gaussian pixel noise by Box and Muller: one pair of uniforms gives two values."""
    if view.noise == 0:
        return None
    count = channels * view.size**2
    pairs = (count + 1) // 2
    u = uniform(seed, AUGMENT, epoch, index, number, 2 * pairs, first=_NOISE)
    radius, turn = (-2 * u[:, :pairs].log()).sqrt(), 2 * math.pi * u[:, pairs:]
    normal = torch.cat((radius * turn.cos(), radius * turn.sin()), dim=1)[:, :count]
    return (view.noise * normal).float().view(-1, channels, view.size, view.size)
