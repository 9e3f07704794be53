"""The order of samples, and batches in that order, on the device that trains."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..augment import Packed
from ..random import permutation
from .source import TensorSource


@dataclass(frozen=True)
class Batch:
    """What a method's loss receives: one rank's part of a step."""

    views: list[Tensor]
    """One (B, C, size, size) float32 a view."""
    index: Tensor
    """(B,) int64: the samples' numbers in their source."""
    label: Tensor
    """(B,) int64, -1 where there is none."""
    step: int = 0
    """Steps done before this one."""
    total_steps: int = 1
    """Those of the whole run."""
    epoch: float = 0.0
    """Passes over the data done before this step, with the part of the current one."""
    captions: list[str] | None = None
    """One a sample, for a method that has `reads_captions`."""
    seed: int = 0
    """The run's, for what a method draws by (seed, step, index), as `fastssl.random` does."""


def epoch_size(source) -> int:
    """The number of samples in an epoch of `source`; a `Mixture` has its own."""
    return getattr(source, "epoch_size", len(source))


def epoch_order(
    source, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Tensor:
    """Sample numbers of one epoch: (steps, batch_size / world) int64 for one rank.

    The global batch of a step is the same for any number of ranks: the ranks' parts side by side.
    Samples that do not fill a batch are left out, others in every epoch.

    Args:
        source: a source, or its number of samples. A `Mixture` draws its own order.
        batch_size: over all ranks.

    Raises:
        ValueError: batch_size exceeds the samples of an epoch or is not a multiple of world.
    """
    n = source if isinstance(source, int) else epoch_size(source)
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must be between 1 and the number of images, {n}, got {batch_size}."
        )
    if batch_size % world:
        raise ValueError(
            f"batch_size (over all processes) must be a multiple of the {world} processes, "
            f"got {batch_size}."
        )
    draw = getattr(source, "draw", None)
    order = draw(seed, epoch) if draw else permutation(n, seed, epoch=epoch)
    return order[: n // batch_size * batch_size].view(-1, world, batch_size // world)[:, rank]


def resident(source, device: torch.device | str):
    """The source to take batches from: one that is a tensor, and takes at most an eighth of a GPU's
    free memory, lies on that GPU; others stay as they are."""
    device = torch.device(device)
    if device.type != "cuda" or not isinstance(source, TensorSource):
        return source
    fits = source.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 8
    return source.to(device) if fits else source


def batches(
    source,
    order: Iterable[Tensor],
    *,
    workers: int = 0,
    ahead: int = 2,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor | Packed, Tensor, Tensor]]:
    """Images, labels and sample numbers, one step after the other.

    Args:
        source: anything with `batch(index)`, see `fastssl.data.load`.
        order: (B,) int64 for each step, for instance what `epoch_order` gives.
        workers: threads that decode up to `ahead` batches in advance; Pillow decodes outside the
            interpreter lock. 0 decodes when a batch is asked for. The batches are the same. A
            `TensorSource` on the device needs none.
        device: where the batches are to be. To a GPU they travel from pinned memory on a stream of
            their own while the steps before them compute.

    Yields:
        images (B, C, H, W) or `Packed`, labels (B,) int64, index (B,) int64.

    Raises:
        ValueError: workers is negative or ahead below 1, when the first batch is asked for.
    """
    for name, value, least in (("workers", workers, 0), ("ahead", ahead, 1)):
        if value < least:
            raise ValueError(f"batches: {name} must be at least {least}, got {value}.")
    transfer = Transfer(device)
    if isinstance(source, TensorSource):
        home = source.images.device
        order = (index.to(home, non_blocking=True) for index in order)
        if home.type == transfer.device.type:
            workers = 0
    if workers == 0:
        for index in order:
            yield transfer.finish(transfer.start((*source.batch(index), index)))
        return

    def assemble(index, parts):
        images, labels = zip(*(part.result() for part in parts), strict=True)
        return transfer.start((_join(images), torch.cat(labels), index))

    # The joining thread waits for decoders, so it cannot be one of them.
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(1) as joining:

        def submit(index):
            parts = [part for part in index.tensor_split(workers) if len(part)]
            parts = [decoders.submit(source.batch, part) for part in parts]
            return joining.submit(assemble, index, parts)

        rows = iter(order)
        pending = deque(submit(index) for _, index in zip(range(ahead), rows, strict=False))
        try:
            while pending:
                batch = transfer.finish(pending.popleft().result())
                for following in rows:
                    pending.append(submit(following))
                    break
                yield batch
        finally:  # an abandoned iteration must not decode what nobody will ask for
            for pool in (joining, decoders):
                pool.shutdown(wait=False, cancel_futures=True)


class Transfer:
    """Copies batches to a device: `start` where they are made, `finish` where they are used.

    Between the two a GPU copies on a stream of its own, beside whatever computes; what lies on
    it already stays. On a CPU both give back what they get.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def start(self, batch: tuple) -> tuple:
        """The batch, on its way, and the event of its arrival."""
        if self.stream is None:
            return batch, None
        with torch.cuda.stream(self.stream):
            return tuple(self._send(x) for x in batch), self.stream.record_event()

    def _send(self, x: Tensor | Packed) -> Tensor | Packed:
        if isinstance(x, Packed):
            pixels, offsets, sizes = map(self._send, _tensors(x))
            return Packed(pixels, offsets, sizes, x.channels)
        # The pinned memory may be given up here: torch reuses it only after the copy.
        x = x if x.is_cuda else x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def finish(self, started: tuple) -> tuple:
        """The batch, for the current stream to use."""
        batch, arrival = started
        if arrival is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrival)
            for x in batch:
                for part in _tensors(x):
                    part.record_stream(current)  # its memory is of the copying stream's pool
        return batch


def _tensors(x: Tensor | Packed) -> tuple[Tensor, ...]:
    return (x.pixels, x.offsets, x.sizes) if isinstance(x, Packed) else (x,)


def _join(parts: tuple[Tensor | Packed, ...]) -> Tensor | Packed:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    starts = [0]
    for part in parts[:-1]:
        starts.append(starts[-1] + len(part.pixels))
    return Packed(
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.offsets + start for part, start in zip(parts, starts, strict=True)]),
        torch.cat([part.sizes for part in parts]),
        parts[0].channels,
    )
