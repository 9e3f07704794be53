"""Triton kernels of the op `render_views`: crop, colour and blur, three launches for all views,
and one before them for noise.

A view's way is cut where it needs all of itself: before contrast, which is about the mean, and
before the blur. The crop carries a view as far as it can, the others take up the views that are not
yet done, and programs of the rest return at once: nothing of `params` is known on the host. Between
launches pixels wait in a buffer of the result's shape, in fp16 if the result has 16 bits. Sums run
in fixed order: a view's bits depend on its image and its parameters only.
512 views of 224 pixels in 16 bits, all with contrast and half of them blurred, are 0.7 GB and 45
GFLOP of the blur's products. By count, not measured, an H200 takes 0.2 ms for either and 0.3 ms for
the crop's arithmetic, partly at the same time.
What is impossible (a crop that is empty, not finite or beyond 2^20 pixels, an image outside
`pixels`, noise without a key, contrast twice) cannot be refused here: it gives NaN, and nothing is
read outside an image. Papers: the operations of SimCLR, arXiv:2002.05709; Philox, SC 2011.
"""

import functools

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of
from fastssl.kernels.tiles import INF
from torch import Tensor

from fastssl import random
from fastssl.ops import augment as op

PARAMS, X0, Y0, X1, Y1, ANGLE, TURNS, FLIP = (
    tl.constexpr(n)
    for n in (op.PARAMS, op.X0, op.Y0, op.X1, op.Y1, op.ANGLE, op.TURNS, op.FLIP)
)  # fmt: skip
BRIGHTNESS, CONTRAST, SATURATION, HUE, FIRST, GRAY, SIGMA, SOLARIZE, NOISE = (
    tl.constexpr(n)
    for n in (
        op.BRIGHTNESS, op.CONTRAST, op.SATURATION, op.HUE, op.FIRST, op.GRAY, op.SIGMA,
        op.SOLARIZE, op.NOISE,
    )
)  # fmt: skip
OPERATIONS = tl.constexpr(op.GRAY - op.FIRST)  # the most a view can have
RED, GREEN, BLUE = map(tl.constexpr, op.LUMINANCE)
FARTHEST = tl.constexpr(2.0**20)
STREAM = tl.constexpr(random.AUGMENT << 24)
NOISE_BLOCK = tl.constexpr(op.NOISE_WORD // 4)
TWO_PI = tl.constexpr(6.283185307179586)


# ---------------------------------------------------------------------------------------- crop


@triton.jit
def taps_of(low, high, offs, PER_SIZE: tl.constexpr, BICUBIC: tl.constexpr,
            ANTIALIAS: tl.constexpr):  # fmt: skip
    """The first pixel of the image that each pixel of a line sees, how far it lies from the
    centre, how many there are, and what makes a distance the filter's argument."""
    share = (high - low) * PER_SIZE
    reach = 1.0 + 0.0 * share
    if ANTIALIAS:
        reach = tl.maximum(share, reach)
    scale = 1.0 / reach.to(tl.float32)
    if BICUBIC:
        reach *= 2.0
    centre = low + share * (offs.to(tl.float64) + 0.5)
    begin = tl.floor(centre - reach - 0.5) + 1.0
    # In fp32 the centre alone would cost the weights 5 digits.
    distance = (begin + 0.5 - centre).to(tl.float32)
    return begin.to(tl.int32), distance, tl.ceil(2.0 * reach).to(tl.int32), scale


@triton.jit
def weight_of(pixel, distance, scale, first, last, BICUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):
    t = tl.abs(distance) * scale
    if BICUBIC:
        a: tl.constexpr = -0.5 if ANTIALIAS else -0.75
        near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
        far = a * (t - 1.0) * (t - 2.0) * (t - 2.0)
        weight = tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - t, 0.0)
    if ANTIALIAS:
        weight = tl.where((pixel >= first) & (pixel <= last), weight, 0.0)
    return weight


