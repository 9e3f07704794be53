"""VICReg by whichever Gram matrix is smaller: see `gram`."""

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable, with_gradient
from fastssl.dist import all_sum, host_may_wait
from fastssl.ops.blocks import steps, wide, world
from fastssl.ops.contrastive import without_autocast
from fastssl.ops.gram import Rows, check_views, column_dots, gram_matrix, is_small, moments
from fastssl.ops.product import product_

# Where a few columns outweigh all others, or columns are nearly uncorrelated, the sum of squares of
# X X^T less the diagonal's of X^T X leaves few digits: of less than this share X^T X is made.
LEAST_REST = 1 / 16


def _off_diagonal(x: Rows, squares: Tensor, levels) -> tuple[Rows, Tensor, Tensor]:
    """x as it is to be taken, its Gram matrix, X^T X without the diagonal, and in fp64 the sum of
    the squares off the diagonal of X^T X, which has `squares` (D,) on it."""
    if x.of_rows:
        gram = gram_matrix(x)
        diagonal = squares.square().sum()
        rest = all_sum(column_dots(gram, gram).sum(), levels) - diagonal
        # A GPU is not waited for.
        may_ask = rest.device.type == "cpu" and host_may_wait(rest)
        if not (may_ask and rest < LEAST_REST * diagonal):
            return x, gram, rest
        x = x._replace(of_columns=True)
    gram = gram_matrix(x)
    gram.diagonal().zero_()
    return x, gram, column_dots(gram, gram).sum()


@without_autocast
def _vicreg_fwd(z_a, z_b, sim, std, cov, eps, n, shards):
    """The loss, and of each view: what X is made of, X if kept, and in the gradient the factors of
    X: the Gram matrix (N, n) or (D, D), and (D,)."""
    levels, D, dtype = () if shards is None else shards.levels, z_a.shape[1], wide(z_a, z_b)
    loss = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for s in steps(*z_a.shape, dtype):
        difference = z_a[s].to(dtype) - z_b[s].to(dtype)
        loss += column_dots(difference, difference).sum()
    loss = all_sum(loss, levels) * (sim / (n * D))
    share = cov / (D * (n - 1) ** 2)
    kept, ones = [], z_a.new_ones(D, dtype=dtype)
    for z in (z_a, z_b):
        mean, shift, squares = moments(z, n, levels, dtype)
        x = Rows(z, mean, ones, shift.to(dtype), n, shards).kept()
        x, gram, off_diagonal = _off_diagonal(x, squares, levels)
        root = (squares / (n - 1) + eps).sqrt()
        loss = loss + std / 2 * (1 - root).relu().mean()
        factor = torch.where(root < 1, -std / (2 * D * (n - 1)) / root, 0)
        if x.of_rows:
            factor = factor - 4 * share * squares
        loss = loss + share * off_diagonal
        kept += [*x[1:4], x.whole, gram.mul_(4 * share), factor.to(dtype)]
    return loss.to(dtype), kept


@without_autocast
def _vicreg_bwd(z, other, kept, slope, sim, n, shards):
    """dz: slope times the gradient of the loss in z."""
    *made, whole, gram, factor = kept
    D, dz = z.shape[1], torch.empty_like(z)
    x = Rows(z, *made, n, shards, whole, of_columns=gram.shape[1] == D)
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


@without_autocast
def _vicreg_small(z_a, z_b, sim, std, cov, eps, needs):
    """The loss and dz_a and dz_b, as needed, by whole matrices and X^T X (2, D, D) of both views,
    in few calls."""
    z = torch.stack([z_a, z_b]).to(wide(z_a, z_b))
    _, n, D = z.shape
    x = z - z[:, :1]  # twice, for of large numbers the mean is rounded
    x.sub_(x.sum(1, keepdim=True), alpha=1 / n)
    gram = torch.bmm(x.mT, x)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    root = (diagonal / (n - 1)).add_(eps).sqrt_()  # (2, D)
    diagonal.zero_()
    difference = torch.sub(*z.unbind())
    share = cov / (D * (n - 1) ** 2)
    loss = share * gram.square().sum()
    loss.add_((1 - root).relu_().sum(), alpha=std / (2 * D))
    loss.add_(difference.square().sum(), alpha=sim / (n * D))
    if not any(needs):
        return loss, None, None
    gram.mul_(4 * share)
    diagonal.add_((root < 1) / root, alpha=-std / (2 * D * (n - 1)))
    dz_a, dz_b = torch.bmm(x, gram).unbind()
    dz_a.add_(difference, alpha=2 * sim / (n * D))
    dz_b.sub_(difference, alpha=2 * sim / (n * D))
    return loss, *(dz if need else None for dz, need in zip((dz_a, dz_b), needs, strict=True))


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
        only where one block holds a view's. On a CPU D^2 also where N < D, of small views, and
        where a few columns outweigh all others.

    Notes: where N < D by X X^T, whose rows are gathered in blocks of columns over several ranks,
        in the backward again; else by X^T X, which is all-reduced. X X^T loses digits of
        covariances that are small beside the variances: a CPU takes X^T X then, a GPU does not
        look. Every statistic is that of the rows of all ranks. Products in float32, the loss in
        float64, of small views on a CPU in float32; autocast has no effect. Deterministic.
        Gradients over several ranks as in `info_nce`.

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
    n, shards = check_views(name, z_a, z_b, group, sim=sim, std=std, cov=cov, eps=eps)
    if z_b is z_a:
        z_b = z_a.view_as(z_a)
    if shards is None and is_small(z_a):
        return with_gradient(name, _vicreg_small, (z_a, z_b), sim, std, cov, eps)
    return VICReg.apply(z_a, z_b, sim, std, cov, eps, n, shards)
