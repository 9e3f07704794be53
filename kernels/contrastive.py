"""Triton kernels of the op `contrastive`: log-sum-exp of similarity logits, and its gradient.

Every kernel looks at the problem from one side: an owner x whose rows a program keeps, and a
partner y whose rows it loops over. Rows of q are the owner for row sums and for dq; swapping the
roles gives column sums and dk, with bias and target moving to the other side. An absent input is
None, which Triton compiles away.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# Column sums share the exponentials of the rows as long as they stay above this. An exponent of
# -24 carries an error of 24 * 2^-24, and terms that flush to zero are below 2^-102 of the sum.
LEAST_SUM = tl.constexpr(2.0**-24)
# Gradient coefficients held at once where the library multiplies: they stay in the second-level
# cache between the kernel and the two products.
PANEL_BYTES = 1 << 25
PANEL_ROWS = 4096
WIDEST_IN_REGISTERS = 256


@triton.jit
def exp_of(x):
    # The difference is formed before the factor log2(e): large logits cancel exactly.
    return tl.exp2(x * LOG2E)


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
def tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, idx_n, idx_m, offs_m, M):
    """Logits of one tile; minus infinity past the last column and for pairs left out."""
    if y_bias_ptr is not None:
        shift = tl.load(y_bias_ptr + idx_m)  # (BLOCK_M,)
    else:
        shift = tl.zeros_like(idx_m).to(tl.float32)
    # The tail mask rides on the addend of the multiply-add, so it costs nothing per element.
    logits = c * scale + tl.where(offs_m < M, shift, -INF)[None, :]
    if x_bias_ptr is not None:
        logits += tl.load(x_bias_ptr + idx_n)[:, None]
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + idx_n)
        y_id = tl.load(y_ids_ptr + idx_m)
        logits = tl.where(x_id[:, None] != y_id[None, :], logits, -INF)
    return logits  # (BLOCK_N, BLOCK_M)


@triton.jit
def finite_or_zero(x):
    # As the reference of an exponential: -inf - -inf would be NaN.
    return tl.where(tl.abs(x) == INF, 0.0, x)


@triton.jit
def column_sums(logits, mask_n):
    """Each column's sum of exponentials, from its own maximum."""
    ref = finite_or_zero(tl.max(logits, 0))  # (BLOCK_M,)
    e = tl.where(mask_n[:, None], exp_of(logits - ref[None, :]), 0.0)
    return ref, tl.sum(e, 0)


