"""Triton kernel of the op `siglip`: sigmoid loss of all pairs and its gradient in one pass."""

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import (
    capability_of,
    constants,
    device_of,
    plain_rows,
    unit_for,
)
from fastssl.kernels.panels import pieces
from fastssl.kernels.tiles import exp_of, tile_products
from torch import Tensor


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1] as 2 artanh(e / (2 + e)): exact to rounding also where e is tiny,
    and cheaper than the logarithm. Left out: terms below 2e-8 of the sum."""
    s = e / (2.0 + e)  # at most 1/3
    t = s * s
    series = 1.0 / 9.0 + t * (1.0 / 11.0 + t * (1.0 / 13.0))
    return 2.0 * s * (1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * (1.0 / 7.0 + t * series))))


@triton.jit(do_not_specialize=["N", "M", "first_n", "first_m", "blocks_m", "part_rows"])
def siglip_panel_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, factor_ptr, x_ids_ptr, y_ids_ptr, target_ptr, weight_ptr,
    panel_ptr, loss_ptr, dscale_ptr, dbias_ptr,
    N, M, first_n, first_m, blocks_m, part_rows, stride_panel,
    stride_xn, stride_ym,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """loss_i = sum_j log(1 + e^z_ij), z = -l for the positive and l = scale <x_i, y_j> + bias else.

    One program computes one tile: its row sums of the loss, and with a panel
    panel = factor G, G_ij = weight_i (sigmoid(l_ij) - [positive]) in the features' dtype, which
    library products turn into gradients, and the sums of G <x_i, y_j> and of G, for dscale and
    dbias, in fp32 from the unrounded tile. 2 D operations per element, 2 or 4 bytes that stay in
    the second-level cache, 4 bytes per row and BLOCK_M columns.
    Safe: the one exponential is of -|z|; sigmoid of the positive less one is -sigmoid(-l) without
    cancellation. factor is scale, or for fp16 a power of two that keeps coefficients of the order
    weight from flushing to zero. SigLIP: arXiv:2303.15343.
    """
    block_m, block_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    start_n, start_m = first_n + block_n * BLOCK_N, first_m + block_m * BLOCK_M
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    c = tile_products(x_ptr, y_ptr, start_n, start_m, N, M, stride_xn, stride_ym,
                      D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)  # fmt: skip
    logits = c * tl.load(scale_ptr) + tl.load(bias_ptr)
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    positive = target[:, None] == offs_m[None, :]
    counts = mask_n[:, None] & mask_m[None, :]
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + offs_n, mask=mask_n, other=0)[:, None]
        y_id = tl.load(y_ids_ptr + offs_m, mask=mask_m, other=0)[None, :]
        counts &= (x_id != y_id) | positive
    z = tl.where(positive, -logits, logits)
    e = exp_of(-tl.abs(z))
    losses = tl.where(counts, tl.maximum(z, 0.0) + log1p_of(e), 0.0)
    part = tl.cast(block_m, tl.int64) * part_rows + offs_n - first_n
    tl.store(loss_ptr + part, tl.sum(losses, 1), mask=mask_n)
    if panel_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0)
        g = tl.where(z >= 0.0, 1.0, e) / (1.0 + e)
        g = tl.where(counts, tl.where(positive, -g, g) * weight[:, None], 0.0)
        tile = tl.cast(start_n // BLOCK_N, tl.int64) * tl.cdiv(M, BLOCK_M) + start_m // BLOCK_M
        tl.store(dscale_ptr + tile, tl.sum(tl.sum(g * c, 1), 0))
        tl.store(dbias_ptr + tile, tl.sum(tl.sum(g, 1), 0))
        panel_ptr += block_n * BLOCK_N * stride_panel + block_m * BLOCK_M
        cells = tl.arange(0, BLOCK_N)[:, None] * stride_panel + tl.arange(0, BLOCK_M)[None, :]
        g *= tl.load(factor_ptr)
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(panel_ptr + cells, g.to(panel_ptr.dtype.element_ty), mask=mask)


def siglip_fwd(
    q: Tensor,  # (N, D) float32, bfloat16 or float16
    k: Tensor,  # (M, D)
    scale: Tensor,  # () float32
    bias: Tensor,  # () float32
    q_ids: Tensor | None,  # (N,) int32
    k_ids: Tensor | None,  # (M,) int32
    target: Tensor,  # (N,) int32; outside [0, M): no positive
    weight: Tensor,  # (N,) float32
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), dq (N, D), dk (M, D) or (0, D), dscale () and dbias (), all fp32."""
    q, k = plain_rows(q), plain_rows(k)
    (N, D), M = q.shape, len(k)
    known = constants("panel", capability_of(q), q.dtype, D)
    loss = scale.new_zeros(N)
    dq, dk = scale.new_empty(N * need_dq, D), scale.new_empty(M * need_dk, D)
    factor, after = scale, None
    dscale = dbias = None
    with device_of(q):
        if q.dtype == torch.float16:
            unit = unit_for(weight)
            factor, after = unit, scale / unit
        if need_dq or need_dk:
            tiles = triton.cdiv(N, known["BLOCK_N"]) * triton.cdiv(M, known["BLOCK_M"])
            dscale, dbias = scale.new_empty(2, tiles)
        for piece in pieces(q, k, 1, known, dq, dk, after):
            part = scale.new_empty(piece.blocks_m, piece.rows)
            siglip_panel_kernel[(piece.programs,)](
                q, k, scale, bias, factor, q_ids, k_ids, target, weight,
                piece.panel, part, dscale, dbias, N, M, piece.n, piece.m, piece.blocks_m,
                piece.rows, piece.strides[1], q.stride(0), k.stride(0), **known,
            )  # fmt: skip
            loss[piece.n : piece.n + piece.rows] += part.sum(0)
        if dscale is None:
            return loss, dq, dk, scale.new_zeros(()), scale.new_zeros(())
        return loss, dq, dk, dscale.sum(), dbias.sum()
