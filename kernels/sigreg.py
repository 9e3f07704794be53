"""Triton kernels of the op `sigreg`: directions, sums for characteristic functions, and back.

Projections p = z A (G N, S) are stored in fp32. Threads then keep to their slices and walk rows.
Each element costs one range reduction and one pair of polynomials, for c_1 + i s_1 = e^(i h p);
powers follow by complex products, whose error grows like the power (that of a recurrence of three
terms like its square). Of the anchors b = 5, 10, 15, .. with j = 1, 2
cos((b +- j) h p) = c_b c_j -+ s_b s_j and sin((b +- j) h p) = s_b c_j +- c_b s_j, so that ten sums
of products give five knots, and a series over five knots is ten products.
"""

import math

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of, plain_rows, splits_of
from torch import Tensor

from fastssl.random import SLICES

ANCHORS = 3  # of one launch: 34 sums or coefficients for each of two elements fit the registers
ROWS_A_LANE = 64  # in fp32; more would show near the null, where sums are nearly N phi
PI = tl.constexpr(math.pi)
# 1.5 * 2^23: added, it leaves an integer in the low bits of a number.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def with_sign(x, odd):
    return (x.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)


@triton.jit
def cos_sin(x, rounded):
    """cos and sin of x + n pi, n the low bits of `rounded`, |x| <= pi / 2; errors below 1.2e-7."""
    y = x * x
    s = y * 2.5992424070864217e-6 - 1.9806249474640936e-4
    s = (s * y + 8.333012461662292e-3) * y - 1.6666656732559204e-1
    c = y * -2.6069372438541905e-7 + 2.4761466193012893e-5
    c = ((c * y - 1.3888395624235272e-3) * y + 4.166664183139801e-2) * y - 0.5
    odd = rounded.to(tl.int32, bitcast=True) << 31
    return with_sign(c * y + 1.0, odd), with_sign(x + x * (y * s), odd)


@triton.jit
def times(c, s, d, t):
    """(c + i s) (d + i t)"""
    return c * d - s * t, s * d + c * t


@triton.jit
def powers(p, inside, spacing, per_pi, pi_1, pi_2, pi_3):
    """Powers 1, 2 and 5 of e^(i h p); 0 where not inside."""
    # pi / h = pi_1 + pi_2 + pi_3, the first two of 12 bits: products with |n| < 2^12 are exact,
    # fused or not, and so are the differences.
    rounded = p * per_pi + ROUND
    n = rounded - ROUND
    x = (((p - n * pi_1) - n * pi_2) - n * pi_3) * spacing
    # Out of reach (|p| > 2^12 pi / h) anything of length 1 will do; NaN stays.
    x = tl.where(tl.abs(x) > 1.6, 0.0, x)
    c1, s1 = cos_sin(x, rounded)
    c1, s1 = tl.where(inside, c1, 0.0), tl.where(inside, s1, 0.0)
    c2, s2 = times(c1, s1, c1, s1)
    c3, s3 = times(c2, s2, c1, s1)
    c5, s5 = times(c3, s3, c2, s2)
    return c1, s1, c2, s2, c5, s5


@triton.jit
def load_tile(ptr, start, last, S, offs_s, BLOCK_N: tl.constexpr):
    """(BLOCK_N, BLOCK_S) of rows start.. of (.., S), and which are rows before `last`."""
    offs_n = tl.arange(0, BLOCK_N)
    inside = (start + offs_n < last)[:, None]
    ptrs = ptr + tl.cast(start, tl.int64) * S + offs_n[:, None] * S + offs_s[None, :]
    return tl.load(ptrs, mask=inside & (offs_s < S)[None, :], other=0.0), inside


@triton.jit
def place(N, S, span, BLOCK_S: tl.constexpr):
    """A program's group, first and last row, and slices."""
    blocks = tl.cdiv(S, BLOCK_S)
    first = tl.program_id(1) * span
    offs_s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    return tl.program_id(0) // blocks, first, tl.minimum(N, first + span), offs_s


# --------------------------------------------------------------------------------------- forward


