"""What the similarity ops ask of their arguments, and the one form that the kernels take."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastssl.autograd import once_differentiable
from fastssl.dist import GlobalSum, Shards, host_may_wait


class Problem(NamedTuple):
    """Arguments of the similarity kernels: `groups` problems one under the other.

    k=None means q, and k_ids=None means q_ids: one tensor given twice to an autograd Function
    would break the graph under torch.compile.
    """

    q: Tensor  # (G N, D)
    k: Tensor | None  # (G M, D)
    scale: Tensor  # ()
    q_ids: Tensor | None  # (G N,) int32
    k_ids: Tensor | None  # (G M,) int32
    keep_equal: bool
    bias: Tensor | None  # (G M,)
    limit: Tensor | None  # (G N,)


def check_floating(name: str, label: str, x) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name}: {label} must be a float32, bfloat16, float16 or float64 tensor, "
            f"got {got}. Convert it with .float()."
        )


def check_features(name: str, *, empty: bool = False, **features: Tensor | None) -> None:
    """Each must be (..., rows, D) in floating point; all of one width, device and batch.

    `empty` allows no rows: this rank's share of a batch that others hold.
    """
    first = None
    for label, x in features.items():
        if x is None:
            continue
        check_floating(name, label, x)
        if x.dim() not in (2, 3) or 0 in (x.shape[-1:] if empty else x.shape):
            raise ValueError(
                f"{name}: {label} must be (rows, D), or (groups, rows, D), with at least one row "
                f"and one column, got {tuple(x.shape)}. Skip empty batches."
            )
        if first is None:
            first = label, x
            continue
        other, q = first
        if q.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name}: {label} must have {other}'s width D={q.shape[-1]}, "
                f"got {tuple(x.shape)}. Project both to one width."
            )
        if q.shape[:-2] != x.shape[:-2]:
            raise ValueError(
                f"{name}: {label} must have {other}'s groups {tuple(q.shape[:-2])}, "
                f"got {tuple(x.shape)}."
            )
        if q.device != x.device:
            raise ValueError(
                f"{name}: {other} and {label} must be on one device, got {q.device} and "
                f"{x.device}. Use .to()."
            )


def int_vector(name: str, label: str, x: Tensor | None, shape, device) -> Tensor | None:
    """Flat int32 of the given shape's length, or None."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {label} must be an integer tensor, got {got}. Use .long().")
    if x.shape != tuple(shape):
        raise ValueError(
            f"{name}: {label} must have shape {tuple(shape)}, one entry a row, "
            f"got {tuple(x.shape)}."
        )
    if x.dtype == torch.int64:
        limit = torch.iinfo(torch.int32)
        if label == "target":  # what lies outside int32 lies outside [0, M) as well: keep it there
            x = x.clamp(limit.min, limit.max)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            if x.numel() and (x.amin() < limit.min or x.amax() > limit.max):
                raise ValueError(
                    f"{name}: {label} must fit into 32 bits, got up to {int(x.abs().amax())}. "
                    "Renumber them with torch.unique(ids, return_inverse=True)[1]."
                )
    return x.to(device=device, dtype=torch.int32).reshape(-1).contiguous()


def check_target(name: str, target: Tensor, M: int) -> None:
    """On the CPU only, since looking at it would stall a GPU. Python would count -1 from behind."""
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= M:
            raise ValueError(
                f"{name}: target must lie in [0, {M}), got {low if low < 0 else high}. "
                "It is the position of a key."
            )


