"""Collectives: the only file below the training loop that touches torch.distributed.

One convention for every loss: its value is the mean over the rows of all ranks, equal on each of
them, and its gradient is that of the sum of all ranks' objectives, so that after
DistributedDataParallel's mean parameters get the gradient of one process with the whole batch.
"""

import enum
import json
import math
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# "auto" exchanges by a ring where the keys of all ranks take more than this.
GATHERED_BYTES = 1 << 30


class _Local(enum.Enum):  # an enum's member is itself after copying and unpickling
    LOCAL = enum.auto()

    def __repr__(self) -> str:
        return "fastssl.LOCAL"


LOCAL = _Local.LOCAL
"""As `group`: this process alone."""


# ---------------------------------------------------------------------------- who talks to whom


class Level(NamedTuple):
    """A process group, by the name that functional collectives know it by."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, group) -> "Level":
        return cls(group.group_name, group.size(), group.rank())


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def resolve_levels(name: str, group=None) -> tuple[Level, ...]:
    """The groups to talk to, the outer one first; () where this process is alone.

    Args:
        name: the caller, for the messages.
        group: None (all processes, once torch.distributed is initialised), LOCAL, a process group,
            or a DeviceMesh of one dimension or of two: nodes, and the ranks of a node.

    Raises:
        TypeError: something else. ValueError: a group that this process is not in, a mesh of
            more dimensions.
    """
    if group is LOCAL or not dist.is_available():
        return ()
    if group is None:
        groups = [dist.group.WORLD] if dist.is_initialized() else []
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: group must contain this process, got one that does not.")
    elif isinstance(group, dist.ProcessGroup):
        groups = [group]
    elif isinstance(group, dist.DeviceMesh):
        if group.ndim > 2 or group.get_coordinate() is None:
            raise ValueError(
                f"{name}: group must be a mesh of one or two dimensions with this process in it, "
                f"got {group}."
            )
        groups = [group.get_group(i) for i in range(group.ndim)]
    else:
        raise TypeError(
            f"{name}: group must be None (all processes), fastssl.LOCAL, a process group or a "
            f"DeviceMesh, got {group!r}."
        )
    return tuple(Level.of(g) for g in groups if g.size() > 1)


def world_size(levels: Sequence[Level]) -> int:
    return math.prod([level.size for level in levels])


def rank_among(levels: Sequence[Level]) -> int:
    rank = 0
    for level in levels:
        rank = rank * level.size + level.rank
    return rank


class Shards(NamedTuple):
    """The rows of one call over the ranks, which are numbered with the outer level first."""

    levels: tuple[Level, ...]
    sizes: tuple[int, ...]  # rows of each rank
    ring: bool = False  # the first level passes rows on instead of gathering them

    @classmethod
    def named(cls, groups: Sequence[str], sizes: Sequence[int], ring: bool) -> "Shards":
        groups = map(dist.distributed_c10d._resolve_process_group, groups)
        return cls(tuple(Level.of(group) for group in groups), tuple(sizes), ring)

    @classmethod
    def one_each(cls, levels: tuple[Level, ...]) -> "Shards":
        """One row a rank."""
        return cls(levels, (1,) * world_size(levels))

    @property
    def rank(self) -> int:
        return rank_among(self.levels)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """The place of this rank's first row among all rows."""
        return sum(self.sizes[: self.rank])

    def along(self, i: int) -> list[int]:
        """Rows of each member of level i, with all that belongs to it on the levels below."""
        below = world_size(self.levels[i + 1 :])
        first = 0
        for level in self.levels[:i]:
            first = first * level.size + level.rank
        first *= self.levels[i].size * below
        members = range(first, first + self.levels[i].size * below, below)
        return [sum(self.sizes[m : m + below]) for m in members]

    def seen_from(self, place: int) -> "Shards":
        """As this rank's counterpart at that place of the first level sees them."""
        return self._replace(levels=(self.levels[0]._replace(rank=place), *self.levels[1:]))

    @property
    def blocks(self) -> list[int]:
        """Rows of each block that is in one place at a time: the ring's members, or all at once."""
        return self.along(0) if self.ring else [self.total]


# ------------------------------------------------------------------------------- raw collectives


def _failed(what: str, level: Level, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"fastssl: {what} failed on rank {level.rank} of {level.size}: {error}. Another rank has "
        "stopped, or makes other calls: look for the first error among all of them."
    )


