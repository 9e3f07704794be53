"""VICReg and Barlow Twins by whichever Gram matrix is smaller.

With X (N, D), sum_ij (X^T X)_ij^2 = ||X X^T||_F^2, and its gradient is 4 (X X^T) X = 4 X (X^T X).
So where N <= D no D x D matrix is needed. For two matrices,
sum_ij (X^T Y)_ij^2 = <X X^T, Y Y^T>_F, of gradient 2 (Y Y^T) X in X. Of centred X and Y these
gradients have columns of mean 0 already: nothing comes of the centring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import Shards, all_sum, gather_rows, resolve_levels
from fastssl.ops.blocks import steps, wide, world
from fastssl.ops.checks import check_features
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.sharded import shards_of

NORMALIZATIONS = ("batch_norm", "local_batch_norm", "local_std")
BATCH_NORM_EPS = 1e-5


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
            return [(slice(None), s) for s in steps(D, self.n, dtype)]
        return [(s, slice(None)) for s in steps(N, D, dtype)]

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
    for s in steps(*z.shape, dtype):
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
    for s in steps(*x.shape, x.dtype):
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


# -------------------------------------------------------------------------------------- VICReg


@without_autocast
def _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards):
    """The loss, and of each view: mean (D,), Gram matrix, factor of X in the gradient (D,)."""
    levels, D, dtype = () if shards is None else shards.levels, z_a.shape[1], wide(z_a, z_b)
    loss = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for s in steps(*z_a.shape, dtype):
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
        slope = dloss * world(ctx.options[-1])
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
    levels, dtype = () if shards is None else shards.levels, wide(z_a, z_b)
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
        slope = dloss * world(ctx.options[-1])
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
