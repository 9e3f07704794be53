"""Many tensors in one launch: a table of their addresses on the device.

A row holds a tensor's addresses, size and dtypes. Programs own CHUNK elements each; a program finds
its tensor by the first programs of all. Whole tiles of the commonest dtypes at aligned addresses
take a path made for them; tails, views and other dtypes one that looks at dtypes as it runs.
"""

from collections import Counter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FP32, BF16, FP16 = map(tl.constexpr, range(3))  # of parameters and gradients
NONE, CODES, FULL = map(tl.constexpr, range(3))  # of states: 8 bits, fp32
DTYPES = {torch.float32: FP32.value, torch.bfloat16: BF16.value, torch.float16: FP16.value}
UNALIGNED = 256  # added to a kind, so that it is nobody's commonest

CHUNK = 8192  # elements of a program
COLUMNS = tl.constexpr(9)  # of the table: the fields of Row, and the tensor's first program


class Row(NamedTuple):
    p: tl.tensor
    g: tl.tensor
    m: tl.tensor
    m_scale: tl.tensor
    v: tl.tensor
    v_scale: tl.tensor
    n: tl.tensor
    kind: tl.tensor


# ------------------------------------------------------------------------------------ in kernels


@triton.jit
def tensor_of(table_ptr, T, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """This program's tensor, its row of the table, and the program's blocks: first and past the
    last."""
    program = tl.program_id(0)
    t, past = 0, T
    while past - t > 1:  # the last tensor whose first program is not after this one
        middle = (t + past) // 2
        if tl.load(table_ptr + middle * COLUMNS + COLUMNS - 1) <= program:
            t = middle
        else:
            past = middle
    ptr = table_ptr + t * COLUMNS
    row = Row(
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4),
        tl.load(ptr + 5), tl.load(ptr + 6), tl.load(ptr + 7),
    )  # fmt: skip
    first = (program - tl.load(ptr + 8)) * (CHUNK // BLOCK)
    last = tl.minimum(first + CHUNK // BLOCK, tl.cdiv(row.n, BLOCK))
    return t, row, first, last


@triton.jit
def pointer_to(address, dtype: tl.constexpr, WHOLE: tl.constexpr):
    ptr = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(ptr, 16) if WHOLE else ptr  # for loads and stores of 16 bytes


@triton.jit
def load(ptrs, mask):
    return tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0)


@triton.jit
def load_values(address, kind, start, offs, mask, WHOLE: tl.constexpr):
    """(ROWS, BLOCK) in fp32. `kind`, here and below, is known when compiling or looked at."""
    if kind == FP32:
        x = load(pointer_to(address, tl.float32, WHOLE) + start + offs, mask)
    elif kind == BF16:
        bits = load(pointer_to(address, tl.uint16, WHOLE) + start + offs, mask)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)  # right when interpreted, too
    else:
        x = load(pointer_to(address, tl.float16, WHOLE) + start + offs, mask)
        x = x.to(tl.float32)
    return x