@triton.jit
def inverse_sum(begin, distance, taps, scale, first, last, BICUBIC: tl.constexpr,
                ANTIALIAS: tl.constexpr):  # fmt: skip
    total = 0.0 * distance
    k = 0
    while k < taps:
        total += weight_of(begin + k, distance + k, scale, first, last, BICUBIC, ANTIALIAS)
        k += 1
    return 1.0 / total


@triton.jit
def place_of(pixel, first, last, length):
    """Outside the crop its edge is repeated, and outside the image the image's."""
    return tl.minimum(tl.maximum(tl.minimum(tl.maximum(pixel, first), last), 0), length - 1)


@triton.jit
def cosine_and_sine(turns):
    """Of fp64 turns, by series on an eighth of a turn: the library's need memory for large ones."""
    quarters = tl.floor(4.0 * turns + 0.5)
    r = (turns - 0.25 * quarters) * TWO_PI
    s = r * r
    cosine, sine = 1.0, 1.0
    for n in tl.static_range(12, 0, -2):
        cosine = 1.0 - s * (1.0 / (n * (n - 1))) * cosine
        sine = 1.0 - s * (1.0 / (n * (n + 1))) * sine
    sine *= r
    quarter = quarters.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def sampled(ptr, x, y, H, W, seen):
    """Bilinear samples at fp64 coordinates inside the image."""
    left, top = x.to(tl.int32), y.to(tl.int32)
    right, bottom = tl.minimum(left + 1, W - 1), tl.minimum(top + 1, H - 1)
    fx, fy = (x - left).to(tl.float32), (y - top).to(tl.float32)
    upper, lower = ptr + top.to(tl.int64) * W, ptr + bottom.to(tl.int64) * W
    a = tl.load(upper + left, mask=seen, other=0).to(tl.float32)
    b = tl.load(upper + right, mask=seen, other=0).to(tl.float32)
    c = tl.load(lower + left, mask=seen, other=0).to(tl.float32)
    d = tl.load(lower + right, mask=seen, other=0).to(tl.float32)
    up, down = a + fx * (b - a), c + fx * (d - c)
    return up + fy * (down - up)


@triton.jit
def rotated(ptr, plane, H, W, good, x0, y0, x1, y1, angle, i, j, PLANES: tl.constexpr,
            PER_SIZE: tl.constexpr):  # fmt: skip
    """Planes at rows i and columns j of the crop turned about its centre, edges repeated."""
    cosine, sine = cosine_and_sine(angle * (1.0 / TWO_PI))
    u = ((x1 - x0) * ((j.to(tl.float64) + 0.5) * PER_SIZE - 0.5))[None, :]
    v = ((y1 - y0) * ((i.to(tl.float64) + 0.5) * PER_SIZE - 0.5))[:, None]
    x = (x0 + x1) * 0.5 - 0.5 + cosine * u - sine * v
    y = (y0 + y1) * 0.5 - 0.5 + sine * u + cosine * v
    x = tl.minimum(tl.maximum(x, 0.0), (W - 1).to(tl.float64))
    y = tl.minimum(tl.maximum(y, 0.0), (H - 1).to(tl.float64))
    good = good & (tl.abs(angle) < INF)
    seen = x >= tl.where(good, 0.0, INF)
    share = tl.where(good, 1.0, float("nan"))
    r = share * sampled(ptr, x, y, H, W, seen)
    g, b = r, r
    if PLANES == 3:
        g = share * sampled(ptr + plane, x, y, H, W, seen)
        b = share * sampled(ptr + 2 * plane, x, y, H, W, seen)
    return r, g, b


