"""Triton kernel of the op `view_parameters`."""

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of
from torch import Tensor

from fastssl import random
from fastssl.ops import augment as params
from fastssl.ops import view_parameters as op

STREAM = tl.constexpr(random.AUGMENT << 24)
TRIES, PARAMS, SPEC = (tl.constexpr(n) for n in (op.TRIES, params.PARAMS, op.SPEC))
# Columns of a specification.
CROP, AREA, RATIO, PAD, SHIFT, ROTATION, TURNS_P, FLIP_P = (
    tl.constexpr(n)
    for n in (
        op.CROP, op.AREA, op.RATIO, op.PAD, op.SHIFT, op.ROTATION, op.TURNS_P, op.FLIP_P,
    )
)  # fmt: skip
JITTER_P, FACTORS, GRAY_P, BLUR_P, BLUR, SOLARIZE_P, THRESHOLD, NOISE_STD = (
    tl.constexpr(n)
    for n in (
        op.JITTER_P, op.FACTORS, op.GRAY_P, op.BLUR_P, op.BLUR, op.SOLARIZE_P, op.THRESHOLD,
        op.NOISE_STD,
    )
)  # fmt: skip
# Numbers of a sample; the crop's tries come first, two to a block of four numbers.
LATER = tl.constexpr(op.U_POSITION)
U_POSITION, U_ANGLE, U_FLIP, U_JITTER, U_ORDER, U_GRAY, U_BLUR, U_SOLARIZE, U_TURNS, U_SHIFT = (
    tl.constexpr(n - op.U_POSITION)
    for n in (
        op.U_POSITION, op.U_ANGLE, op.U_FLIP, op.U_JITTER, op.U_ORDER, op.U_GRAY, op.U_BLUR,
        op.U_SOLARIZE, op.U_TURNS, op.U_SHIFT,
    )
)  # fmt: skip
LATER_BLOCKS = tl.constexpr((op.NUMBERS - op.U_POSITION + 3) // 4)
# Columns of the result.
X0, ANGLE, TURNS, FLIP, BRIGHTNESS, FIRST, GRAY, SIGMA, SOLARIZE, NOISE = (
    tl.constexpr(n)
    for n in (
        params.X0, params.ANGLE, params.TURNS, params.FLIP, params.BRIGHTNESS, params.FIRST,
        params.GRAY, params.SIGMA, params.SOLARIZE, params.NOISE,
    )
)  # fmt: skip
# 1.5 * 2^52: added and taken away, it rounds half to even as torchvision's round.
ROUND = tl.constexpr(6755399441055744.0)


@triton.jit
def uniforms(seed, epoch, index, view, block):
    """Numbers 4 block .. 4 block + 3 of each sample, float64 in (0, 1)."""
    none = index.to(tl.uint32) * 0
    words = tl.philox_impl(
        index.to(tl.uint32), none + epoch.to(tl.uint32), none + (view << 24 | block).to(tl.uint32),
        ((index >> 32) | STREAM).to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    out = ()
    for i in tl.static_range(4):
        out = out + ((words[i].to(tl.float64) + 0.5) * 2.3283064365386963e-10,)
    return out


@triton.jit
def between(ptr, u):
    low = tl.load(ptr)
    return low + (tl.load(ptr + 1) - low) * u


@triton.jit
def pixels(x, whole):
    return tl.where(whole, (x + ROUND) - ROUND, x)


@triton.jit
def corner(free, u, whole, fits):
    """Uniform in 0 .. free, in the middle where no try fits."""
    drawn = tl.where(whole, tl.floor(u * (free + 1)), u * free)
    return tl.where(fits, drawn, tl.where(whole, tl.floor(free / 2), free / 2))


@triton.jit
def drawn_box(s_ptr, seed, epoch, index, view, H, W, x, y):
    """x0, y0, w and h of the random crop; x and y place it."""
    pad = tl.load(s_ptr + PAD)
    whole = pad == 0
    high, wide = H * (1 + 2 * pad), W * (1 + 2 * pad)
    least, most = tl.load(s_ptr + RATIO), tl.load(s_ptr + RATIO + 1)
    log_least, log_most = tl.log(least), tl.log(most)
    shape = wide / high
    fallback = tl.where(whole, 1.0, 0.0)
    w = tl.maximum(pixels(tl.where(shape > most, high * most, wide), whole), fallback)
    h = tl.maximum(pixels(tl.where(shape < least, wide / least, high), whole), fallback)
    fits = index < 0  # none yet
    for pair in range(TRIES // 2):
        u = uniforms(seed, epoch, index, view, pair)
        for i in tl.static_range(2):
            area = between(s_ptr + AREA, u[2 * i]) * (wide * high)
            ratio = tl.exp(log_least + (log_most - log_least) * u[2 * i + 1])
            w_try = pixels(tl.sqrt(area * ratio), whole)
            h_try = pixels(tl.sqrt(area / ratio), whole)
            good = (w_try > 0) & (w_try <= wide) & (h_try > 0) & (h_try <= high)
            w, h = tl.where(good & ~fits, w_try, w), tl.where(good & ~fits, h_try, h)
            fits = fits | good
    x0, y0 = corner(wide - w, x, whole, fits) - pad * W, corner(high - h, y, whole, fits) - pad * H
    return x0, y0, w, h


@triton.jit
def order_of(u):
    """The permutation of 0 .. 3 that comes at u of all 24 in lexical order."""
    n = tl.floor(24 * u).to(tl.int32)
    first, b, odd = n // 6, n % 6 // 2, n % 2 == 1
    second = tl.where(b >= first, b + 1, b)
    smallest = tl.where((first == 0) | (second == 0), 1, 0)
    smallest = tl.where((smallest == 1) & ((first == 1) | (second == 1)), 2, smallest)
    other = 6 - first - second - smallest
    return first, second, tl.where(odd, other, smallest), tl.where(odd, smallest, other)


@triton.jit(do_not_specialize=["B", "seed", "epoch"])
def view_parameters_kernel(
    index_ptr, sizes_ptr, spec_ptr, out_ptr, B, seed, epoch, BLOCK: tl.constexpr
):
    """Rows (v, b) of the result for BLOCK samples of one view: 10 blocks of Philox4x32-10 and ten
    tries for a crop, of which the first that fits counts; see the reference for the formulas.

    24 bytes read and 80 written a row. fp64 throughout, rounded once. Philox: SC 2011.
    """
    view = tl.program_id(1)
    seed, epoch = seed.to(tl.int64), epoch.to(tl.int64)
    offs_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_b = offs_b < B
    index = tl.load(index_ptr + offs_b, mask=mask_b, other=0)
    H = tl.load(sizes_ptr + 2 * offs_b, mask=mask_b, other=1).to(tl.float64)
    W = tl.load(sizes_ptr + 2 * offs_b + 1, mask=mask_b, other=1).to(tl.float64)
    s_ptr = spec_ptr + view * SPEC
    out_ptrs = out_ptr + (view * B + offs_b).to(tl.int64) * PARAMS
    u = ()
    for block in tl.static_range(LATER_BLOCKS):
        u = u + uniforms(seed, epoch, index, view, LATER // 4 + block)

    x0, y0, w, h = drawn_box(
        s_ptr, seed, epoch, index, view, H, W, u[U_POSITION], u[U_POSITION + 1]
    )
    random = tl.load(s_ptr + CROP) != 0
    x0, y0 = tl.where(random, x0, 0.0), tl.where(random, y0, 0.0)
    w, h = tl.where(random, w, W), tl.where(random, h, H)
    shift = tl.load(s_ptr + SHIFT)
    x0 += shift * (2 * u[U_SHIFT] - 1) * w
    y0 += shift * (2 * u[U_SHIFT + 1] - 1) * h
    box = (x0, y0, x0 + w, y0 + h)
    for i in tl.static_range(4):
        tl.store(out_ptrs + X0 + i, box[i].to(tl.float32), mask=mask_b)

    angle = tl.load(s_ptr + ROTATION) * (2 * u[U_ANGLE] - 1)
    tl.store(out_ptrs + ANGLE, angle.to(tl.float32), mask=mask_b)
    turned = u[U_TURNS] < tl.load(s_ptr + TURNS_P)
    turns = tl.where(turned, tl.floor(4 * u[U_TURNS + 1]), 0.0)
    tl.store(out_ptrs + TURNS, turns.to(tl.float32), mask=mask_b)
    flip = u[U_FLIP] < tl.load(s_ptr + FLIP_P)
    tl.store(out_ptrs + FLIP, flip.to(tl.float32), mask=mask_b)

    order = order_of(u[U_ORDER])
    used = 0  # a bit an operation
    for i in tl.static_range(4):
        range_ptr = s_ptr + FACTORS + 2 * i
        factor = between(range_ptr, u[U_JITTER + 1 + i])
        tl.store(out_ptrs + BRIGHTNESS + i, factor.to(tl.float32), mask=mask_b)
        neutral = 0.0 if i == 3 else 1.0
        changes = (tl.load(range_ptr) != neutral) | (tl.load(range_ptr + 1) != neutral)
        used = used | (changes.to(tl.int32) << i)
    jittered = u[U_JITTER] < tl.load(s_ptr + JITTER_P)
    for i in tl.static_range(4):
        applied = jittered & ((used >> order[i] & 1) == 1)
        operation = tl.where(applied, order[i], -1)
        tl.store(out_ptrs + FIRST + i, operation.to(tl.float32), mask=mask_b)

    gray = u[U_GRAY] < tl.load(s_ptr + GRAY_P)
    tl.store(out_ptrs + GRAY, gray.to(tl.float32), mask=mask_b)
    blurred = u[U_BLUR] < tl.load(s_ptr + BLUR_P)
    sigma = tl.where(blurred, between(s_ptr + BLUR, u[U_BLUR + 1]), 0.0)
    tl.store(out_ptrs + SIGMA, sigma.to(tl.float32), mask=mask_b)
    solarized = u[U_SOLARIZE] < tl.load(s_ptr + SOLARIZE_P)
    threshold = tl.where(solarized, tl.load(s_ptr + THRESHOLD), float("inf"))
    tl.store(out_ptrs + SOLARIZE, threshold.to(tl.float32), mask=mask_b)
    none = tl.zeros((BLOCK,), tl.float32)
    tl.store(out_ptrs + NOISE, none + tl.load(s_ptr + NOISE_STD).to(tl.float32), mask=mask_b)
    tl.store(out_ptrs + PARAMS - 1, none, mask=mask_b)


def options() -> dict:
    # Without fused products the last bits are those of the CPU.
    return {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": False}


def view_parameters(
    index: Tensor,  # (B,) int64
    sizes: Tensor,  # (B, 2) int64
    spec: Tensor,  # (V, SPEC) float64
    seed: int,
    epoch: int,
) -> Tensor:
    """(V, B, PARAMS) float32 in one launch."""
    B, V = len(index), len(spec)
    out = index.new_empty(V, B, params.PARAMS, dtype=torch.float32)
    if B and V:
        known = options()
        with device_of(index):
            view_parameters_kernel[triton.cdiv(B, known["BLOCK"]), V](
                index.contiguous(), sizes.contiguous(), spec, out, B, seed, epoch, **known
            )
    return out
