"""Triton pieces that the similarity kernels share: loading, products, logits and coefficients.

A tile is seen from an owner x, whose rows a program keeps, and a partner y, whose rows it loops
over. idx counts rows inside a group and repeats the last one past the end; `at` counts them from
the first group, as the flat vectors do. An absent input is None, which Triton compiles away.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def exp_of(x):
    # The difference is formed before the factor log2(e): large logits cancel exactly.
    return tl.exp2(x * LOG2E)


@triton.jit
def finite_or_zero(x):
    # As the reference of an exponential: -inf - -inf would be NaN.
    return tl.where(tl.abs(x) == INF, 0.0, x)


@triton.jit
def load_rows(ptr, start, rows, stride, first_d, D: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows start.. of a (rows, D) matrix. Past the end the last row repeats, which leaves maxima
    as they are; the caller keeps it out of the sums."""
    # One 64-bit base and 32-bit offsets inside the tile: fewer registers in the inner loop.
    base = ptr + tl.cast(start, tl.int64) * stride + first_d
    row = tl.minimum(tl.arange(0, ROWS), rows - 1 - start)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base + row[:, None] * stride + offs_d[None, :]
    if D % BLOCK_D == 0:
        return tl.load(ptrs)  # (ROWS, BLOCK_D)
    return tl.load(ptrs, mask=(first_d + offs_d)[None, :] < D, other=0.0)


@triton.jit
def tile_products(x_ptr, y_ptr, start_n, start_m, N, M, stride_xn, stride_ym, D: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """<x_i, y_j> of one tile, in steps of BLOCK_D columns."""
    c = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Not unrolled: the unrolled body of a wide D outgrows the instruction cache.
    for d in tl.range(0, D, BLOCK_D):
        x = load_rows(x_ptr, start_n, N, stride_xn, d, D, BLOCK_N, BLOCK_D)
        y = load_rows(y_ptr, start_m, M, stride_ym, d, D, BLOCK_M, BLOCK_D)
        c = tl.dot(x, tl.trans(y), c, input_precision=PRECISION)
    return c  # (BLOCK_N, BLOCK_M)


@triton.jit
def tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr, y_limit_ptr,
                idx_n, at_n, offs_m, at_m, M, KEEP_EQUAL: tl.constexpr,
                SELF: tl.constexpr):  # fmt: skip
    """Logits of one tile; minus infinity past the last column and for pairs left out."""
    if y_bias_ptr is not None:
        shift = tl.load(y_bias_ptr + at_m)  # (BLOCK_M,)
    else:
        shift = tl.zeros_like(at_m).to(tl.float32)
    # The tail mask rides on the addend of the multiply-add, so it costs nothing per element.
    logits = c * scale + tl.where(offs_m < M, shift, -INF)[None, :]
    if x_bias_ptr is not None:
        logits += tl.load(x_bias_ptr + at_n)[:, None]
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + at_n)[:, None]
        y_id = tl.load(y_ids_ptr + at_m)[None, :]
        logits = tl.where((x_id == y_id) == KEEP_EQUAL, logits, -INF)
    if x_limit_ptr is not None:
        logits = tl.where(c > tl.load(x_limit_ptr + at_n)[:, None], -INF, logits)
    if y_limit_ptr is not None:
        logits = tl.where(c > tl.load(y_limit_ptr + at_m)[None, :], -INF, logits)
    if SELF:
        # A row past the end repeats the last one, its self-pair included.
        logits = tl.where(idx_n[:, None] == offs_m[None, :], -INF, logits)
    return logits  # (BLOCK_N, BLOCK_M)


@triton.jit
def load_lse(ptr, at):
    # A side with nothing to sum has lse = -inf; +inf makes each of its exponentials zero.
    lse = tl.load(ptr + at)
    return tl.where(lse == -INF, INF, lse)


@triton.jit
def load_side(lse_ptr, dlse_ptr, target_ptr, dpos_ptr, label_ptr, alike_ptr, at, mask):
    """What the gradient needs of one side's rows; zeros stand for what is absent: older Tritons
    return no None."""
    lse = tl.zeros_like(at).to(tl.float32)
    dlse, target, dpos, label, alike = lse, at, lse, tl.zeros_like(at), lse
    if lse_ptr is not None:
        lse = load_lse(lse_ptr, at)
        dlse = tl.load(dlse_ptr + at)
    if target_ptr is not None:
        target = tl.where(mask, tl.load(target_ptr + at), -1)
        dpos = tl.load(dpos_ptr + at)
    if label_ptr is not None:
        label = tl.load(label_ptr + at)
    if alike_ptr is not None:
        alike = tl.load(alike_ptr + at)
    return lse, dlse, target, dpos, label, alike


@triton.jit
def tile_gradient(logits, x_side, y_side, offs_n, offs_m, M, X_LSE: tl.constexpr,
                  Y_LSE: tl.constexpr, X_TARGET: tl.constexpr, Y_TARGET: tl.constexpr,
                  ALIKE: tl.constexpr, SELF: tl.constexpr):  # fmt: skip
    """G_ij = dlse_i e^(l_ij - lse_i) + dlse_j e^(l_ij - lse_j), plus dpos where j = t_i or i = t_j,
    plus alike_i + alike_j where the labels are equal, left out or not, but for self-pairs.

    One exponential and a pivot could serve both sums when the lses lie close together, but the
    branch for when they do not keeps both forms of the tile alive: 30 to 60 registers a thread,
    which the accumulator needs.
    """
    x_lse, x_dlse, x_target, x_dpos, x_label, x_alike = x_side
    y_lse, y_dlse, y_target, y_dpos, y_label, y_alike = y_side
    g = tl.zeros_like(logits)
    if ALIKE:
        alike = (x_label[:, None] == y_label[None, :]) & (offs_m < M)[None, :]
        if SELF:
            alike &= offs_n[:, None] != offs_m[None, :]
        g += tl.where(alike, x_alike[:, None] + y_alike[None, :], 0.0)
    if X_LSE:
        g += x_dlse[:, None] * exp_of(logits - x_lse[:, None])
    if Y_LSE:
        g += y_dlse[None, :] * exp_of(logits - y_lse[None, :])
    # Added before rounding: near convergence p - 1 is small and its parts are not.
    if X_TARGET:
        g += tl.where(x_target[:, None] == offs_m[None, :], x_dpos[:, None], 0.0)
    if Y_TARGET:
        g += tl.where(offs_n[:, None] == y_target[None, :], y_dpos[None, :], 0.0)
    return g  # (BLOCK_N, BLOCK_M)