@triton.jit
def store_knot(ptr, cos_sum, sin_sum, S, offs_s, k: tl.constexpr, KNOTS: tl.constexpr):
    if k <= KNOTS:
        tl.store(ptr + (k - 1) * S + offs_s, cos_sum, mask=offs_s < S)
        tl.store(ptr + (KNOTS + k - 1) * S + offs_s, sin_sum, mask=offs_s < S)


@triton.jit
def add_rows(a, b):
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def add_rows_of_four(a, b, c, d):
    """Sums over the rows of four tiles, for which warps meet once."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def store_anchor(ptr, of, S, offs_s, b: tl.constexpr, KNOTS: tl.constexpr):
    c, s = add_rows(of[0], of[1])
    store_knot(ptr, c, s, S, offs_s, b, KNOTS)
    for j in tl.static_range(1, 3):
        cc, ss, sc, cs = add_rows_of_four(of[4 * j - 2], of[4 * j - 1], of[4 * j], of[4 * j + 1])
        store_knot(ptr, cc + ss, sc - cs, S, offs_s, b - j, KNOTS)
        store_knot(ptr, cc - ss, sc + cs, S, offs_s, b + j, KNOTS)


# S is not specialised: told that rows are aligned Triton gives a thread two slices of a row, whose
# sums pass between threads one by one; else two rows of a slice, which are added first.
@triton.jit(do_not_specialize=["N", "S", "groups", "span"])
def sigreg_fwd_kernel(
    p_ptr, part_ptr, spacing, per_pi, pi_1, pi_2, pi_3, N, S, groups, span,
    KNOTS: tl.constexpr, FIRST: tl.constexpr, ANCHORS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sums of cos(k h p) and sin(k h p) over `span` rows, for the knots around the anchors
    5 (FIRST + 1), .., and for knots 1 and 2 with the first of them.

    A program owns BLOCK_S slices of one group: 4 bytes read and about 90 operations an element,
    8 bytes written for a slice, knot and span. Safe: a lane adds at most 64 rows; lanes meet in a
    tree, spans in fp64. A NaN or an infinity makes its slice NaN.
    LeJEPA: arXiv:2511.08544.
    """
    group, first, last, offs_s = place(N, S, span, BLOCK_S)
    p_ptr += tl.cast(group, tl.int64) * N * S
    zero = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    low = (zero, zero, zero, zero)
    sums = ()
    for _ in tl.static_range(ANCHORS):
        sums = sums + ((zero, zero, zero, zero, zero, zero, zero, zero, zero, zero),)
    following, among = load_tile(p_ptr, first, last, S, offs_s, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N):
        p, inside = following, among
        # The next tile is on its way while this one is worked on.
        following, among = load_tile(p_ptr, start + BLOCK_N, last, S, offs_s, BLOCK_N)
        c1, s1, c2, s2, c5, s5 = powers(p, inside, spacing, per_pi, pi_1, pi_2, pi_3)
        low = (low[0] + c1, low[1] + s1, low[2] + c2, low[3] + s2)
        c, s = c5, s5
        for _ in tl.static_range(FIRST):
            c, s = times(c, s, c5, s5)
        grown = ()
        for a in tl.static_range(ANCHORS):
            of = sums[a]
            grown = grown + ((
                of[0] + c, of[1] + s,
                of[2] + c * c1, of[3] + s * s1, of[4] + s * c1, of[5] + c * s1,
                of[6] + c * c2, of[7] + s * s2, of[8] + s * c2, of[9] + c * s2,
            ),)  # fmt: skip
            c, s = times(c, s, c5, s5)
        sums = grown
    part = tl.cast(tl.program_id(1), tl.int64) * groups + group
    part_ptr += part * 2 * KNOTS * S
    if FIRST == 0:
        c1, s1, c2, s2 = add_rows_of_four(low[0], low[1], low[2], low[3])
        store_knot(part_ptr, c1, s1, S, offs_s, 1, KNOTS)
        store_knot(part_ptr, c2, s2, S, offs_s, 2, KNOTS)
    for a in tl.static_range(ANCHORS):
        store_anchor(part_ptr, sums[a], S, offs_s, 5 * (FIRST + a + 1), KNOTS)


