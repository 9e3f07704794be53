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
from fastssl.ops.contrastive import lib, without_autocast
from fastssl.ops.product import product, product_
from fastssl.ops.sharded import shards_of

NORMALIZATIONS = ("batch_norm", "local_batch_norm", "local_std")
BATCH_NORM_EPS = 1e-5


# ---------------------------------------------------------------------------- passes over features


def column_moments_ref(z: Tensor, mean: Tensor | None) -> Tensor:
    """(2, D) in fp64: by column the sums of x and of x^2, x = z - mean (D,)."""
    dtype = wide(z) if mean is None else mean.dtype
    sums = torch.zeros(2, z.shape[1], dtype=torch.float64, device=z.device)
    for s in steps(*z.shape, dtype):
        x = z[s].to(dtype) if mean is None else z[s].to(dtype) - mean
        sums[0] += x.sum(0)
        sums[1] += x.square().sum(0)
    return sums


def column_dots_ref(x: Tensor, y: Tensor) -> Tensor:
    """(1, D) in fp64: by column the sum of x y."""
    total = torch.zeros(1, x.shape[1], dtype=torch.float64, device=x.device)
    for s in steps(*x.shape, x.dtype):
        total += (x[s] * y[s]).sum(0)
    return total


def standardise_ref(z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(z - mean) scale + shift by column, in the dtype of mean (D,)."""
    return torch.addcmul(shift, z.to(mean.dtype) - mean, scale)


lib.define("column_moments(Tensor z, Tensor? mean) -> Tensor")
lib.define("column_dots(Tensor x, Tensor y) -> Tensor")
lib.define("standardise(Tensor z, Tensor mean, Tensor scale, Tensor shift) -> Tensor")
lib.impl("column_moments", column_moments_ref, "CompositeExplicitAutograd")
lib.impl("column_dots", column_dots_ref, "CompositeExplicitAutograd")
lib.impl("standardise", standardise_ref, "CompositeExplicitAutograd")


def _sums_fake(rows):
    return lambda z, _: z.new_empty((rows, z.shape[1]), dtype=torch.float64)


torch.library.register_fake("fastssl::column_moments", _sums_fake(2), lib=lib)
torch.library.register_fake("fastssl::column_dots", _sums_fake(1), lib=lib)
torch.library.register_fake(
    "fastssl::standardise", lambda z, mean, *_: z.new_empty(z.shape, dtype=mean.dtype), lib=lib
)


def _column_dots(x: Tensor, y: Tensor) -> Tensor:
    """(D,)"""
    by_reference = x.dtype == torch.float64
    return (column_dots_ref if by_reference else torch.ops.fastssl.column_dots)(x, y).squeeze(0)


def _standardise(z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    by_reference = mean.dtype == torch.float64
    run = standardise_ref if by_reference else torch.ops.fastssl.standardise
    return run(z, mean, scale, shift)


def _moments(z: Tensor, n: int, levels, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of n rows in all by column the mean in dtype, and in fp64 what is still to be added to rows
    less that, and the sum of squares then: (D,) each."""
    by_reference = dtype == torch.float64
    moments = column_moments_ref if by_reference else torch.ops.fastssl.column_moments
    mean = (all_sum(moments(z, None)[0], levels) / n).to(dtype)
    rest, squares = all_sum(moments(z, mean), levels).unbind()
    shift = rest / -n
    return mean, shift, squares.addcmul(shift, rest)


# ------------------------------------------------------------------------------- Gram matrices


class Rows(NamedTuple):
    """One view's rows, centred and perhaps scaled; made in blocks, and kept if one holds all."""

    z: Tensor  # (N, D)
    mean: Tensor  # (D,) in the dtype of the products
    inverse: Tensor  # (D,), what rows less the mean are multiplied by
    shift: Tensor  # (D,), what is then added: what rounding the mean left over
    n: int  # rows of all ranks
    shards: Shards | None
    whole: Tensor | None = None  # (N, D)

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
        if self.whole is not None:
            return self.whole
        return _standardise(self.z[at], *(x[at[1]] for x in self[1:4]))

    def kept(self) -> "Rows":
        return self._replace(whole=_standardise(*self[:4])) if len(self.blocks()) == 1 else self

    def of_all(self, x: Tensor) -> Tensor:
        return x if self.shards is None else gather_rows(x, self.shards)


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
            product_(gram, block, x.of_all(block).T, add=True)
        return gram
    strips = _strips(len(gram))
    for at in x.blocks():
        y = x.block(at) if x.of_rows else x.block(at).T
        for s in strips:
            product_(gram[s, : s.stop], y[s], y[: s.stop].T, add=True)
    for s in strips[1:]:
        gram[: s.start, s] = gram[s, : s.start].T
    return gram if x.shards is None else all_sum(gram, x.shards.levels)


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
    """The loss, and of each view: what X is made of, X if kept, and in the gradient the factors of
    X: the Gram matrix (N, n) or (D, D), and (D,)."""
    levels, D, dtype = () if shards is None else shards.levels, z_a.shape[1], wide(z_a, z_b)
    loss = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for s in steps(*z_a.shape, dtype):
        difference = z_a[s].to(dtype) - z_b[s].to(dtype)
        loss += _column_dots(difference, difference).sum()
    loss = all_sum(loss, levels) * (sim / (n * D))
    share = cov / (D * (n - 1) ** 2)
    kept, ones = [], z_a.new_ones(D, dtype=dtype)
    for z in (z_a, z_b):
        mean, shift, squares = _moments(z, n, levels, dtype)
        x = Rows(z, mean, ones, shift.to(dtype), n, shards).kept()
        gram = _gram(x)
        root = (squares / (n - 1) + eps).sqrt()
        loss = loss + std / 2 * (1 - root).relu().mean()
        factor = torch.where(root < 1, -std / (2 * D * (n - 1)) / root, 0)
        if x.of_rows:
            off_diagonal = all_sum(_column_dots(gram, gram).sum(), levels) - squares.square().sum()
            factor = factor - 4 * share * squares
        else:
            gram.diagonal().zero_()
            off_diagonal = _column_dots(gram, gram).sum()
        loss = loss + share * off_diagonal
        kept += [*x[1:4], x.whole, gram.mul_(4 * share), factor.to(dtype)]
    return loss.to(dtype), kept


@without_autocast
def _vicreg_bwd(z, other, kept, slope, sim, n, shards):
    """dz: slope times the gradient of the loss in z."""
    *made, whole, gram, factor = kept
    D, dz, x = z.shape[1], torch.empty_like(z), Rows(z, *made, n, shards, whole)
    for at in x.blocks():
        block = x.block(at)
        d = block * factor[at[1]]
        if x.of_rows:
            product_(d, gram, x.of_all(block), add=True)
        else:
            product_(d, block, gram, add=True)
        d.add_(z[at].to(d.dtype) - other[at].to(d.dtype), alpha=2 * sim / (n * D))
        dz[at] = d.mul_(slope)
    return dz


class VICReg(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, sim, std, cov, eps, n, shards):
        loss, kept = _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards)
        ctx.save_for_backward(z_a, z_b, *kept)
        ctx.options = sim, n, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z_a, z_b, *kept = ctx.saved_tensors
        slope = dloss * world(ctx.options[-1])
        dz_a = dz_b = None
        if ctx.needs_input_grad[0]:
            dz_a = _vicreg_bwd(z_a, z_b, kept[:6], slope, *ctx.options)
        if ctx.needs_input_grad[1]:
            dz_b = _vicreg_bwd(z_b, z_a, kept[6:], slope, *ctx.options)
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
        W ranks those of the N x N matrix that belong to a rank's rows. Centred features are stored
        only where one block holds a view's.

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
    mean, shift, squares = _moments(z, rows, levels, dtype)
    if normalization == "local_std":
        deviation = (squares.clamp(min=0) / max(rows - 1, 1)).sqrt()
        scale = deviation + BATCH_NORM_EPS
        turn = torch.where(deviation > 0, 1 / (deviation * max(rows - 1, 1)), 0)
    else:
        scale = (squares / rows + BATCH_NORM_EPS).sqrt()
        turn = 1 / (scale * rows)
    inverse, shift, turn = (x.to(dtype) for x in (1 / scale, shift / scale, turn))
    return Rows(z, mean, inverse, shift, n, shards).kept(), turn


