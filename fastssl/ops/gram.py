"""Losses that spread features, by whichever Gram matrix is smaller; nearest neighbours by cosine.

With X (N, D), sum_ij (X^T X)_ij^2 = ||X X^T||_F^2, and its gradient is 4 (X X^T) X = 4 X (X^T X).
So where N <= D no D x D matrix is needed. For two matrices,
sum_ij (X^T Y)_ij^2 = <X X^T, Y Y^T>_F, of gradient 2 (Y Y^T) X in X. Of centred X and Y these
gradients have columns of mean 0 already: nothing comes of the centring.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.dist import (
    Shards,
    all_sum,
    gather_rows,
    host_may_wait,
    resolve_levels,
    scatter_sums,
)
from fastssl.extension import cpu_features
from fastssl.ops.checks import check_features, unit_rows
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.sharded import shards_of

# What a block may take: large enough for a product's full speed.
BLOCK_BYTES = 8 << 20
NORMALIZATIONS = ("batch_norm", "local_batch_norm", "local_std")
BATCH_NORM_EPS = 1e-5


def _steps(total: int, width: int, dtype: torch.dtype) -> list[slice]:
    """Rows of `width` numbers, `total` of them, in blocks."""
    step = max(16, BLOCK_BYTES // (max(width, 1) * dtype.itemsize))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


# ------------------------------------------------------------------------------- Gram matrices


class Rows(NamedTuple):
    """The rows of one view, centred and perhaps scaled; made in blocks, never as a whole."""

    z: Tensor  # (N, D)
    mean: Tensor  # (D,) in the dtype of the products
    inverse: Tensor | None  # (D,), what rows less the mean are multiplied by
    shift: Tensor | None  # (D,), what is then added: what rounding the mean left over
    n: int  # rows of all ranks
    shards: Shards | None

    @property
    def of_rows(self) -> bool:
        """Whether the Gram matrix is X X^T."""
        return self.n <= self.z.shape[1]

    def blocks(self) -> list[tuple[slice, slice]]:
        """Where blocks lie: of columns for X X^T, else of rows."""
        (N, D), dtype = self.z.shape, self.mean.dtype
        if self.of_rows:
            return [(slice(None), s) for s in _steps(D, self.n, dtype)]
        return [(s, slice(None)) for s in _steps(N, D, dtype)]

    def block(self, at: tuple[slice, slice]) -> Tensor:
        x = self.z[at].to(self.mean.dtype) - self.mean[at[1]]
        if self.inverse is None:
            return x
        return torch.addcmul(self.shift[at[1]], x, self.inverse[at[1]])

    def of_all(self, x: Tensor) -> Tensor:
        return x if self.shards is None else gather_rows(x, self.shards)


def _moments(z: Tensor, n: int, levels, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of n rows in all the mean (D,) in dtype, and in fp64, around it, sum and sum of squares."""
    mean = (all_sum(z.sum(0, dtype=dtype).double(), levels) / n).to(dtype)
    sums = torch.zeros(2, len(mean), dtype=torch.float64, device=z.device)
    for s in _steps(*z.shape, dtype):
        x = z[s].to(dtype) - mean
        sums[0] += x.sum(0)
        sums[1] += x.square_().sum(0)
    return mean, *all_sum(sums, levels).unbind()


