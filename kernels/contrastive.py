"""Triton kernels of the op `contrastive`: log-sum-exp of similarity logits, and its gradient.

Every kernel looks at the problem from one side: an owner x whose rows a program keeps, and a
partner y whose rows it loops over. Rows of q are the owner for row sums and for dq; swapping the
roles gives column sums and dk, with bias, limit and target moving to the other side. N and M count
rows inside a group; programs of the first grid axis run through the row blocks of every group.
"""

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import (
    Side,
    capability_of,
    constants,
    device_of,
    in_registers,
    plain_rows,
    splits_of,
    unit_for,
)
from fastssl.kernels.panels import panel_gradient
from fastssl.kernels.tiles import (
    INF,
    exp_of,
    finite_or_zero,
    load_rows,
    load_side,
    tile_gradient,
    tile_logits,
    tile_products,
)
from torch import Tensor

# Column sums share the exponentials of the rows as long as they stay above this. An exponent of
# -24 carries an error of 24 * 2^-24, and terms that flush to zero are below 2^-102 of the sum.
LEAST_SUM = tl.constexpr(2.0**-24)


@triton.jit
def column_sums(logits, mask_n):
    """Each column's sum of exponentials, from its own maximum."""
    ref = finite_or_zero(tl.max(logits, 0))  # (BLOCK_M,)
    e = tl.where(mask_n[:, None], exp_of(logits - ref[None, :]), 0.0)
    return ref, tl.sum(e, 0)


@triton.jit(do_not_specialize=["N", "M", "groups", "span"])
def contrastive_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
    x_limit_ptr, y_limit_ptr, row_ptr, col_ptr, logits_ptr,
    N, M, groups, span, stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_EQUAL: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """row_i = log sum_j e^l_ij over `span` columns; col_j = log sum_i e^l_ij over BLOCK_N rows.

    A program owns BLOCK_N rows and loops over one span of columns with an online maximum and sum
    per row. Column sums come from the same exponentials: E_ij = e^(l_ij - t_i), with t_i the
    row's maximum in this tile, weighted by e^(t_i - max t) <= 1. One exponential per logit, one
    fp32 written per column and row block, 2 N M D operations, no N x M array unless asked for.
    Safe: every exponent is at most zero. Where a column's sum falls below LEAST_SUM the columns of
    the tile are summed again from their own maxima; in fp32, bound by its products, always.
    Blockwise sums: arXiv:2205.14135.
    """
    blocks = tl.num_programs(0) // groups
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start_n, split = block * BLOCK_N, tl.program_id(1)
    first_n, first_m = group * N, group * M
    x_ptr += tl.cast(first_n, tl.int64) * stride_xn
    y_ptr += tl.cast(first_m, tl.int64) * stride_ym
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
        logits = tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr,
                             y_limit_ptr, idx_n, first_n + idx_n, offs_m, first_m + idx_m, M,
                             KEEP_EQUAL, SELF)  # fmt: skip
        if logits_ptr is not None:
            tile_ptr = logits_ptr + tl.cast(first_n + start_n, tl.int64) * M + start_m
            cells = tl.arange(0, BLOCK_N)[:, None] * M + tl.arange(0, BLOCK_M)[None, :]
            tl.store(tile_ptr + cells, logits, mask=mask_n[:, None] & mask_m[None, :])
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
            cols = tl.cast(block, tl.int64) * groups * M + first_m + offs_m
            tl.store(col_ptr + cols, part, mask=mask_m)
        best = new_best
    rows = tl.cast(split, tl.int64) * groups * N + first_n + offs_n
    tl.store(row_ptr + rows, finite_or_zero(best) + tl.log(total), mask=mask_n)


