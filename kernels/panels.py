"""Gradients by panels: a kernel writes coefficients, library products turn them into gradients.

For rows too wide for registers, for fp32, for stored logits, and where only sums are wanted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import capability_of, constants
from fastssl.kernels.tiles import INF, load_side, tile_gradient, tile_logits, tile_products
from torch import Tensor

# Coefficients held at once where the library multiplies: they stay in the second-level cache
# between the kernel and the two products.
PANEL_BYTES = 1 << 25
PANEL_ROWS = 4096
# Elements of a piece where no coefficients are held: bounds the kernels' partial sums.
PIECE = 1 << 28


class Piece(NamedTuple):
    """Part of the groups x N x M coefficients that one launch computes, a tile a program."""

    panel: Tensor | None  # (groups, rows, columns) of q's dtype to fill, or None
    strides: tuple[int, int]  # of the panel's groups and rows
    group: int  # the first group, row and column
    n: int
    m: int
    rows: int
    blocks_n: int
    blocks_m: int
    programs: int


def pieces(
    q: Tensor,  # (G N, D)
    k: Tensor,  # (G M, D)
    groups: int,
    known: dict,
    dq: Tensor,  # (G N, D) or (0, D)
    dk: Tensor,  # (G M, D) or (0, D)
    after: Tensor | None,  # ()
) -> Iterator[Piece]:
    """Pieces whose panel the caller fills with coefficients C before it takes the next one.

    In the end dq = after C k and dk = after C^T q, by library products with fp32 sums.
    """
    N, M = len(q) // groups, len(k) // groups
    block_n, block_m = known["BLOCK_N"], known["BLOCK_M"]
    rows, columns = triton.cdiv(N, block_n) * block_n, triton.cdiv(M, block_m) * block_m
    held = bool(len(dq) or len(dk))
    elements = PANEL_BYTES // q.element_size() if held else PIECE
    # Square where both sides are long: the fp32 sums are then read and written least often.
    rows = min(rows, max(PANEL_ROWS, elements // columns // block_n * block_n))
    columns = min(columns, max(block_m, elements // rows // block_m * block_m))
    whole = rows >= N and columns >= M
    batch = min(groups, max(1, elements // (rows * columns))) if whole else 1
    panel, strides = None, (0, 0)
    if held:
        panel = q.new_empty(batch, min(rows, N), columns)
        strides = panel.stride()[:2]
    # One panel along the sum: the product rounds once, straight into the result.
    in_dq = dq.dtype == torch.float32 or (columns >= M and after is None)
    in_dk = dk.dtype == torch.float32 or (rows >= N and after is None)
    dq_sum = dq if in_dq else dq.new_empty(dq.shape, dtype=torch.float32)
    dk_sum = dk if in_dk else dk.new_empty(dk.shape, dtype=torch.float32)
    q, k, dq_part, dk_part = (x.unflatten(0, (groups, -1)) for x in (q, k, dq_sum, dk_sum))
    for g in range(0, groups, batch):
        last_g = min(g + batch, groups)
        for n in range(0, N, rows):
            last_n = min(n + rows, N)
            for m in range(0, M, columns):
                last_m = min(m + columns, M)
                blocks = triton.cdiv(last_n - n, block_n), triton.cdiv(last_m - m, block_m)
                programs = (last_g - g) * blocks[0] * blocks[1]
                yield Piece(panel, strides, g, n, m, last_n - n, *blocks, programs)
                if held:
                    c = panel[: last_g - g, : last_n - n, : last_m - m]
                if len(dq):
                    _add_product(dq_part[g:last_g, n:last_n], c, k[g:last_g, m:last_m], m > 0)
                if len(dk):
                    _add_product(dk_part[g:last_g, m:last_m], c.mT, q[g:last_g, n:last_n], n > 0)
    for total, out in ((dq_sum, dq), (dk_sum, dk)):
        if after is not None:
            torch.mul(total, after, out=out)
        elif total is not out:
            out.copy_(total)


def _add_product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total += a b, or total = a b, batched, accumulated in fp32 whatever a's dtype."""
    if total.dtype == a.dtype:
        torch.baddbmm(total, a, b, beta=int(add), out=total)
    elif a.is_cuda:
        torch.baddbmm(total, a, b, out_dtype=torch.float32, beta=int(add), out=total)
    else:
        torch.baddbmm(total, a.float(), b.float(), beta=int(add), out=total)