def _strips(m: int) -> list[slice]:
    step = max(128, -(-m // 8))
    return [slice(i, min(i + step, m)) for i in range(0, m, step)]


def _gram(x: Rows) -> Tensor:
    """X X^T, of this rank's rows with all rows (N, n), or X^T X of all rows (D, D).

    A product of a matrix with itself is made below the diagonal, in strips, and mirrored.
    """
    N, D = x.z.shape
    gram = x.mean.new_zeros((N, x.n) if x.of_rows else (D, D))
    if x.of_rows and x.shards is not None:
        for at in x.blocks():
            block = x.block(at)
            gram.addmm_(block, x.of_all(block).T)
        return gram
    for at in x.blocks():
        y = x.block(at) if x.of_rows else x.block(at).T
        for s in _strips(len(gram)):
            gram[s, : s.stop].addmm_(y[s], y[: s.stop].T)
    for s in _strips(len(gram)):
        gram[: s.start, s] = gram[s, : s.start].T
    return gram if x.shards is None else all_sum(gram, x.shards.levels)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """sum_ij x_ij y_ij in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for s in _steps(*x.shape, x.dtype):
        total += (x[s] * y[s]).sum(dtype=torch.float64)
    return total


def _views(name: str, z_a: Tensor, z_b: Tensor, group, **options) -> tuple[int, Shards | None]:
    """Both views checked: the rows of all ranks, and how they lie over them."""
    check_features(name, empty=bool(resolve_levels(name, group)), z_a=z_a, z_b=z_b)
    if z_a.dim() != 2 or z_a.shape != z_b.shape:
        raise ValueError(
            f"{name}: z_a and z_b must both be (N, D), got {tuple(z_a.shape)} and "
            f"{tuple(z_b.shape)}."
        )
    shards, _ = shards_of(name, group, "gather", z_a, z_b, **{"the options": options})
    n = len(z_a) if shards is None else shards.total
    if n < 2:
        raise ValueError(
            f"{name}: z_a and z_b must have at least 2 rows, over all ranks, got {n}: one row has "
            "no variance. Skip this batch."
        )
    return n, shards


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _world(shards: Shards | None) -> int:
    return 1 if shards is None else len(shards.sizes)


# -------------------------------------------------------------------------------------- VICReg


@without_autocast
def _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards):
    """The loss, and of each view: mean (D,), Gram matrix, factor of X in the gradient (D,)."""
    levels, D, dtype = () if shards is None else shards.levels, z_a.shape[1], _wide(z_a, z_b)
    loss = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for s in _steps(*z_a.shape, dtype):
        loss += (z_a[s].to(dtype) - z_b[s].to(dtype)).square_().sum(dtype=torch.float64)
    loss = all_sum(loss, levels) * (sim / (n * D))
    share = cov / (D * (n - 1) ** 2)
    kept = []
    for z in (z_a, z_b):
        mean, _, squares = _moments(z, n, levels, dtype)
        x = Rows(z, mean, None, None, n, shards)
        gram = _gram(x)
        root = (squares / (n - 1) + eps).sqrt()
        loss = loss + std / 2 * (1 - root).relu().mean()
        factor = torch.where(root < 1, -std / (2 * D * (n - 1)) / root, 0)
        if x.of_rows:
            off_diagonal = all_sum(_dot(gram, gram), levels) - squares.square().sum()
            factor = factor - 4 * share * squares
        else:
            gram.diagonal().zero_()
            off_diagonal = _dot(gram, gram)
        loss = loss + share * off_diagonal
        kept += [mean, gram, factor.to(dtype)]
    return loss.to(dtype), kept


@without_autocast
def _vicreg_bwd(z, other, mean, gram, factor, slope, sim, cov, n, shards):
    """dz: slope times the gradient of the loss in z."""
    D, dz, x = z.shape[1], torch.empty_like(z), Rows(z, mean, None, None, n, shards)
    share = 4 * cov / (D * (n - 1) ** 2)
    for at in x.blocks():
        block = x.block(at)
        d = block * factor[at[1]]
        if x.of_rows:
            d.addmm_(gram, x.of_all(block), alpha=share)
        else:
            d.addmm_(block, gram, alpha=share)
        d.add_(z[at].to(d.dtype) - other[at].to(d.dtype), alpha=2 * sim / (n * D))
        dz[at] = d.mul_(slope)
    return dz


class VICReg(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, sim, std, cov, eps, n, shards):
        loss, kept = _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards)
        ctx.save_for_backward(z_a, z_b, *kept)
        ctx.options = sim, cov, n, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z_a, z_b, *kept = ctx.saved_tensors
        slope = dloss * _world(ctx.options[-1])
        dz_a = dz_b = None
        if ctx.needs_input_grad[0]:
            dz_a = _vicreg_bwd(z_a, z_b, *kept[:3], slope, *ctx.options)
        if ctx.needs_input_grad[1]:
            dz_b = _vicreg_bwd(z_b, z_a, *kept[3:], slope, *ctx.options)
        return dz_a, dz_b, *[None] * 6


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    sim: float = 25.0,
    std: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
    group=None,
) -> Tensor:
    """Variance, invariance and covariance of two views' features.

    loss = sim mean (z_a - z_b)^2 + sum over z of both views of
    std / (2 D) sum_i max(0, 1 - sqrt(V_ii + eps)) + cov / D sum_{i != j} V_ij^2,
    V = X^T X / (N - 1), X = z less its mean.

    Args:
        z_a, z_b: (N, D) float32, bfloat16, float16 (computed in float32) or float64, N >= 2.
        sim, std, cov: factors of the three terms.
        eps: > 0, added to the variance under the root.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks.

    Raises:
        TypeError, ValueError: integer features, views of different shape, fewer than 2 rows over
            all ranks, eps not positive; on all ranks, what differs between them and must not.

    Memory: min(N, D)^2 numbers for each view and blocks of 8 MiB, N the rows of all ranks; over
        W ranks those of the N x N matrix that belong to a rank's rows. Centred features are never
        stored.

    Notes: where N <= D by X X^T, whose rows are gathered in blocks of columns over several ranks,
        in the backward again; else by X^T X, which is all-reduced. Every statistic is that of the
        rows of all ranks, exactly. Products in float32, the loss in float64; autocast has no
        effect. Deterministic. Gradients over several ranks as in `info_nce`.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16).unbind()
        >>> vicreg(z_a, z_b).shape
        torch.Size([])

    Paper: VICReg, arXiv:2105.04906, whose invariance term sums over D in the text and takes the
        mean in its code: the mean here.
    """
    name = "vicreg"
    if not eps > 0:
        raise ValueError(f"{name}: eps must be positive, got {eps}. Typical: 1e-4.")
    n, shards = _views(name, z_a, z_b, group, sim=sim, std=std, cov=cov, eps=eps)
    if z_b is z_a:
        z_b = z_a.view_as(z_a)
    return VICReg.apply(z_a, z_b, sim, std, cov, eps, n, shards)


# -------------------------------------------------------------------------------- Barlow Twins


@without_autocast
def _standardised(z, n, shards, normalization, dtype):
    """One view's rows normalised by column, and (D,) the factor of <dX, X> X in their gradient."""
    levels, rows = (() if shards is None else shards.levels), n
    if normalization != "batch_norm":
        levels, rows = (), max(len(z), 1)
    mean, rest, squares = _moments(z, rows, levels, dtype)
    if normalization == "local_std":
        deviation = (squares / max(rows - 1, 1)).sqrt()
        scale = deviation + BATCH_NORM_EPS
        turn = torch.where(deviation > 0, 1 / (deviation * max(rows - 1, 1)), 0)
    else:
        scale = (squares / rows + BATCH_NORM_EPS).sqrt()
        turn = 1 / (scale * rows)
    shift = -rest / rows / scale
    inverse, shift, turn = (x.to(dtype) for x in (1 / scale, shift, turn))
    return Rows(z, mean, inverse, shift, n, shards), turn


@without_autocast
def _barlow_fwd(z_a, z_b, off_diagonal, normalization, n, shards):
    """The loss, what each view's rows are made of, and the matrices of the gradient:

    X X^T of both views and dloss / n dC_ii (D,); or dloss / n dC (D, D) and <dX, X> (2, D).
    """
    levels, dtype = () if shards is None else shards.levels, _wide(z_a, z_b)
    (a, turn_a), (b, turn_b) = (
        _standardised(z, n, shards, normalization, dtype) for z in (z_a, z_b)
    )
    # By itself and in fp64: of C_ii near 1 the gradient has the difference to 1.
    own = torch.zeros_like(a.mean, dtype=torch.float64)
    for at in a.blocks():
        own[at[1]] += (a.block(at) * b.block(at)).sum(0)
    diagonal = all_sum(own, levels) / n  # (D,)
    if a.of_rows:
        matrices = [_gram(a), _gram(b)]
        squares = all_sum(_dot(*matrices), levels) / n**2
        matrices += [((2 * (diagonal - 1) - 2 * off_diagonal * diagonal) / n).to(dtype)]
    else:
        c = a.mean.new_zeros(len(own), len(own))  # (D, D)
        for at in a.blocks():
            c.addmm_(a.block(at).T, b.block(at), alpha=1 / n)
        c.diagonal().copy_(own / n)
        own, c = c, all_sum(c, levels)
        squares = _dot(c, c)
        slope = c * (2 * off_diagonal / n)
        slope.diagonal().copy_((diagonal - 1) * (2 / n))
        along = slope * (c if normalization == "batch_norm" else own) * n
        matrices = [slope, torch.stack([along.sum(1), along.sum(0)])]
    squares = squares - diagonal.square().sum()
    loss = (diagonal - 1).square().sum() + off_diagonal * squares
    return loss.to(dtype), [*a[1:4], turn_a, *b[1:4], turn_b], matrices


@without_autocast
def _barlow_bwd(z_a, z_b, kept, matrices, slope, needs, off_diagonal, normalization, n, shards):
    a, b = Rows(z_a, *kept[:3], n, shards), Rows(z_b, *kept[4:7], n, shards)
    levels = () if shards is None or normalization != "batch_norm" else shards.levels
    found = []
    for i, (x, y, turn) in enumerate(((a, b, kept[3]), (b, a, kept[7]))):
        if not needs[i]:
            found.append(None)
            continue
        dz = torch.empty_like(x.z)
        for at in x.blocks():
            block, columns = x.block(at), at[1]
            if x.of_rows:
                gram, of_diagonal = matrices[1 - i], matrices[2]
                d = y.block(at).mul_(of_diagonal[columns])
                d.addmm_(gram, x.of_all(block), alpha=2 * off_diagonal / n**2)
                along = all_sum((d * block).sum(0), levels)
            else:
                d = y.block(at) @ (matrices[0] if i else matrices[0].T)
                along = matrices[1][i]
            d.mul_(x.inverse[columns]).sub_(block.mul_(along * turn[columns]))
            dz[at] = d.mul_(slope)
        found.append(dz)
    return found


class BarlowTwins(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, off_diagonal, normalization, n, shards):
        loss, kept, matrices = _barlow_fwd(z_a, z_b, off_diagonal, normalization, n, shards)
        ctx.save_for_backward(z_a, z_b, *kept, *matrices)
        ctx.options = off_diagonal, normalization, n, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z_a, z_b, *kept = ctx.saved_tensors
        slope = dloss * _world(ctx.options[-1])
        needs = ctx.needs_input_grad[:2]
        grads = _barlow_bwd(z_a, z_b, kept[:8], kept[8:], slope, needs, *ctx.options)
        return *grads, *[None] * 4


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    *,
    off_diagonal: float = 5e-3,
    normalization: str = "batch_norm",
    group=None,
) -> Tensor:
    """Barlow Twins: loss = sum_i (C_ii - 1)^2 + off_diagonal sum_{i != j} C_ij^2.

    C = X_a^T X_b / N, X = (z - mean) / scale by column.

    Args:
        z_a, z_b: (N, D) float32, bfloat16, float16 (computed in float32) or float64, N >= 2.
        off_diagonal: the factor lambda.
        normalization: "batch_norm": mean and variance (biased, eps 1e-5 under the root) of the
            rows of all ranks, as in the paper's code. "local_batch_norm": of this rank's rows, as
            in lightly. "local_std": of this rank's rows, the scale their unbiased deviation plus
            1e-5, as in stable-pretraining. On one process the first two are one.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks.

    Raises:
        TypeError, ValueError: integer features, views of different shape, fewer than 2 rows over
            all ranks, another normalization; on all ranks, what differs between them and must not.

    Memory: 2 N^2 numbers where N <= D, else 2 D^2, and blocks of 8 MiB, N the rows of all ranks;
        over W ranks those of the N x N matrices that belong to a rank's rows. Normalised features
        are never stored.

    Notes: where N <= D by X X^T of both views, whose rows are gathered in blocks of columns over
        several ranks, in the backward again; else by C, which is all-reduced. With local statistics
        a column that is constant, or a rank's single row, is 0. Products in float32, the loss in
        float64; autocast has no effect. Deterministic. Gradients over several ranks as in
        `info_nce`: the paper's code has 1 / W of them.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16).unbind()
        >>> barlow_twins(z_a, z_b).shape
        torch.Size([])

    Paper: Barlow Twins, arXiv:2103.03230.
    """
    name = "barlow_twins"
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{name}: normalization must be one of {NORMALIZATIONS}, got {normalization!r}."
        )
    options = {"off_diagonal": off_diagonal, "normalization": normalization}
    n, shards = _views(name, z_a, z_b, group, **options)
    if z_b is z_a:
        z_b = z_a.view_as(z_a)
    return BarlowTwins.apply(z_a, z_b, off_diagonal, normalization, n, shards)


