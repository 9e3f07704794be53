"""Triton kernels of the op `blockwise`: the 8-bit codec, and optimizer steps over many tensors.

A step is one launch, whatever the tensors are, by a table of addresses. LARS and LAMB take two
launches before, for the norms. Elements stand in the order of memory, equal in parameter, gradient
and states.
Papers: 8-bit optimizers arXiv:2110.02861; LARS arXiv:1708.03888; LAMB arXiv:1904.00962; AdEMAMix
arXiv:2409.03137.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of
from fastssl.kernels.tables import (
    CHUNK,
    CODES,
    COLUMNS,
    FULL,
    constants,
    load,
    load_values,
    plan_for,
    pointer_to,
    store_parameter,
    tensor_of,
)
from fastssl.kernels.tiles import INF
from torch import Tensor

from fastssl.ops.blockwise import HYPER, RULES, code_book, first_moments

ADAM, ADAMW, SGD, NESTEROV, LION, RMSPROP, ADAGRAD, LARS, LAMB, ADEMAMIX = map(
    tl.constexpr, range(10)
)

# `books`: both codes, signed first, as bits; then, signed first, an entry for each upper half of a
# magnitude's bits from that of 2^-23 to that of 1. No two codes' midpoints share one: the entry and
# the bits add up to the place of the nearest code in the upper half, with the carry from its lower
# half where a midpoint lies between.
FIRST_HALF, LAST_HALF = map(tl.constexpr, (0x3400, 0x3F80))
HALVES = tl.constexpr(LAST_HALF.value - FIRST_HALF.value + 1)

WIDTH = tl.constexpr(HYPER)


class Hyper(NamedTuple):
    lr: tl.tensor
    momentum: tl.tensor
    complement1: tl.tensor  # 1 - beta
    complement2: tl.tensor
    complement3: tl.tensor
    eps: tl.tensor
    decay: tl.tensor
    correction1: tl.tensor  # the inverses, in kernels
    correction2: tl.tensor
    extra: tl.tensor
    scale: tl.tensor
    adapt: tl.tensor
    most: tl.tensor


# ------------------------------------------------------------------------------------- the codec


@triton.jit
def decode(codes, absmax, books_ptr, SIGNED: tl.constexpr):
    """codes (ROWS, BLOCK), absmax (ROWS,)."""
    book = books_ptr if SIGNED else books_ptr + 256
    return tl.load(book + codes.to(tl.int32)).to(tl.float32, bitcast=True) * absmax[:, None]


@triton.jit
def absolute_maximum(x):
    # As integers, of which NaN is the largest.
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return top.to(tl.float32, bitcast=True)


@triton.jit
def encode(x, absmax, books_ptr, SIGNED: tl.constexpr):
    """The places of the nearest codes; between two the even place; of NaN that of 0."""
    lift = tl.where(absmax < 2.0**-64, 2.0**64, 1.0)  # so that the inverse is finite
    inverse = tl.div_rn(1.0, tl.where(absmax == 0.0, 1.0, absmax * lift))
    bits = (x * lift[:, None] * inverse[:, None]).to(tl.int32, bitcast=True)  # (ROWS, BLOCK)
    # NaN, also of infinity times 0, is there only where absmax is not finite. All else rounds to 1
    # or hardly more: no entry past the last is looked up.
    magnitude = tl.where(absmax < INF, 0x7FFFFFFF, 0)
    size = tl.maximum(bits & magnitude[:, None], FIRST_HALF << 16)
    entries = books_ptr + (512 if SIGNED else 512 + HALVES)
    place = (tl.load(entries + ((size >> 16) - FIRST_HALF)) + size) >> 16
    if SIGNED:  # there is no -1
        place = tl.where(bits < 0, 127 - tl.minimum(place, 127), 127 + place)
    return place.to(tl.uint8)


@triton.jit
def quantize_blockwise_kernel(
    x_ptr, codes_ptr, absmax_ptr, books_ptr, n,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """codes of x, and the largest magnitude of each block: ROWS blocks a program, each value read
    once, one byte written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    absmax = absolute_maximum(x)
    tl.store(absmax_ptr + row, absmax, mask=row * BLOCK < n)
    tl.store(codes_ptr + offs, encode(x, absmax, books_ptr, SIGNED), mask=mask)