@triton.jit(
    do_not_specialize=["N", "M", "groups", "row_parts", "col_parts", "row_blocks", "col_blocks"]
)
def contrastive_finish_kernel(
    q_ptr, k_ptr, scale_ptr, bias_ptr, target_ptr, pos_ptr,
    row_part_ptr, row_lse_ptr, col_part_ptr, col_lse_ptr,
    N, M, groups, row_parts, col_parts, row_blocks, col_blocks, stride_qn, stride_km,
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
        merge_parts(row_part_ptr, row_lse_ptr, row_parts, groups * N, block, BLOCK, BLOCK_P)
    elif block < row_blocks + col_blocks:
        merge_parts(col_part_ptr, col_lse_ptr, col_parts, groups * M, block - row_blocks,
                    BLOCK, BLOCK_P)  # fmt: skip
    elif target_ptr is not None:
        offs_n = (block - row_blocks - col_blocks) * BLOCK + tl.arange(0, BLOCK)
        mask_n = offs_n < groups * N
        target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
        valid = (target >= 0) & (target < M)
        at_m = tl.where(valid, offs_n // N * M + target, 0)
        dot = tl.zeros((BLOCK,), tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask = valid[:, None] & (offs_d[None, :] < D)
            q_rows = q_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_d[None, :]
            k_rows = k_ptr + at_m.to(tl.int64)[:, None] * stride_km + offs_d[None, :]
            q = tl.load(q_rows, mask=mask, other=0.0).to(tl.float32)  # (BLOCK, BLOCK_D)
            k = tl.load(k_rows, mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(q * k, 1)
        pos = dot * tl.load(scale_ptr)
        if bias_ptr is not None:
            pos += tl.load(bias_ptr + at_m, mask=valid, other=0.0)
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


@triton.jit(do_not_specialize=["N", "M", "groups", "span"])
def contrastive_bwd_kernel(
    x_ptr, y_ptr, scale_ptr, unit_ptr, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr,
    x_limit_ptr, y_limit_ptr,
    x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, x_label_ptr, x_alike_ptr,
    y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, y_label_ptr, y_alike_ptr,
    dx_ptr, dscale_ptr, dbias_ptr, N, M, groups, span, stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_EQUAL: tl.constexpr, SELF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dx_i = scale sum_j G_ij y_j over `span` columns, G as in `tile_gradient`.

    A program owns BLOCK_N rows, keeps their gradient in registers (D <= 256), loops over one span
    of columns and recomputes each tile's logits: 4 N M D operations, no N x M array, no atomics.
    With SPLIT it writes its fp32 partial, unscaled, for `contrastive_bwd_reduce_kernel`.
    dscale = sum_ij G_ij <x_i, y_j>, one number a program, comes from the unrounded tile: a row dot
    with the finished accumulator would hold 128 more registers at the end. dbias, where the owner
    is k, is the row sum of G.
    Safe: exponents are differences to log-sum-exps, at most zero up to rounding. fp16
    coefficients are lifted by `unit`, a power of two: of the order 1 / N they would flush to zero.
    """
    blocks = tl.num_programs(0) // groups
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start_n, split = block * BLOCK_N, tl.program_id(1)
    first_n, first_m = group * N, group * M
    x_ptr += tl.cast(first_n, tl.int64) * stride_xn
    y_ptr += tl.cast(first_m, tl.int64) * stride_ym
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    idx_n = tl.minimum(offs_n, N - 1)
    scale = tl.load(scale_ptr)
    x_side = load_side(x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, x_label_ptr, x_alike_ptr,
                       first_n + idx_n, mask_n)  # fmt: skip
    x = load_rows(x_ptr, start_n, N, stride_xn, 0, D, BLOCK_N, BLOCK_D)
    dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dscale = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start_m in tl.range(split * span, tl.minimum(M, (split + 1) * span), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        at_m = first_m + tl.minimum(offs_m, M - 1)
        y = load_rows(y_ptr, start_m, M, stride_ym, 0, D, BLOCK_M, BLOCK_D)
        c = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        logits = tile_logits(c, scale, x_bias_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr,
                             y_limit_ptr, idx_n, first_n + idx_n, offs_m, at_m, M,
                             KEEP_EQUAL, SELF)  # fmt: skip
        y_side = load_side(y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, y_label_ptr,
                           y_alike_ptr, at_m, offs_m < M)  # fmt: skip
        g = tile_gradient(
            logits, x_side, y_side, offs_n, offs_m, M, x_lse_ptr is not None, y_lse_ptr is not None,
            x_target_ptr is not None, y_target_ptr is not None,
            x_alike_ptr is not None or y_alike_ptr is not None, SELF,
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
    rows = tl.cast(split, tl.int64) * groups * N + first_n + offs_n  # split is 0 without SPLIT
    if dbias_ptr is not None:
        tl.store(dbias_ptr + rows, dbias, mask=mask_n)
    offs_d = tl.arange(0, BLOCK_D)
    cells = rows[:, None] * D + offs_d[None, :]
    if not SPLIT:
        dx *= scale
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(dx_ptr + cells, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def contrastive_bwd_reduce_kernel(
    part_ptr, dx_ptr, scale_ptr, size, splits, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """dx = scale sum_s part_s over `splits` partial gradients of `size` elements each.

    One program sums BLOCK elements, BLOCK_P splits at once and in fixed order, in fp32, and rounds
    once: 4 bytes read per partial element. Only problems with few row blocks are split, so the
    partials of all programs together stay a few tens of MB.
    """
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, splits, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        cells = offs_p.to(tl.int64)[:, None] * size + offs[None, :]
        inside = (offs_p < splits)[:, None] & mask[None, :]
        total += tl.sum(tl.load(part_ptr + cells, mask=inside, other=0.0), 0)
    dx = total * tl.load(scale_ptr)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------- launchers


def finish_constants(D: int) -> dict:
    return {
        "D": D, "BLOCK": 32, "BLOCK_P": 32, "BLOCK_D": min(64, triton.next_power_of_2(D)),
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def reduce_constants() -> dict:
    return {
        "BLOCK": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def contrastive_fwd(
    q: Tensor,  # (G N, D) float32, bfloat16 or float16
    k: Tensor,  # (G M, D)
    scale: Tensor,  # () float32
    q_ids: Tensor | None,  # (G N,) int32
    k_ids: Tensor | None,  # (G M,) int32
    keep_equal: bool,
    bias: Tensor | None,  # (G M,) float32
    limit: Tensor | None,  # (G N,) float32
    target: Tensor | None,  # (G N,) int32
    rows: bool,
    cols: bool,
    symmetric: bool,
    groups: int,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_lse (G N,), col_lse (G M,), pos (G N,) and logits (G N, M), fp32, empty where not asked
    for."""
    q, k = plain_rows(q), plain_rows(k)
    (n_all, D), m_all = q.shape, len(k)
    N, M = n_all // groups, m_all // groups
    row_lse = scale.new_empty(n_all if rows else 0)
    col_lse = scale.new_empty(m_all if cols else 0)
    pos = scale.new_empty(0 if target is None else n_all)
    logits = scale.new_empty((n_all, M) if store else (0, 0))
    known = constants("store" if store else "fwd", capability_of(q), q.dtype, D)
    known |= {"KEEP_EQUAL": keep_equal, "SELF": symmetric}
    row_part = col_part = None
    with device_of(q):
        if rows or store:
            blocks, splits, span = splits_of(q, N, M, groups, known)
            row_part = row_lse if rows and splits == 1 else scale.new_empty(splits, n_all)
            if cols:
                col_part = col_lse if blocks == groups else scale.new_empty(blocks // groups, m_all)
            contrastive_fwd_kernel[blocks, splits](
                q, k, scale, None, bias, q_ids, k_ids, limit, None, row_part, col_part,
                logits if store else None, N, M, groups, span, q.stride(0), k.stride(0), **known,
            )  # fmt: skip
        elif cols:
            blocks, splits, span = splits_of(k, M, N, groups, known)
            col_part = col_lse if splits == 1 else scale.new_empty(splits, m_all)
            contrastive_fwd_kernel[blocks, splits](
                k, q, scale, bias, None, k_ids, q_ids, None, limit, col_part, None,
                None, M, N, groups, span, k.stride(0), q.stride(0), **known,
            )  # fmt: skip
        row_part = None if row_part is row_lse or not rows else row_part
        col_part = None if col_part is col_lse else col_part
        row_blocks = 0 if row_part is None else triton.cdiv(n_all, 32)
        col_blocks = 0 if col_part is None else triton.cdiv(m_all, 32)
        pos_blocks = 0 if target is None else triton.cdiv(n_all, 32)
        if row_blocks + col_blocks + pos_blocks:
            contrastive_finish_kernel[(row_blocks + col_blocks + pos_blocks,)](
                q, k, scale, bias, target, pos, row_part, row_lse, col_part, col_lse, N, M, groups,
                0 if row_part is None else len(row_part), 0 if col_part is None else len(col_part),
                row_blocks, col_blocks, q.stride(0), k.stride(0), **finish_constants(D),
            )  # fmt: skip
    return row_lse, col_lse, pos, logits


def contrastive_bwd(
    q: Tensor,  # (G N, D)
    k: Tensor,  # (G M, D)
    scale: Tensor,  # ()
    q_ids: Tensor | None,  # (G N,)
    k_ids: Tensor | None,  # (G M,)
    keep_equal: bool,
    bias: Tensor | None,  # (G M,)
    limit: Tensor | None,  # (G N,)
    target: Tensor | None,  # (G N,)
    q_labels: Tensor | None,  # (G N,)
    k_labels: Tensor | None,  # (G M,)
    logits: Tensor,  # (G N, M) or (0, 0)
    row_lse: Tensor,  # (G N,) or (0,)
    col_lse: Tensor,  # (G M,) or (0,)
    drow: Tensor,  # (G N,) or (0,)
    dcol: Tensor,  # (G M,) or (0,)
    dpos: Tensor,  # (G N,) or (0,)
    drow_alike: Tensor,  # (G N,) or (0,)
    dcol_alike: Tensor,  # (G M,) or (0,)
    symmetric: bool,
    groups: int,
    need_dq: bool,
    need_dk: bool,
    need_dbias: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq (G N, D), dk (G M, D) or (0, D), dscale () and dbias (G M,) or (0,).

    dq and dk are of q's dtype, or fp32 with `wide`. `symmetric` takes neither bias, limit, dcol
    nor dcol_alike: q against itself has none.
    """
    q, k = plain_rows(q), plain_rows(k)
    upstream = drow, dcol, dpos, drow_alike, dcol_alike
    unit = unit_for(*upstream) if q.dtype == torch.float16 else None
    drow, dcol, dpos, q_alike, k_alike = (d.contiguous() if d.numel() else None for d in upstream)
    if q_alike is None and k_alike is None:
        q_labels = k_labels = None
    q_side, k_side = Side(label=q_labels, alike=q_alike), Side(label=k_labels, alike=k_alike)
    if drow is not None:
        q_side = q_side._replace(lse=row_lse, dlse=drow)
    if dpos is not None:
        q_side = q_side._replace(target=target, dpos=dpos)
    if dcol is not None:
        k_side = k_side._replace(lse=col_lse, dlse=dcol)
    if symmetric:
        k_side = q_side
    problem = q, k, scale, q_ids, k_ids, keep_equal, bias, limit
    sides = q_side, k_side, symmetric, groups
    like = scale if wide else q
    dq = like.new_empty(len(q) * need_dq, q.shape[1])
    dk = like.new_empty(len(k) * need_dk, k.shape[1])
    dscale = dbias = None
    with device_of(q):
        if logits.numel() and (need_dq or need_dk):
            # Logits do not give their products back, so dscale is a dot with the fp32 sums.
            factor = torch.ones_like(scale) if unit is None else unit
            dq_sum, dk_sum = (d if wide else scale.new_empty(d.shape) for d in (dq, dk))
            _, dbias = panel_gradient(
                *problem, logits, *sides, factor, None, dq_sum, dk_sum, False, need_dbias
            )
            x, total = (q, dq_sum) if need_dq else (k, dk_sum)
            dscale = (x * total).sum() / factor
            torch.mul(dq_sum, scale / factor, out=dq)
            torch.mul(dk_sum, scale / factor, out=dk)
        elif in_registers(q.dtype, q.shape[1]):
            if need_dq:
                masks = None, bias, q_ids, k_ids, limit, None
                dscale, _ = _owner(q, k, scale, unit, masks, keep_equal, *sides, dq, True, False)
            if need_dk:
                # Seen from the keys, the partner's rows carry the target and the owner's the bias.
                masks = bias, None, k_ids, q_ids, None, limit
                sides = k_side, q_side, symmetric, groups
                total, dbias = _owner(
                    k, q, scale, unit, masks, keep_equal, *sides, dk, not need_dq, need_dbias
                )
                dscale = dscale if need_dq else total
            if dscale is None or (need_dbias and dbias is None):
                sides = q_side, k_side, symmetric, groups
                dscale, dbias = panel_gradient(
                    *problem, None, *sides, scale, None, q[:0], k[:0], True, need_dbias
                )
        else:
            factor, after = (scale, None) if unit is None else (unit, scale / unit)
            dscale, dbias = panel_gradient(
                *problem, None, *sides, factor, after, dq, dk, True, need_dbias
            )
    if symmetric:
        dscale = 0.5 * dscale
    return dq, dk, dscale, dbias if need_dbias else scale.new_empty(0)


def _owner(
    x, y, scale, unit, masks, keep_equal, x_side, y_side, symmetric, groups, dx,
    need_dscale, need_dbias,
):  # fmt: skip
    """Fills dx (G N, D) for D <= 256; dscale () and dbias (G N,), the latter where x is k."""
    (n_all, D), N, M = x.shape, len(x) // groups, len(y) // groups
    kind = "bwd" if x_side.alike is None and y_side.alike is None else "alike"
    known = constants(kind, capability_of(x), x.dtype, D)
    blocks, splits, span = splits_of(x, N, M, groups, known)
    part = dx if splits == 1 else scale.new_empty(splits, n_all, D)
    dscale = scale.new_empty(splits * blocks) if need_dscale else None
    dbias = scale.new_empty(splits, n_all) if need_dbias else None
    contrastive_bwd_kernel[blocks, splits](
        x, y, scale, unit, *masks, *x_side, *y_side, part, dscale, dbias,
        N, M, groups, span, x.stride(0), y.stride(0),
        KEEP_EQUAL=keep_equal, SELF=symmetric, SPLIT=splits > 1, **known,
    )  # fmt: skip
    if splits > 1:
        known = reduce_constants()
        contrastive_bwd_reduce_kernel[(triton.cdiv(n_all * D, known["BLOCK"]),)](
            part, dx, scale, n_all * D, splits, **known
        )
    return dscale.sum() if need_dscale else None, dbias.sum(0) if need_dbias else None
