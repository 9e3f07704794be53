"""Processes of a run: one under plain `python`, several under `torchrun`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int
    world: int
    device: torch.device
    started_here: bool
    """Whether the process group is ours to destroy."""

    @classmethod
    def start(cls, device: str = "auto") -> "Ranks":
        """Join the processes torchrun started, if any, and choose a device.

        Args:
            device: "auto" (the GPU of this process if there is one, else the CPU), or a name such
                as "cpu" or "cuda:1".

        Raises:
            ValueError: the device does not exist here.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto":
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise ValueError(
                f'pretrain: device must be "auto", "cpu", "cuda" or as "cuda:1", got {device!r}.'
            ) from None
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    f'pretrain: device is {device!r}, but torch sees no GPU. Use device="cpu".'
                )
            torch.cuda.set_device(chosen)
        if world == 1:
            return cls(0, 1, chosen, False)
        started_here = not dist.is_initialized()
        if started_here:
            # gloo carries the small host-side messages below, nccl the gradients.
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), chosen, started_here)

    def close(self) -> None:
        if self.started_here:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def on_main(self, action: Callable[[], None]) -> None:
        """`action()` on rank 0, for which the others wait; its error is raised on all of them."""
        error = None
        if self.main:
            try:
                action()
            except Exception as caught:
                if self.world == 1:
                    raise
                error = caught
        told = self.gather(error)[0]
        if told is not None:
            raise error or told

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the ranks, on the host."""
        x = x.detach().cpu()
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def rows(self, x: Tensor) -> Tensor:
        """Every rank's rows one after another; all have as many."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, of any type that can be pickled."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return value
        x = torch.tensor(value)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return int(x)