class Pending(NamedTuple):
    """A collective under way: `wait` gives its result."""

    what: str
    level: Level
    result: Tensor

    def wait(self) -> Tensor:
        wait = torch.ops._c10d_functional.wait_tensor
        if torch.compiler.is_compiling():
            return wait(self.result)
        try:
            return wait(self.result)
        except RuntimeError as error:
            raise _failed(self.what, self.level, error) from error


def _start(what: str, level: Level, x: Tensor, *args) -> Pending:
    op = getattr(torch.ops._c10d_functional, what)
    if torch.compiler.is_compiling():
        return Pending(what, level, op(x.contiguous(), *args, level.name))
    try:
        return Pending(what, level, op(x.contiguous(), *args, level.name))
    except RuntimeError as error:
        raise _failed(what, level, error) from error


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))


def _gather(x: Tensor, level: Level, sizes: Sequence[int]) -> Tensor:
    most = max(sizes)
    out = _start("all_gather_into_tensor", level, _padded(x, most), level.size).wait()
    if min(sizes) == most:
        return out
    return torch.cat([out[r * most : r * most + n] for r, n in enumerate(sizes)])


def _reduce_scatter(x: Tensor, level: Level, sizes: Sequence[int]) -> Tensor:
    most = max(sizes)
    if min(sizes) < most:
        x = torch.cat([_padded(part, most) for part in x.split(list(sizes))])
    out = _start("reduce_scatter_tensor", level, x, "sum", level.size).wait()
    return out[: sizes[level.rank]]


def permute(x: Tensor, level: Level, hops: int, rows: int) -> Pending:
    """Send x to the rank `hops` further round the ring; `rows` rows come from the other side."""
    to, source = (level.rank + hops) % level.size, (level.rank - hops) % level.size
    given, taken = [0] * level.size, [0] * level.size
    given[to], taken[source] = len(x), rows
    return _start("all_to_all_single", level, x, taken, given)


# ------------------------------------------------------------------------- collectives over levels


def gather_rows(x: Tensor, shards: Shards, ring: bool = False) -> Tensor:
    """x (rows, ...) of all ranks in their order; with `ring` only of this rank's block."""
    for i in reversed(range(int(ring), len(shards.levels))):
        x = _gather(x, shards.levels[i], shards.along(i))
    return x


def scatter_sums(x: Tensor, shards: Shards, ring: bool = False) -> Tensor:
    """The reverse of `gather_rows`: the sum over the ranks of each rank's own rows."""
    for i in range(int(ring), len(shards.levels)):
        x = _reduce_scatter(x, shards.levels[i], shards.along(i))
    return x