@triton.jit
def resized(ptr, plane, H, W, good, x0, y0, x1, y1, i, j, PLANES: tl.constexpr,
            PER_SIZE: tl.constexpr, BICUBIC: tl.constexpr, ANTIALIAS: tl.constexpr):  # fmt: skip
    """Planes at rows i and columns j of the resized crop."""
    INTEGERS: tl.constexpr = ptr.dtype.element_ty == tl.uint8
    x, dx, taps_x, scale_x = taps_of(x0, x1, j, PER_SIZE, BICUBIC, ANTIALIAS)
    y, dy, taps_y, scale_y = taps_of(y0, y1, i, PER_SIZE, BICUBIC, ANTIALIAS)
    # Without taps the sums are 0 and their inverses infinite: NaN.
    taps_x, taps_y = tl.where(good, taps_x, 0), tl.where(good, taps_y, 0)
    left, top = tl.floor(x0).to(tl.int32), tl.floor(y0).to(tl.int32)
    right, bottom = tl.ceil(x1).to(tl.int32) - 1, tl.ceil(y1).to(tl.int32) - 1
    zeros = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    r, g, b = zeros, zeros, zeros
    k = 0
    while k < taps_y:
        w_y = weight_of(y + k, dy + k, scale_y, top, bottom, BICUBIC, ANTIALIAS)
        rows = ptr + place_of(y + k, top, bottom, H).to(tl.int64) * W
        r_row, g_row, b_row = zeros, zeros, zeros
        t = 0
        while t < taps_x:
            w_x = weight_of(x + t, dx + t, scale_x, left, right, BICUBIC, ANTIALIAS)
            ptrs = rows[:, None] + place_of(x + t, left, right, W)[None, :]
            # A NaN must not get in by a weight of 0.
            seen = None if INTEGERS else (w_y != 0.0)[:, None] & (w_x != 0.0)[None, :]
            other = None if INTEGERS else 0.0
            r_row += w_x[None, :] * tl.load(ptrs, seen, other).to(tl.float32)
            if PLANES == 3:
                g_row += w_x[None, :] * tl.load(ptrs + plane, seen, other).to(tl.float32)
                b_row += w_x[None, :] * tl.load(ptrs + 2 * plane, seen, other).to(tl.float32)
            t += 1
        r += w_y[:, None] * r_row
        if PLANES == 3:
            g += w_y[:, None] * g_row
            b += w_y[:, None] * b_row
        k += 1
    s_x = inverse_sum(x, dx, taps_x, scale_x, left, right, BICUBIC, ANTIALIAS)
    s_y = inverse_sum(y, dy, taps_y, scale_y, top, bottom, BICUBIC, ANTIALIAS)
    s = s_y[:, None] * s_x[None, :]
    return r * s, g * s, b * s


# -------------------------------------------------------------------------------------- colour