@triton.jit
def random16(start, counters_ptr, seed, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, BLOCK) in [0, 2^16): element e takes half a word of Philox4x32-10 of e // 8."""
    group = start // 8 + tl.arange(0, ROWS * BLOCK // 8)
    step, tensor = tl.load(counters_ptr), tl.load(counters_ptr + 1)
    same = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox_impl(
        group.to(tl.uint32), (group >> 32).to(tl.uint32), (same + step).to(tl.uint32),
        (same + tensor).to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(words & 0xFFFF, words >> 16).reshape(ROWS, BLOCK)


@triton.jit
def store_parameter(
    x, address, kind, start, offs, mask, counters_ptr, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x, rounded by the store to the nearest or, if bf16, at random."""
    if kind == FP32:
        tl.store(pointer_to(address, tl.float32, WHOLE) + start + offs, x, mask=mask)
    elif kind == FP16:
        tl.store(pointer_to(address, tl.float16, WHOLE) + start + offs, x, mask=mask)
    elif STOCHASTIC:
        # What is added to the half that goes carries into the other with the right probability.
        up = x.to(tl.uint32, bitcast=True) + random16(start, counters_ptr, seed, BLOCK, ROWS)
        bits = tl.where(x == x, up >> 16, 0x7FC0).to(tl.uint16)
        tl.store(pointer_to(address, tl.uint16, WHOLE) + start + offs, bits, mask=mask)
    else:
        tl.store(pointer_to(address, tl.bfloat16, WHOLE) + start + offs, x, mask=mask)


# ----------------------------------------------------------------------------------- on the host


def constants(block_size: int, stochastic: bool = False) -> dict[str, int]:
    """Eight elements a thread: a warp has a block of 256. Left to itself the assembler spills a few
    bytes to fit one more program than the limit here, which is of four for most."""
    tile = max(1024, block_size)
    registers = 255 if block_size > 512 else 168 if stochastic else 128
    return {
        "BLOCK": block_size, "ROWS": tile // block_size, "num_warps": tile // 256,
        "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": False,
    }  # fmt: skip


class Plan(NamedTuple):
    table: Tensor  # (T, COLUMNS) int64 on the device
    host: Tensor  # what it is copied from
    programs: int
    common: int  # the kind that most elements have
    stream: int  # that of the copy


# By the addresses: steps like the one before copy nothing.
plans: dict[tuple, Plan] = {}
PLANS = 64
# Graphs replay what reads a plan, or copies it: those live as long as the process.
captured: list[Plan] = []


def state_kind(state: Tensor, scale: Tensor, n: int, block_size: int, count: int) -> int:
    """Of a state that holds `count` moments of n elements."""
    if not state.numel():
        return NONE.value
    codes, blocks, n = state.dtype == torch.uint8, count * -(-n // block_size), count * n
    right = (
        scale.numel() == blocks and scale.dtype == torch.float32
        if codes
        else state.dtype == torch.float32
    )
    if state.numel() != n or not right:
        raise ValueError(
            f"blockwise_step_: a state must have {n} elements, uint8 with {blocks} float32 block "
            f"maxima or float32, got {state.numel()} of {state.dtype} with {scale.numel()} of "
            f"{scale.dtype}. Was it made for another block size?"
        )
    return CODES.value if codes else FULL.value


def plan_of(
    tensors: list[list[Tensor]], block_size: int, device: torch.device, count: int, stream: int
) -> Plan:
    table, programs, elements = [], 0, Counter()
    for p, g, m, m_scale, v, v_scale in zip(*tensors, strict=True):
        n = p.numel()
        if g.numel() != n or p.dtype not in DTYPES or g.dtype not in DTYPES:
            raise ValueError(
                "blockwise_step_: a parameter and its gradient must be of one size and float32, "
                f"bfloat16 or float16, got {tuple(p.shape)} of {p.dtype} and {tuple(g.shape)} of "
                f"{g.dtype}."
            )
        kind = DTYPES[p.dtype] + 4 * DTYPES[g.dtype]
        kind += 16 * state_kind(m, m_scale, n, block_size, count)
        kind += 64 * state_kind(v, v_scale, n, block_size, 1)
        elements[kind] += n
        at = [x.data_ptr() for x in (p, g, m, m_scale, v, v_scale)]
        slow = at[2] + n * m.element_size() if count > 1 else 0
        unaligned = (at[0] | at[1] | at[2] | at[4] | slow) % 16 != 0
        table.append([*at, n, kind + UNALIGNED * unaligned, programs])
        programs += -(-n // CHUNK)
    host = torch.tensor(table, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    common = max(elements, key=elements.get)
    return Plan(host.to(device, non_blocking=True), host, programs, common, stream)


def plan_for(
    tensors: list[list[Tensor]], block_size: int, device: torch.device, count: int = 1
) -> Plan:
    """Of parameters, gradients and their states with scales, the first of which hold `count`
    moments."""
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
    key = (
        device,
        block_size,
        count,
        *[x.data_ptr() for each in tensors for x in each],
        *[x.numel() for each in tensors for x in each],
        *[x.dtype for each in tensors for x in each],
    )
    plan = plans.get(key)
    if plan is None or (plan.stream != stream and not capturing):
        plan = plan_of(tensors, block_size, device, count, stream)
        if not capturing:  # else its copy runs with the graph alone
            if len(plans) == PLANS:
                plans.pop(next(iter(plans)), None)
            plans[key] = plan
    if capturing:
        captured.append(plan)
    return plan