def exchange_parts(x: Tensor, shards: Shards, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """x (all rows, C): each rank's part of every row's result; this rank's rows, merged.

    `merge` makes (rows, C) of (P, rows, C). The bytes of a reduce-scatter, for any reduction, and
    in rank order: the same bits wherever it is done.
    """
    for i, level in enumerate(shards.levels):
        sizes = shards.along(i)
        own = sizes[level.rank]
        parts = _start("all_to_all_single", level, x, [own] * level.size, sizes).wait()
        x = merge(parts.unflatten(0, (level.size, own)))
    return x


def all_sum(x: Tensor, levels: Sequence[Level]) -> Tensor:
    for level in reversed(levels):
        x = _start("all_reduce", level, x, "sum").wait()
    return x


def all_logsumexp(x: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """log sum e^x over the ranks, for each of the numbers (n,): the bytes of an all-reduce, no
    number that could overflow, and the same bits on all ranks."""
    if not levels:
        return x
    world, n = world_size(levels), len(x)
    shards = Shards(levels, tuple(n * (r + 1) // world - n * r // world for r in range(world)))
    own = exchange_parts(x.unsqueeze(1), shards, lambda parts: parts.logsumexp(0))
    return gather_rows(own, shards).squeeze(1)


class GlobalSum(torch.autograd.Function):
    """The sum over ranks. Each rank's result depends on each rank's x, hence the backward's
    factor: upstream gradients are taken to be equal on all ranks, as those of one loss are."""

    @staticmethod
    def forward(ctx, x, levels):
        ctx.world = world_size(levels)
        return all_sum(x, levels)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return d * ctx.world, None


# ------------------------------------------------------------------------------ agreement of ranks


def host_may_wait(x: Tensor) -> bool:
    """Whether values can be read: not in torch.compile, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():  # first: the question about capture cannot be traced
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


_met = weakref.WeakSet()  # process groups in which all members have met


def _meet(name: str, level: Level, seconds: float = 30) -> None:
    """Before the first call in a group: its members wait for each other at the default store, where
    each says at which group it waits. A collective would hang where two wait at different ones.

    After so many seconds a member goes on: whoever comes later finds what it has said.

    Raises:
        ValueError: on all ranks, and ever again, where two members wait at different groups.
    """
    group = dist.distributed_c10d._resolve_process_group(level.name)
    if group in _met or not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()

    def key(what: str, *whose) -> str:
        return "/".join(["fastssl", what, *map(str, whose)])

    store.set(key("at", me), json.dumps([level.name, ranks]))
    store.set(key("here", level.name, me), "")
    begun, pause, look = time.monotonic(), 1e-3, 0.3
    while True:
        all_here = store.check([key("here", level.name, r) for r in ranks])
        if store.check([key("failed", level.name)]):
            raise ValueError(f"{name}: {store.get(key('failed', level.name)).decode()}")
        waited = time.monotonic() - begun
        if all_here or waited > seconds:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        if waited < look:
            continue
        look += min(look, 2)  # what follows is W requests
        for r in ranks:
            if not store.check([key("at", r)]):
                continue
            other, others = json.loads(store.get(key("at", r)))
            # Nobody leaves a meeting before all are there, or it fails: r is stuck, and this rank.
            ways_out = [("here", other, me), ("here", level.name, r)]
            ways_out += [("failed", other), ("failed", level.name)]
            if me in others and not any(store.check([key(*way)]) for way in ways_out):
                one, two = sorted([(me, ranks), (r, others)])
                failure = (
                    f"group must be the same on all ranks, got ranks {one[1]} on rank {one[0]} and "
                    f"ranks {two[1]} on rank {two[0]}, which would wait for each other for ever. "
                    "Give the ranks of a group the same calls in the same order."
                )
                for failed in (level.name, other):
                    store.set(key("failed", failed), failure)
    if all_here:
        _met.add(group)


def agree(name: str, levels: tuple[Level, ...], rows: Sequence[int], like: Tensor, **same: object):
    """The rows of every rank, one tuple for each entry of `rows`; what is `same` must agree.

    A few numbers of each rank travel before every call, for no rank can know that another has a
    short last batch, or features of another width: exchanged as they are, those would hang or give
    a wrong loss. They go through the group's CPU backend if it has one (as "cpu:gloo,cuda:nccl"
    does); else reading them waits for the GPU. Before the first call in a group its members meet.
    Inside torch.compile and while a CUDA graph is captured nothing is exchanged, and all ranks must
    have equal shapes.

    Raises:
        ValueError: on all ranks, naming those that differ.
    """
    world = world_size(levels)
    if not host_may_wait(like):
        return [(n,) * world for n in rows]
    for level in reversed(levels):
        _meet(name, level)
    group = dist.distributed_c10d._resolve_process_group(levels[0].name)
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else like.device
    values = [name, *(repr(value) for value in same.values())]
    codes = [*rows, *(zlib.crc32(value.encode()) for value in values)]
    mine = torch.zeros(1, 16, dtype=torch.int64, device="cpu")
    mine[0, : len(codes)] = torch.tensor(codes, device="cpu")
    every = gather_rows(mine.to(device), Shards.one_each(levels)).cpu()
    labels = ["the function", *same]
    for label, column in zip(labels, every.T[len(rows) :], strict=False):
        if (column != column[0]).any():
            texts = _texts(values[labels.index(label)], levels, device)
            raise ValueError(
                f"{name}: {label} must be the same on all ranks, got "
                + ", ".join(f"{text} on rank {r}" for r, text in enumerate(texts))
                + ". Give every rank the same arguments, or fastssl.LOCAL as group."
            )
    return [tuple(column.tolist()) for column in every.T[: len(rows)]]


def _texts(text: str, levels: tuple[Level, ...], device) -> list[str]:
    coded = text.encode()[:64].ljust(64)
    mine = torch.tensor([list(coded)], dtype=torch.uint8, device=device)
    every = gather_rows(mine, Shards.one_each(levels)).cpu()
    return [bytes(row).decode(errors="replace").rstrip() for row in every.tolist()]


def check_exchange(name: str, exchange: str) -> None:
    if exchange not in ("auto", "gather", "ring"):
        raise ValueError(f'{name}: exchange must be "auto", "gather" or "ring", got {exchange!r}.')


from fastssl.syncbn import SyncBatchNorm  # noqa: E402, F401 (which is made of what is above)
