"""Optimizer states of one tensor: made, read, written and brought from one form to another.

A state has its tensor's shape and strides: uint8 codes with `absmax`, the largest magnitude of each
block of elements as they lie in memory, or fp32 without. AdEMAMix's first state is two of them, one
after the other, along a new first dimension.
"""

import math

import torch
from torch import Tensor


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def sharded(x: Tensor, like: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """This rank's part as a DTensor on the ranks of `like`, where that is one; of its shape, or
    contiguous of another with as many rows."""
    if not hasattr(like, "to_local"):
        return x
    shape, stride = (shape, (shape[1], 1)) if shape else (like.shape, like.stride())
    return type(like).from_local(
        x,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def flat(x: Tensor) -> Tensor:
    """(n,): the elements of a dense tensor in the order of memory, not copied."""
    return x.as_strided((x.numel(),), (1,))


def expanded(x: Tensor) -> bool:
    """Whether several elements lie at one address: torch refuses to write them."""
    strided = x.layout is torch.strided
    return strided and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Of tensors of one shape; strides of dimensions of one element do not count."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


def blocks(n: int, block_size: int) -> int:
    return (n + block_size - 1) // block_size


def decode(codes: Tensor, absmax: Tensor, table: Tensor, block_size: int, root: bool) -> Tensor:
    """fp32, of the shape and strides of the codes."""
    x = table[flat(codes).long()] * absmax.repeat_interleave(block_size)[: codes.numel()]
    out = torch.empty_like(codes, dtype=torch.float32)
    flat(out).copy_(x.square() if root else x)
    return out


def encode(x: Tensor, block_size: int, signed: bool, root: bool) -> tuple[Tensor, Tensor]:
    """Codes of the shape and strides of x, and absmax."""
    x = x.sqrt() if root else x
    found, absmax = torch.ops.fastssl.quantize_blockwise(flat(x), block_size, signed)
    codes = torch.empty_like(x, dtype=torch.uint8)
    flat(codes).copy_(found)
    return codes, absmax


def pack(k: int, x: Tensor, bits: int, block_size: int, root: bool) -> dict[str, Tensor]:
    """The entries of a parameter's state for its first (k=0, signed) or second moment x in fp32."""
    if bits == 32:
        return {f"state{k + 1}": x}
    codes, absmax = encode(x, block_size, k == 0, root)
    return {f"state{k + 1}": codes, f"absmax{k + 1}": absmax}


def constant(
    k: int, like: Tensor, value: float, bits: int, block_size: int, root: bool
) -> dict[str, Tensor]:
    """What `pack` makes of a moment of which all elements have this value (0 if it is signed),
    without that moment in fp32: each is the largest of its block."""
    if bits == 32:
        return {f"state{k + 1}": torch.full_like(like, value, dtype=torch.float32)}
    code = 127 if k == 0 else 255 if value else 0
    codes = torch.full_like(like, code, dtype=torch.uint8)
    most = math.sqrt(value) if root else value
    size = (blocks(like.numel(), block_size),)
    return {
        f"state{k + 1}": codes,
        f"absmax{k + 1}": like.new_full(size, most, dtype=torch.float32),
    }


def stack(moments: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The entries of a state that holds these moments, each laid out as it was."""
    if len(moments) == 1:
        return moments[0]
    out = {}
    for name, x in moments[0].items():
        together = torch.cat([flat(moment[name]) for moment in moments])
        out[name] = together.as_strided((len(moments), *x.shape), (x.numel(), *x.stride()))
    return out


def moments(x: Tensor, absmax: Tensor | None, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """The moments that a state and its absmax hold; what does not hold `count` is left whole."""
    if count == 1 or len(x) != count:
        return [(x, absmax)]
    return [(y, None if absmax is None else absmax[i : i + 1].flatten()) for i, y in enumerate(x)]
