"""8-bit states in a state_dict(): of the same shapes for any number of ranks.

Codes have the shape of their parameter. Where that has `rows` rows, along its first dimension, of R
elements each, the scales of the blocks are

    absmax (rows, ceil(R / block_size)), by rows on the ranks as the parameter.

The blocks of a shard start anew at its first element and their scales fill its rows from the front:
there is always room, and none is left over where R is a multiple of block_size. Which elements a
block has is told by `layout` (1 + dimensions,): the rows of every shard but the last, then the
dimensions from the outermost to the innermost in memory. Of states in fp32 it is 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.ops.blockwise import code_book

from . import states
from .states import blocks, flat, local, sharded


class _Rows(NamedTuple):
    """How the rows of a parameter lie on the ranks."""

    each: int  # of every shard but the last; 0 if shards are not of whole rows
    start: int  # before this rank's


def split(p: Tensor) -> list[int]:
    """The dimensions of the mesh whose ranks have other parts of p."""
    return [
        i
        for i, placement in enumerate(getattr(p, "placements", ()))
        if p.device_mesh.size(i) > 1 and not placement.is_replicate()
    ]


def _rows(p: Tensor) -> _Rows:
    rows, along = p.shape[:1].numel(), split(p)
    if not along:
        return _Rows(rows, 0)
    if len(along) > 1 or not p.placements[along[0]].is_shard(0):
        return _Rows(0, 0)
    each = blocks(rows, p.device_mesh.size(along[0]))
    return _Rows(each, min(rows, each * p.device_mesh.get_local_rank(along[0])))


def _whole_rows(where: str, p: Tensor) -> _Rows:
    rows = _rows(p)
    if not rows.each:
        raise ValueError(
            f"{where}: 8-bit states need shards of whole rows, Shard(0) over one dimension of the "
            f"mesh, got {p.placements} of shape {tuple(p.shape)}. Use full_precision_state_dict()."
        )
    return rows


def _layout(p: Tensor) -> list[int]:
    strides = local(p).stride()
    return [_rows(p).each, *sorted(range(p.dim()), key=lambda d: -strides[d])]


def layout(p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entry of a parameter's saved state, which tells of 8 bits or, by zeros, of fp32."""
    small = any(x.dtype == torch.uint8 for x in state.values())
    numbers = _layout(p) if small else [0] * (1 + p.dim())
    return {"layout": torch.tensor(numbers, device=local(p).device)}


def part(x: Tensor, p: Tensor) -> Tensor:
    """This rank's rows of x, which is sharded as p, whole, or this rank's already."""
    if hasattr(x, "to_local"):
        return x.to_local()
    n = local(p).shape[:1]
    if n == p.shape[:1] or x.shape[:1] != p.shape[:1]:
        return x
    start = _rows(p).start
    return x[start : start + n.numel()]


def keys(k: int, count: int) -> list[tuple[str, str]]:
    """What state_dict() calls the codes and scales of each of the moments of state k."""
    return [(f"state{k + 1}{end}", f"absmax{k + 1}{end}") for end in ("", "_slow")[:count]]


