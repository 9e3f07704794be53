"""SIGReg's siblings: moments of random slices, and VISReg's sorted form."""

import math

import torch
from torch import Tensor

from fastssl.dist import GlobalSum, Shards, agree, gather_rows, resolve_levels
from fastssl.ops.blocks import wide
from fastssl.ops.checks import check_floating
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.sigreg import slices_of


def _settled(name: str, z: Tensor, num_slices, seed, step, directions, group):
    """z (G, N, D) in at least float32, directions (D, S), and how rows lie over the ranks."""
    check_floating(name, "z", z)
    levels = resolve_levels(name, group)
    if z.dim() < 2 or 0 in (*z.shape[:-2], z.shape[-1]):
        raise ValueError(
            f"{name}: z must be (..., N, D) with at least one column, got {tuple(z.shape)}."
        )
    directions, same = slices_of(name, z, directions, num_slices, seed, step)
    sizes = (z.shape[-2],)
    if levels:
        sizes = agree(name, levels, sizes, z, **same)[0]
    if not sum(sizes):
        raise ValueError(f"{name}: z must have at least one row, got none. Skip empty batches.")
    z = z.reshape(math.prod(z.shape[:-2]), *z.shape[-2:]).to(wide(z))
    return z, directions, Shards(levels, sizes)


def _mean(total: Tensor, shards: Shards) -> Tensor:
    """Of a sum over this rank's rows the mean over all rows."""
    return (GlobalSum.apply(total, shards.levels) if shards.levels else total) / shards.total


def _root(x: Tensor) -> Tensor:
    """The square root, and 0 without a gradient where x is not positive."""
    positive = x > 0
    return x.where(positive, 1).sqrt().where(positive, 0)


def sliced_moments(
    z: Tensor,
    *,
    num_slices: int = 1024,
    seed: int = 0,
    step: int | Tensor = 0,
    directions: Tensor | None = None,
    group=None,
) -> Tensor:
    """Distance of the first two moments of random slices from those of N(0, 1).

    loss = mean_s m_s^2 + (std_s - 1)^2, of p = z a_s.

    Args:
        z: (..., N, D) float32, bfloat16, float16 (computed in float32) or float64. Leading
            dimensions have moments of their own along the same directions.
        num_slices, seed, step, directions: as in `fastssl.ops.sigreg`.
        group: whose ranks' rows are one sample, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks; about 1 / N times 1.5 where z is normal.

    Raises:
        TypeError, ValueError: integer z, wrong shapes, no rows; on all ranks, what differs between
            them and must not.

    Memory: where D < N a covariance (D, D) and (D, S) for each leading index: std_s^2 =
        a_s^T Cov a_s, and no projection is made. Else the projections (N, S).

    Notes: std is the biased one; where it is 0 it has no gradient. It asks for less than `sigreg`:
        any law whose slices have those moments has loss 0. Two all-reduces, none in the backward.
        Autocast has no effect. Gradients over several ranks as in `info_nce`.

    Example:
        >>> bool(sliced_moments(torch.randn(512, 16), num_slices=64) < 0.1)
        True

    Paper: LeJEPA, arXiv:2511.08544, among its univariate tests.
    """
    name = "sliced_moments"
    return _moments(*_settled(name, z, num_slices, seed, step, directions, group))


@without_autocast
def _moments(z: Tensor, a: Tensor, shards: Shards) -> Tensor:
    mean = _mean(z.sum(1), shards)  # (G, D)
    x = z - mean.detach().unsqueeze(1)  # squares of it do not change with the mean, at the mean
    if z.shape[2] < shards.total:
        covariance = _mean(x.mT @ x, shards)  # (G, D, D)
        variance = ((covariance @ a) * a).sum(1)  # (G, S)
    else:
        variance = _mean((x @ a).square().sum(1), shards)
    return ((mean @ a).square() + (_root(variance) - 1).square()).mean()


def visreg(
    z: Tensor,
    *,
    scale: float = 1.0,
    shape: float = 1.0,
    centre: float = 1.0,
    num_slices: int = 256,
    eps: float = 1e-4,
    seed: int = 0,
    step: int | Tensor = 0,
    directions: Tensor | None = None,
    group=None,
) -> Tensor:
    """VISReg's regulariser: distance from N(0, I) of centre, scale and, apart from them, shape.

    loss = centre mean_d m_d^2 + scale mean_d (std_d - 1)^2 + shape mean_{s, i} (p_(i)s - q_i)^2,
    p = ((z - m) / (std + eps)) a_s, p_(1)s <= ... <= p_(N)s, q_i the normal quantile of
    i / (N + 1). std has no gradient in p.

    Args:
        z: (..., N, D) float32, bfloat16, float16 (computed in float32) or float64, N >= 2 to say
            something. Leading dimensions, such as views, are samples of their own.
        scale, shape, centre: factors of the three terms.
        num_slices, seed, step, directions: as in `fastssl.ops.sigreg`.
        eps: added to std in p.
        group: whose ranks' rows are one sample, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks.

    Raises:
        TypeError, ValueError: integer z, wrong shapes, no rows; on all ranks, what differs between
            them and must not.

    Memory: a few times the projections (N, S) for each leading index, N the rows of all ranks.

    Notes: the value of lightly's three terms, given its directions. Over several ranks rows are
        gathered to be sorted, by each rank alike; gradients are local then. Of equal projections
        the first row is the lower. Where std is 0 it has no gradient. Autocast has no effect.
        Gradients over several ranks as in `info_nce`.

    Example:
        >>> bool(visreg(torch.randn(512, 16)) < 0.1)
        True

    Paper: VISReg, arXiv:2606.02572, which draws other slices on every rank.
    """
    settled = _settled("visreg", z, num_slices, seed, step, directions, group)
    return _visreg(*settled, scale, shape, centre, eps)


@without_autocast
def _visreg(z, a, shards, scale, shape, centre, eps):
    mean = _mean(z.sum(1), shards)  # (G, D)
    x = z - mean.detach().unsqueeze(1)
    std = _root(_mean(x.square().sum(1), shards))  # (G, D)
    # Quantiles sum to 0, and x over all rows: p's errors do not change with the mean, at the mean.
    x = x / (std.detach().unsqueeze(1) + eps)
    every = x.detach()
    if shards.levels:
        every = gather_rows(every.transpose(0, 1), shards).transpose(0, 1)  # (G, all N, D)
    order = (every @ a).argsort(dim=1, stable=True)  # (G, all N, S)
    n = shards.total
    level = torch.arange(1, n + 1, device=z.device, dtype=torch.float64) / (n + 1)
    quantile = torch.special.ndtri(level).to(z.dtype).view(1, n, 1).expand_as(order)
    target = torch.empty_like(quantile).scatter(1, order, quantile)
    own = target[:, shards.first : shards.first + z.shape[1]]
    errors = _mean((x @ a - own).square().sum(1), shards)  # (G, S)
    return centre * mean.square().mean() + scale * (std - 1).square().mean() + shape * errors.mean()
