"""8-bit optimizer states in blocks, and the optimizer step over many tensors in one call.

A state's block of `block_size` elements is its largest magnitude, `absmax` in fp32, and for each
element the place of the nearest of 256 numbers in [-1, 1] (or [0, 1]) times that. The numbers lie
in seven decades, with as many in one as in all below it: small elements keep a relative accuracy
that a linear code has for the largest alone. Zero is exact, and a step's own update uses the state
before it is rounded.
"""

import functools
import hashlib

import torch
from torch import Tensor

from fastssl.ops.contrastive import lib, on_cuda
from fastssl.random import philox4x32

SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


@functools.cache
def _code(signed: bool) -> tuple[float, ...]:
    """The 256 numbers, ascending: of decade i the middles of 2^i cells (unsigned: 2^(i+1)) between
    10^(i-7) and 10^(i-6), their negatives if signed, 0 and 1. Each operation rounds to fp32, a
    product and its sum together: in fp64 both are exact."""

    def rounded(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).float().item()

    low, values = rounded(0.1), [0.0, 1.0]
    for i in range(7):
        cells = 2 ** (i + (not signed))
        step = rounded((1.0 - low) / cells)
        edges = [
            rounded(low + step * k if k < (cells + 1) // 2 else 1.0 - step * (cells - k))
            for k in range(cells + 1)
        ]
        for a, b in zip(edges, edges[1:], strict=False):
            value = rounded(rounded(10.0 ** (i - 6)) * rounded((a + b) / 2))
            values += [value, -value] if signed else [value]
    table = torch.tensor(sorted(values))
    if hashlib.sha256(bytes(table.view(torch.uint8).tolist())).hexdigest() != SHA256[signed]:
        raise RuntimeError("fastssl: this machine's arithmetic gives another 8-bit code.")
    return tuple(table.tolist())


def code_book(signed: bool, device=None) -> Tensor:
    """(256,) float32: the dynamic code of bitsandbytes, bit for bit."""
    return torch.tensor(_code(signed), device=device)


# ----------------------------------------------------------------------------- codes of a tensor


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """(blocks, block_size), filled up with zeros."""
    x = x.reshape(-1)
    return torch.nn.functional.pad(x, (0, -len(x) % block_size)).view(-1, block_size)


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """The places of the nearest codes; between two the even place; of NaN that of 0."""
    code = code_book(signed, x.device)
    middle = (code[1:] + code[:-1]) / 2
    below = torch.bucketize(x, middle)  # middle[below - 1] < x <= middle[below]
    tie = x == middle[below.clamp(max=254)]
    found = below + (tie & (below % 2 == 1)).long()
    return torch.where(x.isnan(), 127 if signed else 0, found).to(torch.uint8)


def quantize_ref(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (blocks,) fp32."""
    blocks = _blocks(x.float(), block_size)
    absmax = blocks.abs().amax(1)
    lift = torch.where(absmax < 2.0**-64, 2.0**64, 1.0)  # so that the inverse is finite
    inverse = torch.where(absmax == 0, 0, 1 / (absmax * lift))
    codes = _nearest(blocks * lift.unsqueeze(1) * inverse.unsqueeze(1), signed)
    return codes.view(-1)[: x.numel()].contiguous(), absmax


def dequantize_ref(codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> Tensor:
    """(n,) fp32."""
    values = _blocks(code_book(signed, codes.device)[codes.long()], block_size)
    return (values * absmax.unsqueeze(1)).view(-1)[: codes.numel()].contiguous()


lib.define("quantize_blockwise(Tensor x, int block_size, bool signed) -> (Tensor, Tensor)")
lib.define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, int block_size, bool signed) -> Tensor"
)
lib.impl("quantize_blockwise", quantize_ref, "CompositeExplicitAutograd")
lib.impl("dequantize_blockwise", dequantize_ref, "CompositeExplicitAutograd")


def _quantize_fake(x, block_size, signed):
    n = x.numel()
    blocks = (n + block_size - 1) // block_size
    return x.new_empty(n, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


def _dequantize_fake(codes, absmax, block_size, signed):
    return absmax.new_empty(codes.numel())


torch.library.register_fake("fastssl::quantize_blockwise", _quantize_fake, lib=lib)
torch.library.register_fake("fastssl::dequantize_blockwise", _dequantize_fake, lib=lib)
on_cuda("blockwise", "quantize_blockwise", quantize_ref, "holds fp32 copies in memory")
on_cuda("blockwise", "dequantize_blockwise", dequantize_ref, "holds fp32 copies in memory")


# ----------------------------------------------------------------------------------- the step

RULES = (
    "adam", "adamw", "sgd", "nesterov", "lion", "rmsprop", "adagrad", "lars", "lamb", "ademamix",
)  # fmt: skip
# Columns of `hyper`, a row for each tensor. A running mean x of y steps as x + complement (y - x):
# of 1 - beta, rounded once, its memory is beta's; with fp32's 0.9999 it would be 2e-4 off.
HYPER = 13
LR, MOMENTUM, COMPLEMENT1, COMPLEMENT2, COMPLEMENT3, EPS, DECAY = range(7)
CORRECTION1, CORRECTION2, EXTRA, SCALE, ADAPT, MOST = range(7, HYPER)


def first_moments(rule: str) -> int:
    """How many moments a first state holds, one after the other, each from a new block on."""
    return 2 if rule == "ademamix" else 1


def _direction(rule: str, p, g, m, v, h, finite):
    """What lr times is taken from p (decay before aside), and the new states m and v."""
    if rule in ("adam", "adamw", "lamb"):
        if rule == "adam":
            g = g + h[DECAY] * p
        m = m + h[COMPLEMENT1] * (g - m)
        v = v + h[COMPLEMENT2] * (g * g - v)
        u = m / h[CORRECTION1] / ((v / h[CORRECTION2]).sqrt() + h[EPS])
        return (u + h[DECAY] * p if rule == "lamb" else u), m, v
    if rule == "ademamix":
        fast = m[0] + h[COMPLEMENT1] * (g - m[0])
        slow = m[1] + h[COMPLEMENT3] * (g - m[1])
        v = v + h[COMPLEMENT2] * (g * g - v)
        mixed = fast / h[CORRECTION1] + h[EXTRA] * slow
        u = mixed / ((v / h[CORRECTION2]).sqrt() + h[EPS])
        return u + h[DECAY] * p, torch.stack([fast, slow]), v
    if rule == "lion":
        u = m + h[COMPLEMENT1] * (g - m)
        u = torch.where(u.isnan(), u, u.sign())  # of NaN sign() makes 0
        return u, m + h[COMPLEMENT2] * (g - m), v
    g = g + h[DECAY] * p
    if rule == "rmsprop":
        v = v + h[COMPLEMENT2] * (g * g - v)
        g = g / (v.sqrt() + h[EPS])
        m = h[MOMENTUM] * m + g
        return m, m, v
    if rule == "adagrad":
        v = v + g * g
        return g / (v.sqrt() + h[EPS]), m, v
    if rule == "lars":
        g = g * _trust(p, g, h, h[EXTRA], finite)
        m = h[MOMENTUM] * m + g
        return m, m, v
    m = h[MOMENTUM] * m + h[COMPLEMENT1] * g
    return (g + h[MOMENTUM] * m if rule == "nesterov" else m), m, v


def _trust(p, d, h, factor, finite):
    """factor |p| / |d|, at most MOST; 1 where a norm is 0 or the tensor is not adapted. `finite`:
    the elements of d that count, None for all."""
    d = d if finite is None else torch.where(finite, d, 0)
    p_norm, d_norm = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (p, d))
    ratio = (factor * p_norm / d_norm).to(d.dtype).clamp(max=h[MOST])
    alike = (p_norm == 0) | (d_norm == 0) | (h[ADAPT] == 0)
    return torch.where(alike, 1, ratio)


def step_ref(p, g, m, v, h, rule: str, finite_only: bool = False):
    """p (n,), m and v after a step of one tensor, in the dtype of h; m or v None where there is
    none, m (2, n) of AdEMAMix."""
    finite = g.isfinite() if finite_only else None
    old = p, m, v
    m, v = (torch.zeros_like(p) if x is None else x for x in (m, v))
    g = g * h[SCALE]
    if rule in ("adamw", "lion"):
        p = p - h[LR] * h[DECAY] * p
    u, m, v = _direction(rule, p, g, m, v, h, finite)
    if rule == "lamb":
        u = u * _trust(p, u, h, 1.0, finite)
    new = p - h[LR] * u, m, v
    if not finite_only:
        return new
    return tuple(
        torch.where(finite, x, 0 if y is None else y) for x, y in zip(new, old, strict=True)
    )


def _random16(n: int, step: int, tensor: int, seed: int, device) -> Tensor:
    """(n,) int32 in [0, 2^16): element e takes half a word of Philox4x32-10 of e // 8."""
    group = torch.arange((n + 7) // 8, device=device)
    counter = [group & 0xFFFFFFFF, group >> 32, step & 0xFFFFFFFF, tensor & 0xFFFFFFFF]
    counter = torch.stack([torch.as_tensor(c, device=device).expand_as(group) for c in counter], 1)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return torch.stack([words & 0xFFFF, words >> 16], 2).flatten()[:n].int()


def _stored(x: Tensor, like: Tensor, random: Tensor | None) -> Tensor:
    if random is None:
        return x.to(like.dtype)
    up = ((x.contiguous().view(torch.int32) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, up)


def blockwise_step_ref(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],  # codes uint8 (n,), fp32 (n,), or (0,) where the rule has none
    first_scale: list[Tensor],  # absmax (blocks,) fp32, or (0,); AdEMAMix: (2n,), (2 blocks,)
    second: list[Tensor],
    second_scale: list[Tensor],
    hyper: Tensor,  # (T, HYPER) fp32
    counters: Tensor,  # (T, 2) int64: the step and the number of the tensor
    found_inf: Tensor | None,  # () fp32: anything but 0 skips the step
    rule: int,
    block_size: int,
    root: bool,  # second states are stored by their square roots
    finite_only: bool,  # elements whose gradient is not finite stay as they are
    stochastic: bool,  # bf16 parameters are rounded up or down at random
    seed: int,
) -> None:
    """One step of every tensor, in place, tensors taken in the order of their memory."""
    if found_inf is not None and found_inf != 0:
        return

    count = first_moments(RULES[rule])

    def values(state, scale, signed, parts=1):
        if not state.numel():
            return None
        if state.dtype == torch.uint8:
            each = zip(state.chunk(parts), scale.chunk(parts), strict=True)
            state = torch.cat([dequantize_ref(*x, block_size, signed) for x in each])
        return state if parts == 1 else state.view(parts, -1)

    for t, (p, g) in enumerate(zip(params, grads, strict=True)):
        order = sorted(range(p.dim()), key=lambda d: -p.stride(d))
        flat_p, flat_g = (x.permute(order).flatten() for x in (p, g))
        m = values(first[t], first_scale[t], True, count)
        v = values(second[t], second_scale[t], False)
        if v is not None and root and second[t].dtype == torch.uint8:
            v = v * v
        old = flat_p.float()
        new = step_ref(old, flat_g.float(), m, v, hyper[t], RULES[rule], finite_only)
        random = None
        if stochastic and p.dtype == torch.bfloat16:
            random = _random16(len(old), *counters[t].tolist(), seed, p.device)
        back = [order.index(d) for d in range(p.dim())]
        shape = [p.shape[d] for d in order]
        p.copy_(_stored(new[0], p, random).view(shape).permute(back))
        for state, scale, x, signed, parts in (
            (first[t], first_scale[t], new[1].flatten(), True, count),
            (second[t], second_scale[t], new[2], False, 1),
        ):
            if state.dtype != torch.uint8:
                if state.numel():
                    state.copy_(x)
                continue
            x = x.sqrt() if root and not signed else x
            codes, absmax = zip(
                *(quantize_ref(y, block_size, signed) for y in x.chunk(parts)), strict=True
            )
            state.copy_(torch.cat(codes))
            scale.copy_(torch.cat(absmax))


lib.define(
    "blockwise_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first,"
    " Tensor(c!)[] first_scale, Tensor(d!)[] second, Tensor(e!)[] second_scale, Tensor hyper,"
    " Tensor counters, Tensor? found_inf, int rule, int block_size, bool root, bool finite_only,"
    " bool stochastic, int seed) -> ()"
)
lib.impl("blockwise_step_", blockwise_step_ref, "CompositeExplicitAutograd")
torch.library.register_fake("fastssl::blockwise_step_", lambda *args: None, lib=lib)
on_cuda("blockwise", "blockwise_step_", blockwise_step_ref, "goes tensor by tensor")