@triton.jit
def dequantize_blockwise_kernel(
    codes_ptr, absmax_ptr, out_ptr, books_ptr, n,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The code's number times the block's magnitude: one byte read, four written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offs < n
    codes = tl.load(codes_ptr + offs, mask=mask, other=0)
    absmax = tl.load(absmax_ptr + row, mask=row * BLOCK < n, other=0.0)
    tl.store(out_ptr + offs, decode(codes, absmax, books_ptr, SIGNED), mask=mask)


# -------------------------------------------------------------------------------------- the rules


@triton.jit
def whole_gradient(p, g, h, RULE: tl.constexpr):
    """g in the units of the loss, with p's decay where that is a part of it."""
    g = g * h.scale
    apart: tl.constexpr = RULE == ADAMW or RULE == LION or RULE == LAMB or RULE == ADEMAMIX
    return g if apart else g + h.decay * p


@triton.jit
def direction(p, g, h, m, slow, v, RULE: tl.constexpr):
    """What lr times is taken from p, and the new states, `slow` of AdEMAMix alone: of LAMB before,
    of LARS with the trust ratio, which g has by then. Divisions and roots are those of IEEE, as on
    a CPU."""
    if RULE == ADAM or RULE == ADAMW or RULE == LAMB or RULE == ADEMAMIX:
        m += h.complement1 * (g - m)
        v += h.complement2 * (g * g - v)
        mean = m * h.correction1
        if RULE == ADEMAMIX:
            slow += h.complement3 * (g - slow)
            mean += h.extra * slow
        u = tl.div_rn(mean, tl.sqrt_rn(v * h.correction2) + h.eps)
        if RULE == LAMB or RULE == ADEMAMIX:
            u += h.decay * p
    elif RULE == LION:
        u = m + h.complement1 * (g - m)
        u = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
        m += h.complement2 * (g - m)
    elif RULE == RMSPROP:
        v += h.complement2 * (g * g - v)
        m = h.momentum * m + tl.div_rn(g, tl.sqrt_rn(v) + h.eps)
        u = m
    elif RULE == ADAGRAD:
        v = v + g * g
        u = tl.div_rn(g, tl.sqrt_rn(v) + h.eps)
    elif RULE == LARS:
        m = h.momentum * m + g
        u = m
    else:
        m = h.momentum * m + h.complement1 * g
        u = g + h.momentum * m if RULE == NESTEROV else m
    return u, m, slow, v


@triton.jit
def stepped(p, g, h, trust, m, slow, v, RULE: tl.constexpr):
    """p, m, slow and v after a step."""
    g = whole_gradient(p, g, h, RULE)
    if RULE == ADAMW or RULE == LION:
        p = p - h.lr * h.decay * p
    if RULE == LARS:
        g = g * trust
    u, m, slow, v = direction(p, g, h, m, slow, v, RULE)
    if RULE == LAMB:
        u = trust * u
    return p - h.lr * u, m, slow, v


# ------------------------------------------------------------------------------------- the states


@triton.jit
def load_state(
    address, scale_address, kind, block, offs, mask, mask_rows, books_ptr,
    SIGNED: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK
    if kind == CODES:
        rows = tl.arange(0, ROWS)
        codes = load(pointer_to(address, tl.uint8, WHOLE) + start + offs, mask)
        absmax = load(pointer_to(scale_address, tl.float32, False) + block + rows, mask_rows)
        x = decode(codes, absmax, books_ptr, SIGNED)
        if ROOT:
            x = x * x
    elif kind == FULL:
        x = load(pointer_to(address, tl.float32, WHOLE) + start + offs, mask)
    else:
        x = tl.zeros((ROWS, BLOCK), tl.float32)
    return x


@triton.jit
def store_state(
    x, address, scale_address, kind, block, offs, mask, mask_rows, books_ptr,
    SIGNED: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK
    if kind == CODES:
        if ROOT:
            x = tl.sqrt_rn(x)
        if not WHOLE:
            x = tl.where(mask, x, 0.0)
        absmax = absolute_maximum(x)
        rows = tl.arange(0, ROWS)
        tl.store(pointer_to(scale_address, tl.float32, False) + block + rows, absmax,
                 mask=mask_rows)  # fmt: skip
        codes = encode(x, absmax, books_ptr, SIGNED)
        tl.store(pointer_to(address, tl.uint8, WHOLE) + start + offs, codes, mask=mask)
    elif kind == FULL:
        tl.store(pointer_to(address, tl.float32, WHOLE) + start + offs, x, mask=mask)


# --------------------------------------------------------------------------------------- the step


@triton.jit
def hyper_of(ptr):
    return Hyper(
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4),
        tl.load(ptr + 5), tl.load(ptr + 6), tl.div_rn(1.0, tl.load(ptr + 7)),
        tl.div_rn(1.0, tl.load(ptr + 8)), tl.load(ptr + 9), tl.load(ptr + 10), tl.load(ptr + 11),
        tl.load(ptr + 12),
    )  # fmt: skip


@triton.jit
def slow_of(row, kind, BLOCK: tl.constexpr):
    """The addresses of AdEMAMix's slow momentum and its scales, behind the fast one's."""
    return row.m + tl.where(kind == CODES, 1, 4) * row.n, row.m_scale + 4 * tl.cdiv(row.n, BLOCK)


@triton.jit
def is_finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def step_tile(
    row, kind, block, h, trust, counters_ptr, books_ptr, seed,
    RULE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROOT: tl.constexpr,
    FINITE_ONLY: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, rows = block * BLOCK, tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    left = tl.minimum(row.n - start, ROWS * BLOCK).to(tl.int32)
    mask = None if WHOLE else offs < left
    mask_rows = None if WHOLE else rows * BLOCK < left
    old = load_values(row.p, kind % 4, start, offs, mask, WHOLE)
    g = load_values(row.g, kind // 4 % 4, start, offs, mask, WHOLE)
    m = load_state(row.m, row.m_scale, kind // 16 % 4, block, offs, mask, mask_rows, books_ptr,
                   True, False, BLOCK, ROWS, WHOLE)  # fmt: skip
    v = load_state(row.v, row.v_scale, kind // 64 % 4, block, offs, mask, mask_rows, books_ptr,
                   False, ROOT, BLOCK, ROWS, WHOLE)  # fmt: skip
    slow = m
    if RULE == ADEMAMIX:
        slow_at, slow_scale = slow_of(row, kind // 16 % 4, BLOCK)
        slow = load_state(slow_at, slow_scale, kind // 16 % 4, block, offs, mask, mask_rows,
                          books_ptr, True, False, BLOCK, ROWS, WHOLE)  # fmt: skip
    p, next_m, next_slow, next_v = stepped(old, g, h, trust, m, slow, v, RULE)
    if FINITE_ONLY:
        finite = is_finite(g)
        p, next_m = tl.where(finite, p, old), tl.where(finite, next_m, m)
        next_slow, next_v = tl.where(finite, next_slow, slow), tl.where(finite, next_v, v)
    store_parameter(p, row.p, kind % 4, start, offs, mask, counters_ptr, seed,
                    STOCHASTIC, BLOCK, ROWS, WHOLE)  # fmt: skip
    store_state(next_m, row.m, row.m_scale, kind // 16 % 4, block, offs, mask, mask_rows, books_ptr,
                True, False, BLOCK, ROWS, WHOLE)  # fmt: skip
    if RULE == ADEMAMIX:
        store_state(next_slow, slow_at, slow_scale, kind // 16 % 4, block, offs, mask, mask_rows,
                    books_ptr, True, False, BLOCK, ROWS, WHOLE)  # fmt: skip
    store_state(next_v, row.v, row.v_scale, kind // 64 % 4, block, offs, mask, mask_rows, books_ptr,
                False, ROOT, BLOCK, ROWS, WHOLE)  # fmt: skip


@triton.jit(do_not_specialize=["T", "seed"])
def blockwise_step_kernel(
    table_ptr, hyper_ptr, counters_ptr, found_inf_ptr, trust_ptr, books_ptr, T, seed,
    RULE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    COMMON: tl.constexpr, ROOT: tl.constexpr, FINITE_ONLY: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """A step of CHUNK elements of one tensor, in place, by tiles of ROWS blocks.

    A tile's parameters, gradients and codes are read once into registers, stepped in fp32 and
    written once: 16.06 bytes an element of fp32 with two states. The step uses the states before
    they are rounded. Safe: a block is its own largest magnitude times numbers up to 1. Without
    fused multiply-adds the results are the reference's; the CPU kernel's compiler may fuse some.
    """
    t, row, first, last = tensor_of(table_ptr, T, BLOCK, CHUNK)
    h = hyper_of(hyper_ptr + t * WIDTH)
    trust = 1.0 if trust_ptr is None else tl.load(trust_ptr + t)
    if found_inf_ptr is not None:
        last = tl.where(tl.load(found_inf_ptr) == 0.0, last, first)
    counters_ptr += 2 * t
    seed = seed.to(tl.int64)
    for block in range(first, last, ROWS):
        if (row.kind == COMMON) & ((block + ROWS) * BLOCK <= row.n):
            step_tile(row, COMMON, block, h, trust, counters_ptr, books_ptr, seed, RULE,
                      BLOCK, ROWS, ROOT, FINITE_ONLY, STOCHASTIC, True)  # fmt: skip
        else:
            for each in range(block, tl.minimum(block + ROWS, last)):
                step_tile(row, row.kind, each, h, trust, counters_ptr, books_ptr, seed, RULE,
                          BLOCK, 1, ROOT, FINITE_ONLY, STOCHASTIC, False)  # fmt: skip


@triton.jit
def norm_tile(
    row, kind, block, h, books_ptr, RULE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ROOT: tl.constexpr, FINITE_ONLY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK) squares of p, and of what its norm is compared with."""
    start, rows = block * BLOCK, tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    left = tl.minimum(row.n - start, ROWS * BLOCK).to(tl.int32)
    mask = None if WHOLE else offs < left
    mask_rows = None if WHOLE else rows * BLOCK < left
    p = load_values(row.p, kind % 4, start, offs, mask, WHOLE)
    g = load_values(row.g, kind // 4 % 4, start, offs, mask, WHOLE)
    d = whole_gradient(p, g, h, RULE)
    if RULE == LAMB:
        m = load_state(row.m, row.m_scale, kind // 16 % 4, block, offs, mask, mask_rows, books_ptr,
                       True, False, BLOCK, ROWS, WHOLE)  # fmt: skip
        v = load_state(row.v, row.v_scale, kind // 64 % 4, block, offs, mask, mask_rows, books_ptr,
                       False, ROOT, BLOCK, ROWS, WHOLE)  # fmt: skip
        d, _, _, _ = direction(p, d, h, m, m, v, RULE)
        if not WHOLE:
            d = tl.where(mask, d, 0.0)  # 0 / (0 + eps), and eps may be 0
    if FINITE_ONLY:
        d = tl.where(is_finite(g), d, 0.0)
    return p * p, d * d


@triton.jit(do_not_specialize=["T"])
def blockwise_norms_kernel(
    table_ptr, hyper_ptr, books_ptr, part_ptr, T,
    RULE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    COMMON: tl.constexpr, ROOT: tl.constexpr, FINITE_ONLY: tl.constexpr,
):  # fmt: skip
    """part = sums of squares over a program's CHUNK elements of one tensor, of p and of what LARS
    (the whole gradient) or LAMB (the direction, which needs the states) compares it with.

    One read of what the step reads, 16 bytes written. A lane adds CHUNK / tile squares in fp32,
    lanes meet in a tree: no atomics, so that results repeat to the last bit.
    """
    t, row, first, last = tensor_of(table_ptr, T, BLOCK, CHUNK)
    h = hyper_of(hyper_ptr + t * WIDTH)
    p_sum, d_sum = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(first, last, ROWS):
        if (row.kind == COMMON) & ((block + ROWS) * BLOCK <= row.n):
            p, d = norm_tile(row, COMMON, block, h, books_ptr, RULE, BLOCK, ROWS, ROOT,
                             FINITE_ONLY, True)  # fmt: skip
        else:
            p, d = norm_tile(row, row.kind, block, h, books_ptr, RULE, BLOCK, ROWS, ROOT,
                             FINITE_ONLY, False)  # fmt: skip
        p_sum += p
        d_sum += d
    part_ptr += 2 * tl.program_id(0)
    tl.store(part_ptr, tl.sum(p_sum).to(tl.float64))
    tl.store(part_ptr + 1, tl.sum(d_sum).to(tl.float64))


@triton.jit
def blockwise_trust_kernel(
    table_ptr, hyper_ptr, part_ptr, trust_ptr,
    RULE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """trust = factor |p| / |d| of a tensor a program, at most `most`; 1 where a norm is 0 or the
    tensor is not adapted. Parts are added in fp64 and fixed order."""
    t = tl.program_id(0)
    ptr = table_ptr + t * COLUMNS
    first, count = tl.load(ptr + 8), tl.cdiv(tl.load(ptr + 6), CHUNK)
    p_sum, d_sum = tl.zeros((BLOCK_P,), tl.float64), tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, count, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        part, mask = part_ptr + 2 * (first + offs), offs < count
        p_sum += tl.load(part, mask=mask, other=0.0)
        d_sum += tl.load(part + 1, mask=mask, other=0.0)
    p_norm, d_norm = tl.sqrt(tl.sum(p_sum)), tl.sqrt(tl.sum(d_sum))
    h = hyper_of(hyper_ptr + t * WIDTH)
    factor = h.extra if RULE == LARS else 1.0
    ratio = (factor * p_norm / d_norm).to(tl.float32)
    ratio = tl.where(ratio > h.most, h.most, ratio)
    alike = (p_norm == 0.0) | (d_norm == 0.0) | (h.adapt == 0.0)
    tl.store(trust_ptr + t, tl.where(alike, 1.0, ratio))


# ------------------------------------------------------------------------------------- launchers


TRUST = {"BLOCK_P": 256, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@functools.cache
def books_of(device: torch.device) -> Tensor:
    """(512 + 2 HALVES,) int32."""
    half = torch.arange(FIRST_HALF.value, LAST_HALF.value + 1)
    books, entries = [], []
    for signed in (True, False):
        zero = 127 if signed else 0
        code = code_book(signed)
        books.append(code.view(torch.int32))
        above = code[zero:]
        middle = ((above[1:] + above[:-1]) * 0.5).view(torch.int32).long()
        place = torch.searchsorted(middle >> 16, half)  # of the code below all that share a half
        inside = middle[place.clamp(max=len(middle) - 1)]
        next_from = (inside & 0xFFFF) + ((place + zero) % 2 == 0)  # a tie goes to the even place
        carry = torch.where(inside >> 16 == half, (1 << 16) - next_from, 0)
        entries.append(((place - half << 16) + carry).int())
    return torch.cat(books + entries).to(device)


def blockwise_step_(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],  # codes uint8 (n,), fp32 (n,), or (0,)
    first_scale: list[Tensor],  # (blocks,) fp32, or (0,); AdEMAMix: (2n,), (2 blocks,)
    second: list[Tensor],
    second_scale: list[Tensor],
    hyper: Tensor,  # (T, HYPER) fp32
    counters: Tensor,  # (T, 2) int64
    found_inf: Tensor | None,  # () fp32
    rule: int,
    block_size: int,
    root: bool,
    finite_only: bool,
    stochastic: bool,
    seed: int,
) -> None:
    T = len(params)
    if T == 0:
        return
    whole = hyper.is_contiguous() and counters.is_contiguous()
    if hyper.shape != (T, HYPER) or counters.shape != (T, 2) or not whole:
        raise ValueError(
            f"blockwise_step_: hyper must be ({T}, {HYPER}) and counters ({T}, 2), contiguous, "
            f"got {tuple(hyper.shape)} and {tuple(counters.shape)}."
        )
    with device_of(hyper):
        tensors = [params, grads, first, first_scale, second, second_scale]
        plan = plan_for(tensors, block_size, hyper.device, first_moments(RULES[rule]))
        if plan.programs == 0:
            return
        books, trust, grid = books_of(hyper.device), None, (plan.programs,)
        known = constants(block_size, stochastic)
        known |= {"RULE": rule, "CHUNK": CHUNK, "COMMON": plan.common, "ROOT": root}
        known["FINITE_ONLY"] = finite_only
        if RULES[rule] in ("lars", "lamb"):
            part = hyper.new_empty(plan.programs, 2, dtype=torch.float64)
            trust = hyper.new_empty(T)
            blockwise_norms_kernel[grid](plan.table, hyper, books, part, T, **known)
            blockwise_trust_kernel[(T,)](
                plan.table, hyper, part, trust, RULE=rule, CHUNK=CHUNK, **TRUST
            )
        blockwise_step_kernel[grid](
            plan.table, hyper, counters, found_inf, trust, books, T, seed,
            STOCHASTIC=stochastic, **known,
        )  # fmt: skip


def quantize_blockwise(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (blocks,) fp32."""
    x, n, known = x.contiguous(), x.numel(), constants(block_size)
    codes = torch.empty(n, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(triton.cdiv(n, block_size), device=x.device)
    if n:
        with device_of(x):
            quantize_blockwise_kernel[(triton.cdiv(len(absmax), known["ROWS"]),)](
                x, codes, absmax, books_of(x.device), n, SIGNED=signed, **known
            )
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """(n,) fp32."""
    n, known = codes.numel(), constants(block_size)
    out = absmax.new_empty(n)
    if n:
        with device_of(codes):
            dequantize_blockwise_kernel[(triton.cdiv(len(absmax), known["ROWS"]),)](
                codes.contiguous(), absmax.contiguous(), out, books_of(codes.device), n,
                SIGNED=signed, **known,
            )  # fmt: skip
    return out