# -------------------------------------------------------------------------- nearest neighbours


def _largest(x: Tensor, k: int) -> Tensor:
    """(R, k): the places of each row's k largest, in ascending order; of equal ones the first."""
    index = None
    if x.device.type == "cpu" and host_may_wait(x):
        values, index = x.topk(k, dim=1)  # of equal ones any: right where none is left out
        if (x >= values[:, -1:]).sum() > k * len(x) or values.isnan().any():
            index = None
    if index is None and x.dtype == torch.float64:
        index = x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    elif index is None:
        # No two have the same key: the bits, in order as integers, over the place from behind.
        bits = (x + 0.0).view(torch.int32)  # -0 becomes 0
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        last = 2**32 - 1
        places = last - torch.arange(x.shape[1], device=x.device)
        keys = torch.add(places, bits.long(), alpha=last + 1)
        index = last - (keys.topk(k, dim=1).values & last)
    return index.sort(dim=1).values


def _products(y: Tensor, every: Tensor, at: int) -> Tensor:
    """(rows, n); -inf for a row with itself, where the first stands at `at`."""
    products = y @ every.T
    products.diagonal(at).fill_(-math.inf)
    return products


def _neighbours(y: Tensor, every: Tensor, first: int, k: int) -> Tensor:
    """(N, k): the rows of `every` with the largest product with each row of y but the row itself,
    which stands at `first` and after."""
    if k == 1 and y.dtype == torch.float32 and len(every) >= 1024 and host_may_wait(y):
        if y.device.type == "cpu" and "AVX512-BF16" in cpu_features():
            return _nearest_by_bf16(y, every, first).unsqueeze(1)
    index = torch.zeros(len(y), k, dtype=torch.int64, device=y.device)
    for s in _steps(len(y), len(every), y.dtype) if k else ():
        products = _products(y[s], every, first + s.start)
        index[s] = products.argmax(1, keepdim=True) if k == 1 else _largest(products, k)
    return index


