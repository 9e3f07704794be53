"""What the launchers of the similarity kernels share: block sizes, splits, the unit of fp16."""

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

WIDEST_IN_REGISTERS = 256


class Side(NamedTuple):
    """What the gradient needs of one side's rows, in the kernels' order; None where absent."""

    lse: Tensor | None = None
    dlse: Tensor | None = None
    target: Tensor | None = None
    dpos: Tensor | None = None
    label: Tensor | None = None
    alike: Tensor | None = None


def config(kind: str, capability: tuple[int, int], dtype: torch.dtype, D: int) -> dict[str, int]:
    """Block sizes, warps and stages for kind "fwd", "store", "bwd" (also the queue's), "alike" (the
    "bwd" of sums over pairs of equal labels) or "panel".

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
        sizes = (64 if kind == "store" else 128, 64, 64, 8, 3)
    elif kind in ("fwd", "store"):
        # With four warps a tile and the addresses it is stored to would not fit the registers.
        num_warps = 4 if width <= 128 and kind == "fwd" else 8
        sizes = (128, 64, 256, num_warps, 3 if hopper else 2)
    elif hopper:
        sizes = (128, 64 if width <= 128 else 32, 256, 8, 3)
    elif width <= 128:
        sizes = (128, 64 if width <= 32 else 32, 256, 8, 3)
    else:
        # Labels and their coefficients take registers that 64 rows of gradients would need.
        sizes = (32 if kind == "alike" else 64, 64, 256, 8, 2)
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


def capability_of(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def splits_of(x: Tensor, rows: int, columns: int, groups: int, known: dict) -> tuple[int, int, int]:
    """Row blocks of all groups, column splits and columns per split: about two programs a
    multiprocessor."""
    # In the interpreter any count does; a small one exercises both the split and the whole form.
    units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    blocks = groups * triton.cdiv(rows, known["BLOCK_N"])
    tiles = triton.cdiv(columns, known["BLOCK_M"])
    tiles_each = triton.cdiv(tiles, max(1, 2 * units // blocks))
    return blocks, triton.cdiv(tiles, tiles_each), tiles_each * known["BLOCK_M"]


def plain_rows(x: Tensor) -> Tensor:
    # Offsets inside a tile are 32-bit: a view whose rows lie further apart is copied.
    return x if x.stride(1) == 1 and 0 <= x.stride(0) < 1 << 22 else x.contiguous()


def device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_for(*coefficients: Tensor) -> Tensor:
    """() power of two that lifts the largest of the values near 2^12.

    In fp16, coefficients of the order 1 / N would flush to zero without it.
    """
    _, exponent = torch.frexp(torch.linalg.vector_norm(torch.cat(coefficients), torch.inf))
    return torch.exp2((12 - exponent).clamp(max=100))
