"""The random parameters of views: numbers of a specification in, rows for `render_views` out.

Every number is Philox4x32-10 of (seed, epoch, sample, view, which parameter): see
`fastssl.random`. Arithmetic is float64 and rounded to float32 once, so that kernels whose
`exp` and `log` differ in the last bit give the same bits but for one number in some 2^28.
"""

from itertools import permutations

import torch
from torch import Tensor

from fastssl.ops.augment import (
    ANGLE,
    BRIGHTNESS,
    FIRST,
    FLIP,
    GRAY,
    NOISE,
    PARAMS,
    SIGMA,
    SOLARIZE,
    TURNS,
    X0,
)
from fastssl.ops.contrastive import lib, on_cuda
from fastssl.random import AUGMENT, uniform

# Columns of `spec`, a row a view. Ranges are two columns: low and high.
SPEC = 26
CROP = 0  # 0: the whole image, 1: a random part of it
AREA = 1  # of the crop, in shares of the padded image
RATIO = 3  # width over height
PAD = 5  # border that the crop may reach into, in shares of the side; 0: whole pixels
SHIFT = 6  # largest translation, in shares of the crop's side
ROTATION = 7  # largest angle, in radians
TURNS_P, FLIP_P, JITTER_P = 8, 9, 10
FACTORS = 11  # of brightness, contrast and saturation, and hue in turns: 11 .. 18
GRAY_P, BLUR_P = 19, 20
BLUR = 21  # standard deviation in pixels of the view
SOLARIZE_P, THRESHOLD = 23, 24
NOISE_STD = 25

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
"""Factors and hue that change nothing."""

# Which number of a sample is what. It is part of what a seed means: append, never renumber.
TRIES = 10
U_CROP = 0  # area and aspect of ten tries: 0 .. 19
U_POSITION = 20  # x and y
U_ANGLE = 22
U_FLIP = 23
U_JITTER = 24  # whether, then brightness, contrast, saturation, hue: 24 .. 28
U_ORDER = 29
U_GRAY = 30
U_BLUR = 31  # whether, then sigma
U_SOLARIZE = 33
U_TURNS = 34  # whether, then how many
U_SHIFT = 36  # x and y
NUMBERS = 38  # the noise of pixels starts at 64

_ORDERS = list(permutations(range(4)))


def _between(low_high: Tensor, u: Tensor) -> Tensor:
    return low_high[0] + (low_high[1] - low_high[0]) * u


def _boxes(s: Tensor, u: Tensor, sizes: Tensor) -> Tensor:
    """(B, 4): x0, y0, x1, y1 in pixels. The first of ten tries that fits, else the largest centred
    box of an allowed ratio; of whole pixels, as torchvision's, where nothing is padded."""
    H, W = sizes.double().unbind(1)
    high, wide = H * (1 + 2 * s[PAD]), W * (1 + 2 * s[PAD])  # of the padded image
    whole = s[PAD] == 0

    def pixels(x):
        return torch.where(whole, x.round(), x)

    tries = u[:, U_CROP : U_CROP + 2 * TRIES]
    area = _between(s[AREA : AREA + 2], tries[:, 0::2]) * (wide * high)[:, None]  # (B, 10)
    ratio = _between(s[RATIO : RATIO + 2].log(), tries[:, 1::2]).exp()
    w, h = pixels((area * ratio).sqrt()), pixels((area / ratio).sqrt())
    fits = (0 < w) & (w <= wide[:, None]) & (0 < h) & (h <= high[:, None])
    first, any_fits = fits.int().argmax(1, keepdim=True), fits.any(1)
    least, most = s[RATIO], s[RATIO + 1]
    largest_w = pixels(torch.where(wide / high > most, high * most, wide)).clamp_min(whole)
    largest_h = pixels(torch.where(wide / high < least, wide / least, high)).clamp_min(whole)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], largest_w)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], largest_h)

    def corner(free, u):
        """Uniform in 0 .. free, in the middle where no try fits."""
        drawn = torch.where(whole, (u * (free + 1)).floor(), u * free)
        middle = torch.where(whole, (free / 2).floor(), free / 2)
        return torch.where(any_fits, drawn, middle)

    x0 = corner(wide - w, u[:, U_POSITION]) - s[PAD] * W
    y0 = corner(high - h, u[:, U_POSITION + 1]) - s[PAD] * H
    random = s[CROP] != 0
    x0, y0 = torch.where(random, x0, 0), torch.where(random, y0, 0)
    w, h = torch.where(random, w, W), torch.where(random, h, H)
    x0 = x0 + s[SHIFT] * (2 * u[:, U_SHIFT] - 1) * w
    y0 = y0 + s[SHIFT] * (2 * u[:, U_SHIFT + 1] - 1) * h
    return torch.stack((x0, y0, x0 + w, y0 + h), 1)


