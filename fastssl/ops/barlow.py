"""Barlow Twins by whichever Gram matrix is smaller: see `gram`."""

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable, with_gradient
from fastssl.dist import all_sum
from fastssl.ops.blocks import wide, world
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.gram import Rows, check_views, column_dots, gram_matrix, is_small, moments
from fastssl.ops.product import product, product_

NORMALIZATIONS = ("batch_norm", "local_batch_norm", "local_std")
BATCH_NORM_EPS = 1e-5


@without_autocast
def _standardised(z, n, shards, normalization, dtype):
    """One view's rows normalised by column, and (D,) the factor of <dX, X> X in their gradient."""
    levels, rows = (() if shards is None else shards.levels), n
    if normalization != "batch_norm":
        levels, rows = (), max(len(z), 1)
    mean, shift, squares = moments(z, rows, levels, dtype)
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
        own[at[1]].add_(column_dots(x, y))
        if c is not None:
            product_(c, x.T, y, add=True)
    diagonal = all_sum(own, levels) / n  # (D,)
    if c is None:
        matrices = [gram_matrix(a), gram_matrix(b)]
        squares = all_sum(column_dots(*matrices).sum(), levels) / n**2
        matrices = [x.mul_(2 * off_diagonal / n**2) for x in matrices]
        matrices += [((2 * (diagonal - 1) - 2 * off_diagonal * diagonal) / n).to(dtype)]
    else:
        c.mul_(1 / n).diagonal().copy_(own / n)
        own, c = c, all_sum(c, levels)
        squares = column_dots(c, c).sum()
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
                along = all_sum(column_dots(d, x), levels).to(d.dtype)
                d.mul_(outer[i][columns])
            else:
                d = product(y, factors[i])
                along = matrices[1][i]
            dz[at] = d.addcmul_(x, along * turns[i][columns], value=-1)
    return found


@without_autocast
def _barlow_small(z_a, z_b, off_diagonal, needs):
    """The loss and dz_a and dz_b, as needed, of views normalised by batch norm: by whole matrices
    and C (D, D), in few calls."""
    n, z = len(z_a), torch.cat([z_a, z_b], 1).to(wide(z_a, z_b))
    z = z - z[0]  # torch's batch norm loses what is large in common
    x, *stats = torch.native_batch_norm(z, None, None, None, None, True, 0.0, BATCH_NORM_EPS)
    a, b = x.chunk(2, 1)
    c = (a.T @ b).div_(n)
    diagonal = c.diagonal()
    distance = diagonal - 1
    diagonal.zero_()
    loss = torch.add(distance.square().sum(), c.square().sum(), alpha=off_diagonal)
    if not any(needs):
        return loss, None, None
    c.mul_(2 * off_diagonal / n)  # becomes dloss / n dC
    diagonal.add_(distance, alpha=2 / n)
    d = [b @ c.T if needs[0] else torch.zeros_like(a), a @ c if needs[1] else torch.zeros_like(b)]
    d, *_ = torch.ops.aten.native_batch_norm_backward(
        torch.cat(d, 1), z, None, None, None, *stats, True, BATCH_NORM_EPS, [True, False, False]
    )
    return loss, *(g if need else None for g, need in zip(d.chunk(2, 1), needs, strict=True))


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

    Memory: 2 N^2 numbers where N < D, else 2 D^2, and blocks of 8 MiB, N the rows of all ranks;
        over W ranks those of the N x N matrices that belong to a rank's rows. Normalised features
        are stored only where one block holds a view's. Of small views on a CPU D^2.

    Notes: where N < D by X X^T of both views, whose rows are gathered in blocks of columns over
        several ranks, in the backward again; else by C, which is all-reduced. With local statistics
        a column that is constant, or a rank's single row, is 0. Products in float32, the loss in
        float64, of small views on a CPU in float32; autocast has no effect. Deterministic.
        Gradients over several ranks as in `info_nce`: the paper's code has 1 / W of them.

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
    n, shards = check_views(name, z_a, z_b, group, **options)
    if z_b is z_a:
        z_b = z_a.view_as(z_a)
    if shards is None and normalization != "local_std" and is_small(z_a):
        return with_gradient(name, _barlow_small, (z_a, z_b), off_diagonal)
    return BarlowTwins.apply(z_a, z_b, off_diagonal, normalization, n, shards)