def float_vector(name: str, label: str, x: Tensor | None, shape, like: Tensor) -> Tensor | None:
    """Flat, of the given shape's length, in like's dtype and on its device; or None."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.shape != tuple(shape):
        got = tuple(x.shape) if isinstance(x, Tensor) else x
        raise ValueError(f"{name}: {label} must be a tensor of shape {tuple(shape)}, got {got}.")
    return x.to(device=like.device, dtype=like.dtype).reshape(-1).contiguous()


def check_number(name: str, label: str, value) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: {label} must be a number or a tensor, got {type(value).__name__}."
        )


def scale_tensor(name: str, label: str, value: float | Tensor, q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: {label} must hold one number, got {tuple(value.shape)}.")
        value = value.to(device=q.device, dtype=dtype)
        return value.reshape(()) if value.dim() else value
    check_number(name, label, value)
    return torch.full((), value, device=q.device, dtype=dtype)


def scale_of(name: str, temperature, logit_scale, q: Tensor) -> Tensor:
    """logit_scale, or 1 / temperature: exactly one is given; numbers are checked."""
    if (temperature is None) == (logit_scale is None):
        raise ValueError(f"{name}: give exactly one of temperature and logit_scale.")
    by_temperature = logit_scale is None
    label = "temperature" if by_temperature else "logit_scale"
    value = temperature if by_temperature else logit_scale
    if not isinstance(value, Tensor):
        check_number(name, label, value)
        highest = torch.finfo(torch.float32).max
        scale = 1 / value if by_temperature and value else value
        if not 0 < value < float("inf") or not scale < highest:
            raise ValueError(
                f"{name}: {label} must be positive and finite, got {value}. Typical: "
                f"{'0.07 to 0.5' if by_temperature else '1 to 100'}."
            )
    scale = scale_tensor(name, label, value, q)
    return scale.reciprocal() if by_temperature else scale


def number_or_tensor(*values) -> list:
    """For ranks to compare: numbers as they are, of tensors only that they are some."""
    return ["a tensor" if isinstance(value, Tensor) else value for value in values]


def checksum(x: Tensor | None) -> int | None:
    """For ranks to compare: of the bits of float32 or float64, where the host has them anyway."""
    if x is None or x.device.type != "cpu" or not host_may_wait(x):
        return None
    bits = x.detach().flatten().view(torch.int32).long()
    return int((bits * torch.arange(1, len(bits) + 1)).sum())


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none", got {reduction!r}.')


def reduced(loss: Tensor, reduction: str, shards: Shards | None = None) -> Tensor:
    """With `shards` a loss of the rows of all ranks, unless there is one loss a row."""
    if reduction == "none":
        return loss
    if shards is None:
        return loss.sum() if reduction == "sum" else loss.mean()
    total = GlobalSum.apply(loss.sum(), shards.levels)
    return total / shards.total if reduction == "mean" else total


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own is x from 20 on, which is not exact in float64."""
    return -logsigmoid(-x)


def slope_of_row(reduction: str, N: int, shards: Shards | None = None) -> float:
    """The derivative of what `reduced` gives by one row's loss."""
    if shards is None or reduction == "none":
        return 1 / N if reduction == "mean" else 1.0
    world = len(shards.sizes)
    return world / shards.total if reduction == "mean" else float(world)


class UnitRows(torch.autograd.Function):
    """x / |x| by rows, and dx = (g - <g, y> y) / |x|: keeps x and one number a row.

    In at least fp32: the squares of small fp16 numbers would underflow. Rows shorter than 1e-12
    are divided by that instead, as in torch's normalize.
    """

    @staticmethod
    def forward(ctx, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        ctx.save_for_backward(x, length)
        y = wide / length.clamp(min=1e-12)
        # No cast that does nothing: compiled by torch 2.11 its gradient would be wrong.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, length = ctx.saved_tensors
        inverse = 1 / length.clamp(min=1e-12)
        g, y = g.to(length.dtype), x * inverse
        along = (g * y).sum(-1, keepdim=True).masked_fill_(length < 1e-12, 0)
        return y.mul_(-along).add_(g).mul_(inverse).to(x.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """The rows of x divided by their L2 norms, which are taken in at least fp32."""
    return UnitRows.apply(x)


def common_dtype(q: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype the products run in: autocast's where it is on, else the promoted one."""
    if q.dtype != torch.float64 and torch.is_autocast_enabled(q.device.type):
        return torch.get_autocast_dtype(q.device.type)
    dtype = q.dtype
    for x in others:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.dim() == 2 else x.flatten(0, 1)


def prepare(
    name: str,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    keep_equal: bool = False,
    bias: Tensor | None = None,
    limit: Tensor | None = None,
    k_ids_name: str = "k_ids",
    dtype: torch.dtype | None = None,
) -> tuple[Problem, int]:
    """The kernels' arguments, checked, in one dtype (default: `common_dtype`) and on one device;
    and the groups."""
    groups = max(q.shape[0], 1) if q.dim() == 3 else 1
    q_shape, k_shape = q.shape[:-1], (q if k is None else k).shape[:-1]
    if k is None:
        if k_ids is not None or bias is not None:
            raise ValueError(f"{name}: q against itself (k=None) takes neither k_ids nor bias.")
    elif q_shape == k_shape and (k_ids is None or k_ids is q_ids):
        k_ids = None
    elif (q_ids is None) != (k_ids is None):
        raise ValueError(f"{name}: q_ids and {k_ids_name} go together, got only one of them.")
    if keep_equal and q_ids is None:
        raise ValueError(f"{name}: keep_equal=True needs q_ids.")
    if k is q:  # one tensor in both roles: as two, for the autograd Function
        k = q.view_as(q)
    dtype = common_dtype(q, k) if dtype is None else dtype
    problem = Problem(
        flat(q, dtype),
        None if k is None else flat(k, dtype),
        scale,
        int_vector(name, "q_ids", q_ids, q_shape, q.device),
        int_vector(name, k_ids_name, k_ids, k_shape, q.device),
        keep_equal,
        float_vector(name, "bias", bias, k_shape, scale),
        float_vector(name, "limit", limit, q_shape, scale),
    )
    return problem, groups
