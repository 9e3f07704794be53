"""Triton kernels of the op `queue`: attention whose values are its keys, in one pass."""

import torch
import triton
import triton.language as tl
from fastssl.kernels.contrastive import contrastive_fwd
from fastssl.kernels.launch import (
    Side,
    capability_of,
    constants,
    device_of,
    in_registers,
    plain_rows,
    splits_of,
)
from fastssl.kernels.panels import panel_gradient
from fastssl.kernels.tiles import INF, exp_of, finite_or_zero, load_rows, tile_logits
from torch import Tensor

# fp16 probabilities are at most 1, and those below 2^-25 flush to zero: 2^16 such keys would weigh
# 2^-9 in all. Lifted by this, only those below 2^-39 do.
LIFT = 2.0**14


@triton.jit(do_not_specialize=["N", "M", "groups", "span"])
def queue_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr, row_ptr, out_ptr,
    N, M, groups, span, stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_EQUAL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """row_i = log sum_j e^l_ij and out_i = sum_j e^(l_ij - row_i) y_j over `span` keys.

    A program owns BLOCK_N queries, keeps their fp32 sums in registers (D <= 256) and loops over
    one span of keys, each read once for both products, with an online maximum: 4 N M D
    operations, one exponential per logit, 4 D + 4 bytes written per query and split.
    Safe: every exponent is at most zero, and fp16 probabilities are lifted by LIFT, a power of
    two. A query with nothing left to sum has row = -inf and out = 0.
    Online softmax: arXiv:2205.14135.
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
    x = load_rows(x_ptr, start_n, N, stride_xn, 0, D, BLOCK_N, BLOCK_D)
    best = tl.full((BLOCK_N,), -INF, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_m in tl.range(split * span, tl.minimum(M, (split + 1) * span), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        at_m = first_m + tl.minimum(offs_m, M - 1)
        y = load_rows(y_ptr, start_m, M, stride_ym, 0, D, BLOCK_M, BLOCK_D)
        c = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        logits = tile_logits(c, scale, None, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr, None,
                             idx_n, first_n + idx_n, offs_m, at_m, M,
                             KEEP_EQUAL, False)  # fmt: skip
        new_best = tl.maximum(best, tl.max(logits, 1))
        ref = finite_or_zero(new_best)
        p = exp_of(logits - ref[:, None])  # (BLOCK_N, BLOCK_M)
        shrink = exp_of(best - ref)
        total = total * shrink + tl.sum(p, 1)
        p = (p * LIFT).to(y.dtype)
        out = tl.dot(p, y, out * shrink[:, None], input_precision=PRECISION)
        best = new_best
    out /= tl.where(total == 0.0, 1.0, total * LIFT)[:, None]
    rows = tl.cast(split, tl.int64) * groups * N + first_n + offs_n
    tl.store(row_ptr + rows, finite_or_zero(best) + tl.log(total), mask=mask_n)
    offs_d = tl.arange(0, BLOCK_D)
    cells = rows[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + cells, out, mask=mask_n[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def queue_merge_kernel(
    row_part_ptr, out_part_ptr, row_ptr, out_ptr, rows, splits,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """row = log sum_s e^row_s and out = sum_s e^(row_s - row) out_s: one program, one query.

    Reads 4 D + 4 bytes per query and split, BLOCK_P splits at once and in fixed order, so results
    repeat to the last bit. Safe: every exponent is at most zero.
    """
    row = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    best = tl.full((), -INF, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    out = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, splits, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        inside = offs_p < splits
        cells = offs_p.to(tl.int64) * rows + row
        part = tl.load(row_part_ptr + cells, mask=inside, other=-INF)  # (BLOCK_P,)
        mask = inside[:, None] & (offs_d < D)[None, :]
        outs = tl.load(out_part_ptr + cells[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        new_best = tl.maximum(best, tl.max(part, 0))
        ref = finite_or_zero(new_best)
        weight = exp_of(part - ref)
        shrink = exp_of(best - ref)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(outs * weight[:, None], 0)  # (BLOCK_D,)
        best = new_best
    out /= tl.where(total == 0.0, 1.0, total)
    tl.store(row_ptr + row, finite_or_zero(best) + tl.log(total))
    tl.store(out_ptr + tl.cast(row, tl.int64) * D + offs_d, out, mask=offs_d < D)


# ------------------------------------------------------------------------------------- launchers


def merge_constants(D: int) -> dict:
    return {
        "D": D, "BLOCK_P": 32, "BLOCK_D": triton.next_power_of_2(D),
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def queue_fwd(
    q: Tensor,  # (G N, D) float32, bfloat16 or float16
    k: Tensor,  # (G M, D)
    scale: Tensor,  # () float32
    q_ids: Tensor | None,  # (G N,) int32
    k_ids: Tensor | None,  # (G M,) int32
    keep_equal: bool,
    bias: Tensor | None,  # (G M,) float32
    limit: Tensor | None,  # (G N,) float32
    groups: int,
) -> tuple[Tensor, Tensor]:
    """row_lse (G N,) and out (G N, D), both fp32."""
    q, k = plain_rows(q), plain_rows(k)
    (n_all, D), N, M = q.shape, len(q) // groups, len(k) // groups
    out = scale.new_empty(n_all, D)
    half = q.dtype == torch.float16
    problem = q, k, scale, q_ids, k_ids, keep_equal, bias, limit
    with device_of(q):
        if not in_registers(q.dtype, D):
            row_lse = contrastive_fwd(*problem, None, True, False, False, groups, False)[0]
            side = Side(row_lse, torch.ones_like(row_lse))
            factor = torch.full_like(scale, LIFT if half else 1.0)
            panel_gradient(
                *problem, None, side, Side(), False, groups,
                factor, factor.reciprocal() if half else None, out, k[:0], False, False,
            )  # fmt: skip
            return row_lse, out
        row_lse = scale.new_empty(n_all)
        known = constants("bwd", capability_of(q), q.dtype, D)
        blocks, splits, span = splits_of(q, N, M, groups, known)
        row_part = row_lse if splits == 1 else scale.new_empty(splits, n_all)
        out_part = out if splits == 1 else scale.new_empty(splits, n_all, D)
        queue_fwd_kernel[blocks, splits](
            q, k, scale, bias, q_ids, k_ids, limit, row_part, out_part,
            N, M, groups, span, q.stride(0), k.stride(0),
            KEEP_EQUAL=keep_equal, LIFT=LIFT if half else 1.0, **known,
        )  # fmt: skip
        if splits > 1:
            queue_merge_kernel[(n_all,)](
                row_part, out_part, row_lse, out, n_all, splits, **merge_constants(D)
            )
    return row_lse, out
