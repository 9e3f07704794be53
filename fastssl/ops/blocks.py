"""What the ops on library products share: rows in blocks, the dtype they compute in."""

import torch
from torch import Tensor

from fastssl.dist import Shards

# What a block may take: large enough for a product's full speed.
BLOCK_BYTES = 8 << 20


def steps(total: int, width: int, dtype: torch.dtype) -> list[slice]:
    """Rows of `width` numbers, `total` of them, in blocks."""
    step = max(16, BLOCK_BYTES // (max(width, 1) * dtype.itemsize))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def wide(*tensors: Tensor) -> torch.dtype:
    """The common dtype, at least fp32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def world(shards: Shards | None) -> int:
    return 1 if shards is None else len(shards.sizes)