@without_autocast
def _barlow_fwd(z_a, z_b, off_diagonal, normalization, n, shards):
    """The loss, what each view's rows are made of, and the matrices of the gradient:

    X X^T of both views and dloss / n dC_ii (D,); or dloss / n dC (D, D) and <dX, X> (2, D).
    """
    levels, dtype = () if shards is None else shards.levels, wide(z_a, z_b)
    (a, turn_a), (b, turn_b) = (
        _standardised(z, n, shards, normalization, dtype) for z in (z_a, z_b)
    )
    # The diagonal by itself and in fp64: of C_ii near 1 the gradient has the difference to 1.
    own = torch.zeros_like(a.mean, dtype=torch.float64)  # (D,)
    c = None if a.of_rows else a.mean.new_zeros(len(own), len(own))  # (D, D)
    for at in a.blocks():
        x, y = a.block(at), b.block(at)
        own[at[1]].add_(_column_dots(x, y))
        if c is not None:
            product_(c, x.T, y, add=True)
    diagonal = all_sum(own, levels) / n  # (D,)
    if c is None:
        matrices = [_gram(a), _gram(b)]
        squares = all_sum(_column_dots(*matrices).sum(), levels) / n**2
        matrices = [x.mul_(2 * off_diagonal / n**2) for x in matrices]
        matrices += [((2 * (diagonal - 1) - 2 * off_diagonal * diagonal) / n).to(dtype)]
    else:
        c.mul_(1 / n).diagonal().copy_(own / n)
        own, c = c, all_sum(c, levels)
        squares = _column_dots(c, c).sum()
        slope = c * (2 * off_diagonal / n)
        slope.diagonal().copy_((diagonal - 1) * (2 / n))
        along = slope * (c if normalization == "batch_norm" else own)
        matrices = [slope, torch.stack([along.sum(1), along.sum(0)]).mul_(n)]
    squares = squares - diagonal.square().sum()
    loss = (diagonal - 1).square().sum() + off_diagonal * squares
    kept = [y for x, turn in ((a, turn_a), (b, turn_b)) for y in (*x[1:4], x.whole, turn)]
    return loss.to(dtype), kept, matrices


