"""What the losses ask of a group of ranks, beyond what the ops do."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.dist import (
    LOCAL,
    GlobalSum,
    Level,
    check_exchange,
    gather_rows,
    initialized,
    rank_among,
    resolve_levels,
    scatter_sums,
    world_size,
)


def check_group(name: str, group, exchange: str = "auto") -> None:
    """Early: at the first call it would stop every rank."""
    resolve_levels(name, group)
    check_exchange(name, exchange)


def described(text: str, group, exchange: str = "auto") -> str:
    """A module's `extra_repr`, with the group and exchange that are not the default."""
    group = "" if group is None else f"group={group!r}"
    exchange = "" if exchange == "auto" else f"exchange={exchange!r}"
    return ", ".join(filter(None, (text, group, exchange)))


def group_of(
    name: str,
    gather_distributed: bool | None,
    group,
    exchange: str = "auto",
    label: str = "gather_distributed",
):
    """The group that lightly's argument, called `label`, and ours name, checked."""
    check_group(name, group, exchange)
    if gather_distributed is None or group is None:
        return LOCAL if gather_distributed is False else group
    if gather_distributed == (group is LOCAL):
        raise ValueError(
            f"{name}: {label}={gather_distributed} contradicts group={group!r}. Give group alone."
        )
    return group


def check_initialized(
    name: str, gather_distributed: bool | None, label: str = "gather_distributed"
) -> None:
    """Not when the loss is made: Lightning makes it before the processes meet."""
    if gather_distributed and not initialized():
        raise ValueError(
            f"{name}: {label}=True needs torch.distributed, which is not initialised. "
            f"Initialise it, or leave {label} out."
        )


def sample_ids(N: int, levels: Sequence[Level], device) -> Tensor:
    """(N,) integers that no other row has, on any rank."""
    return torch.arange(N, device=device) * world_size(levels) + rank_among(levels)


def global_mean(total: Tensor, count: Tensor, levels: Sequence[Level]) -> Tensor:
    """total / count, both summed over the ranks; 0 if nothing was counted."""
    if levels:
        total, count = GlobalSum.apply(torch.stack([total, count.to(total)]), levels).unbind()
    return total / count.clamp(min=1)


class GatherRows(torch.autograd.Function):
    """The rows of all ranks; a row's gradient is the sum of what all of them give it."""

    @staticmethod
    def forward(ctx, x, shards):
        ctx.shards = shards
        return gather_rows(x, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        wide = d.to(torch.promote_types(d.dtype, torch.float32))
        return scatter_sums(wide, ctx.shards).to(d.dtype), None
