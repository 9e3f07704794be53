"""Triton kernels of the op `prototypes`: passes of Sinkhorn-Knopp over scores (B, K), and codes.

With x_bk = scale s_bk + bias_k a pass gives log sum_b e^x_bk, the first one without a bias, or
log sum_b softmax_k(x_b)_k. Where all columns of a row fit the registers one read gives shares and
sums; wider rows are read twice, for their log-sum-exp and then column by column. K and the row
stride are compile-time constants: a model has few, and they tell how rows are aligned.
"""

import torch
import triton
import triton.language as tl
from fastssl.kernels.contrastive import merge_parts
from fastssl.kernels.launch import device_of, plain_rows, splits_of
from fastssl.kernels.tiles import INF, exp_of
from torch import Tensor

WIDEST_IN_REGISTERS = 1 << 14
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of nothing: -inf - -inf would be NaN


@triton.jit
def load_scores(x_ptr, start_b, start_k, B, K: tl.constexpr, STRIDE: tl.constexpr,
                BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of scores in fp32, 0 outside."""
    # One 64-bit base and 32-bit offsets inside the tile.
    base = x_ptr + tl.cast(start_b, tl.int64) * STRIDE + start_k
    offs_b, offs_k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    mask = (start_b + offs_b < B)[:, None] & (start_k + offs_k < K)[None, :]
    x = tl.load(base + offs_b[:, None] * STRIDE + offs_k[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)  # (BLOCK_B, BLOCK_K)


@triton.jit
def store_codes(codes_ptr, p, start_b, start_k, B, K: tl.constexpr,
                BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    base = codes_ptr + tl.cast(start_b, tl.int64) * K + start_k
    offs_b, offs_k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    mask = (start_b + offs_b < B)[:, None] & (start_k + offs_k < K)[None, :]
    tl.store(base + offs_b[:, None] * K + offs_k[None, :], p, mask=mask)


@triton.jit
def take_in(best, total, x):
    """(maximum, sum) of each lane takes in e^x: one exponential, no exchange between lanes."""
    gap = x - best
    e = exp_of(-tl.abs(gap))
    return tl.maximum(best, x), tl.where(gap > 0.0, total * e + 1.0, total + e)


@triton.jit(do_not_specialize=["B", "span"])
def sinkhorn_rows_kernel(
    x_ptr, bias_ptr, scale, part_ptr, codes_ptr, B, span,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part_k = log sum_b softmax_k(x_b)_k over `span` rows, or the softmax itself as codes.

    A program holds all columns of BLOCK_B rows in registers and loops over its span: one read of
    the scores, one exponential an element, 4 K bytes written for the span or 4 an element.
    Safe: exponents are differences to the row's maximum. Sums are fp32, lane by lane. A row with a
    NaN or +inf, or with nothing but -inf, has NaN for codes. Sinkhorn: arXiv:1306.0895.
    """
    first = tl.program_id(0) * span
    offs_b, offs_k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + offs_k, mask=offs_k < K, other=-INF)  # leaves out the columns past K
    sums = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in tl.range(first, tl.minimum(B, first + span), BLOCK_B):
        x = load_scores(x_ptr, start, 0, B, K, STRIDE, BLOCK_B, BLOCK_K) * scale + bias[None, :]
        e = exp_of(x - tl.max(x, 1)[:, None])  # (BLOCK_B, BLOCK_K)
        share = tl.where(start + offs_b < B, 1.0 / tl.sum(e, 1), 0.0)
        p = e * share[:, None]
        if codes_ptr is not None:
            store_codes(codes_ptr, p, start, 0, B, K, BLOCK_B, BLOCK_K)
        if part_ptr is not None:
            sums += p
    if part_ptr is not None:
        parts = part_ptr + tl.cast(tl.program_id(0), tl.int64) * K + offs_k
        tl.store(parts, tl.log(tl.sum(sums, 0)), mask=offs_k < K)