@without_autocast
def _barlow_bwd(z_a, z_b, kept, matrices, slope, needs, normalization, n, shards):
    views = [Rows(z, *kept[i : i + 3], n, shards, kept[i + 3]) for i, z in ((0, z_a), (5, z_b))]
    levels = () if shards is None or normalization != "batch_norm" else shards.levels
    found = [torch.empty_like(x.z) if need else None for x, need in zip(views, needs, strict=True)]
    # Of the gradient the factors by column, with that of the whole loss.
    outer = [x.inverse * slope for x in views]
    turns = [kept[i] * slope for i in (4, 9)]
    of_rows = views[0].of_rows
    if not of_rows:
        factors = [matrices[0].T * outer[0], matrices[0] * outer[1]]  # (D, D)
    for at in views[0].blocks():
        blocks, columns = [x.block(at) for x in views], at[1]
        for i, dz in enumerate(found):
            if dz is None:
                continue
            x, y = blocks[i], blocks[1 - i]
            if of_rows:
                d = y * matrices[2][columns]
                product_(d, matrices[1 - i], views[i].of_all(x), add=True)
                along = all_sum(_column_dots(d, x), levels).to(d.dtype)
                d.mul_(outer[i][columns])
            else:
                d = product(y, factors[i])
                along = matrices[1][i]
            dz[at] = d.addcmul_(x, along * turns[i][columns], value=-1)
    return found


class BarlowTwins(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, off_diagonal, normalization, n, shards):
        loss, kept, matrices = _barlow_fwd(z_a, z_b, off_diagonal, normalization, n, shards)
        ctx.save_for_backward(z_a, z_b, *kept, *matrices)
        ctx.options = normalization, n, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        z_a, z_b, *kept = ctx.saved_tensors
        slope = dloss * world(ctx.options[-1])
        needs = ctx.needs_input_grad[:2]
        grads = _barlow_bwd(z_a, z_b, kept[:10], kept[10:], slope, needs, *ctx.options)
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
        are stored only where one block holds a view's.

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