def _nearest_by_bf16(y: Tensor, every: Tensor, first: int) -> Tensor:
    """(N,): the nearest rows as fp32 finds them. The error of a product in bf16 is bounded by what
    its rows lost in rounding, so that fp32 is needed only for the few that may be the largest."""
    coarse = every.bfloat16()  # (n, D)
    lost, length = every.new_empty(2, len(every)).unbind()
    for s in _steps(*every.shape, every.dtype):
        lost[s] = torch.linalg.vector_norm(every[s] - coarse[s], dim=1)
        length[s] = torch.linalg.vector_norm(every[s], dim=1)
    longest, most_lost = (length + lost).amax(), lost.amax()
    index = torch.empty(len(y), dtype=torch.int64, device=y.device)
    for s in _steps(len(y), len(every), coarse.dtype):
        own = slice(first + s.start, first + s.stop)
        products = _products(coarse[own], coarse, own.start)
        nearest = products.max(1).indices
        least = (y[s] * every[nearest]).sum(1)
        error = lost[own] * longest + (length[own] + lost[own]) * (most_lost + 1e-5 * longest)
        # The product and this number are rounded to bf16 as well.
        floor = least - error - 2**-7 * (least.abs() + error)
        i, j = (products >= floor.bfloat16().unsqueeze(1)).nonzero().unbind(1)
        if len(i) > 8 * len(nearest):
            for t in _steps(len(nearest), 2 * len(every), y.dtype):
                at = s.start + t.start
                rows = y[at : s.start + t.stop]
                index[at : s.start + t.stop] = _products(rows, every, first + at).argmax(1)
            continue
        exact = (y[s][i] * every[j]).sum(1)
        best = torch.full_like(least, -math.inf).scatter_reduce_(0, i, exact, "amax")
        i, j = (x[exact == best[i]] for x in (i, j))
        index[s] = nearest.scatter_reduce_(0, i, j, "amin", include_self=False)
    return index


