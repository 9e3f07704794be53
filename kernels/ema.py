"""Triton kernel of the op `ema`: moving averages of many tensors in one launch.

The table of addresses is that of the optimizer steps, with averages as parameters, values as
gradients and no states.
"""

import torch
import triton
import triton.language as tl
from fastssl.kernels.launch import device_of
from fastssl.kernels.tables import (
    CHUNK,
    constants,
    load_values,
    plan_for,
    store_parameter,
    tensor_of,
)
from torch import Tensor

from fastssl.ops.ema import ema_ref, is_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 256


@triton.jit
def ema_tile(
    row, kind, block, w, BLOCK: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    start = block * BLOCK
    offs = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (ROWS, BLOCK)
    mask = None if WHOLE else offs < tl.minimum(row.n - start, ROWS * BLOCK).to(tl.int32)
    a = load_values(row.p, kind % 4, start, offs, mask, WHOLE)
    v = load_values(row.g, kind // 4 % 4, start, offs, mask, WHOLE)
    a = tl.where(w < 0.5, a + w * (v - a), v - (1.0 - w) * (v - a))
    store_parameter(a, row.p, kind % 4, start, offs, mask, None, 0, False, BLOCK, ROWS, WHOLE)


@triton.jit(do_not_specialize=["T"])
def ema_kernel(
    table_ptr, weight_ptr, T,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, COMMON: tl.constexpr,
):  # fmt: skip
    """a = a + w (v - a) over CHUNK elements of one pair, in place, by tiles of ROWS blocks.

    Two values read and one written for each element, two operations and a rounding. For w of 1/2
    and more it is a = v - (1 - w) (v - a): w = 1 gives v exactly, and equal a and v stay as they
    are.
    """
    _, row, first, last = tensor_of(table_ptr, T, BLOCK, CHUNK)
    w = tl.load(weight_ptr).to(tl.float32)
    for block in range(first, last, ROWS):
        if (row.kind == COMMON) & ((block + ROWS) * BLOCK <= row.n):
            ema_tile(row, COMMON, block, w, BLOCK, ROWS, True)
        else:
            for each in range(block, tl.minimum(block + ROWS, last)):
                ema_tile(row, row.kind, each, w, BLOCK, 1, False)


def ema_(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    device = averages[0].device if averages else weight.device
    regular, rest = [], []
    for a, v in zip(averages, values, strict=True):
        if a.device != device or v.device != device:
            raise ValueError(
                f"ema_: averages and values must be on one device, got {device}, {a.device} and "
                f"{v.device}."
            )
        if a.shape != v.shape or a.dtype not in DTYPES or v.dtype not in DTYPES:
            raise ValueError(
                "ema_: an average and its value must have one shape and be float32, bfloat16 or "
                f"float16, got {tuple(a.shape)} of {a.dtype} and {tuple(v.shape)} of {v.dtype}."
            )
        if not is_dense(a):
            rest.append((a, v))
            continue
        if v.stride() != a.stride():
            v = torch.empty_like(a, dtype=v.dtype).copy_(v)
        regular.append((a, v))
    if weight.device != device:  # without a wait: the number is an argument of the launch
        weight = torch.full((), weight.item(), dtype=torch.float32, device=device)
    if rest:
        ema_ref(*zip(*rest, strict=True), weight)
    if not regular:
        return
    averages, values = map(list, zip(*regular, strict=True))
    none = [weight.new_empty(0)] * len(regular)
    with device_of(averages[0]):
        plan = plan_for([averages, values, none, none, none, none], BLOCK, device)
        if plan.programs:
            ema_kernel[(plan.programs,)](
                plan.table, weight, len(regular), CHUNK=CHUNK, COMMON=plan.common,
                **constants(BLOCK),
            )  # fmt: skip