@triton.jit(do_not_specialize=["B", "tiles"])
def sinkhorn_lse_kernel(
    x_ptr, bias_ptr, scale, part_ptr, B, tiles,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part_b = log sum_k e^x_bk over `tiles` blocks of columns, for rows too wide for registers.

    A program owns BLOCK_B rows, which share each bias it reads: one read of the scores, one
    exponential an element. Each lane keeps a maximum and a sum; they meet at the end.
    Safe: exponents are at most zero. Online softmax: arXiv:1805.02867.
    """
    start_b, split = tl.program_id(0) * BLOCK_B, tl.program_id(1)
    best = tl.full((BLOCK_B, BLOCK_K), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    last = tl.minimum(tl.cdiv(K, BLOCK_K), (split + 1) * tiles)
    for tile in tl.range(split * tiles, last):
        start_k = tile * BLOCK_K
        offs_k = start_k + tl.arange(0, BLOCK_K)
        bias = tl.load(bias_ptr + offs_k, mask=offs_k < K, other=-INF)
        x = load_scores(x_ptr, start_b, start_k, B, K, STRIDE, BLOCK_B, BLOCK_K)
        best, total = take_in(best, total, x * scale + bias[None, :])
    top = tl.max(best, 1)  # (BLOCK_B,)
    lse = top + tl.log(tl.sum(total * exp_of(best - top[:, None]), 1))
    offs_b = start_b + tl.arange(0, BLOCK_B)
    tl.store(part_ptr + tl.cast(split, tl.int64) * B + offs_b, lse, mask=offs_b < B)


@triton.jit(do_not_specialize=["B", "span"])
def sinkhorn_columns_kernel(
    x_ptr, bias_ptr, lse_ptr, scale, part_ptr, codes_ptr, B, span,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part_k = log sum_b e^x_bk over `span` rows; with rows' log-sum-exps, p = e^(x_bk - lse_b) in
    place of e^x_bk, summed or written as codes.

    A program owns BLOCK_K columns: one read of the scores, one exponential an element, sums lane by
    lane that meet at the end, 4 bytes written for each column and span, or for each code.
    Safe: exponents are differences to a lane's maximum, or to an lse, whose rounding costs what
    that of the logits does. Sinkhorn: arXiv:1306.0895.
    """
    start_k, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    best = tl.full((BLOCK_B, BLOCK_K), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    if lse_ptr is not None:
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)
    for start_b in tl.range(split * span, tl.minimum(B, (split + 1) * span), BLOCK_B):
        x = load_scores(x_ptr, start_b, start_k, B, K, STRIDE, BLOCK_B, BLOCK_K) * scale
        offs_b = start_b + tl.arange(0, BLOCK_B)
        if lse_ptr is None:
            best, total = take_in(best, total, tl.where((offs_b < B)[:, None], x, -INF))
        else:
            lse = tl.load(lse_ptr + offs_b, mask=offs_b < B, other=INF)  # rows past B add 0
            p = exp_of(x + bias[None, :] - lse[:, None])  # (BLOCK_B, BLOCK_K)
            if codes_ptr is not None:
                store_codes(codes_ptr, p, start_b, start_k, B, K, BLOCK_B, BLOCK_K)
            else:
                total += p
    if part_ptr is not None:
        if lse_ptr is None:
            top = tl.max(best, 0)  # (BLOCK_K,)
            out = top + tl.log(tl.sum(total * exp_of(best - top[None, :]), 0))
        else:
            out = tl.log(tl.sum(total, 0))
        tl.store(part_ptr + tl.cast(split, tl.int64) * K + offs_k, out, mask=mask_k)


@triton.jit(do_not_specialize=["parts", "length"])
def sinkhorn_merge_kernel(
    part_ptr, out_ptr, parts, length, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """out = log sum_p e^part_p for BLOCK of `length` numbers a program, in fixed order: results
    repeat to the last bit. 4 bytes read for each number and part."""
    merge_parts(part_ptr, out_ptr, parts, length, tl.program_id(0), BLOCK, BLOCK_P)


# ------------------------------------------------------------------------------------- launchers


def rows_constants(K: int) -> dict:
    width = max(32, triton.next_power_of_2(K))
    num_warps = min(16, max(4, width // 512))
    return {
        "BLOCK_B": max(1, 1024 * num_warps // width), "BLOCK_K": width,  # 32 logits a thread
        "num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def lse_constants() -> dict:
    return {
        "BLOCK_B": 4, "BLOCK_K": 2048, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def columns_constants(K: int) -> dict:
    width = min(256, max(64, triton.next_power_of_2(K)))
    return {
        "BLOCK_B": 8192 // width, "BLOCK_K": width,
        "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def merge_constants() -> dict:
    return {
        "BLOCK": 32, "BLOCK_P": 32, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def merged(part: Tensor) -> Tensor:
    """(n,) of (parts, n)."""
    parts, n = part.shape
    if parts == 1:
        return part.view(n)
    out, known = part.new_empty(n), merge_constants()
    sinkhorn_merge_kernel[(triton.cdiv(n, known["BLOCK"]),)](part, out, parts, n, **known)
    return out


def by_rows(x: Tensor, scale: float, bias: Tensor, codes: Tensor | None) -> Tensor | None:
    """Fills the codes, or gives the pass (K,)."""
    B, K = x.shape
    known = rows_constants(K)
    # Whose programs share rows alone: an owner of one block and B partners.
    _, splits, span = splits_of(x, 1, B, 1, {"BLOCK_N": 1, "BLOCK_M": known["BLOCK_B"]})
    part = bias.new_empty(splits, K) if codes is None else None
    sinkhorn_rows_kernel[(splits,)](
        x, bias, scale, part, codes, B, span, K=K, STRIDE=x.stride(0), **known
    )
    return None if part is None else merged(part)


def by_columns(x: Tensor, scale: float, bias: Tensor | None, codes: Tensor | None) -> Tensor | None:
    """Fills the codes, or gives the pass (K,)."""
    B, K = x.shape
    lse = None
    if bias is not None:
        known = lse_constants()
        sizes = {"BLOCK_N": known["BLOCK_B"], "BLOCK_M": known["BLOCK_K"]}
        blocks, splits, span = splits_of(x, B, K, 1, sizes)
        part = bias.new_empty(splits, B)
        sinkhorn_lse_kernel[blocks, splits](
            x, bias, scale, part, B, span // known["BLOCK_K"], K=K, STRIDE=x.stride(0), **known
        )
        lse = merged(part)
    known = columns_constants(K)
    sizes = {"BLOCK_N": known["BLOCK_K"], "BLOCK_M": known["BLOCK_B"]}
    blocks, splits, span = splits_of(x, K, B, 1, sizes)
    part = x.new_empty(splits, K, dtype=torch.float32) if codes is None else None
    sinkhorn_columns_kernel[blocks, splits](
        x, bias, lse, scale, part, codes, B, span, K=K, STRIDE=x.stride(0), **known
    )
    return None if part is None else merged(part)


def sinkhorn_pass(
    scores: Tensor,  # (B, K) float32, bfloat16 or float16
    scale: float,
    bias: Tensor | None,  # (K,) float32
) -> Tensor:
    """(K,) fp32."""
    B, K = scores.shape
    if B == 0:
        return scores.new_full((K,), -torch.inf, dtype=torch.float32)
    x = plain_rows(scores)
    with device_of(x):
        if bias is None or K > WIDEST_IN_REGISTERS:
            return by_columns(x, scale, bias, None)
        return by_rows(x, scale, bias, None)


def sinkhorn_codes(
    scores: Tensor,  # (B, K) float32, bfloat16 or float16
    scale: float,
    bias: Tensor,  # (K,) float32
) -> Tensor:
    """(B, K) fp32."""
    B, K = scores.shape
    codes = bias.new_empty(B, K)
    if B == 0:
        return codes
    x = plain_rows(scores)
    with device_of(x):
        (by_rows if K <= WIDEST_IN_REGISTERS else by_columns)(x, scale, bias, codes)
    return codes
