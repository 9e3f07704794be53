"""Collectives: the only file below the training loop that touches torch.distributed."""

import enum
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


class _Local(enum.Enum):  # an enum's member is itself after copying and unpickling
    LOCAL = enum.auto()

    def __repr__(self) -> str:
        return "fastssl.LOCAL"


LOCAL = _Local.LOCAL
"""As `group`: this process alone."""


def resolve_group(name: str, group=None):
    """The process group to talk to, or None where this process is alone.

    Args:
        name: the caller, for the messages.
        group: None (all processes, once torch.distributed is initialised), LOCAL, or a group.

    Raises:
        TypeError: something else. ValueError: a group that this process is not in.
    """
    if group is LOCAL or not dist.is_available():
        return None
    if group is None:
        group = dist.group.WORLD if dist.is_initialized() else None
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: group must contain this process, got one that does not.")
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name}: group must be None (all processes), fastssl.LOCAL or a process group, "
            f"got {group!r}."
        )
    return None if group is None or group.size() == 1 else group


def all_gather_rows(xs: Sequence[Tensor], group) -> list[Tensor]:
    """Each of `xs` with the rows of all ranks, in rank order; no gradient.

    The xs are (B, ...), of one B, which may differ between ranks. All ranks must call. The counts
    go through the group's CPU backend if it has one (as "cpu:gloo,cuda:nccl" has); else reading
    them waits for the GPU.
    """
    world, x = group.size(), xs[0]
    has_cpu = "cpu:" in dist.get_backend_config(group)
    mine = torch.tensor([x.shape[0]], device="cpu" if has_cpu else x.device)
    counts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(counts, mine, group)
    counts = torch.cat(counts).tolist()
    most = max(counts)
    gathered = []
    for x in xs:
        padded = pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return gathered