@triton.jit(do_not_specialize=["N", "M", "span"])
def contrastive_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
    row_ptr, col_ptr, N, M, span, stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """row_i = log sum_j e^l_ij over `span` columns; col_j = log sum_i e^l_ij over BLOCK_N rows.

    A program owns BLOCK_N rows and loops over one span of columns with an online maximum and sum
    per row. Column sums come from the same exponentials: E_ij = e^(l_ij - t_i), with t_i the
    row's maximum in this tile, weighted by e^(t_i - max t) <= 1. One exponential per logit, one
    fp32 written per column and row block, 2 N M D operations, no N x M array.
    Safe: every exponent is at most zero. Where a column's sum falls below LEAST_SUM the columns of
    the tile are summed again from their own maxima; in fp32, bound by its products, always.
    Blockwise sums: arXiv:2205.14135.
    """
    start_n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    idx_n = tl.minimum(offs_n, N - 1)
    scale = tl.load(scale_ptr)
    if D <= BLOCK_D:
        x = load_rows(x_ptr, start_n, N, stride_xn, 0, D, BLOCK_N, BLOCK_D)
    best = tl.full((BLOCK_N,), -INF, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start_m in tl.range(split * span, tl.minimum(M, (split + 1) * span), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        idx_m = tl.minimum(offs_m, M - 1)
        if D <= BLOCK_D:
            y = load_rows(y_ptr, start_m, M, stride_ym, 0, D, BLOCK_M, BLOCK_D)
            c = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            c = tile_products(x_ptr, y_ptr, start_n, start_m, N, M, stride_xn, stride_ym,
                              D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)  # fmt: skip
        logits = tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
                             idx_n, idx_m, offs_m, M)  # fmt: skip
        if col_ptr is None:
            new_best = tl.maximum(best, tl.max(logits, 1))
            ref = finite_or_zero(new_best)
            total = total * exp_of(best - ref) + tl.sum(exp_of(logits - ref[:, None]), 1)
        else:
            top = tl.max(logits, 1)  # (BLOCK_N,)
            ref = finite_or_zero(top)
            e = exp_of(logits - ref[:, None])
            new_best = tl.maximum(best, top)
            new_ref = finite_or_zero(new_best)
            total = total * exp_of(best - new_ref) + tl.sum(e, 1) * exp_of(ref - new_ref)
            if x_ptr.dtype.element_ty == tl.float32:
                col_ref, col_sum = column_sums(logits, mask_n)
            else:
                peak = tl.max(top, 0)
                col_ref = tl.zeros((BLOCK_M,), tl.float32) + finite_or_zero(peak)
                weight = tl.where(mask_n, exp_of(top - finite_or_zero(peak)), 0.0)
                col_sum = tl.sum(e * weight[:, None], 0)  # (BLOCK_M,)
                least = tl.min(tl.where(mask_m, col_sum, 1.0), 0)
                if (least < LEAST_SUM) | (peak == INF):
                    col_ref, col_sum = column_sums(logits, mask_n)
            part = col_ref + tl.log(col_sum)
            cols = tl.cast(tl.program_id(0), tl.int64) * M + offs_m
            tl.store(col_ptr + cols, part, mask=mask_m)
        best = new_best
    rows = tl.cast(split, tl.int64) * N + offs_n
    tl.store(row_ptr + rows, finite_or_zero(best) + tl.log(total), mask=mask_n)


@triton.jit(do_not_specialize=["N", "M", "row_parts", "col_parts", "row_blocks", "col_blocks"])
def contrastive_finish_kernel(
    q_ptr, k_ptr, scale_ptr, bias_ptr, target_ptr, pos_ptr,
    row_part_ptr, row_lse_ptr, col_part_ptr, col_lse_ptr,
    N, M, row_parts, col_parts, row_blocks, col_blocks, stride_qn, stride_km,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse_i = log sum_p e^part_pi for rows, then columns; pos_i = scale <q_i, k_target> + bias.

    The first row_blocks programs merge BLOCK rows each, the next col_blocks merge columns, the
    rest gather positives: one launch after the forward instead of three. Reads every partial once
    (4 bytes per column and row block of the forward) and 2 N D feature elements.
    Partials are merged in a fixed order, so results repeat to the last bit. A target outside
    [0, M) gives NaN and reads nothing.
    """
    block = tl.program_id(0)
    if block < row_blocks:
        merge_parts(row_part_ptr, row_lse_ptr, row_parts, N, block, BLOCK, BLOCK_P)
    elif block < row_blocks + col_blocks:
        merge_parts(col_part_ptr, col_lse_ptr, col_parts, M, block - row_blocks, BLOCK, BLOCK_P)
    elif target_ptr is not None:
        offs_n = (block - row_blocks - col_blocks) * BLOCK + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
        valid = (target >= 0) & (target < M)
        dot = tl.zeros((BLOCK,), tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask = valid[:, None] & (offs_d[None, :] < D)
            q_rows = q_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_d[None, :]
            k_rows = k_ptr + target.to(tl.int64)[:, None] * stride_km + offs_d[None, :]
            q = tl.load(q_rows, mask=mask, other=0.0).to(tl.float32)  # (BLOCK, BLOCK_D)
            k = tl.load(k_rows, mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(q * k, 1)
        pos = dot * tl.load(scale_ptr)
        if bias_ptr is not None:
            pos += tl.load(bias_ptr + target, mask=valid, other=0.0)
        tl.store(pos_ptr + offs_n, tl.where(valid, pos, float("nan")), mask=mask_n)


@triton.jit
def merge_parts(part_ptr, out_ptr, parts, length, block, BLOCK: tl.constexpr,
                BLOCK_P: tl.constexpr):  # fmt: skip
    if part_ptr is not None:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        mask = offs < length
        best = tl.full((BLOCK,), -INF, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, parts, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            cells = offs_p.to(tl.int64)[:, None] * length + offs[None, :]
            inside = (offs_p < parts)[:, None] & mask[None, :]
            part = tl.load(part_ptr + cells, mask=inside, other=-INF)  # (BLOCK_P, BLOCK)
            new_best = tl.maximum(best, tl.max(part, 0))
            ref = finite_or_zero(new_best)
            total = total * exp_of(best - ref) + tl.sum(exp_of(part - ref[None, :]), 0)
            best = new_best
        tl.store(out_ptr + offs, finite_or_zero(best) + tl.log(total), mask=mask)


@triton.jit
def load_lse(ptr, idx):
    # A side with nothing to sum has lse = -inf; +inf makes each of its exponentials zero.
    lse = tl.load(ptr + idx)
    return tl.where(lse == -INF, INF, lse)


@triton.jit
def load_side(lse_ptr, dlse_ptr, target_ptr, dpos_ptr, idx, mask):
    """What the gradient needs of one side's rows; zeros stand for what is absent."""
    lse = tl.zeros_like(idx).to(tl.float32)
    dlse, dpos, target = lse, lse, idx
    if lse_ptr is not None:
        lse = load_lse(lse_ptr, idx)
        dlse = tl.load(dlse_ptr + idx)
    if target_ptr is not None:
        target = tl.where(mask, tl.load(target_ptr + idx), -1)
        dpos = tl.load(dpos_ptr + idx)
    return lse, dlse, target, dpos


@triton.jit
def tile_gradient(logits, offs_n, offs_m, x_lse, x_dlse, y_lse, y_dlse, x_target, x_dpos, y_target,
                  y_dpos, X_LSE: tl.constexpr, Y_LSE: tl.constexpr, X_TARGET: tl.constexpr,
                  Y_TARGET: tl.constexpr):  # fmt: skip
    """G_ij = dlse_i e^(l_ij - lse_i) + dlse_j e^(l_ij - lse_j), plus dpos where j = t_i or i = t_j.

    One exponential and a pivot could serve both sums when the lses lie close together, but the
    branch for when they do not keeps both forms of the tile alive: 30 to 60 registers a thread,
    which the accumulator needs.
    """
    g = tl.zeros_like(logits)
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


@triton.jit(do_not_specialize=["N", "M", "span"])
def contrastive_bwd_kernel(
    x_ptr, y_ptr, scale_ptr, unit_ptr, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
    x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr,
    y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr,
    dx_ptr, dscale_ptr, dbias_ptr, N, M, span, stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dx_i = scale sum_j G_ij y_j over `span` columns, G as in `tile_gradient`.

    A program owns BLOCK_N rows, keeps their gradient in registers (D <= 256), loops over one span
    of columns and recomputes each tile's logits: 4 N M D operations, no N x M array, no atomics.
    With SPLIT it writes its fp32 partial, unscaled, for `contrastive_bwd_reduce_kernel`.
    dscale = sum_ij G_ij <x_i, y_j>, one number a program, comes from the unrounded tile: a row dot
    with the finished accumulator would hold 128 more registers at the end. dbias, where x carries
    the bias, is the row sum of G.
    Safe: exponents are differences to log-sum-exps, at most zero up to rounding. fp16
    coefficients are lifted by `unit`, a power of two: of the order 1 / N they would flush to zero.
    """
    start_n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first, last = split * span, tl.minimum(M, (split + 1) * span)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    idx_n = tl.minimum(offs_n, N - 1)
    scale = tl.load(scale_ptr)
    x_lse, x_dlse, x_target, x_dpos = load_side(
        x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, idx_n, mask_n
    )
    x = load_rows(x_ptr, start_n, N, stride_xn, 0, D, BLOCK_N, BLOCK_D)
    dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dscale = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start_m in tl.range(first, last, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        idx_m = tl.minimum(offs_m, M - 1)
        y = load_rows(y_ptr, start_m, M, stride_ym, 0, D, BLOCK_M, BLOCK_D)
        c = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        logits = tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
                             idx_n, idx_m, offs_m, M)  # fmt: skip
        y_lse, y_dlse, y_target, y_dpos = load_side(
            y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, idx_m, offs_m < M
        )
        g = tile_gradient(
            logits, offs_n, offs_m, x_lse, x_dlse, y_lse, y_dlse,
            x_target, x_dpos, y_target, y_dpos, x_lse_ptr is not None, y_lse_ptr is not None,
            x_target_ptr is not None, y_target_ptr is not None,
        )  # fmt: skip
        if dscale_ptr is not None:
            dscale += tl.sum(g * c, 1)
        if dbias_ptr is not None:
            dbias += tl.sum(g, 1)
        if unit_ptr is not None:
            g *= tl.load(unit_ptr)
        # In the features' dtype: dots of mixed dtypes are miscompiled by some Tritons.
        dx = tl.dot(g.to(y.dtype), y, dx, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
    if unit_ptr is not None:
        dx /= tl.load(unit_ptr)
    if dscale_ptr is not None:
        dscale = tl.sum(tl.where(mask_n, dscale, 0.0), 0)
        tl.store(dscale_ptr + split * tl.num_programs(0) + tl.program_id(0), dscale)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.cast(split, tl.int64) * N + offs_n, dbias, mask=mask_n)
    offs_d = tl.arange(0, BLOCK_D)
    rows = tl.cast(split, tl.int64) * N + offs_n  # split is zero without SPLIT
    cells = rows[:, None] * D + offs_d[None, :]
    if not SPLIT:
        dx *= scale
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(dx_ptr + cells, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def contrastive_bwd_reduce_kernel(part_ptr, dx_ptr, scale_ptr, size, splits, BLOCK: tl.constexpr):
    """dx = scale sum_s part_s over `splits` partial gradients of `size` elements each.

    One program sums BLOCK elements in the order of the splits, in fp32, and rounds once: 4 bytes
    read per partial element. Only problems with few row blocks are split, so the partials of all
    programs together stay a few tens of MB.
    """
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.range(0, splits):
        total += tl.load(part_ptr + tl.cast(s, tl.int64) * size + offs, mask=mask, other=0.0)
    dx = total * tl.load(scale_ptr)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "first_n", "first_m", "blocks_m"])
def contrastive_panel_kernel(
    x_ptr, y_ptr, scale_ptr, factor_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
    x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr,
    y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr,
    panel_ptr, dscale_ptr, dbias_ptr, N, M, first_n, first_m, blocks_m,
    stride_xn, stride_ym, stride_panel,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """panel = factor G for rows from first_n and columns from first_m, G as in `tile_gradient`.

    One program writes one tile in the features' dtype; library products turn the panel into
    gradients. For D > 256, where registers hold no gradient; without a panel it gives only the
    sums. 2 D operations and 2 or 4 bytes per element, which stay in the second-level cache.
    Also one number sum_ij G_ij c_ij a program, for dscale, and column sums of G for dbias, both
    from unrounded coefficients and in fp32. factor is scale, or for fp16 the power of two that
    keeps coefficients of the order 1 / N from flushing to zero. Safe as `contrastive_bwd_kernel`.
    """
    block_n, block_m = tl.program_id(0) // blocks_m, tl.program_id(0) % blocks_m
    start_n = first_n + block_n * BLOCK_N
    start_m = first_m + block_m * BLOCK_M
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    idx_n, idx_m = tl.minimum(offs_n, N - 1), tl.minimum(offs_m, M - 1)
    c = tile_products(x_ptr, y_ptr, start_n, start_m, N, M, stride_xn, stride_ym,
                      D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)  # fmt: skip
    logits = tile_logits(c, tl.load(scale_ptr), None, y_bias_ptr, x_ids_ptr, y_ids_ptr,
                         idx_n, idx_m, offs_m, M)  # fmt: skip
    x_lse, x_dlse, x_target, x_dpos = load_side(
        x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, idx_n, mask_n
    )
    y_lse, y_dlse, y_target, y_dpos = load_side(
        y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, idx_m, mask_m
    )
    g = tile_gradient(
        logits, offs_n, offs_m, x_lse, x_dlse, y_lse, y_dlse,
        x_target, x_dpos, y_target, y_dpos, x_lse_ptr is not None, y_lse_ptr is not None,
        x_target_ptr is not None, y_target_ptr is not None,
    )  # fmt: skip
    g = tl.where(mask_n[:, None], g, 0.0)  # (BLOCK_N, BLOCK_M)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(tl.sum(g * c, 1), 0))
    if dbias_ptr is not None:
        sums = tl.cast(start_n // BLOCK_N, tl.int64) * M + offs_m
        tl.store(dbias_ptr + sums, tl.sum(g, 0), mask=mask_m)
    if panel_ptr is not None:
        cells = (offs_n - first_n)[:, None] * stride_panel + (offs_m - first_m)[None, :]
        g *= tl.load(factor_ptr)
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(panel_ptr + cells, g.to(panel_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------- launchers


def config(kind: str, capability: tuple[int, int], dtype: torch.dtype, D: int) -> dict[str, int]:
    """Block sizes, warps and stages for kind "fwd", "bwd" or "panel".

    16-bit features up to 256 wide: the owner's tile stays in shared memory or registers and the
    partner's tiles are pipelined. Wider ones, and fp32, whose products run on the plain units and
    hold their operands in registers, go in steps of BLOCK_D. Shared memory is 163 KiB a
    multiprocessor on 8.0 and 227 KiB on 9.0; tests compile each choice and check that it fits
    and that nothing spills.
    """
    width = max(16, triton.next_power_of_2(D))
    hopper = capability >= (9, 0)
    if dtype == torch.float32:
        sizes = (64, 32, 16, 4, 2)
    elif kind == "panel" or width > WIDEST_IN_REGISTERS:
        sizes = (128, 64, 64, 8, 3)
    elif kind == "fwd":
        sizes = (128, 64, 256, 4 if width <= 128 else 8, 3 if hopper else 2)
    elif hopper:
        sizes = (128, 64 if width <= 128 else 32, 256, 8, 3)
    elif width <= 128:
        sizes = (128, 64 if width <= 64 else 32, 256, 8, 3)
    else:
        sizes = (64, 64, 256, 8, 2)
    block_n, block_m, block_d, num_warps, num_stages = sizes
    return {
        "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": min(block_d, width),
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def in_registers(dtype: torch.dtype, D: int) -> bool:
    """Whether a program holds its rows' gradient; else the library multiplies panels."""
    return dtype != torch.float32 and D <= WIDEST_IN_REGISTERS


def constants(kind: str, capability: tuple[int, int], dtype: torch.dtype, D: int) -> dict:
    """The compile-time arguments and options of a main kernel, as launched."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    known = {"D": D, "PRECISION": "tf32" if tf32 else "ieee", "enable_fp_fusion": True}
    if dtype == torch.float32:
        # Left to itself the assembler spills a few bytes to fit one more program.
        known["maxnreg"] = 168
    return known | config(kind, capability, dtype, D)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def _splits(x: Tensor, rows: int, columns: int, known: dict) -> tuple[int, int, int]:
    """Row blocks, column splits and columns per split: about two programs a multiprocessor."""
    # In the interpreter any count does; a small one exercises both the split and the whole form.
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    blocks = triton.cdiv(rows, known["BLOCK_N"])
    tiles = triton.cdiv(columns, known["BLOCK_M"])
    tiles_each = triton.cdiv(tiles, max(1, 2 * units // blocks))
    return blocks, triton.cdiv(tiles, tiles_each), tiles_each * known["BLOCK_M"]


def _rows(x: Tensor) -> Tensor:
    # Offsets inside a tile are 32-bit: a view whose rows lie further apart is copied.
    return x if x.stride(1) == 1 and 0 <= x.stride(0) < 1 << 22 else x.contiguous()


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def contrastive_fwd(
    q: Tensor,  # (N, D) float32, bfloat16 or float16
    k: Tensor,  # (M, D)
    scale: Tensor,  # () float32
    q_ids: Tensor | None,  # (N,) int32
    k_ids: Tensor | None,  # (M,) int32
    bias: Tensor | None,  # (M,) float32
    target: Tensor | None,  # (N,) int32
    rows: bool,
    cols: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse (N,), col_lse (M,) and pos (N,), fp32, empty where not asked for."""
    q, k = _rows(q), _rows(k)
    (N, D), M = q.shape, k.shape[0]
    row_lse = scale.new_empty(N if rows else 0)
    col_lse = scale.new_empty(M if cols else 0)
    pos = scale.new_empty(0 if target is None else N)
    known = constants("fwd", _capability(q), q.dtype, D)
    row_part = col_part = None
    with _device(q):
        if rows:
            blocks, splits, span = _splits(q, N, M, known)
            row_part = row_lse if splits == 1 else scale.new_empty(splits, N)
            if cols:
                col_part = col_lse if blocks == 1 else scale.new_empty(blocks, M)
            contrastive_fwd_kernel[blocks, splits](
                q, k, scale, None, bias, q_ids, k_ids, row_part, col_part,
                N, M, span, q.stride(0), k.stride(0), **known,
            )  # fmt: skip
        elif cols:
            blocks, splits, span = _splits(k, M, N, known)
            col_part = col_lse if splits == 1 else scale.new_empty(splits, M)
            contrastive_fwd_kernel[blocks, splits](
                k, q, scale, bias, None, k_ids, q_ids, col_part, None,
                M, N, span, k.stride(0), q.stride(0), **known,
            )  # fmt: skip
        row_part = None if row_part is row_lse else row_part
        col_part = None if col_part is col_lse else col_part
        row_blocks = 0 if row_part is None else triton.cdiv(N, 32)
        col_blocks = 0 if col_part is None else triton.cdiv(M, 32)
        pos_blocks = 0 if target is None else triton.cdiv(N, 32)
        if row_blocks + col_blocks + pos_blocks:
            contrastive_finish_kernel[(row_blocks + col_blocks + pos_blocks,)](
                q, k, scale, bias, target, pos, row_part, row_lse, col_part, col_lse, N, M,
                0 if row_part is None else len(row_part), 0 if col_part is None else len(col_part),
                row_blocks, col_blocks, q.stride(0), k.stride(0), **finish_constants(D),
            )  # fmt: skip
    return row_lse, col_lse, pos


def reduce_constants() -> dict:
    return {"BLOCK": 512, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def finish_constants(D: int) -> dict:
    return {
        "D": D, "BLOCK": 32, "BLOCK_P": 32, "BLOCK_D": min(64, triton.next_power_of_2(D)),
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def contrastive_bwd(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    scale: Tensor,  # ()
    q_ids: Tensor | None,  # (N,)
    k_ids: Tensor | None,  # (M,)
    bias: Tensor | None,  # (M,)
    target: Tensor | None,  # (N,)
    row_lse: Tensor,  # (N,) or (0,)
    col_lse: Tensor,  # (M,) or (0,)
    drow: Tensor,  # (N,) or (0,)
    dcol: Tensor,  # (M,) or (0,)
    dpos: Tensor,  # (N,) or (0,)
    symmetric: bool,
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (N, D), dk (M, D) or (0, D), dscale () and dbias (M,) or (0,)."""
    q, k = _rows(q), _rows(k)
    D = q.shape[1]
    unit = None
    if q.dtype == torch.float16:
        # The largest coefficient goes near 2^12, so small ones do not flush to zero in fp16.
        _, exponent = torch.frexp(
            torch.linalg.vector_norm(torch.cat([drow, dcol, dpos]), torch.inf)
        )
        unit = torch.exp2((12 - exponent).clamp(max=100))
    drow, dcol, dpos = (d.contiguous() if d.numel() else None for d in (drow, dcol, dpos))
    if dpos is None:
        target = None
    row_side = (None, None) if drow is None else (row_lse, drow)
    col_side = (None, None) if dcol is None else (col_lse, dcol)
    q_side = (*row_side, target, dpos)
    k_side = q_side if symmetric else (*col_side, None, None)
    dq, dk = q.new_empty(0, D), k.new_empty(0, D)
    dscale = dbias = None
    with _device(q):
        wide = not in_registers(q.dtype, D)
        if need_dq and not wide:
            dq, dscale, _ = _owner(
                q, k, scale, unit, None, bias, q_ids, k_ids, q_side, k_side, True
            )
        if need_dk and not wide:
            # Seen from the keys, the partner's rows carry the target and the owner's the bias.
            dk, total, dbias = _owner(
                k, q, scale, unit, bias, None, k_ids, q_ids, k_side, q_side, not need_dq
            )
            dscale = dscale if need_dq else total
        if wide or dscale is None or (bias is not None and dbias is None):
            *wide_d, dscale, dbias = _panels(
                q, k, scale, unit, bias, q_ids, k_ids, q_side, k_side,
                wide and need_dq, wide and need_dk,
            )  # fmt: skip
            dq, dk = wide_d if wide else (dq, dk)
    if symmetric:
        dscale = 0.5 * dscale
    return dq, dk, dscale, scale.new_empty(0) if dbias is None else dbias


def _owner(x, y, scale, unit, x_bias, y_bias, x_ids, y_ids, x_side, y_side, need_dscale):
    """dx (N, D), then dscale () if needed and dbias (N,) if x carries the bias; D <= 256."""
    (N, D), M = x.shape, y.shape[0]
    known = constants("bwd", _capability(x), x.dtype, D)
    blocks, splits, span = _splits(x, N, M, known)
    dx = x.new_empty(N, D)
    part = dx if splits == 1 else scale.new_empty(splits, N, D)
    dscale = scale.new_empty(splits * blocks) if need_dscale else None
    dbias = None if x_bias is None else scale.new_empty(splits, N)
    contrastive_bwd_kernel[blocks, splits](
        x, y, scale, unit, x_bias, y_bias, x_ids, y_ids, *x_side, *y_side, part, dscale, dbias,
        N, M, span, x.stride(0), y.stride(0), SPLIT=splits > 1, **known,
    )  # fmt: skip
    if splits > 1:
        known = reduce_constants()
        contrastive_bwd_reduce_kernel[(triton.cdiv(N * D, known["BLOCK"]),)](
            part, dx, scale, N * D, splits, **known
        )
    return dx, dscale.sum() if need_dscale else None, None if dbias is None else dbias.sum(0)


def _panels(q, k, scale, unit, bias, q_ids, k_ids, q_side, k_side, need_dq, need_dk):
    """dq, dk, dscale and dbias over panels of coefficients; any D."""
    (N, D), M = q.shape, k.shape[0]
    known = constants("panel", _capability(q), q.dtype, D)
    block_n, block_m = known["BLOCK_N"], known["BLOCK_M"]
    blocks_n, blocks_m = triton.cdiv(N, block_n), triton.cdiv(M, block_m)
    rows, columns, panel = blocks_n * block_n, blocks_m * block_m, None
    if need_dq or need_dk:
        # Square where both sides are long: the fp32 sums are then read and written least often.
        elements = PANEL_BYTES // q.element_size()
        rows = min(rows, max(PANEL_ROWS, elements // columns // block_n * block_n))
        columns = min(columns, elements // rows // block_m * block_m)
        panel = q.new_empty(min(rows, N), columns)
    dscale = scale.new_empty(blocks_n * blocks_m)
    dbias = None if bias is None else scale.new_empty(blocks_n, M)
    dq, dk = q.new_empty(N if need_dq else 0, D), k.new_empty(M if need_dk else 0, D)
    # One panel along the sum and no unit: the product rounds once, straight into the result.
    dq_sum = dq if columns >= M and unit is None else scale.new_empty(min(rows, len(dq)), D)
    dk_sum = dk if rows >= N and unit is None else scale.new_empty(len(dk), D)
    after = None if unit is None else scale / unit
    done = 0
    for n in range(0, N, rows):
        n_end = min(n + rows, N)
        dq_rows = dq_sum[n:n_end] if dq_sum is dq else dq_sum[: n_end - n]
        for m in range(0, M, columns):
            m_end = min(m + columns, M)
            grid_n, grid_m = triton.cdiv(n_end - n, block_n), triton.cdiv(m_end - m, block_m)
            contrastive_panel_kernel[(grid_n * grid_m,)](
                q, k, scale, scale if unit is None else unit, bias, q_ids, k_ids,
                *q_side, *k_side, panel, dscale[done:], dbias, N, M, n, m, grid_m,
                q.stride(0), k.stride(0), columns, **known,
            )  # fmt: skip
            done += grid_n * grid_m
            if need_dq:
                _add_product(dq_rows, panel[: n_end - n, : m_end - m], k[m:m_end], m > 0)
            if need_dk:
                g = panel[: n_end - n, : m_end - m].T
                _add_product(dk_sum[m:m_end], g, q[n:n_end], n > 0)
        if need_dq:
            _finish_sum(dq_rows, dq[n:n_end], after)
    if need_dk:
        _finish_sum(dk_sum, dk, after)
    return dq, dk, dscale.sum(), None if dbias is None else dbias.sum(0)


def _add_product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total += a b, or total = a b, accumulated in fp32 whatever a's dtype."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(add), out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=int(add), out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=int(add), out=total)


def _finish_sum(total: Tensor, out: Tensor, after: Tensor | None) -> None:
    if after is not None:
        torch.mul(total, after, out=out)
    elif total.data_ptr() != out.data_ptr():
        out.copy_(total)