@triton.jit
def unit(x):
    return tl.clamp(x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def luminance(r, g, b):
    return RED * r + GREEN * g + BLUE * b


@triton.jit
def turned_hue(r, g, b, turns):
    """Value and chroma are kept. With the hue h in sixths of a turn, each channel is
    value - chroma w, w in [0, 1] a trapezoid of h."""
    shift = 6.0 * (turns - tl.floor(turns))
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = high - low
    over = tl.where(high == r, g - b, tl.where(high == g, b - r, r - g))
    base = tl.where(high == r, 0.0, tl.where(high == g, 2.0, 4.0))
    h = base + shift + over / tl.where(chroma == 0.0, 1.0, chroma)  # in [-1, 11)
    h = tl.where(h < 0.0, h + 6.0, tl.where(h >= 6.0, h - 6.0, h))
    value = high + 0.0 * (r + g + b)  # a comparison would lose a NaN
    r = unit(value - chroma * unit(2.0 - tl.abs(h - 3.0)))
    g = unit(value - chroma * unit(tl.abs(h - 2.0) - 1.0))
    b = unit(value - chroma * unit(tl.abs(h - 4.0) - 1.0))
    return r, g, b


@triton.jit
def operation(p_ptr, k):
    """The k-th in time; past the last one as if there were another contrast."""
    return tl.load(p_ptr + FIRST + k, mask=k < OPERATIONS, other=CONTRAST - BRIGHTNESS)


@triton.jit
def recoloured(r, g, b, p_ptr, first, PLANES: tl.constexpr):
    """Operations from the first-th to the next contrast, whose number comes last; grey if there is
    none."""
    k = first
    code = operation(p_ptr, k)
    while code != CONTRAST - BRIGHTNESS:
        if code == 0:
            factor = tl.load(p_ptr + BRIGHTNESS)
            r, g, b = unit(factor * r), unit(factor * g), unit(factor * b)
        if PLANES == 3:
            if code == SATURATION - BRIGHTNESS:
                factor = tl.load(p_ptr + SATURATION)
                rest = (1.0 - factor) * luminance(r, g, b)
                r, g, b = unit(factor * r + rest), unit(factor * g + rest), unit(factor * b + rest)
            if code == HUE - BRIGHTNESS:
                r, g, b = turned_hue(r, g, b, tl.load(p_ptr + HUE))
        k += 1
        code = operation(p_ptr, k)
    if PLANES == 3:
        if (k == OPERATIONS) & (tl.load(p_ptr + GRAY) != 0.0):
            r = luminance(r, g, b)
            g, b = r, r
    return r, g, b, k


@triton.jit
def random_word(index, epoch, view, seed, i):
    """Word i of noise, as fastssl/random.py counts them."""
    none = (i * 0).to(tl.uint32)
    words = tl.philox_impl(
        none + index.to(tl.uint32), none + epoch.to(tl.uint32),
        (view.to(tl.int32) << 24 | (NOISE_BLOCK + i // 4)).to(tl.uint32),
        none + ((index >> 32) | STREAM).to(tl.uint32), seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    lane = i % 4
    low = tl.where(lane == 0, words[0], words[1])
    word = tl.where(lane < 2, low, tl.where(lane == 2, words[2], words[3]))
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # in (0, 1)


@triton.jit
def finish(x, m, c, at, mask, p_ptr, noise_ptr, norm_ptr, out_ptr, C: tl.constexpr,
           SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Solarise, noise, clamp, normalise and round pixels `at` of channel c."""
    # A constant image stays constant: its pixels differ by the rounding of their weights.
    x = tl.where(x >= tl.load(p_ptr + SOLARIZE) - 1e-6, 1.0 - x, x)
    if tl.load(p_ptr + NOISE) > 0.0:
        if noise_ptr is None:
            x = x * float("nan")
        else:
            x += tl.load(noise_ptr + (m * C + c) * (SIZE * SIZE) + at, mask=mask, other=0.0)
    x = (unit(x) - tl.load(norm_ptr + c)) * tl.load(norm_ptr + C + c)
    out_ptr += m * (C * SIZE * SIZE)
    out_ptrs = out_ptr + (at * C + c if CHANNELS_LAST else c * (SIZE * SIZE) + at)
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def put(r, g, b, keep, m, c, at, mask, p_ptr, noise_ptr, norm_ptr, work_ptr, out_ptr,
        C: tl.constexpr, SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Pixels `at` for the next kernel, or into the result."""
    if keep:
        work_ptrs = work_ptr + (m * C + c) * (SIZE * SIZE) + at
        kind: tl.constexpr = work_ptr.dtype.element_ty
        tl.store(work_ptrs, r.to(kind), mask=mask)
        if C == 3:
            tl.store(work_ptrs + SIZE * SIZE, g.to(kind), mask=mask)
            tl.store(work_ptrs + 2 * SIZE * SIZE, b.to(kind), mask=mask)
    else:
        finish(r, m, c, at, mask, p_ptr, noise_ptr, norm_ptr, out_ptr, C, SIZE, CHANNELS_LAST)
        if C == 3:
            finish(g, m, 1, at, mask, p_ptr, noise_ptr, norm_ptr, out_ptr, C, SIZE, CHANNELS_LAST)
            finish(b, m, 2, at, mask, p_ptr, noise_ptr, norm_ptr, out_ptr, C, SIZE, CHANNELS_LAST)


# ------------------------------------------------------------------------------------- kernels


@triton.jit
def render_noise_kernel(params_ptr, key_ptr, noise_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Normal numbers, times the deviation, of BLOCK pairs of a view's COUNT elements by Box and
    Muller: cosines for the first half, sines for the second. 4 bytes written for each; fp64."""
    PAIRS: tl.constexpr = (COUNT + 1) // 2
    EACH: tl.constexpr = (PAIRS + BLOCK - 1) // BLOCK
    m = (tl.program_id(0) // EACH).to(tl.int64)
    deviation = tl.load(params_ptr + m * PARAMS + NOISE)
    if deviation > 0.0:
        index, epoch = tl.load(key_ptr + 4 * m), tl.load(key_ptr + 4 * m + 1)
        view, seed = tl.load(key_ptr + 4 * m + 2), tl.load(key_ptr + 4 * m + 3)
        pair = tl.program_id(0) % EACH * BLOCK + tl.arange(0, BLOCK)
        u = random_word(index, epoch, view, seed, pair)
        cosine, sine = cosine_and_sine(random_word(index, epoch, view, seed, PAIRS + pair))
        radius = deviation * tl.sqrt((-2.0 * tl.log(u)).to(tl.float32))
        noise_ptrs = noise_ptr + m * COUNT + pair
        tl.store(noise_ptrs, radius * cosine.to(tl.float32), mask=pair < PAIRS)
        tl.store(noise_ptrs + PAIRS, radius * sine.to(tl.float32), mask=PAIRS + pair < COUNT)


@triton.jit(do_not_specialize=["P", "B"])
def render_crop_kernel(
    pixels_ptr, offsets_ptr, sizes_ptr, source_ptr, params_ptr, noise_ptr, norm_ptr, work_ptr,
    part_ptr, out_ptr, P, B,
    C: tl.constexpr, SIZE: tl.constexpr, PER_SIZE: tl.constexpr, BICUBIC: tl.constexpr,
    ANTIALIAS: tl.constexpr, CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Views up to contrast or blur, or to their end: a TILE x TILE square of three planes, or of
    one where there are not just three, a program.

    x_ij = sum_y w_iy sum_x w_jx pixel_yx: the taps of both axes straight from the image, which the
    first cache holds; at any shrinking at most twice the taps of two passes, without a pass between
    them. Turns and the flip change where a pixel goes. Where contrast comes next the square's sum
    of luminance goes to `part`. Weights are differences in fp64, then fp32.
    """
    PLANES: tl.constexpr = 3 if C == 3 else 1
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE
    EACH: tl.constexpr = C // PLANES * ACROSS * ACROSS
    m = (tl.program_id(0) // EACH).to(tl.int64)
    part = tl.program_id(0) % EACH
    c = part // (ACROSS * ACROSS)
    i = part // ACROSS % ACROSS * TILE + tl.arange(0, TILE)  # row of the crop
    j = part % ACROSS * TILE + tl.arange(0, TILE)  # column of the crop
    mask = (i < SIZE)[:, None] & (j < SIZE)[None, :]
    p_ptr = params_ptr + m * PARAMS

    source = tl.load(source_ptr + m)
    good = (source >= 0) & (source < B)
    at = tl.load(offsets_ptr + source, mask=good, other=-1)
    H = tl.load(sizes_ptr + 2 * source, mask=good, other=1)
    W = tl.load(sizes_ptr + 2 * source + 1, mask=good, other=1)
    good = good & (at >= 0) & (H > 0) & (W > 0) & (H < 2**31) & (W < 2**31)
    good = good & (H * W <= (P - at) // C)
    low_x, low_y = tl.load(p_ptr + X0), tl.load(p_ptr + Y0)
    high_x, high_y = tl.load(p_ptr + X1), tl.load(p_ptr + Y1)
    good = good & (low_x >= -FARTHEST) & (low_x < high_x) & (high_x <= FARTHEST)
    good = good & (low_y >= -FARTHEST) & (low_y < high_y) & (high_y <= FARTHEST)
    plane = H * W
    ptr = pixels_ptr + at + c * plane
    H, W = H.to(tl.int32), W.to(tl.int32)
    x0, y0 = low_x.to(tl.float64), low_y.to(tl.float64)
    x1, y1 = high_x.to(tl.float64), high_y.to(tl.float64)
    angle = tl.load(p_ptr + ANGLE).to(tl.float64)

    if angle == 0.0:
        red, green, blue = resized(
            ptr, plane, H, W, good, x0, y0, x1, y1, i, j, PLANES, PER_SIZE, BICUBIC, ANTIALIAS
        )
    else:
        red, green, blue = rotated(
            ptr, plane, H, W, good, x0, y0, x1, y1, angle, i, j, PLANES, PER_SIZE
        )
    if pixels_ptr.dtype.element_ty == tl.uint8:
        red, green, blue = red * (1.0 / 255), green * (1.0 / 255), blue * (1.0 / 255)
    red, green, blue, k = recoloured(red, green, blue, p_ptr, 0, PLANES)

    # Quarter turns are mirror images of the crop or of its transpose.
    turns = tl.load(p_ptr + TURNS).to(tl.int32) & 3
    flip = tl.load(p_ptr + FLIP) != 0.0
    across = (turns & 1) == 1
    mirrored_x = ((turns == 1) | (turns == 2)) ^ (flip & ~across)
    mirrored_y = (turns >= 2) ^ (flip & across)
    row, column = tl.where(mirrored_y, SIZE - 1 - i, i), tl.where(mirrored_x, SIZE - 1 - j, j)
    at = row[:, None] * tl.where(across, 1, SIZE) + column[None, :] * tl.where(across, SIZE, 1)

    blurred = (tl.load(p_ptr + SIGMA) > 0.0) & (SIZE > 1)
    put(
        red, green, blue, (k < OPERATIONS) | blurred, m, c, at, mask, p_ptr, noise_ptr, norm_ptr,
        work_ptr, out_ptr, C, SIZE, CHANNELS_LAST,
    )  # fmt: skip
    if k < OPERATIONS:
        light = luminance(red, green, blue) if PLANES == 3 else red
        total = tl.sum(tl.sum(tl.where(mask, light, 0.0), 1), 0)
        tl.store(part_ptr + m * EACH + part, total)


@triton.jit
def render_colour_kernel(
    params_ptr, noise_ptr, norm_ptr, work_ptr, part_ptr, out_ptr,
    C: tl.constexpr, SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Contrast, x = f x + (1 - f) mean, and what comes after it, to the blur or to the end: BLOCK
    pixels of three planes, or of one, a program.

    4 bytes moved an element in 16 bits. The sum of the squares' sums is a tree in fp32.
    """
    PLANES: tl.constexpr = 3 if C == 3 else 1
    BLOCKS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    EACH: tl.constexpr = C // PLANES * BLOCKS
    m = (tl.program_id(0) // EACH).to(tl.int64)
    c = tl.program_id(0) % EACH // BLOCKS
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE * SIZE
    p_ptr = params_ptr + m * PARAMS
    k = 0
    while operation(p_ptr, k) != CONTRAST - BRIGHTNESS:
        k += 1
    if k < OPERATIONS:
        offs = tl.arange(0, triton.next_power_of_2(PARTS))
        parts = tl.load(part_ptr + m * PARTS + offs, mask=offs < PARTS, other=0.0)
        PIXELS: tl.constexpr = C // PLANES * SIZE * SIZE
        factor = tl.load(p_ptr + CONTRAST)
        rest = (1.0 - factor) * (tl.sum(parts, 0) / PIXELS)
        work_ptrs = work_ptr + (m * C + c) * (SIZE * SIZE) + at
        r = unit(factor * tl.load(work_ptrs, mask=mask, other=0.0).to(tl.float32) + rest)
        g, b = r, r
        if PLANES == 3:
            g = tl.load(work_ptrs + SIZE * SIZE, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(work_ptrs + 2 * SIZE * SIZE, mask=mask, other=0.0).to(tl.float32)
            g, b = unit(factor * g + rest), unit(factor * b + rest)
        r, g, b, again = recoloured(r, g, b, p_ptr, k + 1, PLANES)
        spoilt = tl.where(again < OPERATIONS, float("nan"), 0.0)
        r, g, b = r + spoilt, g + spoilt, b + spoilt
        blurred = (tl.load(p_ptr + SIGMA) > 0.0) & (SIZE > 1)
        put(
            r, g, b, blurred, m, c, at, mask, p_ptr, noise_ptr, norm_ptr, work_ptr, out_ptr, C,
            SIZE, CHANNELS_LAST,
        )  # fmt: skip


@triton.jit
def reflected(place, SIZE: tl.constexpr):
    """Past an edge pixels come again; further out than the blur sees, the last one stays."""
    place = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(place))
    return tl.maximum(place, 0)


@triton.jit
def band(offs_i, offs_k, sigma, inverse, RADIUS: tl.constexpr):
    """Weights for pixel i of pixel k, counted from RADIUS before the tile; whether it is seen."""
    away = offs_k - RADIUS - offs_i
    seen = tl.abs(away) <= RADIUS
    t = away.to(tl.float32) / sigma
    return tl.where(seen, tl.exp(-0.5 * t * t) * inverse, 0.0), seen


@triton.jit
def between_bands(work_ptr, row, column, sigma, inverse, steps, SIZE: tl.constexpr,
                  RADIUS: tl.constexpr, NANS: tl.constexpr, REACH: tl.constexpr,
                  TILE: tl.constexpr):  # fmt: skip
    """A X B; or with REACH, of 1 for what is NaN and for what is seen: above 0 where a NaN gets."""
    offs = tl.arange(0, TILE)
    out = tl.zeros((TILE, TILE), tl.float32)
    k = 0
    while k < steps:
        rows = reflected(row - RADIUS + k * TILE + offs, SIZE) * SIZE
        y = tl.zeros((TILE, TILE), tl.float32)
        t = 0
        while t < steps:
            columns = reflected(column - RADIUS + t * TILE + offs, SIZE)
            x = tl.load(work_ptr + rows[:, None] + columns[None, :]).to(tl.float32)
            right, seen = band(offs[None, :], t * TILE + offs[:, None], sigma, inverse, RADIUS)
            if REACH:
                y = tl.dot((x != x).to(tl.float16), seen.to(tl.float16), y)
            else:
                if NANS:
                    x = tl.where(x == x, x, 0.0)
                y = tl.dot(x, right, y, input_precision="tf32x3")
            t += 1
        left, seen = band(offs[:, None], k * TILE + offs[None, :], sigma, inverse, RADIUS)
        if REACH:
            out = tl.dot(seen.to(tl.float16), y.to(tl.float16), out)
        else:
            out = tl.dot(left, y, out, input_precision="tf32x3")
        k += 1
    return out


@triton.jit(do_not_specialize=["steps"])
def render_blur_kernel(
    params_ptr, noise_ptr, norm_ptr, work_ptr, out_ptr, steps,
    C: tl.constexpr, SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr, RADIUS: tl.constexpr,
    NANS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Y = A X B of a TILE x TILE square of one plane a program, and the end of its way.

    A and B are bands of Gaussian weights made in registers, X the square with RADIUS pixels about
    it, reflected at the edges, in steps of TILE: both passes at once as products on tensor cores,
    in three of TF32, which lose nothing of fp32. A load of 4 elements or more for each of the
    result, from caches. In a product a weight of 0 would spread a NaN: with images that can have
    some they are left out, and put where they get.
    """
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE
    EACH: tl.constexpr = C * ACROSS * ACROSS
    m = (tl.program_id(0) // EACH).to(tl.int64)
    p_ptr = params_ptr + m * PARAMS
    sigma = tl.load(p_ptr + SIGMA)
    if sigma > 0.0:
        part = tl.program_id(0) % EACH
        c = part // (ACROSS * ACROSS)
        row, column = part // ACROSS % ACROSS * TILE, part % ACROSS * TILE
        work_ptr += (m * C + c) * (SIZE * SIZE)
        taps, _ = band(0, tl.arange(0, triton.next_power_of_2(2 * RADIUS + 1)), sigma, 1.0, RADIUS)
        inverse = 1.0 / tl.sum(taps, 0)
        x = between_bands(
            work_ptr, row, column, sigma, inverse, steps, SIZE, RADIUS, NANS, False, TILE
        )
        if NANS:
            reached = between_bands(
                work_ptr, row, column, sigma, inverse, steps, SIZE, RADIUS, NANS, True, TILE
            )
            x = tl.where(reached > 0.0, float("nan"), x)
        i, j = row + tl.arange(0, TILE), column + tl.arange(0, TILE)
        mask = (i < SIZE)[:, None] & (j < SIZE)[None, :]
        at = i[:, None] * SIZE + j[None, :]
        finish(x, m, c, at, mask, p_ptr, noise_ptr, norm_ptr, out_ptr, C, SIZE, CHANNELS_LAST)


# ------------------------------------------------------------------------------------- launchers

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
CROP = {"TILE": 32} | OPTIONS | {"num_warps": 8}
COLOUR = {"BLOCK": 1024} | OPTIONS
BLUR = {"TILE": 32} | OPTIONS
PAIRS = {"BLOCK": 256} | OPTIONS  # of numbers of noise


def crop_constants(bicubic: bool) -> dict:
    # Loads wait for one another: a third program on a multiprocessor hides some of it.
    return CROP if bicubic else CROP | {"maxnreg": 80}


def parts_of(channels: int, size: int) -> int:
    """Squares of a view, each with a sum of its own."""
    return (1 if channels == 3 else channels) * triton.cdiv(size, CROP["TILE"]) ** 2


@functools.lru_cache(64)
def normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, C): what is taken away, and the factors after it. Kept, as a copy to the GPU waits."""
    return torch.tensor([mean, [1.0 / s for s in std]], dtype=torch.float32, device=device)


def render_views(
    pixels: Tensor,  # (P,) uint8 or float32
    offsets: Tensor,  # (B,) int64
    sizes: Tensor,  # (B, 2) int64
    source: Tensor,  # (M,) int64
    params: Tensor,  # (M, PARAMS) float32
    channels: int,
    size: int,
    bicubic: bool,
    antialias: bool,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    noise_key: Tensor | None,  # (M, 4) int64
) -> Tensor:
    """(M, C, size, size)."""
    if channels * size**2 >= 2**31:
        raise ValueError(
            f"render_views: a view must have fewer than 2^31 elements, got {channels} x {size} x "
            f"{size}. Take smaller views."
        )
    M = len(params)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = M, channels, size, size
    out = torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=layout)
    if M == 0:
        return out
    work = out.new_empty(shape, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
    parts = parts_of(channels, size)
    part = params.new_empty(M, parts)
    norm = normalisation(tuple(mean), tuple(std), pixels.device)
    known = {"C": channels, "SIZE": size, "CHANNELS_LAST": channels_last}
    squares = triton.cdiv(size, BLUR["TILE"]) ** 2
    blocks = triton.cdiv(size**2, COLOUR["BLOCK"]) * (1 if channels == 3 else channels)
    noise = None
    with device_of(pixels):
        if noise_key is not None:
            count = channels * size**2
            noise = params.new_empty(M, count)
            programs = M * triton.cdiv(triton.cdiv(count, 2), PAIRS["BLOCK"])
            render_noise_kernel[(programs,)](params, noise_key, noise, COUNT=count, **PAIRS)
        render_crop_kernel[(M * parts,)](
            pixels, offsets, sizes, source, params, noise, norm, work, part, out,
            pixels.numel(), len(offsets), PER_SIZE=1.0 / size, BICUBIC=bicubic,
            ANTIALIAS=antialias, **known, **crop_constants(bicubic),
        )  # fmt: skip
        render_colour_kernel[(M * blocks,)](
            params, noise, norm, work, part, out, PARTS=parts, **known, **COLOUR
        )
        if size > 1:
            radius = max(1, size // 20)
            steps = triton.cdiv(BLUR["TILE"] + 2 * radius, BLUR["TILE"])
            render_blur_kernel[(M * channels * squares,)](
                params, noise, norm, work, out, steps, RADIUS=radius,
                NANS=pixels.is_floating_point(), **known, **BLUR,
            )  # fmt: skip
    return out