def _unit(x: Tensor, eps: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The rows in at least fp32, over their lengths (N, 1); those shorter than eps over eps."""
    x = x.to(_wide(x))
    if not normalize:
        return x, x.new_ones(len(x), 1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp(min=eps), length


@without_autocast
def _koleo_fwd(x, eps, p, topk, normalize, shards):
    """The loss, its neighbours (N, k) and their distances."""
    y, _ = _unit(x, eps, normalize)
    n, first, levels = len(x), 0, ()
    if shards is not None:
        n, first, levels = shards.total, shards.first, shards.levels
    every = y if shards is None else gather_rows(y, shards)
    k = min(topk, n - 1)
    index = _neighbours(y, every, first, k)
    distance = y.new_zeros(len(y), k)
    for c in range(k):
        for s in _steps(*y.shape, y.dtype):
            difference = (y[s] - every[index[s, c]]).add_(eps)
            distance[s, c] = torch.linalg.vector_norm(difference, ord=p, dim=1)
    total = all_sum(-(distance + eps).log().sum(dtype=torch.float64), levels)
    return (total / max(n * k, 1)).to(y.dtype), index, distance


@without_autocast
def _koleo_bwd(x, index, distance, slope, eps, p, normalize, shards):
    y, length = _unit(x, eps, normalize)
    every, n = y, len(x)
    if shards is not None:
        every, n = gather_rows(y, shards), shards.total
    k = index.shape[1]
    dy, devery = torch.zeros_like(y), torch.zeros_like(every)
    weight = -slope / max(n * k, 1) / (distance + eps)  # (N, k)
    for c in range(k):
        for s in _steps(*y.shape, y.dtype):
            j, d = index[s, c], distance[s, c].unsqueeze(1)
            g = (y[s] - every[j]).add_(eps).div_(d.masked_fill(d == 0, 1))
            if p != 2:
                g = g.sign() * g.abs().pow_(p - 1)
            g.mul_(weight[s, c].unsqueeze(1))
            dy[s] += g
            devery.index_add_(0, j, g, alpha=-1)
    dy += devery if shards is None else scatter_sums(devery, shards)
    if normalize:
        along = (dy * y).sum(1, keepdim=True).masked_fill_(length < eps, 0)
        dy.addcmul_(y, along, value=-1).div_(length.clamp(min=eps))
    return dy.to(x.dtype)


class KoLeo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, p, topk, normalize, shards):
        loss, index, distance = _koleo_fwd(x, eps, p, topk, normalize, shards)
        ctx.save_for_backward(x, index, distance)
        ctx.options = eps, p, normalize, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        slope = dloss * _world(ctx.options[-1])
        return _koleo_bwd(*ctx.saved_tensors, slope, *ctx.options), *[None] * 5


def koleo(
    x: Tensor,
    *,
    eps: float = 1e-8,
    p: float = 2,
    topk: int = 1,
    normalize: bool = True,
    group=None,
) -> Tensor:
    """KoLeo, which pushes each row away from its nearest: loss = -mean_i log(d_i + eps).

    d_i = ||y_i - y_j + eps||_p, y = x / |x|, j the other row of largest <y_i, y_j>.

    Args:
        x: (N, D) float32, bfloat16, float16 (computed in float32) or float64.
        eps: > 0; also the least length that a row is divided by.
        p: >= 1, the norm of the distance.
        topk: >= 1, the number of nearest rows that each row is pushed away from, the mean over
            which is taken; all other rows where there are fewer.
        normalize: False takes rows as they are.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks; 0, of gradient 0, for one row.

    Raises:
        TypeError, ValueError: integer x, eps, p or topk out of range; on all ranks, what differs
            between them and must not.

    Memory: O(n D), n the rows of all ranks, and blocks of 8 MiB: no N x n products.

    Notes: the choice of j takes no gradient, y_i and y_j do, on whichever rank. Of rows equally
        near the first counts. Value and gradient are finite in float32 also for equal rows and for
        rows of zeros, but the gradient may be as large as 1 / eps. Products in float32; autocast
        has no effect. Deterministic on the CPU; on a GPU as index_add_ is. Gradients over several
        ranks as in `info_nce`.

    Example:
        >>> koleo(torch.randn(8, 16)).shape
        torch.Size([])

    Paper: spreading vectors for similarity search, arXiv:1806.03198; DINOv2, arXiv:2304.07193.
    """
    name = "koleo"
    check_features(name, empty=bool(resolve_levels(name, group)), x=x)
    if x.dim() != 2:
        raise ValueError(f"{name}: x must be (N, D), got {tuple(x.shape)}.")
    if not eps > 0:
        raise ValueError(f"{name}: eps must be positive, got {eps}. Typical: 1e-8.")
    if not 1 <= p < math.inf:
        raise ValueError(f"{name}: p must be a finite number >= 1, got {p}. Typical: 2.")
    if not isinstance(topk, int) or topk < 1:
        raise ValueError(f"{name}: topk must be an integer >= 1, got {topk!r}.")
    options = {"eps": eps, "p": p, "topk": topk, "normalize": normalize}
    shards, _ = shards_of(name, group, "gather", x, None, **{"the options": options})
    return KoLeo.apply(x, eps, p, topk, normalize, shards)


@torch.no_grad()
def topk_cosine(
    queries: Tensor, bank: Tensor, k: int, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank of largest cosine with each query, largest first.

    Args:
        queries: (N, D), bank: (M, D) float32, bfloat16, float16 (computed in float32) or float64.
        k: 1 <= k <= M.
        chunk: rows of the bank in one product; None: 8192, or k if that is more.

    Returns:
        cosines (N, k) in float32 (float64) and rows of the bank (N, k), int64, without a gradient.

    Raises:
        TypeError, ValueError: integer features, differing widths, k or chunk out of range.

    Memory: the result, one chunk of the bank in float32, blocks of 8 MiB: no N x M cosines.

    Notes: of equal cosines the lower row comes first. Deterministic; equal for every chunk but for
        the rounding of products. A row of zeros has cosine 0 with all. Autocast has no effect.

    Example:
        >>> cosines, rows = topk_cosine(torch.eye(4), torch.eye(4)[[2, 0, 1, 3]], 1)
        >>> rows.flatten().tolist()
        [1, 2, 0, 3]

    Paper: k nearest neighbours as in arXiv:1805.01978; NNCLR, arXiv:2104.14548.
    """
    name = "topk_cosine"
    check_features(name, queries=queries, bank=bank)
    if queries.dim() != 2:
        raise ValueError(f"{name}: queries must be (N, D), got {tuple(queries.shape)}.")
    if not isinstance(k, int) or not 1 <= k <= len(bank):
        raise ValueError(
            f"{name}: k must be an integer from 1 to the bank's {len(bank)} rows, got {k!r}."
        )
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"{name}: chunk must be an integer >= 1, got {chunk!r}.")
    return _topk_cosine(queries, bank, k, max(8192, k) if chunk is None else chunk)


@without_autocast
def _topk_cosine(queries, bank, k, chunk):
    dtype = _wide(queries, bank)
    queries = unit_rows(queries.to(dtype))
    best = queries.new_full((len(queries), k), -math.inf)
    rows = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, len(bank), chunk):
        keys = unit_rows(bank[first : first + chunk].to(dtype))  # (C, D)
        known = min(first, k)  # so many columns of best are filled, in the order of the bank
        for s in _steps(len(queries), len(keys), dtype):
            products = queries[s] @ keys.T  # (R, C)
            near = _largest(products, min(k, len(keys)))
            both = torch.cat([best[s, :known], products.gather(1, near)], 1)
            found = torch.cat([rows[s, :known], near + first], 1)
            kept = _largest(both, min(k, both.shape[1]))
            best[s, : kept.shape[1]] = both.gather(1, kept)
            rows[s, : kept.shape[1]] = found.gather(1, kept)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best, rows.gather(1, order)