@triton.jit(do_not_specialize="N M groups first_group first_n first_m blocks_n blocks_m".split())
def contrastive_panel_kernel(
    x_ptr, y_ptr, scale_ptr, factor_ptr, y_bias_ptr, x_ids_ptr, y_ids_ptr, x_limit_ptr,
    logits_ptr, x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, x_label_ptr, x_alike_ptr,
    y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, y_label_ptr, y_alike_ptr,
    panel_ptr, dscale_ptr, dbias_ptr,
    N, M, groups, first_group, first_n, first_m, blocks_n, blocks_m, stride_pg, stride_pn,
    stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, KEEP_EQUAL: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """panel = factor G for one piece of the groups, rows and columns, G as in `tile_gradient`.

    One program writes one tile in the features' dtype; library products turn the panel into
    gradients. 2 D operations and 2 or 4 bytes per element, which stay in the second-level cache;
    with stored logits 4 bytes read in place of the operations. Without a panel only the sums.
    Also one number sum_ij G_ij c_ij a program, for dscale, and column sums of G for dbias, both
    from unrounded coefficients and in fp32. factor is scale, or for fp16 the power of two that
    keeps coefficients of the order 1 / N from flushing to zero. Safe as `contrastive_bwd_kernel`.
    """
    block_m, block = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    block_n, panel_group = block % blocks_n, block // blocks_n
    group = first_group + panel_group
    start_n, start_m = first_n + block_n * BLOCK_N, first_m + block_m * BLOCK_M
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    idx_n = tl.minimum(offs_n, N - 1)
    at_n, at_m = group * N + idx_n, group * M + tl.minimum(offs_m, M - 1)
    if logits_ptr is None:
        x_ptr += tl.cast(group * N, tl.int64) * stride_xn
        y_ptr += tl.cast(group * M, tl.int64) * stride_ym
        c = tile_products(x_ptr, y_ptr, start_n, start_m, N, M, stride_xn, stride_ym,
                          D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)  # fmt: skip
        logits = tile_logits(c, tl.load(scale_ptr), None, y_bias_ptr, x_ids_ptr, y_ids_ptr,
                             x_limit_ptr, None, idx_n, at_n, offs_m, at_m, M,
                             KEEP_EQUAL, SELF)  # fmt: skip
    else:
        logits_ptr += tl.cast(group * N + start_n, tl.int64) * M + start_m
        cells = tl.arange(0, BLOCK_N)[:, None] * M + tl.arange(0, BLOCK_M)[None, :]
        logits = tl.load(logits_ptr + cells, mask=mask_n[:, None] & mask_m[None, :], other=-INF)
    x_side = load_side(x_lse_ptr, x_dlse_ptr, x_target_ptr, x_dpos_ptr, x_label_ptr, x_alike_ptr,
                       at_n, mask_n)  # fmt: skip
    y_side = load_side(y_lse_ptr, y_dlse_ptr, y_target_ptr, y_dpos_ptr, y_label_ptr, y_alike_ptr,
                       at_m, mask_m)  # fmt: skip
    g = tile_gradient(
        logits, x_side, y_side, offs_n, offs_m, M, x_lse_ptr is not None, y_lse_ptr is not None,
        x_target_ptr is not None, y_target_ptr is not None,
        x_alike_ptr is not None or y_alike_ptr is not None, SELF,
    )  # fmt: skip
    g = tl.where(mask_n[:, None], g, 0.0)  # (BLOCK_N, BLOCK_M)
    if dscale_ptr is not None:
        tile = group * tl.cdiv(N, BLOCK_N) + start_n // BLOCK_N
        tile = tl.cast(tile, tl.int64) * tl.cdiv(M, BLOCK_M) + start_m // BLOCK_M
        tl.store(dscale_ptr + tile, tl.sum(tl.sum(g * c, 1), 0))
    if dbias_ptr is not None:
        sums = tl.cast(start_n // BLOCK_N, tl.int64) * groups * M + at_m
        tl.store(dbias_ptr + sums, tl.sum(g, 0), mask=mask_m)
    if panel_ptr is not None:
        panel_ptr += tl.cast(panel_group, tl.int64) * stride_pg
        panel_ptr += block_n * BLOCK_N * stride_pn + block_m * BLOCK_M
        cells = tl.arange(0, BLOCK_N)[:, None] * stride_pn + tl.arange(0, BLOCK_M)[None, :]
        g *= tl.load(factor_ptr)
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(panel_ptr + cells, g.to(panel_ptr.dtype.element_ty), mask=mask)


def panel_gradient(
    q, k, scale, q_ids, k_ids, keep_equal, bias, limit, logits, q_side, k_side, symmetric, groups,
    factor, after, dq, dk, need_dscale, need_dbias,
):  # fmt: skip
    """Fills dq and dk, where not empty, over panels of factor G, times `after`; any D.

    Returns dscale () and dbias (G M,), or None.
    """
    N, M = len(q) // groups, len(k) // groups
    known = constants("panel", capability_of(q), q.dtype, q.shape[1])
    blocks_n, blocks_m = triton.cdiv(N, known["BLOCK_N"]), triton.cdiv(M, known["BLOCK_M"])
    dscale = scale.new_empty(groups * blocks_n * blocks_m) if need_dscale else None
    dbias = scale.new_empty(blocks_n, len(k)) if need_dbias else None
    for piece in pieces(q, k, groups, known, dq, dk, after):
        contrastive_panel_kernel[(piece.programs,)](
            q, k, scale, factor, bias, q_ids, k_ids, limit, logits, *q_side, *k_side,
            piece.panel, dscale, dbias, N, M, groups, piece.group, piece.n, piece.m,
            piece.blocks_n, piece.blocks_m, *piece.strides, q.stride(0), k.stride(0),
            KEEP_EQUAL=keep_equal, SELF=symmetric, **known,
        )  # fmt: skip
    return dscale.sum() if need_dscale else None, dbias.sum(0) if need_dbias else None