def names(optimizer, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries without contents for the names that `portable` adds to a state:
    torch.distributed.checkpoint finds in flat files only names that the state has."""
    slow = [pair for k in (0, 1) for pair in keys(k, len(optimizer.moments_of(k)))[1:]]
    more = [x for pair in slow for x in pair if x.removesuffix("_slow") in state]
    return {name: torch.empty(0, device=local(p).device) for name in ("layout", *more)}


def portable(optimizer, p: Tensor, state: dict[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """The state of a parameter on this rank as state_dict() has it."""
    out = {"step": state["step"]} | layout(p, state)
    for k in (0, 1):
        if f"state{k + 1}" not in state:
            continue
        count = len(optimizer.moments_of(k))
        each = states.moments(state[f"state{k + 1}"], state.get(f"absmax{k + 1}"), count)
        for names, (x, absmax) in zip(keys(k, count), each, strict=True):
            out[names[0]] = sharded(x, p)
            if absmax is not None:
                _whole_rows(f"{type(optimizer).__name__}.state_dict", p)
                out[names[1]] = _in_rows(absmax, p, block_size)
    return out


def _in_rows(absmax: Tensor, p: Tensor, block_size: int) -> Tensor:
    width = blocks(p.shape[1:].numel(), block_size)
    x = absmax.new_zeros(local(p).shape[:1].numel(), width)
    flat(x)[: len(absmax)] = absmax
    return sharded(x, p, (p.shape[:1].numel(), width))


def load(
    where: str,
    p: Tensor,
    k: int,
    codes: Tensor,
    absmax: Tensor | None,
    layout: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor, int]:
    """Codes and absmax of this rank for state k from what `portable` gave on any ranks, and how
    many blocks were rounded anew.

    A block whose elements had one scale keeps codes and scale, whatever block they were in; only
    one that joins parts of several is rounded.
    """
    for name, x in ((f"absmax{k + 1}", absmax), ("layout", layout)):
        if x is None:
            raise ValueError(f"{where}: 8 bits of state{k + 1} mean nothing without {name}.")
    like, rows, signed = local(p), _whole_rows(where, p), k == 0
    codes, (each, *order) = part(codes, p).to(like.device), layout.tolist()
    shape = p.shape[:1].numel(), blocks(p.shape[1:].numel(), block_size)
    if absmax.shape != shape:
        raise ValueError(
            f"{where}: absmax{k + 1} must have a number for each block of {block_size} elements, "
            f"shape {shape}, got {tuple(absmax.shape)}."
        )
    if not 1 <= each <= shape[0] or sorted(order) != list(range(p.dim())):
        raise ValueError(
            f"{where}: layout must have the rows of a shard, 1 to {shape[0]}, and the order of "
            f"{p.dim()} dimensions, got {[each, *order]}."
        )
    if [each, *order] == _layout(p):
        scales = part(absmax, p).flatten()[: blocks(like.numel(), block_size)]
        codes = torch.empty_like(like, dtype=torch.uint8).copy_(codes)
        return codes, scales.to(like.device, torch.float32, copy=True), 0

    # Where blocks do not end with a row, scales may be in rows of other ranks.
    in_place = p.shape[1:].numel() % block_size == 0 and order[0] == 0
    absmax, first = (part(absmax, p), rows.start) if in_place else (_whole(absmax), 0)
    scales = torch.empty_like(like, dtype=torch.float32)
    place = _scale_of_each(like, rows.start, shape, each, order, block_size) - first * shape[1]
    scales.copy_(absmax.to(like.device).flatten()[place])
    codes = torch.empty_like(like, dtype=torch.uint8).copy_(codes)
    return _reblock(codes, scales, block_size, signed)


def _whole(x: Tensor) -> Tensor:
    if not hasattr(x, "to_local"):
        return x
    return x.to(x.device_mesh.device_type).full_tensor()  # where its ranks can talk


def _scale_of_each(
    like: Tensor, start: int, shape: tuple[int, int], each: int, order: list[int], block_size: int
) -> Tensor:
    """Where the scales of the elements of `like`, the rows from `start`, are among all."""

    def along(d: int, x: Tensor) -> Tensor:
        return x.view([-1 if i == d else 1 for i in range(like.dim())])

    row = along(0, torch.arange(start, start + len(like), device=like.device))
    before = row - row % each  # the first row of its shard
    within, size = 0, 1
    for d in reversed(order):
        index = row % each if d == 0 else along(d, torch.arange(like.shape[d], device=like.device))
        within = within + index * size
        size = size * ((shape[0] - before).clamp(max=each) if d == 0 else like.shape[d])
    return before * shape[1] + within // block_size


def _reblock(
    codes: Tensor, scales: Tensor, block_size: int, signed: bool
) -> tuple[Tensor, Tensor, int]:
    """Codes and absmax of blocks from the codes and the scales of their elements."""
    n, own = codes.numel(), flat(codes)
    count, scale = blocks(n, block_size), flat(scales)
    value = code_book(signed, codes.device)[own.long()] * scale
    ends = torch.cat([scale, scale[-1:].expand(count * block_size - n)])
    least, most = ends.view(count, block_size).aminmax(dim=1)
    joined = least != most
    new, absmax = torch.ops.fastssl.quantize_blockwise(value, block_size, signed)
    of_each = joined.repeat_interleave(block_size)[:n]
    own.copy_(torch.where(of_each, new, own))
    return codes, torch.where(joined, absmax, most), int(joined.sum())
