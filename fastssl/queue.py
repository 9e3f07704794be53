"""A first-in, first-out queue of features: MoCo's negatives, NNCLR's support set."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.dist import Shards, agree, gather_rows, rank_among, resolve_levels, world_size


class FeatureQueue(nn.Module):
    """The last `size` features given to `enqueue`, in a buffer that is written in place.

    Args:
        size: K >= 1, the rows it holds.
        dim: D >= 1, their width.
        labels: keep one integer label with each row, in `labels`; -1 for a row not yet filled.
        ids: keep one integer id with each row, in `ids`, for `queue_nce(queue_ids=...)`; likewise.
        dtype: of the features; what comes in is cast to it. Under bfloat16 autocast a bfloat16
            queue saves `queue_nce` a cast of the whole queue in every step.
        group: None (all processes, once torch.distributed is initialised), a process group, a
            DeviceMesh, or fastssl.LOCAL for none: `enqueue` takes the rows of all its ranks, in
            rank order, so that the queue is equal on all of them.
        sharded: each of the W ranks keeps size / W rows instead, the last of its own, for
            `queue_nce(queue_sharded=True)`.
        seed: of the random unit rows it starts with, equal on all ranks; another for each queue.

    Buffers, all in the state dict: features (K, D); pointer () int64, the row written next;
        filled () int64, rows written so far, at most K; labels and ids (K,) int64, or None.

    Raises:
        ValueError: a size or dim below 1, a size that is no multiple of W if sharded.
        TypeError: a dtype that is not floating point, or no group.

    Memory: K x D, or K / W x D if sharded; never copied.

    Notes: no gradient flows through it, and the host never waits for the device, except for the
        ranks' row counts where the group has no CPU backend. All ranks of the group must call
        `enqueue`, with any number of rows each. A sharded queue differs between ranks, and its
        `enqueue` talks to none: wrap its owner in DistributedDataParallel with
        broadcast_buffers=False, and save it on every rank.

    Example:
        >>> from fastssl.ops import queue_nce
        >>> q, k = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1).unbind()
        >>> queue = FeatureQueue(64, 16)
        >>> loss = queue_nce(q, k, queue.features, temperature=0.2, bias=queue.bias())
        >>> queue.enqueue(k)

    Paper: MoCo, arXiv:1911.05722.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        labels: bool = False,
        ids: bool = False,
        dtype: torch.dtype = torch.float32,
        group=None,
        sharded: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if not (size >= 1 and dim >= 1):
            raise ValueError(f"FeatureQueue: size and dim must be at least 1, got {size}, {dim}.")
        if not dtype.is_floating_point:
            raise TypeError(f"FeatureQueue: dtype must be floating point, got {dtype}.")
        levels = resolve_levels("FeatureQueue", group)
        self.group = group
        self.parts = world_size(levels) if sharded else None
        if sharded:
            if size % self.parts:
                raise ValueError(
                    f"FeatureQueue: size must be a multiple of the {self.parts} ranks it is "
                    f"sharded over, got {size}."
                )
            rank = rank_among(levels)
            size, seed = size // self.parts, seed * self.parts + rank
        # From a generator of its own on the CPU: equal on all ranks and devices.
        generator = torch.Generator().manual_seed(seed)
        rows = normalize(torch.randn(size, dim, generator=generator, device="cpu"), dim=1)
        self.register_buffer("features", torch.empty(size, dim, dtype=dtype).copy_(rows))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        for name, wanted in (("labels", labels), ("ids", ids)):
            empty = torch.full((size,), -1, dtype=torch.int64) if wanted else None
            self.register_buffer(name, empty)

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"{size}, {dim}, dtype={self.features.dtype}"

    def bias(self) -> Tensor:
        """(K,) float32: 0 for a filled row and -inf for the others, as `queue_nce(bias=...)`."""
        rows = torch.arange(self.features.shape[0], device=self.filled.device)
        return torch.zeros_like(rows, dtype=torch.float32).masked_fill(
            rows >= self.filled, -torch.inf
        )

    @torch.no_grad()
    def enqueue(self, x: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Overwrite the oldest rows with `x`; of more than K rows the last K stay.

        Args:
            x: (B, D) floating point, any B, stored as it is: normalise it first if the queue's
                rows are to be unit vectors.
            labels, ids: (B,) integers; given exactly if the queue was built with them.

        Raises:
            TypeError, ValueError: a wrong shape, dtype or device; labels or ids missing, or given
                to a queue that keeps none.
        """
        self._check(x, labels, ids)
        new = {"features": x, "labels": labels, "ids": ids}
        buffers = {name: getattr(self, name) for name in new if new[name] is not None}
        rows = [new[name] for name in buffers]
        levels = resolve_levels("FeatureQueue.enqueue", self.group)
        if self.parts is not None and self.parts != world_size(levels):
            raise ValueError(
                f"FeatureQueue.enqueue: a sharded queue must be built over the ranks that use it, "
                f"got one of {self.parts} parts for {world_size(levels)} ranks. Initialise "
                "torch.distributed before."
            )
        if levels and self.parts is None:
            same = {"the width D": x.shape[1], "the dtypes": [new_rows.dtype for new_rows in rows]}
            (sizes,) = agree("FeatureQueue.enqueue", levels, [len(x)], x, **same)
            rows = [gather_rows(new_rows, Shards(levels, sizes)) for new_rows in rows]
        B, K = rows[0].shape[0], self.features.shape[0]
        first = max(B - K, 0)
        where = (self.pointer + torch.arange(first, B, device=self.pointer.device)) % K
        for buffer, new_rows in zip(buffers.values(), rows, strict=True):
            buffer.index_copy_(0, where, new_rows[first:].to(buffer.dtype))
        self.pointer.add_(B).remainder_(K)
        self.filled.add_(B).clamp_(max=K)

    def _check(self, x: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        name, D, device = "FeatureQueue.enqueue", self.features.shape[1], self.features.device
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: x must be a floating-point tensor, got {got}.")
        if x.dim() != 2 or x.shape[1] != D:
            raise ValueError(
                f"{name}: x must be (B, {D}), as wide as the queue, got {tuple(x.shape)}."
            )
        for label, given in (("labels", labels), ("ids", ids)):
            kept = getattr(self, label) is not None
            if kept and given is None:
                raise ValueError(f"{name}: {label} must be given, as this queue keeps them.")
            if given is not None and not kept:
                raise ValueError(
                    f"{name}: {label} must not be given to a queue that keeps none. "
                    f"Build it with {label}=True."
                )
            if kept and (given.shape != x.shape[:1] or given.is_floating_point()):
                raise ValueError(
                    f"{name}: {label} must be ({x.shape[0]},) integers, one a row, "
                    f"got {tuple(given.shape)} of {given.dtype}."
                )
        for label, given in (("x", x), ("labels", labels), ("ids", ids)):
            if given is not None and given.device != device:
                raise ValueError(
                    f"{name}: {label} must be on the queue's device {device}, got {given.device}. "
                    "Move one of them with .to()."
                )