def _of_view(index: Tensor, sizes: Tensor, s: Tensor, seed: int, epoch: int, view: int) -> Tensor:
    """(B, PARAMS) of one view."""
    u = uniform(seed, AUGMENT, epoch, index, view, NUMBERS)  # (B, 38) float64
    out = torch.zeros(len(index), PARAMS, dtype=torch.float64, device=index.device)
    out[:, X0 : X0 + 4] = _boxes(s, u, sizes)
    out[:, ANGLE] = s[ROTATION] * (2 * u[:, U_ANGLE] - 1)
    turned = u[:, U_TURNS] < s[TURNS_P]
    out[:, TURNS] = torch.where(turned, (4 * u[:, U_TURNS + 1]).floor(), 0)
    out[:, FLIP] = (u[:, U_FLIP] < s[FLIP_P]).double()
    ranges = s[FACTORS : FACTORS + 8].view(4, 2).T  # (2, 4)
    out[:, BRIGHTNESS : BRIGHTNESS + 4] = _between(ranges, u[:, U_JITTER + 1 : U_JITTER + 5])
    used = (ranges != s.new_tensor(NEUTRAL)).any(0)  # (4,)
    orders = torch.tensor(_ORDERS, device=index.device)  # (24, 4)
    order = orders[(u[:, U_ORDER] * len(_ORDERS)).long()]  # (B, 4)
    applied = (u[:, U_JITTER] < s[JITTER_P])[:, None] & used[order]
    out[:, FIRST : FIRST + 4] = torch.where(applied, order, -1).double()
    out[:, GRAY] = (u[:, U_GRAY] < s[GRAY_P]).double()
    blurred = u[:, U_BLUR] < s[BLUR_P]
    out[:, SIGMA] = torch.where(blurred, _between(s[BLUR : BLUR + 2], u[:, U_BLUR + 1]), 0)
    out[:, SOLARIZE] = torch.where(u[:, U_SOLARIZE] < s[SOLARIZE_P], s[THRESHOLD], torch.inf)
    out[:, NOISE] = s[NOISE_STD]
    return out.float()


def view_parameters_ref(
    index: Tensor,  # (B,) int64
    sizes: Tensor,  # (B, 2) int64: H and W
    spec: Tensor,  # (V, SPEC) float64
    seed: int,
    epoch: int,
) -> Tensor:
    """(V, B, PARAMS) float32 on index's device, the views numbered from 0."""
    views = [_of_view(index, sizes, s, seed, epoch, v) for v, s in enumerate(spec)]
    return torch.stack(views)


lib.define(
    "view_parameters(Tensor index, Tensor sizes, Tensor spec, int seed, int epoch) -> Tensor"
)
lib.impl("view_parameters", view_parameters_ref, "CompositeExplicitAutograd")


def _fake(index, sizes, spec, seed, epoch):
    torch._check(
        index.dim() == 1 and sizes.shape == (len(index), 2) and spec.shape[1] == SPEC,
        lambda: f"view_parameters: index must be (B,), sizes (B, 2) and spec (V, {SPEC})",
    )
    return index.new_empty(len(spec), len(index), PARAMS, dtype=torch.float32)


torch.library.register_fake("fastssl::view_parameters", _fake, lib=lib)
on_cuda("view_parameters", "view_parameters", view_parameters_ref, "goes view by view")