@triton.jit(do_not_specialize=["N", "groups", "parts"])
def sigreg_merge_kernel(
    part_ptr, left_ptr, out_ptr, N, S, groups, parts,
    SPACING: tl.constexpr, KNOTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """X = sum of parts - N phi_k or Y = sum of parts, of one knot and group, in fixed order. The
    rows of zeros that do not count, if any, have added 1 to each cosine.

    In fp64: X is the small difference of large sums, and an error of phi counts N times.
    """
    plane, planes = tl.program_id(0), groups * 2 * KNOTS
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_P, BLOCK_S), tl.float64)
    for start in tl.range(0, parts, BLOCK_P):
        at = start + tl.arange(0, BLOCK_P)
        rows = part_ptr + (tl.cast(at, tl.int64) * planes + plane)[:, None] * S
        mask = (at < parts)[:, None] & (offs_s < S)[None, :]
        total += tl.load(rows + offs_s[None, :], mask=mask, other=0.0)
    k = plane % (2 * KNOTS) + 1
    t = tl.cast(k, tl.float64) * SPACING
    phi = tl.where(k <= KNOTS, tl.exp(t * t * -0.5), 0.0)
    out = tl.sum(total, 0) - phi * N
    if left_ptr is not None:
        zeros = tl.load(left_ptr + plane // (2 * KNOTS)).to(tl.float64)
        out -= tl.where(k <= KNOTS, zeros * (1.0 - phi), 0.0)
    tl.store(out_ptr + tl.cast(plane, tl.int64) * S + offs_s, out.to(tl.float32), mask=offs_s < S)


# -------------------------------------------------------------------------------------- backward


@triton.jit
def load_knot(ptr, S, offs_s, k: tl.constexpr, KNOTS: tl.constexpr):
    """a_k and b_k (1, BLOCK_S), 0 past the last knot."""
    mask = (offs_s < S) & (k <= KNOTS)
    a = tl.load(ptr + (k - 1) * S + offs_s, mask=mask, other=0.0)
    b = tl.load(ptr + (KNOTS + k - 1) * S + offs_s, mask=mask, other=0.0)
    return a[None, :], b[None, :]


@triton.jit
def load_anchor(ptr, S, offs_s, b: tl.constexpr, KNOTS: tl.constexpr):
    """What c_b and s_b are multiplied by, in the order of the sums of `sigreg_fwd_kernel`."""
    of = load_knot(ptr, S, offs_s, b, KNOTS)
    for j in tl.static_range(1, 3):
        a_up, b_up = load_knot(ptr, S, offs_s, b + j, KNOTS)
        a_down, b_down = load_knot(ptr, S, offs_s, b - j, KNOTS)
        of = of + (a_up + a_down, a_down - a_up, b_up + b_down, b_up - b_down)
    return of


@triton.jit(do_not_specialize=["N", "span"])
def sigreg_bwd_kernel(
    p_ptr, series_ptr, out_ptr, spacing, per_pi, pi_1, pi_2, pi_3, N, S, span,
    KNOTS: tl.constexpr, FIRST: tl.constexpr, ANCHORS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dp = sum_k a_k cos(k h p) + b_k sin(k h p) over the knots that `sigreg_fwd_kernel` sums, on
    top of what is there unless FIRST = 0. Where no other launch follows dp may overwrite p.

    A program owns BLOCK_S slices and `span` rows of one group; the coefficients of its slices stay
    in registers. About 90 operations and 8 bytes an element. Safe: nothing divides, every cos and
    sin is at most 1.
    LeJEPA: arXiv:2511.08544.
    """
    group, first, last, offs_s = place(N, S, span, BLOCK_S)
    series_ptr += tl.cast(group, tl.int64) * 2 * KNOTS * S
    p_ptr += tl.cast(group, tl.int64) * N * S
    out_ptr += tl.cast(group, tl.int64) * N * S
    a1, b1 = load_knot(series_ptr, S, offs_s, 1, KNOTS)
    a2, b2 = load_knot(series_ptr, S, offs_s, 2, KNOTS)
    series = ()
    for a in tl.static_range(ANCHORS):
        series = series + (load_anchor(series_ptr, S, offs_s, 5 * (FIRST + a + 1), KNOTS),)
    following, among = load_tile(p_ptr, first, last, S, offs_s, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N):
        p, inside = following, among
        following, among = load_tile(p_ptr, start + BLOCK_N, last, S, offs_s, BLOCK_N)
        c1, s1, c2, s2, c5, s5 = powers(p, inside, spacing, per_pi, pi_1, pi_2, pi_3)
        out = out_ptr + tl.cast(start, tl.int64) * S + tl.arange(0, BLOCK_N)[:, None] * S
        out += offs_s[None, :]
        mask = inside & (offs_s < S)[None, :]
        if FIRST == 0:
            dp = a1 * c1 + b1 * s1 + a2 * c2 + b2 * s2
        else:
            dp = tl.load(out, mask=mask)
        c, s = c5, s5
        for _ in tl.static_range(FIRST):
            c, s = times(c, s, c5, s5)
        for a in tl.static_range(ANCHORS):
            of = series[a]
            dp += c * (of[0] + of[2] * c1 + of[5] * s1 + of[6] * c2 + of[9] * s2)
            dp += s * (of[1] + of[4] * c1 + of[3] * s1 + of[8] * c2 + of[7] * s2)
            c, s = times(c, s, c5, s5)
        tl.store(out, dp, mask=mask)


# -------------------------------------------------------------------------- products, directions


@triton.jit
def tf32(x):
    """Rounded to the 10 bits that TF32 products keep: they cut the rest off."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # bits of a NaN may overflow


@triton.jit(do_not_specialize=["R", "span"])
def sigreg_product_kernel(
    x_ptr, y_ptr, out_ptr, R, M, K, span, stride_x, stride_yk, stride_ym,
    TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (splits, R, M) = x (R, K) y (K, M), each split over `span` of K; 2 R K M operations.

    TERMS 0: in fp32. A product in TF32 errs by 3e-4, and even an emulated one is biased towards 0,
    which the sums over all rows do not forgive. TERMS 1: x and y rounded to TF32, where the result
    is rounded to 16 bits. TERMS 2: y as two TF32 numbers, for an x of 16 bits, exact in TF32.
    """
    start_n, split = tl.program_id(0) * BLOCK_N, tl.program_id(2)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    # One 64-bit base and 32-bit offsets inside the tile; past the end the last row repeats.
    x_ptr += tl.cast(start_n, tl.int64) * stride_x
    row = tl.minimum(offs_n, R - 1 - start_n)
    y_ptr += tl.cast(offs_m, tl.int64)[None, :] * stride_ym
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start_k in tl.range(split * span, tl.minimum(K, (split + 1) * span), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + row[:, None] * stride_x + offs_k[None, :]
        x = tl.load(x_ptrs, mask=(offs_k < K)[None, :], other=0.0).to(tl.float32)
        y_ptrs = y_ptr + tl.cast(offs_k, tl.int64)[:, None] * stride_yk
        y = tl.load(y_ptrs, mask=(offs_k < K)[:, None] & (offs_m < M)[None, :], other=0.0)
        if TERMS == 0:
            acc = tl.dot(x, y, acc, input_precision="ieee")
        else:
            high = tf32(y)
            if TERMS == 1:
                x = tf32(x)
            else:
                acc = tl.dot(x, y - high, acc, input_precision="tf32")
            acc = tl.dot(x, high, acc, input_precision="tf32")
    out_ptr += (tl.cast(split, tl.int64) * R + start_n) * M
    mask = (start_n + offs_n < R)[:, None] & (offs_m < M)[None, :]
    tl.store(out_ptr + offs_n[:, None] * M + offs_m[None, :], acc, mask=mask)


@triton.jit
def normals(step, seed, start, D, offs_s, BLOCK_Q: tl.constexpr, SLICES: tl.constexpr):
    """Four (BLOCK_Q, BLOCK_S): dimensions 4 q .. 4 q + 3 of directions not yet of length 1."""
    q = start + tl.arange(0, BLOCK_Q)[:, None]
    zero = q * 0 + offs_s[None, :] * 0
    low = zero + step.to(tl.int32)
    high = zero + ((step >> 32 & 0xFFFFFF) | SLICES << 24).to(tl.int32)
    words = tl.philox(seed, zero + offs_s[None, :], zero + q, low, high)
    out = ()
    for i in tl.static_range(2):
        u = ((words[2 * i] >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        v = ((words[2 * i + 1] >> 9).to(tl.float32) + 0.5) * 2.384185791015625e-07  # half turns
        radius = tl.sqrt_rn(-2.0 * tl.log(u))
        rounded = v + ROUND
        c, s = cos_sin((v - (rounded - ROUND)) * PI, rounded)
        out = out + (tl.where(4 * q + 2 * i < D, radius * c, 0.0),)
        out = out + (tl.where(4 * q + 2 * i + 1 < D, radius * s, 0.0),)
    return out


@triton.jit(do_not_specialize=["seed"])
def sigreg_directions_kernel(
    step_ptr, out_ptr, seed, S, D,
    SLICES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_S columns (D, S) of length 1: Philox4x32-10 of (seed, step, slice, dimensions), four
    normal numbers a block of words by Box-Muller, made twice: once for the lengths.

    Safe: u is exact and never 0 or 1. Philox: SC 2011.
    """
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    step = tl.load(step_ptr)
    squares = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
    for start in tl.range(0, tl.cdiv(D, 4), BLOCK_Q):
        made = normals(step, seed, start, D, offs_s, BLOCK_Q, SLICES)
        for i in tl.static_range(4):
            squares += made[i] * made[i]
    length = tl.sqrt_rn(tl.sum(squares, 0))[None, :]
    for start in tl.range(0, tl.cdiv(D, 4), BLOCK_Q):
        made = normals(step, seed, start, D, offs_s, BLOCK_Q, SLICES)
        for i in tl.static_range(4):
            d = 4 * (start + tl.arange(0, BLOCK_Q)[:, None]) + i
            at = tl.cast(d, tl.int64) * S + offs_s[None, :]
            tl.store(out_ptr + at, made[i] / length, mask=(d < D) & (offs_s < S)[None, :])


# ------------------------------------------------------------------------------------- launchers


def walk_constants() -> dict:
    """Of the kernels that walk rows: two elements a thread."""
    return {"BLOCK_N": 8, "BLOCK_S": 64, "num_warps": 8, "enable_fp_fusion": True}


def merge_constants() -> dict:
    return {"BLOCK_P": 16, "BLOCK_S": 32, "num_warps": 4, "enable_fp_fusion": True}


def product_constants(terms: int) -> dict:
    block_k, num_stages = (16, 2) if terms == 0 else (32, 3)
    return {
        "TERMS": terms, "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": block_k,
        "num_warps": 4, "num_stages": num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def directions_constants() -> dict:
    return {
        "SLICES": SLICES, "BLOCK_Q": 16, "BLOCK_S": 8, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def anchors_of(knots: int) -> list[dict[str, int]]:
    """The launches that cover knots 3 .. knots; the first covers 1 and 2 as well."""
    anchors = max(0, triton.cdiv(knots - 2, 5))
    return [
        {"FIRST": first, "ANCHORS": min(ANCHORS, anchors - first)}
        for first in range(0, max(1, anchors), ANCHORS)
    ]


def reduction(spacing: float) -> tuple[float, float, float, float, float]:
    """h, h / pi, and pi / h in parts of 12, 12 and 24 bits."""
    parts, rest = [], math.pi / spacing
    for _ in range(2):
        mantissa, exponent = math.frexp(rest)
        parts.append(math.ldexp(round(mantissa * 2**12), exponent - 12))
        rest -= parts[-1]
    return spacing, spacing / math.pi, *parts, rest


def spans_of(p: Tensor) -> tuple[tuple[int, int], int]:
    """The grid of kernels that walk the rows of p (G, N, S), and the rows of a program."""
    G, N, S = p.shape
    known = walk_constants()
    sizes = {"BLOCK_N": known["BLOCK_S"], "BLOCK_M": known["BLOCK_N"]}
    blocks, _, span = splits_of(p, S, N, G, sizes)
    span = min(span, ROWS_A_LANE * known["BLOCK_N"])
    return (blocks, triton.cdiv(N, span)), span


def projections(z: Tensor, directions: Tensor) -> Tensor:
    """(G, N, S) float32."""
    (G, N, D), S = z.shape, directions.shape[1]
    rows = plain_rows(z.flatten(0, 1))
    p = directions.new_empty(G, N, S)
    known = product_constants(0 if z.dtype == torch.float32 else 2)
    grid = triton.cdiv(G * N, known["BLOCK_N"]), triton.cdiv(S, known["BLOCK_M"])
    sigreg_product_kernel[grid](
        rows, directions, p, G * N, S, D, D, rows.stride(0), *directions.stride(), **known
    )
    return p


def merged(parts: Tensor, N: int, spacing: float, left_out: Tensor | None = None) -> Tensor:
    """X and Y (G, 2, knots, S) of N rows, less those left out, of sums (spans, G, 2, knots, S)."""
    spans, G, _, knots, S = parts.shape
    out, known = parts.new_empty(parts.shape[1:]), merge_constants()
    sigreg_merge_kernel[G * 2 * knots, triton.cdiv(S, known["BLOCK_S"])](
        parts, left_out, out, N, S, G, spans, SPACING=spacing, KNOTS=knots, **known
    )
    return out


def sigreg_directions(step: Tensor, seed: int, num_slices: int, dim: int) -> Tensor:
    """(dim, num_slices) float32."""
    out = step.new_empty(dim, num_slices, dtype=torch.float32)
    known = directions_constants()
    with device_of(step):
        sigreg_directions_kernel[(triton.cdiv(num_slices, known["BLOCK_S"]),)](
            step, out, seed, num_slices, dim, **known
        )
    return out


def sigreg_fwd(
    z: Tensor,  # (G, N, D) float32, bfloat16 or float16
    directions: Tensor,  # (D, S) float32
    spacing: float,
    knots: int,
    left_out: Tensor | None = None,  # (G,) int64: so many rows of zeros do not count
) -> Tensor:
    """X and Y (G, 2, knots, S) float32."""
    (G, N, _), S = z.shape, directions.shape[1]
    if 0 in (N, S):
        return directions.new_zeros(G, 2, knots, S)
    with device_of(z):
        p = projections(z, directions)
        grid, span = spans_of(p)
        parts = p.new_empty(grid[1], G, 2, knots, S)
        for anchors in anchors_of(knots):
            sigreg_fwd_kernel[grid](
                p, parts, *reduction(spacing), N, S, G, span,
                KNOTS=knots, **anchors, **walk_constants(),
            )  # fmt: skip
        return merged(parts, N, spacing, left_out)


def sigreg_bwd(
    z: Tensor,  # (G, N, D)
    directions: Tensor,  # (D, S) float32
    series: Tensor,  # (G, 2, knots, S) float32
    spacing: float,
) -> Tensor:
    """dz (G, N, D) in z's dtype."""
    (G, N, D), (_, _, knots, S) = z.shape, series.shape
    if 0 in (N, S):
        return z.new_zeros(z.shape)
    with device_of(z):
        p = projections(z, directions)
        launches, (grid, span) = anchors_of(knots), spans_of(p)
        dp = p if len(launches) == 1 else torch.empty_like(p)
        for anchors in launches:
            sigreg_bwd_kernel[grid](
                p, series.contiguous(), dp, *reduction(spacing), N, S, span,
                KNOTS=knots, **anchors, **walk_constants(),
            )  # fmt: skip
        known = product_constants(0 if z.dtype == torch.float32 else 1)
        columns = triton.cdiv(D, known["BLOCK_M"])
        sizes = {"BLOCK_N": known["BLOCK_N"], "BLOCK_M": known["BLOCK_K"]}
        blocks, splits, span = splits_of(z, G * N, S, columns, sizes)
        out = (z if splits == 1 else p).new_empty(splits, G, N, D)
        sigreg_product_kernel[blocks // columns, columns, splits](
            dp, directions, out, G * N, D, S, span, S, *directions.stride()[::-1], **known
        )
        return out[0] if splits == 1 else out.sum(0).to(z.dtype)
