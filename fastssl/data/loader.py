"""The order of samples, and batches in that order."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..augment.random import permutation


@dataclass(frozen=True)
class Batch:
    """What a method's loss receives: one rank's part of a step."""

    views: list[Tensor]
    """One (B, C, size, size) float32 a view."""
    index: Tensor
    """(B,) int64: the samples' numbers in their source."""
    label: Tensor
    """(B,) int64, -1 where there is none."""


def epoch_order(
    n: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Tensor:
    """Sample numbers of one epoch: (steps, batch_size / world) int64 for one rank.

    The global batch of a step is the same for any number of ranks: the ranks' parts side by side.
    Samples that do not fill a batch are left out, others in every epoch.

    Raises:
        ValueError: batch_size exceeds n or is not a multiple of world.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be between 1 and the number of images, {n}, got {batch_size}."
        )
    if batch_size % world:
        raise ValueError(
            f"batch_size (over all processes) must be a multiple of the {world} processes, "
            f"got {batch_size}."
        )
    order = permutation(n, seed, epoch=epoch)[: n // batch_size * batch_size]
    return order.view(-1, world, batch_size // world)[:, rank]


def batches(
    source, order: Tensor, *, workers: int = 0, ahead: int = 2
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and sample numbers, one row of `order` (steps, B) after the other.

    Args:
        source: anything with `batch(index)`, see `fastssl.data.load`.
        order: (steps, B) int64.
        workers: threads that decode up to `ahead` batches in advance; Pillow decodes outside the
            interpreter lock. 0 decodes when a batch is asked for. The batches are the same.

    Yields:
        images (B, C, H, W) uint8, labels (B,) int64, index (B,) int64.
    """
    if workers == 0:
        for index in order:
            yield *source.batch(index), index
        return
    with ThreadPoolExecutor(workers) as pool:

        def submit(index):
            parts = [part for part in index.tensor_split(workers) if len(part)]
            return index, [pool.submit(source.batch, part) for part in parts]

        rows = iter(order)
        pending = deque(submit(index) for _, index in zip(range(ahead), rows, strict=False))
        try:
            while pending:
                index, parts = pending.popleft()
                images, labels = zip(*(part.result() for part in parts), strict=True)
                for following in rows:
                    pending.append(submit(following))
                    break
                yield torch.cat(images), torch.cat(labels), index
        finally:  # an abandoned iteration must not decode what nobody will ask for
            pool.shutdown(wait=True, cancel_futures=True)
